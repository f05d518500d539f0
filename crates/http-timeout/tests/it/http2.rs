//! HTTP/2: many calls on one connection, which one of them opens, which may go silent, and on which a server may
//! refuse.
//!
//! The servers here are scripts of frames, so that each does exactly what its test needs. When reqwest, hyper-util or
//! hyper change a habit that this crate relies on without their promise, these tests show it.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use cancel_safe_http_timeout::{
    Attempts, BreakerConfig, Phase, RequestError, Retry, State, TimeoutClient, TimeoutClientBuilder,
};
use futures_util::future::join_all;
use h2::{RecvStream, server::SendResponse};
use http::{Request, Response};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Runtime,
};

use crate::server::{Server, drip, eventually, reply};

/// What a script does with one request.
#[derive(Clone, Copy)]
enum Act {
    Answer,
    /// Takes it and says nothing, for ever.
    Hang,
    /// Says that it did not process it.
    Refuse,
    /// Answers it, and says that it accepts no more on this connection.
    AnswerAndLeave,
    /// Says that it accepts nothing on this connection, including this request.
    Leave,
    /// Drops the connection.
    Cut,
}

/// A server that answers by its script, which gets the number of the connection and of the request.
struct Script {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    streams: Arc<AtomicUsize>,
    runtime: Option<Runtime>,
}

impl Script {
    fn start(script: impl Fn(usize, usize) -> Act + Send + Sync + 'static) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (connections, streams) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (made, opened) = (Arc::clone(&connections), Arc::clone(&streams));
        let script = Arc::new(script);
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            while let Ok((socket, _)) = listener.accept().await {
                let connection = made.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(connected(socket, connection, Arc::clone(&opened), Arc::clone(&script)));
            }
        });
        Self { address, connections, streams, runtime: Some(runtime) }
    }

    fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    fn streams(&self) -> usize {
        self.streams.load(Ordering::SeqCst)
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn connected<F: Fn(usize, usize) -> Act>(
    socket: TcpStream,
    connection: usize,
    opened: Arc<AtomicUsize>,
    script: Arc<F>,
) {
    let Ok(mut h2) = h2::server::handshake(socket).await else { return };
    let mut hanging = Vec::new();
    while let Some(Ok((request, mut response))) = h2.accept().await {
        match script(connection, opened.fetch_add(1, Ordering::SeqCst)) {
            Act::Answer => drop(tokio::spawn(answer(request, response))),
            Act::Hang => hanging.push((request, response)),
            Act::Refuse => response.send_reset(h2::Reason::REFUSED_STREAM),
            Act::AnswerAndLeave => {
                h2.graceful_shutdown();
                tokio::spawn(answer(request, response));
            }
            Act::Leave => {
                response.send_reset(h2::Reason::REFUSED_STREAM);
                h2.abrupt_shutdown(h2::Reason::NO_ERROR);
            }
            Act::Cut => return,
        }
    }
}

async fn answer(request: Request<RecvStream>, mut response: SendResponse<Bytes>) {
    let mut body = request.into_body();
    while let Some(Ok(data)) = body.data().await {
        let released = body.flow_control().release_capacity(data.len());
        assert!(released.is_ok());
    }
    // The client may be gone.
    if let Ok(mut stream) = response.send_response(Response::new(()), false) {
        drop(stream.send_data(Bytes::from("hello"), true));
    }
}

const LONG: Duration = Duration::from_secs(30);

/// A client that speaks HTTP/2 with prior knowledge, through the caller's own reqwest client.
fn client(change: impl FnOnce(TimeoutClientBuilder) -> TimeoutClientBuilder) -> TimeoutClient {
    let reqwest = reqwest::Client::builder().http2_prior_knowledge().build().unwrap();
    change(TimeoutClient::builder().timeout(LONG).reqwest(reqwest)).build().unwrap()
}

fn quick(retries: u32) -> Retry {
    Retry::attempts(retries + 1).backoff(Duration::from_millis(1), Duration::from_millis(2))
}

#[tokio::test]
async fn many_calls_share_one_connection_and_give_everything_back() {
    let server = Server::start(|_, _| async { drip(3, 1_000, Duration::from_millis(1)) });
    let client = client(|builder| builder.concurrency(8).breaker(BreakerConfig::default()));
    let lengths = join_all((0..50).map(|_| async {
        let response = client.get(server.url("/")).send().await.unwrap();
        assert_eq!(response.version(), http::Version::HTTP_2);
        response.bytes().await.unwrap().len()
    }));
    assert_eq!(lengths.await, [3_000; 50]);
    assert_eq!((server.connections(), client.metrics().in_flight), (1, 0));
    assert!(server.most_bodies() <= 9, "{}", server.most_bodies());
}

/// A slow resolver, so that connecting takes long.
pub(crate) struct SlowNames(pub(crate) SocketAddr, pub(crate) Duration);

impl reqwest::dns::Resolve for SlowNames {
    fn resolve(&self, _: reqwest::dns::Name) -> reqwest::dns::Resolving {
        let (address, pause) = (self.0, self.1);
        Box::pin(async move {
            tokio::time::sleep(pause).await;
            Ok(Box::new(std::iter::once(address)) as reqwest::dns::Addrs)
        })
    }
}

fn slow_to_connect(server: &Script, pause: Duration) -> (TimeoutClient, String) {
    let names = Arc::new(SlowNames(server.address, pause));
    let reqwest = reqwest::Client::builder().http2_prior_knowledge().no_proxy().dns_resolver(names).build().unwrap();
    let client = TimeoutClient::builder().timeout(LONG).reqwest(reqwest).breaker(BreakerConfig::default());
    (client.build().unwrap(), format!("http://slow.test:{}/", server.address.port()))
}

#[tokio::test]
async fn dropping_the_call_that_connects_fails_none_that_wait_for_it() {
    let server = Script::start(|_, _| Act::Answer);
    let (client, url) = slow_to_connect(&server, Duration::from_millis(200));
    let mut first = Box::pin(client.get(&url).send());
    assert!(futures_util::poll!(&mut first).is_pending());
    let rest = async { join_all((0..10).map(|_| client.get(&url).send())).await };
    let drop_first = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(first);
    };
    let (rest, ()) = tokio::join!(rest, drop_first);
    for response in rest {
        let response = response.unwrap();
        assert_eq!(response.extensions().get(), Some(&Attempts(1)), "what was never sent does not count");
    }
    assert_eq!((client.trips(), server.streams()), (Vec::new(), 10));
}

