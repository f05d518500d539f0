//! Commits whose answer is lost, connections that are cut off, and a server that goes silent, on a real PostgreSQL.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cancel_safe_resumable::{ItemError, PgStore, Retry};
use sqlx::PgConnection;
use sqlx::postgres::PgPoolOptions;

use crate::postgres::proxy::{FAULTS, Fault, Proxy, strike};
use crate::postgres::world::{FOR_EVER, World, numbers};
use crate::postgres_tx::{assert_each_once, end, insert, with_table};

const SECOND: Duration = Duration::from_secs(1);
/// The beginning of the statement that appends.
const APPEND: &str = "WITH given";

fn store(proxy: &Proxy, world: &World, sessions: u32) -> PgStore {
    let pool = proxy.pool(PgPoolOptions::new().max_connections(sessions));
    PgStore::new(pool).schema(&world.schema).range_items(10).lease(FOR_EVER)
}

/// The commits of items 3, 13, 23 and so on take a second: the server continues them after the client is gone.
async fn slow_commits(world: &World) {
    let sql = "CREATE FUNCTION {s}_slow() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN IF NEW.n % 10 = 3 THEN PERFORM pg_sleep(1); END IF; RETURN NULL; END $$;
         CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON {s}_effect DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION {s}_slow()";
    world.run(sql).await;
}

async fn end_slow(world: World) {
    world.run("DROP TRIGGER slow ON {s}_effect; DROP FUNCTION {s}_slow").await;
    end(world).await;
}

