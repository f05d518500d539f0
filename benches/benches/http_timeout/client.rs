//! A request through the client beside the same through reqwest, alone and with its middleware: its cost without
//! faults, its effect on a failing server, and the effect of hedging on a server that is sometimes slow.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use cancel_safe_benches::{Contest, Table, percentile};
use cancel_safe_http_timeout::{BreakerConfig, Hedge, Retry, TimeoutClient};
use futures_util::{StreamExt as _, stream};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
};

const CALLS: u32 = 1_000;
const ROUNDS: usize = 20;

/// How long the answer to the request with this number takes.
type Pause = fn(usize) -> Duration;

/// A server on its own thread.
struct Server {
    url: String,
    requests: Arc<AtomicUsize>,
    _runtime: Runtime,
}

impl Server {
    /// Answers every request on every connection after the pause that `pause` has for its number. Each read counts as
    /// one request.
    fn start(answer: &'static [u8], pause: Pause) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let requests = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&requests);
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                tokio::spawn(serve(socket, answer, pause, Arc::clone(&seen)));
            }
        });
        Self { url, requests, _runtime: runtime }
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

async fn serve(mut socket: TcpStream, answer: &'static [u8], pause: Pause, seen: Arc<AtomicUsize>) {
    let mut request = [0; 4096];
    while socket.read(&mut request).await.is_ok_and(|bytes| bytes > 0) {
        let pause = pause(seen.fetch_add(1, Ordering::SeqCst));
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        if !socket.write(answer).await.is_ok_and(|bytes| bytes == answer.len()) {
            return;
        }
    }
}

const HELLO: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";
const SORRY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 5\r\n\r\nsorry";

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn everything() -> TimeoutClient {
    let client = TimeoutClient::builder().concurrency_per_host(50).retry(Retry::attempts(4));
    client.breaker(BreakerConfig::default()).build().unwrap()
}

/// The CPU time of this thread.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    Duration::from_nanos(stat.split(' ').next().and_then(|nanos| nanos.parse().ok()).unwrap_or_default())
}

/// One contestant in three measures: wall time, CPU time and allocations.
struct Way<'a> {
    name: &'static str,
    call: Box<dyn Fn() + 'a>,
}

/// How many calls are in flight at once when their bytes are counted.
const IN_FLIGHT: usize = 200;

/// The bytes on the heap for each call that waits for its answer, including its future, its connection and the server's
/// end of that; apart from their own parts, all contestants have the same.
fn in_flight<F: Future<Output: Send> + Send + 'static>(runtime: &Runtime, call: impl Fn(&str) -> F) -> usize {
    let server = Server::start(HELLO, |_| Duration::from_secs(600));
    let mut bytes = 0;
    // Anything that is made only once exists after the first round.
    for round in 1..=3 {
        bytes = runtime.block_on(async {
            let region = Region::new(&INSTRUMENTED_SYSTEM);
            let calls: Vec<_> = (0..IN_FLIGHT).map(|_| tokio::spawn(call(&server.url))).collect();
            while server.requests() < round * IN_FLIGHT {
                tokio::time::sleep(MILLI).await;
            }
            let held = region.change();
            for call in calls {
                call.abort();
                assert!(call.await.is_err(), "it was waiting");
            }
            held.bytes_allocated - held.bytes_deallocated
        });
    }
    bytes / IN_FLIGHT
}

