//! tokio's `Mutex::lock`, dropped while another task hands the lock over to it: is it free afterwards?

#[path = "../verdict.rs"]
mod verdict;

use std::time::Duration;

use cancel_safe_testing::Explore;
use futures_util::join;
use tokio::task::yield_now;
use tokio::time::timeout;
use tokio_02::sync::Mutex;

fn main() {
    let report = Explore::new().paused_time(true).run(
        async || Mutex::new(()),
        async |mutex| {
            let held = mutex.lock().await;
            let hand_over = async move {
                yield_now().await;
                drop(held);
            };
            join!(async { drop(mutex.lock().await) }, hand_over);
        },
        async |mutex, _outcome| match timeout(Duration::from_secs(60), mutex.lock()).await {
            Ok(_guard) => Ok(()),
            Err(_) => Err("nobody holds the mutex, and nobody can lock it".to_owned()),
        },
    );
    verdict::tell(&report);
}
