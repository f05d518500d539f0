//! Servers that are down, full or restarted, and pools that are closed meanwhile.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cancel_safe_tx_guard::{CommitOutcome, Options, TxError, TxPool};
use sqlx::pool::PoolOptions;
use sqlx::{ConnectOptions, Connection, MySql, Postgres};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::commit::works_as_before;
use crate::on_all;
use crate::proxy::ServerDb;
use crate::world::{PATIENCE, SOON, Server, TestDb, World, eventually};

on_all!(
    a_wrapped_pool_that_is_closed_while_a_transaction_settles_ends,
    a_pool_that_is_closed_while_a_transaction_settles_ends,
);

/// Starts a slow statement, and drops it.
async fn leave_a_slow_statement<D: TestDb>(world: &World<D>, conn: &mut D::Connection) {
    leave_after_an_insert(world, conn, 1, D::SLOW).await;
}

async fn leave_after_an_insert<D: TestDb>(world: &World<D>, conn: &mut D::Connection, n: i64, slow: &str) {
    world.insert(conn, n).await.unwrap();
    let slow = D::execute(conn, slow.to_owned());
    assert!(timeout(Duration::from_millis(100), slow).await.is_err(), "it was not slow");
}

async fn a_wrapped_pool_that_is_closed_while_a_transaction_settles_ends<D: TestDb>() {
    let world = World::<D>::new().await;
    let pool = PoolOptions::<D>::new().max_connections(1).connect_with(world.options.clone()).await.unwrap();
    let db = TxPool::wrap(pool.clone());
    let mut tx = db.begin().await.unwrap();
    leave_a_slow_statement(&world, &mut tx).await;
    let (handle, start) = (tx.outcome_handle(), Instant::now());
    drop(tx);
    // sqlx waits for its connection, which the reaper gives back.
    timeout(PATIENCE, pool.close()).await.unwrap();
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
    assert!(world.committed().await.is_empty());
    let closed = db.begin().await.unwrap_err();
    assert!(matches!(closed, TxError::Closed), "{closed:?}");
    world.end(db).await;
}

async fn a_pool_that_is_closed_while_a_transaction_settles_ends<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    leave_a_slow_statement(&world, &mut tx).await;
    let (handle, start) = (tx.outcome_handle(), Instant::now());
    drop(tx);
    let report = db.close(PATIENCE).await;
    assert!(report.is_clean(), "{report}");
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    assert_eq!(handle.try_outcome(), Some(CommitOutcome::RolledBack));
    assert!(world.committed().await.is_empty());
    world.end(db).await;
}

/// A proxy that is like a server machine that can be switched off: its connections end, and new ones are refused.
struct Machine {
    port: u16,
    server: (String, u16),
    on: Mutex<Option<JoinHandle<()>>>,
}

impl Machine {
    async fn on(server: (String, u16)) -> Self {
        let door = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let machine = Self { port: door.local_addr().unwrap().port(), server, on: Mutex::new(None) };
        machine.serve(door).await;
        machine
    }

    async fn serve(&self, door: TcpListener) {
        let server = self.server.clone();
        let task = tokio::spawn(async move {
            // Dropped with the task, and all connections with it.
            let (power, _) = watch::channel(());
            while let Ok((mut client, _)) = door.accept().await {
                let (server, mut off) = (server.clone(), power.subscribe());
                tokio::spawn(async move {
                    let mut server = TcpStream::connect(server).await.unwrap();
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                        _ = off.changed() => {}
                    }
                });
            }
        });
        *self.on.lock().await = Some(task);
    }

    async fn switch_off(&self) {
        let task = self.on.lock().await.take().unwrap();
        task.abort();
        drop(task.await);
    }

    async fn switch_on(&self) {
        let mut door = None;
        eventually("the port is free again", async || {
            door = TcpListener::bind(("127.0.0.1", self.port)).await.ok();
            door.is_some()
        })
        .await;
        self.serve(door.unwrap()).await;
    }
}

