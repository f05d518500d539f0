//! The client: its shared state, the start of every request, and its metrics.
//!
//! Invariant: a failed TLS set-up or an invalid URL is an error of the first send, never a panic.

mod builder;
mod many;
mod request;

use std::{sync::Arc, time::Duration};

use http::Method;
use reqwest::{IntoUrl, Request, Response};

use crate::{
    breaker::{CircuitBreaker, State},
    call::{Budget, Shared},
    error::RequestError,
    hedge::Hedging,
};

pub use builder::TimeoutClientBuilder;
pub use many::{FetchMany, Fetched};
pub use request::RequestBuilder;

/// An HTTP client with one deadline for each call, a bound on everything, and breakers that cannot stick.
///
/// Clones share one state. The response is reqwest's own type. Its body holds the call's permits, and returns them when
/// it has ended or is dropped. **Read or drop a body before you wait for many more responses**: at most `concurrency`
/// of them exist at a time.
///
/// # Examples
///
/// ```no_run
/// # use std::time::Duration;
/// # async fn f() -> Result<(), Box<dyn std::error::Error>> {
/// use cancel_safe_http_timeout::{BreakerConfig, Retry, TimeoutClient};
///
/// let client = TimeoutClient::builder()
///     .timeout(Duration::from_secs(10))
///     .concurrency(64)
///     .concurrency_per_host(8)
///     .retry(Retry::attempts(4))
///     .breaker(BreakerConfig::default())
///     .build()?;
/// let text = client.get("http://localhost:8080/").send().await?.text().await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct TimeoutClient {
    shared: Arc<Shared>,
}

/// A client's figures at one instant.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct ClientMetrics {
    /// Calls that hold a permit: an attempt is running, or its body has not ended.
    pub in_flight: usize,
    /// Calls that wait for a permit.
    pub waiting: usize,
    /// Retries, since the client was made.
    pub retries: u64,
    /// Hedged copies that were sent because an answer was late, since the client was made; none without a hedge.
    pub hedges: u64,
    /// Retries left in the budget; `None` without a retry policy.
    pub retries_left: Option<f64>,
    /// Origins that the client knows.
    pub origins: usize,
}

impl TimeoutClient {
    /// Starts a GET request.
    pub fn get(&self, url: impl IntoUrl) -> RequestBuilder {
        self.request(Method::GET, url)
    }

    /// Starts a POST request.
    pub fn post(&self, url: impl IntoUrl) -> RequestBuilder {
        self.request(Method::POST, url)
    }

    /// Starts a PUT request.
    pub fn put(&self, url: impl IntoUrl) -> RequestBuilder {
        self.request(Method::PUT, url)
    }

    /// Starts a PATCH request.
    pub fn patch(&self, url: impl IntoUrl) -> RequestBuilder {
        self.request(Method::PATCH, url)
    }

    /// Starts a DELETE request.
    pub fn delete(&self, url: impl IntoUrl) -> RequestBuilder {
        self.request(Method::DELETE, url)
    }

    /// Starts a HEAD request.
    pub fn head(&self, url: impl IntoUrl) -> RequestBuilder {
        self.request(Method::HEAD, url)
    }

    /// Starts an OPTIONS request.
    pub fn options(&self, url: impl IntoUrl) -> RequestBuilder {
        self.request(Method::OPTIONS, url)
    }

    /// Sends a request that was built elsewhere, with its own timeout if it has one.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, the same holds as for [`RequestBuilder::send`].
    ///
    /// # Errors
    ///
    /// Same as [`RequestBuilder::send`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn f(client: cancel_safe_http_timeout::TimeoutClient) -> Result<(), Box<dyn std::error::Error>> {
    /// let url = "http://localhost:8080/".parse()?;
    /// let request = reqwest::Request::new(reqwest::Method::GET, url);
    /// let response = client.execute(request).await?;
    /// # Ok(()) }
    /// ```
    pub fn execute(&self, request: Request) -> impl Future<Output = Result<Response, RequestError>> + Send + use<> {
        RequestBuilder::from_request(Arc::clone(&self.shared), request).send()
    }

