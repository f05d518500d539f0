//! Cancel scopes. Invariant: a scope drops its future only after a poll that left it pending, and while a critical
//! section inside it waits, only when the bound of that section is over.

use std::fmt;
use std::future::{Future, pending, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::task::coop::{consume_budget, unconstrained};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::hold::{Bound, Grip};
use crate::overtime::Overtime;
use crate::stack::{self, InScope, Scope};

/// Runs `future` for at most `duration`, counted from this call.
///
/// Unlike `tokio::time::timeout`, it first finishes a [`critical`](crate::critical) section that has been entered, and
/// drops `future` at its next pending point after that. So it returns by the deadline plus the critical part. That part
/// lasts at most [`CRITICAL_LIMIT`](crate::CRITICAL_LIMIT) (60 s), or until the longest grace of a
/// [`critical_for`](crate::critical_for) inside ends. A section that has not ended by then is dropped with the rest,
/// and torn. A ready result is returned, however late.
///
/// A duration too large for the clock is no deadline at all.
///
/// # Cancel safety
///
/// This method is cancel safe. If dropped before completion, `future` is dropped with it, where it stands; a critical
/// section that this tears is reported to [`on_torn`](crate::on_torn).
///
/// # Errors
///
/// [`Elapsed`] if the deadline passes first. `future` has been dropped by then.
///
/// # Panics
///
/// Panics if it has to wait outside a tokio runtime with its timer enabled.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use cancel_safe_guard::{critical, timeout};
/// use tokio::time::{Instant, sleep};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
/// let start = Instant::now();
/// let result = timeout(Duration::from_millis(10), async {
///     // Is finished, 20 ms past the deadline.
///     critical(sleep(Duration::from_millis(30))).await;
///     sleep(Duration::from_millis(1)).await; // is not begun
/// });
/// assert!(result.await.is_err());
/// assert_eq!(start.elapsed(), Duration::from_millis(30));
/// # }
/// ```
pub fn timeout<T>(duration: Duration, future: impl Future<Output = T>) -> impl Future<Output = Result<T, Elapsed>> {
    until(Instant::now().checked_add(duration), future)
}

/// Runs `future` until `deadline` at the latest. Otherwise it works like [`timeout`].
///
/// # Cancel safety
///
/// This method is cancel safe. If dropped before completion, `future` is dropped with it, where it stands; a critical
/// section that this tears is reported to [`on_torn`](crate::on_torn).
///
/// # Errors
///
/// [`Elapsed`] if the deadline passes first. `future` has been dropped by then.
///
/// # Panics
///
/// Panics if it has to wait outside a tokio runtime with its timer enabled.
///
/// # Examples
///
/// ```
/// use cancel_safe_guard::timeout_at;
/// use tokio::time::Instant;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// // The future is polled before the clock is looked at: what is ready is not thrown away.
/// assert_eq!(timeout_at(Instant::now(), async { 7 }).await, Ok(7));
/// assert!(timeout_at(Instant::now(), std::future::pending::<()>()).await.is_err());
/// # }
/// ```
pub fn timeout_at<T>(deadline: Instant, future: impl Future<Output = T>) -> impl Future<Output = Result<T, Elapsed>> {
    until(Some(deadline), future)
}

/// Runs `future` until `token` is cancelled. Otherwise it works like [`timeout`]: it finishes critical sections, and
/// returns a result that is ready in the very poll in which the token fires.
///
/// It needs a timer only if the token has fired and a critical section is not over yet. Without a timer (outside a
/// tokio runtime, or in one built without its timer) only the section itself bounds that wait.
///
/// # Cancel safety
///
/// This method is cancel safe. If dropped before completion, `future` is dropped with it, where it stands; a critical
/// section that this tears is reported to [`on_torn`](crate::on_torn).
///
/// # Errors
///
/// [`Cancelled`] if the token fires first. `future` has been dropped by then.
///
/// # Examples
///
/// ```
/// use cancel_safe_guard::{critical, with_token};
/// use tokio_util::sync::CancellationToken;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let token = CancellationToken::new();
/// let saved = with_token(&token, critical(async {
///     token.cancel(); // too late: what follows is finished
///     tokio::task::yield_now().await;
///     "saved"
/// }));
/// assert_eq!(saved.await, Ok("saved"));
/// # }
/// ```
pub fn with_token<T>(
    token: &CancellationToken,
    future: impl Future<Output = T>,
) -> impl Future<Output = Result<T, Cancelled>> {
    let scope = Scope::new(None, Some(token.clone()));
    Scoped { future: Some(future), signal: token.cancelled(), scope, held: None, verdict: Cancelled }
}

/// Returns the time left until the nearest deadline of the enclosing scopes, or `None` if there is none.
///
/// Deadlines nest: the earliest one of all enclosing scopes counts. Inside a critical section it is still reported,
/// though postponed, and the section can hurry. A deadline that has passed leaves zero. A spawned task inherits no
/// scope.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use cancel_safe_guard::{remaining, timeout};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
/// assert_eq!(remaining(), None);
/// let inner = timeout(Duration::from_secs(60), async { remaining() });
/// let nested = timeout(Duration::from_secs(5), inner);
/// assert_eq!(nested.await, Ok(Ok(Some(Duration::from_secs(5)))));
/// # }
/// ```
pub fn remaining() -> Option<Duration> {
    stack::nearest_deadline().map(|deadline| deadline.saturating_duration_since(Instant::now()))
}

/// A point where the future may be cancelled although it has nothing to wait for.
///
/// A long computation between awaits is never pending, so no scope can end it. Call this in its loop: any enclosing
/// scope that is due can then end here. Inside a critical section none can, as at any other await. Now and then it
/// yields to the runtime, as tokio's own awaits do, so timeouts and aborts from elsewhere work too.
///
/// # Cancel safety
///
/// This method is cancel safe. It keeps no state.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use cancel_safe_guard::{cancellation_point, timeout};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let endless = timeout(Duration::from_millis(5), async {
///     loop {
///         std::hint::spin_loop(); // a step of the computation
///         cancellation_point().await;
///     }
/// });
/// let result: Result<(), _> = endless.await;
/// assert!(result.is_err());
/// # }
/// ```
pub async fn cancellation_point() {
    // A due scope drops this future instead of polling it again. It is polled in the meantime only if another critical
    // section makes the scope wait, and then this checks again.
    poll_fn(|_| if stack::notice_due() { Poll::Pending } else { Poll::Ready(()) }).await;
    consume_budget().await;
}

/// The deadline of a scope passed before its future was ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Elapsed;

impl fmt::Display for Elapsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("deadline has elapsed")
    }
}

