//! One run of `cancel_safe`: calls that are dropped and called again, compared with calls that are not.
//!
//! Invariant: the oracle is an undisturbed run under the same budget.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::{Debug, Write as _};
use std::marker::PhantomData;
use std::time::Instant;

use crate::act::{Bounds, Broken, Ended, Running, set_up};
use crate::drive::{Course, Drive, Stop, drive};
use crate::failure::{FailureKind, Refusal};
use crate::plan::{Plan, Then};
use crate::runtime::{Fault, Stage, drop_caught};
use crate::scratch::Scratch;
use crate::seen::{End, Visit};
use crate::tracer::{OnClone, Tracer};
use crate::way::Way;
use crate::world::{Patience, World};

/// How often a call is dropped at least before it counts as starving; more if undisturbed calls wait often.
const DROPS: usize = 100;

/// How many times as often a call that keeps its progress may be dropped as an undisturbed one waits.
const DROPS_PER_PENDING: usize = 20;

/// How many times longer than all undisturbed calls together a disturbed call may wait, before it counts as endless.
const WAITS_AS_LONG: u32 = 10;

/// The length to which results are shown.
const TOLD: usize = 1_000;

/// The user's arguments of `cancel_safe`.
pub(crate) struct Calls<'a, S, T, O, Setup, Call, Observe> {
    bounds: &'a Bounds<'a>,
    setup: Setup,
    call: Call,
    observe: Observe,
    oracles: RefCell<BTreeMap<Option<u32>, Oracle<T, O>>>,
    state: PhantomData<fn() -> S>,
}

/// What undisturbed calls return.
struct Oracle<T, O> {
    given: Given<T, O>,
    polls: usize,
}

/// The results of the calls, and what was observed after them.
#[derive(PartialEq)]
struct Given<T, O> {
    results: Vec<T>,
    observed: O,
}

impl<T: Debug, O: Debug> Given<T, O> {
    fn tell(&self) -> String {
        let mut text = match self.results.as_slice() {
            [only] => format!("{only:?}"),
            several => format!("{several:?}"),
        };
        let observed = format!("{:?}", self.observed);
        if observed != "()" {
            // Writing to a String cannot fail.
            let _ = write!(text, ", then {observed}");
        }
        shorten(text)
    }
}

/// How one call ended.
enum Attempt<T> {
    Completed(T),
    Dropped,
    /// Nothing will wake it any more.
    Stuck,
}

/// The progress of a run's calls.
struct Progress<T> {
    results: Vec<T>,
    /// Pendings of all calls.
    polls: usize,
    drops: usize,
    /// Drops since the last result.
    in_vain: usize,
}

