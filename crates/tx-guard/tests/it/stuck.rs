//! Drops while the database waits or works: for a lock, in a long write, in a COPY; and statements that are busy or
//! cancelled from outside.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cancel_safe_tx_guard::{CommitOutcome, Retry, TxError, TxPool};
use futures_util::{FutureExt, StreamExt};
use sqlx::sqlite::SqliteJournalMode;
use sqlx::{Connection, MySql, Postgres, Sqlite};
use tokio::time::timeout;

use crate::commit::works_as_before;
use crate::on_all;
use crate::world::{PATIENCE, SOON, TestDb, World, eventually};

on_all!(
    a_drop_in_a_long_write_frees_everything_soon,
    a_panic_in_a_closure_rolls_back_and_goes_on_to_the_caller,
    a_deadline_between_attempts_runs_no_hook,
    hooks_of_failed_attempts_never_run,
);

/// A database that can produce a transient failure on request.
pub(crate) trait Transient: TestDb {
    async fn transient(conn: &mut Self::Connection) -> sqlx::Error;
}

impl Transient for Postgres {
    async fn transient(conn: &mut sqlx::PgConnection) -> sqlx::Error {
        let fail = "DO $$ BEGIN RAISE EXCEPTION 'in vain' USING ERRCODE = '40001'; END $$";
        Postgres::execute(conn, fail.to_owned()).await.unwrap_err()
    }
}

impl Transient for MySql {
    async fn transient(conn: &mut sqlx::MySqlConnection) -> sqlx::Error {
        let fail = "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'in vain'";
        MySql::execute(conn, fail.to_owned()).await.unwrap_err()
    }
}

impl Transient for Sqlite {
    /// Two connections to a separate database, one of which blocks the other.
    async fn transient(_: &mut sqlx::SqliteConnection) -> sqlx::Error {
        let (_place, options) = Sqlite::place();
        let connect =
            async || sqlx::ConnectOptions::connect(&options.clone().busy_timeout(Duration::ZERO)).await.unwrap();
        let (mut one, mut two): (sqlx::SqliteConnection, sqlx::SqliteConnection) = (connect().await, connect().await);
        Sqlite::execute(&mut one, "BEGIN IMMEDIATE".to_owned()).await.unwrap();
        Sqlite::execute(&mut two, "BEGIN IMMEDIATE".to_owned()).await.unwrap_err()
    }
}

async fn a_drop_in_a_long_write_frees_everything_soon<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    let long = format!(
        "INSERT INTO {} (n) SELECT (a.i * 1000 + b.i) * 1000 + c.i FROM
             (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 900) SELECT i FROM n) a,
             (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 900) SELECT i FROM n) b,
             (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 900) SELECT i FROM n) c",
        world.table
    );
    let long = timeout(Duration::from_millis(100), D::execute(&mut tx, long)).await;
    assert!(long.is_err(), "it was not long: {long:?}");
    let (handle, start) = (tx.outcome_handle(), Instant::now());
    drop(tx);
    works_as_before(&world, &db).await;
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
    assert_eq!(world.committed().await, [77]);
    world.end(db).await;
}

async fn a_panic_in_a_closure_rolls_back_and_goes_on_to_the_caller<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut handle = None;
    let run = db.tx().retry(Retry::default()).run(async |tx| {
        handle = Some(tx.outcome_handle());
        world.insert(tx, 1).await?;
        if handle.is_some() {
            panic!("on purpose");
        }
        Ok::<_, TxError>(())
    });
    assert!(std::panic::AssertUnwindSafe(run).catch_unwind().await.is_err());
    assert_eq!(handle.unwrap().outcome().await, CommitOutcome::RolledBack);
    works_as_before(&world, &db).await;
    assert_eq!(world.committed().await, [77]);
    world.end(db).await;
}

async fn a_deadline_between_attempts_runs_no_hook<D: Transient>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let hooks = Arc::new(AtomicU32::new(0));
    let mut attempts = 0;
    let start = Instant::now();
    // Enough for two attempts on any machine.
    let limit = Duration::from_secs(1);
    let retry = Retry::attempts(u32::MAX).backoff(Duration::from_millis(1), Duration::from_millis(5));
    let run = db.tx().timeout(limit).retry(retry).run(async |tx| {
        attempts += 1;
        world.insert(tx, 1).await?;
        let hooks = Arc::clone(&hooks);
        tx.after_commit(move || {
            hooks.fetch_add(1, Ordering::Relaxed);
        });
        Err::<(), _>(TxError::Database(D::transient(tx).await))
    });
    let error = run.await.unwrap_err();
    // The last attempt may have failed exactly at the deadline, and then its own error is returned.
    assert!(error.is_timeout() || matches!(error, TxError::Database(_)), "{error:?}");
    assert!(start.elapsed() >= limit && start.elapsed() < limit + SOON, "{:?}", start.elapsed());
    assert!(attempts > 1, "it was never run again");
    assert!(world.committed().await.is_empty());
    works_as_before(&world, &db).await;
    assert_eq!(hooks.load(Ordering::Relaxed), 0);
    world.end(db).await;
}

