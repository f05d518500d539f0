//! Peers that vanish without a word: connections that stay open and carry nothing any more.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cancel_safe_tx_guard::{CommitOutcome, TxError, TxEvent, TxPool, TxPoolBuilder};
use futures_util::FutureExt;
use sqlx::Postgres;
use sqlx::pool::PoolOptions;
use sqlx::postgres::PgConnectOptions;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use crate::commit::works_as_before;
use crate::world::{PATIENCE, TestDb, World, eventually, mostly_within};

/// A proxy in front of the server that numbers the connections. A silent connection is neither closed nor served.
pub(crate) struct Door {
    pub(crate) through: PgConnectOptions,
    silent: watch::Sender<HashSet<usize>>,
    ended: Arc<Mutex<HashSet<usize>>>,
    task: JoinHandle<()>,
}

/// The number of the first session of a pool, and of its connection for cancelling.
pub(crate) const SESSION: usize = 0;
pub(crate) const CANCELLER: usize = 1;

impl Door {
    pub(crate) async fn open(options: &PgConnectOptions) -> Self {
        let door = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let through = options.clone().host("127.0.0.1").port(door.local_addr().unwrap().port());
        let server = (options.get_host().to_owned(), options.get_port());
        let (silent, ended) = (watch::Sender::default(), Arc::<Mutex<HashSet<usize>>>::default());
        let (listens, ends) = (silent.subscribe(), Arc::clone(&ended));
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            let mut number = 0;
            while let Ok((client, _)) = door.accept().await {
                connections.spawn(serve(number, client, server.clone(), listens.clone(), Arc::clone(&ends)));
                number += 1;
            }
        });
        Self { through, silent, ended, task }
    }

    pub(crate) fn silence(&self, number: usize) {
        self.silent.send_modify(|silent| assert!(silent.insert(number)));
    }

    fn wake(&self, number: usize) {
        self.silent.send_modify(|silent| assert!(silent.remove(&number)));
    }
}

impl Drop for Door {
    /// The server sees the end of all its connections.
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    number: usize,
    mut client: TcpStream,
    server: (String, u16),
    mut silent: watch::Receiver<HashSet<usize>>,
    ended: Arc<Mutex<HashSet<usize>>>,
) {
    drop(silent.wait_for(|silent| !silent.contains(&number)).await);
    let mut server = TcpStream::connect(server).await.unwrap();
    let copied = tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => true,
        _ = silent.wait_for(|silent| silent.contains(&number)) => false,
    };
    if !copied {
        std::future::pending::<()>().await;
    }
    ended.lock().unwrap().insert(number);
}

pub(crate) fn builder() -> TxPoolBuilder<Postgres> {
    TxPool::<Postgres>::builder().max_connections(1)
}

pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE / 2, future).await.expect("it does not end")
}

pub(crate) async fn backend(db: &TxPool<Postgres>) -> i32 {
    let mut tx = db.begin().await.unwrap();
    let pid = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *tx).await.unwrap();
    tx.rollback().await.unwrap();
    pid
}

#[tokio::test]
async fn an_abandoned_begin_gives_its_place_back() {
    let world = World::<Postgres>::new().await;
    let door = Door::open(&world.options).await;
    let db = builder().connect_with(door.through.clone()).await.unwrap();
    assert!(backend(&db).await > 0);
    door.silence(SESSION);
    assert!(timeout(Duration::from_millis(50), db.begin()).await.is_err());
    within(works_as_before(&world, &db)).await;
    world.end(db).await;
}

#[tokio::test]
async fn an_abandoned_begin_gives_its_place_in_a_wrapped_pool_back() {
    let world = World::<Postgres>::new().await;
    let door = Door::open(&world.options).await;
    let pool = PoolOptions::new().max_connections(1).test_before_acquire(false);
    let pool = pool.connect_with(door.through.clone()).await.unwrap();
    let db = TxPool::wrap(pool.clone());
    assert!(backend(&db).await > 0);
    eventually("sqlx has the connection back", async || pool.num_idle() == 1).await;
    door.silence(SESSION);
    assert!(timeout(Duration::from_millis(50), db.begin()).await.is_err());
    within(works_as_before(&world, &db)).await;
    world.end(db).await;
    pool.close().await;
}

