//! A separate schema for each test, and assertions about it over a plain connection.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use cancel_safe_resumable::{Builder, Done, PgStore, ResumableTask, TaskError};
use futures_util::{StreamExt, TryStreamExt};
use sqlx::{
    AssertSqlSafe, ConnectOptions, PgConnection, PgPool, Row,
    postgres::{PgConnectOptions, PgPoolOptions},
};

pub(crate) const POSTGRES: &str = "CANCEL_SAFE_TEST_POSTGRES_URL";
pub(crate) const PGBOUNCER: &str = "CANCEL_SAFE_TEST_PGBOUNCER_URL";

/// A lease that no test outlives: a range that is taken over sooner was given back.
pub(crate) const FOR_EVER: Duration = Duration::from_secs(3600);

pub(crate) fn url(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| panic!("set {variable} or run cargo xtask test resumable"))
}

/// A schema in the server of the tests.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) pool: PgPool,
    pub(crate) schema: String,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::behind(&url(POSTGRES)).await
    }

    pub(crate) async fn behind(url: &str) -> Self {
        Self { pool: pool(url, 8), schema: Self::name() }
    }

    /// The same schema for several runtimes, each with its own sessions.
    pub(crate) fn named(schema: &str) -> Self {
        Self { pool: pool(&url(POSTGRES), 8), schema: schema.to_owned() }
    }

    /// A unique name.
    pub(crate) fn name() -> String {
        static WORLDS: AtomicU32 = AtomicU32::new(0);
        format!("resumable_{}_{}", std::process::id(), WORLDS.fetch_add(1, Ordering::Relaxed))
    }

    /// A store in this schema, with small ranges.
    pub(crate) fn store(&self) -> PgStore {
        PgStore::new(self.pool.clone()).schema(&self.schema).range_items(10).lease(FOR_EVER)
    }

    /// A connection for the test alone.
    pub(crate) async fn plain(&self) -> PgConnection {
        self.pool.connect_options().connect().await.unwrap()
    }

    /// Runs statements in which `{s}` is the schema.
    pub(crate) async fn run(&self, sql: &str) {
        let sql = sql.replace("{s}", &self.schema);
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut self.plain().await).await.unwrap();
    }

    /// The first column of the one row of a query.
    pub(crate) async fn number(&self, sql: &str) -> i64 {
        let sql = sql.replace("{s}", &self.schema);
        sqlx::query(AssertSqlSafe(sql)).persistent(false).fetch_one(&mut self.plain().await).await.unwrap().get(0)
    }

    pub(crate) async fn end(self) {
        self.run("DROP SCHEMA IF EXISTS {s} CASCADE").await;
        self.pool.close().await;
    }
}

pub(crate) fn pool(url: &str, sessions: u32) -> PgPool {
    let options: PgConnectOptions = url.parse().unwrap();
    PgPoolOptions::new().max_connections(sessions).connect_lazy_with(options)
}

/// A run over numbers.
pub(crate) fn numbers(store: PgStore) -> Builder<u64, u64> {
    ResumableTask::builder("numbers").store(store).checkpoint_every(Duration::from_millis(5))
}

/// Runs the numbers below `n` to the end of the job and returns what this worker has handed out.
pub(crate) async fn work(builder: Builder<u64, u64>, n: u64) -> Result<Vec<Done<u64>>, TaskError> {
    let mut run = builder.stream(0..n, |_, x| async move {
        tokio::task::yield_now().await;
        Ok(x * 2)
    });
    let mut all = Vec::new();
    while let Some(done) = run.next().await {
        all.push(done);
    }
    run.finish().await.map(|_| all)
}

/// The records of a job, in order.
pub(crate) async fn recorded(store: &PgStore, job: &str) -> Result<Vec<Done<u64>>, TaskError> {
    store.results(job).try_collect().await
}

/// Asserts that the job of the numbers below `n` is complete, each with its result, once.
pub(crate) async fn assert_complete(store: &PgStore, n: u64) {
    let recorded = recorded(store, "numbers").await.unwrap();
    let indexes: Vec<usize> = recorded.iter().map(|done| done.index).collect();
    assert_eq!(indexes, (0..n as usize).collect::<Vec<_>>());
    assert!(recorded.iter().all(|done| done.result == Ok(done.index as u64 * 2)));
}
