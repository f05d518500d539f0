//! The breaker's options: when it trips, how long it stays open, how it recovers.
//!
//! Invariant: a `BreakerConfig` is always valid; the builder is the only way to change one, and it checks.

use std::{fmt, sync::Arc, time::Duration};

use crate::{
    circuit::{COUNTER_MAX, Rules, SlowRule, Transition},
    error::BuildError,
    window::{Nanos, Span},
};

/// The lease of a probe when neither the configuration nor a client's timeouts say otherwise.
const DEFAULT_LEASE: Duration = Duration::from_secs(30);

/// The largest count window: each result in it takes a few bytes.
const MAX_COUNT_WINDOW: u32 = 1_000_000;

/// What a breaker looks at: the latest stretch of time, or the latest calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BreakerWindow {
    /// Results of this much time, in ten buckets, of which the oldest is forgotten at a time.
    Time(Duration),
    /// This many results.
    Count(u32),
}

type TransitionHook = Arc<dyn Fn(Transition) + Send + Sync>;

/// The options of a [`CircuitBreaker`](crate::CircuitBreaker), checked when they were built.
///
/// | option | default |
/// |---|---|
/// | window | 10 s, in ten buckets of 1 s |
/// | failure rate | 50 % of at least 20 calls |
/// | consecutive failures | 5 |
/// | slow calls | not looked at |
/// | open | 5 s, doubled at each re-opening, up to 60 s, ± 20 % |
/// | probes | 1 |
/// | lease of a probe | a client's attempt timeout; 30 s without a client |
#[derive(Clone)]
pub struct BreakerConfig {
    window: BreakerWindow,
    min_calls: u32,
    failure_rate: Option<f64>,
    consecutive_failures: Option<u32>,
    slow_call: Option<(Duration, f64)>,
    probes: u32,
    lease: Option<Duration>,
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
            probes: 1,
            lease: None,
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
        Rules {
            span: match self.window {
                BreakerWindow::Time(window) => Span::Time { bucket: nanos(window) / 10 },
                BreakerWindow::Count(calls) => Span::Count(calls as usize),
            },
            min_calls: u64::from(self.min_calls),
            failure_rate: self.failure_rate,
            consecutive_failures: self.consecutive_failures,
            slow: self.slow_call.map(|(threshold, rate)| SlowRule { threshold: nanos(threshold), rate }),
            probes: self.probes,
            lease: nanos(self.lease.unwrap_or(DEFAULT_LEASE)),
            open_first: nanos(self.open_for),
            open_max: nanos(self.open_max),
            open_factor: self.open_factor,
            jitter: self.jitter,
        }
    }

    /// Gives a probe this lease unless the configuration names one.
    pub(crate) fn with_default_lease(mut self, lease: Option<Duration>) -> Self {
        self.lease = self.lease.or(lease);
        self
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
            .field("probes", &self.probes)
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
    /// What the rates are taken over; 10 s by default.
    pub fn window(mut self, window: BreakerWindow) -> Self {
        self.config.window = window;
        self
    }

    /// Rates are not looked at until the window holds this many calls; 20 by default.
    pub fn min_calls(mut self, calls: u32) -> Self {
        self.config.min_calls = calls;
        self
    }

    /// Trips when at least this part of the calls in the window failed, over 0 and up to 1; 0.5 by default.
    pub fn failure_rate(mut self, rate: impl Into<Option<f64>>) -> Self {
        self.config.failure_rate = rate.into();
        self
    }

    /// Trips after this many failures in a row; 5 by default.
    pub fn consecutive_failures(mut self, failures: impl Into<Option<u32>>) -> Self {
        self.config.consecutive_failures = failures.into();
        self
    }

    /// Trips when at least the part `rate` of the calls in the window took `threshold` or longer; off by default.
    ///
    /// With it, a probe or a cancelled call that lasted the threshold is a failure.
    pub fn slow_call(mut self, threshold: Duration, rate: f64) -> Self {
        self.config.slow_call = Some((threshold, rate));
        self
    }

    /// This many calls are let in while half-open; all must succeed to close, one failure opens again. 1 by default.
    pub fn probes(mut self, probes: u32) -> Self {
        self.config.probes = probes;
        self
    }

    /// A probe that is still running after this time no longer blocks others, and its result is ignored.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.config.lease = Some(lease);
        self
    }

    /// How long the breaker stays open the first time; 5 s by default.
    pub fn open_for(mut self, wait: Duration) -> Self {
        self.config.open_for = wait;
        self
    }

    /// The longest it stays open, however often its probes failed; 60 s by default.
    pub fn open_max(mut self, wait: Duration) -> Self {
        self.config.open_max = wait;
        self
    }

    /// By how much the wait grows when a probe fails, at least 1; 2 by default.
    pub fn backoff(mut self, factor: f64) -> Self {
        self.config.open_factor = factor;
        self
    }

    /// By which part of itself the wait is spread, on both sides, 0 to 1; 0.2 by default.
    pub fn jitter(mut self, part: f64) -> Self {
        self.config.jitter = part;
        self
    }

    /// Called after every change of state, outside every lock, by the call that caused it.
    ///
    /// It must be quick and must not panic: it may run inside a `drop`.
    pub fn on_transition(mut self, hook: impl Fn(Transition) + Send + Sync + 'static) -> Self {
        self.config.on_transition = Some(Arc::new(hook));
        self
    }

    /// Checks the options.
    ///
    /// # Errors
    ///
    /// [`BuildError`] names the first option that is out of its range.
    pub fn build(mut self) -> Result<BreakerConfig, BuildError> {
        let config = &mut self.config;
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
        if config.probes == 0 || config.probes > COUNTER_MAX {
            return wrong("probes", "is not a number from 1 to 65,535");
        }
        if config.lease.is_some_and(|lease| lease.is_zero()) {
            return wrong("lease", "is zero");
        }
        if config.open_for.is_zero() {
            return wrong("open_for", "is zero");
        }
        if !(config.open_factor >= 1.0 && config.open_factor.is_finite()) {
            return wrong("backoff", "is not a finite factor of at least 1");
        }
        if !(0.0..=1.0).contains(&config.jitter) {
            return wrong("jitter", "is not from 0 to 1");
        }
        // Who asks for a first wait above the default cap has not asked for a shorter one.
        config.open_max = config.open_max.max(config.open_for);
        Ok(self.config)
    }
}

/// Five hundred years fit; what is longer is as long.
#[inline]
pub(crate) fn nanos(duration: Duration) -> Nanos {
    duration.as_secs().saturating_mul(1_000_000_000).saturating_add(u64::from(duration.subsec_nanos()))
}