#[tokio::test]
async fn the_call_that_connects_may_time_out_alone() {
    let server = Script::start(|_, _| Act::Answer);
    let (client, url) = slow_to_connect(&server, Duration::from_millis(400));
    let first = client.get(&url).timeout(Duration::from_millis(100)).send();
    let mut first = Box::pin(first);
    assert!(futures_util::poll!(&mut first).is_pending());
    // A POST may be sent again as well, because it is known that it was not sent.
    let (error, rest) = tokio::join!(first, join_all((0..10).map(|_| client.post(&url).body("once").send())));
    let error = error.unwrap_err();
    assert!(matches!(error, RequestError::Timeout { phase: Phase::Connect, .. }), "{error:?}");
    assert!(rest.iter().all(Result::is_ok), "{rest:?}");
    assert_eq!(server.streams(), 10);
}

#[tokio::test]
async fn a_connection_that_went_silent_is_not_given_to_a_probe() {
    let server = Script::start(|connection, _| if connection == 0 { Act::Hang } else { Act::Answer });
    let breaker = BreakerConfig::builder().open_for(Duration::from_millis(20), Duration::from_millis(20));
    let client = client(|builder| builder.timeout(Duration::from_secs(1)).breaker(breaker.build().unwrap()));
    let url = server.url();
    let started = Instant::now();
    let mut failed = 0;
    while let Err(error) = client.get(&url).send().await {
        assert!(error.is_timeout() || error.is_circuit_open(), "{error:?}");
        failed += u32::from(error.is_timeout());
        assert!(started.elapsed() < LONG, "the dead connection was never given up");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(failed <= 5, "{failed} calls were sent to a connection that was dead");
    assert_eq!(server.connections(), 2);
    assert_eq!(client.breaker(&url).unwrap().state(), State::Closed);
    assert!(client.get(&url).send().await.is_ok());
}

#[tokio::test]
async fn a_silent_connection_is_found_by_callers_who_bring_their_own_patience() {
    for patience in [100, 400].map(Duration::from_millis) {
        let server = Script::start(|connection, _| if connection == 0 { Act::Hang } else { Act::Answer });
        let client = client(|builder| builder.idle_timeout(None).attempt_timeout(None).timeout(None));
        let started = Instant::now();
        let mut cut = 0;
        while tokio::time::timeout(patience, client.get(server.url()).send()).await.is_err() {
            cut += 1;
            assert!(started.elapsed() < LONG, "the dead connection was never given up");
        }
        assert!(cut >= 3, "{cut} calls in a row are no proof");
        assert!(server.connections() >= 2);
    }
}

#[tokio::test]
async fn callers_who_leave_early_cost_no_connection() {
    let server = Server::start(|_, _| async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        reply(200, "in time")
    });
    let client = client(|builder| builder);
    for _ in 0..20 {
        assert!(tokio::time::timeout(Duration::from_millis(5), client.get(server.url("/")).send()).await.is_err());
    }
    assert_eq!(client.get(server.url("/")).send().await.unwrap().text().await.unwrap(), "in time");
    assert_eq!(server.connections(), 1);
}

