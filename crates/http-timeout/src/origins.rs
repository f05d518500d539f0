//! One record for each origin, in a bounded map that forgets the least recently used.
//!
//! Invariant: the map never holds more than its capacity, and an origin that is needed is forgotten only when every
//! other one is needed too, so its breaker and its limit are not silently doubled.

use std::{
    borrow::{Borrow, Cow},
    collections::HashMap,
    fmt,
    hash::Hash,
    num::NonZeroUsize,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use url::{Position, Url};

use crate::{
    breaker::{BreakerPermit, CircuitBreaker, CircuitOpen},
    circuit::State,
    config::BreakerConfig,
    connections::Connections,
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
            })
        };
        Arc::clone(lock(&self.known).get_or_insert(name.as_ref(), make, is_needed))
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

/// Whether somebody would notice that the origin was forgotten.
fn is_needed(origin: &Arc<Origin>) -> bool {
    // A forgotten gate would come back with a full set of permits.
    let in_flight = origin.gate.as_ref().is_some_and(|gate| gate.in_flight() > 0);
    in_flight || Arc::strong_count(origin) > 1 || origin.breaker.as_ref().is_some_and(is_breaker_needed)
}

/// Isolation is an operator's word, which only the operator takes back.
fn is_breaker_needed(breaker: &CircuitBreaker) -> bool {
    breaker.is_shared() || breaker.state() == State::Isolated
}

/// A bounded map of breakers, one for each key, that forgets the least recently used.
///
/// A breaker that is in use (a clone or a permit of it exists) or isolated is forgotten only when all are. A forgotten
/// key starts again with a closed breaker.
///
/// # Examples
///
/// ```
/// use cancel_safe_http_timeout::{BreakerConfig, BreakerMap};
///
/// let breakers = BreakerMap::new(BreakerConfig::default(), 1_000);
/// breakers.get("db-1").isolate();
/// assert!(breakers.get("db-1").try_acquire().is_err());
/// assert!(breakers.get("db-2").try_acquire().is_ok());
/// assert_eq!(breakers.open(), ["db-1"]);
/// ```
pub struct BreakerMap<K> {
    known: Mutex<Lru<K, CircuitBreaker>>,
    config: BreakerConfig,
}

impl<K: Eq + Hash + Clone> BreakerMap<K> {
    /// Makes an empty map for at most `capacity` keys; at least one.
    pub fn new(config: BreakerConfig, capacity: usize) -> Self {
        let capacity = NonZeroUsize::new(capacity).unwrap_or(NonZeroUsize::MIN);
        Self { known: Mutex::new(Lru::new(capacity)), config }
    }

    /// The breaker of `key`, made closed if the map does not know it.
    pub fn get<Q>(&self, key: &Q) -> CircuitBreaker
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        let make = || CircuitBreaker::new(self.config.clone());
        lock(&self.known).get_or_insert(key, make, is_breaker_needed).clone()
    }

    /// How many keys it knows.
    pub fn len(&self) -> usize {
        lock(&self.known).len()
    }

    /// Whether it knows none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The keys whose breaker is not closed.
    pub fn open(&self) -> Vec<K> {
        let known = lock(&self.known);
        known
            .entries
            .iter()
            .filter(|(_, held)| held.value.state() != State::Closed)
            .map(|(key, _)| key.clone())
            .collect()
    }
}

impl<K> fmt::Debug for BreakerMap<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BreakerMap").field("config", &self.config).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in a key's `Hash` or `Eq` leaves the map a map.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A map that forgets an eighth of itself, the least recently used, when it is full: constant time on average.
#[derive(Debug)]
struct Lru<K, V> {
    entries: HashMap<K, Held<V>>,
    capacity: NonZeroUsize,
    clock: u64,
}

#[derive(Debug)]
struct Held<V> {
    value: V,
    used: u64,
}

impl<K: Eq + Hash, V> Lru<K, V> {
    fn new(capacity: NonZeroUsize) -> Self {
        Self { entries: HashMap::new(), capacity, clock: 0 }
    }

    fn get_or_insert<Q>(&mut self, key: &Q, make: impl FnOnce() -> V, needed: impl Fn(&V) -> bool) -> &V
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        self.clock += 1;
        if self.entries.len() >= self.capacity.get() && !self.entries.contains_key(key) {
            self.evict(needed);
        }
        // The common case, a known key, must not pay for an owned key, which `entry` would ask for.
        if !self.entries.contains_key(key) {
            self.entries.insert(key.to_owned(), Held { value: make(), used: 0 });
        }
        let held = self.entries.get_mut(key).expect("the key is present: it was, or the line above inserted it");
        held.used = self.clock;
        &held.value
    }

    fn evict(&mut self, needed: impl Fn(&V) -> bool) {
        // Those needed sort behind all that are not, and go only when nothing else is left.
        let rank = |held: &Held<V>| (needed(&held.value), held.used);
        let mut ranks: Vec<_> = self.entries.values().map(rank).collect();
        let surplus = (self.capacity.get() / 8).max(1);
        let (_, last, _) = ranks.select_nth_unstable(surplus - 1);
        let last = if last.0 { *ranks.iter().min().unwrap_or(&(true, 0)) } else { *last };
        self.entries.retain(|_, held| rank(held) > last);
    }

    fn values(&self) -> impl Iterator<Item = &V> {
        self.entries.values().map(|held| &held.value)
    }

    fn len(&self) -> usize {
        self.entries.len()
    }
}
