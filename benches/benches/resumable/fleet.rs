//! How many results per second workers make durable in one PostgreSQL: in ranges under leases, and with a queue of
//! rows.
//!
//! The queue is the usual one, in its fast form: a worker takes a hundred rows at a time with `FOR UPDATE SKIP LOCKED` and
//! marks them as done together. Both have one server and workers in this process, each with its own connections.

use std::time::Instant;

use cancel_safe_resumable::{PgStore, ResumableTask};
use futures_util::future::join_all;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool, Row, postgres::PgPoolOptions};

const ITEMS: u64 = 2_000_000;
const ROWS: u64 = 100_000;
const AT_ONCE: i64 = 100;
const ROUNDS: usize = 3;
const SCHEMA: &str = "bench_resumable";

fn pool(url: &str) -> PgPool {
    PgPoolOptions::new().max_connections(2).connect_lazy(url).expect("the address of a server")
}

async fn run_sql(url: &str, sql: String) {
    let mut conn = PgConnection::connect(url).await.expect("the server is up");
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut conn).await.expect("the schema is ours");
}

/// Items per second of workers that share a job in ranges of 1,000.
async fn ranges(url: &str, workers: usize) -> f64 {
    run_sql(url, format!("DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")).await;
    let begun = Instant::now();
    let runs = (0..workers).map(|_| {
        let store = PgStore::new(pool(url)).schema(SCHEMA);
        let run = ResumableTask::builder("bench").store(store).stream(0..ITEMS, |_, x: u64| async move { Ok(x * 2) });
        tokio::spawn(run.finish())
    });
    let ended = join_all(runs).await.into_iter().map(|ended| ended.expect("no worker panics"));
    let completed: usize = ended.map(|summary| summary.expect("the server is up").completed).sum();
    assert_eq!(completed as u64, ITEMS);
    ITEMS as f64 / begun.elapsed().as_secs_f64()
}

/// The same for workers that take rows from a queue.
async fn rows(url: &str, workers: usize) -> f64 {
    let make = format!(
        "DROP SCHEMA IF EXISTS {SCHEMA} CASCADE; CREATE SCHEMA {SCHEMA};
         CREATE TABLE {SCHEMA}.queue (item bigint PRIMARY KEY, state smallint NOT NULL DEFAULT 0, value bigint);
         INSERT INTO {SCHEMA}.queue SELECT generate_series(0, {ROWS} - 1);
         CREATE INDEX ON {SCHEMA}.queue (item) WHERE state = 0; ANALYZE {SCHEMA}.queue"
    );
    run_sql(url, make).await;
    let begun = Instant::now();
    let workers = (0..workers).map(|_| {
        let pool = pool(url);
        tokio::spawn(async move {
            let claim = format!(
                "UPDATE {SCHEMA}.queue SET state = 1 WHERE item IN (SELECT item FROM {SCHEMA}.queue WHERE state = 0
                 ORDER BY item LIMIT {AT_ONCE} FOR UPDATE SKIP LOCKED) RETURNING item"
            );
            let finish = format!(
                "UPDATE {SCHEMA}.queue q SET state = 2, value = d.value
                 FROM unnest($1::bigint[], $2::bigint[]) d(item, value) WHERE q.item = d.item"
            );
            let mut done = 0;
            loop {
                let claimed =
                    sqlx::query(AssertSqlSafe(claim.as_str())).fetch_all(&pool).await.expect("the server is up");
                let items: Vec<i64> = claimed.iter().map(|row| row.get(0)).collect();
                if items.is_empty() {
                    return done;
                }
                let values: Vec<i64> = items.iter().map(|item| item * 2).collect();
                done += items.len();
                let finish = sqlx::query(AssertSqlSafe(finish.as_str())).bind(items).bind(values);
                finish.execute(&pool).await.expect("the server is up");
            }
        })
    });
    let done: usize = join_all(workers).await.into_iter().map(|done| done.expect("no worker panics")).sum();
    assert_eq!(done as u64, ROWS);
    ROWS as f64 / begun.elapsed().as_secs_f64()
}

/// Runs both in turn, and prints the best figure of each.
pub(crate) async fn run(url: &str) {
    println!("\nresults a second, durable in PostgreSQL (the best of {ROUNDS})");
    for workers in [4, 16] {
        let (mut in_ranges, mut in_rows) = (0f64, 0f64);
        for _ in 0..ROUNDS {
            in_ranges = in_ranges.max(ranges(url, workers).await);
            in_rows = in_rows.max(rows(url, workers).await);
        }
        let ratio = in_ranges / in_rows;
        println!(
            "{workers:2} workers: {in_ranges:9.0} in ranges, {in_rows:7.0} with a queue of rows, ratio {ratio:.0}"
        );
    }
    run_sql(url, format!("DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")).await;
}
