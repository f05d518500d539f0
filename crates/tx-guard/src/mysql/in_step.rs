//! Keeping sqlx in step with a MySQL server, so that each answer belongs to its statement.
//!
//! sqlx reads an answer in parts, and a future that is dropped between two parts leaves the rest to the next reader: a
//! row, or any bytes in it, may then pass for the answer to ROLLBACK or to COMMIT.
//!
//! Invariant: an answer is believed only after a random number that is unlikely to have been sent before. Once that
//! number was read, nothing older is left to read. After a dropped statement, the number is requested by preparing a
//! statement, because sqlx allocates as many columns as the answer to a query announces: if that is really a part of a
//! row, it may exceed the memory and end the process. The answer to a preparation cannot announce more than 65,535.

use std::panic::AssertUnwindSafe;
use std::pin::pin;

use futures_util::{FutureExt, StreamExt};
use sqlx::{AssertSqlSafe, Column, Connection, Either, Executor, MySqlConnection, Row, SqlSafeStr, Statement};

/// How often the server is asked: each abandoned statement may answer with one error.
const ATTEMPTS: usize = 16;

/// The answers to a message of several statements.
pub(crate) struct Answers {
    /// Whether the number has come, so that everything after it answers this message.
    pub(crate) proved: bool,
    /// How many statements were done before the error.
    pub(crate) done: usize,
    pub(crate) error: Option<sqlx::Error>,
}

/// Sends statements after one that answers with a number, all in one message.
///
/// If sqlx is out of step, it may take a part of another answer for a length, and panic while reading.
pub(crate) async fn exchange(conn: &mut MySqlConnection, sql: &str) -> Answers {
    // Another answer has these digits only with a chance of one in 2^62.
    let number = fastrand::i64(1 << 62..);
    let sql = format!("SELECT {number}; {sql}");
    // The end of the number's own answer counts as well.
    let (mut proved, mut ends) = (false, 0_usize);
    let read = AssertUnwindSafe(async {
        let mut answers = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_many(conn);
        while let Some(answer) = answers.next().await {
            match answer {
                Ok(Either::Left(_)) if proved => ends += 1,
                Ok(Either::Right(row)) if !proved && row.try_get::<i64, _>(0).ok() == Some(number) => proved = true,
                Ok(_) => return Some(out_of_step()),
                Err(error) => return Some(error),
            }
        }
        None
    });
    let error = read.catch_unwind().await.unwrap_or_else(|_| Some(out_of_step()));
    Answers { proved, done: ends.saturating_sub(1), error }
}

/// Runs statements that have no rows.
pub(crate) async fn run(conn: &mut MySqlConnection, sql: &str) -> Result<(), sqlx::Error> {
    catch_up(conn).await?;
    match exchange(conn, sql).await {
        Answers { proved: true, error: None, .. } => Ok(()),
        Answers { proved: true, error: Some(error), .. } => Err(error),
        Answers { .. } => Err(out_of_step()),
    }
}

/// Reads everything left unread, and makes sure that nothing of it remains and that these statements, which have no
/// rows, were done.
///
/// # Errors
///
/// If something remains, nobody can tell where it ends, and the connection cannot be used any more.
pub(crate) async fn insist(conn: &mut MySqlConnection, sql: &str) -> Result<(), sqlx::Error> {
    prove(conn).await?;
    repeat(conn, sql).await
}

/// Runs statements without rows until no late cancel has hit them. Nothing may be left unread.
pub(crate) async fn repeat(conn: &mut MySqlConnection, sql: &str) -> Result<(), sqlx::Error> {
    for _ in 0..ATTEMPTS {
        match exchange(conn, sql).await {
            Answers { proved: true, error: None, .. } => return Ok(()),
            Answers { error: Some(sqlx::Error::Database(_)), .. } => {}
            Answers { error, .. } => return Err(error.unwrap_or_else(out_of_step)),
        }
    }
    Err(restless())
}

/// Reads everything left unread, whatever it is, and the answers to the rollbacks that sqlx still has to send, and
/// makes sure that nothing remains.
pub(crate) async fn prove(conn: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    for _ in 0..ATTEMPTS {
        // The name of the column is the proof. The number differs each time, because sqlx would not prepare the same
        // text again. The statement stays in sqlx's cache until others take its place, as sqlx has no way to prepare
        // without the cache.
        let number = fastrand::i64(1 << 62..).to_string();
        let prepare = AssertUnwindSafe(async {
            let statement = conn.prepare(AssertSqlSafe(format!("SELECT {number}")).into_sql_str()).await?;
            let names: Vec<_> = statement.columns().iter().map(Column::name).collect();
            if names == [number.as_str()] { Ok(()) } else { Err(out_of_step()) }
        });
        match prepare.catch_unwind().await {
            Ok(Ok(())) => return Ok(()),
            // The error answers what was left unread, in which case nothing was sent, or this statement, which was
            // cancelled.
            Ok(Err(sqlx::Error::Database(_))) => {}
            Ok(Err(error)) => return Err(error),
            Err(_) => return Err(out_of_step()),
        }
    }
    Err(restless())
}

/// Works like `prove`, but only if something is left unread.
pub(crate) async fn catch_up(conn: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    if is_left(conn).await? { prove(conn).await } else { Ok(()) }
}

/// Reads what was left unread, and returns whether more may remain. If there is nothing, this costs nothing; if the
/// rest has already arrived, it may be overlooked.
pub(crate) async fn is_left(conn: &mut MySqlConnection) -> Result<bool, sqlx::Error> {
    let mut left = pin!(conn.flush());
    match left.as_mut().now_or_never() {
        Some(read) => read.map(|()| false),
        // Not dropped, because that would leave part of an answer once more.
        None => left.await.map(|()| true),
    }
}

pub(crate) fn out_of_step() -> sqlx::Error {
    sqlx::Error::Protocol("the answer is that to another statement".into())
}

fn restless() -> sqlx::Error {
    sqlx::Error::Protocol("the connection does not come to rest".into())
}
