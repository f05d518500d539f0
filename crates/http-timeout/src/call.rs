//! One call: the loop of attempts that sends a request, under the limits of its client.
//!
//! Invariant: everything a call holds is owned by its future or by the body it returns, so dropping either gives it
//! back; and a request that may have been sent is sent again only if sending it twice is the same as once.

mod blame;
mod body;
mod deadline;
mod outgoing;
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
use url::Url;

use crate::{
    breaker::{BreakerPermit, CircuitBreaker},
    call::{
        blame::{Blame, Verdict, is_failure, is_retryable},
        body::{BodyLimits, Hold, guard},
        deadline::{Deadline, Limit, Patience, watched, within},
        outgoing::Outgoing,
        redirect::noticed,
        retry::Token,
    },
    connections::give_up,
    error::{Phase, RequestError},
    limit::Permits,
    origins::{Origin, origin_name},
};

pub use retry::Retry;
pub(crate) use {
    retry::{Budget, retry_after},
    shared::{Options, Shared, build_reqwest},
};

/// How much of an unwanted body is read so that its connection can be used again.
const DRAIN_BYTES: usize = 64 * 1024;

/// How long that may take; a new connection is cheaper than a longer wait.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the wait for a silent connection's end may take.
const GIVE_UP_TIMEOUT: Duration = Duration::from_secs(1);

/// How many attempts a response took, the one that brought it included: an extension of every response.
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
    /// Keep the permits during a back-off, so that calls that began later cannot come between.
    pub(crate) keeps_permits: bool,
}

/// A call in progress.
pub(crate) struct Call<'a> {
    client: &'a Shared,
    reqwest: reqwest::Client,
    origin: Arc<Origin>,
    /// None once the only copy of a request that cannot be copied was sent.
    request: Option<Request>,
    repeatable: bool,
    keeps_permits: bool,
    deadline: Deadline,
    attempts: u32,
    /// Attempts that do not count, because they came to nothing through no fault of the origin.
    free: u32,
}

/// An attempt that brought no response.
struct Failed {
    error: RequestError,
    verdict: Verdict,
    /// Where redirects had led the request, if anywhere.
    hop: Option<Url>,
}

/// Another attempt: when, and the token that pays for it; none if it is free.
struct Again<'a> {
    at: Instant,
    token: Option<Token<'a>>,
}

/// How often a call may go on for free because another call, which was making the connection for both, was dropped.
const MAX_FREE: u32 = 16;

impl<'a> Call<'a> {
    pub(crate) fn new(client: &'a Shared, reqwest: reqwest::Client, request: Request, order: Order) -> Self {
        let repeatable =
            order.idempotent || request.method().is_idempotent() || request.headers().contains_key("idempotency-key");
        Self {
            client,
            reqwest,
            origin: client.origins.of(request.url()),
            request: Some(request),
            repeatable,
            keeps_permits: order.keeps_permits,
            deadline: Deadline::new(order.timeout),
            attempts: 0,
            free: 0,
        }
    }

    /// Sends the request, and again as the policy says.
    pub(crate) async fn run(mut self) -> Result<Response, RequestError> {
        let mut kept = None;
        let mut token: Option<Token<'_>> = None;
        loop {
            let permits = match kept.take() {
                Some(permits) => permits,
                None => self.acquire().await?,
            };
            let admission = self.origin.admit().map_err(|open| self.circuit_open(open.retry_after))?;
            match token.take() {
                Some(token) => token.spend(),
                None if self.attempts == 0 && self.free == 0 => self.client.budget.iter().for_each(Budget::deposit),
                None => {}
            }
            let result = self.attempt().await;
            let (result, admission) = self.judge(result, admission);
            let Some(again) = self.again(&result) else {
                return result
                    .map(|response| self.finish(response, Hold::new(admission, permits)))
                    .map_err(|f| f.error);
            };
            #[cfg(feature = "tracing")]
            tracing::debug!(origin = %self.origin.name, attempt = self.attempts, "trying again");
            if let Ok(response) = result {
                self.drain(response).await;
            }
            let is_free = again.token.is_none();
            if is_free {
                self.free += 1;
                self.attempts -= 1;
            }
            kept = (self.keeps_permits || is_free).then_some(permits);
            // The wait ends before the deadline, or `again` would not have asked for it.
            if !is_free {
                sleep_until(again.at).await;
            }
            token = again.token;
        }
    }

    async fn acquire(&self) -> Result<Permits, RequestError> {
        // An open circuit must not cost a wait; it is asked again, and counted, when the permit is there.
        if let Some(retry_after) = self.origin.breaker.as_ref().and_then(CircuitBreaker::refusal) {
            return Err(self.circuit_open(retry_after));
        }
        let phase = if self.attempts == 0 { Phase::Permit } else { Phase::Backoff };
        within(self.deadline.end(), self.client.limits.acquire(&self.origin))
            .await
            .unwrap_or_else(|| Err(self.deadline.timed_out(phase, self.attempts)))
    }

