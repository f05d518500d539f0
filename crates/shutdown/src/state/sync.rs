//! The monitor under the end of an application, in a file of its own.
//!
//! The test of the interleavings compiles `stages` a second time, beside a `sync` that is built from loom's types. So
//! `stages` uses nothing of this crate but this file.
//!
//! Invariant: every waiting thread sees every change that was made under the lock and then announced.

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
        // None of the user's code runs under this lock, so a poisoned lock holds a sound value.
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes every waiting thread. Call it after a change.
    pub(crate) fn announce(&self) {
        self.changed.notify_all();
    }

    /// Waits for an announcement; returns true instead once `deadline` has passed. It may wake spuriously.
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
