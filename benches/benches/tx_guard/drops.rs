//! How long the locks and the connection of a dropped transaction stay taken.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cancel_safe_tx_guard::{Backend, Options, TxPool};
use futures_util::StreamExt;
use futures_util::future::join;
use sqlx::pool::PoolOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode};
use sqlx::{AssertSqlSafe, ConnectOptions, MySql, Pool, Postgres, Sqlite};
use tokio::time::timeout;

use crate::measure::{Place, Table, execute, quantile, show};

const BIG_ROWS: i64 = 2_000_000;
/// How long a statement runs before it is dropped.
const HEAD_START: Duration = Duration::from_millis(20);

/// A database with a slow statement.
trait Slow: Backend {
    const SLOW: &'static str;
    async fn execute(conn: &mut Self::Connection, sql: String) -> Result<(), sqlx::Error>;
}

impl Slow for Postgres {
    const SLOW: &'static str = "SELECT pg_sleep(10)";
    async fn execute(conn: &mut Self::Connection, sql: String) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(conn).await.map(drop)
    }
}

impl Slow for MySql {
    const SLOW: &'static str = "SELECT SLEEP(10)";
    async fn execute(conn: &mut Self::Connection, sql: String) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(conn).await.map(drop)
    }
}

impl Slow for Sqlite {
    const SLOW: &'static str =
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 30000000) SELECT count(*) FROM n";
    async fn execute(conn: &mut Self::Connection, sql: String) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(conn).await.map(drop)
    }
}

/// Waits for the row and the only connection at the same time.
async fn until_free<D: Slow, T>(
    next: impl Future<Output = T>,
    contender: &mut D::Connection,
    update: &str,
) -> Duration {
    let start = Instant::now();
    let (next, freed) = join(next, D::execute(contender, update.to_owned())).await;
    freed.unwrap();
    let elapsed = start.elapsed();
    drop(next);
    elapsed
}

/// Drops a guard while `slow` runs, again and again.
async fn guarded<D: Slow>(
    db: &TxPool<D>,
    contender: &mut D::Connection,
    update: &str,
    slow: &str,
    rounds: usize,
) -> Vec<Duration> {
    let mut times = Vec::new();
    for _ in 0..rounds {
        let mut tx = db.begin().await.unwrap();
        D::execute(&mut tx, update.to_owned()).await.unwrap();
        assert!(timeout(HEAD_START, D::execute(&mut tx, slow.to_owned())).await.is_err(), "it was not slow");
        drop(tx);
        times.push(until_free::<D, _>(async { db.begin().await.unwrap() }, contender, update).await);
    }
    times
}

/// The same once, with a transaction of sqlx.
async fn plain<D: Slow>(pool: &Pool<D>, contender: &mut D::Connection, update: &str, slow: &str) -> Duration {
    let mut tx = pool.begin().await.unwrap();
    D::execute(&mut tx, update.to_owned()).await.unwrap();
    assert!(timeout(HEAD_START, D::execute(&mut tx, slow.to_owned())).await.is_err(), "it was not slow");
    drop(tx);
    until_free::<D, _>(async { pool.begin().await.unwrap() }, contender, update).await
}

async fn pool_of_one<D: Slow>(options: &Options<D>) -> TxPool<D> {
    TxPool::builder().max_connections(1).connect_with(options.clone()).await.unwrap()
}

async fn plain_pool<D: Slow>(options: &Options<D>, test: bool) -> Pool<D> {
    let pool = PoolOptions::new().max_connections(1).acquire_timeout(Duration::from_secs(60));
    pool.test_before_acquire(test).connect_with(options.clone()).await.unwrap()
}

struct Rows(Table);

impl Rows {
    /// Adds our values, and one each for default and tuned sqlx.
    fn add(&mut self, what: &str, target: &str, ours: &[Duration], default: String, tuned: String) {
        let quantiles = [0.5, 0.95, 0.99].map(|q| show(quantile(ours, q))).join(" / ");
        self.0.row([what.to_owned(), target.to_owned(), quantiles, default, tuned]);
    }
}

