//! A driver's message about a failure, in a form that an operator can act on.
//!
//! Invariant: no row data. The detail of PostgreSQL's errors is left out, and so are the values that MySQL and
//! PostgreSQL quote in their messages. The full text is in the source of each error.

use std::borrow::Cow;
use std::io;

use sqlx::error::DatabaseError;

/// A message with its error code.
pub(crate) fn said(error: &sqlx::Error) -> Cow<'static, str> {
    match error {
        sqlx::Error::Database(error) => of_the_database(&**error).into(),
        sqlx::Error::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            "the other side closed the connection".into()
        }
        sqlx::Error::Io(error) => error.to_string().into(),
        sqlx::Error::Tls(error) => format!("no encrypted connection came about: {error}").into(),
        sqlx::Error::Protocol(reason) => format!("the answer was not understood: {reason}").into(),
        sqlx::Error::PoolTimedOut => "it took too long".into(),
        sqlx::Error::WorkerCrashed => "the connection's own thread or runtime has ended".into(),
        // The others are about the caller's own types and columns.
        error => error.to_string().into(),
    }
}

fn of_the_database(error: &(dyn DatabaseError + 'static)) -> String {
    #[cfg(feature = "postgres")]
    if let Some(error) = error.try_downcast_ref::<sqlx::postgres::PgDatabaseError>() {
        let code = error.code();
        // Class 22 is about values, and quotes them.
        let message = if code.starts_with("22") { without_value(error.message(), '"') } else { error.message().into() };
        return format!("{message} (SQLSTATE {code})");
    }
    #[cfg(feature = "mysql")]
    if let Some(error) = error.try_downcast_ref::<sqlx::mysql::MySqlDatabaseError>() {
        let (number, state) = (error.number(), error.code().unwrap_or("HY000"));
        let quotes = state.starts_with("22") || QUOTING.contains(&number);
        let message = if quotes { without_value(error.message(), '\'') } else { error.message().into() };
        return format!("{message} (error {number}, SQLSTATE {state})");
    }
    match error.code() {
        Some(code) => format!("{} (code {code})", error.message()),
        None => error.message().to_owned(),
    }
}

/// MySQL's errors that quote a value outside of class 22: duplicate entries and wrong values.
#[cfg(feature = "mysql")]
const QUOTING: [u16; 5] = [1062, 1366, 1411, 1525, 1586];

/// Removes everything between the first quotation mark and the last one that can end it, because a value may contain
/// such marks too.
#[cfg(any(feature = "mysql", feature = "postgres"))]
fn without_value(message: &str, mark: char) -> Cow<'_, str> {
    let Some(start) = message.find(mark).map(|at| at + mark.len_utf8()) else { return message.into() };
    // The text behind the value names the key or the column.
    let named = if mark == '\'' { message.rfind("' for ") } else { None };
    match named.or_else(|| message.rfind(mark)).filter(|end| *end >= start) {
        Some(end) => format!("{}…{}", &message[..start], &message[end..]).into(),
        None => format!("{}…", &message[..start]).into(),
    }
}

#[cfg(all(test, any(feature = "mysql", feature = "postgres")))]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_left_out_and_the_name_of_its_key_is_not() {
        let cases = [
            ('\'', "Duplicate entry 'it's 1' for key 'PRIMARY'", "Duplicate entry '…' for key 'PRIMARY'"),
            (
                '\'',
                "Incorrect integer value: 'x' for column `a`.`b` at row 1",
                "Incorrect integer value: '…' for column `a`.`b` at row 1",
            ),
            ('\'', "Truncated incorrect DOUBLE value: 'x'y'", "Truncated incorrect DOUBLE value: '…'"),
            ('"', "invalid input syntax for type integer: \"a\"b\"", "invalid input syntax for type integer: \"…\""),
            ('"', "value \"99\" is out of range for type integer", "value \"…\" is out of range for type integer"),
            ('"', "division by zero", "division by zero"),
            ('"', "cut off: \"sec", "cut off: \"…"),
        ];
        for (mark, message, without) in cases {
            assert_eq!(without_value(message, mark), without);
        }
    }
}
