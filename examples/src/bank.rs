//! A bank: transfers with an idempotency key and a limit, served until the process is told to stop, and the chaos that
//! tries it. This file has its phases and its orders. Invariant: the transaction that moves the money also writes the
//! row of the key, so the row tells the outcome.

mod chaos;
mod check;
mod live;
mod server;
mod store;
mod transfer;
mod wire;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use cancel_safe_shutdown::Application;
use cancel_safe_tx_guard::TxPool;
use serde::{Deserialize, Serialize};
use sqlx::{MySql, Postgres, Sqlite};

pub use chaos::{Plan, chaos};
pub use check::Report;

use live::Live;
use store::Bank;

/// The accounts are called 1 to 10.
const ACCOUNTS: i64 = 10;
/// The opening balance of each account.
const START: i64 = 1_000;
/// How long a transfer may take: waiting for a connection, retries and commit included.
const LIMIT: Duration = Duration::from_secs(5);

/// How the server is run.
#[derive(Debug, Clone, clap::Args)]
#[expect(clippy::exhaustive_structs, reason = "tests write it as a literal")]
pub struct Settings {
    /// `sqlite://…`, `postgres://…` or `mysql://…` [default: an SQLite file in a directory that is removed at the end]
    #[arg(long, value_name = "URL")]
    pub database: Option<String>,
    /// Where to listen
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Move the money and write the row of its key in two transactions: the mistake that chaos finds
    #[arg(long)]
    pub broken: bool,
}

/// Serves until a signal comes, and prints the address on standard output.
pub fn serve(settings: Settings) -> ExitCode {
    let place = store::Place::of(settings.database.clone());
    let place = match place {
        Ok(place) => place,
        Err(error) => {
            complain(format_args!("there is no directory for the database: {error}"));
            return ExitCode::FAILURE;
        }
    };
    match place.kind() {
        store::Kind::Sqlite => run::<Sqlite>(place.url(), settings),
        store::Kind::Postgres => run::<Postgres>(place.url(), settings),
        store::Kind::MySql => run::<MySql>(place.url(), settings),
    }
}

fn run<DB: Bank>(url: &str, settings: Settings) -> ExitCode {
    let app = Application::new("bank").shutdown_timeout(Duration::from_secs(20));
    let live = Arc::new(Live::new(app.readiness()));
    let url = url.to_owned();
    app.phase("database", |phase| {
        // Closed after every request has ended, so that it cuts no commit.
        phase.provide_until(|_| async move { Ok(store::open::<DB>(&url).await?) }, close::<DB>)
    })
    .phase("http", |phase| phase.worker_once("http", |cx| server::http::<DB>(cx, settings, live)))
    .run()
}

async fn close<DB: Bank>(db: TxPool<DB>) {
    let report = db.close(LIMIT).await;
    if !report.is_clean() {
        complain(format_args!("{report}"));
    }
}

#[expect(clippy::print_stderr, reason = "a program speaks to its operator")]
fn complain(what: std::fmt::Arguments<'_>) {
    eprintln!("bank: {what}");
}

/// A transfer as a client requests it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Order {
    /// Chosen by the client, a new one for each transfer: a transfer sent twice happens once.
    key: String,
    from: i64,
    to: i64,
    amount: i64,
    /// A shorter limit than the bank's, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    limit_ms: Option<u64>,
}

impl Order {
    fn limit(&self) -> Duration {
        self.limit_ms.map_or(LIMIT, |limit| LIMIT.min(Duration::from_millis(limit)))
    }

    /// What is wrong with it, if anything.
    fn fault(&self) -> Option<&'static str> {
        let is_account = |id| (1..=ACCOUNTS).contains(id);
        if !is_key(&self.key) {
            Some("a key is 1 to 64 lower-case letters, digits and hyphens")
        } else if ![self.from, self.to].iter().all(is_account) || self.from == self.to {
            Some("money goes from one account to another, of 1 to 10")
        } else if self.amount <= 0 {
            Some("the amount is positive")
        } else {
            None
        }
    }
}

/// Lower case only, because MySQL ignores case when it compares text.
fn is_key(key: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=64).contains(&key.len()) && key.bytes().all(fits)
}

/// The outcome of a transfer, as told to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    /// The money has moved.
    Completed,
    /// The money never moves: the account would be overdrawn.
    Refused,
    /// This request committed nothing. The key may be sent again.
    NotCommitted,
    /// The client has to ask for it.
    Unknown,
}

/// A transfer as recorded in the books.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Row {
    key: String,
    from: i64,
    to: i64,
    amount: i64,
    outcome: Outcome,
}

impl Row {
    fn is_of(&self, order: &Order) -> bool {
        (&self.key, self.from, self.to, self.amount) == (&order.key, order.from, order.to, order.amount)
    }
}
