//! One run of `run`: set up, poll to the point, drop, settle, check.
//!
//! Invariant: everything happens in one `block_on`, as in a program, so that no wake-up is lost between the parts; only
//! [`Way::Shutdown`] ends the runtime before the check.

use std::cell::OnceCell;
use std::time::Instant;

use cancel_safe_guard::with_token;
use tokio_util::sync::CancellationToken;

use crate::act::{Bounds, Broken, Ended, Running, set_up};
use crate::crash::{Death, Here};
use crate::drive::{Course, Drive, Stop, drive};
use crate::failure::{FailureKind, Refusal};
use crate::plan::Plan;
use crate::runtime::{Fault, Gate, Stage, drop_caught};
use crate::scratch::Scratch;
use crate::seen::{End, Visit};
use crate::sockets;
use crate::tracer::{OnClone, Tracer};
use crate::way::{Outcome, Way};
use crate::world::{Patience, World};

/// The user's arguments of `run`.
pub(crate) struct Scene<'a, Setup, Operation, Check> {
    pub(crate) bounds: &'a Bounds<'a>,
    pub(crate) setup: Setup,
    pub(crate) operation: Operation,
    pub(crate) check: Check,
}

/// The operation at its point. Its output is `None` if the scope around it has dropped it.
struct Halted<'a, T> {
    running: Running<'a, Option<T>>,
    tracer: Tracer,
    outcome: Outcome<T>,
    /// Ends the scope around the operation, in [`Way::Scope`].
    scope: CancellationToken,
}

/// An operation to be dropped together with its runtime.
struct Doomed<'a, T> {
    running: Running<'a, Option<T>>,
    outcome: Outcome<T>,
    gate: Option<Gate>,
}