    /// Starts a request. An invalid URL shows as the error of [`RequestBuilder::send`].
    pub fn request(&self, method: Method, url: impl IntoUrl) -> RequestBuilder {
        RequestBuilder::new(Arc::clone(&self.shared), method, url)
    }

    /// Sends a GET request that must end within `timeout`, or within the client's own timeout if `timeout` is `None`.
    ///
    /// The timeout covers the body too. A response with the status 4xx or 5xx is an error.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, the connection is abandoned, and permits, probe slot
    /// and unspent retry budget are back when the drop returns. It is unknown whether the server saw the request.
    ///
    /// # Errors
    ///
    /// Same as [`RequestBuilder::send`], and [`RequestError::Http`] for 4xx and 5xx.
    ///
    /// # Examples
    ///
    /// Three services at once, with a limit for each and one for all. The caller uses the answers that arrive in time,
    /// and names the rest. A timeout around `try_join!` would throw away the answers that have arrived.
    ///
    /// ```
    /// # use tokio::{io::{AsyncReadExt as _, AsyncWriteExt as _}, net::TcpListener};
    /// # async fn serve() -> std::io::Result<String> {
    /// #     let listener = TcpListener::bind("127.0.0.1:0").await?;
    /// #     let base = format!("http://{}", listener.local_addr()?);
    /// #     tokio::spawn(async move {
    /// #         while let Ok((mut socket, _)) = listener.accept().await {
    /// #             tokio::spawn(async move {
    /// #                 let mut head = [0; 1024];
    /// #                 let length = socket.read(&mut head).await.unwrap();
    /// #                 let head = String::from_utf8_lossy(&head[..length]);
    /// #                 let body = match head.split('/').nth(3) {
    /// #                     Some(part) if part.starts_with("posts") => std::future::pending().await,
    /// #                     Some(part) if part.starts_with("friends") => "[8, 9]",
    /// #                     _ => r#"{"name": "Ada"}"#,
    /// #                 };
    /// #                 let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    /// #                 socket.write(answer.as_bytes()).await.unwrap();
    /// #             });
    /// #         }
    /// #     });
    /// #     Ok(base)
    /// # }
    /// use std::{collections::BTreeMap, time::Duration};
    /// use cancel_safe_http_timeout::{RequestError, TimeoutClient};
    /// use serde::de::DeserializeOwned;
    ///
    /// struct UserData {
    ///     profile: Result<BTreeMap<String, String>, RequestError>,
    ///     posts: Result<Vec<String>, RequestError>,
    ///     friends: Result<Vec<u64>, RequestError>,
    /// }
    ///
    /// async fn part<T: DeserializeOwned>(
    ///     client: &TimeoutClient,
    ///     url: String,
    ///     limit: Duration,
    /// ) -> Result<T, RequestError> {
    ///     Ok(client.get_with_timeout(url, Some(limit)).await?.json().await?)
    /// }
    ///
    /// async fn aggregate_user_data(client: &TimeoutClient, base: &str, id: u64) -> UserData {
    ///     let all = Duration::from_secs(5);
    ///     let limit = |own: Duration| own.min(all);
    ///     let posts = format!("{base}/users/{id}/posts");
    ///     let friends = format!("{base}/users/{id}/friends");
    ///     let (profile, posts, friends) = tokio::join!(
    ///         part(client, format!("{base}/users/{id}"), limit(Duration::from_secs(2))),
    ///         part(client, posts, limit(Duration::from_millis(300))),
    ///         part(client, friends, limit(Duration::from_secs(9))),
    ///     );
    ///     UserData { profile, posts, friends }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let base = serve().await?;
    /// let client = TimeoutClient::new(Duration::from_secs(5), 100);
    /// let user = aggregate_user_data(&client, &base, 7).await;
    /// assert_eq!(user.profile?["name"], "Ada");
    /// assert_eq!(user.friends?, [8, 9]);
    /// // GET http://…/users/7/posts: timed out while waiting for the response after
    /// // 1 attempt in 300 ms: `timeout` has passed
    /// assert!(user.posts.is_err_and(|error| error.is_timeout()));
    /// # Ok(()) }
    /// ```
    pub fn get_with_timeout<U: IntoUrl>(
        &self,
        url: U,
        timeout: Option<Duration>,
    ) -> impl Future<Output = Result<Response, RequestError>> + Send + use<U> {
        let mut request = self.get(url);
        if timeout.is_some() {
            request = request.timeout(timeout);
        }
        request.send_for_success()
    }

