//! The order in which points are visited, and the end of a search.
//!
//! Invariant: a search ends, and it reports every point left out because of a bound.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::Location;
use std::time::Instant;

use crate::coverage;
use crate::failure::{Failure, FailureKind, Refusal};
use crate::options::Options;
use crate::plan::{Plan, Question, Then};
use crate::report::Report;
use crate::seen::{End, Visit};
use crate::select;
use crate::site::{Await, Namer};
use crate::way::Way;

/// An operation counts as completed at a point after it did so this many times in a row.
const CONFIRMATIONS: usize = 3;

/// How many points between two task polls one exploration visits. If there are more, it spreads them evenly.
const MAX_TASK_POINTS: usize = 256;

/// Visits every point, or the requested one.
pub(crate) fn search(
    options: &Options,
    question: Question,
    only: Option<Plan>,
    caller: &'static Location<'static>,
    visit: &mut dyn FnMut(Plan) -> Visit,
) -> Report {
    let mut search = Search {
        options,
        question,
        visit,
        namer: Namer::new(caller),
        started: Instant::now(),
        places: BTreeMap::new(),
        ends: BTreeMap::new(),
        futurelocks: BTreeSet::new(),
        natural: Visit::default(),
        task_points: 0,
        report: Report { question, ..Report::EMPTY },
    };
    match only {
        Some(plan) => {
            // A call is judged by comparison with an undisturbed one.
            if question == Question::CancelSafe {
                let _end = search.measure(plan.budget);
            }
            search.report.runs = 0;
            let _end = search.go(plan);
        }
        None => search.everything(),
    }
    search.finish()
}

struct Search<'a> {
    options: &'a Options,
    question: Question,
    visit: &'a mut dyn FnMut(Plan) -> Visit,
    namer: Namer,
    started: Instant,
    /// The await of each point, by budget and number.
    places: BTreeMap<(Option<u32>, usize), Option<Await>>,
    /// After how many pendings the operation completed, by budget.
    ends: BTreeMap<Option<u32>, BTreeSet<usize>>,
    /// The points at which a suspended operation is waited for, by budget and number.
    futurelocks: BTreeSet<(Option<u32>, usize)>,
    /// What the first run showed, which was undisturbed.
    natural: Visit,
    /// The number of points visited between two task polls.
    task_points: usize,
    report: Report,
}

/// Whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    GoOn,
    GiveUp,
}

