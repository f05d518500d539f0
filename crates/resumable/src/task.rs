//! The simple forms: a list of items, one after the other, and all results at the end.
//!
//! Invariant: dropping a call at any time leaves a checkpoint from which the same call resumes.

use std::{
    cell::RefCell,
    fmt,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    task::{Context, Poll},
};

use futures_util::stream;
use pin_project_lite::pin_project;
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    builder::{Builder, FIRST_VERSION},
    codec::Codec,
    drive::{Drive, Summary},
    error::TaskError,
    item::{ItemContext, ItemError},
    progress::Progress,
    proof::Prover,
    store::FileStore,
};

/// Runs `work` on every item, recording each result in the checkpoint at `path`, and returns the results in order.
///
/// Results that the checkpoint already has are not computed again. [`ResumableTask`] does the same with a token to
/// cancel it and a view of its progress.
///
/// # Cancel safety
///
/// This method is cancel safe. If dropped before completion, every result it had is in the checkpoint, or will be in a
/// moment (a thread writes and syncs it); the items that were running are dropped. Call it again to resume.
///
/// # Errors
///
/// The same as [`ResumableTask::process`].
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("squares.ckpt");
/// # use cancel_safe_resumable::map;
/// let squares = map(&path, 0..1000u64, |n| async move { n * n }).await?;
/// assert_eq!(squares[999], 998_001);
/// // The checkpoint is the result: the second call runs nothing.
/// let again: Vec<u64> = map(&path, 0..1000, |_: u64| async { unreachable!() }).await?;
/// assert_eq!(squares, again);
/// # Ok(())
/// # }
/// ```
pub fn map<T, R, F, Fut>(
    path: impl Into<PathBuf>,
    items: impl IntoIterator<Item = T>,
    work: F,
) -> Map<impl Future<Output = Result<Vec<R>, TaskError>>>
where
    T: Serialize + DeserializeOwned,
    R: Serialize + DeserializeOwned,
    F: Fn(T) -> Fut,
    Fut: Future<Output = R>,
{
    let version = Arc::new(Mutex::new(FIRST_VERSION.to_owned()));
    let given = Arc::clone(&version);
    let running = async move {
        let version = std::mem::take(&mut *given.lock().unwrap_or_else(PoisonError::into_inner));
        let task = ResumableTask::new(items.into_iter().collect(), path.into(), CancellationToken::new());
        task.version(version).process(work).await
    };
    Map { version, running }
}

pin_project! {
    /// The future of [`map`].
    #[must_use = "nothing is opened and nothing runs unless it is awaited"]
    pub struct Map<Fut> {
        // Read at the first poll of the future; all options are set before that.
        version: Arc<Mutex<String>>,
        #[pin]
        running: Fut,
    }
}

impl<Fut> Map<Fut> {
    /// Sets the version of the computation: change it when the same item would now give another result. Has no effect
    /// once the future was polled. Default: `1`.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. Nothing has happened before the future is polled; then it is as [`map`] says.
    pub fn version(self, version: impl Into<String>) -> Self {
        *self.version.lock().unwrap_or_else(PoisonError::into_inner) = version.into();
        self
    }
}

impl<Fut: Future> Future for Map<Fut> {
    type Output = Fut::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Fut::Output> {
        self.project().running.poll(cx)
    }
}

impl<Fut> fmt::Debug for Map<Fut> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Map").finish_non_exhaustive()
    }
}

/// A computation over a list of items that can stop anywhere and resume from there.
///
/// The checkpoint is a log of results. When the computation is complete, the log is sealed and stays: the same call
/// again returns the results without running anything. Remove the file to start over. Two tasks never share it at the
/// same time.
#[derive(Debug)]
pub struct ResumableTask<T> {
    items: Vec<T>,
    store: FileStore,
    token: CancellationToken,
    version: String,
    progress: watch::Sender<Progress>,
    summary: Option<Summary>,
}

