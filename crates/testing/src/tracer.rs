//! The waker that notices when it is cloned, and so learns where an operation waits.
//!
//! Invariant: a trace is taken only while the operation is being polled, on the thread that polls it.
//!
//! A leaf future stores a clone of the waker before it returns `Pending`. The stack at that clone runs from the leaf
//! through every `async fn` to the operation, so it names the await. The waker is made from a `Box`, not an `Arc`, for
//! two reasons: cloning a `Box` runs our `Clone`, and a boxed waker never equals its clone under `Waker::will_wake`,
//! so a leaf that would keep an old waker that "would wake the same" clones it again at each poll.
//!
//! `cooked-waker` rebuilds the `Box` from the raw pointer at each call, possibly on two threads at once. That is
//! sound as long as nothing is written through the box: [`Probe`] holds one immutable `Arc` and has no interior
//! mutability of its own.

use std::backtrace::Backtrace;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::thread::{self, ThreadId};

use cooked_waker::{IntoWaker, Wake, WakeRef};

use crate::lock::lock;
use crate::torn;

/// If a poll clones its waker more often (a join of hundreds), only its first and last clones are traced.
const TRACES_PER_POLL: usize = 8;

/// The payload of the panic that `Way::Panic` raises at its point.
#[derive(Debug)]
pub(crate) struct PointPanic;

/// What to do when the operation's leaf clones the waker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnClone {
    Nothing,
    Trace,
    TraceAndPanic,
}

#[derive(Debug, Default)]
pub(crate) struct Tracer {
    shared: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    /// The task that drives the operation.
    driver: Option<Waker>,
    woken: bool,
    /// Set during a poll: the polling thread, and what to do on a clone.
    polling: Option<(ThreadId, OnClone)>,
    traces: Vec<Backtrace>,
}

impl Tracer {
    /// Polls with the noticing waker. `driver` is woken when the operation is woken.
    pub(crate) fn poll<T>(
        &self,
        driver: &Waker,
        on_clone: OnClone,
        poll: impl FnOnce(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        {
            let mut state = lock(&self.shared);
            state.driver = Some(driver.clone());
            state.woken = false;
            state.traces.clear();
            state.polling = Some((thread::current().id(), on_clone));
        }
        let _disarm = Disarm(&self.shared);
        let waker = Box::new(Probe { shared: Arc::clone(&self.shared) }).into_waker();
        poll(&mut Context::from_waker(&waker))
    }

    /// Whether the operation was ever polled.
    pub(crate) fn has_polled(&self) -> bool {
        lock(&self.shared).driver.is_some()
    }

    /// Whether the operation has been woken since its last poll.
    pub(crate) fn is_woken(&self) -> bool {
        lock(&self.shared).woken
    }

    /// Keeps the traces of a poll for later.
    pub(crate) fn put_back(&self, traces: Vec<Backtrace>) {
        lock(&self.shared).traces = traces;
    }

    /// The traces of the last poll, oldest first.
    pub(crate) fn take_traces(&self) -> Vec<Backtrace> {
        std::mem::take(&mut lock(&self.shared).traces)
    }
}

/// Ends the noticing with the poll, even if the poll unwinds.
struct Disarm<'a>(&'a Mutex<State>);

impl Drop for Disarm<'_> {
    fn drop(&mut self) {
        lock(self.0).polling = None;
    }
}

/// The data behind the waker.
#[derive(Debug)]
struct Probe {
    shared: Arc<Mutex<State>>,
}

impl Probe {
    fn notice(&self) {
        let Some((thread, on_clone)) = lock(&self.shared).polling else { return };
        if on_clone == OnClone::Nothing || thread != thread::current().id() || thread::panicking() {
            return;
        }
        // Taken outside the lock: walking the stack is slow, and other threads may wake us meanwhile.
        let trace = Backtrace::force_capture();
        {
            let mut state = lock(&self.shared);
            if state.traces.len() == TRACES_PER_POLL {
                state.traces.truncate(TRACES_PER_POLL - 1);
            }
            state.traces.push(trace);
        }
        if on_clone == OnClone::TraceAndPanic {
            torn::panics();
            // Without the panic hook: this panic is the experiment, not a message for anybody.
            resume_unwind(Box::new(PointPanic));
        }
    }
}

impl Clone for Probe {
    fn clone(&self) -> Self {
        self.notice();
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl WakeRef for Probe {
    fn wake_by_ref(&self) {
        // A leaf that only yields wakes at once and never clones.
        self.notice();
        let driver = {
            let mut state = lock(&self.shared);
            state.woken = true;
            state.driver.clone()
        };
        if let Some(driver) = driver {
            driver.wake();
        }
    }
}

impl Wake for Probe {}
