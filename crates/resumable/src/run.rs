//! A run: the stream of its finished items, and how it ended.
//!
//! Invariant: the stream ends only when everything it completed is durable, and dropping it at any time loses none of
//! that.

use std::{
    any::Any,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures_core::Stream;
use futures_util::StreamExt;
use pin_project_lite::pin_project;
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::watch;

use crate::{
    drive::{Drive, Summary},
    error::TaskError,
    item::{Done, ItemContext, ItemError},
    progress::Progress,
};

/// A run: the stream of its finished items, restored ones included, each exactly once.
///
/// Items make progress only while the run is polled: keep the work between two items short, or do it in the item's
/// function. Dropping the run drops the running items; a thread writes and syncs the completed results in a moment. The
/// stream ends when the input is done or the run failed or was cancelled, and everything it had completed is durable;
/// [`finish`](Self::finish) says which of these happened.
#[must_use = "a run does nothing unless polled, and only `finish` says whether it came to its end"]
pub struct Run<R> {
    state: State<R>,
    progress: watch::Receiver<Progress>,
}

type Opening<R> = Pin<Box<dyn Future<Output = Result<Box<dyn Engine<R>>, TaskError>> + Send>>;

enum State<R> {
    Opening(Opening<R>),
    Running(Box<dyn Engine<R>>),
    Ended(Result<Summary, TaskError>),
}

/// The drive loop without the types of the input.
pub(crate) trait Engine<R>: Send + Unpin {
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
    pub(crate) fn new<D: Engine<R> + 'static>(
        opening: impl Future<Output = Result<D, TaskError>> + Send + 'static,
        progress: watch::Receiver<Progress>,
    ) -> Self {
        let opening = async move {
            let engine: Box<dyn Engine<R>> = Box::new(opening.await?);
            Ok(engine)
        };
        Self { state: State::Opening(Box::pin(opening)), progress }
    }

    /// Returns the finished part, from 0.0 to 1.0, restored items included. For a source that does not know its length
    /// it is 0.0 until the whole source was read.
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
    /// Items that you did not take from the stream are run and recorded, but not returned.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, every result so far is in the checkpoint, or will be in
    /// a moment (a thread writes and syncs it); the items that were running are dropped. Start the run again to resume.
    ///
    /// # Errors
    ///
    /// The errors of [`ResumableTask::process`](crate::ResumableTask::process), [`TaskError::DuplicateKey`] if two
    /// items have one key, [`TaskError::QuarantineFull`] if an item failed for good and there is no room for it, and
    /// [`TaskError::Config`] if an option is missing or 0.
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
                    match engine.poll_next(cx) {
                        Poll::Ready(None) => {}
                        // Passed on unchanged, because moving an item costs as much as restoring it.
                        polled => return polled,
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

/// Makes a panic of `work`, in the call or in a poll, a failed attempt.
///
/// What `work` shares between items may be left half changed by a panic; as in a spawned task, `work` must handle that.
pub(crate) fn caught<T, R, F, Fut>(work: F) -> impl Fn(ItemContext, T) -> Caught<Fut>
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
    pub(crate) enum Caught<Fut> {
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
