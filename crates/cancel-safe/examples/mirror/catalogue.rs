//! The catalogue: what is on disk, in SQLite or PostgreSQL. One writer takes all changes that wait into one transaction.
//!
//! A row is there only when its file is durable. Before a file is replaced, its next row is written down as pending beside
//! the one it has, so that whatever ends the process, the digest of the file says which of the two is true. Changes are acknowledged after their COMMIT; nobody waits for a batch to
//! fill, because the writer begins as soon as the last transaction is done, with what has come in meanwhile.

use std::collections::BTreeMap;
use std::path::Path;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cancel_safe::tx_guard::{Backend, TxError, TxPool};
use sqlx::postgres::{PgConnectOptions, Postgres};
use sqlx::query_builder::QueryBuilder;
use sqlx::sqlite::{Sqlite, SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{Database, Encode, Executor, FromRow, IntoArguments, Type};
use tokio::sync::{mpsc, oneshot};

use super::report::chain;

/// The most changes in one transaction: what a kill can make a run fetch again beyond the files in flight.
pub(crate) const MAX_BATCH: usize = 64;
/// Attempts at a batch before the database counts as unreachable, with a pause of 100 ms doubled after each.
const ATTEMPTS: u32 = 5;
/// How long one attempt may take.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the end waits for the database.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// One file that is on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) url: String,
    /// Relative to `DIR/files`.
    pub(crate) path: String,
    pub(crate) bytes: i64,
    /// In hexadecimal.
    pub(crate) sha256: String,
    pub(crate) http_status: i64,
    /// Where the redirects led.
    pub(crate) final_url: String,
    pub(crate) etag: Option<String>,
    pub(crate) last_modified: Option<String>,
    /// Milliseconds since 1970 in UTC.
    pub(crate) fetched_at: i64,
}

/// A row as both drivers read it, in the order of [`COLUMNS`].
type Columns = (String, String, i64, String, i64, String, Option<String>, Option<String>, i64);

impl From<Columns> for Row {
    fn from((url, path, bytes, sha256, http_status, final_url, etag, last_modified, fetched_at): Columns) -> Self {
        Self { url, path, bytes, sha256, http_status, final_url, etag, last_modified, fetched_at }
    }
}

const COLUMNS: &str = "url, path, bytes, sha256, http_status, final_url, etag, last_modified, fetched_at";

/// One step of the catalogue.
#[derive(Debug)]
pub(crate) enum Change {
    /// The file is about to become this one: its row so far stays until [`Change::Put`].
    Intend(Box<Row>),
    /// The file did not become what was intended.
    Forget(String),
    /// The file is durable.
    Put(Box<Row>),
    /// The file of this URL is gone.
    Delete(String),
    /// The catalogue belongs to the directory with this mark from now on.
    Mark(String),
}

/// Why the catalogue cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CatalogueError {
    #[error("the catalogue's database cannot be used")]
    Database(#[from] TxError),
    #[error("the catalogue's database refused a statement")]
    Statement(#[from] sqlx::Error),
    #[error("the database URL cannot be understood")]
    Url(#[source] sqlx::Error),
    #[error(
        "this database holds the catalogue of another directory (its mark is {found}, DIR has {expected}); give the right --database"
    )]
    Foreign { found: String, expected: String },
    #[error("the catalogue is no longer written: {cause}")]
    Stopped { cause: String, disk_full: bool },
}

impl CatalogueError {
    /// Whether the disk below an SQLite catalogue has no room left.
    pub(crate) fn is_disk_full(&self) -> bool {
        let error = match self {
            Self::Stopped { disk_full, .. } => return *disk_full,
            Self::Statement(error) => Some(error),
            Self::Database(error) => error.as_sqlx(),
            _ => None,
        };
        let code = error.and_then(|error| error.as_database_error()).and_then(|error| error.code());
        // The low byte of SQLite's code is the kind: 10 is SQLITE_IOERR, 13 is SQLITE_FULL. PostgreSQL's has five places.
        code.filter(|code| code.len() != 5)
            .and_then(|code| code.parse::<u32>().ok())
            .is_some_and(|code| matches!(code & 0xff, 10 | 13))
    }
}

struct Job {
    change: Change,
    done: oneshot::Sender<Result<(), CatalogueError>>,
}

/// The end of the catalogue that fetches hold.
#[derive(Debug, Clone)]
pub(crate) struct Catalogue {
    jobs: mpsc::Sender<Job>,
    pending: Pending,
}

