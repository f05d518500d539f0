//! The SQL of the catalogue, the same for SQLite and PostgreSQL: its tables, its pages of rows, its one writer.
//!
//! Invariant: a change that is reported as committed is committed; a batch may be applied twice, with the same outcome.

use std::collections::BTreeMap;
use std::path::Path;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use cancel_safe::tx_guard::{Backend, TxError, TxPool};
use sqlx::postgres::{PgConnectOptions, Postgres};
use sqlx::query_builder::QueryBuilder;
use sqlx::sqlite::{Sqlite, SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{Database, Encode, Executor, FromRow, IntoArguments, Type};
use tokio::sync::mpsc;

use super::catalogue::{Catalogue, CatalogueError, Change, Job, MAX_BATCH, Pending, Read, Row, Rows};
use super::report::chain;

/// Attempts at a batch before the database counts as unreachable, with a pause of 100 ms doubled after each.
const ATTEMPTS: u32 = 5;
/// How long one attempt may take.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the end waits for the database.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Rows that are read at once.
const PAGE: usize = 512;
/// Rows that one statement writes at most.
const MAX_PIECE: usize = 64;

/// A row as both drivers read it, in the order of [`COLUMNS`].
type Columns = (String, String, i64, String, i64, String, Option<String>, Option<String>, i64);

impl From<Columns> for Row {
    fn from((url, path, bytes, sha256, http_status, final_url, etag, last_modified, fetched_at): Columns) -> Self {
        Self { url, path, bytes, sha256, http_status, final_url, etag, last_modified, fetched_at }
    }
}

const COLUMNS: &str = "url, path, bytes, sha256, http_status, final_url, etag, last_modified, fetched_at";

/// The writer. It ends when every [`Catalogue`] is dropped.
pub(crate) type Writer = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A catalogue that has been opened.
pub(crate) struct Opened {
    pub(crate) catalogue: Catalogue,
    pub(crate) writer: Writer,
    /// It has no mark yet; settling gives it one.
    pub(crate) is_new: bool,
}

/// Opens or creates the catalogue of the directory `dir`.
pub(crate) async fn open(database: Option<&str>, dir: &Path, mark: &str) -> Result<Opened, CatalogueError> {
    match database {
        Some(url) if !url.starts_with("sqlite:") => {
            let options = PgConnectOptions::from_str(url).map_err(CatalogueError::Url)?;
            let pool = TxPool::<Postgres>::builder().max_connections(2).connect_with(options).await?;
            Store { pool }.open(mark).await
        }
        url => {
            let options = match url {
                Some(url) => SqliteConnectOptions::from_str(url).map_err(CatalogueError::Url)?,
                None => SqliteConnectOptions::new().filename(dir.join("catalog.db")),
            };
            // FULL: in WAL mode a lesser setting loses the last commits in a power cut.
            let options = options
                .create_if_missing(true)
                .journal_mode(SqliteJournalMode::Wal)
                .synchronous(SqliteSynchronous::Full)
                .busy_timeout(Duration::from_secs(5));
            let pool = TxPool::<Sqlite>::builder().max_connections(2).connect_with(options).await?;
            Store { pool }.open(mark).await
        }
    }
}

fn require(found: &str, mark: &str) -> Result<(), CatalogueError> {
    if found == mark {
        return Ok(());
    }
    Err(CatalogueError::Foreign { found: found.to_owned(), expected: mark.to_owned() })
}

struct Store<DB: Backend> {
    pool: TxPool<DB>,
}

impl<DB> Rows for Store<DB>
where
    DB: Backend,
    for<'c> &'c mut DB::Connection: Executor<'c, Database = DB>,
    DB::Arguments: IntoArguments<DB>,
    for<'q> String: Encode<'q, DB> + Type<DB>,
    for<'q> i64: Encode<'q, DB> + Type<DB>,
    for<'q> Option<String>: Encode<'q, DB> + Type<DB>,
    for<'r> Columns: FromRow<'r, DB::Row>,
    for<'r> (String,): FromRow<'r, DB::Row>,
{
    fn after(&self, url: Option<String>) -> Read<'_, Vec<Row>> {
        let mut select = QueryBuilder::<DB>::new(format!("SELECT {COLUMNS} FROM files"));
        if let Some(url) = url {
            select.push(" WHERE url > ").push_bind(url);
        }
        select.push(format!(" ORDER BY url LIMIT {PAGE}"));
        Box::pin(self.read(select))
    }

    fn of(&self, url: String) -> Read<'_, Option<Row>> {
        let mut select = QueryBuilder::<DB>::new(format!("SELECT {COLUMNS} FROM files WHERE url = "));
        select.push_bind(url);
        Box::pin(async move { Ok(self.read(select).await?.pop()) })
    }
}

