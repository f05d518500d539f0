//! Task groups: how each task ended, and that nothing outlives its group.

use std::future::pending;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use cancel_safe_shutdown::{BoxError, StragglerState, TaskGroup, TaskOutcome, WorkerContext};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep};

use crate::Alive;

const LONG: Duration = Duration::from_secs(3600);

/// Waits until `condition` holds, for a minute at most.
async fn until(condition: impl Fn() -> bool) {
    let holds = async {
        while !condition() {
            yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), holds).await.expect("the condition did not come true in a minute");
}

#[tokio::test(start_paused = true)]
async fn the_fast_task_completes_and_the_slow_one_is_cancelled() {
    let group = TaskGroup::new();
    group
        .spawn("fast".to_string(), async {
            sleep(Duration::from_millis(100)).await;
        })
        .unwrap();
    group
        .spawn("slow".to_string(), async {
            sleep(Duration::from_secs(10)).await;
        })
        .unwrap();

    sleep(Duration::from_millis(200)).await;
    group.cancel_all().await;

    let result = group.wait().await;
    assert_eq!(result.completed, ["fast"]);
    assert_eq!(result.cancelled, ["slow"]);
}

#[tokio::test]
async fn every_task_is_in_one_list() {
    let group = TaskGroup::new();
    group.spawn("returns", async {}).unwrap();
    group.spawn("fails", async { Err(BoxError::from("no more")) }).unwrap();
    group.spawn("panics", async { panic!("oh {}", "no") }).unwrap();
    group.spawn_blocking("blocks", |_| ()).unwrap();
    let result = group.wait().await;

    assert_eq!(result.completed.len(), 2);
    assert!(result.completed.contains(&"returns".to_owned()) && result.completed.contains(&"blocks".to_owned()));
    assert_eq!(result.failed[0].0, "fails");
    assert_eq!(result.failed[0].1.to_string(), "no more");
    assert_eq!(result.panicked, [("panics".to_owned(), "oh no".to_owned())]);
    assert!(result.cancelled.is_empty() && result.stragglers.is_empty() && !result.is_clean());
}

#[tokio::test]
async fn a_panic_says_where_it_was() {
    let mut group = TaskGroup::new();
    let line = line!() + 1;
    group.spawn("broken", async { panic!("gone") }).unwrap();
    let (name, outcome) = group.join_next().await.unwrap();
    assert_eq!(name, "broken");
    assert!(matches!(outcome, TaskOutcome::Panicked { message, location, .. }
            if message == "gone" && location.line() == line && location.file().ends_with("group.rs")));
}

#[tokio::test]
async fn join_next_returns_each_outcome_once() {
    let mut group = TaskGroup::<usize, String>::with_results();
    for number in 0..100 {
        group
            .spawn(format!("{number}"), async move { if number % 2 == 0 { Ok(number) } else { Err("odd".into()) } })
            .unwrap();
    }
    let mut seen = vec![0; 100];
    while let Some((name, outcome)) = group.join_next().await {
        let number: usize = name.parse().unwrap();
        seen[number] += 1;
        let expected =
            if number.is_multiple_of(2) { TaskOutcome::Completed(number) } else { TaskOutcome::Failed("odd".into()) };
        assert_eq!(outcome, expected);
    }
    assert_eq!(seen, vec![1; 100]);
    assert!(group.is_empty());
}

#[tokio::test]
async fn a_closed_group_hands_the_future_back_unpolled() {
    let group = TaskGroup::new();
    group.cancel_all().await;

    let rejected = group.spawn("late", async {}).unwrap_err();
    assert_eq!(rejected.name(), "late");
    assert_eq!(rejected.to_string(), "task `late` was not started: its group is closed");
    rejected.into_inner().await;
    assert!(group.spawn_with("late", |_| async {}).is_err());
    assert!(group.spawn_blocking("late", |_| ()).is_err());
    assert!(group.child("late").spawn("later", async {}).is_err());
}

