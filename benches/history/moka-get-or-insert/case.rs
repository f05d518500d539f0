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
        async |cache, _outcome| {
            let cache = cache.clone();
            let again = tokio::spawn(async move { cache.get_or_insert_with("key", made(7)).await });
            match again.await {
                Ok(_value) => Ok(()),
                Err(error) if error.is_panic() => Err("the next call for the same key panicked".to_owned()),
                Err(error) => Err(error.to_string()),
            }
        },
    );
    verdict::tell(&report);
}