    async fn attempt(&mut self) -> Result<Response, Failed> {
        self.attempts += 1;
        let options = &self.client.options;
        let mut request = self.next_request();
        if let (Some(name), Some(left)) = (&options.propagate, self.deadline.left()) {
            request.headers_mut().insert(name, HeaderValue::from(left.as_millis().min(u128::from(u64::MAX)) as u64));
        }
        let origin = &self.origin;
        if origin.connections.take_silent() {
            // It takes a moment at most, since it says nothing to the peer; if a connection must be made, so be it.
            within(self.deadline.part(Some(GIVE_UP_TIMEOUT)), give_up(&self.reqwest, request.url())).await;
        }
        let outgoing = Outgoing::watch(&mut request, options.idle_timeout);
        let started = Instant::now();
        let attempt = options.attempt_timeout.and_then(|timeout| started.checked_add(timeout));
        let patience = Patience { total: self.deadline.end(), attempt, idle: options.idle_timeout };
        let mut hop = None;
        let response = noticed(self.reqwest.execute(request), &mut hop);
        match watched(response, patience, &outgoing).await {
            Ok(Ok(response)) => {
                origin.connections.answered(&response);
                Ok(response)
            }
            Ok(Err(error)) => {
                let mut verdict = blame::of_error(&error, &outgoing, &origin.connections);
                // A connection that failed proves nothing if it was the next stop of a request that had been answered.
                verdict.unsent &= hop.is_none();
                Err(Failed { error: self.told(error), verdict, hop })
            }
            Err(limit) => {
                let whole = if limit == Limit::Total { self.deadline.whole() } else { options.attempt_timeout };
                let verdict = blame::of_timeout(limit, whole, started, &outgoing);
                if !verdict.unsent {
                    origin.connections.timed_out();
                }
                let phase = if verdict.unsent { Phase::Connect } else { Phase::Response };
                Err(Failed { error: self.deadline.timed_out(phase, self.attempts), verdict, hop })
            }
        }
    }

    /// A copy as long as another attempt may need one, else the request itself.
    fn next_request(&mut self) -> Request {
        let copy = self.request.as_ref().and_then(Request::try_clone);
        copy.or_else(|| self.request.take()).expect("the request is here: `again` asks for no attempt once it is gone")
    }

    fn told(&self, error: reqwest::Error) -> RequestError {
        if error.is_timeout() {
            let phase = if error.is_connect() { Phase::Connect } else { Phase::Response };
            self.deadline.timed_out(phase, self.attempts)
        } else {
            RequestError::from(error)
        }
    }

    /// Tells the breaker what the head of the response says. A good head leaves the rest to the body's guard.
    fn judge(
        &self,
        result: Result<Response, Failed>,
        admission: Option<BreakerPermit>,
    ) -> (Result<Response, Failed>, Option<BreakerPermit>) {
        let Some(mut admission) = admission else { return (result, None) };
        admission.head();
        let stop = match &result {
            Ok(response) => Some(response.url()),
            Err(failed) => failed.hop.as_ref(),
        };
        if let Some(url) = stop
            && origin_name(url) != self.origin.name
        {
            // The first origin did its part: the call goes on at the account of the other, if its circuit lets it.
            admission.success();
            match self.client.origins.of(url).admit() {
                Ok(Some(mut other)) => {
                    other.head();
                    admission = other;
                }
                Ok(None) | Err(_) => return (result, None),
            }
        }
        match &result {
            Ok(response) if !is_failure(response.status()) => return (result, Some(admission)),
            Ok(_) => admission.failure(),
            Err(failed) => match failed.verdict.blame {
                Blame::Origin => admission.failure(),
                Blame::Pool | Blame::Producer | Blame::Request => admission.ignore(),
                // A cut call, as if the caller had dropped it.
                Blame::Queue => drop(admission),
            },
        }
        (result, None)
    }

    /// Whether there is another attempt after this result.
    fn again(&self, result: &Result<Response, Failed>) -> Option<Again<'a>> {
        let retry = self.client.options.retry.as_ref();
        let (blame, unsent, asked) = match result {
            Ok(response) => {
                let blame = is_retryable(response.status()).then_some(Blame::Origin);
                (blame?, false, retry_after(response.headers(), SystemTime::now()))
            }
            Err(failed) => (failed.verdict.blame, failed.verdict.unsent, None),
        };
        if self.request.is_none() || !(self.repeatable || unsent) || self.is_refusing() {
            return None;
        }
        // A call that was never sent costs nobody anything. One that was sent on a stale connection is, but only once.
        let free = if unsent { MAX_FREE } else { 1 };
        if blame == Blame::Pool && self.free < free {
            return Some(Again { at: Instant::now(), token: None });
        }
        let retry = retry.filter(|retry| self.attempts <= retry.retries)?;
        if !matches!(blame, Blame::Origin | Blame::Pool) {
            return None;
        }
        let at = Instant::now().checked_add(retry.wait(self.attempts, asked)?)?;
        if self.deadline.is_past(at) {
            return None;
        }
        Some(Again { at, token: Some(self.client.budget.as_ref()?.take()?) })
    }

    fn is_refusing(&self) -> bool {
        self.origin.breaker.as_ref().is_some_and(|breaker| breaker.refusal().is_some())
    }

    /// Reads the rest of an unwanted body, within limits, so that the next attempt finds its connection free.
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

    fn finish(&self, response: Response, hold: Hold) -> Response {
        let options = &self.client.options;
        let limits = BodyLimits {
            deadline: self.deadline,
            idle: options.idle_timeout,
            max_bytes: options.max_body,
            attempts: self.attempts,
        };
        let mut response = guard(response, hold, limits);
        response.extensions_mut().insert(Attempts(self.attempts));
        response
    }

    fn circuit_open(&self, retry_after: Duration) -> RequestError {
        RequestError::CircuitOpen { origin: self.origin.name.clone(), retry_after }
    }
}
