//! Whether sqlx and a MySQL server mean the same answer.
//!
//! sqlx reads an answer in parts, and a future that is dropped between two of them leaves the rest to whoever reads next:
//! a row, or any bytes in it, may then pass for the answer to ROLLBACK or to COMMIT.
//!
//! Invariant: an answer is believed only if a number came with it that nobody can have known before.

use std::panic::AssertUnwindSafe;
use std::pin::pin;

use futures_util::StreamExt;
use futures_util::future::{FutureExt, poll_immediate};
use sqlx::{AssertSqlSafe, Connection, Either, MySqlConnection, Row};

/// How often the server is asked: each statement that was left behind may answer with one error.
const ATTEMPTS: usize = 16;

/// What came back of a message of several statements.
pub(crate) struct Answers {
    /// How many of them were done before the error.
    pub(crate) done: usize,
    /// The number came where it was expected.
    pub(crate) proved: bool,
    pub(crate) error: Option<sqlx::Error>,
}

/// A statement that answers with a number, and the number.
pub(crate) fn question() -> (String, i64) {
    // No answer to anything else has these digits but by a chance of one in 2^62.
    let number = fastrand::i64(1 << 62..);
    (format!("SELECT {number}"), number)
}

/// Sends several statements, after the first `before` of which the number comes.
///
/// Where sqlx is out of step it may take a part of another answer for the length of something, and panic in reading it.
pub(crate) async fn exchange(conn: &mut MySqlConnection, sql: String, before: usize, number: i64) -> Answers {
    let (mut done, mut proved) = (0, false);
    let read = AssertUnwindSafe(async {
        let mut answers = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_many(conn);
        while let Some(answer) = answers.next().await {
            match answer {
                Ok(Either::Left(_)) => done += 1,
                Ok(Either::Right(row)) => {
                    if done != before || proved || row.try_get::<i64, _>(0).ok() != Some(number) {
                        return Some(out_of_step());
                    }
                    proved = true;
                }
                Err(error) => return Some(error),
            }
        }
        None
    });
    let error = read.catch_unwind().await.unwrap_or_else(|_| Some(out_of_step()));
    Answers { done, proved, error }
}

/// Reads what was left to be read, and makes sure that nothing of it is left.
///
/// # Errors
///
/// There is, and nobody can say where it ends: the connection cannot be used any more.
pub(crate) async fn prove(conn: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    for _ in 0..ATTEMPTS {
        let (sql, number) = question();
        match exchange(conn, sql, 0, number).await {
            Answers { done: 1, proved: true, error: None } => return Ok(()),
            // The answer to what was left, after which nothing was sent; or to this, which was cancelled.
            Answers { done: 0, proved: false, error: Some(sqlx::Error::Database(_)) } => {}
            Answers { error, .. } => return Err(error.unwrap_or_else(out_of_step)),
        }
    }
    Err(sqlx::Error::Protocol("the connection does not come to rest".into()))
}

/// The same where there is something left. Where there is nothing, this costs nothing; where it is there already, it may be
/// overlooked.
pub(crate) async fn catch_up(conn: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    let is_left = {
        let mut left = pin!(conn.flush());
        match poll_immediate(left.as_mut()).await {
            Some(read) => {
                read?;
                false
            }
            // Not dropped, because that would leave a part of an answer once more.
            None => left.await.map(|()| true)?,
        }
    };
    if is_left { prove(conn).await } else { Ok(()) }
}

fn out_of_step() -> sqlx::Error {
    sqlx::Error::Protocol("the answer is that to another statement".into())
}
