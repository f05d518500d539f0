//! A service that fails, hangs and recovers, seen by impatient callers through a circuit breaker.
//!
//! ```text
//! cargo run -p cancel-safe-http-timeout --example breaker
//! ```
//!
//! The service is local. Callers drop their calls after 100 ms, which is long before any timeout, so that a plain
//! breaker would never see the hang. For each phase the output says what callers saw and how many calls reached the
//! service. If the circuit does not open, or is not closed at the end, the exit code is 1.
#![expect(clippy::print_stdout, reason = "an example speaks through its output")]

use std::{
    error::Error,
    io,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use cancel_safe_http_timeout::{BreakerConfig, RequestError, Retry, TimeoutClient};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};

/// What the service does with a request, as a number in an atomic.
const ANSWERS: u32 = 0;
const FAILS: u32 = 1;
const HANGS: u32 = 2;

#[derive(Default)]
struct Service {
    does: AtomicU32,
    reached: AtomicU64,
}

impl Service {
    async fn serve(self: Arc<Self>, listener: TcpListener) {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(Arc::clone(&self).answer(socket));
        }
    }

    /// Answers one request, whose head fits in one piece.
    async fn answer(self: Arc<Self>, mut socket: TcpStream) -> io::Result<()> {
        if socket.read(&mut [0; 1_024]).await? == 0 {
            return Ok(());
        }
        self.reached.fetch_add(1, Ordering::Relaxed);
        let status = match self.does.load(Ordering::Relaxed) {
            ANSWERS => "200 OK",
            FAILS => "503 Service Unavailable",
            _ => return std::future::pending().await,
        };
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        // A socket that takes less than this at once is no use to an example.
        socket.write(answer.as_bytes()).await.map(drop)
    }
}

/// What the callers of one phase saw.
#[derive(Default)]
struct Seen {
    answered: u32,
    failed: u32,
    cut: u32,
    refused: u32,
}

/// Calls every 20 ms for two seconds. Each caller has left after 100 ms.
async fn call(client: &TimeoutClient, url: &str) -> Result<Seen, RequestError> {
    let mut seen = Seen::default();
    for _ in 0..100 {
        match timeout(Duration::from_millis(100), client.get(url).send()).await {
            Ok(Ok(response)) if response.status().is_success() => seen.answered += 1,
            Ok(Ok(_)) => seen.failed += 1,
            Ok(Err(RequestError::CircuitOpen { .. })) => seen.refused += 1,
            Ok(Err(error)) => return Err(error),
            Err(_) => seen.cut += 1,
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok(seen)
}

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/", listener.local_addr()?);
    let service = Arc::new(Service::default());
    tokio::spawn(Arc::clone(&service).serve(listener));

    let breaker = BreakerConfig::builder()
        .open_for(Duration::from_millis(300), Duration::from_millis(600))
        .on_transition(|change| println!("  the circuit was {}, is {}", change.from, change.to))
        .build()?;
    let client =
        TimeoutClient::builder().timeout(Duration::from_secs(30)).retry(Retry::none()).breaker(breaker).build()?;

    let mut opened = Vec::new();
    for does in [ANSWERS, FAILS, ANSWERS, HANGS, ANSWERS] {
        println!("the service {}:", ["answers", "fails", "hangs"][does as usize]);
        service.does.store(does, Ordering::Relaxed);
        let (before, trips_before) = (service.reached.load(Ordering::Relaxed), trips(&client));
        let Seen { answered, failed, cut, refused } = call(&client, &url).await?;
        let reached = service.reached.load(Ordering::Relaxed) - before;
        println!("  {reached} of 100 calls reached the service");
        println!("  {answered} answered, {failed} failed, {cut} cut by the caller, {refused} refused");
        opened.push(trips(&client) > trips_before);
    }
    let as_promised = opened == [false, true, false, true, false] && client.open_origins().is_empty();
    Ok(if as_promised { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// How often a circuit of this client has opened.
fn trips(client: &TimeoutClient) -> u64 {
    client.trips().iter().map(|(_, trips)| trips).sum()
}
