//! mobc's `get`, dropped after a connection was handed to it: can the pool of one still give one?

#[path = "../verdict.rs"]
mod verdict;

use std::convert::Infallible;
use std::time::Duration;

use cancel_safe_testing::{Explore, Way};
use futures_util::join;
use mobc::{Manager, Pool, async_trait};
use tokio::task::yield_now;
use tokio::time::timeout;

struct Connector;

#[async_trait]
impl Manager for Connector {
    type Connection = ();
    type Error = Infallible;

    async fn connect(&self) -> Result<(), Infallible> {
        Ok(())
    }

    async fn check(&self, (): ()) -> Result<(), Infallible> {
        Ok(())
    }
}

fn main() {
    // Not `Shutdown`: the pool has a task in its runtime, and takes connections back in others.
    let report = Explore::new().paused_time(true).ways([Way::Eager, Way::Settled]).run(
        async || Pool::builder().max_open(1).get_timeout(None).build(Connector),
        async |pool| {
            let held = pool.get().await;
            let hand_over = async {
                yield_now().await;
                drop(held);
            };
            let (got, ()) = join!(pool.get(), hand_over);
            got.is_ok()
        },
        async |pool, _outcome| match timeout(Duration::from_secs(60), pool.get()).await {
            Ok(Ok(_connection)) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("no connection is out, and none can be had".to_owned()),
        },
    );
    verdict::tell(&report);
}
