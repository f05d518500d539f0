//! The breaker's state machine, pure: the caller passes the time in, and nothing here waits or spawns.
//!
//! Invariant: every admission carries the generation in which it was made, and its result changes only that generation.
//! State, generation, the count of failures in a row and two marks share one atomic word, so no result can slip between
//! a check and a transition. A success in a circuit that has nothing to forget finds the word as its admission saw it,
//! and is done.

use std::{
    sync::{
        PoisonError,
        atomic::Ordering::{Relaxed, SeqCst},
    },
    time::Duration,
};

use super::{
    probes::{ProbeRules, Probes, Verdict},
    silence::{SHORTEST, Silence},
    sync::{AtomicU64, Mutex, MutexGuard},
    window::{Counts, Nanos, Span, Window},
    word::{
        CLOSED, HALF_OPEN, ISOLATED, OPEN, STATE, State, Transition, counter, generation, key, state, successor,
        transition,
    },
};

/// The figures by which a circuit trips and recovers; always valid, because only `BreakerConfig` creates them.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    pub(crate) span: Span,
    pub(crate) min_calls: u64,
    pub(crate) failure_rate: Option<f64>,
    pub(crate) consecutive_failures: Option<u32>,
    pub(crate) slow: Option<SlowRule>,
    /// A call that was cut after waiting this long counts as failed.
    pub(crate) late: Nanos,
    pub(crate) silence: Option<Nanos>,
    pub(crate) probes: ProbeRules,
    pub(crate) open_first: Nanos,
    pub(crate) open_max: Nanos,
    pub(crate) open_factor: f64,
    pub(crate) jitter: f64,
}

/// When a call counts as slow, and how many slow calls trip the circuit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlowRule {
    pub(crate) threshold: Nanos,
    pub(crate) rate: f64,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The answer is finished.
    Success,
    /// The head was good, but the caller dropped the rest while it was flowing: the callee is healthy, but has finished
    /// nothing.
    Unread,
    /// The head of a stream was good. Streams end whenever their consumer likes, so nothing more can be learned.
    Stream,
    Failure,
    Ignored,
    /// The caller gave up.
    Cut,
}

/// When a call ended, and how much of its time counts for the callee.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    pub(super) now: Nanos,
    /// The time until the head of the answer, or until the end if there are no heads.
    pub(super) took: Nanos,
    /// The same, plus the time that the body's consumer waited for it.
    pub(super) waited: Nanos,
}

impl Times {
    /// The times of a call that was ready at once.
    #[inline]
    pub(crate) fn at_once(admission: &Admission) -> Self {
        Self { now: admission.since, took: 0, waited: 0 }
    }

    /// The times of a call that waited for the callee from its admission until now.
    pub(crate) fn until(now: Nanos, admission: &Admission) -> Self {
        let took = now.saturating_sub(admission.since);
        Self { now, took, waited: took }
    }

    /// The times of a call whose answer had a head, and whose consumer waited for the body for `body`.
    pub(crate) fn with_head(now: Nanos, admission: &Admission, head: Nanos, body: Nanos) -> Self {
        let took = head.saturating_sub(admission.since);
        Self { now, took, waited: took.saturating_add(body) }
    }
}

/// The right to make one call, in the generation of its admission. Each is passed to `finish` exactly once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Admission {
    /// State and generation, without counter and marks.
    pub(super) key: u64,
    since: Nanos,
    /// The number of a probe; zero for other calls.
    probe: u64,
}

impl Admission {
    /// From the admission until `then`.
    pub(crate) fn until(&self, then: Nanos) -> Nanos {
        then.saturating_sub(self.since)
    }
}

/// Of calls that take less than this, only samples are measured.
const QUICK: Nanos = 1_000_000;

/// Why a call was not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The caller should wait this long before it asks again.
    Wait(Duration),
    /// A hung probe had not been noticed yet: report it, and ask again.
    Reopened(Transition),
}

