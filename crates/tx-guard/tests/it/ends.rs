//! Sessions that the server ends, that go silent, or that find no room for a cancel: reports say only what is known.

use std::time::{Duration, Instant};

use cancel_safe_tx_guard::{Backend, CommitMode, CommitOutcome, TransactionGuard, TxError, TxEvent, TxPool};
use sqlx::pool::PoolOptions;
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, MySql, Postgres};
use tokio::time::timeout;

use crate::commit::works_as_before;
use crate::on_all;
use crate::silence::{Door, SESSION, builder};
use crate::world::{PATIENCE, SOON, Server, TestDb, World, eventually, mostly_within};

on_all!(an_idle_guard_is_dropped_without_a_cancel);

/// A server's connection shows at once that nothing runs on it. SQLite's own thread has to say so, and on a busy machine
/// that may take longer than the grace.
async fn an_idle_guard_is_dropped_without_a_cancel<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    for n in 0..20 {
        let mut tx = db.begin().await.unwrap();
        let handle = tx.outcome_handle();
        world.insert(&mut tx, n).await.unwrap();
        drop(tx);
        assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
    }
    // The next transaction begins behind all that the last one has caused.
    drop(db.begin().await.unwrap());
    let cancels = db.metrics().cancels;
    let most = if D::beside().is_some() { 0 } else { 10 };
    assert!(cancels <= most, "{cancels} cancels were sent for idle connections");
    world.end(db).await;
}

/// A query for the session's number, with which another session can end it.
trait Ends: Server {
    fn ways() -> Vec<&'static str>;
    async fn number(tx: &mut TransactionGuard<Self>) -> i64;
    /// A query for how many sessions have this number.
    fn count(number: i64) -> String;
}

impl Ends for Postgres {
    fn ways() -> Vec<&'static str> {
        vec!["SELECT pg_terminate_backend({})", "SET LOCAL idle_in_transaction_session_timeout = '50ms'"]
    }

    async fn number(tx: &mut TransactionGuard<Self>) -> i64 {
        sqlx::query_scalar("SELECT pg_backend_pid()::bigint").fetch_one(&mut **tx).await.unwrap()
    }

    fn count(number: i64) -> String {
        format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {number}")
    }
}

impl Ends for MySql {
    fn ways() -> Vec<&'static str> {
        vec!["KILL CONNECTION {}", "SET SESSION idle_transaction_timeout = 1"]
    }

    async fn number(tx: &mut TransactionGuard<Self>) -> i64 {
        sqlx::query_scalar("SELECT CAST(CONNECTION_ID() AS SIGNED)").fetch_one(&mut **tx).await.unwrap()
    }

    fn count(number: i64) -> String {
        format!("SELECT count(*) FROM information_schema.processlist WHERE id = {number}")
    }
}

/// The result of a commit whose session was ended while it was idle.
async fn commit_after_the_end<D: Ends>(way: &str, mode: CommitMode) -> (TxError, CommitOutcome) {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    tx.set_commit_mode(mode);
    world.insert(&mut tx, 1).await.unwrap();
    let number = D::number(&mut tx).await;
    match way.contains("{}") {
        true => world.run(way.replace("{}", &number.to_string())).await,
        false => D::execute(&mut tx, way.to_owned()).await.unwrap(),
    }
    let mut beside = world.plain().await;
    eventually("the session has ended", async || D::numbers(&mut beside, D::count(number)).await.unwrap() == [0]).await;
    let handle = tx.outcome_handle();
    let error = tx.commit().await.unwrap_err();
    assert!(world.committed().await.is_empty());
    works_as_before(&world, &db).await;
    let outcome = handle.outcome().await;
    world.end(db).await;
    (error, outcome)
}

#[tokio::test]
async fn a_session_that_ended_before_commit_was_read_has_rolled_back() {
    for way in Postgres::ways() {
        for mode in [CommitMode::Verified, CommitMode::Resolvable] {
            let (error, outcome) = commit_after_the_end::<Postgres>(way, mode).await;
            assert_eq!(outcome, CommitOutcome::RolledBack, "{way}: {error:?}");
            assert!(!error.is_unknown(), "{way}: {error:?}");
        }
    }
}

/// MariaDB says why it ends a session; MySQL does so only for a session that was idle for too long.
#[tokio::test]
async fn a_session_whose_end_mariadb_has_told_has_rolled_back() {
    for way in MySql::ways() {
        let (error, outcome) = commit_after_the_end::<MySql>(way, CommitMode::Verified).await;
        match &error {
            TxError::Unknown { source } => {
                assert!(source.as_database_error().is_none(), "{way}: the server has told {source:?}");
                assert_eq!(outcome, CommitOutcome::Unknown, "{way}");
            }
            error => assert_eq!(outcome, CommitOutcome::RolledBack, "{way}: {error:?}"),
        }
    }
}

