//! Money transfers with a time limit: a thousand at once, a third of them dropped at a random moment.
//!
//! ```text
//! cargo run -p cancel-safe-tx-guard --example transfer
//! cargo run -p cancel-safe-tx-guard --example transfer -- --database postgres://postgres@localhost/postgres
//! ```
//!
//! The handle of each dropped transfer reports whether it was committed or rolled back. Afterwards the example checks
//! the table: the sum must be unchanged, and it must hold exactly the transfers that were reported as committed.
//! Otherwise the exit code is 1.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example speaks through its output")]

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

use cancel_safe_tx_guard::{
    Backend, CommitMode, CommitOutcome, OutcomeHandle, Retry, TransactionGuard, TxError, TxPool,
};
use clap::Parser;
use futures_util::future::join_all;
use sqlx::{AssertSqlSafe, Connection, Database, MySql, Postgres, Sqlite};

/// A thousand transfers at once, a third of them dropped at a random moment.
#[derive(Debug, Clone, Parser)]
pub(crate) struct Settings {
    /// `postgres://…`, `mysql://…` or `sqlite://…` [default: an SQLite file that is removed afterwards]
    #[arg(long, value_name = "URL")]
    pub(crate) database: Option<String>,
    /// How many transfers
    #[arg(long, default_value_t = 1_000)]
    pub(crate) transfers: usize,
    /// How many accounts, each with 1,000 at first
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(i64).range(2..))]
    pub(crate) accounts: i64,
    /// How long one transfer may take, in milliseconds, with the wait for a connection, the retries and the commit
    #[arg(long, default_value_t = 30_000)]
    pub(crate) limit_ms: u64,
    /// Repeats the random choices of another run
    #[arg(long)]
    pub(crate) seed: Option<u64>,
}

/// The opening balance of every account.
const START: i64 = 1_000;

