//! When a call may be tried again, how long it waits first, and the budget that keeps retries a fraction of the load.
//!
//! Invariant: a token is taken before the wait and goes back in `drop` unless its attempt was made. So while calls
//! fail, attempts never exceed calls × (1 + ratio) + reserve, plus one for each quiet second between two requested
//! retries.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime},
};

use http::{HeaderMap, header::RETRY_AFTER};
use tokio::time::Instant;

/// One retry, in the budget's unit: thousandths.
const TOKEN: u64 = 1_000;

/// After each such time in which no call wanted a retry, the budget gains one retry.
const PEACE: Duration = Duration::from_secs(1);

/// When and how a client retries a call.
///
/// A client retries only idempotent requests (GET, HEAD, PUT, DELETE, OPTIONS, TRACE, one with an `Idempotency-Key`
/// header, or one declared with [`RequestBuilder::idempotent`](crate::RequestBuilder::idempotent)), and any request
/// that provably was not sent because no connection was made. A streamed body cannot be sent twice. A redirected call
/// starts again with its first request, or with the latest one that followed a request that may not be sent twice.
///
/// It retries after connection errors, timeouts of an attempt, and the statuses 408, 429, 500, 502, 503 and 504. The
/// wait before attempt n + 1 is random between zero and `first × 2ⁿ⁻¹`, at most `longest` ("full jitter"). If the
/// server sent `Retry-After`, that wait is added to what it asks for.
///
/// | option | default |
/// |---|---|
/// | attempts in all | 3 |
/// | back-off | 100 ms, at most 10 s |
/// | budget | 0.2 retries a call, and a reserve of 10 |
/// | cap of `Retry-After` | 30 s |
///
/// The budget belongs to the client. It also gains a retry for each second in which no call wanted one.
///
/// ```
/// use std::time::Duration;
/// use cancel_safe_http_timeout::Retry;
///
/// let retry = Retry::attempts(4)
///     .backoff(Duration::from_millis(50), Duration::from_secs(2))
///     .budget(0.1)
///     .retry_after_cap(Duration::from_secs(10));
/// # _ = retry;
/// ```
#[derive(Clone, Debug)]
#[must_use = "a policy does nothing until a client is given it"]
pub struct Retry {
    pub(super) attempts: u32,
    ratio: f64,
    reserve: u32,
    first: Duration,
    longest: Duration,
    retry_after_cap: Duration,
}

impl Retry {
    /// Makes one attempt, and no retry.
    pub fn none() -> Self {
        Self::attempts(1)
    }

    /// Works like the default, with this many attempts in all, including the first. Zero counts as one.
    pub fn attempts(attempts: u32) -> Self {
        Self {
            attempts: attempts.max(1),
            ratio: 0.2,
            reserve: 10,
            first: Duration::from_millis(100),
            longest: Duration::from_secs(10),
            retry_after_cap: Duration::from_secs(30),
        }
    }

    /// Makes this many attempts after the first.
    #[doc(hidden)]
    pub fn idempotent(retries: u32) -> Self {
        Self::attempts(retries.saturating_add(1))
    }

    /// Sets the longest wait before the second attempt, and the longest wait before any attempt; 100 ms and 10 s by
    /// default.
    pub fn backoff(mut self, first: Duration, longest: Duration) -> Self {
        self.first = first;
        self.longest = longest;
        self
    }

    /// Sets how many retries each call adds to the budget of the client, 0 to 1; 0.2 by default.
    pub fn budget(mut self, ratio: f64) -> Self {
        self.ratio = ratio;
        self
    }

    /// Sets how many retries the budget holds at most, and at the start; 10 by default.
    pub fn reserve(mut self, retries: u32) -> Self {
        self.reserve = retries;
        self
    }

    /// Returns a response at once if it asks for a longer wait than this; 30 s by default. With zero, it returns every
    /// response that asks for a wait.
    pub fn retry_after_cap(mut self, cap: Duration) -> Self {
        self.retry_after_cap = cap;
        self
    }

    /// Whether any call may be tried again.
    pub(crate) fn is_some(&self) -> bool {
        self.attempts > 1
    }

    /// The budget of a client; `None` if there are no retries.
    pub(crate) fn budget_of_client(&self) -> Option<Budget> {
        self.is_some().then(|| Budget::new(self))
    }

    /// What is wrong with the options, if anything.
    pub(crate) fn problem(&self) -> Option<&'static str> {
        if !(0.0..=1.0).contains(&self.ratio) {
            return Some("has a budget that is not from 0 to 1");
        }
        (self.first > self.longest).then_some("has a first back-off above the longest")
    }

    /// The wait after this many failed attempts; `None` if the server asks for a longer wait than the cap.
    pub(super) fn wait(&self, failed: u32, retry_after: Option<Duration>) -> Option<Duration> {
        let doubled = 2_u32.checked_pow(failed.saturating_sub(1)).and_then(|factor| self.first.checked_mul(factor));
        let jittered = doubled.unwrap_or(self.longest).min(self.longest).mul_f64(fastrand::f64());
        match retry_after {
            None => Some(jittered),
            Some(asked) if asked > self.retry_after_cap || self.retry_after_cap.is_zero() => None,
            // In addition, not instead; otherwise all clients that got the same time would come back in the same
            // instant.
            Some(asked) => Some(asked.saturating_add(jittered)),
        }
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self::attempts(3)
    }
}

/// How long the server asks to wait: whole seconds, or until a date. A date in the past means no wait; nonsense is
/// ignored.
pub(crate) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than fit are simply very long.
        return Some(Duration::from_secs(value.parse().unwrap_or(u64::MAX)));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or(Duration::ZERO))
}

