//! Hedging: when a second copy of a request is worth sending, and the budget that keeps copies a fraction of the load.
//!
//! Invariant: copies never exceed calls × budget; and a server that is slow for all calls gets no copies, because the
//! time after which a call is late follows the usual time.

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// One copy, in the budget's unit: millionths.
const TOKEN: u64 = 1_000_000;

/// The most that the budget holds, so that a pause in the traffic does not save up a storm.
const MOST_TOKENS: u64 = 10;

/// How many of the latest answers determine the usual time.
const SAMPLES: usize = 128;

/// With fewer answers than this, nothing is known.
const ENOUGH: u32 = 32;

/// The usual time is computed again after this many answers.
const EVERY: u32 = 16;

/// How many of the latest 16 answers may have been late. With more, the whole server is slow, not just a few answers.
const MOST_LATE: u32 = 4;

/// When a client sends a second copy of a request because its answer is late. It takes the answer that comes first.
///
/// Only requests with safe methods (GET, HEAD, OPTIONS, TRACE) are hedged. An answer is late when it takes longer than
/// the percentile of the latest 128 answers of its origin, and longer than twice their median. So if all answers take
/// about the same time, none is late.
///
/// The client sends no copy
///
/// - while more than a quarter of the latest answers, or more than an eighth of the calls in flight (but no less than
///   three), are late;
/// - before 32 answers are known;
/// - to an origin whose circuit is not closed;
/// - if the copy would have to wait for a permit or an admission.
///
/// The budget belongs to the client: each call adds its share of a copy.
///
/// The copy has its own permit, admission and token. The loser's are back before the winner's answer is returned.
///
/// ```
/// use cancel_safe_http_timeout::{Hedge, TimeoutClient};
///
/// let hedge = Hedge::at_percentile(0.95).budget(0.05);
/// let client = TimeoutClient::builder().hedge(hedge).build()?;
/// # Ok::<(), cancel_safe_http_timeout::BuildError>(())
/// ```
#[derive(Clone, Copy, Debug)]
#[must_use = "a policy does nothing until a client is given it"]
pub struct Hedge {
    percentile: f64,
    budget: f64,
}

impl Hedge {
    /// Treats an answer as late if it takes longer than this fraction of the latest answers, between 0 and 1. The
    /// budget is 0.05.
    pub fn at_percentile(percentile: f64) -> Self {
        Self { percentile, budget: 0.05 }
    }

    /// Sets how many copies each call adds to the budget of the client, 0 to 1; 0.05 by default. The budget holds at
    /// most ten.
    pub fn budget(mut self, share: f64) -> Self {
        self.budget = share;
        self
    }

    /// What is wrong with the options, if anything.
    pub(crate) fn problem(&self) -> Option<&'static str> {
        if !(self.percentile > 0.0 && self.percentile < 1.0) {
            return Some("has a percentile that is not between 0 and 1");
        }
        (!(0.0..=1.0).contains(&self.budget)).then_some("has a budget that is not from 0 to 1")
    }
}

/// The hedging of one client.
#[derive(Debug)]
pub(crate) struct Hedging {
    percentile: f64,
    deposit: u64,
    left: AtomicU64,
    made: AtomicU64,
}

/// One copy taken out of the budget; it goes back unless it was sent.
#[derive(Debug)]
#[must_use = "a dropped wager goes back to the budget"]
pub(crate) struct Wager<'a> {
    hedging: &'a Hedging,
    spent: bool,
}

impl Hedging {
    pub(crate) fn new(hedge: Hedge) -> Self {
        let deposit = (hedge.budget * TOKEN as f64).round() as u64;
        Self { percentile: hedge.percentile, deposit, left: AtomicU64::new(0), made: AtomicU64::new(0) }
    }

    /// Adds a call's share.
    pub(crate) fn deposit(&self) {
        self.add(self.deposit);
    }

    /// Takes one copy out, if there is one.
    pub(crate) fn take(&self) -> Option<Wager<'_>> {
        self.left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(TOKEN)).ok()?;
        Some(Wager { hedging: self, spent: false })
    }

    /// The copies that were sent.
    pub(crate) fn made(&self) -> u64 {
        self.made.load(Relaxed)
    }

    fn add(&self, amount: u64) {
        let more = |left: u64| Some((left + amount).min(MOST_TOKENS * TOKEN));
        // The closure never refuses.
        let _ = self.left.fetch_update(Relaxed, Relaxed, more);
    }
}

impl Wager<'_> {
    pub(crate) fn spend(&mut self) {
        if !self.spent {
            self.spent = true;
            self.hedging.made.fetch_add(1, Relaxed);
        }
    }
}

impl Drop for Wager<'_> {
    fn drop(&mut self) {
        if !self.spent {
            self.hedging.add(TOKEN);
        }
    }
}

/// How long the answers of one origin take.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Microseconds, the latest in a ring.
    samples: [AtomicU32; SAMPLES],
    answers: AtomicU32,
    /// After how many microseconds an answer is late; zero if unknown.
    late_after: AtomicU32,
    /// One bit for each of the latest answers: whether it was late.
    late: AtomicU32,
    in_flight: AtomicU32,
    overdue: AtomicU32,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            samples: [const { AtomicU32::new(0) }; SAMPLES],
            answers: AtomicU32::new(0),
            late_after: AtomicU32::new(0),
            late: AtomicU32::new(0),
            in_flight: AtomicU32::new(0),
            overdue: AtomicU32::new(0),
        }
    }
}

