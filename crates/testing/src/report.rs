//! The result of an exploration.
//!
//! Invariant: failures are ordered simplest first: the natural budget before starved ones, then the lowest point.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::failure::{Failure, FailureKind, count};
use crate::plan::Question;
use crate::publish::publish;
use crate::site::{Await, Place, Site};
use crate::way::Way;

/// What an exploration visited and what it found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "a report nobody looks at proves nothing: call assert_clean()"]
pub struct Report {
    pub(crate) question: Question,
    pub(crate) points: usize,
    pub(crate) task_points: usize,
    pub(crate) task_points_in_all: usize,
    pub(crate) runs: usize,
    pub(crate) unsettled: usize,
    pub(crate) varied: bool,
    /// A `select!` that polls its branches in a random order, if the report varies.
    pub(crate) random_select: Option<Site>,
    pub(crate) notes: Vec<String>,
    pub(crate) sites: Vec<Site>,
    /// How many points each site has.
    pub(crate) visited: Vec<usize>,
    pub(crate) covered: BTreeSet<Place>,
    pub(crate) failures: Vec<Failure>,
}

impl Report {
    /// Not a public `Default`, because it should be hard to get a clean report without an exploration.
    pub(crate) const EMPTY: Self = Self {
        question: Question::Run,
        points: 0,
        task_points: 0,
        task_points_in_all: 0,
        runs: 0,
        unsettled: 0,
        varied: false,
        random_select: None,
        notes: Vec::new(),
        sites: Vec::new(),
        visited: Vec::new(),
        covered: BTreeSet::new(),
        failures: Vec::new(),
    };

    /// Returns the number of points at which the operation was dropped: its pendings under each budget, plus once the
    /// point 0, at which it was never polled. Each was visited in every way.
    #[must_use]
    pub fn points(&self) -> usize {
        self.points
    }

    /// Returns the number of points between two polls of tasks. The operation was dropped there as well, because it had
    /// its own tasks; see [`Explore::tasks`](crate::Explore::tasks).
    #[must_use]
    pub fn task_points(&self) -> usize {
        self.task_points
    }

    /// Returns the awaits at which the operation was dropped, ordered by file and line.
    #[must_use]
    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// Returns what went wrong, simplest first.
    #[must_use]
    pub fn failures(&self) -> &[Failure] {
        &self.failures
    }

