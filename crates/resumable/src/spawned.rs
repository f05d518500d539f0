//! Items that run in their own tasks.
//!
//! Invariant: the checkpoint stays locked until the last task has ended, however the run ends.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::{runtime::Handle, task::JoinHandle};

use crate::{item::ItemError, store::Keeper};

/// Starts an item's task. Created where the item is known to be `Send`.
pub(crate) type Spawn<R, Fut> = fn(&Handle, Fut, Keeper) -> Spawned<R>;

/// The task of an item, aborted when this is dropped.
#[derive(Debug)]
pub(crate) struct Spawned<R>(JoinHandle<Result<R, ItemError>>);

pin_project! {
    /// An item's future. It is dropped before the keeper that holds the checkpoint's lock.
    struct Kept<Fut> {
        #[pin]
        future: Fut,
        keeper: Keeper,
    }
}

impl<Fut: Future> Future for Kept<Fut> {
    type Output = Fut::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Fut::Output> {
        self.project().future.poll(cx)
    }
}

pub(crate) fn spawn<R, Fut>(runtime: &Handle, future: Fut, keeper: Keeper) -> Spawned<R>
where
    R: Send + 'static,
    Fut: Future<Output = Result<R, ItemError>> + Send + 'static,
{
    Spawned(runtime.spawn(Kept { future, keeper }))
}

impl<R> Spawned<R> {
    /// Asks the task to end at its next await.
    pub(crate) fn abort(&self) {
        self.0.abort();
    }
}

/// Ends when the task has ended; `None` if it was cut: aborted, or its runtime shut down.
impl<R> Future for Spawned<R> {
    type Output = Option<Result<R, ItemError>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(match ready!(Pin::new(&mut self.0).poll(cx)) {
            Ok(outcome) => Some(outcome),
            // A panic of the function is caught inside; this one came when its future was dropped.
            Err(error) if error.is_panic() => Some(Err(ItemError::retry("panicked while it was dropped"))),
            Err(_) => None,
        })
    }
}

impl<R> Drop for Spawned<R> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
