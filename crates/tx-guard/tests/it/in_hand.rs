//! Guards in hand that were begun with options: isolation, lock and deadline.

use std::time::{Duration, Instant};

use cancel_safe_tx_guard::{CommitError, CommitOutcome, Isolation, TxError, TxPool};
use sqlx::sqlite::SqliteJournalMode;
use sqlx::{MySql, Postgres, Sqlite};
use tokio::time::sleep;

use crate::commit::works_as_before;
use crate::on_all;
use crate::world::{PATIENCE, SOON, TestDb, World, eventually};

on_all!(
    every_option_goes_with_a_guard_in_hand,
    a_commit_after_the_deadline_rolls_back_and_is_a_timeout,
    a_commit_within_the_deadline_commits,
    a_begin_is_bounded_by_the_deadline,
);

async fn every_option_goes_with_a_guard_in_hand<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.tx().serializable().read_only().timeout(PATIENCE).immediate().begin().await.unwrap();
    let written = world.insert(&mut tx, 1).await;
    match written {
        Ok(()) => assert!(tx.commit().await.is_err(), "it was to be read only"),
        Err(_) => tx.rollback().await.unwrap(),
    }
    let mut tx = db.tx().serializable().timeout(None).immediate().begin().await.unwrap();
    world.insert(&mut tx, 2).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(world.committed().await, [2]);
    world.end(db).await;
}

const SHORT: Duration = Duration::from_millis(100);

async fn a_commit_after_the_deadline_rolls_back_and_is_a_timeout<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    for within in [None, Some(PATIENCE)] {
        // On a busy machine, the begin itself may be too late.
        let mut tx = loop {
            match db.tx().timeout(SHORT).begin().await {
                Ok(tx) => break tx,
                Err(error) => assert!(error.is_timeout(), "{error:?}"),
            }
        };
        let handle = tx.outcome_handle();
        drop(world.insert(&mut tx, 1).await);
        sleep(SHORT).await;
        let error = match within {
            None => tx.commit().await.unwrap_err(),
            Some(within) => match tx.commit_within(within).await.unwrap_err() {
                CommitError::Failed(error) => error,
                error => panic!("{error:?}"),
            },
        };
        assert!(matches!(error, TxError::Timeout { timeout } if timeout == SHORT), "{error:?}");
        assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
    }
    works_as_before(&world, &db).await;
    assert_eq!(world.committed().await, [77]);
    world.end(db).await;
}

/// A timeout would say that it is rolled back.
#[tokio::test]
async fn a_transaction_that_its_sql_has_committed_is_no_timeout_but_lost() {
    let world = World::<Postgres>::new().await;
    let db = world.pool(1).await;
    let limit = Duration::from_secs(1);
    let mut tx = db.tx().timeout(limit).begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    sqlx::raw_sql("COMMIT").execute(&mut *tx).await.unwrap();
    let handle = tx.outcome_handle();
    sleep(limit).await;
    let error = tx.commit().await.unwrap_err();
    assert!(matches!(error, TxError::Lost { .. }), "{error:?}");
    assert_eq!(handle.outcome().await, CommitOutcome::Unknown);
    assert_eq!(world.committed().await, [1]);
    world.end(db).await;
}

async fn a_commit_within_the_deadline_commits<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.tx().timeout(PATIENCE).begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    tx.commit().await.unwrap();
    // A transaction without a timeout has no limit, even on a session that had one before.
    let mut tx = db.tx().begin().await.unwrap();
    world.insert(&mut tx, 2).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(world.committed().await, [1, 2]);
    world.end(db).await;
}

async fn a_begin_is_bounded_by_the_deadline<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let held = db.begin().await.unwrap();
    let start = Instant::now();
    let error = db.tx().timeout(SHORT).begin().await.unwrap_err();
    assert!(matches!(error, TxError::PoolExhausted { .. }) && error.is_timeout(), "{error:?}");
    assert!((SHORT..SOON).contains(&start.elapsed()));
    held.rollback().await.unwrap();
    world.end(db).await;
}

/// The wait for the lock is inside SQLite, and still ends at the deadline.
#[tokio::test]
async fn a_begin_that_waits_for_the_lock_of_sqlite_is_bounded_by_the_deadline() {
    let world = World::<Sqlite>::new().await;
    let db = world.pool(2).await;
    let writer = db.tx().immediate().begin().await.unwrap();
    let start = Instant::now();
    let error = db.tx().immediate().timeout(SHORT).begin().await.unwrap_err();
    assert!(matches!(error, TxError::Timeout { timeout } if timeout == SHORT), "{error:?}");
    assert!(start.elapsed() < SOON);
    writer.rollback().await.unwrap();
    works_as_before(&world, &db).await;
    world.end(db).await;
}

