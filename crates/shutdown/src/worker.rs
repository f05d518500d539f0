//! A worker's own groups, and a single worker without an application. Invariant: the tasks in a worker's groups are
//! told to stop, cut and reported with the worker, and a single worker is aborted with its handle.

use std::panic::Location;

use tokio_util::sync::CancellationToken;

use crate::context::WorkerContext;
use crate::group::TaskGroup;
use crate::result::Rejected;
use crate::task::{TaskOutcome, WorkerOutput};

impl WorkerContext {
    /// Creates a group for the worker's own tasks. It is stopped with the worker, cut with the worker, and listed in
    /// the report.
    ///
    /// The worker holds the group. Dropping it cancels its tasks, so the worker must wait for it before it returns.
    pub fn group(&self) -> TaskGroup {
        TaskGroup::below(self.node(), self.name().to_owned())
    }

    /// A group that takes tasks until it is dropped, even after the worker has been told to stop.
    #[cfg(feature = "tower")]
    pub(crate) fn streams_group(&self) -> TaskGroup {
        TaskGroup::lingering_below(self.node(), self.name().to_owned())
    }

    /// Creates a similar but [discarding](TaskGroup::discarding) group, for example for a server's connections.
    pub fn discarding_group(&self) -> TaskGroup {
        TaskGroup::discarding_below(self.node(), self.name().to_owned())
    }
}

/// One worker without an [`Application`](crate::Application): a name, a token and a task.
///
/// Dropping it aborts the task at its next await.
///
/// # Examples
///
/// ```
/// use cancel_safe_shutdown::BackgroundWorker;
/// use tokio_util::sync::CancellationToken;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let token = CancellationToken::new();
/// let mut worker = BackgroundWorker::new("metrics", token.clone());
/// worker.start(|token: CancellationToken| async move { token.cancelled().await })?;
///
/// token.cancel();
/// assert!(worker.join().await.is_completed());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a worker that is dropped is aborted"]
pub struct BackgroundWorker {
    name: String,
    token: CancellationToken,
    group: TaskGroup,
}

impl BackgroundWorker {
    /// Names a worker that stops when `token` is cancelled. Nothing runs yet.
    pub fn new(name: impl Into<String>, token: CancellationToken) -> Self {
        Self { name: name.into(), token, group: TaskGroup::new() }
    }

    /// Returns the name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Starts the worker.
    ///
    /// # Errors
    ///
    /// If the worker has not ended, it is not started again: the error returns `work`, never called.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    #[track_caller]
    pub fn start<W, F>(&mut self, work: W) -> Result<(), Rejected<W>>
    where
        W: FnOnce(CancellationToken) -> F + Send + 'static,
        F: Future + Send + 'static,
        F::Output: WorkerOutput,
    {
        if !self.group.is_empty() {
            return Err(Rejected::new(self.name.clone(), work));
        }
        let (token, spawned_at) = (self.token.clone(), Location::caller());
        // A new group each time, so that an outcome left behind by an earlier run is never taken for this run's.
        self.group = TaskGroup::new();
        let run = move |_| async move { work(token).await.into_result() };
        self.group
            .spawn_contextual(self.name.clone().into(), spawned_at, run)
            .map_err(|_| unreachable!("the group was opened two lines above and nobody else knows it"))
    }

    /// Waits for the worker to end. A worker that was never started counts as cancelled.
    ///
    /// It waits as long as the worker takes. The caller can cancel the worker's token; a timeout around this call
    /// aborts the worker.
    ///
    /// # Cancel safety
    ///
    /// This method is not cancel safe. If dropped, the worker is aborted at its current await and its outcome is lost.
    pub async fn join(mut self) -> TaskOutcome {
        self.group.join_next().await.map_or(TaskOutcome::Cancelled, |(_, outcome)| outcome)
    }
}
