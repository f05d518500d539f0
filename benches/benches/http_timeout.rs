//! What a call through the breaker costs, and a request through the client beside the same request through reqwest.

#[cfg(feature = "peers")]
#[path = "http_timeout/breakers.rs"]
mod breakers;

use std::{
    hint::black_box,
    pin::pin,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use cancel_safe_http_timeout::{
    BreakerConfig, BreakerConfigBuilder, BreakerWindow, CircuitBreaker, Retry, TimeoutClient,
};
use criterion::{Criterion, criterion_group, criterion_main};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

/// One call around a future that is ready, without a runtime.
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

/// Answers every request on every connection with the same few bytes; a request is taken for one read.
async fn serve(listener: TcpListener) {
    while let Ok((mut socket, _)) = listener.accept().await {
        tokio::spawn(async move {
            let mut request = [0; 4096];
            while socket.read(&mut request).await.is_ok_and(|bytes| bytes > 0) {
                let answer: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";
                if !socket.write(answer).await.is_ok_and(|bytes| bytes == answer.len()) {
                    return;
                }
            }
        });
    }
}

fn client(c: &mut Criterion) {
    let server = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let listener = server.block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
    let url = format!("http://{}/", listener.local_addr().expect("an address"));
    server.spawn(serve(listener));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");

    let mut group = c.benchmark_group("client");
    let plain = reqwest::Client::new();
    group.bench_function("reqwest, get and read", |b| {
        b.to_async(&runtime).iter(async || {
            let response = plain.get(&url).timeout(Duration::from_secs(10)).send().await.expect("an answer");
            response.bytes().await.expect("a body")
        });
    });
    let ours = TimeoutClient::builder()
        .concurrency_per_host(50)
        .retry(Retry::attempts(4))
        .breaker(BreakerConfig::default())
        .build()
        .expect("the options are in their range");
    group.bench_function("ours with everything on, get and read", |b| {
        b.to_async(&runtime).iter(async || {
            let response = ours.get(&url).send().await.expect("an answer");
            response.bytes().await.expect("a body")
        });
    });
    group.finish();
}

criterion_group!(benches, breaker_calls, window, client);

/// The peers are measured, and their faults shown, unless a part of the bench is chosen that is none of that.
#[cfg(feature = "peers")]
fn beside_peers(c: &mut Criterion) {
    let chosen = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    if chosen.is_none_or(|part| part == "faults") {
        breakers::faults();
    }
    breakers::calls(c);
}

#[cfg(not(feature = "peers"))]
fn beside_peers(_: &mut Criterion) {}

criterion_group!(peers, beside_peers);
criterion_main!(benches, peers);
