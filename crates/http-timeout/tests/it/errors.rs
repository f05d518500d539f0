//! The text of errors: what was asked, what went wrong, which limit fired, after how many attempts and how long, and
//! why.

use std::{
    error::Error as _,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use cancel_safe_http_timeout::{
    BreakerConfig, Hedge, Limit, Phase, RequestError, Retry, TimeoutClient, TimeoutClientBuilder,
};
use futures_util::{FutureExt as _, StreamExt as _};
use http::{HeaderMap, Method};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpSocket,
};

use crate::server::{Server, drip, eventually, refused_url, reply};

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(300);

fn client(change: impl FnOnce(TimeoutClientBuilder) -> TimeoutClientBuilder) -> TimeoutClient {
    change(TimeoutClient::builder().timeout(LONG)).build().unwrap()
}

fn quick(attempts: u32) -> Retry {
    Retry::attempts(attempts).backoff(Duration::from_millis(1), Duration::from_millis(2))
}

/// An address at which connecting neither succeeds nor fails, because its queue is full, and the connections that fill
/// it.
struct BlackHole {
    address: SocketAddr,
    _listener: TcpListener,
    _queued: Vec<TcpStream>,
}

impl BlackHole {
    fn new() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let listener = socket.listen(1).unwrap().into_std().unwrap();
        let address = listener.local_addr().unwrap();
        let connect = || TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok();
        let queued = std::iter::repeat_with(connect).take(16).map_while(|stream| stream).collect();
        Self { address, _listener: listener, _queued: queued }
    }

    fn url(&self) -> String {
        format!("http://{}/", self.address)
    }
}

#[tokio::test]
async fn an_error_is_one_line_that_says_it_all() {
    let url = refused_url();
    let asked = format!("{}path?token=SECRET#part", url.replace("//", "//me:SECRET@"));
    let error = client(|b| b.retry(quick(2))).post(asked).send().await.unwrap_err();
    let text = error.to_string();
    let begin = format!("POST {url}path: could not connect after 2 attempts in ");
    assert!(text.starts_with(&begin) && text.ends_with("ms: connection refused"), "{text}");
    let report = error.report();
    assert_eq!((report.method.as_ref(), report.phase, report.attempts), (Some(&Method::POST), Phase::Connect, 2));
    assert_eq!(report.url, format!("{url}path"));
    assert!(!format!("{error:?}").contains("SECRET"), "{error:?}");
    let mut causes = std::iter::successors(error.source(), |&error| error.source());
    assert!(causes.any(|cause| cause.is::<reqwest::Error>()), "{error:?}");
}

#[tokio::test]
async fn every_error_of_a_call_names_its_method_and_its_url() {
    let server = Server::start(|request, _| async move {
        match request.uri().path() {
            "/large" => reply(200, vec![0; 2_000]),
            "/missing" => reply(404, ""),
            _ => drip(1_000, 10, Duration::from_millis(20)),
        }
    });
    let client = client(|b| b.max_body(1_000).concurrency(1).max_waiting(0).breaker(BreakerConfig::default()));
    let url = |path: &str| server.url(path);
    let large = client.get(url("/large?SECRET")).send().await.unwrap().bytes().await.unwrap_err();
    let missing = client.get_with_timeout(url("/missing?SECRET"), None).await.unwrap_err();
    let held = client.get(url("/held")).send().await.unwrap();
    let overloaded = client.get(url("/full?SECRET")).send().await.unwrap_err();
    drop(held);
    client.breaker(url("/")).unwrap().isolate();
    let open = client.get(url("/open?SECRET")).send().await.unwrap_err();
    let invalid = client.get(url("/invalid?SECRET")).header("bad name", "SECRET").send().await.unwrap_err();
    assert!(open.is_circuit_open() && overloaded.is_overloaded() && invalid.is_invalid_request());
    let errors = [
        (RequestError::from(large), "/large", ": the body is larger than 1000 bytes after 1 attempt in "),
        (missing, "/missing", ": the server answered 404 Not Found after 1 attempt in "),
        (overloaded, "/full", ": 0 calls are waiting for a permit already after 0 attempts in "),
        (open, "/open", " is open after 0 attempts in "),
        (invalid, "/invalid", ": the request is invalid after 0 attempts in 0 ms: "),
    ];
    for (error, path, says) in errors {
        let text = error.to_string();
        assert!(text.starts_with(&format!("GET {}: ", url(path))), "{text}");
        assert!(text.contains(says) && !text.contains("SECRET"), "{text}");
    }
}

