//! The connection over which sessions are signalled: kept warm, and never the user's.
//!
//! Invariant: it is used again only after a complete answer. A signal without an answer never counts as acknowledged.
//! When the connection is free, one message serves all waiting callers, so that a thousand wait no longer than one.

use std::fmt;
use std::future::pending;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use sqlx::{ConnectOptions, Connection};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{Mutex, oneshot};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::backend::{Activity, Cancels, Driver, Options, Unsignalled, Wanted};

/// How long the warm connection may take to answer before a new one replaces it: this long, plus some round trips, plus
/// something for each signalled session. It may have been idle for hours, and firewalls drop such connections without
/// telling either end.
const WARM_LIMIT: Duration = Duration::from_millis(500);
const WARM_ROUND_TRIPS: u32 = 4;
const SIGNAL_LIMIT: Duration = Duration::from_millis(1);

/// How long opening the connection, and the first answer over it, may take.
const OPEN_LIMIT: Duration = Duration::from_secs(2);

/// The most sessions that one message signals.
const BATCH: usize = 1_000;

/// Before a message is sent, it waits for other requests: for this part of a round trip, up to a limit. A later request
/// has to wait for a whole round trip.
const GATHER_PART: u32 = 8;
const GATHER_LIMIT: Duration = Duration::from_millis(5);

/// A server whose sessions are signalled over another of its sessions.
#[expect(unnameable_types, reason = "part of the sealed half of `Backend`")]
pub trait Signals: Driver {
    /// What distinguishes a session from all others, including earlier and later ones.
    type Session: Clone + Send + Sync + 'static;

    /// How many round trips a message takes.
    const TRIPS: u32;

    /// The present session of a connection.
    fn session(probe: &Self::Probe) -> Self::Session;

    /// How long the server has been running at least. Asked after the connection was opened.
    fn ran(conn: &mut Self::Connection) -> BoxFuture<'_, Result<Duration, sqlx::Error>>;

    /// Signals all these sessions over `conn`. A session that is gone needs no signal.
    fn send<'c>(
        conn: &'c mut Self::Connection,
        opened: Opened,
        wanted: Wanted,
        sessions: &'c [Self::Session],
    ) -> BoxFuture<'c, Result<Vec<Activity>, sqlx::Error>>;
}

#[expect(unnameable_types, reason = "an associated type of the sealed half of `Backend`")]
pub struct Canceller<DB: Signals>(Arc<Inner<DB>>);

struct Inner<DB: Signals> {
    queue: StdMutex<Queue<DB>>,
    warm: Mutex<Option<Warm<DB>>>,
    /// In microseconds.
    round_trip: AtomicU64,
}

/// The requests that wait to be served.
struct Queue<DB: Signals> {
    requests: Vec<Request<DB>>,
    /// Whether a caller is serving the queue, and will see new requests.
    is_served: bool,
}

struct Request<DB: Signals> {
    wanted: Wanted,
    session: DB::Session,
    answer: oneshot::Sender<Result<Activity, Unsignalled>>,
}

/// When a connection was opened, and what that says about its server.
#[derive(Debug, Clone, Copy)]
#[expect(unnameable_types, reason = "part of the sealed half of `Backend`")]
pub struct Opened {
    /// A moment before it was opened.
    since: Instant,
    /// A moment after the server had said how long it had been running.
    seen: Instant,
    ran: Duration,
}

impl Opened {
    /// Whether the server has been running since `learnt`, the moment at which something was learned about it. It
    /// cannot restart while the connection lives.
    #[cfg_attr(not(feature = "mysql"), expect(dead_code, reason = "PostgreSQL's sessions are told by their own start"))]
    pub(crate) fn is_same_server(&self, learnt: Instant) -> bool {
        learnt >= self.since || self.ran > self.seen.saturating_duration_since(learnt)
    }
}

/// A connection, and when it was opened.
struct Warm<DB: Signals> {
    conn: DB::Connection,
    opened: Opened,
}

