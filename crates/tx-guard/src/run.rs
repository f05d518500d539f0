//! The ways to start a transaction with options: by hand, in a loop of attempts, or as a closure.
//!
//! Invariant: all of them go through [`Attempts`], so what holds for one holds for all.

use crate::attempts::Attempts;
use crate::backend::Backend;
use crate::boxed::{BoxedWork, TxRef};
use crate::tx::Tx;
use crate::{TransactionGuard, TxError};

impl<DB: Backend> Tx<DB> {
    /// Begins the transaction, and leaves the rest to the caller.
    ///
    /// A [`timeout`](Self::timeout) stays with the guard: it bounds the begin, sets the server's own limits, and makes
    /// a later [`commit`](TransactionGuard::commit) roll back. The caller runs the statements, and decides when to
    /// abandon them. A [`retry`](Self::retry) applies only to the begin.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped while it waits for a connection, nothing was begun. If dropped while the
    /// transaction is being begun, it is rolled back.
    ///
    /// # Errors
    ///
    /// Same as [`TxPool::begin`](crate::TxPool::begin), or [`TxError::Timeout`] if the time ran out before the
    /// transaction had begun.
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

    /// Returns the attempts at this transaction one by one, for code where a closure does not fit.
    pub fn attempts(self) -> Attempts<DB> {
        Attempts::new(self)
    }

    /// Begins, runs `work`, and commits. If `work` returns an error, it rolls back.
    ///
    /// It calls `work` again for each attempt. `work` may return any error type that a [`TxError`] converts into; name
    /// it if nothing else does, as in `Ok::<_, AppError>(1)`. Inside [`tokio::spawn`], write it as `async move |tx|`.
    ///
    /// If a closure borrows and its future must be [`Send`], as in a web server's handler, today's compilers say that
    /// "`Send` is not general enough". Then use [`run_boxed`](Self::run_boxed) or [`attempts`](Self::attempts).
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before COMMIT is sent, everything is rolled back. If dropped after that,
    /// the commit runs to completion on the runtime, and hooks added with
    /// [`after_commit`](TransactionGuard::after_commit) run.
    ///
    /// # Errors
    ///
    /// The error of `work`, of [`begin`](crate::TxPool::begin) or of [`commit`](TransactionGuard::commit) in the last
    /// attempt. If the time had run out by then, [`TxError::Timeout`] takes its place. If the time ran out during the
    /// commit, it is [`TxError::Pending`]. If it ran out during the wait for a connection, it is the error of `begin`,
    /// which says why: all connections are in use, or the server does not answer.
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

    /// Works like [`run`](Self::run), for work that borrows and whose future must be [`Send`]: it takes a closure that
    /// returns a boxed future.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped, the effect is that of a dropped [`run`](Self::run).
    ///
    /// # Errors
    ///
    /// Same as [`run`](Self::run).
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
