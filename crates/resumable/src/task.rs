//! What a user calls: the simple forms, the builder, and the run.
//!
//! Invariant: dropping any of it at any time leaves a checkpoint from which the same call goes on.

use std::{
    any::Any,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_core::Stream;
use futures_util::{StreamExt, stream};
use pin_project_lite::pin_project;
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    codec::Codec,
    drive::{Drive, Plan, Summary},
    error::TaskError,
    item::{BoxError, Done, ItemContext, ItemError, Retry},
    progress::Progress,
    store::FileStore,
};

/// Runs `work` on every item, recording each result in the checkpoint at `path`, and returns the results in order.
///
/// If the checkpoint has results already, they are not computed again. [`ResumableTask`] is the same with a token to
/// cancel it and a view of its progress.
///
/// # Cancel safety
///
/// This method is cancel safe. If dropped before completion, every result it had is in the checkpoint, or will be in a
/// moment (a thread writes and syncs it); the items that were running are dropped. Call it again to go on.
///
/// # Errors
///
/// As [`ResumableTask::process`].
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("squares.ckpt");
/// let squares = cancel_safe_resumable::map(&path, 0..1000u64, |n| async move { n * n }).await?;
/// assert_eq!(squares[999], 998_001);
/// // The checkpoint is the result: the second call runs nothing.
/// let again = cancel_safe_resumable::map(&path, 0..1000u64, |_| async move { unreachable!() }).await?;
/// assert_eq!(squares, again);
/// # Ok(())
/// # }
/// ```
pub async fn map<T, R, F, Fut>(
    path: impl Into<PathBuf>,
    items: impl IntoIterator<Item = T>,
    work: F,
) -> Result<Vec<R>, TaskError>
where
    T: Serialize + DeserializeOwned,
    R: Serialize + DeserializeOwned,
    F: Fn(T) -> Fut,
    Fut: Future<Output = R>,
{
    let items = items.into_iter().collect();
    ResumableTask::new(items, path.into(), CancellationToken::new()).process(work).await
}

/// A computation over a list of items that can stop anywhere and go on from there.
///
/// The checkpoint is a log of results. It is kept when the computation is complete, sealed: the same call again returns
/// the results without running anything. Remove the file to start over. Two tasks never share it at the same time.
#[derive(Debug)]
pub struct ResumableTask<T> {
    items: Vec<T>,
    store: FileStore,
    token: CancellationToken,
    progress: watch::Sender<Progress>,
    summary: Option<Summary>,
}

impl<T> ResumableTask<T> {
    /// A task that records its results in the file `checkpoint_path` and stops when `cancel_token` fires. Nothing is
    /// opened yet.
    pub fn new(items: Vec<T>, checkpoint_path: PathBuf, cancel_token: CancellationToken) -> Self {
        let progress = watch::Sender::new(Progress { total: items.len(), ..Progress::default() });
        Self { items, store: FileStore::at(checkpoint_path), token: cancel_token, progress, summary: None }
    }

    /// The options of a run over a stream of items: many at once, with retries and a quarantine.
    ///
    /// `job` names the computation; a checkpoint of another job is refused.
    #[must_use]
    pub fn builder<R>(job: impl Into<String>) -> Builder<T, R> {
        Builder {
            plan: Plan {
                job: job.into(),
                version: "1".to_owned(),
                accepted: Vec::new(),
                store: FileStore::at(PathBuf::new()),
                codec: Codec::default(),
                every: Duration::from_millis(100),
                key: None,
                revalidate: None,
                concurrency: 1,
                max_ahead: 1024,
                ordered: false,
                retry: Retry::never(),
                max_defers: 100,
                quarantine: 0,
                retry_quarantined: false,
                token: CancellationToken::new(),
                grace: Duration::ZERO,
            },
        }
    }

    /// Returns the finished part, from 0.0 to 1.0, restored items included.
    #[must_use]
    pub fn progress(&self) -> f64 {
        self.progress.borrow().fraction()
    }

    /// Returns a view of the progress that can be watched while [`process`](Self::process) runs.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Returns what the last call of [`process`](Self::process) did, if it succeeded.
    #[must_use]
    pub fn summary(&self) -> Option<&Summary> {
        self.summary.as_ref()
    }
}

