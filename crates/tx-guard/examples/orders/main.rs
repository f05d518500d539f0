//! A small shop as an axum service, twice: on plain sqlx (`plain.rs`) and with guarded transactions (`guarded.rs`).
//!
//! ```text
//! cargo run -p cancel-safe-tx-guard --example orders -- --check
//! cargo run -p cancel-safe-tx-guard --example orders -- --listen 127.0.0.1:8080
//! curl -X POST 127.0.0.1:8080/orders -H 'content-type: application/json' -d '{"item":"book","count":2}'
//! ```
//!
//! With `--check` clients drive it, a third of which hang up at a random moment, and then the books are checked: every
//! ordered item is missing from the stock, and no money was made or lost. Otherwise the exit code is 1.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example speaks through its output")]

pub(crate) mod check;
pub(crate) mod guarded;
pub(crate) mod plain;
pub(crate) mod shop;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use axum::Router;
use cancel_safe_tx_guard::TxPool;
use clap::Parser;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode};
use sqlx::{ConnectOptions, Sqlite};
use tokio::net::TcpListener;

/// A shop as an axum service, with guarded transactions
#[derive(Debug, Clone, Parser)]
pub(crate) struct Settings {
    /// The SQLite file [default: one that is removed afterwards]
    #[arg(long, value_name = "FILE")]
    pub(crate) database: Option<PathBuf>,
    /// Where to listen
    #[arg(long, default_value = "127.0.0.1:0")]
    pub(crate) listen: SocketAddr,
    /// Uses handlers on plain sqlx instead, to compare
    #[arg(long)]
    pub(crate) plain: bool,
    /// Sends the service this many requests, and checks the books
    #[arg(long, value_name = "REQUESTS", num_args = 0..=1, default_missing_value = "1000")]
    pub(crate) check: Option<usize>,
    /// Repeats the random choices of another check
    #[arg(long)]
    pub(crate) seed: Option<u64>,
}

pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The shop's opening stock.
const ITEM: &str = "book";
const STOCK: i64 = 100_000;
const ACCOUNTS: i64 = 10;
const BALANCE: i64 = 1_000;

#[tokio::main]
async fn main() -> ExitCode {
    match start(Settings::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("failed: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Serves for ever, or checks and returns whether everything was right.
pub(crate) async fn start(settings: Settings) -> Result<bool, Failure> {
    let place = tempfile::tempdir()?;
    let file = settings.database.clone().unwrap_or_else(|| place.path().join("shop.db"));
    let is_new = !file.exists();
    let options = SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .busy_timeout(Duration::from_secs(5));
    if is_new {
        let mut conn = options.connect().await?;
        shop::open(&mut conn, ITEM, STOCK, ACCOUNTS, BALANCE).await?;
    }
    let right = if settings.plain {
        let db = sqlx::Pool::<Sqlite>::connect_with(options.clone()).await?;
        let right = serve(&settings, plain::router(db.clone())).await?;
        db.close().await;
        right
    } else {
        let db = TxPool::<Sqlite>::builder().max_connections(8).connect_with(options.clone()).await?;
        let right = serve(&settings, guarded::router(db.clone())).await?;
        // Those who have hung up have left transactions to be ended.
        let report = db.close(Duration::from_secs(30)).await;
        println!("{report}");
        right && report.is_clean()
    };
    Ok(right && check::audit(&options).await?)
}

async fn serve(settings: &Settings, router: Router) -> Result<bool, Failure> {
    let listener = TcpListener::bind(settings.listen).await?;
    let address = listener.local_addr()?;
    println!("listening on http://{address}");
    let server = axum::serve(listener, router);
    match settings.check {
        None => server.await.map(|()| true).map_err(Failure::from),
        Some(requests) => {
            let server = tokio::spawn(async move { server.await });
            let right = check::drive(address, requests, settings.seed).await;
            server.abort();
            drop(server.await);
            right
        }
    }
}
