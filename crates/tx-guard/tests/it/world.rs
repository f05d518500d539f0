//! A database with a separate table for each test. Assertions read over a plain connection, never over the pool under
//! test.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cancel_safe_tx_guard::{Backend, Options, TxPool};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use sqlx::mysql::{MySqlConnectOptions, MySqlSslMode};
use sqlx::pool::PoolOptions;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode};
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, Database, MySql, MySqlConnection, PgConnection, Pool, Postgres, Row,
    Sqlite, SqliteConnection,
};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Distinguishes the promised milliseconds from the hours of [`TestDb::SLOW`], even on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(30);

pub(crate) const POSTGRES: &str = "CANCEL_SAFE_TEST_POSTGRES_URL";

pub(crate) const MYSQL: &str = "CANCEL_SAFE_TEST_MYSQL_URL";

pub(crate) fn url(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| panic!("set {variable} or run cargo xtask test tx-guard"))
}

/// What the tests need to know about a database, beyond the crate's own knowledge.
pub(crate) trait TestDb: Backend {
    /// A place for the data that lives as long as the test.
    type Place: Send + Sync;

    /// A statement that runs for hours if nobody stops it.
    const SLOW: &'static str;

    /// A query for a million rows.
    const MILLION: &'static str =
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000) SELECT i FROM n";

    /// A query with so many rows that reading them all takes much longer than any test.
    const ENDLESS: &'static str = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n";

    fn place() -> (Self::Place, Options<Self>);

    /// The connections of the tests themselves, if all places are in one server. Opening them takes longer than most
    /// tests, and an exploration would open four of them at each await.
    fn beside() -> Option<fn() -> &'static Pool<Self>> {
        None
    }

    fn execute(conn: &mut Self::Connection, sql: String) -> impl Future<Output = Result<(), sqlx::Error>> + Send;
    fn numbers(conn: &mut Self::Connection, sql: String) -> impl Future<Output = Result<Vec<i64>, sqlx::Error>> + Send;
    /// The same, for reading only once.
    fn numbers_once(
        conn: &mut Self::Connection,
        sql: String,
    ) -> impl Future<Output = Result<Vec<i64>, sqlx::Error>> + Send {
        Self::numbers(conn, sql)
    }
    /// Reads one row of many, and leaves the rest.
    async fn first_row(conn: &mut Self::Connection, sql: &'static str);
}

impl TestDb for Sqlite {
    type Place = TempDir;

    const SLOW: &'static str = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200000000000)
        SELECT count(*) FROM n";

    fn place() -> (TempDir, SqliteConnectOptions) {
        let place = tempfile::tempdir().unwrap();
        let options = SqliteConnectOptions::new()
            .filename(place.path().join("test.db"))
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .busy_timeout(PATIENCE);
        (place, options)
    }

    async fn execute(conn: &mut SqliteConnection, sql: String) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(conn).await.map(drop)
    }

    async fn numbers(conn: &mut SqliteConnection, sql: String) -> Result<Vec<i64>, sqlx::Error> {
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(conn).await
    }

    async fn first_row(conn: &mut SqliteConnection, sql: &'static str) {
        sqlx::query(sql).fetch(conn).next().await.unwrap().unwrap();
    }
}

impl TestDb for Postgres {
    type Place = ();

    const SLOW: &'static str = "SELECT pg_sleep(10000)";

    const ENDLESS: &'static str = "SELECT generate_series(1, 2000000000)";

    fn place() -> ((), PgConnectOptions) {
        ((), url(POSTGRES).parse().unwrap())
    }

    fn beside() -> Option<fn() -> &'static Pool<Self>> {
        static BESIDE: LazyLock<Pool<Postgres>> = LazyLock::new(|| lazily(Postgres::place().1));
        Some(|| &BESIDE)
    }

    async fn execute(conn: &mut PgConnection, sql: String) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(conn).await.map(drop)
    }

    async fn numbers(conn: &mut PgConnection, sql: String) -> Result<Vec<i64>, sqlx::Error> {
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(conn).await
    }

    async fn first_row(conn: &mut PgConnection, sql: &'static str) {
        sqlx::query(sql).fetch(conn).next().await.unwrap().unwrap();
    }
}

