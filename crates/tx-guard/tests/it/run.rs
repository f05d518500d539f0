//! Savepoints, and closures that run as transactions: retry, timeout, hooks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use cancel_safe_tx_guard::{CommitOutcome, Isolation, Retry, TransactionGuard, TxError, TxPool};
use futures_util::FutureExt;
use sqlx::pool::PoolOptions;
use sqlx::{MySql, Postgres, Sqlite};
use tokio::sync::Barrier;

use crate::commit::works_as_before;
use crate::on_all;
use crate::world::{PATIENCE, TestDb, World};

on_all!(
    a_savepoint_undoes_its_part_alone,
    savepoints_nest,
    a_savepoint_that_is_dropped_dooms_the_transaction,
    a_nested_savepoint_that_is_dropped_dooms_the_transaction,
    a_closure_commits_what_it_returns_ok_from,
    a_closure_that_fails_rolls_back_and_hands_its_error_on,
    a_transaction_over_its_time_is_rolled_back,
    hooks_run_once_after_the_commit_alone,
    a_hook_that_panics_keeps_no_other_from_running,
    a_read_only_transaction_writes_nothing,
);

async fn a_savepoint_undoes_its_part_alone<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    let failed = tx
        .savepoint(async |sp| {
            world.insert(sp, 2).await?;
            world.insert(sp, 2).await?;
            Ok::<_, TxError>(())
        })
        .await;
    assert!(matches!(failed, Err(TxError::Database(_))), "{failed:?}");
    let value = tx.savepoint(async |sp| Ok::<_, TxError>(world.insert(sp, 3).await.map(|()| 7)?)).await.unwrap();
    assert_eq!(value, 7);
    tx.commit().await.unwrap();
    assert_eq!(world.committed().await, [1, 3]);
    world.end(db).await;
}

async fn savepoints_nest<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    tx.savepoint(async |outer| {
        world.insert(outer, 1).await?;
        let inner: Result<(), TxError> = outer
            .savepoint(async |inner| {
                world.insert(inner, 2).await?;
                Err(TxError::application("on purpose"))
            })
            .await;
        assert!(matches!(inner, Err(TxError::Application(_))));
        outer.savepoint(async |inner| Ok::<_, TxError>(world.insert(inner, 3).await?)).await
    })
    .await
    .unwrap();
    tx.commit().await.unwrap();
    assert_eq!(world.committed().await, [1, 3]);
    world.end(db).await;
}

async fn a_savepoint_that_is_dropped_dooms_the_transaction<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    drop_a_savepoint(&world, &mut tx).await;
    world.insert(&mut tx, 3).await.unwrap();
    let error = tx.commit().await.unwrap_err();
    assert!(matches!(error, TxError::Lost { .. }), "{error:?}");
    assert!(world.committed().await.is_empty());
    works_as_before(&world, &db).await;
    world.end(db).await;
}

async fn drop_a_savepoint<D: TestDb>(world: &World<D>, tx: &mut TransactionGuard<D>) {
    let halfway = tx.savepoint(async |sp| {
        world.insert(sp, 2).await?;
        std::future::pending::<()>().await;
        Ok::<_, TxError>(())
    });
    assert!(tokio::time::timeout(Duration::from_millis(50), halfway).await.is_err());
}

async fn a_nested_savepoint_that_is_dropped_dooms_the_transaction<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    let outer = tx
        .savepoint(async |outer| {
            drop_a_savepoint(&world, outer).await;
            Ok(())
        })
        .await;
    assert!(matches!(outer, Err(TxError::Lost { .. })), "{outer:?}");
    assert!(matches!(tx.commit().await, Err(TxError::Lost { .. })));
    assert!(world.committed().await.is_empty());
    world.end(db).await;
}

async fn a_closure_commits_what_it_returns_ok_from<D: TestDb>() {
    let world = Arc::new(World::<D>::new().await);
    let db = world.pool(1).await;
    let n = db
        .tx()
        .serializable()
        .timeout(PATIENCE)
        .retry(Retry::default())
        .run(async |tx| {
            world.insert(tx, 1).await?;
            Ok::<_, TxError>(1)
        })
        .await
        .unwrap();
    assert_eq!((n, world.committed().await), (1, vec![1]));
    world.end(db).await;
}

async fn a_closure_that_fails_rolls_back_and_hands_its_error_on<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let attempts = AtomicU32::new(0);
    let failed: Result<(), TxError> = db
        .tx()
        .retry(Retry::attempts(5))
        .run(async |tx| {
            attempts.fetch_add(1, Ordering::Relaxed);
            world.insert(tx, 1).await?;
            Err(TxError::application("overdrawn"))
        })
        .await;
    assert_eq!(failed.unwrap_err().to_string(), "overdrawn");
    assert_eq!(attempts.into_inner(), 1);
    assert!(world.committed().await.is_empty());
    world.end(db).await;
}

