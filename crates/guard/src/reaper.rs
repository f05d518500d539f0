//! Work that outlives its caller. Invariant: work that was polled once is finished, still running, or counted as lost;
//! it never disappears silently.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::runtime::Handle;

use crate::ledger::{Balance, Entry, Ledger};

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Owns work that must finish even if its caller is dropped.
///
/// A clone shares its books with the original. Keep one reaper per application, hand out clones, and call
/// [`drain`](Reaper::drain) once before the runtime ends. Dropping a reaper stops nothing.
///
/// # Limitations
///
/// - The reaper does not limit how much runs at once, because each future belongs to a call that was made. If callers
///   can start and abandon calls faster than the calls finish, move a semaphore's permit into the future.
/// - A future that blocks its thread, or never finishes, counts as `timed_out`. It is not aborted.
/// - Work that continues as a task loses the task-locals and the `tracing` span of its caller: see
///   [`shield`](Reaper::shield).
///
/// # Comparison to `tokio::spawn` and `TaskTracker`
///
/// `tokio::spawn(work).await` also survives its caller. But each call costs a task and two trips through the scheduler,
/// and nothing counts the tasks that the runtime cuts off at its shutdown. A shield runs in the caller's own task and
/// becomes a task only when it is abandoned. `tokio_util::task::TaskTracker` can wait for tasks, but does not know
/// which of them panicked or were cut off.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use cancel_safe_guard::Reaper;
/// use tokio::time::{sleep, timeout};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
/// let reaper = Reaper::new();
/// let commit = reaper.shield(async {
///     sleep(Duration::from_secs(2)).await;
///     "committed"
/// });
///
/// // The caller gives up after one second, the commit does not.
/// assert!(timeout(Duration::from_secs(1), commit).await.is_err());
///
/// let drain = reaper.drain(Duration::from_secs(5)).await;
/// assert_eq!((drain.finished, drain.timed_out, drain.lost), (1, 0, 0));
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Reaper {
    ledger: Arc<Ledger>,
}

impl Reaper {
    /// Creates a reaper. This needs no runtime: each future is bound to the runtime that polls it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Protects `future` from its caller's end.
    ///
    /// The shield is polled inline, in the task of its caller. If it is dropped before its first poll, `future` never
    /// runs. If it is dropped later but before completion, `future` continues as a task on the runtime of its first
    /// pending poll, and its output is dropped. If that poll ran outside any runtime, the task runs on the runtime
    /// around the drop.
    ///
    /// # Task-locals and spans
    ///
    /// A value of `tokio::task_local!` is visible inside its `scope`, and an abandoned shield becomes a task outside
    /// it. `with` and `get` panic there, and the work counts as [`lost`](Drain::lost). The shield cannot take the
    /// values along, because only code that knows their names can read them. So put the scope inside:
    ///
    /// ```
    /// use std::time::Duration;
    /// use cancel_safe_guard::Reaper;
    /// use tokio::time::{sleep, timeout};
    ///
    /// tokio::task_local! { static USER: u32; }
    ///
    /// async fn handle(reaper: &Reaper) {
    ///     let work = async {
    ///         sleep(Duration::from_secs(2)).await;
    ///         assert_eq!(USER.get(), 7);
    ///     };
    ///     reaper.shield(USER.scope(USER.get(), work)).await;
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
    /// let reaper = Reaper::new();
    /// let request = USER.scope(7, handle(&reaper));
    /// assert!(timeout(Duration::from_secs(1), request).await.is_err());
    /// assert!(reaper.drain(Duration::from_secs(5)).await.is_clean());
    /// # }
    /// ```
    ///
    /// The current span of `tracing` is lost, too, and without an error. Keep it with
    /// `shield(work.instrument(Span::current()))`.
    ///
    /// # Cancel safety
    ///
    /// Once polled, it runs to completion even if dropped. `future` cannot finish, and counts as [`lost`](Drain::lost),
    /// if it panics, if its runtime is shut down, or if there is no runtime at its first poll or where it is dropped. A
    /// shield dropped before its first poll has not run at all.
    ///
    /// # Panics
    ///
    /// The shield panics if it is polled again after it has returned its output.
    ///
    /// # Examples
    ///
    /// ```
    /// # use cancel_safe_guard::Reaper;
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// let reaper = Reaper::new();
    /// assert_eq!(reaper.shield(async { 6 * 7 }).await, 42);
    /// # }
    /// ```
    pub fn shield<F, T>(&self, future: F) -> Shield<T>
    where
        F: Future<Output = T> + Send + 'static,
        T: Send + 'static,
    {
        Shield { future: Some(Box::pin(future)), entry: self.ledger.entry(), runtime: None }
    }

