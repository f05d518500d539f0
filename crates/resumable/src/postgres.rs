//! Many workers, on any number of machines, share one job in a PostgreSQL database.
//!
//! Invariant: only the worker that holds a range records its results: each append tests the epoch of the range under
//! the lock of its row. The recorded blocks are those of a checkpoint file.

use std::{path::PathBuf, sync::Arc, time::Duration};

use sqlx::PgPool;

use self::session::Bounds;

pub use self::results::PgResults;

pub(crate) mod drive;
mod input;
mod job;
mod keeper;
mod leases;
mod ledger;
mod queue;
mod range;
mod results;
mod schema;
mod session;
mod shared;
mod transaction;
pub(crate) mod transactional;
mod waiting;

#[cfg(test)]
mod dropped;
#[cfg(test)]
mod tests;

/// The longest schema name in PostgreSQL, which truncates longer ones.
const LONGEST_NAME_BYTES: usize = 63;

/// A job in a PostgreSQL database that any number of processes on any number of machines share.
///
/// Each worker has the whole input, and all have the same input. A worker claims ranges of it under a lease, renews the
/// leases while it lives, and records results in blocks. A worker that was frozen or cut off past its lease loses its
/// ranges to others and cannot write to them any more ([`TaskError::Fenced`](crate::TaskError::Fenced)). The worker
/// that ran an item hands it out, once its result is durable; no other worker does. A run ends when the whole job is
/// complete.
///
/// It creates its tables in a schema of their own, `resumable` by default, and touches nothing else. It works behind a
/// pooler in transaction mode, such as PgBouncer: nothing needs a session, and no statement is named.
///
/// ```no_run
/// use cancel_safe_resumable::{PgStore, ResumableTask};
/// use futures_util::StreamExt;
/// use sqlx::postgres::PgPoolOptions;
///
/// # async fn work(urls: Vec<String>) -> Result<(), Box<dyn std::error::Error>> {
/// // The same program on each machine.
/// let pool = PgPoolOptions::new().connect("postgres://jobs@db/jobs").await?;
/// let store = PgStore::new(pool);
/// let mut run = ResumableTask::builder("crawl")
///     .store(store.clone())
///     .concurrency(64)
///     .stream(urls, |_, url: String| async move { Ok(url.len()) });
/// while let Some(done) = run.next().await {
///     println!("this worker has done item {}", done.index);
/// }
/// run.finish().await?; // the whole job is complete
/// let mut all = store.results::<usize>("crawl"); // in the order of the input
/// # drop(all.next().await);
/// # Ok(())
/// # }
/// ```
///
/// # What is left behind
///
/// | event | what is left behind |
/// |---|---|
/// | the token fires | everything completed is recorded and the ranges are given back when the call returns |
/// | the run is dropped | the same, in a moment; a task on the runtime does it |
/// | the process is killed, or its runtime shut down | all but the last [interval](crate::Builder::checkpoint_every); others take over its ranges when the lease is over |
/// | the process is frozen past its lease | others take over; when it comes back it records nothing, and ends as `Fenced` |
/// | the server crashes, or the network breaks | the run waits, up to [`outage`](Self::outage); an append whose answer was lost is looked up by its block |
/// | the server, or the way to it, goes silent | after [`answer_within`](Self::answer_within) the same |
/// | another version, codec or input | that worker gets an error; nothing is changed |
/// | a block that is missing, damaged, doubled or moved | [`TaskError::Corrupt`](crate::TaskError::Corrupt) |
///
/// "Durable" means what the database guarantees: with `synchronous_commit = off`, a server crash may lose the last
/// commits, and then the items they recorded run again.
///
/// # For operators
///
/// `SELECT * FROM resumable.progress` has a row for each job: how many items it has, how many are done and in
/// quarantine, how many ranges, how many of them are finished, leased or lapsed (no live worker holds them), and how
/// often a range was taken over. This query shows which worker has which range:
///
/// ```sql
/// SELECT r.n, r.owner, r.epoch, r.done, r.count, r.lease_until - clock_timestamp() AS left
/// FROM resumable.range r JOIN resumable.job j ON j.id = r.job
/// WHERE j.name = 'crawl' AND NOT r.finished AND r.owner IS NOT NULL ORDER BY r.n;
/// ```
///
/// `UPDATE resumable.range SET lease_until = NULL WHERE owner LIKE 'pid 4711 %' AND NOT finished` frees at once the
/// ranges of a worker that you know to be dead; if it is not dead, it is fenced. `DELETE FROM resumable.job WHERE name
/// = 'crawl'` removes a job with all its records. A role needs `USAGE` on the schema and `SELECT, INSERT, UPDATE` on
/// its tables, and `CREATE` on the database only for the first start.
///
/// # Limitations
///
/// - The whole input is in memory, and is fixed: no worker may have more items, or other items. With
///   [keys](crate::Builder::key), too, all workers need the same keys in the same order.
/// - [`ordered`](crate::Builder::ordered), [`at_most_once`](crate::Builder::at_most_once),
///   [`parallel`](crate::Builder::parallel), [`checkpoint_every_items`](crate::Builder::checkpoint_every_items),
///   [`revalidate`](crate::Builder::revalidate) and [`retry_quarantined`](crate::Builder::retry_quarantined) are refused.
/// - A mismatch of the input names the range, not the item. The quarantine limit counts for the whole job. If several
///   workers reach it in the same second, it is exceeded by a few items.
/// - It needs a tokio runtime with the time and I/O drivers.
/// - A run that is not polled keeps its leases while its runtime lives: poll it, or drop it.
/// - A cancel waits until completed results are recorded; if the database is unreachable, for as long as the outage.
/// - One transaction appends a range's results, so a single result has at most 256 MiB.
#[derive(Clone, Debug)]
#[must_use = "a store does nothing by itself: give it to `Builder::store`"]
pub struct PgStore {
    pub(crate) pool: PgPool,
    pub(crate) schema: Arc<str>,
    pub(crate) range_items: usize,
    pub(crate) lease: Duration,
    pub(crate) outage: Duration,
    pub(crate) answer_within: Duration,
    pub(crate) owner: Arc<str>,
    pub(crate) tolerated: u32,
}

