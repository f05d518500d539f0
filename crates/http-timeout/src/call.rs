//! One call: the attempts and redirects that bring a request its response, under the limits of its client.
//!
//! Invariant: everything a call holds is owned by its future or by the body it returns, so dropping either gives it
//! back; and a request that may have been sent is sent again only if sending it twice is the same as once.

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
        body::{BodyLimits, Hold, guard},
        deadline::{Deadline, Patience, has_timers, watched, within},
        hop::Hop,
        redirect::Refused,
        retry::Token,
    },
    connections::give_up,
    error::{CallReport, Limit, Phase, RequestError, Subject, redacted},
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

/// How long that may take; a new connection is cheaper than a longer wait.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the wait for a silent connection's end may take.
const GIVE_UP_TIMEOUT: Duration = Duration::from_secs(1);

/// How often a call may go on for free because another call, which was making the connection for both, was dropped.
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

/// What the caller asked for beside the request itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order {
    pub(crate) timeout: Option<Duration>,
    pub(crate) idempotent: bool,
    pub(crate) streaming: bool,
}

/// A call in progress.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    client: &'a Shared,
    reqwest: reqwest::Client,
    idempotent: bool,
    streaming: bool,
    deadline: Deadline,
    attempts: u32,
    /// Requests that do not count, because they came to nothing through no fault of the origin.
    free: u32,
    hop: Hop,
    /// Where another attempt begins, if not with the hop.
    start: Option<Box<Hop>>,
    /// The way out of the latest request, if its body is a stream: that may go on behind an early answer.
    upload: Option<Outgoing>,
}

/// What one request on its way holds.
#[derive(Debug)]
struct Leg {
    admission: Option<BreakerPermit>,
    permits: Permits,
}

/// An exchange that brought no response.
#[derive(Debug)]
struct Failed {
    error: RequestError,
    verdict: Verdict,
}

/// What follows an exchange.
#[derive(Debug)]
enum Next<'a> {
    End,
    Redirected(Box<Result<Request, Refused>>),
    /// The same request at once, for free.
    Same,
    Again {
        at: Instant,
        token: Token<'a>,
    },
}

impl<'a> Call<'a> {
    pub(crate) fn new(
        client: &'a Shared,
        reqwest: reqwest::Client,
        request: Request,
        subject: Subject,
        order: Order,
    ) -> Self {
        Self {
            client,
            reqwest,
            idempotent: order.idempotent,
            streaming: order.streaming,
            deadline: Deadline::new(order.timeout),
            attempts: 0,
            free: 0,
            hop: Hop::new(client, request, subject, order.idempotent, 0),
            start: None,
            upload: None,
        }
    }

    /// Sends the request, and again as the policy says, wherever redirects lead. [`finish`](Self::finish) the response.
    pub(crate) async fn run(&mut self) -> Result<(Response, Hold), RequestError> {
        if !has_timers() {
            return Err(RequestError::NoRuntime { report: self.report(Phase::Permit) });
        }
        let mut kept = None;
        let mut token = None;
        let mut is_attempt = true;
        loop {
            // A request is polled before its deadline is looked at, so one that came too late would be sent.
            if self.deadline.is_past(Instant::now()) {
                return Err(RequestError::timeout(Limit::Total, self.report(Phase::Permit)));
            }
            let permits = match kept.take() {
                Some(permits) => permits,
                None => self.acquire().await?,
            };
            let admission = self.admit()?;
            if is_attempt {
                self.count_attempt(token.take());
            }
            let (result, Leg { admission, permits }) = self.send(Leg { admission, permits }).await;
            let (result, admission) = self.judge(result, admission);
            // Asked when the breaker has heard of it: a circuit that opens now is not tried again.
            let next = self.next(&result);
            if let Next::End = next {
                let response = result.map_err(|failed| failed.error)?;
                return Ok((response, Hold::new(admission, permits)));
            }
            // A redirect is a good answer of its origin, and all there is to it.
            if let Some(admission) = admission {
                admission.success();
            }
            if let Ok(response) = result {
                self.drain(response).await;
            }
            match next {
                Next::End => unreachable!("it ended above"),
                Next::Redirected(request) => {
                    let stays = self.follow(*request)?;
                    kept = stays.then_some(permits);
                    is_attempt = false;
                }
                Next::Same => {
                    self.free += 1;
                    kept = Some(permits);
                    is_attempt = false;
                }
                Next::Again { at, token: paid } => {
                    #[cfg(feature = "tracing")]
                    tracing::debug!(origin = %self.hop.origin.name, attempt = self.attempts, "trying again");
                    drop(permits);
                    // The wait ends before the deadline, or `next` would not have asked for it.
                    sleep_until(at).await;
                    if let Some(start) = self.start.take() {
                        self.hop = *start;
                    }
                    token = Some(paid);
                    is_attempt = true;
                }
            }
        }
    }

