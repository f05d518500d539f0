//! The breaker's state machine, pure: the caller passes the time in, and nothing here waits or spawns.
//!
//! Invariant: every admission carries the generation it was made in, and its result changes that generation only.
//! State, generation and one counter share an atomic word, so no result can slip between a check and a transition:
//!
//! ```text
//! bits 0..2    state: closed, open, half-open, isolated
//! bits 2..18   closed: consecutive failures; half-open: probes in flight
//! bits 18..64  generation, which every transition raises
//! ```

use std::{
    fmt,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::window::{Counts, Nanos, Span, Tally, Window};

const STATE: u64 = 0b11;
const CLOSED: u64 = 0;
const OPEN: u64 = 1;
const HALF_OPEN: u64 = 2;
const ISOLATED: u64 = 3;

const COUNTER_ONE: u64 = 1 << 2;
const COUNTER: u64 = 0xffff << 2;
const GENERATION_ONE: u64 = 1 << 18;

/// The most probes and consecutive failures that the word has room for.
pub(crate) const COUNTER_MAX: u32 = 0xffff;

/// The state of a [`CircuitBreaker`](crate::CircuitBreaker).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum State {
    /// Calls pass, and their results are counted.
    Closed,
    /// Calls are refused until the wait is over; the first call after it is a probe.
    Open,
    /// A few probes are let in; their results decide.
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

/// A change of state, as given to the hook of [`BreakerConfigBuilder::on_transition`](crate::BreakerConfigBuilder).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Transition {
    /// The state before.
    pub from: State,
    /// The state after.
    pub to: State,
}

/// The figures by which a circuit trips and recovers; valid, because only `BreakerConfig` makes them.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    pub(crate) span: Span,
    pub(crate) min_calls: u64,
    pub(crate) failure_rate: Option<f64>,
    pub(crate) consecutive_failures: Option<u32>,
    pub(crate) slow: Option<SlowRule>,
    pub(crate) probes: u32,
    pub(crate) lease: Nanos,
    pub(crate) open_first: Nanos,
    pub(crate) open_max: Nanos,
    pub(crate) open_factor: f64,
    pub(crate) jitter: f64,
}

/// When a call counts as slow, and how many of them trip the circuit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlowRule {
    pub(crate) threshold: Nanos,
    pub(crate) rate: f64,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    Success,
    Failure,
    Ignored,
    Cancelled,
}

/// The right to make one call, in the generation it was given in. Each is handed to `finish` exactly once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Admission {
    /// State and generation, without the counter.
    key: u64,
    since: Nanos,
    /// When the part of the call ended that the slow-call rule measures; `finish` is the end otherwise.
    measured: Option<Nanos>,
}

impl Admission {
    /// Ends the time that counts for the slow-call rule: what follows is the consumer's time, not the callee's.
    pub(crate) fn stop_clock(&mut self, now: Nanos) {
        self.measured.get_or_insert(now);
    }
}

/// One breaker's state.
#[derive(Debug)]
pub(crate) struct Circuit {
    word: AtomicU64,
    /// Taken for every transition and every half-open admission; a closed call never takes it.
    cold: Mutex<Cold>,
    window: Window,
    rules: Rules,
    rejected: AtomicU64,
    cancelled: AtomicU64,
}

#[derive(Debug)]
struct Cold {
    /// Open: when the first probe is let in. Half-open: when the probes in flight lose their lease.
    until: Nanos,
    successes: u32,
    /// How many times the circuit opened since it was last closed: the exponent of the back-off.
    openings: u32,
    trips: u64,
    /// The generation whose results the window holds or, while the circuit is not closed, held last.
    counted: u64,
    rng: fastrand::Rng,
}

/// A view of the circuit's figures at one instant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Snapshot {
    pub(crate) state: State,
    pub(crate) counts: Counts,
    pub(crate) counter: u32,
    pub(crate) trips: u64,
    pub(crate) rejected: u64,
    pub(crate) cancelled: u64,
}

impl Circuit {
    pub(crate) fn new(rules: Rules, rng: fastrand::Rng) -> Self {
        Self {
            word: AtomicU64::new(CLOSED),
            cold: Mutex::new(Cold { until: 0, successes: 0, openings: 0, trips: 0, counted: 0, rng }),
            window: Window::new(rules.span),
            rules,
            rejected: AtomicU64::new(0),
            cancelled: AtomicU64::new(0),
        }
    }

    /// Admits a call, or says how long it should wait before it asks again.
    ///
    /// The clock is a closure because a closed circuit without a slow-call rule does not need to read it.
    #[inline]
    pub(crate) fn admit(&self, now: impl Fn() -> Nanos) -> Result<(Admission, Option<Transition>), Duration> {
        let word = self.word.load(Ordering::Acquire);
        if word & STATE == CLOSED {
            let since = if self.rules.slow.is_some() { now() } else { 0 };
            return Ok((Admission { key: key(word), since, measured: None }, None));
        }
        self.admit_probe(now())
    }

