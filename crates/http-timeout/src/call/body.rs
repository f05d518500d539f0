//! The response as the caller gets it: reqwest's own type, with a body that owns what the call holds.
//!
//! Invariant: permits and the breaker's admission end when the body ends, fails or is dropped, whichever is first.

use std::{
    error::Error as StdError,
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderMap, Method, StatusCode,
    header::{CONTENT_LENGTH, CONTENT_TYPE},
};
use http_body::{Body as _, Frame, SizeHint};
use reqwest::{Request, Response, ResponseBuilderExt};
use tokio::{
    runtime::Handle,
    time::{Instant, Sleep, sleep_until},
};

use crate::{
    breaker::BreakerPermit,
    call::{
        Attempts,
        blame::had_it_all,
        deadline::{Deadline, earlier, into_io},
    },
    error::{CallReport, Limit, Phase, RequestError},
    limit::Permits,
    outgoing::Outgoing,
};

type BoxError = Box<dyn StdError + Send + Sync>;

/// What a call holds until its body has ended.
#[derive(Debug)]
pub(crate) struct Hold {
    /// `None` if the head of the response was already a failure.
    admission: Option<BreakerPermit>,
    /// Declared after the admission, because the next call that gets the permits must see its result.
    _permits: Option<Permits>,
}

impl Hold {
    pub(crate) fn new(admission: Option<BreakerPermit>, permits: Option<Permits>) -> Self {
        Self { admission, _permits: permits }
    }

    /// Reports that the body has ended well, after its consumer waited this long for the peer.
    fn finish(mut self, waited: Duration) {
        if let Some(admission) = self.admission.take() {
            admission.finished(waited);
        }
    }

    /// Reports that the consumer gave up, after it had waited this long for the next piece.
    fn abandon(mut self, quiet: Duration) {
        if let Some(admission) = self.admission.take() {
            admission.abandoned(quiet);
        }
    }

    fn fail(mut self) {
        if let Some(admission) = self.admission.take() {
            admission.failure();
        }
    }

    /// Reports that the end was our own doing.
    fn ignore(mut self) {
        if let Some(admission) = self.admission.take() {
            admission.ignore();
        }
    }

    /// Reports that the call's whole time has passed, in which the consumer waited for `waited` for the body. The
    /// origin is to blame if it had the whole time; otherwise this counts as if the caller had given up.
    fn run_out(mut self, whole: Option<Duration>, waited: Duration, quiet: Duration) {
        if let Some(admission) = self.admission.take() {
            if had_it_all(admission.until_head().saturating_add(waited), whole) {
                admission.failure();
            } else {
                admission.abandoned(quiet);
            }
        }
    }

