//! One thing that went wrong.
//!
//! Invariant: a failure says at which await, and how to see just that run again.

use std::fmt;

use crate::plan::{ONLY, Plan, Then};
use crate::site::{Await, Site};
use crate::way::Way;

/// One run that went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Failure {
    /// The run to see again.
    pub(crate) plan: Plan,
    /// How often it had been pending, which differs from the plan in [`Way::Scope`].
    pub(crate) point: usize,
    pub(crate) completed: bool,
    /// Whether it ended before it reached a point, by a panic or a hang.
    pub(crate) ended_early: bool,
    pub(crate) place: Option<Await>,
    pub(crate) rival: Option<Await>,
    pub(crate) refusal: Refusal,
}

/// The kind of failure. The order is the one in which failures of one run are reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum FailureKind {
    Hang,
    Panic,
    Torn,
    Futurelock,
    /// A call that was dropped and called again returned something else.
    NotSafe,
    /// A call that is dropped again and again never ends.
    Starved,
    Check,
    /// The drop took longer than allowed.
    BlockingDrop,
    /// Undisturbed runs gave different results.
    Unsteady,
    Incomplete,
}

impl FailureKind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Hang => "hang",
            Self::Panic => "panic",
            Self::Torn => "torn",
            Self::Futurelock => "futurelock",
            Self::NotSafe => "not safe",
            Self::Starved => "starved",
            Self::Check => "check",
            Self::BlockingDrop => "blocking drop",
            Self::Unsteady => "unsteady",
            Self::Incomplete => "incomplete",
        }
    }
}

/// Why a run is a failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) kind: FailureKind,
    pub(crate) message: String,
    /// The undisturbed run's result, and what was seen instead.
    pub(crate) evidence: Option<(String, String)>,
}

impl Refusal {
    pub(crate) fn new(kind: FailureKind, message: String) -> Self {
        Self { kind, message, evidence: None }
    }
}

impl Failure {
    /// Returns how many times the operation had been pending when it was dropped: 0 if it was never polled.
    #[must_use]
    pub fn point(&self) -> usize {
        self.point
    }

    /// Returns how many times tasks had been polled since that pending: 0 unless it was dropped between two polls of
    /// its tasks.
    #[must_use]
    pub fn step(&self) -> usize {
        self.plan.step
    }

    /// Returns the way it was dropped.
    #[must_use]
    pub fn way(&self) -> Way {
        self.plan.way
    }

    /// Returns the units of tokio's budget left for each poll; `None` is all of them, as in production.
    #[must_use]
    pub fn budget(&self) -> Option<u32> {
        self.plan.budget
    }

    /// Returns the await at which it was dropped, or the call that began the [torn](Failure::is_torn) critical section.
    /// `None` at point 0, after the operation had completed, or if no frame of user code was seen (a build without line
    /// tables).
    #[must_use]
    pub fn site(&self) -> Option<&Site> {
        self.place.as_ref().map(Await::site)
    }

    /// Returns the awaits around [`site`](Failure::site), innermost first: what called the function that waits, and
    /// from where. Empty if the operation itself waits.
    #[must_use]
    pub fn callers(&self) -> &[Site] {
        self.place.as_ref().map_or(&[], Await::callers)
    }

    /// Returns where the rival waits for the suspended operation, if this is a [futurelock](Failure::is_futurelock).
    #[must_use]
    pub fn rival_site(&self) -> Option<&Site> {
        self.rival.as_ref().map(Await::site)
    }

    /// Returns the message of the check, or of the panic.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.refusal.message
    }

    /// Returns whether the operation had completed: it is wrong even if it is not dropped.
    #[must_use]
    pub fn is_completed(&self) -> bool {
        self.completed
    }

    /// Returns whether something did not end within its bound.
    #[must_use]
    pub fn is_hang(&self) -> bool {
        self.refusal.kind == FailureKind::Hang
    }

    /// Returns whether something panicked.
    #[must_use]
    pub fn is_panic(&self) -> bool {
        self.refusal.kind == FailureKind::Panic
    }

    /// Returns whether something other than the exploration dropped a critical section of `cancel-safe-guard` before
    /// its end. [Critical sections](crate#critical-sections) says what counts.
    #[must_use]
    pub fn is_torn(&self) -> bool {
        self.refusal.kind == FailureKind::Torn
    }

    /// Returns whether something waits for what the operation holds, while the operation is alive but not polled; see
    /// [`Explore::suspended`](crate::Explore::suspended).
    #[must_use]
    pub fn is_futurelock(&self) -> bool {
        self.refusal.kind == FailureKind::Futurelock
    }

    /// Returns whether the drop took longer than [`Explore::drop_within`](crate::Explore::drop_within) allows.
    #[must_use]
    pub fn is_blocking_drop(&self) -> bool {
        self.refusal.kind == FailureKind::BlockingDrop
    }

    /// Returns whether the exploration reached one of its own bounds and left points unvisited.
    #[must_use]
    pub fn is_incomplete(&self) -> bool {
        self.refusal.kind == FailureKind::Incomplete
    }

    /// The order of failures: simplest first.
    pub(crate) fn rank(&self) -> (bool, Plan, FailureKind) {
        (self.completed, self.plan, self.refusal.kind)
    }

    fn headline(&self) -> String {
        let each = self.plan.then == Then::DropEach;
        let verb = match self.refusal.kind {
            FailureKind::Torn => "torn",
            FailureKind::Hang => "stuck",
            FailureKind::Futurelock => "left alive",
            FailureKind::Panic if self.ended_early => "panicked after it had waited",
            _ if self.plan.then == Then::Resume => "left alive and resumed",
            _ if each => "each call dropped",
            _ => "dropped",
        };
        let nth = if each { format!(" at its pending {}", self.plan.point) } else { String::new() };
        match &self.place {
            Some(place) if self.is_torn() => format!("torn at {}", place.site()),
            _ if self.completed && !each => "completed, never dropped".to_owned(),
            Some(place) => format!("{verb}{nth} at {}", place.site()),
            None if self.point == 0 => format!("{verb} before the first poll"),
            None => format!("{verb}{nth} at an await that no line table names"),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_incomplete() || self.refusal.kind == FailureKind::Unsteady {
            // No run is to blame, so there is none to repeat.
            let what = if self.is_incomplete() { "exploration incomplete" } else { "undisturbed runs differ" };
            return write!(f, "{what}: {}", self.message());
        }
        let Plan { budget, point, way, step, .. } = self.plan;
        write!(f, "{}", self.headline())?;
        if step > 0 {
            write!(f, ", after {}", count(step, "poll"))?;
            write!(f, " of tasks, which stood at awaits of their own")?;
        }
        writeln!(f, ": {}", self.message())?;
        for caller in self.callers() {
            writeln!(f, "  called from {caller}")?;
        }
        if let Some(rival) = &self.rival {
            writeln!(f, "  the rival waits at {}", rival.site())?;
            for caller in rival.callers() {
                writeln!(f, "    called from {caller}")?;
            }
        }
        let units = budget.map_or_else(|| "natural".to_owned(), |units| units.to_string());
        writeln!(f, "  point {}, way {way}, budget {units}", self.point)?;
        if self.plan.is_plain() {
            let units = budget.map_or_else(|| "None".to_owned(), |units| format!("Some({units})"));
            write!(f, "  again: .only({point}, Way::{way:?}, {units}), or {ONLY}={}", self.plan)
        } else {
            write!(f, "  again: {ONLY}={}", self.plan)
        }
    }
}

/// `1 point`, `2 points`.
pub(crate) fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}