impl TestDb for MySql {
    type Place = ();

    const SLOW: &'static str = "SELECT SLEEP(10000)";

    const MILLION: &'static str = "WITH d(i) AS (SELECT 0 UNION SELECT 1 UNION SELECT 2 UNION SELECT 3 UNION SELECT 4
            UNION SELECT 5 UNION SELECT 6 UNION SELECT 7 UNION SELECT 8 UNION SELECT 9)
        SELECT a.i FROM d a, d b, d c, d d, d e, d f";

    const ENDLESS: &'static str = "WITH d(i) AS (SELECT 0 UNION SELECT 1 UNION SELECT 2 UNION SELECT 3 UNION SELECT 4
            UNION SELECT 5 UNION SELECT 6 UNION SELECT 7 UNION SELECT 8 UNION SELECT 9)
        SELECT a.i FROM d a, d b, d c, d d, d e, d f, d g, d h, d i";

    fn place() -> ((), MySqlConnectOptions) {
        ((), url(MYSQL).parse().unwrap())
    }

    fn beside() -> Option<fn() -> &'static Pool<Self>> {
        static BESIDE: LazyLock<Pool<MySql>> = LazyLock::new(|| lazily(MySql::place().1));
        Some(|| &BESIDE)
    }

    async fn execute(conn: &mut MySqlConnection, sql: String) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(conn).await.map(drop)
    }

    async fn numbers(conn: &mut MySqlConnection, sql: String) -> Result<Vec<i64>, sqlx::Error> {
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(conn).await
    }

    /// As text, because each prepared statement is closed by a message without an answer, and then the server's own TCP
    /// holds back the next one.
    async fn numbers_once(conn: &mut MySqlConnection, sql: String) -> Result<Vec<i64>, sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(conn).await?.iter().map(|row| row.try_get(0)).collect()
    }

    async fn first_row(conn: &mut MySqlConnection, sql: &'static str) {
        sqlx::query(sql).fetch(conn).next().await.unwrap().unwrap();
    }
}

/// Must be called in the runtime where its connections live.
fn lazily<D: TestDb>(options: Options<D>) -> Pool<D> {
    PoolOptions::new().max_connections(16).acquire_timeout(PATIENCE).connect_lazy_with(options)
}

/// A database with a server, and so with a way to it.
pub(crate) trait Server: TestDb {
    /// The type of a 64-bit number in a CAST.
    const BIGINT: &'static str;

    /// Where the server is, and the options that lead to a port of this machine instead, without encryption.
    fn way(options: &Options<Self>, port: u16) -> ((String, u16), Options<Self>);
    fn account(options: Options<Self>, user: &str, password: &str) -> Options<Self>;
    fn database(options: Options<Self>, name: &str) -> Options<Self>;
}

impl Server for Postgres {
    const BIGINT: &'static str = "BIGINT";

    fn way(options: &PgConnectOptions, port: u16) -> ((String, u16), PgConnectOptions) {
        let server = (options.get_host().to_owned(), options.get_port());
        (server, options.clone().host("127.0.0.1").port(port).ssl_mode(PgSslMode::Disable))
    }

    fn account(options: PgConnectOptions, user: &str, password: &str) -> PgConnectOptions {
        options.username(user).password(password)
    }

    fn database(options: PgConnectOptions, name: &str) -> PgConnectOptions {
        options.database(name)
    }
}

impl Server for MySql {
    const BIGINT: &'static str = "SIGNED";

    fn way(options: &MySqlConnectOptions, port: u16) -> ((String, u16), MySqlConnectOptions) {
        let server = (options.get_host().to_owned(), options.get_port());
        (server, options.clone().host("127.0.0.1").port(port).ssl_mode(MySqlSslMode::Disabled))
    }

    fn account(options: MySqlConnectOptions, user: &str, password: &str) -> MySqlConnectOptions {
        options.username(user).password(password)
    }

    fn database(options: MySqlConnectOptions, name: &str) -> MySqlConnectOptions {
        options.database(name)
    }
}

