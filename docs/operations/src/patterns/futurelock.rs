//! The futurelock: a lock held while a future is set aside
//!
//! A future that is neither polled nor dropped keeps what it holds. `select!` over `&mut future` sets it aside, and so does
//! a busy consumer of `buffer_unordered`. A task that then waits for the same lock waits for ever. `suspended` keeps the
//! operation alive at each await while a rival runs. Taking the lock only after the wait is not enough: a future in the queue
//! of an async lock is handed the lock even while it is set aside. Take a `std` lock between two awaits, or give the
//! holder a task of its own, which goes on when nobody polls it.

use std::sync::{Mutex as StdMutex, PoisonError};
use std::time::Duration;

use cancel_safe_testing::{Explore, Report};
use tokio::sync::Mutex;
use tokio::time::sleep;

// Broken:
async fn refresh_bad(cache: &Mutex<u32>) {
    let mut cache = cache.lock().await;
    *cache = fetch().await;
}

// Mended:
async fn refresh_good(cache: &StdMutex<u32>) {
    let fresh = fetch().await; // waits without the lock
    *cache.lock().unwrap_or_else(PoisonError::into_inner) = fresh;
}

// Judged:
async fn fetch() -> u32 {
    sleep(Duration::from_millis(10)).await;
    7
}

pub(super) fn broken() -> Report {
    Explore::new().paused_time(true).suspended(
        async || Mutex::new(0),
        refresh_bad,
        async |cache| *cache.lock().await,
        async |_cache, _outcome, _seen| Ok(()),
    )
}

pub(super) fn mended() -> Report {
    Explore::new().paused_time(true).suspended(
        async || StdMutex::new(0),
        refresh_good,
        async |cache| *cache.lock().unwrap_or_else(PoisonError::into_inner),
        async |_cache, _outcome, _seen| Ok(()),
    )
}
