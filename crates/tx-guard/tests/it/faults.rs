//! Drops during a statement, without a runtime, in a stream, in a COPY; servers and sessions that die.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cancel_safe_tx_guard::{CommitOutcome, TransactionGuard, TxPool};
use futures_util::FutureExt;
use sqlx::Postgres;
use sqlx::pool::PoolOptions;
use sqlx::postgres::PgConnectOptions;
use tokio::net::{TcpListener, TcpStream};

use crate::commit::works_as_before;
use crate::on_all;
use crate::world::{PATIENCE, SOON, TestDb, World};

on_all!(
    a_drop_in_a_slow_statement_frees_everything_soon,
    a_drop_in_a_slow_statement_of_a_wrapped_pool_frees_everything_soon,
    a_rollback_after_an_abandoned_statement_is_quick,
    a_drop_outside_any_runtime_does_not_panic,
    a_drop_after_the_runtime_has_ended_does_not_panic,
    a_begin_dropped_after_the_runtime_has_ended_does_not_panic,
    a_drop_in_a_half_read_stream_leaves_a_clean_connection,
    a_drop_in_a_stream_without_end_frees_everything_soon,
    a_panic_in_the_owner_rolls_back,
);

async fn abandoned_slow_statement<D: TestDb>(world: &World<D>, db: &TxPool<D>) -> TransactionGuard<D> {
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    let slow = D::execute(&mut tx, D::SLOW.to_owned());
    assert!(tokio::time::timeout(Duration::from_millis(100), slow).await.is_err(), "it was not slow");
    tx
}

async fn a_drop_in_a_slow_statement_frees_everything_soon<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let tx = abandoned_slow_statement(&world, &db).await;
    let handle = tx.outcome_handle();
    let start = Instant::now();
    drop(tx);
    // As long as the dropped transaction lives, it locks the key it has inserted, and holds the only connection.
    let mut next = db.begin().await.unwrap();
    world.insert(&mut next, 1).await.unwrap();
    next.commit().await.unwrap();
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
    assert_eq!(world.committed().await, [1]);
    world.end(db).await;
}

async fn a_drop_in_a_slow_statement_of_a_wrapped_pool_frees_everything_soon<D: TestDb>() {
    let world = World::<D>::new().await;
    let pool = PoolOptions::<D>::new().max_connections(1).connect_with(world.options.clone()).await.unwrap();
    let db = TxPool::wrap(pool.clone());
    let tx = abandoned_slow_statement(&world, &db).await;
    let start = Instant::now();
    drop(tx);
    works_as_before(&world, &db).await;
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    assert_eq!(world.committed().await, [77]);
    world.end(db).await;
    pool.close().await;
}

async fn a_rollback_after_an_abandoned_statement_is_quick<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let tx = abandoned_slow_statement(&world, &db).await;
    let start = Instant::now();
    tx.rollback().await.unwrap();
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    works_as_before(&world, &db).await;
    world.end(db).await;
}

async fn a_drop_outside_any_runtime_does_not_panic<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let tx = abandoned_slow_statement(&world, &db).await;
    std::thread::spawn(move || drop(tx)).join().unwrap();
    works_as_before(&world, &db).await;
    assert_eq!(world.committed().await, [77]);
    world.end(db).await;
}

async fn a_drop_after_the_runtime_has_ended_does_not_panic<D: TestDb>() {
    let world = World::<D>::new().await;
    for wrapped in [false, true] {
        let options = world.options.clone();
        let insert = format!("INSERT INTO {} (n) VALUES (1)", world.table);
        let outlived = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let (db, tx) = runtime.block_on(async {
                let db = if wrapped {
                    TxPool::wrap(PoolOptions::<D>::new().min_connections(1).connect_with(options).await.unwrap())
                } else {
                    TxPool::<D>::builder().connect_with(options).await.unwrap()
                };
                let mut tx = db.begin().await.unwrap();
                D::execute(&mut tx, insert).await.unwrap();
                (db, tx)
            });
            drop(runtime);
            drop(tx);
            drop(db);
        };
        std::thread::spawn(outlived).join().unwrap();
    }
    // The locks of those transactions are gone with their connections.
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(world.committed().await, [1]);
    world.end(db).await;
}

async fn a_begin_dropped_after_the_runtime_has_ended_does_not_panic<D: TestDb>() {
    let world = World::<D>::new().await;
    for polls in 1..=6 {
        let options = world.options.clone();
        let outlived = move || {
            let panics = panics_of_this_thread();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let pool = runtime.block_on(async { PoolOptions::<D>::new().connect_with(options).await.unwrap() });
            let db = TxPool::wrap(pool.clone());
            let mut begin = Box::pin(async move { db.begin().await.map(drop) }.fuse());
            runtime.block_on(async {
                for _ in 0..polls {
                    drop((&mut begin).now_or_never());
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            });
            drop(runtime);
            drop(begin);
            assert_eq!(panics.load(Ordering::Relaxed), 0, "after {polls} polls");
        };
        std::thread::spawn(outlived).join().unwrap();
    }
    works_as_before(&world, &world.pool(1).await).await;
}

/// Counts the panics, because a runtime swallows those of futures that it drops.
fn panics_of_this_thread() -> Arc<AtomicUsize> {
    let (panics, thread) = (Arc::new(AtomicUsize::new(0)), std::thread::current().id());
    let (count, before) = (Arc::clone(&panics), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |info| {
        if std::thread::current().id() == thread {
            count.fetch_add(1, Ordering::Relaxed);
        }
        before(info);
    }));
    panics
}