impl Pace {
    /// After how long an answer is late, if that is known.
    pub(crate) fn late_after(&self) -> Option<Duration> {
        let micros = self.late_after.load(Relaxed);
        (micros > 0).then(|| Duration::from_micros(micros.into()))
    }

    /// Counts a call as in flight until the runner is dropped.
    pub(crate) fn run(&self) -> Runner<'_> {
        self.in_flight.fetch_add(1, Relaxed);
        Runner { pace: self, is_overdue: false }
    }

    fn answered(&self, took: Duration, percentile: f64) {
        let micros = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
        let late_after = self.late_after.load(Relaxed);
        let was_late = u32::from(late_after > 0 && micros > late_after);
        // The closure never refuses.
        let _ = self.late.fetch_update(Relaxed, Relaxed, |late| Some(late << 1 | was_late));
        let answers = self.answers.fetch_add(1, Relaxed);
        self.samples[answers as usize % SAMPLES].store(micros, Relaxed);
        let answers = answers.saturating_add(1);
        if answers.is_multiple_of(EVERY) && answers >= ENOUGH {
            self.learn(answers, percentile);
        }
    }

    #[cold]
    fn learn(&self, answers: u32, percentile: f64) {
        let known = (answers as usize).min(SAMPLES);
        let mut samples: [u32; SAMPLES] = std::array::from_fn(|n| self.samples[n].load(Relaxed));
        let samples = &mut samples[..known];
        samples.sort_unstable();
        let at = |part: f64| samples[((known as f64 * part) as usize).min(known - 1)];
        self.late_after.store(at(percentile).max(at(0.5).saturating_mul(2)).max(1), Relaxed);
    }

    /// Whether a few answers are late, and not all of them.
    fn is_sound(&self) -> bool {
        let late = (self.late.load(Relaxed) & 0xFFFF).count_ones();
        let (overdue, in_flight) = (self.overdue.load(Relaxed), self.in_flight.load(Relaxed));
        // If few calls are in flight, two late ones are no sign; then the latest answers decide.
        late <= MOST_LATE && overdue <= (in_flight / 8).max(3)
    }
}

/// A call in flight, until it is dropped.
#[derive(Debug)]
pub(crate) struct Runner<'a> {
    pace: &'a Pace,
    is_overdue: bool,
}

impl Runner<'_> {
    /// Notes that the answer is late, and returns whether a copy may help.
    pub(crate) fn is_late(&mut self) -> bool {
        self.is_overdue = true;
        self.pace.overdue.fetch_add(1, Relaxed);
        self.pace.is_sound()
    }

    /// Notes that a good answer has come.
    pub(crate) fn answered(self, took: Duration, hedging: &Hedging) {
        self.pace.answered(took, hedging.percentile);
    }
}

impl Drop for Runner<'_> {
    fn drop(&mut self) {
        self.pace.in_flight.fetch_sub(1, Relaxed);
        if self.is_overdue {
            self.pace.overdue.fetch_sub(1, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(answers: impl IntoIterator<Item = u64>) -> Pace {
        let pace = Pace::default();
        answers.into_iter().for_each(|millis| pace.answered(Duration::from_millis(millis), 0.95));
        pace
    }

    #[test]
    fn nothing_is_late_before_enough_is_known() {
        assert_eq!(after([10; 31]).late_after(), None);
        assert_eq!(after([10; 32]).late_after(), Some(Duration::from_millis(20)));
    }

    #[test]
    fn what_is_late_follows_what_is_usual() {
        let fast_with_a_tail = after((0..128).map(|n| if n % 100 == 99 { 1_000 } else { 10 }));
        assert_eq!(fast_with_a_tail.late_after(), Some(Duration::from_millis(20)));
        let wide = after((0..128).map(|n| if n % 10 == 9 { 100 } else { 10 }));
        assert_eq!(wide.late_after(), Some(Duration::from_millis(100)));
        assert_eq!(after([200; 128]).late_after(), Some(Duration::from_millis(400)));
    }

    #[test]
    fn where_many_are_late_no_copy_helps() {
        let pace = after(std::iter::repeat_n(10, 64).chain([30; 4]));
        assert!(pace.run().is_late(), "4 of 16 late");
        pace.answered(Duration::from_millis(30), 0.95);
        assert!(!pace.run().is_late(), "5 of 16 late");
        let pace = after([10; 64]);
        let mut running: Vec<_> = (0..16).map(|_| pace.run()).collect();
        let copies = running.iter_mut().filter_map(|runner| runner.is_late().then_some(())).count();
        assert_eq!(copies, 3, "of 16 calls in flight");
        drop(running);
        assert_eq!((pace.in_flight.load(Relaxed), pace.overdue.load(Relaxed)), (0, 0));
    }

    #[test]
    fn copies_stay_within_their_share_and_unsent_ones_go_back() {
        let hedging = Hedging::new(Hedge::at_percentile(0.95).budget(0.05));
        let mut sent = 0;
        for _ in 0..1_000 {
            hedging.deposit();
            if let Some(mut wager) = hedging.take() {
                wager.spend();
                sent += 1;
            }
        }
        assert_eq!((sent, hedging.made()), (50, 50));
        (0..20).for_each(|_| hedging.deposit());
        drop(hedging.take());
        assert!(hedging.take().is_some(), "the unsent one came back");
    }
}
