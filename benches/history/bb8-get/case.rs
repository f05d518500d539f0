//! bb8's `get`, dropped after a connection was handed to it: can the pool of one still give one?

#[path = "../verdict.rs"]
mod verdict;

use std::convert::Infallible;
use std::time::Duration;

use bb8::{ManageConnection, Pool};
use cancel_safe_testing::{Explore, Way};
use futures_util::join;
use tokio::task::yield_now;

struct Manager;

#[async_trait::async_trait]
impl ManageConnection for Manager {
    type Connection = ();
    type Error = Infallible;

    async fn connect(&self) -> Result<(), Infallible> {
        Ok(())
    }

    async fn is_valid(&self, _: &mut bb8::PooledConnection<'_, Self>) -> Result<(), Infallible> {
        Ok(())
    }

    fn has_broken(&self, (): &mut ()) -> bool {
        false
    }
}

/// A pool of one whose connection is idle.
async fn pool() -> Pool<Manager> {
    let pool = Pool::builder().max_size(1).max_lifetime(None).idle_timeout(None).test_on_check_out(false);
    let pool = pool.connection_timeout(Duration::from_millis(250)).build(Manager).await.expect("nothing can fail");
    drop(pool.get().await);
    pool
}

pub fn explore() {
    // Not `Shutdown`: the pool opens its connections in tasks. Not in paused time: the tokio of the old version has its own.
    let report = Explore::new().ways([Way::Eager, Way::Settled]).run(
        pool,
        async |pool| {
            let held = pool.get().await;
            let hand_over = async {
                yield_now().await;
                drop(held);
            };
            let (got, ()) = join!(pool.get(), hand_over);
            got.is_ok()
        },
        async |pool, _outcome| match pool.get().await {
            Ok(_connection) => Ok(()),
            Err(error) => Err(format!("no connection is out, and none can be had: {error}")),
        },
    );
    verdict::tell(&report);
}
