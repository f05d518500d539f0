//! PostgreSQL behind a pooler in transaction mode: whether there is one, and which session a transaction has.
//!
//! Invariant: a session is told by the transaction that runs on it, because it is somebody else's before and after that;
//! and each message is a simple query, because two messages may reach two sessions.

use std::sync::{Arc, Mutex, PoisonError};

use sqlx::postgres::{PgConnectOptions, PgRow};
use sqlx::{AssertSqlSafe, PgConnection, Postgres, Row};

use super::BackendId;
use crate::canceller::Canceller;

/// sqlx gives the statements it prepares names that are the same on each connection, and behind a pooler they would outlive
/// the transaction. Prepared statements are in no transaction, so it does not matter how the one ends that takes them away.
const FORGET_STATEMENTS: &str = "DO $$ DECLARE statement text; BEGIN
    FOR statement IN SELECT name FROM pg_prepared_statements WHERE name ~ '^sqlx_s_[0-9]+$'
    LOOP EXECUTE format('DEALLOCATE %I', statement); END LOOP; END $$";

/// In the transaction: its session, and the moment at which it was begun. Where the server can look for a client that has
/// gone, it does so as long as the transaction lasts.
const LEARN: &str = "SELECT pid, (extract(epoch FROM backend_start) * 1000000)::bigint,
    (extract(epoch FROM now()) * 1000000)::bigint,
    CASE WHEN current_setting('client_connection_check_interval', true) = '0' AND version() ~ 'linux'
        THEN set_config('client_connection_check_interval', '500ms', true) END
    FROM pg_stat_get_activity(pg_backend_pid())";

const WHO: &str = "SELECT pid, (extract(epoch FROM backend_start) * 1000000)::bigint
    FROM pg_stat_get_activity(pg_backend_pid())";

/// How often each of two connections is asked for its session.
const QUESTIONS: usize = 2;

/// The session of a connection: its own, or that of its transaction.
#[derive(Debug, Clone)]
#[expect(unnameable_types, reason = "an associated type of the sealed half of `Backend`")]
pub struct Place {
    backend: Arc<Mutex<BackendId>>,
    is_pooled: bool,
}

impl Place {
    pub(crate) fn own(backend: BackendId) -> Self {
        Self { backend: Arc::new(Mutex::new(backend)), is_pooled: false }
    }

    /// In no transaction yet, and so nowhere.
    pub(crate) fn pooled() -> Self {
        let nowhere = BackendId { pid: 0, started: 0, transaction: 0, fenced: false, unwatched: false };
        Self { backend: Arc::new(Mutex::new(nowhere)), is_pooled: true }
    }

    pub(crate) fn is_pooled(&self) -> bool {
        self.is_pooled
    }

    pub(crate) fn backend(&self) -> BackendId {
        *self.backend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to be run behind the transaction, before its session is somebody else's.
    pub(crate) fn farewell(&self) -> Option<&'static str> {
        self.is_pooled.then_some(FORGET_STATEMENTS)
    }

    /// Learns where the transaction that was begun just now is.
    pub(crate) async fn learn(&self, conn: &mut PgConnection) -> Result<(), sqlx::Error> {
        // What others have left there would have the names of what will be prepared.
        let sql = AssertSqlSafe(format!("{FORGET_STATEMENTS}; {LEARN}"));
        let row = sqlx::raw_sql(sql).fetch_one(conn).await?;
        let (pid, started) = session(&row)?;
        let backend = BackendId { pid, started, transaction: row.try_get(2)?, fenced: false, unwatched: false };
        *self.backend.lock().unwrap_or_else(PoisonError::into_inner) = backend;
        Ok(())
    }
}

fn session(row: &PgRow) -> Result<(i32, i64), sqlx::Error> {
    Ok((row.try_get(0)?, row.try_get(1)?))
}

/// Why a connection is not used: the pool was not told of the pooler that is behind it.
#[derive(Debug, thiserror::Error)]
#[error("it is behind a pooler that gives each transaction another session")]
struct Refused;

pub(crate) fn is_refused(reason: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    reason.is::<Refused>()
}

/// Fails where connections share sessions, and leaves nothing behind. The first connection of a pool and that for cancelling
/// are asked in turn: behind a pooler they mostly have the same session, and if others are busy there, they have a new one
/// each time.
pub(crate) async fn refuse(
    conn: &mut PgConnection,
    canceller: &Canceller<Postgres>,
    options: &Arc<PgConnectOptions>,
) -> Result<(), sqlx::Error> {
    // Whoever opens the pool hears of it if the connection for cancelling cannot be opened.
    if canceller.warm(options).await.is_err() {
        return Ok(());
    }
    let (mut ours, mut beside) = (Vec::new(), Vec::new());
    for _ in 0..QUESTIONS {
        ours.push(who(conn).await?);
        match canceller.on_warm(who).await {
            Some(session) => beside.push(session?),
            None => return Ok(()),
        }
    }
    let changes = |sessions: &[(i32, i64)]| sessions.windows(2).any(|pair| pair[0] != pair[1]);
    if changes(&ours) || changes(&beside) || ours == beside {
        return Err(sqlx::Error::Configuration(Box::new(Refused)));
    }
    Ok(())
}

async fn who(conn: &mut PgConnection) -> Result<(i32, i64), sqlx::Error> {
    session(&sqlx::raw_sql(WHO).fetch_one(conn).await?)
}
