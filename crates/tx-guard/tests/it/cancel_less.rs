//! Less usual cases, dropped at every await point: failing attempts, commits that leave a receipt, statements that
//! still run, connections that are idle when their pool is closed.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use cancel_safe_testing::{Report, Way};
use cancel_safe_tx_guard::{CommitMode, Retry, TxError, TxPool};
use sqlx::{MySql, Postgres, Sqlite};

use crate::cancel::{Stage, explore, side_by_side, within};
use crate::world::{PATIENCE, TestDb, World};

#[test]
fn a_closure_that_is_run_again_dropped_anywhere_is_whole_or_nothing() {
    let report = explore().run(
        async || Stage::<Postgres>::new().await,
        async |stage| {
            let attempts = Cell::new(0);
            let retry = Retry::attempts(2).backoff(Duration::from_millis(2), Duration::from_millis(2));
            // With a receipt, so the outcome could be asked for on another connection.
            let tx = stage.db.tx().retry(retry).commit_mode(CommitMode::Resolvable);
            let run = tx.run(async |tx| {
                stage.handle.replace(Some(tx.outcome_handle()));
                stage.world.insert(tx, 1).await?;
                attempts.set(attempts.get() + 1);
                if attempts.get() == 1 {
                    let fail = "DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$".to_owned();
                    Postgres::execute(tx, fail).await?;
                }
                Ok::<_, TxError>(())
            });
            run.await.unwrap();
        },
        async |stage, outcome| stage.check(outcome, &[1]).await,
    );
    report.publish("tx-guard", "run, again (PostgreSQL)").assert_clean();
}

fn failing_closure<D: TestDb>() -> Report {
    explore().run(
        async || Stage::<D>::new().await,
        async |stage| {
            let run = stage.db.tx().run(async |tx| {
                stage.handle.replace(Some(tx.outcome_handle()));
                stage.world.insert(tx, 1).await?;
                Err::<(), _>(TxError::from(sqlx::Error::RowNotFound))
            });
            run.await.unwrap_err();
        },
        async |stage, outcome| stage.check(outcome, &[]).await,
    )
}

#[test]
fn a_closure_that_fails_dropped_anywhere_leaves_nothing() {
    side_by_side([
        || failing_closure::<Sqlite>().publish("tx-guard", "run, failing (SQLite)").assert_clean(),
        || failing_closure::<Postgres>().publish("tx-guard", "run, failing (PostgreSQL)").assert_clean(),
        || failing_closure::<MySql>().publish("tx-guard", "run, failing (MySQL)").assert_clean(),
    ]);
}

/// A statement that would run for hours is dropped, and the rollback after it has to cancel it.
fn rollback_behind_a_statement<D: TestDb>() -> Report {
    explore().budgets([]).ways([Way::Eager, Way::Settled]).run(
        async || {
            let stage = Stage::<D>::new().await;
            let mut tx = stage.db.begin().await.unwrap();
            stage.world.insert(&mut tx, 1).await.unwrap();
            let slow = D::execute(&mut tx, D::SLOW.to_owned());
            tokio::time::timeout(Duration::from_millis(10), slow).await.unwrap_err();
            stage.handle.replace(Some(tx.outcome_handle()));
            (stage, RefCell::new(Some(tx)))
        },
        async |(_, tx)| {
            let tx = tx.take().unwrap();
            tx.rollback().await.unwrap();
        },
        async |(stage, tx), outcome| {
            // If it was never polled, the operation has not even taken the transaction.
            drop(tx.take());
            stage.check(outcome, &[]).await
        },
    )
}

#[test]
fn a_rollback_behind_a_statement_dropped_anywhere_ends_both() {
    side_by_side([
        || rollback_behind_a_statement::<Sqlite>().publish("tx-guard", "rollback, behind (SQLite)").assert_clean(),
        || {
            rollback_behind_a_statement::<Postgres>()
                .publish("tx-guard", "rollback, behind (PostgreSQL)")
                .assert_clean()
        },
        || rollback_behind_a_statement::<MySql>().publish("tx-guard", "rollback, behind (MySQL)").assert_clean(),
    ]);
}

/// A pool whose connections are idle is closed.
fn closing<D: TestDb>() -> Report {
    explore().ways([Way::Eager, Way::Settled]).run(
        async || {
            let world = World::<D>::new().await;
            let db: TxPool<D> = world.pool(2).await;
            let (one, two) = (db.begin().await.unwrap(), db.begin().await.unwrap());
            one.commit().await.unwrap();
            two.rollback().await.unwrap();
            (world, db)
        },
        async |(_, db)| db.close(PATIENCE).await.is_clean(),
        async |(world, db), _| {
            let report = within(db.close(PATIENCE)).await?;
            world.run(format!("DROP TABLE {}", world.table)).await;
            match db.begin().await {
                Err(TxError::Closed) if report.is_clean() => Ok(()),
                begun => Err(format!("{report}, and a begin says {:?}", begun.err())),
            }
        },
    )
}

#[test]
fn closing_a_pool_of_idle_connections_dropped_anywhere_can_be_repeated() {
    side_by_side([
        || closing::<Sqlite>().publish("tx-guard", "close, idle (SQLite)").assert_clean(),
        || closing::<Postgres>().publish("tx-guard", "close, idle (PostgreSQL)").assert_clean(),
        || closing::<MySql>().publish("tx-guard", "close, idle (MySQL)").assert_clean(),
    ]);
}
