//! A token for each request. It is cancelled when the client no longer waits for the response, at the request's
//! deadline, and on shutdown. A response that was read to its end does not cancel it.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::header::CONTENT_LENGTH;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Buf;
use pin_project_lite::pin_project;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tower_layer::Layer;
use tower_service::Service;

use crate::context::WorkerContext;

/// A layer that puts a [`CancellationToken`] into the extensions of each request, for axum, tonic and any other tower
/// service.
///
/// The token is cancelled:
/// - when the client goes away: the response's future, or its body, is dropped before its end;
/// - at the request's deadline: the layer's [`timeout`](Self::timeout) or the request's own `grpc-timeout`, whichever is
///   earlier;
/// - on shutdown: when the token that the layer was made from is cancelled.
///
/// The token only informs; the handler decides what to do. It is mainly for what the handler has spawned, because the
/// handler itself is dropped with its request. This crate's servers put this token into every request themselves. Use
/// the layer for the deadline, and for other servers.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use cancel_safe_shutdown::tower::CancellationLayer;
/// use tokio_util::sync::CancellationToken;
///
/// let shutdown = CancellationToken::new(); // In a worker: `cx.token()`.
/// let layer = CancellationLayer::new(shutdown).timeout(Duration::from_secs(30));
/// # let _: CancellationLayer = layer;
/// ```
#[derive(Debug, Clone)]
pub struct CancellationLayer {
    shutdown: CancellationToken,
    timeout: Option<Duration>,
}

impl CancellationLayer {
    /// Creates the layer; `shutdown` cancels the token of every request.
    pub fn new(shutdown: CancellationToken) -> Self {
        Self { shutdown, timeout: None }
    }

    /// Sets how long after its arrival a request's token is cancelled. By default only a `grpc-timeout` limits it.
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout: Some(timeout), ..self }
    }
}

impl<S> Layer<S> for CancellationLayer {
    type Service = CancellationService<S>;

    fn layer(&self, inner: S) -> CancellationService<S> {
        CancellationService { inner, layer: self.clone() }
    }
}

/// The service that a [`CancellationLayer`] makes from another.
#[derive(Debug, Clone)]
pub struct CancellationService<S> {
    inner: S,
    layer: CancellationLayer,
}

impl<S, A, B> Service<Request<A>> for CancellationService<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    B: Body,
{
    type Response = Response<WatchedBody<B>>;
    type Error = S::Error;
    type Future = WatchedResponse<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<A>) -> Self::Future {
        // A child of a token that is already there, so that two layers, or a layer inside one of our servers, add up.
        let above = request.extensions().get::<CancellationToken>().unwrap_or(&self.layer.shutdown);
        let token = above.child_token();
        let limit = [self.layer.timeout, grpc_timeout(request.headers())].into_iter().flatten().min();
        request.extensions_mut().insert(token.clone());
        let connection = request.extensions_mut().remove::<Serving>();
        let deadline = limit.map(|limit| cancel_after(limit, token.clone()));
        let guard = Guard { token: Some(token), deadline, connection };
        let is_head = request.method() == Method::HEAD;
        WatchedResponse { future: self.inner.call(request), guard: Some(guard), is_head }
    }
}

/// Cancels `token` after `limit`. It is a separate task, because a response to a slow reader may not be polled at its
/// deadline.
fn cancel_after(limit: Duration, token: CancellationToken) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        tokio::time::sleep(limit).await;
        token.cancel();
    }))
}

/// The timeout of a gRPC request: up to eight digits and a unit.
fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(amount * 3600)),
        "M" => Some(Duration::from_secs(amount * 60)),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

/// The context of the connection that a request came on: its mark says what the connection is doing.
#[derive(Debug, Clone)]
pub(crate) struct Serving(pub(crate) WorkerContext);

/// Cancels the token of a request that is dropped before its end.
#[derive(Debug)]
struct Guard {
    /// `None` once the response has come to its end.
    token: Option<CancellationToken>,
    deadline: Option<AbortOnDropHandle<()>>,
    connection: Option<Serving>,
}

impl Guard {
    /// The response has come to its end.
    fn finish(mut self) {
        self.deadline = None;
        if let Some(Serving(cx)) = self.connection.take() {
            cx.mark("between requests");
        }
        // Work that the handler left behind, such as an audit entry, may go on until the shutdown.
        self.token = None;
    }
}

fn finish(guard: &mut Option<Guard>) {
    if let Some(guard) = guard.take() {
        guard.finish();
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(token) = &self.token {
            token.cancel();
        }
    }
}

pin_project! {
    /// The future of a [`CancellationService`]'s response.
    #[derive(Debug)]
    pub struct WatchedResponse<F> {
        #[pin]
        future: F,
        guard: Option<Guard>,
        is_head: bool,
    }
}

impl<F, B, E> Future for WatchedResponse<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Body,
{
    type Output = Result<Response<WatchedBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let returned = ready!(this.future.poll(cx));
        let (guard, is_head) = (this.guard.take(), *this.is_head);
        Poll::Ready(returned.map(|response| {
            let left = if is_head { Some(0) } else { length(&response) };
            response.map(|body| {
                let mut body = WatchedBody { body, guard, left };
                // A body that is already at its end is never polled.
                body.finish_at_end();
                body
            })
        }))
    }
}

/// How many bytes the body has, if that is known: a server does not poll it once they are sent.
fn length<B: Body>(response: &Response<B>) -> Option<u64> {
    if let StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED = response.status() {
        return Some(0);
    }
    let header = response.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    header.or_else(|| response.body().size_hint().exact())
}

pin_project! {
    /// The body of a [`CancellationService`]'s response.
    #[derive(Debug)]
    pub struct WatchedBody<B> {
        #[pin]
        body: B,
        guard: Option<Guard>,
        // How many bytes are still to come, if that is known.
        left: Option<u64>,
    }
}

impl<B: Body> WatchedBody<B> {
    fn finish_at_end(&mut self) {
        if self.body.is_end_stream() || self.left == Some(0) {
            finish(&mut self.guard);
        }
    }
}

impl<B: Body> Body for WatchedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut this = self.project();
        let frame = ready!(this.body.as_mut().poll_frame(cx));
        let is_last = match &frame {
            None => true,
            // A failed body cancels its token when it is dropped, because the client did not get its response.
            Some(Err(_)) => false,
            Some(Ok(frame)) => {
                if let (Some(left), Some(data)) = (this.left.as_mut(), frame.data_ref()) {
                    *left = left.saturating_sub(data.remaining() as u64);
                }
                frame.is_trailers() || *this.left == Some(0) || this.body.is_end_stream()
            }
        };
        if is_last {
            finish(this.guard);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grpc_timeout_is_eight_digits_and_a_unit_and_nothing_else() {
        let parsed = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", text.parse().expect("a header"));
            grpc_timeout(&headers)
        };
        assert_eq!(parsed("5S"), Some(Duration::from_secs(5)));
        assert_eq!(parsed("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!((parsed("2M"), parsed("7m")), (Some(Duration::from_secs(120)), Some(Duration::from_millis(7))));
        assert_eq!((parsed("3u"), parsed("4n")), (Some(Duration::from_micros(3)), Some(Duration::from_nanos(4))));
        for wrong in ["", "S", "5", "5s", "+5S", "-5S", "123456789S", "5 S", "1.5S", "5SS"] {
            assert_eq!(parsed(wrong), None, "{wrong}");
        }
    }
}
