//! Whether a failure is transient, wherever in an error chain it is.
//!
//! Invariant: an error after a possible commit is never transient, whatever its sources are.

use std::any::Any;
use std::error::Error;
use std::io;

use sqlx::error::DatabaseError;

#[cfg(any(feature = "mysql", feature = "postgres", feature = "sqlite"))]
use crate::backend::Driver;
use crate::{CommitError, TxError};

/// How many sources of an error are checked: an error that is its own source must not be followed for ever.
const LONGEST_CHAIN: usize = 64;

/// What is known of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The same work may well succeed if run again.
    Transient,
    /// COMMIT was sent, and how it ended will never be known.
    Unknown,
    /// COMMIT is still under way.
    Pending,
    /// It would fail again.
    Lasting,
}

/// Returns whether `error`, or one of its sources, is a failure that another attempt may well avoid: a serialization
/// failure or a deadlock of PostgreSQL (40001, 40P01), a deadlock or a lock wait that took too long on MySQL (1213,
/// 1205), a busy or locked SQLite.
///
/// Use it inside [`Tx::retry_if`](crate::Tx::retry_if), for an application's own error type that
/// [`Tx::run`](crate::Tx::run) cannot look into. If the transaction may have been committed, the error is never
/// transient.
///
/// ```
/// use cancel_safe_tx_guard::{TxError, is_transient};
///
/// let error = TxError::application("the account is overdrawn");
/// assert!(!is_transient(&error));
/// ```
#[must_use]
pub fn is_transient(error: &(dyn Error + 'static)) -> bool {
    verdict(error) == Verdict::Transient
}

impl TxError {
    /// Returns whether the database could not run the transaction alongside others, so the same work may well succeed
    /// if it is run again. [`Tx::retry`](crate::Tx::retry) does that. It is the same as [`is_transient`] of the error.
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// use cancel_safe_tx_guard::{TxError, TxPool};
    ///
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// # let file = tempfile::NamedTempFile::new().unwrap();
    /// let options = sqlx::sqlite::SqliteConnectOptions::new().filename(file.path());
    /// let db = TxPool::<sqlx::Sqlite>::builder()
    ///     .connect_with(options.busy_timeout(std::time::Duration::ZERO))
    ///     .await?;
    /// let writer = db.tx().immediate().begin().await?;
    /// let other = db.tx().immediate().begin().await.unwrap_err();
    /// assert!(other.is_transient(), "{other}");
    /// # writer.rollback().await?;
    /// # Ok::<(), TxError>(())
    /// # }).unwrap();
    /// # }
    /// ```
    #[must_use]
    pub fn is_transient(&self) -> bool {
        is_transient(self)
    }
}

/// Returns the verdict on whatever error the work of a transaction returned, if its type is known.
pub(crate) fn verdict_of_any(error: &dyn Any) -> Verdict {
    let error: Option<&(dyn Error + 'static)> = if let Some(error) = error.downcast_ref::<TxError>() {
        Some(error)
    } else if let Some(error) = error.downcast_ref::<sqlx::Error>() {
        Some(error)
    } else if let Some(error) = error.downcast_ref::<CommitError>() {
        Some(error)
    } else if let Some(error) = error.downcast_ref::<Box<dyn Error + Send + Sync>>() {
        Some(&**error)
    } else if let Some(error) = error.downcast_ref::<Box<dyn Error + Send>>() {
        Some(&**error)
    } else if let Some(error) = error.downcast_ref::<Box<dyn Error>>() {
        Some(&**error)
    } else {
        None
    };
    error.map_or(Verdict::Lasting, verdict)
}

/// Checks `error` and then its sources. The first one with a verdict decides.
pub(crate) fn verdict(error: &(dyn Error + 'static)) -> Verdict {
    let mut next = Some(error);
    for _ in 0..LONGEST_CHAIN {
        let Some(error) = next else { break };
        match verdict_of_one(error) {
            Verdict::Lasting => next = behind(error),
            verdict => return verdict,
        }
    }
    Verdict::Lasting
}

fn verdict_of_one(error: &(dyn Error + 'static)) -> Verdict {
    match error.downcast_ref() {
        Some(TxError::Unknown { .. }) => return Verdict::Unknown,
        Some(TxError::Pending(_)) => return Verdict::Pending,
        _ => {}
    }
    if let Some(CommitError::Pending(_)) = error.downcast_ref() {
        return Verdict::Pending;
    }
    let transient = of_a_driver(error).is_some_and(|error| DRIVERS.iter().any(|is_transient| is_transient(error)));
    if transient { Verdict::Transient } else { Verdict::Lasting }
}

/// The next error behind `error`. Some errors are transparent: they return the source of the error inside them as their
/// own, so the inner error would be skipped.
fn behind<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e (dyn Error + 'static)> {
    if let Some(TxError::Application(held)) = error.downcast_ref() {
        return Some(&**held);
    }
    if let Some(CommitError::Failed(held)) = error.downcast_ref() {
        return Some(held);
    }
    match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        Some(held) => Some(held),
        None => error.source(),
    }
}

/// What counts as transient for each database. Each function recognises only its own errors.
const DRIVERS: &[fn(&(dyn DatabaseError + 'static)) -> bool] = &[
    #[cfg(feature = "mysql")]
    <sqlx::MySql as Driver>::is_transient,
    #[cfg(feature = "postgres")]
    <sqlx::Postgres as Driver>::is_transient,
    #[cfg(feature = "sqlite")]
    <sqlx::Sqlite as Driver>::is_transient,
];

/// The database error in `error`, with or without sqlx's wrapper, which a transparent error hides.
fn of_a_driver<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e (dyn DatabaseError + 'static)> {
    if let Some(error) = error.downcast_ref::<sqlx::Error>() {
        return error.as_database_error();
    }
    if let Some(error) = error.downcast_ref::<Box<dyn DatabaseError>>() {
        return Some(&**error);
    }
    #[cfg(feature = "mysql")]
    if let Some(error) = error.downcast_ref::<sqlx::mysql::MySqlDatabaseError>() {
        return Some(error);
    }
    #[cfg(feature = "postgres")]
    if let Some(error) = error.downcast_ref::<sqlx::postgres::PgDatabaseError>() {
        return Some(error);
    }
    #[cfg(feature = "sqlite")]
    if let Some(error) = error.downcast_ref::<sqlx::sqlite::SqliteError>() {
        return Some(error);
    }
    None
}