/// Each caller loses the transaction in hand, none waits longer than its limit, and afterwards everything works as
/// before.
async fn a_restart_is_survived<D: ServerDb>(wrapped: bool) {
    let world = Arc::new(World::<D>::new().await);
    let machine = Machine::on(D::address(&world.options)).await;
    let options = D::through(world.options.clone(), machine.port);
    let pool = PoolOptions::<D>::new().acquire_timeout(Duration::from_secs(5));
    let db = if wrapped {
        TxPool::wrap(pool.connect_with(options).await.unwrap())
    } else {
        let builder = TxPool::<D>::builder().connect_timeout(Duration::from_secs(5));
        builder.acquire_timeout(Duration::from_secs(5)).connect_with(options).await.unwrap()
    };
    let mut committed = db.begin().await.unwrap();
    world.insert(&mut committed, 1).await.unwrap();
    let mut running = db.begin().await.unwrap();
    world.insert(&mut running, 2).await.unwrap();
    let mut dropped = db.begin().await.unwrap();
    // MySQL notices only at the end of the statement that its client is gone.
    leave_after_an_insert(&world, &mut dropped, 3, D::SECONDS).await;
    machine.switch_off().await;
    drop(dropped);

    // None of it had been sent, but a client that has lost the server cannot know that of a COMMIT in general.
    let handle = committed.outcome_handle();
    let error = committed.commit().await.unwrap_err();
    let unknown = handle.outcome().await == CommitOutcome::Unknown;
    assert_eq!(error.is_unknown(), unknown, "{error:?}");
    world.insert(&mut running, 4).await.unwrap_err();
    drop(running);
    let start = Instant::now();
    let error = db.begin().await.unwrap_err();
    assert!(error.is_connect() || error.is_timeout(), "{error:?}");
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());

    machine.switch_on().await;
    works_as_before(&world, &db).await;
    // The server itself kept running, and notices by itself that its clients are gone.
    let mut plain = world.plain().await;
    eventually("the locks of the lost are free", async || {
        let mut tx = plain.begin().await.unwrap();
        let free = async {
            for n in 1..=3 {
                world.insert(&mut tx, n).await?;
            }
            Ok::<_, sqlx::Error>(())
        };
        let free = timeout(PATIENCE / 2, free).await.is_ok_and(|inserted| inserted.is_ok());
        drop(tx.rollback().await);
        free
    })
    .await;
    assert_eq!(world.committed().await, [77]);
    world.end(db).await;
}

#[tokio::test]
async fn a_restart_is_survived_on_postgres() {
    a_restart_is_survived::<Postgres>(false).await;
}

#[tokio::test]
async fn a_restart_is_survived_by_a_wrapped_pool_on_postgres() {
    a_restart_is_survived::<Postgres>(true).await;
}

#[tokio::test]
async fn a_restart_is_survived_on_mysql() {
    a_restart_is_survived::<MySql>(false).await;
}

#[tokio::test]
async fn a_restart_is_survived_by_a_wrapped_pool_on_mysql() {
    a_restart_is_survived::<MySql>(true).await;
}

/// The cancelling connection is dead and no other is available: the session is given up, and the server finds out.
#[tokio::test]
async fn a_drop_frees_its_locks_when_nobody_can_cancel() {
    let world = World::<Postgres>::new().await;
    let role = format!("{}_role", world.table);
    // One session for the pool, one for cancelling, and no third.
    world.run(format!("CREATE ROLE {role} LOGIN CONNECTION LIMIT 2; GRANT ALL ON {} TO {role}", world.table)).await;
    let options = world.options.clone().username(&role);
    let db = TxPool::<Postgres>::builder().max_connections(1).connect_with(options.clone()).await.unwrap();
    let mut tx = db.begin().await.unwrap();
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *tx).await.unwrap();
    leave_a_slow_statement(&world, &mut tx).await;
    let mut beside = world.plain().await;
    let others = format!("SELECT pid FROM pg_stat_activity WHERE usename = '{role}' AND pid <> {pid}");
    let kill = format!("SELECT pg_terminate_backend(pid) FROM ({others}) canceller");
    Postgres::execute(&mut beside, kill).await.unwrap();
    let usurper = take_the_place::<Postgres>(&options).await;
    let (handle, start) = (tx.outcome_handle(), Instant::now());
    drop(tx);
    world.insert(&mut beside, 1).await.unwrap();
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
    drop(usurper);
    there_is_a_session_again(&db).await;
    works_as_before(&world, &db).await;
    world.run(format!("REVOKE ALL ON {} FROM {role}", world.table)).await;
    world.end(db).await;
    world.run(format!("DROP ROLE {role}")).await;
}

/// Connects as soon as the server has room, which is the canceller's place.
async fn take_the_place<D: TestDb>(options: &Options<D>) -> D::Connection {
    let mut usurper = None;
    eventually("the place of the canceller is free", async || {
        usurper = options.connect().await.ok();
        usurper.is_some()
    })
    .await;
    usurper.unwrap()
}

/// The same with a server that does not notice a dead client: the statement ends in its own time, and the pool does not
/// wait for it.
#[tokio::test]
async fn a_drop_gives_its_place_back_when_nobody_can_cancel_on_mysql() {
    let world = World::<MySql>::new().await;
    let user = format!("limited{}", std::process::id());
    world.run(format!("CREATE USER {user} IDENTIFIED BY 'right' WITH MAX_USER_CONNECTIONS 2")).await;
    world.run(format!("GRANT ALL ON *.* TO {user}")).await;
    let options = MySql::account(world.options.clone(), &user, "right");
    let db = TxPool::<MySql>::builder().max_connections(1).connect_with(options.clone()).await.unwrap();
    let mut tx = db.begin().await.unwrap();
    let id: u64 = sqlx::query_scalar("SELECT CONNECTION_ID()").fetch_one(&mut *tx).await.unwrap();
    leave_a_slow_statement(&world, &mut tx).await;
    let mut beside = world.plain().await;
    let others =
        format!("SELECT CAST(id AS SIGNED) FROM information_schema.processlist WHERE user = '{user}' AND id <> {id}");
    for canceller in MySql::numbers(&mut beside, others).await.unwrap() {
        MySql::execute(&mut beside, format!("KILL CONNECTION {canceller}")).await.unwrap();
    }
    let usurper = take_the_place::<MySql>(&options).await;
    let (handle, start) = (tx.outcome_handle(), Instant::now());
    drop(tx);
    assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    drop(usurper);
    there_is_a_session_again(&db).await;
    works_as_before(&world, &db).await;
    // The statement still runs, and has left nothing behind when it is over.
    MySql::execute(&mut beside, format!("KILL CONNECTION {id}")).await.unwrap();
    world.insert(&mut beside, 1).await.unwrap();
    assert_eq!(world.committed().await, [1, 77]);
    world.end(db).await;
    world.run(format!("DROP USER {user}")).await;
}

