//! One record for each origin, in a bounded map that forgets the least recently used.
//!
//! Invariant: an origin in use is forgotten only when every other one is in use too, so its breaker and its limit are
//! not silently doubled; and an origin with an open circuit is forgotten only when none with a closed one is left.

use std::{
    borrow::Cow,
    fmt,
    num::NonZeroUsize,
    sync::{Arc, Mutex, OnceLock},
};

use reqwest::{Request, Response, StatusCode};
use url::{Position, Url};

use crate::{
    breaker::{BreakerConfig, BreakerMap, CircuitBreaker, Class, Loss, Lru, lock},
    connections::Connections,
    hedge::Pace,
    limit::Gate,
};

/// The name of the origin of a URL: scheme, host and port, without credentials. Borrowed in all but odd cases.
pub(crate) fn origin_name(url: &Url) -> Cow<'_, str> {
    if url.username().is_empty() && url.password().is_none() {
        Cow::Borrowed(&url[..Position::BeforePath])
    } else {
        let host = &url[Position::BeforeHost..Position::BeforePath];
        Cow::Owned(format!("{}://{host}", url.scheme()))
    }
}

type KeyOf = Box<dyn Fn(&Request) -> String + Send + Sync>;
type ClassOf = Box<dyn Fn(&Response) -> Class + Send + Sync>;

/// How a client uses its breakers: how it tells them apart, and what an answer says about the callee.
#[derive(Default)]
pub(crate) struct Breaking {
    pub(crate) config: Option<BreakerConfig>,
    /// Makes one breaker for each value of this function, instead of one for each origin.
    pub(crate) key: Option<KeyOf>,
    pub(crate) classify: Option<ClassOf>,
}

impl Breaking {
    /// What an answer says, by its head.
    pub(crate) fn class_of(&self, response: &Response) -> Class {
        match &self.classify {
            Some(classify) => classify(response),
            None if is_failure(response.status()) => Class::Failure,
            None => Class::Success,
        }
    }
}

impl fmt::Debug for Breaking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Breaking").field("config", &self.config).finish_non_exhaustive()
    }
}

/// Whether a response with this status counts against its origin.
fn is_failure(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status.as_u16(), 408 | 429)
}

/// What a client keeps for one origin.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) name: String,
    pub(crate) breaker: Option<CircuitBreaker>,
    pub(crate) gate: Option<Gate>,
    pub(crate) connections: Connections,
    /// How long its answers take; only hedging needs this.
    pub(crate) pace: OnceLock<Box<Pace>>,
}

/// The origins of one client.
#[derive(Debug)]
pub(crate) struct Origins {
    known: Mutex<Lru<String, Arc<Origin>>>,
    breaking: Breaking,
    /// The breakers of a client that selects them by a function of the request.
    keyed: Option<BreakerMap<String>>,
    /// Calls to one origin: in flight, and waiting.
    gate: Option<(usize, usize)>,
}

impl Origins {
    pub(crate) fn new(capacity: NonZeroUsize, breaking: Breaking, gate: Option<(usize, usize)>) -> Self {
        let keyed = breaking.config.clone().filter(|_| breaking.key.is_some());
        let keyed = keyed.map(|config| BreakerMap::new(config, capacity.get()));
        Self { known: Mutex::new(Lru::new(capacity)), breaking, keyed, gate }
    }

    pub(crate) fn of(&self, url: &Url) -> Arc<Origin> {
        let name = origin_name(url);
        let make = || {
            let config = self.breaking.config.clone().filter(|_| self.keyed.is_none());
            Arc::new(Origin {
                name: name.to_string(),
                breaker: config.map(CircuitBreaker::new),
                gate: self.gate.map(|(concurrency, max_waiting)| Gate::new(concurrency, max_waiting)),
                connections: Connections::default(),
                pace: OnceLock::new(),
            })
        };
        Arc::clone(lock(&self.known).get_or_insert(name.as_ref(), make, loss))
    }

    /// The breaker for `request`, which goes to `origin`.
    pub(crate) fn breaker(&self, request: &Request, origin: &Origin) -> Option<CircuitBreaker> {
        match (&self.keyed, &self.breaking.key) {
            (Some(breakers), Some(key)) => Some(breakers.get(key(request).as_str())),
            _ => origin.breaker.clone(),
        }
    }

    /// The name of the breaker for `request`.
    pub(crate) fn breaker_name(&self, request: &Request) -> String {
        match &self.breaking.key {
            Some(key) => key(request),
            None => origin_name(request.url()).into_owned(),
        }
    }

    /// What an answer says about the callee, by its head.
    pub(crate) fn class_of(&self, response: &Response) -> Class {
        self.breaking.class_of(response)
    }

    /// What `look` sees in each known breaker, with the name of its origin or its key, in the order of the names.
    pub(crate) fn survey<T>(&self, look: impl Fn(&CircuitBreaker) -> Option<T>) -> Vec<(String, T)> {
        let mut breakers = self.keyed.as_ref().map(BreakerMap::entries).unwrap_or_default();
        let origins: Vec<_> = lock(&self.known).values().cloned().collect();
        breakers.extend(origins.iter().filter_map(|origin| Some((origin.name.clone(), origin.breaker.clone()?))));
        let mut seen: Vec<_> =
            breakers.into_iter().filter_map(|(name, breaker)| Some((name, look(&breaker)?))).collect();
        seen.sort_by(|(a, _), (b, _)| a.cmp(b));
        seen
    }

    pub(crate) fn len(&self) -> usize {
        lock(&self.known).len()
    }

    /// Calls that wait for the permit of an origin.
    pub(crate) fn waiting(&self) -> usize {
        lock(&self.known).values().filter_map(|origin| origin.gate.as_ref()).map(Gate::waiting).sum()
    }
}

/// What would be lost if an origin were forgotten.
fn loss(origin: &Arc<Origin>) -> Loss {
    // A forgotten gate would come back with a full set of permits.
    let in_flight = origin.gate.as_ref().is_some_and(|gate| gate.in_flight() > 0);
    if in_flight || Arc::strong_count(origin) > 1 {
        return Loss::Use;
    }
    origin.breaker.as_ref().map_or(Loss::Little, Loss::of)
}