async fn hooks_of_failed_attempts_never_run<D: Transient>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let hooks = Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut attempt = 0;
    let retry = Retry::attempts(5).backoff(Duration::from_millis(1), Duration::from_millis(5));
    let run = db.tx().timeout(PATIENCE).retry(retry).run(async |tx| {
        attempt += 1;
        world.insert(tx, attempt).await?;
        let (ran, hooks) = (attempt, Arc::clone(&hooks));
        tx.after_commit(move || hooks.lock().unwrap().push(ran));
        if attempt < 3 { Err(TxError::Database(D::transient(tx).await)) } else { Ok(()) }
    });
    run.await.unwrap();
    assert_eq!(*hooks.lock().unwrap(), [3]);
    assert_eq!(world.committed().await, [3]);
    world.end(db).await;
}

/// A commit that is slower than the deadline, of a closure that may be retried: once, whatever is done.
#[tokio::test]
async fn a_commit_past_the_deadline_is_pending_and_never_run_again() {
    let world = World::<Postgres>::new().await;
    let table = &world.table;
    world
        .run(format!(
            "CREATE FUNCTION {table}_slow() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN PERFORM pg_sleep(0.6); RETURN NULL; END $$;
             CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON {table} DEFERRABLE INITIALLY DEFERRED
                 FOR EACH ROW EXECUTE FUNCTION {table}_slow()"
        ))
        .await;
    let db = world.pool(1).await;
    let hooks = Arc::new(AtomicU32::new(0));
    let mut attempts = 0;
    let run = db.tx().timeout(Duration::from_millis(300)).retry(Retry::default()).idempotent().run(async |tx| {
        attempts += 1;
        // Otherwise the server's own limit would end the slow commit at the deadline.
        Postgres::execute(tx, "SET LOCAL statement_timeout = 0".to_owned()).await?;
        world.insert(tx, attempts).await?;
        let hooks = Arc::clone(&hooks);
        tx.after_commit(move || {
            hooks.fetch_add(1, Ordering::Relaxed);
        });
        Ok(())
    });
    let error = run.await.unwrap_err();
    let TxError::Pending(handle) = error else { panic!("{error:?}") };
    assert_eq!(handle.outcome().await, CommitOutcome::Committed);
    assert_eq!(world.committed().await, [1]);
    eventually("the hook has run", async || hooks.load(Ordering::Relaxed) == 1).await;
    world.end(db).await;
    world.run(format!("DROP FUNCTION {table}_slow")).await;
}

async fn a_drop_while_waiting_for_a_lock_leaves_the_holder_alone<D: TestDb>() {
    let world = World::<D>::new().await;
    world.insert(&mut world.plain().await, 1).await.unwrap();
    for wrapped in [false, true] {
        let pool = sqlx::pool::PoolOptions::<D>::new().max_connections(2);
        let db = match wrapped {
            true => TxPool::wrap(pool.connect_with(world.options.clone()).await.unwrap()),
            false => world.pool(2).await,
        };
        let update = format!("UPDATE {} SET v = v + 1 WHERE n = 1", world.table);
        let mut holder = db.begin().await.unwrap();
        D::execute(&mut holder, update.clone()).await.unwrap();
        let mut waits = db.begin().await.unwrap();
        let waited = timeout(Duration::from_millis(100), D::execute(&mut waits, update)).await;
        assert!(waited.is_err(), "it did not wait");
        let start = Instant::now();
        drop(waits);
        // The connection of the dropped transaction is the only one that is not in use.
        let mut next = db.begin().await.unwrap();
        D::execute(&mut next, "SELECT 1".to_owned()).await.unwrap();
        assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
        next.commit().await.unwrap();
        holder.commit().await.unwrap();
        assert!(db.close(PATIENCE).await.is_clean());
    }
    let v = format!("SELECT v FROM {}", world.table);
    assert_eq!(D::numbers(&mut world.plain().await, v).await.unwrap(), [2]);
    world.run(format!("DROP TABLE {}", world.table)).await;
}

#[tokio::test]
async fn a_drop_while_waiting_for_a_lock_leaves_the_holder_alone_on_postgres() {
    a_drop_while_waiting_for_a_lock_leaves_the_holder_alone::<Postgres>().await;
}

#[tokio::test]
async fn a_drop_while_waiting_for_a_lock_leaves_the_holder_alone_on_mysql() {
    a_drop_while_waiting_for_a_lock_leaves_the_holder_alone::<MySql>().await;
}

