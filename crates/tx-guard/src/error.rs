//! What can go wrong, one variant for each thing a caller can do about it.
//!
//! Invariant: no error text contains credentials or row data. A target is described by its host and database (or its
//! file), never by its URL, and the driver's messages are shown without values.

use std::io;
use std::time::Duration;

use crate::OutcomeHandle;
use crate::said::said;

/// Why a pool could not be opened, or why a transaction could not be begun, used or ended.
///
/// `From<sqlx::Error>` lets `?` carry the error of a statement, and `From<TxError> for sqlx::Error` lets a
/// function that returns `sqlx::Error` use a guard.
///
/// The message says where it happened and what the database reported, with its SQLSTATE or number. It leaves out
/// PostgreSQL's details and quoted values, because they are row data; they are in the
/// [source](std::error::Error::source).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TxError {
    /// The database URL could not be understood, or names another kind of database.
    #[error("the {database} URL is not valid: {reason}")]
    InvalidUrl {
        /// The kind of database that the caller asked for, such as `PostgreSQL`.
        database: &'static str,
        /// What is wrong with the URL, without its credentials.
        reason: String,
    },
    /// An option of the builder is out of range.
    #[error("the option {option} is not valid: {reason}")]
    InvalidOption {
        /// The name of the builder's method.
        option: &'static str,
        /// What is wrong with its value.
        reason: &'static str,
    },
    /// The server answered, but the database (or the file) does not exist or cannot be opened.
    #[error("the database {target} does not exist or cannot be opened: {}", said(source))]
    MissingDatabase {
        /// The database and its server, or the file.
        target: String,
        /// The error of the driver.
        source: sqlx::Error,
    },
    /// The server did not answer: it is down, the address is wrong, or something else listens there.
    #[error("{target} cannot be reached: {}", said(source))]
    Unreachable {
        /// The database and its server, or the file.
        target: String,
        /// The error of the driver.
        source: sqlx::Error,
    },
    /// The server answered and refused the connection, and will refuse the next one: wrong credentials, or no
    /// permission.
    #[error("{target} refused the connection: {}", said(source))]
    Refused {
        /// The database and its server, or the file.
        target: String,
        /// The error of the driver.
        source: sqlx::Error,
    },
    /// The server has no session left, or none for this account (53300; 1040, 1203, 1226). One may be free later. To
    /// prevent this, use a smaller pool, or fewer pools.
    #[error("{target} has no session left: {}", said(source))]
    TooManySessions {
        /// The database and its server, or the file.
        target: String,
        /// The error of the driver.
        source: sqlx::Error,
    },
    /// The server is starting up or shutting down (57P03, 57P01, 57P02; 1053). It may accept connections later.
    #[error("{target} accepts no connections now: {}", said(source))]
    NotReady {
        /// The database and its server, or the file.
        target: String,
        /// The error of the driver.
        source: sqlx::Error,
    },
    /// Opening a connection took longer than the builder's `connect_timeout`, or than the time that was left: until the
    /// deadline of a closure, or the acquire timeout of a wrapped pool.
    #[error("no connection to {target} was established within {timeout:?}")]
    ConnectTimeout {
        /// The database and its server, or the file.
        target: String,
        /// The timeout that passed.
        timeout: Duration,
    },
    /// A pooler in front of the server gives each transaction another session, and the pool was not told: see
    /// [`PoolerMode`](crate::PoolerMode). Nothing was changed on any session.
    #[error(
        "{target} is behind a pooler that gives each transaction another session: \
         say so with `.pooler(PoolerMode::Transaction)`, or name the port of the server itself"
    )]
    Pooler {
        /// The database and its server.
        target: String,
    },
    /// Every connection of the pool stayed in use for the whole acquire timeout, or until the deadline of a closure.
    #[error("all {max_connections} connections to {target} stayed in use for {timeout:?}")]
    PoolExhausted {
        /// The database and its server, or the file.
        target: String,
        /// How many connections the pool may hold.
        max_connections: u32,
        /// The timeout that passed.
        timeout: Duration,
    },
    /// The pool has been closed.
    #[error("the pool is closed")]
    Closed,
    /// The operation was polled outside a tokio runtime.
    #[error("transactions need a tokio runtime, and there is none here")]
    NoRuntime,
    /// An earlier statement failed, so the database could only roll back. Nothing was committed.
    #[error("the transaction was already aborted by an earlier error and is rolled back: {}", said(source))]
    Aborted {
        /// The database's answer to the commit.
        source: sqlx::Error,
    },
    /// The transaction ended behind the guard's back, or what a dropped statement left to be read made a commit
    /// impossible. The guard has committed nothing.
    #[error("the transaction was lost: {reason}")]
    Lost {
        /// What ended it, as far as that is known.
        reason: &'static str,
    },
    /// COMMIT was sent and no answer came: the transaction may or may not have been committed.
    #[error("whether the transaction was committed is unknown, its connection failed inside COMMIT: {}", said(source))]
    Unknown {
        /// The error of the driver.
        source: sqlx::Error,
    },
    /// The timeout of the whole transaction passed before its commit. It is rolled back.
    #[error("the transaction took longer than {timeout:?} and is rolled back")]
    Timeout {
        /// The timeout that passed.
        timeout: Duration,
    },
    /// The timeout of the whole transaction passed during COMMIT. The commit continues, and the handle reports how it
    /// ends.
    #[error("the commit is still under way")]
    Pending(OutcomeHandle),
    /// The server did not confirm the rollback in time, and its connection was closed. Nothing is committed, but row
    /// locks may be held until the server notices.
    #[error("the server of {target} did not confirm the rollback within {waited:?}; nothing is committed")]
    Unconfirmed {
        /// The database and its server, or the file.
        target: String,
        /// How long the guard waited for the answer.
        waited: Duration,
    },
    /// [`Attempts::next`](crate::Attempts::next) was called once too often.
    #[error("there is no further attempt at the transaction: {reason}")]
    NoAttempt {
        /// Why there is no further attempt.
        reason: &'static str,
    },
    /// The caller's own error, from inside a transaction; it rolls the transaction back. See [`TxError::application`].
    #[error(transparent)]
    Application(Box<dyn std::error::Error + Send + Sync>),
    /// A statement failed, or the database refused to begin or to commit (and rolled back).
    #[error("the database operation failed: {}", said(.0))]
    Database(#[source] sqlx::Error),
}

