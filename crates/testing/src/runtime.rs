//! The deterministic runtime: one async thread, one blocking thread, and a watchdog over both.
//!
//! Invariant: every wait here ends. A wait without an answer becomes a [`Fault`], never a hung test.

use std::any::Any;
use std::cell::Cell;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;

use crate::lock::lock;
use crate::panics;
use crate::torn::Ours;

/// How often the watchdog makes a wait check its limit.
const TICK: Duration = Duration::from_millis(20);

/// How long the end of a runtime waits for blocking jobs of the setup that are known not to end by themselves. They end
/// when the state is dropped, or never.
const WORKER_PATIENCE: Duration = Duration::from_millis(100);

/// How long to wait for the end of an open gate's job; it takes microseconds on an idle machine.
const OPENING: Duration = Duration::from_millis(2);

/// What kept a part of a run from ending as it should.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing woke it within the bound.
    Hung,
    /// It panicked, with this message.
    Panicked(String),
    /// A blocking job of the setup does not end and occupies the only thread.
    Occupied,
}

impl Fault {
    pub(crate) fn from_panic(payload: &(dyn Any + Send)) -> Self {
        let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
        Self::Panicked(text.unwrap_or_else(|| "a panic without a message".to_owned()))
    }
}

/// A real-time clock beside tokio's. A tokio timer would not do: under paused time it would fire as soon as the runtime
/// is idle, and it would move the clock that the operation sees.
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

/// Rings when the runtime has slept. It wakes the driver first, before any task that has become ready meanwhile.
#[derive(Debug, Default)]
pub(crate) struct Bell(Mutex<Ringing>);

#[derive(Debug, Default)]
struct Ringing {
    rung: bool,
    waker: Option<Waker>,
}

