//! The client's options.
//!
//! Invariant: a client that was built is usable; an option out of range is an error that names the option.

use std::{
    num::NonZeroUsize,
    sync::{Arc, OnceLock},
    time::Duration,
};

use http::{HeaderMap, HeaderName};
use tokio::sync::Semaphore;

use crate::{
    breaker::{BreakerConfig, Class},
    call::{DefaultHeaders, Options, Redirects, Retry, Shared, build_reqwest, underneath},
    client::TimeoutClient,
    error::BuildError,
    hedge::{Hedge, Hedging},
    limit::Gate,
    origins::{Breaking, Origins},
};

impl TimeoutClient {
    /// Makes a client with this timeout for a whole call, and at most `max_concurrent` calls in flight (at least one).
    ///
    /// No other timeout applies; there are no retries and no breaker, and the cap on bodies is 64 MiB. A TLS set-up that
    /// fails shows as the error of the first request.
    pub fn new(default_timeout: Duration, max_concurrent: usize) -> Self {
        let builder = Self::builder()
            .timeout(default_timeout)
            .connect_timeout(None)
            .attempt_timeout(None)
            .idle_timeout(None)
            .concurrency(max_concurrent.clamp(1, Semaphore::MAX_PERMITS));
        let reqwest = build_reqwest(underneath(), None).map_or_else(|_| OnceLock::new(), OnceLock::from);
        builder.assemble(reqwest, None)
    }

    /// Starts from the defaults of [`TimeoutClientBuilder`].
    pub fn builder() -> TimeoutClientBuilder {
        TimeoutClientBuilder::default()
    }
}

/// Sets the options of a [`TimeoutClient`].
///
/// | option | default | |
/// |---|---|---|
/// | `timeout` | 30 s | one deadline: wait for a permit, attempts, redirects, back-off and body |
/// | `permit_timeout` | none | the wait for a permit |
/// | `attempt_timeout` | 30 s | one request, to the head of its response |
/// | `connect_timeout` | 10 s | name resolution, TCP and TLS |
/// | `idle_timeout` | 30 s | how long the peer may neither take nor send a byte that the call waits for |
/// | `max_body` | 64 MiB | a response's body, after decompression |
/// | `concurrency` | 100 | calls in flight |
/// | `concurrency_per_host` | none | calls in flight to one origin (scheme, host and port) |
/// | `max_waiting` | 10,000 | calls that wait for the client's permits, and for each origin's |
/// | `max_origins` | 1,024 | origins remembered |
/// | `retry` | none | |
/// | `hedge` | none | instead of `retry` |
/// | `redirects` | 10 | followed in one attempt |
/// | `sensitive_headers` | the ones below | left out when a redirect crosses to another origin |
/// | `breaker` | none | one for each origin |
///
/// The client follows redirects as reqwest and browsers do: 301 and 302 turn POST into GET, 303 turns all but HEAD into
/// GET, 307 and 308 change nothing. Each request on the way has its own permit of its origin, admission by its origin's
/// breaker, attempt timeout and idle time. When the origin changes, the client leaves these out for good:
/// `authorization`, `cookie`, `cookie2`, `host`, `proxy-authorization`, `www-authenticate`, `x-api-key`,
/// `private-token`, the headers that [`sensitive_headers`](Self::sensitive_headers) names, headers marked by
/// `HeaderValue::set_sensitive`, and the query in `Referer`.
#[derive(Debug)]
#[must_use = "the options take effect when `build` is called"]
pub struct TimeoutClientBuilder {
    options: Options,
    reqwest: Option<reqwest::Client>,
    /// The builder of the client underneath, and whether it was changed.
    underneath: reqwest::ClientBuilder,
    is_configured: bool,
    sensitive: Vec<String>,
    connect_timeout_set: bool,
    concurrency: usize,
    concurrency_per_host: Option<usize>,
    max_waiting: usize,
    max_origins: usize,
    breaking: Breaking,
    hedge: Option<Hedge>,
    propagate: Option<String>,
}

