//! The breaker as a tower layer.
//!
//! Invariant: the breaker is asked in `call`, not in `poll_ready`, because a service that was ready may never be called.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::handle::{BreakerError, BreakerPermit, CircuitBreaker, CircuitOpen, Class};

/// Decides what the result of a service says about it. Any `Fn(&Result<T, E>) -> Class` will do.
pub trait Classify<T, E> {
    /// Looks at one result.
    fn classify(&self, result: &Result<T, E>) -> Class;
}

impl<T, E, F: Fn(&Result<T, E>) -> Class> Classify<T, E> for F {
    fn classify(&self, result: &Result<T, E>) -> Class {
        self(result)
    }
}

/// Counts `Ok` as a success and `Err` as a failure.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct ByResult;

impl<T, E> Classify<T, E> for ByResult {
    fn classify(&self, result: &Result<T, E>) -> Class {
        if result.is_ok() { Class::Success } else { Class::Failure }
    }
}

/// Puts a [`CircuitBreaker`] in front of a service. All services of one layer share it.
///
/// # Examples
///
/// ```
/// # #[derive(Clone)] struct Backend;
/// # impl tower_service::Service<()> for Backend {
/// #     type Response = u16; type Error = std::io::Error;
/// #     type Future = std::future::Ready<Result<u16, std::io::Error>>;
/// #     fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
/// #         std::task::Poll::Ready(Ok(()))
/// #     }
/// #     fn call(&mut self, _: ()) -> Self::Future { std::future::ready(Ok(503)) }
/// # }
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use cancel_safe_http_timeout::{
///     BreakerConfig, BreakerLayer, CircuitBreaker, Class, State,
/// };
/// use tower_layer::Layer as _;
/// use tower_service::Service as _;
///
/// let breaker = CircuitBreaker::new(BreakerConfig::default());
/// let layer = BreakerLayer::new(breaker.clone());
/// let layer = layer.classify(|result: &std::io::Result<u16>| match result {
///     Ok(status) if *status < 500 => Class::Success,
///     _ => Class::Failure,
/// });
/// let mut service = layer.layer(Backend);
/// for _ in 0..5 {
///     assert_eq!(service.call(()).await.unwrap(), 503);
/// }
/// assert_eq!(breaker.state(), State::Open);
/// assert!(service.call(()).await.unwrap_err().is_open());
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct BreakerLayer<C = ByResult> {
    breaker: CircuitBreaker,
    classify: C,
}

impl BreakerLayer {
    /// Counts `Ok` as a success and `Err` as a failure.
    pub fn new(breaker: CircuitBreaker) -> Self {
        Self { breaker, classify: ByResult }
    }

    /// Lets `classify` decide what a result says about the service.
    pub fn classify<C>(self, classify: C) -> BreakerLayer<C> {
        BreakerLayer { breaker: self.breaker, classify }
    }
}

impl<S, C: Clone> Layer<S> for BreakerLayer<C> {
    type Service = BreakerService<S, C>;

    fn layer(&self, inner: S) -> Self::Service {
        BreakerService { inner, breaker: self.breaker.clone(), classify: self.classify.clone() }
    }
}

/// A service behind a [`CircuitBreaker`], made by [`BreakerLayer`].
#[derive(Clone, Debug)]
pub struct BreakerService<S, C = ByResult> {
    inner: S,
    breaker: CircuitBreaker,
    classify: C,
}

impl<S, C, R> Service<R> for BreakerService<S, C>
where
    S: Service<R>,
    C: Classify<S::Response, S::Error> + Clone,
{
    type Response = S::Response;
    type Error = BreakerError<S::Error>;
    type Future = BreakerFuture<S::Future, C>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(BreakerError::Inner)
    }

    fn call(&mut self, request: R) -> Self::Future {
        // The permit comes first: a service that panics in `call` has failed.
        let admission = self.breaker.try_acquire().map(Some);
        let call = admission.is_ok().then(|| self.inner.call(request));
        BreakerFuture { call, admission, classify: self.classify.clone() }
    }
}

pin_project! {
    /// The call of a [`BreakerService`].
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, the service's future is dropped, and its admission has
    /// ended when the drop returns, as with [`CircuitBreaker::call`].
    #[derive(Debug)]
    #[must_use = "a future does nothing until it is polled"]
    pub struct BreakerFuture<F, C> {
        // None if the breaker refused the call.
        #[pin]
        call: Option<F>,
        admission: Result<Option<BreakerPermit>, CircuitOpen>,
        classify: C,
    }
}

impl<F, C, T, E> Future for BreakerFuture<F, C>
where
    F: Future<Output = Result<T, E>>,
    C: Classify<T, E>,
{
    type Output = Result<T, BreakerError<E>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let admission = match this.admission {
            Ok(admission) => admission,
            Err(open) => return Poll::Ready(Err(BreakerError::Open(*open))),
        };
        let call = this.call.as_pin_mut().expect("the service was called, because the breaker admitted the call");
        // Taken out for the poll, so that a panic in the poll drops the permit while it unwinds: that counts as a
        // failure, while a later drop, after the panic was caught, would count as a cancellation.
        let permit = admission.take();
        let Poll::Ready(result) = call.poll(cx) else {
            *admission = permit;
            return Poll::Pending;
        };
        if let Some(permit) = permit {
            permit.end_as(this.classify.classify(&result));
        }
        Poll::Ready(result.map_err(BreakerError::Inner))
    }
}
