//! The pool as its users see it: opening, beginning transactions, closing.
//!
//! Invariant: a transaction is counted before anything is sent for it, so closing the pool misses none.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, timeout};

use crate::backend::{Backend, Cancels, CommitMode, Mode};
use crate::begin;
use crate::builder::TxPoolBuilder;
use crate::events::TxEvents;
use crate::metrics::Metrics;
use crate::slot::Shared;
use crate::{TransactionGuard, TxError};

/// A pool of connections for guarded transactions. Clones share the same pool.
///
/// # Comparison with `sqlx::Pool`
///
/// For each connection the pool knows how to cancel a statement on it. Its `BEGIN` alone checks that the connection is
/// alive, and it returns to the pool only when it was seen outside any transaction. [`wrap`](Self::wrap) guards the
/// transactions of an sqlx pool.
///
/// A query that needs no transaction runs on the pool itself: `&TxPool` is an sqlx [`Executor`](sqlx::Executor), for
/// reads. [`reader`](Self::reader) returns a session for several of them. The pool is no [`Acquire`](sqlx::Acquire),
/// whose `begin` has no guard. The crate's own pools and SQLite refuse a write on it; a wrapped pool of PostgreSQL or
/// MySQL commits the write.
pub struct TxPool<DB: Backend> {
    shared: Arc<Shared<DB>>,
}

impl<DB: Backend> TxPool<DB> {
    /// Opens a pool with the default limits, and its first connection.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, what was opened is closed.
    ///
    /// # Errors
    ///
    /// [`TxError::is_connect`] is true for all but [`TxError::NoRuntime`]. The variants distinguish a wrong URL, a
    /// missing database, a server that does not answer, one that refuses, and one that takes too long. None contains
    /// credentials.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// use cancel_safe_tx_guard::{TxError, TxPool};
    /// use sqlx::Sqlite;
    ///
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let db = TxPool::<Sqlite>::connect("sqlite::memory:").await?;
    ///
    /// let wrong = TxPool::<Sqlite>::connect("postgres://user:secret@localhost/db").await;
    /// let wrong = wrong.unwrap_err();
    /// assert!(matches!(wrong, TxError::InvalidUrl { .. }));
    /// assert!(!wrong.to_string().contains("secret"));
    /// # Ok::<(), TxError>(())
    /// # }).unwrap();
    /// # }
    /// ```
    pub async fn connect(url: &str) -> Result<Self, TxError> {
        Self::builder().connect(url).await
    }

    pub(crate) fn of(shared: Arc<Shared<DB>>) -> Self {
        Self { shared }
    }

    /// Returns a builder, to set limits other than the defaults.
    pub fn builder() -> TxPoolBuilder<DB> {
        TxPoolBuilder::new()
    }

    /// Guards the transactions of an sqlx pool. That pool stays yours, and is not closed with this one.
    ///
    /// The pool asks PostgreSQL and MySQL for the id of each session once, and later recognises the session by a
    /// prepared statement that it keeps. Wrap a pool only once, because each wrapper has its own memory. If a pool has
    /// no statement cache, the wrapper asks each time.
    ///
    /// The connection that cancels is opened when it is first needed. The wrapped pool must set limits that last for a
    /// whole session, such as PostgreSQL's `client_connection_check_interval`. On SQLite the wrapper replaces the
    /// progress handler, the commit hook and the rollback hook of the connection; the new ones stay, and have no effect
    /// outside guards.
    #[must_use]
    pub fn wrap(pool: sqlx::Pool<DB>) -> Self {
        Self::builder().wrap(pool)
    }

    /// Begins a transaction.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped while it waits for a connection, nothing was begun, and a connection that
    /// was being opened is kept for others. If dropped while the transaction is being begun, it is rolled back and its
    /// connection returns to the pool, or is closed if no answer comes within the
    /// [`settle_timeout`](TxPoolBuilder::settle_timeout).
    ///
    /// # Errors
    ///
    /// - [`TxError::PoolExhausted`]: no connection became free within the acquire timeout.
    /// - An error for which [`TxError::is_connect`] is true: a new connection was needed and could not be opened.
    /// - [`TxError::Closed`]: the pool was closed.
    /// - [`TxError::Database`]: the database refused to begin.
    /// - [`TxError::NoRuntime`]: there is no tokio runtime here.
    pub async fn begin(&self) -> Result<TransactionGuard<DB>, TxError> {
        self.begin_in(Mode::default(), None).await
    }