    async fn acquire(&self) -> Result<Permits, RequestError> {
        // An open circuit must not cost a wait; it is asked again, and counted, when the permit is there.
        if let Some(retry_after) = self.hop.breaker.as_ref().and_then(CircuitBreaker::refusal) {
            return Err(self.circuit_open(retry_after));
        }
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
        if self.streaming {
            permit.expect_stream();
        }
        Ok(Some(permit))
    }

    fn count_attempt(&mut self, token: Option<Token<'_>>) {
        self.attempts += 1;
        match token {
            Some(token) => token.spend(),
            None => self.client.budget.iter().for_each(Budget::deposit),
        }
    }

    /// Sends the request of this hop once.
    async fn exchange(&self, mut request: Request, outgoing: &Outgoing) -> Result<Response, Failed> {
        let options = &self.client.options;
        if let (Some(name), Some(left)) = (&options.propagate, self.deadline.left()) {
            request.headers_mut().insert(name, HeaderValue::from(left.as_millis().min(u128::from(u64::MAX)) as u64));
        }
        let origin = &self.hop.origin;
        let is_probe = || self.hop.breaker.as_ref().is_some_and(|breaker| breaker.state() == State::HalfOpen);
        if origin.connections.take_silent(is_probe) {
            // It takes a moment at most, since it says nothing to the peer; if a connection must be made, so be it.
            let given_up = Box::pin(give_up(&self.reqwest, request.url()));
            within(self.deadline.part(Some(GIVE_UP_TIMEOUT)), given_up).await;
        }
        let started = Instant::now();
        let attempt = options.attempt_timeout.and_then(|timeout| started.checked_add(timeout));
        let patience = Patience { total: self.deadline.end(), attempt, idle: options.idle_timeout };
        let waiting = origin.connections.wait(outgoing);
        match watched(self.reqwest.execute(request), patience, outgoing).await {
            Ok(Ok(response)) => {
                waiting.end();
                origin.connections.answered(&response);
                Ok(response)
            }
            Ok(Err(error)) => {
                waiting.end();
                let verdict = blame::of_error(&error, outgoing, &origin.connections);
                Err(Failed { error: self.told(error), verdict })
            }
            Err(limit) => {
                let whole = if limit == Limit::Total { self.deadline.whole() } else { options.attempt_timeout };
                let verdict = blame::of_timeout(limit, whole, started, outgoing);
                waiting.timed_out();
                let phase = if verdict.unsent { Phase::Connect } else { Phase::Response };
                Err(Failed { error: RequestError::timeout(limit, self.report(phase)), verdict })
            }
        }
    }

    fn told(&self, error: reqwest::Error) -> RequestError {
        let connecting = error.is_connect();
        let report = self.report(if connecting { Phase::Connect } else { Phase::Response });
        match error {
            error if connecting && error.is_timeout() => RequestError::timeout(Limit::Connect, report),
            error => RequestError::reported(error, report),
        }
    }