/// Counts the futures that the group took, and those that it handed back.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_spawns_that_race_with_a_cancel_each_is_taken_and_told_or_handed_back() {
    const SPAWNERS: usize = 4;
    const SPAWNS: usize = 50;
    for round in 0..100 {
        let (group, alive) = (Arc::new(TaskGroup::new()), Alive::default());
        let spawners = (0..SPAWNERS).map(|number| {
            let (group, alive) = (Arc::clone(&group), alive.clone());
            tokio::spawn(async move {
                let mut rejected = Vec::new();
                for spawn in 0..SPAWNS {
                    let guest = alive.guest();
                    let task = async move { (yield_now().await, drop(guest)).1 };
                    rejected.extend(group.spawn("task", task).map_err(|rejected| rejected.into_inner()).err());
                    if (spawn + number) % 10 == round % 10 {
                        yield_now().await;
                    }
                }
                rejected
            })
        });
        let spawners: Vec<_> = spawners.collect();
        until(|| group.counts().completed >= round as u64 % 100).await;
        group.cancel_all().await;
        let mut rejected = Vec::new();
        for spawner in spawners {
            rejected.extend(spawner.await.unwrap());
        }
        let result = Arc::into_inner(group).unwrap().wait().await;
        assert_eq!(alive.count(), rejected.len(), "a future is neither gone nor handed back");
        assert_eq!(result.completed.len() + result.cancelled.len() + rejected.len(), SPAWNERS * SPAWNS);
        assert!(result.is_clean());
    }
}

#[tokio::test]
async fn outcomes_are_read_in_the_order_of_the_ends_in_whichever_way() {
    let mut group = TaskGroup::<u32, String>::with_results();
    let mut read = Vec::new();
    for number in 0..1000 {
        group.spawn("task", async move { Ok(number) }).unwrap();
        if number % 7 == 3 {
            read.extend(group.join_next().await);
        }
        if number % 11 == 5 {
            read.extend(group.try_join_next());
        }
    }
    read.extend(group.join_all().await);
    let read: Vec<_> = read.into_iter().filter_map(|(_, outcome)| outcome.completed()).collect();
    assert_eq!(read, Vec::from_iter(0..1000));
}

#[tokio::test]
async fn a_result_lists_what_no_reader_was_handed() {
    let mut group = TaskGroup::new();
    for number in 0..5 {
        group.spawn(number.to_string(), async {}).unwrap();
    }
    yield_now().await;
    assert_eq!(group.join_next().await.map(|(name, _)| name), Some("0".to_owned()));
    group.spawn("last", async {}).unwrap();
    let result = group.wait().await;
    assert_eq!(
        (result.completed, result.counts.completed),
        (["1", "2", "3", "4", "last"].map(str::to_owned).to_vec(), 6)
    );
}

#[tokio::test(start_paused = true)]
async fn a_task_with_a_context_has_its_grace_and_a_plain_one_has_none() {
    let group = TaskGroup::new().grace(Duration::from_secs(5));
    let begun = Instant::now();
    group
        .spawn_with("orderly", move |cx| async move {
            cx.cancelled().await;
            assert!(cx.is_cancelled() && cx.reason().is_some());
            assert_eq!(cx.deadline(), Some(begun + Duration::from_secs(5)));
            sleep(Duration::from_secs(3)).await;
        })
        .unwrap();
    group.spawn("plain", pending::<()>()).unwrap();
    yield_now().await;

    group.cancel_all().await;
    assert_eq!(begun.elapsed(), Duration::from_secs(3));
    let result = group.wait().await;
    assert_eq!((result.completed, result.cancelled), (vec!["orderly".to_owned()], vec!["plain".to_owned()]));
}

