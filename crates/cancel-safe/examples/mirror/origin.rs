//! The embedded origin of the demo: 500 files on loopback behind five hosts, each difficult in its own way.
//!
//! Invariant: it lives in the process that kills, so its counts survive every kill; and what it serves is the same on every
//! machine and in every run.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, combinators::BoxBody};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{self, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep};
use url::Url;

use super::judge::Served;

/// Connections served at once.
const MAX_CONNECTIONS: usize = 256;
/// The largest piece in which a body is sent, in bytes.
const PIECE: usize = 64 * 1024;
/// The pieces of a body that drips.
const DRIPS: usize = 16;

/// What a host does to its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Temper {
    Plain,
    /// Sends every fourth body in drips.
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

/// How much is served, and how slowly.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scale {
    files: usize,
    /// The largest file, in bytes; sizes are log-uniform below.
    largest: usize,
    /// How long the late host refuses connections.
    down: Duration,
    /// What a slow body pauses before each of its pieces.
    drip: Duration,
}

impl Scale {
    /// What the demo shows.
    pub(crate) const FULL: Self =
        Self { files: 500, largest: 4 << 20, down: Duration::from_secs(3), drip: Duration::from_millis(60) };
    /// What the tests of the demo run.
    pub(crate) const SHORT: Self =
        Self { files: 60, largest: 128 << 10, down: Duration::from_millis(300), drip: Duration::from_millis(10) };
    /// The same, for tests that end the demo themselves.
    pub(crate) const ENDLESS: Self = Self { drip: Duration::from_secs(60), ..Self::SHORT };
}

/// All files. Several origins may serve the same.
#[derive(Debug)]
pub(crate) struct Content {
    scale: Scale,
    pub(crate) files: Vec<Served>,
}

impl Content {
    /// Makes the files. Takes a moment of arithmetic.
    pub(crate) fn new(scale: Scale) -> Self {
        let mut random = fastrand::Rng::with_seed(scale.files as u64);
        // Each file is a part of these bytes, so that they are made and held once.
        let mut pool = vec![0; 2 * scale.largest];
        random.fill(&mut pool);
        let pool = Bytes::from(pool);
        let files = (0..scale.files).filter_map(|number| {
            let (host, _) = HOSTS[number % HOSTS.len()];
            let url = Url::parse(&format!("http://{host}/set-{}/file-{number:03}.bin", number / 100)).ok()?;
            let size = ((scale.largest as f64).ln() * random.f64()).exp() as usize - 1;
            let start = random.usize(..scale.largest);
            let content = if number < 3 { Bytes::new() } else { pool.slice(start..start + size) };
            Some(Served::new(url, content))
        });
        Self { scale, files: files.collect() }
    }
}

/// The progress of a client; a file fetched twice counts once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) files: usize,
    pub(crate) bytes: u64,
}

/// The requests for one file so far.
#[derive(Debug, Clone, Copy, Default)]
struct Asked {
    /// Answers that began a body.
    bodies: usize,
    /// The longest part that was sent of it, from its beginning, in bytes.
    sent: u64,
    whole: bool,
    /// Its host has asked the client to come later.
    put_off: bool,
}

/// What the connections of one origin share.
#[derive(Debug)]
struct Desk {
    content: Arc<Content>,
    asked: Mutex<Vec<Asked>>,
    progress: watch::Sender<Progress>,
}

/// A running origin. Dropping it stops it.
#[derive(Debug)]
pub(crate) struct Origin {
    /// The host names that the client must resolve by itself.
    pub(crate) hosts: Vec<(String, SocketAddr)>,
    desk: Arc<Desk>,
    late_until: Instant,
    _servers: JoinSet<()>,
}

impl Origin {
    /// Starts a listener for each host, on ports that the system chooses.
    pub(crate) fn start(content: &Arc<Content>) -> io::Result<Self> {
        let asked = Mutex::new(vec![Asked::default(); content.files.len()]);
        let desk = Arc::new(Desk { content: Arc::clone(content), asked, progress: watch::Sender::default() });
        let late_until = Instant::now() + content.scale.down;
        let (mut hosts, mut servers) = (Vec::new(), JoinSet::new());
        for (host, temper) in HOSTS {
            let socket = TcpSocket::new_v4()?;
            socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
            hosts.push((host.to_owned(), socket.local_addr()?));
            let desk = Arc::clone(&desk);
            servers.spawn(async move {
                if temper == Temper::Late {
                    // A socket that is bound and does not listen refuses connections.
                    tokio::time::sleep_until(late_until).await;
                }
                if let Ok(listener) = socket.listen(1024) {
                    serve(listener, host, desk).await;
                }
            });
        }
        Ok(Self { hosts, desk, late_until, _servers: servers })
    }

    /// How far the client has come, as it changes.
    pub(crate) fn progress(&self) -> watch::Receiver<Progress> {
        self.desk.progress.subscribe()
    }

    /// Bodies that were begun beyond the first of each file.
    pub(crate) fn fetched_again(&self) -> usize {
        self.desk.asked().iter().map(|asked| asked.bodies.saturating_sub(1)).sum()
    }

