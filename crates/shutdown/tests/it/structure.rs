//! Structure: a scope whose body fails, groups that fail fast, and groups that keep no outcomes.

use std::future::pending;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use cancel_safe_shutdown::{Application, StopReason, TaskCounts, TaskGroup, TaskOutcome, WorkerContext};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep};

use crate::Alive;

const LONG: Duration = Duration::from_secs(3600);

/// A body that spawns a task for ever, and one that takes a second to clean up.
fn populate(group: &TaskGroup, alive: &Alive) {
    let (one, two) = (alive.guest(), alive.guest());
    group.spawn("server", async move { (one, pending::<()>().await).1 }).unwrap();
    group
        .spawn_with("tidy", move |cx| async move {
            cx.cancelled().await;
            sleep(Duration::from_secs(1)).await;
            drop(two);
        })
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_scope_whose_body_fails_cancels_its_tasks_with_their_grace() {
    let alive = Alive::default();
    let begun = Instant::now();
    let (value, result) = TaskGroup::scope(async |group| {
        populate(group, &alive);
        yield_now().await;
        Err::<(), _>("could not bind")?;
        Ok::<_, &str>(())
    })
    .await;
    assert_eq!((value, alive.count()), (Err("could not bind"), 0));
    assert_eq!((result.completed, result.cancelled), (vec!["tidy".to_owned()], vec!["server".to_owned()]));
    assert_eq!(begun.elapsed(), Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn a_scope_whose_body_panics_cancels_its_tasks_and_panics_when_they_have_ended() {
    let alive = Alive::default();
    let scope = TaskGroup::scope(async |group| {
        populate(group, &alive);
        yield_now().await;
        panic!("in the body")
    });
    let caught = futures_util::FutureExt::catch_unwind(AssertUnwindSafe(scope)).await.map(drop);
    assert_eq!(caught.unwrap_err().downcast_ref::<&str>(), Some(&"in the body"));
    assert_eq!(alive.count(), 0, "the panic went on before the tasks had ended");
}

#[tokio::test(start_paused = true)]
async fn a_try_scope_returns_what_its_body_returned() {
    let alive = Alive::default();
    let fine = TaskGroup::try_scope(async |group| {
        group.spawn("task", async {}).map_err(|_| "closed")?;
        Ok::<_, &str>(7)
    });
    assert_eq!(fine.await, Ok(7));
    let failed = TaskGroup::try_scope(async |group| {
        populate(group, &alive);
        Err::<(), _>("no")
    });
    assert_eq!((failed.await, alive.count()), (Err("no"), 0));
}

#[tokio::test]
#[should_panic(expected = "task `broken` of a scope panicked: by itself")]
async fn a_try_scope_does_not_swallow_the_panic_of_a_task() {
    let scope = TaskGroup::try_scope(async |group| {
        group.spawn("broken", async { panic!("by itself") }).map_err(|_| "closed")?;
        Ok::<_, &str>(())
    });
    scope.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_first_failure_of_a_group_that_fails_fast_cancels_the_others_and_is_its_result() {
    let alive = Alive::default();
    let group = TaskGroup::<(), String>::with_results().fail_fast().grace(Duration::from_secs(5));
    let (guest, below) = (alive.guest(), alive.guest());
    group.spawn("reader", async { (sleep(Duration::from_secs(1)).await, Err("end of file".to_owned())).1 }).unwrap();
    group.spawn("writer", async move { (guest, pending::<()>().await).1 }).unwrap();
    group
        .spawn_with("told", move |cx| async move {
            cx.cancelled().await;
            match cx.reason() {
                Some(StopReason::Failed { worker }) => Err(format!("because of {worker}")),
                other => panic!("{other:?}"),
            }
        })
        .unwrap();
    let child = group.child("below");
    child.spawn("nested", async move { (below, pending::<()>().await).1 }).unwrap();
    let begun = Instant::now();
    let result = group.wait().await;
    assert_eq!((begun.elapsed(), alive.count()), (Duration::from_secs(1), 0));
    assert_eq!((&result.cancelled[..], result.failed.len()), (&["writer".to_owned()][..], 2));
    let failure = result.into_result().unwrap_err();
    assert_eq!((failure.name(), failure.is_panic()), ("reader", false));
    assert_eq!(failure.into_error(), Ok("end of file".to_owned()));
    assert_eq!(child.wait().await.cancelled, ["nested"]);
}

#[tokio::test]
async fn a_panic_is_a_failure_too_and_closes_its_group_before_anybody_learns_of_it() {
    let mut group = TaskGroup::new().fail_fast();
    group.spawn("broken", async { panic!("bug") }).unwrap();
    group.spawn("sibling", pending::<()>()).unwrap();
    let (name, outcome) = group.join_next().await.unwrap();
    assert!(name == "broken" && outcome.is_panicked(), "{name} {outcome:?}");
    assert!(group.spawn("late", async {}).is_err(), "the group is still open");
    let result = group.wait().await;
    assert_eq!((result.counts.panicked, result.counts.cancelled), (1, 1));
}

#[tokio::test]
async fn a_failed_closure_fails_its_group() {
    let group = TaskGroup::new().fail_fast();
    group.spawn_blocking("hash", |_| Err("no memory".into())).unwrap();
    group.spawn("sibling", pending::<()>()).unwrap();
    let failure = group.wait().await.into_result().unwrap_err();
    assert_eq!(failure.to_string(), "task `hash` failed: no memory");
}

#[tokio::test]
async fn without_fail_fast_a_failure_disturbs_nobody() {
    let group = TaskGroup::new();
    group.spawn("broken", async { panic!("bug") }).unwrap();
    group.spawn("failed", async { Err("no".into()) }).unwrap();
    group.spawn("sibling", sleep(Duration::from_millis(5))).unwrap();
    let result = group.wait().await;
    assert_eq!(result.completed, ["sibling"]);
    let failure = result.into_result().unwrap_err();
    assert!(failure.is_panic() && failure.to_string() == "task `broken` panicked: bug");
}

#[tokio::test]
async fn a_discarding_group_keeps_counts_and_the_latest_failures() {
    let mut group = TaskGroup::discarding();
    for number in 0..3000 {
        group.spawn("fine", async {}).unwrap();
        group.spawn(format!("failure {number}"), async { Err("no".into()) }).unwrap();
    }
    group.spawn("broken", async { panic!("bug") }).unwrap();
    let mut read = Vec::new();
    while let Some((name, outcome)) = group.join_next().await {
        assert!(!outcome.is_completed(), "{name} was kept");
        read.push(name);
    }
    // Some were read before the others had ended; the last 1,024 are always there.
    assert!(read.len() >= 1024 && read.contains(&"failure 2999".to_owned()) && read.contains(&"broken".to_owned()));
    let mut counts = TaskCounts::default();
    (counts.completed, counts.failed, counts.panicked) = (3000, 3000, 1);
    assert_eq!(group.counts(), counts);
    let result = group.wait().await;
    assert!(result.is_clean() && result.completed.is_empty() && result.counts == counts);
}

#[tokio::test(start_paused = true)]
async fn a_discarding_group_names_its_stragglers() {
    let group = TaskGroup::discarding();
    group.spawn_with("deaf", |_| pending::<()>()).unwrap();
    group.spawn("plain", pending::<()>()).unwrap();
    yield_now().await;
    let result = group.shutdown(Duration::from_secs(1)).await;
    assert_eq!((result.stragglers.len(), result.counts.stragglers), (1, 1));
    assert_eq!((result.stragglers[0].name.as_str(), result.counts.cancelled), ("deaf", 1));
    assert!(result.cancelled.is_empty());
}

/// The loop of the crate's front page, with connections that end at once.
async fn accept(connections: &TaskGroup, count: usize) {
    for number in 0..count {
        connections.spawn(format!("connection {number}"), async {}).unwrap();
        if number.is_multiple_of(16) {
            yield_now().await;
        }
    }
}

/// The memory of this process, in KiB.
#[cfg(target_os = "linux")]
fn resident_kib() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4
}

/// What to do with the outcomes of many tasks.
#[cfg(target_os = "linux")]
#[derive(Debug, Clone, Copy, PartialEq)]
enum Outcomes {
    Discarded,
    /// Read each one right after its task was spawned.
    Read,
    Kept,
}

/// How much memory 200,000 tasks leave behind. It runs in its own process, because other tests allocate too.
#[cfg(target_os = "linux")]
#[expect(clippy::print_stdout, reason = "it is how the child tells")]
fn grown_kib(outcomes: Outcomes) -> usize {
    if std::env::var_os("GROUP_MEMORY_CHILD").is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut group = if outcomes == Outcomes::Discarded { TaskGroup::discarding() } else { TaskGroup::new() };
        let before = runtime.block_on(async {
            let mut before = 0;
            for count in [2000, 200_000] {
                before = resident_kib();
                if outcomes != Outcomes::Read {
                    accept(&group, count).await;
                    continue;
                }
                for number in 0..count {
                    group.spawn(format!("connection {number}"), async {}).unwrap();
                    assert!(group.join_next().await.is_some_and(|(_, outcome)| outcome.is_completed()));
                }
            }
            before
        });
        println!("GROWN {} KIB", resident_kib().saturating_sub(before));
        return 0;
    }
    let name = std::thread::current().name().unwrap().to_owned();
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args([name.as_str(), "--exact", "--nocapture"])
        .env("GROUP_MEMORY_CHILD", "")
        .output()
        .unwrap();
    let out = String::from_utf8(child.stdout).unwrap();
    let grown = out.split("GROWN ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or_else(|| panic!("{out}"));
    grown.parse().unwrap()
}

#[cfg(target_os = "linux")]
#[test]
fn two_hundred_thousand_connections_leave_nothing_in_a_discarding_group() {
    let grown = grown_kib(Outcomes::Discarded);
    assert!(grown < 2048, "{grown} KiB");
}

#[cfg(target_os = "linux")]
#[test]
fn two_hundred_thousand_outcomes_read_in_turn_leave_nothing_in_a_group() {
    let grown = grown_kib(Outcomes::Read);
    assert!(grown < 2048, "{grown} KiB");
}

/// The broken twin, which the checks above must catch.
#[cfg(target_os = "linux")]
#[test]
fn a_group_that_keeps_outcomes_grows_and_is_caught() {
    if std::env::var_os("GROUP_MEMORY_CHILD").is_some() {
        grown_kib(Outcomes::Kept);
        return;
    }
    let grown = grown_kib(Outcomes::Kept);
    assert!(grown > 8192, "{grown} KiB");
}

/// The exit code of an application whose worker has a task that panics.
async fn exit_code<F>(worker: impl FnOnce(TaskGroup) -> F + Clone + Send + 'static) -> u8
where
    F: Future<Output = ()> + Send + 'static,
{
    let app = Application::new("app").worker("worker", |cx: WorkerContext| async move {
        let group = cx.group();
        group.spawn("job", async { panic!("bug") }).unwrap();
        worker(group).await;
    });
    let report = tokio::time::timeout(LONG, app.serve()).await.unwrap().unwrap();
    assert_eq!(report.is_clean(), report.exit_code() == 0);
    report.exit_code()
}

#[tokio::test]
async fn a_panic_in_a_workers_task_is_101_unless_it_was_read() {
    assert_eq!(exit_code(|group| async move { drop(group.wait().await) }).await, 101);
    assert_eq!(
        exit_code(|group| async move {
            sleep(Duration::from_millis(5)).await;
            drop(group)
        })
        .await,
        101
    );
    let joined = |mut group: TaskGroup| async move {
        assert!(matches!(group.join_next().await, Some((_, TaskOutcome::Panicked { .. }))));
        drop(group.wait().await);
    };
    assert_eq!(exit_code(joined).await, 0);
    assert_eq!(exit_code(|group| async move { assert!(!group.wait().await.is_clean()) }).await, 0);
    assert_eq!(exit_code(|group| async move { drop(group.wait().await.into_result().unwrap_err()) }).await, 0);
}