/// The memory of a call while it waits.
pub(crate) fn bytes() {
    let (runtime, plain) = (runtime(), reqwest::Client::new());
    let ours = TimeoutClient::builder().concurrency(2 * IN_FLIGHT).concurrency_per_host(2 * IN_FLIGHT);
    // Two hundred calls that are dropped at once would open its circuit.
    let breaker = BreakerConfig::builder().silence(None).build().unwrap();
    let ours = ours.retry(Retry::attempts(4)).breaker(breaker).timeout(Duration::from_secs(60));
    let ours = ours.build().unwrap();
    let mut table = Table::new(["a call in flight", "bytes of its future", "bytes on the heap in all"]);
    let of_reqwest = |url: &str| plain.get(url).timeout(Duration::from_secs(60)).send();
    let of_ours = |url: &str| ours.get(url).send();
    let nowhere = "http://localhost/";
    // Its timeout creates a timer at once.
    let _inside = runtime.enter();
    let (size, held) = (size_of_val(&of_reqwest(nowhere)), in_flight(&runtime, of_reqwest));
    table.row("reqwest with a timeout", [size.to_string(), held.to_string()]);
    let (size, held) = (size_of_val(&of_ours(nowhere)), in_flight(&runtime, of_ours));
    table.row("ours, everything on", [size.to_string(), held.to_string()]);
    table.print();
}

/// The cost of a get and a read.
pub(crate) fn costs() {
    let server = Server::start(HELLO, |_| Duration::ZERO);
    let (runtime, url) = (runtime(), server.url.as_str());
    let plain = reqwest::Client::new();
    let ours = everything();
    let reqwest = Way {
        name: "reqwest with a timeout",
        call: Box::new(|| {
            runtime.block_on(async {
                let response = plain.get(url).timeout(Duration::from_secs(10)).send().await.unwrap();
                response.bytes().await.unwrap();
            });
        }),
    };
    let everything_on = Way {
        name: "ours, everything on",
        call: Box::new(|| {
            runtime.block_on(async { ours.get(url).send().await.unwrap().bytes().await.unwrap() });
        }),
    };
    #[cfg(feature = "peers")]
    let peer = Some(peers::way(&runtime, url));
    #[cfg(not(feature = "peers"))]
    let peer = None;
    let ways: Vec<_> = [reqwest, everything_on].into_iter().chain(peer).collect();

    for Way { name, call } in &ways {
        (0..100).for_each(|_| call());
        let region = Region::new(&INSTRUMENTED_SYSTEM);
        (0..100).for_each(|_| call());
        println!("{name}: {} allocations", region.change().allocations / 100);
    }
    let (mut wall, mut busy) = (contest("wall"), contest("CPU"));
    for Way { name, call } in &ways {
        wall = wall.add(name, || (0..CALLS).for_each(|_| call()));
        busy = busy.add_timed(name, || {
            let before = cpu();
            (0..CALLS).for_each(|_| call());
            cpu() - before
        });
    }
    wall.run();
    busy.run();
}

fn contest<'a>(clock: &str) -> Contest<'a> {
    Contest::new(format!("{CALLS} times get and read, {clock} time"), ROUNDS)
}

/// The effect of 100 calls on a server that answers 503 for ever.
pub(crate) fn faults() {
    let runtime = runtime();
    let mut table = Table::new(["100 calls to a server that fails", "GET: requests", "POST: requests", "200 ms took"]);
    table.row("ours", {
        let requests = |post: bool| {
            let server = Server::start(SORRY, |_| Duration::ZERO);
            let client = TimeoutClient::builder().retry(Retry::attempts(4).backoff(MILLI, 4 * MILLI)).build().unwrap();
            runtime.block_on(async {
                for _ in 0..100 {
                    let request = if post { client.post(&server.url).body("") } else { client.get(&server.url) };
                    drop(request.send().await);
                }
            });
            server.requests()
        };
        let client = TimeoutClient::builder().retry(Retry::attempts(4)).timeout(200 * MILLI).build().unwrap();
        let (gets, posts) = (requests(false), requests(true));
        let server = Server::start(HELLO, |_| Duration::from_secs(60));
        let started = Instant::now();
        assert!(runtime.block_on(client.get(&server.url).send()).is_err());
        [gets.to_string(), posts.to_string(), format!("{} ms", started.elapsed().as_millis())]
    });
    #[cfg(feature = "peers")]
    table.row("reqwest-middleware and reqwest-retry", peers::faults(&runtime));
    table.print();
}

