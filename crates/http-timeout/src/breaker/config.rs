//! The breaker's options: when it trips, how long it stays open, how it recovers.
//!
//! Invariant: a `BreakerConfig` is always valid; the builder is the only way to change one, and it checks.

use std::{fmt, sync::Arc, time::Duration};

use super::{
    circuit::{Rules, SlowRule},
    probes::ProbeRules,
    window::{Nanos, Span},
    word::{COUNTER_MAX, Transition},
};
use crate::error::BuildError;

/// How long an attempt may take when neither the configuration nor a client's timeouts say otherwise.
const DEFAULT_PATIENCE: Duration = Duration::from_secs(30);

/// The most probes. Each running probe takes a few bytes.
const MAX_PROBES: u32 = 65_535;

/// The largest count window: each result in it takes a few bytes.
const MAX_COUNT_WINDOW: u32 = 1_000_000;

/// What a breaker considers: the latest stretch of time, or the latest calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BreakerWindow {
    /// The results of this much time, in ten buckets. The window forgets one bucket at a time, the oldest.
    Time(Duration),
    /// This many of the latest results.
    Count(u32),
}

type TransitionHook = Arc<dyn Fn(Transition) + Send + Sync>;

/// The options of a [`CircuitBreaker`](crate::CircuitBreaker), checked when they are built.
///
/// | option | default |
/// |---|---|
/// | window | 10 s, in ten buckets of 1 s |
/// | failure rate | 50 % of at least 20 calls |
/// | consecutive failures | 5 |
/// | slow calls | not counted |
/// | silence | 1 s, from at least 5 cut calls |
/// | open | 5 s, doubled each time it reopens, up to 60 s, ± 20 % |
/// | probes | 1, which must succeed |
/// | lease of a probe | a client's attempt timeout; 30 s without a client |
/// | a cut call is late after | the slow-call threshold; without one, the same as the lease |
///
/// # Cut calls
///
/// The breaker judges a dropped call by how long it had lasted:
///
/// | it had lasted | what it says |
/// |---|---|
/// | less than 20 ms, or less than answers usually take | nothing |
/// | longer | it was met with silence |
/// | the slow-call threshold; without one, the attempt timeout ([`late_after`](BreakerConfigBuilder::late_after)) | it has failed |
///
/// **Silence** is the time that cut calls had waited since the callee last finished an answer: the sum of their waits,
/// or the time since the first of them began if that is less. When silence reaches its limit, one second, and at least
/// five calls were cut in it, the breaker opens, whatever the window holds. So callers that give up after 100 ms detect
/// a hung callee within a second. But a user who leaves a page after 5 ms opens nothing, and neither does a search box
/// that cancels each request before its usual answer. The usual time of an answer is a moving average over successes
/// that callers had to wait for.
///
/// While half-open, half of that silence reopens the breaker (or one lease of silence, if that is shorter), with any
/// number of calls in it. A probe that is still running at the end of its lease has failed, and reopens it too.
#[derive(Clone)]
pub struct BreakerConfig {
    window: BreakerWindow,
    min_calls: u32,
    failure_rate: Option<f64>,
    consecutive_failures: Option<u32>,
    slow_call: Option<(Duration, f64)>,
    silence: Option<Duration>,
    late_after: Option<Duration>,
    probes: u32,
    probes_needed: Option<u32>,
    lease: Option<Duration>,
    /// How long a client lets an attempt take.
    patience: Option<Duration>,
    open_for: Duration,
    open_max: Duration,
    open_factor: f64,
    jitter: f64,
    on_transition: Option<TransitionHook>,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        Self {
            window: BreakerWindow::Time(Duration::from_secs(10)),
            min_calls: 20,
            failure_rate: Some(0.5),
            consecutive_failures: Some(5),
            slow_call: None,
            silence: Some(Duration::from_secs(1)),
            late_after: None,
            probes: 1,
            probes_needed: None,
            lease: None,
            patience: None,
            open_for: Duration::from_secs(5),
            open_max: Duration::from_secs(60),
            open_factor: 2.0,
            jitter: 0.2,
            on_transition: None,
        }
    }
}

impl BreakerConfig {
    /// Starts from the defaults.
    ///
    /// # Examples
    ///
    /// ```
    /// # use std::time::Duration;
    /// use cancel_safe_http_timeout::{BreakerConfig, BreakerWindow, CircuitBreaker};
    ///
    /// let config = BreakerConfig::builder()
    ///     .window(BreakerWindow::Count(100))
    ///     .failure_rate(0.5)
    ///     .consecutive_failures(None)
    ///     .slow_call(Duration::from_secs(2), 0.8)
    ///     .build()?;
    /// let breaker = CircuitBreaker::new(config);
    /// # Ok::<(), cancel_safe_http_timeout::BuildError>(())
    /// ```
    pub fn builder() -> BreakerConfigBuilder {
        BreakerConfigBuilder { config: Self::default() }
    }

