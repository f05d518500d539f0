//! A request to one origin.
//!
//! Invariant: what remains after it was sent is enough to send it again or to follow a redirect, as far as its body
//! allows.

use std::sync::Arc;

use reqwest::Request;

use crate::{breaker::CircuitBreaker, call::shared::Shared, origins::Origin};

/// A request as it goes to one origin: the caller's own, or one that a redirect asked for.
#[derive(Debug)]
pub(super) struct Hop {
    /// The request, without its body if that could be sent only once, and was.
    pub(super) request: Request,
    pub(super) body_is_gone: bool,
    /// Whether sending it twice is the same as once.
    pub(super) repeatable: bool,
    pub(super) origin: Arc<Origin>,
    pub(super) breaker: Option<CircuitBreaker>,
    /// The redirects that led here.
    pub(super) followed: u32,
}

impl Hop {
    pub(super) fn new(client: &Shared, request: Request, idempotent: bool, followed: u32) -> Self {
        let repeatable =
            idempotent || request.method().is_idempotent() || request.headers().contains_key("idempotency-key");
        let origin = client.origins.of(request.url());
        let breaker = client.origins.breaker(&request, &origin);
        Self { request, body_is_gone: false, repeatable, origin, breaker, followed }
    }

    /// Returns the request to send. What remains is enough to send it again, or to follow a redirect if the body is
    /// gone.
    pub(super) fn request(&mut self) -> Request {
        if let Some(copy) = self.request.try_clone() {
            return copy;
        }
        let body = self.request.body_mut().take();
        self.body_is_gone = true;
        let mut request = self.request.try_clone().expect("a request without a body can be copied");
        *request.body_mut() = body;
        request
    }

    /// Whether it can be sent again, and its origin would take it.
    pub(super) fn may_repeat(&self, unsent: bool) -> bool {
        let refuses = self.breaker.as_ref().is_some_and(|breaker| breaker.refusal().is_some());
        (self.repeatable || unsent) && !self.body_is_gone && !refuses
    }
}
