//! The course of an application: phases start in order and are stopped in reverse, each within what remains of the
//! budget. With `run`, a dedicated thread enforces the phases' deadlines: a phase that wedges the runtime is cut on
//! time, and the next one is told. If even this thread is stuck, the watchdog ends the process.

use std::future::poll_fn;
use std::io;
use std::panic::Location;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::thread;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::application::phase::{Phase, Worker};
use crate::application::restart::{self, RestartPolicy, Work};
use crate::clock::TICK;
use crate::clock::{Alarm, Clock, drive};
use crate::context::WorkerContext;
use crate::group::TaskGroup;
use crate::panics::{Panic, catch, watch};
use crate::report::TaskReport;
use crate::state::Core;
use crate::stop::{StopReason, Stopping, after};
use crate::task::{BoxError, TaskOutcome};
use crate::tree::cut;

/// How long a phase may take to provide its values, unless it has a limit of its own.
const PROVIDED_WITHIN: Duration = Duration::from_secs(30);

/// The thread that takes an application through its phases, whatever the runtime does.
#[derive(Debug)]
pub(crate) struct Supervisor {
    ended: CancellationToken,
}

impl Supervisor {
    pub(crate) fn start(
        core: &Arc<Core>,
        phases: Vec<Phase>,
        restart: RestartPolicy,
        runtime: &Handle,
    ) -> io::Result<Self> {
        let ended = CancellationToken::new();
        // The guard is dropped in a panic too, so that `run` never waits for a thread that is gone.
        let (core, guard) = (Arc::clone(core), ended.clone().drop_guard());
        core.runtime.get_or_init(|| runtime.clone());
        let supervise = move || {
            let _guard = guard;
            let alarm = Arc::new(Alarm::default());
            let clock = Clock::System(Arc::clone(&alarm));
            let course = supervise(&core, phases, restart, &clock);
            drive(&alarm, course, || tick(&core));
        };
        thread::Builder::new().name("shutdown-phases".to_owned()).spawn(supervise)?;
        Ok(Self { ended })
    }

    /// Waits until no worker is alive.
    pub(crate) async fn ended(self) {
        self.ended.cancelled().await;
    }
}

/// Probes the runtime now and then while the application stops, which also keeps its timers going. Returns when to ask
/// again.
fn tick(core: &Core) -> Option<Duration> {
    let runtime = core.runtime.get().filter(|_| core.stop.is_set())?;
    core.probe.ask(runtime);
    Some(TICK)
}

/// The thread that probes the user's runtime for as long as this value lives.
#[derive(Debug)]
pub(crate) struct Ticker {
    _over: DropGuard,
}

impl Ticker {
    pub(crate) fn start(core: &Arc<Core>, runtime: Handle) -> io::Result<Self> {
        let over = CancellationToken::new();
        let (core, guard) = (Arc::clone(core), over.clone().drop_guard());
        core.runtime.get_or_init(|| runtime);
        let ask = move || {
            let course = async {
                // A stop wakes the thread as well: it asks from then on.
                let stopped = pin!(core.stop.token().cancelled());
                let _stopped = over.run_until_cancelled(stopped).await;
                over.cancelled().await;
            };
            drive(&Alarm::default(), course, || tick(&core));
        };
        thread::Builder::new().name("shutdown-ticker".to_owned()).spawn(ask)?;
        Ok(Self { _over: guard })
    }
}

/// Runs the phases from the first start to the last end. Afterwards no worker is alive.
pub(crate) async fn supervise(core: &Arc<Core>, phases: Vec<Phase>, restart: RestartPolicy, clock: &Clock) {
    watch();
    if core.working() == 0 {
        core.request(StopReason::Completed);
    }
    let mut running = Vec::new();
    for phase in phases {
        if core.stop.token().is_cancelled() {
            // Before any of the user's values are dropped, because that may take a while: the deadline is then already
            // set.
            core.request(StopReason::Requested);
            for Worker { name, added_at, work, .. } in phase.workers {
                never_started(core, &phase.name, name, added_at, work);
            }
        } else {
            running.push(start(core, phase, restart, clock).await);
        }
    }
    core.started_all();
    core.stop.token().cancelled().await;
    // A cancelled shutdown handle leaves no reason.
    core.request(StopReason::Requested);
    let mut stopping = pin!(stop(core, &running, clock));
    let stopped = poll_fn(|cx| match stopping.as_mut().poll(cx) {
        Poll::Ready(()) => Poll::Ready(true),
        Poll::Pending => core.ending.poll_hurried(cx).map(|()| false),
    });
    if !stopped.await {
        cut_all(core, clock).await;
    }
}

