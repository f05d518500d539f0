//! One call: the attempts and redirects that bring a request its response, under the limits of its client.
//!
//! Invariant: the call's future, or the body it returns, owns everything that the call holds, so dropping either gives
//! it back; and a request that may have been sent is sent again only if sending it twice is the same as once.

mod blame;
mod body;
mod deadline;
mod hop;
mod race;
mod redirect;
mod retry;
mod shared;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::HeaderValue;
use reqwest::{Request, Response};
use tokio::time::{Instant, sleep_until};

use crate::{
    breaker::{BreakerPermit, CircuitBreaker, Class, State},
    call::{
        blame::{Blame, Verdict, is_retryable},
        body::{BodyLimits, Hold},
        deadline::{Deadline, Patience, has_timers, watched, within},
        hop::Hop,
        redirect::Refused,
        retry::Token,
    },
    connections::give_up,
    error::{CallReport, Limit, Phase, RequestError, redacted},
    limit::Permits,
    outgoing::Outgoing,
};

pub use retry::Retry;
pub(crate) use {
    body::read_whole,
    redirect::Redirects,
    retry::{Budget, retry_after},
    shared::{DefaultHeaders, Options, Shared, build_reqwest, underneath},
};

/// How much of an unwanted body is read so that its connection can be used again.
const DRAIN_BYTES: usize = 64 * 1024;

/// How long that read may take; a new connection is cheaper than a longer wait.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the wait for a silent connection's end may take.
const GIVE_UP_TIMEOUT: Duration = Duration::from_secs(1);

/// How often a call may be repeated for free because another call, which was making the connection for both, was
/// dropped.
const MAX_FREE: u32 = 16;

/// How many attempts a response took, including the one that brought it. Every response has it as an extension.
///
/// ```no_run
/// # async fn f(client: cancel_safe_http_timeout::TimeoutClient) -> Result<(), cancel_safe_http_timeout::RequestError> {
/// use cancel_safe_http_timeout::Attempts;
///
/// let response = client.get("http://localhost:8080/").send().await?;
/// let attempts = response.extensions().get::<Attempts>().map_or(1, |attempts| attempts.0);
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(clippy::exhaustive_structs, reason = "it is a number with a name, and never more")]
pub struct Attempts(pub u32);

/// The caller's options besides the request itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order {
    pub(crate) idempotent: bool,
    pub(crate) streaming: bool,
    /// Whether 4xx and 5xx are errors.
    pub(crate) for_success: bool,
}

/// A call in progress.
#[derive(Debug)]
struct Call<'a> {
    client: &'a Shared,
    reqwest: &'a reqwest::Client,
    order: Order,
    deadline: Deadline,
    attempts: u32,
    /// How many requests do not count, because they failed through no fault of the origin.
    free: u32,
    hop: &'a mut Hop,
    /// The hop where another attempt begins, if not the present one.
    start: Option<Box<Hop>>,
    /// The watch over the latest request's body, if that is a stream: its upload may continue after an early answer.
    upload: Option<Outgoing>,
    leg: Leg,
    /// The token that pays for the next attempt.
    token: Option<Token<'a>>,
}

/// What one request in flight holds.
#[derive(Debug, Default)]
struct Leg {
    admission: Option<BreakerPermit>,
    permits: Option<Permits>,
}

/// An exchange that brought no response.
#[derive(Debug)]
struct Failed {
    error: RequestError,
    verdict: Verdict,
}

/// The outcome of an exchange.
#[derive(Debug)]
enum Settled<'a> {
    Ended(Result<Response, RequestError>),
    /// The call goes on, once the rest of the answer is out of the way.
    Goes {
        unread: Option<Box<Response>>,
        next: Next<'a>,
    },
}

/// What follows an exchange.
#[derive(Debug)]
enum Next<'a> {
    Redirected(Box<Result<Request, Refused>>),
    /// The same request again at once, for free.
    Same,
    Again {
        at: Instant,
        token: Token<'a>,
    },
}

/// Sends the request, retries it as the policy says, follows redirects, and puts the limits of the call around the body
/// of the response.
///
/// A future keeps the space of values that are moved out of it, and every call in flight has a future. So large values
/// are created before the future and borrowed within it, and values that few calls need are boxed.
pub(crate) fn send(
    client: Arc<Shared>,
    reqwest: reqwest::Client,
    request: Request,
    timeout: Option<Duration>,
    order: Order,
) -> impl Future<Output = Result<Response, RequestError>> + Send + use<> {
    let mut hop = Hop::new(&client, request, order.idempotent, 0);
    async move {
        let mut call = Call {
            client: &client,
            reqwest: &reqwest,
            order,
            deadline: Deadline::new(timeout),
            attempts: 0,
            free: 0,
            hop: &mut hop,
            start: None,
            upload: None,
            leg: Leg::default(),
            token: None,
        };
        let response = call.run().await?;
        let (response, limits, hold) = call.finish(response)?;
        Ok(limits.guard(hop.request, response, hold))
    }
}