impl Search<'_> {
    fn everything(&mut self) {
        if self.options.ways.as_deref().is_some_and(<[Way]>::is_empty) {
            let plan = Plan::new(None, 0, Way::Eager);
            return self.incomplete(plan, "ways() was given none, so nothing would be dropped".to_owned());
        }
        let budgets = std::iter::once(None).chain(self.options.budgets.iter().copied().map(Some));
        for budget in budgets {
            if self.measure(budget) == Next::GiveUp {
                return;
            }
            let mut ways = self.ways();
            if budget == Some(0) {
                // The first leaf did not get its turn, so this point shows only what happened before it.
                ways.truncate(1);
            }
            for way in ways {
                for &then in self.thens() {
                    if self.sweep(Plan { then, ..Plan::new(budget, 0, way) }) == Next::GiveUp {
                        return;
                    }
                }
            }
            let more = match self.question {
                Question::CancelSafe => self.drop_each(budget),
                Question::Run | Question::Suspended => Next::GoOn,
            };
            if more == Next::GiveUp || (budget.is_none() && self.between_polls_of_tasks() == Next::GiveUp) {
                return;
            }
        }
    }

    /// The ways that make sense for the question.
    fn ways(&mut self) -> Vec<Way> {
        let chosen = self.options.ways.as_deref();
        let mut ways = chosen.map_or_else(|| vec![Way::Eager, Way::Settled, Way::Shutdown], <[Way]>::to_vec);
        if self.question != Question::Run {
            ways.retain(|way| matches!(way, Way::Eager | Way::Settled));
            if ways.is_empty() {
                ways = vec![Way::Eager];
            }
        }
        if chosen.is_none() && (self.natural.setup_tasks > 0 || self.natural.setup_sockets > 0) {
            ways.retain(|&way| way != Way::Shutdown);
        }
        ways
    }

    fn thens(&self) -> &'static [Then] {
        match self.question {
            Question::Run | Question::CancelSafe => &[Then::Drop],
            Question::Suspended => &[Then::Drop, Then::Resume],
        }
    }

    /// Runs the operation to its end once. An operation that never ends is found here, at the price of one run, and is
    /// not swept, because each of its points would cost as many polls as its number.
    fn measure(&mut self, budget: Option<u32>) -> Next {
        let plan = Plan::new(budget, self.options.max_polls, Way::Eager);
        let (end, polls) = self.go(plan);
        if end == End::Completed && self.question == Question::CancelSafe {
            // The oracle has to agree with itself.
            for _ in 1..CONFIRMATIONS {
                let _end = self.go(plan);
            }
            if self.report.failures.iter().any(|it| it.refusal.kind == FailureKind::Unsteady) {
                return Next::GiveUp;
            }
        }
        match end {
            End::Completed if polls <= self.options.max_points => Next::GoOn,
            End::Completed => {
                let bound = self.options.max_points;
                self.incomplete(plan, format!("{polls} points, more than max_points({bound})"));
                Next::GiveUp
            }
            End::Failed => Next::GiveUp,
            End::Dropped => {
                let place = self.places.get(&(budget, polls)).cloned().flatten();
                let refusal = Refusal::new(FailureKind::Hang, format!("not completed after max_polls({polls})"));
                self.fail(plan, polls, End::Dropped, place, refusal);
                Next::GiveUp
            }
        }
    }

    /// Visits the points from the first to the last, in the way of `first`.
    fn sweep(&mut self, first: Plan) -> Next {
        // Before the first poll there is no budget to starve, and nothing to resume.
        let mut point = usize::from(first.budget.is_some() || first.then == Then::Resume);
        let mut completions = 0;
        // A budget of 0 adds one point to the points of a budget of one.
        let last = if first.budget == Some(0) { 1 } else { usize::MAX };
        while completions < CONFIRMATIONS && point <= last {
            let plan = Plan { point, ..first };
            // The completion shows one beyond the last point.
            if point > self.options.max_points.saturating_add(1) {
                self.incomplete(plan, format!("more than max_points({})", self.options.max_points));
                return Next::GiveUp;
            }
            if self.is_late(plan) {
                return Next::GiveUp;
            }
            if plan.way == Way::Panic && !self.has_point(plan) {
                return Next::GoOn;
            }
            // If the operation holds something there, it does so in every way, and each such run would wait until that
            // is known.
            if self.futurelocks.contains(&(plan.budget, point)) {
                point += 1;
                continue;
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

    /// Drops every call at its first pending, at its second, and at its third.
    fn drop_each(&mut self, budget: Option<u32>) -> Next {
        for point in 1..=3 {
            let plan = Plan { then: Then::DropEach, ..Plan::new(budget, point, Way::Settled) };
            if self.is_late(plan) || self.go(plan).0 == End::Failed {
                return Next::GiveUp;
            }
        }
        Next::GoOn
    }

    /// Visits the points between two task polls, if the operation has its own tasks: these are then at their own awaits
    /// when it is dropped.
    fn between_polls_of_tasks(&mut self) -> Next {
        if !self.options.tasks || !self.natural.has_children {
            return Next::GoOn;
        }
        let ways = self.ways();
        let Some(&way) = ways.iter().find(|way| matches!(way, Way::Eager)).or(ways.first()) else { return Next::GoOn };
        if !matches!(way, Way::Eager | Way::Shutdown) {
            return Next::GoOn;
        }
        let steps = std::mem::take(&mut self.natural.steps);
        let all: Vec<(usize, usize)> = steps
            .iter()
            .enumerate()
            .flat_map(|(pending, &steps)| (1..=steps).map(move |step| (pending + 1, step)))
            .collect();
        self.report.task_points_in_all = all.len();
        let visited = all.len().min(MAX_TASK_POINTS);
        for number in 0..visited {
            let (point, step) = all[number * all.len() / visited];
            for &then in self.thens() {
                let plan = Plan { step, then, ..Plan::new(None, point, way) };
                if self.is_late(plan) {
                    return Next::GiveUp;
                }
                match self.go(plan).0 {
                    End::Dropped => {}
                    // The tasks took another course, and the operation was woken before that step.
                    End::Completed => self.report.varied = true,
                    End::Failed => return Next::GiveUp,
                }
            }
            self.task_points += 1;
        }
        Next::GoOn
    }

    fn is_late(&mut self, plan: Plan) -> bool {
        let late = self.started.elapsed() > self.options.timeout;
        if late {
            self.incomplete(plan, format!("not finished within timeout({:?})", self.options.timeout));
        }
        late
    }

    /// Whether an undisturbed operation was pending that often. The poll in which it completes may clone its waker too,
    /// and a panic there would look like one more point.
    fn has_point(&self, plan: Plan) -> bool {
        let end = self.ends.get(&plan.budget).and_then(BTreeSet::last);
        end.is_none_or(|&end| plan.point <= end)
    }

    /// Does one run and records what it showed. Returns how it ended, and after how many pendings.
    fn go(&mut self, plan: Plan) -> (End, usize) {
        let begun = Instant::now();
        let mut visit = (self.visit)(plan);
        let is_costly = begun.elapsed() >= self.options.hang_after;
        let (polls, end) = (visit.polls, visit.end);
        self.report.runs += 1;
        self.report.unsettled += usize::from(visit.is_unsettled);
        let known = self.places.get(&(plan.budget, polls)).cloned();
        // Naming takes longer than the rest of a run, so a point is named once. But if the number of points varies, the
        // same number need not mean the same await, so a failing run is named from its own trace. So is a run that was
        // dropped elsewhere than planned.
        let is_own = plan.way == Way::Scope || plan.then == Then::DropEach;
        let name_again = is_own || (visit.failure.is_some() && self.is_varied());
        let place = if known.is_none() || name_again { self.namer.name(&visit.traces) } else { None };
        let place = place.or(visit.site.take().map(Await::bare)).or(known.flatten());
        match end {
            End::Dropped if !is_own => drop(self.places.insert((plan.budget, polls), place.clone())),
            End::Dropped => {
                self.report.cover(place.as_ref());
                if plan.way == Way::Scope {
                    self.places.entry((plan.budget, plan.point)).or_insert_with(|| place.clone());
                }
            }
            End::Completed => drop(self.ends.entry(plan.budget).or_default().insert(polls)),
            End::Failed => {}
        }
        let completed = end == End::Completed;
        if let Some(section) = visit.torn.take() {
            let refusal = Refusal::new(FailureKind::Torn, "a critical section was dropped before its end".to_owned());
            self.fail(plan, polls, end, Some(Await::bare(section)), refusal);
        }
        let as_seen = end;
        let mut end = end;
        if let Some(refusal) = visit.failure.take() {
            if refusal.kind == FailureKind::Futurelock && plan.step == 0 {
                self.futurelocks.insert((plan.budget, polls));
            }
            let waited = matches!(refusal.kind, FailureKind::NotSafe | FailureKind::Futurelock) && is_costly;
            if refusal.kind == FailureKind::Hang || waited {
                // Each hang costs its whole limit, so one is enough.
                end = End::Failed;
            }
            let rival = self.namer.name(&std::mem::take(&mut visit.rival_traces));
            let place = place.filter(|_| !completed || plan.then == Then::DropEach);
            self.fail_beside(plan, polls, as_seen, place, rival, refusal);
        }
        if self.report.runs == 1 {
            self.natural = visit;
        }
        (end, polls)
    }

    fn fail(&mut self, plan: Plan, point: usize, end: End, place: Option<Await>, refusal: Refusal) {
        self.fail_beside(plan, point, end, place, None, refusal);
    }

    fn fail_beside(
        &mut self,
        plan: Plan,
        point: usize,
        end: End,
        place: Option<Await>,
        rival: Option<Await>,
        refusal: Refusal,
    ) {
        let (completed, ended_early) = (end == End::Completed, end != End::Dropped);
        // If a run ended before its point, any later point would show the same.
        let is_own = plan.way == Way::Scope || plan.then == Then::DropEach;
        let plan = if is_own { plan } else { Plan { point: point + usize::from(ended_early), ..plan } };
        self.report.add_failure(Failure {
            plan,
            point,
            completed,
            ended_early: end == End::Failed,
            place,
            rival,
            refusal,
        });
    }

    fn is_varied(&self) -> bool {
        self.report.varied || self.ends.values().any(|ends| ends.len() > 1)
    }

    fn incomplete(&mut self, plan: Plan, message: String) {
        self.fail(plan, plan.point, End::Dropped, None, Refusal::new(FailureKind::Incomplete, message));
    }

    fn finish(mut self) -> Report {
        self.report.points = self.places.len();
        self.report.task_points = self.task_points;
        self.report.varied = self.is_varied();
        let left_out = self.options.ways.as_deref().is_none() && self.question == Question::Run;
        let (tasks, sockets) = (self.natural.setup_tasks, self.natural.setup_sockets);
        self.report.note(if left_out { (tasks, sockets) } else { (0, 0) }, self.natural.workers);
        for place in self.places.values() {
            self.report.cover(place.as_ref());
        }
        self.report.count_sites(self.places.values().flatten());
        if self.report.varied {
            self.report.random_select = self.places.values().flatten().find_map(select::at_random);
        }
        coverage::append(&self.report.covered);
        self.report
    }
}