/// Without the lock nearly all of them fail: by the time they write, another has written what they have read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_takes_the_lock_of_sqlite_at_once_reads_and_writes_without_a_failure() {
    let world = World::<Sqlite>::new().await;
    world.insert(&mut world.plain().await, 1).await.unwrap();
    let options = world.options.clone().journal_mode(SqliteJournalMode::Wal).busy_timeout(PATIENCE);
    let db = TxPool::<Sqlite>::builder().max_connections(8).connect_with(options).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (db, table) = (db.clone(), world.table.clone());
        tasks.spawn(async move {
            for _ in 0..25 {
                let mut tx = db.tx().immediate().begin().await.unwrap();
                let v = Sqlite::numbers(&mut tx, format!("SELECT v FROM {table}")).await.unwrap()[0];
                Sqlite::execute(&mut tx, format!("UPDATE {table} SET v = {}", v + 1)).await.unwrap();
                tx.commit().await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    let v = Sqlite::numbers(&mut world.plain().await, format!("SELECT v FROM {}", world.table)).await.unwrap();
    assert_eq!(v, [200]);
    world.end(db).await;
}

/// A transaction that takes no lock at its beginning sees a lock that another has taken only when it writes.
#[tokio::test]
async fn the_lock_of_sqlite_is_taken_at_the_beginning_when_it_is_asked_for_and_only_then() {
    let world = World::<Sqlite>::new().await;
    let db = world.impatient_pool().await;
    let writer = db.tx().immediate().begin().await.unwrap();
    for locks in [db.tx().immediate(), db.tx().serializable()] {
        assert!(locks.begin().await.unwrap_err().is_transient());
    }
    for lets in [db.tx(), db.tx().immediate().read_only(), db.tx().serializable().read_only()] {
        lets.begin().await.unwrap().rollback().await.unwrap();
    }
    writer.rollback().await.unwrap();
    world.end(db).await;
}

#[tokio::test]
async fn the_server_knows_the_deadline_of_a_guard_in_hand() {
    let world = World::<Postgres>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.tx().timeout(Duration::from_secs(7)).serializable().begin().await.unwrap();
    let limit = "SELECT setting::bigint FROM pg_settings WHERE name = 'statement_timeout'";
    let limit = Postgres::numbers(&mut tx, limit.to_owned()).await.unwrap();
    assert!((1..=7_250).contains(&limit[0]), "{limit:?}");
    let (level,): (String,) = sqlx::query_as("SHOW transaction_isolation").fetch_one(&mut *tx).await.unwrap();
    assert_eq!(level, "serializable");
    tx.rollback().await.unwrap();
    world.end(db).await;

    let world = World::<MySql>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.tx().timeout(Duration::from_secs(7)).begin().await.unwrap();
    let limit = "SELECT CAST(@@innodb_lock_wait_timeout AS SIGNED)";
    let limit = MySql::numbers(&mut tx, limit.to_owned()).await.unwrap();
    assert!((1..=8).contains(&limit[0]), "{limit:?}");
    tx.rollback().await.unwrap();
    world.end(db).await;
}

/// What others commit meanwhile is seen, or is not seen, or waits.
#[tokio::test]
async fn the_isolation_of_a_guard_in_hand_is_what_was_asked_for_on_mysql() {
    let world = World::<MySql>::new().await;
    let db = world.pool(1).await;
    let mut other = world.plain().await;
    world.insert(&mut other, 1).await.unwrap();
    let read = format!("SELECT n FROM {}", world.table);
    for (isolation, seen) in [(Isolation::ReadCommitted, 2), (Isolation::RepeatableRead, 1)] {
        let mut tx = db.tx().isolation(isolation).begin().await.unwrap();
        assert_eq!(MySql::numbers(&mut tx, read.clone()).await.unwrap(), [1]);
        world.insert(&mut other, 2).await.unwrap();
        assert_eq!(MySql::numbers(&mut tx, read.clone()).await.unwrap().len(), seen, "{isolation:?}");
        tx.rollback().await.unwrap();
        MySql::execute(&mut other, format!("DELETE FROM {} WHERE n = 2", world.table)).await.unwrap();
    }
    let write = format!("SELECT n FROM {} FOR UPDATE NOWAIT", world.table);
    for (isolation, locks) in [(Isolation::RepeatableRead, false), (Isolation::Serializable, true)] {
        let mut tx = db.tx().isolation(isolation).begin().await.unwrap();
        assert_eq!(MySql::numbers(&mut tx, read.clone()).await.unwrap(), [1]);
        assert_eq!(MySql::execute(&mut other, write.clone()).await.is_err(), locks, "{isolation:?}");
        tx.rollback().await.unwrap();
    }
    world.end(db).await;
}

/// A refused begin is the database's answer. The session is closed, and no other is tried.
#[tokio::test]
async fn a_begin_that_is_refused_costs_one_session_and_no_more() {
    for hooked in [false, true] {
        let world = World::<Sqlite>::new().await;
        let builder = TxPool::<Sqlite>::builder().max_connections(2);
        let builder = if hooked { builder.before_begin(|_| Box::pin(async { Ok(()) })) } else { builder };
        let db = builder.connect_with(world.options.clone().busy_timeout(Duration::ZERO)).await.unwrap();
        // Both connections have been used before, so either may have died meanwhile.
        let both = (db.begin().await.unwrap(), db.begin().await.unwrap());
        both.0.rollback().await.unwrap();
        both.1.rollback().await.unwrap();
        eventually("both are at rest", async || db.metrics().idle == 2).await;
        let writer = db.tx().immediate().begin().await.unwrap();
        let error = db.tx().immediate().begin().await.unwrap_err();
        assert!(error.is_transient(), "{error:?}");
        assert_eq!((db.metrics().opened, db.metrics().closed_failed), (2, 1), "hooked: {hooked}");
        writer.rollback().await.unwrap();
        world.end(db).await;
    }
}
