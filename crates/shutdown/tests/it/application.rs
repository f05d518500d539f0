//! Applications inside the runtime of a test: order, budgets, restarts and reports, mostly on a paused clock.

use std::future::pending;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use cancel_safe_shutdown::{
    Application, Report, Restart, StopReason, StragglerState, TaskGroup, TaskOutcome, WorkerContext,
};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::Alive;

const SECOND: Duration = Duration::from_secs(1);

/// What happened, in order, with the time since the start in seconds.
#[derive(Clone)]
struct Diary(Arc<Mutex<Vec<(String, u64)>>>, Instant);

impl Diary {
    fn new() -> Self {
        Self(Arc::default(), Instant::now())
    }

    fn note(&self, what: impl Into<String>) {
        self.0.lock().unwrap().push((what.into(), self.1.elapsed().as_secs()));
    }

    fn read(&self) -> Vec<(String, u64)> {
        std::mem::take(&mut self.0.lock().unwrap())
    }

    /// A worker that notes its start and its cancel, and takes `seconds` to end after it.
    fn worker(&self, seconds: u64) -> impl FnOnce(WorkerContext) -> Ending + Clone + use<> {
        let diary = self.clone();
        move |cx| {
            let ending: Ending = Box::pin(async move {
                diary.note(format!("{} starts", cx.name()));
                cx.ready();
                cx.cancelled().await;
                diary.note(format!("{} stops", cx.name()));
                sleep(SECOND * u32::try_from(seconds).unwrap()).await;
                diary.note(format!("{} ends", cx.name()));
            });
            ending
        }
    }
}

type Ending = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

fn entry(what: &str, second: u64) -> (String, u64) {
    (what.to_owned(), second)
}

/// Runs an application and cancels its handle after `stop_after`.
async fn serve(app: Application, stop_after: Duration) -> Report {
    let handle = app.shutdown_handle();
    let (report, ()) = tokio::join!(app.serve(), async move {
        sleep(stop_after).await;
        handle.cancel();
    });
    report.unwrap()
}

fn outcome<'a>(report: &'a Report, name: &str) -> &'a TaskOutcome<(), String> {
    let mut found = report.tasks().iter().filter(|task| task.name == name);
    let task = found.next().unwrap_or_else(|| panic!("no `{name}` in {report}"));
    assert!(found.next().is_none(), "`{name}` twice in {report}");
    &task.outcome
}

