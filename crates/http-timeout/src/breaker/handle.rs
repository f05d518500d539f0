//! The circuit breaker around any future: the pure circuit, a clock, and permits that cannot be forgotten.
//!
//! Invariant: an admission ends exactly once, synchronously, whether its permit is used, dropped or unwound.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    circuit::{Admission, Circuit, Ending, Refused, Times},
    config::{BreakerConfig, nanos},
    silence::SHORTEST,
    window::Nanos,
    word::{State, Transition},
};

/// What the result of a call says about the callee.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Class {
    /// The callee is healthy.
    Success,
    /// The callee is unhealthy.
    Failure,
    /// The result says nothing about the callee.
    Ignore,
}

/// Why a call through a breaker returned no value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BreakerError<E> {
    /// The breaker refused the call; nothing was polled.
    #[error(transparent)]
    Open(#[from] CircuitOpen),
    /// The call was made and failed.
    #[error("the call failed")]
    Inner(#[source] E),
}

impl<E> BreakerError<E> {
    /// Returns whether the breaker refused the call.
    ///
    /// ```
    /// # tokio_test(async {
    /// use cancel_safe_http_timeout::{BreakerConfig, CircuitBreaker};
    ///
    /// let breaker = CircuitBreaker::new(BreakerConfig::default());
    /// breaker.isolate();
    /// let error = breaker.call(async { Ok::<_, ()>(1) }).await.unwrap_err();
    /// assert!(error.is_open());
    /// # });
    /// # fn tokio_test(f: impl Future) { tokio::runtime::Runtime::new().unwrap().block_on(f); }
    /// ```
    pub fn is_open(&self) -> bool {
        matches!(self, Self::Open(_))
    }

    /// Returns the error of the call itself, if it was made.
    pub fn into_inner(self) -> Option<E> {
        match self {
            Self::Open(_) => None,
            Self::Inner(error) => Some(error),
        }
    }
}

/// The breaker refused a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the circuit is open; ask again after {retry_after:?}")]
#[non_exhaustive]
pub struct CircuitOpen {
    /// The time after which the breaker may admit a probe. While probes are running it is at most the rest of their
    /// lease; they may end much sooner.
    pub retry_after: Duration,
}

/// A breaker's figures at one instant.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct BreakerMetrics {
    /// The state.
    pub state: State,
    /// Calls in the window. While the circuit is not closed, the window is the one that tripped it.
    pub calls: u64,
    /// Failures in the window.
    pub failures: u64,
    /// Slow calls in the window; zero without a slow-call rule.
    pub slow_calls: u64,
    /// Failures in a row, while closed.
    pub consecutive_failures: u32,
    /// Probes that hold a slot, while half-open.
    pub probes: u32,
    /// How often the circuit opened, since the breaker was made.
    pub trips: u64,
    /// Calls that were refused, since the breaker was made.
    pub rejected: u64,
    /// Calls that were cut (dropped before they had a result), since the breaker was made.
    pub cancelled: u64,
}

impl BreakerMetrics {
    /// Returns the fraction of the calls in the window that failed, 0 to 1; `None` without a call.
    pub fn failure_rate(&self) -> Option<f64> {
        (self.calls > 0).then(|| self.failures as f64 / self.calls as f64)
    }
}

/// A circuit breaker that cannot stick. It refuses calls to a callee that keeps failing, and probes it until it
/// recovers.
///
/// Clones share one state. It needs no client and no runtime, guards any future, and never spawns: an admission that is
/// dropped, unwound or hung ends by itself. A result counts only in the generation that admitted it, so calls made
/// before a trip cannot close or reopen the breaker afterwards.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use cancel_safe_http_timeout::{BreakerConfig, CircuitBreaker, State};
///
/// let breaker = CircuitBreaker::new(BreakerConfig::default());
/// for _ in 0..5 {
///     let refused = breaker.call(async { Err::<(), _>("connection refused") }).await;
///     assert!(refused.is_err());
/// }
/// assert_eq!(breaker.state(), State::Open);
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct CircuitBreaker {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    circuit: Circuit,
    /// tokio's clock, so that a test with paused time drives the breaker too.
    epoch: Instant,
    config: BreakerConfig,
}

