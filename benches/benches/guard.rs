//! The cost of the primitives of `cancel-safe-guard`, beside those of tokio and tokio-util.
//!
//! Ready futures are polled by hand, so that no figure contains a trip through the scheduler, unless the scheduler is
//! measured.

use std::cell::Cell;
use std::future::{Future, pending, ready};
use std::hint::black_box;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use cancel_safe_guard::{Guard, Reaper, cancellation_point, critical, remaining, timeout, with_token};
use criterion::{Bencher, Criterion, criterion_group, criterion_main};
use tokio::runtime::Runtime;
use tokio::task::yield_now;
use tokio_util::sync::CancellationToken;

const HOUR: Duration = Duration::from_secs(3600);

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime is built from nothing")
}

/// Polls a future that is ready at once.
fn finish<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => unreachable!("the future is ready at once"),
    }
}

/// Awaits `step` as often as criterion asks, and reports the time of that alone.
async fn steps<F: Future>(count: u64, step: impl Fn() -> F) -> Duration {
    let start = Instant::now();
    for _ in 0..count {
        black_box(step().await);
    }
    start.elapsed()
}

/// Measures `check` on this thread while another one does the same without a pause.
fn contended(b: &mut Bencher<'_>, check: impl Fn() -> bool + Sync) {
    b.iter_custom(|count| {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    black_box(check());
                }
            });
            let start = Instant::now();
            for _ in 0..count {
                black_box(check());
            }
            let elapsed = start.elapsed();
            stop.store(true, Ordering::Relaxed);
            elapsed
        })
    });
}

fn guards(c: &mut Criterion) {
    let cleaned = Cell::new(0);
    let mut group = c.benchmark_group("guard");
    group.bench_function("new and disarm", |b| {
        b.iter(|| Guard::new(|| cleaned.set(black_box(1))).disarm());
    });
    group.bench_function("new and drop", |b| {
        b.iter(|| drop(Guard::new(|| cleaned.set(black_box(1)))));
    });
    group.finish();
}

fn scopes(c: &mut Criterion) {
    let runtime = runtime();
    let mut group = c.benchmark_group("scope");
    group.bench_function("critical, ready, in one timeout", |b| {
        b.iter_custom(|count| {
            let run = timeout(HOUR, steps(count, || critical(ready(black_box(1)))));
            runtime.block_on(run).expect("an hour is enough")
        });
    });
    group.bench_function("critical, one yield, in one timeout", |b| {
        b.iter_custom(|count| {
            let run = timeout(HOUR, steps(count, || critical(yield_now())));
            runtime.block_on(run).expect("an hour is enough")
        });
    });
    group.bench_function("no critical, one yield, in one timeout", |b| {
        b.iter_custom(|count| runtime.block_on(timeout(HOUR, steps(count, yield_now))).expect("an hour is enough"));
    });
    group.bench_function("remaining, in two timeouts", |b| {
        let run = timeout(HOUR, timeout(HOUR, async { b.iter(remaining) }));
        runtime.block_on(run).expect("an hour is enough").expect("an hour is enough");
    });
    group.bench_function("cancellation_point, in one timeout", |b| {
        b.iter_custom(|count| {
            runtime.block_on(timeout(HOUR, steps(count, cancellation_point))).expect("an hour is enough")
        });
    });
    group.finish();

    let inside = runtime.enter();
    let mut group = c.benchmark_group("timeout of a ready future");
    group.bench_function("ours", |b| b.iter(|| finish(timeout(HOUR, ready(black_box(1))))));
    group.bench_function("tokio's", |b| b.iter(|| finish(tokio::time::timeout(HOUR, ready(black_box(1))))));
    group.bench_function("the clock alone", |b| b.iter(tokio::time::Instant::now));
    group.finish();
    drop(inside);

    let mut group = c.benchmark_group("timeout of one yield");
    group.bench_function("ours", |b| {
        b.iter_custom(|count| runtime.block_on(steps(count, || timeout(HOUR, yield_now()))));
    });
    group.bench_function("tokio's", |b| {
        b.iter_custom(|count| runtime.block_on(steps(count, || tokio::time::timeout(HOUR, yield_now()))));
    });
    group.finish();
}

fn shields(c: &mut Criterion) {
    let runtime = runtime();
    let workers =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().expect("a runtime is built from nothing");
    let reaper = Reaper::new();
    let mut group = c.benchmark_group("shield");
    group.bench_function("ready", |b| b.iter(|| finish(reaper.shield(ready(black_box(1))))));
    group.bench_function("ready, boxed without a shield", |b| {
        b.iter(|| finish(black_box(Box::pin(ready(black_box(1))))));
    });
    group.bench_function("one yield", |b| {
        b.iter_custom(|count| runtime.block_on(steps(count, || reaper.shield(yield_now()))));
    });
    group.bench_function("tokio::spawn, ready, current thread", |b| {
        b.iter_custom(|count| runtime.block_on(steps(count, || tokio::spawn(ready(black_box(1))))));
    });
    group.bench_function("tokio::spawn, ready, two workers", |b| {
        b.iter_custom(|count| workers.block_on(steps(count, || tokio::spawn(ready(black_box(1))))));
    });
    group.finish();
}

fn tokens(c: &mut Criterion) {
    let mut group = c.benchmark_group("token");
    let token = CancellationToken::new();
    let flag = AtomicBool::new(false);
    group.bench_function("CancellationToken::is_cancelled", |b| b.iter(|| black_box(&token).is_cancelled()));
    group.bench_function("CancellationToken::is_cancelled, two threads", |b| {
        contended(b, || black_box(&token).is_cancelled());
    });
    group.bench_function("AtomicBool::load", |b| b.iter(|| black_box(&flag).load(Ordering::Acquire)));
    group.bench_function("AtomicBool::load, two threads", |b| {
        contended(b, || black_box(&flag).load(Ordering::Acquire));
    });
    group.bench_function("with_token, ready", |b| b.iter(|| finish(with_token(&token, ready(black_box(1))))));
    group.bench_function("run_until_cancelled, ready", |b| {
        b.iter(|| finish(token.run_until_cancelled(ready(black_box(1)))));
    });
    group.bench_function("select! with a token, ready", |b| {
        b.iter(|| {
            finish(async {
                tokio::select! {
                    biased;
                    one = ready(black_box(1)) => one,
                    () = token.cancelled() => pending().await,
                }
            })
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = guards, scopes, shields, tokens
}
criterion_main!(benches);