/// Runs SQL on a connection.
type Work<D> = for<'c> fn(&'c mut <D as Database>::Connection, String) -> Answer<'c>;
type Answer<'c> = BoxFuture<'c, Result<Vec<i64>, sqlx::Error>>;

/// A database, a table in it, and how to get there.
pub(crate) struct World<D: TestDb> {
    pub(crate) options: Options<D>,
    pub(crate) table: String,
    _place: D::Place,
}

impl<D: TestDb> World<D> {
    /// Creates the table: a unique number, and a text.
    pub(crate) async fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let table = format!("tx_guard_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let (place, options) = D::place();
        let world = Self { options, table, _place: place };
        world.run(format!("CREATE TABLE {} (n BIGINT PRIMARY KEY, v BIGINT NOT NULL DEFAULT 0)", world.table)).await;
        world
    }

    pub(crate) async fn pool(&self, connections: u32) -> TxPool<D> {
        TxPool::builder().max_connections(connections).connect_with(self.options.clone()).await.unwrap()
    }

    pub(crate) async fn plain(&self) -> D::Connection {
        self.options.connect().await.unwrap()
    }

    /// Runs SQL on a connection outside the pool under test.
    pub(crate) async fn run(&self, sql: String) {
        self.beside(sql, |conn, sql| Box::pin(async { D::execute(conn, sql).await.map(|()| Vec::new()) })).await;
    }

    /// Inserts `n` on `conn`, which usually is a guard's.
    pub(crate) async fn insert(&self, conn: &mut D::Connection, n: i64) -> Result<(), sqlx::Error> {
        D::execute(conn, format!("INSERT INTO {} (n) VALUES ({n})", self.table)).await
    }

    /// The committed numbers, as another session sees them.
    pub(crate) async fn committed(&self) -> Vec<i64> {
        let sql = format!("SELECT n FROM {} ORDER BY n", self.table);
        self.beside(sql, |conn, sql| Box::pin(D::numbers_once(conn, sql))).await
    }

    async fn beside(&self, sql: String, work: Work<D>) -> Vec<i64> {
        let Some(beside) = D::beside() else {
            let mut conn = self.plain().await;
            let done = work(&mut conn, sql).await.unwrap();
            conn.close().await.unwrap();
            return done;
        };
        elsewhere(async move { work(&mut *beside().acquire().await.unwrap(), sql).await.unwrap() }).await
    }

    /// Checks that the pool is in order, and removes the table.
    pub(crate) async fn end(&self, db: TxPool<D>) {
        let report = db.close(PATIENCE).await;
        assert!(report.is_clean(), "{report}");
        self.run(format!("DROP TABLE {}", self.table)).await;
    }
}

/// Runs `scenario`, which returns how long it took, several times, and fails if more than a fifth were not within
/// `bound`: a fault would take two seconds each time, and a busy machine may occasionally take that long.
pub(crate) async fn mostly_within(bound: Duration, times: usize, mut scenario: impl AsyncFnMut() -> Duration) {
    let mut took = Vec::new();
    for _ in 0..times {
        took.push(scenario().await);
    }
    let late = took.iter().filter(|took| **took >= bound).count();
    assert!(late * 5 <= times, "not within {bound:?}: {took:?}");
}

/// Runs `peer`, and what it spawns, on a separate runtime that outlives those of the tests.
pub(crate) async fn elsewhere<T: Send + 'static>(peer: impl Future<Output = T> + Send + 'static) -> T {
    static PEERS: LazyLock<Runtime> =
        LazyLock::new(|| Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap());
    PEERS.spawn(peer).await.unwrap()
}

/// Waits for `holds` to be true, and fails after [`PATIENCE`].
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !holds().await {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

impl World<Sqlite> {
    /// Two connections that do not wait for each other's lock.
    pub(crate) async fn impatient_pool(&self) -> TxPool<Sqlite> {
        let options = self.options.clone().busy_timeout(Duration::ZERO);
        TxPool::builder().max_connections(2).connect_with(options).await.unwrap()
    }
}
