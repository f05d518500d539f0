//! The pool as its users see it: opened, begun on, closed.
//!
//! Invariant: a transaction that is begun is counted before anything is sent, so closing the pool misses none.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use deadpool::managed;
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout};

use crate::backend::{Backend, CommitMode, Mode, Options};
use crate::drive::Driven;
use crate::events::TxEvents;
use crate::open::{Open, SETTLE_LIMIT};
use crate::outcome::OutcomeCell;
use crate::pooler::PoolerMode;
use crate::session::Manager;
use crate::slot::{Limits, Shared, Slot, Source};
use crate::work::Ticket;
use crate::{TransactionGuard, TxError};

/// How many connections a pool holds at most, unless the builder says otherwise.
const MAX_CONNECTIONS: u32 = 10;

/// More than any server takes. The pool has room for all from the beginning.
const MOST_CONNECTIONS: u32 = 65_535;

/// How long `begin` waits for a free connection, unless the builder says otherwise.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long opening a connection may take, unless the builder says otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection that was idle for longer may take to answer.
const LIVENESS_TIMEOUT: Duration = Duration::from_secs(2);

/// A pool of connections for guarded transactions. Clones share the same pool.
///
/// # Comparison with `sqlx::Pool`
///
/// Each connection is known by what is needed to cancel a statement on it, is checked for life only after a second
/// of idleness, and is given back only when it was seen outside any transaction. For queries outside transactions
/// sqlx's own pool is the right one; [`wrap`](Self::wrap) guards the transactions of such a pool.
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
    /// The predicate [`TxError::is_connect`] is true of all but [`TxError::NoRuntime`]: the variants tell a wrong URL, a
    /// missing database, a server that does not answer, one that refuses, and one that takes too long apart. None
    /// contains credentials.
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
    /// let wrong = TxPool::<Sqlite>::connect("postgres://user:secret@localhost/db").await.unwrap_err();
    /// assert!(matches!(wrong, TxError::InvalidUrl { .. }));
    /// assert!(!wrong.to_string().contains("secret"));
    /// # Ok::<(), TxError>(())
    /// # }).unwrap();
    /// # }
    /// ```
    pub async fn connect(url: &str) -> Result<Self, TxError> {
        Self::builder().connect(url).await
    }

    /// A builder, for other limits than the default ones.
    pub fn builder() -> TxPoolBuilder<DB> {
        let limits = Limits {
            max_connections: MAX_CONNECTIONS,
            acquire_timeout: ACQUIRE_TIMEOUT,
            connect_timeout: CONNECT_TIMEOUT,
            pooler: PoolerMode::None,
        };
        TxPoolBuilder { limits, commit_mode: CommitMode::default(), database: PhantomData }
    }

    /// Guards the transactions of an sqlx pool, which stays the user's own and is not closed with this one.
    ///
    /// PostgreSQL and MySQL are asked for the id of each session once; later the session is recognised by a prepared
    /// statement that it keeps. Wrap a pool once, because each wrapping has a memory of its own. A pool without a cache
    /// for statements is asked each time.
    ///
    /// The connection for cancelling is opened when it is needed for the first time, and limits that a session has for
    /// good, such as PostgreSQL's `client_connection_check_interval`, are the pool's to set. On SQLite the progress
    /// handler, the commit hook and the rollback hook of the connection are replaced, and stay, without effect outside
    /// guards.
    #[must_use]
    pub fn wrap(pool: sqlx::Pool<DB>) -> Self {
        let options = pool.connect_options();
        Self {
            shared: Arc::new(Shared::new(
                Source::Wrapped(pool),
                options,
                DB::Canceller::default(),
                CommitMode::default(),
            )),
        }
    }

    /// Begins a transaction.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped while it waits for a connection, nothing was begun, and one that was being
    /// opened is kept for others. If dropped while the transaction is being begun, it is rolled back and its connection
    /// goes back to the pool, or is closed if it has no answer within two seconds.
    ///
    /// # Errors
    ///
    /// - [`TxError::PoolExhausted`]: no connection became free within the acquire timeout.
    /// - One for which [`TxError::is_connect`] is true: a new connection was needed and could not be opened.
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
        let runtime = Handle::try_current().map_err(|_| TxError::NoRuntime)?;
        match self.begin_once(&runtime, mode, deadline).await {
            // A connection that had died in the pool. Nothing has happened yet, and those that are idle beside it have
            // most likely died with it: once more, with a new one.
            Err(TxError::Database(error)) if is_dead(&error) => {
                self.shared.forget_idle();
                self.begin_once(&runtime, mode, deadline).await
            }
            begun => begun,
        }
    }

    /// Waiting for a connection dies with the caller. Only what follows it is shielded, and that starts in the same
    /// poll, so a caller that has gone while it waited begins nothing.
    async fn begin_once(
        &self,
        runtime: &Handle,
        mode: Mode,
        deadline: Option<Instant>,
    ) -> Result<TransactionGuard<DB>, TxError> {
        let held = self.shared.acquire(deadline).await?;
        let shared = Arc::clone(&self.shared);
        let ticket = Ticket::new(&shared.work);
        // The count is looked at after it was raised: either this sees the pool closed, or closing sees this.
        if shared.work.is_closed() {
            return Err(TxError::Closed);
        }
        Driven::new(runtime.clone(), {
            let runtime = runtime.clone();
            async move {
                let mut slot = Slot::new(held, runtime.clone(), &shared.known).await?;
                let (conn, probe) = slot.parts();
                DB::begin(conn, probe, &mode).await?;
                let (outcome, hooks, commit_mode) = (OutcomeCell::new(), Vec::new(), shared.commit_mode);
                Ok(TransactionGuard::hold(Open { slot, outcome, runtime, ticket, shared, hooks, commit_mode }))
            }
        })
        .alone_for(SETTLE_LIMIT)
        .await
    }

    pub(crate) fn commit_mode(&self) -> CommitMode {
        self.shared.commit_mode
    }

    /// A listener to what the pool does from now on after its callers have gone. The feature `tracing` logs the same.
    #[must_use]
    pub fn events(&self) -> TxEvents {
        self.shared.teller.listen()
    }

    /// Closes the pool: nothing is begun any more, and within `grace` what is under way comes to its end.
    ///
    /// Waits for commits and rollbacks that were dropped by their callers, with their hooks and events, and for guards
    /// that are still in use.
    /// An sqlx pool that was wrapped stays open. Outside a tokio runtime nothing can be waited for, so `grace` is zero
    /// there.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, the pool is closed, and what was under way goes on.
    /// Call it again to wait again.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// # use std::time::Duration;
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let db = cancel_safe_tx_guard::TxPool::<sqlx::Sqlite>::connect("sqlite::memory:").await.unwrap();
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
            DB::cool(&shared.canceller).await;
        };
        // A farewell that does not fit into the grace is no transaction, so the counts alone are reported.
        drop(timeout(grace, finish).await);
        shared.report()
    }
}

