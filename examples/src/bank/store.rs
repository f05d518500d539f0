//! The tables, in the SQL of each database. Invariant: values from a client are bound, never part of the SQL text.

use std::io;

use cancel_safe_tx_guard::{Backend, CommitMode, TxError, TxPool};
use sqlx::{AssertSqlSafe, Connection, Database, MySql, Postgres, Sqlite};
use tempfile::TempDir;

use super::{ACCOUNTS, Outcome, Row, START};

/// Which database a URL names.
pub(super) enum Kind {
    Sqlite,
    Postgres,
    MySql,
}

/// Where the data is.
pub(super) struct Place {
    url: String,
    /// Removed at the end.
    _directory: Option<TempDir>,
}

impl Place {
    /// The database at this URL, or an SQLite file in its own directory.
    pub(super) fn of(url: Option<String>) -> io::Result<Self> {
        if let Some(url) = url {
            return Ok(Self { url, _directory: None });
        }
        let directory = tempfile::Builder::new().prefix("bank-").tempdir()?;
        let url = format!("sqlite://{}?mode=rwc", directory.path().join("bank.db").display());
        Ok(Self { url, _directory: Some(directory) })
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    pub(super) fn kind(&self) -> Kind {
        match self.url.split(':').next() {
            Some("postgres" | "postgresql") => Kind::Postgres,
            Some("mysql" | "mariadb") => Kind::MySql,
            _ => Kind::Sqlite,
        }
    }
}

/// A database that can hold the bank.
pub(super) trait Bank: Backend {
    /// Settings that are made once.
    const SETTINGS: &'static str;
    /// Writes the row of a key, unless it exists. It waits for a transaction that is about to write the same row.
    const CLAIM: &'static str;

    /// Runs a statement with these texts, and then these numbers, for its question marks; returns how many rows it has
    /// changed.
    fn change(
        conn: &mut Self::Connection,
        sql: &'static str,
        texts: &[&str],
        numbers: &[i64],
    ) -> impl Future<Output = Result<u64, sqlx::Error>> + Send;

    /// The row of a key.
    fn recorded(
        conn: &mut Self::Connection,
        key: &str,
    ) -> impl Future<Output = Result<Option<Row>, sqlx::Error>> + Send;

    /// All rows.
    fn rows(conn: &mut Self::Connection) -> impl Future<Output = Result<Vec<Row>, sqlx::Error>> + Send;

    /// The accounts and what is in them.
    fn balances(db: &TxPool<Self>) -> impl Future<Output = Result<Vec<(i64, i64)>, sqlx::Error>> + Send;
}

type Columns = (String, i64, i64, i64, String);

fn row((key, from, to, amount, outcome): Columns) -> Result<Row, sqlx::Error> {
    let outcome = match outcome.as_str() {
        "completed" => Outcome::Completed,
        "refused" => Outcome::Refused,
        other => return Err(sqlx::Error::Decode(format!("the outcome {other:?}").into())),
    };
    Ok(Row { key, from, to, amount, outcome })
}

/// The form of SQLite and MySQL.
fn plain(sql: &str) -> String {
    sql.to_owned()
}

/// The form of PostgreSQL: `$1` for the first question mark.
fn numbered(sql: &str) -> String {
    let mut parts = sql.split('?');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.enumerate().fold(first, |text, (index, part)| format!("{text}${}{part}", index + 1))
}

macro_rules! bank {
    ($database:ty, $text:path, $settings:literal, $claim:literal) => {
        impl Bank for $database {
            const SETTINGS: &'static str = $settings;
            const CLAIM: &'static str = $claim;

            async fn change(
                conn: &mut Self::Connection,
                sql: &'static str,
                texts: &[&str],
                numbers: &[i64],
            ) -> Result<u64, sqlx::Error> {
                let query = sqlx::query(AssertSqlSafe($text(sql)));
                let query = texts.iter().fold(query, |query, text| query.bind((*text).to_owned()));
                let query = numbers.iter().fold(query, |query, number| query.bind(*number));
                Ok(query.execute(conn).await?.rows_affected())
            }

            async fn recorded(conn: &mut Self::Connection, key: &str) -> Result<Option<Row>, sqlx::Error> {
                let sql = "SELECT id, source, target, amount, outcome FROM transfers WHERE id = ?";
                let query = sqlx::query_as(AssertSqlSafe($text(sql))).bind(key.to_owned());
                query.fetch_optional(conn).await?.map(row).transpose()
            }

            async fn rows(conn: &mut Self::Connection) -> Result<Vec<Row>, sqlx::Error> {
                let query = sqlx::query_as("SELECT id, source, target, amount, outcome FROM transfers");
                query.fetch_all(conn).await?.into_iter().map(row).collect()
            }

            async fn balances(db: &TxPool<Self>) -> Result<Vec<(i64, i64)>, sqlx::Error> {
                sqlx::query_as("SELECT id, balance FROM accounts ORDER BY id").fetch_all(db).await
            }
        }
    };
}

bank!(
    Sqlite,
    plain,
    "PRAGMA journal_mode = WAL",
    "INSERT INTO transfers (id, outcome, source, target, amount) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
);
bank!(
    Postgres,
    numbered,
    "SELECT 1",
    "INSERT INTO transfers (id, outcome, source, target, amount) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
);
bank!(
    MySql,
    plain,
    "SELECT 1",
    "INSERT IGNORE INTO transfers (id, outcome, source, target, amount) VALUES (?, ?, ?, ?, ?)"
);

/// Creates missing tables, and opens the pool.
pub(super) async fn open<DB: Bank>(url: &str) -> Result<TxPool<DB>, TxError> {
    // Over a separate connection: MySQL commits implicitly when it creates a table, and a guard would report that as
    // lost.
    let mut conn = <DB as Database>::Connection::connect(url).await?;
    for sql in [
        DB::SETTINGS,
        "CREATE TABLE IF NOT EXISTS accounts (id BIGINT PRIMARY KEY, balance BIGINT NOT NULL)",
        "CREATE TABLE IF NOT EXISTS transfers (id VARCHAR(64) PRIMARY KEY, source BIGINT NOT NULL,
            target BIGINT NOT NULL, amount BIGINT NOT NULL, outcome VARCHAR(16) NOT NULL)",
    ] {
        DB::change(&mut conn, sql, &[], &[]).await?;
    }
    for id in 1..=ACCOUNTS {
        let sql = "INSERT INTO accounts (id, balance) SELECT ?, ? FROM (SELECT 1 AS one) AS one
            WHERE NOT EXISTS (SELECT 1 FROM accounts WHERE id = ?)";
        DB::change(&mut conn, sql, &[], &[id, START, id]).await?;
    }
    conn.close().await?;
    // PostgreSQL can then tell the outcome of a commit even if its connection is lost.
    TxPool::builder().commit_mode(CommitMode::Resolvable).connect(url).await
}

/// Reads every row over a connection without a guard.
pub(super) async fn read_rows<DB: Bank>(url: &str) -> Result<Vec<Row>, sqlx::Error> {
    let mut conn = <DB as Database>::Connection::connect(url).await?;
    let rows = DB::rows(&mut conn).await?;
    conn.close().await?;
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn question_marks_are_numbered_for_postgres() {
        assert_eq!(numbered("a = ? AND b = ?"), "a = $1 AND b = $2");
        assert_eq!(numbered("a"), "a");
    }
}
