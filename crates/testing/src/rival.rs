//! One run of `suspended`: the operation is left alone at its point, alive, while a rival runs.
//!
//! Invariant: between its point and the end of the rival the operation is not polled, unless waiting is allowed.

use crate::act::{Bounds, Broken, Ended, Running, set_up};
use crate::drive::{Course, Drive, Stop, drive, poll_once};
use crate::failure::{FailureKind, Refusal};
use crate::plan::{Plan, Then};
use crate::runtime::{Fault, Stage, drop_caught};
use crate::scratch::Scratch;
use crate::seen::{End, Visit};
use crate::tracer::{OnClone, Tracer};
use crate::way::{Outcome, Way};
use crate::world::{Patience, World};

/// The user's arguments of `suspended`.
pub(crate) struct Rivals<'a, Setup, Operation, Rival, Check> {
    pub(crate) bounds: &'a Bounds<'a>,
    pub(crate) setup: Setup,
    pub(crate) operation: Operation,
    pub(crate) rival: Rival,
    pub(crate) check: Check,
}

/// A future, its tracer, and its output once it is there.
struct Party<'a, T> {
    part: &'static str,
    running: Running<'a, T>,
    tracer: Tracer,
    output: Option<T>,
    /// Whether it has been dropped already.
    is_gone: bool,
}

impl<'a, T> Party<'a, T> {
    fn new(part: &'static str, future: impl Future<Output = T> + 'a) -> Self {
        Self { part, running: Box::pin(future), tracer: Tracer::default(), output: None, is_gone: false }
    }

    fn may_go_on(&self) -> bool {
        self.output.is_none() && self.tracer.is_woken()
    }
}

