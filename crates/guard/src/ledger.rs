//! The reaper's books. Invariant: every started future is, at each moment, exactly one of running, finished or lost,
//! and it leaves `running` once.
//!
//! The tests compile this file a second time, as the child of a module whose `sync` is built from loom's types, and
//! explore the interleavings of its threads. So it uses nothing of this crate but its sibling `sync`.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use super::sync::{AtomicUsize, Notify};

/// Counters that only grow. The number of running futures is derived, so that no reader can catch a future between two
/// counters.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    started: AtomicUsize,
    finished: AtomicUsize,
    lost: AtomicUsize,
    /// How many callers of [`Ledger::idle`] sleep. It saves the many ending futures the lock inside `Notify`.
    waiting: AtomicUsize,
    idle: Notify,
}

impl Ledger {
    /// An entry for a future that has not been started.
    #[inline]
    pub(crate) fn entry(self: &Arc<Self>) -> Entry {
        Entry { ledger: Arc::clone(self), state: State::Blank }
    }

    /// The outcome of everything started so far.
    ///
    /// The ends are read before the starts. A start cannot follow its end, so the difference is never negative, and if
    /// it is zero, nothing was running when `started` was read.
    pub(crate) fn balance(&self) -> Balance {
        let finished = self.finished.load(SeqCst);
        let lost = self.lost.load(SeqCst);
        let running = self.started.load(SeqCst) - finished - lost;
        Balance { running, finished, lost }
    }

    /// Waits until nothing is running.
    pub(crate) async fn idle(&self) {
        // Announced before the books are read, so that a future whose end is not in the books yet sees this number and
        // wakes us.
        let _waiting = Waiting::new(&self.waiting);
        loop {
            let notified = self.idle.notified();
            if self.balance().running == 0 {
                return;
            }
            notified.await;
        }
    }

    #[inline]
    fn end(&self, outcome: &AtomicUsize) {
        outcome.fetch_add(1, SeqCst);
        if self.waiting.load(SeqCst) > 0 {
            self.idle.notify_waiters();
        }
    }
}

/// The books at one moment. The sum is the number of started futures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Balance {
    pub(crate) running: usize,
    pub(crate) finished: usize,
    pub(crate) lost: usize,
}

/// The entry of one future. It is blank until the future is started. Then it ends as finished, or as lost if it is
/// dropped in any other way.
#[derive(Debug)]
pub(crate) struct Entry {
    ledger: Arc<Ledger>,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Blank,
    Running,
    Ended,
}

impl Entry {
    /// Counts the start, the first time that it is called.
    #[inline]
    pub(crate) fn start(&mut self) {
        if self.state == State::Blank {
            self.state = State::Running;
            self.ledger.started.fetch_add(1, SeqCst);
        }
    }

    #[inline]
    pub(crate) fn is_running(&self) -> bool {
        self.state == State::Running
    }

    /// Hands the entry over to a new owner, and leaves an ended one behind.
    pub(crate) fn take(&mut self) -> Self {
        Self { ledger: Arc::clone(&self.ledger), state: mem::replace(&mut self.state, State::Ended) }
    }

    #[inline]
    pub(crate) fn finish(&mut self) {
        self.state = State::Ended;
        self.ledger.end(&self.ledger.finished);
    }
}

impl Drop for Entry {
    #[inline]
    fn drop(&mut self) {
        if self.is_running() {
            #[cfg(feature = "tracing")]
            tracing::warn!("a future of the reaper was lost: it panicked, or its runtime went before it finished");
            self.ledger.end(&self.ledger.lost);
        }
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, SeqCst);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}
