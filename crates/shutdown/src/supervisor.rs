//! The course of an application: phases start in order and are stopped in reverse, each within what remains of the
//! budget. What it does not outlive itself, the watchdog finishes.

use std::panic::Location;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::application::Phase;
use crate::group::TaskGroup;
use crate::report::{Ledger, Report, TaskReport};
use crate::restart::{self, RestartPolicy, Work};
use crate::stop::{Stop, StopReason, Stopping, after};
use crate::task::{BoxError, TaskOutcome};
use crate::tree::{Node, cut, stop_tree, tree};
use crate::voice::Voice;
use crate::worker::WorkerContext;

/// What the supervisor, the workers, the signals and the watchdog share.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) name: String,
    /// Its token is the shutdown handle.
    pub(crate) stop: Arc<Stop>,
    /// The total budget of a stop.
    pub(crate) budget: Duration,
    drain_delay: Duration,
    /// Cancelled to end a stop at once, where the process cannot simply be ended.
    pub(crate) hurry: CancellationToken,
    /// Whether `run` is about to return, and the process no longer ours to end.
    pub(crate) over: AtomicBool,
    /// Whether the callbacks have returned.
    pub(crate) told: Arc<AtomicBool>,
    /// Whoever takes it ends the application; nobody else reports.
    voice: Mutex<Option<Voice>>,
    ledger: Arc<Ledger>,
    started: Mutex<Vec<Started>>,
    /// Whether the supervisor has begun to stop the phases.
    stopping: AtomicBool,
    /// How many workers have not ended.
    working: AtomicUsize,
}

impl Core {
    pub(crate) fn new(name: String, stop: Arc<Stop>, budget: Duration, drain_delay: Duration, workers: usize) -> Self {
        Self {
            name,
            stop,
            budget,
            drain_delay,
            hurry: CancellationToken::new(),
            over: AtomicBool::new(false),
            told: Arc::default(),
            voice: Mutex::default(),
            ledger: Arc::default(),
            started: Mutex::default(),
            stopping: AtomicBool::new(false),
            working: AtomicUsize::new(workers),
        }
    }

    pub(crate) fn request(&self, reason: StopReason) {
        // A token that is cancelled without a reason was cancelled through the handle, and that came first.
        let reason = if self.stop.token().is_cancelled() { StopReason::Requested } else { reason };
        self.stop.request(Stopping { reason, deadline: after(self.budget) });
    }

    pub(crate) fn give_voice(&self, voice: Voice) {
        *self.voice.lock().unwrap_or_else(PoisonError::into_inner) = Some(voice);
    }

    pub(crate) fn take_voice(&self) -> Option<Voice> {
        self.voice.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The report on every task that has ended, from any thread.
    pub(crate) fn report(&self) -> Report {
        // Without a request there is nothing to report on: the callers have made one or seen one.
        let (reason, deadline) = match self.stop.get() {
            Some(stopping) => (stopping.reason.clone(), stopping.deadline),
            None => (StopReason::Requested, after(self.budget)),
        };
        let elapsed = after(self.budget).saturating_duration_since(deadline);
        Report::new(&self.name, reason, elapsed, &self.ledger)
    }

    /// The groups of all phases that were started and those below them, closed.
    pub(crate) fn nodes(&self) -> Vec<Arc<dyn Node>> {
        self.started().iter().flat_map(|phase| tree(&phase.node)).collect()
    }

    /// How long after a stop for this reason the first phase is told.
    pub(crate) fn delay(&self, reason: &StopReason) -> Duration {
        match reason {
            StopReason::Signal(_) | StopReason::Requested => self.drain_delay,
            _ => Duration::ZERO,
        }
    }

    /// Tells the phase that is first to stop, if the supervisor has not got round to it: a worker that holds up the
    /// runtime while it asks `is_cancelled` now and then is told all the same.
    pub(crate) fn nudge(&self) {
        let Some(Stopping { reason, deadline }) = self.stop.get() else { return };
        let started = self.started();
        if !self.stopping.load(Ordering::Acquire)
            && let Some(last) = started.last()
        {
            let deadline = last.deadline(started.len(), *deadline);
            stop_tree(&last.node, &Stopping { reason: reason.clone(), deadline });
        }
    }

    fn started(&self) -> MutexGuard<'_, Vec<Started>> {
        self.started.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One worker has ended, or will never start.
    fn worker_ended(&self) {
        if self.working.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.request(StopReason::Completed);
        }
    }
}

