//! Reads without a transaction.

use std::time::{Duration, Instant};

use cancel_safe_testing::drop_after;
use cancel_safe_tx_guard::TxPool;
use sqlx::pool::PoolOptions;
use sqlx::{MySql, Postgres};
use tokio::time::timeout;

use crate::on_all;
use crate::silence::{Door, SESSION, within};
use crate::world::{PATIENCE, SOON, Server, TestDb, World, eventually};

async fn rows<D: TestDb>(world: &World<D>, db: &TxPool<D>) -> Vec<i64> {
    let mut reader = within(db.reader()).await.unwrap();
    D::numbers(&mut reader, format!("SELECT n FROM {} ORDER BY n", world.table)).await.unwrap()
}

/// Commits on a guard, on the same session.
async fn writes<D: TestDb>(world: &World<D>, db: &TxPool<D>, n: i64) {
    let mut tx = within(db.begin()).await.unwrap();
    world.insert(&mut tx, n).await.unwrap();
    within(tx.commit()).await.unwrap();
}

async fn a_reader_sees_what_is_committed_and_costs_no_session<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut expected = Vec::new();
    for n in 0..3 {
        assert_eq!(rows(&world, &db).await, expected);
        writes(&world, &db, 2 * n).await;
        let mut other = world.plain().await;
        world.insert(&mut other, 2 * n + 1).await.unwrap();
        expected.extend([2 * n, 2 * n + 1]);
        // No earlier transaction's snapshot is seen.
        assert_eq!(rows(&world, &db).await, expected);
        assert_eq!(rows(&world, &db).await, expected);
    }
    assert_eq!(db.metrics().opened, 1);
    world.end(db).await;
}

async fn a_write_through_a_reader_is_refused<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut reader = db.reader().await.unwrap();
    world.insert(&mut reader, 1).await.unwrap_err();
    drop(reader);
    writes(&world, &db, 2).await;
    assert_eq!(world.committed().await, [2]);
    world.end(db).await;
}

async fn a_query_that_is_dropped_ends_and_gives_its_session_back<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    for n in 0..3 {
        let mut reader = within(db.reader()).await.unwrap();
        timeout(Duration::from_millis(30), D::execute(&mut reader, D::SLOW.to_owned())).await.unwrap_err();
        let start = Instant::now();
        drop(reader);
        writes(&world, &db, n).await;
        assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    }
    assert_eq!(rows(&world, &db).await, [0, 1, 2]);
    world.end(db).await;
}

/// At each of its first polls.
async fn a_query_dropped_anywhere_leaves_a_session_that_works<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    for polls in 0..8 {
        let read = async {
            let mut reader = db.reader().await.unwrap();
            D::numbers(&mut reader, format!("SELECT n FROM {} WHERE n > {polls} ORDER BY n", world.table)).await
        };
        drop(drop_after(polls, read).await);
        writes(&world, &db, i64::try_from(polls).unwrap()).await;
    }
    assert_eq!(rows(&world, &db).await, (0..8).collect::<Vec<_>>());
    world.end(db).await;
}

async fn half_a_result_is_not_the_next_ones<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    for n in 0..3 {
        let mut reader = within(db.reader()).await.unwrap();
        D::first_row(&mut reader, D::MILLION).await;
        drop(reader);
        writes(&world, &db, n).await;
    }
    assert_eq!(rows(&world, &db).await, [0, 1, 2]);
    world.end(db).await;
}

async fn a_closed_pool_has_no_reader_and_waits_for_those_there_are<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let reader = db.reader().await.unwrap();
    assert_eq!(db.close(Duration::ZERO).await.in_use, 1);
    drop(reader);
    assert!(db.close(PATIENCE).await.is_clean());
    assert!(db.reader().await.is_err());
    world.end(db).await;
}

on_all!(
    a_reader_sees_what_is_committed_and_costs_no_session,
    a_write_through_a_reader_is_refused,
    a_query_that_is_dropped_ends_and_gives_its_session_back,
    a_query_dropped_anywhere_leaves_a_session_that_works,
    half_a_result_is_not_the_next_ones,
    a_closed_pool_has_no_reader_and_waits_for_those_there_are,
);

async fn a_wrapped_pool_has_readers<D: Server>() {
    let world = World::<D>::new().await;
    let pool = PoolOptions::<D>::new().max_connections(1).connect_with(world.options.clone()).await.unwrap();
    let db = TxPool::wrap(pool.clone());
    assert_eq!(rows(&world, &db).await, [0_i64; 0]);
    let mut reader = within(db.reader()).await.unwrap();
    timeout(Duration::from_millis(30), D::execute(&mut reader, D::SLOW.to_owned())).await.unwrap_err();
    drop(reader);
    writes(&world, &db, 1).await;
    let mut conn = within(pool.acquire()).await.unwrap();
    world.insert(&mut conn, 2).await.unwrap();
    drop(conn);
    assert_eq!(rows(&world, &db).await, [1, 2]);
    world.end(db).await;
    pool.close().await;
}

#[tokio::test]
async fn a_wrapped_pool_has_readers_on_both() {
    a_wrapped_pool_has_readers::<Postgres>().await;
    a_wrapped_pool_has_readers::<MySql>().await;
}

/// A session that was idle for more than a second is checked first.
#[tokio::test]
async fn a_reader_leaves_a_silent_session_for_another() {
    let world = World::<Postgres>::new().await;
    let door = Door::open(&world.options).await;
    let db = TxPool::<Postgres>::builder().max_connections(1).begin_timeout(Duration::from_millis(300));
    let db = db.connect_with(door.through.clone()).await.unwrap();
    writes(&world, &db, 1).await;
    door.silence(SESSION);
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    assert_eq!(rows(&world, &db).await, [1]);
    eventually("nothing is left", async || db.metrics().in_use + db.metrics().settling == 0).await;
    world.end(db).await;
}