#[tokio::test]
async fn what_is_no_url_is_shown_without_its_secrets() {
    for (asked, shown) in [
        ("nonsense", "GET nonsense: the request is invalid"),
        ("http://me:SECRET@[bad/path?SECRET", "GET http://[bad/path: the request is invalid"),
        ("http://host:port/?SECRET\n", "GET http://host:port/: the request is invalid"),
        ("data:text/plain,x", "GET data:text/plain,x: the request is invalid"),
        ("http://me:a/SECRET@host/path", "GET http://…@host/path: the request is invalid"),
        ("http://me:SECRET?b@host/path?SECRET", "GET http://…@host/path: the request is invalid"),
        ("http://me:a#SECRET@host:port/@me", "GET http://…@me: the request is invalid"),
        ("http:/me:SECRET@[bad/path", "GET …@[bad/path: the request is invalid"),
        // In a URL without a scheme, the name counts as the scheme.
        ("me:SECRET@host:80/path?SECRET", "GET host:80/path: the request is invalid"),
    ] {
        let error = client(|b| b).get(asked).send().await.unwrap_err();
        let text = error.to_string();
        assert!(error.is_invalid_request() && text.starts_with(shown), "{asked}: {text}");
        assert!(!text.contains("SECRET") && text.lines().count() == 1, "{text}");
    }
}

#[tokio::test]
async fn what_is_printed_for_a_debugger_has_no_secrets_either() {
    let headers: HeaderMap = [("x-api-key", "SECRET"), ("x-plain", "SECRET")]
        .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
        .into_iter()
        .collect();
    let builder = TimeoutClient::builder().default_headers(headers);
    let shown = format!("{builder:?}");
    let client = builder.build().unwrap();
    let request =
        client.get("http://me:SECRET@host/path?SECRET").header("authorization", "SECRET").query(&[("a", "SECRET")]);
    let invalid = client.get("http://me:SECRET@[bad/").header("authorization", "SECRET");
    let many = client.get_many(["http://me:SECRET@host/"], None);
    let shown = format!("{shown} {client:?} {request:?} {invalid:?} {many:?}");
    assert!(!shown.contains("SECRET") && shown.contains("GET http://host/path"), "{shown}");
}

#[tokio::test]
async fn a_limit_that_fires_while_connecting_says_so_and_which_it_was() {
    let hole = BlackHole::new();
    let cases = [
        (client(|b| b.timeout(SHORT)), Limit::Total),
        (client(|b| b.attempt_timeout(SHORT)), Limit::Attempt),
        (client(|b| b.connect_timeout(SHORT)), Limit::Connect),
        (client(|b| b.idle_timeout(SHORT)), Limit::Idle),
    ];
    for (client, fired) in cases {
        let error = client.post(hole.url()).body("pay").send().await.unwrap_err();
        assert!(error.is_connect() && error.is_timeout(), "{error:?}");
        let text = error.to_string();
        match error {
            RequestError::Timeout { phase, limit, elapsed, attempts, .. } => {
                assert_eq!((phase, limit, attempts), (Phase::Connect, fired, 1));
                assert!(elapsed >= SHORT && elapsed < LONG / 2, "{elapsed:?}");
            }
            other => panic!("{other:?}"),
        }
        assert!(
            text.contains("while connecting after 1 attempt") && text.ends_with(&format!("`{fired}` has passed")),
            "{text}"
        );
    }
}

#[tokio::test]
async fn a_post_whose_connection_does_not_come_about_is_tried_again() {
    let hole = BlackHole::new();
    for (change, fired) in [
        (TimeoutClientBuilder::attempt_timeout as fn(TimeoutClientBuilder, Duration) -> _, Limit::Attempt),
        (TimeoutClientBuilder::connect_timeout as fn(TimeoutClientBuilder, Duration) -> _, Limit::Connect),
    ] {
        let client = client(|b| change(b.retry(quick(3)), SHORT));
        let error = client.post(hole.url()).body("pay").send().await.unwrap_err();
        assert!(matches!(error, RequestError::Timeout { attempts: 3, limit, .. } if limit == fired), "{error:?}");
    }
}

