//! The client's options.
//!
//! Invariant: a client that was built is usable; an option out of its range is an error that names it.

use std::{
    num::NonZeroUsize,
    sync::{Arc, OnceLock},
    time::Duration,
};

use http::HeaderName;
use tokio::sync::Semaphore;

use crate::{
    breaker::BreakerConfig,
    call::{Budget, Options, Retry, Shared, build_reqwest},
    client::TimeoutClient,
    error::BuildError,
    limit::Limits,
    origins::Origins,
};

impl TimeoutClient {
    /// A client with this timeout for a whole call, and at most `max_concurrent` calls in flight (at least one).
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
        let reqwest = build_reqwest(None).map_or_else(|_| OnceLock::new(), OnceLock::from);
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

    /// The most calls that wait for a permit; one more is [`RequestError::Overloaded`](crate::RequestError::Overloaded).
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
    /// Leave its `timeout`, `read_timeout` and `retry` alone: they know nothing of permits, deadline and budget. Since
    /// its redirects cannot be watched, no request through it is taken for provably unsent, and a redirect to a host
    /// that cannot be reached is charged to the origin that redirected.
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
        let breaker = self.breaker.map(|config| config.with_patience(lease));
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
