//! Where connections come from: our own slots, or the user's sqlx pool.
//!
//! Invariant: a slot that is dropped without having been released closes its connection, so no path, not even one
//! nobody thought of, puts a connection back that might still be in a transaction.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use deadpool::managed::{self, Metrics, Object, PoolError, RecycleError, RecycleResult, TimeoutType};
use sqlx::pool::PoolConnection;
use sqlx::{ConnectOptions, Connection};
use tokio::runtime::Handle;
use tokio::time::timeout;

use crate::backend::{Backend, Mode, Options, Ownership};
use crate::commit::OutcomeCell;
use crate::events::{Teller, TxEvents};
use crate::reaper::{Open, Shield, Ticket, Work};
use crate::{TransactionGuard, TxError};

/// How many connections a pool holds at most, unless the builder says otherwise.
const MAX_CONNECTIONS: u32 = 10;

/// How long `begin` waits for a free connection, unless the builder says otherwise.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long opening a connection may take, unless the builder says otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection that was used within this time is not asked whether it still lives.
const FRESH: Duration = Duration::from_secs(1);

/// How long a connection that was idle for longer may take to answer.
const LIVENESS_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the farewell to one connection may take when a pool is closed.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

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
    /// The predicate [`TxError::is_connect`] is true of all: the variants tell a wrong URL, a missing database, a
    /// server that does not answer, one that refuses, and one that takes too long apart. None contains credentials.
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
        TxPoolBuilder {
            max_connections: MAX_CONNECTIONS,
            acquire_timeout: ACQUIRE_TIMEOUT,
            connect_timeout: CONNECT_TIMEOUT,
            database: std::marker::PhantomData,
        }
    }

    /// Guards the transactions of an sqlx pool, which stays the user's own and is not closed with this one.
    ///
    /// Each transaction then costs what owned slots learn once: on PostgreSQL a round trip for the id of the backend;
    /// on SQLite the progress handler, the commit hook and the rollback hook of the connection are replaced, and
    /// stay, without effect outside guards.
    #[must_use]
    pub fn wrap(pool: sqlx::Pool<DB>) -> Self {
        let options = pool.connect_options();
        Self { shared: Arc::new(Shared::new(Source::Wrapped(pool), options)) }
    }

    /// Begins a transaction.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped while it waits for a connection, nothing has happened. If dropped while
    /// the transaction is being begun, it is rolled back and its connection goes back to the pool.
    ///
    /// # Errors
    ///
    /// - [`TxError::PoolExhausted`]: no connection became free within the acquire timeout.
    /// - One for which [`TxError::is_connect`] is true: a new connection was needed and could not be opened.
    /// - [`TxError::Closed`]: the pool was closed.
    /// - [`TxError::Database`]: the database refused to begin.
    pub async fn begin(&self) -> Result<TransactionGuard<DB>, TxError> {
        self.begin_in(Mode::default()).await
    }

    pub(crate) async fn begin_in(&self, mode: Mode) -> Result<TransactionGuard<DB>, TxError> {
        let runtime = Handle::try_current().map_err(|_| TxError::NoRuntime)?;
        match self.begin_once(&runtime, mode).await {
            // A connection that had died in the pool. Nothing has happened yet, and those that are idle beside it have
            // most likely died with it: once more, with a new one.
            Err(TxError::Database(error)) if is_dead(&error) => {
                self.shared.forget_idle();
                self.begin_once(&runtime, mode).await
            }
            begun => begun,
        }
    }

    /// Waiting for a connection dies with the caller. Only what follows it is shielded, and that starts in the same
    /// poll, so a caller that has gone while it waited begins nothing.
    async fn begin_once(&self, runtime: &Handle, mode: Mode) -> Result<TransactionGuard<DB>, TxError> {
        let held = self.shared.acquire().await?;
        let shared = Arc::clone(&self.shared);
        let ticket = Ticket::new(&shared.work);
        // The count is looked at after it was raised: either this sees the pool closed, or closing sees this.
        if shared.work.is_closed() {
            return Err(TxError::Closed);
        }
        Shield::new(runtime.clone(), {
            let runtime = runtime.clone();
            async move {
                let mut slot = Slot::new(held, runtime.clone()).await?;
                let (conn, probe) = slot.parts();
                DB::begin(conn, probe, &mode).await?;
                let (outcome, hooks) = (OutcomeCell::new(), Vec::new());
                Ok(TransactionGuard::hold(Open { slot, outcome, runtime, ticket, shared, hooks }))
            }
        })
        .await
    }

    /// A listener to what the pool does from now on after its callers have gone. The feature `tracing` logs the same.
    #[must_use]
    pub fn events(&self) -> TxEvents {
        self.shared.teller.listen()
    }

    /// Closes the pool: nothing is begun any more, and within `grace` what is under way comes to its end.
    ///
    /// Waits for commits and rollbacks that were dropped by their callers, and for guards that are still in use.
    /// An sqlx pool that was wrapped stays open.
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
        let finish = async {
            shared.work.close();
            shared.close_idle().await;
            shared.work.idle().await;
            DB::cool(&shared.canceller).await;
        };
        // A farewell that does not fit into the grace is no transaction, so the counts alone are reported.
        drop(timeout(grace, finish).await);
        let load = shared.work.load();
        CloseReport { in_use: load.open, settling: load.settling }
    }
}

