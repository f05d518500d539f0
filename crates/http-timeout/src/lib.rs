//! A reqwest client with one deadline and bounded load, and a circuit breaker that cannot stick.
//!
//! # The problem
//!
//! The usual recipe is a semaphore, a timeout and a counter of failures:
//!
//! ```no_run
//! # use std::{sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed}, time::Duration};
//! # use tokio::{sync::Semaphore, time::timeout};
//! # struct Client { http: reqwest::Client, permits: Semaphore, failures: AtomicU32, probing: AtomicBool }
//! # impl Client {
//! async fn get(&self, url: &str) -> Result<reqwest::Response, Box<dyn std::error::Error>> {
//!     let _permit = self.permits.acquire().await?;        // waits outside the timeout, for ever if need be
//!     if self.failures.load(Relaxed) >= 5 && self.probing.swap(true, Relaxed) {
//!         return Err("circuit open".into());
//!     }
//!     let result = timeout(Duration::from_secs(5), self.http.get(url).send()).await;
//!     self.probing.store(false, Relaxed);                 // dropped at the await above: never runs, open for ever
//!     match &result {
//!         Ok(Ok(_)) => self.failures.store(0, Relaxed),   // a call from before the trip closes the circuit
//!         _ => _ = self.failures.fetch_add(1, Relaxed),
//!     }
//!     Ok(result??)                                        // the permit ends here; the body is read without it, untimed
//! }
//! # }
//! ```
//!
//! # With this crate
//!
//! ```
//! # use std::time::Duration;
//! # async fn serve() -> std::io::Result<String> {
//! #     use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
//! #     let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
//! #     let url = format!("http://{}/", listener.local_addr()?);
//! #     tokio::spawn(async move {
//! #         let (mut socket, _) = listener.accept().await.unwrap();
//! #         assert!(socket.read(&mut [0; 1024]).await.unwrap() > 0);
//! #         socket.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello").await.unwrap();
//! #     });
//! #     Ok(url)
//! # }
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use cancel_safe_http_timeout::{BreakerConfig, Retry, TimeoutClient};
//!
//! let client = TimeoutClient::builder()
//!     .timeout(Duration::from_secs(10))       // one deadline: permit, attempts, back-off and body
//!     .idle_timeout(Duration::from_secs(5))   // only while the peer is waited for
//!     .concurrency(64)                        // held until the body has ended
//!     .retry(Retry::attempts(4))
//!     .breaker(BreakerConfig::default())      // one for each origin
//!     .build()?;
//! # let url = serve().await?;
//! let response: reqwest::Response = client.get(&url).send().await?;
//! assert_eq!(response.text().await?, "hello");
//! assert_eq!(client.metrics().in_flight, 0);
//! # Ok(()) }
//! ```
//!
//! # Guarantees
//!
//! | event | what is left behind |
//! |---|---|
//! | a call or its response is dropped, at any await | permits, probe slot and unspent retry budget are back when the drop returns; nothing was spawned |
//! | a call is cut by its caller | what it says of the callee is told by how long it had waited: nothing, silence, or that it failed |
//! | a probe is cut | its slot is free at once; half a second of cut probes opens the circuit again, with its back-off |
//! | a probe panics, or hangs for its lease | it has failed, and the circuit is open again, with its back-off |
//! | a result comes after the circuit changed state | it changes nothing |
//! | the deadline passes | the call ends one timer tick later at most, in whatever phase it is |
//! | a request that is not idempotent fails | it was sent once, unless it is declared idempotent, has an `Idempotency-Key`, or provably was not sent |
//! | a server is dead | attempts ≤ calls × 1.2 + 10, and one for each second in which no call wanted a retry |
//! | a body is larger than the cap | reading it fails, at once if its length was announced |
//! | an answer is late, and its copy overtakes it | the loser's permit, admission and unsent token are back before the answer is returned |
//! | a redirect leads to another origin | that origin's breaker and limit decide, and it is told no secret of the first |
//!
//! # Who is to blame
//!
//! Decided in one place, for the breaker, the retry and the error. An origin is blamed for a timeout only if it had the
//! whole of that time to itself, and for a lost connection only if the connection was made for the call.
//!
//! | blame | for | breaker | tried again | error |
//! |---|---|---|---|---|
//! | origin | 5xx, 408, 429; a connection that is refused, reset or closed without an answer; a refused stream of HTTP/2; a timeout | failure | as [`Retry`] says, if repeatable or unsent | what happened |
//! | our queue | the deadline passed after our queue, back-off, earlier attempts or the consumer of the body had used up a part of it | a cut call | no, its time is over | `Timeout` |
//! | producer | the body of our upload failed, panicked or was slow, or the kernel hid how it went | nothing | no | `Network`, `Timeout` |
//! | pool | a pooled connection was closed by the time it was used; the call that made the connection for several was dropped | nothing | free: at once, not counted, if repeatable or unsent | `Network`, if that was of no use |
//! | machine | this one has no port, descriptor or memory left for a connection | nothing | as [`Retry`] says | `Network` |
//! | caller | the call or its body was dropped | a cut call | no | none |
//! | request | it is invalid, or redirected for ever | nothing | no | `InvalidRequest`, `Redirect` |
//!
//! Unsent is what no connection has taken, and what the server says it did not process: `REFUSED_STREAM`, and the streams
//! that a `GOAWAY` leaves out.
//!
//! # HTTP/2
//!
//! Many calls share one connection. The call that makes it may be dropped or time out: those that wait for it go on.
//! While a call waits, the connection is asked for a sign of life every 10 s, and closed if there is none in 5 s;
//! [`configure`](TimeoutClientBuilder::configure) can change that. A connection on which calls time out one after the
//! other is taken out of the pool, though it answers such questions: after 3 timeouts, after 3 calls that were dropped
//! after a second in all, and before a probe. The calls that are running on it go on. What opens the circuit of a server
//! that answers them while its streams hang is what opens it for any hang: timeouts, and the silence of cut calls.
//!
//! A refused stream is a failure of its origin, as a 503 is, and costs a retry of the budget; a `GOAWAY` is not.
//!
//! # Limitations
//!
//! - Whether a server saw a request whose call was dropped or timed out cannot be known; no client can.
//! - A response that is neither read nor dropped holds its permits, beyond the deadline too: nothing polls it.
//! - A redirect that asks for a streamed body again is an error: the body is gone. One that is answered while the upload
//!   is still under way can be lost with the connection, as in reqwest.
//! - A [reqwest client of your own](TimeoutClientBuilder::reqwest) follows redirects past these guarantees, unless it is
//!   told not to.
//! - Informational answers (1xx) are no signs of life: reqwest tells nobody of them.
//! - What the kernels have buffered of an upload counts as taken by the peer: on loopback 3 to 4 MiB (measured; Linux's
//!   `tcp_wmem` and `tcp_rmem` set it), which they ask to refill in steps of a third. A peer so slow that such a step takes
//!   longer than the idle timeout is cut although it reads; nobody is charged for that.
//! - `concurrency` counts calls, not connections; the pool is reqwest's.
//! - With the feature `rustls-no-provider` of reqwest, a missing provider panics inside reqwest; bring a
//!   [client](TimeoutClientBuilder::reqwest) of your own.
//!
//! # Comparison
//!
//! - **reqwest alone**: prefer it where a total timeout is all you need. Its `read_timeout` counts the time the consumer
//!   is busy and cuts uploads that progress; it has no limit on calls in flight or on a body's size.
//! - **reqwest-middleware with reqwest-retry**: sends POST again, takes no notice of `Retry-After`, has no budget and no
//!   common deadline.
//! - **tower's `ConcurrencyLimit` and `Timeout`**: their permit and their time end at the head of the response.
//! - **other breakers**: admit every waiting call as a probe, or lose a probe's slot when it is cancelled, or let
//!   results of earlier generations decide, or never see a hang that their callers cut.
//!
//! # Features
//!
//! - `multipart`: forms of several parts.
//! - `tower`: the breaker as a layer.
//! - `tracing`: changes of state and retries as events.
//!
//! TLS, proxies and decompression are features of reqwest, which you select on your own dependency on it.
//!
//! # MSRV
//!
//! Rust 1.89; raised in a minor release only.

mod breaker;
mod call;
mod client;
mod connections;
mod error;
mod hedge;
mod limit;
mod origins;
mod outgoing;

pub use breaker::{
    BreakerConfig, BreakerConfigBuilder, BreakerError, BreakerMap, BreakerMetrics, BreakerPermit, BreakerWindow,
    CircuitBreaker, CircuitOpen, Class, State, Transition,
};
#[cfg(feature = "tower")]
pub use breaker::{BreakerFuture, BreakerLayer, BreakerService, ByResult, Classify};
pub use call::{Attempts, Retry};
pub use client::{ClientMetrics, FetchMany, Fetched, RequestBuilder, TimeoutClient, TimeoutClientBuilder};
pub use error::{BuildError, CallReport, Failure, Limit, Phase, RequestError};
pub use hedge::Hedge;

// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
