//! A server under load, stopped many times, with a pool that an earlier phase provides: nobody uses the pool after it
//! was closed, and every row that was answered with 200 is in it.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::post;
use bytes::Bytes;
use cancel_safe_campaign::publish_campaign;
use cancel_safe_shutdown::{Application, BoxError, WorkerContext};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

const MINUTE: Duration = Duration::from_secs(60);
/// How many clients there are, of HTTP/1 and of HTTP/2.
const CLIENTS: usize = 6;
/// Requests that are answered before a stop may come, so that each stop meets a working server.
const WARM: u64 = 50;

/// A database that records its rows and the statements that came too late.
#[derive(Clone, Default)]
struct Pool(Arc<Database>);

#[derive(Default)]
struct Database {
    closed: AtomicBool,
    too_late: AtomicU64,
    rows: Mutex<HashSet<u64>>,
}

impl Pool {
    /// A statement that takes a moment. A row that reaches a closed database is counted, but not kept.
    async fn insert(&self, row: u64, pace: Duration) {
        sleep(pace).await;
        if self.0.closed.load(Ordering::SeqCst) {
            self.0.too_late.fetch_add(1, Ordering::SeqCst);
        } else {
            self.0.rows.lock().unwrap().insert(row);
        }
    }
}

async fn order(State(pool): State<Pool>, Path(row): Path<u64>) -> StatusCode {
    // Occasionally one that does not end before its phase does.
    let pace = if row % 997 == 0 { MINUTE } else { Duration::from_micros(row % 7 * 100) };
    pool.insert(row, pace).await;
    StatusCode::OK
}

/// The clients' knowledge: the next row, and the rows that were answered with 200.
#[derive(Clone, Default)]
struct Ledger {
    next: Arc<AtomicU64>,
    answered: Arc<Mutex<Vec<u64>>>,
    count: Arc<AtomicU64>,
}

impl Ledger {
    fn request(&self) -> (u64, http::Request<Empty<Bytes>>) {
        let row = self.next.fetch_add(1, Ordering::SeqCst);
        let request = http::Request::post(format!("http://shop/orders/{row}")).header("host", "shop");
        (row, request.body(Empty::new()).unwrap())
    }

    /// Records a complete response.
    async fn note(&self, row: u64, response: http::Response<hyper::body::Incoming>) -> Result<(), hyper::Error> {
        let status = response.status();
        response.into_body().collect().await?;
        assert_eq!(status, StatusCode::OK);
        self.answered.lock().unwrap().push(row);
        self.count.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// Orders until the server closes the connection.
    async fn order_by_http1(self, addr: SocketAddr) -> Result<(), BoxError> {
        let (mut send, connection) = http1::handshake(TokioIo::new(TcpStream::connect(addr).await?)).await?;
        let orders = async move {
            loop {
                send.ready().await?;
                let (row, request) = self.request();
                self.note(row, send.send_request(request).await?).await?;
            }
        };
        until_closed(orders, connection).await
    }

    /// The same, with two requests at a time.
    async fn order_by_http2(self, addr: SocketAddr) -> Result<(), BoxError> {
        let stream = TokioIo::new(TcpStream::connect(addr).await?);
        let (mut send, connection) = http2::handshake(TokioExecutor::new(), stream).await?;
        let orders = async move {
            loop {
                send.ready().await?;
                let ((one, first), (two, second)) = (self.request(), self.request());
                let (first, second) = tokio::join!(send.send_request(first), send.clone().send_request(second));
                let (first, second) = (first?, second?);
                self.note(one, first).await?;
                self.note(two, second).await?;
            }
        };
        until_closed(orders, connection).await
    }
}

/// Runs the orders of one client until they fail or the connection has ended. The orders alone might wait for ever: a
/// request that hyper queues at the moment when the connection's task drops the queue stays there as long as a sender
/// exists.
async fn until_closed(
    orders: impl Future<Output = Result<(), BoxError>>,
    connection: impl Future<Output = Result<(), hyper::Error>> + Send + 'static,
) -> Result<(), BoxError> {
    let mut connection = tokio::spawn(connection);
    tokio::select! {
        biased;
        ended = orders => ended?,
        ended = &mut connection => return Ok(ended??),
    }
    Ok(connection.await??)
}

/// Who owns the server's connections.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Connections {
    /// Its worker, through our API.
    Owned,
    /// Nobody: axum's own loop runs in a plain task, which the worker leaves behind when told to stop.
    Loose,
}

