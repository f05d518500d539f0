//! The settings of a pool, and how they become a pool.
//!
//! Invariant: a pool that was opened has a working session, and an invalid setting is an error.

use std::fmt;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, timeout};

use crate::backend::{Backend, Cancels, CommitMode, Options};
use crate::keeper;
use crate::pooler::PoolerMode;
use crate::reset::{Reset, is_name};
use crate::settings::{FOREVER, Limits, MOST_CONNECTIONS};
use crate::slot::{Shared, Source};
use crate::upkeep::{HookFuture, Upkeep};
use crate::{TxError, TxPool};

/// The settings of a pool. From [`TxPool::builder`].
///
/// | setting | default | what it limits |
/// |---|---|---|
/// | [`max_connections`](Self::max_connections) | 10 | sessions at once |
/// | [`min_connections`](Self::min_connections) | 0 | sessions kept open |
/// | [`acquire_timeout`](Self::acquire_timeout) | 30 s | all of `begin` |
/// | [`connect_timeout`](Self::connect_timeout) | 10 s | the opening of one session |
/// | [`begin_timeout`](Self::begin_timeout) | 2 s | the answer to `BEGIN` on a used session |
/// | [`settle_timeout`](Self::settle_timeout) | 2 s | cancel and rollback after a drop, before the session is terminated |
/// | [`commit_timeout`](Self::commit_timeout) | 600 s | a `commit` whose caller has gone |
/// | [`resolve_timeout`](Self::resolve_timeout) | 10 s | finding out how a lost commit ended |
/// | [`answer_timeout`](Self::answer_timeout) | 2 s | on MySQL, a server that waits for us while `COMMIT` has no answer |
/// | [`catch_up_timeout`](Self::catch_up_timeout) | 5 s | the same for what a dropped statement left to be read |
/// | [`goodbye_timeout`](Self::goodbye_timeout) | 1 s | the farewell to one session |
/// | [`max_lifetime`](Self::max_lifetime) | 30 min, SQLite: none | the age of a session |
/// | [`idle_timeout`](Self::idle_timeout) | 10 min, SQLite: none | how long a session may be idle |
///
/// [`reset`](Self::reset) is [`Reset::Verify`] by default.
///
/// These are fixed: a dropped statement has 1 ms to end before it is cancelled. The connection that cancels has 0.5 s
/// plus four round trips plus 1 ms for each cancel to answer, and 2 s to be reopened. [`Attempts`](crate::Attempts)
/// waits 10 s for the outcome of an abandoned attempt.
///
/// A [wrapped](Self::wrap) pool keeps its own sessions: sqlx decides how many there are, how they are opened, how old
/// they get, and their hooks and reset.
#[must_use = "a builder opens nothing until it connects"]
pub struct TxPoolBuilder<DB: Backend> {
    limits: Limits,
    upkeep: Upkeep<DB>,
    commit_mode: CommitMode,
}

impl<DB: Backend> TxPoolBuilder<DB> {
    pub(crate) fn new() -> Self {
        Self { limits: Limits::default(), upkeep: Upkeep::default(), commit_mode: CommitMode::default() }
    }

    /// Sets how many connections may be open at once: from 1 to 65,535. Default 10. On PostgreSQL and MySQL the pool
    /// keeps one more for cancelling.
    pub fn max_connections(mut self, connections: u32) -> Self {
        self.limits.max_connections = connections;
        self
    }

    /// Sets how long `begin` may take: the wait for a free connection, the opening of one, and `BEGIN` itself. Default
    /// 30 seconds.
    pub fn acquire_timeout(mut self, timeout: Duration) -> Self {
        self.limits.acquire_timeout = timeout;
        self
    }

