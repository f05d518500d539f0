//! Everyday use: begin, run, commit, roll back, drop, close.

use std::time::Duration;

use cancel_safe_tx_guard::{CommitOutcome, TransactionGuard, TxError, TxEvent, TxPool};
use sqlx::pool::PoolOptions;
use sqlx::{Postgres, Sqlite};

use crate::on_all;
use crate::world::{PATIENCE, TestDb, World};

on_all!(
    a_commit_is_seen_by_others,
    a_rollback_leaves_nothing,
    a_drop_rolls_back_and_gives_the_connection_back,
    a_guard_is_begun_on_a_plain_sqlx_pool,
    a_wrapped_pool_works_and_stays_open,
    a_pool_with_all_connections_in_use_says_so,
    a_closed_pool_begins_nothing,
    closing_reports_a_guard_that_is_still_in_use,
    tasks_share_the_pool,
    a_guard_moves_between_tasks,
);

async fn a_commit_is_seen_by_others<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    for n in 1..=3 {
        let mut tx = db.begin().await.unwrap();
        let handle = tx.outcome_handle();
        world.insert(&mut tx, n).await.unwrap();
        assert_eq!(handle.try_outcome(), None);
        tx.commit().await.unwrap();
        assert_eq!(handle.outcome().await, CommitOutcome::Committed);
    }
    assert_eq!(world.committed().await, [1, 2, 3]);
    world.end(db).await;
}

async fn a_rollback_leaves_nothing<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    let handle = tx.outcome_handle();
    world.insert(&mut tx, 1).await.unwrap();
    tx.rollback().await.unwrap();
    assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
    assert!(world.committed().await.is_empty());
    world.end(db).await;
}

async fn a_drop_rolls_back_and_gives_the_connection_back<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    for n in 0..10 {
        let mut tx = db.begin().await.unwrap();
        let handle = tx.outcome_handle();
        world.insert(&mut tx, n).await.unwrap();
        drop(tx);
        assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
    }
    assert!(world.committed().await.is_empty());
    world.end(db).await;
}

async fn a_guard_is_begun_on_a_plain_sqlx_pool<D: TestDb>() {
    let world = World::<D>::new().await;
    let pool = PoolOptions::<D>::new().max_connections(1).connect_with(world.options.clone()).await.unwrap();
    let mut tx: TransactionGuard<D> = TransactionGuard::new(&pool).await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    tx.commit().await.unwrap();
    drop(TransactionGuard::new(&pool).await.unwrap());
    assert_eq!(world.committed().await, [1]);
    world.end(TxPool::wrap(pool.clone())).await;
    pool.close().await;
}

async fn a_wrapped_pool_works_and_stays_open<D: TestDb>() {
    let world = World::<D>::new().await;
    let pool = PoolOptions::<D>::new().max_connections(1).connect_with(world.options.clone()).await.unwrap();
    let db = TxPool::wrap(pool.clone());
    for n in 0..6 {
        let mut tx = db.begin().await.unwrap();
        world.insert(&mut tx, n).await.unwrap();
        match n % 3 {
            0 => tx.commit().await.unwrap(),
            1 => tx.rollback().await.unwrap(),
            _ => drop(tx),
        }
        // The guards do not change the user's own use of the pool: its writes are committed at once.
        let mut conn = pool.acquire().await.unwrap();
        world.insert(&mut conn, 100 + n).await.unwrap();
    }
    assert_eq!(world.committed().await, [0, 3, 100, 101, 102, 103, 104, 105]);
    world.end(db).await;
    assert!(!pool.is_closed());
    pool.close().await;
}

async fn a_pool_with_all_connections_in_use_says_so<D: TestDb>() {
    let world = World::<D>::new().await;
    // Long enough to open the two connections.
    let short = Duration::from_secs(2);
    let builder = TxPool::<D>::builder().max_connections(2).acquire_timeout(short);
    let db = builder.connect_with(world.options.clone()).await.unwrap();
    let held = (db.begin().await.unwrap(), db.begin().await.unwrap());
    let error = db.begin().await.unwrap_err();
    assert!(matches!(error, TxError::PoolExhausted { max_connections: 2, timeout, .. } if timeout == short), "{error}");
    assert!(error.is_timeout());
    drop(held);
    world.end(db).await;
}