/// The retries that a client has left, in thousandths.
#[derive(Debug)]
pub(crate) struct Budget {
    left: AtomicU64,
    made: AtomicU64,
    capacity: u64,
    deposit: u64,
    epoch: Instant,
    /// When a retry was last wanted, or quiet time last paid, in nanoseconds since the epoch.
    quiet_since: AtomicU64,
}

impl Budget {
    fn new(retry: &Retry) -> Self {
        let capacity = u64::from(retry.reserve) * TOKEN;
        let deposit = (retry.ratio * TOKEN as f64).round() as u64;
        Self {
            left: AtomicU64::new(capacity),
            made: AtomicU64::new(0),
            capacity,
            deposit,
            epoch: Instant::now(),
            quiet_since: AtomicU64::new(0),
        }
    }

    /// Adds a call's share.
    pub(super) fn deposit(&self) {
        self.add(self.deposit);
    }

    /// Takes one retry out, if there is one.
    pub(super) fn take(&self) -> Option<Token<'_>> {
        let now = self.refill();
        self.quiet_since.fetch_max(now, Ordering::Relaxed);
        let less = |left: u64| left.checked_sub(TOKEN);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).ok()?;
        Some(Token { budget: self })
    }

    /// Pays for the quiet time since a retry was last wanted, and returns the time.
    ///
    /// Otherwise a client that seldom calls would feel an outage until enough calls had refilled the budget. While
    /// calls keep failing there is no quiet time, so the bound on attempts holds.
    fn refill(&self) -> u64 {
        let now = u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let since = self.quiet_since.load(Ordering::Relaxed);
        let quiet = Duration::from_nanos(now.saturating_sub(since));
        // Only one of the callers that see the same quiet time is paid for it.
        if quiet >= PEACE && self.quiet_since.compare_exchange(since, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            let tokens = quiet.div_duration_f64(PEACE).min(self.capacity as f64);
            self.add((tokens * TOKEN as f64) as u64);
        }
        now
    }

    pub(crate) fn retries_left(&self) -> f64 {
        self.refill();
        self.left.load(Ordering::Relaxed) as f64 / TOKEN as f64
    }

    pub(crate) fn retries_made(&self) -> u64 {
        self.made.load(Ordering::Relaxed)
    }

    fn add(&self, amount: u64) {
        let more = |left: u64| Some(left.saturating_add(amount).min(self.capacity));
        // The closure never refuses.
        let _ = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }
}

/// One retry taken out of the budget; it goes back unless the attempt was made.
#[derive(Debug)]
#[must_use = "a dropped token goes back to the budget"]
pub(super) struct Token<'a> {
    budget: &'a Budget,
}

impl Token<'_> {
    pub(super) fn spend(self) {
        self.budget.made.fetch_add(1, Ordering::Relaxed);
        // The token owns nothing, and its drop would give it back.
        std::mem::forget(self);
    }
}

impl Drop for Token<'_> {
    fn drop(&mut self) {
        self.budget.add(TOKEN);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn spend(budget: &Budget, retries: u32) {
        for _ in 0..retries {
            budget.take().expect("the budget has it").spend();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn peace_fills_the_budget_up_to_its_reserve_and_an_outage_does_not() {
        let budget = Budget::new(&Retry::attempts(4));
        spend(&budget, 10);
        assert!(budget.take().is_none());
        // Retries wanted in quick succession leave no quiet time, however long they go on.
        for _ in 0..1_000 {
            advance(PEACE / 2).await;
            assert!(budget.take().is_none());
        }
        advance(PEACE * 3).await;
        assert_eq!(budget.retries_left(), 3.0);
        // It is paid for once, however many callers look.
        assert_eq!(budget.retries_left(), 3.0);
        spend(&budget, 3);
        assert!(budget.take().is_none());
        advance(PEACE * 3_600).await;
        assert_eq!(budget.retries_left(), 10.0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_retry_that_is_not_made_goes_back() {
        let budget = Budget::new(&Retry::attempts(2).reserve(1));
        let token = budget.take().expect("the budget has it");
        assert!(budget.take().is_none());
        drop(token);
        assert_eq!(budget.retries_left(), 1.0);
    }

    #[test]
    fn waits_double_up_to_the_longest_and_are_spread_over_all_of_it() {
        let retry = Retry::attempts(9).backoff(Duration::from_millis(100), Duration::from_millis(1_000));
        for (failed, bound) in [(1, 100), (2, 200), (4, 800), (5, 1_000), (40, 1_000), (u32::MAX, 1_000)] {
            let waits: Vec<_> = (0..2_000).filter_map(|_| retry.wait(failed, None)).collect();
            let bound = Duration::from_millis(bound);
            assert!(waits.iter().all(|wait| *wait <= bound), "after {failed}");
            // A draw of 2,000 that misses a tenth has a chance of one in 10⁹¹.
            assert!(waits.iter().any(|wait| *wait < bound / 10) && waits.iter().any(|wait| *wait > bound * 9 / 10));
        }
    }

    #[test]
    fn a_retry_after_is_waited_for_up_to_its_cap_and_the_back_off_goes_on_top() {
        let cap = Duration::from_secs(7);
        let retry = Retry::attempts(3).backoff(Duration::ZERO, Duration::ZERO).retry_after_cap(cap);
        assert_eq!(retry.wait(1, Some(cap)), Some(cap));
        assert_eq!(retry.wait(1, Some(cap + Duration::from_nanos(1))), None);
        assert_eq!(retry.retry_after_cap(Duration::ZERO).wait(1, Some(Duration::ZERO)), None);
    }

    #[test]
    fn none_is_one_attempt_and_zero_counts_as_one() {
        for retry in [Retry::none(), Retry::attempts(0)] {
            assert_eq!(retry.attempts, 1);
            assert!(retry.budget_of_client().is_none());
        }
    }
}