/// One worker as it was added.
pub(crate) struct Worker {
    pub(crate) name: String,
    pub(crate) added_at: &'static Location<'static>,
    pub(crate) work: Work,
}

/// A phase whose workers run.
#[derive(Debug, Clone)]
struct Started {
    node: Arc<dyn Node>,
    timeout: Option<Duration>,
}

impl Started {
    /// When the phase is cut if it is told to stop now and `left` phases have to stop until `deadline`.
    fn deadline(&self, left: usize, deadline: Instant) -> Instant {
        let remaining = deadline.saturating_duration_since(Instant::now());
        // Without a timeout of its own, a phase gets an equal share of what remains.
        let share = remaining / u32::try_from(left).unwrap_or(u32::MAX).max(1);
        after(self.timeout.unwrap_or(share).min(remaining))
    }
}

/// Runs the phases from the first start to the last end. Afterwards no worker is alive.
pub(crate) async fn supervise(core: &Arc<Core>, phases: Vec<Phase>, restart: RestartPolicy) {
    if core.working.load(Ordering::Acquire) == 0 {
        core.request(StopReason::Completed);
    }
    let mut running = Vec::new();
    for phase in phases {
        if core.stop.token().is_cancelled() {
            for Worker { name, added_at, .. } in phase.workers {
                never_started(core, &phase.name, name, added_at);
            }
        } else {
            running.push(start(core, phase, restart).await);
        }
    }
    core.stop.token().cancelled().await;
    // Whoever cancelled the shutdown handle left no reason.
    core.request(StopReason::Requested);
    if core.hurry.run_until_cancelled(stop(core, &running)).await.is_none() {
        cut_all(core, &running).await;
    }
}

/// Starts a phase and waits for it to be ready if it is to. A stop ends the waiting.
async fn start(core: &Arc<Core>, phase: Phase, restart: RestartPolicy) -> TaskGroup {
    let group = TaskGroup::of_workers(Arc::clone(&core.ledger), phase.name.clone());
    core.started().push(Started { node: group.node(), timeout: phase.timeout });
    let policy = phase.restart.unwrap_or(restart);
    let mut readiness = Vec::new();
    for worker in phase.workers {
        readiness.push(launch(core, &group, &phase.name, worker, policy));
    }
    if let Some(limit) = phase.ready_within {
        let ready = async {
            for worker in readiness {
                worker.cancelled().await;
            }
        };
        let ready = timeout_at(after(limit), ready);
        if let Some(Err(_)) = core.stop.token().run_until_cancelled(ready).await {
            core.request(StopReason::NotReady { phase: phase.name });
        }
    }
    group
}

/// Starts a worker and returns what its readiness cancels. The watchdog and a second signal close groups from threads of
/// their own, also in the middle of a start: then the worker is never started.
fn launch(
    core: &Arc<Core>,
    group: &TaskGroup,
    phase: &str,
    worker: Worker,
    policy: RestartPolicy,
) -> CancellationToken {
    let Worker { name, added_at, work } = worker;
    let ready = CancellationToken::new();
    let (shared, told) = (Arc::clone(core), ready.clone());
    let run = move |cx: WorkerContext| run_worker(shared, work, policy, cx.with_ready(told));
    if group.spawn_contextual(name.clone().into(), added_at, run).is_err() {
        never_started(core, phase, name, added_at);
    }
    ready
}