    pub(crate) fn rules(&self) -> Rules {
        let patience = self.patience.unwrap_or(DEFAULT_PATIENCE);
        let lease = nanos(self.lease.unwrap_or(patience));
        let late_after = self.late_after.or(self.slow_call.map(|(threshold, _)| threshold));
        Rules {
            span: match self.window {
                BreakerWindow::Time(window) => Span::Time { bucket: nanos(window) / 10 },
                BreakerWindow::Count(calls) => Span::Count(calls as usize),
            },
            min_calls: u64::from(self.min_calls),
            failure_rate: self.failure_rate,
            consecutive_failures: self.consecutive_failures,
            slow: self.slow_call.map(|(threshold, rate)| SlowRule { threshold: nanos(threshold), rate }),
            late: nanos(late_after.unwrap_or(patience)),
            silence: self.silence.map(nanos),
            probes: ProbeRules {
                most: self.probes,
                needed: self.probes_needed.unwrap_or(self.probes),
                lease,
                // Even without a silence limit, probes must not be cut and sent again for ever.
                silence: self.silence.map_or(lease, |limit| lease.min(nanos(limit) / 2)),
            },
            open_first: nanos(self.open_for),
            open_max: nanos(self.open_max),
            open_factor: self.open_factor,
            jitter: self.jitter,
        }
    }

    /// Sets how long a client lets an attempt take. That is the lease of a probe, and the time after which a cut call
    /// is late, unless the configuration sets them.
    pub(crate) fn with_patience(mut self, patience: Option<Duration>) -> Self {
        self.patience = patience;
        self
    }

    pub(crate) fn measures_slow_calls(&self) -> bool {
        self.slow_call.is_some()
    }

    pub(crate) fn report(&self, transition: Transition) {
        #[cfg(feature = "tracing")]
        tracing::info!(from = %transition.from, to = %transition.to, "circuit breaker changed state");
        if let Some(hook) = &self.on_transition {
            hook(transition);
        }
    }
}

impl fmt::Debug for BreakerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BreakerConfig")
            .field("window", &self.window)
            .field("min_calls", &self.min_calls)
            .field("failure_rate", &self.failure_rate)
            .field("consecutive_failures", &self.consecutive_failures)
            .field("slow_call", &self.slow_call)
            .field("silence", &self.silence)
            .field("late_after", &self.late_after)
            .field("probes", &self.probes)
            .field("probes_needed", &self.probes_needed)
            .field("lease", &self.lease)
            .field("open_for", &self.open_for)
            .field("open_max", &self.open_max)
            .finish_non_exhaustive()
    }
}

/// Sets the options of a [`BreakerConfig`].
#[derive(Clone, Debug)]
#[must_use = "the options take effect when `build` is called"]
pub struct BreakerConfigBuilder {
    config: BreakerConfig,
}

impl BreakerConfigBuilder {
    /// Sets what the rates are computed over; 10 s by default.
    pub fn window(mut self, window: BreakerWindow) -> Self {
        self.config.window = window;
        self
    }

    /// Ignores the rates until the window holds this many calls; 20 by default.
    pub fn min_calls(mut self, calls: u32) -> Self {
        self.config.min_calls = calls;
        self
    }

    /// Trips when at least this fraction of the calls in the window failed, over 0 and up to 1; 0.5 by default.
    pub fn failure_rate(mut self, rate: impl Into<Option<f64>>) -> Self {
        self.config.failure_rate = rate.into();
        self
    }

    /// Trips after this many failures in a row; 5 by default.
    pub fn consecutive_failures(mut self, failures: impl Into<Option<u32>>) -> Self {
        self.config.consecutive_failures = failures.into();
        self
    }

    /// Trips when at least the fraction `rate` of the calls in the window took `threshold` or longer; off by default.
    ///
    /// With it, a probe or a cancelled call that lasted at least the threshold is a failure.
    pub fn slow_call(mut self, threshold: Duration, rate: f64) -> Self {
        self.config.slow_call = Some((threshold, rate));
        self
    }

    /// Trips when cut calls have met with this much silence; 1 s by default. With `None` it never does.
    ///
    /// [`BreakerConfig`] explains silence.
    pub fn silence(mut self, limit: impl Into<Option<Duration>>) -> Self {
        self.config.silence = limit.into();
        self
    }

    /// Counts a cut call as failed if it had lasted this long.
    ///
    /// By default this is the slow-call threshold; without one it is the client's attempt timeout, or 30 s without a
    /// client.
    pub fn late_after(mut self, time: Duration) -> Self {
        self.config.late_after = Some(time);
        self
    }

    /// Admits this many calls while half-open; 1 by default. All must succeed to close the breaker, and one failure
    /// reopens it, unless [`probes_needed`](Self::probes_needed) asks for less.
    pub fn probes(mut self, probes: u32) -> Self {
        self.config.probes = probes;
        self
    }

