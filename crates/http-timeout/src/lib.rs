//! A reqwest client with one deadline and bounded load, and a circuit breaker that cannot stick.
//!
//! # The problem
//!
//! The usual recipe is a semaphore, a timeout and a counter of failures:
//!
//! ```no_run
//! # use std::{sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed}, time::Duration};
//! # use std::error::Error;
//! # use tokio::{sync::Semaphore, time::timeout};
//! # struct Client { http: reqwest::Client, permits: Semaphore, failures: AtomicU32, probing: AtomicBool }
//! # impl Client {
//! async fn get(&self, url: &str) -> Result<reqwest::Response, Box<dyn Error>> {
//!     let _permit = self.permits.acquire().await?; // waits outside of the timeout
//!     if self.failures.load(Relaxed) >= 5 && self.probing.swap(true, Relaxed) {
//!         return Err("circuit open".into());
//!     }
//!     let result = timeout(Duration::from_secs(5), self.http.get(url).send()).await;
//!     // Dropped at the await above: never runs, and the circuit is open for ever.
//!     self.probing.store(false, Relaxed);
//!     match &result {
//!         // A call from before the trip closes the circuit.
//!         Ok(Ok(_)) => self.failures.store(0, Relaxed),
//!         _ => _ = self.failures.fetch_add(1, Relaxed),
//!     }
//!     Ok(result??) // the permit ends here; the body is read without it, untimed
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
//!     // One deadline: permit, attempts, back-off and body.
//!     .timeout(Duration::from_secs(10))
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
//! | a caller cuts its call | how long the call had waited decides what it says about the callee: nothing, silence, or a failure |
//! | a probe is cut | its slot is free at once; half a second of cut probes reopens the circuit, with its back-off |
//! | a probe panics, or hangs for its lease | it has failed, and the circuit is open again, with its back-off |
//! | a result comes after the circuit changed state | it changes nothing |
//! | the deadline passes | the call ends at most one timer tick later, whatever phase it is in |
//! | a request that is not idempotent fails | it was sent once, unless it is declared idempotent, has an `Idempotency-Key`, or provably was not sent |
//! | a server is dead | attempts ≤ calls × 1.2 + 10, and one for each second in which no call wanted a retry |
//! | a body is larger than the cap | reading it fails, at once if its length was announced |
//! | an answer is late, and a hedged copy overtakes it | the loser's permit, admission and unsent token are back before the answer is returned |
//! | a redirect leads to another origin | that origin's breaker and limit decide, and it receives none of the first origin's secrets |
//!
//! # Who is to blame
//!
//! One place decides this, for the breaker, the retry and the error. An origin is to blame for a timeout only if it had
//! the whole of that time to itself, and for a lost connection only if the connection was made for the call.
//!
//! | blame | for | breaker | tried again | error |
//! |---|---|---|---|---|
//! | origin | 5xx, 408, 429; a connection that is refused, reset or closed without an answer; a refused HTTP/2 stream; a timeout | failure | as [`Retry`] says, if repeatable or unsent | what happened |
//! | our queue | the deadline passed after our queue, back-off, earlier attempts or the consumer of the body had used up a part of it | a cut call | no, its time is over | `Timeout` |
//! | producer | the body of our upload failed, panicked or was slow, or the kernel hid how it went | nothing | no | `Network`, `Timeout` |
//! | pool | a pooled connection was closed by the time it was used; the call that made the connection for several was dropped | nothing | free: at once, not counted, if repeatable or unsent | `Network`, if that was of no use |
//! | machine | this machine has no port, descriptor or memory left for a connection | nothing | as [`Retry`] says | `Network` |
//! | caller | the call or its body was dropped | a cut call | no | none |
//! | request | it is invalid, or redirected endlessly | nothing | no | `InvalidRequest`, `Redirect` |
//!
//! A request is unsent if no connection has taken it, or if the server says that it did not process it:
//! `REFUSED_STREAM`, and the streams that a `GOAWAY` leaves out.
//!
//! # HTTP/2
//!
//! Many calls share one connection. The call that makes it may be dropped or time out; the calls that wait for the
//! connection continue.
//!
//! While a call waits, the client pings the connection every 10 s, and closes it if no answer comes within 5 s;
//! [`configure`](TimeoutClientBuilder::configure) can change that. A connection may answer pings while calls on it time
//! out one after the other. The client takes such a connection out of the pool after 3 timeouts, after 3 dropped calls
//! that had waited a second in all, and before a probe. Calls that are running on it continue.
//!
//! If a server answers pings while its streams hang, its circuit opens as for any hang: through timeouts, and the
//! silence of cut calls.
//!
//! A refused stream is a failure of its origin, like a 503, and costs a retry of the budget; a `GOAWAY` is not.
//!
//! # Limitations
//!
//! - No client can know whether a server saw a request whose call was dropped or timed out.
//! - A response that is neither read nor dropped holds its permits, even beyond the deadline, because nothing polls it.
//! - A redirect that asks for a streamed body again is an error: the body is gone. A redirect that arrives during the
//!   upload can be lost with the connection, as in reqwest.
//! - A [reqwest client of your own](TimeoutClientBuilder::reqwest) follows redirects past these guarantees, unless you
//!   tell it not to.
//! - Informational answers (1xx) are no signs of life, because reqwest does not report them.
//! - The part of an upload that the kernels have buffered counts as taken by the peer: on loopback 3 to 4 MiB
//!   (measured; Linux's `tcp_wmem` and `tcp_rmem` set it). They ask to refill it in steps of a third. If a peer is so
//!   slow that such a step takes longer than the idle timeout, it is cut although it reads; nobody is blamed for that.
//! - `concurrency` counts calls, not connections; the pool is reqwest's.
//! - A call that waits for a stream of an HTTP/2 connection waits for the origin, even if all its streams carry
//!   responses that this client does not read. Keep `concurrency_per_host` below the server's limit, often 100.
//! - With reqwest's feature `rustls-no-provider`, a missing provider panics inside reqwest; bring your own
//!   [client](TimeoutClientBuilder::reqwest).
//!
//! # Comparison
//!
//! - **reqwest alone**: prefer it if a total timeout is all you need. Its `read_timeout` counts the time while the
//!   consumer is busy, and cuts uploads that make progress. It has no limit on calls in flight or on a body's size.
//! - **reqwest-middleware with reqwest-retry**: resends POST, ignores `Retry-After`, and has no budget and no common
//!   deadline.
//! - **tower's `ConcurrencyLimit` and `Timeout`**: their permit and their time end at the head of the response.
//! - **other breakers**: they admit every waiting call as a probe, or lose the slot of a cancelled probe, or let
//!   results of earlier generations decide, or never see a hang that their callers cut.
//!
//! # Features
//!
//! - `multipart`: forms of several parts.
//! - `tower`: the breaker as a layer.
//! - `tracing`: changes of state and retries as events.
//!
//! TLS, proxies and decompression are reqwest features; select them on your own reqwest dependency.
//!
//! # MSRV
//!
//! Rust 1.89. It is raised only in a minor release.

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