impl TxError {
    /// Returns whether a connection could not be opened: URL, server, database, credentials, sessions or time.
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// use cancel_safe_tx_guard::TxPool;
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let nowhere = TxPool::<sqlx::Sqlite>::connect("sqlite:///no/such/directory/db").await;
    /// let error = nowhere.unwrap_err();
    /// assert!(error.is_connect());
    /// # });
    /// # }
    /// ```
    #[must_use]
    pub fn is_connect(&self) -> bool {
        matches!(
            self,
            Self::InvalidUrl { .. }
                | Self::MissingDatabase { .. }
                | Self::Unreachable { .. }
                | Self::Refused { .. }
                | Self::TooManySessions { .. }
                | Self::NotReady { .. }
                | Self::ConnectTimeout { .. }
                | Self::Pooler { .. }
        )
    }

    /// Returns whether the database had no room for the transaction, or was unavailable. The transaction was not begun,
    /// and a later try may well succeed. A web service answers this with 503.
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// use std::time::Duration;
    /// use cancel_safe_tx_guard::TxPool;
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let pool = TxPool::<sqlx::Sqlite>::builder().max_connections(1);
    /// let pool = pool.acquire_timeout(Duration::from_millis(10));
    /// let db = pool.connect("sqlite::memory:").await.unwrap();
    /// let held = db.begin().await.unwrap();
    /// let error = db.begin().await.unwrap_err();
    /// assert!(error.is_unavailable() && error.is_timeout(), "{error}");
    /// # drop(held);
    /// # });
    /// # }
    /// ```
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. }
                | Self::TooManySessions { .. }
                | Self::NotReady { .. }
                | Self::ConnectTimeout { .. }
                | Self::PoolExhausted { .. }
                | Self::Database(sqlx::Error::PoolTimedOut)
                | Self::Closed
        )
    }

    /// Wraps the caller's own error, to roll back from inside a closure that runs in a transaction.
    ///
    /// ```
    /// use cancel_safe_tx_guard::TxError;
    ///
    /// let error = TxError::application("the account is overdrawn");
    /// assert_eq!(error.to_string(), "the account is overdrawn");
    /// ```
    pub fn application(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Application(error.into())
    }

    /// Returns whether a time limit passed before anything was committed. A later try may help.
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// use std::time::Duration;
    /// use cancel_safe_tx_guard::{TxError, TxPool};
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let db = TxPool::<sqlx::Sqlite>::connect("sqlite::memory:").await.unwrap();
    /// let run = db.tx().timeout(Duration::from_millis(10)).run(async move |_| {
    ///     std::future::pending::<()>().await;
    ///     Ok::<_, TxError>(())
    /// });
    /// assert!(run.await.unwrap_err().is_timeout());
    /// # });
    /// # }
    /// ```
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(
            self,
            Self::ConnectTimeout { .. }
                | Self::PoolExhausted { .. }
                | Self::Database(sqlx::Error::PoolTimedOut)
                | Self::Timeout { .. }
        )
    }

    /// Returns whether the transaction may have been, or may yet be, committed: [`Unknown`](Self::Unknown) or
    /// [`Pending`](Self::Pending). After any other error, the guard has committed nothing.
    ///
    /// ```
    /// use cancel_safe_tx_guard::TxError;
    ///
    /// let lost = TxError::Unknown { source: sqlx::Error::WorkerCrashed };
    /// assert!(lost.is_unknown());
    /// assert!(!TxError::Closed.is_unknown());
    /// ```
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::Unknown { .. } | Self::Pending(_))
    }

    /// Returns the underlying error of the driver, if there is one.
    #[must_use]
    pub fn as_sqlx(&self) -> Option<&sqlx::Error> {
        match self {
            Self::MissingDatabase { source, .. }
            | Self::Unreachable { source, .. }
            | Self::Refused { source, .. }
            | Self::TooManySessions { source, .. }
            | Self::NotReady { source, .. }
            | Self::Aborted { source }
            | Self::Unknown { source }
            | Self::Database(source) => Some(source),
            _ => None,
        }
    }
}

