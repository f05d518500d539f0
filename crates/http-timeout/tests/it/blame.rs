//! Who is to blame: the origin is never charged for a delay of our queue, our producer, our pool or our kernel.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use cancel_safe_http_timeout::{Attempts, BreakerConfig, Limit, Phase, RequestError, Retry, State, TimeoutClient};
use futures_util::{FutureExt as _, StreamExt as _, future::join_all, stream};
use http_body_util::BodyExt as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream},
};

use crate::server::{Server, drip, reply};

const LONG: Duration = Duration::from_secs(30);

fn trips_at_once() -> BreakerConfig {
    BreakerConfig::builder().consecutive_failures(1).open_for(LONG, LONG).build().unwrap()
}

fn state(client: &TimeoutClient, url: &str) -> State {
    client.breaker(url).unwrap().state()
}

#[tokio::test]
async fn the_time_in_our_queue_is_not_the_origin_s() {
    let server = Server::start(|_, _| async {
        tokio::time::sleep(Duration::from_millis(120)).await;
        reply(200, "in time")
    });
    let client = TimeoutClient::builder().concurrency(1).breaker(trips_at_once()).build().unwrap();
    let url = server.url("/");
    // The first has all of its time and more; the others have what the queue leaves them.
    let calls = (0..6).map(|n| {
        let timeout = if n == 0 { LONG } else { Duration::from_millis(200) };
        client.get(&url).timeout(timeout).send()
    });
    let late = join_all(calls).await.into_iter().filter(Result::is_err).count();
    assert!(late > 0, "nobody was late, so nothing was shown");
    assert_eq!(state(&client, &url), State::Closed);
}

#[tokio::test]
async fn a_deadline_that_the_origin_had_to_itself_is_its_failure() {
    let server = Server::start(|_, _| std::future::pending());
    let client = TimeoutClient::builder().timeout(Duration::from_millis(100)).breaker(trips_at_once()).build().unwrap();
    assert!(client.get(server.url("/")).send().await.unwrap_err().is_timeout());
    assert_eq!(state(&client, &server.url("/")), State::Open);
}

#[tokio::test]
async fn a_producer_that_fails_or_is_slow_is_not_the_origin_s_fault() {
    let server = Server::start(|request, _| async move {
        drop(request.into_body().collect().await);
        reply(200, "taken")
    });
    let url = server.url("/");
    let client =
        TimeoutClient::builder().attempt_timeout(Duration::from_secs(1)).breaker(trips_at_once()).build().unwrap();

    let failing = stream::iter([Ok("a"), Err(io::Error::other("our disk"))]);
    let error = client.put(&url).body(reqwest::Body::wrap_stream(failing)).send().await.unwrap_err();
    assert!(!error.is_timeout(), "{error:?}");

    let slow = stream::once(async { Ok::<_, io::Error>("a") }).chain(stream::pending());
    let error = client.put(&url).body(reqwest::Body::wrap_stream(slow)).send().await.unwrap_err();
    assert!(error.is_timeout(), "{error:?}");
    assert_eq!(state(&client, &url), State::Closed);
}

/// A server that silently closes each connection some time after the answer, so that the client notices only when it
/// uses the connection again. It answers `answers` requests on each connection, and reads one more.
fn closes_behind(answers: usize) -> (String, Arc<AtomicUsize>) {
    closes_after(answers, Duration::ZERO)
}

/// The same, but it closes `pause` after it has read that last one.
fn closes_after(answers: usize, pause: Duration) -> (String, Arc<AtomicUsize>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let requests = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&requests);
    tokio::spawn(async move {
        let listener = TcpListener::from_std(listener).unwrap();
        while let Ok((mut socket, _)) = listener.accept().await {
            let seen = Arc::clone(&seen);
            tokio::spawn(async move {
                for _ in 0..answers {
                    if !takes_request(&mut socket, &seen).await {
                        return;
                    }
                    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
                    assert_eq!(socket.write(answer).await.unwrap(), answer.len());
                }
                takes_request(&mut socket, &seen).await;
                tokio::time::sleep(pause).await;
            });
        }
    });
    (url, requests)
}

async fn takes_request(socket: &mut TcpStream, seen: &AtomicUsize) -> bool {
    let took = socket.read(&mut [0; 4096]).await.is_ok_and(|bytes| bytes > 0);
    seen.fetch_add(usize::from(took), Ordering::SeqCst);
    took
}

