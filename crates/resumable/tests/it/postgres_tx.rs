//! Effect and result in one transaction, on a real PostgreSQL.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cancel_safe_resumable::{Builder, ItemError, PgStore, Summary, TaskError};
use futures_util::future::join_all;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{AssertSqlSafe, PgConnection, Row};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::postgres::world::{POSTGRES, World, assert_complete, numbers, pool, recorded, url};
use crate::support::eventually;

/// The effect of an item: a row, and nothing in the table forbids a second.
pub(crate) async fn insert(conn: &mut PgConnection, schema: &str, x: u64) -> Result<u64, sqlx::Error> {
    let sql = format!("INSERT INTO {schema}_effect VALUES ({x})");
    sqlx::query(AssertSqlSafe(sql)).persistent(false).execute(conn).await?;
    Ok(x * 2)
}

async fn run(builder: Builder<u64, u64>, schema: String, n: u64) -> Result<Summary, TaskError> {
    builder.process_tx(0..n, async |conn: &mut PgConnection, x| Ok(insert(conn, &schema, x).await?)).await
}

pub(crate) async fn with_table(world: &World) {
    world.run("CREATE TABLE {s}_effect (n bigint)").await;
}

pub(crate) async fn assert_each_once(world: &World, n: u64) {
    assert_complete(&world.store(), n).await;
    let sql = "SELECT count(*) * 1000000 + count(DISTINCT n) FROM {s}_effect";
    assert_eq!(world.number(sql).await, (n * 1_000_000 + n) as i64, "an effect is missing, or there twice");
}

pub(crate) async fn end(world: World) {
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
            // A failed statement that is not reported spoils the transaction, and is reported then.
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

/// The server ends sessions at any moment, every other time one that is in its COMMIT.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_are_ended_at_any_moment_lose_and_double_nothing() {
    let world = World::new().await;
    with_table(&world).await;
    // Each commit takes long enough to be hit.
    let slow = "CREATE FUNCTION {s}_slow() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_sleep(0.02); RETURN NULL; END $$;
         CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON {s}_effect DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION {s}_slow()";
    world.run(slow).await;
    let stop = CancellationToken::new();
    let (killer, stopped) = (world.clone(), stop.clone());
    let killer = tokio::spawn(async move {
        let mut conn = killer.plain().await;
        let mut killed = [0, 0];
        for in_commit in [false, true].into_iter().cycle() {
            // Found by the name of the application: a session in its COMMIT shows "COMMIT" as its query.
            let kill = format!(
                "SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity
                WHERE application_name = '{}' AND NOT ({in_commit} AND (query, state) <> ('COMMIT', 'active'))
                ORDER BY random() LIMIT 1) one",
                killer.schema
            );
            let row = sqlx::query(AssertSqlSafe(kill)).persistent(false).fetch_one(&mut conn).await.unwrap();
            killed[usize::from(in_commit)] += row.get::<i64, _>(0);
            if stopped.is_cancelled() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(fastrand::u64(20..60))).await;
        }
        killed
    });
    let options: PgConnectOptions = url(POSTGRES).parse().unwrap();
    let pool = PgPoolOptions::new().max_connections(8).connect_lazy_with(options.application_name(&world.schema));
    let workers = (0..2).map(|_| {
        let store = PgStore::new(pool.clone()).schema(&world.schema).range_items(10).lease(Duration::from_secs(10));
        // A fenced worker continues: it may have lost an answer because the session ended while it gave its range back.
        run(numbers(store.tolerate_lost(100)).concurrency(3), world.schema.clone(), 160)
    });
    for summary in join_all(workers).await {
        assert_eq!(summary.unwrap().total, 160);
    }
    stop.cancel();
    let killed = killer.await.unwrap();
    assert!(killed.iter().all(|killed| *killed > 0), "{killed:?}");
    assert_each_once(&world, 160).await;
    world.run("DROP TRIGGER slow ON {s}_effect; DROP FUNCTION {s}_slow").await;
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
            numbers(store.lease(Duration::from_secs(4))).process_tx(0..30, work).await
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