#[tokio::test(start_paused = true)]
async fn a_task_that_outlives_the_grace_is_aborted_and_named() {
    let alive = Alive::default();
    let group = TaskGroup::new();
    let guest = alive.guest();
    let line = line!() + 1;
    let deaf = group.spawn_with("deaf", |cx| async move {
        let _guest = guest;
        cx.mark("first");
        cx.mark("second");
        pending::<()>().await;
    });
    deaf.unwrap();
    yield_now().await;

    let begun = Instant::now();
    let result = group.shutdown(Duration::from_secs(2)).await;
    assert!(begun.elapsed() >= Duration::from_secs(2) && begun.elapsed() < Duration::from_secs(3));
    let [straggler] = &result.stragglers[..] else { panic!("{result:?}") };
    assert_eq!((straggler.name.as_str(), straggler.spawned_at.line()), ("deaf", line));
    assert_eq!(straggler.last_mark.as_deref(), Some("second"));
    assert_eq!(straggler.state, StragglerState::ParkedAtAwait);
    assert_eq!(alive.count(), 0, "the future is still there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_stopped_is_named_and_does_not_hold_the_group() {
    let group = TaskGroup::new();
    let release = Arc::new(AtomicBool::new(false));
    let (begun, running) = mpsc::channel();
    let (released, sender) = (Arc::clone(&release), begun.clone());
    group
        .spawn("spins", async move {
            sender.send(()).unwrap();
            while !released.load(Ordering::Acquire) {
                std::hint::spin_loop();
            }
        })
        .unwrap();
    let released = Arc::clone(&release);
    group
        .spawn_blocking("blocks", move |cx| {
            begun.send(()).unwrap();
            while !released.load(Ordering::Acquire) {
                std::hint::spin_loop();
            }
            assert!(cx.is_cancelled());
        })
        .unwrap();
    running.recv().unwrap();
    running.recv().unwrap();

    let mut result = group.shutdown(Duration::from_millis(10)).await;
    release.store(true, Ordering::Release);
    result.stragglers.sort_by_key(|straggler| straggler.name.clone());
    let found: Vec<_> = result.stragglers.iter().map(|it| (it.name.as_str(), it.state)).collect();
    assert_eq!(found, [("blocks", StragglerState::BlockingClosure), ("spins", StragglerState::BlockedInPoll)]);
    assert!(result.completed.is_empty() && result.cancelled.is_empty());
}

#[tokio::test]
async fn dropping_a_group_drops_its_tasks_and_those_below() {
    let alive = Alive::default();
    let group = TaskGroup::new();
    let child = group.child("nested");
    let (one, two, three) = (alive.guest(), alive.guest(), alive.guest());
    group.spawn("plain", async move { (one, pending::<()>().await).1 }).unwrap();
    group.spawn_with("context", |_| async move { (two, pending::<()>().await).1 }).unwrap();
    child.spawn("below", async move { (three, pending::<()>().await).1 }).unwrap();
    yield_now().await;

    drop(group);
    until(|| alive.count() == 0).await;
    assert_eq!(child.wait().await.cancelled, ["below"]);
}

#[tokio::test]
async fn a_blocking_closure_that_has_not_begun_is_dropped_by_a_cancel() {
    let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).enable_all().build().unwrap();
    let (release, wait) = mpsc::channel::<()>();
    let result = runtime.spawn(async move {
        let (begun, running) = mpsc::channel();
        let gate = tokio::task::spawn_blocking(move || {
            begun.send(()).unwrap();
            wait.recv().unwrap_err();
        });
        running.recv().unwrap();
        let group = TaskGroup::new();
        group.spawn_blocking("queued", |_| ()).unwrap();
        let cancelling = async {
            group.cancel_all().await;
            group.wait().await
        };
        let (result, ()) = tokio::join!(cancelling, async {
            drop(release);
            gate.await.unwrap();
        });
        result
    });
    let result = std::thread::spawn(move || runtime.block_on(result).unwrap()).join().unwrap();
    assert_eq!(result.cancelled, ["queued"]);
}

#[test]
fn a_blocking_closure_that_finds_no_thread_in_its_grace_is_no_straggler_and_never_runs() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
    let ran = Arc::new(AtomicBool::new(false));
    let (release, held) = mpsc::channel::<()>();
    runtime.block_on(async {
        let holder = tokio::task::spawn_blocking(move || held.recv().unwrap_or_default());
        let group = TaskGroup::new();
        let run = Arc::clone(&ran);
        group.spawn_blocking("queued", move |_| run.store(true, Ordering::SeqCst)).unwrap();
        let result = group.shutdown(Duration::from_millis(20)).await;
        assert_eq!((result.cancelled, result.stragglers.len()), (vec!["queued".to_owned()], 0));
        drop(release);
        holder.await.unwrap();
        // Behind the closure in the queue: had that run, it would have run before this one.
        tokio::task::spawn_blocking(|| ()).await.unwrap();
    });
    assert!(!ran.load(Ordering::SeqCst));
}

