//! One item: what its function is told, how it may fail, and what comes out.
//!
//! Invariant: an item's idempotency key is the same in every attempt and after every restart of one checkpoint.

use std::{error::Error, fmt, sync::Arc, time::Duration};

use xxhash_rust::xxh3::xxh3_128_with_seed;

pub(crate) type BoxError = Box<dyn Error + Send + Sync>;

/// What an item's function is told about this attempt.
#[derive(Clone, Debug)]
pub struct ItemContext {
    pub(crate) index: usize,
    pub(crate) key: Option<Arc<str>>,
    pub(crate) attempt: u32,
    pub(crate) seed: u64,
}

impl ItemContext {
    /// Returns the item's position in the input, counted from 0.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// Returns the item's key, if the run has [`key`](crate::Builder::key).
    #[must_use]
    pub fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// Returns the number of this attempt, from 1. Failed attempts of earlier runs count, unless the retry is
    /// [`per_run`](Retry::per_run); deferrals do not.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Returns 32 hexadecimal digits that name this item in this checkpoint: the same in every attempt and after every
    /// restart, different in another checkpoint.
    ///
    /// Send it with the effect (as an `Idempotency-Key`, in a unique column), because an item whose result was not yet
    /// durable at a crash runs again.
    #[must_use]
    pub fn idempotency_key(&self) -> String {
        let index = (self.index as u64).to_le_bytes();
        let name = self.key.as_deref().map_or(&index[..], str::as_bytes);
        format!("{:032x}", xxh3_128_with_seed(name, self.seed))
    }
}

/// How an attempt failed, and so what happens to its item.
///
/// Any error becomes one that is retried, so that `?` works in an item's function.
#[derive(Debug)]
pub struct ItemError {
    pub(crate) verdict: Verdict,
    pub(crate) cause: BoxError,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Retry,
    Permanent,
    Defer(Duration),
}

impl ItemError {
    /// Another attempt may succeed: the item is tried again as [`retry`](crate::Builder::retry) says.
    pub fn retry(cause: impl Into<BoxError>) -> Self {
        Self { verdict: Verdict::Retry, cause: cause.into() }
    }

    /// No attempt will succeed: the item goes straight to quarantine.
    pub fn permanent(cause: impl Into<BoxError>) -> Self {
        Self { verdict: Verdict::Permanent, cause: cause.into() }
    }

    /// Not now: the item goes back into the queue for at least `after`, and no attempt is counted.
    ///
    /// An item may do so [`max_defers`](crate::Builder::max_defers) times in a run; after that it counts as a retry.
    pub fn defer(after: Duration, cause: impl Into<BoxError>) -> Self {
        Self { verdict: Verdict::Defer(after), cause: cause.into() }
    }
}

impl<E: Error + Send + Sync + 'static> From<E> for ItemError {
    fn from(cause: E) -> Self {
        Self::retry(cause)
    }
}

impl fmt::Display for ItemError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cause.fmt(f)
    }
}

/// A finished item.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Done<R> {
    /// Its position in the input, counted from 0.
    pub index: usize,
    /// Its key, if the run has [`key`](crate::Builder::key).
    pub key: Option<Arc<str>>,
    /// Whether an earlier run finished it.
    pub restored: bool,
    /// How often it was tried by this run and, if it failed then, by earlier ones; 0 for a restored result.
    pub attempts: u32,
    /// Its result, or why it is in quarantine.
    pub result: Result<R, Quarantined>,
}

/// Why an item is in quarantine: it is skipped until a run has
/// [`retry_quarantined`](crate::Builder::retry_quarantined).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("in quarantine after {attempts} attempts: {cause}")]
#[non_exhaustive]
pub struct Quarantined {
    /// How often it was tried.
    pub attempts: u32,
    /// The last error and its sources, cut after 1 KiB.
    pub cause: String,
    /// Whether it may have taken effect: it was started under [`at_most_once`](crate::Builder::at_most_once), and the
    /// run ended before its result was recorded.
    pub uncertain: bool,
}

impl Quarantined {
    /// An item that was started, and whose end is not known: to run it again could do twice what must be done once.
    pub(crate) fn uncertain() -> Self {
        let cause = "it was started, and the run ended before its result was recorded".to_owned();
        Self { attempts: 1, cause, uncertain: true }
    }
}

/// How often and how soon a failed item is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    pub(crate) max_attempts: u32,
    pub(crate) per_run: bool,
    base: Duration,
    cap: Duration,
}

impl Retry {
    /// Every item is tried once (the default).
    #[must_use]
    pub fn never() -> Self {
        Self::exponential(1)
    }

    /// Every item is tried at most `max_attempts` times in all. Before attempt n + 1 it waits a random time up to
    /// 100 ms × 2ⁿ⁻¹, at most 30 s, and takes no slot of the concurrency meanwhile.
    #[must_use]
    pub fn exponential(max_attempts: u32) -> Self {
        Self { max_attempts, per_run: false, base: Duration::from_millis(100), cap: Duration::from_secs(30) }
    }

    /// Gives every item all its attempts again in each run. By default the failed attempts of earlier runs count too.
    ///
    /// For work that is killed and started again while what it depends on is down: without this a few short runs use up
    /// the attempts of items that were never at fault.
    #[must_use]
    pub fn per_run(mut self) -> Self {
        self.per_run = true;
        self
    }

    /// Sets the longest wait before the second attempt. Default: 100 ms.
    #[must_use]
    pub fn base(mut self, base: Duration) -> Self {
        self.base = base;
        self
    }

    /// Sets the longest wait before any attempt. Default: 30 s.
    #[must_use]
    pub fn cap(mut self, cap: Duration) -> Self {
        self.cap = cap;
        self
    }

    /// The wait after `attempts` failed ones. Full jitter: items that failed together do not come back together.
    pub(crate) fn delay_after(&self, attempts: u32) -> Duration {
        let doublings = attempts.saturating_sub(1).min(31);
        self.base.saturating_mul(1 << doublings).min(self.cap).mul_f64(fastrand::f64())
    }
}

/// The message of an error and its sources, cut so that a record stays small.
pub(crate) fn describe(error: &(dyn Error + 'static)) -> String {
    const LIMIT_BYTES: usize = 1024;
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source
        && text.len() < LIMIT_BYTES
    {
        let message = error.to_string();
        // Many libraries repeat their source in their own message.
        if !text.contains(&message) {
            text.push_str(": ");
            text.push_str(&message);
        }
        source = error.source();
    }
    let end = (0..=LIMIT_BYTES.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    text.truncate(end.unwrap_or_default());
    text
}
