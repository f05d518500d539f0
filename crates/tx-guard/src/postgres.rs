//! PostgreSQL: cancelling and terminating over a connection of its own, and a commit that proves itself.
//!
//! Invariant: a cancel is acknowledged before the connection it was meant for is used again, and is meant for a process
//! that is told by more than its number, so it can never hit the statement of another transaction.

use futures_util::{FutureExt, StreamExt, TryFutureExt};
use sqlx::postgres::{PgConnectOptions, PgDatabaseError, PgSeverity};
use sqlx::{AssertSqlSafe, Connection, Database, Either, PgConnection, Postgres, SqlSafeStr};
use sqlx_core::transaction::TransactionManager;

use crate::TxError;
use crate::backend::{Activity, Backend, CommitFailure, Driver, Isolation, Mode, Options, Ownership, depth};
use crate::canceller::Canceller;

type Manager = <Postgres as Database>::TransactionManager;

/// How often a rollback is tried: each statement that was left behind may answer with one error.
const ROLLBACK_ATTEMPTS: usize = 16;

/// How much later than the client the server ends a session whose transaction lasts too long, in milliseconds.
const SESSION_MARGIN: u128 = 1_000;

/// The largest timeout the server takes, in milliseconds.
const LONGEST_LIMIT: u128 = 2_147_483_647;

/// Lets the server notice within half a second that the client has gone. From version 14 on.
const CHECK_CLIENT: &str = "SET client_connection_check_interval = '500ms'";

/// Process ids are given out again. The moment of the start tells two holders of the same one apart.
///
/// On a session of our own, everything outside a guard's transaction may only read from here on. A `begin` that is
/// cancelled two levels deep takes the whole transaction with it, and the statements that follow in the level between
/// do not pass the guard. Left as it is where nothing can be written anyway.
const IDENTIFY: &str = "SELECT pid, (extract(epoch FROM backend_start) * 1000000)::bigint,
    CASE WHEN $1 AND current_setting('default_transaction_read_only') = 'off' AND NOT pg_is_in_recovery()
        THEN set_config('default_transaction_read_only', 'on', false) = 'on' ELSE false END
    FROM pg_stat_get_activity(pg_backend_pid())";
const CANCEL: &str = "SELECT pg_cancel_backend(pid) FROM pg_stat_get_activity($1)
    WHERE (extract(epoch FROM backend_start) * 1000000)::bigint = $2";
const TERMINATE: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_get_activity($1)
    WHERE (extract(epoch FROM backend_start) * 1000000)::bigint = $2";

/// The xid fails in an aborted transaction, before COMMIT is run. CHAIN makes a COMMIT outside a transaction an
/// error instead of a warning; the empty transaction that follows it is rolled back off the caller's path.
const VERIFIED_COMMIT: &str = "SELECT pg_current_xact_id_if_assigned()::text; COMMIT AND CHAIN";

/// Begins a transaction and spoils it at once, so that each later statement is refused.
const FENCE: &str = "BEGIN; ROLLBACK TO SAVEPOINT \"none: the guarded transaction was lost\"";

/// One backend of the server.
#[derive(Debug, Clone, Copy)]
#[expect(unnameable_types, reason = "an associated type of the sealed half of `Backend`")]
pub struct BackendId {
    pid: i32,
    /// In microseconds.
    started: i64,
    /// Whether only a transaction that asks for it may write.
    fenced: bool,
}

impl Backend for Postgres {}

impl Driver for Postgres {
    const TITLE: &'static str = "PostgreSQL";
    type Probe = BackendId;
    type Canceller = Canceller<PgConnection>;

    fn target(options: &Options<Self>) -> String {
        let database = options.get_database().unwrap_or("(default)");
        match options.get_socket() {
            Some(socket) => format!("{database:?} at {}", socket.display()),
            None => format!("{database:?} at {}:{}", options.get_host(), options.get_port()),
        }
    }

    fn connect_error(target: String, source: sqlx::Error) -> TxError {
        match &source {
            sqlx::Error::Database(error) => match error.code().as_deref() {
                Some("3D000") => TxError::MissingDatabase { target, source },
                _ => TxError::Refused { target, source },
            },
            sqlx::Error::Configuration(_) => {
                TxError::InvalidUrl { database: Self::TITLE, reason: "an option cannot be used".to_owned() }
            }
            _ => TxError::Unreachable { target, source },
        }
    }