/// Every session that the server ends, including the canceller, is reported as lost, and the next transaction gets a
/// new session.
async fn a_server_that_ends_all_its_sessions_is_survived(wrapped: bool) {
    let world = World::<Postgres>::new().await;
    let role = format!("{}_role", world.table);
    world.run(format!("CREATE ROLE {role} LOGIN; GRANT ALL ON {} TO {role}", world.table)).await;
    let options = world.options.clone().username(&role);
    let db = match wrapped {
        true => TxPool::wrap(PoolOptions::<Postgres>::new().max_connections(3).connect_with(options).await.unwrap()),
        false => TxPool::<Postgres>::builder().max_connections(3).connect_with(options).await.unwrap(),
    };
    let mut committed = db.begin().await.unwrap();
    world.insert(&mut committed, 1).await.unwrap();
    let mut running = db.begin().await.unwrap();
    world.insert(&mut running, 2).await.unwrap();
    let mut dropped = db.begin().await.unwrap();
    leave_after_an_insert(&world, &mut dropped, 3, Postgres::SLOW).await;
    let (handle, dropped_handle) = (committed.outcome_handle(), dropped.outcome_handle());
    world.run(format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}'")).await;
    drop(dropped);

    let error = committed.commit().await.unwrap_err();
    let unknown = handle.outcome().await == CommitOutcome::Unknown;
    assert_eq!(error.is_unknown(), unknown, "{error:?}");
    world.insert(&mut running, 4).await.unwrap_err();
    let start = Instant::now();
    drop(running);
    works_as_before(&world, &db).await;
    assert_eq!(dropped_handle.outcome().await, CommitOutcome::RolledBack);
    // The canceller is new as well.
    let mut tx = db.begin().await.unwrap();
    leave_after_an_insert(&world, &mut tx, 5, Postgres::SLOW).await;
    drop(tx);
    world.run(format!("INSERT INTO {} (n) VALUES (5)", world.table)).await;
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    assert_eq!(world.committed().await, [5, 77]);
    world.run(format!("REVOKE ALL ON {} FROM {role}", world.table)).await;
    world.end(db).await;
    world.run(format!("DROP ROLE {role}")).await;
}

#[tokio::test]
async fn a_server_that_ends_all_its_sessions_is_survived_by_a_pool() {
    a_server_that_ends_all_its_sessions_is_survived(false).await;
}

#[tokio::test]
async fn a_server_that_ends_all_its_sessions_is_survived_by_a_wrapped_pool() {
    a_server_that_ends_all_its_sessions_is_survived(true).await;
}

/// Each attempt is rolled back, so that its session is available for the next one.
async fn there_is_a_session_again<D: TestDb>(db: &TxPool<D>) {
    let begins = async || match db.begin().await {
        Ok(tx) => tx.rollback().await.is_ok(),
        Err(_) => false,
    };
    eventually("there is a session again", begins).await;
}

#[tokio::test]
async fn a_server_without_a_session_left_is_told_and_what_runs_goes_on() {
    let world = World::<Postgres>::new().await;
    let role = format!("{}_role", world.table);
    world.run(format!("CREATE ROLE {role} LOGIN CONNECTION LIMIT 2; GRANT ALL ON {} TO {role}", world.table)).await;
    let options = world.options.clone().username(&role);
    let builder = TxPool::<Postgres>::builder().max_connections(5).acquire_timeout(PATIENCE);
    let db = builder.connect_with(options).await.unwrap();
    let mut tx = db.begin().await.unwrap();
    // This takes the place of the connection for cancelling.
    let other = db.begin().await.unwrap();
    let error = db.begin().await.unwrap_err();
    assert!(matches!(error, TxError::TooManySessions { .. }), "{error:?}");
    assert!(error.is_connect());
    other.rollback().await.unwrap();
    // The remaining transaction can still be cancelled, and its session comes back.
    leave_a_slow_statement(&world, &mut tx).await;
    let (handle, start) = (tx.outcome_handle(), Instant::now());
    drop(tx);
    let mut plain = world.plain().await;
    world.insert(&mut plain, 1).await.unwrap();
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    // The session is given back before the outcome is reported, so it is found again.
    handle.outcome().await;
    // If it was closed instead, the server needs a moment until it has room for another one.
    there_is_a_session_again(&db).await;
    works_as_before(&world, &db).await;
    world.run(format!("REVOKE ALL ON {} FROM {role}", world.table)).await;
    world.end(db).await;
    world.run(format!("DROP ROLE {role}")).await;
}