impl<'a> Call<'a> {
    /// Sends the request, retries it as the policy says, and follows redirects.
    async fn run(&mut self) -> Result<Response, RequestError> {
        if !has_timers() {
            return Err(RequestError::NoRuntime { report: self.report(Phase::Permit) });
        }
        loop {
            // A request is polled before its deadline is checked, so without this a request that is too late would be
            // sent.
            if self.deadline.is_past(Instant::now()) {
                return Err(RequestError::timeout(Limit::Total, self.report(Phase::Permit)));
            }
            if !self.has_permits()? {
                self.leg.permits = Some(Box::pin(self.acquire()).await?);
            }
            self.leg.admission = self.admit()?;
            self.count_attempt();
            let result = self.send().await;
            let (unread, next) = match self.settle(result) {
                Settled::Ended(result) => return result,
                Settled::Goes { unread, next } => (unread, next),
            };
            Box::pin(self.go_on(unread, next)).await?;
        }
    }

    /// Prepares everything for the next request.
    async fn go_on(&mut self, unread: Option<Box<Response>>, next: Next<'a>) -> Result<(), RequestError> {
        if let Some(response) = unread {
            self.drain(response).await;
        }
        match next {
            Next::Redirected(request) => return self.follow(*request),
            Next::Same => self.free += 1,
            Next::Again { at, token } => {
                #[cfg(feature = "tracing")]
                tracing::debug!(origin = %self.hop.origin.name, attempt = self.attempts, "trying again");
                self.leg.permits = None;
                self.token = Some(token);
                // The wait ends before the deadline, or `again` would not have asked for it.
                sleep_until(at).await;
                if let Some(start) = self.start.take() {
                    *self.hop = *start;
                }
            }
        }
        Ok(())
    }

    /// Takes the permits if they are available without a wait.
    fn has_permits(&mut self) -> Result<bool, RequestError> {
        if self.leg.permits.is_none() {
            // An open circuit must not cost a wait. The breaker is asked again, and the call counted, once the permit
            // is there.
            if let Some(retry_after) = self.hop.breaker.as_ref().and_then(CircuitBreaker::refusal) {
                return Err(self.circuit_open(retry_after));
            }
            self.leg.permits = Permits::try_acquire(&self.client.gate, self.hop.origin.gate.as_ref());
        }
        Ok(self.leg.permits.is_some())
    }

    async fn acquire(&self) -> Result<Permits, RequestError> {
        let end = self.deadline.part(self.client.options.permit_timeout);
        match within(end, Permits::acquire(&self.client.gate, self.hop.origin.gate.as_ref())).await {
            Some(Ok(permits)) => Ok(permits),
            Some(Err(full)) => Err(RequestError::Overloaded { limit: full.limit, report: self.report(Phase::Permit) }),
            None => {
                let limit = if self.deadline.is_past(Instant::now()) { Limit::Total } else { Limit::Permit };
                Err(RequestError::timeout(limit, self.report(Phase::Permit)))
            }
        }
    }

    fn admit(&self) -> Result<Option<BreakerPermit>, RequestError> {
        let Some(breaker) = &self.hop.breaker else { return Ok(None) };
        let mut permit = breaker.try_acquire().map_err(|open| self.circuit_open(open.retry_after))?;
        if self.order.streaming {
            permit.expect_stream();
        }
        Ok(Some(permit))
    }

    /// A request that follows a redirect, or is sent again for free, is part of the attempt that led to it.
    fn count_attempt(&mut self) {
        match self.token.take() {
            Some(token) => token.spend(),
            None if self.attempts == 0 => self.client.budget.iter().for_each(Budget::deposit),
            None => return,
        }
        self.attempts += 1;
    }

    /// Sends this hop's request once, and its copy as well if the client hedges.
    async fn send(&mut self) -> Result<Response, Failed> {
        if self.has_gone_silent() {
            // This takes a moment at most, because it sends nothing to the peer, except that it may have to make a
            // connection.
            let given_up = Box::pin(give_up(self.reqwest, self.hop.request.url()));
            within(self.deadline.part(Some(GIVE_UP_TIMEOUT)), given_up).await;
        }
        if let Some(hedging) = self.hedging() {
            return Box::pin(self.hedge(hedging)).await;
        }
        let (response, outgoing) = self.launch();
        self.exchange(response, &outgoing).await
    }

    /// Whether this request must not use the pool's connection.
    fn has_gone_silent(&self) -> bool {
        let is_probe = || self.hop.breaker.as_ref().is_some_and(|breaker| breaker.state() == State::HalfOpen);
        self.hop.origin.connections.take_silent(is_probe)
    }

