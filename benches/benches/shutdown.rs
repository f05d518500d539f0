//! Named tasks against `JoinSet` and other peers, a cancel against a shared token, the cost of watching a task, and,
//! with real signals, how a process ends (`scenarios`).

#[cfg(all(unix, feature = "peers"))]
#[path = "shutdown/scenarios.rs"]
mod scenarios;

use std::future::pending;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cancel_safe_benches::Contest;
use cancel_safe_shutdown::{TaskGroup, WorkerContext};
use criterion::{BatchSize, Criterion, criterion_group};
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{JoinMap, TaskTracker};

const TASKS: usize = 10_000;
const GRACE: Duration = Duration::from_secs(60);

fn runtimes() -> [(&'static str, Runtime); 2] {
    let one = Builder::new_current_thread().enable_all().build();
    let two = Builder::new_multi_thread().worker_threads(2).enable_all().build();
    [("current thread", one.expect("a runtime")), ("two threads", two.expect("a runtime"))]
}

/// Spawning 10,000 tasks and joining them all, in turns. All contestants allocate owned names, because a `JoinSet` task
/// has to carry its own.
fn spawn_and_join() {
    for (threads, runtime) in runtimes() {
        let contest = Contest::new(format!("spawn and join 10,000 ({threads})"), 100)
            .add("JoinSet, no names", || runtime.block_on(join_set()))
            .add("TaskGroup, static names", || runtime.block_on(static_names()))
            .add("JoinSet, owned names", || runtime.block_on(named_join_set()))
            .add("TaskGroup, owned names", || runtime.block_on(owned_names()))
            .add("JoinMap, owned names", || runtime.block_on(join_map()))
            .add("TaskTracker, no names, no results", || runtime.block_on(tracker()));
        #[cfg(feature = "peers")]
        let contest = contest
            .add("async-shutdown, no names, no results", || runtime.block_on(peers::async_shutdown()))
            .add("tokio-graceful-shutdown", || runtime.block_on(peers::graceful_shutdown()));
        contest.run();
    }
}

async fn static_names() {
    let mut group = TaskGroup::new();
    for _ in 0..TASKS {
        group.spawn("task", async {}).expect("an open group");
    }
    while group.join_next().await.is_some() {}
}

async fn owned_names() {
    let mut group = TaskGroup::new();
    for number in 0..TASKS {
        group.spawn(number.to_string(), async {}).expect("an open group");
    }
    while group.join_next().await.is_some() {}
}

async fn join_set() {
    let mut set = JoinSet::new();
    for _ in 0..TASKS {
        set.spawn(async {});
    }
    while set.join_next().await.is_some() {}
}

async fn named_join_set() {
    let mut set = JoinSet::new();
    for number in 0..TASKS {
        let name = number.to_string();
        set.spawn(async move { name });
    }
    while set.join_next().await.is_some() {}
}

async fn join_map() {
    let mut map = JoinMap::new();
    for number in 0..TASKS {
        map.spawn(number.to_string(), async {});
    }
    while map.join_next().await.is_some() {}
}

async fn tracker() {
    let tracker = TaskTracker::new();
    for _ in 0..TASKS {
        tracker.spawn(async {});
    }
    tracker.close();
    tracker.wait().await;
}

#[cfg(feature = "peers")]
mod peers {
    use std::convert::Infallible;

    use tokio_graceful_shutdown::{SubsystemBuilder, SubsystemHandle, Toplevel};

    use crate::{GRACE, TASKS};

    pub(crate) async fn async_shutdown() {
        let shutdown = async_shutdown::ShutdownManager::<()>::new();
        for _ in 0..TASKS {
            let task = shutdown.wrap_delay_shutdown(async {}).expect("nobody has stopped it");
            tokio::spawn(task);
        }
        shutdown.trigger_shutdown(()).expect("the first to stop it");
        shutdown.wait_shutdown_complete().await;
    }

    pub(crate) async fn graceful_shutdown() {
        let top = Toplevel::<Box<dyn std::error::Error + Send + Sync>>::new(async |top: &mut SubsystemHandle| {
            for number in 0..TASKS {
                let task = async |_: &mut SubsystemHandle| Ok::<_, Infallible>(());
                top.start(SubsystemBuilder::new(number.to_string(), task));
            }
        });
        top.handle_shutdown_requests(GRACE).await.expect("no task fails");
    }
}

/// From the cancel to the return of the last of 10,000 parked tasks, without the spawning.
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
    /// Wakes itself and yields as many more times as the field says.
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

criterion_group!(benches, cancel, is_cancelled, wrapper);

fn main() -> ExitCode {
    #[cfg(all(unix, feature = "peers"))]
    if let Some(code) = scenarios::child() {
        return code;
    }
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let is_wanted = |title: &str| words.is_empty() || words.iter().any(|word| title.contains(word.as_str()));
    if is_wanted("spawn and join") {
        spawn_and_join();
    }
    #[cfg(all(unix, feature = "peers"))]
    if is_wanted("scenarios") {
        scenarios::run_all();
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
    ExitCode::SUCCESS
}
