//! What tasks return, and how they end. Whatever becomes of a task, is told exactly once.

use std::fmt;

use crate::panics::PanicLocation;

/// The error of a task whose type was not kept.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// How a task ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TaskOutcome<T = (), E = BoxError> {
    /// It returned. A task that saw its cancellation and returned in time has completed too.
    Completed(T),
    /// It was told to stop and its future was dropped at an await, or it was never started.
    Cancelled,
    /// It returned an error.
    Failed(E),
    /// It panicked.
    #[non_exhaustive]
    Panicked {
        /// The panic message, or the type of the payload if that is not text.
        message: String,
        /// Where it panicked. If the program has set its own panic hook since, only that hook knows the place; then
        /// this is where the task was spawned.
        location: PanicLocation,
    },
    /// Its grace was over, or its runtime was shut down, and its future was dropped.
    Aborted,
    /// Its grace was over, and it cannot be stopped: it is a running blocking closure, or a future that does not yield.
    Abandoned,
}

impl<T, E> TaskOutcome<T, E> {
    /// Returns whether the task returned without an error.
    pub fn is_completed(&self) -> bool {
        matches!(self, Self::Completed(_))
    }

    /// Returns what the task returned, unless it ended otherwise.
    pub fn completed(self) -> Option<T> {
        match self {
            Self::Completed(value) => Some(value),
            _ => None,
        }
    }

    /// Returns whether the task was dropped because it was told to stop.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Cancelled)
    }

    /// Returns whether the task returned an error.
    pub fn is_failed(&self) -> bool {
        matches!(self, Self::Failed(_))
    }

    /// Returns whether the task panicked.
    pub fn is_panicked(&self) -> bool {
        matches!(self, Self::Panicked { .. })
    }
}

impl<T, E: fmt::Display> fmt::Display for TaskOutcome<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Completed(_) => f.write_str("completed"),
            Self::Cancelled => f.write_str("cancelled"),
            Self::Failed(error) => write!(f, "failed: {error}"),
            Self::Panicked { message, location } => write!(f, "panicked: {message}, at {location}"),
            Self::Aborted => f.write_str("aborted"),
            Self::Abandoned => f.write_str("abandoned"),
        }
    }
}

/// What a task of a [`TaskGroup<T, E>`](crate::TaskGroup) may return: `Result<T, E>`, or nothing if `T` is `()`.
pub trait TaskOutput<T, E> {
    /// Says how a task that returned this ended.
    fn into_outcome(self) -> TaskOutcome<T, E>;
}

impl<E> TaskOutput<(), E> for () {
    fn into_outcome(self) -> TaskOutcome<(), E> {
        TaskOutcome::Completed(())
    }
}

impl<T, E> TaskOutput<T, E> for Result<T, E> {
    fn into_outcome(self) -> TaskOutcome<T, E> {
        match self {
            Ok(value) => TaskOutcome::Completed(value),
            Err(error) => TaskOutcome::Failed(error),
        }
    }
}

#[expect(private_interfaces, reason = "the trait behind `Never` is the only way to name the type, and no more")]
impl<T, E> TaskOutput<T, E> for Never {
    fn into_outcome(self) -> TaskOutcome<T, E> {
        self
    }
}

/// What a worker may return: nothing, or `Result<(), E>` with any error.
pub trait WorkerOutput {
    /// Says whether the worker failed.
    ///
    /// # Errors
    ///
    /// The worker's own error, boxed.
    fn into_result(self) -> Result<(), BoxError>;
}

impl WorkerOutput for () {
    fn into_result(self) -> Result<(), BoxError> {
        Ok(())
    }
}

impl<E: Into<BoxError>> WorkerOutput for Result<(), E> {
    fn into_result(self) -> Result<(), BoxError> {
        self.map_err(Into::into)
    }
}

#[expect(private_interfaces, reason = "the trait behind `Never` is the only way to name the type, and no more")]
impl WorkerOutput for Never {
    fn into_result(self) -> Result<(), BoxError> {
        self
    }
}

/// The type of a `loop` without an end, and of a panic. Stable Rust can name it only as the return type of this
/// function pointer.
pub(crate) type Never = <fn() -> ! as Returning>::Value;

pub(crate) trait Returning {
    type Value;
}

impl<T> Returning for fn() -> T {
    type Value = T;
}

/// What a task that outlived its grace was doing when it was cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StragglerState {
    /// The same poll was running at two observations some milliseconds apart: it blocks its thread or never yields.
    BlockedInPoll,
    /// It was waiting at an await, or moving from one await to the next.
    ParkedAtAwait,
    /// It is a blocking closure; only its own return can end it.
    BlockingClosure,
    /// It never learnt of its stop: other work held every thread of the runtime from then on.
    Starved,
}

impl StragglerState {
    /// As it is kept in a trace. Zero stands for none.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::BlockedInPoll => 1,
            Self::ParkedAtAwait => 2,
            Self::BlockingClosure => 3,
            Self::Starved => 4,
        }
    }

    pub(crate) fn of(number: u8) -> Option<Self> {
        let states = [Self::BlockedInPoll, Self::ParkedAtAwait, Self::BlockingClosure, Self::Starved];
        states.into_iter().find(|state| state.number() == number)
    }
}

impl fmt::Display for StragglerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BlockedInPoll => "blocked inside a poll",
            Self::ParkedAtAwait => "parked at an await",
            Self::BlockingClosure => "inside a blocking closure",
            Self::Starved => "starved: the runtime ran nothing after it was told to stop",
        })
    }
}
