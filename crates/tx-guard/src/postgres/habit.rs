//! What the linked version of sqlx does with a dropped `begin`, which differs between versions.
//!
//! Invariant: it is found out once per process, on a session that has nothing else to do. Until then, and if it cannot
//! be found out, the cautious answer holds.

use std::sync::OnceLock;

use futures_util::FutureExt;
use sqlx::{Connection, PgConnection, SqlSafeStr};
use sqlx_core::transaction::TransactionManager;

use super::Manager;

/// Begins nothing, and takes long enough that even a nearby server does not answer within the poll.
const NOTHING: &str = "SELECT pg_sleep(0.002)";

/// How often to ask. A server may be that fast all the same, and a message may stay in the buffer for another reason,
/// such as a full socket. So a yes has to be seen more than once.
const QUESTIONS: usize = 16;
const YESES: usize = 3;

static TAKES_BACK: OnceLock<bool> = OnceLock::new();

/// Finds it out, unless it is already known.
pub(crate) async fn learn(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    let mut yeses = 0;
    for _ in 0..QUESTIONS {
        if TAKES_BACK.get().is_some() {
            return Ok(());
        }
        let is_dropped = Manager::begin(conn, Some(NOTHING.into_sql_str())).now_or_never().is_none();
        let is_queued = conn.should_flush();
        conn.flush().await?;
        yeses += usize::from(is_dropped && is_queued);
        if is_dropped && (!is_queued || yeses == YESES) {
            TAKES_BACK.get_or_init(|| is_queued);
        }
    }
    Ok(())
}

/// Whether a `ROLLBACK` is queued behind a `begin` that is dropped.
pub(crate) fn takes_dropped_begins_back() -> bool {
    TAKES_BACK.get().copied().unwrap_or(true)
}