impl<DB> Store<DB>
where
    DB: Backend,
    for<'c> &'c mut DB::Connection: Executor<'c, Database = DB>,
    DB::Arguments: IntoArguments<DB>,
    for<'q> String: Encode<'q, DB> + Type<DB>,
    for<'q> i64: Encode<'q, DB> + Type<DB>,
    for<'q> Option<String>: Encode<'q, DB> + Type<DB>,
    for<'r> Columns: FromRow<'r, DB::Row>,
    for<'r> (String,): FromRow<'r, DB::Row>,
{
    async fn open(self, mark: &str) -> Result<Opened, CatalogueError> {
        let mut tx = self.pool.begin().await?;
        for sql in [
            "CREATE TABLE IF NOT EXISTS files (url TEXT PRIMARY KEY, path TEXT NOT NULL UNIQUE, bytes BIGINT NOT NULL, \
             sha256 TEXT NOT NULL, http_status BIGINT NOT NULL, final_url TEXT NOT NULL, etag TEXT, last_modified TEXT, \
             fetched_at BIGINT NOT NULL)",
            "CREATE TABLE IF NOT EXISTS pending (url TEXT PRIMARY KEY, path TEXT NOT NULL, bytes BIGINT NOT NULL, \
             sha256 TEXT NOT NULL, http_status BIGINT NOT NULL, final_url TEXT NOT NULL, etag TEXT, last_modified TEXT, \
             fetched_at BIGINT NOT NULL)",
            "CREATE TABLE IF NOT EXISTS mirror (id INTEGER PRIMARY KEY CHECK (id = 1), mark TEXT NOT NULL)",
        ] {
            (*tx).execute(sql).await?;
        }
        let found: Option<(String,)> = sqlx::query_as("SELECT mark FROM mirror").fetch_optional(&mut *tx).await?;
        if let Some((found,)) = &found {
            require(found, mark)?;
        }
        let select = sqlx::AssertSqlSafe(format!("SELECT {COLUMNS} FROM pending ORDER BY url"));
        let pending: Vec<Columns> = sqlx::query_as(select).fetch_all(&mut *tx).await?;
        tx.commit().await?;
        let pending: BTreeMap<String, Row> =
            pending.into_iter().map(Row::from).map(|row| (row.url.clone(), row)).collect();
        let pending: Pending = Arc::new(pending.into());
        let (jobs, waiting) = mpsc::channel(MAX_BATCH);
        let catalogue = Catalogue::new(jobs, Arc::new(Self { pool: self.pool.clone() }), Arc::clone(&pending));
        Ok(Opened { catalogue, writer: Box::pin(self.write(waiting, pending)), is_new: found.is_none() })
    }

    async fn read(&self, mut query: QueryBuilder<DB>) -> Result<Vec<Row>, CatalogueError> {
        let mut tx = self.pool.begin().await?;
        let rows: Vec<Columns> = query.build_query_as().fetch_all(&mut *tx).await?;
        tx.rollback().await?;
        Ok(rows.into_iter().map(Row::from).collect())
    }

    async fn write(self, mut waiting: mpsc::Receiver<Job>, pending: Pending) {
        let mut batch = Vec::with_capacity(MAX_BATCH);
        while waiting.recv_many(&mut batch, MAX_BATCH).await > 0 {
            let outcome = self.commit_in_time(&batch).await;
            for Job { change, done } in batch.drain(..) {
                let told = match &outcome {
                    Ok(()) => Ok(()),
                    Err(error) => Err(CatalogueError::Stopped { cause: chain(error), disk_full: error.is_disk_full() }),
                };
                // Here and not in the caller, because its future may have been dropped meanwhile.
                if told.is_ok() {
                    let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
                    match change {
                        Change::Intend(row) => drop(pending.insert(row.url.clone(), *row)),
                        Change::Put(row) => drop(pending.remove(&row.url)),
                        Change::Forget(url) => drop(pending.remove(&url)),
                        Change::Delete(_) | Change::Mark(_) => {}
                    }
                }
                // A fetch that was dropped meanwhile no longer waits.
                let _dropped = done.send(told);
            }
            if outcome.is_err() {
                // From now on, changes are refused at once instead of waiting for a database that is gone.
                break;
            }
        }
        drop(waiting);
        self.pool.close(CLOSE_TIMEOUT).await;
    }

    /// Commits a batch, several times if need be.
    async fn commit_in_time(&self, batch: &[Job]) -> Result<(), CatalogueError> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            let late = || CatalogueError::Stopped {
                cause: format!("the database did not answer within {COMMIT_TIMEOUT:?}"),
                disk_full: false,
            };
            // Every change may be applied twice, so that a commit whose outcome is unknown is simply made again.
            let outcome =
                tokio::time::timeout(COMMIT_TIMEOUT, self.commit(batch)).await.unwrap_or_else(|_| Err(late()));
            // If its disk is full, SQLite gives a transaction up by itself, and COMMIT shows it in no other way.
            let outcome = outcome.map_err(|error| match error {
                CatalogueError::Database(TxError::Lost { .. }) if DB::NAME == Sqlite::NAME => {
                    CatalogueError::Stopped { cause: chain(&error), disk_full: true }
                }
                error => error,
            });
            if outcome.is_ok() || attempt == ATTEMPTS {
                return outcome;
            }
            tokio::time::sleep(Duration::from_millis(50 << attempt)).await;
        }
    }

    async fn commit(&self, batch: &[Job]) -> Result<(), CatalogueError> {
        let mut tx = self.pool.begin().await?;
        let (mut files, mut pending) = (BTreeMap::new(), BTreeMap::new());
        // The last of several changes of one URL stands: ON CONFLICT refuses to touch a row twice in one statement.
        for job in batch {
            match &job.change {
                Change::Intend(row) => drop(pending.insert(&row.url, Some(&**row))),
                Change::Forget(url) => drop(pending.insert(url, None)),
                Change::Put(row) => {
                    files.insert(&row.url, Some(&**row));
                    pending.insert(&row.url, None);
                }
                Change::Delete(url) => drop(files.insert(url, None)),
                Change::Mark(mark) => {
                    let mut insert = QueryBuilder::<DB>::new("INSERT INTO mirror (id, mark) VALUES (1, ");
                    insert.push_bind(mark.clone()).push(") ON CONFLICT (id) DO NOTHING");
                    insert.build().execute(&mut *tx).await?;
                    // Another directory may have been faster.
                    let (found,): (String,) = sqlx::query_as("SELECT mark FROM mirror").fetch_one(&mut *tx).await?;
                    require(&found, mark)?;
                }
            }
        }
        for (table, rows) in [("files", files), ("pending", pending)] {
            let gone: Vec<&String> = rows.iter().filter(|(_, row)| row.is_none()).map(|(url, _)| *url).collect();
            for urls in pieces(&gone) {
                delete::<DB>(table, urls).build().execute(&mut *tx).await?;
            }
            let rows: Vec<&Row> = rows.into_values().flatten().collect();
            for rows in pieces(&rows) {
                upsert::<DB>(table, rows).build().execute(&mut *tx).await?;
            }
        }
        tx.commit().await?;
        Ok(())
    }
}