    /// What follows this result.
    fn next(&self, result: &Result<Response, Failed>) -> Next<'a> {
        let Hop { request, body_is_gone, followed, .. } = &self.hop;
        let redirect = result.as_ref().ok().and_then(|response| {
            let answer = (response.status(), response.headers());
            self.client.options.redirects.next(request, *body_is_gone, answer, *followed)
        });
        match redirect {
            Some(request) => Next::Redirected(Box::new(request)),
            None => self.again(result).unwrap_or(Next::End),
        }
    }

    /// Another attempt after this result, if there is one.
    fn again(&self, result: &Result<Response, Failed>) -> Option<Next<'a>> {
        let retry = &self.client.options.retry;
        let (blame, unsent, asked) = match result {
            Ok(response) => {
                let blame = is_retryable(response.status()).then_some(Blame::Origin);
                (blame?, false, retry_after(response.headers(), SystemTime::now()))
            }
            Err(failed) => (failed.verdict.blame, failed.verdict.unsent, None),
        };
        // A call that was never sent costs nobody anything. One that was sent on a stale connection is, but only once.
        let free = if unsent { MAX_FREE } else { 1 };
        if blame == Blame::Pool && self.free < free && self.hop.may_repeat(unsent) {
            return Some(Next::Same);
        }
        let hop = self.start.as_deref().unwrap_or(&self.hop);
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

    /// Goes on with the request that a redirect asked for, and says whether it stays with the same origin.
    fn follow(&mut self, request: Result<Request, Refused>) -> Result<bool, RequestError> {
        let request = request.map_err(|Refused { to, problem }| RequestError::Redirect {
            to: redacted(&to),
            problem,
            report: self.report(Phase::Response),
        })?;
        let subject = Subject { method: request.method().clone(), url: request.url().clone() };
        let hop = Hop::new(self.client, request, subject, self.idempotent, self.hop.followed + 1);
        let left = std::mem::replace(&mut self.hop, hop);
        let stays = Arc::ptr_eq(&left.origin, &self.hop.origin);
        // An answer to what may not be sent twice is where another attempt goes on, not before it.
        self.start = match self.start.take() {
            _ if !left.repeatable || left.body_is_gone => None,
            None => Some(Box::new(left)),
            start => start,
        };
        Ok(stays)
    }

    /// Reads the rest of an unwanted body, within limits, so that the next request finds its connection free.
    async fn drain(&self, mut response: Response) {
        let read = async {
            let mut left = DRAIN_BYTES;
            while let Ok(Some(chunk)) = response.chunk().await {
                match left.checked_sub(chunk.len()) {
                    Some(less) => left = less,
                    None => break,
                }
            }
        };
        // A drain that was cut is as good as one that was finished: the connection is not used again.
        within(self.deadline.part(Some(DRAIN_TIMEOUT)), read).await;
    }

    /// Puts the limits of the call around the body of its response.
    pub(crate) fn finish(self, response: Response, hold: Hold) -> Response {
        let options = &self.client.options;
        let limits = BodyLimits {
            deadline: self.deadline,
            idle: options.idle_timeout,
            max_bytes: options.max_body,
            attempts: self.attempts,
            subject: self.hop.subject,
            upload: self.upload,
        };
        let mut response = guard(response, hold, limits);
        response.extensions_mut().insert(Attempts(self.attempts));
        response
    }

    fn report(&self, phase: Phase) -> Box<CallReport> {
        self.hop.subject.report(phase, self.attempts, self.deadline.elapsed())
    }

    fn circuit_open(&self, retry_after: Duration) -> RequestError {
        let origin = self.client.origins.breaker_name(&self.hop.request);
        RequestError::CircuitOpen { origin, retry_after, report: self.report(Phase::Permit) }
    }

    /// Tells the breaker what the head of the response says. A good head leaves the rest to the body's guard.
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