    #[cold]
    fn admit_probe(&self, now: Nanos) -> Result<(Admission, Option<Transition>), Duration> {
        let mut cold = self.lock();
        let word = self.word.load(Ordering::Acquire);
        let granted = |word: u64| Admission { key: key(word), since: now, measured: None };
        if word & STATE == CLOSED {
            return Ok((granted(word), None));
        }
        if let Some(wait) = self.refusal_of(word, &cold, now) {
            self.rejected.fetch_add(1, Ordering::Relaxed);
            return Err(wait);
        }
        if word & STATE == HALF_OPEN && self.has_free_slot(word, &cold) {
            if counter(word) == 0 {
                // The lease that runs was that of probes that have ended.
                cold.until = now.saturating_add(self.rules.lease);
            }
            self.word.store(word + COUNTER_ONE, Ordering::Release);
            return Ok((granted(word), None));
        }
        // The wait is over, or every probe has outlived its lease: a new generation, in which old probes are stale.
        cold.successes = 0;
        cold.until = now.saturating_add(self.rules.lease);
        let next = successor(word, HALF_OPEN);
        self.word.store(next + COUNTER_ONE, Ordering::Release);
        Ok((granted(next), transition(word, next)))
    }

    /// How long a call made now would be told to wait; `None` when it would be admitted.
    pub(crate) fn refusal(&self, now: impl Fn() -> Nanos) -> Option<Duration> {
        if self.word.load(Ordering::Acquire) & STATE == CLOSED {
            return None;
        }
        let cold = self.lock();
        self.refusal_of(self.word.load(Ordering::Acquire), &cold, now())
    }

    fn refusal_of(&self, word: u64, cold: &Cold, now: Nanos) -> Option<Duration> {
        match word & STATE {
            CLOSED => None,
            // Nobody knows when an operator will reset it; the longest wait of an open circuit is a fair pace to ask.
            ISOLATED => Some(Duration::from_nanos(self.rules.open_max)),
            HALF_OPEN if self.has_free_slot(word, cold) => None,
            _ => cold.until.checked_sub(now).filter(|left| *left > 0).map(Duration::from_nanos),
        }
    }

    fn has_free_slot(&self, word: u64, cold: &Cold) -> bool {
        counter(word) + cold.successes < self.rules.probes
    }

    /// Takes the result of an admission; a result of an earlier generation changes nothing.
    pub(crate) fn finish(&self, admission: Admission, ending: Ending, now: impl Fn() -> Nanos) -> Option<Transition> {
        if ending == Ending::Cancelled {
            self.cancelled.fetch_add(1, Ordering::Relaxed);
        }
        if key(self.word.load(Ordering::Acquire)) != admission.key {
            return None;
        }
        if admission.key & STATE == HALF_OPEN {
            return self.finish_probe(admission, ending, now());
        }
        if ending == Ending::Ignored {
            return None;
        }
        self.finish_closed(admission, ending, now())
    }

    fn finish_closed(&self, admission: Admission, ending: Ending, now: Nanos) -> Option<Transition> {
        let generation = admission.key / GENERATION_ONE;
        let slow = self.is_slow(admission, now);
        let tally = match ending {
            Ending::Success => Tally { failure: false, slow, conclusive: true },
            Ending::Failure => Tally { failure: true, slow, conclusive: true },
            // A call cut after the slow-call threshold is a slow call, whoever cut it.
            Ending::Cancelled if slow => Tally { failure: true, slow, conclusive: true },
            // Hangs that an outer timeout cuts would never be seen if nothing else were heard from the callee.
            Ending::Cancelled if self.window.counts(generation, now).conclusive == 0 => {
                Tally { failure: true, slow, conclusive: false }
            }
            Ending::Cancelled | Ending::Ignored => return None,
        };
        self.window.record(generation, now, tally);
        let consecutive = self.count_consecutive(admission.key, tally.failure)?;
        // A success that was not slow can only improve the figures.
        if !tally.failure && !tally.slow {
            return None;
        }
        let trips = self.rules.consecutive_failures.is_some_and(|limit| consecutive >= limit)
            || self.exceeds(self.window.counts(generation, now));
        if trips { self.trip(admission.key, now) } else { None }
    }

    /// Counts failures in a row in the word itself; `None` when the generation has passed meanwhile.
    fn count_consecutive(&self, expected: u64, failure: bool) -> Option<u32> {
        let mut word = self.word.load(Ordering::Acquire);
        loop {
            if key(word) != expected {
                return None;
            }
            let count = if failure { (counter(word) + 1).min(COUNTER_MAX) } else { 0 };
            let next = expected | (u64::from(count) * COUNTER_ONE);
            if next == word {
                return Some(count);
            }
            match self.word.compare_exchange_weak(word, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(count),
                Err(changed) => word = changed,
            }
        }
    }

