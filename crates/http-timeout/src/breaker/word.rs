//! The layout of the word that holds a circuit's state, generation, counter and marks.
//!
//! Invariant: a word and its successor never compare equal, so a compare-exchange cannot mistake one for the other.
//!
//! ```text
//! bits 0..2    state: closed, open, half-open, isolated
//! bit  2       closed: calls were cut since an answer was finished
//! bit  3       closed: enough calls have failed or were slow, but the window holds too few to judge by
//! bits 4..20   closed: consecutive failures
//! bits 20..64  generation, which every transition raises
//! ```

use std::fmt;

pub(super) const STATE: u64 = 0b11;
pub(super) const CLOSED: u64 = 0;
pub(super) const OPEN: u64 = 1;
pub(super) const HALF_OPEN: u64 = 2;
pub(super) const ISOLATED: u64 = 3;

pub(super) const SILENT: u64 = 1 << 2;
pub(super) const SHORT: u64 = 1 << 3;
pub(super) const COUNTER_ONE: u64 = 1 << 4;
pub(super) const COUNTER: u64 = 0xffff << 4;
const GENERATION_ONE: u64 = 1 << 20;

/// The most consecutive failures that the word has room for.
pub(crate) const COUNTER_MAX: u32 = 0xffff;

/// The state of a [`CircuitBreaker`](crate::CircuitBreaker).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum State {
    /// Calls pass, and their results are counted.
    Closed,
    /// Calls are refused until the wait is over; the first call after it is a probe.
    Open,
    /// A few probes are admitted; their results decide.
    HalfOpen,
    /// Calls are refused until [`CircuitBreaker::reset`](crate::CircuitBreaker::reset).
    Isolated,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half-open",
            Self::Isolated => "isolated",
        })
    }
}

/// A change of state, as passed to the hook of [`BreakerConfigBuilder::on_transition`](crate::BreakerConfigBuilder).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Transition {
    /// The state before.
    pub from: State,
    /// The state after.
    pub to: State,
}

impl Transition {
    /// Whether the state differs. Isolating an isolated circuit starts a new generation, but is not reported.
    pub(super) fn is_change(&self) -> bool {
        self.from != self.to
    }
}

/// State and generation, without counter and marks.
pub(super) fn key(word: u64) -> u64 {
    word & !(COUNTER | SILENT | SHORT)
}

pub(super) fn generation(word: u64) -> u64 {
    word / GENERATION_ONE
}

pub(super) fn counter(word: u64) -> u32 {
    ((word & COUNTER) / COUNTER_ONE) as u32
}

/// The word of the next generation. Generations wrap after 2^44 transitions: 500 years at a thousand a second.
pub(super) fn successor(word: u64, state: u64) -> u64 {
    (key(word) & !STATE).wrapping_add(GENERATION_ONE) | state
}

pub(super) fn state(word: u64) -> State {
    match word & STATE {
        CLOSED => State::Closed,
        OPEN => State::Open,
        HALF_OPEN => State::HalfOpen,
        _ => State::Isolated,
    }
}

pub(super) fn transition(before: u64, after: u64) -> Transition {
    Transition { from: state(before), to: state(after) }
}
