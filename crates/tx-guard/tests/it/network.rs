//! Many drops at once over a network: no session is lost, and the locks are free soon.
//!
//! The assertions are generous, because the machine may be busy; the bench `storm` measures. By default a hundred drops
//! at round trips of 0 and 20 ms; `CANCEL_SAFE_CAMPAIGN=full` makes storms of a thousand, and of 60 ms.

pub(crate) mod storm;

use std::time::Duration;

use cancel_safe_campaign::{publish_campaign, publish_not_run};
use sqlx::{MySql, Postgres};
use tokio::sync::Mutex;

use self::storm::{Doing, Report, Stormy, quantile, storm};
use crate::world::TestDb;

/// The time that a busy machine may need. The aim is a tenth of it.
const SOON: Duration = Duration::from_secs(2);

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// The faults in a report.
fn faults(report: &Report) -> Vec<String> {
    let mut faults = Vec::new();
    if report.lost > 0 || report.terminated > 0 {
        let Report { lost, terminated, cancels, missed, .. } = report;
        faults.push(format!(
            "{lost} sessions were lost, {terminated} terminated, {cancels} cancels, {missed} events missed"
        ));
    }
    for (what, times) in [("locks", &report.locks), ("slots", &report.slots)] {
        let (half, last) = (quantile(times, 0.5), quantile(times, 1.0));
        if last > SOON {
            faults.push(format!("the {what} were free after {half:?} (half of them) and {last:?} (all)"));
        }
    }
    faults
}

async fn a_storm_loses_no_session_and_holds_no_lock<D: Stormy + TestDb>(round_trip: Duration) {
    let (_place, options) = D::place();
    for doing in [Doing::Running, Doing::Idle] {
        let report = storm::<D>(&options, 100, round_trip, doing).await;
        let faults = faults(&report);
        assert!(faults.is_empty(), "100 drops at {round_trip:?}, {doing:?}: {}", faults.join("; "));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_loses_no_session_and_holds_no_lock_on_postgres() {
    a_storm_loses_no_session_and_holds_no_lock::<Postgres>(millis(0)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_loses_no_session_and_holds_no_lock_on_mysql() {
    a_storm_loses_no_session_and_holds_no_lock::<MySql>(millis(0)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_far_from_the_server_loses_no_session_and_holds_no_lock_on_postgres() {
    a_storm_loses_no_session_and_holds_no_lock::<Postgres>(millis(20)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_far_from_the_server_loses_no_session_and_holds_no_lock_on_mysql() {
    a_storm_loses_no_session_and_holds_no_lock::<MySql>(millis(20)).await;
}

/// How many of a hundred drops of idle guards may send a cancel: a guard whose thread is suspended for three
/// milliseconds between two lines looks as if it were reading rows, and such a cancel does no harm. If the grace is too
/// short for the round trip to the server, all hundred do.
const UNLUCKY: usize = 10;

/// Where nothing runs there is nothing to cancel, however far away the server is.
async fn no_cancel_is_sent_for_idle_guards<D: Stormy + TestDb>() {
    let (_place, options) = D::place();
    let report = storm::<D>(&options, 100, millis(20), Doing::Idle).await;
    let slowest = quantile(&report.locks, 1.0);
    assert!(report.cancels <= UNLUCKY && report.missed == 0, "{} cancels, {slowest:?}", report.cancels);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_cancel_is_sent_for_idle_guards_on_postgres() {
    no_cancel_is_sent_for_idle_guards::<Postgres>().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_cancel_is_sent_for_idle_guards_on_mysql() {
    no_cancel_is_sent_for_idle_guards::<MySql>().await;
}

/// Whether there are enough files: each of a thousand connections takes three in this process and in the server.
#[cfg(target_os = "linux")]
fn has_files_for_all() -> bool {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let files =
        limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next()?.parse().ok());
    files.is_some_and(|files: u64| files >= 4_000)
}

#[cfg(not(target_os = "linux"))]
fn has_files_for_all() -> bool {
    false
}

/// The storms that are too big for everyday runs, one after another, whatever the database: two storms of a thousand at
/// the same time keep two processors busy for longer than the two seconds after which a session that has not come to
/// rest is ended.
#[expect(clippy::print_stdout, reason = "a campaign says what it has seen")]
async fn big_storms_lose_no_session_and_hold_no_lock<D: Stormy + TestDb>(database: &str) {
    static ONE: Mutex<()> = Mutex::const_new(());
    if std::env::var("CANCEL_SAFE_CAMPAIGN").is_ok_and(|form| form == "full") {
        let _one = ONE.lock().await;
        let (_place, options) = D::place();
        let (mut drops, mut wrong) = (0, Vec::new());
        for many in [100, 1_000] {
            if many == 1_000 && !has_files_for_all() {
                publish_not_run("tx-guard", &format!("storms/{database}"), "a process may not open 4,000 files");
                continue;
            }
            for round_trip in [0, 20, 60].map(millis) {
                let report = storm::<D>(&options, many, round_trip, Doing::Running).await;
                let [half, most] = [0.5, 0.99].map(|q| quantile(&report.locks, q));
                println!("{database}: {many} drops at {round_trip:?}: locks free after {half:?} (p50), {most:?} (p99)");
                drops += usize::try_from(many).unwrap();
                wrong.extend(
                    faults(&report).into_iter().map(|fault| format!("{many} drops at {round_trip:?}: {fault}")),
                );
            }
        }
        publish_campaign("tx-guard", &format!("storms/{database}"), drops, wrong.len());
        assert!(wrong.is_empty(), "{database}: {wrong:#?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn big_storms_lose_no_session_and_hold_no_lock_on_postgres() {
    big_storms_lose_no_session_and_hold_no_lock::<Postgres>("PostgreSQL").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn big_storms_lose_no_session_and_hold_no_lock_on_mysql() {
    big_storms_lose_no_session_and_hold_no_lock::<MySql>("MySQL").await;
}