/// A statement that sleeps, on any of the databases.
async fn sleeping<D: Slow>(rows: &mut Rows, what: &str, target: &str, options: &Options<D>, update: [String; 3]) {
    let [ours, theirs, tuned] = update;
    let db = pool_of_one::<D>(options).await;
    let mut contender: D::Connection = options.connect().await.unwrap();
    let times = guarded(&db, &mut contender, &ours, D::SLOW, 100).await;
    // The two of sqlx wait for ten seconds each, at the same time if possible.
    let once = async |test: bool, update: String| {
        let pool = plain_pool::<D>(options, test).await;
        let mut contender: D::Connection = options.connect().await.unwrap();
        show(plain(&pool, &mut contender, &update, D::SLOW).await)
    };
    let (default, tuned) = if D::URL_SCHEMES.contains(&"sqlite") {
        (once(true, theirs).await, "the same".to_owned())
    } else {
        join(once(true, theirs), once(false, tuned)).await
    };
    rows.add(what, target, &times, default, tuned);
    assert!(db.close(Duration::from_secs(10)).await.is_clean());
}

pub(crate) async fn run(postgres: &str, mysql: &str) {
    let place = Place::open(postgres, 50).await;
    println!("after a drop, until the row and the only connection of the pool are free: p50 / p95 / p99");
    let mut rows = Rows(Table::new(&["", "bar", "tx-guard", "sqlx", "sqlx, tuned"]));
    let updates = [1, 2, 3].map(|row| place.update(row));
    sleeping::<Postgres>(&mut rows, "PostgreSQL, `pg_sleep(10)`", "p50 5, p99 25 ms", &place.options, updates).await;
    wrapped(&mut rows, &place).await;
    big_update(&mut rows, postgres).await;
    lock_wait(&mut rows, &place).await;
    half_read(&mut rows, &place).await;
    idle(&mut rows, &place).await;
    killed(&mut rows, &place).await;
    mariadb(&mut rows, mysql).await;
    sqlite(&mut rows).await;
    rows.0.print();
    place.close().await;
}

async fn wrapped(rows: &mut Rows, place: &Place) {
    let pool = plain_pool::<Postgres>(&place.options, false).await;
    let db = TxPool::wrap(pool.clone());
    let times = guarded(&db, &mut place.conn().await, &place.update(1), Postgres::SLOW, 100).await;
    rows.add("the same on a wrapped pool", "", &times, String::new(), String::new());
    pool.close().await;
}

async fn big_update(rows: &mut Rows, url: &str) {
    let big = Place::open(url, BIG_ROWS).await;
    let all = format!("UPDATE {} SET v = v + 1", big.table);
    let db = pool_of_one::<Postgres>(&big.options).await;
    let (mut contender, one) = (big.conn().await, big.update(1));
    let mut times = Vec::new();
    for _ in 0..10 {
        let mut tx = db.begin().await.unwrap();
        assert!(timeout(Duration::from_millis(300), execute(&mut tx, all.clone())).await.is_err(), "it was not slow");
        drop(tx);
        let free = until_free::<Postgres, _>(async { db.begin().await.unwrap() }, &mut contender, &one);
        times.push(free.await);
    }
    assert!(db.close(Duration::from_secs(10)).await.is_clean());
    let pool = plain_pool::<Postgres>(&big.options, true).await;
    let mut tx = pool.begin().await.unwrap();
    assert!(timeout(Duration::from_millis(300), execute(&mut tx, all)).await.is_err(), "it was not slow");
    drop(tx);
    let free = until_free::<Postgres, _>(async { pool.begin().await.unwrap() }, &mut contender, &one);
    let default = show(free.await);
    rows.add("PostgreSQL, UPDATE of 2 million rows", "p50 20 ms", &times, default, "the same".to_owned());
    pool.close().await;
    big.close().await;
}

/// A wait for a lock that another transaction holds for three seconds.
async fn lock_wait(rows: &mut Rows, place: &Place) {
    let (held, other) = (place.update(1), place.update(2));
    let db = pool_of_one::<Postgres>(&place.options).await;
    let (mut holder, mut contender) = (place.conn().await, place.conn().await);
    sqlx::raw_sql("BEGIN").execute(&mut holder).await.unwrap();
    execute(&mut holder, held.clone()).await.unwrap();
    let times = guarded(&db, &mut contender, &other, &held, 50).await;
    assert!(db.close(Duration::from_secs(10)).await.is_clean());
    let pool = plain_pool::<Postgres>(&place.options, true).await;
    let release = async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        sqlx::raw_sql("ROLLBACK").execute(&mut holder).await.unwrap();
    };
    let (default, ()) = join(plain(&pool, &mut contender, &other, &held), release).await;
    let default = format!("{}, as long as the holder", show(default));
    rows.add("PostgreSQL, waiting for a lock", "", &times, default, "the same".to_owned());
    pool.close().await;
}

