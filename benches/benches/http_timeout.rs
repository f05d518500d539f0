//! The cost of a call through the breaker, and of a request through the client beside the same request through reqwest.

#![expect(clippy::unwrap_used, reason = "a bench that fails has nothing to measure")]
#![expect(clippy::print_stdout, reason = "a bench speaks through its output")]

use std::{
    hint::black_box,
    pin::pin,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use cancel_safe_http_timeout::{BreakerConfig, BreakerConfigBuilder, BreakerWindow, CircuitBreaker};
use criterion::{Criterion, criterion_group};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[cfg(feature = "peers")]
#[path = "http_timeout/breakers.rs"]
mod breakers;
#[path = "http_timeout/client.rs"]
mod client;

/// Counts allocations, which costs all contestants the same.
#[global_allocator]
static ALLOCATOR: &StatsAlloc<std::alloc::System> = &INSTRUMENTED_SYSTEM;

/// One call around a ready future, without a runtime.
fn call(breaker: &CircuitBreaker) {
    let polled = pin!(breaker.call(async { Ok::<_, ()>(black_box(1)) })).poll(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(polled, Poll::Ready(Ok(1))), "a closed breaker admits a ready call");
}

fn breaker(config: BreakerConfigBuilder) -> CircuitBreaker {
    CircuitBreaker::new(config.build().expect("the options are in their range"))
}

fn breaker_calls(c: &mut Criterion) {
    let mut group = c.benchmark_group("breaker");
    group.bench_function("clock alone", |b| b.iter(|| black_box(Instant::now())));

    let closed = breaker(BreakerConfig::builder());
    group.bench_function("call, closed", |b| b.iter(|| call(&closed)));

    let slow = breaker(BreakerConfig::builder().slow_call(Duration::from_secs(1), 0.5));
    group.bench_function("call, closed, slow-call rule", |b| b.iter(|| call(&slow)));

    group.bench_function("permit, closed", |b| {
        b.iter(|| closed.try_acquire().expect("it is closed").success());
    });

    let shared = breaker(BreakerConfig::builder());
    group.bench_function("call, closed, two threads", |b| {
        b.iter_custom(|calls| {
            let started = Instant::now();
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| (0..calls).for_each(|_| call(&shared)));
                }
            });
            started.elapsed()
        });
    });

    let isolated = breaker(BreakerConfig::builder());
    isolated.isolate();
    group.bench_function("refusal", |b| b.iter(|| black_box(isolated.try_acquire().is_err())));
    group.finish();
}

/// A failure sums the window up, so it is the call that a full window could make dear.
fn window(c: &mut Criterion) {
    let mut group = c.benchmark_group("window");
    let configs =
        [("time", BreakerWindow::Time(Duration::from_secs(3_600))), ("count", BreakerWindow::Count(1_000_000))];
    for (name, window) in configs {
        for held in [0, 100_000] {
            let breaker = breaker(BreakerConfig::builder().window(window).consecutive_failures(None).failure_rate(1.0));
            (0..held).for_each(|_| call(&breaker));
            // Half of them succeed, because a window of nothing but failures would trip.
            group.bench_function(format!("success and failure, {name}, {held} calls held"), |b| {
                b.iter(|| {
                    call(&breaker);
                    breaker.try_acquire().expect("it is closed").failure();
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, breaker_calls, window);
#[cfg(feature = "peers")]
criterion_group!(peers, breakers::calls);

fn main() {
    benches();
    #[cfg(feature = "peers")]
    peers();
    Criterion::default().configure_from_args().final_summary();
    // `cargo test` runs benches too, and asks for no figures.
    if std::env::args().any(|word| word == "--bench") {
        #[cfg(feature = "peers")]
        breakers::faults();
        client::costs();
        client::bytes();
        client::faults();
        client::hedging();
    }
}
