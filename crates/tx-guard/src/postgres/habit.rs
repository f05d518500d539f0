//! What the sqlx that is linked here does with a `begin` that is dropped, which differs between its versions.
//!
//! Invariant: it is found out once in a process, on a session that has nothing else to do. Until then, and where it cannot be
//! found out, the careful answer holds.

use std::sync::OnceLock;

use futures_util::FutureExt;
use sqlx::{Connection, PgConnection, SqlSafeStr};
use sqlx_core::transaction::TransactionManager;

use super::Manager;

/// Begins nothing, and takes so long that a server that is near does not answer within the poll.
const NOTHING: &str = "SELECT pg_sleep(0.002)";

/// How often it is asked: a server may be that fast all the same, and a message may stay in the buffer for a reason of its
/// own, such as a socket that takes nothing for the moment. So a yes has to be said more than once.
const QUESTIONS: usize = 16;
const YESES: usize = 3;

static TAKES_BACK: OnceLock<bool> = OnceLock::new();

/// Finds it out, unless it is known.
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
