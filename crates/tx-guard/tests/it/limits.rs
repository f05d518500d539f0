//! The limits of a pool, each set to something else than its default.

use std::time::Duration;

use cancel_safe_tx_guard::{CommitOutcome, TxError, TxPool};
use futures_util::FutureExt;
use sqlx::Postgres;
use sqlx::postgres::PgPoolOptions;
use tokio::time::Instant;

use crate::silence::{CANCELLER, Door, SESSION, builder, within};
use crate::world::World;

/// Less than the default of a commit whose caller has gone.
const LONG: Duration = Duration::from_secs(30);

const SHORT: Duration = Duration::from_millis(200);

/// Neither the session nor that for cancelling answers any more.
async fn a_rollback_says_for_how_long_it_has_waited(world: &World<Postgres>, door: &Door, db: &TxPool<Postgres>) {
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    door.silence(SESSION);
    door.silence(CANCELLER);
    // The door has a turn to become silent.
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