/// No attempt is counted: there would be no room for a failed item.
#[tokio::test]
async fn an_item_that_pauses_the_run_is_rolled_back_and_nothing_starts_until_then() {
    let world = World::new().await;
    with_table(&world).await;
    let until = Mutex::new(None);
    let meanwhile = AtomicUsize::new(0);
    let work = async |conn: &mut PgConnection, x: u64| {
        if until.lock().unwrap().is_some_and(|until| Instant::now() < until) {
            meanwhile.fetch_add(1, Ordering::SeqCst);
        }
        let result = insert(conn, &world.schema, x).await?;
        let mut until = until.lock().unwrap();
        if x == 5 && until.is_none() {
            *until = Some(Instant::now() + Duration::from_secs(3));
            return Err(ItemError::pause(Duration::from_secs(3)).because("429"));
        }
        Ok(result)
    };
    let summary = numbers(world.store()).concurrency(3).process_tx(0..200, work).await.unwrap();
    assert_eq!((summary.completed, summary.quarantined), (200, 0));
    // The items that were about to start while the item's transaction was rolled back.
    assert!(meanwhile.load(Ordering::SeqCst) <= 20, "{meanwhile:?} started in the pause");
    assert_each_once(&world, 200).await;
    end(world).await;
}

/// If the quota is still missing after a pause, one item asks for it, and not as many as may run.
#[tokio::test]
async fn after_a_pause_one_transaction_goes_first() {
    const REFUSALS: usize = 8;
    let world = World::new().await;
    let (calls, refused) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = async |_: &mut PgConnection, x: u64| {
        let mut refused = refused.lock().unwrap();
        if calls.fetch_add(1, Ordering::SeqCst) >= 20 && refused.len() < REFUSALS {
            refused.push(Instant::now());
            return Err(ItemError::pause(Duration::from_millis(300)).because("429"));
        }
        Ok(x * 2)
    };
    let summary = numbers(world.store()).concurrency(4).process_tx(0..40, work).await.unwrap();
    assert_eq!((summary.completed, summary.quarantined), (40, 0));
    let refused = refused.into_inner().unwrap();
    let later = |pair: &&[Instant]| pair[1] - pair[0] >= Duration::from_millis(150);
    // At most four before the first pause, and then one after each: if all were let in, there would be two or three
    // pauses.
    let pauses = 1 + refused.windows(2).filter(later).count();
    assert!(pauses > REFUSALS / 2 - 1, "{REFUSALS} refusals in {pauses} pauses");
    world.end().await;
}

#[tokio::test]
async fn a_cancel_ends_a_run_of_transactions_that_is_paused() {
    let world = World::new().await;
    let token = CancellationToken::new();
    let cancel = token.clone();
    let work = async |_: &mut PgConnection, x: u64| {
        if x < 5 {
            return Ok(x * 2);
        }
        let cancel = cancel.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(200)).await;
            cancel.cancel();
        });
        Err(ItemError::pause(Duration::MAX))
    };
    let error = numbers(world.store()).cancel(token).process_tx(0..30, work).await.unwrap_err();
    assert!(error.is_cancelled(), "{error}");
    assert_eq!(world.number("SELECT count(*) FROM {s}.range WHERE lease_until IS NOT NULL").await, 0);
    assert_eq!(world.number("SELECT sum(done)::bigint FROM {s}.range").await, 5);
    world.end().await;
}

#[tokio::test]
async fn an_item_that_defers_itself_is_rolled_back_and_tried_later_so_often_and_no_more() {
    let world = World::new().await;
    with_table(&world).await;
    let tried = Mutex::new(Vec::new());
    let work = async |conn: &mut PgConnection, x: u64| {
        let result = insert(conn, &world.schema, x).await?;
        let times = {
            let mut tried = tried.lock().unwrap();
            tried.push(x);
            tried.iter().filter(|tried| **tried == x).count()
        };
        match x {
            7 => Err(ItemError::defer(Duration::from_millis(5), "never")),
            _ if x % 10 == 4 && times < 3 => Err(ItemError::defer(Duration::from_millis(5), "later")),
            _ => Ok(result),
        }
    };
    let builder = numbers(world.store()).max_defers(2).quarantine(1).concurrency(2);
    let summary = builder.process_tx(0..30, work).await.unwrap();
    assert_eq!((summary.completed, summary.quarantined), (29, 1));
    let tried = tried.into_inner().unwrap();
    let times = |x| tried.iter().filter(|tried| **tried == x).count();
    assert_eq!([0, 4, 14, 24, 7].map(times), [1, 3, 3, 3, 3]);
    let all = recorded(&world.store(), "numbers").await.unwrap();
    let failed: Vec<_> =
        all.iter().filter(|done| done.result.is_err()).map(|done| (done.index, done.attempts)).collect();
    assert_eq!(failed, [(7, 1)]);
    assert_eq!(world.number("SELECT count(*) * 100 + count(DISTINCT n) FROM {s}_effect WHERE n <> 7").await, 2929);
    end(world).await;
}
