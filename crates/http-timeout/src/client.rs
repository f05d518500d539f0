//! The client: its options, its shared state, and the first word of every request.
//!
//! Invariant: a client that exists is usable; wrong options and broken TLS are error values, not panics.

use std::{
    num::NonZeroUsize,
    sync::{Arc, OnceLock},
    time::Duration,
};

use http::{HeaderName, Method};
use reqwest::{IntoUrl, Response};
use tokio::sync::Semaphore;

use crate::{
    breaker::{CircuitBreaker, State},
    config::BreakerConfig,
    error::{BuildError, RequestError, redacted},
    limit::Limits,
    many::FetchMany,
    origins::Origins,
    request::RequestBuilder,
    retry::{Budget, Retry, retry_after},
};

/// How many attempts a response took, the one that brought it included: an extension of every response.
///
/// ```no_run
/// # async fn f(client: cancel_safe_http_timeout::TimeoutClient) -> Result<(), cancel_safe_http_timeout::RequestError> {
/// use cancel_safe_http_timeout::Attempts;
///
/// let response = client.get("http://localhost:8080/").send().await?;
/// let attempts = response.extensions().get::<Attempts>().map_or(1, |attempts| attempts.0);
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(clippy::exhaustive_structs, reason = "it is a number with a name, and never more")]
pub struct Attempts(pub u32);

/// An HTTP client with one deadline for each call, a bound on everything, and breakers that cannot stick.
///
/// Clones share one state. The response is reqwest's own; its body holds the call's permits, and they go back when it
/// has ended or is dropped. **Read or drop a body before you wait for many more responses**: at most `concurrency` of
/// them exist at a time.
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
///     .retry(Retry::idempotent(3))
///     .breaker(BreakerConfig::default())
///     .build()?;
/// let text = client.get("http://localhost:8080/").send().await?.text().await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct TimeoutClient {
    pub(crate) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    reqwest: OnceLock<reqwest::Client>,
    pub(crate) options: Options,
    pub(crate) limits: Limits,
    pub(crate) origins: Origins,
    pub(crate) budget: Option<Budget>,
}

/// The options that a call looks at.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) timeout: Option<Duration>,
    pub(crate) attempt_timeout: Option<Duration>,
    pub(crate) connect_timeout: Option<Duration>,
    pub(crate) idle_timeout: Option<Duration>,
    pub(crate) max_body: Option<u64>,
    pub(crate) retry: Option<Retry>,
    pub(crate) propagate: Option<HeaderName>,
}

/// A client's figures at one instant.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct ClientMetrics {
    /// Calls that hold a permit: an attempt is running, or its body has not ended.
    pub in_flight: usize,
    /// Calls that wait for a permit.
    pub waiting: usize,
    /// Retries that the budget has left; none without a retry policy.
    pub retries_left: Option<f64>,
    /// Origins that the client knows.
    pub origins: usize,
}

impl Shared {
    /// The client underneath, set up at the first use if that failed before.
    pub(crate) fn reqwest(&self) -> Result<&reqwest::Client, RequestError> {
        if let Some(client) = self.reqwest.get() {
            return Ok(client);
        }
        let client = build_reqwest(self.options.connect_timeout)?;
        Ok(self.reqwest.get_or_init(|| client))
    }
}

fn build_reqwest(connect_timeout: Option<Duration>) -> reqwest::Result<reqwest::Client> {
    let mut builder = reqwest::Client::builder();
    if let Some(timeout) = connect_timeout {
        builder = builder.connect_timeout(timeout);
    }
    builder.build()
}

impl TimeoutClient {
    /// A client with this timeout for a whole call, and at most `max_concurrent` calls in flight (at least one).
    ///
    /// Nothing but the timeout ends a call; there are no retries and no breaker. A TLS set-up that fails shows as the
    /// error of the first request.
    pub fn new(default_timeout: Duration, max_concurrent: usize) -> Self {
        let builder = Self::builder()
            .timeout(default_timeout)
            .connect_timeout(None)
            .attempt_timeout(None)
            .idle_timeout(None)
            .concurrency(max_concurrent.clamp(1, Semaphore::MAX_PERMITS));
        let reqwest = OnceLock::new();
        if let Ok(client) = build_reqwest(None) {
            reqwest.get_or_init(|| client);
        }
        builder.assemble(reqwest, None)
    }