impl<T: Serialize + DeserializeOwned> ResumableTask<T> {
    /// Runs `work` on every item that has no result in the checkpoint, one after the other, and returns all results in
    /// the order of the items.
    ///
    /// An item is known by its serialised form, of which `work` is handed a copy, so that the task keeps its items and
    /// can be processed again after a cancel. A panic of `work` goes on to the caller; what was completed before is
    /// recorded.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, every result it had is in the checkpoint, or will be in
    /// a moment (a thread writes and syncs it, and keeps the file locked until then); the item that was running is
    /// dropped. Call it again, or a new task on the same file, to go on. To know that all is durable, fire the token
    /// instead and wait for [`TaskError::Cancelled`].
    ///
    /// # Errors
    ///
    /// [`TaskError::Cancelled`] once the token has fired and all results so far are durable. [`TaskError::Busy`] if
    /// another run holds the file for more than a second. [`TaskError::Corrupt`], [`TaskError::InputMismatch`],
    /// [`TaskError::VersionMismatch`] and [`TaskError::NewerFormat`] if the file does not belong to these items and this
    /// result type; it is not changed then. [`TaskError::Codec`] if an item or a result does not survive serde.
    /// [`TaskError::Io`] if the file system fails.
    ///
    /// # Examples
    ///
    /// ```
    /// # use cancel_safe_resumable::{ResumableTask, TaskError};
    /// # use tokio_util::sync::CancellationToken;
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("double.checkpoint");
    /// let items: Vec<u64> = (0..100).collect();
    /// let token = CancellationToken::new();
    /// let mut task = ResumableTask::new(items, path, token.clone());
    /// token.cancel();
    /// let cancelled = task.process(|x| async move { x * 2 }).await;
    /// assert!(matches!(cancelled, Err(TaskError::Cancelled)));
    /// # Ok(())
    /// # }
    /// ```
    pub async fn process<F, Fut, R>(&mut self, work: F) -> Result<Vec<R>, TaskError>
    where
        F: Fn(T) -> Fut,
        Fut: Future<Output = R>,
        R: Serialize + DeserializeOwned,
    {
        self.summary = None;
        let builder = ResumableTask::<&T>::builder("task").store(self.store.clone()).cancel(self.token.clone());
        let plan = builder.validated()?;
        let codec = plan.codec;
        let on_copy = move |_: ItemContext, item: &T| {
            let running = copy(codec, item).map(&work);
            async move {
                match running {
                    Ok(running) => Ok(running.await),
                    Err(cause) => Err(ItemError::permanent(cause)),
                }
            }
        };
        let items = stream::iter(self.items.iter());
        let mut drive = Drive::open(plan, items, on_copy, self.progress.clone()).await?;
        let mut results = Vec::with_capacity(self.items.len());
        // One item at a time comes out in the order of the input.
        while let Some(done) = std::future::poll_fn(|cx| drive.poll_next(cx)).await {
            results.extend(done.result.ok());
        }
        let ended = drive.take_outcome().unwrap_or(Err(TaskError::Cancelled));
        self.summary = Some(ended?);
        Ok(results)
    }
}

/// The copy of an item that its function is handed.
fn copy<T: Serialize + DeserializeOwned>(codec: Codec, item: &T) -> Result<T, BoxError> {
    let mut bytes = Vec::new();
    codec.encode(item, &mut bytes)?;
    codec.decode(&bytes)
}

/// The options of a run over a stream of items. Every one but [`store`](Self::store) has a default.
#[must_use = "nothing is opened and nothing runs before `stream`"]
pub struct Builder<T, R> {
    plan: Plan<T, R>,
}

impl<T, R> fmt::Debug for Builder<T, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder").field("job", &self.plan.job).field("store", &self.plan.store).finish_non_exhaustive()
    }
}

impl<T, R> Builder<T, R> {
    /// Sets where the checkpoint is. There is no default.
    pub fn store(mut self, store: FileStore) -> Self {
        self.plan.store = store;
        self
    }

