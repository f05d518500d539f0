//! One run: set up, poll to the point, drop, settle, check.
//!
//! Invariant: each run has its own state and its own runtime; nothing of one run reaches another, and whatever the
//! user's code does, the run ends with a [`Visit`].

use std::pin::Pin;

use crate::crash::{Death, Here};
use cancel_safe_guard::with_token;
use tokio_util::sync::CancellationToken;

use crate::drive::{Course, Drive, Stop, drive};
use crate::explore::{Explore, Outcome, Plan, Way};
use crate::report::FailureKind;
use crate::runtime::{Fault, Gate, Stage, Watchdog};
use crate::scratch::Scratch;
use crate::search::{End, Visit};
use crate::torn::Watch;
use crate::tracer::OnClone;

/// What the user handed to `run`.
pub(crate) struct Scene<'a, Setup, Operation, Check> {
    pub(crate) options: &'a Explore,
    pub(crate) watchdog: &'a Watchdog,
    pub(crate) setup: Setup,
    pub(crate) operation: Operation,
    pub(crate) check: Check,
}

/// The part of a run that did not end as it should.
struct Broken {
    part: &'static str,
    fault: Fault,
}

impl Broken {
    fn at(part: &'static str) -> impl FnOnce(Fault) -> Self {
        move |fault| Self { part, fault }
    }
}

/// The operation. Its output is `None` if the scope around it has dropped it.
type Running<'a, T> = Pin<Box<dyn Future<Output = Option<T>> + 'a>>;

/// The operation at its point, and what keeps the blocking jobs from beginning.
struct Halted<'a, T> {
    running: Running<'a, T>,
    outcome: Outcome<T>,
    gate: Gate,
    /// Ends the scope around the operation, in [`Way::Scope`].
    scope: CancellationToken,
}

