//! What an exploration found, and how to see one failure again.
//!
//! Invariant: failures are in the order simplest first: natural budget before starved ones, then the lowest point.

use std::collections::BTreeSet;
use std::fmt;

use crate::campaign::publish;
use crate::explore::{ONLY, Plan, Way};
use crate::site::Site;

/// What an exploration visited and what it found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "a report nobody looks at proves nothing: call assert_clean()"]
pub struct Report {
    pub(crate) points: usize,
    pub(crate) runs: usize,
    pub(crate) unsettled: usize,
    pub(crate) varied: bool,
    pub(crate) sites: Vec<Site>,
    pub(crate) failures: Vec<Failure>,
}

impl Report {
    /// Not a public `Default`: a clean report that nobody earned should be hard to come by.
    pub(crate) const EMPTY: Self =
        Self { points: 0, runs: 0, unsettled: 0, varied: false, sites: Vec::new(), failures: Vec::new() };

    /// The number of points at which the operation was dropped: the pendings it has under each budget, and once the
    /// point 0, at which it was never polled. Each was visited in every way.
    #[must_use]
    pub fn points(&self) -> usize {
        self.points
    }

    /// The awaits at which the operation was dropped, in the order of files and lines.
    #[must_use]
    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// What went wrong, simplest first.
    #[must_use]
    pub fn failures(&self) -> &[Failure] {
        &self.failures
    }

    /// Whether nothing went wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.failures.is_empty()
    }

    /// How many times the operation was run: each point in each way, and the runs that completed.
    #[must_use]
    pub fn runs(&self) -> usize {
        self.runs
    }

    /// How many runs were checked although spawned tasks were still alive after the time allowed for settling.
    #[must_use]
    pub fn unsettled(&self) -> usize {
        self.unsettled
    }

    /// Whether the number of points differed between runs, as it does with sockets. The report then says what it
    /// saw, but another exploration may see other points.
    #[must_use]
    pub fn is_varied(&self) -> bool {
        self.varied
    }

    /// Panics with the simplest failure, if there is any.
    ///
    /// # Panics
    ///
    /// If the report is not clean.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert!(self.is_clean(), "{self}");
    }

    /// Prints the line `cancel-points <krate> <operation> <points>` to standard output and, if the environment
    /// variable `CANCEL_SAFE_POINTS_FILE` is set, appends it to that file, so that a table of what was visited can be
    /// made of many tests. Returns the report, for `assert_clean()` to follow.
    ///
    /// # Panics
    ///
    /// If that file cannot be written: a table that lacks lines in silence would be worse.
    #[track_caller]
    pub fn publish(&self, krate: &str, operation: &str) -> &Self {
        publish(&format!("cancel-points {krate} {operation} {}\n", self.points));
        self
    }

    pub(crate) fn add_failure(&mut self, failure: Failure) {
        let key = |failure: &Failure| (failure.completed, failure.plan, failure.kind);
        // A completion is confirmed several times; its failure is one failure.
        if let Err(at) = self.failures.binary_search_by_key(&key(&failure), key) {
            self.failures.insert(at, failure);
        }
    }

    pub(crate) fn add_sites(&mut self, sites: BTreeSet<Site>) {
        self.sites = sites.into_iter().collect();
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (points, awaits) = (count(self.points, "point"), count(self.sites.len(), "await"));
        write!(f, "{points} at {awaits} in {}", count(self.runs, "run"))?;
        if self.varied {
            write!(f, ", their number varied")?;
        }
        if self.unsettled > 0 {
            write!(f, ", {} unsettled", count(self.unsettled, "run"))?;
        }
        match self.failures.as_slice() {
            [] => write!(f, ": clean"),
            [only] => write!(f, ": 1 failure\n{only}"),
            [first, rest @ ..] => write!(f, ": {} failures, the simplest:\n{first}", rest.len() + 1),
        }
    }
}

fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// One run that went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Failure {
    pub(crate) plan: Plan,
    pub(crate) completed: bool,
    pub(crate) site: Option<Site>,
    pub(crate) kind: FailureKind,
    pub(crate) message: String,
}

/// What kind of wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum FailureKind {
    Hang,
    Panic,
    Torn,
    Check,
    Incomplete,
}

impl Failure {
    /// The pendings the operation had had: 0 if it was never polled.
    #[must_use]
    pub fn point(&self) -> usize {
        self.plan.point
    }

    /// The way it was dropped.
    #[must_use]
    pub fn way(&self) -> Way {
        self.plan.way
    }

    /// The units of tokio's budget left for each poll; `None` is all of them, as in production.
    #[must_use]
    pub fn budget(&self) -> Option<u32> {
        self.plan.budget
    }

    /// The await at which it was dropped, or the call that began the critical section which was
    /// [torn](Failure::is_torn). `None` at point 0, after it had completed, or if no frame of user code was
    /// seen (a build without line tables).
    #[must_use]
    pub fn site(&self) -> Option<&Site> {
        self.site.as_ref()
    }

    /// What the check said, or what was thrown.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Whether the operation had completed: it is wrong even when nobody drops it.
    #[must_use]
    pub fn is_completed(&self) -> bool {
        self.completed
    }

    /// Whether something was not woken within its bound, or never came to an end.
    #[must_use]
    pub fn is_hang(&self) -> bool {
        self.kind == FailureKind::Hang
    }

    /// Whether the operation, its drop, the setup or the check panicked.
    #[must_use]
    pub fn is_panic(&self) -> bool {
        self.kind == FailureKind::Panic
    }

    /// Whether a critical section of `cancel-safe-guard` was dropped before its end, and not by the exploration itself.
    /// [Critical sections](crate#critical-sections) says what counts.
    #[must_use]
    pub fn is_torn(&self) -> bool {
        self.kind == FailureKind::Torn
    }

    /// Whether the exploration reached one of its own bounds, so that points were left unvisited.
    #[must_use]
    pub fn is_incomplete(&self) -> bool {
        self.kind == FailureKind::Incomplete
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { point, way, budget } = self.plan;
        match &self.site {
            // No run is to blame, so there is none to repeat.
            _ if self.is_incomplete() => return write!(f, "exploration incomplete: {}", self.message),
            Some(site) if self.is_torn() => write!(f, "torn at {site}")?,
            _ if self.completed => write!(f, "completed, never dropped")?,
            Some(site) if self.is_hang() => write!(f, "stuck at {site}")?,
            Some(site) => write!(f, "dropped at {site}")?,
            None if point == 0 => write!(f, "dropped before the first poll")?,
            None => write!(f, "dropped at an await that no line table names")?,
        }
        let rust_budget = budget.map_or_else(|| "None".to_owned(), |units| format!("Some({units})"));
        let budget = budget.map_or_else(|| "natural".to_owned(), |units| units.to_string());
        writeln!(f, ": {}", self.message)?;
        writeln!(f, "  point {point}, way {way}, budget {budget}")?;
        write!(f, "  again: .only({point}, Way::{way:?}, {rust_budget}), or {ONLY}={point}:{way}:{budget}")
    }
}
