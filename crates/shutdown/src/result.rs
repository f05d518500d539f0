//! How the tasks of a group ended, for its holder to read. Each task is in exactly one list and counted exactly once.

use std::borrow::Cow;
use std::fmt;
use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::report::Ledger;
use crate::task::{BoxError, StragglerState, TaskOutcome};

/// How the tasks of a group ended. Each task is in exactly one list.
#[derive(Debug)]
#[non_exhaustive]
#[must_use = "it holds the errors and panics of the tasks"]
pub struct TaskGroupResult<E = BoxError> {
    /// The tasks that returned without an error.
    pub completed: Vec<String>,
    /// The tasks whose future was dropped because they were told to stop, or because their runtime was shut down.
    pub cancelled: Vec<String>,
    /// The tasks that returned an error, each with its error.
    pub failed: Vec<(String, E)>,
    /// The tasks that panicked, each with its panic message.
    pub panicked: Vec<(String, String)>,
    /// The tasks that had not ended when their grace was over.
    pub stragglers: Vec<Straggler>,
    /// How many tasks ended in each way since the group was created. It includes tasks whose outcome was read before,
    /// and tasks that a [`discarding`](crate::TaskGroup::discarding) group has not kept.
    pub counts: TaskCounts,
    /// Whether the first failure was a panic.
    panic_first: bool,
    panics: Panics,
}

impl<E> TaskGroupResult<E> {
    pub(crate) fn new(counts: TaskCounts, ledger: Option<Arc<Ledger>>) -> Self {
        Self {
            completed: Vec::new(),
            cancelled: Vec::new(),
            failed: Vec::new(),
            panicked: Vec::new(),
            stragglers: Vec::new(),
            counts,
            panic_first: false,
            panics: Panics { ledger, noticed: AtomicBool::new(false) },
        }
    }

    /// Returns whether every task listed here completed or was cancelled in time.
    pub fn is_clean(&self) -> bool {
        self.notice_panics();
        self.failed.is_empty() && self.panicked.is_empty() && self.stragglers.is_empty()
    }

    /// Returns the first failure, an error or a panic, as an error; otherwise the result itself.
    ///
    /// # Errors
    ///
    /// If a task failed or panicked. Stragglers are no failures; [`is_clean`](Self::is_clean) checks for those too.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_shutdown::{TaskFailure, TaskGroup};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// async fn import() -> Result<usize, TaskFailure> {
    ///     let group = TaskGroup::new().fail_fast();
    ///     group.spawn("parse", async { Err("line 3".into()) }).expect("an open group");
    ///     let result = group.wait().await.into_result()?;
    ///     Ok(result.completed.len())
    /// }
    /// assert_eq!(import().await.unwrap_err().name(), "parse");
    /// # }
    /// ```
    pub fn into_result(mut self) -> Result<Self, TaskFailure<E>> {
        self.notice_panics();
        let panic_first = self.panic_first;
        if !panic_first && !self.failed.is_empty() {
            let (name, error) = self.failed.swap_remove(0);
            return Err(TaskFailure { name, cause: Cause::Failed(error) });
        }
        if panic_first && !self.panicked.is_empty() {
            let (name, message) = self.panicked.swap_remove(0);
            return Err(TaskFailure { name, cause: Cause::Panicked(message) });
        }
        Ok(self)
    }

    /// Adds a task; `cut` says what it was doing if its grace was over.
    pub(crate) fn add<T>(&mut self, name: String, outcome: TaskOutcome<T, E>, cut: Option<Cut>) {
        let is_first = self.failed.is_empty() && self.panicked.is_empty();
        match (outcome, cut) {
            (TaskOutcome::Completed(_), _) => self.completed.push(name),
            (TaskOutcome::Failed(error), _) => self.failed.push((name, error)),
            (TaskOutcome::Panicked { message, .. }, _) => {
                self.panic_first |= is_first;
                self.panicked.push((name, message));
            }
            (TaskOutcome::Aborted | TaskOutcome::Abandoned, Some((state, spawned_at, last_mark))) => {
                self.stragglers.push(Straggler { name, spawned_at, last_mark, state });
            }
            (TaskOutcome::Cancelled | TaskOutcome::Aborted | TaskOutcome::Abandoned, _) => self.cancelled.push(name),
        }
    }