    /// Starts this hop's request, which is sent at the first poll.
    fn launch(&mut self) -> (impl Future<Output = reqwest::Result<Response>> + Unpin + use<>, Outgoing) {
        let request = self.hop.request();
        let (response, outgoing) = self.execute(request);
        self.upload = self.hop.body_is_gone.then(|| outgoing.clone());
        (response, outgoing)
    }

    fn execute(
        &self,
        mut request: Request,
    ) -> (impl Future<Output = reqwest::Result<Response>> + Unpin + use<>, Outgoing) {
        let options = &self.client.options;
        if let (Some(name), Some(left)) = (&options.propagate, self.deadline.left()) {
            request.headers_mut().insert(name, HeaderValue::from(left.as_millis().min(u128::from(u64::MAX)) as u64));
        }
        let outgoing = Outgoing::watch(&mut request, options.idle_timeout);
        (self.reqwest.execute(request), outgoing)
    }

    /// Waits for the response to a request, within the limits of an attempt.
    #[expect(clippy::manual_async_fn, reason = "an `async fn` keeps each of its arguments twice")]
    fn exchange<'s, R: Future<Output = reqwest::Result<Response>> + Unpin>(
        &'s self,
        response: R,
        outgoing: &'s Outgoing,
    ) -> impl Future<Output = Result<Response, Failed>> + use<'s, 'a, R> {
        async move {
            let started = Instant::now();
            let attempt = self.client.options.attempt_timeout.and_then(|timeout| started.checked_add(timeout));
            let patience = Patience { total: self.deadline.end(), attempt, idle: self.client.options.idle_timeout };
            let waiting = self.hop.origin.connections.wait(outgoing);
            match watched(response, patience, outgoing).await {
                Ok(result) => {
                    waiting.end();
                    self.received(result, outgoing)
                }
                Err(limit) => {
                    let failed = self.too_late(limit, started, outgoing);
                    waiting.timed_out();
                    Err(failed)
                }
            }
        }
    }

    fn received(&self, result: reqwest::Result<Response>, outgoing: &Outgoing) -> Result<Response, Failed> {
        let connections = &self.hop.origin.connections;
        match result {
            Ok(response) => {
                connections.answered(&response);
                Ok(response)
            }
            Err(error) => {
                let verdict = blame::of_error(&error, outgoing, connections);
                Err(Failed { error: self.told(error), verdict })
            }
        }
    }

    fn too_late(&self, limit: Limit, started: Instant, outgoing: &Outgoing) -> Failed {
        let attempt = self.client.options.attempt_timeout;
        let whole = if limit == Limit::Total { self.deadline.whole() } else { attempt };
        let verdict = blame::of_timeout(limit, whole, started, outgoing);
        let phase = if verdict.unsent { Phase::Connect } else { Phase::Response };
        Failed { error: RequestError::timeout(limit, self.report(phase)), verdict }
    }

    fn told(&self, error: reqwest::Error) -> RequestError {
        let connecting = error.is_connect();
        let report = self.report(if connecting { Phase::Connect } else { Phase::Response });
        match error {
            error if connecting && error.is_timeout() => RequestError::timeout(Limit::Connect, report),
            error => RequestError::reported(error, report),
        }
    }

    /// Reports the result to the breaker, and decides what follows.
    fn settle(&mut self, result: Result<Response, Failed>) -> Settled<'a> {
        let admission = self.leg.admission.take();
        let (result, admission) = self.judge(result, admission);
        // Decided after the breaker got the result, so that a circuit that opens now is not tried again.
        match self.next(&result) {
            Some(next) => {
                // A redirect is a good and complete answer of its origin.
                admission.into_iter().for_each(BreakerPermit::success);
                Settled::Goes { unread: result.ok().map(Box::new), next }
            }
            None => {
                self.leg.admission = admission;
                Settled::Ended(result.map_err(|failed| failed.error))
            }
        }
    }

    /// What follows this result, if it is not the end.
    fn next(&self, result: &Result<Response, Failed>) -> Option<Next<'a>> {
        let Hop { request, body_is_gone, followed, .. } = &*self.hop;
        let redirect = result.as_ref().ok().and_then(|response| {
            let answer = (response.status(), response.headers());
            self.client.options.redirects.next(request, *body_is_gone, answer, *followed)
        });
        match redirect {
            Some(request) => Some(Next::Redirected(Box::new(request))),
            None => self.again(result),
        }
    }

    /// Another attempt after this result, if one is allowed.
    fn again(&self, result: &Result<Response, Failed>) -> Option<Next<'a>> {
        let retry = &self.client.options.retry;
        let (blame, unsent, asked) = match result {
            Ok(response) => {
                let blame = is_retryable(response.status()).then_some(Blame::Origin);
                (blame?, false, retry_after(response.headers(), SystemTime::now()))
            }
            Err(failed) => (failed.verdict.blame, failed.verdict.unsent, None),
        };
        // A request that was never sent is free. A request that was sent on a stale connection is free too, but only
        // once.
        let free = if unsent { MAX_FREE } else { 1 };
        if blame == Blame::Pool && self.free < free && self.hop.may_repeat(unsent) {
            return Some(Next::Same);
        }
        let hop = self.start.as_deref().unwrap_or(self.hop);
        let possible = matches!(blame, Blame::Origin | Blame::Pool | Blame::Machine) && self.attempts < retry.attempts;
        if !possible || !hop.may_repeat(unsent) {
            return None;
        }
        let at = Instant::now().checked_add(retry.wait(self.attempts, asked)?)?;
        if self.deadline.is_past(at) {
            return None;
        }
        Some(Next::Again { at, token: self.client.budget.as_ref()?.take()? })
    }

    /// Continues with the request of a redirect, and keeps the permits if the origin stays the same.
    fn follow(&mut self, request: Result<Request, Refused>) -> Result<(), RequestError> {
        let request = request.map_err(|Refused { to, problem }| RequestError::Redirect {
            to: redacted(&to),
            problem,
            report: self.report(Phase::Response),
        })?;
        let hop = Hop::new(self.client, request, self.order.idempotent, self.hop.followed + 1);
        let left = std::mem::replace(self.hop, hop);
        if !Arc::ptr_eq(&left.origin, &self.hop.origin) {
            self.leg.permits = None;
        }
        // After an answer to a request that must not be sent twice, another attempt begins here, not earlier.
        self.start = match self.start.take() {
            _ if !left.repeatable || left.body_is_gone => None,
            None => Some(Box::new(left)),
            start => start,
        };
        Ok(())
    }

    /// Reads the rest of an unwanted body, within limits, so that the next request finds its connection free.
    async fn drain(&self, mut response: Box<Response>) {
        let read = async {
            let mut left = DRAIN_BYTES;
            while let Ok(Some(chunk)) = response.chunk().await {
                match left.checked_sub(chunk.len()) {
                    Some(less) => left = less,
                    None => break,
                }
            }
        };
        // If the drain is cut, that is fine: the connection is just not used again.
        within(self.deadline.part(Some(DRAIN_TIMEOUT)), read).await;
    }

    /// The response, and the data for its body; or an error if the caller accepts only a success.
    fn finish(mut self, response: Response) -> Result<(Response, BodyLimits, Hold), RequestError> {
        let Leg { admission, permits } = std::mem::take(&mut self.leg);
        let hold = Hold::new(admission, permits);
        let status = response.status();
        if self.order.for_success && (status.is_client_error() || status.is_server_error()) {
            let retry_after = retry_after(response.headers(), SystemTime::now());
            // The body is dropped before the permits.
            drop(response);
            return Err(RequestError::Http { status, retry_after, report: self.report(Phase::Response) });
        }
        let options = &self.client.options;
        let limits = BodyLimits {
            deadline: self.deadline,
            idle: options.idle_timeout,
            max_bytes: options.max_body,
            attempts: self.attempts,
            upload: self.upload,
        };
        Ok((response, limits, hold))
    }

    fn report(&self, phase: Phase) -> Box<CallReport> {
        CallReport::of(&self.hop.request, phase, self.attempts, self.deadline.elapsed())
    }

    fn circuit_open(&self, retry_after: Duration) -> RequestError {
        let origin = self.client.origins.breaker_name(&self.hop.request);
        RequestError::CircuitOpen { origin, retry_after, report: self.report(Phase::Permit) }
    }

    /// Reports to the breaker what the head of the response says. If the head is good, the body's guard reports the
    /// rest.
    fn judge(
        &self,
        result: Result<Response, Failed>,
        admission: Option<BreakerPermit>,
    ) -> (Result<Response, Failed>, Option<BreakerPermit>) {
        let Some(mut admission) = admission else { return (result, None) };
        match &result {
            Ok(response) => {
                admission.head();
                match self.client.origins.class_of(response) {
                    Class::Success => return (result, Some(admission)),
                    Class::Failure => admission.failure(),
                    Class::Ignore => admission.ignore(),
                }
            }
            Err(failed) => match failed.verdict.blame {
                Blame::Origin => admission.failure(),
                Blame::Pool | Blame::Machine | Blame::Producer | Blame::Request => admission.ignore(),
                // A cut call, as if the caller had dropped it.
                Blame::Queue => drop(admission),
            },
        }
        (result, None)
    }
}
