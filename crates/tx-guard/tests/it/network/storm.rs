//! A storm: many guards are dropped at once while their statements run, far away from the server. It measures when each
//! row is free, as seen by a client near the server, and when each connection is back in its pool.
//!
//! Invariant: the measurement does not disturb what it measures. Locks are checked over a separate connection without a
//! delay, and the delaying proxy has its own thread. This file uses nothing from the other rooms, because a bench uses
//! it too.

use std::collections::{BTreeSet, HashMap};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cancel_safe_tx_guard::{Backend, Options, TransactionGuard, TxEvent, TxPool};
use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt};
use sqlx::mysql::{MySqlConnectOptions, MySqlSslMode};
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, MySql, MySqlConnection, PgConnection, Postgres, Row};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, sleep_until, timeout};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// How many connections are opened at the same time.
const ABREAST: usize = 32;

/// A database with a server, and what a storm needs to know about it.
pub(crate) trait Stormy: Backend {
    /// A statement of another session that makes the next one slow.
    const HINDRANCE: &'static str = "SELECT 1 /* TAG */";
    /// A statement that runs for hours.
    const SLOW: &'static str;
    /// The number of the session.
    const ID: &'static str;
    /// A query for how many sessions run a statement with `TAG` in it.
    const RUNNING: &'static str;

    /// Where the server is, and the options that lead to a port of this machine instead, without encryption.
    fn way(options: &Options<Self>, port: u16) -> ((String, u16), Options<Self>);
    fn execute(conn: &mut Self::Connection, sql: String) -> impl Future<Output = Result<(), sqlx::Error>> + Send;
    fn numbers(conn: &mut Self::Connection, sql: String) -> impl Future<Output = Result<Vec<i64>, sqlx::Error>> + Send;
}

impl Stormy for Postgres {
    const SLOW: &'static str = "SELECT pg_sleep(10000) /* TAG */";
    const ID: &'static str = "SELECT pg_backend_pid()::BIGINT";
    const RUNNING: &'static str = "SELECT count(*) FROM pg_stat_activity
        WHERE state = 'active' AND query LIKE '%TAG%' AND pid <> pg_backend_pid()";

    fn way(options: &PgConnectOptions, port: u16) -> ((String, u16), PgConnectOptions) {
        let server = (options.get_host().to_owned(), options.get_port());
        (server, options.clone().host("127.0.0.1").port(port).ssl_mode(PgSslMode::Disable))
    }

    async fn execute(conn: &mut PgConnection, sql: String) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(conn).await.map(drop)
    }

    async fn numbers(conn: &mut PgConnection, sql: String) -> Result<Vec<i64>, sqlx::Error> {
        sqlx::query_scalar(AssertSqlSafe(sql)).persistent(false).fetch_all(conn).await
    }
}

/// No SLEEP: in MariaDB all sleeping sessions share one mutex, and a KILL that does not get it at once tries again
/// after a tenth of a second, so that a hundred KILLs take ten seconds.
impl Stormy for MySql {
    const HINDRANCE: &'static str = "SELECT GET_LOCK('TAG', 0)";
    const SLOW: &'static str = "SELECT GET_LOCK('TAG', 10000)";
    const ID: &'static str = "SELECT CAST(CONNECTION_ID() AS SIGNED)";
    const RUNNING: &'static str = "SELECT count(*) FROM information_schema.processlist
        WHERE info LIKE '%TAG%' AND id <> CONNECTION_ID()";

    fn way(options: &MySqlConnectOptions, port: u16) -> ((String, u16), MySqlConnectOptions) {
        let server = (options.get_host().to_owned(), options.get_port());
        (server, options.clone().host("127.0.0.1").port(port).ssl_mode(MySqlSslMode::Disabled))
    }

    async fn execute(conn: &mut MySqlConnection, sql: String) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(conn).await.map(drop)
    }

    /// As text, because each prepared statement is closed by a message without an answer, and then the server's own TCP
    /// holds back the next one.
    async fn numbers(conn: &mut MySqlConnection, sql: String) -> Result<Vec<i64>, sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(conn).await?.iter().map(|row| row.try_get(0)).collect()
    }
}

