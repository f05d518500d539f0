//! PostgreSQL: which session a transaction has, and whether a pooler in transaction mode is in front of it.
//!
//! Invariant: behind a pooler a session is identified by the transaction that runs on it, because before and after that
//! it belongs to others; and each message is a simple query, because two messages may reach two sessions.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, PgConnection, Postgres, Row};

use super::BackendId;
use crate::backend::{Cancels, First};

/// sqlx gives its prepared statements the same names on each connection, and behind a pooler they would outlive the
/// transaction. Prepared statements do not belong to a transaction, so it does not matter how the transaction that
/// removes them ends.
const FORGET_STATEMENTS: &str = "DO $$ DECLARE statement text; BEGIN
    FOR statement IN SELECT name FROM pg_prepared_statements WHERE name ~ '^sqlx_s_[0-9]+$'
    LOOP EXECUTE format('DEALLOCATE %I', statement); END LOOP; END $$";

/// In the transaction: its session, and the time at which it began. If the server can check for a vanished client, it
/// does so as long as the transaction lasts.
const LEARN: &str = "SELECT pid, (extract(epoch FROM backend_start) * 1000000)::bigint,
    (extract(epoch FROM now()) * 1000000)::bigint,
    CASE WHEN current_setting('client_connection_check_interval', true) = '0' AND version() ~ 'linux'
        THEN set_config('client_connection_check_interval', '500ms', true) END
    FROM pg_stat_get_activity(pg_backend_pid())";

const WHO: &str = "SELECT a.pid, (extract(epoch FROM a.backend_start) * 1000000)::bigint,
    (extract(epoch FROM clock_timestamp() - a.backend_start) * 1000000)::bigint
    FROM pg_stat_get_activity(pg_backend_pid()) a";

/// How often to ask each of two connections for its session, and how often if there is some kind of pooler.
const QUESTIONS: usize = 2;
const QUESTIONS_TO_A_POOLER: usize = 30;

/// How much older than its connection a session may look.
const AGE_MARGIN: Duration = Duration::from_millis(250);

/// The session of a connection: its own, or that of its transaction.
#[derive(Debug, Clone)]
#[expect(unnameable_types, reason = "an associated type of the sealed half of `Backend`")]
pub struct Place(Arc<Session>);

#[derive(Debug)]
struct Session {
    backend: Mutex<BackendId>,
    owner: Owner,
    /// Whether it has a prepared statement that tells its state and follows each transaction.
    is_compared: AtomicBool,
    /// The last answer to that.
    state: Mutex<Option<String>>,
}

/// Whose the session of a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// Ours alone.
    Us,
    /// The user's sqlx pool, which has lent it.
    Lender,
    /// A pooler, which gives each transaction another one.
    Pooler,
}

impl Place {
    pub(crate) fn own(backend: BackendId) -> Self {
        Self::new(backend, Owner::Us)
    }

    pub(crate) fn lent(backend: BackendId) -> Self {
        Self::new(backend, Owner::Lender)
    }

    /// In no transaction yet, and so on no session.
    pub(crate) fn pooled() -> Self {
        let nowhere = BackendId { pid: 0, started: 0, transaction: 0, fenced: false, unwatched: false };
        Self::new(nowhere, Owner::Pooler)
    }

    fn new(backend: BackendId, owner: Owner) -> Self {
        let (is_compared, state) = (AtomicBool::new(false), Mutex::new(None));
        Self(Arc::new(Session { backend: Mutex::new(backend), owner, is_compared, state }))
    }

    pub(crate) fn is_pooled(&self) -> bool {
        self.0.owner == Owner::Pooler
    }

    /// Whether the session waits for its next transaction with sqlx counting the last one still. sqlx forgets one only with
    /// a `ROLLBACK` in a message of its own, which would be one more for each transaction.
    pub(crate) fn stays_counted(&self) -> bool {
        self.0.owner == Owner::Us
    }