/// Whether the session has ended without us. 57P is PostgreSQL's class for a server that ends its sessions; MySQL has 08
/// for that, and 70100 for a session that was killed. An answer that is none to BEGIN belongs to something else that was
/// done on the session, which nobody can make sense of any more.
fn is_dead(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::Protocol(_) | sqlx::Error::BeginFailed => true,
        sqlx::Error::Database(error) => {
            error.code().is_some_and(|code| code.starts_with("57P") || code.starts_with("08") || code == "70100")
        }
        _ => false,
    }
}

impl<DB: Backend> Clone for TxPool<DB> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<DB: Backend> fmt::Debug for TxPool<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let load = self.shared.work.load();
        f.debug_struct("TxPool")
            .field("target", &DB::target(&self.shared.options))
            .field("in_use", &load.open)
            .field("settling", &load.settling)
            .finish()
    }
}

/// What [`TxPool::close`] has left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct CloseReport {
    /// Transactions that are still in the hands of their users.
    pub in_use: usize,
    /// Commits and rollbacks that had not ended when the grace was over. They go on while the runtime lives.
    pub settling: usize,
}

impl CloseReport {
    /// Every transaction has ended.
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

/// The limits of a pool. From [`TxPool::builder`].
#[must_use = "a builder opens nothing until it connects"]
pub struct TxPoolBuilder<DB: Backend> {
    limits: Limits,
    commit_mode: CommitMode,
    database: PhantomData<fn() -> DB>,
}

impl<DB: Backend> TxPoolBuilder<DB> {
    /// How many connections there may be at once: from 1 to 65,535. Default 10. On PostgreSQL and MySQL one more is kept
    /// for cancelling.
    pub fn max_connections(mut self, connections: u32) -> Self {
        self.limits.max_connections = connections;
        self
    }

    /// How long `begin` waits for a free connection. Default 30 seconds.
    pub fn acquire_timeout(mut self, timeout: Duration) -> Self {
        self.limits.acquire_timeout = timeout;
        self
    }

    /// How long opening one connection may take. Default 10 seconds.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.limits.connect_timeout = timeout;
        self
    }

    /// What there is between the pool and the server. Default [`PoolerMode::None`].
    pub fn pooler(mut self, mode: PoolerMode) -> Self {
        self.limits.pooler = mode;
        self
    }

    /// What is done for a connection that is lost inside `COMMIT`, unless a transaction says otherwise. Default
    /// [`CommitMode::Verified`].
    pub fn commit_mode(mut self, mode: CommitMode) -> Self {
        self.commit_mode = mode;
        self
    }

