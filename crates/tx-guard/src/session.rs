//! Connections of our own: opened, looked after, closed.
//!
//! Invariant: there are never more of them than the pool allows, and one that was begun to be opened is not lost
//! with the caller who asked for it, or callers with short deadlines would open and abandon connections for ever.

use std::future::pending;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use deadpool::managed::{self, Metrics, RecycleError, RecycleResult};
use futures_util::future::{Either, select};
use sqlx::{ConnectOptions, Connection};
use tokio::runtime::Handle;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};

use crate::backend::{Backend, Options};
use crate::drive::Driven;
use crate::pooler::PoolerMode;

/// A connection that was used within this time is not asked whether it still lives.
const FRESH: Duration = Duration::from_secs(1);

/// How long the farewell to one connection may take when a pool is closed.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

/// One connection of our own, and what was learnt about it when it was opened.
pub(crate) struct Session<DB: Backend> {
    pub(crate) conn: DB::Connection,
    pub(crate) probe: DB::Probe,
    /// None where a connection does not need it.
    home: Option<Home>,
    idle_since: Instant,
    /// One of as many as there may be sessions.
    _permit: OwnedSemaphorePermit,
}

impl<DB: Backend> Session<DB> {
    async fn open(
        options: Arc<Options<DB>>,
        pooler: PoolerMode,
        first: Option<DB::Canceller>,
        permit: OwnedSemaphorePermit,
    ) -> Result<Self, sqlx::Error> {
        let mut conn = options.connect().await?;
        let probe = DB::probe(&mut conn, pooler, first.as_ref().map(|canceller| (canceller, &options))).await?;
        Ok(Self {
            conn,
            probe,
            home: DB::NEEDS_ITS_RUNTIME.then(Home::here),
            idle_since: Instant::now(),
            _permit: permit,
        })
    }

    /// The same in bounded time, because a caller who has gone bounds nothing.
    async fn open_within(
        limit: Duration,
        options: Arc<Options<DB>>,
        pooler: PoolerMode,
        first: Option<DB::Canceller>,
        permit: OwnedSemaphorePermit,
    ) -> Result<Self, sqlx::Error> {
        timeout(limit, Self::open(options, pooler, first, permit)).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
    }

    /// The session was in use until now.
    pub(crate) fn rest(&mut self) {
        self.idle_since = Instant::now();
    }

    async fn look_after(&mut self) -> Result<(), sqlx::Error> {
        if self.home.as_ref().is_some_and(Home::has_ended) {
            return Err(sqlx::Error::WorkerCrashed);
        }
        if self.idle_since.elapsed() < FRESH { Ok(()) } else { self.conn.ping().await }
    }

    pub(crate) async fn close(self) {
        // The database sees the end of the connection in any case; this only makes it a polite one.
        drop(timeout(GOODBYE_TIMEOUT, self.conn.close()).await);
    }
}

/// The runtime on which a connection was opened. When it has ended, the connection works only as long as it never has to
/// wait, and may fail inside COMMIT.
struct Home(AbortHandle);

impl Home {
    /// A task that ends with its runtime, and only then.
    fn here() -> Self {
        Self(tokio::spawn(pending::<()>()).abort_handle())
    }

    fn has_ended(&self) -> bool {
        self.0.is_finished()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Opens sessions, and looks after those that were idle for long.
pub(crate) struct Manager<DB: Backend> {
    options: Arc<Options<DB>>,
    connect_timeout: Duration,
    pooler: PoolerMode,
    /// For the first session, which is compared with that of the connection for cancelling.
    first: Mutex<Option<DB::Canceller>>,
    permits: Arc<Semaphore>,
    spares: Arc<Spares<DB>>,
}

/// Sessions whose callers had gone before they were open.
struct Spares<DB: Backend> {
    /// None once the pool is closed.
    sessions: Mutex<Option<Vec<Session<DB>>>>,
    arrived: Notify,
}

impl<DB: Backend> Spares<DB> {
    fn take(&self) -> Option<Session<DB>> {
        self.lock().as_mut().and_then(Vec::pop)
    }

    fn put(&self, session: Session<DB>) {
        // In a closed pool nobody will ask for it: it closes as it is dropped.
        if let Some(sessions) = self.lock().as_mut() {
            sessions.push(session);
            self.arrived.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<Session<DB>>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<DB: Backend> Manager<DB> {
    pub(crate) fn new(
        options: Arc<Options<DB>>,
        max_sessions: usize,
        connect_timeout: Duration,
        pooler: PoolerMode,
        canceller: DB::Canceller,
    ) -> Self {
        let spares = Spares { sessions: Mutex::new(Some(Vec::new())), arrived: Notify::new() };
        let permits = Arc::new(Semaphore::new(max_sessions));
        let first = Mutex::new(Some(canceller));
        Self { options, connect_timeout, pooler, first, permits, spares: Arc::new(spares) }
    }

    /// Takes the sessions away for which nobody waits any more.
    pub(crate) fn spares(&self) -> Vec<Session<DB>> {
        self.spares.lock().as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// The same, for the last time: what is opened from now on is closed at once.
    pub(crate) fn last_spares(&self) -> Vec<Session<DB>> {
        self.spares.lock().take().unwrap_or_default()
    }

    /// A spare session, or the permission to open one, whichever there is first.
    async fn spare_or_permit(&self) -> Either<Session<DB>, OwnedSemaphorePermit> {
        loop {
            let mut arrived = pin!(self.spares.arrived.notified());
            // Enlisted before looking, so that a spare that comes between the two is not missed.
            arrived.as_mut().enable();
            if let Some(session) = self.spares.take() {
                return Either::Left(session);
            }
            let permit = Arc::clone(&self.permits).acquire_owned();
            match select(arrived, pin!(permit)).await {
                Either::Right((Ok(permit), _)) => return Either::Right(permit),
                // The semaphore is never closed, so this is a spare.
                Either::Left(_) | Either::Right((Err(_), _)) => {}
            }
        }
    }
}

impl<DB: Backend> managed::Manager for Manager<DB> {
    type Type = Session<DB>;
    type Error = sqlx::Error;

    async fn create(&self) -> Result<Session<DB>, sqlx::Error> {
        let permit = loop {
            match self.spare_or_permit().await {
                Either::Left(mut spare) => {
                    if spare.look_after().await.is_ok() {
                        return Ok(spare);
                    }
                }
                Either::Right(permit) => break permit,
            }
        };
        let spares = Arc::downgrade(&self.spares);
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (limit, options) = (self.connect_timeout, Arc::clone(&self.options));
        let opening = Session::<DB>::open_within(limit, options, self.pooler, first, permit);
        Driven::new(Handle::current(), opening)
            .or_late(move |opened| {
                // A pool that is gone needs no spare: the session closes as it is dropped.
                if let (Some(Ok(session)), Some(spares)) = (opened, spares.upgrade()) {
                    spares.put(session);
                }
            })
            .await
    }

    async fn recycle(&self, session: &mut Session<DB>, _: &Metrics) -> RecycleResult<sqlx::Error> {
        session.look_after().await.map_err(RecycleError::Backend)
    }
}