impl<DB: Signals> Warm<DB> {
    async fn open(options: &Arc<Options<DB>>) -> Result<Self, sqlx::Error> {
        // Taken before the connection is opened: anything older than this is older than the connection.
        let since = Instant::now();
        let mut conn = Self::connect(options).await?;
        let ran = DB::ran(&mut conn).await?;
        Ok(Self { conn, opened: Opened { since, seen: Instant::now(), ran } })
    }

    async fn connect(options: &Arc<Options<DB>>) -> Result<DB::Connection, sqlx::Error> {
        let Some(beside) = beside() else { return options.connect().await };
        // A `JoinSet`, because its drop also ends the opening.
        let mut opening = JoinSet::new();
        let options = Arc::clone(options);
        opening.spawn_on(async move { options.connect().await }, &beside);
        match opening.join_next().await {
            Some(Ok(opened)) => opened,
            Some(Err(_)) | None => Err(sqlx::Error::WorkerCrashed),
        }
    }
}

/// A thread for all cancels of the process, on which nothing else runs: a transaction's runtime may be busy reading the
/// rows of the statement to cancel, and the answers to cancels would wait for that. `None` if no thread can be started.
fn beside() -> Option<Handle> {
    static BESIDE: OnceLock<Option<Handle>> = OnceLock::new();
    let start = || {
        // The thread first: if it cannot be started, there must be no runtime to drop, which panics inside another
        // runtime.
        let (give, given) = mpsc::channel::<Runtime>();
        let run = move || given.recv().map(|runtime| runtime.block_on(pending::<()>()));
        thread::Builder::new().name("tx-guard-cancel".to_owned()).spawn(run).ok()?;
        let runtime = Builder::new_current_thread().enable_all().build().ok()?;
        let handle = runtime.handle().clone();
        give.send(runtime).ok()?;
        Some(handle)
    };
    BESIDE.get_or_init(start).clone()
}

impl<DB: Signals> Cancels<DB> for Canceller<DB> {
    fn beside() -> Option<Handle> {
        beside()
    }

    /// Opens the connection before its first use.
    async fn warm(&self, options: &Arc<Options<DB>>) -> Result<(), sqlx::Error> {
        // The task that holds the lock has opened the connection, or is about to.
        let Ok(mut warm) = self.0.warm.try_lock() else { return Ok(()) };
        if warm.is_none() {
            let mut opened = Warm::open(options).await?;
            // With the first message the driver learns all it has to know about it. The second one shows how long it
            // takes.
            DB::send(&mut opened.conn, opened.opened, Wanted::Look, &[]).await?;
            self.0.send(&mut opened, Wanted::Look, &[]).await?;
            *warm = Some(opened);
        }
        Ok(())
    }

    /// Signals a session, together with all others that are waiting for a signal.
    async fn signal(
        &self,
        options: &Arc<Options<DB>>,
        wanted: Wanted,
        probe: &DB::Probe,
    ) -> Result<Activity, Unsignalled> {
        let (session, (answer, answered)) = (DB::session(probe), oneshot::channel());
        let is_served = {
            let mut queue = self.0.queue();
            queue.requests.push(Request { wanted, session, answer });
            std::mem::replace(&mut queue.is_served, true)
        };
        if !is_served {
            let turn = Turn { inner: Arc::clone(&self.0), is_over: false };
            let options = Arc::clone(options);
            drop(beside().unwrap_or_else(Handle::current).spawn(serve(turn, options)));
        }
        // A runtime that has ended does not answer.
        answered.await.unwrap_or(Err(Unsignalled::Unanswered))
    }

    /// Zero before any was sent.
    fn round_trip(&self) -> Duration {
        self.0.round_trip()
    }

    async fn close(&self) {
        if let Some(warm) = self.0.warm.lock().await.take() {
            // A server that is gone needs no farewell.
            drop(warm.conn.close().await);
        }
    }
}

