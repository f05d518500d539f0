//! Every operation dropped at every await point, and the state left behind compared with the documentation.

use std::cell::{Cell, RefCell};
use std::future::pending;
use std::time::Duration;

use cancel_safe_shutdown::{Application, BackgroundWorker, StopReason, TaskGroup, TaskOutcome, WorkerContext};
use cancel_safe_testing::{Explore, Outcome, Report, Way};
use tokio::sync::oneshot;
use tokio::task::{JoinSet, yield_now};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::Alive;

const LATER: Duration = Duration::from_secs(1);

fn explore() -> Explore {
    Explore::new().paused_time(true)
}

/// Waits until every living task is gone: a dropped group has requested the abort of its tasks, and the runtime carries
/// it out.
async fn all_gone(alive: &Alive) -> Result<(), String> {
    for _ in 0..100 {
        if alive.count() == 0 {
            return Ok(());
        }
        yield_now().await;
    }
    Err(format!("{} tasks have outlived what owned them", alive.count()))
}

/// A group with two tasks that end, one after the other, and one task that does not.
fn busy_group(alive: &Alive) -> TaskGroup {
    let group = TaskGroup::new().grace(LATER);
    let (one, two, three) = (alive.guest(), alive.guest(), alive.guest());
    group.spawn("soon", async move { (one, sleep(LATER).await).1 }).unwrap();
    group.spawn("later", async move { (two, sleep(2 * LATER).await).1 }).unwrap();
    group.spawn_with("deaf", |_| async move { (three, pending::<()>().await).1 }).unwrap();
    group
}

#[test]
fn a_dropped_wait_leaves_no_task_behind() {
    let report = explore().run(
        async || Alive::default(),
        async |alive| {
            let group = TaskGroup::new();
            for number in 0..3 {
                let guest = alive.guest();
                group.spawn("task", async move { (guest, sleep(number * LATER).await).1 }).unwrap();
            }
            group.wait().await.completed.len()
        },
        async |alive, outcome| {
            all_gone(alive).await?;
            if let Outcome::Completed(completed) = outcome
                && completed != 3
            {
                return Err(format!("{completed} of 3 completed"));
            }
            Ok(())
        },
    );
    report.publish("shutdown", "TaskGroup::wait").assert_clean();
}

#[test]
fn a_dropped_shutdown_leaves_no_task_behind() {
    let report = explore().run(
        async || Alive::default(),
        async |alive| busy_group(alive).shutdown(LATER).await.stragglers.len(),
        async |alive, outcome| {
            all_gone(alive).await?;
            if let Outcome::Completed(stragglers) = outcome
                && stragglers != 1
            {
                return Err(format!("{stragglers} stragglers"));
            }
            Ok(())
        },
    );
    report.publish("shutdown", "TaskGroup::shutdown").assert_clean();
}

#[test]
fn a_dropped_scope_leaves_no_task_behind() {
    let report = explore().run(
        async || Alive::default(),
        async |alive| {
            let body = async |group: &mut TaskGroup| {
                for _ in 0..2 {
                    let guest = alive.guest();
                    group.spawn("inside", async move { (guest, sleep(LATER).await).1 }).unwrap();
                    yield_now().await;
                }
            };
            drop(TaskGroup::scope(body).await);
        },
        async |alive, _| all_gone(alive).await,
    );
    report.publish("shutdown", "TaskGroup::scope").assert_clean();
}

/// A task to drop, and a task that is told to stop and then takes its time.
fn populate(group: &TaskGroup, alive: &Alive) {
    let (one, two) = (alive.guest(), alive.guest());
    group.spawn("plain", async move { (one, pending::<()>().await).1 }).unwrap();
    let tidy = move |cx: WorkerContext| async move {
        cx.cancelled().await;
        sleep(LATER).await;
        drop(two);
    };
    group.spawn_with("tidy", tidy).unwrap();
}

#[test]
fn a_dropped_scope_whose_body_has_failed_leaves_no_task_behind() {
    let report = explore().run(
        async || Alive::default(),
        async |alive| {
            let body = async |group: &mut TaskGroup| {
                populate(group, alive);
                yield_now().await;
                Err::<(), _>("no")
            };
            let (returned, result) = TaskGroup::scope(body).await;
            assert_eq!((returned, result.completed.len()), (Err("no"), 1));
        },
        async |alive, _| all_gone(alive).await,
    );
    report.publish("shutdown", "TaskGroup::scope, failed").assert_clean();
}