impl Shared {
    #[inline]
    fn now(&self) -> Nanos {
        nanos(self.epoch.elapsed())
    }

    /// Asks a closed circuit, which is the usual case. The result stays in registers: callers match on it themselves,
    /// because a `Result` of an admission and a refusal goes through memory, which takes a tenth longer.
    #[inline]
    fn admit_closed(&self) -> Option<Admission> {
        self.circuit.admit_closed(|| self.now())
    }

    /// Asks a circuit that is not closed.
    #[cold]
    fn admit_probe(&self) -> Result<Admission, CircuitOpen> {
        let now = self.now();
        loop {
            match self.circuit.admit(now) {
                Ok((admission, transition)) => {
                    // A hook that panics must not lose the slot.
                    let mut lent = Lent { shared: self, admission, is_out: true };
                    self.report(transition);
                    lent.is_out = false;
                    return Ok(admission);
                }
                Err(Refused::Wait(retry_after)) => return Err(CircuitOpen { retry_after }),
                // At most once: a circuit that has just reopened has no probes.
                Err(Refused::Reopened(transition)) => self.report(Some(transition)),
            }
        }
    }

    #[inline]
    fn finish(&self, admission: &Admission, ending: Ending, times: Times) {
        let transition = self.circuit.finish(admission, ending, times);
        self.report(transition);
    }

    #[inline]
    fn report(&self, transition: Option<Transition>) {
        if let Some(transition) = transition {
            self.config.report(transition);
        }
    }

    /// Makes sure that a hung probe shows in what follows.
    fn notice(&self) {
        self.report(self.circuit.notice(|| self.now()));
    }
}

impl CircuitBreaker {
    /// Makes a closed breaker.
    pub fn new(config: BreakerConfig) -> Self {
        let circuit = Circuit::new(config.rules(), fastrand::Rng::new());
        Self { shared: Arc::new(Shared { circuit, epoch: Instant::now(), config }) }
    }

    /// Polls `call` if the breaker admits it, and counts `Ok` as a success and `Err` as a failure.
    ///
    /// The breaker is asked when the returned future is first polled.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, `call` is dropped, and its admission has ended when
    /// the drop returns: a probe slot is free again. How long the cut call had lasted decides what it says about the
    /// callee, as [`BreakerConfig`] explains. A panic in `call` is a failure.
    ///
    /// # Errors
    ///
    /// [`BreakerError::Open`] if the call was refused, [`BreakerError::Inner`] with the error of `call`.
    pub async fn call<T, E>(&self, call: impl Future<Output = Result<T, E>>) -> Result<T, BreakerError<E>> {
        let classify = |result: &Result<T, E>| if result.is_ok() { Class::Success } else { Class::Failure };
        self.call_with(classify, call).await
    }

