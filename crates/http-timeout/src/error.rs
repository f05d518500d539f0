//! The errors, named by what the caller can do about them.
//!
//! Invariant: no message carries the credentials, the query or the fragment of a URL, nor a header.

use std::{error::Error as StdError, fmt, io, time::Duration};

use http::StatusCode;
use url::Url;

/// What a call was doing when its time ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Waiting for a permit of the client's limits; nothing had been sent.
    Permit,
    /// Connecting; nothing had been sent.
    Connect,
    /// Sending the request or waiting for the head of the response.
    Response,
    /// Waiting to try again.
    Backoff,
    /// Reading the body of the response.
    Body,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Permit => "waiting for a permit",
            Self::Connect => "connecting",
            Self::Response => "waiting for the response",
            Self::Backoff => "waiting to try again",
            Self::Body => "reading the body",
        })
    }
}

/// Why a request gave no response, or a body no end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The time ran out: the whole call's, an attempt's, or that of a silent peer.
    #[error("timed out while {phase}, after {elapsed:?} and {attempts} attempt(s)")]
    Timeout {
        /// What the call was doing.
        phase: Phase,
        /// The time since the call began.
        elapsed: Duration,
        /// How many attempts had been made, the last of them included.
        attempts: u32,
    },
    /// The origin's circuit breaker refused the call; nothing was sent by this attempt.
    #[error("the circuit of {origin} is open; ask again after {retry_after:?}")]
    CircuitOpen {
        /// Scheme, host and port.
        origin: String,
        /// After this time the breaker may let a probe in.
        retry_after: Duration,
    },
    /// The body is larger than the client's `max_body`.
    #[error("the body is larger than {limit} bytes")]
    BodyTooLarge {
        /// The limit, in bytes, after decompression.
        limit: u64,
    },
    /// Too many calls wait for a permit already; nothing was sent.
    #[error("{limit} calls are waiting for a permit already")]
    Overloaded {
        /// The most calls that may wait.
        limit: usize,
    },
    /// The request could not be built, for instance because the URL is invalid; nothing was sent.
    #[error("the request is invalid")]
    InvalidRequest(#[source] reqwest::Error),
    /// The HTTP client underneath could not be set up, for instance its TLS; nothing was sent.
    #[error("the HTTP client cannot be set up")]
    Setup(#[source] reqwest::Error),
    /// The network or the peer failed.
    #[error("the network or the peer failed")]
    Network(#[source] reqwest::Error),
    /// The response has the status 4xx or 5xx; from `get_with_timeout`, `get_many` and `error_for_status` only.
    #[error("the server answered {status} for {url}")]
    Http {
        /// The status.
        status: StatusCode,
        /// The URL that answered, without credentials, query and fragment.
        url: String,
        /// How long the server asked to wait, if it did.
        retry_after: Option<Duration>,
        /// How many attempts had been made; 1 where `error_for_status` made the error, which does not know.
        attempts: u32,
    },
}

impl RequestError {
    /// Whether the time ran out, ours or that of a reqwest client that was brought along.
    pub fn is_timeout(&self) -> bool {
        match self {
            Self::Timeout { .. } => true,
            Self::Network(error) => error.is_timeout(),
            _ => false,
        }
    }

    /// Whether the origin's breaker refused the call.
    pub fn is_circuit_open(&self) -> bool {
        matches!(self, Self::CircuitOpen { .. })
    }

    /// Whether a body was larger than the cap.
    pub fn is_body_too_large(&self) -> bool {
        matches!(self, Self::BodyTooLarge { .. })
    }

    /// Whether the client itself had too much to do.
    pub fn is_overloaded(&self) -> bool {
        matches!(self, Self::Overloaded { .. })
    }

    /// Whether the request itself was wrong, so that sending it again is of no use.
    pub fn is_invalid_request(&self) -> bool {
        matches!(self, Self::InvalidRequest(_))
    }

    /// Whether no connection could be made, so that nothing was sent.
    pub fn is_connect(&self) -> bool {
        match self {
            Self::Timeout { phase, .. } => *phase == Phase::Connect,
            Self::Network(error) => error.is_connect(),
            _ => false,
        }
    }

    /// The status of [`Http`](Self::Http).
    pub fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Http { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// A copy of an error that a guarded body put into an I/O or reqwest error.
    fn found_in(error: &(dyn StdError + 'static)) -> Option<Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            // An `io::Error` hides what it was made of from `source`, so it is opened by hand.
            let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            let ours = inner.and_then(|inner| inner.downcast_ref::<Self>()).or_else(|| error.downcast_ref::<Self>());
            match ours {
                Some(&Self::Timeout { phase, elapsed, attempts }) => {
                    return Some(Self::Timeout { phase, elapsed, attempts });
                }
                Some(&Self::BodyTooLarge { limit }) => return Some(Self::BodyTooLarge { limit }),
                _ => next = error.source(),
            }
        }
        None
    }
}

/// Takes over an error of reading a body, so that `response.json().await.map_err(RequestError::from)` tells a timeout
/// and a body over the cap from a broken connection.
impl From<reqwest::Error> for RequestError {
    fn from(error: reqwest::Error) -> Self {
        if let Some(ours) = Self::found_in(&error) {
            return ours;
        }
        let error = match error.url().map(redacted) {
            Some(url) => error.with_url(url),
            None => error,
        };
        match error.status() {
            Some(status) => {
                let url = error.url().map(Url::to_string).unwrap_or_default();
                Self::Http { status, url, retry_after: None, attempts: 1 }
            }
            None if error.is_builder() => Self::InvalidRequest(error),
            None => Self::Network(error),
        }
    }
}

/// The URL without what may be secret: credentials, query and fragment.
pub(crate) fn redacted(url: &Url) -> Url {
    let mut shown = url.clone();
    // Both setters refuse only URLs that cannot have credentials.
    let _ = shown.set_username("");
    let _ = shown.set_password(None);
    shown.set_query(None);
    shown.set_fragment(None);
    shown
}

/// Why a client or a configuration could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// An option is out of its range or contradicts another.
    #[error("option `{option}` {problem}")]
    Option {
        /// The name of the option's setter.
        option: &'static str,
        /// What is wrong with it; reads on from the name.
        problem: &'static str,
    },
    /// The HTTP client underneath could not be set up, for instance its TLS.
    #[error("the HTTP client cannot be set up")]
    Client(#[source] reqwest::Error),
}

impl BuildError {
    /// The name of the option that is wrong.
    pub fn option(&self) -> Option<&'static str> {
        match self {
            Self::Option { option, .. } => Some(option),
            Self::Client(_) => None,
        }
    }
}
