//! The APIs for code that does not fit a closure, dropped at every await point: a loop of attempts, a boxed future, a
//! guard in hand with a deadline.

use std::sync::Mutex;
use std::time::Duration;

use cancel_safe_testing::Report;
use cancel_safe_tx_guard::{OutcomeHandle, Retry, TxError};
use sqlx::{MySql, Postgres, Sqlite};

use crate::cancel::{Stage, explore, explore_unstarved, side_by_side};
use crate::stuck::Transient;
use crate::world::{PATIENCE, TestDb};

/// The first attempt fails transiently.
fn attempts<D: Transient>() -> Report {
    explore().run(
        async || Stage::<D>::new().await,
        async |stage| {
            let retry = Retry::attempts(2).backoff(Duration::from_millis(2), Duration::from_millis(2));
            let mut attempts = stage.db.tx().timeout(PATIENCE).retry(retry).attempts();
            let mut made = 0;
            loop {
                let mut tx = attempts.next().await.unwrap();
                stage.handle.replace(Some(tx.outcome_handle()));
                made += 1;
                let work = async {
                    stage.world.insert(&mut tx, 1).await?;
                    if made == 1 { Err(D::transient(&mut tx).await) } else { Ok(()) }
                };
                let worked = attempts.within(work).await;
                if attempts.end(tx, worked).await.unwrap().is_some() {
                    break;
                }
            }
        },
        async |stage, outcome| stage.check(outcome, &[1]).await,
    )
}

#[test]
fn a_loop_of_attempts_dropped_anywhere_is_whole_or_nothing_on_sqlite() {
    attempts::<Sqlite>().publish("tx-guard", "attempts (SQLite)").assert_clean();
}

#[test]
fn a_loop_of_attempts_dropped_anywhere_is_whole_or_nothing_on_postgres() {
    attempts::<Postgres>().publish("tx-guard", "attempts (PostgreSQL)").assert_clean();
}

#[test]
fn a_loop_of_attempts_dropped_anywhere_is_whole_or_nothing_on_mysql() {
    attempts::<MySql>().publish("tx-guard", "attempts (MySQL)").assert_clean();
}

/// The end of an attempt whose work has failed for good.
fn failing<D: TestDb>() -> Report {
    explore_unstarved().run(
        async || Stage::<D>::new().await,
        async |stage| {
            let mut attempts = stage.db.tx().retry(Retry::default()).attempts();
            let mut tx = attempts.next().await.unwrap();
            stage.handle.replace(Some(tx.outcome_handle()));
            stage.world.insert(&mut tx, 1).await.unwrap();
            attempts.end(tx, Err::<(), _>(TxError::application("on purpose"))).await.unwrap_err();
        },
        async |stage, outcome| stage.check(outcome, &[]).await,
    )
}

#[test]
fn the_end_of_what_has_failed_dropped_anywhere_leaves_nothing() {
    side_by_side([
        || failing::<Sqlite>().publish("tx-guard", "attempts, failing (SQLite)").assert_clean(),
        || failing::<Postgres>().publish("tx-guard", "attempts, failing (PostgreSQL)").assert_clean(),
        || failing::<MySql>().publish("tx-guard", "attempts, failing (MySQL)").assert_clean(),
    ]);
}

fn boxed<D: TestDb>() -> Report {
    explore_unstarved().run(
        async || (Stage::<D>::new().await, Mutex::new(None::<OutcomeHandle>)),
        async |(stage, handle)| {
            let world = &stage.world;
            let run = stage.db.tx().run_boxed(|mut tx| {
                Box::pin(async move {
                    *handle.lock().unwrap() = Some(tx.outcome_handle());
                    world.insert(&mut tx, 1).await?;
                    let insert = tx.savepoint_boxed(|mut sp| {
                        Box::pin(async move { Ok::<_, TxError>(world.insert(&mut sp, 2).await?) })
                    });
                    insert.await
                })
            });
            run.await.unwrap();
        },
        async |(stage, handle), outcome| {
            stage.handle.replace(handle.lock().unwrap().take());
            stage.check(outcome, &[1, 2]).await
        },
    )
}

#[test]
fn boxed_work_with_a_savepoint_dropped_anywhere_is_whole_or_nothing() {
    side_by_side([
        || boxed::<Sqlite>().publish("tx-guard", "run_boxed (SQLite)").assert_clean(),
        || boxed::<Postgres>().publish("tx-guard", "run_boxed (PostgreSQL)").assert_clean(),
        || boxed::<MySql>().publish("tx-guard", "run_boxed (MySQL)").assert_clean(),
    ]);
}

/// The time is over at the commit, so a rollback is driven to its end.
fn too_late<D: TestDb>() -> Report {
    explore_unstarved().run(
        async || Stage::<D>::new().await,
        async |stage| {
            let limit = Duration::from_millis(100);
            let Ok(mut tx) = stage.db.tx().immediate().timeout(limit).begin().await else { return };
            stage.handle.replace(Some(tx.outcome_handle()));
            // On a busy machine, the transaction's own limit may pass in here.
            drop(stage.world.insert(&mut tx, 1).await);
            tokio::time::sleep(limit).await;
            assert!(tx.commit().await.unwrap_err().is_timeout());
        },
        async |stage, outcome| stage.check(outcome, &[]).await,
    )
}

#[test]
fn a_guard_in_hand_that_is_too_late_dropped_anywhere_leaves_nothing() {
    side_by_side([
        || too_late::<Sqlite>().publish("tx-guard", "begin, too late (SQLite)").assert_clean(),
        || too_late::<Postgres>().publish("tx-guard", "begin, too late (PostgreSQL)").assert_clean(),
        || too_late::<MySql>().publish("tx-guard", "begin, too late (MySQL)").assert_clean(),
    ]);
}