    /// Sets how many of the probes must succeed to close; all by default. The breaker reopens when too few are left.
    pub fn probes_needed(mut self, successes: u32) -> Self {
        self.config.probes_needed = Some(successes);
        self
    }

    /// Counts a probe as failed if it is still running after this time. The breaker then reopens, and ignores the
    /// probe's result. Default: the client's attempt timeout, or 30 s without a client.
    ///
    /// A probe whose answer has begun is not charged. After this time, counted from the head, it only makes room for
    /// another probe.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.config.lease = Some(lease);
        self
    }

    /// Sets how long the breaker stays open the first time, and the longest it ever stays open, however often its
    /// probes fail; 5 s and 60 s by default.
    pub fn open_for(mut self, first: Duration, longest: Duration) -> Self {
        (self.config.open_for, self.config.open_max) = (first, longest);
        self
    }

    /// Sets the factor by which the wait grows when a probe fails, at least 1; 2 by default.
    pub fn backoff(mut self, factor: f64) -> Self {
        self.config.open_factor = factor;
        self
    }

    /// Sets the fraction by which the wait is randomly shortened or extended, 0 to 1; 0.2 by default.
    pub fn jitter(mut self, part: f64) -> Self {
        self.config.jitter = part;
        self
    }

    /// Calls `hook` after every change of state, outside every lock, from the call that caused it.
    ///
    /// The hook must be quick and must not panic: it may run inside a `drop`.
    pub fn on_transition(mut self, hook: impl Fn(Transition) + Send + Sync + 'static) -> Self {
        self.config.on_transition = Some(Arc::new(hook));
        self
    }

    /// Checks the options.
    ///
    /// # Errors
    ///
    /// [`BuildError`] names the first option that is out of range.
    pub fn build(self) -> Result<BreakerConfig, BuildError> {
        let config = &self.config;
        let wrong = |option, problem| Err(BuildError::Option { option, problem });
        let is_rate = |rate: f64| rate > 0.0 && rate <= 1.0;
        match config.window {
            BreakerWindow::Time(window) if window < Duration::from_millis(1) => {
                return wrong("window", "is shorter than a millisecond");
            }
            BreakerWindow::Count(calls) if calls == 0 || calls > MAX_COUNT_WINDOW => {
                return wrong("window", "is not a number of calls from 1 to 1,000,000");
            }
            BreakerWindow::Count(calls) if config.min_calls > calls => {
                return wrong("min_calls", "is more than the window holds, so the rates would never be looked at");
            }
            _ => {}
        }
        if config.min_calls == 0 {
            return wrong("min_calls", "is zero");
        }
        if config.failure_rate.is_some_and(|rate| !is_rate(rate)) {
            return wrong("failure_rate", "is not over 0 and up to 1");
        }
        if config.slow_call.is_some_and(|(threshold, rate)| !is_rate(rate) || threshold.is_zero()) {
            return wrong("slow_call", "has a threshold of zero or a rate that is not over 0 and up to 1");
        }
        if config.consecutive_failures.is_some_and(|failures| failures == 0 || failures > COUNTER_MAX) {
            return wrong("consecutive_failures", "is not a number from 1 to 65,535");
        }
        if config.failure_rate.is_none() && config.consecutive_failures.is_none() && config.slow_call.is_none() {
            return wrong("failure_rate", "is off like every other rule, so the breaker could never trip");
        }
        if config.probes == 0 || config.probes > MAX_PROBES {
            return wrong("probes", "is not a number from 1 to 65,535");
        }
        if config.probes_needed.is_some_and(|needed| needed == 0 || needed > config.probes) {
            return wrong("probes_needed", "is zero or more than the probes that are let in");
        }
        if config.silence.is_some_and(|limit| limit < Duration::from_millis(100)) {
            return wrong("silence", "is shorter than 100 ms, the waits of the five shortest calls that tell anything");
        }
        if config.late_after.is_some_and(|time| time.is_zero()) {
            return wrong("late_after", "is zero");
        }
        if config.lease.is_some_and(|lease| lease.is_zero()) {
            return wrong("lease", "is zero");
        }
        if config.open_for.is_zero() || config.open_max < config.open_for {
            return wrong("open_for", "has a first wait of zero, or above the longest");
        }
        if !(config.open_factor >= 1.0 && config.open_factor.is_finite()) {
            return wrong("backoff", "is not a finite factor of at least 1");
        }
        if !(0.0..=1.0).contains(&config.jitter) {
            return wrong("jitter", "is not from 0 to 1");
        }
        Ok(self.config)
    }
}

/// Five hundred years fit; a longer duration counts as that.
#[inline]
pub(crate) fn nanos(duration: Duration) -> Nanos {
    duration.as_secs().saturating_mul(1_000_000_000).saturating_add(u64::from(duration.subsec_nanos()))
}