impl<T> ResumableTask<T> {
    /// Creates a task that records its results in the file `checkpoint_path` and stops when `cancel_token` fires.
    /// Nothing is opened yet.
    pub fn new(items: Vec<T>, checkpoint_path: PathBuf, cancel_token: CancellationToken) -> Self {
        let progress = watch::Sender::new(Progress::new(items.len()));
        let (store, version) = (FileStore::at(checkpoint_path), FIRST_VERSION.to_owned());
        Self { items, store, token: cancel_token, version, progress, summary: None }
    }

    /// Sets the version of the computation: change it when the same item would now give another result. Default: `1`.
    #[must_use]
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.version = version.into();
        self
    }

    /// Starts a builder for a run over a stream of items: many at once, with retries and a quarantine.
    ///
    /// `job` names the computation; a checkpoint of another job is refused.
    pub fn builder<R>(job: impl Into<String>) -> Builder<T, R> {
        Builder::new(job.into())
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
    /// An item is identified by its serialised form. `work` gets a copy made from that form, so the task keeps its
    /// items and can be processed again after a cancel. A panic of `work` reaches the caller; results completed before
    /// are recorded.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, every result it had is in the checkpoint, or will be in
    /// a moment (a thread writes and syncs it, and keeps the file locked until then); the item that was running is
    /// dropped. Call it again, or a new task on the same file, to resume. To know that all is durable, fire the token
    /// instead and wait for [`TaskError::Cancelled`].
    ///
    /// # Errors
    ///
    /// [`TaskError::Cancelled`] once the token has fired and all results so far are durable. [`TaskError::Busy`] if
    /// another run holds the file for more than a second. [`TaskError::Corrupt`], [`TaskError::VersionMismatch`] and
    /// [`TaskError::NewerFormat`] if the file is damaged or does not belong to this result type; it is not changed then.
    /// [`TaskError::InputMismatch`] if it does not belong to these items. [`TaskError::Codec`] and [`TaskError::RoundTrip`] if
    /// an item or a result does not survive serde.
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
        let builder = ResumableTask::<&T>::builder("task").version(self.version.clone());
        let plan = builder.store(self.store.clone()).cancel(self.token.clone()).validated()?;
        let refused = OnceLock::new();
        let (copier, refusal) = (RefCell::new(Copier::new(plan.codec)), &refused);
        let on_copy = move |cx: ItemContext, item: &T| {
            let running = copier.borrow_mut().copy(cx.index(), item).map(&work);
            let running = running.map_err(|error| drop(refusal.set(error)));
            async move {
                match running {
                    Ok(running) => Ok(running.await),
                    Err(()) => Err(ItemError::permanent("the item cannot be copied")),
                }
            }
        };
        let items = stream::iter(self.items.iter());
        let mut drive = Drive::open(plan, items, on_copy, None, self.progress.clone()).await?;
        let mut results = Vec::with_capacity(self.items.len());
        // One item at a time comes out in the order of the input.
        while let Some(done) = std::future::poll_fn(|cx| drive.poll_next(cx)).await {
            results.extend(done.result.ok());
        }
        let ended = drive.take_outcome().unwrap_or(Err(TaskError::Cancelled));
        drop(drive);
        // In the simple forms an item can only fail if its serialised form cannot be read back.
        self.summary = Some(refused.into_inner().map_or(ended, Err)?);
        Ok(results)
    }
}

/// Copies an item for its function, through the item's serialised form.
struct Copier {
    prover: Prover,
    codec: Codec,
    bytes: Vec<u8>,
}

impl Copier {
    fn new(codec: Codec) -> Self {
        Self { prover: Prover::new(codec), codec, bytes: Vec::new() }
    }

    fn copy<T: Serialize + DeserializeOwned>(&mut self, index: usize, item: &T) -> Result<T, TaskError> {
        self.bytes.clear();
        self.prover.encode(index, item, &mut self.bytes)?;
        self.codec.decode(&self.bytes).map_err(|cause| TaskError::unread::<T>(self.codec, index, &self.bytes, cause))
    }
}