    async fn probe(conn: &mut PgConnection, ownership: Ownership) -> Result<BackendId, sqlx::Error> {
        let can_check = conn.server_version_num().is_some_and(|version| version >= 14_00_00);
        if ownership == Ownership::Owned && can_check {
            // Not every operating system can do it; the server then refuses the setting, and goes without.
            match sqlx::raw_sql(CHECK_CLIENT).execute(&mut *conn).await {
                Ok(_) | Err(sqlx::Error::Database(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let owned = ownership == Ownership::Owned;
        let (pid, started, fenced) = sqlx::query_as(IDENTIFY).bind(owned).persistent(false).fetch_one(conn).await?;
        Ok(BackendId { pid, started, fenced })
    }

    async fn warm(canceller: &Self::Canceller, options: &PgConnectOptions) -> Result<(), sqlx::Error> {
        canceller.warm(options).await
    }

    async fn begin(conn: &mut PgConnection, backend: &BackendId, mode: &Mode) -> Result<(), sqlx::Error> {
        let sql = begin_sql(mode, backend.fenced, conn.server_version_num());
        Manager::begin(conn, Some(AssertSqlSafe(sql).into_sql_str())).await
    }

    async fn run_sql(conn: &mut PgConnection, sql: String) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(conn).await.map(drop)
    }

    /// 40001 is a serialization failure, 40P01 a deadlock.
    fn is_transient(error: &sqlx::Error) -> bool {
        let code = error.as_database_error().and_then(|e| e.code());
        matches!(code.as_deref(), Some("40001" | "40P01"))
    }

    fn is_lost(conn: &PgConnection, _: &BackendId) -> bool {
        depth::<Self>(conn) == 0
    }

    fn fence(conn: &mut PgConnection) {
        // One poll writes the message into the connection's buffer, ahead of whatever the caller sends next. Dropped
        // after that it changes nothing, since sqlx's depth is zero.
        Manager::begin(conn, Some(FENCE.into_sql_str())).now_or_never();
    }

    async fn commit(conn: &mut PgConnection, _: &BackendId) -> Result<(), CommitFailure> {
        let mut sent = false;
        let mut failure = None;
        {
            let mut answers = sqlx::raw_sql(VERIFIED_COMMIT).fetch_many(&mut *conn);
            while let Some(answer) = answers.next().await {
                match answer {
                    // The row of the SELECT has come, so COMMIT has been run.
                    Ok(Either::Right(_)) => sent = true,
                    Ok(Either::Left(_)) => {}
                    Err(error) => failure = Some(error),
                }
            }
        }
        let Some(error) = failure else { return Ok(()) };
        if !is_refusal(&error) {
            return Err(CommitFailure::Unknown(error));
        }
        if !sent {
            return Err(CommitFailure::Aborted(error));
        }
        // The COMMIT failed, and the server is outside any transaction, where a ROLLBACK would be warned about in its
        // log, while sqlx still counts one: open an empty one for the rollback to end.
        let ended = error.as_database_error().and_then(|e| e.code()).as_deref() == Some("25P01");
        match sqlx::raw_sql("BEGIN").execute(conn).await {
            Ok(_) if ended => Err(CommitFailure::Ended),
            Ok(_) | Err(_) => Err(CommitFailure::Refused(error)),
        }
    }

    async fn rollback(conn: &mut PgConnection, _: &BackendId) -> Result<(), sqlx::Error> {
        if depth::<Self>(conn) == 0 {
            return Err(sqlx::Error::Protocol("the transaction was lost: the state of the session is unknown".into()));
        }
        for _ in 0..ROLLBACK_ATTEMPTS {
            match Manager::rollback(conn).await {
                Ok(()) if depth::<Self>(conn) == 0 => return Ok(()),
                // A nested transaction that was forgotten, the error of a statement that was left behind, or a cancel
                // that hit the ROLLBACK itself.
                Ok(()) | Err(sqlx::Error::Database(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Err(sqlx::Error::Protocol("the transaction could not be rolled back".into()))
    }

    async fn rest(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
        conn.ping().await
    }

    async fn cancel(
        canceller: &Self::Canceller,
        options: &PgConnectOptions,
        to: &BackendId,
    ) -> Result<Activity, sqlx::Error> {
        signal(canceller, options, CANCEL, *to).await.map(|()| Activity::Unseen)
    }

    async fn terminate(
        canceller: &Self::Canceller,
        options: &PgConnectOptions,
        to: &BackendId,
    ) -> Result<(), sqlx::Error> {
        signal(canceller, options, TERMINATE, *to).await
    }

    /// Only a round trip can do it.
    fn interrupt(_: &BackendId) {}

    async fn cool(canceller: &Self::Canceller) {
        canceller.close().await;
    }
}

/// BEGIN and its limits in one message, so that they cost no round trip of their own.
fn begin_sql(mode: &Mode, fenced: bool, version: Option<u32>) -> String {
    let mut sql = String::from("BEGIN");
    sql.push_str(match mode.isolation {
        None => "",
        Some(Isolation::ReadCommitted) => " ISOLATION LEVEL READ COMMITTED",
        Some(Isolation::RepeatableRead) => " ISOLATION LEVEL REPEATABLE READ",
        Some(Isolation::Serializable) => " ISOLATION LEVEL SERIALIZABLE",
    });
    if mode.read_only {
        sql.push_str(" READ ONLY");
    } else if fenced {
        sql.push_str(" READ WRITE");
    }
    if let Some(remaining) = mode.remaining {
        // Zero would mean "no limit". The server's own limits only matter when the client is gone or hangs, so
        // those that end the whole session come later than what the client does by itself.
        let limit = remaining.as_millis().clamp(1, LONGEST_LIMIT);
        let margin = (limit + SESSION_MARGIN).min(LONGEST_LIMIT);
        sql.push_str(&format!("; SET LOCAL statement_timeout = {limit}"));
        sql.push_str(&format!("; SET LOCAL idle_in_transaction_session_timeout = {margin}"));
        if version.is_some_and(|version| version >= 17_00_00) {
            sql.push_str(&format!("; SET LOCAL transaction_timeout = {margin}"));
        }
    }
    sql
}

/// Whether the server has refused and lives on. A FATAL answer may have come before or after the commit.
fn is_refusal(error: &sqlx::Error) -> bool {
    match error.as_database_error().and_then(|e| e.try_downcast_ref::<PgDatabaseError>()) {
        Some(answer) => !matches!(answer.severity(), PgSeverity::Fatal | PgSeverity::Panic),
        None => false,
    }
}

async fn signal(
    canceller: &Canceller<PgConnection>,
    options: &PgConnectOptions,
    sql: &'static str,
    to: BackendId,
) -> Result<(), sqlx::Error> {
    canceller
        .ask(options, |conn, _| sqlx::query(sql).bind(to.pid).bind(to.started).execute(conn).map_ok(drop).boxed())
        .await
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use sqlx::ConnectOptions;

    use super::*;

    #[tokio::test]
    async fn a_cancel_reaches_no_other_backend_that_was_given_the_same_process_id() {
        let url = std::env::var("CANCEL_SAFE_TEST_POSTGRES_URL")
            .expect("set CANCEL_SAFE_TEST_POSTGRES_URL or run cargo xtask test tx-guard");
        let options: PgConnectOptions = url.parse().unwrap();
        let canceller = <Postgres as Driver>::Canceller::default();
        Postgres::warm(&canceller, &options).await.unwrap();
        let mut conn = options.connect().await.unwrap();
        let ours = Postgres::probe(&mut conn, Ownership::Wrapped).await.unwrap();
        let before = BackendId { started: ours.started - 1, ..ours };

        // Again and again, because a cancel that comes before the statement is no cancel.
        let again = async |to: BackendId| {
            loop {
                Postgres::cancel(&canceller, &options, &to).await.unwrap();
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let slept = tokio::select! {
            slept = sqlx::raw_sql("SELECT pg_sleep(0.5)").execute(&mut conn) => slept,
            () = again(before) => unreachable!("it cancels for ever"),
        };
        assert!(slept.is_ok(), "{slept:?}");
        let slept = tokio::select! {
            slept = sqlx::raw_sql("SELECT pg_sleep(30)").execute(&mut conn) => slept,
            () = again(ours) => unreachable!("it cancels for ever"),
        };
        assert!(slept.is_err(), "{slept:?}");
    }
}
