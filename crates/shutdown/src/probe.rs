//! Whether the runtime still runs anything, asked from outside of it by tasks that do nothing.
//!
//! Each of them wakes a thread of the runtime as well. One that holds the timers while it polls a task for ever would
//! otherwise keep the others asleep (tokio#4730). Invariant: at most one of them is on its way for each thread that asks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;

/// How often the runtime is asked while an application stops.
pub(crate) const TICK: Duration = Duration::from_millis(20);

/// Counts the questions and the answers.
#[derive(Debug, Default)]
pub(crate) struct Probe {
    asked: AtomicU64,
    answered: Arc<AtomicU64>,
}

impl Probe {
    /// Asks, unless the answer to the last question is still to come. For one thread.
    pub(crate) fn ask(&self, runtime: &Handle) {
        if self.open() == 0 {
            self.ask_for(runtime, || {});
        }
    }

    /// Asks, and has the answer told by `tell`, which is dropped unused with a runtime that ends.
    pub(crate) fn ask_for(&self, runtime: &Handle, tell: impl FnOnce() + Send + 'static) {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let answered = Arc::clone(&self.answered);
        drop(runtime.spawn(async move {
            answered.fetch_add(1, Ordering::Relaxed);
            tell();
        }));
    }

    /// How many questions have been answered.
    pub(crate) fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// How many are on their way.
    pub(crate) fn open(&self) -> u64 {
        self.asked.load(Ordering::Relaxed).saturating_sub(self.answered())
    }
}