    /// Sets the version of the computation: change it when the same item would now give another result. Default: `1`.
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.plan.version = version.into();
        self
    }

    /// Accepts a checkpoint of another version, or of this one with another result type, whose results can still be
    /// read. The file keeps its version, so say so as long as the file lives. Default: none is accepted.
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

    /// Sets how many items run at once. Default: 1.
    pub fn concurrency(mut self, items: usize) -> Self {
        self.plan.concurrency = items;
        self
    }

    /// Sets how many items, besides those that run, may be held in memory: waiting for a retry, deferred, or finished and
    /// waiting for one before them. When so many are, no new item is read. Default: 1024.
    pub fn max_ahead(mut self, items: usize) -> Self {
        self.plan.max_ahead = items;
        self
    }

    /// Hands the items out in the order of the input. Default: as they finish.
    pub fn ordered(mut self) -> Self {
        self.plan.ordered = true;
        self
    }

    /// Sets how often and how soon a failed item is tried again. Default: [`Retry::never`].
    pub fn retry(mut self, retry: Retry) -> Self {
        self.plan.retry = retry;
        self
    }

    /// Sets how often an item may be deferred in a run before a deferral counts as a failed attempt. Default: 100.
    pub fn max_defers(mut self, times: u32) -> Self {
        self.plan.max_defers = times;
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

    /// Runs a restored item again if this returns false for its result; the last result counts. Default: all are kept.
    pub fn revalidate(mut self, is_valid: impl Fn(&T, &R) -> bool + Send + 'static) -> Self {
        self.plan.revalidate = Some(Box::new(is_valid));
        self
    }

    /// Sets the longest time a result stays in memory before it is written and synced: what a power cut may lose.
    /// Default: 100 ms.
    pub fn checkpoint_every(mut self, interval: Duration) -> Self {
        self.plan.every = interval;
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

    /// Sets how long the items that run when the token fires may go on; then they are dropped. Default: not at all.
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
        let total = source.size_hint().0;
        let (sender, progress) = watch::channel(Progress { total, ..Progress::default() });
        let opening = async move {
            let plan = self.validated()?;
            let drive = Drive::open(plan, Box::pin(source), caught(work), sender).await?;
            let engine: Box<dyn Engine<R>> = Box::new(drive);
            Ok(engine)
        };
        Run { state: State::Opening(Box::pin(opening)), progress }
    }

    fn validated(self) -> Result<Plan<T, R>, TaskError> {
        let plan = self.plan;
        let mistakes = [
            (plan.store.path().as_os_str().is_empty(), "no store: say where the checkpoint is with `.store(…)`"),
            (plan.concurrency == 0, "a concurrency of 0 would never run an item"),
            (plan.max_ahead == 0, "a max_ahead of 0 would never read an item"),
            (plan.retry.max_attempts == 0, "0 attempts would never run an item"),
        ];
        match mistakes.iter().find(|(is_made, _)| *is_made) {
            Some((_, mistake)) => Err(TaskError::Config(mistake)),
            None => Ok(plan),
        }
    }
}

/// Makes a panic of `work`, be it when called or when polled, a failed attempt.
///
/// What `work` shares between items may be left half changed by a panic; that is its own affair, as in a spawned task.
fn caught<T, R, F, Fut>(work: F) -> impl Fn(ItemContext, T) -> Caught<Fut>
where
    F: Fn(ItemContext, T) -> Fut,
    Fut: Future<Output = Result<R, ItemError>>,
{
    move |context, item| match catch_unwind(AssertUnwindSafe(|| work(context, item))) {
        Ok(running) => Caught::Running { running },
        Err(panic) => Caught::Panicked { error: Some(panicked(panic.as_ref())) },
    }
}

pin_project! {
    #[project = CaughtProjection]
    enum Caught<Fut> {
        Running {
            #[pin]
            running: Fut,
        },
        Panicked {
            error: Option<ItemError>,
        },
    }
}

impl<R, Fut: Future<Output = Result<R, ItemError>>> Future for Caught<Fut> {
    type Output = Fut::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project() {
            CaughtProjection::Running { running } => {
                let polled = catch_unwind(AssertUnwindSafe(|| running.poll(cx)));
                polled.unwrap_or_else(|panic| Poll::Ready(Err(panicked(panic.as_ref()))))
            }
            CaughtProjection::Panicked { error } => error.take().map_or(Poll::Pending, |error| Poll::Ready(Err(error))),
        }
    }
}

