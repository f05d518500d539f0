//! Named tasks against `JoinSet`, a cancel against a shared token, and what a task pays for being watched.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cancel_safe_shutdown::{TaskGroup, WorkerContext};
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

const TASKS: usize = 10_000;
const GRACE: Duration = Duration::from_secs(60);

fn runtimes() -> [(&'static str, Runtime); 2] {
    let one = Builder::new_current_thread().enable_all().build();
    let two = Builder::new_multi_thread().worker_threads(2).enable_all().build();
    [("current thread", one.expect("a runtime")), ("two threads", two.expect("a runtime"))]
}

/// Spawning 10,000 tasks and joining them all. The names are allocated for both: a `JoinSet` task has to carry its own.
fn spawn_and_join(c: &mut Criterion) {
    for (threads, runtime) in runtimes() {
        let mut group = c.benchmark_group(format!("spawn and join 10,000 ({threads})"));
        group.sample_size(20);
        group.bench_function("TaskGroup, static names", |b| {
            b.to_async(&runtime).iter(async || {
                let mut group = TaskGroup::new();
                for _ in 0..TASKS {
                    group.spawn("task", async {}).expect("an open group");
                }
                while group.join_next().await.is_some() {}
            });
        });
        group.bench_function("TaskGroup, owned names", |b| {
            b.to_async(&runtime).iter(async || {
                let mut group = TaskGroup::new();
                for number in 0..TASKS {
                    group.spawn(number.to_string(), async {}).expect("an open group");
                }
                while group.join_next().await.is_some() {}
            });
        });
        group.bench_function("JoinSet, no names", |b| {
            b.to_async(&runtime).iter(async || {
                let mut set = JoinSet::new();
                for _ in 0..TASKS {
                    set.spawn(async {});
                }
                while set.join_next().await.is_some() {}
            });
        });
        group.bench_function("JoinSet, owned names", |b| {
            b.to_async(&runtime).iter(async || {
                let mut set = JoinSet::new();
                for number in 0..TASKS {
                    let name = number.to_string();
                    set.spawn(async move { name });
                }
                while set.join_next().await.is_some() {}
            });
        });
        group.finish();
    }
}

/// From the cancel to the return of the last of 10,000 parked tasks. The spawning is not measured.
fn cancel(c: &mut Criterion) {
    for (threads, runtime) in runtimes() {
        let mut group = c.benchmark_group(format!("cancel 10,000 ({threads})"));
        group.sample_size(20);
        group.bench_function("TaskGroup, plain tasks", |b| {
            b.to_async(&runtime).iter_custom(async |iterations| {
                timed(iterations, async || {
                    let group = TaskGroup::new();
                    for _ in 0..TASKS {
                        group.spawn("task", pending::<()>()).expect("an open group");
                    }
                    settle().await;
                    let begun = Instant::now();
                    group.cancel_all().await;
                    begun.elapsed()
                })
                .await
            });
        });
        group.bench_function("TaskGroup, tasks with a context", |b| {
            b.to_async(&runtime).iter_custom(async |iterations| {
                timed(iterations, async || {
                    let group = TaskGroup::new().grace(GRACE);
                    for _ in 0..TASKS {
                        let work = |cx: WorkerContext| async move { cx.cancelled().await };
                        group.spawn_with("task", work).expect("an open group");
                    }
                    settle().await;
                    let begun = Instant::now();
                    group.cancel_all().await;
                    begun.elapsed()
                })
                .await
            });
        });
        group.bench_function("JoinSet and a shared token", |b| {
            b.to_async(&runtime).iter_custom(async |iterations| {
                timed(iterations, async || {
                    let (mut set, token) = (JoinSet::new(), CancellationToken::new());
                    for _ in 0..TASKS {
                        set.spawn(token.clone().cancelled_owned());
                    }
                    settle().await;
                    let begun = Instant::now();
                    token.cancel();
                    while set.join_next().await.is_some() {}
                    begun.elapsed()
                })
                .await
            });
        });
        group.finish();
    }
}

async fn timed(iterations: u64, run: impl AsyncFn() -> Duration) -> Duration {
    let mut total = Duration::ZERO;
    for _ in 0..iterations {
        total += run().await;
    }
    total
}

/// Lets every task reach its await.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(20)).await;
}

fn is_cancelled(c: &mut Criterion) {
    let [(_, runtime), _] = runtimes();
    let mut group = c.benchmark_group("is_cancelled");
    let tasks = TaskGroup::new();
    let (send, receive) = std::sync::mpsc::channel();
    let cx = runtime.block_on(async {
        let hand_out = move |cx: WorkerContext| async move { send.send(cx).expect("a listener") };
        tasks.spawn_with("task", hand_out).expect("an open group");
        tokio::task::yield_now().await;
        receive.recv().expect("a context")
    });
    group.bench_function("WorkerContext", |b| b.iter(|| std::hint::black_box(&cx).is_cancelled()));
    let flag = Arc::new(AtomicBool::new(false));
    group.bench_function("AtomicBool", |b| b.iter(|| std::hint::black_box(&flag).load(Ordering::Acquire)));
    let token = CancellationToken::new();
    group.bench_function("CancellationToken", |b| b.iter(|| std::hint::black_box(&token).is_cancelled()));
    group.finish();
}

/// One task that is polled 10,000 times, and the same in a group: the difference is 10,000 times the wrapper.
fn wrapper(c: &mut Criterion) {
    /// Wakes itself and yields, `0` times more.
    struct Polls(usize);
    impl Future for Polls {
        type Output = ();
        fn poll(mut self: std::pin::Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> std::task::Poll<()> {
            if self.0 == 0 {
                return std::task::Poll::Ready(());
            }
            self.0 -= 1;
            cx.waker().wake_by_ref();
            std::task::Poll::Pending
        }
    }
    let [(_, runtime), _] = runtimes();
    let mut group = c.benchmark_group("10,000 polls of one task");
    group.bench_function("TaskGroup", |b| {
        b.to_async(&runtime).iter_batched(
            TaskGroup::new,
            async |mut group| {
                group.spawn("task", Polls(TASKS)).expect("an open group");
                group.join_next().await
            },
            BatchSize::SmallInput,
        );
    });
    group.bench_function("tokio::spawn", |b| {
        b.to_async(&runtime).iter(async || tokio::spawn(Polls(TASKS)).await);
    });
    group.finish();
}

criterion_group!(benches, spawn_and_join, cancel, is_cancelled, wrapper);
criterion_main!(benches);
