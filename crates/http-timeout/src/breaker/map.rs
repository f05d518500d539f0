//! Bounded maps: of breakers by key, and of the records that a client keeps for each origin.
//!
//! Invariant: a map never holds more than its capacity. It forgets the least recently used entries: first those that
//! cost nothing to forget, then those whose knowledge would be lost (an open breaker would have to trip again), and
//! only then those in use.

use std::{
    borrow::Borrow,
    collections::{HashMap, HashSet},
    fmt,
    hash::Hash,
    num::NonZeroUsize,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{config::BreakerConfig, handle::CircuitBreaker, word::State};

/// What would be lost if an entry were forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Loss {
    /// Nothing but figures that come back by themselves.
    Little,
    /// The knowledge that a callee is down: calls would have to find that out again.
    Knowledge,
    /// The entry is in use, or isolated: a second one would exist beside it.
    Use,
}

impl Loss {
    pub(crate) fn of(breaker: &CircuitBreaker) -> Self {
        // An operator has isolated it, and only the operator may undo that.
        if breaker.is_shared() || breaker.is_isolated() {
            Self::Use
        } else if breaker.is_worth_keeping() {
            Self::Knowledge
        } else {
            Self::Little
        }
    }
}

/// A bounded map of breakers, one for each key. It forgets the least recently used.
///
/// It forgets a breaker that is in use (a clone or a permit of it exists) or isolated only when all are. It forgets an
/// open or half-open breaker only when no closed one is left. (A breaker counts as closed if no call has asked it for
/// as long as its longest wait after it could have been probed.) A forgotten key starts again with a closed breaker.
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
    /// Makes an empty map for at most `capacity` keys, but at least one.
    pub fn new(config: BreakerConfig, capacity: usize) -> Self {
        let capacity = NonZeroUsize::new(capacity).unwrap_or(NonZeroUsize::MIN);
        Self { known: Mutex::new(Lru::new(capacity)), config }
    }

    /// Returns the breaker of `key`; makes a closed one if the map does not know the key.
    pub fn get<Q>(&self, key: &Q) -> CircuitBreaker
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        let make = || CircuitBreaker::new(self.config.clone());
        lock(&self.known).get_or_insert(key, make, Loss::of).clone()
    }

    /// Returns how many keys it knows.
    pub fn len(&self) -> usize {
        lock(&self.known).len()
    }

    /// Returns whether it knows none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the keys whose breaker is not closed.
    pub fn open(&self) -> Vec<K> {
        // Looking at a state may report a change of it, which must not happen under the lock.
        let not_closed = self.entries().into_iter().filter(|(_, breaker)| breaker.state() != State::Closed);
        not_closed.map(|(key, _)| key).collect()
    }

    /// All its entries.
    pub(crate) fn entries(&self) -> Vec<(K, CircuitBreaker)> {
        let known = lock(&self.known);
        known.entries.iter().map(|(key, held)| (key.clone(), held.value.clone())).collect()
    }
}

impl<K> fmt::Debug for BreakerMap<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BreakerMap").field("config", &self.config).finish_non_exhaustive()
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in a key's `Hash` or `Eq` leaves the map valid.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A map that forgets an eighth of itself, the least recently used, when it is full: constant time on average.
#[derive(Debug)]
pub(crate) struct Lru<K, V> {
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
    pub(crate) fn new(capacity: NonZeroUsize) -> Self {
        Self { entries: HashMap::new(), capacity, clock: 0 }
    }

    pub(crate) fn get_or_insert<Q>(&mut self, key: &Q, make: impl FnOnce() -> V, loss: impl Fn(&V) -> Loss) -> &V
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToOwned<Owned = K> + ?Sized,
    {
        self.clock += 1;
        if self.entries.len() >= self.capacity.get() && !self.entries.contains_key(key) {
            self.evict(loss);
        }
        // The common case, a known key, must not pay for an owned key, which `entry` would require.
        if !self.entries.contains_key(key) {
            self.entries.insert(key.to_owned(), Held { value: make(), used: 0 });
        }
        let held = self.entries.get_mut(key).expect("the key is present: it was, or the line above inserted it");
        held.used = self.clock;
        &held.value
    }

    fn evict(&mut self, loss: impl Fn(&V) -> Loss) {
        let rank = |held: &Held<V>| (loss(&held.value), held.used);
        let mut ranks: Vec<_> = self.entries.values().map(rank).collect();
        ranks.sort_unstable();
        let little = ranks.partition_point(|(loss, _)| *loss == Loss::Little);
        // An eighth at once, so that many insertions share the cost of sorting; but no more than necessary of entries
        // with a loss.
        let surplus = (self.capacity.get() / 8).min(little).max(1);
        // Only by the time of use, which is unique to an entry: the loss may have changed meanwhile.
        let gone: HashSet<u64> = ranks.iter().take(surplus).map(|(_, used)| *used).collect();
        self.entries.retain(|_, held| !gone.contains(&held.used));
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &V> {
        self.entries.values().map(|held| &held.value)
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
}
