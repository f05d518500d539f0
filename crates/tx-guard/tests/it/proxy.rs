//! A proxy that delays, cuts and resets inside COMMIT: the reported results are compared with the table.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use cancel_safe_tx_guard::{CommitMode, CommitOutcome, Options, TransactionGuard, TxError, TxPool};
use futures_util::FutureExt;
use sqlx::mysql::{MySqlConnectOptions, MySqlSslMode};
use sqlx::postgres::{PgConnectOptions, PgListener, PgSslMode};
use sqlx::{Connection, MySql, PgPool, Postgres};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::world::{PATIENCE, TestDb, World, eventually};

/// How often each fault occurs.
const ROUNDS: i64 = 4;

/// A database behind a socket.
pub(crate) trait ServerDb: TestDb {
    /// A statement that ends by itself after ten seconds.
    const SECONDS: &'static str;

    fn address(options: &Options<Self>) -> (String, u16);
    /// The same database through another port of this machine, in plain text.
    fn through(options: Options<Self>, port: u16) -> Options<Self>;
    /// SQL that slows down each commit of an insert into `table`, if the database can do that.
    fn slow_commits(table: &str) -> Option<(String, String)>;
}

impl ServerDb for Postgres {
    const SECONDS: &'static str = "SELECT pg_sleep(10)";

    fn address(options: &PgConnectOptions) -> (String, u16) {
        (options.get_host().to_owned(), options.get_port())
    }

    fn through(options: PgConnectOptions, port: u16) -> PgConnectOptions {
        options.host("127.0.0.1").port(port).ssl_mode(PgSslMode::Disable)
    }

    fn slow_commits(table: &str) -> Option<(String, String)> {
        let set = format!(
            "CREATE FUNCTION {table}_slow() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN PERFORM pg_sleep(0.05); RETURN NULL; END $$;
             CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON {table} DEFERRABLE INITIALLY DEFERRED
                 FOR EACH ROW EXECUTE FUNCTION {table}_slow()"
        );
        Some((set, format!("DROP TRIGGER slow ON {table}; DROP FUNCTION {table}_slow")))
    }
}

impl ServerDb for MySql {
    const SECONDS: &'static str = "SELECT SLEEP(10)";

    fn address(options: &MySqlConnectOptions) -> (String, u16) {
        (options.get_host().to_owned(), options.get_port())
    }

    fn through(options: MySqlConnectOptions, port: u16) -> MySqlConnectOptions {
        options.host("127.0.0.1").port(port).ssl_mode(MySqlSslMode::Disabled)
    }

    fn slow_commits(_: &str) -> Option<(String, String)> {
        None
    }
}

/// What happens to the next COMMIT.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// It comes later, and so does its answer.
    Delay,
    /// It never reaches the server.
    CutBefore,
    /// It reaches the server, and the client is cut off at once.
    CutBehind,
    /// Its answer is read but not passed on.
    CutAnswer,
    /// Only this many bytes of its answer are passed on.
    Part(usize),
    /// The client is cut off by a reset instead of an end, before and after.
    ResetBefore,
    ResetAnswer,
    /// It reaches the server, but the `ROLLBACK` behind it fails there.
    SpoiltRollback,
}

const FAULTS: [Fault; 9] = [
    Fault::Delay,
    Fault::CutBefore,
    Fault::CutBehind,
    Fault::CutAnswer,
    Fault::Part(1),
    Fault::Part(9),
    Fault::Part(30),
    Fault::ResetBefore,
    Fault::ResetAnswer,
];

type Armed = Arc<Mutex<Option<Fault>>>;

