//! A transaction's options: how strict, how long, how often, and what may be done again.
//!
//! Invariant: nothing is begun here, so options can be set in any order and thrown away.

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

/// Says of an error of any type whether it is transient.
pub(crate) type IsTransient = Arc<dyn Fn(&dyn Any) -> bool + Send + Sync>;

impl<DB: Backend> TxPool<DB> {
    /// A transaction with options: isolation, timeout, retry.
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
    /// What the transaction is called in [records](crate::TxRecord) and `tracing` events. Default: nothing.
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

    /// The isolation. Default: the database's own. SQLite knows only one, the strictest.
    pub fn isolation(mut self, isolation: Isolation) -> Self {
        self.mode.isolation = Some(isolation);
        self
    }

    /// The strictest isolation. On SQLite, where it always holds, this takes the lock for writing at the beginning.
    pub fn serializable(self) -> Self {
        self.isolation(Isolation::Serializable)
    }

    /// SQLite's lock for writing is taken at the beginning, so a transaction that reads before it writes need not fail
    /// because another has written meanwhile. Without effect on PostgreSQL and MySQL, and on what is
    /// [`read_only`](Self::read_only).
    pub fn immediate(mut self) -> Self {
        self.mode.immediate = true;
        self
    }

    /// Nothing is written: PostgreSQL and MySQL refuse each statement that would, SQLite the commit.
    pub fn read_only(mut self) -> Self {
        self.mode.read_only = true;
        self
    }

    /// How long everything may take: all attempts, their pauses, and the wait for a connection. Default: no limit.
    ///
    /// Whatever fails at or past that moment is told as [`TxError::Timeout`](crate::TxError::Timeout), unless it may have
    /// been committed.
    ///
    /// PostgreSQL and MariaDB are told as well, so a transaction whose client has vanished ends there a second or two later;
    /// MySQL can only be told how long a `SELECT` and the wait for a lock may take. Their limits come later than ours.
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.timeout = timeout.into();
        self
    }

    /// Does the work again after a transient failure: a serialization failure or deadlock of PostgreSQL (40001, 40P01), a
    /// busy or locked SQLite, a deadlock or a lock waited for too long on MySQL (1213, 1205). Default: [`Retry::none`].
    ///
    /// Such a failure is found in what the work returns, and behind it in the chain of sources, if that is a
    /// [`TxError`](crate::TxError), an [`sqlx::Error`] or a boxed [`std::error::Error`]. For another type, say it with
    /// [`retry_if`](Self::retry_if). Failures of the begin and of the commit are always seen.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// Calls an error of the application's own transient where `is_transient` does, so [`retry`](Self::retry) holds for it
    /// too. For work that returns another type of error it has no effect.
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

    /// Doing the work twice does no more than doing it once, so it may be repeated after a commit of which nobody knows
    /// whether it happened.
    pub fn idempotent(mut self) -> Self {
        self.idempotent = true;
        self
    }

    /// What is done if the connection is lost inside `COMMIT`. Default: what the pool does.
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