    fn exceeds(&self, counts: Counts) -> bool {
        let reaches = |part: u64, rate: f64| part as f64 >= rate * counts.calls as f64;
        counts.calls >= self.rules.min_calls
            && (self.rules.failure_rate.is_some_and(|rate| reaches(counts.failures, rate))
                || self.rules.slow.is_some_and(|slow| reaches(counts.slow, slow.rate)))
    }

    fn is_slow(&self, admission: Admission, now: Nanos) -> bool {
        let ended = admission.measured.unwrap_or(now);
        self.rules.slow.is_some_and(|slow| ended.saturating_sub(admission.since) >= slow.threshold)
    }

    #[cold]
    fn trip(&self, expected: u64, now: Nanos) -> Option<Transition> {
        let mut cold = self.lock();
        let word = self.word.load(Ordering::Acquire);
        if key(word) != expected { None } else { self.open(&mut cold, word, now) }
    }

    #[cold]
    fn finish_probe(&self, probe: Admission, ending: Ending, now: Nanos) -> Option<Transition> {
        let mut cold = self.lock();
        let word = self.word.load(Ordering::Acquire);
        if key(word) != probe.key {
            return None;
        }
        let slow = self.is_slow(probe, now);
        match ending {
            Ending::Success if !slow => {
                cold.successes += 1;
                if cold.successes >= self.rules.probes {
                    return Some(self.close(&mut cold, word));
                }
                self.word.store(word - COUNTER_ONE, Ordering::Release);
                None
            }
            // Nothing was learnt: the slot goes back at once, and the next call is the probe.
            Ending::Ignored => self.give_back(word),
            Ending::Cancelled if !slow => self.give_back(word),
            Ending::Success | Ending::Failure | Ending::Cancelled => self.open(&mut cold, word, now),
        }
    }

    fn give_back(&self, word: u64) -> Option<Transition> {
        self.word.store(word - COUNTER_ONE, Ordering::Release);
        None
    }

    fn open(&self, cold: &mut Cold, word: u64, now: Nanos) -> Option<Transition> {
        let grown = self.rules.open_first as f64 * self.rules.open_factor.powi(cold.openings.min(1000) as i32);
        let capped = grown.min(self.rules.open_max as f64);
        // Spread on both sides of the wait, so that a thousand clients do not come back in step.
        let wait = capped * (1.0 + self.rules.jitter * (2.0 * cold.rng.f64() - 1.0));
        cold.until = now.saturating_add(wait as Nanos);
        cold.openings = cold.openings.saturating_add(1);
        cold.trips += 1;
        let next = successor(word, OPEN);
        self.word.store(next, Ordering::Release);
        transition(word, next)
    }

    fn close(&self, cold: &mut Cold, word: u64) -> Transition {
        let next = successor(word, CLOSED);
        cold.openings = 0;
        cold.counted = next / GENERATION_ONE;
        self.word.store(next, Ordering::Release);
        Transition { from: state(word), to: State::Closed }
    }

    /// Refuses every call until `reset`.
    pub(crate) fn isolate(&self) -> Option<Transition> {
        let _cold = self.lock();
        // A failure may be counted in a closed word at any time; swapping makes its compare-exchange fail.
        let word = self.word.load(Ordering::Acquire);
        let next = successor(word, ISOLATED);
        self.word.store(next, Ordering::Release);
        transition(word, next)
    }

    /// Closes the circuit with an empty window, whatever its state.
    pub(crate) fn reset(&self) -> Option<Transition> {
        let mut cold = self.lock();
        let word = self.word.load(Ordering::Acquire);
        let closed = self.close(&mut cold, word);
        (closed.from != closed.to).then_some(closed)
    }

    pub(crate) fn state(&self) -> State {
        state(self.word.load(Ordering::Acquire))
    }

    pub(crate) fn snapshot(&self, now: Nanos) -> Snapshot {
        let cold = self.lock();
        let word = self.word.load(Ordering::Acquire);
        Snapshot {
            state: state(word),
            counts: self.window.counts(cold.counted, now),
            counter: counter(word),
            trips: cold.trips,
            rejected: self.rejected.load(Ordering::Relaxed),
            cancelled: self.cancelled.load(Ordering::Relaxed),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Cold> {
        // Every critical section only assigns plain values; a poisoned lock guards a usable state.
        self.cold.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(word: u64) -> u64 {
    word & !COUNTER
}

fn counter(word: u64) -> u32 {
    ((word & COUNTER) / COUNTER_ONE) as u32
}

/// The word of the next generation. Generations wrap after 2^46 transitions: 2,000 years at a thousand a second.
fn successor(word: u64, state: u64) -> u64 {
    (word & !STATE & !COUNTER).wrapping_add(GENERATION_ONE) | state
}

fn state(word: u64) -> State {
    match word & STATE {
        CLOSED => State::Closed,
        OPEN => State::Open,
        HALF_OPEN => State::HalfOpen,
        _ => State::Isolated,
    }
}

fn transition(before: u64, after: u64) -> Option<Transition> {
    let (from, to) = (state(before), state(after));
    (from != to).then_some(Transition { from, to })
}

#[cfg(test)]
mod tests;
