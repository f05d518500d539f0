//! A million results, one after another, durable a hundred milliseconds later at most: in a checkpoint, and in other
//! common stores.
//!
//! Each peer is used in the fastest way that keeps this promise: it gathers results, and makes them durable together
//! when the interval is over. A log that can only sync each result gets fewer of them.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use cancel_safe_resumable::{FileStore, ResumableTask};
use futures_util::StreamExt;
use tokio::runtime::Runtime;

const ITEMS: u64 = 1_000_000;
const EVERY: Duration = Duration::from_millis(100);
const ROUNDS: usize = 5;

type Recorded = fn(&Runtime, &Path, u64);

/// The peers: how many results each gets, and how it records and reads them.
fn contestants() -> Vec<(&'static str, u64, Recorded, Recorded)> {
    let all = [
        ("this crate", ITEMS, ours as Recorded, ours as Recorded),
        ("SQLite through sqlx", ITEMS, sqlite::record, sqlite::read),
    ];
    #[cfg(feature = "peers")]
    let all = all.into_iter().chain(peers::contestants());
    all.into_iter().collect()
}

/// The second call reads what the first has recorded.
fn ours(runtime: &Runtime, dir: &Path, items: u64) {
    let builder = ResumableTask::builder("bench").store(FileStore::at(dir.join("ours")));
    let mut run = builder.stream(0..items, |_, x: u64| async move { Ok(x * 2) });
    runtime.block_on(async {
        let mut sum = 0;
        while let Some(done) = run.next().await {
            sum += done.result.expect("every item has a result");
        }
        assert_eq!(sum, items * (items - 1));
        run.finish().await.expect("nothing stops the run");
    });
}

/// Results that are gathered until the interval is over.
pub(super) struct Interval(Instant);

impl Interval {
    pub(super) fn begin() -> Self {
        Self(Instant::now())
    }

    pub(super) fn is_over(&mut self) -> bool {
        let over = self.0.elapsed() >= EVERY;
        if over {
            self.0 = Instant::now();
        }
        over
    }
}

/// One transaction for each interval, with statements of many rows each: one statement for each row costs ten times as
/// much.
mod sqlite {
    use std::path::Path;

    use sqlx::{Connection, Row, SqliteConnection, sqlite::SqliteConnectOptions, sqlite::SqliteJournalMode};
    use tokio::runtime::Runtime;

    use super::Interval;

    async fn open(dir: &Path) -> SqliteConnection {
        let options = SqliteConnectOptions::new().filename(dir.join("sqlite")).create_if_missing(true);
        let options = options.journal_mode(SqliteJournalMode::Wal).pragma("synchronous", "FULL");
        SqliteConnection::connect_with(&options).await.expect("the directory is writable")
    }

    pub(super) fn record(runtime: &Runtime, dir: &Path, items: u64) {
        runtime.block_on(async {
            let mut conn = open(dir).await;
            let create = "CREATE TABLE result (item INTEGER PRIMARY KEY, value INTEGER NOT NULL)";
            sqlx::query(create).execute(&mut conn).await.expect("the file is new");
            let (mut rows, mut interval) = (Vec::new(), Interval::begin());
            for item in 0..items {
                rows.push((item, item * 2));
                if rows.len() == 10_000 || interval.is_over() || item + 1 == items {
                    let text = serde_json::to_string(&rows).expect("numbers are JSON");
                    rows.clear();
                    let insert = "INSERT INTO result SELECT value ->> 0, value ->> 1 FROM json_each(?)";
                    sqlx::query(insert).bind(text).execute(&mut conn).await.expect("the rows are new");
                }
            }
            conn.close().await.expect("everything is written");
        });
    }

    pub(super) fn read(runtime: &Runtime, dir: &Path, items: u64) {
        runtime.block_on(async {
            let mut conn = open(dir).await;
            let rows = sqlx::query("SELECT value FROM result ORDER BY item").fetch_all(&mut conn).await;
            let sum: i64 = rows.expect("the rows are there").iter().map(|row| row.get::<i64, _>(0)).sum();
            assert_eq!(sum as u64, items * (items - 1));
        });
    }
}

#[cfg(feature = "peers")]
#[path = "peers.rs"]
mod peers;

fn size(dir: &Path) -> u64 {
    let entries =
        std::fs::read_dir(dir).expect("it is a directory").map(|entry| entry.expect("it can be listed").path());
    let length =
        |path: PathBuf| if path.is_dir() { size(&path) } else { path.metadata().map_or(0, |found| found.len()) };
    entries.map(length).sum()
}

/// Runs all of them in turn, again and again, and prints the median of each.
pub(crate) fn run(runtime: &Runtime) {
    let contestants = contestants();
    let mut figures = vec![(Vec::new(), Vec::new(), 0); contestants.len()];
    for _ in 0..ROUNDS {
        for ((_, items, record, read), figure) in contestants.iter().zip(&mut figures) {
            let dir = tempfile::tempdir().expect("a directory is made");
            let each = |begun: Instant| begun.elapsed().as_secs_f64() * 1e9 / *items as f64;
            let begun = Instant::now();
            record(runtime, dir.path(), *items);
            figure.0.push(each(begun));
            figure.2 = size(dir.path()) / items;
            let begun = Instant::now();
            read(runtime, dir.path(), *items);
            figure.1.push(each(begun));
        }
    }
    let median = |figures: &mut Vec<f64>| {
        figures.sort_by(f64::total_cmp);
        figures[figures.len() / 2]
    };
    let figures: Vec<_> =
        figures.iter_mut().map(|(record, read, bytes)| (median(record), median(read), *bytes)).collect();
    let (record, read, bytes) = figures[0];
    println!(
        "\nresults, each durable within 100 ms: ns to record and to read one (medians of {ROUNDS}), bytes, and ratios to ours"
    );
    println!("{:34} {:>10} {:>8} {:>8} {:>7} {:>6} {:>7}", "", "record", "ratio", "read", "ratio", "bytes", "ratio");
    for ((name, ..), (its_record, its_read, its_bytes)) in contestants.iter().zip(figures) {
        let (a, b, c) = (its_record / record, its_read / read, its_bytes as f64 / bytes as f64);
        println!("{name:34} {its_record:>10.0} {a:>8.1} {its_read:>8.0} {b:>7.1} {its_bytes:>6} {c:>7.1}");
    }
}