#[tokio::test]
async fn a_stale_connection_costs_a_repeatable_call_nothing_and_the_origin_no_blame() {
    let (url, requests) = closes_behind(1);
    let client = TimeoutClient::builder().breaker(trips_at_once()).build().unwrap();
    for _ in 0..10 {
        let response = client.get(&url).send().await.unwrap();
        assert_eq!(response.extensions().get(), Some(&Attempts(1)));
        assert_eq!(response.text().await.unwrap(), "ok");
    }
    assert_eq!(state(&client, &url), State::Closed);
    // Every call but the first met a stale connection, once.
    assert_eq!(requests.load(Ordering::SeqCst), 10 + 9);
}

#[tokio::test]
async fn a_post_on_a_stale_connection_is_not_sent_twice_and_charged_to_nobody() {
    let (url, requests) = closes_behind(1);
    let client = TimeoutClient::builder().breaker(trips_at_once()).build().unwrap();
    assert_eq!(client.get(&url).send().await.unwrap().text().await.unwrap(), "ok");
    let error = client.post(&url).body("once").send().await.unwrap_err();
    assert!(matches!(error, RequestError::Network { .. }), "{error:?}");
    assert_eq!(requests.load(Ordering::SeqCst), 2);
    assert_eq!(state(&client, &url), State::Closed);
}

#[tokio::test]
async fn a_pooled_connection_that_is_closed_long_after_the_request_is_the_origin_s_fault() {
    // A connection that was stale shows it within a round trip.
    let (url, requests) = closes_after(1, Duration::from_secs(3));
    let client = TimeoutClient::builder().breaker(trips_at_once()).build().unwrap();
    assert_eq!(client.get(&url).send().await.unwrap().text().await.unwrap(), "ok");
    let error = client.get(&url).send().await.unwrap_err();
    assert!(matches!(error, RequestError::Network { .. }), "{error:?}");
    assert_eq!((requests.load(Ordering::SeqCst), state(&client, &url)), (2, State::Open));
}

#[tokio::test]
async fn a_fresh_connection_that_is_closed_without_an_answer_is_the_origin_s_fault() {
    let (url, requests) = closes_behind(0);
    let client = TimeoutClient::builder().breaker(trips_at_once()).build().unwrap();
    assert!(client.get(&url).send().await.is_err());
    assert_eq!((requests.load(Ordering::SeqCst), state(&client, &url)), (1, State::Open));
}

#[tokio::test]
async fn an_upload_that_the_kernel_hides_may_be_cut_but_is_never_charged() {
    let server = Server::start(|request, _| async move {
        let _unread = request;
        std::future::pending().await
    });
    let idle = Duration::from_millis(200);
    let client = TimeoutClient::builder().timeout(LONG).idle_timeout(idle).breaker(trips_at_once()).build().unwrap();
    let url = server.url("/");
    // The first is in the buffers as a whole, the second fills them up.
    for bytes in [256 << 10, 32 << 20] {
        let error = client.put(&url).body(vec![7; bytes]).send().await.unwrap_err();
        assert!(matches!(error, RequestError::Timeout { .. }), "{error:?}");
        assert_eq!(state(&client, &url), State::Closed, "{bytes} bytes");
    }
    // A body that fits into one write hides nothing.
    assert!(client.put(&url).body("small").send().await.is_err());
    assert_eq!(state(&client, &url), State::Open);
}

/// A client whose calls have this total time, and a server that answers at once and never ends its body.
fn endless(timeout: Duration) -> (TimeoutClient, Server) {
    let server = Server::start(|_, _| async { drip(1, 1, LONG) });
    (TimeoutClient::builder().timeout(timeout).breaker(trips_at_once()).build().unwrap(), server)
}

#[tokio::test]
async fn a_body_is_late_by_the_origin_s_fault_only_if_the_origin_had_the_time() {
    let whole = Duration::from_secs(2);
    let (client, server) = endless(whole);
    let url = server.url("/");
    let response = client.get(&url).send().await.unwrap();
    tokio::time::sleep(whole * 3 / 4).await;
    assert!(response.bytes().await.unwrap_err().is_timeout());
    assert_eq!(state(&client, &url), State::Closed, "its consumer was busy for most of the time");
    assert_eq!(client.breaker(&url).unwrap().metrics().cancelled, 1);

    // So long that seconds between the head and the first read do not matter. Only the deadline will come, so no
    // waiting is necessary.
    let (client, server) = endless(whole * 60);
    let response = client.get(server.url("/")).send().await.unwrap();
    tokio::time::pause();
    assert!(response.bytes().await.unwrap_err().is_timeout());
    assert_eq!(state(&client, &server.url("/")), State::Open, "it was waited for all the time");
}

