//! mobc's `get`, left alone while it connects: can others still ask the pool for anything?

#[path = "../verdict.rs"]
mod verdict;

use std::convert::Infallible;
use std::time::Duration;

use cancel_safe_testing::Explore;
use mobc::{Manager, Pool, async_trait};
use tokio::time::sleep;

struct Slow;

#[async_trait]
impl Manager for Slow {
    type Connection = ();
    type Error = Infallible;

    async fn connect(&self) -> Result<(), Infallible> {
        sleep(Duration::from_millis(10)).await;
        Ok(())
    }

    async fn check(&self, (): ()) -> Result<(), Infallible> {
        Ok(())
    }
}

fn main() {
    let report = Explore::new().paused_time(true).hang_after(Duration::from_secs(1)).suspended(
        async || Pool::builder().max_open(2).get_timeout(None).build(Slow),
        async |pool| pool.get().await.is_ok(),
        async |pool| pool.state().await.max_open,
        async |_pool, _outcome, max_open| if max_open == 2 { Ok(()) } else { Err(format!("{max_open} instead of 2")) },
    );
    verdict::tell(&report);
}
