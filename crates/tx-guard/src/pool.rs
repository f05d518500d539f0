//! The pool as its users see it: opened, begun on, closed.
//!
//! Invariant: a transaction that is begun is counted before anything is sent, so closing the pool misses none.

use std::fmt;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, timeout};

use crate::backend::{Backend, CommitMode, Mode, Options};
use crate::begin;
use crate::events::TxEvents;
use crate::keeper;
use crate::metrics::Metrics;
use crate::pooler::PoolerMode;
use crate::reset::{Reset, is_name};
use crate::settings::{FOREVER, Limits, MOST_CONNECTIONS};
use crate::slot::{Shared, Source};
use crate::upkeep::{HookFuture, Upkeep};
use crate::{TransactionGuard, TxError};

/// A pool of connections for guarded transactions. Clones share the same pool.
///
/// # Comparison with `sqlx::Pool`
///
/// Each connection is known by what is needed to cancel a statement on it, is checked for life by its `BEGIN` alone, and is
/// given back only when it was seen outside any transaction. [`wrap`](Self::wrap) guards the transactions of an sqlx pool.
///
/// A query that needs no transaction runs on the pool itself: `&TxPool` is an sqlx [`Executor`](sqlx::Executor), for reads.
/// [`reader`](Self::reader) has a session for several of them. It is no [`Acquire`](sqlx::Acquire), whose `begin` has no guard.
/// A write on it is refused on a pool of the crate's own, and on SQLite; a wrapped pool of PostgreSQL or MySQL commits it.
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
        TxPoolBuilder { limits: Limits::default(), upkeep: Upkeep::default(), commit_mode: CommitMode::default() }
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
        let max_connections = pool.options().get_max_connections();
        let acquire_timeout = pool.options().get_acquire_timeout();
        let limits = Limits { max_connections, acquire_timeout, ..Limits::default() };
        let (source, upkeep) = (Source::Wrapped(pool), Upkeep::default());
        Self { shared: Arc::new(Shared::new(source, limits, upkeep, options, CommitMode::default())) }
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
        begin::begin(&self.shared, mode, deadline).await
    }

    pub(crate) fn shared(&self) -> &Arc<Shared<DB>> {
        &self.shared
    }

    pub(crate) fn commit_mode(&self) -> CommitMode {
        self.shared.commit_mode
    }

    /// A listener to what the pool does from now on after its callers have gone. The feature `tracing` logs the same.
    #[must_use]
    pub fn events(&self) -> TxEvents {
        self.shared.teller.listen()
    }

    /// What the pool is doing now, and what it has done so far.
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let db = cancel_safe_tx_guard::TxPool::<sqlx::Sqlite>::connect("sqlite::memory:").await.unwrap();
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

/// The settings of a pool. From [`TxPool::builder`].
///
/// | setting | default | what it limits |
/// |---|---|---|
/// | [`max_connections`](Self::max_connections) | 10 | sessions at once |
/// | [`min_connections`](Self::min_connections) | 0 | sessions that are kept open |
/// | [`acquire_timeout`](Self::acquire_timeout) | 30 s | all of `begin` |
/// | [`connect_timeout`](Self::connect_timeout) | 10 s | the opening of one session |
/// | [`begin_timeout`](Self::begin_timeout) | 2 s | the answer to `BEGIN` on a session that was used before |
/// | [`goodbye_timeout`](Self::goodbye_timeout) | 1 s | the farewell to one session |
/// | [`max_lifetime`](Self::max_lifetime) | 30 min, SQLite: none | the age of a session |
/// | [`idle_timeout`](Self::idle_timeout) | 10 min, SQLite: none | how long a session may be idle |
///
/// [`reset`](Self::reset) is [`Reset::Verify`] by default.
///
/// A wrapped pool keeps its own settings of these: its sessions are sqlx's. Its acquire timeout and the default
/// `begin_timeout` hold for `begin`.
#[must_use = "a builder opens nothing until it connects"]
pub struct TxPoolBuilder<DB: Backend> {
    limits: Limits,
    upkeep: Upkeep<DB>,
    commit_mode: CommitMode,
}

impl<DB: Backend> TxPoolBuilder<DB> {
    /// How many connections there may be at once: from 1 to 65,535. Default 10. On PostgreSQL and MySQL one more is kept
    /// for cancelling.
    pub fn max_connections(mut self, connections: u32) -> Self {
        self.limits.max_connections = connections;
        self
    }

    /// How long `begin` may take: the wait for a free connection, the opening of one, and `BEGIN` itself. Default 30
    /// seconds.
    pub fn acquire_timeout(mut self, timeout: Duration) -> Self {
        self.limits.acquire_timeout = timeout;
        self
    }