async fn half_read(rows: &mut Rows, place: &Place) {
    const MANY: &str = "SELECT i FROM generate_series(1, 5000000) i";
    let (update, mut contender) = (place.update(1), place.conn().await);
    let db = pool_of_one::<Postgres>(&place.options).await;
    let mut times = Vec::new();
    for _ in 0..20 {
        let mut tx = db.begin().await.unwrap();
        execute(&mut tx, update.clone()).await.unwrap();
        sqlx::query(MANY).fetch(&mut *tx).next().await.unwrap().unwrap();
        drop(tx);
        times.push(until_free::<Postgres, _>(async { db.begin().await.unwrap() }, &mut contender, &update).await);
    }
    assert!(db.close(Duration::from_secs(10)).await.is_clean());
    let mut theirs = Vec::new();
    for test in [true, false] {
        let pool = plain_pool::<Postgres>(&place.options, test).await;
        let mut tx = pool.begin().await.unwrap();
        execute(&mut tx, update.clone()).await.unwrap();
        sqlx::query(MANY).fetch(&mut *tx).next().await.unwrap().unwrap();
        drop(tx);
        let free = until_free::<Postgres, _>(async { pool.begin().await.unwrap() }, &mut contender, &update);
        theirs.push(show(free.await));
        pool.close().await;
    }
    let tuned = theirs.pop().unwrap();
    rows.add("PostgreSQL, one row read of 5 million", "", &times, theirs.pop().unwrap(), tuned);
}

/// Nothing runs. The three take turns.
async fn idle(rows: &mut Rows, place: &Place) {
    let db = pool_of_one::<Postgres>(&place.options).await;
    let pools = [plain_pool::<Postgres>(&place.options, true).await, plain_pool(&place.options, false).await];
    let (mut contender, mut times) = (place.conn().await, [Vec::new(), Vec::new(), Vec::new()]);
    for _ in 0..300 {
        let update = place.update(1);
        let mut tx = db.begin().await.unwrap();
        execute(&mut tx, update.clone()).await.unwrap();
        drop(tx);
        times[0].push(until_free::<Postgres, _>(std::future::ready(()), &mut contender, &update).await);
        for (which, pool) in pools.iter().enumerate() {
            let mut tx = pool.begin().await.unwrap();
            execute(&mut tx, update.clone()).await.unwrap();
            drop(tx);
            times[which + 1].push(until_free::<Postgres, _>(std::future::ready(()), &mut contender, &update).await);
        }
    }
    let [default, tuned] = [&times[1], &times[2]].map(|times| show(quantile(times, 0.5)));
    let ratio = quantile(&times[0], 0.5).as_secs_f64() / quantile(&times[2], 0.5).as_secs_f64();
    rows.add(&format!("PostgreSQL, idle ({ratio:.2} × tuned)"), "1.2 ×", &times[0], default, tuned);
    assert!(db.close(Duration::from_secs(10)).await.is_clean());
}

/// Which kind of transaction a child holds.
#[derive(Clone, Copy)]
pub(crate) enum Role {
    Guarded,
    Plain,
}

impl Role {
    pub(crate) fn named(name: &str) -> Option<Self> {
        match name {
            "hold-guarded" => Some(Self::Guarded),
            "hold-plain" => Some(Self::Plain),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Guarded => "hold-guarded",
            Self::Plain => "hold-plain",
        }
    }
}

/// The child: runs `url`'s slow statement in a transaction until it is killed. The argument before the row is the SQL's
/// table, after a space.
pub(crate) async fn hold(role: Role, target: &str, row: i64) {
    let (url, table) = target.split_once(' ').unwrap();
    let update = format!("UPDATE {table} SET v = v + 1 WHERE n = {row}");
    let work = async |conn: &mut sqlx::PgConnection| {
        execute(conn, update).await.unwrap();
        println!("ready");
        execute(conn, Postgres::SLOW.to_owned()).await.unwrap();
    };
    match role {
        Role::Guarded => {
            let db = TxPool::<Postgres>::connect(url).await.unwrap();
            work(&mut db.begin().await.unwrap()).await;
        }
        Role::Plain => {
            let pool = Pool::<Postgres>::connect(url).await.unwrap();
            work(&mut pool.begin().await.unwrap()).await;
        }
    }
}

