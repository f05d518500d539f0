//! Where a transaction's connection comes from, and where it goes: our own sessions, or the user's sqlx pool.
//!
//! Invariant: a slot that is dropped without a release closes its connection, so no path, not even an unforeseen one,
//! returns a connection that might still be in a transaction.

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::backend::{Backend, Cancels, CommitMode, Options};
use crate::drive::Driven;
use crate::events::Teller;
use crate::metrics::{Closed, Counters, Metrics};
use crate::pooler::PoolerMode;
use crate::queue::{Asked, Counts, Place, Queue};
use crate::session::Session;
use crate::settings::Limits;
use crate::upkeep::{Upkeep, with_runtime};
use crate::work::{Ticket, Work};
use crate::{CloseReport, TxError};

/// How often, and after which pause, to try again to open a session for which the cancelling connection has made room.
/// The server notices the end of that connection a moment later.
const ROOM_ATTEMPTS: usize = 10;
const ROOM_PAUSE: Duration = Duration::from_millis(25);

/// The shared state of a pool's clones, its guards, and the work behind them.
pub(crate) struct Shared<DB: Backend> {
    source: Source<DB>,
    queue: Arc<Queue<Session<DB>>>,
    opening: AtomicU32,
    /// Whether one of our own sessions has been opened, so that it is known what is between here and the server.
    has_opened: AtomicBool,
    pub(crate) limits: Limits,
    pub(crate) upkeep: Upkeep<DB>,
    /// The task that looks after the sessions ends with this.
    pub(crate) keeper: Mutex<Option<AbortHandle>>,
    /// The options with which the latest session was opened.
    options: Mutex<Arc<Options<DB>>>,
    pub(crate) commit_mode: CommitMode,
    pub(crate) known: DB::Known,
    pub(crate) canceller: DB::Canceller,
    pub(crate) work: Arc<Work>,
    pub(crate) teller: Teller,
    pub(crate) counters: Arc<Counters>,
}

pub(crate) enum Source<DB: Backend> {
    Owned,
    Wrapped(sqlx::Pool<DB>),
}

/// Why no session was opened.
enum Failure {
    Late(Duration),
    Closed,
    /// sqlx was built without a runtime.
    NoFeature,
    Failed(sqlx::Error),
}

/// Counts a session that is being opened.
struct Opening<'a>(&'a AtomicU32);