#[tokio::test]
async fn giving_a_connection_up_leaves_the_calls_on_it_alone_and_says_nothing_to_the_server() {
    // The first stream trickles for long; those after it hang on the same connection.
    let server = Server::start(|_, hit| async move {
        match hit {
            0 => drip(500, 10, Duration::from_millis(10)),
            1..=3 => std::future::pending().await,
            _ => reply(200, "new"),
        }
    });
    let client = client(|builder| builder);
    let url = server.url("/");
    let long = client.get(&url).send().await.unwrap();
    for _ in 0..3 {
        let error = client.get(&url).timeout(Duration::from_secs(1)).send().await.unwrap_err();
        assert!(error.is_timeout(), "{error:?}");
    }
    assert_eq!(client.get(&url).send().await.unwrap().text().await.unwrap(), "new");
    assert_eq!((server.connections(), server.hits()), (2, 5));
    assert_eq!(long.bytes().await.unwrap().len(), 5_000);
}

#[tokio::test]
async fn a_refused_stream_is_tried_again_whatever_the_method_and_the_size() {
    for size in [0, 1_000, 100 * 1024] {
        let server = Script::start(|_, stream| if stream == 0 { Act::Refuse } else { Act::Answer });
        let client = client(|builder| builder.retry(quick(3)));
        let response = client.post(server.url()).body(vec![b'x'; size]).send().await.unwrap();
        assert_eq!(response.extensions().get(), Some(&Attempts(2)), "{size} bytes");
        assert_eq!(server.streams(), 2);
    }
}

#[tokio::test]
async fn refused_streams_stay_within_the_bound_on_attempts() {
    let server = Script::start(|_, _| Act::Refuse);
    let client = client(|builder| builder.retry(quick(3)));
    for _ in 0..100 {
        assert!(client.get(server.url()).send().await.is_err());
    }
    assert!(server.streams() <= 130, "{} streams for 100 calls", server.streams());
}

#[tokio::test]
async fn without_a_retry_policy_a_refused_stream_is_opened_once() {
    let server = Script::start(|_, _| Act::Refuse);
    let client = client(|builder| builder);
    assert!(client.post(server.url()).body("once").send().await.is_err());
    assert_eq!(server.streams(), 1, "the retries of reqwest go round our budget");
}

#[tokio::test]
async fn a_server_that_leaves_gets_no_blame_and_loses_no_call() {
    // Each connection answers one request, and accepts no more.
    let server = Script::start(|_, _| Act::AnswerAndLeave);
    let client = client(|builder| builder.breaker(BreakerConfig::default()));
    for _ in 0..20 {
        let response = client.post(server.url()).body("once").send().await.unwrap();
        assert_eq!(response.text().await.unwrap(), "hello");
    }
    assert_eq!((server.streams(), client.trips()), (20, Vec::new()));
}

#[tokio::test]
async fn a_connection_that_ends_between_two_calls_is_nobody_s_fault() {
    for act in [Act::Leave, Act::Cut] {
        // The first request of each connection is answered; the second finds the connection going.
        let first = Arc::new(AtomicUsize::new(usize::MAX));
        let server =
            Script::start(
                move |connection, _| {
                    if first.swap(connection, Ordering::SeqCst) == connection { act } else { Act::Answer }
                },
            );
        let client = client(|builder| builder.breaker(BreakerConfig::default()));
        for call in 0..20 {
            let response = client.get(server.url()).send().await;
            let response = response.unwrap_or_else(|error| panic!("call {call}: {error:?}"));
            assert_eq!(response.text().await.unwrap(), "hello");
        }
        let metrics = client.breaker(server.url()).unwrap().metrics();
        assert_eq!((metrics.failures, metrics.trips), (0, 0), "{metrics:?}");
        eventually(|| server.connections() >= 10).await;
    }
}