#[test]
fn a_dropped_try_scope_leaves_no_task_behind() {
    let report = explore().run(
        async || Alive::default(),
        async |alive| {
            let body = async |group: &mut TaskGroup| {
                populate(group, alive);
                yield_now().await;
                Err::<(), _>("no")
            };
            assert_eq!(TaskGroup::try_scope(body).await, Err("no"));
        },
        async |alive, _| all_gone(alive).await,
    );
    report.publish("shutdown", "TaskGroup::try_scope").assert_clean();
}

/// A cancel of a group, dropped anywhere: it takes effect from the first poll on, and its grace still ends.
fn cancelling_all(cancel_all: impl AsyncFn(&TaskGroup)) -> Report {
    explore().ways([Way::Eager, Way::Settled]).run(
        async || {
            let alive = Alive::default();
            let group = busy_group(&alive);
            (RefCell::new(Some(group)), alive)
        },
        #[expect(clippy::await_holding_refcell_ref, reason = "nobody else borrows the group while it is cancelled")]
        async |(group, _)| cancel_all(group.borrow().as_ref().unwrap()).await,
        async |(group, alive), outcome| {
            let group = group.take().unwrap();
            let made = !matches!(outcome, Outcome::Dropped { point: 0, .. });
            if made != group.spawn("new", async {}).is_err() {
                return Err(format!("the cancel was made: {made}; the group disagrees"));
            }
            if !made {
                group.cancel_all().await;
            }
            let result = group.wait().await;
            if result.stragglers.len() != 1
                || result.completed.len() + result.cancelled.len() != if made { 2 } else { 3 }
            {
                return Err(format!("{result:?}"));
            }
            all_gone(alive).await
        },
    )
}

#[test]
fn a_dropped_cancel_stands_and_its_grace_still_ends() {
    let report = cancelling_all(async |group| group.cancel_all().await);
    report.publish("shutdown", "TaskGroup::cancel_all").assert_clean();
    let report = cancelling_all(async |group| group.cancel_all_because("no use").await);
    report.publish("shutdown", "TaskGroup::cancel_all_because").assert_clean();
}

#[test]
fn a_cancel_that_first_awaits_is_caught() {
    let report = cancelling_all(async |group| {
        sleep(LATER).await;
        group.cancel_all().await;
    });
    assert!(!report.is_clean(), "the broken twin went unnoticed");
}

#[test]
fn a_dropped_join_all_leaves_no_task_behind() {
    let report = explore().run(
        async || Alive::default(),
        async |alive| {
            let group = TaskGroup::new();
            for number in 0..3 {
                let guest = alive.guest();
                group.spawn("task", async move { (guest, sleep(number * LATER).await).1 }).unwrap();
            }
            group.join_all().await.len()
        },
        async |alive, outcome| {
            all_gone(alive).await?;
            if matches!(outcome, Outcome::Completed(joined) if joined != 3) {
                Err("not all".to_owned())
            } else {
                Ok(())
            }
        },
    );
    report.publish("shutdown", "TaskGroup::join_all").assert_clean();
}

/// A cancel of one name, dropped anywhere: it takes effect from the first poll on, and the other task is not touched.
fn cancelling(cancel: impl AsyncFn(&TaskGroup)) -> Report {
    explore().ways([Way::Eager, Way::Settled]).run(
        async || {
            let alive = Alive::default();
            let group = TaskGroup::new().grace(LATER);
            let (one, two, three) = (alive.guest(), alive.guest(), alive.guest());
            let listens = move |cx: WorkerContext| async move { (one, cx.cancelled().await).1 };
            group.spawn_with("listens", listens).unwrap();
            group.spawn_with("deaf", |_| async move { (two, pending::<()>().await).1 }).unwrap();
            group.spawn("other", async move { (three, pending::<()>().await).1 }).unwrap();
            (RefCell::new(Some(group)), alive)
        },
        #[expect(clippy::await_holding_refcell_ref, reason = "nobody else borrows the group while it is cancelled")]
        async |(group, _)| cancel(group.borrow().as_ref().unwrap()).await,
        async |(group, alive), outcome| {
            let group = group.take().unwrap();
            let made = !matches!(outcome, Outcome::Dropped { point: 0, .. });
            sleep(LATER).await;
            if made == group.contains("listens") || !group.contains("other") {
                return Err(format!("the cancel was made: {made}; alive are {:?}", group.tasks()));
            }
            group.cancel_all().await;
            let result = group.wait().await;
            if result.stragglers.len() != 1 || result.completed.len() + result.cancelled.len() != 2 {
                return Err(format!("{result:?}"));
            }
            all_gone(alive).await
        },
    )
}