async fn a_transaction_over_its_time_is_rolled_back<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let timeout = Duration::from_millis(100);
    let late = db.tx().timeout(timeout).retry(Retry::default()).run(async |tx| {
        world.insert(tx, 1).await?;
        std::future::pending::<Result<(), TxError>>().await
    });
    let error = late.await.unwrap_err();
    assert!(matches!(error, TxError::Timeout { timeout: said } if said == timeout), "{error:?}");
    assert!(error.is_timeout());
    works_as_before(&world, &db).await;
    assert_eq!(world.committed().await, [77]);
    world.end(db).await;
}

async fn hooks_run_once_after_the_commit_alone<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let ran = Arc::new(AtomicU32::new(0));
    let hook = |n: u32| {
        let ran = Arc::clone(&ran);
        move || {
            ran.fetch_add(n, Ordering::Relaxed);
        }
    };
    for committed in [false, true] {
        let mut tx = db.begin().await.unwrap();
        world.insert(&mut tx, 1).await.unwrap();
        tx.after_commit(hook(1));
        let kept = tx.savepoint(async |sp| {
            sp.after_commit(hook(10));
            Ok::<_, TxError>(())
        });
        kept.await.unwrap();
        let undone: Result<(), TxError> = tx
            .savepoint(async |sp| {
                sp.after_commit(hook(100));
                Err(TxError::application("on purpose"))
            })
            .await;
        assert!(undone.is_err());
        assert_eq!(ran.load(Ordering::Relaxed), 0);
        if committed { tx.commit().await.unwrap() } else { tx.rollback().await.unwrap() }
    }
    assert_eq!(ran.load(Ordering::Relaxed), 11);

    // A dropped commit still runs the hooks.
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 2).await.unwrap();
    tx.after_commit(hook(1000));
    let handle = tx.outcome_handle();
    drop(tx.commit().now_or_never());
    assert_eq!(handle.outcome().await, CommitOutcome::Committed);
    world.end(db).await;
    assert_eq!(ran.load(Ordering::Relaxed), 1011);
}

async fn a_hook_that_panics_keeps_no_other_from_running<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    let ran = Arc::new(AtomicU32::new(0));
    tx.after_commit(|| panic!("on purpose"));
    tx.after_commit({
        let ran = Arc::clone(&ran);
        move || ran.store(1, Ordering::Relaxed)
    });
    assert!(tokio::spawn(tx.commit()).await.unwrap_err().is_panic());
    assert_eq!(ran.load(Ordering::Relaxed), 1);
    works_as_before(&world, &db).await;
    assert_eq!(world.committed().await, [1, 77]);
    world.end(db).await;
}

async fn a_read_only_transaction_writes_nothing<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let written = db.tx().read_only().run(async |tx| Ok::<_, TxError>(world.insert(tx, 1).await?)).await;
    assert!(written.is_err());
    let none = format!("SELECT count(*) FROM {}", world.table);
    let read = db.tx().read_only().run(async |tx| Ok::<_, TxError>(D::numbers(tx, none.clone()).await?)).await;
    assert_eq!(read.unwrap(), [0]);
    works_as_before(&world, &db).await;
    assert_eq!(world.committed().await, [77]);
    world.end(db).await;
}

#[tokio::test]
async fn a_closure_with_captures_runs_inside_a_spawned_task() {
    let world = Arc::new(World::<Sqlite>::new().await);
    let db = world.pool(2).await;
    let task = tokio::spawn({
        let (db, world) = (db.clone(), Arc::clone(&world));
        async move {
            let text = String::from("captured");
            db.tx()
                .retry(Retry::default())
                .run(async move |tx| {
                    let n: i64 = sqlx::query_scalar("SELECT length($1)").bind(&text).fetch_one(&mut **tx).await?;
                    world.insert(tx, n).await?;
                    tx.savepoint(async |sp| Ok::<_, TxError>(world.insert(sp, n + 1).await?)).await?;
                    Ok::<_, TxError>(n)
                })
                .await
        }
    });
    assert_eq!(task.await.unwrap().unwrap(), 8);
    assert_eq!(world.committed().await, [8, 9]);
    world.end(db).await;
}

