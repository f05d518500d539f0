//! What is no mistake: a lock guard, a permit
//!
//! It is often said that a dropped future may leave a mutex locked or a permit taken. It does not: both are given back by
//! the destructor of their guard, which runs when the future is dropped, at any await. What the lock protects may be half
//! changed; that is [half of a change](#half-of-a-change). Calling `forget` on a permit is [accounting](#a-count-that-never-comes-down).

use std::time::Duration;

use cancel_safe_testing::{Explore, Report};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::sleep;

// Broken:
async fn deadlock_risk(state: &State) {
    let _guard = state.mutex.lock().await;
    risky_operation().await;
}

// Mended:
async fn process_bad(state: &State) {
    let permit = state.semaphore.acquire().await.expect("it is never closed");
    risky_operation().await;
    drop(permit);
}

async fn process_good(state: &State) {
    let _permit = state.semaphore.acquire().await.expect("it is never closed");
    risky_operation().await;
}

// Judged:
struct State {
    mutex: Mutex<()>,
    semaphore: Semaphore,
}

async fn risky_operation() {
    sleep(Duration::from_millis(10)).await;
}

fn explore(operation: impl AsyncFn(&State)) -> Report {
    Explore::new().paused_time(true).run(
        async || State { mutex: Mutex::new(()), semaphore: Semaphore::new(1) },
        operation,
        async |state, _outcome| match (state.mutex.try_lock(), state.semaphore.available_permits()) {
            (Ok(_), 1) => Ok(()),
            (lock, permits) => Err(format!("the lock is {lock:?}, and {permits} permits are free")),
        },
    )
}

pub(super) fn broken() -> Report {
    explore(deadlock_risk)
}

pub(super) fn mended() -> Report {
    explore(async |state| {
        process_bad(state).await;
        process_good(state).await;
    })
}