/// Runs one server, from its start to the last message of its clients. Returns how many orders were answered, and what
/// went wrong.
async fn stop_under_load(seed: u64, connections: Connections) -> (u64, Option<String>) {
    let random = Mutex::new(fastrand::Rng::with_seed(seed));
    let wait = Duration::from_micros(random.lock().unwrap().u64(0..3_000));
    let pool = Pool::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let made = pool.clone();
    let http = move |cx: WorkerContext| async move {
        let pool: Pool = cx.provided().ok_or("no pool")?;
        let router = Router::new().route("/orders/{row}", post(order)).with_state(pool);
        if connections == Connections::Owned {
            return cancel_safe_shutdown::axum::serve(listener, router, cx).await.map_err(BoxError::from);
        }
        drop(tokio::spawn(axum::serve(listener, router).into_future()));
        cx.ready();
        cx.cancelled().await;
        Ok(())
    };
    let app = Application::new("shop")
        .shutdown_timeout(MINUTE)
        .phase("storage", |phase| {
            let close = |pool: Pool| async move { pool.0.closed.store(true, Ordering::SeqCst) };
            phase.provide_until(|_| async { Ok(made) }, close)
        })
        .phase("ingress", |phase| {
            phase.worker_once("http", http).timeout(Duration::from_millis(100)).ready_within(MINUTE)
        });
    let (stop, mut readiness) = (app.shutdown_handle(), app.readiness());
    let running = tokio::spawn(app.serve());
    readiness.wait_for(|readiness| readiness.is_ready()).await.unwrap();

    let ledger = Ledger::default();
    // Different rows each time, so that the endless ones come at another moment.
    ledger.next.store(1 + seed * 131, Ordering::SeqCst);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let ledger = ledger.clone();
            tokio::spawn(async move {
                // It ends in the same way as its server.
                let ended =
                    if number % 2 == 0 { ledger.order_by_http1(addr).await } else { ledger.order_by_http2(addr).await };
                drop(ended);
            })
        })
        .collect();
    let warm = async {
        while ledger.count.load(Ordering::SeqCst) < WARM && !clients.iter().all(tokio::task::JoinHandle::is_finished) {
            sleep(Duration::from_micros(100)).await;
        }
    };
    timeout(MINUTE, warm).await.expect("nothing is answered");
    sleep(wait).await;
    stop.cancel();
    let report = timeout(MINUTE, running).await.expect("it does not end").unwrap().unwrap();
    if connections == Connections::Loose {
        // Nothing else would end them.
        sleep(Duration::from_millis(20)).await;
        clients.iter().for_each(tokio::task::JoinHandle::abort);
    }
    for client in clients {
        let ended = timeout(MINUTE, client).await.expect("a connection is left open");
        assert!(ended.is_ok() || connections == Connections::Loose, "{ended:?}");
    }
    let database = &pool.0;
    assert!(database.closed.load(Ordering::SeqCst), "{report}");
    let rows = database.rows.lock().unwrap();
    let answered = ledger.answered.lock().unwrap();
    let lost = answered.iter().filter(|row| !rows.contains(row)).count() as u64;
    let too_late = database.too_late.load(Ordering::SeqCst);
    let wrong = || format!("seed {seed}: {lost} lost, {too_late} queries after the close: {report}");
    (ledger.count.load(Ordering::SeqCst), (lost + too_late > 0).then(wrong))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_stopped_under_load_loses_no_answered_request_and_asks_no_closed_pool() {
    let full = std::env::var("CANCEL_SAFE_CAMPAIGN").is_ok_and(|campaign| campaign == "full");
    let stops = if full { 1000 } else { 20 };
    let first = fastrand::u64(..1_000_000);
    let (mut answered, mut violations) = (0, Vec::new());
    for number in 0..stops {
        let (orders, wrong) = stop_under_load(first + number, Connections::Owned).await;
        answered += orders;
        violations.extend(wrong);
    }
    assert!(answered >= stops * WARM / 2, "{answered} orders in {stops} stops");
    publish_campaign("shutdown", "stops-under-load", usize::try_from(stops).unwrap(), violations.len());
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_whose_connections_nobody_owns_is_caught() {
    let mut caught = Vec::new();
    for seed in 0..5 {
        caught.extend(stop_under_load(seed, Connections::Loose).await.1);
    }
    assert!(!caught.is_empty());
    assert!(caught.iter().any(|wrong| !wrong.contains(": 0 lost")), "{}", caught.join("\n"));
}
