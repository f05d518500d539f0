//! What a call asked for and how far it had come: the part that all its errors have in common.
//!
//! Invariant: no report carries the credentials, the query or the fragment of a URL.

use std::{fmt, time::Duration};

use http::Method;
use reqwest::Request;
use url::Url;

/// What a call was doing when it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Waiting for a permit of the client's limits. The request that waits was not sent; one before it may have been,
    /// unless `attempts` is 0.
    Permit,
    /// Connecting. The request was not sent; one before it, an earlier attempt or the one that was redirected, may have
    /// been.
    Connect,
    /// Sending the request or waiting for the head of the response.
    Response,
    /// Reading the body of the response.
    Body,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Permit => "waiting for a permit",
            Self::Connect => "connecting",
            Self::Response => "waiting for the response",
            Self::Body => "reading the body",
        })
    }
}

/// Which time limit a call ran into. Its text is the name of the option that sets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Limit {
    /// The deadline of the whole call.
    Total,
    /// How long one request may take until the head of its response.
    Attempt,
    /// How long connecting may take.
    Connect,
    /// How long the peer may be silent while the call waits for it.
    Idle,
    /// How long a call may wait for a permit.
    Permit,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Total => "timeout",
            Self::Attempt => "attempt_timeout",
            Self::Connect => "connect_timeout",
            Self::Idle => "idle_timeout",
            Self::Permit => "permit_timeout",
        })
    }
}

/// What a call asked for, and how far it had come when it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CallReport {
    /// The method; `None` if only a [`reqwest::Error`] was available.
    pub method: Option<Method>,
    /// The URL without credentials, query and fragment; after redirects, the one that they led to.
    pub url: String,
    /// What the call was doing.
    pub phase: Phase,
    /// How many attempts had been made, including the last. A redirect is part of its attempt.
    pub attempts: u32,
    /// The time since the call began.
    pub elapsed: Duration,
}

impl CallReport {
    /// The report of the call that sends `request`.
    pub(crate) fn of(request: &Request, phase: Phase, attempts: u32, elapsed: Duration) -> Box<Self> {
        let (method, url) = (Some(request.method().clone()), redacted(request.url()));
        Box::new(Self { method, url, phase, attempts, elapsed })
    }

    /// "after 2 attempts in 1.2 s", if that is known.
    pub(super) fn effort(&self) -> String {
        if self.method.is_none() {
            return String::new();
        }
        let plural = if self.attempts == 1 { "" } else { "s" };
        format!(" after {} attempt{plural} in {}", self.attempts, Shown(self.elapsed))
    }
}

impl fmt::Display for CallReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.method {
            Some(method) => write!(f, "{method} {}", self.url),
            None => f.write_str(&self.url),
        }
    }
}

/// A duration in short form: "20 ms", "1.2 s".
pub(super) struct Shown(pub(super) Duration);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 < Duration::from_secs(1) {
            write!(f, "{} ms", self.0.as_millis())
        } else {
            write!(f, "{:.1} s", self.0.as_secs_f64())
        }
    }
}

/// What a request is about, for the errors of its call.
#[derive(Clone)]
pub(crate) struct Subject {
    pub(crate) method: Method,
    pub(crate) url: Url,
}

impl fmt::Debug for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, redacted(&self.url))
    }
}

impl Subject {
    pub(crate) fn report(&self, phase: Phase, attempts: u32, elapsed: Duration) -> Box<CallReport> {
        let (method, url) = (Some(self.method.clone()), redacted(&self.url));
        Box::new(CallReport { method, url, phase, attempts, elapsed })
    }
}

/// The URL without what may be secret: credentials, query and fragment.
pub(crate) fn redacted(url: &Url) -> String {
    if url.cannot_be_a_base() {
        // For example "name:password@host", where the scheme is missing.
        return redacted_text(url.as_str());
    }
    let mut shown = url.clone();
    // Both setters refuse only URLs that cannot have credentials.
    let _ = shown.set_username("");
    let _ = shown.set_password(None);
    shown.set_query(None);
    shown.set_fragment(None);
    shown.into()
}

/// Works like [`redacted`], for a text that is not a URL. It is unknown where its credentials end, so everything before
/// the last `@` is left out.
pub(crate) fn redacted_text(text: &str) -> String {
    let is_scheme = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte));
    let begin = text.find("://").filter(|at| is_scheme(&text[..*at])).map_or(0, |at| at + 3);
    let (scheme, rest) = text.split_at(begin);
    let (gap, rest) = match rest.rsplit_once('@') {
        // The part that is left out may be more than the credentials.
        Some((left_out, rest)) if left_out.contains(['/', '\\', '?', '#']) => ("…@", rest),
        Some((_, rest)) => ("", rest),
        None => ("", rest),
    };
    let shown = rest.split(['?', '#']).next().unwrap_or_default();
    format!("{scheme}{gap}{shown}").replace(char::is_control, " ")
}
