//! A watch over the upload of one attempt, placed in the body that the connection takes: whether the connection has
//! taken the request, when it last asked for more, and how long it had to wait for us.
//!
//! Invariant: of a request that no connection has taken, not a byte was sent; every request carries the watch, with or
//! without a body.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use reqwest::{Body, Request};
use tokio::time::Instant;

/// A body is handed over in pieces of this size, so that the watch sees each piece that the peer takes. The connection
/// asks again when it has written sixteen of them, or 400 KiB.
const PIECE_BYTES: usize = 32 * 1024;

/// After this much in one go, which is what the connection writes at once, the connection has to check for an answer.
/// Otherwise, if a peer answers early and closes, the next write would fail, and the answer would be lost.
const STRETCH_BYTES: usize = 13 * PIECE_BYTES;

/// How long the first check takes, which is when a redirect or a refusal comes.
const FIRST_LOOK: Duration = Duration::from_millis(2);

/// The size to which the pieces shrink for a peer that is slow to take them.
const SMALL_PIECE_BYTES: usize = 512;

/// A body smaller than this is sent in one go; of a larger one, the buffers of two kernels may hold any part for any
/// time.
const UNSEEN_BYTES: u64 = 64 * 1024;

/// Buffered data leaves in a few visible steps: the kernel asks for more when about a third of its buffer is free.
const HIDDEN_STEPS: u32 = 4;

/// What is known about the upload of one attempt.
#[derive(Clone, Debug)]
pub(crate) struct Outgoing(Arc<Mutex<Flow>>);

#[derive(Debug)]
struct Flow {
    /// When a connection took the request: only then can any of it have been sent.
    taken: Option<Instant>,
    /// When the peer last took something.
    progress: Instant,
    /// `None` if the request has no body, like most requests.
    feed: Option<Box<Feed>>,
}

/// How a body is handed over.
#[derive(Debug)]
struct Feed {
    /// Since when the connection has been waiting for our producer.
    starving: Option<Instant>,
    /// How long it waited for our producer before that.
    starved: Duration,
    producer_failed: bool,
    /// The longest time without visible progress of the peer, although it made progress.
    longest_pause: Duration,
    /// If the wait for the next piece is longer than this, the pieces become smaller.
    patience: Option<Duration>,
    bytes: u64,
    piece: usize,
}

impl Outgoing {
    /// Puts a watch between `request` and the connection.
    ///
    /// The layers below cannot copy such a body, so neither reqwest's redirects nor its retries send it again behind
    /// our back.
    pub(crate) fn watch(request: &mut Request, idle: Option<Duration>) -> Self {
        let body = request.body_mut().take();
        let feed = body.is_some().then(|| Box::new(Feed::new(idle.map(|idle| idle / 8))));
        let outgoing = Self(Arc::new(Mutex::new(Flow { taken: None, progress: Instant::now(), feed })));
        let upload = body.map(|inner| Box::new(Upload::new(inner)));
        *request.body_mut() = Some(Body::wrap(WatchedBody { upload, flow: outgoing.clone() }));
        outgoing
    }

    /// When a connection took the request; `None` if none did, and so nothing was sent.
    pub(crate) fn taken(&self) -> Option<Instant> {
        self.lock().taken
    }

    /// When the peer will have been silent for `idle`, or for the time that it needs to empty the buffers at its
    /// observed pace. While it waits for us, its silence is our doing.
    pub(crate) fn idle_end(&self, idle: Duration) -> Option<Instant> {
        let flow = self.lock();
        let Some(feed) = &flow.feed else { return flow.progress.checked_add(idle) };
        let since = if feed.starving.is_none() { flow.progress } else { Instant::now() };
        since.checked_add(idle.max(feed.longest_pause.saturating_mul(HIDDEN_STEPS)))
    }

    /// How long the peer had to wait for our producer.
    pub(crate) fn starved(&self) -> Duration {
        let starved = |feed: &mut Feed| feed.starved + feed.starving.map_or(Duration::ZERO, |since| since.elapsed());
        self.note(starved).unwrap_or_default()
    }

    /// Whether the producer of the body failed by itself.
    pub(crate) fn producer_failed(&self) -> bool {
        self.note(|feed| feed.producer_failed).unwrap_or_default()
    }

    /// Whether the peer may be taking more of the body than can be seen from here.
    pub(crate) fn is_hidden(&self) -> bool {
        self.note(|feed| feed.bytes > UNSEEN_BYTES).unwrap_or_default()
    }

    /// Looks at the feed, or changes it; `None` if the request has no body.
    fn note<T>(&self, note: impl FnOnce(&mut Feed) -> T) -> Option<T> {
        self.lock().feed.as_deref_mut().map(note)
    }

    fn lock(&self) -> MutexGuard<'_, Flow> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Flow {
    fn take(&mut self) {
        if self.taken.is_none() {
            let now = Instant::now();
            self.taken = Some(now);
            self.progress = now;
        }
    }

    /// Notes that the connection asks for more, so the peer has taken what it had.
    fn asked(&mut self) {
        let now = Instant::now();
        self.taken.get_or_insert(now);
        let pause = now.saturating_duration_since(self.progress);
        self.progress = now;
        if let Some(feed) = &mut self.feed
            && !feed.end_hunger(now)
            && feed.bytes > 0
        {
            feed.longest_pause = feed.longest_pause.max(pause);
            if feed.patience.is_some_and(|patience| pause > patience) {
                feed.piece = (feed.piece / 2).max(SMALL_PIECE_BYTES);
            }
        }
    }
}

