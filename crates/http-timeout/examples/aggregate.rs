//! A page from three services at once, with a limit for each and one for all. It uses the answers that arrive in time.
//!
//! ```text
//! cargo run -p cancel-safe-http-timeout --example aggregate
//! ```
//!
//! The services are local. One of them fails at first and is asked again, and one is too slow. The page says which part
//! is missing and why, and is still ready in time; otherwise the exit code is 1.
#![expect(clippy::print_stdout, reason = "an example speaks through its output")]

use std::{
    error::Error,
    fmt,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use cancel_safe_http_timeout::{BreakerConfig, RequestError, Retry, TimeoutClient};
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

/// How long the page may take in all.
const WHOLE: Duration = Duration::from_secs(2);

/// The parts of a user's page that arrived in time.
struct UserData {
    profile: Option<String>,
    posts: Vec<String>,
    friends: Vec<u64>,
    /// The parts that are missing, and why.
    missing: Vec<(&'static str, RequestError)>,
}

impl UserData {
    /// Asks all services at once. Dropping this drops all calls in flight, and leaves nothing behind.
    async fn aggregate(client: &TimeoutClient, base: &str, user: u64) -> Self {
        let end = Instant::now() + WHOLE;
        // A part has its own limit, but never more than is left for the page.
        let limit = |own: Duration| own.min(end.saturating_duration_since(Instant::now()));
        let (profile, posts, friends) = tokio::join!(
            fetch(client, format!("{base}/profile/{user}"), limit(Duration::from_millis(1_500))),
            fetch(client, format!("{base}/posts/{user}"), limit(Duration::from_millis(500))),
            fetch(client, format!("{base}/friends/{user}"), limit(Duration::from_secs(10))),
        );
        let mut missing = Vec::new();
        Self {
            profile: known("profile", profile, &mut missing),
            posts: known("posts", posts, &mut missing).unwrap_or_default(),
            friends: known("friends", friends, &mut missing).unwrap_or_default(),
            missing,
        }
    }
}

/// One part of the page; the limit covers its wait for a permit, its attempts and its body.
async fn fetch<T: DeserializeOwned>(client: &TimeoutClient, url: String, limit: Duration) -> Result<T, RequestError> {
    let response = client.get_with_timeout(url, Some(limit)).await?;
    Ok(response.json().await?)
}

/// Notes why a part is missing.
fn known<T>(
    part: &'static str,
    fetched: Result<T, RequestError>,
    missing: &mut Vec<(&'static str, RequestError)>,
) -> Option<T> {
    fetched.map_err(|error| missing.push((part, error))).ok()
}

impl fmt::Display for UserData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "profile: {}", self.profile.as_deref().unwrap_or("unknown"))?;
        writeln!(f, "posts:   {:?}", self.posts)?;
        writeln!(f, "friends: {:?}", self.friends)?;
        self.missing.iter().try_for_each(|(part, why)| writeln!(f, "without {part}: {why}"))
    }
}

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let base = serve().await?;
    let client = TimeoutClient::builder()
        .timeout(WHOLE)
        .concurrency(64)
        .retry(Retry::attempts(3))
        .breaker(BreakerConfig::default())
        .build()?;
    let begun = Instant::now();
    let page = UserData::aggregate(&client, &base, 7).await;
    let took = begun.elapsed();
    print!("{page}");
    println!(
        "after {took:.0?}, with {} retries and {} calls in flight",
        client.metrics().retries,
        client.metrics().in_flight
    );
    let parts: Vec<_> = page.missing.iter().map(|(part, _)| *part).collect();
    let is_as_promised = parts == ["posts"] && page.profile.is_some() && page.friends.len() == 3;
    Ok(if is_as_promised { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Serves the three services, and returns their address.
async fn serve() -> std::io::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let base = format!("http://{}", listener.local_addr()?);
    let asked = Arc::new(AtomicU32::new(0));
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(answer(socket, Arc::clone(&asked)));
        }
    });
    Ok(base)
}

/// Answers one request, whose head fits in one piece.
async fn answer(mut socket: TcpStream, asked_for_friends: Arc<AtomicU32>) -> std::io::Result<()> {
    let mut head = [0; 1_024];
    let length = socket.read(&mut head).await?;
    let head = String::from_utf8_lossy(&head[..length]);
    let (status, body) = if head.starts_with("GET /profile") {
        ("200 OK", "\"Ada\"")
    } else if head.starts_with("GET /posts") {
        tokio::time::sleep(Duration::from_secs(60)).await;
        ("200 OK", "[]")
    } else if asked_for_friends.fetch_add(1, Ordering::Relaxed) == 0 {
        ("503 Service Unavailable", "")
    } else {
        ("200 OK", "[1, 2, 3]")
    };
    let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
    // A socket that takes less than this at once is no use to an example.
    socket.write(answer.as_bytes()).await.map(drop)
}