/// Starts a phase and, if required, waits until it is ready. A stop ends the wait.
async fn start(core: &Arc<Core>, phase: Phase, restart: RestartPolicy, clock: &Clock) -> TaskGroup {
    let group = TaskGroup::of_workers(Arc::clone(&core.ledger), phase.name.clone());
    core.enter(group.node(), phase.timeout);
    let policy = phase.restart.unwrap_or(restart);
    let mut readiness = Vec::new();
    for worker in phase.workers {
        // Without a limit of its own, a phase is ready when it has made its values.
        let counts = phase.ready_within.is_some() || worker.is_provider;
        let ready = launch(core, &group, &phase.name, worker, policy);
        readiness.extend(counts.then_some(ready));
    }
    let ready = async {
        for worker in &readiness {
            worker.cancelled().await;
        }
    };
    if !readiness.is_empty() {
        let ready = clock.timeout_at(after(phase.ready_within.unwrap_or(PROVIDED_WITHIN)), ready);
        if let Some(None) = core.stop.token().run_until_cancelled(ready).await {
            core.request(StopReason::NotReady { phase: phase.name });
        }
    }
    group
}

/// Starts a worker and returns the token that its readiness cancels. The watchdog and a second signal close groups from
/// other threads, even in the middle of a start: then the worker is never started.
fn launch(
    core: &Arc<Core>,
    group: &TaskGroup,
    phase: &str,
    worker: Worker,
    policy: RestartPolicy,
) -> CancellationToken {
    let Worker { name, added_at, work, restart, is_tolerated, .. } = worker;
    let policy = restart.unwrap_or(policy);
    if is_tolerated {
        core.ledger.tolerate(&name, added_at);
    }
    let ready = CancellationToken::new();
    let (shared, told, values) = (Arc::clone(core), ready.clone(), Arc::clone(&core.values));
    // The supervisor's thread is outside the runtime.
    let _entered = core.runtime.get().map(Handle::enter);
    let run = move |cx: WorkerContext| run_worker(shared, work, policy, is_tolerated, cx.of_worker(told, values));
    if let Err(rejected) = group.spawn_contextual(name.clone().into(), added_at, run) {
        never_started(core, phase, name, added_at, rejected);
    }
    ready
}

/// Runs one worker to its last end, and stops the application if that was an error or a panic.
async fn run_worker(
    core: Arc<Core>,
    work: Work,
    policy: RestartPolicy,
    is_tolerated: bool,
    cx: WorkerContext,
) -> Result<(), BoxError> {
    let working = Working { core, cx: cx.clone(), is_tolerated };
    let end = restart::run(work, policy, cx).await;
    // Before the count, so that the reason is the last worker's failure and not "all workers have completed".
    match &end {
        Ok(Ok(())) => {}
        Ok(Err(_)) => working.failed(|worker| StopReason::Failed { worker }),
        Err(_) => working.failed(|worker| StopReason::Panicked { worker }),
    }
    drop(working);
    end.unwrap_or_else(|panic| std::panic::resume_unwind(Box::new(panic)))
}

/// Counts a worker as ended however it ends: its future may be dropped at any await.
struct Working {
    core: Arc<Core>,
    cx: WorkerContext,
    is_tolerated: bool,
}

impl Working {
    fn failed(&self, reason: impl FnOnce(String) -> StopReason) {
        if !self.is_tolerated {
            self.core.request(reason(self.cx.name().to_owned()));
        }
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        // The worker's captures are dropped last, and may panic when all else went well.
        if thread::panicking() {
            self.failed(|worker| StopReason::Panicked { worker });
        }
        // A worker that has ended cannot become ready any more, so nothing should wait for it.
        self.cx.ready();
        self.core.worker_ended();
    }
}

/// Records a worker that will never run. If dropping its work panics, the panic is its outcome.
fn never_started<W>(core: &Core, phase: &str, name: String, added_at: &'static Location<'static>, work: W) {
    let outcome = match catch(|| drop(work)) {
        Ok(()) => TaskOutcome::Cancelled,
        Err(Panic { message, location }) => {
            TaskOutcome::Panicked { message, location: location.unwrap_or_else(|| added_at.into()) }
        }
    };
    let report = TaskReport {
        name,
        group: phase.to_owned(),
        is_worker: true,
        is_tolerated: false,
        outcome,
        spawned_at: added_at,
        last_mark: None,
        straggling: None,
    };
    core.ledger.record(report);
    core.worker_ended();
}

