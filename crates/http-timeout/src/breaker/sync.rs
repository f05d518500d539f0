//! The locks and atomics of the state machine, in a file of their own.
//!
//! The test of the interleavings compiles `circuit`, `probes`, `silence` and `window` a second time, beside another
//! `sync` that is built from loom's types. So these four use nothing of this crate but each other and this file.
//!
//! Invariant: all of them are the standard library's, so nothing here depends on a runtime.

use std::cell::Cell;

pub(crate) use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU64, AtomicUsize},
};

/// A small number that differs from thread to thread, the same for the life of a thread.
#[inline]
pub(crate) fn thread_index() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static INDEX: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    // A permit dropped while its thread is being torn down has no thread-locals any more.
    let Ok(index) = INDEX.try_with(Cell::get) else { return 0 };
    if index != usize::MAX {
        return index;
    }
    let index = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    // The thread-local cannot be gone, because it was there just now.
    INDEX.try_with(|kept| kept.set(index)).unwrap_or_default();
    index
}