/// One breaker's state.
#[derive(Debug)]
pub(crate) struct Circuit {
    pub(super) word: AtomicU64,
    /// How long an answer usually takes, a moving average; zero when none is known.
    usual: AtomicU64,
    /// Taken for every transition, every half-open admission and every cut; a success in a closed circuit never takes it.
    cold: Mutex<Cold>,
    pub(super) window: Window,
    pub(super) rules: Rules,
    rejected: AtomicU64,
    cancelled: AtomicU64,
}

#[derive(Debug)]
pub(super) struct Cold {
    /// While open: when the first probe is admitted.
    until: Nanos,
    probes: Probes,
    /// While closed, and only while the word has the mark: the calls cut since an answer was finished.
    pub(super) silence: Silence,
    /// How often the circuit has opened since it was last closed: the exponent of the back-off.
    openings: u32,
    trips: u64,
    rng: fastrand::Rng,
}

/// A view of the circuit's figures at one instant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Snapshot {
    pub(crate) state: State,
    pub(crate) counts: Counts,
    pub(crate) consecutive: u32,
    pub(crate) probes: u32,
    pub(crate) trips: u64,
    pub(crate) rejected: u64,
    pub(crate) cancelled: u64,
}

impl Circuit {
    pub(crate) fn new(rules: Rules, rng: fastrand::Rng) -> Self {
        let cold = Cold { until: 0, probes: Probes::new(), silence: Silence::NONE, openings: 0, trips: 0, rng };
        Self {
            word: AtomicU64::new(CLOSED),
            usual: AtomicU64::new(0),
            cold: Mutex::new(cold),
            window: Window::new(rules.span),
            rules,
            rejected: AtomicU64::new(0),
            cancelled: AtomicU64::new(0),
        }
    }

    /// Admits a call if the circuit is closed.
    #[inline]
    pub(crate) fn admit_closed(&self, now: impl FnOnce() -> Nanos) -> Option<Admission> {
        let word = self.word.load(SeqCst);
        (word & STATE == CLOSED).then(|| Admission { key: key(word), since: now(), probe: 0 })
    }

    /// Admits a call if the circuit is closed or wants a probe; otherwise says why not.
    #[cold]
    pub(crate) fn admit(&self, now: Nanos) -> Result<(Admission, Option<Transition>), Refused> {
        let mut cold = self.lock();
        let word = self.word.load(SeqCst);
        let granted = |word: u64, probe: u64| Admission { key: key(word), since: now, probe };
        if word & STATE == CLOSED {
            return Ok((granted(word, 0), None));
        }
        if let Some(reopened) = self.reopen_if_hung(&mut cold, word, now) {
            return Err(Refused::Reopened(reopened));
        }
        if let Some(wait) = self.refusal_of(word, &cold, now) {
            self.rejected.fetch_add(1, Relaxed);
            return Err(Refused::Wait(wait));
        }
        if word & STATE == HALF_OPEN {
            return Ok((granted(word, cold.probes.start(now)), None));
        }
        // The wait is over: a new generation, in which earlier probes are stale.
        cold.probes.clear();
        let next = successor(word, HALF_OPEN);
        self.word.store(next, SeqCst);
        Ok((granted(next, cold.probes.start(now)), Some(transition(word, next))))
    }

    /// How long a call made now would be told to wait; `None` when it would be admitted.
    pub(crate) fn refusal(&self, now: impl Fn() -> Nanos) -> Option<Duration> {
        if self.word.load(SeqCst) & STATE == CLOSED {
            return None;
        }
        let cold = self.lock();
        self.refusal_of(self.word.load(SeqCst), &cold, now())
    }

    fn refusal_of(&self, word: u64, cold: &Cold, now: Nanos) -> Option<Duration> {
        let until = match word & STATE {
            CLOSED => return None,
            // Nobody knows when an operator will reset it, so the longest wait of an open circuit is a reasonable
            // interval.
            ISOLATED => now.saturating_add(self.rules.open_max),
            HALF_OPEN if cold.probes.has_room(now, &self.rules.probes) => return None,
            HALF_OPEN => cold.probes.room_at(now, &self.rules.probes),
            _ => cold.until,
        };
        until.checked_sub(now).filter(|left| *left > 0).map(Duration::from_nanos)
    }