    /// How long opening one connection may take. Default 10 seconds.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.limits.connect_timeout = timeout;
        self
    }

    /// How long a session that was used before may take to begin a transaction, before it is closed and another one is
    /// taken. Default 2 seconds. SQLite waits for its lock as long as its `busy_timeout` says.
    pub fn begin_timeout(mut self, timeout: Duration) -> Self {
        self.limits.begin_timeout = timeout;
        self
    }

    /// How long the farewell to one session may take. Default 1 second.
    pub fn goodbye_timeout(mut self, timeout: Duration) -> Self {
        self.limits.goodbye_timeout = timeout;
        self
    }

    /// How many sessions are kept open at least, up to `max_connections`. Default 0, though the first one is opened with
    /// the pool.
    pub fn min_connections(mut self, connections: u32) -> Self {
        self.upkeep.min_connections = connections;
        self
    }

    /// After how long a session is closed, when nobody has it. Up to a tenth less, so that those that were opened together
    /// are not closed together. Default 30 minutes, on SQLite for ever; `None` is for ever.
    pub fn max_lifetime(mut self, lifetime: impl Into<Option<Duration>>) -> Self {
        self.upkeep.max_lifetime = lifetime.into();
        self
    }

    /// After how long a session is closed that nobody has used. Default 10 minutes, on SQLite never; `None` is never.
    pub fn idle_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.upkeep.idle_timeout = timeout.into();
        self
    }

    /// How a session is made the same for each transaction. Default [`Reset::Verify`].
    pub fn reset(mut self, reset: Reset) -> Self {
        self.upkeep.reset = reset;
        self
    }

    /// The names of settings that [`Reset::Verify`] compares besides its own: on PostgreSQL such as `app.tenant`, on MySQL
    /// such as `time_zone` or `@tenant`.
    pub fn verify<N: Into<String>>(mut self, names: impl IntoIterator<Item = N>) -> Self {
        self.upkeep.verify = names.into_iter().map(Into::into).collect();
        self
    }

    /// Runs on each new session, before the pool's own settings. If it fails, the session is not opened.
    pub fn after_connect<F>(mut self, hook: F) -> Self
    where
        F: for<'c> Fn(&'c mut DB::Connection) -> HookFuture<'c, ()> + Send + Sync + 'static,
    {
        self.upkeep.after_connect = Some(Arc::new(hook));
        self
    }

    /// Runs ahead of each `BEGIN`, within its limit. If it fails, the session is closed and another one is taken.
    pub fn before_begin<F>(mut self, hook: F) -> Self
    where
        F: for<'c> Fn(&'c mut DB::Connection) -> HookFuture<'c, ()> + Send + Sync + 'static,
    {
        self.upkeep.before_begin = Some(Arc::new(hook));
        self
    }

    /// Runs after each transaction, when its session is idle again, and says whether to keep the session. One on which the
    /// hook fails, or takes longer than two seconds, is closed.
    pub fn after_release<F>(mut self, hook: F) -> Self
    where
        F: for<'c> Fn(&'c mut DB::Connection) -> HookFuture<'c, bool> + Send + Sync + 'static,
    {
        self.upkeep.after_release = Some(Arc::new(hook));
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

    /// Opens the pool, asking `options` for the driver's own options each time a session is opened, so that credentials
    /// that change are always the latest. An error of `options` is one of connecting.
    ///
    /// The connection for cancelling is opened with those with which a session was opened last.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, what was opened is closed.
    ///
    /// # Errors
    ///
    /// As [`TxPool::connect`], and [`TxError::InvalidOption`] for a limit out of its range.
    pub async fn connect_with_fn<F, O>(mut self, options: F) -> Result<TxPool<DB>, TxError>
    where
        F: Fn() -> O + Send + Sync + 'static,
        O: Future<Output = Result<Options<DB>, sqlx::Error>> + Send + 'static,
    {
        let first = options().await.map_err(|error| DB::connect_error(DB::TITLE.to_owned(), error))?;
        self.upkeep.rotation = Some(Arc::new(move || Box::pin(options())));
        self.connect_with(first).await
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
    pub async fn connect_with(mut self, options: Options<DB>) -> Result<TxPool<DB>, TxError> {
        if !(1..=MOST_CONNECTIONS).contains(&self.limits.max_connections) {
            return Err(TxError::InvalidOption { option: "max_connections", reason: "it must be from 1 to 65,535" });
        }
        if self.upkeep.min_connections > self.limits.max_connections {
            return Err(TxError::InvalidOption {
                option: "min_connections",
                reason: "it is more than max_connections",
            });
        }
        if !self.upkeep.verify.iter().all(|name| is_name(name)) {
            let reason = "a name has letters, digits, _ and . only, and on MySQL an @ ahead of them";
            return Err(TxError::InvalidOption { option: "verify", reason });
        }
        if self.upkeep.max_lifetime.is_some_and(|lifetime| lifetime.is_zero()) {
            return Err(TxError::InvalidOption { option: "max_lifetime", reason: "it is zero" });
        }
        if Handle::try_current().is_err() {
            return Err(TxError::NoRuntime);
        }
        let options = Arc::new(self.through_a_pooler(options)?);
        if self.limits.pooler == PoolerMode::Transaction {
            // The sessions are the pooler's, and what is asked of one is answered by another.
            self.upkeep.reset = Reset::None;
        }
        let shared = Arc::new(Shared::new(Source::Owned, self.limits, self.upkeep, options, self.commit_mode));
        // Both are opened now: a wrong address shows here, and the first cancel finds its connection warm.
        let limit = self.limits.connect_timeout;
        let first = shared.acquire(Instant::now() + limit.min(FOREVER), limit).await?;
        let target = || DB::target(&shared.options());
        match timeout(limit, DB::warm(&shared.canceller, &shared.options())).await {
            Ok(Ok(())) => {}
            // It is not opened where it would take the place of a transaction.
            Ok(Err(error)) if DB::is_full(&error) => {}
            Ok(Err(error)) => return Err(DB::connect_error(target(), error)),
            Err(_) => return Err(TxError::ConnectTimeout { target: target(), timeout: limit }),
        }
        first.pass_on();
        let keeper = tokio::spawn(keeper::keep_up(Arc::downgrade(&shared))).abort_handle();
        *shared.keeper.lock().unwrap_or_else(PoisonError::into_inner) = Some(keeper);
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
