//! A server whose connections and their streams are tasks of its worker. None outlives the worker's phase, and the
//! report names each straggler by peer and path.

#[cfg(feature = "axum")]
pub mod axum;
mod line;
mod request;
pub mod tower;

use std::fmt::Debug;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tower_layer::Layer;
use tower_service::Service;

use crate::context::WorkerContext;
use crate::group::TaskGroup;
use crate::server::line::{Hold, Line, line};
use crate::server::request::{CancellationLayer, CancellationService, Serving};
use crate::task::BoxError;

/// The pause after an `accept` that failed for lack of a resource, such as a file descriptor.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// What a server accepts connections from: a TCP or Unix listener, or your own listener that adds TLS.
pub trait Listener: Send + 'static {
    /// The stream of a connection.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    /// The address of a peer.
    type Addr: Debug + Send + 'static;

    /// Accepts the next connection. The listener handles errors itself, and tries again.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, no connection is lost. Every implementation must
    /// ensure this, because the server drops the future when it is told to stop, and only then.
    fn accept(&mut self) -> impl Future<Output = (Self::Io, Self::Addr)> + Send;
}

impl Listener for tokio::net::TcpListener {
    type Io = tokio::net::TcpStream;
    type Addr = std::net::SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            match Self::accept(self).await {
                Ok(accepted) => return accepted,
                Err(error) => survive(error).await,
            }
        }
    }
}

#[cfg(unix)]
impl Listener for tokio::net::UnixListener {
    type Io = tokio::net::UnixStream;
    type Addr = tokio::net::unix::SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            match Self::accept(self).await {
                Ok(accepted) => return accepted,
                Err(error) => survive(error).await,
            }
        }
    }
}

/// Handles an error of `accept`. A fault of one connection is no reason to pause, and no error is a reason to stop a
/// server.
async fn survive(error: io::Error) {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    if !matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) {
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }
}

/// Serves a tower service over HTTP/1 and HTTP/2 until the worker of `cx` is told to stop, then drains.
///
/// For axum's `Router` use [`axum::serve`](crate::axum); this function is for tonic's `Routes` and any other tower
/// service.
///
/// On a stop, the server closes the listener and the idle connections at once. It answers requests that have arrived,
/// until the worker's deadline. Then it closes whatever is left: half-sent requests, event streams, upgraded
/// connections. The report names each of those by peer, such as `127.0.0.1:50000`, with `GET /path` as its last mark,
/// or as its name for an HTTP/2 stream.
///
/// Each request has a [token](CancellationLayer) in its extensions. A handler that panics ends its connection, and
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
/// use cancel_safe_shutdown::{Application, WorkerContext};
/// use tokio::net::TcpListener;
///
/// async fn grpc(cx: WorkerContext) -> Result<(), std::io::Error> {
///     let listener = TcpListener::bind("0.0.0.0:50051").await?;
///     let service = routes(); // tonic: `Routes::new(GreeterServer::new(..)).prepare()`
///     cancel_safe_shutdown::tower::serve(listener, service, cx).await
/// }
/// # fn routes() -> axum::Router { axum::Router::new() }
///
/// fn main() -> std::process::ExitCode {
///     Application::new("greeter").worker("grpc", grpc).run()
/// }
/// ```
pub async fn serve<L, S, B>(listener: L, service: S, cx: WorkerContext) -> io::Result<()>
where
    L: Listener,
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    serve_each(listener, |_| service.clone(), cx).await;
    Ok(())
}

/// Works like [`serve`], with a service for each connection.
pub(crate) async fn serve_each<L, S, B>(mut listener: L, mut service_for: impl FnMut(&L::Addr) -> S, cx: WorkerContext)
where
    L: Listener,
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    let connections = cx.discarding_group();
    cx.ready();
    loop {
        let (stream, peer) = tokio::select! {
            biased;
            () = cx.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let service = service_for(&peer);
        let serving = move |cx: WorkerContext| connection(stream, service, cx);
        if connections.spawn_with(format!("{peer:?}"), serving).is_err() {
            break;
        }
    }
    // At once, so that a new client is refused now and tries another server.
    drop(listener);
    cx.mark("draining");
    // The report tells the panics among them.
    drop(connections.wait().await);
}

