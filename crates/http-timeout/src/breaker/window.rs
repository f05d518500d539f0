//! The sliding window of results: how many of the latest calls failed or were slow.
//!
//! Invariant: it counts only results of one generation, and none older than the window, so a sum never mixes results
//! from before and after a transition. Counting costs the same however many calls it holds.
//!
//! Nearly all calls of a closed circuit succeed, so a success in a time window takes one compare-exchange on a counter
//! that few other threads use. Everything else goes through a lock, as does each turn to the next tenth of the window:
//!
//! ```text
//! stripes   generation and successes since the latest turn, one word a stripe
//! ledger    the rest: failures and slow calls since the turn, the nine tenths before it, and the sum of all these
//! ```

use std::sync::{
    PoisonError,
    atomic::Ordering::{Relaxed, SeqCst},
};

use super::sync::{AtomicU64, Mutex, MutexGuard, thread_index};

/// Nanoseconds since the breaker was created. Every pure function here gets the time in this form.
pub(crate) type Nanos = u64;

/// A time window is this many buckets; it slides by one bucket at a time.
const BUCKETS: usize = 10;

/// The number of stripes; a power of two. Up to this many threads that succeed at once each count on their own stripe.
const STRIPES: usize = 4;

/// A stripe's word has the low bits of the generation, and below them the count. Both are wide enough: a bucket of a
/// week holds less than 2^40 calls, and no thread sleeps between a load and a compare-exchange for 2^24 transitions.
const COUNT: u64 = (1 << 40) - 1;

/// What a window covers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Span {
    /// The results of the latest stretch of time, by the width of one of its ten buckets.
    Time { bucket: Nanos },
    /// The latest results, by their number.
    Count(usize),
}

/// One result as the window counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) failure: bool,
    pub(crate) slow: bool,
}

impl Tally {
    const WELL: Self = Self { failure: false, slow: false };
}

/// The sum of the results in a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) calls: u64,
    pub(crate) failures: u64,
    pub(crate) slow: u64,
}

impl Counts {
    fn add(&mut self, tally: Tally) {
        self.calls += 1;
        self.failures += u64::from(tally.failure);
        self.slow += u64::from(tally.slow);
    }

    fn remove(&mut self, other: Self) {
        self.calls -= other.calls;
        self.failures -= other.failures;
        self.slow -= other.slow;
    }
}

impl From<Tally> for Counts {
    fn from(tally: Tally) -> Self {
        Self { calls: 1, failures: u64::from(tally.failure), slow: u64::from(tally.slow) }
    }
}

/// The window of one breaker.
#[derive(Debug)]
pub(crate) struct Window {
    stripes: [Stripe; STRIPES],
    /// When the current bucket ends; never for a window of calls, whose successes all go to the ledger.
    ends: AtomicU64,
    is_counting: bool,
    ledger: Mutex<Ledger>,
}

/// Two cache lines wide, so that threads on different stripes do not invalidate each other's lines.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Stripe {
    successes: AtomicU64,
    /// When the latest answer was finished.
    answered: AtomicU64,
}

#[derive(Debug)]
struct Ledger {
    generation: u64,
    /// The sum of the ledger: everything except what the stripes have counted since the turn.
    total: Counts,
    store: Store,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "the large variant is the usual one, and a breaker holds one of them")]
enum Store {
    /// Bucket i holds the latest epoch that is congruent to i; the bucket of `epoch` is being filled.
    Time {
        bucket: Nanos,
        epoch: u64,
        buckets: [Counts; BUCKETS],
    },
    Count {
        ring: Box<[Option<Tally>]>,
        next: usize,
    },
}

impl Window {
    pub(crate) fn new(span: Span) -> Self {
        let (store, ends) = match span {
            Span::Time { bucket } => {
                let bucket = bucket.max(1);
                (Store::Time { bucket, epoch: 0, buckets: [Counts::default(); BUCKETS] }, bucket)
            }
            Span::Count(size) => (Store::Count { ring: vec![None; size.max(1)].into(), next: 0 }, Nanos::MAX),
        };
        Self {
            stripes: std::array::from_fn(|_| Stripe { successes: AtomicU64::new(0), answered: AtomicU64::new(0) }),
            ends: AtomicU64::new(ends),
            is_counting: matches!(span, Span::Count(_)),
            ledger: Mutex::new(Ledger { generation: 0, total: Counts::default(), store }),
        }
    }

    /// Counts a success of `generation` that is not slow, on a stripe. Returns true if the window slid, so that a rate
    /// may be higher than before.
    #[inline]
    pub(crate) fn succeed(&self, stripe: &Stripe, generation: u64, now: Nanos) -> bool {
        if self.is_counting {
            self.record(generation, now, Tally::WELL);
            return false;
        }
        // A thread that read the clock before another thread but arrives after it also counts in the newer bucket.
        let turns = now >= self.ends.load(Relaxed);
        if turns {
            self.turn(now);
        }
        let successes = &stripe.successes;
        let mut word = successes.load(Relaxed);
        // A stripe of a later generation ignores it, and a stripe that is completely full stays as it is.
        while word & !COUNT == tag(generation) && word & COUNT != COUNT {
            match successes.compare_exchange_weak(word, word + 1, SeqCst, Relaxed) {
                Ok(_) => break,
                Err(changed) => word = changed,
            }
        }
        turns
    }

