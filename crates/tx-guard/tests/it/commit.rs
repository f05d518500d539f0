//! The results of a commit: `Ok` means committed, all other results are distinct, and the handle reports a dropped one.

use std::time::Duration;

use cancel_safe_testing::drop_after;
use cancel_safe_tx_guard::{CommitError, CommitMode, CommitOutcome, TxError, TxEvent, TxPool};
use futures_util::FutureExt;
use sqlx::{AssertSqlSafe, Connection, Postgres, Sqlite};

use crate::on_all;
use crate::world::{PATIENCE, TestDb, World, eventually};

on_all!(
    a_raw_commit_inside_the_guard_is_caught,
    a_cancelled_nested_begin_is_caught_at_every_poll,
    a_nested_transaction_that_ends_properly_is_fine,
    a_dropped_commit_is_told_by_its_handle,
    a_commit_that_is_never_polled_rolls_back,
    a_commit_in_time_says_ok,
);

async fn a_raw_commit_inside_the_guard_is_caught<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    for written in [false, true] {
        let mut tx = db.begin().await.unwrap();
        if written {
            world.insert(&mut tx, 1).await.unwrap();
        }
        // SQLite's commit hook refuses this at once; PostgreSQL commits, and the guard's own commit reports it.
        drop(D::execute(&mut tx, "COMMIT".to_owned()).await);
        let handle = tx.outcome_handle();
        let error = tx.commit().await.unwrap_err();
        assert!(matches!(error, TxError::Lost { .. }), "{error:?}");
        // The SQL that ended the transaction has not told the guard how.
        let told = handle.outcome().await == CommitOutcome::Committed;
        assert!(!told && (handle.outcome().await == CommitOutcome::Unknown || world.committed().await.is_empty()));
    }
    works_as_before(&world, &db).await;
    world.end(db).await;
}

/// sqlx rolls the OUTER transaction back when a nested `begin` is cancelled.
async fn a_cancelled_nested_begin_is_caught_at_every_poll<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut caught = 0;
    // SQLite's thread may answer before the first poll is over, and then a round has nothing to cancel.
    for _ in 0..200 {
        for polls in 1.. {
            if !cancel_a_nested_begin(&world, &db, polls, true, &mut caught).await {
                break;
            }
            // Without a statement in between, only the commit itself can notice.
            cancel_a_nested_begin(&world, &db, polls, false, &mut caught).await;
        }
        if caught > 0 {
            break;
        }
    }
    assert!(caught > 0, "no cancelled begin did any harm, so this test shows nothing");
    works_as_before(&world, &db).await;
    world.end(db).await;
}

/// Whether the nested `begin` was still under way after `polls` polls.
async fn cancel_a_nested_begin<D: TestDb>(
    world: &World<D>,
    db: &TxPool<D>,
    polls: usize,
    write_after: bool,
    caught: &mut u32,
) -> bool {
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    if drop_after(polls, tx.begin()).await.is_some() {
        tx.rollback().await.unwrap();
        return false;
    }
    if write_after {
        drop(world.insert(&mut tx, 2).await);
    }
    // Whether or not sqlx has lost the transaction, it must not be committed in part.
    match tx.commit().await {
        Ok(()) => {
            let whole: &[i64] = if write_after { &[1, 2] } else { &[1] };
            assert_eq!(world.committed().await, whole);
            world.run(format!("DELETE FROM {}", world.table)).await;
        }
        Err(error) => {
            assert!(matches!(error, TxError::Lost { .. }), "{error:?}");
            *caught += 1;
        }
    }
    assert!(world.committed().await.is_empty(), "a statement after the loss was committed by itself");
    true
}

async fn a_nested_transaction_that_ends_properly_is_fine<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    let mut nested = tx.begin().await.unwrap();
    world.insert(&mut nested, 2).await.unwrap();
    nested.rollback().await.unwrap();
    let mut nested = tx.begin().await.unwrap();
    world.insert(&mut nested, 3).await.unwrap();
    nested.commit().await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(world.committed().await, [1, 3]);
    world.end(db).await;
}

