//! Tasks by their names, and the other ways to spawn and to join.

use std::cell::Cell;
use std::future::pending;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cancel_safe_shutdown::{StopReason, StragglerState, TaskGroup, TaskOutcome, WorkerContext};
use tokio::sync::mpsc;
use tokio::task::{LocalSet, yield_now};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::Alive;

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn one_task_is_cancelled_by_its_name_with_its_grace_and_the_others_go_on() {
    let alive = Alive::default();
    let mut group = TaskGroup::new().grace(5 * SECOND);
    for name in ["anna", "bert"] {
        let guest = alive.guest();
        group
            .spawn_with(name, move |cx| async move {
                cx.cancelled().await;
                assert_eq!(cx.reason(), Some(StopReason::Because("moved away".to_owned())));
                assert!(cx.is_cancelled() && cx.deadline().is_some());
                sleep(SECOND).await;
                drop(guest);
            })
            .unwrap();
    }
    yield_now().await;
    let begun = Instant::now();
    assert_eq!(group.cancel_because("anna", "moved away").await, 1);
    assert_eq!((begun.elapsed(), alive.count(), group.len()), (SECOND, 1, 1));
    let (name, outcome) = group.try_join_next().unwrap();
    assert!(name == "anna" && outcome.is_completed());
    assert!(group.try_join_next().is_none() && group.contains("bert") && !group.contains("anna"));
    group.spawn("new", async {}).unwrap();
    assert_eq!(group.cancel("nobody").await, 0);
}