    /// Starts from the defaults of [`TimeoutClientBuilder`].
    pub fn builder() -> TimeoutClientBuilder {
        TimeoutClientBuilder::default()
    }

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

    /// Starts a request. An invalid URL shows as the error of [`RequestBuilder::send`].
    pub fn request(&self, method: Method, url: impl IntoUrl) -> RequestBuilder {
        let request = self.shared.reqwest().map(|client| client.request(method, url));
        RequestBuilder::new(self.clone(), request)
    }

    /// Sends a GET request that must end within `timeout`, or within the client's own timeout if it is `None`.
    ///
    /// The timeout covers the body too. A response with the status 4xx or 5xx is an error.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, the connection is given up, and permits, probe slot
    /// and unspent retry budget are back when the drop returns. Whether the server saw the request is unknown.
    ///
    /// # Errors
    ///
    /// As [`RequestBuilder::send`], and [`RequestError::Http`] for 4xx and 5xx.
    pub async fn get_with_timeout(
        &self,
        url: impl IntoUrl,
        timeout: Option<Duration>,
    ) -> Result<Response, RequestError> {
        let mut request = self.get(url);
        if timeout.is_some() {
            request = request.timeout(timeout);
        }
        send_for_success(request).await
    }

    /// Fetches many URLs, as many at a time as the client's `concurrency` allows, and yields each as it is answered.
    ///
    /// Each URL has `per_request_timeout` for itself, from when its turn has come to the end of its body; `None` is the
    /// client's own timeout. A duplicate is fetched again. A response with the status 4xx or 5xx is an error. Dropping
    /// the stream drops what is in flight; URLs whose turn has not come are never asked for.
    ///
    /// A response that was yielded holds its permit until its body was read or dropped, so read each before you ask
    /// for the next.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # async fn f(client: cancel_safe_http_timeout::TimeoutClient) {
    /// use futures_util::StreamExt as _;
    ///
    /// let mut pages = client.get_many(["http://localhost/a", "http://localhost/b"], Duration::from_secs(2));
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
        FetchMany::new(self.clone(), urls.into_iter(), per_request_timeout.into())
    }

    /// The origins whose breaker is not closed.
    pub fn open_origins(&self) -> Vec<String> {
        let not_closed = |breaker: &CircuitBreaker| (breaker.state() != State::Closed).then_some(());
        self.shared.origins.survey(not_closed).into_iter().map(|(origin, ())| origin).collect()
    }

    /// How often each origin's breaker has opened, for those that ever did.
    ///
    /// An origin that was forgotten because too many others came after it is forgotten here too.
    pub fn trips(&self) -> Vec<(String, u64)> {
        self.shared.origins.survey(|breaker| Some(breaker.metrics().trips).filter(|trips| *trips > 0))
    }

    /// The breaker of the origin of `url`, for instance to isolate it; `None` without breakers or for an invalid URL.
    pub fn breaker(&self, url: impl IntoUrl) -> Option<CircuitBreaker> {
        self.shared.origins.of(&url.into_url().ok()?).breaker.clone()
    }

    /// The figures at this instant.
    pub fn metrics(&self) -> ClientMetrics {
        ClientMetrics {
            in_flight: self.shared.limits.in_flight(),
            waiting: self.shared.limits.waiting(),
            retries_left: self.shared.budget.as_ref().map(Budget::retries_left),
            origins: self.shared.origins.len(),
        }
    }
}

