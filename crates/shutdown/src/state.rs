//! The state that the supervisor, the workers, the signals and the watchdog share: the stop, the end, and the started
//! phases. Any of them may read the report at any time, and none waits for another under a lock.

pub(crate) mod stages;
mod sync;
pub(crate) mod voice;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::clock::Probe;
use crate::context::Values;
use crate::report::{Ledger, Report, Unnamed};
use crate::signal::INTERRUPT;
use crate::state::stages::Ending;
use crate::state::voice::{Announcer, Audience, Voice};
use crate::stop::{Readiness, Stop, StopReason, Stopping, after};
use crate::tree::{Node, stop_tree, tree};

/// How long a runtime must have run nothing at all before the waiting tasks count as starved.
const STARVED: Duration = Duration::from_millis(50);

/// The limits of a stop.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Terms {
    /// The total budget.
    pub(crate) budget: Duration,
    pub(crate) drain_delay: Duration,
    /// Whether the drain delay applies to a stop by SIGINT too.
    pub(crate) drains_on_interrupt: bool,
}

/// One application.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) name: String,
    /// Its token is the shutdown handle.
    pub(crate) stop: Arc<Stop>,
    terms: Terms,
    readiness: watch::Sender<Readiness>,
    /// What its phases provide.
    pub(crate) values: Arc<Values>,
    pub(crate) ending: Arc<Ending<Voice>>,
    announcer: Announcer,
    pub(crate) ledger: Arc<Ledger>,
    started: Mutex<Vec<Started>>,
    /// How many workers have not ended.
    working: AtomicUsize,
    pub(crate) probe: Probe,
    /// The runtime that `run` has built.
    pub(crate) runtime: OnceLock<Handle>,
    /// How many threads that runtime has, if they are counted.
    pub(crate) threads: Arc<AtomicUsize>,
    pub(crate) counts_threads: AtomicBool,
}

impl Core {
    /// Starts the thread that reports for the application.
    pub(crate) fn start(
        name: String,
        stop: Arc<Stop>,
        terms: Terms,
        workers: usize,
        audience: Audience,
        readiness: watch::Sender<Readiness>,
    ) -> std::io::Result<Self> {
        let ending = Arc::new(Ending::new());
        let (voice, announcer) = Voice::start(audience, Arc::downgrade(&ending))?;
        ending.give_voice(voice);
        Ok(Self {
            name,
            stop,
            terms,
            readiness,
            values: Arc::default(),
            ending,
            announcer,
            ledger: Arc::default(),
            started: Mutex::default(),
            working: AtomicUsize::new(workers),
            probe: Probe::default(),
            runtime: OnceLock::new(),
            threads: Arc::default(),
            counts_threads: AtomicBool::new(false),
        })
    }

    pub(crate) fn request(&self, reason: StopReason) {
        // A token that is cancelled without a reason was cancelled through the handle, and that came first.
        let reason = if self.stop.token().is_cancelled() { StopReason::Requested } else { reason };
        // Before the stop, so that a worker that is told to stop sees that the application is no longer ready.
        self.readiness
            .send_if_modified(|readiness| std::mem::replace(readiness, Readiness::Stopping) != Readiness::Stopping);
        // Before anything learns of the stop, so that the deadline is then already enforced.
        self.ending.begin(after(self.terms.budget).into_std());
        if self.stop.request(Stopping { reason: reason.clone(), deadline: after(self.terms.budget) }) {
            self.announcer.stopping(&reason);
        }
    }

    /// A receiver for the changes of the readiness.
    #[cfg(all(unix, feature = "systemd"))]
    pub(crate) fn watch_readiness(&self) -> watch::Receiver<Readiness> {
        self.readiness.subscribe()
    }

    /// Notes that every phase has started and is ready.
    pub(crate) fn started_all(&self) {
        self.readiness.send_if_modified(|readiness| {
            let first = *readiness == Readiness::Starting && !self.stop.token().is_cancelled();
            if first {
                *readiness = Readiness::Ready;
            }
            first
        });
    }

