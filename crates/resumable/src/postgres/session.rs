//! One transaction on one pooled connection, within bounds that the server enforces too.
//!
//! Invariant: a connection returns to the pool only after its transaction has ended; in every other case it is closed,
//! and the server rolls back. Nothing needs a session beyond the transaction, so a pooler may stand between.

use std::{sync::Arc, time::Duration};

use sqlx::{
    AssertSqlSafe, PgConnection, PgPool, Postgres,
    pool::PoolConnection,
    postgres::{PgArguments, PgDatabaseError, PgSeverity},
    query::Query,
};
use tokio::time::timeout;

/// How transactions begin, and how long one may take.
#[derive(Clone, Debug)]
pub(crate) struct Bounds {
    begin: Arc<str>,
}

impl Bounds {
    /// A worker that is frozen before its COMMIT would hold its rows as long as its session lives. So the server ends a
    /// transaction that is idle for longer than `limit`, and a statement that takes longer.
    ///
    /// `READ COMMITTED` is explicit because a database may have another default. Under that, a statement that waited
    /// for a row would not see the row's new content.
    pub(crate) fn new(limit: Duration) -> Self {
        let ms = limit.as_millis().clamp(1, i32::MAX as u128);
        let begin = format!(
            "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; SET LOCAL statement_timeout = {ms}; \
             SET LOCAL idle_in_transaction_session_timeout = {ms}"
        );
        Self { begin: begin.into() }
    }

    /// The statements with which a transaction begins.
    pub(crate) fn begin(&self) -> AssertSqlSafe<Arc<str>> {
        AssertSqlSafe(Arc::clone(&self.begin))
    }
}

/// A pooled connection. The pool gets it back when its transaction is known to have ended. If dropped earlier, even
/// while a transaction begins, it is closed.
#[derive(Debug)]
pub(crate) struct Session {
    connection: Option<PoolConnection<Postgres>>,
}

impl Session {
    pub(crate) async fn acquire(pool: &PgPool) -> Result<Self, sqlx::Error> {
        Ok(Self { connection: Some(pool.acquire().await?) })
    }

    pub(crate) fn connection(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        self.connection.as_deref_mut().ok_or(sqlx::Error::PoolClosed)
    }

    pub(crate) fn give_back(mut self) {
        drop(self.connection.take());
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(connection) = &mut self.connection {
            connection.close_on_drop();
        }
    }
}

/// A transaction. If dropped before its commit, it closes its connection, and so is rolled back.
#[derive(Debug)]
pub(crate) struct Tx(Session);

impl Tx {
    pub(crate) async fn begin(pool: &PgPool, bounds: &Bounds) -> Result<Self, sqlx::Error> {
        let mut tx = Self(Session::acquire(pool).await?);
        sqlx::raw_sql(bounds.begin()).execute(tx.connection()?).await?;
        Ok(tx)
    }

    pub(crate) fn connection(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        self.0.connection()
    }

    pub(crate) async fn commit(mut self) -> Result<(), sqlx::Error> {
        sqlx::raw_sql("COMMIT").execute(self.connection()?).await?;
        self.0.give_back();
        Ok(())
    }
}

/// An unnamed statement, which a pooler may send to a server that has seen none of ours before.
pub(crate) fn statement<'q>(sql: &Arc<str>) -> Query<'q, Postgres, PgArguments> {
    sqlx::query(AssertSqlSafe(Arc::clone(sql))).persistent(false)
}

/// The server's error code for a statement that hit `statement_timeout`.
const STATEMENT_TOOK_TOO_LONG: &str = "57014";

/// Whether the cause of an error is likely to pass by itself: the server or the network is down, full, or starting up,
/// or another transaction was in the way.
pub(crate) fn is_passing(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(error) => {
            let code = error.code().unwrap_or_default();
            // Connection, transaction rolled back, out of resources, object in use, operator intervention, system error;
            // and a transaction that was idle for too long.
            ["08", "40", "53", "55", "57", "58"].iter().any(|class| code.starts_with(class))
                || matches!(&*code, "25P02" | "25P03" | "25P04")
        }
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::WorkerCrashed => true,
        _ => false,
    }
}

/// Whether the server refused a COMMIT, and so has rolled back: a deferred constraint did not hold, or took too long.
/// After any other error the transaction may have been committed.
pub(crate) fn is_refusal(error: &sqlx::Error) -> bool {
    let said = error.as_database_error().and_then(|error| error.try_downcast_ref::<PgDatabaseError>());
    said.is_some_and(|said| {
        said.severity() == PgSeverity::Error && (!is_passing(error) || said.code() == STATEMENT_TOOK_TOO_LONG)
    })
}

/// Waits for the server's answer, for a limited time.
pub(crate) async fn answered<T, E: From<sqlx::Error>>(
    within: Duration,
    answer: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    timeout(within, answer).await.unwrap_or_else(|_| Err(timed_out().into()))
}

/// The error of an operation that took longer than its bound.
fn timed_out() -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, "the database did not answer in time"))
}