async fn a_drop_in_a_half_read_stream_leaves_a_clean_connection<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    D::first_row(&mut tx, D::MILLION).await;
    drop(tx);
    works_as_before(&world, &db).await;
    assert_eq!(world.committed().await, [77]);
    world.end(db).await;
}

async fn a_drop_in_a_stream_without_end_frees_everything_soon<D: TestDb>() {
    drop_in_a_stream_without_end::<D>().await;
    // sqlx reads as long as there are rows, and on such a runtime nothing else gets a turn.
    let one_thread = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::spawn_blocking(move || one_thread.block_on(drop_in_a_stream_without_end::<D>())).await.unwrap();
}

async fn drop_in_a_stream_without_end<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    D::first_row(&mut tx, D::ENDLESS).await;
    let start = Instant::now();
    drop(tx);
    let mut next = db.begin().await.unwrap();
    world.insert(&mut next, 1).await.unwrap();
    next.commit().await.unwrap();
    // Reading to the end would take many minutes. The limit is generous, because a busy machine reads slowly.
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    assert_eq!(world.committed().await, [1]);
    world.end(db).await;
}

async fn a_panic_in_the_owner_rolls_back<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    let panicked = std::panic::AssertUnwindSafe(async move {
        let _tx = tx;
        panic!("on purpose");
    })
    .catch_unwind()
    .await;
    assert!(panicked.is_err());
    works_as_before(&world, &db).await;
    assert_eq!(world.committed().await, [77]);
    world.end(db).await;
}

#[tokio::test]
async fn a_session_that_died_while_idle_is_replaced() {
    let world = World::<Postgres>::new().await;
    let options = world.options.clone().application_name(&world.table);
    let db = TxPool::<Postgres>::builder().max_connections(3).connect_with(options).await.unwrap();
    drop((db.begin().await.unwrap(), db.begin().await.unwrap(), db.begin().await.unwrap()));
    // The connection that cancels dies as well.
    let kill =
        format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '{}'", world.table);
    world.run(kill).await;
    works_as_before(&world, &db).await;
    let tx = abandoned_slow_statement(&world, &db).await;
    let (handle, start) = (tx.outcome_handle(), Instant::now());
    drop(tx);
    assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    world.end(db).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_cancel_hits_the_next_transaction() {
    let world = World::<Postgres>::new().await;
    let db = world.pool(1).await;
    for round in 0..300 {
        let mut tx = db.begin().await.unwrap();
        // The statement ends at about the time of its cancel, so the cancel often comes too late.
        let nap = Postgres::execute(&mut tx, "SELECT pg_sleep(0.0015)".to_owned());
        drop(nap.now_or_never());
        drop(tx);
        let mut next = db.begin().await.unwrap();
        Postgres::execute(&mut next, "SELECT 1".to_owned()).await.unwrap_or_else(|error| panic!("{round}: {error}"));
        next.commit().await.unwrap_or_else(|error| panic!("{round}: {error}"));
    }
    world.end(db).await;
}

/// A proxy in front of the server that connects slowly, and counts.
async fn slow_door(options: &PgConnectOptions) -> (PgConnectOptions, Arc<AtomicUsize>) {
    let door = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let through = options.clone().host("127.0.0.1").port(door.local_addr().unwrap().port());
    let server = (options.get_host().to_owned(), options.get_port());
    let opened = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&opened);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = door.accept().await {
            count.fetch_add(1, Ordering::Relaxed);
            let server = server.clone();
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                let mut server = TcpStream::connect(server).await.unwrap();
                tokio::io::copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    (through, opened)
}

#[tokio::test]
async fn callers_who_do_not_wait_open_no_more_connections_than_there_may_be() {
    let world = World::<Postgres>::new().await;
    let (options, opened) = slow_door(&world.options).await;
    let db = TxPool::<Postgres>::builder().max_connections(3).connect_with(options).await.unwrap();
    let begin = || tokio::time::timeout(Duration::from_millis(1), db.begin());
    for _ in 0..100 {
        let impatient = tokio::join!(begin(), begin(), begin());
        drop(impatient);
    }
    let all = (db.begin().await.unwrap(), db.begin().await.unwrap(), db.begin().await.unwrap());
    drop(all);
    // Three, and the connection for cancelling.
    assert_eq!(opened.load(Ordering::Relaxed), 4);
    world.end(db).await;
}