    /// Prepares an asynchronous cleanup that runs when the returned [`Deferred`] is dropped.
    ///
    /// The cleanup runs as a task on the runtime around this call or, if there is none, on the runtime around the drop.
    /// Without either it cannot run and counts as [`lost`](Drain::lost). Nothing is counted before the drop. The
    /// cleanup sees only the task-locals that it sets itself, as in [`shield`](Reaper::shield).
    ///
    /// # Examples
    ///
    /// ```
    /// use std::time::Duration;
    /// use cancel_safe_guard::Reaper;
    /// use tokio::sync::mpsc;
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// let (released, mut log) = mpsc::channel(1);
    /// let reaper = Reaper::new();
    ///
    /// let lease = reaper.defer(|| async move {
    ///     released.send("lease 7").await.unwrap_or_default()
    /// });
    /// drop(lease);
    ///
    /// assert!(reaper.drain(Duration::from_secs(5)).await.is_clean());
    /// assert_eq!(log.recv().await, Some("lease 7"));
    /// # }
    /// ```
    pub fn defer<C, Fut>(&self, cleanup: C) -> Deferred
    where
        C: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        // The caller's closure is called inside the future, so that its panic ends that task and not the drop.
        let cleanup: BoxFuture<()> = Box::pin(async move { cleanup().await });
        Deferred { reaper: self.clone(), runtime: Handle::try_current().ok(), cleanup: Some(cleanup) }
    }

    /// Waits until all started work has ended, for at most `grace`, and says how it ended.
    ///
    /// Call it after the last caller has been stopped and before the runtime ends. It also waits for work that starts
    /// during the wait. A shield that its caller still polls counts as running. The totals cover the time since the
    /// reaper was created: their sum is the number of all futures ever started, and a second drain counts work that was
    /// late the first time as finished. Work that is not done by `grace` keeps running; nothing is aborted.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. It only waits; it starts, stops and counts nothing.
    ///
    /// # Panics
    ///
    /// Panics if it has to wait outside a tokio runtime with its timer enabled.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::time::Duration;
    /// use cancel_safe_guard::Reaper;
    /// use tokio::time::{sleep, timeout};
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
    /// let reaper = Reaper::new();
    /// for seconds in [1, 60] {
    ///     let work = reaper.shield(sleep(Duration::from_secs(seconds)));
    ///     assert!(timeout(Duration::ZERO, work).await.is_err());
    /// }
    /// let drain = reaper.drain(Duration::from_secs(10)).await;
    /// assert_eq!((drain.finished, drain.timed_out), (1, 1));
    /// assert!(!drain.is_clean());
    /// # }
    /// ```
    pub async fn drain(&self, grace: Duration) -> Drain {
        let books = self.ledger.balance();
        if books.running == 0 {
            return books.into();
        }
        // The books are read again, because work may have ended in the same instant as the grace.
        match tokio::time::timeout(grace, self.ledger.idle()).await {
            Ok(()) | Err(_) => self.ledger.balance().into(),
        }
    }
}

/// Hands an abandoned future to a runtime. Without one, or when it is shut down, dropping `entry` counts the loss.
fn hand_over<T: Send + 'static>(runtime: Option<Handle>, entry: Entry, future: BoxFuture<T>) {
    let Some(runtime) = runtime.or_else(|| Handle::try_current().ok()) else {
        return;
    };
    drop(runtime.spawn(go_on(entry, future)));
}

/// The task in which an abandoned future continues. If dropped with its runtime, it counts the loss.
async fn go_on<T>(mut entry: Entry, future: BoxFuture<T>) {
    // The output may have a destructor, which must run before the books say that the future is finished.
    drop(future.await);
    entry.finish();
}

/// A future that finishes even if its caller is dropped; made by [`Reaper::shield`].
///
/// If it is dropped after its first poll, it continues as a task; if it is dropped before that, it never runs. The task
/// does not see the caller's task-locals and span, unless they are [put inside](Reaper::shield).
#[must_use = "a shield that is never polled never runs"]
pub struct Shield<T: Send + 'static> {
    /// Taken out during a poll and after the end: if the future panics, that poll drops it, and it is not handed over
    /// to panic again.
    future: Option<BoxFuture<T>>,
    entry: Entry,
    runtime: Option<Handle>,
}