impl From<sqlx::Error> for TxError {
    fn from(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::PoolClosed => Self::Closed,
            // If a function that returns sqlx's error has wrapped one of ours, it comes back as itself.
            sqlx::Error::Io(error) => match error.downcast::<Self>() {
                Ok(ours) => ours,
                Err(error) => Self::Database(sqlx::Error::Io(error)),
            },
            error => Self::Database(error),
        }
    }
}

impl From<TxError> for sqlx::Error {
    /// A driver's error comes out as itself; ours travels inside an `Io` error, and comes back as itself.
    fn from(error: TxError) -> Self {
        match error {
            TxError::Database(error) => error,
            TxError::Closed => Self::PoolClosed,
            TxError::PoolExhausted { .. } => Self::PoolTimedOut,
            error => Self::Io(io::Error::other(error)),
        }
    }
}

/// Why [`commit_within`](crate::TransactionGuard::commit_within) did not return "committed".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommitError {
    /// The time ran out during COMMIT. The commit continues, and the handle reports how it ends.
    #[error("the commit is still under way")]
    Pending(OutcomeHandle),
    /// The commit ended in time, without success.
    #[error(transparent)]
    Failed(#[from] TxError),
}

impl CommitError {
    /// Returns whether the commit is still in progress.
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// use std::time::Duration;
    /// use cancel_safe_tx_guard::TxPool;
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let db = TxPool::<sqlx::Sqlite>::connect("sqlite::memory:").await.unwrap();
    /// let tx = db.begin().await.unwrap();
    /// match tx.commit_within(Duration::ZERO).await {
    ///     Ok(()) => {}
    ///     Err(error) => assert!(error.is_pending()),
    /// }
    /// # });
    /// # }
    /// ```
    #[must_use]
    pub fn is_pending(&self) -> bool {
        matches!(self, Self::Pending(_))
    }
}
