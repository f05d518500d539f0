//! The commit gate, and the blocking job that must pass it.
//!
//! Invariant: once the future that waits for a job has been dropped, the job changes nothing that a user can see.
//! `spawn_blocking` alone does not guarantee that: its closure keeps running after its future is gone.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
#[cfg(feature = "json")]
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::Error;

/// How much is written between two checks of the gate, and how much a writer buffers.
pub(crate) const CHUNK_BYTES: usize = 1 << 20;

/// The state of an operation with respect to the one call that users can see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing is visible yet; either side may move on from here.
    Pending,
    /// The job is inside the visible call.
    Renaming,
    /// The visible call has been made. If what follows fails, the job undoes it, unless a caller was told that it
    /// stays.
    #[cfg_attr(not(unix), expect(dead_code, reason = "only transactions have more to do"))]
    Settled,
    /// The visible call has been made. Final.
    Done,
    /// The visible call will never be made. Final.
    Cancelled,
}

/// Decides, once and for both sides, whether a job may make its visible call.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
    left: Condvar,
    /// Whether a caller has waited for `left`; changed and read only while `state` is locked. A notification is a
    /// system call even if nothing waits.
    is_awaited: AtomicBool,
    /// After this time the gate is closed. The job checks it itself, because a timer is coarse and an executor may be
    /// late.
    deadline: Option<Instant>,
}

impl Gate {
    pub(crate) fn new() -> Arc<Self> {
        Self::with_deadline(None)
    }

    /// A gate that closes by itself at `deadline`.
    pub(crate) fn with_deadline(deadline: Option<Instant>) -> Arc<Self> {
        let state = Mutex::new(State::Pending);
        Arc::new(Self { state, left: Condvar::new(), is_awaited: AtomicBool::new(false), deadline })
    }

    /// Asks to make the visible call; `None` if the operation has been cancelled.
    pub(crate) fn enter(&self) -> Option<Passage<'_>> {
        let mut state = self.state();
        if *state == State::Pending && self.is_late() {
            *state = State::Cancelled;
        }
        if *state != State::Pending {
            return None;
        }
        *state = State::Renaming;
        Some(Passage { gate: self, next: State::Pending })
    }

    /// Cancels unless the visible call has been entered; never waits. Returns whether it is cancelled.
    #[cfg(any(unix, feature = "json"))]
    pub(crate) fn try_cancel(&self) -> bool {
        let mut state = self.state();
        if *state == State::Pending {
            *state = State::Cancelled;
        }
        *state == State::Cancelled
    }

    /// Cancels; if the visible call has been entered, waits for that one system call. Returns whether it is cancelled.
    pub(crate) fn cancel(&self) -> bool {
        let state = self.state();
        self.is_awaited.store(true, Ordering::Relaxed);
        let mut state =
            self.left.wait_while(state, |state| *state == State::Renaming).unwrap_or_else(PoisonError::into_inner);
        *state = match *state {
            State::Pending | State::Cancelled => State::Cancelled,
            // From here on a caller may have seen the change and been told that it stays.
            _ => State::Done,
        };
        *state == State::Cancelled
    }

    /// Whether the operation has been cancelled, so that a long job can stop early.
    pub(crate) fn is_cancelled(&self) -> bool {
        *self.state() == State::Cancelled
    }

    /// Whether its deadline is over.
    pub(crate) fn is_late(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Moves to the state `next`, and wakes the callers that wait for it.
    fn leave(&self, next: State) {
        let mut state = self.state();
        *state = next;
        let is_awaited = self.is_awaited.load(Ordering::Relaxed);
        drop(state);
        if is_awaited {
            self.left.notify_all();
        }
    }

    /// The state is one word that is always valid, so a panic while it was locked has broken nothing.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The permission to make the visible call, held while it is made.
///
/// Dropping it without [`done`](Passage::done) says that nothing became visible; so does a panic.
#[derive(Debug)]
#[must_use = "the gate stays open only while the passage is held"]
pub(crate) struct Passage<'a> {
    gate: &'a Gate,
    next: State,
}

