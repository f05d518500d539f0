//! What the calls of one client share.
//!
//! Invariant: a TLS set-up that failed is an error value of the first send, never a panic.

use std::{sync::OnceLock, time::Duration};

use http::HeaderName;

use crate::{
    call::{
        redirect,
        retry::{Budget, Retry},
    },
    error::RequestError,
    limit::Limits,
    origins::Origins,
};

/// How often a connection of HTTP/2 is asked for a sign of life while a call waits on it.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// How long it may take to give one.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// The state that every call of a client has a part in.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) reqwest: OnceLock<reqwest::Client>,
    pub(crate) options: Options,
    pub(crate) limits: Limits,
    pub(crate) origins: Origins,
    pub(crate) budget: Option<Budget>,
}

impl Shared {
    /// The client underneath, set up now if that failed before.
    pub(crate) fn reqwest(&self) -> Result<&reqwest::Client, RequestError> {
        if let Some(client) = self.reqwest.get() {
            return Ok(client);
        }
        let client = build_reqwest(self.options.connect_timeout).map_err(RequestError::Setup)?;
        Ok(self.reqwest.get_or_init(|| client))
    }
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

pub(crate) fn build_reqwest(connect_timeout: Option<Duration>) -> reqwest::Result<reqwest::Client> {
    let mut builder = reqwest::Client::builder()
        .redirect(redirect::policy())
        // Its retries go round our budget.
        .retry(reqwest::retry::never())
        // While a call waits, so that a connection whose other end is gone is found.
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .http2_keep_alive_timeout(KEEP_ALIVE_TIMEOUT);
    if let Some(timeout) = connect_timeout {
        builder = builder.connect_timeout(timeout);
    }
    builder.build()
}