/// Both read before either writes, so one of them has to fail at this isolation level, and succeeds when run again.
#[tokio::test]
async fn a_transient_failure_that_only_the_commit_hears_of_is_run_again() {
    let world = World::<Postgres>::new().await;
    let db = world.pool(1).await;
    let fail = "DO $$ BEGIN PERFORM pg_sleep(0.1); RAISE EXCEPTION 'in vain' USING ERRCODE = '40001'; END $$";
    let mut attempts = 0;
    let run = db.tx().retry(Retry::default()).run(async |tx| {
        attempts += 1;
        world.insert(tx, attempts).await?;
        if attempts == 1 {
            // Nobody waits for the answer, so the commit meets it.
            drop(Postgres::execute(tx, fail.to_owned()).now_or_never());
        }
        Ok::<_, TxError>(())
    });
    run.await.unwrap();
    assert_eq!(world.committed().await, [2]);
    world.end(db).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_serialization_failure_is_run_again_and_no_update_is_lost() {
    let world = World::<Postgres>::new().await;
    world.insert(&mut world.plain().await, 1).await.unwrap();
    let db = world.pool(2).await;
    let both_have_read = Barrier::new(2);
    let attempts = AtomicU32::new(0);
    let increment = async || {
        let mut waited = false;
        db.tx()
            .isolation(Isolation::RepeatableRead)
            .retry(Retry::attempts(5))
            .run(async |tx| {
                attempts.fetch_add(1, Ordering::Relaxed);
                let read = format!("SELECT v FROM {} WHERE n = 1", world.table);
                let v = Postgres::numbers(tx, read).await?[0];
                if !std::mem::replace(&mut waited, true) {
                    both_have_read.wait().await;
                }
                Ok::<_, TxError>(
                    Postgres::execute(tx, format!("UPDATE {} SET v = {} WHERE n = 1", world.table, v + 1)).await?,
                )
            })
            .await
            .unwrap();
    };
    tokio::join!(increment(), increment());
    let v = format!("SELECT v FROM {}", world.table);
    assert_eq!(Postgres::numbers(&mut world.plain().await, v).await.unwrap(), [2]);
    assert_eq!(attempts.load(Ordering::Relaxed), 3);
    world.end(db).await;
}

/// The lock for writing is taken at the beginning, so no upgrade from reading can fail.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serializable_increments_on_sqlite_lose_no_update() {
    let world = World::<Sqlite>::new().await;
    world.insert(&mut world.plain().await, 1).await.unwrap();
    let db = world.pool(2).await;
    let increment = async || {
        for _ in 0..10 {
            let run = db.tx().serializable().run(async |tx| {
                let v = Sqlite::numbers(tx, format!("SELECT v FROM {}", world.table)).await?[0];
                Ok::<_, TxError>(Sqlite::execute(tx, format!("UPDATE {} SET v = {}", world.table, v + 1)).await?)
            });
            run.await.unwrap();
        }
    };
    tokio::join!(increment(), increment());
    let v = format!("SELECT v FROM {}", world.table);
    assert_eq!(Sqlite::numbers(&mut world.plain().await, v).await.unwrap(), [20]);
    world.end(db).await;
}

#[tokio::test]
async fn the_server_ends_a_statement_at_the_deadline_even_if_nobody_asks() {
    let world = World::<Postgres>::new().await;
    let db = world.pool(1).await;
    let limits = db.tx().timeout(Duration::from_secs(7)).run(async |tx| {
        let settings = "SELECT setting::bigint FROM pg_settings
            WHERE name IN ('statement_timeout', 'idle_in_transaction_session_timeout') ORDER BY name DESC";
        Ok::<_, TxError>(Postgres::numbers(tx, settings.to_owned()).await?)
    });
    let limits = limits.await.unwrap();
    // The server's limits come a moment after the client's own, so a client that is still there never meets them.
    assert!(limits.iter().all(|limit| (1..=8_000).contains(limit)), "{limits:?}");
    assert!(limits[0] <= 7_250 && limits[1] == limits[0] + 750, "{limits:?}");
    world.end(db).await;
}

/// SQLite says so only when it comes to the commit.
#[tokio::test]
async fn a_write_where_nothing_is_to_be_written_is_named_on_sqlite() {
    let world = World::<Sqlite>::new().await;
    let db = world.pool(1).await;
    let error = db.tx().read_only().run(async |tx| Ok(world.insert(tx, 1).await?)).await.unwrap_err();
    assert!(matches!(error, TxError::Lost { .. }), "{error:?}");
    assert!(error.to_string().contains("read only"), "{error}");
    assert!(world.committed().await.is_empty());
    world.end(db).await;
}

/// Its sessions are not ours, and accept any write.
#[tokio::test]
async fn a_read_only_transaction_on_a_wrapped_pool_writes_nothing() {
    async fn on<D: TestDb>() {
        let world = World::<D>::new().await;
        let pool = PoolOptions::<D>::new().max_connections(1).connect_with(world.options.clone()).await.unwrap();
        let db = TxPool::wrap(pool.clone());
        let error = db.tx().read_only().run(async |tx| Ok(world.insert(tx, 1).await?)).await.unwrap_err();
        assert!(matches!(error, TxError::Database(_)), "{error:?}");
        assert!(world.committed().await.is_empty());
        works_as_before(&world, &db).await;
        world.end(db).await;
        pool.close().await;
    }
    on::<Postgres>().await;
    on::<MySql>().await;
}