impl Passage<'_> {
    /// Says that the visible call has been made.
    pub(crate) fn done(mut self) {
        self.next = State::Done;
    }

    /// Says that the visible call has been made, and releases waiting callers, although the job has more to do; see
    /// [`undo`](Self::undo).
    #[cfg(unix)]
    pub(crate) fn settle(&mut self) {
        self.next = State::Done;
        self.gate.leave(State::Settled);
    }

    /// Asks for permission to undo the visible call. Returns `false` if a caller cancelled after it was settled,
    /// because that caller was told that the change stays.
    #[cfg(unix)]
    pub(crate) fn undo(&mut self) -> bool {
        let mut state = self.gate.state();
        if *state == State::Settled {
            *state = State::Renaming;
        }
        let is_possible = *state == State::Renaming;
        if is_possible {
            self.next = State::Pending;
        }
        is_possible
    }
}

impl Drop for Passage<'_> {
    fn drop(&mut self) {
        self.gate.leave(self.next);
    }
}

/// The work of a job that has not begun. Dropping it drops the files that it would have finished.
type Work<T> = Box<dyn FnOnce(&Gate) -> Result<T, Error> + Send>;

/// A closure on the blocking pool that is cancelled, through its gate, when this future is dropped.
#[must_use = "a job is cancelled when it is dropped"]
pub(crate) struct Job<T> {
    gate: Arc<Gate>,
    path: Arc<Path>,
    handle: JoinHandle<Result<T, Error>>,
    /// Shared with the queue, so that dropping a queued job need not wait for a thread to clean up.
    queued: Arc<Mutex<Option<Work<T>>>>,
    finished: bool,
}

impl<T: Send + 'static> Job<T> {
    /// Queues `work` on the blocking pool of `runtime`; `path` is for errors.
    pub(crate) fn spawn(
        runtime: &Handle,
        gate: &Arc<Gate>,
        path: &Arc<Path>,
        work: impl FnOnce(&Gate) -> Result<T, Error> + Send + 'static,
    ) -> Self {
        let queued = Arc::new(Mutex::new(Some(Box::new(work) as Work<T>)));
        let (inner_gate, inner_path, inner) = (gate.clone(), path.clone(), queued.clone());
        let handle = runtime.spawn_blocking(move || {
            // A job that was cancelled in the queue must not even create its temporary file.
            match take(&inner) {
                Some(work) if !inner_gate.is_cancelled() => work(&inner_gate),
                _ => Err(Error::Interrupted { path: inner_path.to_path_buf() }),
            }
        });
        Self { gate: gate.clone(), path: path.clone(), handle, queued, finished: false }
    }
}

/// The runtime whose blocking pool does the work.
pub(crate) fn current_runtime(path: &Path) -> Result<Handle, Error> {
    Handle::try_current().map_err(|_| Error::NoRuntime { path: path.to_path_buf() })
}

/// Takes the work of a job that has not begun. Nothing panics while it is locked.
fn take<T>(queued: &Mutex<Option<Work<T>>>) -> Option<Work<T>> {
    queued.lock().unwrap_or_else(PoisonError::into_inner).take()
}

impl<T> fmt::Debug for Job<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job").field("path", &self.path).field("gate", &self.gate).finish_non_exhaustive()
    }
}

#[cfg(feature = "json")]
impl<T> Job<T> {
    /// Waits for the job, but cancels it if it has not entered its visible call by the deadline of its gate.
    ///
    /// If the visible call has been entered, this waits for it, because the caller can no longer decide its outcome.
    pub(crate) async fn within(mut self, timeout: Duration) -> Result<T, Error> {
        let Some(deadline) = self.gate.deadline else { return self.await };
        let late = Error::TimedOut { path: self.path.to_path_buf(), timeout };
        let gate = self.gate.clone();
        match tokio::time::timeout_at(deadline, &mut self).await {
            // The job noticed before the timer that it was late.
            Ok(Err(Error::Interrupted { .. })) if gate.is_late() => Err(late),
            Ok(result) => result,
            Err(_) if gate.try_cancel() => {
                if take(&self.queued).is_none() {
                    // Only for the removal of the temporary file; if the disk hangs, the caller's time matters more.
                    let _late_result = tokio::time::timeout(CLEAN_UP_GRACE, self).await;
                }
                Err(late)
            }
            Err(_) => self.await,
        }
    }
}