/// A path to the server with a delay in each direction. Messages sent in a row arrive in a row.
pub(crate) struct Way<D: Stormy> {
    pub(crate) options: Options<D>,
    accepting: AbortHandle,
}

impl<D: Stormy> Way<D> {
    /// Opens a path to the server of `options` with this round trip.
    pub(crate) async fn open(options: &Options<D>, round_trip: Duration) -> Self {
        static LINES: LazyLock<Runtime> =
            LazyLock::new(|| Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap());
        let door = LINES.spawn(TcpListener::bind(("127.0.0.1", 0))).await.unwrap().unwrap();
        let (server, through) = D::way(options, door.local_addr().unwrap().port());
        let one_way = round_trip / 2;
        let accepting = LINES.spawn(async move {
            while let Ok((client, _)) = door.accept().await {
                let server = server.clone();
                tokio::spawn(async move {
                    let server = TcpStream::connect(server).await.unwrap();
                    client.set_nodelay(true).unwrap();
                    server.set_nodelay(true).unwrap();
                    let ((from_client, to_client), (from_server, to_server)) =
                        (client.into_split(), server.into_split());
                    carry(from_client, to_server, one_way);
                    carry(from_server, to_client, one_way);
                });
            }
        });
        Self { options: through, accepting: accepting.abort_handle() }
    }
}

impl<D: Stormy> Drop for Way<D> {
    /// Connections that are already open continue.
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// One task notes when data arrived, and another passes it on when it is due.
fn carry(
    mut from: impl AsyncReadExt + Unpin + Send + 'static,
    mut to: impl AsyncWriteExt + Unpin + Send + 'static,
    one_way: Duration,
) {
    let (sender, mut line) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut buffer = vec![0; 1 << 14];
        while let Ok(size @ 1..) = from.read(&mut buffer).await {
            if sender.send((Instant::now() + one_way, buffer[..size].to_vec())).is_err() {
                break;
            }
        }
    });
    tokio::spawn(async move {
        while let Some((due, bytes)) = line.recv().await {
            // A timer would round a zero delay up to a millisecond.
            if !one_way.is_zero() {
                sleep_until(due.into()).await;
            }
            #[expect(clippy::disallowed_methods, reason = "nobody drops this task halfway")]
            if to.write_all(&bytes).await.is_err() {
                break;
            }
        }
        drop(to.shutdown().await);
    });
}

/// What the guards do when they are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Doing {
    /// A slow statement runs.
    Running,
    /// The last statement has its answer.
    Idle,
}

/// The result of a storm.
#[derive(Debug)]
pub(crate) struct Report {
    /// After the drop, when each row was free.
    pub(crate) locks: Vec<Duration>,
    /// After the drop, when each connection was back.
    pub(crate) slots: Vec<Duration>,
    /// How many sessions the pool has opened anew.
    pub(crate) lost: usize,
    pub(crate) terminated: usize,
    pub(crate) cancels: usize,
    /// How many events could not be counted.
    pub(crate) missed: u64,
}

/// The `q` quantile of `times`.
pub(crate) fn quantile(times: &[Duration], q: f64) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted[((sorted.len() - 1) as f64 * q).round() as usize]
}