/// Whether the session has ended without us. 57P is PostgreSQL's class for a server that ends its sessions.
fn is_dead(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) => true,
        sqlx::Error::Database(error) => error.code().is_some_and(|code| code.starts_with("57P")),
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
    max_connections: u32,
    acquire_timeout: Duration,
    connect_timeout: Duration,
    database: std::marker::PhantomData<fn() -> DB>,
}

impl<DB: Backend> TxPoolBuilder<DB> {
    /// How many connections there may be at once. Default 10. On PostgreSQL one more is kept for cancelling.
    pub fn max_connections(mut self, connections: u32) -> Self {
        self.max_connections = connections;
        self
    }

    /// How long `begin` waits for a free connection. Default 30 seconds.
    pub fn acquire_timeout(mut self, timeout: Duration) -> Self {
        self.acquire_timeout = timeout;
        self
    }

    /// How long opening one connection may take. Default 10 seconds.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
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
        // A driver would take the URL of another database for a host or a file name.
        let scheme = url.split_once("://").map(|(scheme, _)| scheme);
        if let Some(scheme) = scheme.filter(|scheme| !DB::URL_SCHEMES.contains(scheme)) {
            return Err(invalid(format!("the scheme is {scheme:?} where {:?} is wanted", DB::URL_SCHEMES)));
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
        let max_size = usize::try_from(self.max_connections)
            .ok()
            .filter(|size| (1..=tokio::sync::Semaphore::MAX_PERMITS).contains(size))
            .ok_or_else(|| invalid("max_connections", "it must be at least 1"))?;
        if Handle::try_current().is_err() {
            return Err(TxError::NoRuntime);
        }
        let options = Arc::new(options);
        let manager = Manager { options: Arc::clone(&options) };
        let sessions = managed::Pool::builder(manager)
            .max_size(max_size)
            .wait_timeout(Some(self.acquire_timeout))
            .create_timeout(Some(self.connect_timeout))
            .recycle_timeout(Some(LIVENESS_TIMEOUT))
            .runtime(deadpool::Runtime::Tokio1)
            .build()
            .map_err(|_| invalid("acquire_timeout", "timeouts need a runtime"))?;
        let source = Source::Owned { sessions, limits: self };
        let shared = Arc::new(Shared::new(source, options));
        // Both are opened now: a wrong address shows here, and the first cancel finds its connection warm.
        let first = shared.acquire().await?;
        DB::warm(&shared.canceller, &shared.options)
            .await
            .map_err(|error| DB::connect_error(DB::target(&shared.options), error))?;
        // It was not in a transaction yet.
        drop(first);
        Ok(TxPool { shared })
    }
}

impl<DB: Backend> fmt::Debug for TxPoolBuilder<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TxPoolBuilder")
            .field("max_connections", &self.max_connections)
            .field("acquire_timeout", &self.acquire_timeout)
            .field("connect_timeout", &self.connect_timeout)
            .finish()
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

/// What the clones of a pool, its guards and the reaper share.
pub(crate) struct Shared<DB: Backend> {
    source: Source<DB>,
    pub(crate) options: Arc<Options<DB>>,
    pub(crate) canceller: DB::Canceller,
    pub(crate) work: Arc<Work>,
    pub(crate) teller: Teller,
}

enum Source<DB: Backend> {
    Owned { sessions: managed::Pool<Manager<DB>>, limits: TxPoolBuilder<DB> },
    Wrapped(sqlx::Pool<DB>),
}

impl<DB: Backend> Shared<DB> {
    fn new(source: Source<DB>, options: Arc<Options<DB>>) -> Self {
        Self { source, options, canceller: DB::Canceller::default(), work: Arc::default(), teller: Teller::new() }
    }

    async fn acquire(&self) -> Result<Held<DB>, TxError> {
        if self.work.is_closed() {
            return Err(TxError::Closed);
        }
        let target = || DB::target(&self.options);
        match &self.source {
            Source::Owned { sessions, limits } => match sessions.get().await {
                Ok(session) => Ok(Held::Owned(session)),
                Err(PoolError::Timeout(TimeoutType::Wait)) => Err(TxError::PoolExhausted {
                    target: target(),
                    max_connections: limits.max_connections,
                    timeout: limits.acquire_timeout,
                }),
                Err(PoolError::Timeout(_)) => {
                    Err(TxError::ConnectTimeout { target: target(), timeout: limits.connect_timeout })
                }
                Err(PoolError::Backend(error)) => Err(DB::connect_error(target(), error)),
                Err(PoolError::NoRuntimeSpecified) => Err(TxError::NoRuntime),
                // There are no hooks that could fail, so what is left is a closed pool.
                Err(PoolError::Closed | PoolError::PostCreateHook(_)) => Err(TxError::Closed),
            },
            Source::Wrapped(pool) => match pool.acquire().await {
                Ok(conn) => Ok(Held::Wrapped(conn)),
                Err(sqlx::Error::PoolClosed) => Err(TxError::Closed),
                Err(sqlx::Error::PoolTimedOut) => Err(TxError::PoolExhausted {
                    target: target(),
                    max_connections: pool.options().get_max_connections(),
                    timeout: pool.options().get_acquire_timeout(),
                }),
                Err(error) => Err(DB::connect_error(target(), error)),
            },
        }
    }

