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

/// The state that every call of a client has a part in.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) reqwest: OnceLock<reqwest::Client>,
    /// Whether that client is ours, with the redirect policy that leaves notes.
    pub(crate) notices_redirects: bool,
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
    let mut builder = reqwest::Client::builder().redirect(redirect::policy());
    if let Some(timeout) = connect_timeout {
        builder = builder.connect_timeout(timeout);
    }
    builder.build()
}
