//! Effect and result in one transaction, on a real PostgreSQL.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cancel_safe_resumable::{Builder, ItemError, PgStore, Summary, TaskError};
use futures_util::future::join_all;
use sqlx::{AssertSqlSafe, PgConnection, Row};
use tokio_util::sync::CancellationToken;

use crate::postgres::world::{POSTGRES, World, assert_complete, numbers, pool, recorded, url};
use crate::support::eventually;

/// The effect of an item: a row, and nothing in the table forbids a second.
async fn insert(conn: &mut PgConnection, schema: &str, x: u64) -> Result<u64, sqlx::Error> {
    let sql = format!("INSERT INTO {schema}_effect VALUES ({x})");
    sqlx::query(AssertSqlSafe(sql)).persistent(false).execute(conn).await?;
    Ok(x * 2)
}

async fn run(builder: Builder<u64, u64>, schema: String, n: u64) -> Result<Summary, TaskError> {
    builder.process_tx(0..n, async |conn: &mut PgConnection, x| Ok(insert(conn, &schema, x).await?)).await
}

async fn with_table(world: &World) {
    world.run("CREATE TABLE {s}_effect (n bigint)").await;
}

async fn assert_each_once(world: &World, n: u64) {
    assert_complete(&world.store(), n).await;
    let sql = "SELECT count(*) * 1000000 + count(DISTINCT n) FROM {s}_effect";
    assert_eq!(world.number(sql).await, (n * 1_000_000 + n) as i64, "an effect is missing, or there twice");
}

async fn end(world: World) {
    world.run("DROP TABLE {s}_effect").await;
    world.end().await;
}

#[tokio::test]
async fn the_effect_of_each_item_and_its_result_are_there_once() {
    let world = World::new().await;
    with_table(&world).await;
    let failures = AtomicUsize::new(0);
    let work = async |conn: &mut PgConnection, x: u64| {
        let result = insert(conn, &world.schema, x).await?;
        // After its effect, which is rolled back.
        if x % 7 == 3 && failures.fetch_add(1, Ordering::Relaxed) < 5 {
            return Err(ItemError::retry("not this time"));
        }
        Ok(result)
    };
    let retry = cancel_safe_resumable::Retry::attempts(9).backoff(Duration::from_millis(1), Duration::from_millis(10));
    let worker = || numbers(world.store()).concurrency(3).retry(retry).process_tx(0..95, &work);
    let (one, two) = tokio::join!(worker(), worker());
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(one.completed + two.completed, 95);
    assert_eq!((one.total, one.restored + one.completed, one.quarantined), (95, 95, 0));
    assert_each_once(&world, 95).await;
    // A second time nothing runs.
    let again = run(numbers(world.store()), world.schema.clone(), 95).await.unwrap();
    assert_eq!((again.completed, again.restored), (0, 95));
    assert_each_once(&world, 95).await;
    end(world).await;
}

#[tokio::test]
async fn what_fails_for_good_leaves_no_effect_and_is_in_quarantine() {
    let world = World::new().await;
    with_table(&world).await;
    let work = async |conn: &mut PgConnection, x: u64| {
        let result = insert(conn, &world.schema, x).await?;
        match x {
            4 => Err(ItemError::permanent("no")),
            // A statement that fails and is not told spoils the transaction, and is told then.
            5 => sqlx::query("SELECT 1 / 0").execute(conn).await.map_or(Ok(result), |_| Ok(result)),
            _ => Ok(result),
        }
    };
    let full = numbers(world.store()).process_tx(0..12, &work).await.unwrap_err();
    assert!(full.is_quarantine_full(), "{full}");
    let summary = numbers(world.store()).quarantine(2).process_tx(0..12, &work).await.unwrap();
    assert_eq!(summary.quarantined, 2);
    let all = recorded(&world.store(), "numbers").await.unwrap();
    assert_eq!(all.iter().filter(|done| done.result.is_err()).map(|done| done.index).collect::<Vec<_>>(), [4, 5]);
    assert_eq!(world.number("SELECT count(*) FROM {s}_effect").await, 10);
    assert_eq!(world.number("SELECT count(*) FROM {s}_effect WHERE n IN (4, 5)").await, 0);
    end(world).await;
}