    /// Returns whether nothing went wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.failures.is_empty()
    }

    /// Returns how many times the operation ran: each point in each way, and the runs that completed.
    #[must_use]
    pub fn runs(&self) -> usize {
        self.runs
    }

    /// Returns how many runs were checked while spawned tasks were still alive after the time allowed for settling.
    #[must_use]
    pub fn unsettled(&self) -> usize {
        self.unsettled
    }

    /// Returns whether the number of points differed between runs, as it does with sockets. The report then says what
    /// it saw, but another exploration may see other points.
    #[must_use]
    pub fn is_varied(&self) -> bool {
        self.varied
    }

    /// Returns what was not explored, or only in part, and why: for example, a setup whose tasks end with their
    /// runtime.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Panics with the simplest failure of each await, if there is any.
    ///
    /// # Panics
    ///
    /// If the report is not clean.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert!(self.is_clean(), "{self}");
    }

    /// Prints the line `cancel-points <krate> <operation> <points>` to standard output. If the environment variable
    /// `CANCEL_SAFE_POINTS_FILE` is set, it also appends the line to that file; the lines of many tests make a table of
    /// what was visited. Returns the report, so `assert_clean()` can follow.
    ///
    /// # Panics
    ///
    /// If that file cannot be written: a table that silently lacks lines would be worse.
    #[track_caller]
    pub fn publish(&self, krate: &str, operation: &str) -> &Self {
        publish(&format!("cancel-points {krate} {operation} {}\n", self.points + self.task_points));
        self
    }

    pub(crate) fn add_failure(&mut self, failure: Failure) {
        // A call that takes a unit itself before its leaf makes no progress on one unit: the budget starves it.
        let is_starved = |it: &Failure| it.refusal.kind == FailureKind::Starved;
        if is_starved(&failure) && failure.budget().is_some() && !self.failures.iter().any(is_starved) {
            return;
        }
        // A completion is confirmed several times; its failure is one failure.
        if let Err(at) = self.failures.binary_search_by_key(&failure.rank(), Failure::rank) {
            self.failures.insert(at, failure);
        }
    }

    pub(crate) fn cover(&mut self, place: Option<&Await>) {
        self.covered.extend(place.into_iter().flat_map(Await::frames).cloned());
    }

    pub(crate) fn count_sites<'a>(&mut self, places: impl Iterator<Item = &'a Await>) {
        let mut points = BTreeMap::<&Site, usize>::new();
        for place in places {
            *points.entry(place.site()).or_default() += 1;
        }
        (self.sites, self.visited) = points.into_iter().map(|(site, points)| (site.clone(), points)).unzip();
    }

    /// Notes what in the setup, and in the bounds, kept points from being visited.
    pub(crate) fn note(&mut self, (tasks, sockets): (usize, usize), workers: usize) {
        for (number, noun) in [(tasks, "task"), (sockets, "socket")] {
            if number > 0 {
                let end = if number == 1 { "ends with its" } else { "end with their" };
                self.notes.push(format!(
                    "{} of the setup {end} runtime, so the state would be dead: {} was left out (ask for it by ways())",
                    count(number, noun),
                    Way::Shutdown
                ));
            }
        }
        if workers > 0 {
            let jobs = count(workers, "blocking job");
            self.notes.push(format!(
                "{jobs} did not end, and got {}: runs may vary, and tokio's paused clock stands still meanwhile",
                if workers == 1 { "a thread of its own" } else { "threads of their own" }
            ));
        }
        if self.task_points < self.task_points_in_all {
            let all = self.task_points_in_all;
            self.notes.push(format!("{} of {all} points between polls of tasks were visited", self.task_points));
        }
    }

    /// The simplest failure of each await, in the order of failures.
    fn simplest(&self) -> Vec<&Failure> {
        let mut seen: Vec<(Option<&Site>, FailureKind)> = Vec::new();
        let mut simplest = Vec::new();
        for failure in &self.failures {
            let key = (failure.site(), failure.refusal.kind);
            if !seen.contains(&key) {
                seen.push(key);
                simplest.push(failure);
            }
        }
        simplest
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (points, awaits) = (count(self.points, "point"), count(self.sites.len(), "await"));
        write!(f, "{points} at {awaits}")?;
        if self.task_points > 0 {
            write!(f, " and {} between polls of tasks", self.task_points)?;
        }
        write!(f, " in {}", count(self.runs, "run"))?;
        if self.varied {
            write!(f, ", their number varied")?;
        }
        if let Some(site) = &self.random_select {
            write!(f, " (likely because the select! at {site} is not `biased`)")?;
        }
        if self.unsettled > 0 {
            write!(f, ", {} unsettled", count(self.unsettled, "run"))?;
        }
        let simplest = self.simplest();
        match (self.failures.as_slice(), simplest.as_slice()) {
            ([], _) => write!(f, ": clean")?,
            ([only], _) => write!(f, ": 1 failure\n{only}")?,
            (all, [first]) => write!(f, ": {} failures, the simplest:\n{first}", all.len())?,
            (all, simplest) => {
                writeln!(f, ": {} failures, the simplest of each await:", all.len())?;
                self.fmt_table(f)?;
                for failure in simplest {
                    write!(f, "\n{failure}")?;
                }
            }
        }
        for note in &self.notes {
            write!(f, "\nnote: {note}")?;
        }
        Ok(())
    }
}

impl Report {
    fn fmt_table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.sites.iter().map(ToString::to_string).collect();
        let width = names.iter().map(String::len).max().unwrap_or(0).max("await".len());
        writeln!(f, "  {:<width$}  {:>7} {:>9}", "await", "points", "failures")?;
        for ((name, site), points) in names.iter().zip(&self.sites).zip(&self.visited) {
            let failures = self.failures.iter().filter(|failure| failure.site() == Some(site)).count();
            writeln!(f, "  {name:<width$}  {points:>7} {failures:>9}")?;
        }
        Ok(())
    }
}
