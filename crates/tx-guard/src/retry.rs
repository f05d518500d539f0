//! How often a transaction is tried, and how long it pauses between two attempts.
//!
//! Invariant: a pause is random and starts at zero, so transactions that got in each other's way do not meet again.

use std::time::Duration;

/// How often a transaction is tried after a transient failure, and how soon.
///
/// Before attempt n + 1 it waits for a random time between zero and `first × 2ⁿ⁻¹`, at most `longest` ("full jitter").
///
/// | option | default |
/// |---|---|
/// | attempts in all | 3 |
/// | back-off | 10 ms, at most 1 s |
///
/// ```
/// use std::time::Duration;
/// use cancel_safe_tx_guard::Retry;
///
/// let (first, longest) = (Duration::from_millis(5), Duration::from_secs(2));
/// let patient = Retry::attempts(8).backoff(first, longest);
/// assert_ne!(patient, Retry::default());
/// assert_eq!(Retry::none(), Retry::attempts(1));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a policy does nothing until a transaction is given it"]
pub struct Retry {
    pub(crate) attempts: u32,
    first: Duration,
    longest: Duration,
}

impl Retry {
    /// Makes one attempt, and no retry.
    pub fn none() -> Self {
        Self::attempts(1)
    }

    /// Works like the default, with this many attempts in all. Zero counts as one.
    pub fn attempts(attempts: u32) -> Self {
        Self { attempts: attempts.max(1), first: Duration::from_millis(10), longest: Duration::from_secs(1) }
    }

    /// Sets the longest wait before the second attempt, and the longest wait before any attempt. Default: 10 ms and 1
    /// s.
    pub fn backoff(mut self, first: Duration, longest: Duration) -> Self {
        self.first = first;
        self.longest = longest;
        self
    }

    /// The wait after `failed` failed attempts, at least one.
    pub(crate) fn pause(&self, failed: u32) -> Duration {
        self.bound(failed).mul_f64(fastrand::f64())
    }

    fn bound(&self, failed: u32) -> Duration {
        let doubled = 2_u32.saturating_pow(failed.saturating_sub(1));
        self.first.saturating_mul(doubled).min(self.longest)
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self::attempts(3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn pauses_double_from_the_first_up_to_the_longest() {
        let retry = Retry::attempts(u32::MAX).backoff(3 * MS, 10 * MS);
        let bounds: Vec<_> = (1..=4).map(|failed| retry.bound(failed)).collect();
        assert_eq!(bounds, [3 * MS, 6 * MS, 10 * MS, 10 * MS]);
        assert_eq!(retry.bound(u32::MAX), 10 * MS);
        assert_eq!(Retry::default().backoff(Duration::MAX, Duration::MAX).bound(9), Duration::MAX);
    }

    #[test]
    fn a_pause_is_random_below_its_bound() {
        let retry = Retry::default().backoff(1000 * MS, 1000 * MS);
        let pauses: Vec<_> = (0..100).map(|_| retry.pause(1)).collect();
        assert!(pauses.iter().all(|pause| *pause < 1000 * MS), "{pauses:?}");
        assert!(pauses.iter().any(|pause| *pause < 500 * MS), "{pauses:?}");
        assert!(pauses.iter().any(|pause| *pause > 500 * MS), "{pauses:?}");
    }

    #[test]
    fn no_attempts_are_one() {
        assert_eq!(Retry::attempts(0), Retry::none());
    }
}
