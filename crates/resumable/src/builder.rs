//! The options of a run, each with its default and its limit.
//!
//! Invariant: contradictory options are refused before anything is opened.

use std::{fmt, path::PathBuf, time::Duration};

use futures_core::Stream;
use futures_util::{StreamExt, stream};
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    codec::Codec,
    drive::Drive,
    error::TaskError,
    item::{ItemContext, ItemError, Retry},
    plan::Plan,
    progress::Progress,
    run::{Run, caught},
    spawned::spawn,
    store::FileStore,
    stores::{Kind, Store},
};
#[cfg(feature = "postgres")]
use crate::{
    drive::Summary,
    postgres::{
        PgStore,
        drive::{PgDrive, Running},
        transactional,
    },
};

/// The default version of a computation.
pub(crate) const FIRST_VERSION: &str = "1";

/// The options of a run over a stream of items. Every option except [`store`](Self::store) has a default.
#[must_use = "nothing is opened and nothing runs before `stream`"]
pub struct Builder<T, R> {
    plan: Plan<T, R>,
    #[cfg(feature = "postgres")]
    postgres: Option<Box<PgStore>>,
}

impl<T, R> fmt::Debug for Builder<T, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder").field("job", &self.plan.job).field("store", &self.plan.store).finish_non_exhaustive()
    }
}

impl<T, R> Builder<T, R> {
    pub(crate) fn new(job: String) -> Self {
        Self {
            plan: Plan {
                job,
                version: FIRST_VERSION.to_owned(),
                accepted: Vec::new(),
                store: FileStore::at(PathBuf::new()),
                codec: Codec::default(),
                every: Duration::from_millis(100),
                every_items: u64::MAX,
                key: None,
                revalidate: None,
                concurrency: 1,
                parallel: false,
                max_ahead: 1024,
                ordered: false,
                at_most_once: false,
                retry: Retry::none(),
                max_defers: 100,
                quarantine: 0,
                retry_quarantined: false,
                token: CancellationToken::new(),
                grace: Duration::ZERO,
            },
            #[cfg(feature = "postgres")]
            postgres: None,
        }
    }

    /// Sets where the results are kept: in a [`FileStore`], or with feature `postgres` in a `PgStore`. There is no default.
    pub fn store(mut self, store: impl Into<Store>) -> Self {
        match store.into().0 {
            Kind::File(store) => self.plan.store = store,
            #[cfg(feature = "postgres")]
            Kind::Postgres(store) => self.postgres = Some(store),
        }
        self
    }