    pub(crate) fn backend(&self) -> BackendId {
        *self.0.backend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to run after the transaction, in the same message.
    pub(crate) fn farewell(&self) -> Option<&'static str> {
        match self.0.owner {
            Owner::Us if self.is_compared() => Some("ROLLBACK; EXECUTE txg_state"),
            Owner::Us => Some("ROLLBACK"),
            Owner::Lender => None,
            Owner::Pooler => Some(FORGET_STATEMENTS),
        }
    }

    pub(crate) fn is_compared(&self) -> bool {
        self.0.is_compared.load(Ordering::Relaxed)
    }

    /// Makes the question for its state follow each transaction from now on.
    pub(crate) fn compare(&self) {
        self.0.is_compared.store(true, Ordering::Relaxed);
    }

    /// The session's state after its last transaction. `None` while there is another one.
    pub(crate) fn state(&self) -> MutexGuard<'_, Option<String>> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Learns the session of the transaction that has just begun.
    pub(crate) async fn learn(&self, conn: &mut PgConnection) -> Result<(), sqlx::Error> {
        // Statements that others have left there would have the names of those prepared here.
        let sql = AssertSqlSafe(format!("{FORGET_STATEMENTS}; {LEARN}"));
        let row = sqlx::raw_sql(sql).fetch_one(conn).await?;
        let (pid, started) = session(&row)?;
        let backend = BackendId { pid, started, transaction: row.try_get(2)?, fenced: false, unwatched: false };
        *self.0.backend.lock().unwrap_or_else(PoisonError::into_inner) = backend;
        Ok(())
    }
}

fn session(row: &PgRow) -> Result<(i32, i64), sqlx::Error> {
    Ok((row.try_get(0)?, row.try_get(1)?))
}

/// Why a connection is not used: the pool was not told about the pooler behind it.
#[derive(Debug, thiserror::Error)]
#[error("it is behind a pooler that gives each transaction another session")]
struct Refused;

pub(crate) fn is_refused(reason: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    reason.is::<Refused>()
}

/// Fails where connections share sessions, and leaves nothing behind.
///
/// The first connection of a pool and the cancelling connection are asked in turn: behind a pooler they mostly have the
/// same session, and if others are busy there, a new one each time. A session that is older than its connection shows
/// that there is a pooler, and more questions then find out its mode: in session mode, the two sessions stay the same.
pub(crate) async fn refuse(conn: &mut PgConnection, first: First<'_, Postgres>) -> Result<(), sqlx::Error> {
    // If the connection for cancelling cannot be opened, opening the pool reports that. The other connection can be
    // asked alone.
    let has_canceller = first.canceller.warm(first.options).await.is_ok();
    let (mut ours, mut beside) = (None, None);
    let mut questions = QUESTIONS;
    let mut asked = 0;
    while asked < questions {
        asked += 1;
        let one = who(conn).await?;
        let other = if has_canceller { first.canceller.on_warm(who).await.transpose()? } else { None };
        let differ = |before: Option<Who>, now: Option<Who>| match (before, now) {
            (Some(before), Some(now)) => before.session() != now.session(),
            _ => false,
        };
        let is_same = other.is_some_and(|other| other.session() == one.session());
        if is_same || differ(ours, Some(one)) || differ(beside, other) {
            return Err(sqlx::Error::Configuration(Box::new(Refused)));
        }
        let oldest = other.map_or(one.age, |other| other.age.max(one.age));
        if oldest > first.since.elapsed() + AGE_MARGIN {
            questions = QUESTIONS_TO_A_POOLER;
        }
        (ours, beside) = (Some(one), other.or(beside));
    }
    Ok(())
}

/// The present session of a connection.
#[derive(Clone, Copy)]
struct Who {
    pid: i32,
    started: i64,
    age: Duration,
}

impl Who {
    fn session(self) -> (i32, i64) {
        (self.pid, self.started)
    }
}

async fn who(conn: &mut PgConnection) -> Result<Who, sqlx::Error> {
    let row = sqlx::raw_sql(WHO).fetch_one(conn).await?;
    let (pid, started) = session(&row)?;
    // A clock that was set back makes the session look young.
    let age = Duration::from_micros(u64::try_from(row.try_get::<i64, _>(2)?).unwrap_or_default());
    Ok(Who { pid, started, age })
}
