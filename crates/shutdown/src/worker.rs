//! What a worker holds while it runs, and one worker by hand. A context only tells and marks; it keeps nothing alive.

use std::borrow::Cow;
use std::fmt;
use std::panic::Location;
use std::sync::Arc;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::group::TaskGroup;
use crate::result::Rejected;
use crate::stop::{OwnStop, Stop, StopReason};
use crate::task::{Slot, TaskOutcome, WorkerOutput};
use crate::tree::Node;
use crate::values::Values;

/// What a worker, or a task spawned with a context, knows of its stop. Cheap to clone.
#[derive(Clone)]
pub struct WorkerContext {
    slot: Arc<Slot>,
    stop: Arc<Stop>,
    node: Arc<dyn Node>,
    ready: Option<CancellationToken>,
    values: Option<Arc<Values>>,
}

impl WorkerContext {
    pub(crate) fn new(slot: Arc<Slot>, node: Arc<dyn Node>) -> Self {
        Self { slot, stop: Arc::clone(node.stop()), node, ready: None, values: None }
    }

    /// The context of a worker of an application's.
    pub(crate) fn of_worker(self, ready: CancellationToken, values: Arc<Values>) -> Self {
        Self { ready: Some(ready), values: Some(values), ..self }
    }

    /// Returns the name of the worker or task.
    pub fn name(&self) -> &str {
        &self.slot.name
    }

    /// Waits until the worker is told to stop, and returns at once if it has been.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, nothing has happened: the next call waits for the same.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::time::Duration;
    /// use cancel_safe_shutdown::WorkerContext;
    ///
    /// async fn worker(cx: WorkerContext) {
    ///     let mut tick = tokio::time::interval(Duration::from_secs(1));
    ///     loop {
    ///         tokio::select! {
    ///             () = cx.cancelled() => break,
    ///             _ = tick.tick() => {}
    ///         }
    ///     }
    ///     cx.mark("flush");
    /// }
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
    /// #     let group = cancel_safe_shutdown::TaskGroup::new();
    /// #     group.spawn_with("worker", worker)?;
    /// #     let result = group.shutdown(Duration::from_secs(60)).await;
    /// #     assert_eq!(result.completed, ["worker"]);
    /// #     Ok::<_, Box<dyn std::error::Error>>(())
    /// # })?;
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub async fn cancelled(&self) {
        match self.slot.own_stop() {
            Some(own) => own.cancelled(&self.stop).await,
            None => self.stop.token().cancelled().await,
        }
    }

    /// The same as [`cancelled`](Self::cancelled), for code that keeps what it waits for: the graceful shutdown of a
    /// server, say.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, nothing has happened.
    pub fn cancelled_owned(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        let cx = self.clone();
        async move { cx.cancelled().await }
    }

    /// Returns whether the worker has been told to stop. Two atomic loads.
    pub fn is_cancelled(&self) -> bool {
        self.stop.is_set() || self.slot.own_stop().is_some_and(OwnStop::is_set)
    }

    /// Returns why the worker has been told to stop; `None` exactly while [`is_cancelled`](Self::is_cancelled) is false.
    pub fn reason(&self) -> Option<StopReason> {
        match self.slot.own_stop() {
            Some(own) => own.reason(&self.stop),
            None => self.stop.get().map(|stopping| stopping.reason.clone()),
        }
    }

    /// Returns when the worker will be cut; `None` while it has not been told to stop.
    pub fn deadline(&self) -> Option<Instant> {
        match self.slot.own_stop() {
            Some(own) => own.deadline(&self.stop),
            None => self.stop.get().map(|stopping| stopping.deadline),
        }
    }

    /// Returns a token that is cancelled when the worker is told to stop, for code that takes one.
    ///
    /// Cancelling this token reaches whoever holds it and its children, and not the worker.
    pub fn token(&self) -> CancellationToken {
        match self.slot.own_stop() {
            Some(own) => own.token(&self.stop),
            None => self.stop.token().child_token(),
        }
    }

    /// Says that the worker has started: what a phase with [`ready_within`](crate::Phase::ready_within) waits for.
    ///
    /// Without effect the second time, and in a task of a group.
    pub fn ready(&self) {
        if let Some(ready) = &self.ready {
            ready.cancel();
        }
    }

    /// Returns what an earlier phase [provides](crate::Phase::provide) of this type: a pool of connections, say.
    ///
    /// `None` if none does, when its phase has stopped, and in a task of a group: what a task needs it is given.
    pub fn provided<T: Clone + Send + Sync + 'static>(&self) -> Option<T> {
        self.values.as_ref()?.get()
    }

    pub(crate) fn values(&self) -> Option<&Arc<Values>> {
        self.values.as_ref()
    }

    /// Leaves a mark. The last one is in the report if the worker does not end in time.
    pub fn mark(&self, mark: impl Into<Cow<'static, str>>) {
        self.slot.set_mark(mark.into());
    }

    /// Creates a group for the worker's own tasks: stopped when the worker is, cut when the worker is, and in the report.
    ///
    /// The group is the worker's to hold. Dropping it cancels its tasks, so the worker waits for it before it returns.
    pub fn group(&self) -> TaskGroup {
        TaskGroup::below(&self.node, self.slot.name.clone().into_owned())
    }

    /// A group that takes tasks until it is dropped, also when the worker has been told to stop.
    #[cfg(feature = "tower")]
    pub(crate) fn streams_group(&self) -> TaskGroup {
        TaskGroup::lingering_below(&self.node, self.slot.name.clone().into_owned())
    }

    /// Creates the same kind of group, but a [discarding](TaskGroup::discarding) one: for a server's connections.
    pub fn discarding_group(&self) -> TaskGroup {
        TaskGroup::discarding_below(&self.node, self.slot.name.clone().into_owned())
    }
}

impl fmt::Debug for WorkerContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerContext")
            .field("name", &self.slot.name)
            .field("reason", &self.reason())
            .finish_non_exhaustive()
    }
}

/// One worker by hand, without an [`Application`](crate::Application): a name, a token and a task.
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
    /// A worker that has not ended is not started twice: `work` is handed back, never called.
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
        // A new group each time, so that what an earlier run has left behind is never taken for the outcome of this one.
        self.group = TaskGroup::new();
        let run = move |_| async move { work(token).await.into_result() };
        self.group
            .spawn_contextual(self.name.clone().into(), spawned_at, run)
            .map_err(|_| unreachable!("the group was opened two lines above and nobody else knows it"))
    }

    /// Waits for the worker to end. One that was never started counts as cancelled.
    ///
    /// Waits for as long as the worker takes: its token is the caller's to cancel, and a timeout around this call
    /// aborts it.
    ///
    /// # Cancel safety
    ///
    /// This method is not cancel safe. If dropped, the worker is aborted at its current await and its outcome is lost.
    pub async fn join(mut self) -> TaskOutcome {
        self.group.join_next().await.map_or(TaskOutcome::Cancelled, |(_, outcome)| outcome)
    }
}
