//! When an application should get work, and what its phases pass to each other.

use std::future::pending;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cancel_safe_shutdown::{Application, Readiness, Report, StopReason, TaskOutcome, WorkerContext};
use tokio::time::{Instant, sleep};

const SECOND: Duration = Duration::from_secs(1);

async fn cooperative(cx: WorkerContext) {
    cx.cancelled().await;
}

/// A pool of connections that knows whether it is open.
#[derive(Clone, Default)]
struct Pool(Arc<Mutex<Vec<&'static str>>>);

impl Pool {
    fn note(&self, what: &'static str) {
        self.0.lock().unwrap().push(what);
    }

    fn notes(&self) -> Vec<&'static str> {
        self.0.lock().unwrap().clone()
    }
}

fn outcome<'a>(report: &'a Report, name: &str) -> &'a TaskOutcome<(), String> {
    &report.tasks().iter().find(|task| task.name.contains(name)).unwrap().outcome
}

#[tokio::test(start_paused = true)]
async fn an_application_is_ready_when_its_phases_are_and_no_longer_once_it_stops() {
    let app = Application::new("app")
        .phase("storage", |phase| {
            let slow = |cx: WorkerContext| async move {
                sleep(3 * SECOND).await;
                cx.ready();
                cx.cancelled().await;
            };
            phase.worker("db", slow).ready_within(10 * SECOND)
        })
        .phase("ingress", |phase| phase.worker("http", cooperative))
        .drain_delay(5 * SECOND);
    let (mut readiness, stop) = (app.readiness(), app.shutdown_handle());
    let begun = Instant::now();
    let serving = tokio::spawn(app.serve());
    assert_eq!(*readiness.borrow(), Readiness::Starting);
    readiness.wait_for(|readiness| readiness.is_ready()).await.unwrap();
    assert_eq!(begun.elapsed(), 3 * SECOND);
    stop.cancel();
    readiness.wait_for(|readiness| *readiness == Readiness::Stopping).await.unwrap();
    // The workers continue for a while, but no more work comes.
    assert_eq!(begun.elapsed(), 3 * SECOND);
    assert_eq!(serving.await.unwrap().unwrap().exit_code(), 0);
    assert_eq!(begun.elapsed(), 8 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn an_application_that_is_stopped_before_it_is_ready_never_is() {
    let app = Application::new("app")
        .phase("storage", |phase| phase.worker("db", cooperative).ready_within(SECOND))
        .phase("ingress", |phase| phase.worker("http", cooperative));
    let mut readiness = app.readiness();
    let seen = tokio::spawn(async move {
        let mut seen = vec![*readiness.borrow_and_update()];
        while readiness.changed().await.is_ok() {
            seen.push(*readiness.borrow_and_update());
        }
        seen
    });
    let report = app.serve().await.unwrap();
    assert!(matches!(report.reason(), StopReason::NotReady { phase } if phase == "storage"), "{report}");
    assert_eq!(seen.await.unwrap(), [Readiness::Starting, Readiness::Stopping]);
}

#[tokio::test(start_paused = true)]
async fn what_a_phase_provides_is_there_for_the_next_one_and_closed_after_it() {
    let pool = Pool::default();
    let opened = pool.clone();
    let app = Application::new("app")
        .phase("storage", |phase| {
            let open = |_| async move {
                sleep(SECOND).await;
                opened.note("opened");
                Ok(opened)
            };
            phase.provide_until(open, |pool: Pool| async move { pool.note("closed") })
        })
        .phase("ingress", |phase| {
            phase.worker("http", |cx: WorkerContext| async move {
                let pool: Pool = cx.provided().ok_or("no pool")?;
                pool.note("used");
                cx.cancelled().await;
                let there = cx.provided::<Pool>().is_some();
                pool.note(if there { "used at the end" } else { "gone too early" });
                Ok::<_, &str>(())
            })
        });
    let stop = app.shutdown_handle();
    let mut readiness = app.readiness();
    let serving = tokio::spawn(app.serve());
    readiness.wait_for(|readiness| readiness.is_ready()).await.unwrap();
    sleep(SECOND).await;
    stop.cancel();
    let report = serving.await.unwrap().unwrap();
    assert_eq!(pool.notes(), ["opened", "used", "used at the end", "closed"], "{report}");
    assert_eq!(report.exit_code(), 0, "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_value_that_cannot_be_made_starts_nothing_else() {
    let app = Application::new("app")
        .phase("storage", |phase| phase.provide::<Pool, _, _>(|_| async { Err("connection refused".into()) }))
        .phase("ingress", |phase| phase.worker("http", cooperative));
    let report = app.serve().await.unwrap();
    assert_eq!(report.exit_code(), 1);
    assert!(report.to_string().contains("Pool` of `storage`: failed: connection refused"), "{report}");
    assert!(outcome(&report, "http").is_cancelled(), "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_value_that_takes_too_long_is_not_waited_for() {
    let begun = Instant::now();
    let app = Application::new("app")
        .phase("storage", |phase| phase.provide::<Pool, _, _>(|_| pending()))
        .phase("ingress", |phase| phase.worker("http", cooperative));
    let report = app.serve().await.unwrap();
    assert!(matches!(report.reason(), StopReason::NotReady { .. }), "{report}");
    assert_eq!(begun.elapsed(), 30 * SECOND);
    assert!(
        outcome(&report, "Pool").is_completed(),
        "the making was dropped, and there was nothing to close: {report}"
    );
}
