//! The metrics of a pool.

use std::time::Duration;

use cancel_safe_tx_guard::{TxPool, TxPoolBuilder};
use sqlx::pool::PoolOptions;
use sqlx::{Postgres, Sqlite};
use tokio::time::timeout;

use crate::on_all;
use crate::silence::within;
use crate::world::{PATIENCE, TestDb, World, eventually};

async fn a_pool_counts_what_it_has_and_what_it_has_done<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(2).await;
    let first = db.metrics();
    assert_eq!((first.size, first.idle, first.opened, first.in_use), (1, 1, 1, 0));
    let one = db.begin().await.unwrap();
    let two = db.begin().await.unwrap();
    let waiting = tokio::spawn({
        let db = db.clone();
        async move { db.begin().await.unwrap().rollback().await }
    });
    eventually("somebody waits", async || db.metrics().waiting == 1).await;
    let busy = db.metrics();
    assert_eq!((busy.size, busy.idle, busy.opened, busy.in_use), (2, 0, 2, 2), "{busy}");
    one.commit().await.unwrap();
    drop(two);
    within(waiting).await.unwrap().unwrap();
    eventually("all is at rest", async || {
        let now = db.metrics();
        (now.idle, now.in_use, now.settling, now.waiting) == (2, 0, 0, 0)
    })
    .await;
    let end = db.metrics();
    assert_eq!((end.committed, end.rolled_back, end.unknown), (1, 2, 0), "{end:?}");
    assert_eq!((end.opened, end.closed_failed, end.closed_with_pool), (2, 0, 0), "{end:?}");
    assert!(db.close(PATIENCE).await.is_clean());
    let closed = db.metrics();
    assert_eq!((closed.size, closed.idle, closed.closed_with_pool), (0, 0, 2), "{closed:?}");
    world.run(format!("DROP TABLE {}", world.table)).await;
}

on_all!(a_pool_counts_what_it_has_and_what_it_has_done, a_session_that_is_in_use_when_its_pool_is_closed_is_counted,);

/// Works once, and waits until the only session is closed, for this reason and no other.
async fn one_is_closed(builder: TxPoolBuilder<Sqlite>, reason: usize) {
    let world = World::<Sqlite>::new().await;
    let db = builder.max_connections(1).connect_with(world.options.clone()).await.unwrap();
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    tx.commit().await.unwrap();
    let reasons = || {
        let now = db.metrics();
        [now.closed_expired, now.closed_idle, now.closed_unfit, now.closed_failed, now.closed_with_pool]
    };
    eventually("it is closed", async || reasons().iter().any(|count| *count > 0)).await;
    let reasons = reasons();
    assert!(reasons[reason] > 0 && reasons.iter().filter(|count| **count > 0).count() == 1, "{reasons:?}");
    world.end(db).await;
}

#[tokio::test]
async fn the_reason_why_a_session_was_closed_is_counted() {
    let short = Duration::from_millis(50);
    let builder = || TxPool::<Sqlite>::builder().idle_timeout(None).max_lifetime(None);
    one_is_closed(builder().max_lifetime(short), 0).await;
    one_is_closed(builder().idle_timeout(short), 1).await;
    one_is_closed(builder().after_release(|_| Box::pin(async { Ok(false) })), 2).await;
}

/// On one thread no task can have worked on it yet.
#[tokio::test]
async fn a_transaction_that_was_dropped_is_being_rolled_back_until_it_is_over() {
    let world = World::<Postgres>::new().await;
    let db = world.pool(1).await;
    drop(db.begin().await.unwrap());
    let now = db.metrics();
    assert_eq!((now.in_use, now.settling), (0, 1), "{now:?}");
    eventually("it is over", async || db.metrics().idle == 1).await;
    let now = db.metrics();
    assert_eq!((now.in_use, now.settling, now.rolled_back), (0, 0, 1), "{now:?}");
    world.end(db).await;
}

async fn a_session_that_is_in_use_when_its_pool_is_closed_is_counted<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let tx = db.begin().await.unwrap();
    assert_eq!(db.close(Duration::ZERO).await.in_use, 1);
    tx.commit().await.unwrap();
    eventually("it is closed", async || db.metrics().size == 0).await;
    let closed = db.metrics();
    assert_eq!((closed.opened, closed.closed_with_pool, closed.closed_failed), (1, 1, 0), "{closed:?}");
    world.end(db).await;
}

#[tokio::test]
async fn a_cancel_and_a_session_that_has_died_are_counted() {
    let world = World::<Postgres>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    timeout(Duration::from_millis(50), Postgres::execute(&mut tx, Postgres::SLOW.to_owned())).await.unwrap_err();
    drop(tx);
    let mut tx = within(db.begin()).await.unwrap();
    assert_eq!((db.metrics().cancels, db.metrics().closed_failed), (1, 0));
    let kill = "SELECT pg_terminate_backend(pg_backend_pid())".to_owned();
    Postgres::execute(&mut tx, kill).await.unwrap_err();
    drop(tx);
    within(db.begin()).await.unwrap().rollback().await.unwrap();
    assert_eq!((db.metrics().closed_failed, db.metrics().opened), (1, 2));
    // The session had already ended.
    assert_eq!(db.metrics().terminated, 0);
    world.end(db).await;
}

#[tokio::test]
async fn a_wrapped_pool_counts_what_its_guards_have() {
    let world = World::<Postgres>::new().await;
    let pool = PoolOptions::<Postgres>::new().max_connections(2).connect_with(world.options.clone()).await.unwrap();
    let db = TxPool::wrap(pool.clone());
    assert_eq!(db.metrics().size, 0);
    let tx = db.begin().await.unwrap();
    assert_eq!((db.metrics().size, db.metrics().in_use, db.metrics().idle), (1, 1, 0));
    tx.commit().await.unwrap();
    eventually("it was given back", async || db.metrics().size == 0).await;
    assert_eq!(db.metrics().committed, 1);
    world.end(db).await;
    pool.close().await;
}