const MILLI: Duration = Duration::from_millis(1);

/// The effect of hedging on a server that is slow for one request in a hundred, and on one that is slow for all.
pub(crate) fn hedging() {
    let runtime = runtime();
    let mut table = Table::new(["hedging at 0.95 with 0.05", "p50", "p99", "p99.9", "requests a call"]);
    let scenes: [(_, Pause); 2] =
        [("slow for 1 %", |n| if n % 100 == 99 { 200 * MILLI } else { 2 * MILLI }), ("slow for all", |_| 40 * MILLI)];
    for (scene, pause) in scenes {
        for hedged in [false, true] {
            let server = Server::start(HELLO, pause);
            let client = TimeoutClient::builder();
            let client = if hedged { client.hedge(Hedge::at_percentile(0.95).budget(0.05)) } else { client };
            let client = client.build().unwrap();
            let one = |_| async {
                let started = Instant::now();
                client.get(&server.url).send().await.unwrap().bytes().await.unwrap();
                started.elapsed()
            };
            // The first calls, before enough is known, are not compared.
            runtime.block_on(stream::iter(0..400).map(one).buffer_unordered(4).count());
            let (calls, before) = (4_000, server.requests());
            let mut times: Vec<_> = runtime.block_on(stream::iter(0..calls).map(one).buffer_unordered(4).collect());
            let mut at = |part| format!("{:.1} ms", percentile(&mut times, part).unwrap().as_secs_f64() * 1e3);
            let times = [at(0.5), at(0.99), at(0.999)];
            let load = (server.requests() - before) as f64 / calls as f64;
            let name = format!("{scene}, {}", if hedged { "hedged" } else { "not hedged" });
            table.row(&name, times.into_iter().chain([format!("{load:.3}")]));
        }
    }
    table.print();
}

#[cfg(feature = "peers")]
mod peers {
    //! reqwest-middleware with reqwest-retry.

    use std::time::{Duration, Instant};

    use reqwest_middleware::{ClientBuilder, ClientWithMiddleware};
    use reqwest_retry::{RetryTransientMiddleware, policies::ExponentialBackoff};
    use tokio::runtime::Runtime;

    use super::{HELLO, MILLI, SORRY, Server, Way};

    pub(super) fn way<'a>(runtime: &'a Runtime, url: &'a str) -> Way<'a> {
        let middleware = client(3);
        let call = move || {
            runtime.block_on(async {
                let request = middleware.get(url).timeout(Duration::from_secs(10));
                request.send().await.unwrap().bytes().await.unwrap();
            });
        };
        Way { name: "reqwest-middleware and reqwest-retry", call: Box::new(call) }
    }

    fn client(retries: u32) -> ClientWithMiddleware {
        let policy = ExponentialBackoff::builder().retry_bounds(MILLI, 4 * MILLI).build_with_max_retries(retries);
        let retry = RetryTransientMiddleware::new_with_policy(policy);
        ClientBuilder::new(reqwest::Client::new()).with(retry).build()
    }

    pub(super) fn faults(runtime: &Runtime) -> [String; 3] {
        let requests = |post: bool| {
            let (server, client) = (Server::start(SORRY, |_| Duration::ZERO), client(3));
            runtime.block_on(async {
                for _ in 0..100 {
                    let request = if post { client.post(&server.url).body("") } else { client.get(&server.url) };
                    drop(request.send().await);
                }
            });
            server.requests()
        };
        let (gets, posts) = (requests(false), requests(true));
        let server = Server::start(HELLO, |_| Duration::from_secs(60));
        let started = Instant::now();
        assert!(runtime.block_on(client(3).get(&server.url).timeout(200 * MILLI).send()).is_err());
        [gets.to_string(), posts.to_string(), format!("{} ms", started.elapsed().as_millis())]
    }
}
