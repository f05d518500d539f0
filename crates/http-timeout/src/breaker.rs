//! The circuit breaker, usable around any future and without the client. The files below import only downwards:
//!
//! ```text
//! layer   the breaker as a tower layer
//! map     many breakers in a bounded map
//! handle  `CircuitBreaker`: the circuit, a clock, and permits that cannot be forgotten
//! config  the options, checked
//! closed  what the results of a closed circuit's calls come to
//! circuit the state machine, pure: the time is passed in, nothing waits or spawns
//! probes  half-open: which probes run, and what they have shown
//! window  the results of the latest calls
//! silence what calls that were cut had waited
//! word    how state, generation, counter and marks share an atomic word
//! sync    the locks and atomics of all these, which the model checker replaces
//! ```
//!
//! Invariant: nothing in here knows about HTTP.

mod circuit;
mod closed;
mod config;
mod handle;
#[cfg(feature = "tower")]
mod layer;
mod map;
mod probes;
mod silence;
mod sync;
mod window;
mod word;

#[cfg(test)]
mod edges;
#[cfg(test)]
mod schedules;

pub use config::{BreakerConfig, BreakerConfigBuilder, BreakerWindow};
pub use handle::{BreakerError, BreakerMetrics, BreakerPermit, CircuitBreaker, CircuitOpen, Class};
#[cfg(feature = "tower")]
pub use layer::{BreakerFuture, BreakerLayer, BreakerService, ByResult, Classify};
pub use map::BreakerMap;
pub(crate) use map::{Loss, Lru, lock};
pub use word::{State, Transition};