impl Default for TimeoutClientBuilder {
    fn default() -> Self {
        let options = Options {
            timeout: Some(Duration::from_secs(30)),
            attempt_timeout: Some(Duration::from_secs(30)),
            connect_timeout: Some(Duration::from_secs(10)),
            permit_timeout: None,
            idle_timeout: Some(Duration::from_secs(30)),
            max_body: Some(64 * 1024 * 1024),
            retry: Retry::none(),
            redirects: Redirects::default(),
            default_headers: DefaultHeaders::default(),
            propagate: None,
        };
        Self {
            options,
            reqwest: None,
            underneath: underneath(),
            is_configured: false,
            sensitive: Vec::new(),
            connect_timeout_set: false,
            concurrency: 100,
            concurrency_per_host: None,
            max_waiting: 10_000,
            max_origins: 1_024,
            breaking: Breaking::default(),
            hedge: None,
            propagate: None,
        }
    }
}

impl TimeoutClientBuilder {
    /// Sets one deadline for the wait for a permit, every attempt, every back-off and the body; 30 s by default, `None`
    /// for no deadline.
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.options.timeout = timeout.into();
        self
    }

    /// Sets how long a call may wait for a permit at a time; by default as long as the call may take.
    pub fn permit_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.options.permit_timeout = timeout.into();
        self
    }

    /// Sets how long one request may take until the head of its response; 30 s by default. Each request that follows a
    /// redirect gets this time again.
    pub fn attempt_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.options.attempt_timeout = timeout.into();
        self
    }

    /// Sets how long connecting may take; 10 s by default. It does not apply with [`reqwest`](Self::reqwest), which
    /// brings its own.
    pub fn connect_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.options.connect_timeout = timeout.into();
        self.connect_timeout_set = true;
        self
    }

    /// Sets how long the peer may be silent while the call waits for it, in both directions; 30 s by default.
    ///
    /// The time while the consumer of a body or the producer of a streamed request is busy does not count, nor does the
    /// wait for a permit. A body in memory above 64 KiB is sent in pieces, to see its progress.
    pub fn idle_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.options.idle_timeout = timeout.into();
        self
    }

    /// Sets the maximum size of a response's body in bytes, after decompression; reading more of it is an error. 64 MiB
    /// by default.
    pub fn max_body(mut self, bytes: impl Into<Option<u64>>) -> Self {
        self.options.max_body = bytes.into();
        self
    }

    /// Sets the maximum number of calls in flight, 100 by default. A call is in flight until its body has ended or was
    /// dropped.
    pub fn concurrency(mut self, calls: usize) -> Self {
        self.concurrency = calls;
        self
    }

    /// Sets the maximum number of calls in flight to one origin (scheme, host and port); no such limit by default.
    pub fn concurrency_per_host(mut self, calls: impl Into<Option<usize>>) -> Self {
        self.concurrency_per_host = calls.into();
        self
    }

    /// Sets how many calls may wait for the client's permits, and how many for those of one origin; 10,000 by default.
    /// One call more is [`RequestError::Overloaded`](crate::RequestError::Overloaded).
    ///
    /// The queues are separate: however many calls wait for a slow origin, they take no place from calls to others.
    pub fn max_waiting(mut self, calls: usize) -> Self {
        self.max_waiting = calls;
        self
    }

    /// Sets how many origins the client remembers, with their breaker and limit; the least recently used goes first.
    /// 1,024 by default.
    pub fn max_origins(mut self, origins: usize) -> Self {
        self.max_origins = origins;
        self
    }

    /// Retries calls; by default there are no retries.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.options.retry = retry;
        self
    }

    /// Sends a second copy of a request if its answer is late; by default it sends none. Cannot be combined with
    /// [`retry`](Self::retry).
    pub fn hedge(mut self, hedge: impl Into<Option<Hedge>>) -> Self {
        self.hedge = hedge.into();
        self
    }

    /// Sets the maximum number of redirects of one attempt, 10 by default; with zero, a redirect is a response like any
    /// other.
    pub fn redirects(mut self, most: u32) -> Self {
        self.options.redirects.most = most;
        self
    }

    /// Names further headers that are left out when a redirect crosses to another origin.
    ///
    /// ```
    /// use cancel_safe_http_timeout::TimeoutClient;
    ///
    /// let secret = ["x-session", "x-signature"];
    /// let client = TimeoutClient::builder().sensitive_headers(secret).build()?;
    /// # Ok::<(), cancel_safe_http_timeout::BuildError>(())
    /// ```
    pub fn sensitive_headers(mut self, names: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.sensitive.extend(names.into_iter().map(Into::into));
        self
    }

    /// Sets headers for every request that does not set them itself.
    ///
    /// Across origins they are left out like the headers of a request. Headers that [`configure`](Self::configure)
    /// gives to reqwest are not: the sensitive ones are sent empty.
    pub fn default_headers(mut self, headers: HeaderMap) -> Self {
        self.options.default_headers = DefaultHeaders(headers);
        self
    }

    /// Gives each origin a breaker; by default there are no breakers.
    pub fn breaker(mut self, config: impl Into<Option<BreakerConfig>>) -> Self {
        self.breaking.config = config.into();
        self
    }

    /// Makes one breaker for each value of `key`, instead of one for each origin.
    ///
    /// The usual reason is one host whose routes fail independently. Use few values, without ids: a breaker that sees
    /// few calls never trips, and the client remembers at most `max_origins` breakers. Put no secret into a key: errors
    /// and [`trips`](TimeoutClient::trips) name it.
    ///
    /// ```
    /// use cancel_safe_http_timeout::{BreakerConfig, TimeoutClient};
    ///
    /// // One breaker for `/search/…`, one for `/orders/…` and so on, of each host.
    /// let route = |request: &reqwest::Request| {
    ///     let url = request.url();
    ///     let first = url.path_segments().and_then(|mut path| path.next());
    ///     let first = first.unwrap_or_default();
    ///     format!("{}/{first}", url.origin().ascii_serialization())
    /// };
    /// let client = TimeoutClient::builder().breaker(BreakerConfig::default());
    /// let client = client.breaker_key(route).build()?;
    /// # Ok::<(), cancel_safe_http_timeout::BuildError>(())
    /// ```
    pub fn breaker_key(mut self, key: impl Fn(&reqwest::Request) -> String + Send + Sync + 'static) -> Self {
        self.breaking.key = Some(Box::new(key));
        self
    }

    /// Lets `classify` decide, by the head of an answer, what the answer says about the callee. It decides nothing
    /// else.
    ///
    /// Without it, 5xx, 408 and 429 are failures, and everything else is a success. It is not called if there is no
    /// answer.
    ///
    /// ```
    /// use cancel_safe_http_timeout::{BreakerConfig, Class, TimeoutClient};
    ///
    /// // A 501 is what this service says of routes that it does not have, and a 429 is
    /// // for us to heed, not for the breaker.
    /// let classify = |response: &reqwest::Response| match response.status().as_u16() {
    ///     429 => Class::Ignore,
    ///     501 => Class::Success,
    ///     500.. => Class::Failure,
    ///     _ => Class::Success,
    /// };
    /// let client = TimeoutClient::builder().breaker(BreakerConfig::default());
    /// let client = client.classify(classify).build()?;
    /// # Ok::<(), cancel_safe_http_timeout::BuildError>(())
    /// ```
    pub fn classify(mut self, classify: impl Fn(&reqwest::Response) -> Class + Send + Sync + 'static) -> Self {
        self.breaking.classify = Some(Box::new(classify));
        self
    }

    /// Tells the server in this header of each attempt how many milliseconds of the call are left. Off by default.
    pub fn propagate_deadline(mut self, header: impl Into<String>) -> Self {
        self.propagate = Some(header.into());
        self
    }

    /// Changes the reqwest client underneath, for instance its TLS, proxies or name resolution.
    ///
    /// Every guarantee of this crate still holds, because the settings that they rest on are set after `change`:
    /// redirects and retries come from this builder, and so does `connect_timeout` unless it is `None` here.
    ///
    /// ```
    /// use cancel_safe_http_timeout::TimeoutClient;
    ///
    /// let client = TimeoutClient::builder()
    ///     .configure(|b: reqwest::ClientBuilder| b.no_proxy().user_agent("crawler/1.0"))
    ///     .build()?;
    /// # Ok::<(), cancel_safe_http_timeout::BuildError>(())
    /// ```
    pub fn configure(mut self, change: impl FnOnce(reqwest::ClientBuilder) -> reqwest::ClientBuilder) -> Self {
        self.underneath = change(self.underneath);
        self.is_configured = true;
        self
    }

    /// Sends through this client, which was made elsewhere. Prefer [`configure`](Self::configure). With your own
    /// client:
    ///
    /// - It follows redirects internally, as its own policy says, unless that is `Policy::none()`. It does so without a
    ///   permit of their origin, past its breaker, with its own rules for headers, and at the expense of the first
    ///   origin.
    /// - Its `timeout`, `read_timeout` and `retry` know nothing of permits, deadline and budget: leave them alone.
    /// - It has its own `connect_timeout`.
    /// - It pings its HTTP/2 connections (here every 10 s while a call waits) only if you tell it to.
    pub fn reqwest(mut self, client: reqwest::Client) -> Self {
        self.reqwest = Some(client);
        self
    }

    /// Checks the options and makes the client.
    ///
    /// # Errors
    ///
    /// [`BuildError::Option`] names the first option that is out of range. [`BuildError::Client`] says why the client
    /// underneath could not be set up.
    pub fn build(mut self) -> Result<TimeoutClient, BuildError> {
        let options = &mut self.options;
        let wrong = |option, problem| Err(BuildError::Option { option, problem });
        let durations = [
            ("timeout", options.timeout),
            ("permit_timeout", options.permit_timeout),
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
        if let Some(problem) = options.retry.problem() {
            return wrong("retry", problem);
        }
        if let Some(problem) = self.hedge.as_ref().and_then(Hedge::problem) {
            return wrong("hedge", problem);
        }
        if self.hedge.is_some() && options.retry.is_some() {
            return wrong("hedge", "cannot go with `retry`: both answer the same trouble with more load");
        }
        for name in std::mem::take(&mut self.sensitive) {
            match HeaderName::try_from(name) {
                Ok(name) => options.redirects.sensitive.push(name),
                Err(_) => return wrong("sensitive_headers", "has what is not the name of a header"),
            }
        }
        if self.breaking.config.is_none() && self.breaking.key.is_some() {
            return wrong("breaker_key", "is of no use without a breaker");
        }
        if self.breaking.config.is_none() && self.breaking.classify.is_some() {
            return wrong("classify", "is of no use without a breaker");
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
            Some(_) if self.is_configured => {
                return wrong("configure", "cannot change a reqwest client that was made elsewhere");
            }
            Some(client) => client,
            None => {
                let underneath = std::mem::take(&mut self.underneath);
                build_reqwest(underneath, options.connect_timeout).map_err(BuildError::Client)?
            }
        };
        options.redirects.observe(&client);
        let lease = options.attempt_timeout.or(options.timeout);
        Ok(self.assemble(OnceLock::from(client), lease))
    }

    fn assemble(mut self, reqwest: OnceLock<reqwest::Client>, lease: Option<Duration>) -> TimeoutClient {
        let budget = self.options.retry.budget_of_client();
        self.breaking.config = self.breaking.config.map(|config| config.with_patience(lease));
        let per_host = self.concurrency_per_host.map(|size| (size, self.max_waiting));
        let max_origins = NonZeroUsize::new(self.max_origins).unwrap_or(NonZeroUsize::MIN);
        let shared = Shared {
            reqwest,
            options: self.options,
            gate: Gate::new(self.concurrency, self.max_waiting),
            origins: Origins::new(max_origins, self.breaking, per_host),
            budget,
            hedging: self.hedge.map(Hedging::new),
        };
        TimeoutClient { shared: Arc::new(shared) }
    }
}