impl PgStore {
    /// Creates a store on a connection pool. A run takes one connection at a time.
    pub fn new(pool: PgPool) -> Self {
        Self {
            pool,
            schema: "resumable".into(),
            range_items: 1000,
            lease: Duration::from_secs(30),
            outage: Duration::from_secs(60),
            answer_within: Duration::from_secs(30),
            owner: format!("pid {}", std::process::id()).into(),
            tolerated: 0,
        }
    }

    /// Sets the schema of the tables, at most 63 bytes. It is created if it is missing, and must hold nothing else.
    /// Default: `resumable`.
    pub fn schema(mut self, name: impl Into<String>) -> Self {
        self.schema = name.into().into();
        self
    }

    /// Sets how many items are claimed together. Default: 1,000.
    ///
    /// Fewer items share slow work more evenly; more items cost fewer transactions. One transaction takes as long as a
    /// few hundred trivial items. The setting of a job's first worker counts.
    pub fn range_items(mut self, items: usize) -> Self {
        self.range_items = items;
        self
    }

    /// Sets how long a range is held without a sign of life. Default: 30 s.
    ///
    /// A worker renews its leases every third of this time, by the server's clock. After a crash others take over when
    /// the lease is over; after an orderly end, or a drop, at once.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// Sets how long the database may be unreachable before the run ends with
    /// [`TaskError::Database`](crate::TaskError::Database). Default: 60 s.
    pub fn outage(mut self, outage: Duration) -> Self {
        self.outage = outage;
        self
    }

    /// Sets how long the server may take to answer a statement of this crate, including the `BEGIN` and `COMMIT` of an
    /// item's transaction. Default: 30 s.
    ///
    /// A server that vanishes without a word, behind a pulled cable, ends no connection. After this time the run closes
    /// the connection, which counts as an [`outage`](Self::outage), and looks up a `COMMIT` that was sent over another
    /// connection. Choose it longer than a commit with its deferred constraints takes.
    pub fn answer_within(mut self, answer: Duration) -> Self {
        self.answer_within = answer;
        self
    }

    /// Sets the name that the tables show for this worker. Each run adds its own number, so that two runs of one name
    /// can be told apart. Default: the process id.
    pub fn owner(mut self, name: impl Into<String>) -> Self {
        self.owner = name.into().into();
        self
    }

    /// Sets how many ranges a run may lose to other workers before it ends with [`TaskError::Fenced`](crate::TaskError::Fenced). Default: 0.
    ///
    /// The other workers record, once, what this one loses. Raise it if nothing restarts a frozen worker, so that the
    /// worker continues by itself.
    pub fn tolerate_lost(mut self, ranges: u32) -> Self {
        self.tolerated = ranges;
        self
    }

    /// What is wrong with the settings, if anything.
    pub(crate) fn mistake(&self) -> Option<&'static str> {
        let mistakes = [
            (self.range_items == 0, "a range of 0 items would never end"),
            (self.range_items > 1 << 24, "a range has at most 16,777,216 items"),
            (self.lease < Duration::from_millis(100), "a lease of less than 100 ms would be over before it is renewed"),
            (
                self.lease > Duration::from_secs(86_400),
                "a lease of more than a day would hold a crashed worker's ranges for as long",
            ),
            (self.answer_within.is_zero(), "no server answers within no time"),
            (self.schema.is_empty(), "a schema has a name"),
            (self.schema.len() > LONGEST_NAME_BYTES, "the name of a schema has at most 63 bytes"),
            (self.schema.contains('\0'), "the name of a schema has no NUL"),
        ];
        mistakes.iter().find(|(is_made, _)| *is_made).map(|(_, mistake)| *mistake)
    }

    /// Half a lease, so that a worker that is frozen in a transaction does not hold its rows for longer than its lease.
    pub(crate) fn bounds(&self) -> Bounds {
        Bounds::new(self.lease / 2)
    }

    pub(crate) fn heartbeat_every(&self) -> Duration {
        self.lease / 3
    }

    /// How soon to look whether another worker's range has become free. It is random, so that not all workers look at
    /// the same time.
    pub(crate) fn look_again(&self) -> Duration {
        let wait = (self.lease / 8).clamp(Duration::from_millis(20), Duration::from_secs(1));
        wait.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

/// The name of a job in errors.
pub(crate) fn place(schema: &str, name: &str) -> PathBuf {
    PathBuf::from(format!("postgres:{schema}/{name}"))
}