    /// Sets how long opening one connection may take. Default 10 seconds.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.limits.connect_timeout = timeout;
        self
    }

    /// Sets how long a used session may take to begin a transaction. After that it is closed and another one is taken.
    /// Default 2 seconds. SQLite waits for its lock as long as its `busy_timeout` says.
    pub fn begin_timeout(mut self, timeout: Duration) -> Self {
        self.limits.begin_timeout = timeout;
        self
    }

    /// Sets how long a session may take to come to rest after its transaction was dropped. After that it is terminated
    /// from outside, which may take the same time again. This is also the limit for `after_release`, and for the
    /// `BEGIN` of a caller that has gone. Default 2 seconds.
    pub fn settle_timeout(mut self, timeout: Duration) -> Self {
        self.limits.settle_timeout = timeout;
        self
    }

    /// Sets how long a `commit` may continue after its caller has gone. Then its connection is closed, and its outcome
    /// is unknown. Default 10 minutes, because it is the closing that puts the outcome in doubt.
    pub fn commit_timeout(mut self, timeout: Duration) -> Self {
        self.limits.commit_timeout = timeout;
        self
    }

    /// Sets how long the pool tries to find out how a commit with a lost connection ended, with
    /// [`CommitMode::Resolvable`]. A crashed server needs a while to come back. Default 10 seconds.
    pub fn resolve_timeout(mut self, timeout: Duration) -> Self {
        self.limits.resolve_timeout = timeout;
        self
    }

    /// On MySQL, sets how long the server must be seen to wait for us while we wait for its answer to `COMMIT`. After
    /// that no answer is expected, and the outcome is unknown. Default 2 seconds.
    pub fn answer_timeout(mut self, timeout: Duration) -> Self {
        self.limits.answer_timeout = timeout;
        self
    }

    /// Sets the same for what a dropped statement left to be read, which may be a lot. After that the transaction is
    /// lost. Default 5 seconds.
    pub fn catch_up_timeout(mut self, timeout: Duration) -> Self {
        self.limits.catch_up_timeout = timeout;
        self
    }

    /// Sets how long the farewell to one session may take. Default 1 second.
    pub fn goodbye_timeout(mut self, timeout: Duration) -> Self {
        self.limits.goodbye_timeout = timeout;
        self
    }

    /// Sets how many sessions are kept open at least, up to `max_connections`. Default 0, though the first session is
    /// opened with the pool.
    pub fn min_connections(mut self, connections: u32) -> Self {
        self.upkeep.min_connections = connections;
        self
    }

    /// Sets the age at which an unused session is closed. The actual age is up to a tenth less, so sessions that were
    /// opened together are not closed together. Default 30 minutes, on SQLite no limit; `None` is no limit.
    pub fn max_lifetime(mut self, lifetime: impl Into<Option<Duration>>) -> Self {
        self.upkeep.max_lifetime = lifetime.into();
        self
    }

    /// Sets how long a session may be idle before it is closed. Default 10 minutes, on SQLite no limit; `None` is no
    /// limit.
    pub fn idle_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.upkeep.idle_timeout = timeout.into();
        self
    }

    /// Sets how a session is restored for the next transaction. Default [`Reset::Verify`].
    pub fn reset(mut self, reset: Reset) -> Self {
        self.upkeep.reset = reset;
        self
    }

    /// Names settings that [`Reset::Verify`] compares besides its own: for example `app.tenant` on PostgreSQL, and
    /// `time_zone` or `@tenant` on MySQL.
    pub fn verify<N: Into<String>>(mut self, names: impl IntoIterator<Item = N>) -> Self {
        self.upkeep.verify = names.into_iter().map(Into::into).collect();
        self
    }

    /// Runs a hook on each new session, before the pool's own settings. If the hook fails, the session is not opened.
    pub fn after_connect<F>(mut self, hook: F) -> Self
    where
        F: for<'c> Fn(&'c mut DB::Connection) -> HookFuture<'c, ()> + Send + Sync + 'static,
    {
        self.upkeep.after_connect = Some(Arc::new(hook));
        self
    }

    /// Runs a hook before each `BEGIN`, within its limit. If the hook fails, the session is closed and another one is
    /// taken.
    pub fn before_begin<F>(mut self, hook: F) -> Self
    where
        F: for<'c> Fn(&'c mut DB::Connection) -> HookFuture<'c, ()> + Send + Sync + 'static,
    {
        self.upkeep.before_begin = Some(Arc::new(hook));
        self
    }

    /// Runs a hook after each transaction, when its session is idle again. The hook says whether to keep the session.
    /// If it fails, or takes longer than the [`settle_timeout`](Self::settle_timeout), the session is closed.
    pub fn after_release<F>(mut self, hook: F) -> Self
    where
        F: for<'c> Fn(&'c mut DB::Connection) -> HookFuture<'c, bool> + Send + Sync + 'static,
    {
        self.upkeep.after_release = Some(Arc::new(hook));
        self
    }

    /// Sets what there is between the pool and the server. Default [`PoolerMode::None`].
    pub fn pooler(mut self, mode: PoolerMode) -> Self {
        self.limits.pooler = mode;
        self
    }

    /// Sets what happens when a connection is lost inside `COMMIT`, unless a transaction says otherwise. Default
    /// [`CommitMode::Verified`].
    pub fn commit_mode(mut self, mode: CommitMode) -> Self {
        self.commit_mode = mode;
        self
    }

    /// Guards the transactions of an sqlx pool, like [`TxPool::wrap`], with these limits. The number of connections and
    /// the acquire timeout come from the pool. What the pool does with its sessions, by hooks or [`reset`](Self::reset)
    /// for example, is set on the pool and not here.
    #[must_use]
    pub fn wrap(self, pool: sqlx::Pool<DB>) -> TxPool<DB> {
        let options = pool.connect_options();
        let limits = Limits {
            max_connections: pool.options().get_max_connections(),
            acquire_timeout: pool.options().get_acquire_timeout(),
            pooler: PoolerMode::None,
            ..self.limits
        };
        let (source, upkeep) = (Source::Wrapped(pool), Upkeep::default());
        TxPool::of(Arc::new(Shared::new(source, limits, upkeep, options, self.commit_mode)))
    }

    /// Opens the pool and its first connection.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, what was opened is closed.
    ///
    /// # Errors
    ///
    /// Same as [`TxPool::connect`], and [`TxError::InvalidOption`] for a limit out of range.
    pub async fn connect(self, url: &str) -> Result<TxPool<DB>, TxError> {
        let invalid = |reason: String| TxError::InvalidUrl { database: DB::TITLE, reason };
        // A driver would take the URL of another database for a host or a file name, and a part of a URL for the whole.
        let scheme = url.split_once("://").map(|(scheme, _)| scheme);
        if !scheme.map_or(DB::TAKES_FILES, |scheme| DB::URL_SCHEMES.contains(&scheme)) {
            // Text that only looks like a scheme may hold a password.
            let named =
                |scheme: &&str| scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte));
            let scheme = scheme.filter(named).unwrap_or("missing");
            return Err(invalid(format!("the scheme is {scheme:?} where {:?} is wanted", DB::URL_SCHEMES)));
        }
        // A slash in a password would end the address, and the rest of the password would be shown as the database's
        // name.
        let path = url.split_once("://").and_then(|(_, rest)| rest.split(['?', '#']).next()?.split_once('/'));
        if !DB::TAKES_FILES && path.is_some_and(|(address, path)| !address.contains('@') && path.contains('@')) {
            return Err(invalid(
                "it has an @ behind its address: write / as %2F in a password, and @ as %40".to_owned(),
            ));
        }
        let options = url.parse::<Options<DB>>().map_err(|error| invalid(error.to_string()))?;
        self.connect_with(options).await
    }

    /// Opens the pool. It asks `options` for the driver's own options each time it opens a session, so credentials that
    /// change are always the latest. An error of `options` counts as a connection error.
    ///
    /// The connection that cancels is opened with the options of the most recent session.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, what was opened is closed.
    ///
    /// # Errors
    ///
    /// Same as [`TxPool::connect`], and [`TxError::InvalidOption`] for a limit out of range.
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
    /// Same as [`TxPool::connect`], and [`TxError::InvalidOption`] for a limit out of range.
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
            // The sessions belong to the pooler, and another one may answer what this one was asked.
            self.upkeep.reset = Reset::None;
        }
        let shared = Arc::new(Shared::new(Source::Owned, self.limits, self.upkeep, options, self.commit_mode));
        // Both are opened now: a wrong address shows here, and the first cancel finds its connection warm.
        let limit = self.limits.connect_timeout;
        let first = shared.acquire(Instant::now() + limit.min(FOREVER), limit).await?;
        let target = || DB::target(&shared.options());
        match timeout(limit, shared.canceller.warm(&shared.options())).await {
            Ok(Ok(())) => {}
            // The cancelling connection is not opened if it would take the place of a transaction.
            Ok(Err(error)) if DB::is_full(&error) => {}
            Ok(Err(error)) => return Err(DB::connect_error(target(), error)),
            Err(_) => return Err(TxError::ConnectTimeout { target: target(), timeout: limit }),
        }
        first.pass_on();
        let keeper = tokio::spawn(keeper::keep_up(Arc::downgrade(&shared))).abort_handle();
        *shared.keeper.lock().unwrap_or_else(PoisonError::into_inner) = Some(keeper);
        Ok(TxPool::of(shared))
    }

    /// The options adapted to what is between here and the server.
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