    /// Records a result of `generation`, and sums up. A window that has moved on to a later generation ignores it.
    pub(crate) fn record(&self, generation: u64, now: Nanos, tally: Tally) -> Counts {
        let mut ledger = self.lock();
        self.slide(&mut ledger, now);
        if ledger.generation == generation {
            ledger.add(tally);
        }
        self.sum(&ledger)
    }

    /// Sums the results that are still inside the window at `now`.
    pub(crate) fn counts(&self, now: Nanos) -> Counts {
        let mut ledger = self.lock();
        self.slide(&mut ledger, now);
        self.sum(&ledger)
    }

    /// Works like `counts` without sliding the window, so that the next call still sees that it should slide.
    pub(crate) fn peek(&self, now: Nanos) -> Counts {
        let ledger = self.lock();
        let mut sum = self.sum(&ledger);
        if let Store::Time { bucket, epoch, buckets } = &ledger.store {
            let passed = (now / *bucket).saturating_sub(*epoch);
            if passed >= BUCKETS as u64 {
                return Counts::default();
            }
            (1..=passed).for_each(|ahead| sum.remove(buckets[slot(*epoch + ahead)]));
        }
        sum
    }

    /// Empties the window for `generation`, before the first call of that generation is admitted.
    pub(crate) fn restart(&self, generation: u64) {
        let mut ledger = self.lock();
        ledger.generation = generation;
        ledger.total = Counts::default();
        match &mut ledger.store {
            Store::Time { buckets, .. } => *buckets = [Counts::default(); BUCKETS],
            Store::Count { ring, next } => {
                ring.fill(None);
                *next = 0;
            }
        }
        for stripe in &self.stripes {
            stripe.successes.store(tag(generation), SeqCst);
        }
    }

    /// When the latest answer was finished.
    pub(crate) fn answered(&self) -> Nanos {
        self.stripes.iter().map(|stripe| stripe.answered.load(Relaxed)).max().unwrap_or(0)
    }

    /// The stripe of this thread.
    #[inline]
    pub(crate) fn here(&self) -> &Stripe {
        // The number of stripes is a power of two, and a mask is cheaper than a remainder.
        &self.stripes[thread_index() & (STRIPES - 1)]
    }

    #[cold]
    fn turn(&self, now: Nanos) {
        self.slide(&mut self.lock(), now);
    }

    /// Moves the stripes' counts into the ledger if their bucket has passed, and forgets results that are too old.
    fn slide(&self, ledger: &mut Ledger, now: Nanos) {
        if now < self.ends.load(Relaxed) {
            return;
        }
        let tag = tag(ledger.generation);
        let counted: u64 = self.stripes.iter().map(|stripe| stripe.successes.swap(tag, SeqCst) & COUNT).sum();
        let Store::Time { bucket, epoch, buckets } = &mut ledger.store else { return };
        buckets[slot(*epoch)].calls += counted;
        ledger.total.calls += counted;
        let current = now / *bucket;
        for passed in (*epoch + 1..=current).take(BUCKETS) {
            ledger.total.remove(std::mem::take(&mut buckets[slot(passed)]));
        }
        *epoch = current;
        self.ends.store((current + 1).saturating_mul(*bucket), Relaxed);
    }

    /// The stripes have the ledger's generation, because only `restart` changes it, under the lock.
    fn sum(&self, ledger: &Ledger) -> Counts {
        let counted: u64 = self.stripes.iter().map(|stripe| stripe.successes.load(SeqCst) & COUNT).sum();
        Counts { calls: ledger.total.calls + counted, ..ledger.total }
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        // Nothing in a critical section can panic half-way, so a poisoned window is still valid.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stripe {
    /// Notes that an answer was finished.
    #[inline]
    pub(crate) fn answer(&self, now: Nanos) {
        self.answered.store(now, Relaxed);
    }

    /// When the latest answer on this stripe was finished.
    #[inline]
    pub(crate) fn answered(&self) -> Nanos {
        self.answered.load(Relaxed)
    }
}

impl Ledger {
    fn add(&mut self, tally: Tally) {
        match &mut self.store {
            Store::Time { epoch, buckets, .. } => buckets[slot(*epoch)].add(tally),
            Store::Count { ring, next } => {
                if let Some(oldest) = ring[*next].replace(tally) {
                    self.total.remove(oldest.into());
                }
                *next = (*next + 1) % ring.len();
            }
        }
        self.total.add(tally);
    }
}

/// The upper bits of a stripe's word.
fn tag(generation: u64) -> u64 {
    generation.wrapping_mul(COUNT + 1)
}

fn slot(epoch: u64) -> usize {
    (epoch % BUCKETS as u64) as usize
}