#[tokio::test]
async fn an_abandoned_commit_is_given_up_and_in_doubt() {
    let world = World::<Postgres>::new().await;
    let door = Door::open(&world.options).await;
    let db = builder().connect_with(door.through.clone()).await.unwrap();
    let mut events = db.events();
    let mut tx = db.begin().await.unwrap();
    let handle = tx.outcome_handle();
    world.insert(&mut tx, 1).await.unwrap();
    door.silence(SESSION);
    // Gives the door a turn to become silent.
    tokio::task::yield_now().await;
    assert!(tx.commit().now_or_never().is_none());
    let start = tokio::time::Instant::now();
    tokio::time::pause();
    assert_eq!(handle.outcome().await, CommitOutcome::Unknown);
    assert!(start.elapsed() >= Duration::from_secs(600), "{:?}", start.elapsed());
    tokio::time::resume();
    assert_eq!(events.next().await, Some(TxEvent::LateOutcome(CommitOutcome::Unknown)));
    within(works_as_before(&world, &db)).await;
    drop(door);
    world.end(db).await;
}

#[tokio::test]
async fn a_server_that_opens_one_session_and_then_nothing_is_a_timeout() {
    let world = World::<Postgres>::new().await;
    let door = Door::open(&world.options).await;
    door.silence(CANCELLER);
    let limit = Duration::from_millis(500);
    let connecting = builder().connect_timeout(limit).connect_with(door.through.clone());
    let error = within(connecting).await.unwrap_err();
    assert!(matches!(error, TxError::ConnectTimeout { timeout, .. } if timeout == limit), "{error:?}");
}

/// Returns how long it took until the transaction was rolled back.
async fn a_cancel_without_an_answer(world: &World<Postgres>, options: &PgConnectOptions, kill: bool) -> Duration {
    let door = Door::open(options).await;
    let db = builder().connect_with(door.through.clone()).await.unwrap();
    let before = backend(&db).await;
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    let slow = Postgres::execute(&mut tx, Postgres::SLOW.to_owned());
    assert!(timeout(Duration::from_millis(100), slow).await.is_err(), "it was not slow");
    if kill {
        let killed = format!(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE application_name = '{}' AND pid <> {before}",
            world.table
        );
        world.run(killed).await;
    } else {
        door.silence(CANCELLER);
    }
    let (handle, start) = (tx.outcome_handle(), Instant::now());
    drop(tx);
    assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
    let took = start.elapsed();
    assert_ne!(backend(&db).await, before);
    assert!(db.close(PATIENCE).await.is_clean());
    took
}

/// A cancel that was sent and never answered may arrive at any time. Its target session must not be in other hands by
/// then.
#[tokio::test]
async fn a_session_whose_cancel_had_no_answer_is_not_used_again() {
    let world = World::<Postgres>::new().await;
    let options = world.options.clone().application_name(&world.table);
    for kill in [false, true] {
        // Less than the two seconds after which a session is given up: the cancel found another way.
        let lost = async || a_cancel_without_an_answer(&world, &options, kill).await;
        mostly_within(Duration::from_millis(1_900), 5, lost).await;
    }
    world.run(format!("DROP TABLE {}", world.table)).await;
}

#[tokio::test]
async fn a_session_that_is_open_after_the_pool_was_closed_is_closed() {
    let world = World::<Postgres>::new().await;
    let door = Door::open(&world.options).await;
    let db = builder().max_connections(2).connect_with(door.through.clone()).await.unwrap();
    let tx = db.begin().await.unwrap();
    let late = CANCELLER + 1;
    door.silence(late);
    assert!(timeout(Duration::from_millis(50), db.begin()).await.is_err());
    tx.rollback().await.unwrap();
    assert!(db.close(PATIENCE).await.is_clean());
    door.wake(late);
    eventually("the late session is closed", async || door.ended.lock().unwrap().contains(&late)).await;
    world.end(db).await;
}
