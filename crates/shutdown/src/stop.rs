//! The word that says "stop": reason, deadline and flag are one cell, so no reader ever sees one without the others.

use std::fmt;
use std::sync::OnceLock;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::task::TaskOutcome;

/// Why something was told to stop. The first reason wins and never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// The process received this signal, by its number (2 is SIGINT, 15 is SIGTERM).
    Signal(i32),
    /// The program asked for it: the shutdown handle was cancelled, a group was cancelled or dropped.
    Requested,
    /// Every worker ended by itself without an error.
    Completed,
    /// This worker returned an error, and its restart policy did not absorb it; or this task of a group that
    /// [fails fast](crate::TaskGroup::fail_fast) did.
    Failed {
        /// The name of the worker or task.
        worker: String,
    },
    /// This worker panicked, and its restart policy did not absorb it; or this task of a group that
    /// [fails fast](crate::TaskGroup::fail_fast) did.
    Panicked {
        /// The name of the worker or task.
        worker: String,
    },
    /// The workers of this phase did not all call [`ready`](crate::WorkerContext::ready) in time.
    NotReady {
        /// The name of the phase.
        phase: String,
    },
    /// The application could not be started at all: see [`AppError`](crate::AppError) for the causes.
    NotStarted {
        /// The error and its sources.
        cause: String,
    },
}

impl StopReason {
    /// What a group that fails fast is stopped for, if this outcome is a failure.
    pub(crate) fn of_failure<T, E>(outcome: &TaskOutcome<T, E>, task: &str) -> Option<Self> {
        match outcome {
            TaskOutcome::Failed(_) => Some(Self::Failed { worker: task.to_owned() }),
            TaskOutcome::Panicked { .. } => Some(Self::Panicked { worker: task.to_owned() }),
            _ => None,
        }
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal(2) => f.write_str("SIGINT"),
            Self::Signal(15) => f.write_str("SIGTERM"),
            Self::Signal(number) => write!(f, "signal {number}"),
            Self::Requested => f.write_str("a request of the program"),
            Self::Completed => f.write_str("all workers have completed"),
            Self::Failed { worker } => write!(f, "worker `{worker}` failed"),
            Self::Panicked { worker } => write!(f, "worker `{worker}` panicked"),
            Self::NotReady { phase } => write!(f, "phase `{phase}` was not ready in time"),
            Self::NotStarted { cause } => write!(f, "not started: {cause}"),
        }
    }
}

/// A stop that has been requested.
#[derive(Debug, Clone)]
pub(crate) struct Stopping {
    pub(crate) reason: StopReason,
    /// When whatever has not ended is cut.
    pub(crate) deadline: Instant,
}

/// Set at most once. Reading it is one atomic load; the token is for those who wait.
#[derive(Debug, Default)]
pub(crate) struct Stop {
    cell: OnceLock<Stopping>,
    token: CancellationToken,
}

impl Stop {
    /// Sets the reason unless there is one already, then wakes everyone who waits.
    ///
    /// Returns whether this was the first request.
    pub(crate) fn request(&self, stopping: Stopping) -> bool {
        let first = self.cell.set(stopping).is_ok();
        if first {
            // After the cell, so that whoever is woken finds the reason.
            self.token.cancel();
        }
        first
    }

    pub(crate) fn is_set(&self) -> bool {
        self.cell.get().is_some()
    }

    pub(crate) fn get(&self) -> Option<&Stopping> {
        self.cell.get()
    }

    pub(crate) fn token(&self) -> &CancellationToken {
        &self.token
    }
}

/// The moment `timeout` from now. One beyond what an instant can hold is as good as 30 years away.
pub(crate) fn after(timeout: Duration) -> Instant {
    const FAR: Duration = Duration::from_secs(60 * 60 * 24 * 365 * 30);
    Instant::now() + timeout.min(FAR)
}
