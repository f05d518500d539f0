//! What is known about the connections to one origin, although the pool belongs to reqwest: which of them have answered
//! before, and whether one has gone silent.
//!
//! Invariant: it uses bounded memory, and has no influence on the admission of calls.

use std::{
    collections::VecDeque,
    error::Error as StdError,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use http::{Extensions, HeaderValue, Method, Version, header::CONTENT_LENGTH};
use hyper_util::client::legacy::{Error as PoolError, connect::HttpInfo};
use reqwest::{Request, Response};
use tokio::time::Instant;
use url::Url;

use crate::outgoing::Outgoing;

/// The most connections that are remembered, the latest ones.
const REMEMBERED: usize = 256;

/// If this many calls in a row time out on a connection without an answer, that is no accident.
const SILENT_CALLS: u32 = 3;

/// Calls dropped by their callers count like timeouts once they have waited this long in all.
const SILENCE: Duration = Duration::from_secs(1);

/// The connections to one origin.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    /// The local ports of connections that have answered.
    answered: Mutex<VecDeque<u16>>,
    /// How many calls have timed out since the last answer.
    timed_out: AtomicU32,
    /// How many calls have timed out, or were dropped while they waited for an answer.
    unanswered: AtomicU32,
    /// How long all of these have waited, in milliseconds.
    waited: AtomicU64,
}

/// A call that waits for its answer on a connection. If dropped, it counts as unanswered.
#[derive(Debug)]
pub(crate) struct Waiting<'a> {
    connections: &'a Connections,
    outgoing: &'a Outgoing,
    is_over: bool,
}

impl Waiting<'_> {
    /// Notes that the wait has ended by itself: in an answer, an error or a timeout.
    pub(crate) fn end(mut self) {
        self.is_over = true;
    }

    /// Notes that a limit of the call was reached.
    pub(crate) fn timed_out(mut self) {
        self.is_over = true;
        if let Some(taken) = self.outgoing.taken() {
            self.connections.unanswered(taken);
            self.connections.timed_out.fetch_add(1, Relaxed);
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.is_over
            && let Some(taken) = self.outgoing.taken()
        {
            self.connections.unanswered(taken);
        }
    }
}

impl Connections {
    /// Remembers which connection brought this response.
    pub(crate) fn answered(&self, response: &Response) {
        if self.unanswered.load(Relaxed) != 0 {
            self.forget_silence();
        }
        let Some(port) = response.extensions().get::<HttpInfo>().map(|info| info.local_addr().port()) else { return };
        let mut answered = self.lock();
        if !answered.contains(&port) {
            if answered.len() == REMEMBERED {
                answered.pop_front();
            }
            answered.push_back(port);
        }
    }

    /// Whether the connection that failed with `error` had answered before, and so came out of the pool.
    pub(crate) fn had_answered(&self, error: &reqwest::Error) -> bool {
        let Some(info) = find::<PoolError>(error).and_then(PoolError::connect_info) else { return false };
        let mut extras = Extensions::new();
        info.get_extras(&mut extras);
        let Some(port) = extras.get::<HttpInfo>().map(|info| info.local_addr().port()) else { return false };
        let mut answered = self.lock();
        let place = answered.iter().position(|known| *known == port);
        // An HTTP/2 connection fails many calls at once, so it is not forgotten here.
        if let Some(place) = place {
            answered.swap(place, 0);
        }
        place.is_some()
    }

    /// Notes that a call begins to wait for its answer.
    pub(crate) fn wait<'a>(&'a self, outgoing: &'a Outgoing) -> Waiting<'a> {
        Waiting { connections: self, outgoing, is_over: false }
    }

    /// Whether a connection has gone silent, so that the next call must not use it. Returns true only once.
    ///
    /// For a probe it is enough that no call was answered, however short the waits were.
    pub(crate) fn take_silent(&self, is_probe: impl FnOnce() -> bool) -> bool {
        let unanswered = self.unanswered.load(Relaxed);
        if unanswered < SILENT_CALLS {
            return false;
        }
        let waited = Duration::from_millis(self.waited.load(Relaxed));
        let is_silent = self.timed_out.load(Relaxed) >= SILENT_CALLS || waited >= SILENCE || is_probe();
        is_silent && self.unanswered.compare_exchange(unanswered, 0, Relaxed, Relaxed).is_ok() && {
            self.forget_silence();
            true
        }
    }

    fn unanswered(&self, since: Instant) {
        let waited = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.waited.fetch_add(waited, Relaxed);
        self.unanswered.fetch_add(1, Relaxed);
    }

    fn forget_silence(&self) {
        self.timed_out.store(0, Relaxed);
        self.unanswered.store(0, Relaxed);
        self.waited.store(0, Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u16>> {
        self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes the pooled HTTP/2 connection to the origin of `url` out of the pool; calls that are running on it go on.
///
/// HTTP/1 does not need this: there a dropped call takes its connection with it. The pool reveals its connection only
/// in an error. So this makes a request that hyper itself refuses, on the connection and without a byte to the peer:
/// CONNECT with a body on HTTP/2, and HTTP/2 on an HTTP/1 connection. `tests/it/http2.rs` checks that in hyper.
pub(crate) async fn give_up(reqwest: &reqwest::Client, url: &Url) {
    let mut request = Request::new(Method::CONNECT, url.clone());
    *request.version_mut() = Version::HTTP_2;
    request.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static("1"));
    if let Err(error) = reqwest.execute(request).await
        && find::<hyper::Error>(&error).is_some_and(hyper::Error::is_user)
        && let Some(connection) = find::<PoolError>(&error).and_then(PoolError::connect_info)
    {
        connection.poison();
    }
}

/// The first error of this type among the causes of `error`.
pub(crate) fn find<'a, E: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a E> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}
