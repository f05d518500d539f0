//! Tables, quantiles, a table in a database, and a proxy that adds latency.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection};

/// A readable table, which is also valid Markdown.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(head: &[&str]) -> Self {
        let head: Vec<String> = head.iter().map(|&cell| cell.to_owned()).collect();
        let rule = head.iter().map(|_| "---".to_owned()).collect();
        Self { rows: vec![head, rule] }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub(crate) fn print(&self) {
        println!();
        for row in &self.rows {
            println!("| {} |", row.join(" | "));
        }
        println!();
    }
}

/// The `q` quantile of `values`.
pub(crate) fn quantile<T: Copy + PartialOrd>(values: &[T], q: f64) -> T {
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| a.partial_cmp(b).unwrap());
    sorted[((sorted.len() - 1) as f64 * q).round() as usize]
}

/// Short, with a unit.
pub(crate) fn show(time: Duration) -> String {
    match time.as_secs_f64() {
        seconds if seconds >= 1.0 => format!("{seconds:.1} s"),
        seconds if seconds >= 0.01 => format!("{:.0} ms", seconds * 1e3),
        seconds => format!("{:.2} ms", seconds * 1e3),
    }
}

/// A table in PostgreSQL; [`close`](Self::close) removes it.
pub(crate) struct Place {
    pub(crate) options: PgConnectOptions,
    pub(crate) url: String,
    pub(crate) table: String,
}

impl Place {
    pub(crate) async fn open(url: &str, rows: i64) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let table = format!("tx_bench_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let place = Self { options: url.parse().unwrap(), url: url.to_owned(), table };
        let table = &place.table;
        let sql = format!(
            "CREATE TABLE {table} (n BIGINT PRIMARY KEY, v BIGINT NOT NULL DEFAULT 0);
             INSERT INTO {table} (n) SELECT generate_series(1, {rows})"
        );
        place.run(&sql).await;
        place.run(&format!("VACUUM ANALYZE {table}")).await;
        place
    }

    pub(crate) async fn conn(&self) -> PgConnection {
        self.options.connect().await.unwrap()
    }

    pub(crate) async fn run(&self, sql: &str) {
        let mut conn = self.conn().await;
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut conn).await.unwrap();
        conn.close().await.unwrap();
    }

    pub(crate) async fn number(&self, sql: String) -> i64 {
        let mut conn = self.conn().await;
        let number = sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut conn).await.unwrap();
        conn.close().await.unwrap();
        number
    }

    pub(crate) fn update(&self, row: i64) -> String {
        format!("UPDATE {} SET v = v + 1 WHERE n = {row}", self.table)
    }

    pub(crate) async fn close(self) {
        self.run(&format!("DROP TABLE {} CASCADE", self.table)).await;
    }
}

/// Runs SQL without a result.
pub(crate) async fn execute(conn: &mut PgConnection, sql: String) -> Result<(), sqlx::Error> {
    sqlx::query(AssertSqlSafe(sql)).execute(conn).await.map(drop)
}

/// Options for the same server, with `one_way` added to each message in either direction. It uses threads, because the
/// timers of the runtime have a resolution of whole milliseconds.
#[expect(clippy::disallowed_methods, reason = "these threads execute nothing else")]
pub(crate) fn far_away(options: &PgConnectOptions, one_way: Duration) -> PgConnectOptions {
    let door = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = door.local_addr().unwrap().port();
    let server = (options.get_host().to_owned(), options.get_port());
    // One thread notes when data arrived and the other passes it on later, so that messages sent in a row arrive in a
    // row, as on a long line.
    let carry = move |mut from: TcpStream, mut to: TcpStream| {
        let (sender, line) = mpsc::channel::<(Instant, Vec<u8>)>();
        std::thread::spawn(move || {
            let mut buffer = [0; 1 << 16];
            while let Ok(size @ 1..) = from.read(&mut buffer) {
                if sender.send((Instant::now(), buffer[..size].to_vec())).is_err() {
                    break;
                }
            }
        });
        std::thread::spawn(move || {
            for (came, bytes) in line {
                std::thread::sleep(one_way.saturating_sub(came.elapsed()));
                if to.write_all(&bytes).is_err() {
                    break;
                }
            }
            drop(to.shutdown(std::net::Shutdown::Both));
        });
    };
    std::thread::spawn(move || {
        for client in door.incoming() {
            let (client, server) = (client.unwrap(), TcpStream::connect((server.0.as_str(), server.1)).unwrap());
            client.set_nodelay(true).unwrap();
            server.set_nodelay(true).unwrap();
            carry(client.try_clone().unwrap(), server.try_clone().unwrap());
            carry(server, client);
        }
    });
    options.clone().host("127.0.0.1").port(port).ssl_mode(PgSslMode::Disable)
}

/// In which order the contestants of one turn are measured: another one in each turn, because what a contestant leaves
/// behind slows down the one after it.
pub(crate) fn order(turn: usize, contestants: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..contestants).collect();
    fastrand::Rng::with_seed(turn as u64).shuffle(&mut order);
    order
}