    /// What is left of the budget.
    pub(crate) fn remaining(&self) -> Duration {
        self.stop.get().map_or(Duration::ZERO, |stopping| stopping.deadline.saturating_duration_since(Instant::now()))
    }

    /// The report on every task that has ended, from any thread.
    pub(crate) fn report(&self, unnamed: Unnamed) -> Report {
        // Without a request there is nothing to report on: the callers have made one or seen one.
        let (reason, deadline) = match self.stop.get() {
            Some(stopping) => (stopping.reason.clone(), stopping.deadline),
            None => (StopReason::Requested, after(self.terms.budget)),
        };
        let elapsed = after(self.terms.budget).saturating_duration_since(deadline);
        Report::new(&self.name, reason, elapsed, &self.ledger, unnamed)
    }

    /// Closes the groups of all started phases and the groups below them, and lists them, each with whether it was
    /// starved.
    pub(crate) fn nodes(&self) -> Vec<(Arc<dyn Node>, bool)> {
        let started = self.started();
        let nodes = started.iter().map(|phase| (tree(&phase.node), self.is_starved(phase)));
        nodes.flat_map(|(nodes, starved)| nodes.into_iter().map(move |node| (node, starved))).collect()
    }

    /// How long after a stop for this reason the first phase is told to stop.
    pub(crate) fn delay(&self, reason: &StopReason) -> Duration {
        match reason {
            // A person at a terminal waits for no load balancer.
            StopReason::Signal(INTERRUPT) if !self.terms.drains_on_interrupt => Duration::ZERO,
            StopReason::Signal(_) | StopReason::Requested => self.terms.drain_delay,
            _ => Duration::ZERO,
        }
    }

    /// Enters a phase whose workers are about to start.
    pub(crate) fn enter(&self, node: Arc<dyn Node>, timeout: Option<Duration>) {
        self.started().push(Started { node, timeout, told: None });
    }

    /// The roots of the phases that have started, in their order, and whether they are starved.
    pub(crate) fn roots(&self) -> Vec<(Arc<dyn Node>, bool)> {
        self.started().iter().map(|phase| (Arc::clone(&phase.node), self.is_starved(phase))).collect()
    }

    /// When the phase at `index` is cut if it is told to stop now.
    pub(crate) fn phase_deadline(&self, index: usize, total: Instant) -> Instant {
        let timeout = self.started().get(index).and_then(|phase| phase.timeout);
        let remaining = total.saturating_duration_since(Instant::now());
        // Without a timeout of its own, a phase gets an equal share of what remains.
        let share = remaining / u32::try_from(index + 1).unwrap_or(u32::MAX);
        after(timeout.unwrap_or(share).min(remaining))
    }

    /// Tells the phase at `index` to stop.
    pub(crate) fn tell(&self, index: usize, stopping: &Stopping) {
        let node = self.started().get_mut(index).map(|phase| {
            phase.told.get_or_insert_with(|| (std::time::Instant::now(), self.probe.answered()));
            Arc::clone(&phase.node)
        });
        if let Some(node) = node {
            stop_tree(&node, stopping);
        }
    }

    /// Whether the runtime has run nothing at all since this phase was told to stop.
    fn is_starved(&self, phase: &Started) -> bool {
        phase.told.is_some_and(|(at, answered)| {
            self.probe.open() > 0 && answered == self.probe.answered() && at.elapsed() >= STARVED
        })
    }

    /// How many of the application's futures are alive in the runtime.
    pub(crate) fn named_futures(&self) -> usize {
        self.nodes().iter().map(|(node, _)| node.live_futures()).sum()
    }

    fn started(&self) -> MutexGuard<'_, Vec<Started>> {
        self.started.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn working(&self) -> usize {
        self.working.load(Ordering::Acquire)
    }

    /// Notes that a worker has ended, or will never start.
    pub(crate) fn worker_ended(&self) {
        if self.working.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.request(StopReason::Completed);
        }
    }
}

/// A phase whose workers run.
#[derive(Debug)]
struct Started {
    node: Arc<dyn Node>,
    timeout: Option<Duration>,
    /// When it was told to stop, and how many probes the runtime had answered by then.
    told: Option<(std::time::Instant, u64)>,
}