fn panicked(panic: &(dyn Any + Send)) -> ItemError {
    let message = panic.downcast_ref::<&str>().copied();
    let message = message.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("(no message)");
    ItemError::retry(format!("panicked: {message}"))
}

/// A run: the stream of its finished items, restored ones included, each exactly once.
///
/// Items make progress only while the run is polled: keep the work between two items short, or do it in the item's
/// function. Dropping the run drops the items that are running; what it had completed is written and synced by a thread
/// in a moment. The stream ends when the input is done or the run failed or was cancelled, and everything it had
/// completed is durable; [`finish`](Self::finish) says which it was.
#[must_use = "a run does nothing unless polled, and only `finish` says whether it came to its end"]
pub struct Run<R> {
    state: State<R>,
    progress: watch::Receiver<Progress>,
}

enum State<R> {
    Opening(Pin<Box<dyn Future<Output = Result<Box<dyn Engine<R>>, TaskError>> + Send>>),
    Running(Box<dyn Engine<R>>),
    Ended(Result<Summary, TaskError>),
}

/// The drive loop without the types of the input.
trait Engine<R>: Send + Unpin {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Done<R>>>;
    fn take_outcome(&mut self) -> Option<Result<Summary, TaskError>>;
}

impl<I, R, S, F, Fut> Engine<R> for Drive<I, R, S, F, Fut>
where
    I: Serialize + Clone + Send,
    R: Serialize + DeserializeOwned + Send,
    S: Stream<Item = I> + Unpin + Send,
    F: Fn(ItemContext, I) -> Fut + Send,
    Fut: Future<Output = Result<R, ItemError>> + Send,
{
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Done<R>>> {
        Drive::poll_next(self, cx)
    }

    fn take_outcome(&mut self) -> Option<Result<Summary, TaskError>> {
        Drive::take_outcome(self)
    }
}

impl<R> Run<R> {
    /// Returns the finished part, from 0.0 to 1.0, restored items included. For a source that does not know its length
    /// this is the part of what was read.
    #[must_use]
    pub fn progress(&self) -> f64 {
        self.progress.borrow().fraction()
    }

    /// Returns a view of the progress that can be watched from elsewhere while the run is polled.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// Runs what is left to its end, makes it durable, unlocks the file, and says how the run ended.
    ///
    /// Items that were not taken from the stream are run and recorded, but not seen.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, every result so far is in the checkpoint, or will be in
    /// a moment (a thread writes and syncs it); the items that were running are dropped. Start the run again to go on.
    ///
    /// # Errors
    ///
    /// Those of [`ResumableTask::process`], [`TaskError::DuplicateKey`] if two items have one key,
    /// [`TaskError::QuarantineFull`] if an item failed for good and there is no room for it, and [`TaskError::Config`] if
    /// an option is missing or 0.
    pub async fn finish(mut self) -> Result<Summary, TaskError> {
        while self.next().await.is_some() {}
        match self.state {
            State::Ended(outcome) => outcome,
            State::Opening(_) | State::Running(_) => Err(TaskError::Cancelled),
        }
    }
}

impl<R> Stream for Run<R> {
    type Item = Done<R>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Done<R>>> {
        loop {
            match &mut self.state {
                State::Opening(opening) => {
                    self.state = match ready!(opening.as_mut().poll(cx)) {
                        Ok(engine) => State::Running(engine),
                        Err(error) => State::Ended(Err(error)),
                    };
                }
                State::Running(engine) => {
                    if let Some(done) = ready!(engine.poll_next(cx)) {
                        return Poll::Ready(Some(done));
                    }
                    let outcome = engine.take_outcome().unwrap_or(Err(TaskError::Cancelled));
                    self.state = State::Ended(outcome);
                }
                State::Ended(_) => return Poll::Ready(None),
            }
        }
    }
}

impl<R> fmt::Debug for Run<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Run").field("progress", &*self.progress.borrow()).finish_non_exhaustive()
    }
}
