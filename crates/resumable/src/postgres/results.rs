//! The results of a job, read back in the order of the input.
//!
//! Invariant: a range is read as it was at one moment, and each of its blocks is checked; an incomplete job is an
//! error, after all its results.

use std::{
    collections::VecDeque,
    fmt,
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_core::Stream;
use futures_util::{
    TryStreamExt,
    stream::{self, StreamExt},
};
use serde::de::DeserializeOwned;
use sqlx::Row;

use crate::{
    codec::Codec,
    error::TaskError,
    item::{Done, Quarantined},
    log::{Header, Kind},
    postgres::{
        PgStore, job,
        ledger::{Known, Ledger, failure},
        place, schema,
        schema::{Unusable, quoted},
        session::{Tx, statement},
    },
};

/// The most ranges to read at once.
const RANGES: i64 = 16;
/// After this many bytes, the remaining ranges wait for the next read.
const PAGE_BYTES: i64 = 16 << 20;

/// The recorded items of a job, in the order of the input: see [`PgStore::results`].
#[must_use = "a stream does nothing unless polled"]
pub struct PgResults<R> {
    stream: Pin<Box<dyn Stream<Item = Result<Done<R>, TaskError>> + Send>>,
}

impl<R> fmt::Debug for PgResults<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PgResults").finish_non_exhaustive()
    }
}

impl<R> Stream for PgResults<R> {
    type Item = Result<Done<R>, TaskError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.stream.poll_next_unpin(cx)
    }
}

impl PgStore {
    /// Reads a job's recorded items, in the order of the input, and checks each block.
    ///
    /// You can read while workers are running. Unfinished items are left out, and then the stream ends with
    /// [`TaskError::Incomplete`]; any other error ends it too. Up to 16 ranges are in memory at a time: 16,000 items by
    /// default, and if they are large, 16 MiB plus one range.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use cancel_safe_resumable::{PgStore, TaskError};
    /// # use futures_util::TryStreamExt;
    /// # async fn read(store: PgStore) -> Result<(), TaskError> {
    /// let mut results = store.results::<u64>("crawl");
    /// while let Some(done) = results.try_next().await? {
    ///     println!("{}: {:?}", done.index, done.result);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn results<R: DeserializeOwned + Send + 'static>(&self, job: impl Into<String>) -> PgResults<R> {
        let reader = Reader::<R> {
            store: self.clone(),
            name: job.into(),
            job: None,
            next: 0,
            items: VecDeque::new(),
            done: 0,
            is_over: false,
            of: PhantomData,
        };
        PgResults { stream: Box::pin(stream::unfold(reader, Reader::step)) }
    }
}

struct Reader<R> {
    store: PgStore,
    name: String,
    job: Option<Arc<job::Job>>,
    /// The number of the next range.
    next: i64,
    items: VecDeque<Done<R>>,
    done: usize,
    is_over: bool,
    of: PhantomData<fn() -> R>,
}

/// A range as stored in the database.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) n: i64,
    first: i64,
    count: i32,
    seq: i32,
    finished: bool,
    pub(crate) blocks: Vec<u8>,
    /// How many rows the blocks came in.
    pub(crate) rows: i32,
}

impl<R: DeserializeOwned> Reader<R> {
    async fn step(mut self) -> Option<(Result<Done<R>, TaskError>, Self)> {
        loop {
            if let Some(done) = self.items.pop_front() {
                self.done += 1;
                return Some((Ok(done), self));
            }
            if self.is_over {
                return None;
            }
            if let Err(error) = self.load().await {
                self.is_over = true;
                return Some((Err(error), self));
            }
        }
    }

    async fn load(&mut self) -> Result<(), TaskError> {
        let job = match &self.job {
            Some(job) => Arc::clone(job),
            None => {
                let job = self.store.patiently("find the job", || find(&self.store, &self.name)).await?;
                Arc::clone(self.job.insert(Arc::new(job)))
            }
        };
        let next = self.next;
        let ranges = self.store.patiently("read results", || read(&self.store, job.id, next, PAGE_BYTES)).await?;
        if let Some(last) = ranges.last() {
            self.next = last.n + 1;
        } else {
            self.is_over = true;
            if self.done < job.total {
                let path = place(&self.store.schema, &self.name);
                return Err(TaskError::Incomplete { path, done: self.done, total: job.total });
            }
        }
        for range in ranges {
            self.enter(&job.header, range)?;
        }
        Ok(())
    }