impl std::error::Error for Elapsed {}

impl From<Elapsed> for io::Error {
    fn from(elapsed: Elapsed) -> Self {
        Self::new(io::ErrorKind::TimedOut, elapsed)
    }
}

/// The token of a scope fired before its future was ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Cancelled;

impl fmt::Display for Cancelled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cancelled by its token")
    }
}

impl std::error::Error for Cancelled {}

pub(crate) fn until<T>(
    deadline: Option<Instant>,
    future: impl Future<Output = T>,
) -> impl Future<Output = Result<T, Elapsed>> {
    // Lazy, so that a future that is ready at once costs no timer and needs no runtime.
    let signal = async move {
        match deadline {
            Some(deadline) => sleep_until(deadline).await,
            None => pending().await,
        }
    };
    let scope = Scope::new(deadline, None);
    Scoped { future: Some(future), signal, scope, held: None, verdict: Elapsed }
}

pin_project! {
    /// A future inside a scope that becomes due when `signal` is ready.
    struct Scoped<F, S, E> {
        // Emptied before the result is returned, so that the future has been dropped when the caller learns of the cut.
        #[pin]
        future: Option<F>,
        #[pin]
        signal: S,
        scope: Scope,
        // Created when a critical section waits inside for the first time.
        held: Option<Box<Held>>,
        verdict: E,
    }
}

/// The state of a scope while a critical section waits inside it.
struct Held {
    /// Holds the enclosing scope, so that it does not end either.
    grip: Grip<Bound>,
    /// Begins when the scope is due.
    overtime: Option<Overtime>,
}

impl<F: Future, S: Future<Output = ()>, E: Copy> Future for Scoped<F, S, E> {
    type Output = Result<F::Output, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        // First of all, whatever the signal says, because a completed result is never thrown away.
        let polled = {
            let future = this.future.as_mut().as_pin_mut().expect("a scope that has returned is not polled again");
            let _inside = InScope::enter(this.scope);
            future.poll(cx)
        };
        if let Poll::Ready(output) = polled {
            this.future.set(None);
            *this.held = None;
            return Poll::Ready(Ok(output));
        }
        // Outside the cooperative budget; otherwise a future that uses up the whole budget in each poll could never
        // time out.
        if !this.scope.due && pin!(unconstrained(this.signal)).poll(cx).is_ready() {
            this.scope.due = true;
        }
        if let Some(bound) = this.scope.held(cx.waker()) {
            let held = this.held.get_or_insert_with(|| Box::new(Held { grip: Grip::new(bound), overtime: None }));
            if this.scope.due {
                held.overtime.get_or_insert_with(Overtime::begin);
            }
            if !held.overtime.as_mut().is_some_and(|overtime| overtime.is_over(bound, cx)) {
                let due = held.overtime.as_ref().map(Overtime::since).or(this.scope.deadline);
                held.grip.set_bound(bound.outward(due));
                held.grip.settle(stack::holds_around());
                return Poll::Pending;
            }
        }
        if this.scope.due {
            this.future.set(None);
            *this.held = None;
            return Poll::Ready(Err(*this.verdict));
        }
        if let Some(held) = this.held {
            held.grip.release();
        }
        Poll::Pending
    }
}