    fn notice_panics(&self) {
        if let Some(ledger) = &self.panics.ledger
            && !self.panics.noticed.swap(true, Ordering::Relaxed)
        {
            ledger.notice_panics(u64::try_from(self.panicked.len()).unwrap_or(u64::MAX));
        }
    }
}

impl<E> Default for TaskGroupResult<E> {
    fn default() -> Self {
        Self::new(TaskCounts::default(), None)
    }
}

/// What a straggler was doing, where it was spawned, and its last mark.
pub(crate) type Cut = (StragglerState, &'static Location<'static>, Option<String>);

/// Where to report that a group's panics were noticed.
#[derive(Debug)]
struct Panics {
    ledger: Option<Arc<Ledger>>,
    noticed: AtomicBool,
}

/// How many tasks of a group have ended, and how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TaskCounts {
    /// The tasks that returned without an error.
    pub completed: u64,
    /// The tasks whose future was dropped because they were told to stop, or because their runtime was shut down.
    pub cancelled: u64,
    /// The tasks that returned an error.
    pub failed: u64,
    /// The tasks that panicked.
    pub panicked: u64,
    /// The tasks that had not ended when their grace was over.
    pub stragglers: u64,
}

impl TaskCounts {
    pub(crate) fn add<T, E>(&mut self, outcome: &TaskOutcome<T, E>, was_cut: bool) {
        let count = match outcome {
            TaskOutcome::Completed(_) => &mut self.completed,
            TaskOutcome::Failed(_) => &mut self.failed,
            TaskOutcome::Panicked { .. } => &mut self.panicked,
            TaskOutcome::Aborted | TaskOutcome::Abandoned if was_cut => &mut self.stragglers,
            TaskOutcome::Cancelled | TaskOutcome::Aborted | TaskOutcome::Abandoned => &mut self.cancelled,
        };
        *count += 1;
    }
}

/// The task of a group that failed or panicked first.
#[derive(Debug)]
pub struct TaskFailure<E = BoxError> {
    name: String,
    cause: Cause<E>,
}

#[derive(Debug)]
enum Cause<E> {
    Failed(E),
    Panicked(String),
}

impl<E> TaskFailure<E> {
    /// Returns the name of the task.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns whether it panicked, rather than returned an error.
    pub fn is_panic(&self) -> bool {
        matches!(self.cause, Cause::Panicked(_))
    }

    /// Returns the error of the task, or its panic message.
    ///
    /// # Errors
    ///
    /// The message of a panic.
    pub fn into_error(self) -> Result<E, String> {
        match self.cause {
            Cause::Failed(error) => Ok(error),
            Cause::Panicked(message) => Err(message),
        }
    }
}

impl<E: fmt::Display> fmt::Display for TaskFailure<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cause {
            Cause::Failed(error) => write!(f, "task `{}` failed: {error}", self.name),
            Cause::Panicked(message) => write!(f, "task `{}` panicked: {message}", self.name),
        }
    }
}

impl<E: fmt::Display + fmt::Debug> std::error::Error for TaskFailure<E> {}

/// A task that had not ended when its grace was over.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Straggler {
    /// The name it was given.
    pub name: String,
    /// Where it was spawned.
    pub spawned_at: &'static Location<'static>,
    /// The last [`mark`](crate::WorkerContext::mark) that it left.
    pub last_mark: Option<String>,
    /// What it was doing.
    pub state: StragglerState,
}

impl fmt::Display for Straggler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` {}, spawned at {}", self.name, self.state, self.spawned_at)?;
        match &self.last_mark {
            Some(mark) => write!(f, ", last mark `{mark}`"),
            None => Ok(()),
        }
    }
}

/// Work that a closed group, or a worker that is already running, did not take. None of it has run.
#[must_use = "the work it holds has not been started"]
pub struct Rejected<W> {
    name: Cow<'static, str>,
    work: W,
}

impl<W> Rejected<W> {
    pub(crate) fn new(name: impl Into<Cow<'static, str>>, work: W) -> Self {
        Self { name: name.into(), work }
    }

    /// Returns the name that the work would have had.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the work: a future that was never polled, or a closure that was never called.
    pub fn into_inner(self) -> W {
        self.work
    }
}

impl<W> fmt::Debug for Rejected<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rejected").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<W> fmt::Display for Rejected<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "task `{}` was not started: its group is closed", self.name)
    }
}

impl<W> std::error::Error for Rejected<W> {}
