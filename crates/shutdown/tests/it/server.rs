//! Servers that are told to stop, with a real connection in each possible state.
#![expect(clippy::disallowed_methods, reason = "no write of these tests is ever dropped")]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::get;
use bytes::Bytes;
use cancel_safe_shutdown::axum::Cancelled;
use cancel_safe_shutdown::{Application, Report, StragglerState, WorkerContext};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

const MINUTE: Duration = Duration::from_secs(60);
/// Longer than any drain that works.
const NEVER: Duration = Duration::from_secs(30);
/// The time of the server's phase when something is in its way.
const SOON: Duration = Duration::from_millis(300);

/// What the handlers and the tests share.
#[derive(Clone, Default)]
struct Shared(Arc<Things>);

#[derive(Default)]
struct Things {
    db_closed: AtomicBool,
    /// Handlers that were dropped before their end, and how many of these after the database was closed.
    dropped: AtomicUsize,
    dropped_too_late: AtomicUsize,
    arrived: Notify,
    gate: Notify,
    token: Mutex<Option<CancellationToken>>,
    upgraded_ended: Notify,
}

/// Counts a handler that is dropped before its end.
struct Witness(Shared);

impl Drop for Witness {
    fn drop(&mut self) {
        let things = &self.0.0;
        if things.db_closed.load(Ordering::SeqCst) {
            things.dropped_too_late.fetch_add(1, Ordering::SeqCst);
        }
        things.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

fn router(shared: Shared) -> Router {
    Router::new()
        .route("/", get(async || "hi"))
        .route("/peer", get(async |ConnectInfo(peer): ConnectInfo<SocketAddr>| peer.to_string()))
        .route("/gated", get(gated))
        .route("/stuck", get(stuck))
        .route("/panics", get(async || -> () { panic!("in a handler") }))
        .route("/events", get(events))
        .route("/orderly-events", get(orderly_events))
        .route("/sized", get(sized))
        .route("/upgrade", get(upgrade))
        .with_state(shared)
}

async fn gated(State(Shared(things)): State<Shared>, Cancelled(token): Cancelled) -> String {
    *things.token.lock().unwrap() = Some(token);
    things.arrived.notify_one();
    things.gate.notified().await;
    format!("database closed: {}", things.db_closed.load(Ordering::SeqCst))
}

async fn stuck(State(shared): State<Shared>, Cancelled(token): Cancelled) {
    let _witness = Witness(shared.clone());
    *shared.0.token.lock().unwrap() = Some(token);
    shared.0.arrived.notify_one();
    std::future::pending().await
}

/// A stream whose length is announced.
async fn sized(State(Shared(things)): State<Shared>, Cancelled(token): Cancelled) -> Response {
    *things.token.lock().unwrap() = Some(token);
    let parts = futures_util::stream::iter(["he", "llo"].map(|part| Ok::<_, Infallible>(Bytes::from(part))));
    Response::builder().header("content-length", 5).body(Body::from_stream(parts)).unwrap()
}

/// Events without an end.
async fn events() -> Body {
    let ticks = futures_util::stream::unfold((), |()| async {
        tokio::time::sleep(Duration::from_millis(5)).await;
        Some((Ok::<_, Infallible>(Bytes::from("data: tick\n\n")), ()))
    });
    Body::from_stream(ticks)
}

/// Events that end when the server is told to stop.
async fn orderly_events(Cancelled(token): Cancelled) -> Body {
    let ticks = futures_util::stream::unfold(token, |token| async {
        let tick = token.run_until_cancelled(tokio::time::sleep(Duration::from_millis(5))).await;
        tick.map(|()| (Ok::<_, Infallible>(Bytes::from("data: tick\n\n")), token))
    });
    Body::from_stream(ticks)
}

/// An echo in its own task, like axum's web sockets.
async fn upgrade(State(shared): State<Shared>, request: Request) -> Response {
    tokio::spawn(async move {
        let upgraded = hyper::upgrade::on(request).await.unwrap();
        let mut stream = TokioIo::new(upgraded);
        let mut byte = [0];
        while matches!(stream.read(&mut byte).await, Ok(1)) {
            stream.write_all(&byte).await.unwrap();
        }
        shared.0.upgraded_ended.notify_one();
    });
    let response = Response::builder().status(StatusCode::SWITCHING_PROTOCOLS);
    response.header("connection", "upgrade").header("upgrade", "echo").body(Body::empty()).unwrap()
}

/// A server in the last phase of an application, behind a database in the first.
struct Site {
    addr: SocketAddr,
    stop: CancellationToken,
    running: JoinHandle<Report>,
    shared: Shared,
}

impl Site {
    /// `limit` is the time of the server's phase.
    async fn open(limit: Duration) -> Self {
        let shared = Shared::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let closing = shared.clone();
        let db = |cx: WorkerContext| async move {
            cx.cancelled().await;
            closing.0.db_closed.store(true, Ordering::SeqCst);
        };
        let router = router(shared.clone());
        let http = |cx: WorkerContext| async move { cancel_safe_shutdown::axum::serve(listener, router, cx).await };
        let app = Application::new("site")
            .shutdown_timeout(MINUTE)
            .phase("storage", |phase| phase.worker_once("db", db))
            .phase("ingress", |phase| phase.worker_once("http", http).timeout(limit).ready_within(MINUTE));
        let stop = app.shutdown_handle();
        let running = tokio::spawn(async move { app.serve().await.unwrap() });
        Self { addr, stop, running, shared }
    }

    async fn connect(&self) -> Client {
        Client::new(TcpStream::connect(self.addr).await.unwrap())
    }

    /// Waits until the server has noticed the stop: from then on it accepts no connection.
    async fn refuses(&self) {
        let refused = async {
            while TcpStream::connect(self.addr).await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        timeout(MINUTE, refused).await.expect("it still listens");
    }

    async fn report(self) -> Report {
        timeout(MINUTE, self.running).await.expect("it does not end").unwrap()
    }

    fn token(&self) -> CancellationToken {
        self.shared.0.token.lock().unwrap().clone().unwrap()
    }
}

/// HTTP/1 by hand.
struct Client {
    stream: TcpStream,
    name: String,
}

impl Client {
    fn new(stream: TcpStream) -> Self {
        let name = stream.local_addr().unwrap().to_string();
        Self { stream, name }
    }

    async fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.unwrap();
    }

    async fn get(&mut self, path: &str) {
        self.send(&format!("GET {path} HTTP/1.1\r\nhost: here\r\n\r\n")).await;
    }

    /// Reads until `end` has come.
    async fn read_until(&mut self, end: &str) -> String {
        let mut text = String::new();
        while !text.contains(end) {
            let mut bytes = [0; 1024];
            let read = timeout(MINUTE, self.stream.read(&mut bytes)).await.expect("nothing comes").unwrap();
            assert!(read > 0, "it ended after {text}");
            text.push_str(std::str::from_utf8(&bytes[..read]).unwrap());
        }
        text
    }

    /// Reads to the end of the connection. A cut connection may end with a reset.
    async fn read_to_end(&mut self) -> String {
        let mut bytes = Vec::new();
        drop(timeout(MINUTE, self.stream.read_to_end(&mut bytes)).await.expect("it is not closed"));
        String::from_utf8(bytes).unwrap()
    }
}

/// Asserts that exactly this connection was in the way, parked, and what it was doing.
fn assert_straggler(report: &Report, name: &str, mark: Option<&str>) {
    assert_eq!(report.exit_code(), 70, "{report}");
    let mut tasks = report.stragglers().filter(|task| !task.is_worker);
    let found = tasks.find(|task| task.name == name).unwrap_or_else(|| panic!("no {name}: {report}"));
    assert_eq!(found.last_mark.as_deref(), mark, "{report}");
    assert_eq!(found.straggling, Some(StragglerState::ParkedAtAwait));
}

#[tokio::test]
async fn an_idle_connection_is_closed_at_once() {
    let site = Site::open(NEVER).await;
    let mut client = site.connect().await;
    client.get("/").await;
    assert!(client.read_until("hi").await.starts_with("HTTP/1.1 200"));
    site.stop.cancel();
    assert_eq!(client.read_to_end().await, "");
    let report = site.report().await;
    assert!(report.is_clean() && report.elapsed() < NEVER / 2, "{report}");
}

#[tokio::test]
async fn a_connection_without_a_request_is_closed_at_once() {
    let site = Site::open(NEVER).await;
    let mut served = site.connect().await;
    let mut client = site.connect().await;
    // Served after it, so that the first has been accepted too.
    let mut last = site.connect().await;
    for client in [&mut served, &mut last] {
        client.get("/peer").await;
        assert!(client.read_until("127.0.0.1").await.ends_with(&client.name));
    }
    site.stop.cancel();
    assert_eq!(client.read_to_end().await, "");
    let report = site.report().await;
    assert!(report.is_clean() && report.elapsed() < NEVER / 2, "{report}");
}

#[tokio::test]
async fn a_request_in_flight_is_answered_before_the_database_closes() {
    let site = Site::open(NEVER).await;
    let mut client = site.connect().await;
    client.get("/gated").await;
    site.shared.0.arrived.notified().await;
    site.stop.cancel();
    site.refuses().await;
    // The handler was told to stop, and continues.
    timeout(MINUTE, site.token().cancelled()).await.expect("nobody told the handler");
    site.shared.0.gate.notify_one();
    let response = client.read_to_end().await;
    assert!(response.starts_with("HTTP/1.1 200") && response.ends_with("database closed: false"), "{response}");
    let report = site.report().await;
    assert!(report.is_clean() && report.elapsed() < NEVER / 2, "{report}");
}

#[tokio::test]
async fn a_request_that_is_not_answered_is_dropped_at_the_deadline_before_the_database_closes() {
    let site = Site::open(SOON).await;
    let mut client = site.connect().await;
    client.get("/stuck?password=secret").await;
    site.shared.0.arrived.notified().await;
    site.stop.cancel();
    assert_eq!(client.read_to_end().await, "");
    let shared = site.shared.clone();
    let report = site.report().await;
    assert_straggler(&report, &client.name, Some("GET /stuck"));
    assert!(report.elapsed() >= SOON, "{report}");
    assert_eq!(shared.0.dropped.load(Ordering::SeqCst), 1);
    assert_eq!(shared.0.dropped_too_late.load(Ordering::SeqCst), 0, "a handler ran beside a closed database");
}

#[tokio::test]
async fn a_half_sent_request_is_closed_at_the_deadline_and_named() {
    let site = Site::open(SOON).await;
    let mut client = site.connect().await;
    client.send("GET / HTTP/1.1\r\nho").await;
    let mut other = site.connect().await;
    other.get("/").await;
    other.read_until("hi").await;
    site.stop.cancel();
    // There may even be an answer, 408 or 400, but not as if it had been a request.
    assert!(!client.read_to_end().await.contains("200"));
    let report = site.report().await;
    assert_straggler(&report, &client.name, Some("before its first request"));
    assert_eq!(report.stragglers().filter(|task| !task.is_worker).count(), 1, "{report}");
}

#[tokio::test]
async fn a_half_sent_request_that_is_completed_in_time_is_answered() {
    let site = Site::open(NEVER).await;
    let mut client = site.connect().await;
    client.get("/").await;
    client.read_until("hi").await;
    client.send("GET /pe").await;
    let mut other = site.connect().await;
    other.get("/").await;
    other.read_until("hi").await;
    site.stop.cancel();
    site.refuses().await;
    client.send("er HTTP/1.1\r\nhost: here\r\n\r\n").await;
    let response = client.read_to_end().await;
    // A keep-alive connection on which the next request has not quite begun may be closed instead; both are right.
    assert!(response.is_empty() || response.starts_with("HTTP/1.1 200"), "{response}");
    assert!(site.report().await.is_clean());
}

#[tokio::test]
async fn an_event_stream_is_closed_at_the_deadline_and_named() {
    let site = Site::open(SOON).await;
    let mut client = site.connect().await;
    client.get("/events").await;
    client.read_until("tick").await;
    site.stop.cancel();
    assert!(client.read_to_end().await.contains("tick"), "it was cut at once");
    let report = site.report().await;
    assert_straggler(&report, &client.name, Some("GET /events"));
}

#[tokio::test]
async fn an_event_stream_that_asks_its_token_ends_by_itself() {
    let site = Site::open(NEVER).await;
    let mut client = site.connect().await;
    client.get("/orderly-events").await;
    client.read_until("tick").await;
    site.stop.cancel();
    assert!(client.read_to_end().await.ends_with("0\r\n\r\n"), "the body has no end");
    let report = site.report().await;
    assert!(report.is_clean() && report.elapsed() < NEVER / 2, "{report}");
}

#[tokio::test]
async fn an_upgraded_connection_is_closed_at_the_deadline_and_named() {
    let site = Site::open(SOON).await;
    let mut client = site.connect().await;
    client.send("GET /upgrade HTTP/1.1\r\nhost: here\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n").await;
    client.read_until("\r\n\r\n").await;
    client.send("a").await;
    client.read_until("a").await;
    site.stop.cancel();
    site.refuses().await;
    // It still works in its grace.
    client.send("b").await;
    client.read_until("b").await;
    assert_eq!(client.read_to_end().await, "");
    timeout(MINUTE, site.shared.0.upgraded_ended.notified()).await.expect("its task waits for ever");
    let report = site.report().await;
    assert_straggler(&report, &client.name, Some("upgraded by GET /upgrade"));
}

#[tokio::test]
async fn an_upgraded_connection_that_has_ended_is_in_nobodys_way() {
    let site = Site::open(NEVER).await;
    let mut client = site.connect().await;
    client.send("GET /upgrade HTTP/1.1\r\nhost: here\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n").await;
    client.read_until("\r\n\r\n").await;
    site.stop.cancel();
    site.refuses().await;
    drop(client);
    let report = site.report().await;
    assert!(report.is_clean() && report.elapsed() < NEVER / 2, "{report}");
}

/// A client of HTTP/2, and its address.
async fn connect_h2(addr: SocketAddr) -> (http2::SendRequest<Empty<Bytes>>, JoinHandle<()>, String) {
    let stream = TcpStream::connect(addr).await.unwrap();
    let name = stream.local_addr().unwrap().to_string();
    let (send, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    (send, tokio::spawn(async move { drop(connection.await) }), name)
}

fn request_h2(path: &str) -> hyper::Request<Empty<Bytes>> {
    hyper::Request::get(format!("http://here{path}")).body(Empty::new()).unwrap()
}

#[tokio::test]
async fn an_idle_connection_of_http_2_is_closed_at_once() {
    let site = Site::open(NEVER).await;
    let (mut send, connection, _) = connect_h2(site.addr).await;
    let response = send.send_request(request_h2("/")).await.unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "hi");
    site.stop.cancel();
    timeout(MINUTE, connection).await.expect("it is not closed").unwrap();
    let report = site.report().await;
    assert!(report.is_clean() && report.elapsed() < NEVER / 2, "{report}");
}

#[tokio::test]
async fn a_stream_of_http_2_in_flight_is_answered_before_the_database_closes() {
    let site = Site::open(NEVER).await;
    let (mut send, _connection, _) = connect_h2(site.addr).await;
    let answer = tokio::spawn(send.send_request(request_h2("/gated")));
    site.shared.0.arrived.notified().await;
    site.stop.cancel();
    site.refuses().await;
    site.shared.0.gate.notify_one();
    let response = timeout(MINUTE, answer).await.unwrap().unwrap().unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "database closed: false");
    let report = site.report().await;
    assert!(report.is_clean() && report.elapsed() < NEVER / 2, "{report}");
}

#[tokio::test]
async fn a_stream_of_http_2_that_is_not_answered_is_dropped_with_its_phase_and_named() {
    let site = Site::open(SOON).await;
    let (mut send, connection, name) = connect_h2(site.addr).await;
    let answer = tokio::spawn(send.send_request(request_h2("/stuck")));
    site.shared.0.arrived.notified().await;
    site.stop.cancel();
    assert!(timeout(MINUTE, answer).await.unwrap().unwrap().is_err());
    timeout(MINUTE, connection).await.expect("it is not closed").unwrap();
    let shared = site.shared.clone();
    let report = site.report().await;
    assert_straggler(&report, "GET /stuck", None);
    let stream = report.stragglers().find(|task| task.name == "GET /stuck").unwrap();
    assert!(stream.group.ends_with(&name), "{report}");
    assert_eq!(shared.0.dropped.load(Ordering::SeqCst), 1);
    assert_eq!(shared.0.dropped_too_late.load(Ordering::SeqCst), 0, "a handler ran beside a closed database");
}

#[tokio::test]
async fn a_stream_of_http_2_whose_client_gives_up_is_dropped() {
    let site = Site::open(NEVER).await;
    let (mut send, _connection, _) = connect_h2(site.addr).await;
    let answer = tokio::spawn(send.send_request(request_h2("/stuck")));
    site.shared.0.arrived.notified().await;
    let token = site.token();
    assert!(!token.is_cancelled());
    answer.abort();
    timeout(MINUTE, token.cancelled()).await.expect("nobody told the handler");
    site.stop.cancel();
    let shared = site.shared.clone();
    assert!(site.report().await.is_clean());
    assert_eq!(shared.0.dropped.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_handler_is_told_when_its_client_goes_away() {
    let site = Site::open(NEVER).await;
    let mut client = site.connect().await;
    client.get("/stuck").await;
    site.shared.0.arrived.notified().await;
    let token = site.token();
    assert!(!token.is_cancelled());
    drop(client);
    timeout(MINUTE, token.cancelled()).await.expect("nobody told the handler");
    site.stop.cancel();
    assert!(site.report().await.is_clean());
}

#[tokio::test]
async fn a_response_that_has_been_sent_leaves_its_token_alone_until_the_stop() {
    let site = Site::open(NEVER).await;
    let mut client = site.connect().await;
    client.get("/gated").await;
    site.shared.0.arrived.notified().await;
    site.shared.0.gate.notify_one();
    client.read_until("closed: false").await;
    drop(client);
    let token = site.token();
    // The connection has ended by the time the next one, on one thread, is served.
    let mut other = site.connect().await;
    other.get("/").await;
    other.read_until("hi").await;
    assert!(!token.is_cancelled());
    site.stop.cancel();
    site.refuses().await;
    assert!(token.is_cancelled());
    assert!(site.report().await.is_clean());
}

#[tokio::test]
async fn a_handler_that_panics_ends_its_connection_and_the_exit_code_says_so() {
    let site = Site::open(NEVER).await;
    let mut client = site.connect().await;
    client.get("/panics").await;
    assert_eq!(client.read_to_end().await, "");
    let mut other = site.connect().await;
    other.get("/").await;
    other.read_until("hi").await;
    site.stop.cancel();
    let report = site.report().await;
    assert_eq!(report.exit_code(), 101, "{report}");
}

#[tokio::test]
async fn dropping_the_server_closes_what_it_has_and_its_handlers() {
    let shared = Shared::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let router = router(shared.clone());
    let (hang_up, hung_up) = oneshot::channel::<()>();
    let worker = |cx: WorkerContext| async move {
        tokio::select! {
            served = cancel_safe_shutdown::tower::serve(listener, router, cx.clone()) => served.unwrap(),
            _ = hung_up => {}
        }
        cx.cancelled().await;
    };
    let app = Application::new("site").worker_once("http", worker);
    let stop = app.shutdown_handle();
    let running = tokio::spawn(app.serve());
    let mut stuck = Client::new(TcpStream::connect(addr).await.unwrap());
    stuck.get("/stuck").await;
    shared.0.arrived.notified().await;
    let (mut send, connection, _) = connect_h2(addr).await;
    let answer = tokio::spawn(send.send_request(request_h2("/stuck")));
    shared.0.arrived.notified().await;
    drop(hang_up);
    assert_eq!(stuck.read_to_end().await, "");
    assert!(timeout(MINUTE, answer).await.unwrap().unwrap().is_err());
    timeout(MINUTE, connection).await.expect("it is not closed").unwrap();
    stop.cancel();
    assert!(timeout(MINUTE, running).await.unwrap().unwrap().unwrap().is_clean());
    assert_eq!(shared.0.dropped.load(Ordering::SeqCst), 2);
}

/// What a load balancer sees: the server still answers, and says that it should get no work.
#[tokio::test]
async fn a_probe_is_told_503_before_and_from_the_first_moment_of_a_stop_while_the_server_still_answers() {
    let (open, opened) = oneshot::channel::<()>();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let app = Application::new("site").shutdown_timeout(MINUTE).drain_delay(NEVER);
    let router = Router::new()
        .route("/", get(async || "hi"))
        .route("/readyz", cancel_safe_shutdown::axum::readiness(app.readiness()));
    let slow = |cx: WorkerContext| async move {
        opened.await.unwrap();
        cx.ready();
        cx.cancelled().await;
    };
    let http = |cx: WorkerContext| async move { cancel_safe_shutdown::axum::serve(listener, router, cx).await };
    let app = app
        .phase("ingress", |phase| phase.worker_once("http", http))
        .phase("cache", |phase| phase.worker_once("slow", slow).ready_within(MINUTE));
    let (mut readiness, stop) = (app.readiness(), app.shutdown_handle());
    let running = tokio::spawn(app.serve());

    let mut client = Client::new(TcpStream::connect(addr).await.unwrap());
    client.get("/readyz").await;
    assert!(client.read_until("starting").await.starts_with("HTTP/1.1 503"));
    open.send(()).unwrap();
    readiness.wait_for(|readiness| readiness.is_ready()).await.unwrap();
    client.get("/readyz").await;
    let response = client.read_until("\r\n\r\nready").await;
    assert!(response.starts_with("HTTP/1.1 200") && response.contains("cache-control: no-store"), "{response}");
    stop.cancel();
    readiness.wait_for(|readiness| !readiness.is_ready()).await.unwrap();
    client.get("/readyz").await;
    assert!(client.read_until("stopping").await.starts_with("HTTP/1.1 503"));
    // Also to new clients, as long as the delay runs.
    let mut late = Client::new(TcpStream::connect(addr).await.unwrap());
    late.get("/").await;
    assert!(late.read_until("hi").await.starts_with("HTTP/1.1 200"));
    drop((client, late));
    running.abort();
}

/// The broken twin: the checks above must catch what axum's own server does.
#[tokio::test]
async fn a_connection_that_nobody_owns_is_caught() {
    let shared = Shared::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let router = router(shared.clone()).into_make_service_with_connect_info::<SocketAddr>();
    let layered = |cx: WorkerContext| async move {
        let stop = cx.cancelled_owned();
        axum::serve(listener, router).with_graceful_shutdown(stop).await
    };
    let closing = shared.clone();
    let db = |cx: WorkerContext| async move {
        cx.cancelled().await;
        closing.0.db_closed.store(true, Ordering::SeqCst);
    };
    let app = Application::new("site")
        .phase("storage", |phase| phase.worker_once("db", db))
        .phase("ingress", |phase| phase.worker_once("http", layered).timeout(SOON));
    let stop = app.shutdown_handle();
    let running = tokio::spawn(app.serve());
    let mut client = Client::new(TcpStream::connect(addr).await.unwrap());
    client.get("/events").await;
    client.read_until("tick").await;
    stop.cancel();
    let report = timeout(MINUTE, running).await.unwrap().unwrap().unwrap();
    client.read_until("tick").await;
    assert!(shared.0.db_closed.load(Ordering::SeqCst) && !report.stragglers().any(|task| task.name == client.name));
}

#[tokio::test]
#[expect(clippy::disallowed_methods, reason = "nobody drops the client halfway")]
async fn a_response_whose_length_is_announced_leaves_its_token_alone() {
    let site = Site::open(NEVER).await;
    for (method, end) in [("GET", "hello"), ("HEAD", "\r\n\r\n")] {
        let mut stream = TcpStream::connect(site.addr).await.unwrap();
        stream.write_all(format!("{method} /sized HTTP/1.1\r\nhost: here\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        while !answer.ends_with(end) {
            let mut piece = [0; 1_024];
            let size = timeout(MINUTE, stream.read(&mut piece)).await.unwrap().unwrap();
            assert_ne!(size, 0, "{answer}");
            answer += std::str::from_utf8(&piece[..size]).unwrap();
        }
        let token = site.shared.0.token.lock().unwrap().take().unwrap();
        assert!(timeout(Duration::from_millis(50), token.cancelled()).await.is_err(), "{method}");
    }
    site.stop.cancel();
    let report = site.report().await;
    assert!(report.is_clean() && report.elapsed() < NEVER / 2, "{report}");
}

/// One frame of HTTP/2.
struct Frame {
    kind: u8,
    stream: u32,
}

/// A client that has made no request yet, and answers no ping: its connection goes on until it has.
#[expect(clippy::disallowed_methods, reason = "nobody drops the client halfway")]
async fn raw_h2(addr: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    stream
}

#[expect(clippy::disallowed_methods, reason = "nobody drops the client halfway")]
async fn frame(stream: &mut TcpStream) -> Frame {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.unwrap();
    let [_, high, low, kind, _, id @ ..] = head;
    let mut body = vec![0; usize::from(u16::from_be_bytes([high, low]))];
    stream.read_exact(&mut body).await.unwrap();
    Frame { kind, stream: u32::from_be_bytes(id) }
}

#[tokio::test]
#[expect(clippy::disallowed_methods, reason = "nobody drops the client halfway")]
async fn a_first_request_that_crosses_the_stop_is_answered() {
    const HEADERS: u8 = 1;
    const RST_STREAM: u8 = 3;
    const GOAWAY: u8 = 7;
    let site = Site::open(NEVER).await;
    let mut stream = raw_h2(site.addr).await;
    // The settings of the server: the connection is up.
    frame(&mut stream).await;
    site.stop.cancel();
    while frame(&mut stream).await.kind != GOAWAY {}
    // GET / in HPACK, as the first stream, and its last frame.
    stream.write_all(b"\0\0\x03\x01\x05\0\0\0\x01\x82\x84\x86").await.unwrap();
    let answer = async {
        loop {
            let found = frame(&mut stream).await;
            if found.stream == 1 && [HEADERS, RST_STREAM].contains(&found.kind) {
                break found.kind;
            }
        }
    };
    assert_eq!(timeout(MINUTE, answer).await.unwrap(), HEADERS);
    drop(stream);
    let report = site.report().await;
    assert!(report.is_clean() && report.elapsed() < NEVER / 2, "{report}");
}