impl Bell {
    fn ring(&self) {
        let waker = {
            let mut ringing = lock(&self.0);
            ringing.rung = true;
            ringing.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Ends after the runtime's next sleep.
    pub(crate) async fn next(&self) {
        lock(&self.0).rung = false;
        poll_fn(|cx| {
            let mut ringing = lock(&self.0);
            if ringing.rung {
                return Poll::Ready(());
            }
            ringing.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// The runtime owns the bell and the waker owns the runtime: without this the runtime would never be freed.
    fn forget_waker(&self) {
        let waker = lock(&self.0).waker.take();
        drop(waker);
    }
}

/// A fresh current-thread runtime with a single blocking thread for the jobs of the operation.
#[derive(Debug)]
pub(crate) struct Stage<'a> {
    runtime: Runtime,
    /// How long it has to be quiet before a wait counts as endless.
    pub(crate) quiet: &'a Cell<Duration>,
    /// How long to wait for blocking jobs when everything else is at rest.
    pub(crate) job_patience: &'a Cell<Duration>,
    pub(crate) watchdog: &'a Watchdog,
    pub(crate) paused: bool,
    pub(crate) bell: Arc<Bell>,
    /// How many blocking jobs of the setup never end; each occupies a thread.
    workers: usize,
    blocking_threads: Arc<(Mutex<usize>, Condvar)>,
}

impl<'a> Stage<'a> {
    pub(crate) fn new(
        paused: bool,
        workers: usize,
        watchdog: &'a Watchdog,
        quiet: &'a Cell<Duration>,
        job_patience: &'a Cell<Duration>,
    ) -> std::io::Result<Self> {
        let blocking_threads = Arc::new((Mutex::new(0_usize), Condvar::new()));
        let (started, stopped) = (Arc::clone(&blocking_threads), Arc::clone(&blocking_threads));
        let bell = Arc::new(Bell::default());
        let slept = Arc::clone(&bell);
        let printed = panics::printed();
        let runtime = Builder::new_current_thread()
            .enable_all()
            // One blocking thread makes the blocking pool a queue: jobs run in the order of submission, and a finished
            // job proves that all earlier ones have finished.
            .max_blocking_threads(workers + 1)
            // The driver is polled between any two task polls, so that each of these polls can be a point.
            .event_interval(1)
            // Tasks woken by other threads run next: the runtime's own queue never runs dry here, so tasks outside it
            // would starve.
            .global_queue_interval(1)
            .start_paused(paused)
            .on_thread_unpark(move || slept.ring())
            .on_thread_start(move || {
                panics::join(printed.as_ref());
                *lock(&started.0) += 1;
            })
            .on_thread_stop(move || {
                *lock(&stopped.0) -= 1;
                stopped.1.notify_all();
            })
            .build()?;
        Ok(Self { runtime, quiet, job_patience, watchdog, paused, bell, workers, blocking_threads })
    }

    /// Runs `future` to its end; it bounds its own waits.
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        let output = self.runtime.block_on(future);
        self.bell.forget_waker();
        output
    }

    /// Drops `value` in the context of the runtime, where its `Drop` may spawn.
    pub(crate) fn drop_inside<T>(&self, value: T) -> Result<(), Fault> {
        let _context = self.runtime.enter();
        drop_caught(value)
    }

    pub(crate) fn alive_tasks(&self) -> usize {
        self.runtime.metrics().num_alive_tasks()
    }

    /// Ends the runtime with all its tasks at their current awaits, then waits for the blocking jobs already submitted.
    ///
    /// The shutdown begins before the gate opens, so that the set of jobs that still run does not depend on thread
    /// timing.
    pub(crate) fn shut_down(self, gate: Option<Gate>) -> Result<(), Fault> {
        let Self { runtime, watchdog, workers, blocking_threads, .. } = self;
        let _ours = Ours::begin();
        if let Some(gate) = &gate {
            // If it does not close, an earlier job hangs, and the wait for the blocking thread then finds that.
            let _closed = gate.held().wait(watchdog.limit());
        }
        runtime.shutdown_background();
        drop(gate);
        let (count, changed) = &*blocking_threads;
        let (count, _) = changed
            .wait_timeout_while(lock(count), watchdog.limit(), |count| *count > workers)
            .unwrap_or_else(PoisonError::into_inner);
        if *count <= workers { Ok(()) } else { Err(Fault::Hung) }
    }

    /// Ends the runtime in the ordinary way; a blocking job that never ends is left behind after the limit.
    pub(crate) fn finish(self) {
        let _ours = Ours::begin();
        let patience = if self.workers == 0 { self.watchdog.limit() } else { WORKER_PATIENCE };
        self.runtime.shutdown_timeout(patience);
    }

    /// Ends the runtime without waiting for a blocking job that is known to hang.
    pub(crate) fn abandon(self) {
        let _ours = Ours::begin();
        self.runtime.shutdown_background();
    }
}

/// Drops `value`, and catches its panic. A section that this tears counts as torn by the exploration.
pub(crate) fn drop_caught<T>(value: T) -> Result<(), Fault> {
    let _ours = Ours::begin();
    catch_unwind(AssertUnwindSafe(|| drop(value))).map_err(|payload| Fault::from_panic(payload.as_ref()))
}

/// Holds the only blocking thread: on every machine, jobs submitted while it is closed have not begun. It opens when it
/// is dropped.
#[derive(Debug)]
pub(crate) struct Gate {
    held: Told,
    open: mpsc::Sender<()>,
    job: JoinHandle<()>,
}

impl Gate {
    /// Must be called inside the runtime. It closes when all earlier jobs have ended.
    pub(crate) fn close() -> Self {
        let (hold, held) = mpsc::sync_channel::<()>(1);
        let (open, opened) = mpsc::channel::<()>();
        let job = tokio::task::spawn_blocking(move || {
            if hold.send(()).is_ok() {
                // A later receiver sees that the channel is closed, which means the same.
                drop(hold);
                // Ends when the gate is dropped: nothing is ever sent.
                opened.recv().unwrap_or_default();
            }
        });
        Self { held: Told(held), open, job }
    }

    /// Opens it, and waits a moment for its job to be over.
    pub(crate) fn open(self) {
        let Self { held: _, open, job } = self;
        drop(open);
        let begun = Instant::now();
        while !job.is_finished() && begun.elapsed() < OPENING {
            std::thread::yield_now();
        }
        // The job wakes the runtime once more after it has reported its end.
        std::thread::yield_now();
    }

    /// The word that it is closed.
    pub(crate) fn held(&self) -> &Told {
        &self.held
    }
}

/// A message from the blocking thread.
#[derive(Debug)]
pub(crate) struct Told(pub(crate) mpsc::Receiver<()>);

impl Told {
    /// Waits for it, and blocks the thread meanwhile. Returns whether it came, or cannot come any more.
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        !matches!(self.0.recv_timeout(limit), Err(RecvTimeoutError::Timeout))
    }
}