#[tokio::test]
async fn waiting_for_a_group_waits_for_the_groups_below() {
    let group = TaskGroup::new();
    let child = group.child("nested");
    let (send, receive) = tokio::sync::oneshot::channel::<()>();
    child.spawn("below", async { drop(receive.await) }).unwrap();
    let waiting = tokio::spawn(group.wait());
    yield_now().await;
    assert!(!waiting.is_finished());
    send.send(()).unwrap();
    assert_eq!(child.wait().await.completed, ["below"]);
    assert!(waiting.await.unwrap().completed.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_group_that_was_dropped_before_one_below_it_ended_is_in_nobodys_way() {
    let root = TaskGroup::new();
    let middle = root.child("middle");
    let leaf = middle.child("leaf");
    leaf.spawn("task", pending::<()>()).unwrap();
    let idle = middle.child("idle");
    drop(middle);
    yield_now().await;
    let begun = Instant::now();
    root.cancel_all().await;
    assert_eq!(begun.elapsed(), Duration::ZERO);
    drop(idle);
    assert_eq!(leaf.wait().await.cancelled, ["task"]);
}

#[tokio::test]
async fn a_group_below_that_is_still_held_is_waited_for_while_it_has_tasks_and_no_longer() {
    let group = TaskGroup::new();
    let outer = group.child("outer");
    let inner = outer.child("inner");
    let busy = Arc::new(group.child("busy"));
    let spawner = Arc::clone(&busy);
    let (send, receive) = tokio::sync::oneshot::channel::<()>();
    // A task of one group ends with a spawn into another group, which was idle before.
    inner
        .spawn("first", async move {
            receive.await.unwrap();
            spawner.spawn("second", sleep(Duration::from_millis(10))).unwrap();
        })
        .unwrap();
    let waiting = tokio::spawn(group.wait());
    yield_now().await;
    assert!(!waiting.is_finished());
    send.send(()).unwrap();
    drop(tokio::time::timeout(Duration::from_secs(60), waiting).await.expect("it waits for the handles").unwrap());

    assert!(busy.is_empty() && inner.is_empty());
    assert!(busy.spawn("late", async {}).is_err() && inner.child("late").spawn("later", async {}).is_err());
    assert_eq!(inner.wait().await.completed, ["first"]);
    assert_eq!(Arc::into_inner(busy).unwrap().wait().await.completed, ["second"]);
    assert!(outer.wait().await.completed.is_empty());
}

/// One task after another, each spawned by the previous one into another group: there is never a moment without a task.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chain_of_tasks_across_held_groups_is_waited_for_to_its_end() {
    fn hop(groups: Arc<Vec<TaskGroup>>, left: usize) {
        let next = Arc::clone(&groups);
        let task = async move {
            if left > 0 {
                hop(next, left - 1);
            }
        };
        groups[left % groups.len()].spawn("hop", task).unwrap();
    }
    for _ in 0..200 {
        let root = TaskGroup::new();
        let groups = Arc::new(["a", "b", "c"].map(|name| root.child(name)).into_iter().collect::<Vec<_>>());
        hop(Arc::clone(&groups), 50);
        drop(root.wait().await);
        let mut completed = 0;
        for group in Arc::into_inner(groups).unwrap() {
            let result = group.wait().await;
            assert!(result.is_clean() && result.cancelled.is_empty(), "{result:?}");
            completed += result.completed.len();
        }
        assert_eq!(completed, 51);
    }
}

#[tokio::test]
async fn groups_nested_10_000_deep_are_cancelled_and_dropped() {
    let alive = Alive::default();
    let root = TaskGroup::new();
    let mut groups = vec![root.child("0")];
    for depth in 1..10_000 {
        let child = groups[depth - 1].child("below");
        groups.push(child);
    }
    let guest = alive.guest();
    groups[9_999].spawn("deepest", async move { (guest, pending::<()>().await).1 }).unwrap();
    yield_now().await;
    root.cancel_all().await;
    assert_eq!(alive.count(), 0);
    assert!(root.wait().await.is_clean());
    // From the root down: this order would recurse if a group owned the groups below it.
    drop(groups);
}

#[tokio::test]
async fn a_task_that_can_only_panic_or_loop_needs_no_type() {
    let group = TaskGroup::new();
    group
        .spawn("loops", async {
            loop {
                yield_now().await;
            }
        })
        .unwrap();
    group.spawn("panics", async { panic!("at once") }).unwrap();
    yield_now().await;
    let result = group.shutdown(LONG).await;
    assert_eq!((result.cancelled.len(), result.panicked.len()), (1, 1));
}

#[tokio::test]
async fn a_scope_waits_for_its_tasks() {
    let alive = Alive::default();
    let (value, result) = TaskGroup::scope(async |group| {
        let guest = alive.guest();
        group.spawn("inside", async { (guest, yield_now().await).1 }).unwrap();
        7
    })
    .await;
    assert_eq!((value, alive.count()), (7, 0));
    assert_eq!(result.completed, ["inside"]);
}

#[test]
fn tasks_cut_by_the_end_of_their_runtime_are_told() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut group = TaskGroup::new();
    {
        let _entered = runtime.enter();
        group.spawn("orphan", pending::<()>()).unwrap();
    }
    drop(runtime);
    let other = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (name, outcome) = other.block_on(group.join_next()).unwrap();
    assert_eq!(name, "orphan");
    assert!(matches!(outcome, TaskOutcome::Aborted));
}