#[cfg(feature = "postgres")]
impl<DB: Signals> Canceller<DB> {
    /// Runs something else on the connection, which is lost if that fails. `None` if it is not open.
    pub(crate) async fn on_warm<T>(
        &self,
        run: impl AsyncFnOnce(&mut DB::Connection) -> Result<T, sqlx::Error>,
    ) -> Option<Result<T, sqlx::Error>> {
        let mut warm = self.0.warm.lock().await;
        let mut taken = warm.take()?;
        let ran = run(&mut taken.conn).await;
        if ran.is_ok() {
            *warm = Some(taken);
        }
        Some(ran)
    }
}

/// The turn of the caller that serves the queue. If it is dropped before the queue is empty, the remaining requests are
/// answered by their drop, and the next request finds no server.
struct Turn<DB: Signals> {
    inner: Arc<Inner<DB>>,
    is_over: bool,
}

impl<DB: Signals> Turn<DB> {
    /// The next requests to serve together; none if the turn is over.
    fn next(&mut self) -> Vec<Request<DB>> {
        let mut queue = self.inner.queue();
        // A caller that has gone needs no signal any more.
        queue.requests.retain(|request| !request.answer.is_closed());
        let count = queue.requests.len().min(BATCH);
        queue.is_served = count > 0;
        self.is_over = count == 0;
        queue.requests.drain(..count).collect()
    }
}

impl<DB: Signals> Drop for Turn<DB> {
    fn drop(&mut self) {
        if !self.is_over {
            let mut queue = self.inner.queue();
            queue.is_served = false;
            queue.requests.clear();
        }
    }
}

async fn serve<DB: Signals>(mut turn: Turn<DB>, options: Arc<Options<DB>>) {
    loop {
        let gather = (turn.inner.round_trip() / GATHER_PART).min(GATHER_LIMIT);
        if gather > Duration::from_micros(100) {
            sleep(gather).await;
        }
        let mut batch = turn.next();
        if batch.is_empty() {
            return;
        }
        for wanted in [Wanted::Cancel, Wanted::Look, Wanted::Terminate] {
            let requests: Vec<_> = batch.extract_if(.., |request| request.wanted == wanted).collect();
            if requests.is_empty() {
                continue;
            }
            let sessions: Vec<_> = requests.iter().map(|request| request.session.clone()).collect();
            let answers = turn.inner.ask(&options, wanted, &sessions).await;
            for (index, request) in requests.into_iter().enumerate() {
                let answer = match &answers {
                    Ok(seen) => seen.get(index).copied().ok_or(Unsignalled::Unanswered),
                    Err(failure) => Err(*failure),
                };
                // A caller that has gone needs no answer.
                let (Ok(()) | Err(_)) = request.answer.send(answer);
            }
        }
    }
}

impl<DB: Signals> Inner<DB> {
    fn queue(&self) -> MutexGuard<'_, Queue<DB>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn round_trip(&self) -> Duration {
        Duration::from_micros(self.round_trip.load(Ordering::Relaxed))
    }

    /// Sends one message over the connection, or over a new one if it fails.
    async fn ask(
        &self,
        options: &Arc<Options<DB>>,
        wanted: Wanted,
        sessions: &[DB::Session],
    ) -> Result<Vec<Activity>, Unsignalled> {
        let mut warm = self.warm.lock().await;
        let mut in_doubt = false;
        if let Some(mut taken) = warm.take() {
            let count = u32::try_from(sessions.len()).unwrap_or(u32::MAX);
            let limit = WARM_LIMIT + self.round_trip() * WARM_ROUND_TRIPS + SIGNAL_LIMIT.saturating_mul(count);
            if let Ok(Ok(answer)) = timeout(limit, self.send(&mut taken, wanted, sessions)).await {
                *warm = Some(taken);
                return Ok(answer);
            }
            in_doubt = true;
        }
        let Ok(Ok(mut opened)) = timeout(OPEN_LIMIT, Warm::<DB>::open(options)).await else {
            return Err(if in_doubt { Unsignalled::Unanswered } else { Unsignalled::Unreachable });
        };
        let answer = timeout(OPEN_LIMIT, self.send(&mut opened, wanted, sessions)).await;
        let Ok(Ok(answer)) = answer else { return Err(Unsignalled::Unanswered) };
        *warm = Some(opened);
        // The unanswered signal may still be under way behind this one, so the session must not be used again.
        if in_doubt { Err(Unsignalled::Unanswered) } else { Ok(answer) }
    }

    /// Sends one message, and learns from it how long that takes.
    async fn send(
        &self,
        warm: &mut Warm<DB>,
        wanted: Wanted,
        sessions: &[DB::Session],
    ) -> Result<Vec<Activity>, sqlx::Error> {
        let start = Instant::now();
        let answer = DB::send(&mut warm.conn, warm.opened, wanted, sessions).await?;
        let took = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX) / u64::from(DB::TRIPS);
        // Mostly the latest times count; one slow answer does not make the server look far away.
        let known = self.round_trip.load(Ordering::Relaxed);
        let learnt = if known == 0 { took } else { (known * 3 + took.min(known * 4)) / 4 };
        self.round_trip.store(learnt.max(1), Ordering::Relaxed);
        Ok(answer)
    }
}