    /// Works like [`call`](Self::call); `classify` decides what a result says about the callee.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, the same holds as for [`call`](Self::call).
    ///
    /// # Errors
    ///
    /// [`BreakerError::Open`] if the call was refused, [`BreakerError::Inner`] with the error of `call`.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() {
    /// use cancel_safe_http_timeout::{BreakerConfig, CircuitBreaker, Class};
    ///
    /// let breaker = CircuitBreaker::new(BreakerConfig::default());
    /// // A missing row is an answer, not a sick database.
    /// let classify = |result: &Result<u8, &str>| match result {
    ///     Ok(_) | Err("no such row") => Class::Success,
    ///     Err(_) => Class::Failure,
    /// };
    /// assert!(breaker.call_with(classify, async { Err("no such row") }).await.is_err());
    /// assert_eq!(breaker.metrics().failures, 0);
    /// # }
    /// ```
    pub async fn call_with<T, E>(
        &self,
        classify: impl FnOnce(&Result<T, E>) -> Class,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, BreakerError<E>> {
        // Borrows the breaker. A permit would count a reference, and two threads would contend for the counter.
        let admission = match self.shared.admit_closed() {
            Some(admission) => admission,
            None => self.shared.admit_probe()?,
        };
        let mut lent = Lent { shared: &self.shared, admission, is_out: true };
        let (mut call, mut has_waited) = (pin!(call), false);
        let result = poll_fn(|cx| {
            let polled = call.as_mut().poll(cx);
            has_waited |= polled.is_pending();
            polled
        })
        .await;
        let ending = classify(&result).into();
        // A call that was ready at once ended when it began, and reading the clock is the most expensive part of such a
        // call.
        if has_waited || self.shared.config.measures_slow_calls() {
            lent.end(ending);
        } else {
            lent.end_at(ending, Times::at_once(&lent.admission));
        }
        result.map_err(BreakerError::Inner)
    }

    /// Asks for permission to make one call, for code that is not a future or that decides later how the call went.
    ///
    /// # Errors
    ///
    /// [`CircuitOpen`] if the breaker refuses the call; it says when to ask again.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_http_timeout::{BreakerConfig, CircuitBreaker};
    ///
    /// let breaker = CircuitBreaker::new(BreakerConfig::default());
    /// let permit = breaker.try_acquire()?;
    /// match std::fs::read("/proc/self/status") {
    ///     Ok(_) => permit.success(),
    ///     Err(_) => permit.failure(),
    /// }
    /// # Ok::<(), cancel_safe_http_timeout::CircuitOpen>(())
    /// ```
    pub fn try_acquire(&self) -> Result<BreakerPermit, CircuitOpen> {
        let admission = match self.shared.admit_closed() {
            Some(admission) => admission,
            None => self.shared.admit_probe()?,
        };
        Ok(BreakerPermit {
            shared: Arc::clone(&self.shared),
            admission,
            is_out: true,
            head: None,
            is_for_stream: false,
        })
    }

    /// How long a call made now would have to wait; `None` if it would be admitted. Takes no slot.
    pub(crate) fn refusal(&self) -> Option<Duration> {
        self.shared.notice();
        self.shared.circuit.refusal(|| self.shared.now())
    }

    /// Returns the state. An open breaker whose wait is over stays open until a call probes it.
    pub fn state(&self) -> State {
        self.shared.notice();
        self.shared.circuit.state()
    }

    /// Returns the figures at this instant.
    pub fn metrics(&self) -> BreakerMetrics {
        self.shared.notice();
        let now = self.shared.circuit.snapshot(self.shared.now());
        BreakerMetrics {
            state: now.state,
            calls: now.counts.calls,
            failures: now.counts.failures,
            slow_calls: now.counts.slow,
            consecutive_failures: now.consecutive,
            probes: now.probes,
            trips: now.trips,
            rejected: now.rejected,
            cancelled: now.cancelled,
        }
    }

    /// Refuses every call until [`reset`](Self::reset), for instance while the callee is being replaced.
    pub fn isolate(&self) {
        self.shared.report(self.shared.circuit.isolate());
    }

    /// Closes the breaker with an empty window, whatever its state. Running calls no longer count.
    pub fn reset(&self) {
        self.shared.report(self.shared.circuit.reset());
    }

    /// Whether a clone or a permit exists elsewhere.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.shared) > 1
    }

    /// Whether an operator has isolated it. Unlike `state`, it reports nothing, so a map may ask it under its lock.
    pub(crate) fn is_isolated(&self) -> bool {
        self.shared.circuit.state() == State::Isolated
    }

    /// Whether forgetting this breaker would lose something: it refuses calls, or did so recently.
    pub(crate) fn is_worth_keeping(&self) -> bool {
        self.shared.circuit.is_worth_keeping(|| self.shared.now())
    }
}

impl From<Class> for Ending {
    fn from(class: Class) -> Self {
        match class {
            Class::Success => Self::Success,
            Class::Failure => Self::Failure,
            Class::Ignore => Self::Ignored,
        }
    }
}

/// The ending of an admission whose call did not report one.
fn unsaid() -> Ending {
    if std::thread::panicking() { Ending::Failure } else { Ending::Cut }
}

/// An admission that borrows its breaker for the duration of one `call`.
struct Lent<'a> {
    shared: &'a Shared,
    admission: Admission,
    is_out: bool,
}

impl Lent<'_> {
    fn end(&mut self, ending: Ending) {
        self.end_at(ending, Times::until(self.shared.now(), &self.admission));
    }

    #[inline]
    fn end_at(&mut self, ending: Ending, times: Times) {
        self.is_out = false;
        self.shared.finish(&self.admission, ending, times);
    }
}