/// The same in pieces of 1, 2, 4, … up to [`MAX_PIECE`]: of so few statements the connection keeps each prepared.
fn pieces<T>(mut rest: &[T]) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let length = 1 << rest.len().min(MAX_PIECE).checked_ilog2()?;
        rest.split_off(..length)
    })
}

fn delete<DB>(table: &str, urls: &[&String]) -> QueryBuilder<DB>
where
    DB: Backend,
    for<'q> String: Encode<'q, DB> + Type<DB>,
{
    let mut delete = QueryBuilder::<DB>::new(format!("DELETE FROM {table} WHERE url IN ("));
    let mut separated = delete.separated(", ");
    for url in urls {
        separated.push_bind((*url).clone());
    }
    delete.push(")");
    delete
}

fn upsert<DB>(table: &str, rows: &[&Row]) -> QueryBuilder<DB>
where
    DB: Backend,
    for<'q> String: Encode<'q, DB> + Type<DB>,
    for<'q> i64: Encode<'q, DB> + Type<DB>,
    for<'q> Option<String>: Encode<'q, DB> + Type<DB>,
{
    let mut insert = QueryBuilder::<DB>::new(format!("INSERT INTO {table} ({COLUMNS}) "));
    insert.push_values(rows, |mut tuple, row| {
        tuple.push_bind(row.url.clone()).push_bind(row.path.clone()).push_bind(row.bytes).push_bind(row.sha256.clone());
        tuple.push_bind(row.http_status).push_bind(row.final_url.clone()).push_bind(row.etag.clone());
        tuple.push_bind(row.last_modified.clone()).push_bind(row.fetched_at);
    });
    insert.push(
        " ON CONFLICT (url) DO UPDATE SET path = excluded.path, bytes = excluded.bytes, sha256 = excluded.sha256, \
         http_status = excluded.http_status, final_url = excluded.final_url, etag = excluded.etag, \
         last_modified = excluded.last_modified, fetched_at = excluded.fetched_at",
    );
    insert
}