#[tokio::test]
async fn a_drop_in_a_copy_leaves_nothing_and_a_clean_connection() {
    let world = World::<Postgres>::new().await;
    let db = world.pool(1).await;
    let (into, from) =
        (format!("COPY {} (n) FROM STDIN", world.table), "COPY (SELECT generate_series(1, 2000000000)) TO STDOUT");
    for flushed in [false, true] {
        let mut tx = db.begin().await.unwrap();
        let mut copy = tx.copy_in_raw(&into).await.unwrap();
        for n in 1..=if flushed { 20_000 } else { 1 } {
            copy.send(format!("{n}\n").as_bytes()).await.unwrap();
        }
        drop(copy);
        drop(tx);
        works_as_before(&world, &db).await;
        assert_eq!(world.committed().await, [77]);
        world.run(format!("DELETE FROM {}", world.table)).await;
    }
    let mut tx = db.begin().await.unwrap();
    let mut copy = tx.copy_out_raw(from).await.unwrap();
    copy.next().await.unwrap().unwrap();
    drop(copy);
    drop(tx);
    let start = Instant::now();
    works_as_before(&world, &db).await;
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    assert_eq!(world.committed().await, [77]);
    // And in the middle of an await of the copy.
    let mut tx = db.begin().await.unwrap();
    drop(tx.copy_in_raw(&into).now_or_never());
    drop(tx);
    let mut tx = db.begin().await.unwrap();
    Postgres::execute(&mut tx, "SELECT 1".to_owned()).await.unwrap();
    tx.commit().await.unwrap();
    world.end(db).await;
}

/// Another session cancels this one again and again, so that many cancels arrive at a ROLLBACK or a COMMIT.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_that_arrives_at_the_rollback_leaves_nothing_open() {
    let world = World::<Postgres>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *tx).await.unwrap();
    tx.rollback().await.unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let storm = tokio::spawn({
        let (over, mut beside) = (Arc::clone(&over), world.plain().await);
        async move {
            while !over.load(Ordering::Relaxed) {
                Postgres::execute(&mut beside, format!("SELECT pg_cancel_backend({pid})")).await.unwrap();
            }
            beside.close().await.unwrap();
        }
    });
    let mut committed = Vec::new();
    for n in 1..=300 {
        let Ok(mut tx) = db.begin().await else { continue };
        let handle = tx.outcome_handle();
        let written = world.insert(&mut tx, n).await.is_ok();
        match n % 3 {
            0 => drop(tx.rollback().await),
            1 => drop(tx),
            _ => drop(tx.commit().await),
        }
        match handle.outcome().await {
            CommitOutcome::Committed => {
                assert!(written, "{n} was committed without its row");
                committed.push(n);
            }
            outcome => assert_eq!(outcome, CommitOutcome::RolledBack, "{n}"),
        }
    }
    over.store(true, Ordering::Relaxed);
    storm.await.unwrap();
    assert_eq!(world.committed().await, committed);
    world.run(format!("DELETE FROM {}", world.table)).await;
    works_as_before(&world, &db).await;
    world.end(db).await;
}

/// In rollback-journal mode a reader keeps a writer from committing, and SQLite leaves the transaction open.
#[tokio::test]
async fn a_busy_commit_on_sqlite_is_refused_rolled_back_and_run_again() {
    let world = World::<Sqlite>::new().await;
    let old = world.options.clone().journal_mode(SqliteJournalMode::Delete).busy_timeout(Duration::from_millis(10));
    let db = TxPool::<Sqlite>::builder().max_connections(1).connect_with(old.clone()).await.unwrap();
    world.insert(&mut sqlx::ConnectOptions::connect(&old).await.unwrap(), 100).await.unwrap();
    let mut reader: sqlx::SqliteConnection = sqlx::ConnectOptions::connect(&old).await.unwrap();
    let mut reads = reader.begin().await.unwrap();
    Sqlite::numbers(&mut reads, format!("SELECT n FROM {}", world.table)).await.unwrap();

    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    let handle = tx.outcome_handle();
    let error = tx.commit().await.unwrap_err();
    let code = error.as_sqlx().and_then(|e| e.as_database_error()?.code()).map(|code| code.into_owned());
    assert_eq!(code.as_deref(), Some("5"), "{error:?}");
    assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);

    let mut attempts = 0;
    let mut reads = Some(reads);
    let retry = Retry::attempts(20).backoff(Duration::from_millis(1), Duration::from_millis(5));
    db.tx()
        .retry(retry)
        .run(async |tx| {
            attempts += 1;
            if attempts == 3 {
                reads.take().unwrap().rollback().await?;
            }
            Ok::<_, TxError>(world.insert(tx, 2).await?)
        })
        .await
        .unwrap();
    assert_eq!(attempts, 3);
    assert_eq!(world.committed().await, [2, 100]);
    drop(reads);
    reader.close().await.unwrap();
    world.end(db).await;
}