async fn killed(rows: &mut Rows, place: &Place) {
    let once = async |role: Role, row: i64| {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([role.name(), &format!("{} {}", place.url, place.table), &row.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let line = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            line
        });
        assert_eq!(line.await.unwrap().trim(), "ready");
        tokio::time::sleep(HEAD_START).await;
        child.kill().unwrap();
        let update = place.update(row);
        let free = until_free::<Postgres, _>(std::future::ready(()), &mut place.conn().await, &update).await;
        child.wait().unwrap();
        free
    };
    let ours = async {
        let mut times = Vec::new();
        for _ in 0..10 {
            times.push(once(Role::Guarded, 1).await);
        }
        times
    };
    let (times, theirs) = join(ours, once(Role::Plain, 2)).await;
    rows.add("PostgreSQL, the client's process is killed", "600 ms", &times, show(theirs), "the same".to_owned());
}

async fn mariadb(rows: &mut Rows, url: &str) {
    let options: Options<MySql> = url.parse().unwrap();
    let table = format!("tx_bench_{}", std::process::id());
    let mut conn = options.connect().await.unwrap();
    for sql in [
        format!("CREATE TABLE {table} (n BIGINT PRIMARY KEY, v BIGINT NOT NULL DEFAULT 0)"),
        format!("INSERT INTO {table} (n) VALUES (1), (2), (3)"),
    ] {
        MySql::execute(&mut conn, sql).await.unwrap();
    }
    let updates = [1, 2, 3].map(|row| format!("UPDATE {table} SET v = v + 1 WHERE n = {row}"));
    sleeping::<MySql>(rows, "MariaDB, `SLEEP(10)`", "p95 10 ms", &options, updates).await;
    MySql::execute(&mut conn, format!("DROP TABLE {table}")).await.unwrap();
}

async fn sqlite(rows: &mut Rows) {
    let place = tempfile::tempdir().unwrap();
    let options = SqliteConnectOptions::new()
        .filename(place.path().join("bench.db"))
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .busy_timeout(Duration::from_secs(60));
    let mut conn = options.connect().await.unwrap();
    let create = "CREATE TABLE t (n INTEGER PRIMARY KEY, v INTEGER NOT NULL DEFAULT 0); INSERT INTO t (n) VALUES (1)";
    Sqlite::execute(&mut conn, create.to_owned()).await.unwrap();
    let update = "UPDATE t SET v = v + 1 WHERE n = 1";
    // Others wait for SQLite's lock by asking again at growing intervals, which would be measured instead. A caller
    // that has the only connection again has the lock as well.
    let db = pool_of_one::<Sqlite>(&options).await;
    let mut times = Vec::new();
    for _ in 0..100 {
        let mut tx = db.begin().await.unwrap();
        Sqlite::execute(&mut tx, update.to_owned()).await.unwrap();
        let slow = timeout(HEAD_START, Sqlite::execute(&mut tx, Sqlite::SLOW.to_owned()));
        assert!(slow.await.is_err(), "it was not slow");
        drop(tx);
        let start = Instant::now();
        let mut tx = db.begin().await.unwrap();
        Sqlite::execute(&mut tx, update.to_owned()).await.unwrap();
        times.push(start.elapsed());
        tx.rollback().await.unwrap();
    }
    let pool = plain_pool::<Sqlite>(&options, true).await;
    let mut tx = pool.begin().await.unwrap();
    Sqlite::execute(&mut tx, update.to_owned()).await.unwrap();
    assert!(timeout(HEAD_START, Sqlite::execute(&mut tx, Sqlite::SLOW.to_owned())).await.is_err(), "it was not slow");
    drop(tx);
    let start = Instant::now();
    let mut tx = pool.begin().await.unwrap();
    Sqlite::execute(&mut tx, update.to_owned()).await.unwrap();
    let theirs = format!("{}, as long as the statement", show(start.elapsed()));
    rows.add("SQLite, a query of 30 million steps", "p95 10 ms", &times, theirs, "the same".to_owned());
    assert!(db.close(Duration::from_secs(10)).await.is_clean());
}
