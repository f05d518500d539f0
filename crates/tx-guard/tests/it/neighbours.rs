//! A wrapped pool whose other users leak open transactions into it.

use cancel_safe_testing::drop_after;
use cancel_safe_tx_guard::TxPool;
use sqlx::pool::PoolOptions;
use sqlx::{MySql, Pool, Postgres, Sqlite};

use crate::on_all;
use crate::silence::within;
use crate::world::{TestDb, World};

/// More than any plain `begin` takes.
const POLLS: usize = 12;

async fn one_connection<D: TestDb>(world: &World<D>) -> Pool<D> {
    PoolOptions::<D>::new().max_connections(1).connect_with(world.options.clone()).await.unwrap()
}

/// Begins and commits on the pool, and checks that this has committed nothing else.
async fn commits_its_own_alone<D: TestDb>(world: &World<D>, db: &TxPool<D>, n: i64, what: &str) {
    let mut expected = world.committed().await;
    let mut tx = within(db.begin()).await.unwrap_or_else(|error| panic!("{what}: {error:?}"));
    world.insert(&mut tx, n).await.unwrap();
    within(tx.commit()).await.unwrap();
    expected.push(n);
    expected.sort_unstable();
    assert_eq!(world.committed().await, expected, "{what}");
}

async fn a_guard_does_not_begin_inside_a_leaked_transaction<D: TestDb>() {
    let world = World::<D>::new().await;
    let pool = one_connection(&world).await;
    let db = TxPool::wrap(pool.clone());
    // A guard comes first, so that the connection is a known one.
    commits_its_own_alone(&world, &db, 1, "nothing is leaked").await;
    for n in 1..=3 {
        let mut conn = pool.acquire().await.unwrap();
        D::execute(&mut conn, "BEGIN".to_owned()).await.unwrap();
        world.insert(&mut conn, 10 * n).await.unwrap();
        drop(conn);
        commits_its_own_alone(&world, &db, 10 * n + 1, "a write was leaked").await;
    }
    assert_eq!(world.committed().await, [1, 11, 21, 31]);
    pool.close().await;
    world.end(db).await;
}

async fn a_guard_does_not_begin_inside_what_a_dropped_begin_has_leaked<D: TestDb>() {
    let world = World::<D>::new().await;
    let pool = one_connection(&world).await;
    let db = TxPool::wrap(pool.clone());
    for polls in 0..POLLS {
        drop(drop_after(polls, pool.begin()).await);
        // Into the leaked transaction, if there is one.
        let n = i64::try_from(polls).unwrap() * 10;
        let mut conn = within(pool.acquire()).await.unwrap();
        drop(world.insert(&mut conn, n).await);
        drop(conn);
        commits_its_own_alone(&world, &db, n + 1, &format!("a plain begin was dropped after {polls} polls")).await;
    }
    pool.close().await;
    world.end(db).await;
}

on_all!(
    a_guard_does_not_begin_inside_a_leaked_transaction,
    a_guard_does_not_begin_inside_what_a_dropped_begin_has_leaked,
);

/// An error has already ended it, as far as possible without a ROLLBACK.
#[tokio::test]
async fn a_guard_does_not_begin_inside_a_failed_transaction() {
    let world = World::<Postgres>::new().await;
    let pool = one_connection(&world).await;
    let db = TxPool::wrap(pool.clone());
    let mut conn = pool.acquire().await.unwrap();
    Postgres::execute(&mut conn, "BEGIN".to_owned()).await.unwrap();
    Postgres::execute(&mut conn, "SELECT 1 / 0".to_owned()).await.unwrap_err();
    drop(conn);
    commits_its_own_alone(&world, &db, 1, "a failed transaction was leaked").await;
    pool.close().await;
    world.end(db).await;
}

/// A forgotten `begin` of sqlx counts in sqlx, which would turn the next one into a savepoint.
async fn forgotten<D: TestDb>() {
    let world = World::<D>::new().await;
    let pool = one_connection(&world).await;
    let db = TxPool::wrap(pool.clone());
    let mut conn = pool.acquire().await.unwrap();
    let begun = sqlx::Connection::begin(&mut *conn).await.unwrap();
    std::mem::forget(begun);
    world.insert(&mut conn, 1).await.unwrap();
    drop(conn);
    commits_its_own_alone(&world, &db, 2, "a transaction was forgotten").await;
    assert_eq!(world.committed().await, [2]);
    pool.close().await;
    world.end(db).await;
}

#[tokio::test]
async fn a_guard_does_not_begin_inside_a_forgotten_transaction() {
    forgotten::<Sqlite>().await;
    forgotten::<Postgres>().await;
    forgotten::<MySql>().await;
}

/// Each new connection is in a transaction, which the next user must not end either.
#[tokio::test]
async fn a_pool_whose_connections_are_all_in_transactions_is_an_error_and_no_loop() {
    let world = World::<Postgres>::new().await;
    let pool = PoolOptions::<Postgres>::new()
        .max_connections(2)
        .after_connect(|conn, _| Box::pin(async move { Postgres::execute(conn, "BEGIN; SELECT 1".to_owned()).await }));
    let pool = pool.connect_with(world.options.clone()).await.unwrap();
    let db = TxPool::wrap(pool.clone());
    let error = within(db.begin()).await.unwrap_err();
    assert!(error.as_sqlx().is_some(), "{error:?}");
    pool.close().await;
    world.end(db).await;
}
