//! The ways an operation ends at its point, and its outcome.
//!
//! Invariant: the user's check gets this outcome, so an operation has either completed or been dropped, never neither.

use std::fmt;

/// How an operation is dropped at a point. Each way finds bugs that the others miss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Way {
    /// At once: the blocking jobs that it submitted have not begun, and land after the drop.
    Eager,
    /// After everything around it has come to rest: what it waits for is done, but it has not seen that yet.
    Settled,
    /// Together with its runtime: tasks that it (or a `Drop`) has spawned end at their current awaits. Blocking jobs
    /// that are already submitted still run, as in tokio.
    ///
    /// The check runs on a fresh runtime, so the state has to outlive the runtime of the setup: a pool or a connection
    /// that was opened there is dead.
    Shutdown,
    /// By a cancel scope of `cancel-safe-guard` around it, which is cancelled at the point: a critical section is
    /// finished, and the operation is dropped at its next pending outside of one. It may complete instead.
    ///
    /// Use it for operations that only such scopes ever end; the ways above drop them in the middle of a section.
    Scope,
    /// By a panic raised inside the leaf future that waits: its destructors run while the thread unwinds, and the
    /// locks it holds are poisoned.
    Panic,
    /// With its whole process, which is killed: no destructor runs, and only what is outside the process survives.
    /// [Crashes](crate#crashes) says how to write the setup.
    Crash,
}

impl Way {
    pub(crate) const ALL: [Self; 6] =
        [Self::Eager, Self::Settled, Self::Shutdown, Self::Scope, Self::Panic, Self::Crash];
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eager => "eager",
            Self::Settled => "settled",
            Self::Shutdown => "shutdown",
            Self::Scope => "scope",
            Self::Panic => "panic",
            Self::Crash => "crash",
        })
    }
}

/// The outcome of the operation in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "an operation either completed or it was dropped; a match should say both")]
pub enum Outcome<T> {
    /// It returned.
    Completed(T),
    /// It was dropped.
    Dropped {
        /// The number of times it had returned `Pending`; 0 if it was never polled.
        point: usize,
        /// The way it was dropped.
        way: Way,
    },
}

impl<T> Outcome<T> {
    /// Returns whether the operation returned.
    #[must_use]
    pub fn is_completed(&self) -> bool {
        matches!(self, Self::Completed(_))
    }

    /// Returns whether the operation was dropped.
    #[must_use]
    pub fn is_dropped(&self) -> bool {
        !self.is_completed()
    }

    /// Returns what the operation returned.
    #[must_use]
    pub fn completed(self) -> Option<T> {
        match self {
            Self::Completed(value) => Some(value),
            Self::Dropped { .. } => None,
        }
    }
}
