//! The catalogue: a record of the files on disk, in SQLite or PostgreSQL. One writer puts all waiting changes into one
//! transaction.
//!
//! A row exists only when its file is durable. Before a file is replaced, its next row is recorded as pending beside
//! the present one, so that however the process ends, the digest of the file says which of the two is true. Changes are
//! acknowledged after their COMMIT. No change waits for a batch to fill, because the writer starts as soon as the last
//! transaction is done, with the changes that have come in meanwhile.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use cancel_safe::tx_guard::TxError;
use futures_util::{StreamExt, TryStreamExt};
use tokio::sync::{mpsc, oneshot};

/// The most changes in one transaction. Each is of a URL whose fetch is under way, or of one that is settled or flushed.
pub(crate) const MAX_BATCH: usize = 512;

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

/// One step of the catalogue.
#[derive(Debug)]
pub(crate) enum Change {
    /// The file is about to become this one. Its present row stays until [`Change::Put`].
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

/// A change, and the sender that answers its caller.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) change: Change,
    pub(crate) done: oneshot::Sender<Result<(), CatalogueError>>,
}

/// The handle to the catalogue that fetches hold.
#[derive(Clone)]
pub(crate) struct Catalogue {
    jobs: mpsc::Sender<Job>,
    rows: Arc<dyn Rows>,
    pending: Pending,
}

/// Intended changes that are not yet known to be done, by URL.
pub(crate) type Pending = Arc<Mutex<BTreeMap<String, Row>>>;

/// Reads the rows of a catalogue.
pub(crate) trait Rows: Send + Sync {
    /// The rows whose URLs come after `url`, some of them, in the order of the database.
    fn after(&self, url: Option<String>) -> Read<'_, Vec<Row>>;

    /// The row of a URL.
    fn of(&self, url: String) -> Read<'_, Option<Row>>;
}

/// A read in progress.
pub(crate) type Read<'a, T> = Pin<Box<dyn Future<Output = Result<T, CatalogueError>> + Send + 'a>>;

impl Catalogue {
    /// A catalogue that reads with `rows` and writes through `jobs`.
    pub(crate) fn new(jobs: mpsc::Sender<Job>, rows: Arc<dyn Rows>, pending: Pending) -> Self {
        Self { jobs, rows, pending }
    }

    /// The rows whose URLs come after `url`, some of them, in the order of the database; none at its end.
    pub(crate) async fn after(&self, url: Option<String>) -> Result<Vec<Row>, CatalogueError> {
        self.rows.after(url).await
    }

    /// The row of a URL.
    pub(crate) async fn row(&self, url: &str) -> Result<Option<Row>, CatalogueError> {
        self.rows.of(url.to_owned()).await
    }

    /// Intended changes that are not yet known to be done, from this run and earlier ones.
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

    /// Applies many changes; all that are waiting go into one transaction. Dropped, any of them may still be applied.
    pub(crate) async fn apply_all(&self, changes: Vec<Change>) -> Result<(), CatalogueError> {
        let applied = futures_util::stream::iter(changes).map(|change| self.apply(change)).buffered(MAX_BATCH);
        applied.try_collect().await
    }
}
