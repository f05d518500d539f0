//! PostgreSQL: messages whose answers prove which message they answer, and the fate of a commit without an answer.
//!
//! Invariant: nothing counts as done because of an answer that might belong to another message, and a reported fate
//! always belongs to the transaction in question.

use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use sqlx::postgres::{PgConnectOptions, PgDatabaseError, PgRow, PgSeverity};
use sqlx::{
    AssertSqlSafe, Column, ColumnIndex, ConnectOptions, Connection, Database, Either, PgConnection, Postgres, Row,
};
use sqlx_core::transaction::TransactionManager;
use tokio::time::{sleep, timeout};

use crate::backend::{CommitFailure, Receipt, depth};

type Manager = <Postgres as Database>::TransactionManager;

/// The cheapest statement with a row, which fails in an aborted transaction, before COMMIT runs. CHAIN makes a COMMIT
/// outside a transaction an error instead of a warning; the empty transaction that follows it is rolled back after it.
const VERIFIED_COMMIT: &str = "SHOW lock_timeout; COMMIT AND CHAIN";

/// The name of its row's column, which distinguishes it from the rows of other statements.
const VERIFIED_BY: &str = "lock_timeout";

/// The name of the prepared statement with the state by which sessions are compared, and of its column.
pub(crate) const STATE: &str = "txg_state";

/// Asks for that state.
pub(crate) const ASK_STATE: &str = "EXECUTE txg_state";

/// Asks for the transaction's id before a commit whose end is to be found out later. A transaction that has written
/// nothing gets an id from this, because its NOTIFYs go out at its commit all the same. On a standby nothing can be
/// committed, and there is no id.
const RECEIPT: &str = "SELECT CASE WHEN NOT pg_is_in_recovery() THEN pg_current_xact_id()::text END AS txg_transaction,
    CASE WHEN pg_is_in_recovery() THEN '' ELSE left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) END AS txg_timeline";

/// Asks for the fate of a transaction. A standby that took over may not know the transaction, and may give its id to
/// another one.
const FATE: &str = "SELECT pg_xact_status('TRANSACTION'::xid8)
    WHERE left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) = 'TIMELINE'";

/// How long one query for the fate of a commit may take, and the pauses between queries.
const RESOLVE_ATTEMPT: Duration = Duration::from_secs(2);
const FIRST_RESOLVE_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_RESOLVE_PAUSE: Duration = Duration::from_millis(200);

/// The answer to a message of several statements, one of which has a row.
#[derive(Default)]
pub(crate) struct Answer {
    /// Whether the row has come.
    pub(crate) row: bool,
    /// How many statements were done since the row came, including the one with the row.
    pub(crate) done_after_row: usize,
    /// The session's state as seen by the farewell.
    pub(crate) state: Option<String>,
    pub(crate) failure: Option<sqlx::Error>,
}

/// Commits. `farewell` runs after that, and its failure undoes nothing.
pub(crate) async fn exchange_commit(conn: &mut PgConnection, farewell: Option<&str>) -> Answer {
    let sql = with(VERIFIED_COMMIT.to_owned(), farewell);
    exchange(conn, sql, |row| is_alone(row, VERIFIED_BY)).await
}

/// Rolls back, and proves it by a fresh random number. `farewell` runs after that.
pub(crate) async fn exchange_rollback(conn: &mut PgConnection, farewell: Option<&str>) -> Answer {
    let number = fastrand::i32(..).to_string();
    let sql = with(format!("ROLLBACK AND CHAIN; SELECT {number}"), farewell);
    exchange(conn, sql, |row| text(row, 0).as_ref() == Some(&number)).await
}

/// Proves that the session is in no transaction, and that its answers are in step: an empty transaction that somebody has
/// left is ended, any other is an error.
pub(crate) async fn exchange_nothing(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    let number = fastrand::i32(..).to_string();
    let sql = format!("BEGIN NOT DEFERRABLE; SELECT {number}; ROLLBACK");
    let answer = exchange(conn, sql, |row| text(row, 0).as_ref() == Some(&number)).await;
    match answer.failure {
        // A session that listens may be told something behind the answer.
        None | Some(sqlx::Error::Protocol(_)) if answer.row && answer.done_after_row >= 2 => Ok(()),
        None => Err(out_of_step()),
        Some(error) => Err(error),
    }
}

/// Sends a message without a result, and skips what a session that listens was told while it was idle: sqlx takes that for
/// an answer where it expects one.
pub(crate) async fn say(conn: &mut PgConnection, sql: String) -> Result<(), sqlx::Error> {
    match sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *conn).now_or_never() {
        Some(Ok(_)) => Ok(()),
        Some(Err(error)) if !matches!(error, sqlx::Error::Protocol(_)) => Err(error),
        Some(Err(_)) | None => conn.flush().await,
    }
}

fn with(sql: String, farewell: Option<&str>) -> String {
    match farewell {
        Some(farewell) => format!("{sql}; {farewell}"),
        None => sql,
    }
}

/// Sends the message. `is_ours` distinguishes its row from the rows of others.
async fn exchange(conn: &mut PgConnection, sql: String, is_ours: impl Fn(&PgRow) -> bool) -> Answer {
    let mut answer = Answer::default();
    let mut parts = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_many(conn);
    while let Some(part) = parts.next().await {
        match part {
            // Somebody may have put another question under that name.
            Ok(Either::Right(row)) if answer.row => answer.state = text(&row, STATE).filter(|_| is_alone(&row, STATE)),
            Ok(Either::Right(row)) => answer.row = is_ours(&row),
            Ok(Either::Left(_)) if answer.row => answer.done_after_row += 1,
            Ok(Either::Left(_)) => {}
            Err(error) => answer.failure = Some(error),
        }
    }
    answer
}