#[tokio::test(start_paused = true)]
async fn phases_start_in_order_and_stop_in_reverse() {
    let diary = Diary::new();
    let app = Application::new("app")
        .phase("storage", |phase| phase.worker("db", diary.worker(1)))
        .phase("ingress", |phase| phase.worker("http", diary.worker(2)));
    let report = serve(app, SECOND).await;

    let expected =
        [("db starts", 0), ("http starts", 0), ("http stops", 1), ("http ends", 3), ("db stops", 3), ("db ends", 4)];
    assert_eq!(diary.read(), expected.map(|(what, second)| entry(what, second)));
    assert_eq!((report.reason(), report.exit_code()), (&StopReason::Requested, 0));
    assert!(report.is_clean() && report.stragglers().next().is_none());
    assert_eq!(report.elapsed().as_secs(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_phase_is_cut_at_its_timeout_and_the_next_one_still_has_its_time() {
    let diary = Diary::new();
    let app = Application::new("app")
        .phase("storage", |phase| phase.worker("db", diary.worker(1)))
        .phase("ingress", |phase| phase.worker("http", diary.worker(100)).timeout(5 * SECOND));
    let report = serve(app, SECOND).await;

    assert_eq!(diary.read()[2..], [entry("http stops", 1), entry("db stops", 6), entry("db ends", 7)]);
    assert!(matches!(outcome(&report, "http"), TaskOutcome::Aborted));
    assert!(matches!(outcome(&report, "db"), TaskOutcome::Completed(())));
    let [straggler] = report.stragglers().collect::<Vec<_>>()[..] else { panic!("{report}") };
    assert_eq!((straggler.name.as_str(), straggler.straggling), ("http", Some(StragglerState::ParkedAtAwait)));
    assert_eq!(report.exit_code(), 70);
}

#[tokio::test(start_paused = true)]
async fn phases_are_clipped_to_what_remains_of_the_total() {
    let diary = Diary::new();
    let app = Application::new("app")
        .phase("storage", |phase| phase.worker("db", diary.worker(100)).timeout(60 * SECOND))
        .phase("ingress", |phase| phase.worker("http", diary.worker(100)).timeout(6 * SECOND))
        .shutdown_timeout(10 * SECOND);
    let begun = Instant::now();
    let report = serve(app, Duration::ZERO).await;
    assert_eq!(begun.elapsed().as_secs(), 10);
    assert_eq!(report.stragglers().count(), 2);
}

#[tokio::test(start_paused = true)]
async fn without_timeouts_phases_share_the_total() {
    let diary = Diary::new();
    let app = Application::new("app")
        .phase("storage", |phase| phase.worker("db", diary.worker(4)))
        .phase("ingress", |phase| phase.worker("http", diary.worker(100)))
        .shutdown_timeout(10 * SECOND);
    let report = serve(app, Duration::ZERO).await;
    assert_eq!(diary.read()[2..], [entry("http stops", 0), entry("db stops", 5), entry("db ends", 9)]);
    assert_eq!(report.stragglers().count(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_drain_delay_runs_inside_the_timeout() {
    let diary = Diary::new();
    let app =
        Application::new("app").worker("http", diary.worker(100)).shutdown_timeout(10 * SECOND).drain_delay(4 * SECOND);
    let begun = Instant::now();
    drop(serve(app, Duration::ZERO).await);
    assert_eq!(diary.read(), [entry("http starts", 0), entry("http stops", 4)]);
    assert_eq!(begun.elapsed().as_secs(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_phase_without_workers_leaves_the_drain_delay_to_the_one_before_it() {
    let diary = Diary::new();
    let app = Application::new("app")
        .phase("ingress", |phase| phase.worker("http", diary.worker(1)))
        .phase("extras", |phase| phase)
        .shutdown_timeout(10 * SECOND)
        .drain_delay(4 * SECOND);
    drop(serve(app, Duration::ZERO).await);
    assert_eq!(diary.read(), [entry("http starts", 0), entry("http stops", 4), entry("http ends", 5)]);
}

#[tokio::test(start_paused = true)]
async fn a_failed_start_rolls_the_earlier_phase_back_and_starts_no_later_one() {
    let diary = Diary::new();
    let app = Application::new("app")
        .phase("storage", |phase| phase.worker("db", diary.worker(1)).ready_within(SECOND))
        .phase("cache", |phase| {
            let refused = |_: WorkerContext| async { Err(std::io::Error::other("refused")) };
            phase.worker("redis", refused).ready_within(60 * SECOND)
        })
        .phase("ingress", |phase| phase.worker("http", diary.worker(1)));
    let report = app.serve().await.unwrap();

    assert_eq!(diary.read(), [entry("db starts", 0), entry("db stops", 0), entry("db ends", 1)]);
    assert_eq!(report.reason(), &StopReason::Failed { worker: "redis".into() });
    assert!(matches!(outcome(&report, "redis"), TaskOutcome::Failed(cause) if cause == "refused"));
    assert!(matches!(outcome(&report, "http"), TaskOutcome::Cancelled));
    assert_eq!(report.exit_code(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_phase_that_is_not_ready_in_time_stops_the_application() {
    let diary = Diary::new();
    let app = Application::new("app")
        .phase("storage", |phase| {
            phase.worker("db", |cx: WorkerContext| async move { cx.cancelled().await }).ready_within(3 * SECOND)
        })
        .phase("ingress", |phase| phase.worker("http", diary.worker(1)));
    let report = app.serve().await.unwrap();
    assert_eq!(report.reason(), &StopReason::NotReady { phase: "storage".into() });
    assert_eq!((diary.read(), report.exit_code()), (vec![], 1));
}

#[tokio::test]
async fn an_application_ends_when_its_workers_have_completed() {
    let report = Application::new("app").worker("one", |_: WorkerContext| async {}).serve().await.unwrap();
    assert_eq!((report.reason(), report.exit_code()), (&StopReason::Completed, 0));
    let report = Application::new("none").serve().await.unwrap();
    assert_eq!((report.reason(), report.tasks().len()), (&StopReason::Completed, 0));
}

#[tokio::test]
async fn plain_closures_over_a_token_are_workers() {
    let mut app = Application::new("app");
    app.add_worker("database", |cancel: CancellationToken| async move { cancel.cancelled().await });
    let shutdown = app.shutdown_handle();
    app.add_worker("health-check", move |_cancel| async move { shutdown.cancel() });
    let report = app.serve().await.unwrap();
    assert_eq!((report.tasks().len(), report.is_clean()), (2, true));
}

#[tokio::test]
async fn a_handle_cancelled_before_the_start_starts_nothing() {
    let diary = Diary::new();
    let app = Application::new("app").worker("late", diary.worker(0));
    app.shutdown_handle().cancel();
    let report = app.serve().await.unwrap();
    assert!(diary.read().is_empty() && matches!(outcome(&report, "late"), TaskOutcome::Cancelled));
    assert_eq!((report.reason(), report.exit_code()), (&StopReason::Requested, 0));
}

#[tokio::test(start_paused = true)]
async fn the_first_reason_wins() {
    let second = |cx: WorkerContext| async move {
        cx.cancelled().await;
        assert_eq!(cx.reason(), Some(StopReason::Failed { worker: "first".into() }));
        Err(std::io::Error::other("also"))
    };
    let app = Application::new("app")
        .worker("first", |_: WorkerContext| async { Err(std::io::Error::other("the cause")) })
        .worker("second", second);
    let report = app.serve().await.unwrap();
    assert_eq!(report.reason(), &StopReason::Failed { worker: "first".into() });
    assert!(matches!(outcome(&report, "second"), TaskOutcome::Failed(cause) if cause == "also"));
}

#[tokio::test(start_paused = true)]
async fn a_worker_is_restarted_until_it_succeeds() {
    let attempts = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&attempts);
    let flaky = move |_: WorkerContext| async move {
        match counted.fetch_add(1, Ordering::SeqCst) {
            0 => Err(std::io::Error::other("once")),
            1 => panic!("twice"),
            _ => Ok(()),
        }
    };
    let report = Application::new("app").restart(Restart::OnFailure).worker("flaky", flaky).serve().await.unwrap();
    assert_eq!((attempts.load(Ordering::SeqCst), report.exit_code()), (3, 0));
}

#[tokio::test(start_paused = true)]
async fn past_the_intensity_a_failure_escalates() {
    let attempts = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&attempts);
    let broken = move |_: WorkerContext| async move {
        counted.fetch_add(1, Ordering::SeqCst);
        panic!("every time");
    };
    let policy = Restart::OnFailure.intensity(3, 3600 * SECOND).backoff(SECOND, 2 * SECOND);
    let begun = Instant::now();
    let report =
        Application::new("app").phase("p", |p| p.restart(policy).worker("broken", broken)).serve().await.unwrap();
    assert_eq!((attempts.load(Ordering::SeqCst), report.exit_code()), (4, 101));
    assert_eq!(report.reason(), &StopReason::Panicked { worker: "broken".into() });
    // 1 s, 2 s and 2 s, each less up to a half.
    assert!(begun.elapsed() >= Duration::from_millis(2500) && begun.elapsed() <= 5 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_restarted_while_stopping() {
    let attempts = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&attempts);
    let work = move |cx: WorkerContext| async move {
        counted.fetch_add(1, Ordering::SeqCst);
        cx.cancelled().await;
    };
    let report = serve(Application::new("app").restart(Restart::Always).worker("worker", work), SECOND).await;
    assert_eq!((attempts.load(Ordering::SeqCst), report.exit_code()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn the_tasks_of_a_workers_group_are_in_the_report_once() {
    let alive = Alive::default();
    let (guest, child_guest) = (alive.guest(), alive.guest());
    let work = |cx: WorkerContext| async move {
        let mut group = cx.group();
        group.spawn("done", async {}).unwrap();
        group.join_next().await.unwrap();
        group.spawn("parked", async move { (guest, pending::<()>().await).1 }).unwrap();
        let deaf = |_| async move { (child_guest, pending::<()>().await).1 };
        let child = group.child("nested");
        child.spawn_with("deaf", deaf).unwrap();
        drop(child.wait().await);
        drop(group.wait().await);
    };
    let report = serve(Application::new("app").worker_once("http", work).shutdown_timeout(2 * SECOND), SECOND).await;
    assert!(matches!(outcome(&report, "done"), TaskOutcome::Completed(())));
    assert!(matches!(outcome(&report, "parked"), TaskOutcome::Cancelled));
    assert!(matches!(outcome(&report, "deaf"), TaskOutcome::Aborted));
    let deaf = report.tasks().iter().find(|task| task.name == "deaf").unwrap();
    assert_eq!((deaf.group.as_str(), deaf.is_worker), ("http/nested", false));
    assert_eq!((report.exit_code(), alive.count()), (70, 0));
}

#[tokio::test]
async fn the_report_keeps_the_latest_tasks_and_counts_the_others() {
    let work = |cx: WorkerContext| async move {
        let mut group = cx.group();
        for number in 0..3000 {
            group.spawn(format!("{number}"), async {}).unwrap();
            group.join_next().await.unwrap();
        }
    };
    let report = Application::new("app").worker("server", work).serve().await.unwrap();
    assert_eq!((report.tasks().len(), report.unlisted()), (1025, 3000 - 1024));
    assert_eq!(report.tasks().last().unwrap().name, "2999");
}

#[tokio::test(start_paused = true)]
async fn dropping_serve_drops_the_workers() {
    let alive = Alive::default();
    let guest = alive.guest();
    let work = |_: WorkerContext| async move { (guest, pending::<()>().await).1 };
    let app = Application::new("app").worker_once("worker", work);
    tokio::time::timeout(SECOND, app.serve()).await.unwrap_err();
    while alive.count() > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn the_callbacks_get_the_report_and_the_last_word_on_the_code() {
    let (send, told) = mpsc::channel();
    let app = Application::new("app")
        .worker("one", |_: WorkerContext| async {})
        .exit_code(|report| (report.reason() == &StopReason::Completed).then_some(65))
        .on_report(move |report| send.send((report.name().to_owned(), report.exit_code())).unwrap());
    assert_eq!(app.serve().await.unwrap().exit_code(), 65);
    assert_eq!(told.recv().unwrap(), ("app".to_owned(), 65));
}

#[test]
fn a_callback_that_panics_is_a_panic_and_keeps_no_report_from_being_told() {
    // Past the panic hook: printing a backtrace may take longer than the wait for a callback.
    fn panics() -> ! {
        std::panic::resume_unwind(Box::new("in a callback"))
    }
    let app = || Application::new("app").worker("one", |_: WorkerContext| async {});
    assert_eq!(app().on_report(move |_| panics()).run(), std::process::ExitCode::from(101));

    let (send, told) = mpsc::channel();
    let app = app().exit_code(move |_| panics()).on_report(move |report| send.send(report.exit_code()).unwrap());
    assert_eq!(app.run(), std::process::ExitCode::from(101));
    assert_eq!(told.recv(), Ok(101));
}

#[tokio::test]
async fn a_callback_that_panics_after_a_cut_leaves_the_code_of_the_cut() {
    let app = Application::new("app").shutdown_timeout(Duration::from_millis(1)).on_report(|_| panic!("in a callback"));
    let app = app.exit_code(|_| panic!("nobody asks for a code")).worker("deaf", |_: WorkerContext| pending::<()>());
    assert_eq!(serve(app, Duration::from_millis(1)).await.exit_code(), 70);
}

/// Nothing overflows, and nothing waits for a phase without any time.
#[tokio::test(start_paused = true)]
async fn times_of_zero_and_times_without_an_end_are_times() {
    for time in [Duration::ZERO, Duration::MAX] {
        let policy = Restart::OnFailure.intensity(3, time).backoff(time, time);
        let cooperative = |cx: WorkerContext| async move { cx.cancelled().await };
        let app = Application::new("app").shutdown_timeout(time).second_signal_after(time).restart(policy);
        let app = app.phase("first", |phase| phase.worker("one", cooperative).timeout(time));
        let app = app.phase("last", |phase| phase.worker("two", cooperative).timeout(time));
        let report = serve(app, SECOND).await;
        assert_eq!((report.reason(), report.exit_code()), (&StopReason::Requested, 0), "{time:?}: {report}");
        assert!(report.tasks().iter().all(|task| task.outcome.is_completed()), "{time:?}: {report}");
        assert!(report.elapsed() < SECOND, "{time:?}: {report}");

        let app = Application::new("app").phase("late", |phase| phase.worker("one", cooperative).ready_within(time));
        let report = serve(app, SECOND).await;
        let late = StopReason::NotReady { phase: "late".to_owned() };
        assert_eq!(report.reason(), if time.is_zero() { &late } else { &StopReason::Requested }, "{report}");

        let group = TaskGroup::new().grace(time);
        group.spawn_with("one", cooperative).unwrap();
        tokio::task::yield_now().await;
        group.cancel_all().await;
        assert_eq!(group.wait().await.completed, ["one"], "{time:?}");
    }
}

/// The report is printed and returned although no thread is left to wait for the callbacks.
#[test]
fn serve_ends_in_time_although_a_straggler_holds_the_last_blocking_thread() {
    let (release, held) = mpsc::channel::<()>();
    let (send, told) = mpsc::channel();
    // One that had not begun would be called off.
    let (begin, begun) = tokio::sync::oneshot::channel();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
    let work = |cx: WorkerContext| async move {
        let group = cx.group();
        let hash = move |_| {
            begin.send(()).unwrap();
            held.recv().unwrap_or_default();
        };
        group.spawn_blocking("hash", hash).unwrap();
        drop(group.wait().await);
    };
    let app = Application::new("app")
        .worker_once("hasher", work)
        .shutdown_timeout(Duration::from_millis(50))
        .on_report(move |report| send.send(report.exit_code()).unwrap());
    let handle = app.shutdown_handle();
    let report = runtime.block_on(async {
        let stop = async move {
            begun.await.unwrap();
            handle.cancel();
        };
        let served = tokio::time::timeout(60 * SECOND, async { tokio::join!(app.serve(), stop).0.unwrap() });
        served.await.expect("it waits for the closure")
    });
    assert_eq!((report.exit_code(), told.recv().unwrap()), (70, 70));
    assert_eq!(outcome(&report, "hash"), &TaskOutcome::Abandoned);
    drop(release);
}