    pub(crate) async fn begin_in(
        &self,
        mode: Mode,
        deadline: Option<Instant>,
    ) -> Result<TransactionGuard<DB>, TxError> {
        begin::begin(&self.shared, mode, deadline).await
    }

    pub(crate) fn shared(&self) -> &Arc<Shared<DB>> {
        &self.shared
    }

    pub(crate) fn commit_mode(&self) -> CommitMode {
        self.shared.commit_mode
    }

    /// Returns a listener for what the pool does from now on after its callers have gone. The feature `tracing` logs
    /// the same.
    #[must_use]
    pub fn events(&self) -> TxEvents {
        self.shared.teller.listen()
    }

    /// Returns what the pool is doing now, and what it has done so far.
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// # use cancel_safe_tx_guard::TxPool;
    /// let db = TxPool::<sqlx::Sqlite>::connect("sqlite::memory:").await.unwrap();
    /// db.begin().await.unwrap().commit().await.unwrap();
    /// let metrics = db.metrics();
    /// assert_eq!((metrics.size, metrics.opened, metrics.committed), (1, 1, 1));
    /// # });
    /// # }
    /// ```
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        self.shared.metrics()
    }

    /// Closes the pool: it begins nothing more, and work in progress has `grace` to end.
    ///
    /// It waits for commits and rollbacks that their callers dropped, with their hooks and events, and for guards that
    /// are still in use. A wrapped sqlx pool stays open. Outside a tokio runtime it cannot wait, so `grace` is zero
    /// there.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, the pool is closed, and work in progress continues.
    /// Call it again to wait again.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// # use std::time::Duration;
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// # use cancel_safe_tx_guard::TxPool;
    /// let db = TxPool::<sqlx::Sqlite>::connect("sqlite::memory:").await.unwrap();
    /// drop(db.begin().await.unwrap());
    /// let report = db.close(Duration::from_secs(5)).await;
    /// assert!(report.is_clean(), "{report}");
    /// # });
    /// # }
    /// ```
    pub async fn close(&self, grace: Duration) -> CloseReport {
        let shared = &self.shared;
        if Handle::try_current().is_err() {
            shared.work.close();
            shared.forget();
            return shared.report();
        }
        let finish = async {
            shared.work.close();
            shared.close_idle().await;
            shared.work.idle().await;
            shared.canceller.close().await;
        };
        // If a farewell alone exceeds the grace, no transaction is affected, so only the counts are reported.
        drop(timeout(grace, finish).await);
        shared.report()
    }
}

impl<DB: Backend> Clone for TxPool<DB> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<DB: Backend> fmt::Debug for TxPool<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let metrics = self.metrics();
        f.debug_struct("TxPool")
            .field("target", &DB::target(&self.shared.options()))
            .field("idle", &metrics.idle)
            .field("waiting", &metrics.waiting)
            .field("in_use", &metrics.in_use)
            .field("settling", &metrics.settling)
            .finish()
    }
}

/// What [`TxPool::close`] left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct CloseReport {
    /// Transactions that their users still hold.
    pub in_use: usize,
    /// Commits and rollbacks that had not ended when the grace was over. They continue while the runtime lives.
    pub settling: usize,
}

impl CloseReport {
    /// Returns whether every transaction has ended.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.in_use == 0 && self.settling == 0
    }
}

impl fmt::Display for CloseReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} transactions in use, {} being ended", self.in_use, self.settling)
    }
}

/// What [`TransactionGuard::new`] can begin on: a [`TxPool`] or an `sqlx::Pool`. Sealed.
pub trait PoolSource: sealed::Sealed + Sync {
    /// The database of the pool.
    type Database: Backend;

    /// Returns the pool itself, or one that wraps it.
    fn tx_pool(&self) -> TxPool<Self::Database>;
}

impl<DB: Backend> PoolSource for TxPool<DB> {
    type Database = DB;

    fn tx_pool(&self) -> Self {
        self.clone()
    }
}

impl<DB: Backend> PoolSource for sqlx::Pool<DB> {
    type Database = DB;

    fn tx_pool(&self) -> TxPool<DB> {
        TxPool::wrap(self.clone())
    }
}

mod sealed {
    //! Keeps others from implementing a trait that is only for the two pools.

    /// Implemented only for the pools.
    #[expect(unnameable_types, reason = "this is what seals `PoolSource`")]
    pub trait Sealed {}

    impl<DB: super::Backend> Sealed for super::TxPool<DB> {}
    impl<DB: super::Backend> Sealed for sqlx::Pool<DB> {}
}
