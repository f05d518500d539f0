//! How long a `begin` may take, whatever happens to the sessions and the server.

use std::time::Duration;

use cancel_safe_testing::drop_after;
use cancel_safe_tx_guard::{TxError, TxPool, TxPoolBuilder};
use sqlx::pool::PoolOptions;
use sqlx::{Postgres, Sqlite};
use tokio::time::{Instant, sleep};

use crate::commit::works_as_before;
use crate::silence::{Door, SESSION, backend, within};
use crate::world::{PATIENCE, TestDb, World, eventually};

/// More connections than any test opens.
const ALL: usize = 100;

fn builder() -> TxPoolBuilder<Postgres> {
    TxPool::<Postgres>::builder().begin_timeout(Duration::from_millis(300))
}

fn is_a_silent_server(error: &TxError, door: &Door) {
    assert!(error.is_timeout() && error.is_connect(), "{error:?}");
    let target = format!("127.0.0.1:{}", door.through.get_port());
    assert!(error.to_string().contains(&target), "{error}");
}

#[tokio::test]
async fn a_session_that_has_gone_silent_after_a_short_rest_is_left_for_another() {
    let world = World::<Postgres>::new().await;
    let door = Door::open(&world.options).await;
    let db = builder().max_connections(1).connect_with(door.through.clone()).await.unwrap();
    let before = backend(&db).await;
    door.silence(SESSION);
    assert_ne!(within(backend(&db)).await, before);
    within(works_as_before(&world, &db)).await;
    world.end(db).await;
}

/// Asked one after the other, they would take longer than there is time for.
#[tokio::test]
async fn the_idle_sisters_of_a_silent_session_are_not_asked_one_after_the_other() {
    const SESSIONS: usize = 6;
    let world = World::<Postgres>::new().await;
    let door = Door::open(&world.options).await;
    let builder = builder().max_connections(6).begin_timeout(Duration::from_secs(1));
    let db = builder.acquire_timeout(Duration::from_secs(5)).connect_with(door.through.clone()).await.unwrap();
    let mut guards = Vec::new();
    for _ in 0..SESSIONS {
        guards.push(db.begin().await.unwrap());
    }
    for guard in guards {
        guard.rollback().await.unwrap();
    }
    // Including the connection for cancelling.
    (0..=SESSIONS).for_each(|number| door.silence(number));
    within(db.begin()).await.unwrap().rollback().await.unwrap();
    world.end(db).await;
}

#[tokio::test]
async fn a_session_of_a_wrapped_pool_that_has_gone_silent_is_left_for_another() {
    let world = World::<Postgres>::new().await;
    let door = Door::open(&world.options).await;
    let pool = PoolOptions::new().max_connections(1).test_before_acquire(false);
    let pool = pool.connect_with(door.through.clone()).await.unwrap();
    let db = TxPool::wrap(pool.clone());
    let before = backend(&db).await;
    eventually("sqlx has the connection back", async || pool.num_idle() == 1).await;
    door.silence(SESSION);
    assert_ne!(within(backend(&db)).await, before);
    within(works_as_before(&world, &db)).await;
    world.end(db).await;
    pool.close().await;
}

/// Neither the existing session nor a new one gets an answer.
#[tokio::test]
async fn a_server_that_has_gone_silent_is_a_timeout_that_names_it() {
    let world = World::<Postgres>::new().await;
    let door = Door::open(&world.options).await;
    let limit = Duration::from_millis(1_500);
    let db = builder().max_connections(2).acquire_timeout(limit).connect_with(door.through.clone()).await.unwrap();
    assert!(backend(&db).await > 0);
    (0..ALL).for_each(|number| door.silence(number));
    let start = Instant::now();
    let error = within(db.begin()).await.unwrap_err();
    is_a_silent_server(&error, &door);
    assert!(start.elapsed() >= limit, "given up early: {:?}", start.elapsed());
    // Callers that wait behind sessions being opened wait for the same server.
    let (one, two, three) = within(async { tokio::join!(db.begin(), db.begin(), db.begin()) }).await;
    for error in [one.unwrap_err(), two.unwrap_err(), three.unwrap_err()] {
        is_a_silent_server(&error, &door);
    }
    drop(door);
    db.close(Duration::ZERO).await;
    world.run(format!("DROP TABLE {}", world.table)).await;
}

/// The `begin` of a closure has the rest of the closure's time.
#[tokio::test]
async fn a_closure_with_a_deadline_does_not_wait_longer_for_a_silent_server() {
    let world = World::<Postgres>::new().await;
    let door = Door::open(&world.options).await;
    let db = builder().max_connections(1).connect_with(door.through.clone()).await.unwrap();
    assert!(backend(&db).await > 0);
    (0..ALL).for_each(|number| door.silence(number));
    let run = db.tx().timeout(Duration::from_millis(400)).run(async |_| Ok::<_, TxError>(()));
    let error = within(run).await.unwrap_err();
    assert!(error.is_timeout(), "{error:?}");
    drop(door);
    db.close(Duration::ZERO).await;
    world.run(format!("DROP TABLE {}", world.table)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite_waits_for_its_lock_as_long_as_it_was_told_to() {
    let world = World::<Sqlite>::new().await;
    let db = TxPool::<Sqlite>::builder().max_connections(2).begin_timeout(Duration::from_millis(20));
    let db = db.connect_with(world.options.clone()).await.unwrap();
    let mut holder = db.begin().await.unwrap();
    world.insert(&mut holder, 1).await.unwrap();
    let other = db.clone();
    let waits = tokio::spawn(async move { other.tx().serializable().run(async |_| Ok::<_, TxError>(())).await });
    sleep(Duration::from_millis(200)).await;
    assert!(!waits.is_finished(), "the lock is held");
    holder.commit().await.unwrap();
    tokio::time::timeout(PATIENCE, waits).await.unwrap().unwrap().unwrap();
    world.end(db).await;
}

/// Callers that give up do not keep others from the session that was opened for them.
#[tokio::test]
async fn what_is_opened_for_callers_who_have_gone_is_the_next_ones() {
    let world = World::<Postgres>::new().await;
    let options = world.options.clone().application_name(&world.table);
    let db = TxPool::<Postgres>::builder().max_connections(4).connect_with(options).await.unwrap();
    let held = db.begin().await.unwrap();
    for _ in 0..50 {
        drop(drop_after(1, db.begin()).await);
        tokio::task::yield_now().await;
        if world_sessions(&world).await >= 5 {
            break;
        }
    }
    let (one, two, three) = within(async { tokio::join!(db.begin(), db.begin(), db.begin()) }).await;
    // Including the connection for cancelling.
    assert!(world_sessions(&world).await <= 5);
    for guard in [one, two, three] {
        guard.unwrap().rollback().await.unwrap();
    }
    held.rollback().await.unwrap();
    world.end(db).await;
}

async fn world_sessions(world: &World<Postgres>) -> usize {
    let mut other = world.plain().await;
    let sql = format!("SELECT pid::bigint FROM pg_stat_activity WHERE application_name = '{}'", world.table);
    Postgres::numbers(&mut other, sql).await.unwrap().len()
}
