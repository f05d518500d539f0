//! Applications inside a test: stopped, timed by a paused clock, and their reports compared.

use std::future::pending;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cancel_safe_shutdown::{
    Application, Readiness, Report, Restart, Signal, StopReason, StragglerState, TestRun, WorkerContext,
};
use cancel_safe_testing::{Explore, Outcome};
use tokio::time::{Instant, sleep};

use crate::Alive;

const SECOND: Duration = Duration::from_secs(1);

/// A worker that takes `seconds` to end.
fn drain(seconds: u32) -> impl FnOnce(WorkerContext) -> BoxFuture + Clone + Send {
    move |cx: WorkerContext| {
        Box::pin(async move {
            cx.cancelled().await;
            cx.mark("draining");
            sleep(seconds * SECOND).await;
        })
    }
}

type BoxFuture = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

fn shop() -> Application {
    Application::new("shop")
        .phase("storage", |phase| phase.worker("pool", drain(1)))
        .phase("ingress", |phase| phase.worker("http", drain(2)))
}

async fn terminated(application: Application) -> Report {
    let mut run = TestRun::start(application).unwrap();
    assert!(run.ready().await);
    run.terminate();
    run.ended().await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_stop_takes_exactly_the_time_of_its_phases_and_two_runs_are_equal() {
    let report = terminated(shop()).await;
    assert_eq!((report.exit_code(), report.elapsed()), (0, 3 * SECOND), "{report}");
    assert_eq!(report.reason(), &StopReason::Signal(15));
    assert_eq!(terminated(shop()).await, report);
    // It looks the same, but is not: the storage takes a second more.
    let slower = Application::new("shop").phase("storage", |phase| phase.worker("pool", drain(2)));
    assert_ne!(terminated(slower.phase("ingress", |phase| phase.worker("http", drain(2)))).await, report);
}

#[tokio::test(start_paused = true)]
async fn a_straggler_is_cut_at_its_deadline_and_looks_the_same_each_time() {
    let run = || {
        let deaf = |cx: WorkerContext| async move {
            cx.mark("deaf");
            pending::<()>().await;
        };
        terminated(
            shop().shutdown_timeout(5 * SECOND).phase("last", |phase| phase.worker("deaf", deaf).timeout(SECOND)),
        )
    };
    let report = run().await;
    let deaf = report.task("deaf").unwrap();
    assert_eq!((report.exit_code(), deaf.straggling), (70, Some(StragglerState::ParkedAtAwait)), "{report}");
    assert_eq!(deaf.last_mark.as_deref(), Some("deaf"));
    // The two checks of what to cut are some milliseconds apart.
    assert!((4 * SECOND..4 * SECOND + Duration::from_millis(25)).contains(&report.elapsed()), "{report}");
    for _ in 0..5 {
        assert_eq!(run().await, report);
    }
}

#[tokio::test(start_paused = true)]
async fn restarts_and_failures_are_the_same_on_a_paused_clock() {
    let flaky = |_: WorkerContext| async { Err::<(), _>("no disk") };
    let policy = Restart::OnFailure.intensity(2, 60 * SECOND);
    let mut run = TestRun::start(shop().restart(policy).worker("flaky", flaky)).unwrap();
    assert!(run.ready().await);
    let report = run.ended().await.unwrap();
    assert_eq!(report.reason(), &StopReason::Failed { worker: "flaky".to_owned() });
    assert_eq!((report.exit_code(), report.elapsed()), (1, 3 * SECOND), "{report}");
}

#[tokio::test(start_paused = true)]
async fn copies_of_a_signal_are_one_and_a_later_one_ends_the_grace() {
    let mut run = TestRun::start(Application::new("shop").worker("deaf", drain(20))).unwrap();
    assert!(run.ready().await);
    run.terminate();
    let begun = Instant::now();
    sleep(Duration::from_millis(999)).await;
    run.terminate();
    assert_eq!(run.readiness(), Readiness::Stopping);
    sleep(Duration::from_millis(1)).await;
    run.interrupt();
    let report = run.ended().await.unwrap();
    assert_eq!((report.exit_code(), report.reason()), (70, &StopReason::Signal(15)), "{report}");
    assert!(begun.elapsed() < 2 * SECOND, "the grace went on for {:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_drain_delay_is_for_those_who_wait_for_a_load_balancer() {
    let app = || shop().drain_delay(5 * SECOND);
    assert_eq!(terminated(app()).await.elapsed(), 8 * SECOND);
    let mut run = TestRun::start(app()).unwrap();
    run.ready().await;
    run.interrupt();
    assert_eq!(run.ended().await.unwrap().elapsed(), 3 * SECOND);
    let run = TestRun::start(app()).unwrap();
    run.request_stop();
    assert_eq!(run.ended().await.unwrap().elapsed(), Duration::ZERO, "it stopped before it had started anything");
}

#[tokio::test(start_paused = true)]
async fn an_application_that_never_becomes_ready_says_so() {
    let app = shop().phase("last", |phase| phase.worker("slow", drain(0)).ready_within(3 * SECOND));
    let mut run = TestRun::start(app).unwrap();
    assert_eq!(run.readiness(), Readiness::Starting);
    assert!(!run.ready().await);
    let report = run.ended().await.unwrap();
    assert_eq!(report.reason(), &StopReason::NotReady { phase: "last".to_owned() });
}

#[tokio::test(start_paused = true)]
async fn a_signal_that_does_not_stop_runs_its_actions_at_once() {
    let reloads = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&reloads);
    let app = shop().on_signal(Signal::Hangup, move |cx| {
        assert_eq!(cx.signal(), Signal::Hangup);
        counted.fetch_add(1, Ordering::SeqCst);
    });
    let mut run = TestRun::start(app).unwrap();
    run.raise(Signal::Hangup);
    run.raise(Signal::User1);
    assert_eq!(reloads.load(Ordering::SeqCst), 1);
    assert!(run.ready().await);
    assert_eq!(run.readiness(), Readiness::Ready);
}

#[tokio::test(start_paused = true)]
async fn the_callbacks_of_the_application_are_told_and_may_set_the_code() {
    let told = Arc::new(Mutex::new(None));
    let heard = Arc::clone(&told);
    let app = shop().exit_code(|_| Some(9)).on_report(move |report| *heard.lock().unwrap() = Some(report.clone()));
    let report = terminated(app).await;
    assert_eq!(report.exit_code(), 9);
    assert_eq!(told.lock().unwrap().as_ref(), Some(&report));
}

#[test]
fn a_dropped_run_leaves_no_worker_behind() {
    let report = Explore::new().paused_time(true).run(
        async || Alive::default(),
        async |alive| {
            let guest = alive.guest();
            let worker = |cx: WorkerContext| async move {
                cx.cancelled().await;
                sleep(SECOND).await;
                drop(guest);
            };
            let mut run = TestRun::start(Application::new("shop").worker_once("worker", worker)).unwrap();
            let ready = run.ready().await && run.ready().await;
            run.terminate();
            ready && run.ended().await.unwrap().is_clean()
        },
        async |alive, outcome| {
            for _ in 0..100 {
                if alive.count() == 0 && !matches!(outcome, Outcome::Completed(false)) {
                    return Ok(());
                }
                tokio::task::yield_now().await;
            }
            Err(format!("{outcome:?}, {} workers", alive.count()))
        },
    );
    report.publish("shutdown", "TestRun").assert_clean();
}