/// How long a call whose time is up waits for its temporary file to be removed.
#[cfg(feature = "json")]
const CLEAN_UP_GRACE: Duration = Duration::from_millis(100);

impl<T> Future for Job<T> {
    type Output = Result<T, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let joined = ready!(Pin::new(&mut self.handle).poll(cx));
        self.finished = true;
        Poll::Ready(match joined {
            Ok(result) => result,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => {
                drop(take(&self.queued));
                Err(cut_short(&self.gate, &self.path))
            }
        })
    }
}

impl<T> Drop for Job<T> {
    fn drop(&mut self) {
        if !self.finished {
            self.gate.cancel();
            // A queued job ends here, and its files with it, because it may take long until a thread is free.
            drop(take(&self.queued));
            self.handle.abort();
        }
    }
}

/// The error of an operation whose runtime went away. The gate tells the state of the target.
pub(crate) fn cut_short(gate: &Gate, path: &Path) -> Error {
    let path = path.to_path_buf();
    if gate.cancel() {
        Error::Interrupted { path }
    } else {
        Error::NotDurable {
            path,
            source: io::Error::other("the runtime was shut down before the directory was synced"),
        }
    }
}

#[cfg(test)]
mod tests {
    #[cfg(feature = "json")]
    use std::{
        cell::Cell,
        sync::LazyLock,
        sync::mpsc::{Receiver, Sender, channel},
    };

    #[cfg(feature = "json")]
    use cancel_safe_testing::{Explore, Outcome};
    #[cfg(feature = "json")]
    use tokio::runtime::Runtime;

    use super::*;

    #[test]
    fn a_cancelled_gate_lets_nobody_in() {
        let gate = Gate::new();
        assert!(gate.cancel());
        assert!(gate.enter().is_none() && gate.is_cancelled());
    }

    #[test]
    fn a_call_that_was_made_cannot_be_cancelled() {
        let gate = Gate::new();
        gate.enter().expect("nobody has cancelled").done();
        assert!(!gate.cancel() && !gate.is_cancelled());
    }

    #[test]
    fn a_late_job_is_refused_although_nobody_has_cancelled() {
        let gate = Gate::with_deadline(Some(Instant::now()));
        assert!(gate.enter().is_none() && gate.is_cancelled());
    }

    #[test]
    fn a_call_that_failed_can_still_be_cancelled() {
        let gate = Gate::new();
        drop(gate.enter().expect("nobody has cancelled"));
        assert!(gate.cancel());
    }

    #[cfg(unix)]
    #[test]
    fn what_is_settled_is_undone_only_if_nobody_has_left() {
        let gate = Gate::new();
        let mut passage = gate.enter().expect("nobody has cancelled");
        passage.settle();
        assert!(passage.undo());
        drop(passage);
        assert!(gate.cancel(), "it was undone");

        let gate = Gate::new();
        let mut passage = gate.enter().expect("nobody has cancelled");
        passage.settle();
        // It does not wait, although the job is still at work.
        assert!(!gate.cancel(), "it has been made");
        assert!(!passage.undo());
        drop(passage);
        assert!(!gate.cancel());
    }

    #[test]
    fn a_panic_within_the_call_does_not_wedge_the_canceller() {
        let gate = Gate::new();
        let inner = gate.clone();
        let died = std::thread::spawn(move || {
            let _passage = inner.enter();
            panic!("within the visible call");
        });
        assert!(died.join().is_err());
        assert!(gate.cancel());
    }

    #[cfg(feature = "json")]
    #[test]
    fn a_timeout_does_not_wait_for_the_call_that_has_been_entered() {
        let gate = Gate::new();
        let passage = gate.enter().expect("nobody has cancelled");
        assert!(!gate.try_cancel());
        passage.done();
        assert!(!gate.try_cancel());
    }