/// Sends `request` and turns 4xx and 5xx into errors.
pub(crate) async fn send_for_success(request: RequestBuilder) -> Result<Response, RequestError> {
    let response = request.send().await?;
    let status = response.status();
    if !status.is_client_error() && !status.is_server_error() {
        return Ok(response);
    }
    Err(RequestError::Http {
        status,
        url: redacted(response.url()).into(),
        retry_after: retry_after(response.headers(), std::time::SystemTime::now()),
        attempts: response.extensions().get::<Attempts>().map_or(1, |attempts| attempts.0),
    })
}

/// Sets the options of a [`TimeoutClient`].
///
/// | option | default | |
/// |---|---|---|
/// | `timeout` | 30 s | one deadline: wait for a permit, attempts, back-off and body |
/// | `attempt_timeout` | 30 s | one attempt, to the head of its response |
/// | `connect_timeout` | 10 s | name resolution, TCP and TLS |
/// | `idle_timeout` | 30 s | the peer neither takes nor gives a byte that is waited for |
/// | `max_body` | 64 MiB | a response's body, after decompression |
/// | `concurrency` | 100 | calls in flight |
/// | `concurrency_per_host` | none | of them to one origin (scheme, host and port) |
/// | `max_waiting` | 10,000 | calls that wait for a permit |
/// | `max_origins` | 1,024 | origins remembered |
/// | `retry` | none | |
/// | `breaker` | none | one for each origin |
#[derive(Clone, Debug)]
#[must_use = "the options take effect when `build` is called"]
pub struct TimeoutClientBuilder {
    options: Options,
    reqwest: Option<reqwest::Client>,
    connect_timeout_set: bool,
    concurrency: usize,
    concurrency_per_host: Option<usize>,
    max_waiting: usize,
    max_origins: usize,
    breaker: Option<BreakerConfig>,
    propagate: Option<String>,
}

impl Default for TimeoutClientBuilder {
    fn default() -> Self {
        let options = Options {
            timeout: Some(Duration::from_secs(30)),
            attempt_timeout: Some(Duration::from_secs(30)),
            connect_timeout: Some(Duration::from_secs(10)),
            idle_timeout: Some(Duration::from_secs(30)),
            max_body: Some(64 * 1024 * 1024),
            retry: None,
            propagate: None,
        };
        Self {
            options,
            reqwest: None,
            connect_timeout_set: false,
            concurrency: 100,
            concurrency_per_host: None,
            max_waiting: 10_000,
            max_origins: 1_024,
            breaker: None,
            propagate: None,
        }
    }
}