#[tokio::test]
async fn a_rollback_that_nobody_confirmed_says_so() {
    let world = World::<Postgres>::new().await;
    let door = Door::open(&world.options).await;
    let db = builder().connect_with(door.through.clone()).await.unwrap();
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    door.silence(SESSION);
    door.silence(SESSION + 1);
    door.silence(SESSION + 2);
    let handle = tx.outcome_handle();
    let error = timeout(PATIENCE / 2, tx.rollback()).await.expect("it does not end").unwrap_err();
    assert!(matches!(error, TxError::Unconfirmed { .. }), "{error:?}");
    assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
    drop(door);
    assert!(db.close(PATIENCE).await.is_clean());
    assert!(world.committed().await.is_empty());
    world.run(format!("DROP TABLE {}", world.table)).await;
}

/// The same with a way to end the session: then the server confirms it over another connection.
#[tokio::test]
async fn a_rollback_on_a_silent_session_is_confirmed_by_its_end() {
    let world = World::<Postgres>::new().await;
    let door = Door::open(&world.options).await;
    let db = builder().connect_with(door.through.clone()).await.unwrap();
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    door.silence(SESSION);
    timeout(PATIENCE / 2, tx.rollback()).await.expect("it does not end").unwrap();
    works_as_before(&world, &db).await;
    world.end(db).await;
}

/// An account with a session limit.
trait Limited: Server {
    fn account_sql(name: &str, sessions: u32) -> Vec<String>;
}

impl Limited for Postgres {
    fn account_sql(name: &str, sessions: u32) -> Vec<String> {
        vec![format!("CREATE ROLE {name} LOGIN PASSWORD 'p' CONNECTION LIMIT {sessions}")]
    }
}

impl Limited for MySql {
    fn account_sql(name: &str, sessions: u32) -> Vec<String> {
        vec![
            format!("CREATE USER {name}@'%' IDENTIFIED BY 'p' WITH MAX_USER_CONNECTIONS {sessions}"),
            format!("GRANT ALL ON *.* TO {name}@'%'"),
        ]
    }
}

/// Both sessions of the account are in use, and one has a slow statement whose guard is dropped: how long its row stays
/// locked.
async fn lock_of_a_drop_on_a_full_server(options: PgConnectOptions, world: &World<Postgres>) -> Duration {
    let pool = PoolOptions::<Postgres>::new().max_connections(2).connect_with(options).await.unwrap();
    let db = TxPool::wrap(pool.clone());
    let other = db.begin().await.unwrap();
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    let slow = Postgres::execute(&mut tx, Postgres::SLOW.to_owned());
    assert!(timeout(Duration::from_millis(200), slow).await.is_err(), "it was not slow");
    let start = Instant::now();
    drop(tx);
    // This waits for the row.
    world.run(format!("INSERT INTO {} (n) VALUES (1)", world.table)).await;
    let took = start.elapsed();
    other.rollback().await.unwrap();
    assert_eq!(db.metrics().terminated, 1, "it is told that the session was given up");
    assert!(db.close(PATIENCE).await.is_clean());
    pool.close().await;
    took
}

#[tokio::test]
async fn a_drop_frees_its_locks_on_a_server_that_has_no_session_left() {
    let world = World::<Postgres>::new().await;
    let account = format!("{}_full", world.table);
    for sql in Postgres::account_sql(&account, 2) {
        world.run(sql).await;
    }
    world.run(format!("GRANT ALL ON {} TO {account}", world.table)).await;
    let options = Postgres::account(world.options.clone(), &account, "p");
    // Less than the two seconds that a cancellable statement is waited for: the server sees that its client has gone.
    let lock = async || {
        let took = lock_of_a_drop_on_a_full_server(options.clone(), &world).await;
        world.run(format!("DELETE FROM {}", world.table)).await;
        took
    };
    mostly_within(Duration::from_millis(1_900), 5, lock).await;
    world.run(format!("DROP TABLE {}; DROP ROLE {account}", world.table)).await;
}