    /// Fetches many URLs, as many at a time as the client's `concurrency` allows, and yields each answer as it arrives.
    ///
    /// Each URL has its own `per_request_timeout`, from its turn to the end of its body; `None` is the client's own
    /// timeout. Its turn comes when it is one of those `concurrency`, so with a
    /// [`concurrency_per_host`](TimeoutClientBuilder::concurrency_per_host) that is lower, the wait for a permit of the
    /// host is part of that time. A duplicate is fetched again. A response with the status 4xx or 5xx is an error. Dropping the stream
    /// drops the calls in flight, and URLs whose turn has not come are never requested.
    ///
    /// The stream yields a response when its body is in memory (at most `max_body`), so you can collect the responses.
    /// A body that breaks off is the error of its URL. For bodies too large for that, use [`get`](Self::get).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # async fn f(client: cancel_safe_http_timeout::TimeoutClient) {
    /// use futures_util::StreamExt as _;
    ///
    /// let urls = ["http://localhost/a", "http://localhost/b"];
    /// let mut pages = client.get_many(urls, Duration::from_secs(2));
    /// while let Some(page) = pages.next().await {
    ///     match page.result {
    ///         Ok(response) => println!("{}: {:?}", page.url, response.text().await),
    ///         Err(error) => println!("{}: {error}", page.url),
    ///     }
    /// }
    /// # }
    /// ```
    pub fn get_many<I>(&self, urls: I, per_request_timeout: impl Into<Option<Duration>>) -> FetchMany<I::IntoIter>
    where
        I: IntoIterator<Item: AsRef<str>>,
    {
        FetchMany::new(Arc::clone(&self.shared), urls.into_iter(), per_request_timeout.into())
    }

    /// Returns the origins whose breaker is not closed; with a [`breaker_key`](TimeoutClientBuilder::breaker_key), the
    /// keys.
    pub fn open_origins(&self) -> Vec<String> {
        let not_closed = |breaker: &CircuitBreaker| (breaker.state() != State::Closed).then_some(());
        self.shared.origins.survey(not_closed).into_iter().map(|(origin, ())| origin).collect()
    }

    /// Returns how often each origin's breaker has opened, for the origins where it ever did.
    ///
    /// If an origin was forgotten because too many others came after it, it is missing here too.
    pub fn trips(&self) -> Vec<(String, u64)> {
        self.shared.origins.survey(|breaker| Some(breaker.metrics().trips).filter(|trips| *trips > 0))
    }

    /// Returns the breaker for the origin of `url`, for instance to isolate it; `None` without breakers or for an
    /// invalid URL.
    ///
    /// With a [`breaker_key`](TimeoutClientBuilder::breaker_key), returns the breaker of a GET request to `url`.
    pub fn breaker(&self, url: impl IntoUrl) -> Option<CircuitBreaker> {
        let request = Request::new(Method::GET, url.into_url().ok()?);
        let origin = self.shared.origins.of(request.url());
        self.shared.origins.breaker(&request, &origin)
    }

    /// Returns the figures at this instant.
    pub fn metrics(&self) -> ClientMetrics {
        ClientMetrics {
            in_flight: self.shared.gate.in_flight(),
            waiting: self.shared.waiting(),
            retries: self.shared.budget.as_ref().map_or(0, Budget::retries_made),
            retries_left: self.shared.budget.as_ref().map(Budget::retries_left),
            hedges: self.shared.hedging.as_ref().map_or(0, Hedging::made),
            origins: self.shared.origins.len(),
        }
    }
}