impl<S, T, R, Setup, Operation, Rival, Check> Rivals<'_, Setup, Operation, Rival, Check>
where
    Setup: AsyncFn() -> S,
    Operation: AsyncFn(&S) -> T,
    Rival: AsyncFn(&S) -> R,
    Check: AsyncFn(&S, Outcome<T>, R) -> Result<(), String>,
{
    pub(crate) fn visit(&self, plan: Plan) -> Visit {
        self.bounds.act(Scratch::new(), Visit::default(), |stage, visit| self.perform(stage, plan, visit))
    }

    fn perform<'s>(&'s self, stage: Stage<'s>, plan: Plan, visit: &mut Visit) -> (Stage<'s>, Ended) {
        let ended = stage.block_on(async {
            let (state, world) = set_up(&stage, (self.setup)(), visit).await?;
            let ended = self.meet(&stage, &world, plan, &state, visit).await;
            let dropped = drop_caught(state).map_err(Broken::at("drop of the state"));
            ended.and_then(|verdict| dropped.map(|()| verdict))
        });
        (stage, ended)
    }

    async fn meet(&self, stage: &Stage<'_>, world: &World<'_>, plan: Plan, state: &S, visit: &mut Visit) -> Ended {
        let mut operation = Party::new("operation", (self.operation)(state));
        self.halt(world, plan, &mut operation, visit).await?;
        let mut rival = Party::new("rival", (self.rival)(state));
        if let Some(refusal) = self.let_rival(world, plan, &mut operation, &mut rival, visit).await? {
            return Ok(Err(refusal));
        }
        if plan.then == Then::Resume && !operation.is_gone {
            self.drive_on(world, plan, Patience::Limit, &mut operation).await?;
        }
        let Party { running, output, .. } = operation;
        drop_caught(running).map_err(Broken::at("drop"))?;
        drop_caught(rival.running).map_err(Broken::at("drop of the rival"))?;
        let outcome = output.map_or(Outcome::Dropped { point: plan.point, way: plan.way }, Outcome::Completed);
        let patience = self.bounds.options.settle_for;
        visit.is_unsettled =
            !world.settle(patience).await.map_err(Broken::at("wait for spawned tasks and blocking jobs"))?;
        let Some(result) = rival.output else { return Err(Broken::at("rival")(Fault::Hung)) };
        let verdict = stage.watchdog.bound((self.check)(state, outcome, result)).await.map_err(Broken::at("check"))?;
        Ok(verdict.map_err(|message| Refusal::new(FailureKind::Check, message)))
    }

    /// Polls the operation to its point and, if it is to be settled there, lets everything around it come to rest.
    async fn halt(
        &self,
        world: &World<'_>,
        plan: Plan,
        operation: &mut Party<'_, T>,
        visit: &mut Visit,
    ) -> Result<(), Broken> {
        let is_measured = plan.point == self.bounds.options.max_polls;
        let course = Course {
            point: plan.point,
            step: plan.step,
            budget: plan.budget,
            at_point: OnClone::Trace,
            before: if is_measured { OnClone::Trace } else { OnClone::Nothing },
            patience: Patience::Limit,
        };
        let Drive { stop, polls, steps, has_children, traces } =
            drive(operation.running.as_mut(), course, world, &operation.tracer).await;
        (visit.polls, visit.steps, visit.has_children, visit.traces) = (polls, steps, has_children, traces);
        match stop {
            Stop::Completed(value) => {
                operation.output = Some(value);
                visit.end = End::Completed;
            }
            Stop::Parked | Stop::Unwound => visit.end = End::Dropped,
            Stop::Faulted(fault) => return Err(Broken::at("operation")(fault)),
        }
        if plan.way == Way::Settled && visit.end == End::Dropped {
            let rested = world.rest(&operation.tracer, self.bounds.options.settle_for).await;
            rested.map_err(Broken::at("operation"))?;
        }
        Ok(())
    }

    /// Lets the rival run to its end beside the operation.
    async fn let_rival<'p>(
        &self,
        world: &World<'_>,
        plan: Plan,
        operation: &mut Party<'p, T>,
        rival: &mut Party<'_, R>,
        visit: &mut Visit,
    ) -> Result<Option<Refusal>, Broken>
    where
        T: 'p,
    {
        if operation.output.is_some() {
            // The operation holds nothing any more: a rival that waits now would wait without it too.
            self.drive_on(world, plan, Patience::Limit, rival).await?;
            return Ok(None);
        }
        let allowed = self.bounds.options.waiting;
        let patience = match plan.then {
            _ if allowed => Patience::Rest,
            // The drop at this point has already shown that it is no futurelock.
            Then::Resume => Patience::Limit,
            Then::Drop | Then::DropEach => Patience::Known,
        };
        match self.drive_on(world, plan, patience, rival).await {
            Err(broken) if broken.is_hang() && allowed => {
                self.go_on_together(world, operation, rival).await.map(|()| None)
            }
            Err(broken) if broken.is_hang() => {
                visit.rival_traces = rival.tracer.take_traces();
                self.prove(world, plan, operation, rival).await
            }
            ended => ended.map(|()| None),
        }
    }

    /// The rival makes no progress. If the drop of the operation wakes it, it was waiting for the operation.
    async fn prove<'p>(
        &self,
        world: &World<'_>,
        plan: Plan,
        operation: &mut Party<'p, T>,
        rival: &mut Party<'_, R>,
    ) -> Result<Option<Refusal>, Broken>
    where
        T: 'p,
    {
        let suspended = std::mem::replace(&mut operation.running, Box::pin(std::future::pending()));
        operation.is_gone = true;
        drop_caught(suspended).map_err(Broken::at("drop"))?;
        let woken = world.until(|| rival.tracer.is_woken(), Patience::Rest, None, &mut 0).await;
        if woken.is_ok() {
            let message = "alive but not polled, it holds what the rival waits for (a futurelock)".to_owned();
            return Ok(Some(Refusal::new(FailureKind::Futurelock, message)));
        }
        // It waits for something else, which may still come; then the operation was dropped early, but not wrongly.
        self.drive_on(world, plan, Patience::Limit, rival).await.map(|()| None)
    }

    /// Polls a party to its end, without starving it, because the question is what it waits for, not what it does
    /// meanwhile.
    async fn drive_on<V>(
        &self,
        world: &World<'_>,
        plan: Plan,
        patience: Patience,
        party: &mut Party<'_, V>,
    ) -> Result<(), Broken> {
        if party.output.is_some() {
            return Ok(());
        }
        let (point, budget) = (self.bounds.options.max_polls, plan.budget.filter(|_| party.part == "operation"));
        let course = Course { point, step: 0, budget, at_point: OnClone::Trace, before: OnClone::Trace, patience };
        let Drive { stop, traces, .. } = drive(party.running.as_mut(), course, world, &party.tracer).await;
        party.tracer.put_back(traces);
        match stop {
            Stop::Completed(value) => {
                party.output = Some(value);
                Ok(())
            }
            Stop::Parked | Stop::Unwound => Err(Broken::at(party.part)(Fault::Hung)),
            Stop::Faulted(fault) => Err(Broken::at(party.part)(fault)),
        }
    }

    /// Polls both as they are woken, until the rival has ended.
    async fn go_on_together(
        &self,
        world: &World<'_>,
        operation: &mut Party<'_, T>,
        rival: &mut Party<'_, R>,
    ) -> Result<(), Broken> {
        for _ in 0..self.bounds.options.max_polls {
            if rival.output.is_some() {
                return Ok(());
            }
            if rival.may_go_on() {
                self.poll(rival).await?;
            } else if operation.may_go_on() {
                self.poll(operation).await?;
            }
            let woken = || operation.may_go_on() || rival.may_go_on() || rival.output.is_some();
            world.until(woken, Patience::Limit, None, &mut 0).await.map_err(Broken::at("rival"))?;
        }
        Err(Broken::at("rival")(Fault::Hung))
    }

    async fn poll<V>(&self, party: &mut Party<'_, V>) -> Result<(), Broken> {
        let point = self.bounds.options.max_polls;
        let course = Course {
            point,
            step: 0,
            budget: None,
            at_point: OnClone::Nothing,
            before: OnClone::Nothing,
            patience: Patience::Limit,
        };
        match poll_once(party.running.as_mut(), course, 0, &party.tracer).await {
            Ok(std::task::Poll::Ready(value)) => party.output = Some(value),
            Ok(std::task::Poll::Pending) => {}
            Err(fault) => return Err(Broken::at(party.part)(fault.unwrap_or(Fault::Hung))),
        }
        Ok(())
    }
}