/// The cancel uses the room for one more session.
#[tokio::test]
async fn a_wrapped_pool_cancels_while_there_is_room_for_one_more() {
    async fn on<D: Limited + Backend>() {
        let world = World::<D>::new().await;
        let account = format!("{}_r", world.table);
        for sql in D::account_sql(&account, 2) {
            world.run(sql).await;
        }
        let options = D::account(world.options.clone(), &account, "p");
        let pool = PoolOptions::<D>::new().max_connections(1).connect_with(options).await.unwrap();
        let db = TxPool::wrap(pool.clone());
        let mut events = db.events();
        let mut tx = db.begin().await.unwrap();
        let slow = D::execute(&mut tx, D::SLOW.to_owned());
        assert!(timeout(Duration::from_millis(200), slow).await.is_err(), "it was not slow");
        let (handle, start) = (tx.outcome_handle(), Instant::now());
        drop(tx);
        assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
        assert!(start.elapsed() < SOON);
        assert_eq!(events.next().await, Some(TxEvent::ImplicitRollback));
        assert_eq!(events.next().await, Some(TxEvent::CancelSent));
        assert_eq!(db.begin().await.unwrap().rollback().await.map_err(|error| error.to_string()), Ok(()));
        assert!(db.close(PATIENCE).await.is_clean());
        pool.close().await;
        world.run(format!("DROP TABLE {}", world.table)).await;
    }
    on::<Postgres>().await;
    on::<MySql>().await;
}

/// Several guards are dropped at once, with a cancelling connection that has been open for long: a few messages serve
/// all of them, and none loses its session.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_dropped_at_once_is_cancelled_at_once() {
    async fn on<D: TestDb>(hold: &str, wait: &str) {
        const GUARDS: u32 = 30;
        let world = World::<D>::new().await;
        let mut holder = world.plain().await;
        D::numbers(&mut holder, hold.to_owned()).await.unwrap();
        let db = world.pool(GUARDS).await;
        let mut guards = Vec::new();
        for _ in 0..GUARDS {
            let mut tx = db.begin().await.unwrap();
            let slow = D::execute(&mut tx, wait.to_owned());
            assert!(timeout(Duration::from_millis(20), slow).await.is_err(), "it was not slow");
            guards.push(tx);
        }
        let mut events = db.events();
        let handles: Vec<_> = guards.iter().map(TransactionGuard::outcome_handle).collect();
        drop(guards);
        for handle in handles {
            assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
        }
        assert!(db.close(PATIENCE).await.is_clean());
        drop(db);
        let mut cancelled = 0;
        while let Some(event) = events.next().await {
            assert_ne!(event, TxEvent::SessionTerminated, "on {}", D::NAME);
            cancelled += u32::from(event == TxEvent::CancelSent);
        }
        assert_eq!(cancelled, GUARDS);
        world.run(format!("DROP TABLE {}", world.table)).await;
    }
    on::<Postgres>("SELECT 1::bigint FROM pg_advisory_lock(4711)", "SELECT pg_advisory_lock(4711)").await;
    // Not SLEEP: all sleeping sessions share one mutex of the server, for which each KILL waits up to two seconds.
    on::<MySql>("SELECT GET_LOCK('at_once', 0)", "SELECT GET_LOCK('at_once', 10000)").await;
}

#[tokio::test]
async fn a_wrapped_transaction_asks_the_server_to_look_for_its_client() {
    let world = World::<Postgres>::new().await;
    let pool = PoolOptions::<Postgres>::new().max_connections(1).connect_with(world.options.clone()).await.unwrap();
    let db = TxPool::wrap(pool.clone());
    let interval = async |conn: &mut sqlx::PgConnection| -> String {
        let show = AssertSqlSafe("SELECT current_setting('client_connection_check_interval')".to_owned());
        sqlx::query_scalar(show).fetch_one(conn).await.unwrap()
    };
    let before = interval(&mut *pool.acquire().await.unwrap()).await;
    let mut tx = db.begin().await.unwrap();
    let inside = interval(&mut tx).await;
    tx.commit().await.unwrap();
    let after = interval(&mut *pool.acquire().await.unwrap()).await;
    assert_eq!((before.as_str(), after.as_str()), ("0", "0"));
    assert_eq!(inside, "500ms");
    pool.close().await;
    world.end(db).await;
}

/// An interval that the owner has set is left as it is.
#[tokio::test]
async fn a_wrapped_session_keeps_the_interval_that_it_has() {
    let world = World::<Postgres>::new().await;
    let options = world.options.clone().options([("client_connection_check_interval", "7s")]);
    let pool = PoolOptions::<Postgres>::new().max_connections(1).connect_with(options).await.unwrap();
    let db = TxPool::wrap(pool.clone());
    let mut tx = db.begin().await.unwrap();
    let show = "SELECT current_setting('client_connection_check_interval')";
    let inside: String = sqlx::query_scalar(show).fetch_one(&mut *tx).await.unwrap();
    assert_eq!(inside, "7s");
    tx.rollback().await.unwrap();
    pool.close().await;
    world.end(db).await;
}
