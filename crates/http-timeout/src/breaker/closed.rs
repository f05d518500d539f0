//! The effect of results on a closed circuit.
//!
//! Invariant: the rates are checked after everything that may bring one to its limit: a failure, a slow call, a success
//! that completes the minimum, and a slide of the window.

use std::sync::atomic::Ordering::SeqCst;

use super::{
    circuit::{Circuit, Times},
    silence::{FEWEST, Silence},
    window::{Counts, Nanos, Tally},
    word::{COUNTER, COUNTER_MAX, COUNTER_ONE, SHORT, SILENT, Transition, counter, generation, key},
};

impl Circuit {
    /// Counts a healthy call. If its answer is finished, that also ends a silence.
    #[inline]
    pub(super) fn succeed(&self, expected: u64, is_finished: bool, times: Times) -> Option<Transition> {
        let stripe = self.window.here();
        if is_finished {
            self.learn(times.waited);
            stripe.answer(times.now);
        }
        let forgets = if is_finished { COUNTER | SILENT } else { COUNTER };
        if self.is_slow(times.took) {
            return self.record(expected, Tally { failure: false, slow: true }, forgets, times.now);
        }
        let slid = self.window.succeed(stripe, generation(expected), times.now);
        // After the success was counted: a call that marks the window as short counts after that, so one of the two
        // sees the other.
        let word = self.word.load(SeqCst);
        if word == expected && !slid { None } else { self.look(expected, forgets, slid, times.now) }
    }

    /// Handles a success that has something to forget or that may complete the minimum.
    #[cold]
    fn look(&self, expected: u64, forgets: u64, slid: bool, now: Nanos) -> Option<Transition> {
        let word = self.change(expected, |word| word & !forgets)?;
        if word & SHORT == 0 && !slid {
            return None;
        }
        self.judge(expected, self.window.counts(now), now)
    }

    /// Counts a failed call.
    #[cold]
    pub(super) fn fail(&self, expected: u64, times: Times) -> Option<Transition> {
        self.record(expected, Tally { failure: true, slow: self.is_slow(times.took) }, 0, times.now)
    }

    /// Counts a call that its caller gave up.
    #[cold]
    pub(super) fn cut(&self, expected: u64, times: Times) -> Option<Transition> {
        let Times { now, waited, .. } = times;
        if waited >= self.rules.late
            && let Some(opened) = self.fail(expected, Times { took: waited, ..times })
        {
            return Some(opened);
        }
        self.hush(expected, waited, now)
    }

    /// Adds a cut call to the silence.
    fn hush(&self, expected: u64, waited: Nanos, now: Nanos) -> Option<Transition> {
        let limit = self.rules.silence.filter(|_| self.is_telling(waited))?;
        let mut cold = self.lock();
        let word = self.change(expected, |word| word | SILENT)?;
        if word & SILENT == 0 {
            // The callee has answered since the last cut.
            cold.silence = Silence::NONE;
        }
        let began = now.saturating_sub(waited).max(self.window.answered());
        cold.silence.add(began, now.saturating_sub(began));
        if cold.silence.cuts < FEWEST || cold.silence.length(now) < limit {
            return None;
        }
        let word = self.word.load(SeqCst);
        (key(word) == expected).then(|| self.open(&mut cold, word, now))
    }

    /// Records a result that is not a plain success, and opens the circuit if it was one too many.
    fn record(&self, expected: u64, tally: Tally, forgets: u64, now: Nanos) -> Option<Transition> {
        let counts = self.window.record(generation(expected), now, tally);
        let count = |word: u64| {
            let more = (counter(word) + 1).min(COUNTER_MAX);
            if tally.failure { (word & !COUNTER) | (u64::from(more) * COUNTER_ONE) } else { word & !forgets }
        };
        let before = self.change(expected, count)?;
        let consecutive = counter(count(before));
        if self.rules.consecutive_failures.is_some_and(|limit| consecutive >= limit) {
            return self.trip(expected, now);
        }
        self.judge(expected, counts, now)
    }

    /// Opens the circuit if a rate has reached its limit. If only the minimum is missing, the next successes check
    /// again.
    fn judge(&self, expected: u64, mut counts: Counts, now: Nanos) -> Option<Transition> {
        loop {
            let is_short = counts.calls < self.rules.min_calls;
            if !is_short && self.reaches(counts) {
                return self.trip(expected, now);
            }
            let marks = is_short && self.reaches(Counts { calls: self.rules.min_calls, ..counts });
            let before = self.change(expected, |word| if marks { word | SHORT } else { word & !SHORT })?;
            if (before & SHORT != 0) == marks {
                return None;
            }
            // A call that ended between the sum and the mark did not see the mark; the next sum includes it.
            counts = self.window.counts(now);
        }
    }

    fn reaches(&self, counts: Counts) -> bool {
        let reaches = |part: u64, rate: f64| part as f64 >= rate * counts.calls as f64;
        self.rules.failure_rate.is_some_and(|rate| reaches(counts.failures, rate))
            || self.rules.slow.is_some_and(|slow| reaches(counts.slow, slow.rate))
    }

    /// Changes the word's counter and marks, and returns the previous word; `None` if the generation has passed.
    fn change(&self, expected: u64, change: impl Fn(u64) -> u64) -> Option<u64> {
        let mut word = self.word.load(SeqCst);
        loop {
            if key(word) != expected {
                return None;
            }
            let next = change(word);
            if next == word {
                return Some(word);
            }
            match self.word.compare_exchange_weak(word, next, SeqCst, SeqCst) {
                Ok(_) => return Some(word),
                Err(changed) => word = changed,
            }
        }
    }
}