#[tokio::main]
async fn main() -> ExitCode {
    match start(Settings::parse()).await {
        Ok(summary) if summary.is_right() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("failed: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Chooses the database by the URL.
pub(crate) async fn start(settings: Settings) -> Result<Summary, TxError> {
    match settings.database.clone() {
        None => {
            let place = tempfile::tempdir().map_err(TxError::application)?;
            let url = format!("sqlite://{}?mode=rwc", place.path().join("bank.db").display());
            run::<Sqlite>(&url, &settings).await
        }
        Some(url) if url.starts_with("sqlite:") => run::<Sqlite>(&url, &settings).await,
        Some(url) if url.starts_with("mysql:") || url.starts_with("mariadb:") => run::<MySql>(&url, &settings).await,
        Some(url) => run::<Postgres>(&url, &settings).await,
    }
}

/// SQL that all three databases understand, on each of them.
pub(crate) trait Bank: Backend {
    /// Runs the statement; returns how many rows were changed.
    async fn change(conn: &mut Self::Connection, sql: String) -> Result<u64, sqlx::Error>;
    async fn numbers(conn: &mut Self::Connection, sql: String) -> Result<Vec<i64>, sqlx::Error>;
}

impl Bank for Sqlite {
    async fn change(conn: &mut Self::Connection, sql: String) -> Result<u64, sqlx::Error> {
        Ok(sqlx::query(AssertSqlSafe(sql)).execute(conn).await?.rows_affected())
    }

    async fn numbers(conn: &mut Self::Connection, sql: String) -> Result<Vec<i64>, sqlx::Error> {
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(conn).await
    }
}

impl Bank for Postgres {
    async fn change(conn: &mut Self::Connection, sql: String) -> Result<u64, sqlx::Error> {
        Ok(sqlx::query(AssertSqlSafe(sql)).execute(conn).await?.rows_affected())
    }

    async fn numbers(conn: &mut Self::Connection, sql: String) -> Result<Vec<i64>, sqlx::Error> {
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(conn).await
    }
}

impl Bank for MySql {
    async fn change(conn: &mut Self::Connection, sql: String) -> Result<u64, sqlx::Error> {
        Ok(sqlx::query(AssertSqlSafe(sql)).execute(conn).await?.rows_affected())
    }

    async fn numbers(conn: &mut Self::Connection, sql: String) -> Result<Vec<i64>, sqlx::Error> {
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(conn).await
    }
}

/// One order to transfer money.
struct Order {
    id: usize,
    from: i64,
    to: i64,
    amount: i64,
    /// The transfer is dropped after it was pending this often. `None`: it is left alone.
    dropped_at: Option<u32>,
    /// The handle of the last attempt.
    handle: RefCell<Option<OutcomeHandle>>,
}

impl Order {
    fn random(id: usize, accounts: i64, random: &mut fastrand::Rng) -> Self {
        let from = random.i64(0..accounts);
        let to = (from + random.i64(1..accounts)) % accounts;
        // Two of five, of which some are done before: about a third of all are dropped.
        let dropped_at = (random.u8(..5) < 2).then(|| random.u32(1..=10));
        Self { id, from, to, amount: random.i64(1..=50), dropped_at, handle: RefCell::new(None) }
    }

    /// What happens in the transaction.
    async fn work<DB: Bank>(&self, tx: &mut TransactionGuard<DB>, bank: &str) -> Result<(), TxError> {
        *self.handle.borrow_mut() = Some(tx.outcome_handle());
        let Self { id, from, to, amount, .. } = self;
        let take = format!("UPDATE {bank} SET balance = balance - {amount} WHERE id = {from} AND balance >= {amount}");
        let give = format!("UPDATE {bank} SET balance = balance + {amount} WHERE id = {to}");
        // Always the lower account first: two transfers that go opposite ways would wait for each other.
        let taken = if from < to {
            let taken = DB::change(tx, take).await?;
            DB::change(tx, give).await?;
            taken
        } else {
            DB::change(tx, give).await?;
            DB::change(tx, take).await?
        };
        if taken == 0 {
            // The error rolls everything back.
            return Err(TxError::application("the account is overdrawn"));
        }
        DB::change(tx, format!("INSERT INTO {bank}_ledger (id) VALUES ({id})")).await?;
        Ok(())
    }

    async fn carry_out<DB: Bank>(&self, db: &TxPool<DB>, bank: &str, limit: Duration) -> Told {
        let transfer = db
            .tx()
            .timeout(limit)
            // PostgreSQL then tells the end of a commit even if its connection is lost.
            .commit_mode(CommitMode::Resolvable)
            .retry(Retry::attempts(20).backoff(Duration::from_millis(5), Duration::from_millis(200)))
            .run(async |tx| self.work(tx, bank).await);
        match drop_at(transfer, self.dropped_at).await {
            Some(Ok(())) => Told::Committed,
            Some(Err(error)) if error.is_unknown() => Told::Dropped(self.outcome().await),
            Some(Err(error)) => Told::Failed(error.to_string()),
            None => Told::Dropped(self.outcome().await),
        }
    }

    /// How a transfer ended that returned no result.
    async fn outcome(&self) -> CommitOutcome {
        let handle = self.handle.borrow().clone();
        match handle {
            Some(handle) => handle.outcome().await,
            // Never begun.
            None => CommitOutcome::RolledBack,
        }
    }
}

/// How one order ended.
enum Told {
    Committed,
    Failed(String),
    Dropped(CommitOutcome),
}

/// Drops `future` when it has been pending `at` times, as a timeout or a lost `select!` does.
async fn drop_at<T>(future: impl Future<Output = T>, at: Option<u32>) -> Option<T> {
    let pendings = at.map_or(usize::MAX, |at| usize::try_from(at).unwrap_or(usize::MAX));
    cancel_safe_testing::drop_after(pendings, future).await
}

/// The result of all transfers.
#[derive(Debug)]
pub(crate) struct Summary {
    transfers: usize,
    pub(crate) committed: usize,
    pub(crate) failed: usize,
    pub(crate) dropped_committed: usize,
    pub(crate) dropped_rolled_back: usize,
    pub(crate) dropped_unknown: usize,
    sum_before: i64,
    sum_after: i64,
    /// Whether the table holds exactly the transfers that were reported as committed.
    ledger_agrees: bool,
}

impl Summary {
    pub(crate) fn is_right(&self) -> bool {
        self.sum_before == self.sum_after && self.ledger_agrees && self.dropped_unknown == 0
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dropped = self.dropped_committed + self.dropped_rolled_back + self.dropped_unknown;
        writeln!(f, "{} transfers: {} committed, {} failed", self.transfers, self.committed, self.failed)?;
        writeln!(
            f,
            "{dropped} dropped: {} committed, {} rolled back, {} unknown",
            self.dropped_committed, self.dropped_rolled_back, self.dropped_unknown
        )?;
        let ledger = if self.ledger_agrees { "agrees" } else { "DOES NOT AGREE" };
        write!(f, "sum before {}, after {}; the ledger {ledger}", self.sum_before, self.sum_after)
    }
}

async fn run<DB: Bank>(url: &str, settings: &Settings) -> Result<Summary, TxError> {
    let seed = settings.seed.unwrap_or_else(|| fastrand::u64(..));
    println!("--seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    // Its own tables in a database that may hold others.
    let bank = format!("bank_{}_{}", std::process::id(), fastrand::u32(..));
    open_accounts::<DB>(url, &bank, settings.accounts).await?;
    let db = TxPool::<DB>::builder().max_connections(8).acquire_timeout(Duration::from_secs(60)).connect(url).await?;
    let orders: Vec<_> = (0..settings.transfers).map(|id| Order::random(id, settings.accounts, &mut random)).collect();

    let limit = Duration::from_millis(settings.limit_ms);
    let told = join_all(orders.iter().map(|order| order.carry_out(&db, &bank, limit))).await;

    let mut summary = Summary {
        transfers: orders.len(),
        committed: 0,
        failed: 0,
        dropped_committed: 0,
        dropped_rolled_back: 0,
        dropped_unknown: 0,
        sum_before: settings.accounts * START,
        sum_after: 0,
        ledger_agrees: true,
    };
    let mut expected = BTreeSet::new();
    for (order, told) in orders.iter().zip(told) {
        let Order { id, from, to, amount, .. } = order;
        let transfer = format!("transfer {id}, {amount} from {from} to {to}");
        match told {
            Told::Committed => {
                summary.committed += 1;
                expected.insert(*id as i64);
            }
            Told::Failed(why) => {
                summary.failed += 1;
                println!("{transfer}: failed: {why}");
            }
            Told::Dropped(outcome) => {
                let how = match outcome {
                    CommitOutcome::Committed => {
                        summary.dropped_committed += 1;
                        expected.insert(*id as i64);
                        "committed"
                    }
                    CommitOutcome::RolledBack => {
                        summary.dropped_rolled_back += 1;
                        "rolled back"
                    }
                    _ => {
                        summary.dropped_unknown += 1;
                        "unknown"
                    }
                };
                println!("{transfer}: dropped: {how}");
            }
        }
    }
    let report = db.close(Duration::from_secs(10)).await;
    if !report.is_clean() {
        return Err(TxError::application(format!("not at rest: {report}")));
    }
    audit::<DB>(url, &bank, &expected, &mut summary).await?;
    println!("{summary}");
    Ok(summary)
}

/// Over a separate connection: MySQL commits implicitly when a table is created, and a guard would report that as lost.
async fn open_accounts<DB: Bank>(url: &str, bank: &str, accounts: i64) -> Result<(), sqlx::Error> {
    let mut conn = <DB as Database>::Connection::connect(url).await?;
    let rows = (0..accounts).map(|id| format!("({id}, {START})")).collect::<Vec<_>>().join(", ");
    for sql in [
        format!("CREATE TABLE {bank} (id BIGINT PRIMARY KEY, balance BIGINT NOT NULL)"),
        format!("CREATE TABLE {bank}_ledger (id BIGINT PRIMARY KEY)"),
        format!("INSERT INTO {bank} (id, balance) VALUES {rows}"),
    ] {
        DB::change(&mut conn, sql).await?;
    }
    conn.close().await
}

/// Reads the final state over a connection without a guard, and drops the tables.
async fn audit<DB: Bank>(
    url: &str,
    bank: &str,
    expected: &BTreeSet<i64>,
    summary: &mut Summary,
) -> Result<(), sqlx::Error> {
    let mut conn = <DB as Database>::Connection::connect(url).await?;
    let balances = DB::numbers(&mut conn, format!("SELECT balance FROM {bank}")).await?;
    let ledger = DB::numbers(&mut conn, format!("SELECT id FROM {bank}_ledger")).await?;
    summary.sum_after = balances.iter().sum();
    summary.ledger_agrees = *expected == ledger.into_iter().collect::<BTreeSet<_>>();
    DB::change(&mut conn, format!("DROP TABLE {bank}")).await?;
    DB::change(&mut conn, format!("DROP TABLE {bank}_ledger")).await?;
    conn.close().await
}