impl<'a> Opening<'a> {
    fn new(count: &'a AtomicU32) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<DB: Backend> Shared<DB> {
    pub(crate) fn new(
        source: Source<DB>,
        limits: Limits,
        upkeep: Upkeep<DB>,
        options: Arc<Options<DB>>,
        commit_mode: CommitMode,
    ) -> Self {
        let queue = Arc::new(Queue::new(usize::try_from(limits.max_connections).unwrap_or(usize::MAX)));
        let (known, canceller) = (DB::Known::default(), DB::Canceller::default());
        let counters = Arc::<Counters>::default();
        let (work, teller) = (Arc::default(), Teller::new(Arc::clone(&counters)));
        let (opening, has_opened, keeper) = (AtomicU32::new(0), AtomicBool::new(false), Mutex::default());
        Self {
            source,
            queue,
            opening,
            has_opened,
            limits,
            upkeep,
            keeper,
            options: Mutex::new(options),
            commit_mode,
            known,
            canceller,
            work,
            teller,
            counters,
        }
    }

    /// Takes a connection no later than `until`, which is `limit` after the first request. The wait ends with the
    /// caller. The steps after it continue without one.
    pub(crate) async fn acquire(self: &Arc<Self>, until: Instant, limit: Duration) -> Result<Slot<DB>, TxError> {
        let mut place = match self.queue.ask() {
            Asked::Now(place) => place,
            Asked::Later(told) => match timeout_at(until, told).await {
                Ok(told) => told.map_err(|_| TxError::Closed)?,
                Err(_) => return Err(self.too_late(limit)),
            },
            Asked::Closed => return Err(TxError::Closed),
        };
        let runtime = Handle::current();
        if let Some(session) = place.take() {
            if session.is_homeless() {
                self.counters.closed(Closed::Failed);
                drop(session);
            } else if session.is_expired() {
                self.close(session, Closed::Expired).await;
            } else {
                return Ok(self.slot(session, place, runtime));
            }
        }
        let opening = {
            let (shared, runtime) = (Arc::clone(self), runtime.clone());
            async move {
                let session = shared.open(&runtime).await?;
                Ok(shared.slot(session, place, runtime))
            }
        };
        let opening = Driven::new(runtime, opening).or_late(|opened| {
            if let Some(Ok(slot)) = opened {
                slot.pass_on();
            }
        });
        let target = || DB::target(&self.options());
        match timeout_at(until, opening).await {
            Ok(Ok(slot)) => Ok(slot),
            Ok(Err(Failure::Late(timeout))) => Err(TxError::ConnectTimeout { target: target(), timeout }),
            Ok(Err(Failure::Closed)) => Err(TxError::Closed),
            Ok(Err(Failure::NoFeature)) => {
                let reason =
                    "sqlx can open no connection without it: add its feature `runtime-tokio` to your Cargo.toml";
                Err(TxError::InvalidOption { option: "sqlx/runtime-tokio", reason })
            }
            Ok(Err(Failure::Failed(error))) => Err(DB::connect_error(target(), error)),
            Err(_) => Err(match &self.source {
                Source::Owned => TxError::ConnectTimeout { target: target(), timeout: limit },
                Source::Wrapped(_) => self.too_late(limit),
            }),
        }
    }

    fn slot(self: &Arc<Self>, session: Session<DB>, place: Place<Session<DB>>, runtime: Handle) -> Slot<DB> {
        Slot { session: Some(session), place: Some(place), runtime, shared: Arc::clone(self) }
    }

    /// Opens a session, or borrows one, in bounded time, because a caller that has gone sets no bound.
    async fn open(&self, runtime: &Handle) -> Result<Session<DB>, Failure> {
        let _opening = Opening::new(&self.opening);
        let opened = match &self.source {
            Source::Owned => {
                let limit = self.limits.connect_timeout;
                let opening = timeout(limit, self.open_with_room());
                let opened = with_runtime(opening).await.ok_or(Failure::NoFeature)?;
                opened.map_err(|_| Failure::Late(limit))?.map_err(Failure::Failed)
            }
            Source::Wrapped(pool) => match with_runtime(pool.acquire()).await.ok_or(Failure::NoFeature)? {
                Ok(conn) => Ok(Session::lent(conn, runtime.clone())),
                Err(sqlx::Error::PoolClosed) => Err(Failure::Closed),
                Err(sqlx::Error::PoolTimedOut) => Err(Failure::Late(pool.options().get_acquire_timeout())),
                Err(error) => Err(Failure::Failed(error)),
            },
        };
        opened.inspect(|_| self.counters.opened())
    }

    /// The options with which the latest session was opened, for other connections.
    pub(crate) fn options(&self) -> Arc<Options<DB>> {
        Arc::clone(&self.options.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The present options, if they may change.
    async fn newest_options(&self) -> Result<Arc<Options<DB>>, sqlx::Error> {
        if let Some(rotation) = &self.upkeep.rotation {
            let options = rotation().await?;
            let options = Arc::new(match self.limits.pooler {
                PoolerMode::None => options,
                PoolerMode::Transaction => DB::for_a_pooler(options),
            });
            *self.options.lock().unwrap_or_else(PoisonError::into_inner) = options;
        }
        Ok(self.options())
    }

    /// If the server accepts no more sessions, the cancelling connection makes room.
    async fn open_with_room(&self) -> Result<Session<DB>, sqlx::Error> {
        let open = async || {
            let first = (!self.has_opened.load(Ordering::Relaxed)).then_some(&self.canceller);
            let options = self.newest_options().await?;
            let opened = Session::<DB>::open(&options, &self.upkeep, self.limits.pooler, first).await;
            self.has_opened.fetch_or(opened.is_ok(), Ordering::Relaxed);
            opened
        };
        let mut opened = open().await;
        if opened.as_ref().is_err_and(DB::is_full) {
            self.canceller.close().await;
            for _ in 0..ROOM_ATTEMPTS {
                opened = open().await;
                if !opened.as_ref().is_err_and(DB::is_full) {
                    break;
                }
                sleep(ROOM_PAUSE).await;
            }
        }
        opened
    }

    /// The error that says what the wait was for: a connection in use, or a new one. sqlx waits for a server that is
    /// down in the same way as for a connection that is in use.
    fn too_late(&self, timeout: Duration) -> TxError {
        let target = DB::target(&self.options());
        let all_open = match &self.source {
            // If the sessions ahead are still being opened, the caller waits for the server.
            Source::Owned => self.opening.load(Ordering::Relaxed) < self.limits.max_connections,
            Source::Wrapped(pool) => pool.size() >= self.limits.max_connections,
        };
        match all_open {
            true => TxError::PoolExhausted { target, max_connections: self.limits.max_connections, timeout },
            false => TxError::ConnectTimeout { target, timeout },
        }
    }

    pub(crate) fn metrics(&self) -> Metrics {
        let (Counts { taken, idle, waiting }, load) = (self.queue.counts(), self.work.load());
        Metrics { size: taken, idle, waiting, in_use: load.open, settling: load.settling, ..self.counters.read() }
    }

    /// Says goodbye to a session, and counts it.
    async fn close(&self, session: Session<DB>, why: Closed) {
        self.counters.closed(why);
        session.close(self.limits.goodbye_timeout).await;
    }

    /// If the pool is just being closed, the session closes when it is dropped.
    fn put_back(&self, session: Session<DB>, place: Place<Session<DB>>) {
        if place.put_back(session).is_some() {
            self.counters.closed(Closed::WithPool);
        }
    }

    /// Closes our own idle sessions.
    pub(crate) fn forget_idle(&self) {
        self.drop_idle(self.queue.take_idle(|_| true), Closed::Failed);
    }

    /// Works like `forget_idle`, for the last time.
    pub(crate) fn forget(&self) {
        self.end_keeper();
        self.drop_idle(self.queue.close(), Closed::WithPool);
    }

    fn drop_idle(&self, places: Vec<Place<Session<DB>>>, why: Closed) {
        for mut place in places {
            self.counters.closed(why);
            // Before the place, which must not be free until the session is gone.
            drop(place.take());
        }
    }

    fn end_keeper(&self) {
        if let Some(keeper) = self.keeper.lock().unwrap_or_else(PoisonError::into_inner).take() {
            keeper.abort();
        }
    }

    pub(crate) fn report(&self) -> CloseReport {
        let load = self.work.load();
        CloseReport { in_use: load.open, settling: load.settling }
    }

    /// Closes the idle sessions that are too old, and those above the minimum that have been idle for too long.
    pub(crate) async fn close_expired(&self) {
        let mut spare = self.queue.counts().taken.saturating_sub(self.upkeep.min_connections as usize);
        let expired = self.queue.take_idle(|session| {
            let is_spare = spare > 0 && self.upkeep.idle_timeout.is_some_and(|limit| session.is_idle_for(limit));
            spare -= usize::from(is_spare);
            is_spare || session.is_expired()
        });
        for mut place in expired {
            if let Some(session) = place.take() {
                let why = if session.is_expired() { Closed::Expired } else { Closed::Idle };
                self.close(session, why).await;
            }
        }
    }

    /// Opens sessions up to the minimum. A failure is retried at the next check.
    pub(crate) async fn open_to_the_least(&self) {
        while let Some(place) = self.queue.take_free(self.upkeep.min_connections as usize) {
            let Ok(session) = self.open(&Handle::current()).await else { return };
            self.put_back(session, place);
        }
    }

    /// Says goodbye to our own idle sessions, and lets no caller wait for one any more.
    pub(crate) async fn close_idle(&self) {
        self.end_keeper();
        for mut place in self.queue.close() {
            if let Some(session) = place.take() {
                self.close(session, Closed::WithPool).await;
            }
        }
    }
}

/// A connection that may be in a transaction. Closed by its drop, unless it was released before.
pub(crate) struct Slot<DB: Backend> {
    /// Taken only by the release and the drop. Declared before the place, which is free only when the session is gone.
    session: Option<Session<DB>>,
    place: Option<Place<Session<DB>>>,
    runtime: Handle,
    shared: Arc<Shared<DB>>,
}

/// The proof behind the `expect`s below.
const HELD: &str = "the session is taken only by the release and the drop, after which nobody has the slot";

impl<DB: Backend> Slot<DB> {
    /// Learns what cancelling on a borrowed connection needs.
    pub(crate) async fn recognise(&mut self, known: &DB::Known) -> Result<(), sqlx::Error> {
        self.session.as_mut().expect(HELD).recognise(known).await
    }

    pub(crate) fn connection(&self) -> &DB::Connection {
        self.session.as_ref().expect(HELD).connection()
    }

    pub(crate) fn parts(&mut self) -> (&mut DB::Connection, &DB::Probe) {
        self.session.as_mut().expect(HELD).parts()
    }

    /// Whether the connection was used before, so that it may have died meanwhile.
    pub(crate) fn is_used(&self) -> bool {
        self.session.as_ref().is_some_and(Session::is_used)
    }

    /// Whether it was used before, but not within this time.
    pub(crate) fn is_used_before(&self, limit: Duration) -> bool {
        self.session.as_ref().is_some_and(|session| session.is_used() && session.is_idle_for(limit))
    }

    /// Whether the connection may be released with an unsent message: its next user sends that along with its own, or
    /// the user's own pool waits for the answer.
    pub(crate) fn takes_unsent(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.is_lent() || session.is_looked_at(&self.shared.upkeep))
            || self.place.as_ref().is_some_and(Place::is_waited_for)
    }

    /// Gives the connection to the next waiting caller, or back to its pool; or closes it if the pool was closed
    /// meanwhile.
    pub(crate) async fn release(mut self, closed: bool) {
        let (Some(session), Some(place)) = (self.session.take(), self.place.take()) else { return };
        if session.is_lent() {
            // A runtime that has shut down drops the task, and so closes the connection.
            let limit = self.shared.limits.settle_timeout;
            drop(self.runtime.spawn(async move {
                session.give_back(limit).await;
                drop(place);
            }));
        } else if closed {
            self.shared.close(session, Closed::WithPool).await;
        } else if session.is_expired() || session.is_looked_at(&self.shared.upkeep) {
            // Closing the pool waits for this.
            let ticket = Ticket::new(&self.shared.work, None);
            ticket.settling();
            drop(self.runtime.spawn(look_over(Arc::clone(&self.shared), session, place, ticket)));
        } else {
            self.shared.put_back(session, place);
        }
    }

    /// Gives an unused connection to the next waiting caller.
    pub(crate) fn pass_on(mut self) {
        if let (Some(session), Some(place)) = (self.session.take(), self.place.take()) {
            self.shared.put_back(session, place);
        }
    }
}

/// Closes a session that is too old or must not be kept, and gives back any other, off its caller's path.
async fn look_over<DB: Backend>(
    shared: Arc<Shared<DB>>,
    mut session: Session<DB>,
    place: Place<Session<DB>>,
    ticket: Arc<Ticket>,
) {
    let keep = !session.is_expired() && {
        let look = timeout(shared.limits.settle_timeout, session.look_over(&shared.upkeep));
        // A session whose hook has panicked is closed, like one whose hook has failed.
        matches!(AssertUnwindSafe(look).catch_unwind().await, Ok(Ok(Ok(true))))
    };
    match keep {
        true => shared.put_back(session, place),
        false => {
            let why = if session.is_expired() { Closed::Expired } else { Closed::Unfit };
            shared.close(session, why).await;
            drop(place);
        }
    }
    drop(ticket);
}

impl<DB: Backend> Drop for Shared<DB> {
    fn drop(&mut self) {
        self.end_keeper();
    }
}

impl<DB: Backend> Drop for Slot<DB> {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            session.interrupt();
            self.shared.counters.closed(Closed::Failed);
            drop(session);
        }
    }
}
