//! Clients that order, transfer and hang up, and the check of the books afterwards.
//!
//! Invariant: the books are read over a connection without a guard, after the last request.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, SqliteConnection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{ACCOUNTS, BALANCE, Failure, ITEM, STOCK};

/// How many requests are made at once.
const AT_ONCE: usize = 50;

/// No request takes this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Makes `requests` requests, and returns whether every answer was right.
pub(crate) async fn drive(address: SocketAddr, requests: usize, seed: Option<u64>) -> Result<bool, Failure> {
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("--seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut answers, mut hung_up) = ([0, 0, 0], 0);
    for start in (0..requests).step_by(AT_ONCE) {
        let batch = (start..requests.min(start + AT_ONCE)).map(|_| {
            let (request, patience) = any(&mut random);
            ask(address, request, patience)
        });
        for answer in join_all(batch).await {
            match answer?.map(|answer| answer.status) {
                Some(200..=299) => answers[0] += 1,
                Some(404 | 409) => answers[1] += 1,
                Some(_) => answers[2] += 1,
                None => hung_up += 1,
            }
        }
    }
    let [done, refused, failed] = answers;
    println!("{requests} requests: {done} done, {refused} refused, {failed} failed, {hung_up} hung up");
    Ok(failed == 0 && done > 0)
}

/// Checks the books at the end, and returns whether they are right.
pub(crate) async fn audit(options: &SqliteConnectOptions) -> Result<bool, Failure> {
    let mut conn = options.connect().await?;
    let books = Books::read(&mut conn).await?;
    println!("{books:?}");
    Ok(books.are_right())
}

/// A request, and after how long its client hangs up.
fn any(random: &mut fastrand::Rng) -> (String, Duration) {
    let request = match random.u8(..4) {
        0 => post("/orders", &json!({ "item": ITEM, "count": random.i64(1..=5) })),
        1 => {
            let (from, to) = (random.i64(..ACCOUNTS), random.i64(..ACCOUNTS));
            post("/transfers", &json!({ "from": from, "to": to, "amount": random.i64(1..=400) }))
        }
        2 => format!("DELETE /orders/{} HTTP/1.0\r\n\r\n", random.i64(1..=200)),
        _ => "GET /orders HTTP/1.0\r\n\r\n".to_owned(),
    };
    let patience = if random.u8(..3) == 0 { Duration::from_micros(random.u64(..20_000)) } else { PATIENCE };
    (request, patience)
}

pub(crate) fn post(path: &str, body: &serde_json::Value) -> String {
    let body = body.to_string();
    let length = body.len();
    format!("POST {path} HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}")
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
}

/// `None` if the client hung up first.
pub(crate) async fn ask(address: SocketAddr, request: String, patience: Duration) -> Result<Option<Answer>, Failure> {
    let talk = async {
        let mut stream = TcpStream::connect(address).await?;
        #[expect(clippy::disallowed_methods, reason = "whoever hangs up in the middle of a request is meant to")]
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or("no answer")?;
        let status = head.split(' ').nth(1).ok_or("no status")?.parse()?;
        Ok(Answer { status, body: body.to_owned() })
    };
    match timeout(patience, talk).await {
        Ok(answer) => answer.map(Some),
        Err(_) if patience == PATIENCE => Err("a request had no answer".into()),
        Err(_) => Ok(None),
    }
}

/// The figures that have to add up.
#[derive(Debug, PartialEq, Eq)]
struct Books {
    in_stock: i64,
    ordered: i64,
    money: i64,
}

impl Books {
    fn are_right(&self) -> bool {
        self.in_stock + self.ordered == STOCK && self.money == ACCOUNTS * BALANCE
    }

    async fn read(conn: &mut SqliteConnection) -> Result<Self, sqlx::Error> {
        // In one statement, so it is one moment.
        let read = "SELECT (SELECT sum(count) FROM stock), (SELECT coalesce(sum(count), 0) FROM orders),
            (SELECT sum(balance) FROM accounts)";
        let (in_stock, ordered, money) = sqlx::query_as(read).fetch_one(conn).await?;
        Ok(Self { in_stock, ordered, money })
    }
}