impl Feed {
    fn new(patience: Option<Duration>) -> Self {
        Self {
            starving: None,
            starved: Duration::ZERO,
            producer_failed: false,
            longest_pause: Duration::ZERO,
            patience,
            bytes: 0,
            piece: PIECE_BYTES,
        }
    }

    /// Notes that the connection does not wait for our producer any more. Returns whether it did.
    fn end_hunger(&mut self, now: Instant) -> bool {
        let Some(since) = self.starving.take() else { return false };
        self.starved += now.saturating_duration_since(since);
        true
    }

    /// Hands a piece of `held` over.
    fn serve(&mut self, held: &mut Bytes) -> Bytes {
        let piece = held.split_to(held.len().min(self.piece));
        self.bytes += piece.len() as u64;
        piece
    }
}

/// The body of a request as the connection sees it. It asks for more when the peer has taken what it had.
struct WatchedBody {
    /// None if the request has no body.
    upload: Option<Box<Upload>>,
    flow: Outgoing,
}

/// A body that is being sent.
struct Upload {
    inner: Body,
    held: Bytes,
    /// How much was handed over since the connection last checked for an answer.
    stretch: usize,
    /// Whether it has ever checked.
    has_looked: bool,
    /// Ends after the runtime has checked its sockets, or later.
    pause: Option<Pin<Box<dyn Future<Output = ()> + Send + Sync>>>,
}

impl Upload {
    fn new(inner: Body) -> Self {
        Self { inner, held: Bytes::new(), stretch: 0, has_looked: false, pause: None }
    }
}

/// Notes a failure of the producer if it panics, because that also ends the connection.
struct Unwinding<'a>(&'a Outgoing);

impl Drop for Unwinding<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.note(|feed| feed.producer_failed = true);
        }
    }
}

impl http_body::Body for WatchedBody {
    type Data = Bytes;
    type Error = reqwest::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, reqwest::Error>>> {
        let WatchedBody { upload: Some(this), flow: outgoing } = &mut *self else { return Poll::Ready(None) };
        if this.stretch >= STRETCH_BYTES {
            let has_looked = this.has_looked;
            let pause = this.pause.get_or_insert_with(|| match has_looked {
                false => Box::pin(tokio::time::sleep(FIRST_LOOK)),
                true => Box::pin(tokio::task::yield_now()),
            });
            std::task::ready!(pause.as_mut().poll(cx));
            (this.stretch, this.pause, this.has_looked) = (0, None, true);
        }
        outgoing.lock().asked();
        if this.held.is_empty() {
            // Outside the lock, because the producer may be slow, and may use the same watch.
            let unwinding = Unwinding(outgoing);
            let polled = Pin::new(&mut this.inner).poll_frame(cx);
            drop(unwinding);
            match polled {
                Poll::Pending => {
                    (this.stretch, this.has_looked) = (0, true);
                    outgoing.note(|feed| feed.starving = Some(Instant::now()));
                    return Poll::Pending;
                }
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => this.held = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                Poll::Ready(Some(Err(error))) => {
                    outgoing.note(|feed| feed.producer_failed = true);
                    return Poll::Ready(Some(Err(error)));
                }
                Poll::Ready(None) => return Poll::Ready(None),
            }
        }
        let piece = outgoing.note(|feed| feed.serve(&mut this.held)).unwrap_or_default();
        this.stretch += piece.len();
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        // The connection calls this before it writes the head, and nothing calls it earlier.
        self.flow.lock().take();
        self.upload.as_ref().is_none_or(|upload| upload.held.is_empty() && upload.inner.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let Some(upload) = &self.upload else { return SizeHint::with_exact(0) };
        let (inner, held) = (upload.inner.size_hint(), upload.held.len() as u64);
        let mut hint = SizeHint::new();
        if let Some(upper) = inner.upper() {
            hint.set_upper(upper + held);
        }
        hint.set_lower(inner.lower() + held);
        hint
    }
}

impl Drop for WatchedBody {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut flow = self.flow.lock();
        // From here on nothing waits for our producer: any silence is the peer's, and begins now.
        if flow.feed.as_mut().is_some_and(|feed| feed.end_hunger(now)) {
            flow.progress = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use http::Method;
    use http_body::Body as _;
    use tokio::time::advance;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn when_a_connection_has_dropped_the_body_nobody_waits_for_its_producer_any_more() {
        let mut request = Request::new(Method::PUT, "http://localhost/".parse().expect("a URL"));
        let never = futures_util::stream::pending::<Result<Bytes, std::io::Error>>();
        *request.body_mut() = Some(Body::wrap_stream(never));
        let outgoing = Outgoing::watch(&mut request, Some(SECOND));
        let mut body = request.body_mut().take().expect("it was put there");
        assert!(Pin::new(&mut body).poll_frame(&mut Context::from_waker(Waker::noop())).is_pending());
        advance(SECOND * 3).await;
        assert_eq!(outgoing.idle_end(SECOND), Some(Instant::now() + SECOND), "it waits for us");
        drop(body);
        let dropped = Instant::now();
        advance(SECOND * 3).await;
        assert_eq!(outgoing.idle_end(SECOND), Some(dropped + SECOND));
        assert_eq!(outgoing.starved(), SECOND * 3);
    }
}