fn is_alone(row: &PgRow, column: &str) -> bool {
    row.columns().iter().map(Column::name).eq([column])
}

fn text<I: ColumnIndex<PgRow>>(row: &PgRow, column: I) -> Option<String> {
    row.try_get_raw(column).ok()?.as_str().ok().map(str::to_owned)
}

/// Ends the empty transaction that CHAIN has left. Its ROLLBACK goes out before the next message, or by itself when the
/// connection is given back.
pub(crate) fn leave(conn: &mut PgConnection) {
    while depth::<Postgres>(conn) > 0 {
        Manager::start_rollback(conn);
    }
}

/// The id of the transaction. Nothing that could commit it has been sent, so an error means a rollback.
pub(crate) async fn receipt(conn: &mut PgConnection) -> Result<Receipt, CommitFailure> {
    let mut rows = match sqlx::raw_sql(RECEIPT).fetch_all(conn).await {
        Ok(rows) => rows,
        Err(error) if is_refusal(&error) => return Err(CommitFailure::Aborted(error)),
        Err(error) => return Err(CommitFailure::Refused(error)),
    };
    let row = rows.pop().ok_or_else(|| CommitFailure::Refused(out_of_step()))?;
    let timeline = text(&row, "txg_timeline").ok_or_else(|| CommitFailure::Refused(out_of_step()))?;
    Ok(Receipt { transaction: text(&row, "txg_transaction"), timeline })
}

pub(crate) fn in_doubt(error: sqlx::Error, receipt: Option<Receipt>) -> CommitFailure {
    match receipt {
        Some(receipt) => CommitFailure::Resolvable(error, receipt),
        None => CommitFailure::Unknown(error),
    }
}

/// Asks for the fate of the transaction until it is known, on a separate connection. `end` ends its session.
pub(crate) async fn resolve<F: Future>(
    options: &PgConnectOptions,
    receipt: &Receipt,
    limit: Duration,
    end: impl Fn() -> F,
) -> Option<bool> {
    let ask = async {
        let mut pause = FIRST_RESOLVE_PAUSE;
        loop {
            match timeout(RESOLVE_ATTEMPT, fate(options, receipt)).await {
                Ok(Ok(Some(status))) if status == "committed" => return Some(true),
                Ok(Ok(Some(status))) if status == "aborted" => return Some(false),
                // Its client is gone, so the session need not wait for a COMMIT that never comes.
                Ok(Ok(Some(_))) => drop(timeout(RESOLVE_ATTEMPT, end()).await),
                // The server has another history.
                Ok(Ok(None)) => return None,
                Ok(Err(_)) | Err(_) => {}
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_RESOLVE_PAUSE);
        }
    };
    timeout(limit, ask).await.ok().flatten()
}

async fn fate(options: &PgConnectOptions, receipt: &Receipt) -> Result<Option<String>, sqlx::Error> {
    // On a standby, nothing can have been committed.
    let Some(transaction) = &receipt.transaction else { return Ok(Some("aborted".to_owned())) };
    let plain = |text: &str| text.chars().filter(char::is_ascii_alphanumeric).collect::<String>();
    let fate = FATE.replace("TRANSACTION", &plain(transaction)).replace("TIMELINE", &plain(&receipt.timeline));
    let mut conn = options.connect().await?;
    // One simple query, because behind a pooler two messages may reach two sessions.
    let mut rows = sqlx::raw_sql(AssertSqlSafe(fate)).fetch_all(&mut conn).await?;
    let status = rows.pop().map(|row| text(&row, 0));
    // The answer counts, whatever becomes of the farewell.
    drop(conn.close().await);
    Ok(status.flatten())
}

pub(crate) fn out_of_step() -> sqlx::Error {
    sqlx::Error::Protocol("the answer is that to another message".into())
}

/// Whether the server has refused and lives on. A FATAL answer may have come before or after the commit.
pub(crate) fn is_refusal(error: &sqlx::Error) -> bool {
    severity(error).is_some_and(|severity| !matches!(severity, PgSeverity::Fatal | PgSeverity::Panic))
}

/// Whether the server has said that it ends the session, after which nothing is run on it.
pub(crate) fn is_last_word(error: &sqlx::Error) -> bool {
    severity(error).is_some_and(|severity| matches!(severity, PgSeverity::Fatal | PgSeverity::Panic))
}

fn severity(error: &sqlx::Error) -> Option<PgSeverity> {
    Some(error.as_database_error()?.try_downcast_ref::<PgDatabaseError>()?.severity())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_gone_is_asked_for_as_long_as_is_said() {
        // Nobody listens on this port any more.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let options = PgConnectOptions::new_without_pgpass().host("127.0.0.1").port(port);
        let receipt = Receipt { transaction: Some("1".to_owned()), timeline: "00000001".to_owned() };
        for limit in [1, 60].map(Duration::from_secs) {
            let start = Instant::now();
            assert_eq!(resolve(&options, &receipt, limit, async || {}).await, None);
            let took = start.elapsed();
            assert!(took >= limit && took < limit + RESOLVE_ATTEMPT, "{took:?}");
        }
    }
}
