//! How a group ends: joined, cancelled or awaited. Once the group is told to stop, the grace bounds every wait.

use std::pin::pin;
use std::time::Duration;

use tokio::time::timeout_at;

use crate::clock::Clock;
use crate::group::TaskGroup;
use crate::result::TaskGroupResult;
use crate::stop::{StopReason, after};
use crate::task::TaskOutcome;
use crate::tree::{bounded, cut, finished};

impl<T: Send + 'static, E: Send + 'static> TaskGroup<T, E> {
    /// Returns the next task that has ended, with its name, or `None` when there is none left.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, no outcome is lost: the next call returns it.
    pub async fn join_next(&mut self) -> Option<(String, TaskOutcome<T, E>)> {
        // Before anything is taken, so that a caller with many outcomes at hand still yields, and yielding loses none.
        tokio::task::coop::consume_budget().await;
        if let Some(ended) = self.try_join_next() {
            return Some(ended);
        }
        let node = self.node();
        let (roster, taken) = self.reader();
        bounded(&node, |cx| roster.poll_take(taken, cx)).await;
        taken.pop_front().map(|ended| roster.hand_out(ended))
    }

    /// Returns the next task that has ended if there already is one, and `None` otherwise.
    pub fn try_join_next(&mut self) -> Option<(String, TaskOutcome<T, E>)> {
        let (roster, taken) = self.reader();
        if taken.is_empty() && !roster.take(taken) {
            return None;
        }
        taken.pop_front().map(|ended| roster.hand_out(ended))
    }

    /// Waits until every task has ended, here and in the groups below, and returns the outcomes not yet read, in the
    /// order in which the tasks ended.
    ///
    /// It works like [`wait`](Self::wait), for a group whose values matter.
    ///
    /// # Cancel safety
    ///
    /// This method is not cancel safe. If dropped, every task is dropped at its current await and the outcomes are
    /// lost; a blocking closure that has begun keeps running.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_shutdown::{TaskGroup, TaskOutcome};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let group = TaskGroup::<u32, String>::with_results();
    /// group.spawn("one", async { Ok(1) })?;
    /// group.spawn("two", async { Ok(2) })?;
    /// let ended = group.join_all().await.into_iter();
    /// let sum: u32 = ended.filter_map(|(_, outcome)| outcome.completed()).sum();
    /// assert_eq!(sum, 3);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn join_all(mut self) -> Vec<(String, TaskOutcome<T, E>)> {
        self.finished().await;
        std::iter::from_fn(|| self.try_join_next()).collect()
    }

    /// Cancels every task and waits until none is alive.
    ///
    /// It closes this group and the groups below it, drops plain tasks at their current await, and tells tasks with a
    /// context to stop. Tasks that are still alive when the grace is over are aborted, and [`wait`](Self::wait) reports
    /// them as stragglers. So this method returns within the grace plus 25 ms.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. Once polled, the cancel is made and stands. If dropped before completion, the next
    /// call of `cancel_all`, `join_next` or `wait` enforces the end of the grace.
    pub async fn cancel_all(&self) {
        self.stop(StopReason::Requested, after(self.roster.grace()));
        self.idle().await;
    }

    /// Works like [`cancel_all`](Self::cancel_all), with your own reason for the tasks to
    /// [see](crate::WorkerContext::reason).
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. Once polled, the cancel is made and stands, as with `cancel_all`.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_shutdown::{StopReason, TaskGroup};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let group = TaskGroup::new();
    /// group.spawn_with("watcher", |cx| async move {
    ///     cx.cancelled().await;
    ///     assert_eq!(cx.reason(), Some(StopReason::Because("new settings".to_owned())));
    /// })?;
    /// group.cancel_all_because("new settings").await;
    /// assert_eq!(group.wait().await.completed, ["watcher"]);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn cancel_all_because(&self, reason: impl Into<String>) {
        self.stop(StopReason::Because(reason.into()), after(self.roster.grace()));
        self.idle().await;
    }

    /// Waits until every task has ended, here and in the groups below, and sorts the outcomes not yet read.
    ///
    /// When no task is alive any more, it closes the groups below, even if they still have holders. It waits as long as
    /// the tasks take; after a cancel, no longer than the grace plus 25 ms. It drops the values of the tasks: if they
    /// matter, read the group with [`join_next`](Self::join_next) first.
    ///
    /// # Cancel safety
    ///
    /// This method is not cancel safe. If dropped, every task is dropped at its current await and the outcomes are
    /// lost; a blocking closure that has begun keeps running.
    pub async fn wait(mut self) -> TaskGroupResult<E> {
        self.finished().await;
        let (roster, taken) = self.reader();
        roster.take_result(std::mem::take(taken))
    }

    /// Cancels every task with a grace of `timeout`, then waits as [`wait`](Self::wait) does.
    ///
    /// # Cancel safety
    ///
    /// This method is not cancel safe. If dropped, the tasks are dropped at once, without the rest of their grace, and
    /// the outcomes are lost; a blocking closure that has begun keeps running.
    pub async fn shutdown(self, timeout: Duration) -> TaskGroupResult<E> {
        let deadline = after(timeout);
        self.stop(StopReason::Requested, deadline);
        let node = self.node();
        // It may have been told to stop before, with a longer grace.
        let is_longer = node.stop().get().is_some_and(|stopping| stopping.deadline > deadline);
        if is_longer && timeout_at(deadline, self.finished()).await.is_err() {
            cut(&[(node, false)], &Clock::Tokio).await;
        }
        self.wait().await
    }

    async fn finished(&self) {
        let node = self.node();
        let mut finished = pin!(finished(&node));
        bounded(&node, |cx| finished.as_mut().poll(cx)).await;
    }
}