#[tokio::test(start_paused = true)]
async fn a_plain_task_and_a_deaf_one_are_cancelled_by_name_too() {
    let alive = Alive::default();
    let group = TaskGroup::new().grace(2 * SECOND);
    let (one, two, three) = (alive.guest(), alive.guest(), alive.guest());
    group.spawn("plain", async move { (one, pending::<()>().await).1 }).unwrap();
    group.spawn_with("deaf", |cx| async move { (cx.mark("here"), two, pending::<()>().await).2 }).unwrap();
    group.spawn("other", async move { (three, sleep(9 * SECOND).await).1 }).unwrap();
    yield_now().await;
    assert_eq!(group.cancel("plain").await, 1);
    assert_eq!(alive.count(), 2);
    assert_eq!(group.cancel("deaf").await, 1);
    assert_eq!(alive.count(), 1);
    let result = group.wait().await;
    assert_eq!((result.cancelled, result.completed), (vec!["plain".to_owned()], vec!["other".to_owned()]));
    let [straggler] = &result.stragglers[..] else { panic!("{:?}", result.stragglers) };
    assert_eq!((straggler.name.as_str(), straggler.last_mark.as_deref()), ("deaf", Some("here")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closure_that_does_not_listen_does_not_hold_the_cancel_of_its_name() {
    let group = TaskGroup::new().grace(Duration::from_millis(10));
    let release = Arc::new(AtomicBool::new(false));
    let (begun, mut running) = mpsc::channel(1);
    let released = Arc::clone(&release);
    group
        .spawn_blocking("blocks", move |cx| {
            begun.blocking_send(()).unwrap();
            while !released.load(Ordering::Acquire) {
                std::hint::spin_loop();
            }
            assert!(cx.is_cancelled());
        })
        .unwrap();
    running.recv().await.unwrap();
    assert_eq!(group.cancel("blocks").await, 1);
    release.store(true, Ordering::Release);
    let result = group.wait().await;
    assert_eq!(result.stragglers[0].state, StragglerState::BlockingClosure);
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_name_reaches_every_token_of_its_task_before_and_after() {
    let group = TaskGroup::new();
    let (send, mut contexts) = mpsc::channel(2);
    for name in ["one", "two"] {
        let send = send.clone();
        group
            .spawn_with(name, move |cx: WorkerContext| async move {
                send.send((cx.token(), cx.clone())).await.unwrap();
                cx.cancelled_owned().await;
            })
            .unwrap();
    }
    let (one, first): (CancellationToken, _) = contexts.recv().await.unwrap();
    let (two, second): (CancellationToken, WorkerContext) = contexts.recv().await.unwrap();
    group.cancel("one").await;
    assert!(one.is_cancelled() && first.token().is_cancelled() && first.is_cancelled());
    assert!(!two.is_cancelled() && !second.token().is_cancelled() && !second.is_cancelled());
    assert_eq!((first.reason(), second.reason()), (Some(StopReason::Requested), None));
    group.cancel_all_because("all").await;
    assert!(two.is_cancelled() && second.token().is_cancelled());
    // The first reason wins, for each.
    let all = Some(StopReason::Because("all".to_owned()));
    assert_eq!((first.reason(), second.reason()), (Some(StopReason::Requested), all));
}

#[tokio::test]
async fn an_aborted_name_has_no_grace_and_its_group_stays_open() {
    let alive = Alive::default();
    let mut group = TaskGroup::new();
    for _ in 0..2 {
        let guest = alive.guest();
        group.spawn_with("twin", |cx| async move { (guest, cx.cancelled().await, pending::<()>().await).2 }).unwrap();
    }
    yield_now().await;
    assert_eq!(group.abort("twin"), 2);
    for _ in 0..2 {
        let (name, outcome) = group.join_next().await.unwrap();
        assert!(name == "twin" && matches!(outcome, TaskOutcome::Aborted), "{outcome:?}");
    }
    assert_eq!((alive.count(), group.abort("twin")), (0, 0));
    group.spawn("new", async {}).unwrap();
    assert_eq!(group.wait().await.completed, ["new"]);
}

#[tokio::test]
async fn the_tasks_of_a_group_are_listed_while_they_live() {
    let group = TaskGroup::new();
    let line = line!() + 1;
    group.spawn_with("marked", |cx| async move { (cx.mark("first"), pending::<()>().await).1 }).unwrap();
    group.spawn("brief", async {}).unwrap();
    yield_now().await;
    let tasks = group.tasks();
    let [task] = &tasks[..] else { panic!("{tasks:?}") };
    assert_eq!((task.name.as_str(), task.spawned_at.line()), ("marked", line));
    assert_eq!((task.last_mark.as_deref(), task.is_inside_poll), (Some("first"), false));
}

#[tokio::test]
async fn join_all_returns_every_outcome_once_in_the_order_of_the_ends() {
    let mut group = TaskGroup::<u32, String>::with_results();
    let (send, mut gate) = mpsc::channel::<()>(1);
    group.spawn("late", async move { (gate.recv().await, Ok(2)).1 }).unwrap();
    group.spawn("read", async { Ok(0) }).unwrap();
    assert_eq!(group.join_next().await, Some(("read".to_owned(), TaskOutcome::Completed(0))));
    group.spawn("early", async move { (drop(send), Err("no".to_owned())).1 }).unwrap();
    let outcomes = group.join_all().await;
    let expected =
        [("early".to_owned(), TaskOutcome::Failed("no".to_owned())), ("late".to_owned(), TaskOutcome::Completed(2))];
    assert_eq!(outcomes, expected);
}

#[tokio::test]
async fn tasks_that_are_not_send_are_tasks_like_any_other() {
    let counted = Rc::new(Cell::new(0));
    let local = LocalSet::new();
    let counting = Rc::clone(&counted);
    local
        .run_until(async move {
            let group = TaskGroup::new();
            let (one, two) = (Rc::clone(&counting), Rc::clone(&counting));
            group.spawn_local("counts", async move { (yield_now().await, one.set(one.get() + 1)).1 }).unwrap();
            group.spawn_local("parked", async move { (two, pending::<()>().await).1 }).unwrap();
            yield_now().await;
            yield_now().await;
            group.cancel_all().await;
            let result = group.wait().await;
            assert_eq!((result.completed, result.cancelled), (vec!["counts".to_owned()], vec!["parked".to_owned()]));
            assert_eq!(Rc::strong_count(&counting), 2, "the parked task is still there");
        })
        .await;
    assert_eq!(counted.get(), 1);
}

#[test]
fn a_task_is_spawned_on_a_runtime_from_outside() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let mut group = TaskGroup::<bool, String>::with_results();
    let here = std::thread::current().id();
    group.spawn_on("there", async move { Ok(std::thread::current().id() != here) }, runtime.handle()).unwrap();
    let joined = runtime.block_on(async { timeout(60 * SECOND, group.join_next()).await.unwrap() });
    assert_eq!(joined, Some(("there".to_owned(), TaskOutcome::Completed(true))));
    runtime.block_on(group.cancel_all());
    assert!(group.spawn_on("late", async { Ok(true) }, runtime.handle()).is_err());
}

/// A cancel of a name races with one of the group, 500 times: whatever a task has seen once stays the reason.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_cancels_at_once_leave_one_reason() {
    for _ in 0..500 {
        let group = Arc::new(TaskGroup::new());
        let (send, mut context) = mpsc::channel(1);
        group
            .spawn_with("task", move |cx: WorkerContext| async move {
                send.send(cx.clone()).await.unwrap();
                cx.cancelled().await;
            })
            .unwrap();
        let cx = context.recv().await.unwrap();
        let (other, watched) = (Arc::clone(&group), cx.clone());
        let by_name = tokio::spawn(async move { other.cancel_because("task", "name").await });
        let watching = tokio::task::spawn_blocking(move || {
            loop {
                if let Some(seen) = watched.reason() {
                    assert!(watched.is_cancelled());
                    return seen;
                }
            }
        });
        group.cancel_all_because("all").await;
        let seen = watching.await.unwrap();
        by_name.await.unwrap();
        assert_eq!(cx.reason(), Some(seen));
    }
}
