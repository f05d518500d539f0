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
#[derive(Debug)]
pub(crate) struct Visit {
    pub(crate) polls: usize,
    pub(crate) end: End,
    pub(crate) traces: Vec<Backtrace>,
    pub(crate) unsettled: bool,
    pub(crate) failure: Option<(FailureKind, String)>,
}

/// How the operation ended in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Before the point, with its result.
    Completed,
    /// Before the point, by its own panic or because nothing woke it.
    Failed,
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
        report: Report::default(),
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
            if point > self.options.max_points {
                self.incomplete(plan, format!("more than max_points({})", self.options.max_points));
                return Next::GiveUp;
            }
            if self.started.elapsed() > self.options.timeout {
                self.incomplete(plan, format!("not finished within timeout({:?})", self.options.timeout));
                return Next::GiveUp;
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

    fn go(&mut self, plan: Plan) -> (End, usize) {
        let visit = (self.visit)(plan);
        self.report.runs += 1;
        self.report.unsettled += usize::from(visit.unsettled);
        match visit.end {
            End::Dropped => {
                let named = self.sites.contains_key(&(plan.budget, visit.polls));
                if !named {
                    let site = self.namer.name(&visit.traces);
                    self.sites.insert((plan.budget, visit.polls), site);
                }
            }
            End::Completed => drop(self.ends.entry(plan.budget).or_default().insert(visit.polls)),
            End::Failed => {}
        }
        let ended = (visit.end, visit.polls);
        if let Some((kind, message)) = visit.failure {
            // From this run's own trace where it has one: the schedule may have varied.
            let site = self.namer.name(&visit.traces);
            let site = site.or_else(|| self.sites.get(&(plan.budget, visit.polls)).cloned().flatten());
            let completed = visit.end == End::Completed;
            let plan = Plan { point: visit.polls, ..plan };
            let site = site.filter(|_| !completed);
            self.report.add_failure(Failure { plan, completed, site, kind, message });
        }
        ended
    }

    fn incomplete(&mut self, plan: Plan, message: String) {
        let kind = FailureKind::Incomplete;
        self.report.add_failure(Failure { plan, completed: false, site: None, kind, message });
    }

    fn finish(mut self) -> Report {
        self.report.points = self.sites.len();
        self.report.varied = self.ends.values().any(|ends| ends.len() > 1);
        self.report.add_sites(self.sites.into_values().flatten().collect());
        self.report
    }
}
