//! An ordinary web server over a directory, with a log of its requests and a few switches to make it difficult.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::body::{Body, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// What a server does and has seen.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Requests by path.
    pub(crate) asked: BTreeMap<String, usize>,
    /// Paths that get this status instead of their file, and how often (`usize::MAX`: always).
    pub(crate) refuse: BTreeMap<String, (StatusCode, usize)>,
    /// The `Retry-After` of a refusal.
    pub(crate) retry_after: Option<&'static str>,
    /// Paths whose file is served with this status instead of 200.
    pub(crate) with_status: BTreeMap<String, StatusCode>,
    /// Paths whose body is cut: after how many bytes, and how often.
    pub(crate) cut: BTreeMap<String, (usize, usize)>,
    /// The ranges that were asked for, by path.
    pub(crate) ranges: Vec<(String, String)>,
    /// Whether it ignores ranges.
    pub(crate) whole_only: bool,
    /// The received headers.
    pub(crate) sent: Vec<(String, String)>,
    /// Paths whose body never ends.
    pub(crate) hang: Vec<String>,
    /// A pause before each answer.
    pub(crate) pause: Duration,
}

/// A server that stops when it is dropped.
pub(crate) struct Server {
    pub(crate) base: String,
    state: Arc<Mutex<State>>,
    _runtime: Runtime,
}

impl Server {
    pub(crate) fn over(dir: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State::default()));
        runtime.spawn(serve(listener, dir.to_owned(), Arc::clone(&state)));
        Self { base, state, _runtime: runtime }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many requests there have been in all.
    pub(crate) fn requests(&self) -> usize {
        self.state().asked.values().sum()
    }
}

async fn serve(listener: TcpListener, dir: PathBuf, state: Arc<Mutex<State>>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (dir, state) = (dir.clone(), Arc::clone(&state));
        tokio::spawn(async move {
            let answer = service_fn(|request| respond(request, &dir, &state));
            let _hung_up =
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
        });
    }
}

type Answer = Response<BoxBody<Bytes, Infallible>>;

async fn respond(request: Request<Incoming>, dir: &Path, state: &Mutex<State>) -> Result<Answer, Infallible> {
    let path = request.uri().path().to_owned();
    let (refusal, status, retry_after, hang, pause) = {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        *state.asked.entry(path.clone()).or_default() += 1;
        let refusal = state.refuse.get_mut(&path).filter(|(_, times)| *times > 0).map(|(status, times)| {
            *times -= usize::from(*times != usize::MAX);
            *status
        });
        let status = state.with_status.get(&path).copied().unwrap_or(StatusCode::OK);
        (refusal, status, state.retry_after, state.hang.contains(&path), state.pause)
    };
    tokio::time::sleep(pause).await;
    let empty = |status| {
        let mut response = Response::new(Full::default().boxed());
        *response.status_mut() = status;
        response
    };
    if let Some(status) = refusal {
        let mut response = empty(status);
        if let Some(wait) = retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, wait.parse().unwrap());
        }
        return Ok(response);
    }
    let Ok(content) = std::fs::read(dir.join(&path[1..])) else { return Ok(empty(StatusCode::NOT_FOUND)) };
    let etag = format!("\"{}-{}\"", content.len(), content.iter().map(|byte| u64::from(*byte)).sum::<u64>());
    if request.headers().get(header::IF_NONE_MATCH).is_some_and(|known| known == etag.as_str()) {
        return Ok(empty(StatusCode::NOT_MODIFIED));
    }
    let range = request.headers().get(header::RANGE).and_then(|range| range.to_str().ok()).map(str::to_owned);
    let is_same = request.headers().get(header::IF_RANGE).is_some_and(|known| known == etag.as_str());
    let (cut, from) = {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        state.sent.extend(
            request
                .headers()
                .iter()
                .map(|(name, value)| (name.to_string(), value.to_str().unwrap_or_default().to_owned())),
        );
        let from = range.as_ref().filter(|_| is_same && !state.whole_only);
        let from = from.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
        state.ranges.extend(range.map(|range| (path.clone(), range)));
        let cut = state.cut.get_mut(&path).filter(|(_, times)| *times > 0).map(|(bytes, times)| {
            *times -= 1;
            *bytes
        });
        (cut, from)
    };
    let length = content.len();
    let content = content[from.unwrap_or(0)..].to_vec();
    if let Some(bytes) = cut {
        let begin = Bytes::copy_from_slice(&content[..bytes.min(content.len())]);
        let mut response = Response::new(if hang { Endless(Some(begin)).boxed() } else { Broken::new(begin).boxed() });
        response.headers_mut().insert(header::CONTENT_LENGTH, content.len().into());
        response.headers_mut().insert(header::ETAG, etag.parse().unwrap());
        if let Some(from) = from {
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            let range = format!("bytes {from}-{}/{length}", length - 1);
            response.headers_mut().insert(header::CONTENT_RANGE, range.parse().unwrap());
        }
        return Ok(response);
    }
    let body = if hang { Endless(Some(content.into())).boxed() } else { Full::new(content.into()).boxed() };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    if let Some(from) = from {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        let range = format!("bytes {from}-{}/{length}", length - 1);
        response.headers_mut().insert(header::CONTENT_RANGE, range.parse().unwrap());
    }
    response.headers_mut().insert(header::ETAG, etag.parse().unwrap());
    Ok(response)
}

/// A body that sends its bytes and then neither ends nor continues.
struct Endless(Option<Bytes>);

impl Body for Endless {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.take().map_or(std::task::Poll::Pending, |bytes| std::task::Poll::Ready(Some(Ok(Frame::data(bytes)))))
    }
}

/// A body that ends too early: its connection goes away a moment after its last bytes.
struct Broken {
    left: Bytes,
    pause: std::pin::Pin<Box<tokio::time::Sleep>>,
}

impl Broken {
    fn new(left: Bytes) -> Self {
        Self { left, pause: Box::pin(tokio::time::sleep(Duration::from_millis(300))) }
    }
}

impl Body for Broken {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left.is_empty() {
            // Data that is still in a buffer when a body ends too early is never sent.
            std::task::ready!(self.pause.as_mut().poll(cx));
            return std::task::Poll::Ready(None);
        }
        let piece = self.left.len().min(64 << 10);
        std::task::Poll::Ready(Some(Ok(Frame::data(self.left.split_to(piece)))))
    }
}
