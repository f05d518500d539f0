//! moka's `get_or_insert_with`, dropped while the value is being made: can the key be filled afterwards?

#[path = "../verdict.rs"]
mod verdict;

use std::time::Duration;

use cancel_safe_testing::Explore;
use moka::future::Cache;
use tokio::time::sleep;

async fn made(value: u32) -> u32 {
    sleep(Duration::from_millis(10)).await;
    value
}

fn main() {
    let report = Explore::new().paused_time(true).run(
        async || Cache::new(10),
        async |cache| cache.get_or_insert_with("key", made(7)).await,
        async |cache, _outcome| match cache.get_or_insert_with("key", made(7)).await {
            7 => Ok(()),
            other => Err(format!("the cache made {other} of 7")),
        },
    );
    verdict::tell(&report);
}
