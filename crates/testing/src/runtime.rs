//! The deterministic runtime: one async thread, one blocking thread, and a watchdog over both.
//!
//! Invariant: whatever is awaited here ends. A wait that nobody answers becomes a [`Fault`], never a hung test.

use std::any::Any;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Handle, Runtime};

use crate::torn::Ours;

/// How often the watchdog lets a wait look at its limit.
const TICK: Duration = Duration::from_millis(20);

/// How many times the scheduler is let run between two looks at the number of alive tasks.
const YIELDS_PER_ROUND: u32 = 8;

/// Rounds of settling that pass no time: enough for a task that only needs to be scheduled or needs a blocking job.
const TIMELESS_ROUNDS: u32 = 6;

/// The time one further round of settling lets pass, really and (with paused time) on tokio's clock.
const ROUND: Duration = Duration::from_micros(500);

/// What kept a part of a run from ending as it should.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing woke it within the bound.
    Hung,
    /// It panicked, with this message.
    Panicked(String),
}

impl Fault {
    pub(crate) fn from_panic(payload: &(dyn Any + Send)) -> Self {
        let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
        Self::Panicked(text.unwrap_or_else(|| "a panic without a message".to_owned()))
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is kept behind these locks is valid after every single assignment, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A real-time clock beside tokio's. A timer of tokio's would not do: under paused time it would fire as soon as the
/// runtime is idle, and it would move the clock that the operation sees.
#[derive(Debug)]
pub(crate) struct Watchdog {
    waiting: Arc<Mutex<Option<Waker>>>,
    limit: Duration,
    /// Dropping it ends the watchdog's thread.
    _stop: mpsc::Sender<()>,
}

impl Watchdog {
    pub(crate) fn new(limit: Duration) -> Self {
        let (stop, stopped) = mpsc::channel::<()>();
        let waiting = Arc::new(Mutex::new(None::<Waker>));
        let watched = Arc::clone(&waiting);
        std::thread::spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(TICK) {
                let waker = lock(&watched).take();
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
        });
        Self { waiting, limit, _stop: stop }
    }

    pub(crate) fn limit(&self) -> Duration {
        self.limit
    }

    /// Waits for `future`, but not longer than the limit, and not past a panic.
    pub(crate) async fn bound<T>(&self, future: impl Future<Output = T>) -> Result<T, Fault> {
        let mut future = pin!(future);
        let deadline = Instant::now() + self.limit;
        poll_fn(|cx| {
            match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
                Err(payload) => return Poll::Ready(Err(Fault::from_panic(payload.as_ref()))),
                Ok(Poll::Ready(value)) => return Poll::Ready(Ok(value)),
                Ok(Poll::Pending) => {}
            }
            if Instant::now() >= deadline {
                return Poll::Ready(Err(Fault::Hung));
            }
            *lock(&self.waiting) = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

/// A fresh current-thread runtime with a single blocking thread.
#[derive(Debug)]
pub(crate) struct Stage<'a> {
    runtime: Runtime,
    watchdog: &'a Watchdog,
    paused: bool,
    blocking_threads: Arc<(Mutex<usize>, Condvar)>,
}

impl<'a> Stage<'a> {
    pub(crate) fn new(paused: bool, watchdog: &'a Watchdog) -> std::io::Result<Self> {
        let blocking_threads = Arc::new((Mutex::new(0_usize), Condvar::new()));
        let (started, stopped) = (Arc::clone(&blocking_threads), Arc::clone(&blocking_threads));
        let runtime = Builder::new_current_thread()
            .enable_all()
            // One blocking thread makes the blocking pool a queue: jobs run in the order they were submitted, and a
            // job at its end proves that all before it have finished.
            .max_blocking_threads(1)
            .start_paused(paused)
            .on_thread_start(move || *lock(&started.0) += 1)
            .on_thread_stop(move || {
                *lock(&stopped.0) -= 1;
                stopped.1.notify_all();
            })
            .build()?;
        Ok(Self { runtime, watchdog, paused, blocking_threads })
    }

    /// Runs `future` to its end, its panic, or the limit.
    pub(crate) fn play<T>(&self, future: impl Future<Output = T>) -> Result<T, Fault> {
        self.runtime.block_on(self.watchdog.bound(future))
    }

    /// Runs `future`, which bounds its own waits.
    pub(crate) fn play_unbounded<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Enters the runtime, for code that is not async but spawns.
    pub(crate) fn enter(&self) -> tokio::runtime::EnterGuard<'_> {
        self.runtime.enter()
    }

    /// Drops `value` inside the runtime, where its `Drop` may spawn. What this and the ends of the runtime tear, the
    /// exploration has torn.
    pub(crate) fn drop_inside<T>(&self, value: T) -> Result<(), Fault> {
        let _context = self.runtime.enter();
        let _ours = Ours::begin();
        catch_unwind(AssertUnwindSafe(|| drop(value))).map_err(|payload| Fault::from_panic(payload.as_ref()))
    }

    pub(crate) fn alive_tasks(&self) -> usize {
        self.runtime.metrics().num_alive_tasks()
    }

    /// Lets blocking jobs and spawned tasks end, until no more than `baseline` tasks are alive. Returns whether that
    /// was reached within `patience`; without it a task that lives on purpose would hold up every run.
    pub(crate) async fn settle(&self, baseline: usize, patience: Duration) -> bool {
        let metrics = Handle::current().metrics();
        let rounds = TIMELESS_ROUNDS + u32::try_from(patience.as_micros() / ROUND.as_micros()).unwrap_or(u32::MAX);
        let mut calm = false;
        for round in 0..rounds {
            let pause = if round < TIMELESS_ROUNDS { Duration::ZERO } else { ROUND };
            fence(pause).await;
            if self.paused && !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            for _ in 0..YIELDS_PER_ROUND {
                tokio::task::yield_now().await;
            }
            // Twice in a row, because the last task may have submitted one more blocking job as it ended.
            let calm_before = std::mem::replace(&mut calm, metrics.num_alive_tasks() <= baseline);
            if calm && calm_before {
                return true;
            }
        }
        false
    }

    /// Ends the runtime with all its tasks where they stand, then waits for the blocking jobs already submitted.
    ///
    /// The shutdown begins before the gate opens, so that which jobs still run does not depend on thread timing.
    pub(crate) fn shut_down(self, gate: Gate) -> Result<(), Fault> {
        let Self { runtime, watchdog, blocking_threads, .. } = self;
        let _ours = Ours::begin();
        gate.wait_until_held(watchdog.limit());
        runtime.shutdown_background();
        gate.open();
        let (count, changed) = &*blocking_threads;
        let (count, _) = changed
            .wait_timeout_while(lock(count), watchdog.limit(), |count| *count > 0)
            .unwrap_or_else(PoisonError::into_inner);
        if *count == 0 { Ok(()) } else { Err(Fault::Hung) }
    }

    /// Ends the runtime in the ordinary way; a blocking job that never ends is left behind after the limit.
    pub(crate) fn finish(self) {
        let _ours = Ours::begin();
        self.runtime.shutdown_timeout(self.watchdog.limit());
    }

    /// Ends the runtime without waiting for a blocking job that is known to hang.
    pub(crate) fn abandon(self) {
        let _ours = Ours::begin();
        self.runtime.shutdown_background();
    }
}

/// Holds the only blocking thread: jobs submitted while it is closed have not begun, on every machine alike.
#[derive(Debug)]
pub(crate) struct Gate {
    held: mpsc::Receiver<()>,
    _open: mpsc::Sender<()>,
}

impl Gate {
    /// Must be called inside the runtime.
    pub(crate) fn close() -> Self {
        let (hold, held) = mpsc::sync_channel(1);
        let (open, opened) = mpsc::channel::<()>();
        drop(tokio::task::spawn_blocking(move || {
            let listening = hold.send(());
            // Ends when the gate is dropped: nothing is ever sent.
            listening.is_ok().then(|| opened.recv())
        }));
        Self { held, _open: open }
    }

    pub(crate) fn open(self) {}

    fn wait_until_held(&self, limit: Duration) {
        // A timeout means that an earlier job hangs, which the wait for the blocking thread then finds.
        let _ = self.held.recv_timeout(limit);
    }
}

/// Ends when every blocking job submitted before it has ended, after holding the blocking thread for `pause`.
pub(crate) async fn fence(pause: Duration) {
    let job = tokio::task::spawn_blocking(move || {
        if !pause.is_zero() {
            // On the blocking thread, where real time passes without moving tokio's paused clock.
            std::thread::park_timeout(pause);
        }
    });
    drop(job.await);
}
