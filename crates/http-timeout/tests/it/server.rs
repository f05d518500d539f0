//! A real server of HTTP/1 and of HTTP/2 with prior knowledge, on loopback, on its own thread, so that it outlives
//! every runtime that a test makes or breaks.

use std::{
    convert::Infallible,
    future::Future,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use http::{Request, Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::{
    body::{Bytes, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::{
    net::{TcpListener, TcpSocket},
    runtime::Runtime,
    time::Sleep,
};

pub(crate) type Reply = Response<BoxBody<Bytes, Infallible>>;

/// What the server has seen.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    hits: AtomicUsize,
    connections: AtomicUsize,
    bodies: AtomicUsize,
    most_bodies: AtomicUsize,
}

pub(crate) struct Server {
    address: SocketAddr,
    seen: Arc<Seen>,
    runtime: Option<Runtime>,
}

impl Server {
    /// Serves with `handler`, which gets the request and the number of requests before it.
    pub(crate) fn start<F, R>(handler: F) -> Self
    where
        F: Fn(Request<Incoming>, usize) -> R + Send + Sync + 'static,
        R: Future<Output = Reply> + Send + 'static,
    {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        // Tests start servers inside runtimes, where nothing may block on another: tokio takes a bound socket over.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.set_nonblocking(true).expect("a socket without blocking");
        let address = listener.local_addr().expect("an address");
        let seen = Arc::new(Seen::default());
        runtime.spawn(accept(listener, Arc::new(handler), Arc::clone(&seen)));
        Self { address, seen, runtime: Some(runtime) }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Requests that reached the handler.
    pub(crate) fn hits(&self) -> usize {
        self.seen.hits.load(Ordering::SeqCst)
    }

    pub(crate) fn connections(&self) -> usize {
        self.seen.connections.load(Ordering::SeqCst)
    }

    /// Responses in progress.
    pub(crate) fn bodies(&self) -> usize {
        self.seen.bodies.load(Ordering::SeqCst)
    }

    /// The most responses that were in progress at a time.
    pub(crate) fn most_bodies(&self) -> usize {
        self.seen.most_bodies.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn accept<F, R>(listener: std::net::TcpListener, handler: Arc<F>, seen: Arc<Seen>)
where
    F: Fn(Request<Incoming>, usize) -> R + Send + Sync + 'static,
    R: Future<Output = Reply> + Send + 'static,
{
    let listener = TcpListener::from_std(listener).expect("a socket that the runtime can poll");
    while let Ok((socket, _)) = listener.accept().await {
        seen.connections.fetch_add(1, Ordering::SeqCst);
        let (handler, seen) = (Arc::clone(&handler), Arc::clone(&seen));
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let hit = seen.hits.fetch_add(1, Ordering::SeqCst);
                let (reply, counted) = (handler(request, hit), Counted::new(&seen));
                async move { Ok::<_, Infallible>(reply.await.map(|body| Tracked { body, _counted: counted })) }
            });
            // An error is ignored, because in many of the tests the client hangs up.
            drop(auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), service).await);
        });
    }
}

/// One response in progress, from its request to the end of its body.
struct Counted(Arc<Seen>);

impl Counted {
    fn new(seen: &Arc<Seen>) -> Self {
        let now = seen.bodies.fetch_add(1, Ordering::SeqCst) + 1;
        seen.most_bodies.fetch_max(now, Ordering::SeqCst);
        Self(Arc::clone(seen))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.bodies.fetch_sub(1, Ordering::SeqCst);
    }
}

struct Tracked {
    body: BoxBody<Bytes, Infallible>,
    _counted: Counted,
}

impl Body for Tracked {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

pub(crate) fn reply(status: u16, body: impl Into<Bytes>) -> Reply {
    let mut reply = Response::new(Full::new(body.into()).boxed());
    *reply.status_mut() = StatusCode::from_u16(status).expect("a status");
    reply
}

pub(crate) fn with_header(mut reply: Reply, name: &'static str, value: &str) -> Reply {
    reply.headers_mut().insert(name, value.parse().expect("a header"));
    reply
}

/// A body of unknown length: `chunks` pieces of `size` bytes with a pause before each.
pub(crate) fn drip(chunks: usize, size: usize, pause: Duration) -> Reply {
    Response::new(Drip { left: chunks, size, pause, sleep: None }.boxed())
}

struct Drip {
    left: usize,
    size: usize,
    pause: Duration,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Body for Drip {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let pause = self.pause;
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(pause)));
        std::task::ready!(sleep.as_mut().poll(cx));
        self.sleep = None;
        self.left -= 1;
        Poll::Ready(Some(Ok(Frame::data(Bytes::from(vec![b'x'; self.size])))))
    }
}

/// A URL without a listener: connecting is refused. The port stays taken until the process ends, so that no server of
/// another test gets it.
pub(crate) fn refused_url() -> String {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).expect("a free port");
    let url = format!("http://{}/", socket.local_addr().expect("an address"));
    std::mem::forget(socket);
    url
}

/// Waits until `condition` holds, for a minute at most.
pub(crate) async fn eventually(condition: impl Fn() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < Duration::from_secs(60), "the condition did not come true in a minute");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
