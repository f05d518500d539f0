//! The monitor that the end of an application is made of, under a name of its own.
//!
//! The test of the interleavings compiles `stages` a second time, beside a `sync` that is made of loom's types. So
//! `stages` uses nothing of this crate but this file.
//!
//! Invariant: every change made under the lock and then announced is seen by every thread that waits.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// A value that threads change and wait for.
#[derive(Debug, Default)]
pub(crate) struct Monitor<T> {
    value: Mutex<T>,
    changed: Condvar,
}

impl<T> Monitor<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { value: Mutex::new(value), changed: Condvar::new() }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        // No code of the user's runs under this lock, so a poisoned one holds a sound value.
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes every thread that waits. To be called after a change.
    pub(crate) fn announce(&self) {
        self.changed.notify_all();
    }

    /// Waits for an announcement; returns true instead once `deadline` has passed. May return for no reason.
    pub(crate) fn wait<'a>(&'a self, value: MutexGuard<'a, T>, deadline: Option<Instant>) -> (MutexGuard<'a, T>, bool) {
        let Some(deadline) = deadline else {
            return (self.changed.wait(value).unwrap_or_else(PoisonError::into_inner), false);
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return (value, true);
        }
        let (value, _) = self.changed.wait_timeout(value, left).unwrap_or_else(PoisonError::into_inner);
        (value, false)
    }
}