async fn a_dropped_commit_is_told_by_its_handle<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    // A database may answer before the first poll is over.
    for n in 1.. {
        let mut tx = db.begin().await.unwrap();
        let handle = tx.outcome_handle();
        world.insert(&mut tx, n).await.unwrap();
        let said = tx.commit().now_or_never();
        assert_eq!(handle.outcome().await, CommitOutcome::Committed);
        assert!(world.committed().await.contains(&n));
        if said.is_none() {
            break;
        }
    }
    world.end(db).await;
}

async fn a_commit_that_is_never_polled_rolls_back<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    let handle = tx.outcome_handle();
    world.insert(&mut tx, 1).await.unwrap();
    drop(tx.commit());
    assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
    assert!(world.committed().await.is_empty());
    world.end(db).await;
}

async fn a_commit_in_time_says_ok<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    tx.commit_within(PATIENCE).await.unwrap();
    assert_eq!(world.committed().await, [1]);
    world.end(db).await;
}

/// A transaction on the only connection of the pool commits and is seen.
pub(crate) async fn works_as_before<D: TestDb>(world: &World<D>, db: &TxPool<D>) {
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 77).await.unwrap();
    tx.commit().await.unwrap();
    assert!(world.committed().await.contains(&77));
}

/// A commit by its SQL is not reported as rolled back.
#[tokio::test]
async fn a_raw_commit_is_noticed_without_a_commit_of_the_guard() {
    let world = World::<Postgres>::new().await;
    let db = world.pool(1).await;
    for (n, explicit) in [(1, true), (2, false)] {
        let mut tx = db.begin().await.unwrap();
        world.insert(&mut tx, n).await.unwrap();
        Postgres::execute(&mut tx, "COMMIT".to_owned()).await.unwrap();
        let handle = tx.outcome_handle();
        if explicit {
            let error = tx.rollback().await.unwrap_err();
            assert!(matches!(error, TxError::Lost { .. }), "{error:?}");
        } else {
            drop(tx);
        }
        assert_eq!(handle.outcome().await, CommitOutcome::Unknown);
    }
    assert_eq!(world.committed().await, [1, 2]);
    works_as_before(&world, &db).await;
    world.end(db).await;
}

#[tokio::test]
async fn committing_an_aborted_transaction_is_an_error() {
    let world = World::<Postgres>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    let handle = tx.outcome_handle();
    world.insert(&mut tx, 1).await.unwrap();
    world.insert(&mut tx, 1).await.unwrap_err();
    let error = tx.commit().await.unwrap_err();
    assert!(matches!(error, TxError::Aborted { .. }), "{error:?}");
    assert!(!error.is_unknown());
    assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
    works_as_before(&world, &db).await;

    // Plain sqlx returns Ok in the same case, so the check above can fail.
    let mut conn = world.plain().await;
    let mut tx = conn.begin().await.unwrap();
    world.insert(&mut tx, 2).await.unwrap();
    world.insert(&mut tx, 2).await.unwrap_err();
    tx.commit().await.unwrap();
    assert!(!world.committed().await.contains(&2));
    world.end(db).await;
}

#[tokio::test]
async fn a_deferred_constraint_refuses_the_commit_and_the_connection_lives_on() {
    let world = World::<Postgres>::new().await;
    let table = &world.table;
    world
        .run(format!(
            "ALTER TABLE {table} ADD COLUMN parent BIGINT REFERENCES {table} (n) DEFERRABLE INITIALLY DEFERRED"
        ))
        .await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *tx).await.unwrap();
    Postgres::execute(&mut tx, format!("INSERT INTO {table} (n, parent) VALUES (1, 2)")).await.unwrap();
    let error = tx.commit().await.unwrap_err();
    let code = error.as_sqlx().and_then(|e| e.as_database_error()?.code()).map(|code| code.into_owned());
    assert!(matches!(error, TxError::Database(_)), "{error:?}");
    assert_eq!(code.as_deref(), Some("23503"));
    let mut tx = db.begin().await.unwrap();
    let after: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *tx).await.unwrap();
    assert_eq!(pid, after);
    drop(tx);
    works_as_before(&world, &db).await;
    world.end(db).await;
}

