//! One item: what its function gets, how it may fail, and what comes out.
//!
//! Invariant: an item's idempotency key is the same in every attempt and after every restart of one checkpoint.

use std::{
    error::Error,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_128_with_seed;

pub(crate) type BoxError = Box<dyn Error + Send + Sync>;

/// What an item's function knows about this attempt.
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

/// How an attempt failed. It decides what happens to the item.
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
    Defer(Instant),
    Pause(Instant),
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

    /// Not now: the item goes back into the queue, for a time or until a point in time. No attempt is counted.
    ///
    /// An item may do this [`max_defers`](crate::Builder::max_defers) times in a run; after that, a deferral counts as
    /// a failed attempt. If one item after another is deferred (twice as many as run at once, and at least 16) and none
    /// ends in another way, the run waits as a whole, as in a [pause](Self::pause): 100 ms, then twice as long each
    /// time, up to the shortest time that any of them asked for. After each wait one item goes first.
    pub fn defer(until: impl Into<Until>, cause: impl Into<BoxError>) -> Self {
        Self { verdict: Verdict::Defer(until.into().0), cause: cause.into() }
    }

    /// No item now: the whole run waits, for a time or until a point in time, because a quota is used up or a disk is full.
    /// `because` gives the reason, which the [progress](crate::Progress::paused) shows.
    ///
    /// Until then no item starts; running items go on. This item waits too, and neither an attempt nor a deferral is counted.
    /// Then one item goes first, and the others follow when it has ended, or after a second. Another pause can lengthen
    /// this one but never shortens it. The number of pauses has no limit: the token ends a run that waits.
    ///
    /// ```
    /// # use cancel_safe_resumable::ItemError;
    /// # use std::time::Duration;
    /// # fn _example() -> Result<(), ItemError> {
    /// return Err(ItemError::pause(Duration::from_secs(60)).because("429 Too Many Requests"));
    /// # }
    /// ```
    pub fn pause(until: impl Into<Until>) -> Self {
        Self { verdict: Verdict::Pause(until.into().0), cause: "paused".into() }
    }

    /// Says why.
    #[must_use]
    pub fn because(mut self, cause: impl Into<BoxError>) -> Self {
        self.cause = cause.into();
        self
    }
}

/// The longest wait: 30 years stand for ever, because an instant may not be able to hold a later end.
pub(crate) const LONGEST_WAIT: Duration = Duration::from_secs(60 * 60 * 24 * 365 * 30);

/// The end of a wait that begins now.
pub(crate) fn later(wait: Duration) -> Instant {
    Instant::now() + wait.min(LONGEST_WAIT)
}

/// When a wait ends: after a duration from now, or at a point in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Until(Instant);

impl From<Duration> for Until {
    fn from(wait: Duration) -> Self {
        Self(later(wait))
    }
}

impl From<Instant> for Until {
    fn from(instant: Instant) -> Self {
        Self(instant)
    }
}

impl From<std::time::Instant> for Until {
    fn from(instant: std::time::Instant) -> Self {
        Self(instant.into())
    }
}

/// Converts a date that a server gave, by the present clock; a date in the past is now.
impl From<SystemTime> for Until {
    fn from(date: SystemTime) -> Self {
        date.duration_since(SystemTime::now()).unwrap_or_default().into()
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
    /// How often this run tried it, plus its failed attempts in earlier runs; 0 for a restored result.
    pub attempts: u32,
    /// Its result, or the reason for its quarantine.
    pub result: Result<R, Quarantined>,
}

/// Why an item is in quarantine: it is skipped until a run has
/// [`retry_quarantined`](crate::Builder::retry_quarantined).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("in quarantine after {attempts} attempt{}: {cause}", if *attempts == 1 { "" } else { "s" })]
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
    /// An item that was started and whose end is unknown. Running it again could do twice what must be done once.
    pub(crate) fn uncertain() -> Self {
        let cause = "it was started, and the run ended before its result was recorded".to_owned();
        Self { attempts: 1, cause, uncertain: true }
    }
}

/// How often and how soon a failed item is tried again.
///
/// The wait before attempt n + 1 is random between zero and `first × 2ⁿ⁻¹`, at most `longest` ("full jitter": items that
/// failed together do not come back together). An item that waits takes no slot of the concurrency.
///
/// | option | default |
/// |---|---|
/// | attempts in all | 1 |
/// | back-off | 100 ms, at most 10 s |
///
/// ```
/// use std::time::Duration;
/// use cancel_safe_resumable::Retry;
///
/// let (first, longest) = (Duration::from_millis(50), Duration::from_secs(2));
/// let retry = Retry::attempts(4).backoff(first, longest);
/// # _ = retry;
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a policy does nothing until a run is given it"]
pub struct Retry {
    pub(crate) max_attempts: u32,
    pub(crate) per_run: bool,
    first: Duration,
    longest: Duration,
}

impl Retry {
    /// Allows one attempt and no retry.
    pub fn none() -> Self {
        Self::attempts(1)
    }

    /// Allows this many attempts in all, including the first. Zero counts as one. More than one needs tokio's time
    /// driver: without it the run ends with [`TaskError::Config`](crate::TaskError::Config) before it begins.
    pub fn attempts(attempts: u32) -> Self {
        let (first, longest) = (Duration::from_millis(100), Duration::from_secs(10));
        Self { max_attempts: attempts.max(1), per_run: false, first, longest }
    }

    /// Sets the longest wait before the second attempt, and before any attempt. Default: 100 ms and 10 s.
    pub fn backoff(mut self, first: Duration, longest: Duration) -> Self {
        self.first = first;
        self.longest = longest;
        self
    }

    /// Gives every item all its attempts again in each run. By default the failed attempts of earlier runs count too.
    ///
    /// For work that is killed and restarted while a service it depends on is down: without this, a few short runs use up
    /// the attempts of items that were never at fault.
    pub fn per_run(mut self) -> Self {
        self.per_run = true;
        self
    }

    /// Whether the options contradict each other.
    pub(crate) fn is_contradictory(&self) -> bool {
        self.first > self.longest
    }

    /// The wait after `attempts` failed ones.
    pub(crate) fn delay_after(&self, attempts: u32) -> Duration {
        let doublings = attempts.saturating_sub(1).min(31);
        self.first.saturating_mul(1 << doublings).min(self.longest).mul_f64(fastrand::f64())
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self::none()
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