    /// Checks a range and takes its items.
    fn enter(&mut self, header: &Header, range: Stored) -> Result<(), TaskError> {
        let Stored { n, first, count, seq, finished, blocks, rows } = range;
        let path = place(&self.store.schema, &format!("{}/{n}", self.name));
        let damaged = |detail| TaskError::Corrupt { path: path.clone(), offset: 0, detail };
        let (Ok(first), Ok(count)) = (usize::try_from(first), usize::try_from(count)) else {
            return Err(damaged("the range is not one that this crate has made"));
        };
        if rows != seq {
            return Err(damaged("blocks of the range are missing"));
        }
        let Some(codec) = Codec::of_number(header.codec) else {
            return Err(damaged("its codec is not one that this program has"));
        };
        let mut ledger = Ledger::new(header.salt, n, count);
        let mut items: Vec<Option<Result<Done<R>, TaskError>>> = (0..count).map(|_| None).collect();
        let sealed = ledger.read(first as u64, header.identity, &blocks, &path, |record| {
            let index = first + record.at;
            let done =
                |attempts, result| Done { index, key: record.key.map(Arc::from), restored: true, attempts, result };
            let entered = match record.kind {
                Kind::Result => {
                    let failed = |cause| TaskError::unread::<R>(codec, index, record.payload, cause);
                    Some(codec.decode(record.payload).map(|result| done(0, Ok(result))).map_err(failed))
                }
                Kind::Quarantine => failure(record.payload).map(|(attempts, cause)| {
                    Ok(done(attempts, Err(Quarantined { attempts, cause, uncertain: false })))
                }),
                _ => None,
            };
            if let (Some(slot), Some(entered)) = (items.get_mut(record.at), entered) {
                *slot = Some(entered);
            }
        })?;
        let is_whole = sealed && ledger.items.iter().all(|item| matches!(item, Known::Result | Known::Quarantined));
        if finished != is_whole {
            return Err(damaged("a finished range does not end with its seal"));
        }
        for item in items.into_iter().flatten() {
            self.items.push_back(item?);
        }
        Ok(())
    }
}

async fn find(store: &PgStore, name: &str) -> Result<job::Job, Unusable> {
    const NO_JOB: TaskError = TaskError::Config("there is no job of this name in the store");
    if !schema::exists(&store.pool, &store.bounds(), &store.schema).await? {
        return Err(Unusable::Refused(NO_JOB));
    }
    let mut tx = Tx::begin(&store.pool, &store.bounds()).await?;
    let found = job::read(&mut tx, &store.schema, name).await?;
    tx.commit().await?;
    found.map(|found| found.job).ok_or(Unusable::Refused(NO_JOB))
}

/// Reads some ranges with their blocks in one statement, so that each range is as it was at one moment.
///
/// Each block comes as a row of its own: a value made of all blocks could exceed the server's limit of a gigabyte.
pub(crate) async fn read(store: &PgStore, job: i64, from: i64, page_bytes: i64) -> Result<Vec<Stored>, sqlx::Error> {
    let s = quoted(&store.schema);
    let select = format!(
        "WITH next AS (SELECT n, first, count, seq, finished,
                sum(bytes) OVER (ORDER BY n ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS bytes_before
            FROM {s}.range r, LATERAL (SELECT coalesce(sum(octet_length(body)), 0) AS bytes
                FROM {s}.block b WHERE b.job = r.job AND b.n = r.n) blocks
            WHERE r.job = $1 AND r.n >= $2 AND r.n < $3)
        SELECT next.n, first, count, next.seq, finished, body
        FROM next LEFT JOIN {s}.block b ON b.job = $1 AND b.n = next.n
        WHERE bytes_before IS NULL OR bytes_before < $4 ORDER BY next.n, b.seq"
    );
    let mut tx = Tx::begin(&store.pool, &store.bounds()).await?;
    let select = statement(&select.into()).bind(job).bind(from).bind(from + RANGES).bind(page_bytes);
    let mut ranges: Vec<Stored> = Vec::new();
    let mut rows = select.fetch(tx.connection()?);
    while let Some(row) = rows.try_next().await? {
        let n = row.try_get(0)?;
        if ranges.last().is_none_or(|last| last.n != n) {
            let (first, count, seq, finished) = (row.try_get(1)?, row.try_get(2)?, row.try_get(3)?, row.try_get(4)?);
            ranges.push(Stored { n, first, count, seq, finished, blocks: Vec::new(), rows: 0 });
        }
        if let (Some(range), Some(body)) = (ranges.last_mut(), row.try_get::<Option<&[u8]>, _>(5)?) {
            range.blocks.extend_from_slice(body);
            range.rows += 1;
        }
    }
    drop(rows);
    tx.commit().await?;
    Ok(ranges)
}