    /// Notices a hung probe, if that has not happened yet. Callers that read the state call this first.
    pub(crate) fn notice(&self, now: impl Fn() -> Nanos) -> Option<Transition> {
        if self.word.load(SeqCst) & STATE != HALF_OPEN {
            return None;
        }
        let mut cold = self.lock();
        let word = self.word.load(SeqCst);
        self.reopen_if_hung(&mut cold, word, now())
    }

    /// A probe that outlived its lease failed at the end of the lease, whenever that is noticed.
    fn reopen_if_hung(&self, cold: &mut Cold, word: u64, now: Nanos) -> Option<Transition> {
        if word & STATE != HALF_OPEN {
            return None;
        }
        let hung = cold.probes.hung_since(now, &self.rules.probes)?;
        Some(self.open(cold, word, hung))
    }

    /// Notes that the head of the answer has come.
    pub(crate) fn head(&self, admission: &Admission, now: Nanos) {
        if admission.probe == 0 {
            return;
        }
        let mut cold = self.lock();
        if key(self.word.load(SeqCst)) == admission.key {
            cold.probes.head(admission.probe, now);
        }
    }

    /// Takes the result of an admission; a result of an earlier generation changes nothing.
    #[inline]
    pub(crate) fn finish(&self, admission: &Admission, ending: Ending, times: Times) -> Option<Transition> {
        if ending == Ending::Cut {
            self.cancelled.fetch_add(1, Relaxed);
        }
        if key(self.word.load(SeqCst)) != admission.key {
            return None;
        }
        if admission.probe != 0 {
            return self.finish_probe(admission, ending, times);
        }
        match ending {
            Ending::Success => self.succeed(admission.key, true, times),
            Ending::Unread => self.succeed(admission.key, false, times),
            Ending::Failure => self.fail(admission.key, times),
            Ending::Cut => self.cut(admission.key, times),
            Ending::Ignored | Ending::Stream => None,
        }
    }

    #[cold]
    fn finish_probe(&self, probe: &Admission, ending: Ending, times: Times) -> Option<Transition> {
        let Times { now, took, waited } = times;
        let mut cold = self.lock();
        let word = self.word.load(SeqCst);
        if key(word) != probe.key {
            return None;
        }
        if let Some(reopened) = self.reopen_if_hung(&mut cold, word, now) {
            return Some(reopened);
        }
        let (rules, number) = (&self.rules.probes, probe.probe);
        let verdict = match ending {
            Ending::Failure => cold.probes.fail(number, rules),
            Ending::Ignored => cold.probes.give_back(number),
            Ending::Cut if waited >= self.rules.late => cold.probes.fail(number, rules),
            // Nothing was learned: the slot is free at once, and the next call is the probe.
            Ending::Cut if !self.is_telling(waited) => cold.probes.give_back(number),
            Ending::Cut => cold.probes.cut(number, waited, now, rules),
            _ if self.is_slow(took) => cold.probes.fail(number, rules),
            Ending::Success | Ending::Unread | Ending::Stream => cold.probes.succeed(number, rules),
        };
        if ending == Ending::Success {
            self.window.here().answer(now);
            self.learn(waited);
        }
        match verdict {
            Verdict::Undecided => None,
            Verdict::Close => Some(self.close(&mut cold, word)),
            Verdict::Open => Some(self.open(&mut cold, word, now)),
        }
    }

    /// Whether a success of this admission may skip the clock, as if it had ended when it began. That is so only while
    /// calls take less than a millisecond, and even then one in sixteen is timed, to notice when they take longer. The
    /// lowest bits of the clock serve as dice.
    #[inline]
    pub(crate) fn is_quick(&self, admission: &Admission) -> bool {
        let is_busy = admission.since.saturating_sub(self.window.here().answered()) < QUICK;
        let is_usual = self.usual.load(Relaxed) < QUICK;
        self.rules.slow.is_none() && is_busy && is_usual && !admission.since.is_multiple_of(16)
    }

    pub(super) fn is_slow(&self, took: Nanos) -> bool {
        self.rules.slow.is_some_and(|slow| took >= slow.threshold)
    }