/// Runs items in transactions; those of the list meet their fault at the first attempt.
async fn run(world: &World, store: PgStore, concurrency: usize, n: u64, faults: &[(u64, Fault, &'static str)]) {
    let left = Mutex::new(faults.to_vec());
    let work = async |conn: &mut PgConnection, x: u64| {
        let result = insert(conn, &world.schema, x).await?;
        let mine = left.lock().unwrap().extract_if(.., |(item, ..)| *item == x).next();
        if let Some((_, fault, words)) = mine {
            strike(conn, fault, words).await;
        }
        Ok::<_, ItemError>(result)
    };
    let summary = numbers(store).concurrency(concurrency).process_tx(0..n, work).await.unwrap();
    assert_eq!((summary.total as u64, summary.completed as u64, summary.quarantined), (n, n, 0));
    assert_each_once(world, n).await;
}

/// While the server commits, other items of the range want to append, and no item may be mistaken for another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_is_on_its_way_is_waited_for_and_credited_to_its_own_item() {
    let world = World::new().await;
    with_table(&world).await;
    slow_commits(&world).await;
    let proxy = Proxy::open().await;
    let faults = [3, 13, 23].map(|x| (x, Fault::CutBehind, "COMMIT"));
    run(&world, store(&proxy, &world, 8), 4, 30, &faults).await;
    assert_eq!(proxy.struck(), 3);
    end_slow(world).await;
}

/// All items except the one in doubt wait for its range, with all available connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_of_few_connections_is_enough_to_find_out_about_a_lost_commit() {
    let world = World::new().await;
    for sessions in [1, 2] {
        with_table(&world).await;
        slow_commits(&world).await;
        let proxy = Proxy::open().await;
        let faults = [
            (3, Fault::CutBehind, "COMMIT"),
            (13, Fault::CutAnswer, "COMMIT"),
            (25, Fault::CutBefore, "COMMIT"),
            (33, Fault::CutBehind, "COMMIT"),
        ];
        run(&world, store(&proxy, &world, sessions), 4, 40, &faults).await;
        assert_eq!(proxy.struck(), faults.len());
        world.run("DROP SCHEMA {s} CASCADE; DROP TABLE {s}_effect; DROP FUNCTION {s}_slow").await;
    }
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_cut_off_or_silent_at_any_statement_loses_and_doubles_nothing() {
    let world = World::new().await;
    with_table(&world).await;
    let proxy = Proxy::open().await;
    let mut faults = Vec::new();
    for words in ["BEGIN", APPEND, "COMMIT"] {
        faults.extend(FAULTS.map(|fault| (faults.len() as u64 * 2 + fault as u64 * 2 + 1, fault, words)));
    }
    // It waits neither an hour for a statement nor an hour for a lease.
    run(&world, store(&proxy, &world, 6).answer_within(2 * SECOND), 4, 60, &faults).await;
    // A connection may not begin again after its order to be struck, or may have given way to another item's doubt.
    assert!(proxy.struck() >= 10, "{}", proxy.struck());
    end(world).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stays_silent_ends_the_run() {
    let world = World::new().await;
    with_table(&world).await;
    let proxy = Proxy::open().await;
    let pool = proxy.pool(PgPoolOptions::new().max_connections(4).acquire_timeout(2 * SECOND));
    let store = PgStore::new(pool).schema(&world.schema).range_items(10).lease(FOR_EVER);
    let work = async |conn: &mut PgConnection, x: u64| {
        let result = insert(conn, &world.schema, x).await?;
        if x == 5 {
            proxy.fall_silent();
        }
        Ok::<_, ItemError>(result)
    };
    let run = numbers(store.answer_within(SECOND).outage(2 * SECOND)).process_tx(0..30, work);
    let error = tokio::time::timeout(60 * SECOND, run).await.expect("it ends").unwrap_err();
    assert!(error.is_database(), "{error}");
    world.run("UPDATE {s}.range SET lease_until = NULL").await;
    let rest = async |conn: &mut PgConnection, x: u64| Ok::<_, ItemError>(insert(conn, &world.schema, x).await?);
    let summary = numbers(world.store()).process_tx(0..30, rest).await.unwrap();
    assert!(summary.restored >= 5, "{summary:?}");
    assert_each_once(&world, 30).await;
    end(world).await;
}

/// It is dropped at each of its polls, including those of BEGIN, and then the pool is checked.
#[tokio::test]
async fn a_dropped_transaction_leaves_no_connection_in_the_pool_that_is_in_one() {
    let world = World::new().await;
    with_table(&world).await;
    let pool = crate::postgres::world::pool(&crate::postgres::world::url(crate::postgres::world::POSTGRES), 2);
    for polls in 1.. {
        let store = PgStore::new(pool.clone()).schema(&world.schema).range_items(10).lease(FOR_EVER);
        let job = format!("job {polls}");
        let is_over = {
            let builder = cancel_safe_resumable::ResumableTask::builder(&job).store(store);
            let work = async |conn: &mut PgConnection, x: u64| Ok(insert(conn, &world.schema, x).await?);
            let mut run = std::pin::pin!(builder.process_tx(0..6, work));
            let mut left = polls;
            std::future::poll_fn(|cx| match run.as_mut().poll(cx) {
                std::task::Poll::Ready(summary) => std::task::Poll::Ready(Some(summary.unwrap())),
                std::task::Poll::Pending if left == 0 => std::task::Poll::Ready(None),
                std::task::Poll::Pending => {
                    left -= 1;
                    std::task::Poll::Pending
                }
            })
            .await
        };
        let (mut one, mut two) = (pool.acquire().await.unwrap(), pool.acquire().await.unwrap());
        for connection in [&mut one, &mut two] {
            let bound = "SELECT current_setting('idle_in_transaction_session_timeout')";
            let row = sqlx::query(bound).persistent(false).fetch_one(&mut **connection).await.unwrap();
            let bound: String = sqlx::Row::get(&row, 0);
            assert_eq!(bound, "0", "a connection came back in a transaction, after {polls} polls");
        }
        if is_over.is_some() {
            assert!(polls > 6, "{polls} polls are too few to have met a BEGIN");
            break;
        }
    }
    end(world).await;
}

/// A violation that PostgreSQL checks only at COMMIT is as much the item's fault as an earlier one.
#[tokio::test]
async fn a_deferred_constraint_that_fails_at_the_commit_is_the_failure_of_its_item() {
    let world = World::new().await;
    world.run("CREATE TABLE {s}_effect (n bigint, v bigint UNIQUE DEFERRABLE INITIALLY DEFERRED)").await;
    let attempts = Mutex::new(Vec::new());
    let has_failed = AtomicBool::new(false);
    let work = async |conn: &mut PgConnection, x: u64| {
        attempts.lock().unwrap().push(x);
        // 4 is there before 6 comes; 8 is there twice, but not the second time.
        let v = if x == 6 || x == 8 && !has_failed.swap(true, Ordering::SeqCst) { 4 } else { x };
        let sql = format!("INSERT INTO {}_effect VALUES ({x}, {v})", world.schema);
        sqlx::query(sqlx::AssertSqlSafe(sql)).persistent(false).execute(conn).await?;
        Ok::<_, ItemError>(x * 2)
    };
    let retry = Retry::attempts(3).backoff(Duration::from_millis(1), Duration::from_millis(10));
    let summary = numbers(world.store()).retry(retry).quarantine(1).process_tx(0..12, work).await.unwrap();
    assert_eq!((summary.completed, summary.quarantined), (11, 1));
    let tried = |x| attempts.lock().unwrap().iter().filter(|tried| **tried == x).count();
    assert_eq!((tried(4), tried(6), tried(8)), (1, 3, 2));
    let all = crate::postgres::world::recorded(&world.store(), "numbers").await.unwrap();
    let failed: Vec<_> = all.iter().filter(|done| done.result.is_err()).collect();
    assert_eq!(failed.len(), 1);
    assert_eq!((failed[0].index, failed[0].attempts), (6, 3));
    assert!(failed[0].result.as_ref().unwrap_err().cause.contains("unique"), "{:?}", failed[0]);
    assert_eq!(world.number("SELECT count(*) FROM {s}_effect WHERE n <> 6").await, 11);
    end(world).await;
}
