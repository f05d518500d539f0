//! One record for each origin, in a bounded map that forgets the least recently used.
//!
//! Invariant: an origin that is in use is forgotten only when every other one is in use too, so its breaker and its limit
//! are not silently doubled; and one whose circuit is open only when no closed one is left.

use std::{
    borrow::Cow,
    num::NonZeroUsize,
    sync::{Arc, Mutex, OnceLock},
};

use url::{Position, Url};

use crate::{
    breaker::{BreakerConfig, BreakerPermit, CircuitBreaker, CircuitOpen, Loss, Lru, lock},
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

/// What a client keeps for one origin.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) name: String,
    pub(crate) breaker: Option<CircuitBreaker>,
    pub(crate) gate: Option<Gate>,
    pub(crate) connections: Connections,
    /// How long its answers take, which only hedging asks.
    pub(crate) pace: OnceLock<Box<Pace>>,
}

impl Origin {
    pub(crate) fn admit(&self) -> Result<Option<BreakerPermit>, CircuitOpen> {
        self.breaker.as_ref().map(CircuitBreaker::try_acquire).transpose()
    }
}

/// The origins of one client.
#[derive(Debug)]
pub(crate) struct Origins {
    known: Mutex<Lru<String, Arc<Origin>>>,
    breaker: Option<BreakerConfig>,
    /// Calls to one origin: in flight, and waiting.
    gate: Option<(usize, usize)>,
}

impl Origins {
    pub(crate) fn new(capacity: NonZeroUsize, breaker: Option<BreakerConfig>, gate: Option<(usize, usize)>) -> Self {
        Self { known: Mutex::new(Lru::new(capacity)), breaker, gate }
    }

    pub(crate) fn of(&self, url: &Url) -> Arc<Origin> {
        let name = origin_name(url);
        let make = || {
            Arc::new(Origin {
                name: name.to_string(),
                breaker: self.breaker.clone().map(CircuitBreaker::new),
                gate: self.gate.map(|(concurrency, max_waiting)| Gate::new(concurrency, max_waiting)),
                connections: Connections::default(),
                pace: OnceLock::new(),
            })
        };
        Arc::clone(lock(&self.known).get_or_insert(name.as_ref(), make, loss))
    }

    /// What `look` sees in each known breaker, with the name of its origin, in the order of the names.
    pub(crate) fn survey<T>(&self, look: impl Fn(&CircuitBreaker) -> Option<T>) -> Vec<(String, T)> {
        let origins: Vec<_> = lock(&self.known).values().cloned().collect();
        let mut seen: Vec<_> =
            origins.iter().filter_map(|origin| Some((origin.name.clone(), look(origin.breaker.as_ref()?)?))).collect();
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

/// What would be lost with an origin that was forgotten.
fn loss(origin: &Arc<Origin>) -> Loss {
    // A forgotten gate would come back with a full set of permits.
    let in_flight = origin.gate.as_ref().is_some_and(|gate| gate.in_flight() > 0);
    if in_flight || Arc::strong_count(origin) > 1 {
        return Loss::Use;
    }
    origin.breaker.as_ref().map_or(Loss::Little, Loss::of)
}