#[tokio::test]
async fn a_late_outcome_is_told_alike_by_event_and_handle() {
    let world = World::<Postgres>::new().await;
    let db = world.pool(1).await;
    let mut events = db.events();
    // If the server answers before the first poll is over, the outcome is not late.
    let handle = loop {
        let mut tx = db.begin().await.unwrap();
        Postgres::execute(&mut tx, "COMMIT".to_owned()).await.unwrap();
        let handle = tx.outcome_handle();
        if tx.commit().now_or_never().is_none() {
            break handle;
        }
    };
    assert_eq!(handle.outcome().await, CommitOutcome::Unknown);
    let mut told = events.next().await;
    while told == Some(TxEvent::CancelSent) {
        // The machine is busy, and cleaning up after such a commit takes time.
        told = events.next().await;
    }
    assert_eq!(told, Some(TxEvent::LateOutcome(CommitOutcome::Unknown)));
    world.end(db).await;
}

#[tokio::test]
async fn a_slow_commit_is_handed_over_and_told_later() {
    let world = World::<Postgres>::new().await;
    let table = &world.table;
    world
        .run(format!(
            "CREATE FUNCTION {table}_slow() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END $$;
             CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON {table} DEFERRABLE INITIALLY DEFERRED
                 FOR EACH ROW EXECUTE FUNCTION {table}_slow()"
        ))
        .await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    let pending = tx.commit_within(Duration::from_millis(10)).await.unwrap_err();
    assert!(pending.is_pending());
    let CommitError::Pending(handle) = pending else { panic!("{pending:?}") };
    assert_eq!(handle.outcome().await, CommitOutcome::Committed);
    assert_eq!(world.committed().await, [1]);
    world.end(db).await;
    world.run(format!("DROP FUNCTION {table}_slow")).await;
}

#[tokio::test]
async fn a_session_that_is_killed_in_its_commit_is_in_doubt_until_the_server_is_asked() {
    for mode in [CommitMode::Verified, CommitMode::Resolvable] {
        kill_in_commit(mode).await;
    }
}

async fn kill_in_commit(mode: CommitMode) {
    let world = World::<Postgres>::new().await;
    let table = &world.table;
    world
        .run(format!(
            "CREATE FUNCTION {table}_slow() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN PERFORM pg_sleep(10); RETURN NULL; END $$;
             CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON {table} DEFERRABLE INITIALLY DEFERRED
                 FOR EACH ROW EXECUTE FUNCTION {table}_slow()"
        ))
        .await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    tx.set_commit_mode(mode);
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *tx).await.unwrap();
    let handle = tx.outcome_handle();
    world.insert(&mut tx, 1).await.unwrap();
    let commit = tokio::spawn(tx.commit());
    let mut other = world.plain().await;
    eventually("the commit sleeps in its trigger", async || {
        let waits = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND wait_event = 'PgSleep'");
        Postgres::numbers(&mut other, waits).await.unwrap() == [1]
    })
    .await;
    Postgres::execute(&mut other, format!("SELECT pg_terminate_backend({pid})")).await.unwrap();
    let error = commit.await.unwrap().unwrap_err();
    let resolved = mode == CommitMode::Resolvable;
    assert_eq!(error.is_unknown(), !resolved, "{error:?}");
    let outcome = if resolved { CommitOutcome::RolledBack } else { CommitOutcome::Unknown };
    assert_eq!(handle.outcome().await, outcome);
    world.run(format!("DROP TRIGGER slow ON {table}")).await;
    works_as_before(&world, &db).await;
    world.end(db).await;
    world.run(format!("DROP FUNCTION {table}_slow")).await;
}

#[tokio::test]
async fn a_write_that_sqlite_rolled_back_by_itself_is_caught() {
    let world = World::<Sqlite>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    let rollback = format!("INSERT OR ROLLBACK INTO {} (n) VALUES (1)", world.table);
    sqlx::query(AssertSqlSafe(rollback)).execute(&mut *tx).await.unwrap_err();
    // Without the commit hook, this would now be committed by itself, outside any transaction.
    world.insert(&mut tx, 2).await.unwrap_err();
    let error = tx.commit().await.unwrap_err();
    assert!(matches!(error, TxError::Lost { .. }), "{error:?}");
    assert!(world.committed().await.is_empty());
    works_as_before(&world, &db).await;
    world.end(db).await;
}
