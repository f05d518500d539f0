//! The sliding window of results: how many of the latest calls failed or were slow.
//!
//! Invariant: a stripe holds results of one generation only, and none older than the window, so a sum never mixes
//! what happened before a transition with what happened after it. Recording costs the same however many calls it holds.

use std::{
    cell::Cell,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Nanoseconds since the breaker was made; the time every pure function here is given.
pub(crate) type Nanos = u64;

/// A time window is this many buckets; it slides by one bucket at a time.
const BUCKETS: usize = 10;

/// Threads that record at once each lock a stripe of their own, up to this many; a power of two.
const STRIPES: usize = 4;

/// What a window covers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Span {
    /// The results of the latest stretch of time, by the width of one of its ten buckets.
    Time { bucket: Nanos },
    /// The latest results, by their number.
    Count(usize),
}

/// One result as the window counts it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tally {
    pub(crate) failure: bool,
    pub(crate) slow: bool,
    /// Whether the call ended by itself; a cancelled call that counts as a failure did not.
    pub(crate) conclusive: bool,
}

/// The sum of the results in a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) calls: u64,
    pub(crate) failures: u64,
    pub(crate) slow: u64,
    pub(crate) conclusive: u64,
}

impl Counts {
    fn add(&mut self, tally: Tally) {
        self.calls += 1;
        self.failures += u64::from(tally.failure);
        self.slow += u64::from(tally.slow);
        self.conclusive += u64::from(tally.conclusive);
    }

    fn remove(&mut self, tally: Tally) {
        self.calls -= 1;
        self.failures -= u64::from(tally.failure);
        self.slow -= u64::from(tally.slow);
        self.conclusive -= u64::from(tally.conclusive);
    }

    fn merge(&mut self, other: Self) {
        self.calls += other.calls;
        self.failures += other.failures;
        self.slow += other.slow;
        self.conclusive += other.conclusive;
    }
}

/// The window of one breaker.
#[derive(Debug)]
pub(crate) struct Window {
    stripes: Box<[Stripe]>,
}

/// Two cache lines wide, so that threads on different stripes do not invalidate each other's lines.
#[derive(Debug)]
#[repr(align(128))]
struct Stripe(Mutex<Slots>);

#[derive(Debug)]
struct Slots {
    generation: u64,
    store: Store,
}

#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "the large variant is the usual one, and in place it is one cache miss less"
)]
enum Store {
    /// `ends` is when the bucket of `epoch` does.
    Time {
        bucket: Nanos,
        epoch: u64,
        ends: Nanos,
        buckets: [Counts; BUCKETS],
    },
    Count {
        ring: Box<[Option<Tally>]>,
        next: usize,
        total: Counts,
    },
}

impl Window {
    pub(crate) fn new(span: Span) -> Self {
        // The latest N results have one order, so a count window cannot be striped.
        let stripes = if matches!(span, Span::Count(_)) { 1 } else { STRIPES };
        Self { stripes: (0..stripes).map(|_| Stripe(Mutex::new(Slots::new(span)))).collect() }
    }

    /// Records a result of `generation`; a stripe that has moved on to a later generation ignores it.
    pub(crate) fn record(&self, generation: u64, now: Nanos, tally: Tally) {
        // The number of stripes is a power of two, and a mask is cheaper than a remainder.
        let mut slots = self.stripes[thread_index() & (self.stripes.len() - 1)].lock();
        if slots.generation > generation {
            return;
        }
        if slots.generation < generation {
            slots.restart(generation);
        }
        slots.store.add(now, tally);
    }

    /// Sums the results of `generation` that are still inside the window at `now`.
    pub(crate) fn counts(&self, generation: u64, now: Nanos) -> Counts {
        let mut sum = Counts::default();
        for stripe in &self.stripes {
            let slots = stripe.lock();
            if slots.generation == generation {
                sum.merge(slots.store.sum(now));
            }
        }
        sum
    }
}

impl Stripe {
    fn lock(&self) -> std::sync::MutexGuard<'_, Slots> {
        // Nothing in a critical section can panic half way; a poisoned window is still a window.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slots {
    fn new(span: Span) -> Self {
        let store = match span {
            Span::Time { bucket } => {
                let bucket = bucket.max(1);
                Store::Time { bucket, epoch: 0, ends: bucket, buckets: [Counts::default(); BUCKETS] }
            }
            Span::Count(size) => {
                Store::Count { ring: vec![None; size.max(1)].into(), next: 0, total: Counts::default() }
            }
        };
        Self { generation: 0, store }
    }

    fn restart(&mut self, generation: u64) {
        self.generation = generation;
        match &mut self.store {
            Store::Time { buckets, .. } => *buckets = [Counts::default(); BUCKETS],
            Store::Count { ring, next, total } => {
                ring.fill(None);
                *next = 0;
                *total = Counts::default();
            }
        }
    }
}

impl Store {
    fn add(&mut self, now: Nanos, tally: Tally) {
        match self {
            Self::Time { bucket, epoch, ends, buckets } => {
                // The usual case, the bucket of the last call, must not pay for a division. A thread that read the
                // clock before another but comes after it counts in the newer bucket too.
                if now >= *ends {
                    let current = now / *bucket;
                    let passed = (current - *epoch).min(BUCKETS as u64);
                    for expired in (current - passed + 1)..=current {
                        buckets[(expired % BUCKETS as u64) as usize] = Counts::default();
                    }
                    (*epoch, *ends) = (current, (current + 1).saturating_mul(*bucket));
                }
                buckets[(*epoch % BUCKETS as u64) as usize].add(tally);
            }
            Self::Count { ring, next, total } => {
                if let Some(oldest) = ring[*next].replace(tally) {
                    total.remove(oldest);
                }
                total.add(tally);
                *next = (*next + 1) % ring.len();
            }
        }
    }

    fn sum(&self, now: Nanos) -> Counts {
        match self {
            Self::Time { bucket, epoch, buckets, .. } => {
                let current = (now / *bucket).max(*epoch);
                let mut sum = Counts::default();
                // Bucket i of the ring holds the one epoch of (epoch - 10, epoch] that is congruent to it.
                for age in 0..(BUCKETS as u64).min(*epoch + 1) {
                    let held = *epoch - age;
                    if current - held < BUCKETS as u64 {
                        sum.merge(buckets[(held % BUCKETS as u64) as usize]);
                    }
                }
                sum
            }
            Self::Count { total, .. } => *total,
        }
    }
}

/// A small number that differs from thread to thread, the same for the life of a thread.
fn thread_index() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static INDEX: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    INDEX
        .try_with(|index| {
            if index.get() == usize::MAX {
                index.set(NEXT.fetch_add(1, Ordering::Relaxed) % STRIPES);
            }
            index.get()
        })
        // A permit dropped while its thread is being torn down has no thread-locals any more.
        .unwrap_or(0)
}
