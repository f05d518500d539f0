//! Locks that a panic does not break.
//!
//! Invariant: the values in them are valid after every single assignment.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The values in these locks are valid after every single assignment, so a panic elsewhere does not break them.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