impl TimeoutClientBuilder {
    /// One deadline for the wait for a permit, every attempt, every back-off and the body; `None` for none.
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.options.timeout = timeout.into();
        self
    }

    /// How long one attempt may take to the head of its response.
    pub fn attempt_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.options.attempt_timeout = timeout.into();
        self
    }

    /// How long a connection may take to come about. Not with [`reqwest`](Self::reqwest), which brings its own.
    pub fn connect_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.options.connect_timeout = timeout.into();
        self.connect_timeout_set = true;
        self
    }

    /// How long the peer may be silent while it is waited for, in both directions.
    ///
    /// The time that the consumer of a body or the producer of a streamed request is busy does not count, nor does the
    /// wait for a permit. A body in memory above 64 KiB is sent in pieces to see its progress; such a request is not
    /// redirected by 307 and 308.
    pub fn idle_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.options.idle_timeout = timeout.into();
        self
    }

    /// The most bytes of a response's body, after decompression; reading more of it is an error.
    pub fn max_body(mut self, bytes: impl Into<Option<u64>>) -> Self {
        self.options.max_body = bytes.into();
        self
    }

    /// The most calls in flight; a call is in flight until its body has ended or was dropped.
    pub fn concurrency(mut self, calls: usize) -> Self {
        self.concurrency = calls;
        self
    }

    /// The most calls in flight to one origin (scheme, host and port).
    pub fn concurrency_per_host(mut self, calls: impl Into<Option<usize>>) -> Self {
        self.concurrency_per_host = calls.into();
        self
    }

    /// The most calls that wait for a permit; one more is [`RequestError::Overloaded`].
    pub fn max_waiting(mut self, calls: usize) -> Self {
        self.max_waiting = calls;
        self
    }

    /// The most origins whose breaker and limit are remembered; the least recently used goes first.
    pub fn max_origins(mut self, origins: usize) -> Self {
        self.max_origins = origins;
        self
    }

    /// Tries calls again.
    pub fn retry(mut self, retry: impl Into<Option<Retry>>) -> Self {
        self.options.retry = retry.into();
        self
    }

    /// Gives each origin a breaker.
    pub fn breaker(mut self, config: impl Into<Option<BreakerConfig>>) -> Self {
        self.breaker = config.into();
        self
    }

    /// Tells the server how many milliseconds are left of the call, in this header of each attempt.
    pub fn propagate_deadline(mut self, header: impl Into<String>) -> Self {
        self.propagate = Some(header.into());
        self
    }

    /// Sends through this client, with its TLS, proxy, name resolution and redirects.
    ///
    /// Leave its `timeout`, `read_timeout` and `retry` alone: they know nothing of permits, deadline and budget.
    pub fn reqwest(mut self, client: reqwest::Client) -> Self {
        self.reqwest = Some(client);
        self
    }

    /// Checks the options and makes the client.
    ///
    /// # Errors
    ///
    /// [`BuildError::Option`] names the first option that is out of its range; [`BuildError::Client`] says why the
    /// client underneath could not be set up.
    pub fn build(mut self) -> Result<TimeoutClient, BuildError> {
        let options = &mut self.options;
        let wrong = |option, problem| Err(BuildError::Option { option, problem });
        let durations = [
            ("timeout", options.timeout),
            ("attempt_timeout", options.attempt_timeout),
            ("connect_timeout", options.connect_timeout),
            ("idle_timeout", options.idle_timeout),
        ];
        if let Some((option, _)) = durations.iter().find(|(_, duration)| *duration == Some(Duration::ZERO)) {
            return wrong(option, "is zero, so no call could succeed");
        }
        let permits = 1..=Semaphore::MAX_PERMITS;
        if !permits.contains(&self.concurrency) {
            return wrong("concurrency", "is zero or more than a semaphore can hold");
        }
        if self.concurrency_per_host.is_some_and(|calls| !permits.contains(&calls)) {
            return wrong("concurrency_per_host", "is zero or more than a semaphore can hold");
        }
        if self.max_origins == 0 {
            return wrong("max_origins", "is zero");
        }
        if let Some(problem) = options.retry.as_ref().and_then(Retry::problem) {
            return wrong("retry", problem);
        }
        if let Some(name) = &self.propagate {
            match HeaderName::try_from(name) {
                Ok(name) => options.propagate = Some(name),
                Err(_) => return wrong("propagate_deadline", "is not the name of a header"),
            }
        }
        let client = match self.reqwest.take() {
            Some(_) if self.connect_timeout_set => {
                return wrong("connect_timeout", "cannot be set on a reqwest client that was made elsewhere");
            }
            Some(client) => client,
            None => build_reqwest(options.connect_timeout).map_err(BuildError::Client)?,
        };
        let lease = options.attempt_timeout.or(options.timeout);
        Ok(self.assemble(OnceLock::from(client), lease))
    }

    fn assemble(self, reqwest: OnceLock<reqwest::Client>, lease: Option<Duration>) -> TimeoutClient {
        let budget = self.options.retry.as_ref().map(Budget::new);
        let breaker = self.breaker.map(|config| config.with_default_lease(lease));
        let max_origins = NonZeroUsize::new(self.max_origins).unwrap_or(NonZeroUsize::MIN);
        let shared = Shared {
            reqwest,
            options: self.options,
            limits: Limits::new(self.concurrency, self.max_waiting),
            origins: Origins::new(max_origins, breaker, self.concurrency_per_host),
            budget,
        };
        TimeoutClient { shared: Arc::new(shared) }
    }
}