/// A proxy in front of the server. Its drop closes all its connections.
pub(crate) struct Proxy {
    pub(crate) port: u16,
    armed: Armed,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    pub(crate) async fn open(server: (String, u16)) -> Self {
        let door = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = door.local_addr().unwrap().port();
        let armed = Armed::default();
        let arms = Arc::clone(&armed);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = door.accept().await {
                let server = TcpStream::connect(server.clone()).await.unwrap();
                connections.spawn(serve(client, server, Arc::clone(&arms)));
            }
        });
        Self { port, armed, task }
    }

    pub(crate) fn arm(&self, fault: Fault) {
        *self.armed.lock().unwrap() = Some(fault);
    }

    pub(crate) fn disarm(&self) {
        *self.armed.lock().unwrap() = None;
    }

    fn is_armed(&self) -> bool {
        self.armed.lock().unwrap().is_some()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[expect(clippy::disallowed_methods, reason = "nobody drops the proxy's tasks halfway")]
async fn serve(client: TcpStream, server: TcpStream, armed: Armed) {
    drop((client.set_nodelay(true), server.set_nodelay(true)));
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let (mut ask, mut answer) = ([0; 8192], [0; 8192]);
    loop {
        tokio::select! {
            read = from_client.read(&mut ask) => {
                let Ok(size @ 1..) = read else { return };
                let fault = ask[..size].windows(6).any(|text| text == b"COMMIT").then(|| armed.lock().unwrap().take());
                if let Some(fault) = fault.flatten() {
                    let (client, server) = ((&from_client, &mut to_client), (&mut from_server, &mut to_server));
                    if !strike(fault, &ask[..size], client, server).await {
                        return;
                    }
                } else if to_server.write_all(&ask[..size]).await.is_err() {
                    return;
                }
            }
            read = from_server.read(&mut answer) => {
                let Ok(size @ 1..) = read else { return };
                if to_client.write_all(&answer[..size]).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Applies the fault; returns whether the connection continues.
#[expect(clippy::disallowed_methods, reason = "nobody drops the proxy's tasks halfway")]
async fn strike(
    fault: Fault,
    ask: &[u8],
    (from_client, to_client): (&OwnedReadHalf, &mut OwnedWriteHalf),
    (from_server, to_server): (&mut OwnedReadHalf, &mut OwnedWriteHalf),
) -> bool {
    if let Fault::ResetBefore | Fault::ResetAnswer = fault {
        drop(from_client.as_ref().set_zero_linger());
    }
    if let Fault::CutBefore | Fault::ResetBefore = fault {
        return false;
    }
    if let Fault::Delay = fault {
        sleep(Duration::from_millis(30)).await;
    }
    if let Fault::SpoiltRollback = fault {
        let ask = String::from_utf8_lossy(ask).replace("; ROLLBACK", "; SELECT x");
        drop(to_server.write_all(ask.as_bytes()).await);
        return true;
    }
    drop(to_server.write_all(ask).await);
    if let Fault::CutBehind = fault {
        return false;
    }
    let mut answer = [0; 8192];
    let size = from_server.read(&mut answer).await.unwrap_or(0);
    let handed_on = match fault {
        Fault::Delay => size,
        Fault::Part(part) => part.min(size),
        _ => return false,
    };
    drop(to_client.write_all(&answer[..handed_on]).await);
    matches!(fault, Fault::Delay)
}

/// The reported results, fault by fault.
#[derive(Debug, Default)]
struct Told {
    committed: usize,
    rolled_back: usize,
    unknown: usize,
}

async fn quiet<D: ServerDb>(world: &World<D>, pair: i64) {
    // A server that loses its client during COMMIT still finishes it; afterwards the locks are free.
    let sql = format!("UPDATE {} SET v = v + 1 WHERE n IN ({}, {})", world.table, 2 * pair, 2 * pair + 1);
    let insert = format!("INSERT INTO {} (n) VALUES ({})", world.table, 2 * pair);
    eventually("the transaction has ended on the server", async || {
        let mut conn = world.plain().await;
        // Waits for any transaction that has inserted the same key, and then undoes its own insert.
        let mut tx = conn.begin().await.unwrap();
        let free = D::execute(&mut tx, sql.clone()).await.is_ok();
        drop(D::execute(&mut tx, insert.clone()).await);
        drop(tx.rollback().await);
        free
    })
    .await;
}

/// Applies each fault to transactions of `begin`, and compares.
async fn meet<D: ServerDb>(
    world: &World<D>,
    proxy: &Proxy,
    db: &TxPool<D>,
    begin: impl AsyncFn(&TxPool<D>) -> TransactionGuard<D>,
) -> Told {
    let mut told = Told::default();
    let mut pair = 0;
    for fault in FAULTS {
        for round in 0..ROUNDS {
            pair += 1;
            let mut tx = begin(db).await;
            let handle = tx.outcome_handle();
            world.insert(&mut tx, 2 * pair).await.unwrap();
            world.insert(&mut tx, 2 * pair + 1).await.unwrap();
            proxy.arm(fault);
            // Some callers do not wait.
            let said = if round % 4 == 3 { tx.commit().now_or_never() } else { Some(tx.commit().await) };
            let outcome = timeout(PATIENCE, handle.outcome()).await.expect("a handle is told");
            assert!(!proxy.is_armed(), "{fault:?} was never met");
            match said {
                Some(Ok(())) => assert_eq!(outcome, CommitOutcome::Committed, "{fault:?}"),
                Some(Err(error)) if error.is_unknown() => assert_eq!(outcome, CommitOutcome::Unknown, "{fault:?}"),
                Some(Err(error)) => assert_eq!(outcome, CommitOutcome::RolledBack, "{fault:?}, {error:?}"),
                None => {}
            }
            quiet(world, pair).await;
            let rows = world.committed().await;
            let rows = rows.into_iter().filter(|n| n / 2 == pair).count();
            match outcome {
                CommitOutcome::Committed => {
                    told.committed += 1;
                    assert_eq!(rows, 2, "{fault:?}");
                }
                CommitOutcome::RolledBack => {
                    told.rolled_back += 1;
                    assert_eq!(rows, 0, "{fault:?}");
                }
                _ => {
                    told.unknown += 1;
                    assert!(rows == 0 || rows == 2, "{fault:?}");
                    assert!(!matches!(fault, Fault::Delay), "a late answer is an answer");
                }
            }
        }
    }
    told
}

#[expect(clippy::print_stdout, reason = "what was told is a figure")]
async fn no_outcome_is_told_wrongly<D: ServerDb>(slow: bool, mode: CommitMode) -> Told {
    let world = World::<D>::new().await;
    let slow = slow.then(|| D::slow_commits(&world.table)).flatten();
    if let Some((set, _)) = &slow {
        world.run(set.clone()).await;
    }
    let proxy = Proxy::open(D::address(&world.options)).await;
    let options = D::through(world.options.clone(), proxy.port);
    let db = TxPool::<D>::builder().max_connections(2).commit_mode(mode).connect_with(options).await.unwrap();
    let told = meet(&world, &proxy, &db, async |db| db.begin().await.unwrap()).await;
    println!("{}: {told:?}", std::any::type_name::<D>());
    assert!(told.committed > 0 && told.unknown + told.rolled_back > 0, "{told:?}");
    if let Some((_, unset)) = slow {
        world.run(unset).await;
    }
    world.end(db).await;
    told
}

/// The twin: taking a commit's error for "rolled back" is wrong.
async fn an_error_of_a_plain_commit_means_nothing<D: ServerDb>() {
    let world = World::<D>::new().await;
    let proxy = Proxy::open(D::address(&world.options)).await;
    let pool = sqlx::pool::PoolOptions::<D>::new().test_before_acquire(false);
    let pool = pool.connect_with(D::through(world.options.clone(), proxy.port)).await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    world.insert(&mut tx, 2).await.unwrap();
    world.insert(&mut tx, 3).await.unwrap();
    proxy.arm(Fault::CutAnswer);
    assert!(tx.commit().await.is_err());
    quiet(&world, 1).await;
    assert_eq!(world.committed().await, [2, 3]);
    pool.close().await;
    world.run(format!("DROP TABLE {}", world.table)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_outcome_is_told_wrongly_on_postgres() {
    no_outcome_is_told_wrongly::<Postgres>(false, CommitMode::Verified).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_outcome_of_a_slow_commit_is_told_wrongly_on_postgres() {
    no_outcome_is_told_wrongly::<Postgres>(true, CommitMode::Verified).await;
}

#[tokio::test]
async fn an_error_of_a_plain_commit_means_nothing_on_postgres() {
    an_error_of_a_plain_commit_means_nothing::<Postgres>().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_outcome_is_left_unknown_where_it_is_asked_for() {
    for slow in [false, true] {
        let told = no_outcome_is_told_wrongly::<Postgres>(slow, CommitMode::Resolvable).await;
        assert_eq!(told.unknown, 0, "{told:?}");
    }
}

/// Its NOTIFY goes out at its commit, although it has written nothing.
#[tokio::test]
async fn a_lost_commit_that_has_only_notified_is_no_rollback() {
    let world = World::<Postgres>::new().await;
    let mut listener = PgListener::connect_with(&PgPool::connect_lazy_with(world.options.clone())).await.unwrap();
    listener.listen(&world.table).await.unwrap();
    let proxy = Proxy::open(Postgres::address(&world.options)).await;
    let db = TxPool::<Postgres>::builder().max_connections(1).commit_mode(CommitMode::Resolvable);
    let db = db.connect_with(Postgres::through(world.options.clone(), proxy.port)).await.unwrap();
    for (fault, expected) in
        [(Fault::CutAnswer, CommitOutcome::Committed), (Fault::CutBefore, CommitOutcome::RolledBack)]
    {
        let mut tx = db.begin().await.unwrap();
        let handle = tx.outcome_handle();
        Postgres::execute(&mut tx, format!("NOTIFY {}", world.table)).await.unwrap();
        proxy.arm(fault);
        assert_eq!(tx.commit().await.is_ok(), expected == CommitOutcome::Committed, "{fault:?}");
        assert_eq!(handle.outcome().await, expected, "{fault:?}");
    }
    timeout(PATIENCE, listener.recv()).await.expect("one has gone out").unwrap();
    world.end(db).await;
}

/// In a pool that does not ask about its other commits.
#[tokio::test]
async fn a_lost_commit_is_found_out_where_its_closure_asks_for_that() {
    let world = World::<Postgres>::new().await;
    let proxy = Proxy::open(Postgres::address(&world.options)).await;
    let db = TxPool::<Postgres>::builder().max_connections(1);
    let db = db.connect_with(Postgres::through(world.options.clone(), proxy.port)).await.unwrap();
    let run = db.tx().commit_mode(CommitMode::Resolvable).run(async |tx| {
        world.insert(tx, 1).await?;
        proxy.arm(Fault::CutAnswer);
        Ok::<_, TxError>(())
    });
    run.await.unwrap();
    assert_eq!(world.committed().await, [1]);
    world.end(db).await;
}

/// As after any other commit; its connection is closed by then.
#[tokio::test]
async fn the_hooks_of_a_commit_that_was_found_out_run_once() {
    let world = World::<Postgres>::new().await;
    let proxy = Proxy::open(Postgres::address(&world.options)).await;
    let db = TxPool::<Postgres>::builder().max_connections(1).commit_mode(CommitMode::Resolvable);
    let db = db.connect_with(Postgres::through(world.options.clone(), proxy.port)).await.unwrap();
    let sizes = Arc::<Mutex<Vec<usize>>>::default();
    for (n, fault) in [(1, Fault::CutAnswer), (2, Fault::CutBefore)] {
        let mut tx = db.begin().await.unwrap();
        world.insert(&mut tx, n).await.unwrap();
        let (seen, pool) = (Arc::clone(&sizes), db.clone());
        tx.after_commit(move || seen.lock().unwrap().push(pool.metrics().size));
        proxy.arm(fault);
        assert_eq!(tx.commit().await.is_ok(), n == 1, "{fault:?}");
    }
    assert_eq!(*sizes.lock().unwrap(), [0]);
    assert_eq!(world.committed().await, [1]);
    world.end(db).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_outcome_is_told_wrongly_on_mysql() {
    no_outcome_is_told_wrongly::<MySql>(false, CommitMode::Resolvable).await;
}

#[tokio::test]
async fn an_error_of_a_plain_commit_means_nothing_on_mysql() {
    an_error_of_a_plain_commit_means_nothing::<MySql>().await;
}
