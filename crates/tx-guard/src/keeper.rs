//! The task that looks after the idle sessions of a pool.
//!
//! Invariant: it ends with its pool, and holds it only while it looks.

use std::sync::Weak;

use tokio::time::sleep;

use crate::backend::Backend;
use crate::slot::Shared;

/// Opens what the pool is to have at least, and closes what is too old or has been idle for too long, until the pool is
/// closed or gone. Starts over after each look, so that a pool nobody has any more ends at the next one.
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