impl<T: Send + 'static> Future for Shield<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let mut future = self.future.take().expect("a shield that has returned is not polled again");
        self.entry.start();
        let polled = future.as_mut().poll(cx);
        if polled.is_ready() {
            drop(future);
            self.entry.finish();
            return polled;
        }
        if self.runtime.is_none() {
            self.runtime = Handle::try_current().ok();
        }
        self.future = Some(future);
        polled
    }
}

impl<T: Send + 'static> Drop for Shield<T> {
    fn drop(&mut self) {
        if let Some(future) = self.future.take()
            && self.entry.is_running()
        {
            hand_over(self.runtime.take(), self.entry.take(), future);
        }
    }
}

impl<T: Send + 'static> fmt::Debug for Shield<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shield").field("running", &self.entry.is_running()).finish_non_exhaustive()
    }
}

/// An asynchronous cleanup that runs on drop unless it is disarmed; made by [`Reaper::defer`].
///
/// Dropping it hands the cleanup to the runtime and returns at once; [`Reaper::drain`] waits for its end.
#[must_use = "dropping it at once runs the cleanup at once"]
pub struct Deferred {
    reaper: Reaper,
    runtime: Option<Handle>,
    cleanup: Option<BoxFuture<()>>,
}

impl Deferred {
    /// Drops the cleanup without running or counting it.
    pub fn disarm(mut self) {
        self.cleanup = None;
    }

    /// Runs the cleanup now and waits for its end.
    ///
    /// # Cancel safety
    ///
    /// Once polled, it runs to completion even if dropped. If dropped before its first poll, the [`Deferred`] itself is
    /// dropped: the cleanup runs as a task.
    ///
    /// # Examples
    ///
    /// ```
    /// # use cancel_safe_guard::Reaper;
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// let reaper = Reaper::new();
    /// let lease = reaper.defer(|| async { /* tell the server */ });
    /// lease.run().await;
    /// # }
    /// ```
    pub async fn run(mut self) {
        if let Some(cleanup) = self.cleanup.take() {
            self.reaper.shield(cleanup).await;
        }
    }
}

impl Drop for Deferred {
    fn drop(&mut self) {
        if let Some(cleanup) = self.cleanup.take() {
            let mut entry = self.reaper.ledger.entry();
            entry.start();
            hand_over(self.runtime.take(), entry, cleanup);
        }
    }
}

impl fmt::Debug for Deferred {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deferred").field("armed", &self.cleanup.is_some()).finish_non_exhaustive()
    }
}

/// How the work of a [`Reaper`] has ended. The sum of the three counts is the number of all futures started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "what timed out or was lost is reported here and nowhere else"]
#[non_exhaustive]
pub struct Drain {
    /// Ran to completion, inline or after its caller was dropped.
    pub finished: usize,
    /// Still running when the grace was over.
    pub timed_out: usize,
    /// Panicked, was cut off by the shutdown of its runtime, or had no runtime to continue on.
    pub lost: usize,
}

impl From<Balance> for Drain {
    fn from(Balance { running, finished, lost }: Balance) -> Self {
        Self { finished, timed_out: running, lost }
    }
}

impl Drain {
    /// Returns whether all started work has finished: nothing is running and nothing was lost.
    ///
    /// # Examples
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use cancel_safe_guard::Reaper;
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// assert!(Reaper::new().drain(Duration::ZERO).await.is_clean());
    /// # }
    /// ```
    pub fn is_clean(&self) -> bool {
        self.timed_out == 0 && self.lost == 0
    }
}

#[cfg(test)]
mod tests {
    use futures_util::poll;
    use tokio::time::sleep;

    use super::*;

    /// The books of an abandoned future whose task is dropped after `polls` polls, or ends.
    async fn left_after(polls: Option<usize>) -> (usize, usize, usize) {
        let reaper = Reaper::new();
        let mut entry = reaper.ledger.entry();
        entry.start();
        let mut task = Box::pin(go_on(entry, Box::pin(sleep(Duration::from_secs(1)))));
        match polls {
            None => task.await,
            Some(polls) => {
                for _ in 0..polls {
                    assert!(poll!(task.as_mut()).is_pending());
                }
                drop(task);
            }
        }
        let Drain { finished, timed_out, lost } = reaper.drain(Duration::ZERO).await;
        (finished, timed_out, lost)
    }

    // Done by hand, because `testing` depends on this crate, and could not be a dependency of its tests in a tarball.
    #[tokio::test(start_paused = true)]
    async fn an_abandoned_future_that_is_dropped_with_its_task_is_counted_as_lost() {
        assert_eq!(left_after(None).await, (1, 0, 0));
        for polls in 0..3 {
            assert_eq!(left_after(Some(polls)).await, (0, 0, 1));
        }
    }
}
