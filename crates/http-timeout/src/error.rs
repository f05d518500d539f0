//! The errors, named by what the caller can do about them; each says in one line what was requested and how far it got.
//!
//! Invariant: no message carries the credentials, the query or the fragment of a URL, nor a header.

mod report;

use std::{error::Error as StdError, fmt, io, time::Duration};

use http::StatusCode;

use report::Shown;

pub use report::{CallReport, Limit, Phase};
pub(crate) use report::{Subject, redacted, redacted_text};

/// reqwest's error for a failed call, and what that call was. It displays as reqwest's error.
#[derive(Debug)]
#[non_exhaustive]
pub struct Failure {
    /// reqwest's error, without a URL, because that may hold secrets.
    pub error: reqwest::Error,
    /// What the call asked for.
    pub report: Box<CallReport>,
}

impl std::ops::Deref for Failure {
    type Target = reqwest::Error;

    fn deref(&self) -> &reqwest::Error {
        &self.error
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl StdError for Failure {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&self.error)
    }
}

/// Why a request got no response, or a body did not end.
///
/// One line of text says what was asked, what went wrong, after how many attempts and how long, and the cause:
///
/// ```text
/// GET https://host/path: could not connect after 2 attempts in 1.2 s: connection refused
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// A time limit ran out: of the whole call, of an attempt, or for a silent peer.
    #[error("{report}: timed out while {phase}{}: `{limit}` has passed", report.effort())]
    #[non_exhaustive]
    Timeout {
        /// What the call was doing.
        phase: Phase,
        /// Which limit fired.
        limit: Limit,
        /// The time since the call began.
        elapsed: Duration,
        /// How many attempts had been made, including the last.
        attempts: u32,
        /// What the call asked for.
        report: Box<CallReport>,
    },
    /// The origin's circuit breaker refused the call; this attempt sent nothing.
    #[error("{report}: the circuit of {origin} is open{}: ask again after {}", report.effort(), Shown(*retry_after))]
    #[non_exhaustive]
    CircuitOpen {
        /// Scheme, host and port; or the key of the breaker, if the client has a function for it.
        origin: String,
        /// The time after which the breaker may admit a probe.
        retry_after: Duration,
        /// What the call asked for.
        report: Box<CallReport>,
    },
    /// The body is larger than the client's `max_body`.
    #[error("{report}: the body is larger than {limit} bytes{}", report.effort())]
    #[non_exhaustive]
    BodyTooLarge {
        /// The limit, in bytes, after decompression.
        limit: u64,
        /// What the call asked for.
        report: Box<CallReport>,
    },
    /// Too many calls are already waiting for a permit; nothing was sent.
    #[error("{report}: {limit} calls are waiting for a permit already{}", report.effort())]
    #[non_exhaustive]
    Overloaded {
        /// How many calls may wait.
        limit: usize,
        /// What the call asked for.
        report: Box<CallReport>,
    },
    /// There is no tokio runtime here, or one without a time driver; nothing was sent.
    #[error(
        "{report}: a call needs a tokio runtime with time and IO: use #[tokio::main], or a builder with enable_all"
    )]
    #[non_exhaustive]
    NoRuntime {
        /// What the call asked for.
        report: Box<CallReport>,
    },
    /// The request could not be built, for instance because the URL is invalid; nothing was sent.
    #[error("{report}: the request is invalid{}: {}", _0.report.effort(), cause(_0), report = _0.report)]
    InvalidRequest(#[source] Failure),
    /// The HTTP client underneath could not be set up, for instance its TLS; nothing was sent.
    #[error("{report}: the HTTP client cannot be set up{}: {}", _0.report.effort(), cause(_0), report = _0.report)]
    Setup(#[source] Failure),
    /// The network or the peer failed.
    #[error("{report}: {}{}: {}", failing(_0.report.phase), _0.report.effort(), cause(_0), report = _0.report)]
    Network(#[source] Failure),
    /// The server answered with a redirect that cannot be followed.
    #[error("{report}: the redirect to {to} was not followed{}: {problem}", report.effort())]
    #[non_exhaustive]
    Redirect {
        /// The target, without credentials, query and fragment.
        to: String,
        /// Why it was not followed.
        problem: &'static str,
        /// What the call asked for.
        report: Box<CallReport>,
    },
    /// The response has the status 4xx or 5xx. Only `get_with_timeout`, `get_many` and `error_for_status` return this.
    #[error("{report}: the server answered {status}{}", report.effort())]
    #[non_exhaustive]
    Http {
        /// The status.
        status: StatusCode,
        /// How long the server asked to wait, if it did.
        retry_after: Option<Duration>,
        /// What the call asked for.
        report: Box<CallReport>,
    },
}

fn failing(phase: Phase) -> &'static str {
    match phase {
        Phase::Permit | Phase::Connect => "could not connect",
        Phase::Response => "the network or the peer failed before the response",
        Phase::Body => "the network or the peer failed within the body",
    }
}

impl RequestError {
    /// Returns what the call asked for, and how far it had come.
    pub fn report(&self) -> &CallReport {
        match self {
            Self::Timeout { report, .. }
            | Self::CircuitOpen { report, .. }
            | Self::BodyTooLarge { report, .. }
            | Self::Overloaded { report, .. }
            | Self::NoRuntime { report, .. }
            | Self::Redirect { report, .. }
            | Self::Http { report, .. }
            | Self::InvalidRequest(Failure { report, .. })
            | Self::Setup(Failure { report, .. })
            | Self::Network(Failure { report, .. }) => report,
        }
    }

    pub(crate) fn timeout(limit: Limit, report: Box<CallReport>) -> Self {
        let CallReport { phase, elapsed, attempts, .. } = *report;
        Self::Timeout { phase, limit, elapsed, attempts, report }
    }

    /// Returns whether a time limit ran out: ours, or one of a reqwest client that you brought along.
    pub fn is_timeout(&self) -> bool {
        match self {
            Self::Timeout { .. } => true,
            Self::Network(failure) => failure.error.is_timeout(),
            _ => false,
        }
    }

    /// Returns whether the origin's breaker refused the call.
    pub fn is_circuit_open(&self) -> bool {
        matches!(self, Self::CircuitOpen { .. })
    }

    /// Returns whether a body was larger than the cap.
    pub fn is_body_too_large(&self) -> bool {
        matches!(self, Self::BodyTooLarge { .. })
    }

    /// Returns whether the client itself was overloaded.
    pub fn is_overloaded(&self) -> bool {
        matches!(self, Self::Overloaded { .. })
    }

    /// Returns whether the request itself was wrong, so it is useless to send it again.
    pub fn is_invalid_request(&self) -> bool {
        matches!(self, Self::InvalidRequest(..))
    }

    /// Returns whether a redirect could not be followed.
    pub fn is_redirect(&self) -> bool {
        matches!(self, Self::Redirect { .. })
    }

    /// Returns whether no connection could be made, so the latest request was not sent.
    ///
    /// An earlier attempt, or the request that was redirected, may have been.
    pub fn is_connect(&self) -> bool {
        match self {
            Self::Timeout { phase, .. } => *phase == Phase::Connect,
            Self::Network(failure) => failure.error.is_connect(),
            _ => false,
        }
    }

    /// Returns the status of [`Http`](Self::Http).
    pub fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Http { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// Takes the error that a guarded body returned out of `outer`, reqwest's error around it.
    fn taken_from(outer: reqwest::Error) -> Result<Self, reqwest::Error> {
        let mut next: Option<&(dyn StdError + 'static)> = Some(&outer);
        while let Some(error) = next {
            // An `io::Error` does not return its inner error from `source`, so it is opened by hand.
            let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            let ours = inner.and_then(|inner| inner.downcast_ref::<Self>()).or_else(|| error.downcast_ref::<Self>());
            match ours {
                Some(Self::Timeout { limit, report, .. }) => return Ok(Self::timeout(*limit, report.clone())),
                Some(Self::BodyTooLarge { limit, report }) => {
                    return Ok(Self::BodyTooLarge { limit: *limit, report: report.clone() });
                }
                Some(Self::Network(Failure { report, .. })) => {
                    let report = report.clone();
                    return Ok(Self::Network(Failure { error: outer.without_url(), report }));
                }
                _ => next = error.source(),
            }
        }
        Err(outer)
    }

    /// Converts an error of reqwest, for a call whose `report` is known.
    pub(crate) fn reported(error: reqwest::Error, report: Box<CallReport>) -> Self {
        let wrong = error.is_builder() || lacks_tls(&error);
        // The report has the URL, without what may be secret.
        let failure = Failure { error: error.without_url(), report };
        if wrong { Self::InvalidRequest(failure) } else { Self::Network(failure) }
    }
}

/// Converts an error of reading a body, so that `response.json().await.map_err(RequestError::from)` tells a timeout and
/// a body over the cap from a broken connection.
impl From<reqwest::Error> for RequestError {
    fn from(error: reqwest::Error) -> Self {
        Self::taken_from(error).unwrap_or_else(|error| {
            let url = error.url().map_or_else(|| "a request".to_owned(), redacted);
            let report = CallReport { method: None, url, phase: Phase::Body, attempts: 1, elapsed: Duration::ZERO };
            match error.status() {
                Some(status) => Self::Http { status, retry_after: None, report: Box::new(report) },
                None => Self::reported(error, Box::new(report)),
            }
        })
    }
}

/// The connector's message about a scheme that it was not built for.
const WITHOUT_TLS: &str = "invalid URL, scheme is not http";

/// Whether the URL asks for TLS and reqwest was built without it.
pub(crate) fn lacks_tls(error: &reqwest::Error) -> bool {
    error.is_connect() && root(error).to_string() == WITHOUT_TLS
}

/// The first cause, in one line.
fn cause(error: &Failure) -> String {
    let root = root(error);
    let text = match root.downcast_ref::<io::Error>() {
        // "connection refused" says as much as "Connection refused (os error 111)".
        Some(io) if io.raw_os_error().is_some() && io.kind().to_string() != "uncategorized error" => {
            io.kind().to_string()
        }
        _ => root.to_string(),
    };
    if text == WITHOUT_TLS {
        return "reqwest was built without TLS: add its feature `rustls` or `native-tls` to your Cargo.toml".to_owned();
    }
    text.replace(char::is_control, " ")
}

fn root<'a>(error: &'a (dyn StdError + 'static)) -> &'a (dyn StdError + 'static) {
    let mut root = error;
    while let Some(next) = root.source() {
        root = next;
    }
    root
}

/// Why a client or a configuration could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// An option is out of range or contradicts another.
    #[error("option `{option}` {problem}")]
    Option {
        /// The name of the option's setter.
        option: &'static str,
        /// What is wrong with it; the text continues the name.
        problem: &'static str,
    },
    /// The HTTP client underneath could not be set up, for instance its TLS.
    #[error("the HTTP client cannot be set up")]
    Client(#[source] reqwest::Error),
}

impl BuildError {
    /// Returns the name of the option that is wrong.
    pub fn option(&self) -> Option<&'static str> {
        match self {
            Self::Option { option, .. } => Some(option),
            Self::Client(_) => None,
        }
    }
}