/// Serves one connection to its end, even if an upgrade hands its stream to another task.
async fn connection<I, S, B>(stream: I, service: S, cx: WorkerContext)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    cx.mark("before its first request");
    let (line, hold) = line(stream);
    let streams = Streams::new(cx.clone());
    // Dropped with this future in every case, so that no stream of the connection lives on.
    let _end = EndStreams(Arc::clone(&streams.0));
    let service = PerRequest::new(service, Arc::clone(&streams.0));
    converse(line, service, streams.clone(), &cx).await;
    upgraded(&hold, &streams, &cx).await;
}

/// Speaks HTTP until the connection is closed or upgraded.
async fn converse<I, S, B>(line: Line<I>, service: PerRequest<S>, streams: Streams, cx: &WorkerContext)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    let mut builder = Builder::new(streams);
    // The timers bound how long a client may take for the head of a request: 30 seconds, hyper's default.
    builder.http1().timer(TokioTimer::new());
    builder.http2().timer(TokioTimer::new()).enable_connect_protocol();
    let mut conversation = pin!(builder.serve_connection_with_upgrades(TokioIo::new(line), service));
    tokio::select! {
        // An error concerns only the connection and its client.
        _ended = conversation.as_mut() => return,
        () = cx.cancelled() => {}
    }
    conversation.as_mut().graceful_shutdown();
    let _ended = conversation.await;
}

/// Waits until the holder of an upgraded connection's stream is done.
async fn upgraded<I>(hold: &Hold<I>, streams: &Streams, cx: &WorkerContext) {
    if !hold.is_released() {
        cx.mark(format!("upgraded by {}", streams.0.latest()));
        hold.released().await;
    }
}

/// What the tasks of one connection share.
#[derive(Debug)]
struct Connection {
    cx: WorkerContext,
    /// The HTTP/2 streams. Created with the first stream.
    group: OnceLock<TaskGroup>,
    /// The method and path of the latest request.
    latest: Mutex<String>,
}

impl Connection {
    fn latest(&self) -> MutexGuard<'_, String> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The executor on which hyper spawns the HTTP/2 streams: tasks below the connection's task, with the same time to
/// drain.
#[derive(Debug, Clone)]
struct Streams(Arc<Connection>);

impl Streams {
    fn new(cx: WorkerContext) -> Self {
        Self(Arc::new(Connection { cx, group: OnceLock::new(), latest: Mutex::default() }))
    }
}

impl<F> Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let group = self.0.group.get_or_init(|| self.0.cx.streams_group());
        // Hyper calls the service for a request right before it spawns its stream.
        let name = self.0.latest().clone();
        // A spawn is rejected only after the connection has ended, and then the stream has ended too.
        drop(group.spawn_with(name, |_| stream));
    }
}

/// Ends the streams of a connection. Each stream holds an executor, and so keeps its own group alive: dropping the
/// group is not enough, it has to be cancelled.
struct EndStreams(Arc<Connection>);

impl Drop for EndStreams {
    fn drop(&mut self) {
        if let Some(group) = self.0.group.get() {
            group.end_now();
        }
    }
}

/// The service of one connection, as hyper wants it.
struct PerRequest<S> {
    inner: TowerToHyperService<CancellationService<S>>,
    connection: Arc<Connection>,
}

impl<S> PerRequest<S> {
    fn new(service: S, connection: Arc<Connection>) -> Self {
        let layer = CancellationLayer::new(connection.cx.token());
        Self { inner: TowerToHyperService::new(layer.layer(service)), connection }
    }
}

impl<S, B> hyper::service::Service<Request<Incoming>> for PerRequest<S>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone,
    B: Body,
{
    type Response = <CancellationService<S> as Service<Request<Incoming>>>::Response;
    type Error = S::Error;
    type Future = <TowerToHyperService<CancellationService<S>> as hyper::service::Service<Request<Incoming>>>::Future;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        // Without the query, which may contain secrets.
        let name = format!("{} {}", request.method(), request.uri().path());
        self.connection.cx.mark(name.clone());
        *self.connection.latest() = name;
        request.extensions_mut().insert(Serving(self.connection.cx.clone()));
        self.inner.call(request)
    }
}