#[tokio::test]
async fn a_body_that_was_there_in_time_is_nobody_s_fault_when_it_is_read_too_late() {
    let server = Server::start(|_, _| async { reply(200, vec![7; 256 * 1024]) });
    let whole = Duration::from_secs(2);
    let client = TimeoutClient::builder().timeout(whole).breaker(trips_at_once()).build().unwrap();
    let url = server.url("/");
    let mut response = client.get(&url).send().await.unwrap();
    assert!(response.chunk().await.unwrap().is_some());
    tokio::time::sleep(whole).await;
    assert!(response.chunk().await.unwrap_err().is_timeout());
    let metrics = client.breaker(&url).unwrap().metrics();
    assert_eq!((metrics.state, metrics.failures, client.metrics().in_flight), (State::Closed, 0, 0));
}

#[tokio::test]
async fn a_piece_that_nobody_took_is_no_silence_when_the_body_is_dropped() {
    let (next, pieces) = tokio::sync::mpsc::unbounded_channel::<&'static str>();
    let pieces = std::sync::Mutex::new(Some(pieces));
    let server = Server::start(move |_, _| {
        let pieces = pieces.lock().unwrap().take();
        async move {
            let Some(pieces) = pieces else { return reply(200, "whole") };
            let frames = stream::unfold(pieces, |mut pieces| async {
                Some((Ok(hyper::body::Frame::data(pieces.recv().await?.into())), pieces))
            });
            http::Response::new(http_body_util::BodyExt::boxed(http_body_util::StreamBody::new(frames)))
        }
    });
    let config = BreakerConfig::builder().consecutive_failures(1).late_after(Duration::from_millis(50));
    let client = TimeoutClient::builder().breaker(config.build().unwrap()).build().unwrap();
    let url = server.url("/");
    let mut response = client.get(&url).send().await.unwrap();
    next.send("first").unwrap();
    assert!(response.chunk().await.unwrap().is_some());
    // As in a `select!` whose other branch was quicker and is busy for a while.
    assert!(response.chunk().now_or_never().is_none());
    next.send("second").unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    for _ in 0..3 {
        // Whatever the server sent before these has come.
        assert_eq!(client.get(&url).send().await.unwrap().text().await.unwrap(), "whole");
    }
    drop(response);
    let metrics = client.breaker(&url).unwrap().metrics();
    assert_eq!((metrics.state, metrics.failures, metrics.cancelled), (State::Closed, 0, 0));
}

#[tokio::test]
async fn a_deadline_that_has_passed_sends_nothing_and_blames_nobody() {
    let server = Server::start(|_, _| async { reply(200, "warm") });
    let client = TimeoutClient::builder().breaker(trips_at_once()).retry(Retry::attempts(3)).build().unwrap();
    let url = server.url("/");
    assert_eq!(client.get(&url).send().await.unwrap().text().await.unwrap(), "warm");
    for _ in 0..10 {
        let error = client.get(&url).timeout(Duration::ZERO).send().await.unwrap_err();
        let RequestError::Timeout { limit: Limit::Total, attempts: 0, .. } = error else { panic!("{error:?}") };
    }
    // Anything that was sent would arrive before this.
    assert_eq!(client.get(&url).send().await.unwrap().text().await.unwrap(), "warm");
    assert_eq!((server.hits(), state(&client, &url)), (2, State::Closed));
}

#[tokio::test]
async fn a_producer_that_panics_is_not_the_origin_s_fault() {
    let server = Server::start(|request, _| async move {
        drop(request.into_body().collect().await);
        reply(200, "taken")
    });
    let client = TimeoutClient::builder().breaker(trips_at_once()).build().unwrap();
    let panics = stream::once(async { if true { panic!("on purpose") } else { Ok::<_, io::Error>("a") } });
    let error = client.put(server.url("/")).body(reqwest::Body::wrap_stream(panics)).send().await.unwrap_err();
    assert!(matches!(error, RequestError::Network(_)), "{error:?}");
    assert_eq!(state(&client, &server.url("/")), State::Closed);
}