impl<DB: Signals> Clone for Canceller<DB> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<DB: Signals> Default for Canceller<DB> {
    fn default() -> Self {
        let queue = Queue { requests: Vec::new(), is_served: false };
        Self(Arc::new(Inner { queue: StdMutex::new(queue), warm: Mutex::new(None), round_trip: AtomicU64::new(0) }))
    }
}

impl<DB: Signals> fmt::Debug for Canceller<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Canceller").finish_non_exhaustive()
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::env;
    use std::process::Command;

    use super::*;

    /// Set in a process in which no thread can be started.
    const CHILD: &str = "TX_GUARD_TEST_WITHOUT_THREADS";

    #[test]
    fn a_server_is_the_same_only_if_it_ran_before_something_was_learnt_of_it() {
        let since = Instant::now();
        let seconds = Duration::from_secs;
        let is_same = |ran, learnt| Opened { since, seen: since, ran }.is_same_server(learnt);
        let before = since.checked_sub(seconds(10)).unwrap();
        assert!(is_same(seconds(11), before));
        assert!(!is_same(seconds(10), before), "it may have been started at that moment");
        assert!(!is_same(seconds(0), before));
        // A session learnt while the connection lives is on the server to which the connection leads.
        assert!(is_same(seconds(0), since) && is_same(seconds(0), since + seconds(1)));
    }

    /// A request that comes when the queue is empty gets its own turn, which the end of the previous turn must not end.
    #[cfg(feature = "postgres")]
    #[test]
    fn a_turn_that_is_over_ends_no_other_and_one_that_is_not_leaves_the_place_free() {
        let canceller = Canceller::<sqlx::Postgres>::default();
        let turn = || Turn { inner: Arc::clone(&canceller.0), is_over: false };
        let is_served = || std::mem::replace(&mut canceller.0.queue().is_served, true);
        let mut over = turn();
        assert!(!is_served());
        assert!(over.next().is_empty());
        assert!(!is_served(), "the next one has to see to it");
        drop(over);
        assert!(is_served(), "the next one does");
        drop(turn());
        assert!(!is_served(), "nobody serves any more");
    }

    #[test]
    fn where_no_thread_is_to_be_had_there_is_none() {
        if env::var_os(CHILD).is_some() {
            let runtime = Builder::new_current_thread().build().unwrap();
            runtime.block_on(async { assert!(beside().is_none()) });
            return;
        }
        let name = "canceller::tests::where_no_thread_is_to_be_had_there_is_none";
        let output = Command::new(env::current_exe().unwrap())
            .args(["--exact", name, "--test-threads=1"])
            // No machine has room for a stack of 2^50 bytes.
            .envs([(CHILD, "1"), ("RUST_MIN_STACK", "1125899906842624")])
            .output()
            .unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && printed.contains("1 passed"), "{printed}");
    }
}
