//! The task that looks after the idle sessions of a pool.
//!
//! Invariant: it ends with its pool, and holds the pool only while it checks.

use std::sync::Weak;

use tokio::time::sleep;

use crate::backend::Backend;
use crate::slot::Shared;

/// Opens sessions up to the pool's minimum, and closes those that are too old or have been idle for too long, until the
/// pool is closed or gone. Upgrades the reference again for each check, so that an abandoned pool ends at the next one.
pub(crate) async fn keep_up<DB: Backend>(shared: Weak<Shared<DB>>) {
    while let Some(strong) = shared.upgrade() {
        if strong.work.is_closed() {
            return;
        }
        strong.close_expired().await;
        strong.open_to_the_least().await;
        let period = strong.upkeep.period();
        drop(strong);
        sleep(period).await;
    }
}
