//! One deadline for a whole call, and the idle timeout of the way out: only time spent waiting for the peer counts.
//!
//! Invariant: a future is always polled before its deadline is looked at, so a result that is there is never lost.

use std::{
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use reqwest::{Body, Request};
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::error::{Phase, RequestError};

/// A request body in memory up to this size is sent as it is; the kernel takes it in one go.
const UPLOAD_UNWATCHED_BYTES: usize = 64 * 1024;

/// Larger ones are sent in pieces of this size, so that each piece the peer takes is seen.
const UPLOAD_PIECE_BYTES: usize = 8 * 1024;

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

    pub(crate) fn end(&self) -> Option<Instant> {
        self.end
    }

    /// The end of a part of the call that may take `limit` from now: the call's own end if that is sooner.
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

    pub(crate) fn timed_out(&self, phase: Phase, attempts: u32) -> RequestError {
        RequestError::Timeout { phase, elapsed: self.started.elapsed(), attempts }
    }
}

pub(crate) fn earlier(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    a.into_iter().chain(b).min()
}

/// Awaits `future` until `end`; `None` if it was not ready by then.
pub(crate) async fn within<F: Future>(end: Option<Instant>, future: F) -> Option<F::Output> {
    match end {
        None => Some(future.await),
        Some(end) => timeout_at(end, future).await.ok(),
    }
}

/// Awaits `response` until `end`, and no longer than `idle` without a sign of life from the peer; `None` if time ran out.
///
/// The signs of life are those that the upload saw. The timer is not moved at each of them: when it fires, it looks for
/// the latest and sleeps again.
pub(crate) async fn watched<F: Future>(
    response: F,
    end: Option<Instant>,
    idle: Option<Duration>,
    upload: Option<&Upload>,
) -> Option<F::Output> {
    let started = Instant::now();
    let waiting_since = || upload.map_or(started, Upload::waiting_since);
    let next_look = || earlier(end, idle.and_then(|idle| waiting_since().checked_add(idle)));
    let Some(first_look) = next_look() else { return Some(response.await) };
    let mut response = pin!(response);
    let mut timer = pin!(sleep_until(first_look));
    poll_fn(|cx| {
        if let Poll::Ready(response) = response.as_mut().poll(cx) {
            return Poll::Ready(Some(response));
        }
        while timer.as_mut().poll(cx).is_ready() {
            match next_look() {
                Some(look) if look > Instant::now() => timer.as_mut().reset(look),
                _ => return Poll::Ready(None),
            }
        }
        Poll::Pending
    })
    .await
}

/// What is known about the way out of one attempt.
#[derive(Clone, Debug)]
pub(crate) struct Upload(Arc<Mutex<Flow>>);

#[derive(Debug)]
struct Flow {
    /// When the peer last took something.
    progress: Instant,
    /// Whether we are the ones who have nothing to send at the moment.
    starved: bool,
}

impl Upload {
    /// Puts a watch between the body of `request` and the connection, unless there is none or it is small.
    pub(crate) fn watch(request: &mut Request) -> Option<Self> {
        let is_large = |body: &mut Body| body.as_bytes().is_none_or(|bytes| bytes.len() > UPLOAD_UNWATCHED_BYTES);
        let inner = request.body_mut().take_if(is_large)?;
        let upload = Self(Arc::new(Mutex::new(Flow { progress: Instant::now(), starved: false })));
        let watched = WatchedBody { inner, piece: Bytes::new(), flow: upload.clone() };
        *request.body_mut() = Some(Body::wrap(watched));
        Some(upload)
    }

    fn waiting_since(&self) -> Instant {
        let flow = self.lock();
        if flow.starved { Instant::now() } else { flow.progress }
    }

    fn saw(&self, starved: bool) {
        let mut flow = self.lock();
        flow.progress = Instant::now();
        flow.starved = starved;
    }

    fn lock(&self) -> MutexGuard<'_, Flow> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request body that notes when the connection asks for more: it does so when the peer has taken what it had.
struct WatchedBody {
    inner: Body,
    piece: Bytes,
    flow: Upload,
}

impl http_body::Body for WatchedBody {
    type Data = Bytes;
    type Error = reqwest::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, reqwest::Error>>> {
        if self.piece.is_empty() {
            let polled = Pin::new(&mut self.inner).poll_frame(cx);
            self.flow.saw(polled.is_pending());
            match std::task::ready!(polled) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.piece = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                end_or_error => return Poll::Ready(end_or_error),
            }
        } else {
            self.flow.saw(false);
        }
        let size = self.piece.len().min(UPLOAD_PIECE_BYTES);
        Poll::Ready(Some(Ok(Frame::data(self.piece.split_to(size)))))
    }

    fn is_end_stream(&self) -> bool {
        self.piece.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let inner = self.inner.size_hint();
        let held = self.piece.len() as u64;
        let mut hint = SizeHint::new();
        if let Some(upper) = inner.upper() {
            hint.set_upper(upper + held);
        }
        hint.set_lower(inner.lower() + held);
        hint
    }
}

/// A timeout in the shape in which `reqwest::Error::is_timeout` recognises it.
pub(crate) fn into_io(error: RequestError) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, error)
}
