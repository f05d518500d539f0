//! One deadline for a whole call, and the limits of one attempt. Only time spent waiting for the peer counts as
//! silence.
//!
//! Invariant: a future is always polled before its deadline is checked, so an available result is never lost.

use std::{
    future::{Future, poll_fn},
    io,
    panic::catch_unwind,
    pin::{Pin, pin},
    task::Poll,
    time::Duration,
};

use tokio::{
    runtime::Handle,
    time::{Instant, sleep_until, timeout_at},
};

use crate::{
    error::{Limit, RequestError},
    outgoing::Outgoing,
};

/// When a call began and when it must end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    started: Instant,
    end: Option<Instant>,
}

impl Deadline {
    pub(crate) fn new(timeout: Option<Duration>) -> Self {
        let started = Instant::now();
        // A timeout beyond the clock's range is no timeout.
        Self { started, end: timeout.and_then(|timeout| started.checked_add(timeout)) }
    }

    /// The whole time that the call has, if it has an end.
    pub(crate) fn whole(&self) -> Option<Duration> {
        self.end.map(|end| end.saturating_duration_since(self.started))
    }

    pub(crate) fn end(&self) -> Option<Instant> {
        self.end
    }

    /// The end of a part of the call that may take `limit` from now, or the call's own end if that is sooner.
    pub(crate) fn part(&self, limit: Option<Duration>) -> Option<Instant> {
        earlier(self.end, limit.and_then(|limit| Instant::now().checked_add(limit)))
    }

    pub(crate) fn is_past(&self, instant: Instant) -> bool {
        self.end.is_some_and(|end| instant >= end)
    }

    /// What is left of the call, if it has an end.
    pub(crate) fn left(&self) -> Option<Duration> {
        self.end.map(|end| end.saturating_duration_since(Instant::now()))
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

pub(crate) fn earlier(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    a.into_iter().chain(b).min()
}

/// Whether there is a runtime with a time driver.
pub(crate) fn has_timers() -> bool {
    // tokio panics if there is no time driver, and there is no other way to find out.
    Handle::try_current().is_ok() && catch_unwind(|| sleep_until(Instant::now())).is_ok()
}

/// Awaits `future` until `end`; `None` if it was not ready by then.
pub(crate) async fn within<F: Future>(end: Option<Instant>, future: F) -> Option<F::Output> {
    match end {
        None => Some(future.await),
        Some(end) => timeout_at(end, future).await.ok(),
    }
}

/// The limits of one attempt.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    pub(crate) total: Option<Instant>,
    pub(crate) attempt: Option<Instant>,
    pub(crate) idle: Option<Duration>,
}

impl Patience {
    /// The next moment at which a limit may be reached, and which limit.
    fn next_look(&self, outgoing: &Outgoing) -> Option<(Instant, Limit)> {
        let idle = self.idle.and_then(|idle| outgoing.idle_end(idle));
        // If several limits are reached together, the first of these is reported.
        let looks = [(self.total, Limit::Total), (self.attempt, Limit::Attempt), (idle, Limit::Idle)];
        looks.into_iter().filter_map(|(end, limit)| Some((end?, limit))).min_by_key(|(end, _)| *end)
    }
}

/// Waits for `response` until a limit is reached, and returns which.
///
/// The timer is not moved at each sign of life of the peer. When it fires, this checks the latest sign and sleeps
/// again.
#[expect(clippy::manual_async_fn, reason = "an `async fn` keeps each of its arguments twice")]
pub(crate) fn watched<'a, F: Future + Unpin>(
    mut response: F,
    patience: Patience,
    outgoing: &'a Outgoing,
) -> impl Future<Output = Result<F::Output, Limit>> + use<'a, F> {
    async move {
        // Without a limit, the timer is never polled.
        let (first_look, is_limited) =
            patience.next_look(outgoing).map_or_else(|| (Instant::now(), false), |(look, _)| (look, true));
        let mut timer = pin!(sleep_until(first_look));
        poll_fn(|cx| {
            if let Poll::Ready(response) = Pin::new(&mut response).poll(cx) {
                return Poll::Ready(Ok(response));
            }
            while is_limited && timer.as_mut().poll(cx).is_ready() {
                match patience.next_look(outgoing) {
                    Some((look, limit)) if look <= Instant::now() => return Poll::Ready(Err(limit)),
                    Some((look, _)) => timer.as_mut().reset(look),
                    None => return Poll::Pending,
                }
            }
            Poll::Pending
        })
        .await
    }
}

/// A timeout in the shape in which `reqwest::Error::is_timeout` recognises it.
pub(crate) fn into_io(error: RequestError) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, error)
}
