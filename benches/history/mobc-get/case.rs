//! mobc's `get`, dropped while it checks the only connection of the pool: can another be had afterwards?

#[path = "../verdict.rs"]
mod verdict;

use std::convert::Infallible;
use std::time::Duration;

use cancel_safe_testing::{Explore, Way};
use mobc::{Manager, Pool, async_trait};
use tokio::time::{sleep, timeout};

struct Slow;

#[async_trait]
impl Manager for Slow {
    type Connection = ();
    type Error = Infallible;

    async fn connect(&self) -> Result<(), Infallible> {
        Ok(())
    }

    async fn check(&self, (): ()) -> Result<(), Infallible> {
        sleep(Duration::from_millis(10)).await;
        Ok(())
    }
}

/// A pool of one whose connection is idle. It comes back in a task of its own.
async fn pool() -> Pool<Slow> {
    let pool = Pool::builder().max_open(1).get_timeout(None).build(Slow);
    drop(pool.get().await.expect("nothing can fail"));
    while pool.state().await.idle == 0 {
        tokio::task::yield_now().await;
    }
    pool
}

fn main() {
    // Not `Shutdown`: the pool has a task in its runtime.
    let report = Explore::new().paused_time(true).ways([Way::Eager, Way::Settled]).run(
        pool,
        async |pool| pool.get().await.is_ok(),
        async |pool, _outcome| match timeout(Duration::from_secs(60), pool.get()).await {
            Ok(Ok(_connection)) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("no connection is out, and none can be had".to_owned()),
        },
    );
    verdict::tell(&report);
}