#[test]
fn a_dropped_cancel_of_a_name_stands() {
    let report = cancelling(async |group| {
        group.cancel("listens").await;
        group.cancel_because("deaf", "no use").await;
    });
    report.publish("shutdown", "TaskGroup::cancel").assert_clean();
}

#[test]
fn a_cancel_of_a_name_that_first_awaits_is_caught() {
    let report = cancelling(async |group| {
        sleep(LATER).await;
        group.cancel("listens").await;
        group.cancel("deaf").await;
    });
    assert!(!report.is_clean(), "the broken twin went unnoticed");
}

/// Joins tasks in an operation that may be dropped, then the rest in the check: together each exactly once.
fn joining(join_next: impl AsyncFn(&mut TaskGroup<u32>) -> Option<u32>) -> Report {
    explore().ways([Way::Eager, Way::Settled]).run(
        async || {
            let group = TaskGroup::<u32>::with_results();
            for number in 0..4 {
                group.spawn("task", async move { (sleep(number * LATER).await, Ok(number)).1 }).unwrap();
            }
            (RefCell::new(Some(group)), RefCell::new(Vec::new()))
        },
        #[expect(clippy::await_holding_refcell_ref, reason = "nobody else borrows the group while it is joined")]
        async |(group, joined)| {
            let mut group = group.borrow_mut();
            while let Some(number) = join_next(group.as_mut().unwrap()).await {
                joined.borrow_mut().push(number);
            }
        },
        async |(group, joined), _| {
            let mut group = group.take().unwrap();
            let mut joined = joined.take();
            while let Some((_, outcome)) = group.join_next().await {
                let TaskOutcome::Completed(number) = outcome else { return Err(format!("{outcome:?}")) };
                joined.push(number);
            }
            joined.sort_unstable();
            if joined == [0, 1, 2, 3] { Ok(()) } else { Err(format!("joined {joined:?}")) }
        },
    )
}

#[test]
fn a_dropped_join_next_loses_no_outcome() {
    let report = joining(async |group| match group.join_next().await {
        Some((_, TaskOutcome::Completed(number))) => Some(number),
        _ => None,
    });
    report.publish("shutdown", "TaskGroup::join_next").assert_clean();
}

#[test]
fn a_join_that_awaits_after_it_has_taken_is_caught() {
    let report = joining(async |group| match group.join_next().await {
        Some((_, TaskOutcome::Completed(number))) => {
            yield_now().await;
            Some(number)
        }
        _ => None,
    });
    assert!(!report.is_clean(), "the broken twin went unnoticed");
}

#[test]
fn tasks_spawned_without_a_group_are_caught() {
    let report = explore().ways([Way::Eager, Way::Settled]).run(
        async || Alive::default(),
        async |alive| {
            let guest = alive.guest();
            tokio::spawn(async move { (guest, sleep(LATER).await).1 }).await.unwrap();
        },
        async |alive, _| all_gone(alive).await,
    );
    assert!(!report.is_clean(), "the broken twin went unnoticed");
    // A group does this no worse than a `JoinSet` does it for tasks without names.
    let report = explore().ways([Way::Eager, Way::Settled]).run(
        async || Alive::default(),
        async |alive| {
            let guest = alive.guest();
            let mut set = JoinSet::new();
            set.spawn(async move { (guest, sleep(LATER).await).1 });
            set.join_next().await;
        },
        async |alive, _| all_gone(alive).await,
    );
    report.assert_clean();
}

#[test]
fn a_dropped_join_aborts_the_worker() {
    let report = explore().run(
        async || Alive::default(),
        async |alive| {
            let token = CancellationToken::new();
            let mut worker = BackgroundWorker::new("worker", token);
            let guest = alive.guest();
            worker.start(|_| async move { (guest, sleep(LATER).await).1 }).unwrap();
            worker.join().await.is_completed()
        },
        async |alive, outcome| {
            all_gone(alive).await?;
            if matches!(outcome, Outcome::Completed(false)) { Err("not completed".to_owned()) } else { Ok(()) }
        },
    );
    report.publish("shutdown", "BackgroundWorker::join").assert_clean();
}