    /// A job that has begun when its time is up, on another runtime.
    #[cfg(feature = "json")]
    struct Late {
        gate: Arc<Gate>,
        /// Lets the job go on.
        release: Sender<()>,
        released: Cell<Option<Receiver<()>>>,
        /// Whether the job has entered.
        tell: Sender<bool>,
        entered: Receiver<bool>,
    }

    #[cfg(feature = "json")]
    impl Late {
        const LIMIT: Duration = Duration::from_secs(1);

        fn new() -> Self {
            let ((release, released), (tell, entered)) = (channel(), channel());
            let gate = Gate::with_deadline(Instant::now().checked_add(Self::LIMIT));
            Self { gate, release, released: Cell::new(Some(released)), tell, entered }
        }

        /// Waits for `work` as a job, which tells when it has begun.
        async fn within(&self, work: impl FnOnce(&Gate, Sender<()>) + Send + 'static) -> Result<(), Error> {
            static ELSEWHERE: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime"));
            let (begin, begun) = channel();
            let path = Arc::<Path>::from(Path::new("file"));
            let job = Job::spawn(ELSEWHERE.handle(), &self.gate, &path, move |gate| {
                work(gate, begin);
                Ok(())
            });
            begun.recv().expect("the job begins");
            job.within(Self::LIMIT).await
        }
    }

    #[cfg(feature = "json")]
    #[test]
    fn a_job_that_is_late_never_enters_wherever_its_caller_is_dropped() {
        let report = Explore::new().paused_time(true).run(
            async || Late::new(),
            async |late| {
                let released = late.released.take().expect("it is run once");
                let tell = late.tell.clone();
                let work = move |gate: &Gate, begin: Sender<()>| {
                    begin.send(()).expect("the caller waits for it");
                    released.recv().expect("the check releases it");
                    tell.send(gate.enter().is_some()).unwrap_or_default();
                };
                late.within(work).await
            },
            async |late, outcome| {
                late.release.send(()).unwrap_or_default();
                let is_begun = !matches!(outcome, Outcome::Dropped { point: 0, .. });
                let entered = is_begun.then(|| late.entered.recv_timeout(10 * Late::LIMIT));
                match (&outcome, entered) {
                    (Outcome::Completed(Err(Error::TimedOut { .. })), Some(Ok(false))) => Ok(()),
                    (Outcome::Dropped { .. }, None | Some(Ok(false))) => Ok(()),
                    _ => Err(format!("{outcome:?}, and it entered: {entered:?}")),
                }
            },
        );
        report.publish("atomic-fs", "job with a deadline").assert_clean();
    }

    #[cfg(feature = "json")]
    #[test]
    fn a_call_that_was_entered_in_time_is_made_wherever_its_caller_is_dropped() {
        let report = Explore::new().paused_time(true).run(
            async || Late::new(),
            async |late| {
                let tell = late.tell.clone();
                let work = move |gate: &Gate, begin: Sender<()>| {
                    let passage = gate.enter().expect("nobody has cancelled");
                    begin.send(()).expect("the caller waits for it");
                    // The call that users can see takes its time.
                    std::thread::park_timeout(Duration::from_millis(10));
                    tell.send(true).unwrap_or_default();
                    passage.done();
                };
                late.within(work).await
            },
            async |late, outcome| match (&outcome, late.entered.try_recv(), late.gate.is_cancelled()) {
                (Outcome::Completed(Ok(())) | Outcome::Dropped { point: 1.., .. }, Ok(true), false) => Ok(()),
                (Outcome::Dropped { point: 0, .. }, Err(_), false) => Ok(()),
                state => Err(format!("outcome, made, cancelled: {state:?}")),
            },
        );
        report.publish("atomic-fs", "job that is late in its call").assert_clean();
    }

    #[test]
    fn cancel_waits_for_the_call_that_has_been_entered() {
        let gate = Gate::new();
        let passage = gate.enter().expect("nobody has cancelled");
        let inner = gate.clone();
        let canceller = std::thread::spawn(move || inner.cancel());
        passage.done();
        assert!(!canceller.join().expect("cancel does not panic"), "it must see the call that it waited for");
    }
}
