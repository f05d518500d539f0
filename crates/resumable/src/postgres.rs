//! Many workers, on any number of machines, share one job in a PostgreSQL.
//!
//! Invariant: a result is recorded by the worker that holds its range, and by no other: each append tests the epoch of the
//! range under the lock of its row. What is recorded are the blocks of a checkpoint file.

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

/// The longest name of a schema in PostgreSQL; a longer one would be cut.
const LONGEST_NAME_BYTES: usize = 63;

/// A job in a PostgreSQL that any number of processes on any number of machines share.
///
/// Each worker has the whole input, and the same one. It claims ranges of it under a lease, renews the leases while it
/// lives, and records results in blocks; a worker that was frozen or cut off past its lease loses its ranges to others and
/// cannot write to them any more ([`TaskError::Fenced`](crate::TaskError::Fenced)). An item is handed out by the worker that ran it, once its result
/// is durable, and so by one worker only. A run ends when the whole job is complete.
///
/// The tables are made in a schema of their own, `resumable` by default, and nothing else is touched. It works behind a
/// pooler in transaction mode, such as PgBouncer: nothing needs a session, and no statement has a name.
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
/// | the run is dropped | the same, in a moment, by a task on the runtime |
/// | the process is killed, or its runtime shut down | all but the last [interval](crate::Builder::checkpoint_every); its ranges are taken over when the lease is over |
/// | the process is frozen past its lease | others take over; when it comes back it records nothing, and ends as `Fenced` |
/// | the server crashes, or the network breaks | the run waits, up to [`outage`](Self::outage); an append whose answer was lost is looked up by its block |
/// | the server, or the way to it, goes silent | after [`answer_within`](Self::answer_within) the same |
/// | another version, codec or input | an error of that worker; nothing is changed |
/// | a block that is missing, damaged, doubled or moved | [`TaskError::Corrupt`](crate::TaskError::Corrupt) |
///
/// Durable means what the database means by it: with `synchronous_commit = off` a crash of the server may lose the last
/// commits, and then the items they recorded run again.
///
/// # For operators
///
/// `SELECT * FROM resumable.progress` has a line a job: items, those that are done and in quarantine, ranges, those that
/// are finished, leased, lapsed (held by nobody that lives), and how often one was taken over. This shows who works on what:
///
/// ```sql
/// SELECT r.n, r.owner, r.epoch, r.done, r.count, r.lease_until - clock_timestamp() AS left
/// FROM resumable.range r JOIN resumable.job j ON j.id = r.job
/// WHERE j.name = 'crawl' AND NOT r.finished AND r.owner IS NOT NULL ORDER BY r.n;
/// ```
///
/// `UPDATE resumable.range SET lease_until = NULL WHERE owner LIKE 'pid 4711 %' AND NOT finished` takes the ranges of a
/// worker that is known to be dead from it at once; if it is not dead, it is fenced. `DELETE FROM resumable.job WHERE
/// name = 'crawl'` removes a job with all it has. A role needs `USAGE` on the schema and `SELECT, INSERT, UPDATE` on its
/// tables, and `CREATE` on the database for the first start alone.
///
/// # Limitations
///
/// - The input is in memory as a whole, and is fixed: no worker may have more items, or others. By
///   [key](crate::Builder::key), too, it has to be the same keys in the same order.
/// - [`ordered`](crate::Builder::ordered), [`at_most_once`](crate::Builder::at_most_once),
///   [`parallel`](crate::Builder::parallel), [`checkpoint_every_items`](crate::Builder::checkpoint_every_items),
///   [`revalidate`](crate::Builder::revalidate) and [`retry_quarantined`](crate::Builder::retry_quarantined) are refused.
/// - A mismatch of the input names the range, not the item. The limit of the quarantine counts for the whole job. If
///   several workers reach it in the same second, it is exceeded by a few items.
/// - It needs tokio's runtime, with its drivers of time and of input and output.
/// - A run that is not polled keeps its leases while its runtime lives: poll it, or drop it.
/// - A cancel waits for what is completed to be recorded; if the database is away, as long as the outage.
/// - One transaction appends a range's results: a single result has at most 256 MiB.
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
    /// A store on the connections of a pool. A run takes one at a time.
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

    /// Sets the schema of the tables, at most 63 bytes. It is made if it is missing, and must hold nothing else. Default:
    /// `resumable`.
    pub fn schema(mut self, name: impl Into<String>) -> Self {
        self.schema = name.into().into();
        self
    }

    /// Sets how many items are claimed together. Default: 1,000.
    ///
    /// Fewer items share slow work more evenly; more items cost fewer transactions. One transaction takes as long as a few
    /// hundred trivial items.
    /// The first worker of a job decides.
    pub fn range_items(mut self, items: usize) -> Self {
        self.range_items = items;
        self
    }

    /// Sets how long a range is held without a sign of life. Default: 30 s.
    ///
    /// Leases are renewed each third of it, by the clock of the server. After a crash others take over when it is over;
    /// after an orderly end, or a drop, at once.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// Sets for how long the database may be away before the run ends with [`TaskError::Database`](crate::TaskError::Database). Default: 60 s.
    pub fn outage(mut self, outage: Duration) -> Self {
        self.outage = outage;
        self
    }

    /// Sets how long the server may take to answer to a statement of this crate, among them the `BEGIN` and the `COMMIT` of
    /// an item's transaction. Default: 30 s.
    ///
    /// A server that vanishes without a word, behind a pulled cable, ends no connection. After this time the connection is
    /// closed, which counts as an [`outage`](Self::outage); a `COMMIT` that was sent is looked up over
    /// another. Choose it longer than a commit with its deferred constraints takes.
    pub fn answer_within(mut self, answer: Duration) -> Self {
        self.answer_within = answer;
        self
    }

    /// Sets the name that the tables show for this worker. Each run adds a number of its own, so that two of one name are
    /// told apart. Default: the process id.
    pub fn owner(mut self, name: impl Into<String>) -> Self {
        self.owner = name.into().into();
        self
    }

    /// Sets how many ranges a run may lose to other workers before it ends with [`TaskError::Fenced`](crate::TaskError::Fenced). Default: 0.
    ///
    /// The other workers record what this one loses, once. Raise it where nobody restarts a worker that was frozen, so that
    /// the worker goes on by itself.
    pub fn tolerate_lost(mut self, ranges: u32) -> Self {
        self.tolerated = ranges;
        self
    }

    /// What is wrong with the settings.
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

    /// Half a lease: a worker that is frozen in a transaction does not hold its rows for longer than its lease.
    pub(crate) fn bounds(&self) -> Bounds {
        Bounds::new(self.lease / 2)
    }

    pub(crate) fn heartbeat_every(&self) -> Duration {
        self.lease / 3
    }

    /// How soon to look whether a range of another has become free; not all workers at the same time.
    pub(crate) fn look_again(&self) -> Duration {
        let wait = (self.lease / 8).clamp(Duration::from_millis(20), Duration::from_secs(1));
        wait.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

/// How errors name a job, or what is in one.
pub(crate) fn place(schema: &str, name: &str) -> PathBuf {
    PathBuf::from(format!("postgres:{schema}/{name}"))
}