    /// Ends the call for the breaker if a stream follows. Nothing that happens to the stream is reported any more.
    fn end_if_stream(&mut self, headers: &HeaderMap) {
        if let Some(admission) =
            self.admission.take_if(|admission| admission.is_for_stream() || is_event_stream(headers))
        {
            admission.stream();
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // The head was good, and an unwanted body says nothing against the origin.
        if let Some(admission) = self.admission.take() {
            admission.abandoned(Duration::ZERO);
        }
    }
}

/// The limits that go with a body.
#[derive(Debug)]
pub(crate) struct BodyLimits {
    pub(crate) deadline: Deadline,
    pub(crate) idle: Option<Duration>,
    pub(crate) max_bytes: Option<u64>,
    pub(crate) attempts: u32,
    /// The body of the request, if that is a stream and may still be on its way.
    pub(crate) upload: Option<Outgoing>,
}

impl BodyLimits {
    /// Puts the guard around the body of `response`, the answer to `request`; everything else about it stays.
    pub(crate) fn guard(self, mut request: Request, response: Response, mut hold: Hold) -> Response {
        let (attempts, (parts, inner)) = (Attempts(self.attempts), apart(response));
        // An empty body has ended already: its call must not hold a permit until the response is dropped.
        let hold = if inner.is_end_stream() || has_no_body(request.method(), &parts) {
            hold.finish(Duration::ZERO);
            None
        } else {
            hold.end_if_stream(&parts.headers);
            Some(hold)
        };
        // What its errors need remains.
        request.headers_mut().clear();
        *request.body_mut() = None;
        let (received, waiting_since, waited, timer) = (0, None, Duration::ZERO, None);
        let body = GuardedBody { inner, hold, limits: self, request, received, waiting_since, waited, timer };
        let mut response = Response::from(http::Response::from_parts(parts, reqwest::Body::wrap(body)));
        // Here, after the URL has left the map, because the map would have to grow for both.
        response.extensions_mut().insert(attempts);
        response
    }
}

/// Reads the body of `response` into memory, and gives the response back with it.
pub(crate) async fn read_whole(response: Response) -> Result<Response, RequestError> {
    let (parts, body) = apart(response);
    let bytes = Response::from(http::Response::new(body)).bytes().await?;
    Ok(http::Response::from_parts(parts, reqwest::Body::from(bytes)).into())
}

/// Takes a response apart so that it can be put together again with another body.
fn apart(response: Response) -> (http::response::Parts, reqwest::Body) {
    let url = response.url().clone();
    let (mut parts, body) = http::Response::<reqwest::Body>::from(response).into_parts();
    // reqwest keeps the URL in an extension of a private type, which only this builder can create. The builder gets the
    // existing map, because a second one would cost three allocations.
    let mut carrier = http::Response::builder();
    if let Some(extensions) = carrier.extensions_mut() {
        *extensions = std::mem::take(&mut parts.extensions);
    }
    carrier = carrier.url(url);
    if let Some(extensions) = carrier.extensions_mut() {
        parts.extensions = std::mem::take(extensions);
    }
    (parts, body)
}

/// Whether such an answer has no body. The body itself does not tell if reqwest decompresses it.
fn has_no_body(method: &Method, answer: &http::response::Parts) -> bool {
    *method == Method::HEAD
        || matches!(answer.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
        || answer.headers.get(CONTENT_LENGTH).is_some_and(|length| length == "0")
}

/// Whether the body may be quiet for any length of time.
fn is_event_stream(headers: &HeaderMap) -> bool {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = content_type.split(';').next().unwrap_or_default();
    essence.trim().eq_ignore_ascii_case("text/event-stream")
}

struct GuardedBody {
    inner: reqwest::Body,
    /// `None` once the body has ended.
    hold: Option<Hold>,
    limits: BodyLimits,
    /// The request, for errors.
    request: Request,
    received: u64,
    /// Since when the consumer has been waiting for the peer; `None` while it is busy itself.
    waiting_since: Option<Instant>,
    /// How long it waited before that, in all.
    waited: Duration,
    /// Created at the first wait, because a body that is already there needs no timer.
    timer: Option<Pin<Box<Sleep>>>,
}

impl GuardedBody {
    fn receive(&mut self, frame: Frame<Bytes>) -> Result<Frame<Bytes>, BoxError> {
        self.received += frame.data_ref().map_or(0, |data| data.len() as u64);
        if let Some(limit) = self.limits.max_bytes.filter(|limit| self.received > *limit) {
            return Err(self.too_large(limit));
        }
        // Otherwise a peer that always has a next piece would hold the call beyond its deadline.
        if self.limits.deadline.is_past(Instant::now()) { Err(self.timed_out(Duration::ZERO)) } else { Ok(frame) }
    }

    /// Notes that nothing more will be read. The body is dropped first: when another call gets the permits, there must
    /// never be more bodies in flight than permits, however long the response is kept.
    fn end(&mut self) -> Option<Hold> {
        drop(std::mem::take(&mut self.inner));
        self.hold.take()
    }

    fn too_large(&mut self, limit: u64) -> BoxError {
        // The origin did nothing wrong.
        drop(self.end());
        RequestError::BodyTooLarge { limit, report: self.report() }.into()
    }

    /// Ends the call at a time limit, after a last wait of this length for a piece, and returns the error.
    fn timed_out(&mut self, quiet: Duration) -> BoxError {
        let limit = if self.limits.deadline.is_past(Instant::now()) { Limit::Total } else { Limit::Idle };
        match self.end() {
            Some(hold) if limit == Limit::Total => hold.run_out(self.limits.deadline.whole(), self.waited, quiet),
            hold => hold.into_iter().for_each(Hold::fail),
        }
        into_io(RequestError::timeout(limit, self.report())).into()
    }

    fn report(&self) -> Box<CallReport> {
        let BodyLimits { deadline, attempts, .. } = &self.limits;
        CallReport::of(&self.request, Phase::Body, *attempts, deadline.elapsed())
    }

    /// Ends the wait for the next piece, and returns how long it was.
    fn end_wait(&mut self) -> Duration {
        let waited = self.waiting_since.take().map_or(Duration::ZERO, |since| since.elapsed());
        self.waited += waited;
        waited
    }

    /// Reports that the connection broke, for which our upload may be to blame.
    fn fail(&mut self) {
        let producer_failed = self.limits.upload.as_ref().is_some_and(Outgoing::producer_failed);
        self.end().into_iter().for_each(if producer_failed { Hold::ignore } else { Hold::fail });
    }

    /// Whether the peer has sent something unread. A consumer that was busy elsewhere after giving up a read was not
    /// waiting for it.
    fn has_more(&mut self) -> bool {
        // A reqwest body may create a timer, which needs a runtime. And after a panic its state is unknown.
        let may_look = self.hold.is_some() && Handle::try_current().is_ok() && !std::thread::panicking();
        let mut cx = Context::from_waker(Waker::noop());
        may_look && matches!(Pin::new(&mut self.inner).poll_frame(&mut cx), Poll::Ready(None | Some(Ok(_))))
    }

    /// Ready when the consumer has waited too long for the peer, or the call's time is over.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let since = *self.waiting_since.get_or_insert_with(Instant::now);
        let idle_end = self.limits.idle.and_then(|idle| {
            // While the peer waits for our upload, its silence is our doing.
            let upload = self.limits.upload.as_ref().and_then(|upload| upload.idle_end(idle));
            Some(since.checked_add(idle)?.max(upload.unwrap_or(since)))
        });
        let Some(end) = earlier(self.limits.deadline.end(), idle_end) else { return Poll::Pending };
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(end)));
        if timer.deadline() != end {
            timer.as_mut().reset(end);
        }
        timer.as_mut().poll(cx)
    }
}