#[tokio::test]
async fn a_destructor_that_panics_ends_its_task_all_the_same() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("in a destructor");
        }
    }
    let group = TaskGroup::new();
    let bomb = Bomb;
    group.spawn("bomb", async move { (bomb, pending::<()>().await).1 }).unwrap();
    yield_now().await;
    let result = group.shutdown(LONG).await;
    assert_eq!(result.panicked, [("bomb".to_owned(), "in a destructor".to_owned())]);
}

#[tokio::test]
async fn a_destructor_that_panics_after_the_end_is_the_tasks_panic() {
    struct Bomb;
    impl Future for Bomb {
        type Output = ();
        fn poll(self: std::pin::Pin<&mut Self>, _: &mut std::task::Context<'_>) -> std::task::Poll<()> {
            std::task::Poll::Ready(())
        }
    }
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("after the end");
        }
    }
    let group = TaskGroup::new();
    group.spawn("bomb", Bomb).unwrap();
    assert_eq!(group.wait().await.panicked, [("bomb".to_owned(), "after the end".to_owned())]);
}

#[tokio::test]
async fn a_task_is_told_to_have_ended_only_when_its_values_are_gone() {
    let alive = Alive::default();
    for _ in 0..1000 {
        let mut group = TaskGroup::new();
        let guest = alive.guest();
        group.spawn("owner", async move { (guest, yield_now().await).1 }).unwrap();
        group.join_next().await.unwrap();
        assert_eq!(alive.count(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_is_no_longer_than_it_is_told_whatever_was_told_before() {
    let group = TaskGroup::new();
    group.spawn_with("deaf", |_| pending::<()>()).unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(1), group.cancel_all()).await.is_err());
    let begun = Instant::now();
    let result = group.shutdown(Duration::from_secs(1)).await;
    assert_eq!(result.stragglers.len(), 1);
    assert_eq!(begun.elapsed().as_secs(), 1);
}

#[tokio::test]
async fn a_blocking_closure_that_runs_is_said_to_be_running() {
    let group = TaskGroup::new();
    let (begun, running) = tokio::sync::oneshot::channel();
    let (release, held) = mpsc::channel::<()>();
    let work = move |_: WorkerContext| {
        begun.send(()).unwrap();
        held.recv().unwrap_or_default();
    };
    group.spawn_blocking("hash", work).unwrap();
    running.await.unwrap();
    assert!(group.tasks()[0].is_inside_poll);
    drop(release);
    assert_eq!(group.wait().await.completed, ["hash"]);
}
