//! Worker processes: killed, frozen, and with a crashing server. And the example `fleet`, which does all of that.

#[expect(dead_code, reason = "its `main` is for the command line")]
#[path = "../../examples/fleet/main.rs"]
mod example;

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cancel_safe_resumable::{PgStore, ResumableTask};
use futures_util::future::join_all;
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};

use self::example::cluster::Cluster;
use self::example::{Settings, WORKER, start, work_as_told};
use crate::postgres::pooler::Pooler;
use crate::postgres::world::{POSTGRES, World, assert_complete, numbers, pool, url, work};
use crate::support::{in_full, not_run};

const FROZEN: &str = "RESUMABLE_FROZEN";

/// A worker of the example; does nothing in the test run itself.
#[tokio::test]
async fn worker_of_the_example() {
    let Ok(told) = std::env::var(WORKER) else { return };
    std::process::exit(i32::from(work_as_told(&told).await));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_that_is_killed_and_frozen_records_each_result_once() {
    let settings = Settings {
        database: Some(url(POSTGRES)),
        workers: 4,
        items: if in_full() { 100_000 } else { 20_000 },
        blows: if in_full() { 40 } else { 5 },
        seed: None,
        worker: ["fleet::worker_of_the_example", "--exact"].map(String::from).into(),
    };
    let report = start(settings).await.unwrap();
    assert!(report.is_right(), "{report}");
}

/// Runs in a process that is frozen; does nothing in the test run itself.
#[tokio::test]
async fn child_that_is_frozen() {
    let Ok(schema) = std::env::var(FROZEN) else { return };
    let store = PgStore::new(pool(&url(POSTGRES), 2)).schema(schema).range_items(10).owner("child");
    let run = numbers(store.lease(Duration::from_secs(3))).stream(0..30, |_, x| async move {
        if x >= 5 {
            std::future::pending::<()>().await;
        }
        Ok(x * 1000)
    });
    let code = run.finish().await.map_or_else(|error| if error.is_fenced() { 3 } else { 1 }, |_| 0);
    std::process::exit(code);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_stopped_past_its_lease_and_continued_is_fenced() {
    let world = World::new().await;
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["fleet::child_that_is_frozen", "--exact"])
        .env(FROZEN, &world.schema)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let signal = |signal: &str| {
        let pid = child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    };
    // Its first results are there: it is at work.
    let mut tries = 0;
    while world.number("SELECT count(*) FROM pg_tables WHERE schemaname = '{s}' AND tablename = 'range'").await == 0
        || world.number("SELECT coalesce(sum(done), 0)::bigint FROM {s}.range").await < 5
    {
        tokio::time::sleep(Duration::from_millis(20)).await;
        tries += 1;
        assert!(tries < 5000, "the child does not work");
    }
    signal("-STOP");
    // The successor has its name, like a worker that was started again.
    let others = work(numbers(world.store().owner("child")), 30).await;
    signal("-CONT");
    let status = child.wait().unwrap();
    assert_eq!(others.unwrap().len(), 25);
    assert_eq!(status.code(), Some(3), "{status}");
    assert_eq!(world.number("SELECT taken_over::bigint FROM {s}.progress").await, 1);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_crashes_in_the_middle_has_each_range_exactly_once() {
    let cluster = Cluster::start().unwrap();
    let url = cluster.url();
    crash_in_the_middle(cluster, &url).await;
}

/// The pooler stays, its sessions are gone, and the workers get the pooler's errors.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_crashes_behind_a_pooler_has_each_range_exactly_once() {
    let cluster = Cluster::start().unwrap();
    let options: PgConnectOptions = cluster.url().parse().unwrap();
    let Some(pooler) = Pooler::in_front_of(options.get_port()).await else {
        return not_run("a crash behind a pooler", "there is no PgBouncer on this machine");
    };
    crash_in_the_middle(cluster, &pooler.url()).await;
}

/// Crashes the server after equal shares of the work. The workers reach it at `url`.
async fn crash_in_the_middle(mut cluster: Cluster, url: &str) {
    let world = World::behind(&cluster.url()).await;
    let (items, crashes) = if in_full() { (20_000, 10) } else { (1_200, 2) };
    // Later items wait for the next crash, so that there is work left at each crash, however fast the machine is.
    let allowed = Arc::new(AtomicU64::new(0));
    let workers: Vec<_> = (0..4)
        .map(|_| {
            let allowed = Arc::clone(&allowed);
            let store = PgStore::new(pool(url, 2)).schema(&world.schema).range_items(50);
            let store = store.lease(Duration::from_secs(5)).outage(Duration::from_secs(300)).tolerate_lost(1000);
            let run = ResumableTask::builder("numbers").store(store).concurrency(4);
            let run = run.stream(0..items, move |_, x: u64| {
                let allowed = Arc::clone(&allowed);
                async move {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                    while x >= allowed.load(Ordering::SeqCst) {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    Ok(x * 2)
                }
            });
            tokio::spawn(run.finish())
        })
        .collect();
    for crash in 1..=crashes {
        let share = (items * crash / (crashes + 1)) as i64;
        allowed.store(items * (crash + 1) / (crashes + 1) - 1, Ordering::SeqCst);
        let done = async || match PgConnection::connect(&cluster.url()).await {
            Ok(mut conn) => {
                let sql = format!("SELECT coalesce(sum(done), 0)::bigint FROM {}.range", world.schema);
                let row = sqlx::query(AssertSqlSafe(sql)).persistent(false).fetch_one(&mut conn).await;
                row.map_or(0, |row| row.get::<i64, _>(0))
            }
            Err(_) => 0,
        };
        let mut recorded = done().await;
        for _ in 0..12_000 {
            if recorded >= share {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
            recorded = done().await;
        }
        assert!((share..items as i64).contains(&recorded), "{recorded} of {items} were recorded");
        cluster.crash().unwrap();
        cluster.serve().unwrap();
    }
    allowed.store(items, Ordering::SeqCst);
    for worker in join_all(workers).await {
        assert_eq!(worker.unwrap().unwrap().total as u64, items);
    }
    // Each block is checked, and a doubled result is an error.
    assert_complete(&world.store(), items).await;
    world.end().await;
}