async fn a_closed_pool_begins_nothing<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let held = db.begin().await.unwrap();
    let waiting = tokio::spawn({
        let db = db.clone();
        async move { db.begin().await.map(drop) }
    });
    let (report, ()) = tokio::join!(db.close(PATIENCE), async {
        let waiter = waiting.await.unwrap();
        assert!(matches!(waiter, Err(TxError::Closed)), "{waiter:?}");
        held.commit().await.unwrap();
    });
    assert!(report.is_clean(), "{report}");
    assert!(matches!(db.begin().await, Err(TxError::Closed)));
    world.end(db).await;
}

async fn closing_reports_a_guard_that_is_still_in_use<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(2).await;
    let held = db.begin().await.unwrap();
    let report = db.close(Duration::from_millis(10)).await;
    assert_eq!((report.in_use, report.settling, report.is_clean()), (1, 0, false));
    drop(held);
    world.end(db).await;
}

async fn tasks_share_the_pool<D: TestDb>() {
    let world = std::sync::Arc::new(World::<D>::new().await);
    let db = world.pool(3).await;
    let mut tasks = Vec::new();
    for task in 0..6 {
        let (db, world) = (db.clone(), world.clone());
        tasks.push(async move {
            for n in 0..5 {
                let mut tx = db.begin().await.unwrap();
                world.insert(&mut tx, task * 10 + n).await.unwrap();
                match n % 2 {
                    0 => tx.commit().await.unwrap(),
                    _ => drop(tx),
                }
            }
        });
    }
    futures_util::future::join_all(tasks).await;
    assert_eq!(world.committed().await.len(), 18);
    world.end(db).await;
}

async fn a_guard_moves_between_tasks<D: TestDb>() {
    fn portable<T: Send + 'static>(value: T) -> T {
        value
    }
    fn shareable<T: Clone + Send + Sync + 'static>(value: T) -> T {
        value
    }
    let world = World::<D>::new().await;
    let db = shareable(world.pool(1).await);
    let mut tx = portable(db.begin().await.unwrap());
    world.insert(&mut tx, 1).await.unwrap();
    let committed = std::thread::spawn(move || futures_util::FutureExt::now_or_never(portable(tx.commit())));
    // A commit that is polled once on a thread without a runtime, and dropped there, still runs to its end.
    drop(committed.join().unwrap());
    crate::world::eventually("the row is committed", async || world.committed().await == [1]).await;
    world.end(db).await;
}

#[tokio::test]
async fn an_sqlx_statement_runs_on_the_guard_itself() -> Result<(), sqlx::Error> {
    let db = TxPool::<Sqlite>::connect("sqlite::memory:").await?;
    let mut tx = TransactionGuard::new(&db).await?;
    let two: i64 = sqlx::query_scalar("SELECT 1 + $1").bind(1_i64).fetch_one(&mut *tx).await?;
    assert_eq!(two, 2);
    tx.commit().await?;
    Ok(())
}

#[tokio::test]
async fn a_pool_of_no_connections_is_refused() {
    let error = TxPool::<Sqlite>::builder().max_connections(0).connect("sqlite::memory:").await.unwrap_err();
    assert!(matches!(error, TxError::InvalidOption { option: "max_connections", .. }));
}

#[tokio::test]
async fn events_tell_what_happened_behind_the_callers_backs() {
    let world = World::<Postgres>::new().await;
    let db = world.pool(1).await;
    let mut events = db.events();
    let mut tx = db.begin().await.unwrap();
    let slow = Postgres::execute(&mut tx, Postgres::SLOW.to_owned());
    assert!(tokio::time::timeout(Duration::from_millis(50), slow).await.is_err());
    drop(tx);
    assert_eq!(events.next().await, Some(TxEvent::ImplicitRollback));
    assert_eq!(events.next().await, Some(TxEvent::CancelSent));
    // If the server answers before the first poll is over, there is no late outcome to report.
    while futures_util::FutureExt::now_or_never(db.begin().await.unwrap().commit()).is_some() {}
    assert_eq!(events.next().await, Some(TxEvent::LateOutcome(CommitOutcome::Committed)));
    world.end(db).await;
    assert_eq!(events.next().await, None);
}

#[tokio::test]
async fn a_listener_that_is_too_slow_is_told_how_much_it_missed() {
    let db = TxPool::<Sqlite>::connect("sqlite::memory:").await.unwrap();
    let mut events = db.events();
    for _ in 0..300 {
        drop(db.begin().await.unwrap());
    }
    assert!(matches!(events.next().await, Some(TxEvent::Missed(missed)) if missed >= 44));
}
