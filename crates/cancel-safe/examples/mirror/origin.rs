//! The embedded origin: 500 files on loopback behind five hosts, each with a way of its own to be difficult.

use std::collections::{BTreeMap, HashSet};
use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use sha2::{Digest, Sha256};
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep};
use url::Url;

use super::home::hex;

/// Files that are served in all.
const FILES: usize = 500;
/// The largest of them, in bytes; sizes are log-uniform below.
const LARGEST: u64 = 4 << 20;
/// How long the late host refuses connections.
const DOWN: Duration = Duration::from_secs(8);
/// What a slow body pauses between two of its 16 pieces.
const DRIP: Duration = Duration::from_millis(150);
/// Connections served at once.
const MAX_CONNECTIONS: usize = 256;

/// What a host does to its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Temper {
    Plain,
    /// Sends bodies in drips.
    Slow,
    /// Answers the first request for every fourth file with this status and `Retry-After: 1`.
    Busy(StatusCode),
    /// Refuses connections for its first seconds.
    Late,
}

const HOSTS: [(&str, Temper); 5] = [
    ("plain.demo.test", Temper::Plain),
    ("slow.demo.test", Temper::Slow),
    ("busy.demo.test", Temper::Busy(StatusCode::SERVICE_UNAVAILABLE)),
    ("limited.demo.test", Temper::Busy(StatusCode::TOO_MANY_REQUESTS)),
    ("late.demo.test", Temper::Late),
];

/// A running origin. Dropping it stops it.
#[derive(Debug)]
pub(crate) struct Origin {
    /// What the client must resolve by itself.
    pub(crate) hosts: Vec<(&'static str, SocketAddr)>,
    /// Every URL, with the SHA-256 of what it serves.
    pub(crate) files: BTreeMap<Url, String>,
    _servers: JoinSet<()>,
}

impl Origin {
    /// Starts a listener a host on ports that the system chooses.
    pub(crate) async fn start() -> io::Result<Self> {
        let (mut hosts, mut servers) = (Vec::new(), JoinSet::new());
        for (host, temper) in HOSTS {
            let socket = TcpSocket::new_v4()?;
            socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
            hosts.push((host, socket.local_addr()?));
            servers.spawn(async move {
                if temper == Temper::Late {
                    // A socket that is bound and does not listen refuses connections.
                    tokio::time::sleep(DOWN).await;
                }
                if let Ok(listener) = socket.listen(1024) {
                    serve(listener, host, temper).await;
                }
            });
        }
        // Half a gigabyte of arithmetic would hold up the executor.
        let files = tokio::task::spawn_blocking(digests).await.map_err(io::Error::other)?;
        Ok(Self { hosts, files, _servers: servers })
    }
}

fn digests() -> BTreeMap<Url, String> {
    (0..FILES)
        .filter_map(|number| {
            let (host, _) = HOSTS[number % HOSTS.len()];
            let url = Url::parse(&format!("http://{host}{}", name(number))).ok()?;
            Some((url, hex(&Sha256::digest(content(number)))))
        })
        .collect()
}

fn name(number: usize) -> String {
    format!("/set-{}/file-{number:03}.bin", number / 100)
}

/// The same bytes on every machine and in every run, so that a second run finds nothing to do.
fn content(number: usize) -> Bytes {
    let mut random = fastrand::Rng::with_seed(number as u64);
    let size = ((LARGEST as f64).ln() * random.f64()).exp() as u64 - 1;
    let mut bytes = vec![0; if number < 3 { 0 } else { size as usize }];
    random.fill(&mut bytes);
    bytes.into()
}

async fn serve(listener: TcpListener, host: &'static str, temper: Temper) {
    let told = Arc::new(Mutex::new(HashSet::new()));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => {
                let Ok((stream, _)) = accepted else { continue };
                let told = Arc::clone(&told);
                connections.spawn(async move {
                    let answer = service_fn(move |request| {
                        let response = respond(&request, host, temper, &told);
                        async move { Ok::<_, Infallible>(response) }
                    });
                    // A client that hangs up is its own affair.
                    let _hung_up = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
                });
            }
        }
    }
}

type Answer = Response<BoxBody<Bytes, Infallible>>;

fn respond(request: &Request<Incoming>, host: &str, temper: Temper, told: &Mutex<HashSet<usize>>) -> Answer {
    let found =
        (0..FILES).find(|number| HOSTS[number % HOSTS.len()].0 == host && name(*number) == request.uri().path());
    let Some(number) = found else { return status(StatusCode::NOT_FOUND) };
    if let Temper::Busy(code) = temper
        && (number / HOSTS.len()).is_multiple_of(4)
        && told.lock().unwrap_or_else(PoisonError::into_inner).insert(number)
    {
        let mut response = status(code);
        response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
        return response;
    }
    let etag = format!("\"{number}\"");
    if request.headers().get(header::IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == etag.as_bytes()) {
        return status(StatusCode::NOT_MODIFIED);
    }
    let content = content(number);
    let body = match temper {
        Temper::Slow if number.is_multiple_of(4) => Drip::new(content).boxed(),
        _ => Full::new(content).boxed(),
    };
    let mut response = Response::new(body);
    if let Ok(etag) = header::HeaderValue::from_str(&etag) {
        response.headers_mut().insert(header::ETAG, etag);
    }
    response
}

fn status(code: StatusCode) -> Answer {
    let mut response = Response::new(Full::default().boxed());
    *response.status_mut() = code;
    response
}

/// A body in pieces, with a pause before each.
struct Drip {
    left: Bytes,
    piece: usize,
    pause: Pin<Box<Sleep>>,
}

impl Drip {
    fn new(content: Bytes) -> Self {
        Self { piece: content.len().div_ceil(16).max(1), left: content, pause: Box::pin(tokio::time::sleep(DRIP)) }
    }
}

impl Body for Drip {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left.is_empty() {
            return Poll::Ready(None);
        }
        std::task::ready!(self.pause.as_mut().poll(cx));
        self.pause.as_mut().reset(Instant::now() + DRIP);
        let piece = self.piece.min(self.left.len());
        Poll::Ready(Some(Ok(Frame::data(self.left.split_to(piece)))))
    }

    fn is_end_stream(&self) -> bool {
        self.left.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left.len() as u64)
    }
}