#[tokio::test]
async fn a_producer_that_fails_behind_an_early_answer_is_not_the_origin_s_fault() {
    let server = Server::start(|request, _| async move {
        let _unread = request;
        drip(1, 1, LONG)
    });
    let client = TimeoutClient::builder().breaker(trips_at_once()).build().unwrap();
    let (fail, failure) = tokio::sync::oneshot::channel::<()>();
    let failing = stream::once(async { Ok("a") })
        .chain(stream::once(async { failure.await.map_err(|_| io::Error::other("our disk")).map(|()| "b") }));
    let request = client.put(server.url("/")).body(reqwest::Body::wrap_stream(failing));
    let response = request.send().await.unwrap();
    drop(fail);
    let error = RequestError::from(response.bytes().await.unwrap_err());
    assert!(matches!(error, RequestError::Network(_)), "{error:?}");
    assert_eq!(state(&client, &server.url("/")), State::Closed);
}

/// Fails like a machine without a free descriptor.
struct Exhausted;

impl reqwest::dns::Resolve for Exhausted {
    fn resolve(&self, _: reqwest::dns::Name) -> reqwest::dns::Resolving {
        Box::pin(async { Err(io::Error::from_raw_os_error(24).into()) })
    }
}

#[tokio::test]
async fn a_machine_without_a_port_or_a_descriptor_left_is_not_the_origin_s_fault() {
    let server = Server::start(|_, _| async { reply(200, "reached") });
    let without_port = TimeoutClient::builder().configure(|b| b.local_address(Some([192, 0, 2, 1].into())));
    let without_descriptor = TimeoutClient::builder().configure(|b| b.dns_resolver(Arc::new(Exhausted)));
    for (builder, url) in [(without_port, server.url("/")), (without_descriptor, "http://a.test/".to_owned())] {
        let retry = Retry::attempts(2).backoff(Duration::ZERO, Duration::ZERO);
        let client = builder.breaker(trips_at_once()).retry(retry).build().unwrap();
        let error = client.post(&url).body("unsent").send().await.unwrap_err();
        assert!(error.is_connect() && error.report().attempts == 2, "{error:?}");
        assert_eq!(state(&client, &url), State::Closed, "{error}");
    }
}

/// Reads `bytes` evenly over this time, and answers.
async fn slow_reader(bytes: usize, whole: Duration) -> String {
    let socket = TcpSocket::new_v4().unwrap();
    // A small window, as a real path to a slow peer has; loopback would hide megabytes.
    socket.set_recv_buffer_size(8 * 1024).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let (mut taken, mut buffer, begun) = (0, vec![0; 16 * 1024], tokio::time::Instant::now());
        while taken < bytes {
            taken += socket.read(&mut buffer).await.unwrap();
            tokio::time::sleep_until(begun + whole.mul_f64(taken as f64 / bytes as f64)).await;
        }
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        assert_eq!(socket.write(answer).await.unwrap(), answer.len());
    });
    url
}

#[tokio::test]
async fn an_upload_to_a_slow_reader_progresses_beyond_the_idle_timeout() {
    // A megabyte a second. The kernel shows this in steps of about a megabyte, and hides the last three.
    let (bytes, whole, idle) = (9 << 20, Duration::from_secs(9), Duration::from_secs(5));
    let url = slow_reader(bytes, whole).await;
    let client = TimeoutClient::builder().timeout(4 * LONG).idle_timeout(idle).build().unwrap();
    let started = Instant::now();
    let response = client.put(&url).body(vec![7; bytes]).send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(started.elapsed() > idle, "{:?} prove nothing", started.elapsed());
}

#[tokio::test]
async fn a_deadline_that_passes_while_connecting_is_told_as_such_and_nothing_was_sent() {
    // A port that accepts no connection, because its queue is full.
    let (url, _held) = full_queue();
    let client = TimeoutClient::builder().timeout(Duration::from_millis(200)).build().unwrap();
    let error = client.post(&url).body("once").send().await.unwrap_err();
    assert!(matches!(error, RequestError::Timeout { phase: Phase::Connect, .. }), "{error:?}");
    assert!(error.is_connect());
}

/// A listener whose queue is full, so that connecting neither succeeds nor fails. Keep what is returned.
fn full_queue() -> (String, (Vec<std::net::TcpStream>, TcpListener)) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let connect = || std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok();
    let held = std::iter::from_fn(connect).take(16).collect();
    (format!("http://{address}/"), (held, listener))
}