impl<S, T, Setup, Operation, Check> Scene<'_, Setup, Operation, Check>
where
    Setup: AsyncFn() -> S,
    Operation: AsyncFn(&S) -> T,
    Check: AsyncFn(&S, Outcome<T>) -> Result<(), String>,
{
    pub(crate) fn visit(&self, plan: Plan, here: &Here) -> Visit {
        let visit = self.visit_once(plan, here);
        if !visit.is_slow_drop || visit.failure.is_some() {
            return visit;
        }
        // One slow drop may be due to the machine.
        let mut again = self.visit_once(plan, here);
        if again.is_slow_drop && again.failure.is_none() {
            let limit = self.bounds.options.drop_within.unwrap_or_default();
            let message = format!("the drop blocked its thread for more than {limit:?}");
            again.failure = Some(Refusal::new(FailureKind::BlockingDrop, message));
        }
        again
    }

    fn visit_once(&self, plan: Plan, here: &Here) -> Visit {
        let scratch = Scratch::new();
        let mut visit = Visit::default();
        if plan.way == Way::Crash {
            match here.kill_at(plan, &scratch, self.bounds.options.hang_after) {
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
                    visit.failure = Some(Refusal::new(FailureKind::Incomplete, message));
                    return visit;
                }
            }
        }
        self.bounds.act(scratch, visit, |stage, visit| self.perform(stage, plan, visit))
    }

    /// Creates the state, uses it, and drops it in whichever runtime is alive then.
    fn perform<'s>(&'s self, stage: Stage<'s>, plan: Plan, visit: &mut Visit) -> (Stage<'s>, Ended) {
        let cell = OnceCell::new();
        let (stage, ended) = self.use_up(stage, plan, &cell, visit);
        let dropped = stage.drop_inside(cell).map_err(Broken::at("drop of the state"));
        (stage, ended.and_then(|verdict| dropped.map(|()| verdict)))
    }

    fn use_up<'s, 'o>(
        &'s self,
        stage: Stage<'s>,
        plan: Plan,
        cell: &'o OnceCell<S>,
        visit: &mut Visit,
    ) -> (Stage<'s>, Ended)
    where
        's: 'o,
    {
        let ended = stage.block_on(async {
            let (state, world) = set_up(&stage, (self.setup)(), visit).await?;
            let state = cell.get_or_init(|| state);
            if plan.point == self.bounds.options.max_polls {
                visit.setup_sockets = sockets::count().unwrap_or(0);
            }
            let outcome = match plan.way {
                Way::Crash => Outcome::Dropped { point: plan.point, way: plan.way },
                Way::Shutdown => {
                    let Halted { running, outcome, .. } = self.halt(&world, plan, state, visit).await?;
                    return Ok(Err(Doomed { running, outcome, gate: world.take_gate() }));
                }
                _ => {
                    let halted = self.halt(&world, plan, state, visit).await?;
                    self.end(&world, plan, halted, visit).await?
                }
            };
            visit.is_unsettled = !self.settle(&world).await?;
            self.judge(&stage, state, outcome).await.map(Ok)
        });
        match ended {
            Ok(Ok(verdict)) => (stage, Ok(verdict)),
            Err(broken) => (stage, Err(broken)),
            Ok(Err(doomed)) => self.shut_down(stage, doomed, cell, visit),
        }
    }

    /// Ends the operation with its runtime, and checks on a fresh one.
    fn shut_down<'s>(
        &'s self,
        stage: Stage<'s>,
        doomed: Doomed<'_, T>,
        cell: &OnceCell<S>,
        visit: &mut Visit,
    ) -> (Stage<'s>, Ended) {
        let Doomed { running, outcome, gate } = doomed;
        let dropped = self.timed(visit, || stage.drop_inside(running));
        let shut_down = stage.shut_down(gate);
        let stage = self.bounds.stage();
        let ended = stage.block_on(async {
            dropped.and(shut_down).map_err(Broken::at("drop"))?;
            // Tasks spawned by the drop are gone; tasks that the state spawns from now on are waited for.
            let ((), world) = set_up(&stage, async {}, &mut Visit::default()).await?;
            visit.is_unsettled = !self.settle(&world).await?;
            match cell.get() {
                Some(state) => self.judge(&stage, state, outcome).await,
                None => Ok(Ok(())),
            }
        });
        (stage, ended)
    }

    async fn settle(&self, world: &World<'_>) -> Result<bool, Broken> {
        world
            .settle(self.bounds.options.settle_for)
            .await
            .map_err(Broken::at("wait for spawned tasks and blocking jobs"))
    }

    async fn judge(&self, stage: &Stage<'_>, state: &S, outcome: Outcome<T>) -> Ended {
        let verdict = stage.watchdog.bound((self.check)(state, outcome)).await.map_err(Broken::at("check"))?;
        Ok(verdict.map_err(|message| Refusal::new(FailureKind::Check, message)))
    }

    /// Drops the operation at its point, in the requested way.
    async fn end(
        &self,
        world: &World<'_>,
        plan: Plan,
        halted: Halted<'_, T>,
        visit: &mut Visit,
    ) -> Result<Outcome<T>, Broken> {
        let Halted { running, tracer, outcome, scope } = halted;
        match plan.way {
            Way::Scope if outcome.is_dropped() => {
                scope.cancel();
                self.wait_for_cut(world, plan, running, &tracer, visit).await
            }
            Way::Settled if outcome.is_dropped() => {
                let rested = world.rest(&tracer, self.bounds.options.settle_for).await;
                let dropped = self.timed(visit, || drop_caught(running));
                rested.and(dropped).map_err(Broken::at("drop")).map(|()| outcome)
            }
            _ => self.timed(visit, || drop_caught(running)).map_err(Broken::at("drop")).map(|()| outcome),
        }
    }

    /// Does the drop, and notes whether it took longer than allowed.
    fn timed<R>(&self, visit: &mut Visit, drop: impl FnOnce() -> R) -> R {
        let begun = Instant::now();
        let dropped = drop();
        visit.is_slow_drop |= self.bounds.options.drop_within.is_some_and(|limit| begun.elapsed() > limit);
        dropped
    }

    /// Keeps polling the operation until the cancelled scope around it drops it, or it completes.
    async fn wait_for_cut(
        &self,
        world: &World<'_>,
        plan: Plan,
        mut running: Running<'_, Option<T>>,
        tracer: &Tracer,
        visit: &mut Visit,
    ) -> Result<Outcome<T>, Broken> {
        // The place of the drop is known only afterwards, so each poll is traced.
        let course = self.course(plan, self.bounds.options.max_polls, OnClone::Trace, OnClone::Trace);
        let before = std::mem::take(&mut visit.traces);
        let Drive { stop, polls, traces, .. } = drive(running.as_mut(), course, world, tracer).await;
        // The operation was pending once more in the poll in which the scope dropped it.
        if matches!(stop, Stop::Completed(None)) {
            visit.polls += polls + 1;
        }
        visit.traces = if traces.is_empty() { before } else { traces };
        let outcome = match stop {
            Stop::Completed(None) => Ok(Outcome::Dropped { point: visit.polls, way: plan.way }),
            Stop::Completed(Some(value)) => Ok(Outcome::Completed(value)),
            Stop::Parked | Stop::Unwound => Err(Fault::Hung),
            Stop::Faulted(fault) => Err(fault),
        };
        let dropped = drop_caught(running);
        outcome.and_then(|outcome| dropped.map(|()| outcome)).map_err(Broken::at("operation in a cancelled scope"))
    }

    fn course(&self, plan: Plan, point: usize, at_point: OnClone, before: OnClone) -> Course {
        Course { point, step: plan.step, budget: plan.budget, at_point, before, patience: Patience::Limit }
    }

    /// Polls the operation to its point.
    async fn halt<'o>(
        &'o self,
        world: &World<'_>,
        plan: Plan,
        state: &'o S,
        visit: &mut Visit,
    ) -> Result<Halted<'o, T>, Broken> {
        let Plan { point, way, .. } = plan;
        let scope = CancellationToken::new();
        let operation = (self.operation)(state);
        let mut running: Running<'o, Option<T>> = match way {
            Way::Scope => {
                let scope = scope.clone();
                Box::pin(async move { with_token(&scope, operation).await.ok() })
            }
            _ => Box::pin(async { Some(operation.await) }),
        };
        // A run that may end anywhere has to trace each poll; other runs trace only the last one.
        let before = if point == self.bounds.options.max_polls { OnClone::Trace } else { OnClone::Nothing };
        let at_point = if way == Way::Panic { OnClone::TraceAndPanic } else { OnClone::Trace };
        let tracer = Tracer::default();
        let course = self.course(plan, point, at_point, before);
        let Drive { stop, polls, steps, has_children, traces } = drive(running.as_mut(), course, world, &tracer).await;
        (visit.polls, visit.steps, visit.has_children, visit.traces) = (polls, steps, has_children, traces);
        let outcome = match stop {
            Stop::Completed(value) => value.map_or(Outcome::Dropped { point, way }, Outcome::Completed),
            Stop::Parked | Stop::Unwound => Outcome::Dropped { point, way },
            Stop::Faulted(fault) => {
                // It has already failed; a second panic on the way out adds nothing.
                drop(drop_caught(running));
                return Err(Broken::at("operation")(fault));
            }
        };
        visit.end = if outcome.is_completed() { End::Completed } else { End::Dropped };
        Ok(Halted { running, tracer, outcome, scope })
    }

    /// The part of a run that the killed process does: `at_end` never returns.
    pub(crate) fn victim(&self, plan: Plan) -> impl FnOnce(&mut dyn FnMut(&Visit)) {
        move |at_end| {
            let mut visit = Visit::default();
            let stage = self.bounds.stage();
            let ended = stage.block_on(async {
                let (state, world) = set_up(&stage, (self.setup)(), &mut visit).await?;
                let halted = self.halt(&world, plan, &state, &mut visit).await;
                at_end(&visit);
                drop(halted);
                Ok::<_, Broken>(())
            });
            // The parent concludes from the silence that the setup has failed.
            drop(ended);
        }
    }
}