impl<S, T, Setup, Operation, Check> Scene<'_, Setup, Operation, Check>
where
    Setup: AsyncFn() -> S,
    Operation: AsyncFn(&S) -> T,
    Check: AsyncFn(&S, Outcome<T>) -> Result<(), String>,
{
    pub(crate) fn visit(&self, plan: Plan, here: &Here) -> Visit {
        let scratch = Scratch::new();
        let watch = Watch::begin();
        let mut visit = Visit::default();
        if plan.way == Way::Crash {
            match here.kill_at(plan, &scratch, self.options.hang_after) {
                Death::AtPoint(site) => {
                    visit.polls = plan.point;
                    visit.end = End::Dropped;
                    visit.site = site;
                }
                // The result died with the process; the other ways check a completion.
                Death::Outlived(polls) => {
                    visit.polls = polls;
                    visit.end = End::Completed;
                    return visit;
                }
                Death::Missed(message) => {
                    visit.failure = Some((FailureKind::Incomplete, message));
                    return visit;
                }
            }
        }
        let (stage, ended) = self.perform(self.stage(), plan, &mut visit);
        match ended {
            Ok(Ok(())) => stage.finish(),
            Ok(Err(message)) => {
                let hint = watch.torn_by_us().map(|section| {
                    format!(" (the drop has torn the critical section of {section}; a scope would not: see Way::Scope)")
                });
                visit.failure = Some((FailureKind::Check, message + &hint.unwrap_or_default()));
                stage.finish();
            }
            Err(Broken { part, fault: Fault::Panicked(message) }) => {
                visit.failure = Some((FailureKind::Panic, format!("the {part} panicked: {message}")));
                stage.finish();
            }
            Err(Broken { part, fault: Fault::Hung }) => {
                let limit = self.options.hang_after;
                visit.failure =
                    Some((FailureKind::Hang, format!("the {part} did not end within hang_after({limit:?})")));
                // Not waited for: what hangs may be a blocking job.
                stage.abandon();
            }
        }
        visit.torn = watch.torn_by_code();
        visit
    }

    /// Makes the state, uses it up, and drops it in whichever runtime is alive then.
    fn perform<'s>(
        &'s self,
        stage: Stage<'s>,
        plan: Plan,
        visit: &mut Visit,
    ) -> (Stage<'s>, Result<Result<(), String>, Broken>) {
        let state = match stage.play((self.setup)()) {
            Ok(state) => state,
            Err(fault) => return (stage, Err(Broken { part: "setup", fault })),
        };
        let baseline = stage.alive_tasks();
        let (stage, outcome) = match plan.way {
            Way::Crash => (stage, Ok(Outcome::Dropped { point: plan.point, way: plan.way })),
            _ => self.operate(stage, plan, &state, baseline, visit),
        };
        let verdict = outcome.and_then(|outcome| {
            let settled = stage.play(stage.settle(baseline, self.options.settle_for));
            visit.unsettled = !settled.map_err(Broken::at("wait for blocking jobs"))?;
            stage.play((self.check)(&state, outcome)).map_err(Broken::at("check"))
        });
        let dropped = stage.drop_inside(state).map_err(Broken::at("drop of the state"));
        let verdict = verdict.and_then(|verdict| dropped.map(|()| verdict));
        (stage, verdict)
    }

    /// Runs the operation to its point and drops it there. Hands back the runtime to check on.
    fn operate<'s>(
        &'s self,
        stage: Stage<'s>,
        plan: Plan,
        state: &S,
        baseline: usize,
        visit: &mut Visit,
    ) -> (Stage<'s>, Result<Outcome<T>, Broken>) {
        let Halted { running, outcome, gate, scope } = match self.halt(&stage, plan, state, visit) {
            Ok(halted) => halted,
            Err(broken) => return (stage, Err(broken)),
        };
        let by_drop = Broken::at("drop");
        match plan.way {
            Way::Settled => {
                gate.open();
                let settled = stage.play(stage.settle(baseline, self.options.settle_for));
                let dropped = stage.drop_inside(running);
                (stage, settled.and(dropped).map_err(by_drop).map(|()| outcome))
            }
            Way::Scope if outcome.is_dropped() => {
                gate.open();
                scope.cancel();
                let outcome = self.wait_for_cut(&stage, plan, running);
                (stage, outcome)
            }
            Way::Shutdown => {
                let dropped = stage.drop_inside(running);
                let shut_down = stage.shut_down(gate);
                (self.stage(), dropped.and(shut_down).map_err(by_drop).map(|()| outcome))
            }
            _ => {
                let dropped = stage.drop_inside(running);
                gate.open();
                (stage, dropped.map_err(by_drop).map(|()| outcome))
            }
        }
    }

    /// Polls the operation on until the scope around it, which has been cancelled, drops it, or it completes.
    fn wait_for_cut(&self, stage: &Stage<'_>, plan: Plan, mut running: Running<'_, T>) -> Result<Outcome<T>, Broken> {
        let Plan { budget, point, way } = plan;
        let course =
            Course { point: self.options.max_polls, budget, at_point: OnClone::Nothing, before: OnClone::Nothing };
        let Drive { stop, gate, .. } = stage.play_unbounded(drive(running.as_mut(), course, self.watchdog));
        gate.open();
        let outcome = match stop {
            Stop::Completed(value) => Ok(value.map_or(Outcome::Dropped { point, way }, Outcome::Completed)),
            Stop::Parked | Stop::Unwound => Err(Fault::Hung),
            Stop::Faulted(fault) => Err(fault),
        };
        let dropped = stage.drop_inside(running);
        outcome.and_then(|outcome| dropped.map(|()| outcome)).map_err(Broken::at("operation in a cancelled scope"))
    }

    /// Polls the operation to its point.
    fn halt<'o>(
        &'o self,
        stage: &Stage<'_>,
        plan: Plan,
        state: &'o S,
        visit: &mut Visit,
    ) -> Result<Halted<'o, T>, Broken> {
        let Plan { budget, point, way } = plan;
        let scope = CancellationToken::new();
        let mut running: Running<'o, T> = {
            let _context = stage.enter();
            let operation = (self.operation)(state);
            match way {
                Way::Scope => {
                    let scope = scope.clone();
                    Box::pin(async move { with_token(&scope, operation).await.ok() })
                }
                _ => Box::pin(async { Some(operation.await) }),
            }
        };
        // A run that may end anywhere has to know where it was at each poll; the others, only at the last one.
        let before = if point == self.options.max_polls { OnClone::Trace } else { OnClone::Nothing };
        let at_point = if way == Way::Panic { OnClone::TraceAndPanic } else { OnClone::Trace };
        let course = Course { point, budget, at_point, before };
        let Drive { stop, polls, traces, gate } = stage.play_unbounded(drive(running.as_mut(), course, self.watchdog));
        visit.polls = polls;
        visit.traces = traces;
        let outcome = match stop {
            Stop::Completed(value) => value.map_or(Outcome::Dropped { point, way }, Outcome::Completed),
            Stop::Parked | Stop::Unwound => Outcome::Dropped { point, way },
            Stop::Faulted(fault) => {
                gate.open();
                // It has failed already; a second panic on the way out adds nothing.
                drop(stage.drop_inside(running));
                return Err(Broken { part: "operation", fault });
            }
        };
        visit.end = if outcome.is_completed() { End::Completed } else { End::Dropped };
        Ok(Halted { running, outcome, gate, scope })
    }

    /// The part of a run that a process does which is killed: `at_end` never returns.
    pub(crate) fn victim(&self, plan: Plan) -> impl FnOnce(&mut dyn FnMut(&Visit)) {
        move |at_end| {
            let mut visit = Visit::default();
            let stage = self.stage();
            if let Ok(state) = stage.play((self.setup)()) {
                let halted = self.halt(&stage, plan, &state, &mut visit);
                at_end(&visit);
                drop(halted);
            }
        }
    }

    fn stage(&self) -> Stage<'_> {
        match Stage::new(self.options.paused_time, self.watchdog) {
            Ok(stage) => stage,
            Err(error) => panic!("no runtime could be built: {error}"),
        }
    }
}
