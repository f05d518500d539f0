//! The integration tests of `cancel-safe-guard`, one binary.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod bound;
mod cancel;
mod chaos;
mod happy;
mod interleavings;
mod reaper;
mod scope;
mod shared;
mod torn;

use std::future::{Future, pending};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use cancel_safe_guard::{Elapsed, timeout_at};
use tokio::time::Instant;

/// Polls `future` once, by hand, with a waker that does nothing.
fn poll_once<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    pin!(future).poll(&mut Context::from_waker(Waker::noop()))
}

/// The error of a scope whose deadline passed, which only a scope can create. It needs a runtime with a timer.
fn elapsed() -> Elapsed {
    match poll_once(&mut Box::pin(timeout_at(Instant::now(), pending::<()>()))) {
        Poll::Ready(Err(elapsed)) => elapsed,
        other => unreachable!("the deadline has passed: {other:?}"),
    }
}

/// Awaits a quick future, so that a missing wake-up fails the test instead of hanging it. With paused time it fails at
/// once, because the clock jumps to this bound.
async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("something has not been woken")
}

/// Awaits `future` and returns its panic as an error. The future is dropped after the panic was caught.
async fn caught<F: Future>(future: F) -> Result<F::Output, String> {
    let mut future = pin!(future);
    std::future::poll_fn(move |cx| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
        Ok(polled) => polled.map(Ok),
        Err(panic) => Poll::Ready(Err(panic.downcast_ref::<&str>().map_or_else(String::new, |it| (*it).to_owned()))),
    })
    .await
}