/// A wait for a stop, dropped anywhere, never reports a stop that did not happen, and can be repeated.
fn waiting(
    wait: impl AsyncFn(&WorkerContext),
    cancel: impl AsyncFn(&TaskGroup),
    check: impl Fn(&WorkerContext) -> bool,
) -> Report {
    explore().ways([Way::Eager, Way::Settled]).run(
        async || {
            let group = TaskGroup::new();
            let (send, context) = oneshot::channel();
            let hand_out = |cx: WorkerContext| async move {
                assert!(send.send(cx.clone()).is_ok());
                cx.cancelled().await;
            };
            group.spawn_with("worker", hand_out).unwrap();
            (context.await.unwrap(), RefCell::new(Some(group)), Cell::new(false))
        },
        #[expect(clippy::await_holding_refcell_ref, reason = "nobody else borrows the group while it is cancelled")]
        async |(cx, group, told)| {
            tokio::join!(
                async {
                    wait(cx).await;
                    told.set(true);
                },
                async {
                    sleep(LATER).await;
                    cancel(group.borrow().as_ref().unwrap()).await;
                }
            );
        },
        async |(cx, group, told), _| {
            let group = group.take().unwrap();
            if told.get() && !(cx.is_cancelled() && check(cx)) {
                return Err("told of a cancel that nobody made".to_owned());
            }
            group.cancel_all().await;
            wait(cx).await;
            if group.wait().await.completed == ["worker"] { Ok(()) } else { Err("the worker was not told".to_owned()) }
        },
    )
}

#[test]
fn a_dropped_wait_for_the_cancel_can_be_repeated() {
    let requested = |cx: &WorkerContext| cx.reason() == Some(StopReason::Requested);
    let cancel_all = async |group: &TaskGroup| group.cancel_all().await;
    let report = waiting(async |cx| cx.cancelled().await, cancel_all, requested);
    report.publish("shutdown", "WorkerContext::cancelled").assert_clean();
    // The same for a task that is stopped alone.
    let alone = async |group: &TaskGroup| assert_eq!(group.cancel("worker").await, 1);
    let report = waiting(async |cx| cx.cancelled().await, alone, requested);
    report.publish("shutdown", "WorkerContext::cancelled, alone").assert_clean();
    let report = waiting(async |cx| cx.cancelled_owned().await, cancel_all, requested);
    report.publish("shutdown", "WorkerContext::cancelled_owned").assert_clean();
}

#[test]
fn a_wait_that_ends_by_itself_is_caught() {
    let early = async |cx: &WorkerContext| {
        tokio::time::timeout(LATER / 2, cx.cancelled()).await.unwrap_or_default();
    };
    let report = waiting(early, async |group| group.cancel_all().await, |_| true);
    assert!(!report.is_clean(), "the broken twin went unnoticed");
}

#[test]
fn a_dropped_serve_leaves_no_worker_behind() {
    let report = explore().run(
        async || Alive::default(),
        async |alive| {
            let (guest, below) = (alive.guest(), alive.guest());
            let orderly = |cx: WorkerContext| async move {
                let _guest = guest;
                let group = cx.group();
                group.spawn("below", async move { (below, pending::<()>().await).1 }).unwrap();
                cx.cancelled().await;
                sleep(LATER).await;
                drop(group.wait().await);
            };
            let app = Application::new("app")
                .phase("storage", |phase| phase.worker("db", |cx: WorkerContext| async move { cx.cancelled().await }))
                .phase("ingress", |phase| phase.worker_once("http", orderly));
            let handle = app.shutdown_handle();
            let app = app.worker("timer", move |_: WorkerContext| async move {
                sleep(LATER).await;
                handle.cancel();
            });
            app.serve().await.unwrap().exit_code()
        },
        async |alive, outcome| {
            all_gone(alive).await?;
            if let Outcome::Completed(code) = outcome
                && code != 0
            {
                return Err(format!("exit code {code}"));
            }
            Ok(())
        },
    );
    report.publish("shutdown", "Application::serve").assert_clean();
}