    /// Whether a call cut after this wait says anything about the callee.
    pub(super) fn is_telling(&self, waited: Nanos) -> bool {
        waited >= SHORTEST && waited >= self.usual.load(Relaxed)
    }

    /// Learns how long an answer took. An answer that was there at once says nothing about answers that take a while.
    #[inline]
    pub(super) fn learn(&self, took: Nanos) {
        if took == 0 {
            return;
        }
        // If two calls learn at once, one of two similar samples may be lost.
        let usual = self.usual.load(Relaxed);
        let learnt = if usual == 0 { took } else { usual - usual / 8 + took / 8 };
        self.usual.store(learnt.max(1), Relaxed);
    }

    /// Opens the circuit if it is still in the generation of `expected`.
    #[cold]
    pub(super) fn trip(&self, expected: u64, now: Nanos) -> Option<Transition> {
        let mut cold = self.lock();
        let word = self.word.load(SeqCst);
        (key(word) == expected).then(|| self.open(&mut cold, word, now))
    }

    pub(super) fn open(&self, cold: &mut Cold, word: u64, now: Nanos) -> Transition {
        let grown = self.rules.open_first as f64 * self.rules.open_factor.powi(cold.openings.min(1000) as i32);
        let capped = grown.min(self.rules.open_max as f64);
        // Spread on both sides of the wait, so that a thousand clients do not come back in step.
        let wait = capped * (1.0 + self.rules.jitter * (2.0 * cold.rng.f64() - 1.0));
        cold.until = now.saturating_add(wait as Nanos);
        cold.openings = cold.openings.saturating_add(1);
        cold.trips += 1;
        let next = successor(word, OPEN);
        // A failure may be counted in a closed word at any time; the new generation makes its compare-exchange fail.
        self.word.store(next, SeqCst);
        transition(word, next)
    }

    fn close(&self, cold: &mut Cold, word: u64) -> Transition {
        let next = successor(word, CLOSED);
        cold.openings = 0;
        // Before the word changes, so that no call of the new generation finds the old one's results.
        self.window.restart(generation(next));
        self.word.store(next, SeqCst);
        transition(word, next)
    }

    /// Refuses every call until `reset`.
    pub(crate) fn isolate(&self) -> Option<Transition> {
        let _cold = self.lock();
        let word = self.word.load(SeqCst);
        let next = successor(word, ISOLATED);
        self.word.store(next, SeqCst);
        Some(transition(word, next)).filter(Transition::is_change)
    }

    /// Closes the circuit with an empty window, whatever its state.
    pub(crate) fn reset(&self) -> Option<Transition> {
        let mut cold = self.lock();
        let word = self.word.load(SeqCst);
        Some(self.close(&mut cold, word)).filter(Transition::is_change)
    }

    pub(crate) fn state(&self) -> State {
        state(self.word.load(SeqCst))
    }

    /// Whether forgetting this circuit would lose something: it refuses calls, or did so recently.
    pub(crate) fn is_worth_keeping(&self, now: impl Fn() -> Nanos) -> bool {
        let word = self.word.load(SeqCst);
        match word & STATE {
            CLOSED => false,
            OPEN => now() < self.lock().until.saturating_add(self.rules.open_max),
            _ => true,
        }
    }

    pub(crate) fn snapshot(&self, now: Nanos) -> Snapshot {
        let cold = self.lock();
        let word = self.word.load(SeqCst);
        let is = |state| word & STATE == state;
        Snapshot {
            state: state(word),
            counts: self.window.peek(now),
            consecutive: if is(CLOSED) { counter(word) } else { 0 },
            probes: if is(HALF_OPEN) { cold.probes.holding(now, &self.rules.probes) } else { 0 },
            trips: cold.trips,
            rejected: self.rejected.load(Relaxed),
            cancelled: self.cancelled.load(Relaxed),
        }
    }

    /// Moves an admission to the present generation, which no correct caller can do.
    #[cfg(test)]
    pub(super) fn forge(&self, admission: &mut Admission) {
        admission.key = key(self.word.load(SeqCst));
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Cold> {
        // Every critical section only assigns plain values, so a poisoned lock guards a usable state.
        self.cold.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
