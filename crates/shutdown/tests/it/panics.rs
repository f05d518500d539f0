//! A panic of a worker, or of something that it owns, gives the exit code 101, wherever it comes from, and names its
//! place.

use std::fmt;
use std::future::pending;
use std::panic::panic_any;
use std::time::Duration;

use cancel_safe_shutdown::{Application, Phase, Report, Restart, StopReason, TaskGroup, TaskOutcome, WorkerContext};

/// Panics when it is dropped, unless it is a copy.
struct Bomb(bool);

impl Bomb {
    fn armed() -> Self {
        Self(true)
    }
}

impl Clone for Bomb {
    fn clone(&self) -> Self {
        Self(false)
    }
}

impl Drop for Bomb {
    fn drop(&mut self) {
        if self.0 {
            panic!("a bomb went off");
        }
    }
}

async fn cooperative(cx: WorkerContext) {
    cx.cancelled().await;
}

/// Serves the application until it ends by itself.
async fn serve(app: Application) -> Report {
    app.serve().await.unwrap()
}

fn worker<'a>(report: &'a Report, name: &str) -> &'a TaskOutcome<(), String> {
    &report.tasks().iter().find(|task| task.is_worker && task.name == name).unwrap().outcome
}

#[track_caller]
fn assert_panicked(report: &Report, name: &str) {
    assert!(worker(report, name).is_panicked(), "{report}");
    assert_eq!(report.exit_code(), 101, "{report}");
    assert!(matches!(report.reason(), StopReason::Panicked { worker } if worker == name), "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_payload_whose_destructor_panics_is_a_panic() {
    let app = Application::new("app").worker("good", cooperative);
    let app = app.worker("broken", |_: WorkerContext| async { panic_any(Bomb::armed()) });
    assert_panicked(&serve(app).await, "broken");
}

#[tokio::test(start_paused = true)]
async fn a_captured_value_that_panics_when_all_else_is_done_stops_the_application() {
    let bomb = Bomb::armed();
    let carries = move |_: WorkerContext| async move { drop(bomb) };
    let report = serve(Application::new("app").worker("good", cooperative).worker("carrier", carries)).await;
    assert_panicked(&report, "carrier");
    assert!(report.to_string().contains("a bomb went off"), "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_captured_value_that_panics_after_a_restart_is_a_panic() {
    let bomb = Bomb::armed();
    let fails = move |_: WorkerContext| async move {
        drop(bomb);
        Err::<(), _>("not yet")
    };
    let app = Application::new("app").restart(Restart::OnFailure.intensity(1, Duration::from_secs(60)));
    let report = serve(app.worker("carrier", fails)).await;
    assert!(worker(&report, "carrier").is_panicked() && report.exit_code() == 101, "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_worker_cut_with_a_value_that_panics_is_a_panic() {
    let app = Application::new("app").shutdown_timeout(Duration::from_secs(1));
    let stop = app.shutdown_handle();
    let app = app.worker_once("carrier", |_: WorkerContext| async move {
        let _bomb = Bomb::armed();
        stop.cancel();
        pending::<()>().await;
    });
    let report = serve(app).await;
    assert!(worker(&report, "carrier").is_panicked() && report.exit_code() == 101, "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_provided_value_that_panics_when_it_is_dropped_is_its_providers_panic() {
    let app = Application::new("app").phase("storage", |phase| phase.provide(|_| async { Ok(Bomb::armed()) }));
    let stop = app.shutdown_handle();
    let user = move |cx: WorkerContext| async move {
        (cx.provided::<Bomb>().is_some(), stop.cancel()).0.then_some(()).ok_or("no bomb")
    };
    let report = serve(app.phase("ingress", |phase| phase.worker_once("user", user))).await;
    assert!(worker(&report, "user").is_completed(), "{report}");
    assert!(report.tasks().iter().any(|task| task.group == "storage" && task.outcome.is_panicked()), "{report}");
    assert_eq!((report.reason(), report.exit_code()), (&StopReason::Requested, 101), "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_destructor_that_spawns_at_the_stop_gets_its_future_back_and_leaves_no_task() {
    struct Spawns(std::sync::Arc<TaskGroup>, std::sync::mpsc::Sender<bool>);
    impl Drop for Spawns {
        fn drop(&mut self) {
            self.1.send(self.0.spawn("late", pending::<()>()).is_err()).unwrap();
        }
    }
    let (send, rejected) = std::sync::mpsc::channel();
    let app = Application::new("app").shutdown_timeout(Duration::from_secs(1));
    let stop = app.shutdown_handle();
    let keeper = move |cx: WorkerContext| async move {
        let _spawns = Spawns(cx.group().into(), send);
        stop.cancel();
        pending::<()>().await;
    };
    let report = serve(app.worker_once("keeper", keeper)).await;
    assert_eq!((rejected.try_recv(), report.exit_code(), report.tasks().len()), (Ok(true), 70, 1), "{report}");
}

#[tokio::test(start_paused = true)]
async fn an_application_inside_a_worker_of_another_ends_by_itself() {
    let inner = |_: WorkerContext| async {
        let inner = Application::new("inner").worker("broken", |_: WorkerContext| async { Err::<(), _>("no more") });
        let report = inner.serve().await.map_err(|error| error.to_string())?;
        if report.exit_code() == 1 { Ok(()) } else { Err(report.to_string()) }
    };
    let report = serve(Application::new("outer").worker("outer", inner)).await;
    assert_eq!((report.reason(), report.exit_code()), (&StopReason::Completed, 0), "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_never_starts_may_panic_all_the_same() {
    let bomb = Bomb::armed();
    let app = Application::new("app").worker_once("late", move |_: WorkerContext| async move { drop(bomb) });
    app.shutdown_handle().cancel();
    let report = serve(app.worker("good", cooperative)).await;
    assert!(worker(&report, "late").is_panicked() && report.exit_code() == 101, "{report}");
    assert!(worker(&report, "good").is_cancelled(), "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_task_whose_destructor_panics_has_panicked() {
    let app = Application::new("app").worker("keeper", |cx: WorkerContext| async move {
        let group = cx.group();
        let carries = async {
            let _bomb = Bomb::armed();
            pending::<()>().await;
        };
        group.spawn("carrier", carries).map_err(|_| "closed")?;
        tokio::task::yield_now().await;
        group.cancel_all().await;
        drop(group.wait().await);
        Ok::<_, &str>(())
    });
    let report = serve(app).await;
    assert_eq!(report.exit_code(), 101, "{report}");
}

#[tokio::test(start_paused = true)]
async fn an_error_whose_text_panics_is_a_panic() {
    #[derive(Debug)]
    struct Unspeakable;
    impl fmt::Display for Unspeakable {
        fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
            panic!("no words")
        }
    }
    impl std::error::Error for Unspeakable {}
    let app = Application::new("app").worker("broken", |_: WorkerContext| async { Err::<(), _>(Unspeakable) });
    let report = serve(app).await;
    assert!(worker(&report, "broken").is_panicked() && report.exit_code() == 101, "{report}");
    assert!(report.to_string().contains("in the text of an error: no words"), "{report}");
}

#[tokio::test]
async fn the_place_of_a_panic_is_where_it_panicked() {
    fn deep() {
        panic!("deep down");
    }
    let mut group = TaskGroup::new();
    group.spawn("async", async { deep() }).unwrap();
    group.spawn_blocking("blocking", |_| deep()).unwrap();
    let line = line!() - 5;
    while let Some((name, outcome)) = group.join_next().await {
        let TaskOutcome::Panicked { message, location, .. } = outcome else { panic!("{name}: {outcome:?}") };
        assert_eq!((message.as_str(), location.line()), ("deep down", line), "{name}");
        assert!(location.file().ends_with("panics.rs"), "{location}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_payload_that_is_no_text_says_its_type() {
    let app = Application::new("app").worker("number", |_: WorkerContext| async { panic_any(42_u32) });
    let report = serve(app).await;
    assert!(report.to_string().contains("panicked: a value of type u32: 42, at "), "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_ends_too_often_under_always_stops_the_application() {
    let policy = Restart::Always.intensity(2, Duration::from_secs(60));
    let app = Application::new("app").restart(policy).worker_once("good", cooperative);
    let report = serve(app.worker("flapping", |_: WorkerContext| async {})).await;
    assert!(matches!(report.reason(), StopReason::Failed { worker } if worker == "flapping"), "{report}");
    assert_eq!(report.exit_code(), 1);
    assert!(report.to_string().contains("failed: ended again after 2 restarts within 60s"), "{report}");
}

/// A phase with a worker that fails the first time, and a worker that waits for the end.
fn flaky(phase: Phase, restart: Option<Restart>) -> Phase {
    let attempts = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
    let work = move |cx: WorkerContext| async move {
        if attempts.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0 {
            return Err("the first time");
        }
        cx.cancelled().await;
        Ok(())
    };
    let phase = phase.worker("flaky", work);
    match restart {
        Some(restart) => phase.restarted(restart),
        None => phase,
    }
}

#[tokio::test(start_paused = true)]
async fn a_worker_may_have_a_restart_policy_of_its_own() {
    for (restart, code) in [(None, 1), (Some(Restart::OnFailure), 0), (Some(Restart::Never), 1)] {
        let app = Application::new("app").phase("main", |phase| flaky(phase, restart));
        let stop = app.shutdown_handle();
        let timer = |_: WorkerContext| async move {
            tokio::time::sleep(Duration::from_secs(5)).await;
            stop.cancel();
        };
        let report = serve(app.worker_once("timer", timer)).await;
        assert_eq!(report.exit_code(), code, "{restart:?}: {report}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_tolerated_worker_fails_alone_and_is_reported() {
    async fn fails(_: WorkerContext) -> Result<(), &'static str> {
        Err("no metrics today")
    }
    async fn panics(_: WorkerContext) {
        panic!("no traces either")
    }
    let app = Application::new("app").worker("metrics", fails).tolerated().worker("traces", panics).tolerated();
    let stop = app.shutdown_handle();
    let timer = |_: WorkerContext| async move {
        tokio::time::sleep(Duration::from_secs(5)).await;
        stop.cancel();
    };
    let report = serve(app.worker_once("timer", timer)).await;
    assert_eq!((report.reason(), report.exit_code()), (&StopReason::Requested, 0), "{report}");
    assert!(report.is_clean());
    assert!(worker(&report, "metrics").is_failed() && worker(&report, "traces").is_panicked(), "{report}");
    assert!(report.tasks().iter().filter(|task| task.is_tolerated).count() == 2, "{report}");
    assert!(report.to_string().contains("no metrics today"), "{report}");

    let others = Application::new("app").worker("metrics", fails).tolerated().worker("broken", fails);
    assert_eq!(serve(others).await.exit_code(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_payload_whose_text_panics_is_a_panic() {
    #[derive(Debug)]
    struct Unspeakable;
    impl fmt::Display for Unspeakable {
        fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
            panic!("no words")
        }
    }
    impl std::error::Error for Unspeakable {}
    let group = TaskGroup::new();
    let payload: Box<dyn std::error::Error + Send + Sync> = Box::new(Unspeakable);
    group.spawn("broken", async move { panic_any(payload) }).unwrap();
    let result = group.wait().await;
    assert_eq!(result.panicked, [("broken".to_owned(), "a payload whose text panics".to_owned())]);
}

#[tokio::test(start_paused = true)]
async fn a_destructor_that_panics_with_its_executor_stops_a_group_that_fails_fast() {
    let group = TaskGroup::new().fail_fast();
    group.spawn_with("deaf", |_| pending::<()>()).unwrap();
    let local = tokio::task::LocalSet::new();
    let carries = async {
        let _bomb = Bomb::armed();
        pending::<()>().await;
    };
    local.run_until(async { group.spawn_local("carrier", carries).map_err(|_| "closed") }).await.unwrap();
    local.run_until(tokio::task::yield_now()).await;
    drop(local);
    let result = group.wait().await;
    assert_eq!((result.panicked.len(), result.stragglers.len()), (1, 1), "{result:?}");
}

/// As when its runtime ends with the closure in the queue.
#[tokio::test]
async fn a_blocking_closure_that_never_runs_is_gone_when_its_end_is_told() {
    let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build().unwrap();
    let (release, held) = std::sync::mpsc::channel::<()>();
    let (begun, running) = tokio::sync::oneshot::channel();
    let holder = runtime.spawn_blocking(move || {
        begun.send(()).unwrap();
        held.recv().unwrap_or_default();
    });
    running.await.unwrap();
    let group = TaskGroup::new();
    {
        let _inside = runtime.enter();
        let bomb = Bomb::armed();
        group.spawn_blocking("queued", move |_| drop(bomb)).map_err(|_| "closed").unwrap();
    }
    runtime.shutdown_background();
    drop(release);
    let result = group.wait().await;
    assert_eq!(result.panicked.len(), 1, "{result:?}");
    drop(holder.await);
}