/// Drops `drops` guards of one pool at once.
pub(crate) async fn storm<D: Stormy>(options: &Options<D>, drops: u32, round_trip: Duration, doing: Doing) -> Report {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let table = format!("tx_storm_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let mut beside = options.connect().await.unwrap();
    let rows: Vec<String> = (1..=drops).map(|n| format!("({n}, 0)")).collect();
    for sql in [
        format!("CREATE TABLE {table} (n BIGINT PRIMARY KEY, v BIGINT NOT NULL)"),
        format!("INSERT INTO {table} (n, v) VALUES {}", rows.join(", ")),
        D::HINDRANCE.replace("TAG", &table),
    ] {
        D::execute(&mut beside, sql).await.unwrap();
    }
    let way = Way::<D>::open(options, round_trip).await;
    let pool = TxPool::<D>::builder().max_connections(drops).connect_timeout(PATIENCE).acquire_timeout(PATIENCE);
    let db = pool.connect_with(way.options.clone()).await.unwrap();

    let (mut guards, before) = begin_all(&db, drops).await;
    let updates =
        guards.iter_mut().zip(1..).map(|(tx, n)| D::execute(tx, format!("UPDATE {table} SET v = 1 WHERE n = {n}")));
    join_all(updates).await.into_iter().for_each(Result::unwrap);
    let handles: Vec<_> = guards.iter().map(TransactionGuard::outcome_handle).collect();
    let mut events = db.events();
    let told = tokio::spawn(async move {
        let (mut terminated, mut cancels, mut missed) = (0, 0, 0);
        while let Some(event) = events.next().await {
            match event {
                TxEvent::SessionTerminated => terminated += 1,
                TxEvent::CancelSent => cancels += 1,
                TxEvent::Missed(events) => missed += events,
                _ => {}
            }
        }
        (terminated, cancels, missed)
    });
    let mut tasks = JoinSet::new();
    for mut tx in guards {
        let slow = D::SLOW.replace("TAG", &table);
        tasks.spawn(async move {
            match doing {
                Doing::Running => drop(D::execute(&mut tx, slow).await),
                Doing::Idle => std::future::pending().await,
            }
        });
    }
    if doing == Doing::Running {
        all_run::<D>(&mut beside, &table, drops).await;
    }
    let start = Instant::now();
    tasks.abort_all();
    let slots = join_all(handles.iter().map(async |handle| {
        handle.outcome().await;
        start.elapsed()
    }));
    let (slots, locks) = futures_util::future::join(slots, until_free::<D>(&mut beside, &table, drops, start)).await;
    let (guards, after) = begin_all(&db, drops).await;
    drop(guards);
    assert!(db.close(PATIENCE).await.is_clean());
    drop(db);
    let (terminated, cancels, missed) = timeout(PATIENCE, told).await.unwrap().unwrap();
    D::execute(&mut beside, format!("DROP TABLE {table}")).await.unwrap();
    drop(beside.close().await);
    Report { locks, slots, lost: before.difference(&after).count(), terminated, cancels, missed }
}

/// As many guards as the pool has connections, and the sessions they have.
async fn begin_all<D: Stormy>(db: &TxPool<D>, drops: u32) -> (Vec<TransactionGuard<D>>, BTreeSet<i64>) {
    let begun = stream::iter(0..drops).map(async |_| {
        let mut tx = db.begin().await.unwrap();
        let id = D::numbers(&mut tx, D::ID.to_owned()).await.unwrap()[0];
        (tx, id)
    });
    begun.buffer_unordered(ABREAST).unzip().await
}

async fn all_run<D: Stormy>(beside: &mut D::Connection, tag: &str, drops: u32) {
    let running = D::RUNNING.replace("TAG", tag);
    let all = async {
        while D::numbers(beside, running.clone()).await.unwrap() != [i64::from(drops)] {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, all).await.expect("the statements do not all run");
}

/// Checks which rows another session could lock, until all are free.
async fn until_free<D: Stormy>(beside: &mut D::Connection, table: &str, drops: u32, start: Instant) -> Vec<Duration> {
    let mut held: BTreeSet<i64> = (1..=i64::from(drops)).collect();
    let mut free = HashMap::new();
    while !held.is_empty() {
        assert!(start.elapsed() < PATIENCE, "{} rows are not free", held.len());
        let list: Vec<String> = held.iter().map(i64::to_string).collect();
        let look = format!("SELECT n FROM {table} WHERE n IN ({}) FOR UPDATE SKIP LOCKED", list.join(", "));
        let found = D::numbers(beside, look).await.unwrap();
        let now = start.elapsed();
        for n in found {
            held.remove(&n);
            free.insert(n, now);
        }
        sleep(Duration::from_millis(1)).await;
    }
    free.into_values().collect()
}
