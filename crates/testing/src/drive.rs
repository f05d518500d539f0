//! Polls one operation up to one point.
//!
//! Invariant: before each poll every earlier blocking job has ended, and during it none begins; so the operation's
//! n-th pending is the same one in each run.

use std::backtrace::Backtrace;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::task::coop;

use crate::runtime::{Fault, Gate, Watchdog, fence};
use crate::torn::Ours;
use crate::tracer::{OnClone, PointPanic, Tracer};

/// The units that tokio gives a task for each poll.
const FULL_BUDGET: u32 = 128;

/// A starved operation gets one more unit after this many pendings. `io::copy` takes a unit itself before it asks its
/// reader, so with a budget of one it would yield for ever: a livelock of the schedule, not a bug of the operation.
const PENDINGS_PER_EXTRA_UNIT: usize = 128;

/// Where to stop, and under which budget to get there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Course {
    /// The number of pendings after which the operation stays where it is.
    pub(crate) point: usize,
    pub(crate) budget: Option<u32>,
    /// Applies to the poll that reaches the point.
    pub(crate) at_point: OnClone,
    /// Applies to the polls before.
    pub(crate) before: OnClone,
}

/// How far an operation got.
#[derive(Debug)]
pub(crate) struct Drive<T> {
    pub(crate) stop: Stop<T>,
    /// The pendings seen.
    pub(crate) polls: usize,
    /// Where the last poll waited.
    pub(crate) traces: Vec<Backtrace>,
    /// Closed since before the last poll.
    pub(crate) gate: Gate,
}

#[derive(Debug)]
pub(crate) enum Stop<T> {
    Completed(T),
    /// At the point, alive.
    Parked,
    /// At the point, by the panic that was asked for.
    Unwound,
    Faulted(Fault),
}

/// Polls `operation` until it completes, fails, or has been pending `course.point` times.
pub(crate) async fn drive<F: Future + ?Sized>(
    mut operation: Pin<&mut F>,
    course: Course,
    watchdog: &Watchdog,
) -> Drive<F::Output> {
    let tracer = Tracer::default();
    let mut polls = 0;
    let (stop, gate) = loop {
        let rest = watchdog.bound(async {
            fence(Duration::ZERO).await;
            if polls > 0 {
                poll_fn(|cx| tracer.poll_woken(cx)).await;
            }
        });
        let rested = rest.await;
        let gate = Gate::close();
        if let Err(fault) = rested {
            break (Stop::Faulted(fault), gate);
        }
        if course.point == 0 {
            break (Stop::Parked, gate);
        }
        // A new turn of the scheduler brings a full budget.
        tokio::task::yield_now().await;
        match poll_once(operation.as_mut(), course, polls, &tracer).await {
            Ok(Poll::Ready(value)) => break (Stop::Completed(value), gate),
            Ok(Poll::Pending) => polls += 1,
            Err(None) => {
                polls += 1;
                break (Stop::Unwound, gate);
            }
            Err(Some(fault)) => break (Stop::Faulted(fault), gate),
        }
        if polls == course.point {
            break (Stop::Parked, gate);
        }
        gate.open();
    };
    Drive { stop, polls, traces: tracer.take_traces(), gate }
}

/// One poll. `Err(None)` is the panic that was asked for.
async fn poll_once<F: Future + ?Sized>(
    mut operation: Pin<&mut F>,
    course: Course,
    polls: usize,
    tracer: &Tracer,
) -> Result<Poll<F::Output>, Option<Fault>> {
    let on_clone = if polls + 1 == course.point { course.at_point } else { course.before };
    poll_fn(|cx| {
        if let Some(budget) = course.budget {
            let extra = u32::try_from(polls / PENDINGS_PER_EXTRA_UNIT).unwrap_or(FULL_BUDGET);
            starve(budget.saturating_add(extra), cx);
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

/// Leaves `units` of tokio's cooperative budget for this poll, so that every leaf of tokio's that would be ready
/// beyond them yields once.
fn starve(units: u32, cx: &mut Context<'_>) {
    for _ in units..FULL_BUDGET {
        match coop::poll_proceed(cx) {
            Poll::Ready(unit) => unit.made_progress(),
            Poll::Pending => return,
        }
    }
}