    /// Opens the pool and its first connection.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, what was opened is closed.
    ///
    /// # Errors
    ///
    /// As [`TxPool::connect`], and [`TxError::InvalidOption`] for a limit out of its range.
    pub async fn connect(self, url: &str) -> Result<TxPool<DB>, TxError> {
        let invalid = |reason: String| TxError::InvalidUrl { database: DB::TITLE, reason };
        // A driver would take the URL of another database for a host or a file name, and a part of one for the whole.
        let scheme = url.split_once("://").map(|(scheme, _)| scheme);
        if !scheme.map_or(DB::TAKES_FILES, |scheme| DB::URL_SCHEMES.contains(&scheme)) {
            // What only looks like a scheme may hold a password.
            let named =
                |scheme: &&str| scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte));
            let scheme = scheme.filter(named).unwrap_or("missing");
            return Err(invalid(format!("the scheme is {scheme:?} where {:?} is wanted", DB::URL_SCHEMES)));
        }
        // A slash in a password ends the address, and the rest of the password would be told as the database's name.
        let path = url.split_once("://").and_then(|(_, rest)| rest.split(['?', '#']).next()?.split_once('/'));
        if !DB::TAKES_FILES && path.is_some_and(|(address, path)| !address.contains('@') && path.contains('@')) {
            return Err(invalid(
                "it has an @ behind its address: write / as %2F in a password, and @ as %40".to_owned(),
            ));
        }
        let options = url.parse::<Options<DB>>().map_err(|error| invalid(error.to_string()))?;
        self.connect_with(options).await
    }

    /// Opens the pool and its first connection with the driver's own options.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, what was opened is closed.
    ///
    /// # Errors
    ///
    /// As [`TxPool::connect`], and [`TxError::InvalidOption`] for a limit out of its range.
    pub async fn connect_with(self, options: Options<DB>) -> Result<TxPool<DB>, TxError> {
        let invalid = |option, reason| TxError::InvalidOption { option, reason };
        let max_size = usize::try_from(self.limits.max_connections)
            .ok()
            .filter(|_| (1..=MOST_CONNECTIONS).contains(&self.limits.max_connections))
            .ok_or_else(|| invalid("max_connections", "it must be from 1 to 65,535"))?;
        if Handle::try_current().is_err() {
            return Err(TxError::NoRuntime);
        }
        let options = Arc::new(self.through_a_pooler(options)?);
        let canceller = DB::Canceller::default();
        let Limits { connect_timeout, pooler, .. } = self.limits;
        let manager = Manager::new(Arc::clone(&options), max_size, connect_timeout, pooler, canceller.clone());
        let sessions = managed::Pool::builder(manager)
            .max_size(max_size)
            .wait_timeout(Some(self.limits.acquire_timeout))
            .create_timeout(Some(self.limits.connect_timeout))
            .recycle_timeout(Some(LIVENESS_TIMEOUT))
            .runtime(deadpool::Runtime::Tokio1)
            .build()
            .map_err(|_| invalid("acquire_timeout", "timeouts need a runtime"))?;
        let source = Source::Owned { sessions, limits: self.limits };
        let shared = Arc::new(Shared::new(source, options, canceller, self.commit_mode));
        // Both are opened now: a wrong address shows here, and the first cancel finds its connection warm.
        let first = shared.acquire(None).await?;
        let target = || DB::target(&shared.options);
        let limit = self.limits.connect_timeout;
        timeout(limit, DB::warm(&shared.canceller, &shared.options))
            .await
            .map_err(|_| TxError::ConnectTimeout { target: target(), timeout: limit })?
            .map_err(|error| DB::connect_error(target(), error))?;
        // It was not in a transaction yet.
        drop(first);
        Ok(TxPool { shared })
    }

    /// The options for what there is between here and the server.
    fn through_a_pooler(&self, options: Options<DB>) -> Result<Options<DB>, TxError> {
        match self.limits.pooler {
            PoolerMode::None => Ok(options),
            PoolerMode::Transaction if DB::HAS_POOLERS => Ok(DB::for_a_pooler(options)),
            PoolerMode::Transaction => {
                Err(TxError::InvalidOption { option: "pooler", reason: "this database has none that is known" })
            }
        }
    }
}

impl<DB: Backend> fmt::Debug for TxPoolBuilder<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TxPoolBuilder").field("limits", &self.limits).field("commit_mode", &self.commit_mode).finish()
    }
}

/// What [`TransactionGuard::new`] can begin on: a [`TxPool`] or an `sqlx::Pool`. Sealed.
pub trait PoolSource: sealed::Sealed + Sync {
    /// The database of the pool.
    type Database: Backend;

    /// The pool itself, or one that wraps it.
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
    //! Keeps others from implementing what only the two pools can be.

    /// Implemented for the pools alone.
    #[expect(unnameable_types, reason = "this is what seals `PoolSource`")]
    pub trait Sealed {}

    impl<DB: super::Backend> Sealed for super::TxPool<DB> {}
    impl<DB: super::Backend> Sealed for sqlx::Pool<DB> {}
}
