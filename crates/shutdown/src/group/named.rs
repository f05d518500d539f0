//! The tasks of a group by name: listing the live ones, and ending some of them. Names are not unique, and each of
//! these methods looks through all live tasks.

use std::future::poll_fn;
use std::panic::Location;

use tokio::time::{sleep, timeout, timeout_at};

use crate::group::TaskGroup;
use crate::stop::{StopReason, Stopping, after};
use crate::tree::{Node, SAMPLE, SETTLE};

impl<T: Send + 'static, E: Send + 'static> TaskGroup<T, E> {
    /// Returns whether a task of this name is alive.
    pub fn contains(&self, name: &str) -> bool {
        !self.roster.named(name).is_empty()
    }

    /// Returns the live tasks, in no particular order.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_shutdown::TaskGroup;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let group = TaskGroup::new();
    /// group.spawn("idle", std::future::pending::<()>())?;
    /// let tasks = group.tasks();
    /// assert_eq!((tasks[0].name.as_str(), tasks[0].is_inside_poll), ("idle", false));
    /// assert!(group.contains("idle") && !group.contains("other"));
    /// # Ok(())
    /// # }
    /// ```
    pub fn tasks(&self) -> Vec<LiveTask> {
        self.roster.read_all(|task, trace| LiveTask {
            name: task.name.as_str().to_owned(),
            spawned_at: task.spawned_at,
            last_mark: task.name.last_mark(),
            is_inside_poll: trace.is_inside_poll(),
        })
    }

    /// Drops the tasks of this name at their current await, without a grace, and returns how many there were.
    ///
    /// It does not wait for their end. Their outcome is [`Aborted`](crate::TaskOutcome::Aborted). A blocking closure is
    /// dropped if it has not begun; otherwise it continues.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_shutdown::TaskGroup;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let group = TaskGroup::new();
    /// group.spawn("stuck", std::future::pending::<()>())?;
    /// group.spawn("fine", async {})?;
    /// assert_eq!(group.abort("stuck"), 1);
    /// assert_eq!(group.wait().await.completed, ["fine"]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn abort(&self, name: &str) -> usize {
        let tasks = self.roster.named(name);
        self.roster.abort(&tasks);
        tasks.len()
    }

    /// Cancels the tasks of this name, waits until they have ended, and returns how many there were.
    ///
    /// Plain tasks are dropped at their current await. Tasks with a context are told to stop, and aborted when the
    /// group's [grace](Self::grace) is over. The group stays open, and its other tasks continue. If such a task holds a
    /// group below this one, the group ends when the task drops it.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. Once polled, the cancel is made and stands. If dropped before completion, a task
    /// that does not listen keeps running past its grace until its group is cancelled.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_shutdown::TaskGroup;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let group = TaskGroup::new();
    /// for tenant in ["anna", "bert"] {
    ///     group.spawn_with(tenant, |cx| async move { cx.cancelled().await })?;
    /// }
    /// assert_eq!(group.cancel("anna").await, 1);
    /// assert!(!group.contains("anna") && group.contains("bert"));
    /// # Ok(())
    /// # }
    /// ```
    pub async fn cancel(&self, name: &str) -> usize {
        self.cancel_named(name, StopReason::Requested).await
    }

    /// Works like [`cancel`](Self::cancel), with your own reason for the tasks to [see](crate::WorkerContext::reason).
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. Once polled, the cancel is made and stands, as with `cancel`.
    pub async fn cancel_because(&self, name: &str, reason: impl Into<String>) -> usize {
        self.cancel_named(name, StopReason::Because(reason.into())).await
    }

    async fn cancel_named(&self, name: &str, reason: StopReason) -> usize {
        let deadline = after(self.roster.grace());
        let tasks = self.roster.named(name);
        self.roster.tell_to_stop(&tasks, &Stopping { reason, deadline });
        let mut ended = poll_fn(|cx| self.roster.poll_ended(&tasks, cx));
        if timeout_at(deadline, &mut ended).await.is_err() {
            let looks = self.roster.look_at(&tasks);
            sleep(SAMPLE).await;
            self.roster.cut(&looks, false);
            self.roster.abort(&tasks);
            // Elapsed or not, the next step is the same: what is still alive then is abandoned.
            drop(timeout(SETTLE, ended).await);
            self.roster.abandon_tasks(&tasks);
        }
        tasks.len()
    }
}

/// A task of a group that has not ended.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LiveTask {
    /// The name it was given.
    pub name: String,
    /// Where it was spawned.
    pub spawned_at: &'static Location<'static>,
    /// The last [`mark`](crate::WorkerContext::mark) that it left.
    pub last_mark: Option<String>,
    /// Whether it was running at this moment, rather than parked at an await.
    pub is_inside_poll: bool,
}
