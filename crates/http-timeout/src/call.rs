//! One call: the loop of attempts that sends a request, under the limits of its client.
//!
//! Invariant: everything a call holds is owned by its future or by the body it returns, so dropping either gives it
//! back; and a request that may have been sent is sent again only if sending it twice is the same as once.

mod body;
mod deadline;
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
        body::{BodyLimits, Hold, guard},
        deadline::{Deadline, Upload, watched, within},
        redirect::noticed,
        retry::{Token, is_failure, is_retryable},
    },
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
}

/// An attempt that brought no response.
struct Failed {
    error: RequestError,
    /// No connection came about, so the server cannot have seen the request.
    unsent: bool,
    /// The origin is to blame.
    charged: bool,
    /// Where redirects had led the request, if anywhere.
    hop: Option<Url>,
}

/// Another attempt: when, and the token that pays for it.
struct Again<'a> {
    at: Instant,
    token: Token<'a>,
}

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
                None => self.client.budget.iter().for_each(Budget::deposit),
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
            kept = self.keeps_permits.then_some(permits);
            // The wait ends before the deadline, or `again` would not have asked for it.
            sleep_until(again.at).await;
            token = Some(again.token);
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
        let upload = options.idle_timeout.and_then(|_| Upload::watch(&mut request));
        let end = self.deadline.part(options.attempt_timeout);
        let mut hop = None;
        let response = noticed(self.reqwest.execute(request), &mut hop);
        match watched(response, end, options.idle_timeout, upload.as_ref()).await {
            Some(Ok(response)) => Ok(response),
            Some(Err(error)) => Err(self.failed(error, hop)),
            None => {
                let error = self.deadline.timed_out(Phase::Response, self.attempts);
                Err(Failed { error, unsent: false, charged: true, hop })
            }
        }
    }

    /// A copy if another attempt may need one, else the request itself.
    fn next_request(&mut self) -> Request {
        let more = self.client.options.retry.as_ref().is_some_and(|retry| self.attempts <= retry.retries);
        let copy = self.request.as_ref().filter(|_| more).and_then(Request::try_clone);
        copy.or_else(|| self.request.take()).expect("the request is here: `again` asks for no attempt once it is gone")
    }

    fn failed(&self, error: reqwest::Error, hop: Option<Url>) -> Failed {
        let refused = error.is_connect();
        // A connection that failed proves nothing if it was the next stop of a request that had been answered.
        let unsent = refused && hop.is_none() && self.client.notices_redirects;
        // Wrong requests and endless redirects are no sign of a sick origin.
        let charged = !error.is_builder() && !error.is_redirect();
        let error = if error.is_timeout() {
            let phase = if refused { Phase::Connect } else { Phase::Response };
            self.deadline.timed_out(phase, self.attempts)
        } else {
            RequestError::from(error)
        };
        Failed { error, unsent, charged, hop }
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
            Err(failed) if !failed.charged => admission.ignore(),
            Ok(_) | Err(_) => admission.failure(),
        }
        (result, None)
    }

    /// Whether there is another attempt after this result.
    fn again(&self, result: &Result<Response, Failed>) -> Option<Again<'a>> {
        let retry = self.client.options.retry.as_ref()?;
        let (passing, unsent, asked) = match result {
            Ok(response) => {
                (is_retryable(response.status()), false, retry_after(response.headers(), SystemTime::now()))
            }
            Err(failed) => (failed.charged, failed.unsent, None),
        };
        let possible =
            passing && (self.repeatable || unsent) && self.request.is_some() && self.attempts <= retry.retries;
        if !possible || self.origin.breaker.as_ref().is_some_and(|breaker| breaker.refusal().is_some()) {
            return None;
        }
        let at = Instant::now().checked_add(retry.wait(self.attempts, asked)?)?;
        if self.deadline.is_past(at) {
            return None;
        }
        Some(Again { at, token: self.client.budget.as_ref()?.take()? })
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
