//! A transaction's options: isolation, time limit, retries, and idempotence.
//!
//! Invariant: nothing begins here, so options can be set in any order and thrown away.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::{Backend, CommitMode, Isolation, Mode};
use crate::{Retry, TxPool};

/// A transaction and its options, to be [run](Self::run) as a closure or [begun](Self::begin) by hand. From
/// [`TxPool::tx`].
#[must_use = "nothing is begun until run() or begin() is awaited"]
pub struct Tx<DB: Backend> {
    pub(crate) pool: TxPool<DB>,
    pub(crate) mode: Mode,
    pub(crate) timeout: Option<Duration>,
    pub(crate) retry: Retry,
    pub(crate) retry_if: Vec<IsTransient>,
    pub(crate) idempotent: bool,
    pub(crate) commit_mode: CommitMode,
}

/// Says whether an error of any type is transient.
pub(crate) type IsTransient = Arc<dyn Fn(&dyn Any) -> bool + Send + Sync>;

impl<DB: Backend> TxPool<DB> {
    /// Returns a transaction with options: isolation, timeout, retry.
    pub fn tx(&self) -> Tx<DB> {
        Tx {
            pool: self.clone(),
            mode: Mode::default(),
            timeout: None,
            retry: Retry::none(),
            retry_if: Vec::new(),
            idempotent: false,
            commit_mode: self.commit_mode(),
        }
    }
}

impl<DB: Backend> Tx<DB> {
    /// Names the transaction in [records](crate::TxRecord) and `tracing` events. Default: no name.
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// # use cancel_safe_tx_guard::{TxError, TxEvent, TxPool};
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// # let db = TxPool::<sqlx::Sqlite>::connect("sqlite::memory:").await?;
    /// let mut events = db.events();
    /// drop(db.tx().named("transfer").begin().await?);
    /// let record = events.record().await.expect("the pool is there");
    /// assert_eq!((record.event, record.name), (TxEvent::ImplicitRollback, Some("transfer")));
    /// # Ok::<(), TxError>(())
    /// # }).unwrap();
    /// # }
    /// ```
    pub fn named(mut self, name: &'static str) -> Self {
        self.mode.name = Some(name);
        self
    }

    /// Sets the isolation. Default: the database's own. SQLite knows only one, the strictest.
    pub fn isolation(mut self, isolation: Isolation) -> Self {
        self.mode.isolation = Some(isolation);
        self
    }

    /// Sets the strictest isolation. On SQLite, where it always holds, this takes the write lock at the beginning.
    pub fn serializable(self) -> Self {
        self.isolation(Isolation::Serializable)
    }

    /// Takes SQLite's write lock at the beginning, so a transaction that reads before it writes need not fail because
    /// another has written meanwhile. It has no effect on PostgreSQL and MySQL, or on a [`read_only`](Self::read_only)
    /// transaction.
    pub fn immediate(mut self) -> Self {
        self.mode.immediate = true;
        self
    }

    /// Forbids writes: PostgreSQL and MySQL refuse each statement that writes, SQLite refuses the commit.
    pub fn read_only(mut self) -> Self {
        self.mode.read_only = true;
        self
    }

    /// Sets how long everything may take: all attempts, their pauses, and the wait for a connection. Default: no limit.
    ///
    /// Any failure at or after that moment is reported as [`TxError::Timeout`](crate::TxError::Timeout), unless the
    /// transaction may have been committed.
    ///
    /// PostgreSQL and MariaDB get the limit as well, so a transaction whose client has vanished ends there a second or
    /// two later. MySQL can only limit a `SELECT` and the wait for a lock. The limits on the server come later than
    /// this one.
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.timeout = timeout.into();
        self
    }

    /// Repeats the work after a transient failure: a serialization failure or deadlock of PostgreSQL (40001, 40P01), a
    /// busy or locked SQLite, a deadlock or a lock wait that took too long on MySQL (1213, 1205). Default:
    /// [`Retry::none`].
    ///
    /// It finds such a failure in the error that the work returns, and in the chain of its sources, if that error is a
    /// [`TxError`](crate::TxError), an [`sqlx::Error`] or a boxed [`std::error::Error`]. For another type, use
    /// [`retry_if`](Self::retry_if). It always sees failures of the begin and of the commit.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// Treats the application's own errors as transient if `is_transient` says so, so [`retry`](Self::retry) applies to
    /// them too. It has no effect on work that returns another type of error.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// use cancel_safe_tx_guard::{Retry, TxError, TxPool, is_transient};
    ///
    /// enum AppError {
    ///     Database(TxError),
    ///     Overdrawn,
    /// }
    /// # impl From<TxError> for AppError {
    /// #     fn from(error: TxError) -> Self {
    /// #         Self::Database(error)
    /// #     }
    /// # }
    ///
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// # let db = TxPool::<sqlx::Sqlite>::connect("sqlite::memory:").await?;
    /// let tx = db.tx().retry(Retry::default()).retry_if(|error: &AppError| match error {
    ///     AppError::Database(error) => is_transient(error),
    ///     AppError::Overdrawn => false,
    /// });
    /// let overdrawn = tx.run(async move |_| Err(AppError::Overdrawn));
    /// let worked: Result<(), AppError> = overdrawn.await;
    /// assert!(matches!(worked, Err(AppError::Overdrawn)));
    /// # Ok::<(), TxError>(())
    /// # }).unwrap();
    /// # }
    /// ```
    pub fn retry_if<E: 'static>(mut self, is_transient: impl Fn(&E) -> bool + Send + Sync + 'static) -> Self {
        let of_any = move |error: &dyn Any| error.downcast_ref().is_some_and(&is_transient);
        self.retry_if.push(Arc::new(of_any));
        self
    }

    /// Declares that doing the work twice does no more than doing it once. So it may be repeated after a commit with an
    /// unknown outcome.
    pub fn idempotent(mut self) -> Self {
        self.idempotent = true;
        self
    }

    /// Sets what happens if the connection is lost inside `COMMIT`. Default: what the pool does.
    pub fn commit_mode(mut self, mode: CommitMode) -> Self {
        self.commit_mode = mode;
        self
    }
}

impl<DB: Backend> fmt::Debug for Tx<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tx")
            .field("mode", &self.mode)
            .field("timeout", &self.timeout)
            .field("retry", &self.retry)
            .field("idempotent", &self.idempotent)
            .field("commit_mode", &self.commit_mode)
            .finish_non_exhaustive()
    }
}