/// The server ends sessions at any moment, also between a COMMIT and its answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_are_ended_at_any_moment_lose_and_double_nothing() {
    let world = World::new().await;
    with_table(&world).await;
    let stop = CancellationToken::new();
    let (killer, stopped) = (world.clone(), stop.clone());
    let killer = tokio::spawn(async move {
        let mut conn = killer.plain().await;
        let kill = format!(
            "SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity
            WHERE pid <> pg_backend_pid() AND query LIKE '%{}%' ORDER BY random() LIMIT 1) one",
            killer.schema
        );
        let mut killed = 0;
        while !stopped.is_cancelled() {
            let row = sqlx::query(AssertSqlSafe(kill.clone())).fetch_one(&mut conn).await.unwrap();
            killed += row.get::<i64, _>(0);
            tokio::time::sleep(Duration::from_millis(fastrand::u64(20..80))).await;
        }
        killed
    });
    let workers = (0..2).map(|_| {
        // A fenced worker goes on: a session that ended while it gave back may have cost it its answer.
        let builder = numbers(world.store().lease(Duration::from_secs(5)).tolerate_lost(100)).concurrency(3);
        run(builder, world.schema.clone(), 120)
    });
    for summary in join_all(workers).await {
        assert_eq!(summary.unwrap().total, 120);
    }
    stop.cancel();
    let killed = killer.await.unwrap();
    assert!(killed > 0, "nothing was ended");
    assert_each_once(&world, 120).await;
    end(world).await;
}

/// It is dropped while an item is in its transaction, which has taken effect and holds a lock.
#[tokio::test]
async fn a_dropped_transaction_is_rolled_back_and_its_range_given_back() {
    let world = World::new().await;
    with_table(&world).await;
    let reached = Arc::new(AtomicUsize::new(0));
    let work = async |conn: &mut PgConnection, x: u64| {
        let result = insert(conn, &world.schema, x).await?;
        if x == 15 {
            reached.store(1, Ordering::SeqCst);
            std::future::pending::<()>().await;
        }
        Ok::<_, ItemError>(result)
    };
    {
        let mut running = std::pin::pin!(numbers(world.store()).process_tx(0..30, work));
        let is_there = eventually("an item is in its transaction", || reached.load(Ordering::SeqCst) == 1);
        futures_util::future::select(running.as_mut(), std::pin::pin!(is_there)).await;
    }
    // The lease would last for an hour.
    let summary = run(numbers(world.store()), world.schema.clone(), 30).await.unwrap();
    assert_eq!((summary.completed, summary.restored), (15, 15));
    assert_each_once(&world, 30).await;
    end(world).await;
}

#[tokio::test]
async fn every_transaction_is_bounded_by_the_server_too() {
    let world = World::new().await;
    let work = async |conn: &mut PgConnection, _: u64| {
        let sql = "SELECT string_agg(setting, ' ' ORDER BY name) FROM pg_settings
            WHERE name IN ('statement_timeout', 'idle_in_transaction_session_timeout')";
        Ok::<String, ItemError>(sqlx::query(sql).fetch_one(conn).await?.get(0))
    };
    let builder = cancel_safe_resumable::ResumableTask::builder("bounds");
    builder.store(world.store().lease(Duration::from_secs(60))).process_tx(0..1, work).await.unwrap();
    let store = world.store();
    let mut results = store.results::<String>("bounds");
    let first = futures_util::StreamExt::next(&mut results).await.unwrap().unwrap();
    assert_eq!(first.result, Ok("30000 30000".to_owned()));
    let file = cancel_safe_resumable::ResumableTask::builder("file").process_tx(0..1, async |_, x: u64| Ok(x)).await;
    assert!(matches!(file, Err(TaskError::Config(_))));
    world.end().await;
}

/// The thread of a worker stands still in a transaction that holds its own range, with the keeper of its leases: the server
/// ends the session, and another takes over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_stands_still_in_its_transaction_is_taken_over_and_leaves_no_effect() {
    let world = World::new().await;
    with_table(&world).await;
    let (frozen, thaw) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (is_frozen, thawed, schema) = (Arc::clone(&frozen), Arc::clone(&thaw), world.schema.clone());
    let zombie = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let store = PgStore::new(pool(&url(POSTGRES), 3)).schema(&schema).range_items(10);
            let work = async |conn: &mut PgConnection, x: u64| {
                let result = insert(conn, &schema, x).await?;
                if x == 5 && is_frozen.load(Ordering::SeqCst) == 0 {
                    let lock = format!("SELECT n FROM {schema}.range WHERE n = 0 FOR UPDATE");
                    sqlx::query(AssertSqlSafe(lock)).fetch_one(&mut *conn).await?;
                    is_frozen.store(1, Ordering::SeqCst);
                    while thawed.load(Ordering::SeqCst) == 0 {
                        std::thread::yield_now();
                    }
                }
                Ok::<_, ItemError>(result)
            };
            numbers(store.lease(Duration::from_millis(400))).process_tx(0..30, work).await
        })
    });
    eventually("the zombie stands still", || frozen.load(Ordering::SeqCst) == 1).await;
    let summary = run(numbers(world.store()), world.schema.clone(), 30).await.unwrap();
    assert!(summary.completed >= 20);
    thaw.store(1, Ordering::SeqCst);
    let error = zombie.join().unwrap().unwrap_err();
    assert!(error.is_fenced(), "{error}");
    assert_each_once(&world, 30).await;
    end(world).await;
}
