//! A pool's own work before a transaction, dropped at every await point: changing options, hooks, the check of an
//! abandoned attempt, the preparation of a statement.

use std::time::Duration;

use cancel_safe_testing::Report;
use cancel_safe_tx_guard::{HookFuture, Reset, Retry, TxError, TxPool};
use sqlx::{AssertSqlSafe, Executor, MySql, Postgres, SqlSafeStr, Sqlite};

use crate::cancel::{Stage, explore, explore_unstarved, side_by_side};
use crate::world::TestDb;

fn ask<D: TestDb>(conn: &mut D::Connection) -> HookFuture<'_, ()> {
    Box::pin(D::execute(conn, "SELECT 1".to_owned()))
}

/// Everything that a pool can do for its sessions, from the first one on.
fn hooks<D: TestDb>() -> Report {
    explore_unstarved().run(
        async || Stage::<D>::new().await,
        async |stage| {
            let options = stage.world.options.clone();
            let db = TxPool::<D>::builder()
                .max_connections(1)
                .reset(Reset::Discard)
                .after_connect(ask::<D>)
                .before_begin(ask::<D>)
                .after_release(|conn| {
                    Box::pin(async move { D::execute(conn, "SELECT 1".to_owned()).await.map(|()| true) })
                })
                .connect_with_fn(move || {
                    let options = options.clone();
                    async move {
                        tokio::task::yield_now().await;
                        Ok(options)
                    }
                });
            let db = db.await.unwrap();
            // The second transaction comes after the upkeep of the first one's session.
            for n in [1, 2] {
                let mut tx = db.begin().await.unwrap();
                if n == 2 {
                    stage.handle.replace(Some(tx.outcome_handle()));
                }
                stage.world.insert(&mut tx, n).await.unwrap();
                match n {
                    1 => tx.rollback().await.unwrap(),
                    _ => tx.commit().await.unwrap(),
                }
            }
        },
        async |stage, outcome| stage.check(outcome, &[2]).await,
    )
}

#[test]
fn a_pool_with_hooks_dropped_anywhere_is_whole_or_nothing() {
    side_by_side([
        || hooks::<Sqlite>().publish("tx-guard", "hooks (SQLite)").assert_clean(),
        || hooks::<Postgres>().publish("tx-guard", "hooks (PostgreSQL)").assert_clean(),
        || hooks::<MySql>().publish("tx-guard", "hooks (MySQL)").assert_clean(),
    ]);
}

/// The first guard is dropped while its statement runs, so the second attempt waits for the end of it.
fn given_up<D: TestDb>() -> Report {
    explore().run(
        async || Stage::<D>::new().await,
        async |stage| {
            let retry = Retry::attempts(2).backoff(Duration::from_millis(2), Duration::from_millis(2));
            let mut attempts = stage.db.tx().retry(retry).attempts();
            let mut first = attempts.next().await.unwrap();
            stage.handle.replace(Some(first.outcome_handle()));
            stage.world.insert(&mut first, 1).await.unwrap();
            drop(first);
            let mut second = attempts.next().await.unwrap();
            stage.handle.replace(Some(second.outcome_handle()));
            stage.world.insert(&mut second, 2).await.unwrap();
            assert!(attempts.end(second, Ok::<_, TxError>(())).await.unwrap().is_some());
        },
        async |stage, outcome| stage.check(outcome, &[2]).await,
    )
}

#[test]
fn an_attempt_behind_one_that_was_given_up_dropped_anywhere_is_whole_or_nothing() {
    side_by_side([
        || given_up::<Sqlite>().publish("tx-guard", "attempts, given up (SQLite)").assert_clean(),
        || given_up::<Postgres>().publish("tx-guard", "attempts, given up (PostgreSQL)").assert_clean(),
        || given_up::<MySql>().publish("tx-guard", "attempts, given up (MySQL)").assert_clean(),
    ]);
}

fn prepared<D: TestDb>() -> Report
where
    for<'p> &'p TxPool<D>: Executor<'p, Database = D>,
{
    explore_unstarved().run(
        async || Stage::<D>::new().await,
        async |stage| {
            let sql = AssertSqlSafe(format!("SELECT n FROM {}", stage.world.table)).into_sql_str();
            let statement = (&stage.db).prepare(sql).await;
            drop(statement.unwrap());
        },
        async |stage, outcome| stage.check(outcome, &[]).await,
    )
}

#[test]
fn a_statement_that_is_prepared_on_a_pool_dropped_anywhere_leaves_nothing() {
    side_by_side([
        || prepared::<Postgres>().publish("tx-guard", "prepare (PostgreSQL)").assert_clean(),
        || prepared::<MySql>().publish("tx-guard", "prepare (MySQL)").assert_clean(),
    ]);
}
