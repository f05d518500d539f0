//! The doors to a transaction with options: begun by hand, in a loop of attempts, or run as a closure.
//!
//! Invariant: all of them go through [`Attempts`], so what holds for one holds for each.

use crate::attempts::Attempts;
use crate::backend::Backend;
use crate::boxed::{BoxedWork, TxRef};
use crate::tx::Tx;
use crate::{TransactionGuard, TxError};

impl<DB: Backend> Tx<DB> {
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