/// What is intended and not yet known to be done, by URL.
type Pending = Arc<Mutex<BTreeMap<String, Row>>>;

/// The end that writes: ends when every [`Catalogue`] is dropped.
pub(crate) type Writer = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A catalogue that has been opened.
pub(crate) struct Opened {
    pub(crate) catalogue: Catalogue,
    pub(crate) writer: Writer,
    pub(crate) rows: Vec<Row>,
    /// It bears no mark yet: settling gives it one.
    pub(crate) is_new: bool,
}

impl Catalogue {
    /// Opens or creates the catalogue, and reads it.
    pub(crate) async fn open(database: Option<&str>, dir: &Path, mark: &str) -> Result<Opened, CatalogueError> {
        match database {
            Some(url) if !url.starts_with("sqlite:") => {
                let options = PgConnectOptions::from_str(url).map_err(CatalogueError::Url)?;
                let pool = TxPool::<Postgres>::builder().max_connections(2).connect_with(options).await?;
                Store::open(pool, mark).await
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
                Store::open(pool, mark).await
            }
        }
    }

    /// What is intended and not yet known to be done, by this run and by those before.
    pub(crate) fn pending(&self) -> Vec<Row> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Applies one change; `Ok` means that it is committed. Dropped, the change may still be applied.
    pub(crate) async fn apply(&self, change: Change) -> Result<(), CatalogueError> {
        let (done, outcome) = oneshot::channel();
        let stopped = || CatalogueError::Stopped { cause: "its writer has ended".to_owned(), disk_full: false };
        self.jobs.send(Job { change, done }).await.map_err(|_| stopped())?;
        outcome.await.map_err(|_| stopped())?
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
    async fn open(pool: TxPool<DB>, mark: &str) -> Result<Opened, CatalogueError> {
        let mut tx = pool.begin().await?;
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
        let select = sqlx::AssertSqlSafe(format!("SELECT {COLUMNS} FROM files ORDER BY url"));
        let rows: Vec<Columns> = sqlx::query_as(select).fetch_all(&mut *tx).await?;
        let select = sqlx::AssertSqlSafe(format!("SELECT {COLUMNS} FROM pending ORDER BY url"));
        let pending: Vec<Columns> = sqlx::query_as(select).fetch_all(&mut *tx).await?;
        tx.commit().await?;
        let pending = pending.into_iter().map(Row::from).map(|row| (row.url.clone(), row)).collect();
        let (jobs, waiting) = mpsc::channel(MAX_BATCH);
        let catalogue = Catalogue { jobs, pending: Arc::new(Mutex::new(pending)) };
        let writer = Box::pin(Self { pool }.write(waiting, Arc::clone(&catalogue.pending)));
        Ok(Opened { catalogue, writer, rows: rows.into_iter().map(Row::from).collect(), is_new: found.is_none() })
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
                // Here and not where the change was asked for: that future may have been dropped meanwhile.
                if told.is_ok() {
                    let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
                    match change {
                        Change::Intend(row) => drop(pending.insert(row.url.clone(), *row)),
                        Change::Put(row) => drop(pending.remove(&row.url)),
                        Change::Forget(url) => drop(pending.remove(&url)),
                        Change::Delete(_) | Change::Mark(_) => {}
                    }
                }
                // A fetch that was dropped meanwhile does not ask any more.
                let _dropped = done.send(told);
            }
            if outcome.is_err() {
                // Whoever comes now is refused at once instead of waiting for a database that is gone.
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
            // SQLite gives a transaction up by itself where its disk has no room, and says so of COMMIT in no other way.
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
            if !gone.is_empty() {
                let mut delete = QueryBuilder::<DB>::new(format!("DELETE FROM {table} WHERE url IN ("));
                let mut urls = delete.separated(", ");
                for url in gone {
                    urls.push_bind(url.clone());
                }
                delete.push(")");
                delete.build().execute(&mut *tx).await?;
            }
            let rows: Vec<&Row> = rows.into_values().flatten().collect();
            if !rows.is_empty() {
                upsert::<DB>(table, rows).build().execute(&mut *tx).await?;
            }
        }
        tx.commit().await?;
        Ok(())
    }
}

fn upsert<DB>(table: &str, rows: Vec<&Row>) -> QueryBuilder<DB>
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
