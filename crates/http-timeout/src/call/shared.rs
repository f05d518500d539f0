//! The shared state of a client's calls.
//!
//! Invariant: a failed TLS set-up is an error of the first send, never a panic.

use std::{fmt, sync::OnceLock, time::Duration};

use http::{HeaderMap, HeaderName};

use crate::{
    call::{
        redirect::Redirects,
        retry::{Budget, Retry},
    },
    hedge::Hedging,
    limit::Gate,
    origins::Origins,
};

/// How often to ping an HTTP/2 connection while a call waits on it.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// How long the answer to a ping may take.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// The state that all calls of a client share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) reqwest: OnceLock<reqwest::Client>,
    pub(crate) options: Options,
    pub(crate) gate: Gate,
    pub(crate) origins: Origins,
    pub(crate) budget: Option<Budget>,
    pub(crate) hedging: Option<Hedging>,
}

impl Shared {
    /// The client underneath. If its set-up failed before, tries again.
    pub(crate) fn reqwest(&self) -> reqwest::Result<&reqwest::Client> {
        if let Some(client) = self.reqwest.get() {
            return Ok(client);
        }
        let client = build_reqwest(underneath(), self.options.connect_timeout)?;
        Ok(self.reqwest.get_or_init(|| client))
    }

    /// Calls that wait for a permit, the client's or an origin's.
    pub(crate) fn waiting(&self) -> usize {
        self.gate.waiting() + self.origins.waiting()
    }
}

/// The options that a call reads.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) timeout: Option<Duration>,
    pub(crate) permit_timeout: Option<Duration>,
    pub(crate) attempt_timeout: Option<Duration>,
    pub(crate) connect_timeout: Option<Duration>,
    pub(crate) idle_timeout: Option<Duration>,
    pub(crate) max_body: Option<u64>,
    pub(crate) retry: Retry,
    pub(crate) redirects: Redirects,
    pub(crate) default_headers: DefaultHeaders,
    pub(crate) propagate: Option<HeaderName>,
}

/// Headers for every request that lacks them. `Debug` shows only their names.
#[derive(Clone, Default)]
pub(crate) struct DefaultHeaders(pub(crate) HeaderMap);

impl fmt::Debug for DefaultHeaders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// The builder of the client underneath, with defaults that the user may change.
pub(crate) fn underneath() -> reqwest::ClientBuilder {
    // Pings while a call waits, to find connections whose peer is gone.
    reqwest::Client::builder()
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .http2_keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
}

/// Builds the client underneath. The settings that this crate's guarantees rest on are set last.
pub(crate) fn build_reqwest(
    builder: reqwest::ClientBuilder,
    connect_timeout: Option<Duration>,
) -> reqwest::Result<reqwest::Client> {
    let builder = builder
        // The call follows redirects, each with its own origin's permit and breaker.
        .redirect(reqwest::redirect::Policy::none())
        // reqwest's own retries would bypass our budget.
        .retry(reqwest::retry::never());
    match connect_timeout {
        Some(timeout) => builder.connect_timeout(timeout),
        None => builder,
    }
    .build()
}