    /// Sets the version of the computation: change it when the same item would now give another result, or a result of
    /// another type. The name of the type does not count: it may be moved and renamed. Default: `1`.
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.plan.version = version.into();
        self
    }

    /// Accepts a checkpoint of another version whose results are still right and still readable. The file keeps its
    /// version, so accept it as long as the file lives. Default: none is accepted.
    pub fn accept_version(mut self, version: impl Into<String>) -> Self {
        self.plan.accepted.push(version.into());
        self
    }

    /// Recognises items by a key instead of their position, so that items may be inserted, removed, reordered and
    /// edited between runs; each key must occur once. Default: by position, verified by a fingerprint.
    pub fn key(mut self, key: impl Fn(&T) -> String + Send + 'static) -> Self {
        self.plan.key = Some(Box::new(key));
        self
    }

    /// Sets how many items run at once, all in the task that polls the run. Use it for items that wait. Default: 1.
    pub fn concurrency(mut self, items: usize) -> Self {
        (self.plan.concurrency, self.plan.parallel) = (items, false);
        self
    }

    /// Runs up to `items` items at once, each in its own task on tokio's runtime. Use it for items that compute, to use
    /// all cores. Default: items run in the task that polls, and [`concurrency`](Self::concurrency) limits them.
    ///
    /// The tasks go on while the run is not polled; their results are recorded when it is. When the run ends, every
    /// task has ended: if the token or an error cuts a task, the run aborts it and waits for it. A dropped run aborts
    /// its tasks, and the checkpoint stays locked until the last one has ended, so that nothing runs beside a
    /// successor. A task ends at its next await: a long computation should make one now and then
    /// (`tokio::task::yield_now`). A `PgStore` refuses this.
    pub fn parallel(mut self, items: usize) -> Self {
        (self.plan.concurrency, self.plan.parallel) = (items, true);
        self
    }

    /// Sets how many items may be held in memory besides the running ones: waiting for a retry, deferred, or finished and
    /// waiting for an earlier item. At this limit no new item is read. Default: 1024.
    pub fn max_ahead(mut self, items: usize) -> Self {
        self.plan.max_ahead = items;
        self
    }

    /// Hands out the items in the order of the input. Default: as they finish.
    pub fn ordered(mut self) -> Self {
        self.plan.ordered = true;
        self
    }

    /// Sets how often and how soon a failed item is tried again. Default: [`Retry::none`].
    pub fn retry(mut self, retry: Retry) -> Self {
        self.plan.retry = retry;
        self
    }

    /// Sets how often an item may be deferred in a run before a deferral counts as a failed attempt. Default: 100.
    pub fn max_defers(mut self, times: u32) -> Self {
        self.plan.max_defers = times;
        self
    }

    /// Starts an item only once a durable record says that it will, so that no item is silently started twice. Default:
    /// at least once, with an [idempotency key](crate::ItemContext::idempotency_key).
    ///
    /// If it is unknown how an item ended (the process died, or the run was dropped while it ran), the item goes to
    /// quarantine, marked [`uncertain`](field@crate::Quarantined::uncertain). A failed attempt is known to have failed,
    /// and is repeated if [`retry`](Self::retry) says so. Intents are synced in groups, as many as there are free
    /// slots.
    pub fn at_most_once(mut self) -> Self {
        self.plan.at_most_once = true;
        self
    }

    /// Sets how many items may be in quarantine; one more ends the run with [`TaskError::QuarantineFull`]. Default: 0.
    pub fn quarantine(mut self, items: usize) -> Self {
        self.plan.quarantine = items;
        self
    }

    /// Sets whether items that earlier runs put in quarantine are tried again, with all their attempts. Default: false.
    pub fn retry_quarantined(mut self, retry: bool) -> Self {
        self.plan.retry_quarantined = retry;
        self
    }

    /// Runs a restored item again if this returns false for its result; the last result counts. Default: every result is kept.
    pub fn revalidate(mut self, is_valid: impl Fn(&T, &R) -> bool + Send + 'static) -> Self {
        self.plan.revalidate = Some(Box::new(is_valid));
        self
    }

    /// Sets the longest time a result stays in memory before it is written and synced. A power cut may lose that much.
    /// Default: 100 ms.
    pub fn checkpoint_every(mut self, interval: Duration) -> Self {
        self.plan.every = interval;
        self
    }

    /// Sets how many results may be in memory before they are written and synced, even if the
    /// [interval](Self::checkpoint_every) is not over. A kill may lose that many. Results that arrive during a sync are
    /// part of the next one; items never wait for either. A `PgStore` refuses this: it decides what one transaction appends.
    /// Default: the interval alone decides.
    pub fn checkpoint_every_items(mut self, items: usize) -> Self {
        self.plan.every_items = items as u64;
        self
    }

    /// Sets how results are encoded. Default: [`Codec::MessagePack`].
    pub fn codec(mut self, codec: Codec) -> Self {
        self.plan.codec = codec;
        self
    }

    /// Stops the run when the token fires. Default: nothing stops it but dropping it.
    pub fn cancel(mut self, token: CancellationToken) -> Self {
        self.plan.token = token;
        self
    }

    /// Sets how long running items may continue after the token fires before they are dropped. Default: zero, they are
    /// dropped at once.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.plan.grace = grace;
        self
    }

    /// Runs `work` on every item of `source` that has no result in the checkpoint.
    ///
    /// Nothing happens before the run is polled. A panic of `work` is a failed attempt of its item.
    pub fn stream<S, F, Fut>(self, source: S, work: F) -> Run<R>
    where
        S: IntoIterator<Item = T, IntoIter: Send + 'static>,
        T: Serialize + Clone + Send + 'static,
        R: Serialize + DeserializeOwned + Send + 'static,
        F: Fn(ItemContext, T) -> Fut + Send + 'static,
        Fut: Future<Output = Result<R, ItemError>> + Send + 'static,
    {
        self.stream_from(stream::iter(source), work)
    }

    /// Does the same as [`stream`](Self::stream) for items that come from an asynchronous stream.
    pub fn stream_from<S, F, Fut>(self, source: S, work: F) -> Run<R>
    where
        S: Stream<Item = T> + Send + 'static,
        T: Serialize + Clone + Send + 'static,
        R: Serialize + DeserializeOwned + Send + 'static,
        F: Fn(ItemContext, T) -> Fut + Send + 'static,
        Fut: Future<Output = Result<R, ItemError>> + Send + 'static,
    {
        let (sender, progress) = watch::channel(Progress::of_source(source.size_hint()));
        #[cfg(feature = "postgres")]
        if let Some(store) = self.postgres.clone() {
            let work = caught(work);
            let work = Box::new(move |cx, item| -> Running<R> { Box::pin(work(cx, item)) });
            let opening = async move { PgDrive::open(self.shared(&store)?, *store, source, work, sender).await };
            return Run::new(opening, progress);
        }
        let opening = async move {
            let plan = self.validated()?;
            let spawn = plan.parallel.then_some(spawn as _);
            Drive::open(plan, Box::pin(source), caught(work), spawn, sender).await
        };
        Run::new(opening, progress)
    }

    /// Runs `work` on every item, each in its own transaction, which also records the result: the database has both or
    /// neither. It returns when the whole job is complete, whichever workers ran its items.
    ///
    /// `work` gets the connection of the transaction, and must not end the transaction. Half of the
    /// [lease](crate::PgStore::lease) bounds each of its statements, and the time between two statements. If `work`
    /// returns an error, or a deferred constraint does not hold at the commit, the transaction is rolled back, and the
    /// item is tried again as [`retry`](Self::retry) says. `concurrency(n)` takes n connections of the pool, and now
    /// and then one more for the leases: items that run longer than a third of a lease need a pool of n + 1. An item
    /// whose commit is in doubt may make other items of its range start over. Read the results with
    /// [`PgStore::results`](crate::PgStore::results).
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, the running items are rolled back, unless their commit
    /// had been sent; the ranges are given back in a moment. Call it again to resume.
    ///
    /// # Errors
    ///
    /// The errors of [`Run::finish`], [`TaskError::Fenced`] if other workers have taken over ranges of this one, and
    /// [`TaskError::Database`] if the database failed, or was unreachable or silent for too long.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use cancel_safe_resumable::{PgStore, ResumableTask, TaskError};
    /// # async fn pay(pool: sqlx::PgPool, invoices: Vec<i64>) -> Result<(), TaskError> {
    /// let builder = ResumableTask::builder("pay").store(PgStore::new(pool)).concurrency(8);
    /// let summary = builder
    ///     .process_tx(invoices, async |conn: &mut sqlx::PgConnection, invoice| {
    ///         let sql = "UPDATE invoice SET paid = paid + 1 WHERE id = $1";
    ///         let pay = sqlx::query(sql).bind(invoice);
    ///         Ok(pay.execute(conn).await?.rows_affected())
    ///     })
    ///     .await?;
    /// println!("{} paid by this worker", summary.completed);
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(feature = "postgres")]
    pub async fn process_tx<S, F>(mut self, source: S, work: F) -> Result<Summary, TaskError>
    where
        S: IntoIterator<Item = T>,
        T: Serialize + Clone,
        R: Serialize + DeserializeOwned,
        F: AsyncFn(&mut sqlx::PgConnection, T) -> Result<R, ItemError>,
    {
        const NO_STORE: &str = "transactions need a `PgStore`";
        let store = self.postgres.take().ok_or(TaskError::Config(NO_STORE))?;
        let source = stream::iter(source);
        let (sender, _) = watch::channel(Progress::default());
        transactional::process(self.shared(&store)?, *store, source, work, sender).await
    }

    /// Runs `work` on every item of `source` that has no result in the checkpoint and returns all results, restored ones
    /// included, in the order of the input.
    ///
    /// It holds all results in memory. A vector has no place for an item without a result: if an item is in quarantine,
    /// the call fails, but only after every other item has been run and recorded.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, every result so far is in the checkpoint, or will be in
    /// a moment (a thread writes and syncs it); the items that were running are dropped. Call it again to resume.
    ///
    /// # Errors
    ///
    /// The errors of [`Run::finish`], and [`TaskError::Quarantined`] if an item has no result.
    ///
    /// # Examples
    ///
    /// ```
    /// # use cancel_safe_resumable::{FileStore, ResumableTask};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("squares.ckpt");
    /// let builder = ResumableTask::builder("squares").store(FileStore::at(path));
    /// let squares: Vec<u64> =
    ///     builder.concurrency(8).collect(0..100u64, |_, n| async move { Ok(n * n) }).await?;
    /// assert_eq!(squares[99], 9801);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn collect<S, F, Fut>(self, source: S, work: F) -> Result<Vec<R>, TaskError>
    where
        S: IntoIterator<Item = T, IntoIter: Send + 'static>,
        T: Serialize + Clone + Send + 'static,
        R: Serialize + DeserializeOwned + Send + 'static,
        F: Fn(ItemContext, T) -> Fut + Send + 'static,
        Fut: Future<Output = Result<R, ItemError>> + Send + 'static,
    {
        let mut run = self.ordered().stream(source, work);
        let (mut results, mut first, mut items) = (Vec::new(), None, 0);
        while let Some(done) = run.next().await {
            match done.result {
                Ok(result) => results.push(result),
                Err(quarantined) => {
                    items += 1;
                    first = first.or(Some((done.index, quarantined.cause)));
                }
            }
        }
        run.finish().await?;
        match first {
            None => Ok(results),
            Some((index, cause)) => Err(TaskError::Quarantined { items, index, cause }),
        }
    }

    /// The plan for a run on PostgreSQL, if PostgreSQL supports its options.
    #[cfg(feature = "postgres")]
    fn shared(mut self, store: &PgStore) -> Result<Plan<T, R>, TaskError> {
        // There is no file, and none is opened.
        self.plan.store = FileStore::at("postgres:");
        let plan = self.validated()?;
        let mistakes = [
            (
                plan.ordered,
                "workers that share a job hand items out as they finish: `PgStore::results` has them in order",
            ),
            (plan.at_most_once, "at most once is not offered on PostgreSQL: `process_tx` is exactly once"),
            (
                plan.revalidate.is_some(),
                "a result that others may have handed out is not run again: no `revalidate` here",
            ),
            (plan.parallel, "tasks of their own for items are not offered on PostgreSQL: start more workers"),
            (
                plan.every_items != u64::MAX,
                "a checkpoint by count is not offered on PostgreSQL: `checkpoint_every` bounds what is not yet durable",
            ),
            (plan.retry_quarantined, "items in quarantine are not tried again on PostgreSQL"),
        ];
        let made = mistakes.iter().find(|(is_made, _)| *is_made).map(|(_, mistake)| *mistake);
        match made.or_else(|| store.mistake()) {
            Some(mistake) => Err(TaskError::Config(mistake)),
            None => Ok(plan),
        }
    }

    pub(crate) fn validated(self) -> Result<Plan<T, R>, TaskError> {
        let plan = self.plan;
        let mistakes = [
            (plan.store.path().as_os_str().is_empty(), "no store: say where the checkpoint is with `.store(…)`"),
            (plan.concurrency == 0, "a concurrency of 0 would never run an item"),
            (plan.max_ahead == 0, "a max_ahead of 0 would never read an item"),
            (plan.retry.is_contradictory(), "the first back-off is above the longest"),
            (plan.every_items == 0, "a checkpoint every 0 items"),
        ];
        match mistakes.iter().find(|(is_made, _)| *is_made) {
            Some((_, mistake)) => Err(TaskError::Config(mistake)),
            None => Ok(plan),
        }
    }
}