/// Stops the phases in reverse order, each when the one after it has ended or was cut.
async fn stop(core: &Core, groups: &[TaskGroup], clock: &Clock) {
    let Some(Stopping { reason, deadline }) = core.stop.get() else { return };
    let drained = after(core.delay(reason));
    for (index, group) in groups.iter().enumerate().rev() {
        if Instant::now() >= *deadline {
            break;
        }
        let node = group.node();
        let phase_deadline = core.phase_deadline(index, *deadline);
        if Instant::now() < drained {
            // The delay runs inside the phase's time. A phase whose workers have ended leaves the rest of it to the one
            // before it.
            let delayed = drained.min(phase_deadline);
            let _elapsed = clock.timeout_at(delayed, poll_fn(|cx| node.poll_idle(cx))).await;
        }
        core.tell(index, &Stopping { reason: reason.clone(), deadline: phase_deadline });
        if clock.timeout_at(phase_deadline, poll_fn(|cx| node.poll_idle(cx))).await.is_none() {
            cut(&core.roots()[index..=index], clock).await;
        }
    }
    cut_all(core, clock).await;
}

/// Ends whatever is left, all at once: there is no time for an order any more.
async fn cut_all(core: &Core, clock: &Clock) {
    let reason = core.stop.get().map_or(StopReason::Requested, |stopping| stopping.reason.clone());
    let mut roots = core.roots();
    let now = Stopping { reason, deadline: Instant::now() };
    for index in (0..roots.len()).rev() {
        core.tell(index, &now);
    }
    roots.reverse();
    cut(&roots, clock).await;
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use cancel_safe_testing::{Explore, Outcome};
    use tokio::sync::watch;
    use tokio::time::sleep;

    use super::*;
    use crate::application::restart::Restart;
    use crate::report::Unnamed;
    use crate::state::Terms;
    use crate::state::voice::Audience;
    use crate::trace::{Kind, Own};

    const SECOND: Duration = Duration::from_secs(1);

    /// The core of an application with one worker, and what the worker leaves behind.
    struct Scene {
        core: Arc<Core>,
        /// Held by each attempt for as long as it lives.
        alive: Arc<()>,
        begun: Arc<AtomicUsize>,
    }

    /// An application of one worker.
    fn core(budget: Duration) -> Arc<Core> {
        let stop = Arc::default();
        let terms = Terms { budget, ..Terms::default() };
        let core = Core::start("app".to_owned(), stop, terms, 1, Audience::default(), watch::Sender::default());
        Arc::new(core.expect("a thread"))
    }

    impl Scene {
        fn new() -> Self {
            Self { core: core(10 * SECOND), alive: Arc::default(), begun: Arc::default() }
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
            let cx = WorkerContext::new(Arc::new(Own::new("worker".into(), Kind::Contextual)), group.node());
            run_worker(Arc::clone(&self.core), work, Restart::OnFailure.into(), false, cx).await.is_ok()
        }

        fn check(&self, outcome: Outcome<bool>, attempts: usize) -> Result<(), String> {
            let (begun, working) = (self.begun.load(Ordering::SeqCst), self.core.working());
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
                    scene.core.ending.hurry();
                };
                tokio::join!(supervise(&scene.core, vec![phase], Restart::Never.into(), &Clock::Tokio), hurry);
                scene.core.report(Unnamed::default()).stragglers().count()
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
        let core = core(SECOND);
        core.request(StopReason::Requested);
        let group = TaskGroup::of_workers(Arc::clone(&core.ledger), "main".to_owned());
        group.stop(StopReason::Requested, Instant::now());

        let work = Work::Once(Box::new(|_| unreachable!("the worker was started")));
        let (name, added_at) = ("late".to_owned(), Location::caller());
        let worker = Worker { name, added_at, work, restart: None, is_tolerated: false, is_provider: false };
        launch(&core, &group, "main", worker, Restart::Never.into());

        let report = core.report(Unnamed::default());
        let [task] = report.tasks() else { panic!("{report}") };
        assert!(task.name == "late" && task.is_worker && task.outcome.is_cancelled(), "{report}");
        assert_eq!(core.working(), 0);
    }
}