#[tokio::test]
async fn a_limit_that_fires_later_says_so_too() {
    let server = Server::start(|request, _| async move {
        if request.uri().path() == "/head" {
            std::future::pending::<()>().await;
        }
        drip(1_000, 10, Duration::from_secs(10))
    });
    for (client, in_head, in_body) in [
        (client(|b| b.timeout(SHORT * 3)), Limit::Total, Limit::Total),
        (client(|b| b.idle_timeout(SHORT * 3)), Limit::Idle, Limit::Idle),
        (client(|b| b.attempt_timeout(SHORT * 3).idle_timeout(SHORT * 4)), Limit::Attempt, Limit::Idle),
    ] {
        let error = client.get(server.url("/head")).send().await.unwrap_err();
        assert!(
            matches!(error, RequestError::Timeout { phase: Phase::Response, limit, .. } if limit == in_head),
            "{error:?}"
        );
        let response = client.get(server.url("/body")).send().await.unwrap();
        let error = RequestError::from(response.bytes().await.unwrap_err());
        assert!(
            matches!(error, RequestError::Timeout { phase: Phase::Body, limit, .. } if limit == in_body),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn the_wait_for_a_permit_has_a_limit_of_its_own() {
    let server = Server::start(|_, _| async { reply(200, "unread") });
    let client = client(|b| b.concurrency(1).permit_timeout(SHORT));
    let held = client.get(server.url("/")).send().await.unwrap();
    let error = client.get(server.url("/")).send().await.unwrap_err();
    assert!(
        matches!(error, RequestError::Timeout { phase: Phase::Permit, limit: Limit::Permit, attempts: 0, .. }),
        "{error:?}"
    );
    let error = client.get(server.url("/")).timeout(SHORT / 2).send().await.unwrap_err();
    assert!(matches!(error, RequestError::Timeout { phase: Phase::Permit, limit: Limit::Total, .. }), "{error:?}");
    drop(held);
    assert_eq!(client.get(server.url("/")).send().await.unwrap().text().await.unwrap(), "unread");
}

#[tokio::test]
async fn a_body_that_breaks_off_says_of_what_call_it_was() {
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let url = format!("http://{}/broken", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        assert!(socket.read(&mut [0; 1_024]).await.unwrap() > 0);
        let part = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhello";
        assert_eq!(socket.write(part).await.unwrap(), part.len());
    });
    let client = client(|b| b);
    let error = client.put(format!("{url}?SECRET")).send().await.unwrap().bytes().await.unwrap_err();
    let error = RequestError::from(error);
    let text = error.to_string();
    let begin = format!("PUT {url}: the network or the peer failed within the body after 1 attempt in ");
    assert!(matches!(error, RequestError::Network(_)), "{error:?}");
    assert!(text.starts_with(&begin) && !text.contains("SECRET"), "{text}");
    eventually(|| client.metrics().in_flight == 0).await;
}

#[tokio::test]
async fn without_tls_an_https_url_names_the_feature_to_add_and_blames_nobody() {
    let server = Server::start(|_, _| async { reply(200, "") });
    let url = server.url("/").replace("http://", "https://");
    let client = client(|b| b.breaker(BreakerConfig::default()).retry(quick(3)));
    for _ in 0..6 {
        let error = client.get(&url).send().await.unwrap_err();
        let text = error.to_string();
        if error.is_invalid_request() {
            assert!(text.contains("without TLS") && text.contains("`rustls`"), "{text}");
            assert_eq!(error.report().attempts, 1);
        } else {
            // If it is built together with a crate that needs TLS, reqwest has TLS.
            assert!(error.is_connect() || error.is_circuit_open(), "{text}");
            return;
        }
    }
    assert!(client.open_origins().is_empty());
    assert_eq!(client.metrics().retries, 0);
}

#[test]
fn without_a_runtime_or_its_timers_a_call_is_an_error_and_no_panic() {
    let build = |builder: TimeoutClientBuilder| builder.build().unwrap();
    let clients = [
        build(TimeoutClient::builder()),
        build(TimeoutClient::builder().hedge(Hedge::at_percentile(0.5))),
        // Nothing of its own needs a timer then.
        build(TimeoutClient::builder().timeout(None).attempt_timeout(None).connect_timeout(None).idle_timeout(None)),
    ];
    let timeless = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    for client in &clients {
        let calls = || {
            let call = client.get("http://127.0.0.1:9/").send();
            let mut many = client.get_many(["http://127.0.0.1:9/"], None);
            async move { [call.await.unwrap_err(), many.next().await.unwrap().result.unwrap_err()] }
        };
        let outside = calls().now_or_never().expect("it waits for nothing");
        let inside = timeless.block_on(calls());
        for error in outside.into_iter().chain(inside) {
            assert!(matches!(error, RequestError::NoRuntime { .. }), "{error}");
            let text = error.to_string();
            assert!(text.starts_with("GET http://127.0.0.1:9/: a call needs a tokio runtime"), "{text}");
        }
    }
}
