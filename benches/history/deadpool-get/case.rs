//! deadpool's `get`, dropped while it makes an object, again and again: does a pool of two still make one?
//!
//! One drop shows nothing, because there is another place.

#[path = "../verdict.rs"]
mod verdict;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cancel_safe_testing::Explore;
use tokio::time::sleep;

/// How many objects a pool has room for.
pub const PLACES: usize = 2;

/// Makes objects. The first few take a while, like connections to a server that has just been started.
#[derive(Default)]
pub struct Maker {
    begun: AtomicUsize,
}

impl Maker {
    pub async fn make(&self) {
        if self.begun.fetch_add(1, Ordering::SeqCst) <= PLACES {
            sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Explores with the pool of the version at hand: managers differ in types.
pub fn explore<P>(pool: impl Fn() -> P, get: impl AsyncFn(&P) -> bool) {
    let report = Explore::new().paused_time(true).hang_after(Duration::from_secs(1)).cancel_safe(
        async || pool(),
        async |pool| get(pool).await,
        async |_pool| (),
    );
    verdict::tell(&report);
}
