//! When a call may be tried again, how long it waits first, and the budget that keeps retries a fraction of the load.
//!
//! Invariant: a token is taken before the wait and goes back in `drop` unless its attempt was made, so attempts never
//! exceed calls × (1 + ratio) + reserve.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime},
};

use http::{HeaderMap, header::RETRY_AFTER};

/// One retry, in the budget's unit: thousandths.
const TOKEN: u64 = 1_000;

/// When and how a client tries a call again.
///
/// Only idempotent requests are tried again (GET, HEAD, PUT, DELETE, OPTIONS, TRACE, one with an `Idempotency-Key`
/// header, or one declared by [`RequestBuilder::idempotent`](crate::RequestBuilder::idempotent)), and any request that
/// provably was not sent because no connection came about (and no redirect went before). A body that is a stream cannot be sent twice.
///
/// Tried again are connection errors, timeouts of an attempt, and the statuses 408, 429, 500, 502, 503 and 504. The
/// wait before the n-th retry is random between zero and `base × 2ⁿ⁻¹` ("full jitter"), or that on top of what
/// `Retry-After` asks for.
///
/// | option | default |
/// |---|---|
/// | back-off | 100 ms, at most 10 s |
/// | budget | 0.2 retries a call, and a reserve of 10 |
/// | cap of `Retry-After` | 30 s |
#[derive(Clone, Debug)]
#[must_use = "a policy does nothing until a client is given it"]
pub struct Retry {
    pub(crate) retries: u32,
    pub(crate) ratio: f64,
    pub(crate) reserve: u32,
    pub(crate) base: Duration,
    pub(crate) max: Duration,
    pub(crate) retry_after_cap: Duration,
}

impl Retry {
    /// At most `retries` retries of a call, so `retries + 1` attempts.
    pub fn idempotent(retries: u32) -> Self {
        Self {
            retries,
            ratio: 0.2,
            reserve: 10,
            base: Duration::from_millis(100),
            max: Duration::from_secs(10),
            retry_after_cap: Duration::from_secs(30),
        }
    }

    /// How many retries each call adds to the budget of the client, 0 to 1.
    pub fn budget(mut self, ratio: f64) -> Self {
        self.ratio = ratio;
        self
    }

    /// How many retries the budget holds at most, and at the start.
    pub fn reserve(mut self, retries: u32) -> Self {
        self.reserve = retries;
        self
    }

    /// The longest wait before the first retry, and before any retry.
    pub fn backoff(mut self, base: Duration, max: Duration) -> Self {
        self.base = base;
        self.max = max;
        self
    }

    /// A response that asks for a longer wait is returned at once; with zero, every response that asks for one.
    pub fn retry_after_cap(mut self, cap: Duration) -> Self {
        self.retry_after_cap = cap;
        self
    }

    /// What is wrong with the options, if anything.
    pub(crate) fn problem(&self) -> Option<&'static str> {
        if !(0.0..=1.0).contains(&self.ratio) {
            return Some("has a budget that is not from 0 to 1");
        }
        (self.base > self.max).then_some("has a first back-off above the longest")
    }

    /// The wait before retry number `retry` (1, 2, …); `None` if the server asks for more patience than the cap.
    pub(crate) fn wait(&self, retry: u32, retry_after: Option<Duration>) -> Option<Duration> {
        let doubled = 2_u32.checked_pow(retry.saturating_sub(1)).and_then(|factor| self.base.checked_mul(factor));
        let jittered = doubled.unwrap_or(self.max).min(self.max).mul_f64(fastrand::f64());
        match retry_after {
            None => Some(jittered),
            Some(asked) if asked > self.retry_after_cap || self.retry_after_cap.is_zero() => None,
            // On top of it, not instead: all who were told the same second would come back in the same instant.
            Some(asked) => Some(asked.saturating_add(jittered)),
        }
    }
}

/// How long the server asks to wait: whole seconds, or until a date. A date in the past is no wait, nonsense no request.
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
}

impl Budget {
    pub(crate) fn new(retry: &Retry) -> Self {
        let capacity = u64::from(retry.reserve) * TOKEN;
        let deposit = (retry.ratio * TOKEN as f64).round() as u64;
        Self { left: AtomicU64::new(capacity), made: AtomicU64::new(0), capacity, deposit }
    }

    /// Adds a call's share.
    pub(crate) fn deposit(&self) {
        self.add(self.deposit);
    }

    /// Takes one retry out, if there is one.
    pub(crate) fn take(&self) -> Option<Token<'_>> {
        let less = |left: u64| left.checked_sub(TOKEN);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).ok()?;
        Some(Token { budget: self, spent: false })
    }

    pub(crate) fn retries_left(&self) -> f64 {
        self.left.load(Ordering::Relaxed) as f64 / TOKEN as f64
    }

    pub(crate) fn retries_made(&self) -> u64 {
        self.made.load(Ordering::Relaxed)
    }

    fn add(&self, amount: u64) {
        let more = |left: u64| Some((left + amount).min(self.capacity));
        // The closure never refuses.
        let _ = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }
}

/// One retry taken out of the budget; it goes back unless the attempt was made.
#[derive(Debug)]
#[must_use = "a dropped token goes back to the budget"]
pub(crate) struct Token<'a> {
    budget: &'a Budget,
    spent: bool,
}

impl Token<'_> {
    pub(crate) fn spend(mut self) {
        self.spent = true;
        self.budget.made.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Token<'_> {
    fn drop(&mut self) {
        if !self.spent {
            self.budget.add(TOKEN);
        }
    }
}