/// Runs one worker to its last end, and stops the application if that was an error or a panic.
async fn run_worker(core: Arc<Core>, work: Work, policy: RestartPolicy, cx: WorkerContext) -> Result<(), BoxError> {
    /// Counts the worker as ended however it ends: its future may be dropped at any await.
    struct Working(Arc<Core>, WorkerContext);
    impl Drop for Working {
        fn drop(&mut self) {
            // One that has ended cannot become ready any more, and nobody need wait for it.
            self.1.ready();
            self.0.worker_ended();
        }
    }
    let working = Working(Arc::clone(&core), cx.clone());
    let worker = cx.name().to_owned();
    let end = restart::run(work, policy, cx).await;
    // Before the count, so that the last worker's failure is the reason and not that all have ended.
    match &end {
        Ok(Ok(())) => {}
        Ok(Err(_)) => core.request(StopReason::Failed { worker }),
        Err(_) => core.request(StopReason::Panicked { worker }),
    }
    drop(working);
    end.unwrap_or_else(|payload| std::panic::resume_unwind(payload))
}

fn never_started(core: &Core, phase: &str, name: String, added_at: &'static Location<'static>) {
    let report = TaskReport {
        name,
        group: phase.to_owned(),
        is_worker: true,
        outcome: TaskOutcome::Cancelled,
        spawned_at: added_at,
        last_mark: None,
        straggling: None,
    };
    core.ledger.record(report, || true);
    core.worker_ended();
}

/// Stops the phases, the last one first, each when the one after it has ended or was cut.
async fn stop(core: &Core, groups: &[TaskGroup]) {
    let Some(Stopping { reason, deadline }) = core.stop.get() else { return };
    core.stopping.store(true, Ordering::Release);
    let started = core.started().clone();
    let mut delay = core.delay(reason);
    for (earlier, (group, phase)) in groups.iter().zip(&started).enumerate().rev() {
        if Instant::now() >= *deadline {
            break;
        }
        let phase_deadline = phase.deadline(earlier + 1, *deadline);
        if !delay.is_zero() {
            // The delay runs inside the phase's time. Workers that end during it end it.
            let _elapsed = timeout_at(after(delay).min(phase_deadline), group.idle()).await;
            delay = Duration::ZERO;
        }
        group.stop(reason.clone(), phase_deadline);
        group.idle().await;
    }
    cut_all(core, groups).await;
}

