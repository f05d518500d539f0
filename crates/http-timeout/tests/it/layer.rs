//! The breaker as a tower layer.

use std::{
    future::{Pending, Ready, pending, ready},
    marker::PhantomData,
    panic::AssertUnwindSafe,
    task::{Context, Poll},
    time::Duration,
};

use cancel_safe_http_timeout::{BreakerConfig, BreakerLayer, CircuitBreaker, State};
use futures_util::FutureExt as _;
use tower_layer::Layer as _;
use tower_service::Service;

type Answer = Result<(), &'static str>;

/// A service whose futures are made by a function.
struct Backend<F>(fn() -> F, PhantomData<F>);

impl<F: Future<Output = Answer>> Service<()> for Backend<F> {
    type Response = ();
    type Error = &'static str;
    type Future = F;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Answer> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, (): ()) -> F {
        self.0()
    }
}

#[tokio::test(start_paused = true)]
async fn the_layer_trips_refuses_and_gives_a_dropped_probe_s_slot_back() {
    let open_for = Duration::from_secs(5);
    let config = BreakerConfig::builder().open_for(open_for, open_for).jitter(0.0).build().unwrap();
    let breaker = CircuitBreaker::new(config);
    let layer = BreakerLayer::new(breaker.clone());
    let mut sick = layer.layer(Backend::<Ready<Answer>>(|| ready(Err("sick")), PhantomData));
    for _ in 0..5 {
        assert_eq!(sick.call(()).await.unwrap_err().into_inner(), Some("sick"));
    }
    assert!(sick.call(()).await.unwrap_err().is_open());

    tokio::time::advance(open_for).await;
    let mut hanging = layer.layer(Backend::<Pending<Answer>>(pending, PhantomData));
    for _ in 0..3 {
        let probe = hanging.call(());
        assert_eq!((breaker.state(), breaker.metrics().probes), (State::HalfOpen, 1));
        assert!(tokio::time::timeout(Duration::from_millis(1), probe).await.is_err());
        assert_eq!((breaker.state(), breaker.metrics().probes), (State::HalfOpen, 0));
    }
    drop(hanging.call(()));
    assert_eq!(breaker.metrics().probes, 0, "the slot of a call that was never polled");
    let mut well = layer.layer(Backend::<Ready<Answer>>(|| ready(Ok(())), PhantomData));
    well.call(()).await.unwrap();
    assert_eq!(breaker.state(), State::Closed);
}

#[tokio::test]
async fn a_panic_that_is_caught_outside_is_a_failure_of_the_service() {
    let breaker = CircuitBreaker::new(BreakerConfig::default());
    let mut service = BreakerLayer::new(breaker.clone()).layer(Backend(|| async { panic!("on purpose") }, PhantomData));
    // The service has answered another call, so that a cancelled call would be neutral.
    breaker.try_acquire().unwrap().success();
    let call = AssertUnwindSafe(service.call(()));
    assert!(call.catch_unwind().await.is_err());
    assert_eq!((breaker.metrics().failures, breaker.metrics().cancelled), (1, 0));
}