impl<'a, S, T, O, Setup, Call, Observe> Calls<'a, S, T, O, Setup, Call, Observe>
where
    T: PartialEq + Debug,
    O: PartialEq + Debug,
    Setup: AsyncFn() -> S,
    Call: AsyncFn(&mut S) -> T,
    Observe: AsyncFn(&mut S) -> O,
{
    pub(crate) fn new(bounds: &'a Bounds<'a>, setup: Setup, call: Call, observe: Observe) -> Self {
        Self { bounds, setup, call, observe, oracles: RefCell::default(), state: PhantomData }
    }

    pub(crate) fn visit(&self, plan: Plan) -> Visit {
        self.bounds.act(Scratch::new(), Visit::default(), |stage, visit| self.perform(stage, plan, visit))
    }

    fn perform<'s>(&'s self, stage: Stage<'s>, plan: Plan, visit: &mut Visit) -> (Stage<'s>, Ended) {
        let begun = Instant::now();
        let ended = stage.block_on(async {
            let (mut state, world) = set_up(&stage, (self.setup)(), visit).await?;
            let ended = self.judge(&stage, &world, plan, &mut state, visit).await;
            let dropped = drop_caught(state).map_err(Broken::at("drop of the state"));
            ended.and_then(|verdict| dropped.map(|()| verdict))
        });
        if plan.point == self.bounds.options.max_polls {
            self.bounds.wait_at_least(begun.elapsed() * WAITS_AS_LONG);
        }
        (stage, ended)
    }

    /// Repeats the call until all results are there, and compares them.
    async fn judge(&self, stage: &Stage<'_>, world: &World<'_>, plan: Plan, state: &mut S, visit: &mut Visit) -> Ended {
        let mut progress = Progress { results: Vec::new(), polls: 0, drops: 0, in_vain: 0 };
        while progress.results.len() < self.bounds.options.calls {
            if let Some(refusal) = self.call_once(world, plan, state, visit, &mut progress).await? {
                return Ok(Err(refusal));
            }
        }
        if progress.drops == 0 {
            (visit.end, visit.polls) = (End::Completed, progress.polls);
        }
        let patience = self.bounds.options.settle_for;
        visit.is_unsettled =
            !world.settle(patience).await.map_err(Broken::at("wait for spawned tasks and blocking jobs"))?;
        let observed = stage.watchdog.bound((self.observe)(state)).await.map_err(Broken::at("observation"))?;
        let Progress { results, polls, drops, .. } = progress;
        Ok(self.compare(plan, Given { results, observed }, polls, drops))
    }

    /// One call, possibly dropped.
    async fn call_once(
        &self,
        world: &World<'_>,
        plan: Plan,
        state: &mut S,
        visit: &mut Visit,
        progress: &mut Progress<T>,
    ) -> Result<Option<Refusal>, Broken> {
        let left = match plan.then {
            Then::DropEach => Some(plan.point),
            // In an undisturbed run the point lies beyond the last pending.
            Then::Drop if progress.drops == 0 => Some(plan.point.saturating_sub(progress.polls)),
            Then::Drop | Then::Resume => None,
        };
        match self.attempt(world, plan, left, state, visit, progress).await? {
            Attempt::Completed(result) => {
                progress.results.push(result);
                progress.in_vain = 0;
            }
            Attempt::Dropped => {
                progress.drops += 1;
                progress.in_vain += 1;
                visit.end = End::Dropped;
            }
            Attempt::Stuck if progress.drops == 0 => return Err(Broken::at("call")(Fault::Hung)),
            Attempt::Stuck => return Ok(Some(self.never_ends(plan, progress))),
        }
        let pendings = self.oracles.borrow().get(&plan.budget).map_or(0, |oracle| oracle.polls);
        if progress.in_vain > DROPS + DROPS_PER_PENDING * pendings {
            let (drops, point) = (progress.in_vain, plan.point);
            let message = format!(
                "dropped {drops} times at its pending {point}, each time after it had been woken, it never ended"
            );
            return Ok(Some(Refusal::new(FailureKind::Starved, message)));
        }
        Ok(None)
    }

    /// Polls one call to its end, or drops it after `left` pendings.
    async fn attempt(
        &self,
        world: &World<'_>,
        plan: Plan,
        left: Option<usize>,
        state: &mut S,
        visit: &mut Visit,
        progress: &mut Progress<T>,
    ) -> Result<Attempt<T>, Broken> {
        let max_polls = self.bounds.options.max_polls;
        let tracer = Tracer::default();
        let mut running: Running<'_, T> = Box::pin((self.call)(state));
        let course = Course {
            point: left.unwrap_or(max_polls),
            step: if plan.then == Then::Drop && left.is_some() { plan.step } else { 0 },
            budget: plan.budget,
            at_point: OnClone::Trace,
            before: if left == Some(max_polls) { OnClone::Trace } else { OnClone::Nothing },
            // An undisturbed call may take its time; a comparison with it shows that a disturbed one never ends.
            patience: if plan.point == max_polls { Patience::Limit } else { Patience::Known },
        };
        let Drive { stop, polls, traces, steps, has_children } = drive(running.as_mut(), course, world, &tracer).await;
        progress.polls += polls;
        visit.steps.extend(steps);
        visit.has_children |= has_children;
        if progress.drops == 0 || plan.then == Then::DropEach {
            visit.polls = if plan.then == Then::DropEach { plan.point } else { progress.polls };
            visit.traces = traces;
        }
        let attempt = match stop {
            Stop::Completed(result) => Ok(Attempt::Completed(result)),
            Stop::Parked if left.is_none() => Ok(Attempt::Stuck),
            // The undisturbed run: the search decides what that means.
            Stop::Parked if left == Some(max_polls) => Ok(Attempt::Dropped),
            Stop::Parked | Stop::Unwound => self.before_drop(world, plan, &tracer).await,
            Stop::Faulted(Fault::Hung) => Ok(Attempt::Stuck),
            Stop::Faulted(fault) => Err(Broken::at("call")(fault)),
        };
        let dropped = drop_caught(running).map_err(Broken::at("drop"));
        attempt.and_then(|attempt| dropped.map(|()| attempt))
    }

    /// What happens between the last poll of a call and its drop.
    async fn before_drop(&self, world: &World<'_>, plan: Plan, tracer: &Tracer) -> Result<Attempt<T>, Broken> {
        match (plan.then, plan.way) {
            (Then::DropEach, _) => {
                // If an interval were dropped before it was woken, the exploration itself would starve it.
                let woken = world.until(|| tracer.is_woken(), Patience::Known, None, &mut 0).await;
                match woken {
                    Ok(_) => Ok(Attempt::Dropped),
                    Err(Fault::Hung) => Ok(Attempt::Stuck),
                    Err(fault) => Err(Broken::at("call")(fault)),
                }
            }
            (_, Way::Settled) => {
                let rested = world.rest(tracer, self.bounds.options.settle_for).await;
                rested.map(|()| Attempt::Dropped).map_err(Broken::at("drop"))
            }
            _ => Ok(Attempt::Dropped),
        }
    }

    fn never_ends(&self, plan: Plan, progress: &Progress<T>) -> Refusal {
        let seen = match progress.results.as_slice() {
            [] => "nothing: it never ends".to_owned(),
            results => shorten(format!("{results:?}, and then it never ends")),
        };
        let oracles = self.oracles.borrow();
        let undisturbed = oracles.get(&plan.budget).map_or_else(String::new, |oracle| oracle.given.tell());
        not_safe(progress.drops, seen, undisturbed)
    }

    fn compare(&self, plan: Plan, given: Given<T, O>, polls: usize, drops: usize) -> Result<(), Refusal> {
        let mut oracles = self.oracles.borrow_mut();
        let Some(oracle) = oracles.get(&plan.budget) else {
            oracles.insert(plan.budget, Oracle { given, polls });
            return Ok(());
        };
        if oracle.given == given {
            return Ok(());
        }
        let (seen, undisturbed) = (given.tell(), oracle.given.tell());
        if drops == 0 {
            let message = format!("once {undisturbed}, and another time {seen}");
            return Err(Refusal::new(FailureKind::Unsteady, message));
        }
        Err(not_safe(drops, seen, undisturbed))
    }
}

fn not_safe(drops: usize, seen: String, undisturbed: String) -> Refusal {
    let times = if drops == 1 { String::new() } else { format!(" ({drops} drops)") };
    Refusal {
        kind: FailureKind::NotSafe,
        message: format!("called again{times} it gave {seen}; undisturbed {undisturbed}"),
        evidence: Some((undisturbed, seen)),
    }
}

fn shorten(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(TOLD) {
        text.truncate(end);
        text.push('…');
    }
    text
}