impl http_body::Body for GuardedBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        if this.hold.is_none() {
            return Poll::Ready(None);
        }
        if let Some(limit) = this.limits.max_bytes
            && this.received.saturating_add(this.inner.size_hint().lower()) > limit
        {
            // The peer announces more than the cap: not a byte of it needs to be read.
            return Poll::Ready(Some(Err(this.too_large(limit))));
        }
        match Pin::new(&mut this.inner).poll_frame(cx) {
            Poll::Ready(polled) => {
                this.end_wait();
                Poll::Ready(match polled {
                    Some(Ok(frame)) => Some(this.receive(frame)),
                    Some(Err(error)) => {
                        this.fail();
                        Some(Err(RequestError::reported(error, this.report()).into()))
                    }
                    None => {
                        if let Some(hold) = this.hold.take() {
                            hold.finish(this.waited);
                        }
                        None
                    }
                })
            }
            Poll::Pending => this.poll_patience(cx).map(|()| {
                let quiet = this.end_wait();
                Some(Err(this.timed_out(quiet)))
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        // Only true once the end was seen here, because a consumer that stops early on a hint would keep the permits.
        self.hold.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        if self.hold.is_some() { self.inner.size_hint() } else { SizeHint::with_exact(0) }
    }
}

impl Drop for GuardedBody {
    fn drop(&mut self) {
        let mut quiet = self.end_wait();
        if !quiet.is_zero() && self.has_more() {
            quiet = Duration::ZERO;
        }
        if let Some(hold) = self.end() {
            hold.abandon(quiet);
        }
    }
}
