//! In which order the points are visited, and when a search ends.
//!
//! Invariant: a search ends, and a point left out because of a bound is a failure, never silence.

use std::backtrace::Backtrace;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::Location;
use std::time::Instant;

use crate::explore::{Explore, Plan, Way};
use crate::report::{Failure, FailureKind, Report};
use crate::site::{Namer, Site};

/// An operation has completed at a point when it did so this many times in a row.
const CONFIRMATIONS: usize = 3;

/// What one run showed.
#[derive(Debug, Default)]
pub(crate) struct Visit {
    pub(crate) polls: usize,
    pub(crate) end: End,
    /// Where it waited last: the traces, not yet named, or the name that another process has found.
    pub(crate) traces: Vec<Backtrace>,
    pub(crate) site: Option<Site>,
    pub(crate) unsettled: bool,
    /// Where the critical section began that the code under test has torn.
    pub(crate) torn: Option<Site>,
    pub(crate) failure: Option<(FailureKind, String)>,
}

/// How the operation ended in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum End {
    /// Before the point, by its own panic or because nothing woke it.
    #[default]
    Failed,
    /// Before the point, with its result.
    Completed,
    /// At the point.
    Dropped,
}

/// Visits every point there is, or the one that was asked for.
pub(crate) fn search(
    options: &Explore,
    only: Option<Plan>,
    caller: &'static Location<'static>,
    visit: &mut dyn FnMut(Plan) -> Visit,
) -> Report {
    let mut search = Search {
        options,
        visit,
        namer: Namer::new(caller),
        started: Instant::now(),
        sites: BTreeMap::new(),
        ends: BTreeMap::new(),
        report: Report::EMPTY,
    };
    match only {
        Some(plan) => drop(search.go(plan)),
        None => search.everything(),
    }
    search.finish()
}

struct Search<'a> {
    options: &'a Explore,
    visit: &'a mut dyn FnMut(Plan) -> Visit,
    namer: Namer,
    started: Instant,
    /// The await of each point, by budget and number.
    sites: BTreeMap<(Option<u32>, usize), Option<Site>>,
    /// After how many pendings the operation was seen to complete, by budget.
    ends: BTreeMap<Option<u32>, BTreeSet<usize>>,
    report: Report,
}

/// Whether it makes sense to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    GoOn,
    GiveUp,
}

impl Search<'_> {
    fn everything(&mut self) {
        if self.options.ways.is_empty() {
            let plan = Plan { budget: None, point: 0, way: Way::Eager };
            return self.incomplete(plan, "ways() was given none, so nothing would be dropped".to_owned());
        }
        let budgets = std::iter::once(None).chain(self.options.budgets.iter().copied().map(Some));
        for budget in budgets {
            if self.measure(budget) == Next::GiveUp {
                return;
            }
            for &way in &self.options.ways {
                if self.sweep(budget, way) == Next::GiveUp {
                    return;
                }
            }
        }
    }

    /// Runs the operation to its end once. One that never ends is found here, at the price of one run, and is not
    /// swept: each of its points would cost as many polls as its number.
    fn measure(&mut self, budget: Option<u32>) -> Next {
        let plan = Plan { budget, point: self.options.max_polls, way: Way::Eager };
        let (end, polls) = self.go(plan);
        match end {
            End::Completed if polls <= self.options.max_points => Next::GoOn,
            End::Completed => {
                let bound = self.options.max_points;
                self.incomplete(plan, format!("{polls} points, more than max_points({bound})"));
                Next::GiveUp
            }
            End::Failed => Next::GiveUp,
            End::Dropped => {
                let site = self.sites.get(&(budget, polls)).cloned().flatten();
                let message = format!("not completed after max_polls({polls})");
                self.report.add_failure(Failure { plan, completed: false, site, kind: FailureKind::Hang, message });
                Next::GiveUp
            }
        }
    }

    fn sweep(&mut self, budget: Option<u32>, way: Way) -> Next {
        // Before the first poll there is no budget to starve.
        let mut point = usize::from(budget.is_some());
        let mut completions = 0;
        while completions < CONFIRMATIONS {
            let plan = Plan { budget, point, way };
            // The operation is seen to complete one beyond its last point.
            if point > self.options.max_points.saturating_add(1) {
                self.incomplete(plan, format!("more than max_points({})", self.options.max_points));
                return Next::GiveUp;
            }
            if self.started.elapsed() > self.options.timeout {
                self.incomplete(plan, format!("not finished within timeout({:?})", self.options.timeout));
                return Next::GiveUp;
            }
            if way == Way::Panic && !self.has_point(plan) {
                return Next::GoOn;
            }
            match self.go(plan).0 {
                End::Dropped => {
                    completions = 0;
                    point += 1;
                }
                End::Completed => completions += 1,
                End::Failed => return Next::GiveUp,
            }
        }
        Next::GoOn
    }

    /// Whether an undisturbed operation was seen pending that often. The poll in which it completes may clone its
    /// waker too; a panic there would look like one more point.
    fn has_point(&self, plan: Plan) -> bool {
        let end = self.ends.get(&plan.budget).and_then(BTreeSet::last);
        end.is_none_or(|&end| plan.point <= end)
    }

    /// Does one run and keeps what it showed. Says how it ended, and after how many pendings.
    fn go(&mut self, plan: Plan) -> (End, usize) {
        let visit = (self.visit)(plan);
        let Visit { polls, end, .. } = visit;
        self.report.runs += 1;
        self.report.unsettled += usize::from(visit.unsettled);
        let known = self.sites.get(&(plan.budget, polls)).cloned();
        // Naming takes longer than all the rest of a run, so a point is named once; but where the number of points
        // varies, the same number need not be the same await, and a failing run is named from its own trace.
        let name_again = visit.failure.is_some() && self.is_varied();
        let site = if known.is_none() || name_again { self.namer.name(&visit.traces) } else { None };
        let site = site.or(visit.site).or(known.flatten());
        match end {
            End::Dropped => drop(self.sites.insert((plan.budget, polls), site.clone())),
            End::Completed => drop(self.ends.entry(plan.budget).or_default().insert(polls)),
            End::Failed => {}
        }
        let completed = end == End::Completed;
        let reached = Plan { point: polls, ..plan };
        if let Some(section) = visit.torn {
            let (site, message) = (Some(section), "a critical section was dropped before its end".to_owned());
            self.report.add_failure(Failure { plan: reached, completed, site, kind: FailureKind::Torn, message });
        }
        if let Some((kind, message)) = visit.failure {
            let site = site.filter(|_| !completed);
            self.report.add_failure(Failure { plan: reached, completed, site, kind, message });
            if kind == FailureKind::Hang {
                // Each hang costs its whole limit: one is enough to know.
                return (End::Failed, polls);
            }
        }
        (end, polls)
    }

    fn is_varied(&self) -> bool {
        self.ends.values().any(|ends| ends.len() > 1)
    }

    fn incomplete(&mut self, plan: Plan, message: String) {
        let kind = FailureKind::Incomplete;
        self.report.add_failure(Failure { plan, completed: false, site: None, kind, message });
    }

    fn finish(mut self) -> Report {
        self.report.points = self.sites.len();
        self.report.varied = self.is_varied();
        self.report.add_sites(self.sites.into_values().flatten().collect());
        self.report
    }
}
