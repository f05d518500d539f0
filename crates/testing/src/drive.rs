//! Polls one operation up to one point.
//!
//! Invariant: no blocking job begins during a poll of the operation, and before the next poll every earlier job that
//! anything waits for has ended. So the operation's n-th pending is the same in each run.

use std::backtrace::Backtrace;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::task::coop;

use crate::runtime::Fault;
use crate::torn::Ours;
use crate::tracer::{OnClone, PointPanic, Tracer};
use crate::world::{Patience, Went, World};

/// The budget units that tokio gives a task for each poll.
const FULL_BUDGET: u32 = 128;

/// A starved operation gets one more unit after this many pendings. `io::copy` takes a unit itself before it polls its
/// reader, so with a budget of one it would yield for ever: a livelock of the schedule, not a bug of the operation.
const PENDINGS_PER_EXTRA_UNIT: usize = 128;

/// Where to stop, and the budget on the way there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Course {
    /// The number of pendings after which the operation stays where it is.
    pub(crate) point: usize,
    /// The number of task polls after that.
    pub(crate) step: usize,
    pub(crate) budget: Option<u32>,
    /// What to do on a clone in the poll that reaches the point.
    pub(crate) at_point: OnClone,
    /// What to do on a clone in the earlier polls.
    pub(crate) before: OnClone,
    pub(crate) patience: Patience,
}

/// How far an operation got.
#[derive(Debug)]
pub(crate) struct Drive<T> {
    pub(crate) stop: Stop<T>,
    /// The pendings seen.
    pub(crate) polls: usize,
    /// How many task polls followed each pending, until the operation was polled again.
    pub(crate) steps: Vec<usize>,
    /// Whether tasks other than the setup's were alive at some pending.
    pub(crate) has_children: bool,
    /// Where the last poll waited.
    pub(crate) traces: Vec<Backtrace>,
}

#[derive(Debug)]
pub(crate) enum Stop<T> {
    Completed(T),
    /// At the point, alive.
    Parked,
    /// At the point, by the requested panic.
    Unwound,
    Faulted(Fault),
}

/// Polls `operation` until it completes, fails, or reaches its point. The gate is closed from before the last poll on.
pub(crate) async fn drive<F: Future + ?Sized>(
    mut operation: Pin<&mut F>,
    course: Course,
    world: &World<'_>,
    tracer: &Tracer,
) -> Drive<F::Output> {
    world.close_gate();
    // This brings a full budget for the first poll.
    let _ran = world.step().await;
    let (mut polls, mut steps, mut has_children) = (0, Vec::new(), false);
    let stop = loop {
        let stop_after = (polls == course.point && course.step > 0).then_some(course.step);
        if polls == course.point && stop_after.is_none() {
            break Stop::Parked;
        }
        if polls > 0 {
            let mut polled = 0;
            let went = world.until(|| tracer.is_woken(), course.patience, stop_after, &mut polled).await;
            steps.push(polled);
            match went {
                Ok(Went::Stepped) => break Stop::Parked,
                Ok(Went::Woken) => {}
                Err(fault) => break Stop::Faulted(fault),
            }
        }
        match poll_once(operation.as_mut(), course, polls, tracer).await {
            Ok(Poll::Ready(value)) => break Stop::Completed(value),
            Ok(Poll::Pending) => {
                polls += 1;
                has_children |= world.has_children();
            }
            Err(None) => {
                polls += 1;
                break Stop::Unwound;
            }
            Err(Some(fault)) => break Stop::Faulted(fault),
        }
    };
    Drive { stop, polls, steps, has_children, traces: tracer.take_traces() }
}

/// One poll. `Err(None)` is the requested panic.
pub(crate) async fn poll_once<F: Future + ?Sized>(
    mut operation: Pin<&mut F>,
    course: Course,
    polls: usize,
    tracer: &Tracer,
) -> Result<Poll<F::Output>, Option<Fault>> {
    let on_clone = if polls + 1 == course.point { course.at_point } else { course.before };
    poll_fn(|cx| {
        if let Some(budget) = course.budget {
            let extra = u32::try_from(polls / PENDINGS_PER_EXTRA_UNIT).unwrap_or(FULL_BUDGET);
            // Without any unit nothing would ever be ready, so a budget of 0 applies only to the first poll.
            let units = if polls == 0 { budget } else { budget.max(1) };
            starve(units.saturating_add(extra), cx);
        }
        let driver = cx.waker().clone();
        let _ours = Ours::if_panics();
        let polled =
            catch_unwind(AssertUnwindSafe(|| tracer.poll(&driver, on_clone, |cx| operation.as_mut().poll(cx))));
        Poll::Ready(polled.map_err(|payload| {
            let asked_for = payload.is::<PointPanic>();
            (!asked_for).then(|| Fault::from_panic(payload.as_ref()))
        }))
    })
    .await
}

/// Leaves `units` of tokio's cooperative budget for this poll, so that every tokio leaf that would be ready beyond them
/// yields once.
fn starve(units: u32, cx: &mut Context<'_>) {
    for _ in units..FULL_BUDGET {
        match coop::poll_proceed(cx) {
            Poll::Ready(unit) => unit.made_progress(),
            Poll::Pending => return,
        }
    }
}
