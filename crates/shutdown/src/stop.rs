//! A request to stop: reason, deadline and flag are one cell, so no reader ever sees one without the others.

use std::fmt;
use std::pin::pin;
use std::sync::OnceLock;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Why something was told to stop. The first reason wins and never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// The process received this signal, by its number (2 is SIGINT, 15 is SIGTERM).
    Signal(i32),
    /// The program asked for it: the shutdown handle was cancelled, or a group was cancelled or dropped.
    Requested,
    /// The program asked for it and said why: [`cancel_all_because`](crate::TaskGroup::cancel_all_because).
    Because(String),
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

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal(2) => f.write_str("SIGINT"),
            Self::Signal(15) => f.write_str("SIGTERM"),
            Self::Signal(number) => write!(f, "signal {number}"),
            Self::Requested => f.write_str("a request of the program"),
            Self::Because(why) => f.write_str(why),
            Self::Completed => f.write_str("all workers have completed"),
            Self::Failed { worker } => write!(f, "worker `{worker}` failed"),
            Self::Panicked { worker } => write!(f, "worker `{worker}` panicked"),
            Self::NotReady { phase } => write!(f, "phase `{phase}` was not ready in time"),
            Self::NotStarted { cause } => write!(f, "not started: {cause}"),
        }
    }
}

/// Whether an application should get work; see [`Application::readiness`](crate::Application::readiness).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Readiness {
    /// A phase has yet to start or to become ready.
    #[default]
    Starting,
    /// Every phase is ready, and nobody has asked for a stop.
    Ready,
    /// A stop has begun, though it may be in its [drain delay](crate::Application::drain_delay).
    Stopping,
}

impl Readiness {
    /// Returns whether the application should get work.
    pub fn is_ready(self) -> bool {
        self == Self::Ready
    }
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Stopping => "stopping",
        })
    }
}

/// A stop that has been requested.
#[derive(Debug, Clone)]
pub(crate) struct Stopping {
    pub(crate) reason: StopReason,
    /// When whatever has not ended is cut.
    pub(crate) deadline: Instant,
}

/// Set at most once. Reading it is one atomic load; the token is for tasks that wait.
#[derive(Debug, Default)]
pub(crate) struct Stop {
    cell: OnceLock<Stopping>,
    token: CancellationToken,
}

impl Stop {
    /// Sets the reason unless there is one already, then wakes every waiting task.
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

/// The moment `timeout` from now. If that is more than an instant can hold, it is 30 years away instead.
pub(crate) fn after(timeout: Duration) -> Instant {
    const FAR: Duration = Duration::from_secs(60 * 60 * 24 * 365 * 30);
    Instant::now() + timeout.min(FAR)
}

/// The stop of one task alone, in addition to the stop of its group.
#[derive(Debug, Default)]
pub(crate) struct OwnStop {
    cell: OnceLock<Stopping>,
    told: Notify,
    /// Given to code that takes a token. Created on demand, so that a cancel of 10,000 tasks does not visit 10,000
    /// tokens.
    token: OnceLock<CancellationToken>,
    /// Whether this stop came before the group's, as seen by the first caller that asked for the reason.
    is_first: OnceLock<bool>,
}

impl OwnStop {
    pub(crate) fn request(&self, stopping: Stopping) {
        if self.cell.set(stopping).is_ok() {
            // After the cell, so that whoever is woken finds the reason.
            self.told.notify_waiters();
            if let Some(token) = self.token.get() {
                token.cancel();
            }
        }
    }

    pub(crate) fn is_set(&self) -> bool {
        self.cell.get().is_some()
    }

    /// The reason of this stop or the group's. The one that was seen first stays the reason.
    pub(crate) fn reason(&self, group: &Stop) -> Option<StopReason> {
        let (own, group) = (self.cell.get(), group.get());
        let is_first = || *self.is_first.get_or_init(|| own.is_some());
        let first = own.or(group).and_then(|_| if is_first() { own } else { group });
        first.map(|stopping| stopping.reason.clone())
    }

    /// The earlier of this stop's deadline and the group's.
    pub(crate) fn deadline(&self, group: &Stop) -> Option<Instant> {
        let deadlines = [self.cell.get(), group.get()];
        deadlines.into_iter().flatten().map(|stopping| stopping.deadline).min()
    }

    /// Waits for this stop or the group's.
    pub(crate) async fn cancelled(&self, group: &Stop) {
        let mut told = pin!(self.told.notified());
        // Before the check, so that a stop between the two is not missed.
        told.as_mut().enable();
        if !self.is_set() {
            group.token().run_until_cancelled(told).await;
        }
    }

    /// A token that is cancelled with this stop or the group's.
    pub(crate) fn token(&self, group: &Stop) -> CancellationToken {
        let token = self.token.get_or_init(|| group.token().child_token());
        // The stop may have come before the token.
        if self.is_set() {
            token.cancel();
        }
        token.child_token()
    }
}
