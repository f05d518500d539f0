//! Running a closure as a transaction: begin, work, commit, and again where the database asks for it.
//!
//! Invariant: a commit whose end is not known is never repeated, unless the caller has said that it may be.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::attempts::Attempts;
use crate::backend::{Backend, CommitMode, Isolation, Mode};
use crate::boxed::{BoxedWork, TxRef};
use crate::{Retry, TransactionGuard, TxError, TxPool};

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
    /// Whatever fails at or past that moment is told as [`TxError::Timeout`], unless it may have been committed.
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
    /// [`TxError`], an [`sqlx::Error`] or a boxed [`std::error::Error`]. For another type, say it with
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
    /// let worked: Result<(), AppError> = tx.run(async move |_| Err(AppError::Overdrawn)).await;
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

    /// Begins, and leaves the rest to the caller.
    ///
    /// A [`timeout`](Self::timeout) goes with the guard: the begin is bounded by it, the server's own limits are set, and
    /// a [`commit`](TransactionGuard::commit) after it rolls back. Statements are the caller's, and so is giving them up.
    /// A [`retry`](Self::retry) holds for the begin alone.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped while it waits for a connection, nothing was begun. If dropped while the
    /// transaction is being begun, it is rolled back.
    ///
    /// # Errors
    ///
    /// As [`TxPool::begin`], and [`TxError::Timeout`] if the time was over before the transaction had begun.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// use std::time::Duration;
    /// use cancel_safe_tx_guard::{TxError, TxPool};
    ///
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// # let db = TxPool::<sqlx::Sqlite>::connect("sqlite::memory:").await?;
    /// let mut tx = db.tx().immediate().timeout(Duration::from_secs(2)).begin().await?;
    /// sqlx::query("CREATE TABLE account (id INTEGER)").execute(&mut *tx).await?;
    /// tx.commit().await?;
    /// # Ok::<(), TxError>(())
    /// # }).unwrap();
    /// # }
    /// ```
    pub async fn begin(self) -> Result<TransactionGuard<DB>, TxError> {
        self.attempts().next().await
    }

    /// The attempts at this transaction one by one, for code that a closure does not fit.
    pub fn attempts(self) -> Attempts<DB> {
        Attempts::new(self)
    }

    /// Begins, runs `work`, and commits; if `work` returns an error, rolls back.
    ///
    /// `work` is called anew for each attempt, and returns any error that a [`TxError`] turns into: name it where nothing
    /// else does, as in `Ok::<_, AppError>(1)`. Inside [`tokio::spawn`], write it as `async move |tx|`.
    ///
    /// Where a closure borrows and its future must be [`Send`], as in the handler of a web server, today's compilers
    /// say that "`Send` is not general enough": use [`run_boxed`](Self::run_boxed) or [`attempts`](Self::attempts).
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before COMMIT is sent, everything is rolled back. If dropped after that,
    /// the commit is driven to its end on the runtime, and hooks given with
    /// [`after_commit`](TransactionGuard::after_commit) run.
    ///
    /// # Errors
    ///
    /// The error of `work`, of [`begin`](TxPool::begin) or of [`commit`](TransactionGuard::commit) in the last
    /// attempt; [`TxError::Timeout`] in its place if the time had passed when it came, and [`TxError::Pending`] if the
    /// time has passed while the commit was under way. If it has passed while a connection was waited for, the error is
    /// that of `begin`, which says why: all are in use, or the server does not answer.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// use std::time::Duration;
    /// use cancel_safe_tx_guard::{Retry, TxError, TxPool};
    ///
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// # let db = TxPool::<sqlx::Sqlite>::connect("sqlite::memory:").await?;
    /// let n = db
    ///     .tx()
    ///     .serializable()
    ///     .timeout(Duration::from_secs(2))
    ///     .retry(Retry::default())
    ///     .run(async move |tx| {
    ///         let n: i64 = sqlx::query_scalar("SELECT 41 + 1").fetch_one(&mut **tx).await?;
    ///         tx.after_commit(|| println!("now others see it"));
    ///         Ok::<_, TxError>(n)
    ///     })
    ///     .await?;
    /// assert_eq!(n, 42);
    /// # Ok::<(), TxError>(())
    /// # }).unwrap();
    /// # }
    /// ```
    pub async fn run<T, E, F>(self, mut work: F) -> Result<T, E>
    where
        F: AsyncFnMut(&mut TransactionGuard<DB>) -> Result<T, E>,
        E: From<TxError> + 'static,
    {
        let mut attempts = self.attempts();
        loop {
            let mut tx = attempts.next().await?;
            let worked = attempts.within(work(&mut tx)).await;
            if let Some(value) = attempts.end(tx, worked).await? {
                return Ok(value);
            }
        }
    }

    /// As [`run`](Self::run), for work that borrows and whose future must be [`Send`]: a closure that returns a boxed
    /// future.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped, it is as after [`run`](Self::run).
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// use cancel_safe_tx_guard::{Retry, TxError, TxPool};
    ///
    /// async fn length(db: &TxPool<sqlx::Sqlite>, text: &str) -> Result<i64, TxError> {
    ///     let tx = db.tx().retry(Retry::default());
    ///     tx.run_boxed(|mut tx| {
    ///         Box::pin(async move {
    ///             let length = sqlx::query_scalar("SELECT length($1)").bind(text);
    ///             Ok(length.fetch_one(&mut **tx).await?)
    ///         })
    ///     })
    ///     .await
    /// }
    ///
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// # let db = TxPool::<sqlx::Sqlite>::connect("sqlite::memory:").await?;
    /// assert_eq!(tokio::spawn(async move { length(&db, "four").await }).await.unwrap()?, 4);
    /// # Ok::<(), TxError>(())
    /// # }).unwrap();
    /// # }
    /// ```
    pub async fn run_boxed<'env, T, E, F>(self, mut work: F) -> Result<T, E>
    where
        F: for<'tx> FnMut(TxRef<'tx, 'env, DB>) -> BoxedWork<'tx, T, E>,
        E: From<TxError> + 'static,
    {
        let mut attempts = self.attempts();
        loop {
            let mut tx = attempts.next().await?;
            let worked = attempts.within(work(TxRef::new(&mut tx))).await;
            if let Some(value) = attempts.end(tx, worked).await? {
                return Ok(value);
            }
        }
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
