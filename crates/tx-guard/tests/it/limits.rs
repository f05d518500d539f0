//! The limits of a pool, each set to a value other than its default.

use std::time::Duration;

use cancel_safe_tx_guard::{CommitOutcome, TxError, TxPool};
use futures_util::FutureExt;
use sqlx::postgres::PgPoolOptions;
use sqlx::{MySql, Postgres};
use tokio::time::Instant;

use crate::late;
use crate::silence::{CANCELLER, Door, SESSION, builder, within};
use crate::world::{TestDb, World};

/// Less than the default for a commit whose caller has gone.
const LONG: Duration = Duration::from_secs(30);

const SHORT: Duration = Duration::from_millis(200);

/// Neither the session nor the cancelling connection answers any more.
async fn a_rollback_says_for_how_long_it_has_waited(world: &World<Postgres>, door: &Door, db: &TxPool<Postgres>) {
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    door.silence(SESSION);
    door.silence(CANCELLER);
    // Gives the door a turn to become silent.
    tokio::task::yield_now().await;
    let error = within(tx.rollback()).await.unwrap_err();
    assert!(matches!(error, TxError::Unconfirmed { waited: SHORT, .. }), "{error:?}");
}

#[tokio::test]
async fn a_rollback_is_waited_for_as_long_as_the_pool_says() {
    let world = World::<Postgres>::new().await;
    let door = Door::open(&world.options).await;
    let db = builder().settle_timeout(SHORT).connect_with(door.through.clone()).await.unwrap();
    a_rollback_says_for_how_long_it_has_waited(&world, &door, &db).await;
    drop(door);
    world.end(db).await;
}

#[tokio::test]
async fn a_wrapped_pool_has_limits_too() {
    let world = World::<Postgres>::new().await;
    let door = Door::open(&world.options).await;
    let pool = PgPoolOptions::new().max_connections(1).connect_with(door.through.clone()).await.unwrap();
    let db = TxPool::<Postgres>::builder().settle_timeout(SHORT).wrap(pool.clone());
    a_rollback_says_for_how_long_it_has_waited(&world, &door, &db).await;
    drop(door);
    world.end(db).await;
    pool.close().await;
}

#[tokio::test]
async fn a_commit_whose_caller_has_gone_is_given_up_when_the_pool_says() {
    let world = World::<Postgres>::new().await;
    let door = Door::open(&world.options).await;
    let db = builder().commit_timeout(LONG).connect_with(door.through.clone()).await.unwrap();
    let mut tx = db.begin().await.unwrap();
    let handle = tx.outcome_handle();
    world.insert(&mut tx, 1).await.unwrap();
    door.silence(SESSION);
    tokio::task::yield_now().await;
    assert!(tx.commit().now_or_never().is_none());
    let start = Instant::now();
    tokio::time::pause();
    assert_eq!(handle.outcome().await, CommitOutcome::Unknown);
    let took = start.elapsed();
    assert!(took >= LONG && took < LONG * 2, "{took:?}");
    tokio::time::resume();
    drop(door);
    world.end(db).await;
}

/// A pool of one session through the door. `other` is the separate limit for reading before COMMIT is sent.
async fn with_answer_timeout(door: &late::Door<MySql>, limit: Duration, other: Duration) -> TxPool<MySql> {
    let db = TxPool::<MySql>::builder().max_connections(1).answer_timeout(limit).catch_up_timeout(other);
    db.connect_with(door.through.clone()).await.unwrap()
}

/// The server has answered and waits for the client, which waits for the answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_to_commit_that_never_comes_is_waited_for_as_long_as_the_pool_says() {
    let world = World::<MySql>::new().await;
    let door = late::Door::<MySql>::open(&world.options).await;
    let limit = Duration::from_millis(700);
    let db = with_answer_timeout(&door, limit, LONG).await;
    let mut tx = db.begin().await.unwrap();
    let handle = tx.outcome_handle();
    world.insert(&mut tx, 1).await.unwrap();
    door.answers_held.send_replace(true);
    let start = std::time::Instant::now();
    let error = within(tx.commit()).await.unwrap_err();
    assert!(error.is_unknown(), "{error:?}");
    let took = start.elapsed();
    assert!(took >= limit && took < LONG, "{took:?}");
    assert_eq!(handle.outcome().await, CommitOutcome::Unknown);
    assert_eq!(world.committed().await, [1], "it was committed all the same");
    door.answers_held.send_replace(false);
    world.end(db).await;
}

/// The same answer, on its way for longer than the default limit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_to_commit_that_comes_within_that_time_is_heard() {
    let world = World::<MySql>::new().await;
    let door = late::Door::<MySql>::open(&world.options).await;
    let db = with_answer_timeout(&door, LONG, Duration::from_millis(100)).await;
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    door.answers_held.send_replace(true);
    let commit = tokio::spawn(tx.commit());
    tokio::time::sleep(Duration::from_millis(3_500)).await;
    assert!(!commit.is_finished(), "it was given up");
    door.answers_held.send_replace(false);
    within(commit).await.unwrap().unwrap();
    assert_eq!(world.committed().await, [1]);
    world.end(db).await;
}

/// A server that works on its COMMIT does not wait for its client, however long that takes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_on_which_the_server_works_is_not_given_up() {
    let world = World::<MySql>::new().await;
    let db = TxPool::<MySql>::builder().max_connections(1).answer_timeout(Duration::from_millis(100));
    let db = db.connect_with(world.options.clone()).await.unwrap();
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    let mut other = world.plain().await;
    MySql::execute(&mut other, "FLUSH TABLES WITH READ LOCK".to_owned()).await.unwrap();
    let commit = tokio::spawn(tx.commit());
    // Long enough for the server to be checked twice.
    tokio::time::sleep(Duration::from_millis(1_700)).await;
    assert!(!commit.is_finished(), "it was given up");
    MySql::execute(&mut other, "UNLOCK TABLES".to_owned()).await.unwrap();
    within(commit).await.unwrap().unwrap();
    assert_eq!(world.committed().await, [1]);
    drop(other);
    world.end(db).await;
}