    /// What a stalled client waits for: the hosts that still have files for it, and how they behave.
    pub(crate) fn waits(&self) -> String {
        let mut left = [0; HOSTS.len()];
        for (number, _) in self.desk.asked().iter().enumerate().filter(|(_, asked)| !asked.whole) {
            left[number % HOSTS.len()] += 1;
        }
        let down = self.late_until.saturating_duration_since(Instant::now());
        let some = HOSTS.into_iter().zip(left).filter(|(_, files)| *files > 0);
        let told = some.map(|((host, temper), files)| match temper {
            Temper::Late if !down.is_zero() => {
                format!("{host} refuses connections for {:.1} s more", down.as_secs_f32())
            }
            Temper::Late => format!("{host} is up again, {files} to go"),
            Temper::Busy(code) => format!("{host} answers {} and \"in 1 s\", {files} to go", code.as_u16()),
            Temper::Slow => format!("{host} sends drop by drop, {files} to go"),
            Temper::Plain => format!("{host}, {files} to go"),
        });
        told.collect::<Vec<_>>().join("; ")
    }
}

impl Desk {
    fn asked(&self) -> MutexGuard<'_, Vec<Asked>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first `end` bytes of a file have been sent.
    fn sent(&self, number: usize, end: u64) {
        let mut asked = self.asked();
        let Some(asked) = asked.get_mut(number) else { return };
        let new = end.saturating_sub(asked.sent);
        asked.sent += new;
        let whole = end == self.content.files[number].content.len() as u64;
        let files = usize::from(whole && !asked.whole);
        asked.whole |= whole;
        self.progress.send_if_modified(|progress| {
            progress.bytes += new;
            progress.files += files;
            new > 0 || files > 0
        });
    }
}

async fn serve(listener: TcpListener, host: &'static str, desk: Arc<Desk>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => {
                let Ok((stream, _)) = accepted else { continue };
                let desk = Arc::clone(&desk);
                connections.spawn(async move {
                    let answer = service_fn(move |request| {
                        let response = respond(&request, host, &desk);
                        async move { Ok::<_, Infallible>(response) }
                    });
                    // A client that hangs up, or is killed, is no error here.
                    let _hung_up = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
                });
            }
        }
    }
}

type Answer = Response<BoxBody<Bytes, Infallible>>;

fn respond(request: &Request<Incoming>, host: &str, desk: &Arc<Desk>) -> Answer {
    let is_asked_for = |file: &Served| file.url.host_str() == Some(host) && file.url.path() == request.uri().path();
    let Some(number) = desk.content.files.iter().position(is_asked_for) else {
        return status(StatusCode::NOT_FOUND);
    };
    let file = &desk.content.files[number];
    let is_fourth = (number / HOSTS.len()).is_multiple_of(4);
    let (_, temper) = HOSTS[number % HOSTS.len()];
    if let (Temper::Busy(code), true) = (temper, is_fourth)
        && !std::mem::replace(&mut desk.asked()[number].put_off, true)
    {
        let mut response = status(code);
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        return response;
    }
    let etag = format!("\"{number}\"");
    let says = |name| request.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    if says(header::IF_NONE_MATCH) == Some(&etag) {
        return status(StatusCode::NOT_MODIFIED);
    }
    let size = file.content.len();
    let start = says(header::RANGE)
        .filter(|_| says(header::IF_RANGE).is_none_or(|known| known == etag))
        .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok())
        .filter(|start| *start < size);
    desk.asked()[number].bodies += 1;
    let drip = (temper == Temper::Slow && is_fourth).then_some(desk.content.scale.drip);
    let body = Sending::new(Arc::clone(desk), number, start.unwrap_or(0), drip);
    let mut response = Response::new(body.boxed());
    let mut tell = |name, value: String| {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(name, value);
        }
    };
    tell(header::ETAG, etag);
    tell(header::ACCEPT_RANGES, "bytes".to_owned());
    if let Some(start) = start {
        tell(header::CONTENT_RANGE, format!("bytes {start}-{}/{size}", size - 1));
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    response
}

fn status(code: StatusCode) -> Answer {
    let mut response = Response::new(Empty::new().boxed());
    *response.status_mut() = code;
    response
}

/// A body in pieces, with a pause before each if it drips.
struct Sending {
    desk: Arc<Desk>,
    number: usize,
    left: Bytes,
    end: u64,
    piece: usize,
    pause: Option<(Duration, Pin<Box<Sleep>>)>,
}

impl Sending {
    fn new(desk: Arc<Desk>, number: usize, start: usize, drip: Option<Duration>) -> Self {
        let left = desk.content.files[number].content.slice(start..);
        if left.is_empty() {
            desk.sent(number, 0);
        }
        let piece = if drip.is_some() { left.len().div_ceil(DRIPS).max(1) } else { PIECE };
        let pause = drip.map(|drip| (drip, Box::pin(tokio::time::sleep(drip))));
        Self { desk, number, left, end: start as u64, piece, pause }
    }
}

impl Body for Sending {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left.is_empty() {
            return Poll::Ready(None);
        }
        if let Some((drip, pause)) = &mut self.pause {
            ready!(pause.as_mut().poll(cx));
            pause.as_mut().reset(Instant::now() + *drip);
        }
        let length = self.piece.min(self.left.len());
        let piece = self.left.split_to(length);
        self.end += length as u64;
        self.desk.sent(self.number, self.end);
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.left.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left.len() as u64)
    }
}