/// Ends whatever is left, all at once: there is no time for an order any more.
async fn cut_all(core: &Core, groups: &[TaskGroup]) {
    let reason = core.stop.get().map_or(StopReason::Requested, |stopping| stopping.reason.clone());
    for group in groups.iter().rev() {
        group.stop(reason.clone(), Instant::now());
    }
    let nodes: Vec<_> = groups.iter().rev().map(TaskGroup::node).collect();
    cut(&nodes).await;
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use cancel_safe_testing::{Explore, Outcome};
    use tokio::time::sleep;

    use super::*;
    use crate::restart::Restart;
    use crate::task::{Kind, Slot};

    const SECOND: Duration = Duration::from_secs(1);

    /// The core of an application with one worker, and what the worker leaves behind.
    struct Scene {
        core: Arc<Core>,
        /// Held by each attempt for as long as it lives.
        alive: Arc<()>,
        begun: Arc<AtomicUsize>,
    }

    impl Scene {
        fn new() -> Self {
            let core = Core::new("app".to_owned(), Arc::default(), 10 * SECOND, Duration::ZERO, 1);
            Self { core: Arc::new(core), alive: Arc::default(), begun: Arc::default() }
        }

        /// Fails at first, and returns in its third attempt.
        fn flaky(&self) -> Phase {
            let (alive, begun) = (Arc::clone(&self.alive), Arc::clone(&self.begun));
            Phase::new("main".to_owned()).worker("flaky", |_: WorkerContext| async move {
                let number = begun.fetch_add(1, Ordering::SeqCst);
                sleep(SECOND).await;
                drop(alive);
                if number < 2 { Err("not yet") } else { Ok(()) }
            })
        }

        /// Returns in its only attempt.
        fn steady(&self) -> Phase {
            let (alive, begun) = (Arc::clone(&self.alive), Arc::clone(&self.begun));
            Phase::new("main".to_owned()).worker_once("steady", move |_: WorkerContext| async move {
                begun.fetch_add(1, Ordering::SeqCst);
                sleep(SECOND).await;
                drop(alive);
            })
        }

        async fn run(&self, mut phase: Phase) -> bool {
            let Worker { work, .. } = phase.workers.remove(0);
            let group = TaskGroup::of_workers(Arc::clone(&self.core.ledger), phase.name);
            let slot = Slot::new("worker".into(), Location::caller(), Kind::Contextual);
            let cx = WorkerContext::new(Arc::new(slot), group.node());
            run_worker(Arc::clone(&self.core), work, Restart::OnFailure.into(), cx).await.is_ok()
        }

        fn check(&self, outcome: Outcome<bool>, attempts: usize) -> Result<(), String> {
            let (begun, working) = (self.begun.load(Ordering::SeqCst), self.core.working.load(Ordering::SeqCst));
            let lives_on = Arc::strong_count(&self.alive) > 1;
            match (outcome, working) {
                _ if lives_on => Err(format!("an attempt outlives its worker: {outcome:?}")),
                (Outcome::Completed(true), 0) if begun == attempts => Ok(()),
                // A worker that was never polled was not there to end.
                (Outcome::Dropped { point: 0, .. }, 1) if begun == 0 => Ok(()),
                (Outcome::Dropped { point: 1.., .. }, 0) if (1..=attempts).contains(&begun) => Ok(()),
                _ => Err(format!("{outcome:?}: {begun} attempts, {working} workers still count as running")),
            }
        }
    }

    #[test]
    fn a_worker_dropped_anywhere_leaves_no_attempt_and_counts_as_ended() {
        let explore = Explore::new().paused_time(true);
        let report = explore.run(
            async || Scene::new(),
            async |scene| scene.run(scene.flaky()).await,
            async |scene, outcome| scene.check(outcome, 3),
        );
        report.publish("shutdown", "task of a worker").assert_clean();
        let report = explore.run(
            async || Scene::new(),
            async |scene| scene.run(scene.steady()).await,
            async |scene, outcome| scene.check(outcome, 1),
        );
        report.publish("shutdown", "task of a worker that starts once").assert_clean();
    }

    #[test]
    fn a_hurried_stop_dropped_anywhere_leaves_no_worker() {
        let report = Explore::new().paused_time(true).run(
            async || Scene::new(),
            async |scene| {
                let alive = Arc::clone(&scene.alive);
                let deaf = |_: WorkerContext| async move { (alive, pending::<()>().await).1 };
                let phase = Phase::new("main".to_owned()).worker_once("deaf", deaf);
                let hurry = async {
                    sleep(SECOND).await;
                    scene.core.request(StopReason::Requested);
                    sleep(SECOND).await;
                    scene.core.hurry.cancel();
                };
                tokio::join!(supervise(&scene.core, vec![phase], Restart::Never.into()), hurry);
                scene.core.report().stragglers().count()
            },
            async |scene, outcome| match (Arc::strong_count(&scene.alive), outcome) {
                (1, Outcome::Completed(1) | Outcome::Dropped { .. }) => Ok(()),
                (count, outcome) => Err(format!("{} workers left: {outcome:?}", count - 1)),
            },
        );
        report.publish("shutdown", "supervisor in a hurry").assert_clean();
    }

    #[tokio::test]
    async fn a_worker_whose_phase_is_closed_while_it_starts_is_reported_as_never_started() {
        let core = Core::new("app".to_owned(), Arc::default(), Duration::from_secs(1), Duration::ZERO, 1);
        let core = Arc::new(core);
        core.request(StopReason::Requested);
        let group = TaskGroup::of_workers(Arc::clone(&core.ledger), "main".to_owned());
        group.stop(StopReason::Requested, Instant::now());

        let work = Work::Once(Box::new(|_| unreachable!("the worker was started")));
        let worker = Worker { name: "late".to_owned(), added_at: Location::caller(), work };
        launch(&core, &group, "main", worker, Restart::Never.into());

        let report = core.report();
        let [task] = report.tasks() else { panic!("{report}") };
        assert!(task.name == "late" && task.is_worker && task.outcome.is_cancelled(), "{report}");
        assert_eq!(core.working.load(Ordering::Acquire), 0);
    }
}
