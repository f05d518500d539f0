//! The server, the request token and the readiness probe for axum. This file adds no guarantees:
//! [`tower`](crate::tower) and the application keep all its promises.

use std::convert::Infallible;
use std::fmt::Debug;
use std::io;
use std::task::{Context, Poll};

use ::axum::Router;
use ::axum::extract::{ConnectInfo, FromRequestParts};
use ::axum::http::header::CACHE_CONTROL;
use ::axum::http::request::Parts;
use ::axum::http::{Request, StatusCode};
use ::axum::response::{IntoResponse, Response};
use ::axum::routing::{MethodRouter, get};
use hyper::body::Incoming;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tower_service::Service;

use crate::context::WorkerContext;
use crate::server::{Listener, serve_each};
use crate::stop::Readiness;

/// Serves an axum router over HTTP/1 and HTTP/2 until the worker of `cx` is told to stop, then drains.
///
/// Axum's own `serve` leaves the connections it has spawned running beside a closed database; here they belong to the
/// worker. On a stop, the server closes the listener and the idle connections at once. It answers requests that have
/// arrived, until the worker's deadline. Then it closes whatever is left: half-sent requests, event streams, upgraded
/// connections. The report names each of those by peer, such as `127.0.0.1:50000`, with `GET /path` as its last mark,
/// or as its name for an HTTP/2 stream.
///
/// Every request has its token ([`Cancelled`]) and its [`ConnectInfo`]. A handler that panics ends its connection, and
/// counts as a task that has panicked: the application's exit code is 101. The worker is [ready](WorkerContext::ready)
/// from the first poll of this future.
///
/// # Cancel safety
///
/// This method is not cancel safe. If dropped, every connection is closed at once, and its request lost.
///
/// # Errors
///
/// None: an error on a connection concerns only that connection and its client. It returns a `Result` so it can be a
/// worker.
///
/// # Limitations
///
/// The server does not own what a handler spawns itself, nor the task of an upgraded connection, which finds its stream
/// closed. Both can check the token of their request.
///
/// # Examples
///
/// ```no_run
/// use axum::{Router, routing::get};
/// use cancel_safe_shutdown::{Application, WorkerContext};
/// use tokio::net::TcpListener;
///
/// async fn http(cx: WorkerContext) -> Result<(), std::io::Error> {
///     let listener = TcpListener::bind("0.0.0.0:8080").await?;
///     let router = Router::new().route("/", get(async || "hello"));
///     cancel_safe_shutdown::axum::serve(listener, router, cx).await
/// }
///
/// fn main() -> std::process::ExitCode {
///     Application::new("shop").worker("http", http).run()
/// }
/// ```
pub async fn serve<L>(listener: L, router: Router, cx: WorkerContext) -> io::Result<()>
where
    L: ::axum::serve::Listener,
    L::Addr: Clone + Debug + Send + Sync + 'static,
{
    let service = |peer: &L::Addr| WithPeer { router: router.clone(), peer: peer.clone() };
    serve_each(AxumListener(listener), service, cx).await;
    Ok(())
}

/// Adapts an axum listener to this crate's trait.
struct AxumListener<L>(L);

impl<L> Listener for AxumListener<L>
where
    L: ::axum::serve::Listener,
    L::Addr: Debug + Send + 'static,
{
    type Io = L::Io;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (L::Io, L::Addr) {
        self.0.accept().await
    }
}

/// A router that tells its handlers the address of the peer.
#[derive(Clone)]
struct WithPeer<A> {
    router: Router,
    peer: A,
}

impl<A: Clone + Send + Sync + 'static> Service<Request<Incoming>> for WithPeer<A> {
    type Response = Response;
    type Error = Infallible;
    type Future = <Router as Service<Request<Incoming>>>::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<Request<Incoming>>::poll_ready(&mut self.router, cx)
    }

    fn call(&mut self, mut request: Request<Incoming>) -> Self::Future {
        request.extensions_mut().insert(ConnectInfo(self.peer.clone()));
        self.router.call(request)
    }
}

/// Returns the route of a readiness probe. It answers 200 while the application is
/// [ready](crate::Application::readiness), and 503 before. It answers 503 again from the first moment of a stop, while
/// the [drain delay](crate::Application::drain_delay) runs and this server still answers. The body is one word:
/// `ready`, `starting` or `stopping`.
///
/// # Examples
///
/// ```
/// use axum::{Router, routing::get};
/// use cancel_safe_shutdown::{Application, WorkerContext};
/// use tokio::net::TcpListener;
///
/// let app = Application::new("shop");
/// let router = Router::new()
///     .route("/", get(async || "hello"))
///     .route("/readyz", cancel_safe_shutdown::axum::readiness(app.readiness()));
/// let app = app.worker("http", |cx: WorkerContext| async move {
///     let listener = TcpListener::bind("127.0.0.1:0").await?;
///     cancel_safe_shutdown::axum::serve(listener, router, cx).await
/// });
/// # let stop = app.shutdown_handle();
/// # let app = app.worker("example", |_: WorkerContext| async move { stop.cancel() });
/// # assert_eq!(
/// app.run()
/// # , std::process::ExitCode::SUCCESS);
/// ```
pub fn readiness<S: Clone + Send + Sync + 'static>(readiness: watch::Receiver<Readiness>) -> MethodRouter<S> {
    get(async move || {
        let now = *readiness.borrow();
        let status = if now.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        // A cached answer would not show the present state.
        (status, [(CACHE_CONTROL, "no-store")], now.to_string())
    })
}

/// Extracts the token of a request. The token is cancelled when the client goes away, at the request's deadline, and on
/// shutdown.
///
/// It works under this crate's [`serve`], and under a [`CancellationLayer`](crate::tower::CancellationLayer).
///
/// # Examples
///
/// ```
/// use axum::{Router, routing::post};
/// use cancel_safe_shutdown::axum::Cancelled;
///
/// async fn import(Cancelled(token): Cancelled) -> &'static str {
///     for _line in 0..3 {
///         if token.is_cancelled() {
///             return "stopped half-way";
///         }
///     }
///     "imported"
/// }
/// # let _: Router =
/// Router::new().route("/import", post(import));
/// ```
#[derive(Debug, Clone)]
#[expect(clippy::exhaustive_structs, reason = "extractors are taken apart in the arguments of a handler")]
pub struct Cancelled(pub CancellationToken);

impl<S: Sync> FromRequestParts<S> for Cancelled {
    type Rejection = MissingToken;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, MissingToken> {
        parts.extensions.get().cloned().map(Self).ok_or(MissingToken)
    }
}

/// The request has no token, because neither this crate's [`serve`] nor its layer is there. The answer has the status
/// 500.
#[derive(Debug, thiserror::Error)]
#[error("the request has no cancellation token: the layer is missing")]
#[non_exhaustive]
pub struct MissingToken;

impl IntoResponse for MissingToken {
    fn into_response(self) -> Response {
        (StatusCode::INTERNAL_SERVER_ERROR, self.to_string()).into_response()
    }
}