    /// Drops the idle sessions of our own, which closes them.
    fn forget_idle(&self) {
        if let Source::Owned { sessions, .. } = &self.source {
            drop(sessions.retain(|_, _| false).removed);
        }
    }

    /// Says goodbye to the idle sessions of our own, and lets nobody wait for one any more.
    async fn close_idle(&self) {
        if let Source::Owned { sessions, .. } = &self.source {
            let idle = sessions.retain(|_, _| false).removed;
            sessions.close();
            for session in idle {
                session.close().await;
            }
        }
    }
}

/// One connection of our own, and what was learnt about it when it was opened.
struct Session<DB: Backend> {
    conn: DB::Connection,
    probe: DB::Probe,
    idle_since: Instant,
}

impl<DB: Backend> Session<DB> {
    async fn close(self) {
        // The database sees the end of the connection in any case; this only makes it a polite one.
        drop(timeout(GOODBYE_TIMEOUT, self.conn.close()).await);
    }
}

/// Opens sessions, and looks after those that were idle for long.
struct Manager<DB: Backend> {
    options: Arc<Options<DB>>,
}

impl<DB: Backend> managed::Manager for Manager<DB> {
    type Type = Session<DB>;
    type Error = sqlx::Error;

    async fn create(&self) -> Result<Session<DB>, sqlx::Error> {
        let mut conn = self.options.connect().await?;
        let probe = DB::probe(&mut conn, Ownership::Owned).await?;
        Ok(Session { conn, probe, idle_since: Instant::now() })
    }

    async fn recycle(&self, session: &mut Session<DB>, _: &Metrics) -> RecycleResult<sqlx::Error> {
        if session.idle_since.elapsed() < FRESH {
            return Ok(());
        }
        session.conn.ping().await.map_err(RecycleError::Backend)
    }
}

/// A connection that was taken from its pool and is in no transaction yet.
enum Held<DB: Backend> {
    Owned(Object<Manager<DB>>),
    Wrapped(PoolConnection<DB>),
}

/// A connection that may be in a transaction. Closed by its drop, unless it was released before.
pub(crate) struct Slot<DB: Backend> {
    /// Taken only by the release and the drop.
    lease: Option<Lease<DB>>,
    runtime: Handle,
}

enum Lease<DB: Backend> {
    Owned(Object<Manager<DB>>),
    Wrapped(PoolConnection<DB>, DB::Probe),
}

/// The proof behind the `expect`s below.
const LEASED: &str = "the lease is taken only by the release and the drop, after which nobody has the slot";

impl<DB: Backend> Slot<DB> {
    async fn new(held: Held<DB>, runtime: Handle) -> Result<Self, sqlx::Error> {
        let lease = match held {
            Held::Owned(session) => Lease::Owned(session),
            Held::Wrapped(mut conn) => {
                let probe = DB::probe(&mut conn, Ownership::Wrapped).await?;
                Lease::Wrapped(conn, probe)
            }
        };
        Ok(Self { lease: Some(lease), runtime })
    }

    pub(crate) fn connection(&self) -> &DB::Connection {
        match self.lease.as_ref().expect(LEASED) {
            Lease::Owned(session) => &session.conn,
            Lease::Wrapped(conn, _) => conn,
        }
    }

    pub(crate) fn parts(&mut self) -> (&mut DB::Connection, &DB::Probe) {
        match self.lease.as_mut().expect(LEASED) {
            Lease::Owned(session) => {
                let session = &mut **session;
                (&mut session.conn, &session.probe)
            }
            Lease::Wrapped(conn, probe) => (conn, probe),
        }
    }

    /// Gives the connection back to its pool, or closes it if the pool was closed meanwhile.
    pub(crate) async fn release(mut self, closed: bool) {
        match self.lease.take() {
            Some(Lease::Owned(session)) if closed => Object::take(session).close().await,
            Some(Lease::Owned(mut session)) => session.idle_since = Instant::now(),
            Some(Lease::Wrapped(conn, _)) => self.give(conn),
            None => {}
        }
    }

    /// An sqlx pool spawns a task when a connection leaves a hand, and panics where it finds no runtime.
    fn give(&self, conn: PoolConnection<DB>) {
        let _entered = self.runtime.enter();
        drop(conn);
    }
}

impl<DB: Backend> Drop for Slot<DB> {
    fn drop(&mut self) {
        match self.lease.take() {
            Some(Lease::Owned(session)) => {
                DB::interrupt(&session.probe);
                drop(Object::take(session));
            }
            Some(Lease::Wrapped(conn, probe)) => {
                DB::interrupt(&probe);
                let _entered = self.runtime.enter();
                drop(conn.detach());
            }
            None => {}
        }
    }
}