impl Drop for Lent<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.is_out {
            self.end(unsaid());
        }
    }
}

/// Permission to make one call. Dropping it reports the call as cut by its caller, or as failed if the thread is
/// panicking.
#[derive(Debug)]
#[must_use = "a dropped permit reports the call as cut"]
pub struct BreakerPermit {
    shared: Arc<Shared>,
    admission: Admission,
    is_out: bool,
    head: Option<Nanos>,
    is_for_stream: bool,
}

impl BreakerPermit {
    /// Reports that the callee is healthy.
    pub fn success(mut self) {
        if self.head.is_none() && self.shared.circuit.is_quick(&self.admission) {
            self.end_at(Ending::Success, Times::at_once(&self.admission));
        } else {
            self.end(Ending::Success);
        }
    }

    /// Reports that the callee is unhealthy.
    pub fn failure(mut self) {
        self.end(Ending::Failure);
    }

    /// Reports that the call said nothing about the callee. A probe slot is free again.
    pub fn ignore(mut self) {
        self.end(Ending::Ignored);
    }

    /// Reports what a classifier said.
    #[cfg(feature = "tower")]
    pub(crate) fn end_as(self, class: Class) {
        match class {
            Class::Success => self.success(),
            Class::Failure => self.failure(),
            Class::Ignore => self.ignore(),
        }
    }

    /// Notes that the caller has asked for a stream, so that giving up says nothing, however long it had waited.
    pub(crate) fn expect_stream(&mut self) {
        self.is_for_stream = true;
    }

    pub(crate) fn is_for_stream(&self) -> bool {
        self.is_for_stream
    }

    /// Notes that the head of the answer has come. The slow-call rule and the lease of a probe end here. The time that
    /// follows is also the consumer's, so the endings below get the part of it that was spent waiting for the callee.
    pub(crate) fn head(&mut self) {
        let now = self.shared.now();
        self.head = Some(now);
        self.shared.circuit.head(&self.admission, now);
    }

    /// The time until the head of the answer.
    pub(crate) fn until_head(&self) -> Duration {
        Duration::from_nanos(self.head.map_or(0, |head| self.admission.until(head)))
    }

    /// Notes that the body has ended well. `waited` is how long its consumer waited for the peer in all.
    pub(crate) fn finished(mut self, waited: Duration) {
        self.end_after(Ending::Success, nanos(waited));
    }

    /// Notes that the head was good, but the body was dropped before its end.
    ///
    /// `quiet` is how long its consumer had been waiting for the next piece when it gave up; zero if it was not
    /// waiting, because it still had the last piece or never asked for one. A body that was quiet for less than 20 ms
    /// was flowing: the callee is healthy. A body that was quiet for longer was stalling, and the call was cut like any
    /// other.
    pub(crate) fn abandoned(mut self, quiet: Duration) {
        let quiet = nanos(quiet);
        self.end_after(if quiet < SHORTEST { Ending::Unread } else { Ending::Cut }, quiet);
    }

    /// Notes that the head was good and that a stream follows (`text/event-stream`, or marked by the caller), which may
    /// be quiet for any length of time. The call ends here: neutral while the circuit is closed, and as a good probe,
    /// because no better result would ever come.
    pub(crate) fn stream(mut self) {
        self.end(Ending::Stream);
    }

    fn end(&mut self, ending: Ending) {
        self.end_after(ending, 0);
    }

    /// Ends the call, after its consumer has waited for the body for `body`.
    fn end_after(&mut self, ending: Ending, body: Nanos) {
        let now = self.shared.now();
        let times = match self.head {
            Some(head) => Times::with_head(now, &self.admission, head, body),
            None => Times::until(now, &self.admission),
        };
        self.end_at(ending, times);
    }

    fn end_at(&mut self, ending: Ending, times: Times) {
        self.is_out = false;
        self.shared.finish(&self.admission, ending, times);
    }
}

impl Drop for BreakerPermit {
    fn drop(&mut self) {
        if self.is_out {
            let ending = unsaid();
            let is_neutral = self.is_for_stream && ending != Ending::Failure;
            self.end(if is_neutral { Ending::Ignored } else { ending });
        }
    }
}
