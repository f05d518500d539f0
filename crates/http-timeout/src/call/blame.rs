//! Who is to blame for a failed attempt: decided here, once, for the breaker, the retry and the error.
//!
//! Invariant: an origin is blamed for a timeout only if it had the whole of that time to itself, and for a connection
//! only if that connection was made for the call.
//!
//! | blame | for what | breaker | tried again |
//! |---|---|---|---|
//! | origin | 5xx, 408, 429; a connection refused, reset or closed without an answer; a refused stream; a timeout | failure | as the policy and the budget say, if repeatable or unsent |
//! | queue | the deadline passed, but our queue, back-off or earlier attempts had used up a part of it | a cut call | no: its time is over |
//! | producer | the body of our upload failed or was slow, or the kernel hid how it went | nothing | no |
//! | pool | a pooled connection was closed by the time it was used; the call that was making the connection for all was dropped | nothing | free: at once and not counted, if repeatable or unsent |
//! | machine | this one has no port, descriptor or memory left for a connection | nothing | as the policy and the budget say |
//! | caller | the call or its body was dropped | a cut call | no |
//! | request | it is invalid, or redirected for ever | nothing | no |

use std::{error::Error as StdError, io, time::Duration};

use http::StatusCode;
use hyper_util::client::legacy::Error as PoolError;
use tokio::time::Instant;

use crate::{
    connections::{Connections, find},
    error::{Limit, lacks_tls},
    outgoing::Outgoing,
};

/// A connection that was closed before it was used shows it within a round trip.
const STALE_WITHIN: Duration = Duration::from_secs(2);

/// Too many open files, of the process or of the system: EMFILE and ENFILE on every Unix, WSAEMFILE. No kind of error
/// stands for them.
const NO_DESCRIPTORS: [i32; 3] = [24, 23, 10_024];

/// Who is to blame for an attempt that did not end well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blame {
    Origin,
    Queue,
    Producer,
    Pool,
    Machine,
    Request,
}

/// The verdict on an attempt that did not end well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) blame: Blame,
    /// The origin provably did not process the request, so that any request may be tried again.
    pub(crate) unsent: bool,
}

/// Whether a response with this status may be a transient problem.
pub(crate) fn is_retryable(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504)
}

/// The verdict on an attempt that ended with `error`.
pub(crate) fn of_error(error: &reqwest::Error, outgoing: &Outgoing, connections: &Connections) -> Verdict {
    let taken = outgoing.taken();
    let refused = is_refused(error);
    let unsent = taken.is_none() || refused;
    let stale = taken.is_none_or(|taken| taken.elapsed() < STALE_WITHIN) || error.is_timeout();
    let blame = if error.is_builder() || error.is_redirect() || lacks_tls(error) {
        Blame::Request
    } else if taken.is_none() && is_exhausted(error) {
        Blame::Machine
    } else if outgoing.producer_failed() {
        Blame::Producer
    } else if is_orphaned(error) || (is_lost(error, refused) && stale && connections.had_answered(error)) {
        Blame::Pool
    } else {
        Blame::Origin
    };
    Verdict { blame, unsent }
}

/// The verdict on an attempt that began at `started` and was ended by `limit`, which is `whole` long.
pub(crate) fn of_timeout(limit: Limit, whole: Option<Duration>, started: Instant, outgoing: &Outgoing) -> Verdict {
    let starved = outgoing.starved();
    let share = started.elapsed().saturating_sub(starved);
    let had_it_all = had_it_all(share, whole);
    let blame = match limit {
        Limit::Idle if outgoing.is_hidden() => Blame::Producer,
        Limit::Idle | Limit::Connect => Blame::Origin,
        Limit::Total | Limit::Attempt if had_it_all => Blame::Origin,
        Limit::Attempt => Blame::Producer,
        Limit::Total | Limit::Permit => Blame::Queue,
    };
    Verdict { blame, unsent: outgoing.taken().is_none() }
}

/// Whether a `share` counts as the `whole`; it may be shorter by a tick of the timer.
pub(crate) fn had_it_all(share: Duration, whole: Option<Duration>) -> bool {
    whole.is_none_or(|whole| share >= whole.mul_f64(0.95))
}

/// Whether this machine could not make a connection to any origin.
fn is_exhausted(error: &reqwest::Error) -> bool {
    let causes = std::iter::successors(Some(error as &(dyn StdError + 'static)), |&error| error.source());
    causes.filter_map(|cause| cause.downcast_ref::<io::Error>()).any(|error| {
        matches!(error.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::OutOfMemory)
            || error.raw_os_error().is_some_and(|code| NO_DESCRIPTORS.contains(&code))
    })
}

/// Whether the origin says that it did not process the request.
fn is_refused(error: &reqwest::Error) -> bool {
    find::<h2::Error>(error).is_some_and(|error| {
        let refused_stream = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
        // h2 reports a GOAWAY only to the streams that were not processed.
        error.is_remote() && (error.is_go_away() || refused_stream)
    })
}

/// Whether the connection was lost, rather than an invalid answer received.
fn is_lost(error: &reqwest::Error, refused: bool) -> bool {
    let closed = |error: &hyper::Error| error.is_incomplete_message() || error.is_canceled() || error.is_timeout();
    let lost_stream = |error: &h2::Error| if error.is_reset() { false } else { refused || error.is_io() };
    find::<hyper::Error>(error).is_some_and(closed)
        || find::<h2::Error>(error).is_some_and(lost_stream)
        || find::<io::Error>(error).is_some()
}

/// Whether another call was making the connection that this one waited for, and was dropped or failed.
///
/// The pool's error has no public type, but it is the only one here with no cause and this text; `tests/it/http2.rs`
/// checks that in hyper-util.
fn is_orphaned(error: &reqwest::Error) -> bool {
    let Some(pool) = find::<PoolError>(error).filter(|error| error.is_connect()) else { return false };
    pool.source().is_some_and(|cause| cause.source().is_none() && cause.to_string() == "request was canceled")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_had_all_the_time_if_a_tick_of_the_timer_is_missing_and_no_more() {
        let whole = Some(Duration::from_millis(100));
        for (share, had_all) in [(94, false), (95, true), (100, true), (50, false), (0, false)] {
            assert_eq!(had_it_all(Duration::from_millis(share), whole), had_all, "{share} of 100 ms");
        }
        assert!(had_it_all(Duration::ZERO, None), "there was no limit to use up");
    }
}
