//! The exploration as the user states it.
//!
//! Invariant: every option has a default and every bound is finite.

use std::fmt;
use std::panic::Location;
use std::str::FromStr;
use std::time::Duration;

use crate::crash;
use crate::report::Report;
use crate::runtime::Watchdog;
use crate::search::search;
use crate::visit::Scene;

/// Names one run, as `point:way:budget`; every exploration in the process then does just that one.
pub(crate) const ONLY: &str = "CANCEL_SAFE_ONLY";

/// How an operation is dropped at a point. Each way finds bugs that the others miss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Way {
    /// At once: the blocking jobs it has submitted have not begun, and land after the drop.
    Eager,
    /// After everything around it has come to rest: what it waits for is done, but it has not seen that.
    Settled,
    /// Together with its runtime: tasks that it (or a `Drop`) has spawned end where they stand. Blocking jobs
    /// already submitted are run, as tokio does.
    ///
    /// The check runs on a fresh runtime, so the state has to outlive the one in which it was set up: a pool or a
    /// connection that was opened there is dead.
    Shutdown,
    /// By a cancel scope of `cancel-safe-guard` around it, which is cancelled at the point: a critical section is
    /// finished, and the operation is dropped at its next pending outside of one. It may complete instead.
    ///
    /// For operations that are only ever ended by such scopes; the ways above drop them in the middle of a section.
    Scope,
    /// By a panic raised inside the leaf future that waits: its destructors run while the thread unwinds, and the
    /// locks it holds are poisoned.
    Panic,
    /// With its whole process, killed: no destructor runs, and only what is outside the process survives. See
    /// [Crashes](crate#crashes) for how to write the setup.
    Crash,
}

impl Way {
    const ALL: [Self; 6] = [Self::Eager, Self::Settled, Self::Shutdown, Self::Scope, Self::Panic, Self::Crash];
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

/// What became of the operation in a run.
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
    /// Whether the operation returned.
    #[must_use]
    pub fn is_completed(&self) -> bool {
        matches!(self, Self::Completed(_))
    }

    /// Whether the operation was dropped.
    #[must_use]
    pub fn is_dropped(&self) -> bool {
        !self.is_completed()
    }

    /// What the operation returned.
    #[must_use]
    pub fn completed(self) -> Option<T> {
        match self {
            Self::Completed(value) => Some(value),
            Self::Dropped { .. } => None,
        }
    }
}

/// One run: the operation is dropped after `point` pendings under this budget in this way. Ordered simplest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Plan {
    pub(crate) budget: Option<u32>,
    pub(crate) point: usize,
    pub(crate) way: Way,
}

impl FromStr for Plan {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{ONLY} is {text:?}, but has to look like 3:settled:natural or 3:settled:2");
        let mut parts = text.split(':');
        let (Some(point), Some(way), Some(budget), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(wrong());
        };
        let way = Way::ALL.into_iter().find(|it| it.to_string() == way);
        let budget = if budget == "natural" { None } else { Some(budget.parse().map_err(|_| wrong())?) };
        Ok(Self { budget, point: point.parse().map_err(|_| wrong())?, way: way.ok_or_else(wrong)? })
    }
}

/// Drops an operation at every await point, and checks what it leaves behind.
#[derive(Debug, Clone)]
#[must_use = "nothing is explored until run() is called"]
pub struct Explore {
    pub(crate) budgets: Vec<u32>,
    pub(crate) ways: Vec<Way>,
    pub(crate) max_points: usize,
    pub(crate) max_polls: usize,
    pub(crate) timeout: Duration,
    pub(crate) paused_time: bool,
    pub(crate) hang_after: Duration,
    pub(crate) settle_for: Duration,
    only: Option<Plan>,
}

impl Default for Explore {
    fn default() -> Self {
        Self::new()
    }
}

impl Explore {
    /// An exploration with every option at its default.
    pub fn new() -> Self {
        Self {
            budgets: vec![1, 2, 3],
            ways: vec![Way::Eager, Way::Settled, Way::Shutdown],
            max_points: 1_000,
            max_polls: 10_000,
            timeout: Duration::from_secs(120),
            paused_time: false,
            hang_after: Duration::from_secs(10),
            settle_for: Duration::from_millis(5),
            only: None,
        }
    }

    /// The starved budgets to explore besides the natural one, in units of tokio's cooperative budget. Default
    /// `[1, 2, 3]`.
    ///
    /// With a budget of one, every leaf of tokio's that would be ready at once yields first: a point where
    /// production may drop it under load, and an undisturbed test never would.
    pub fn budgets(mut self, budgets: impl IntoIterator<Item = u32>) -> Self {
        self.budgets = budgets.into_iter().collect();
        self
    }

    /// The ways to drop the operation. Default: eager, settled and shutdown.
    pub fn ways(mut self, ways: impl IntoIterator<Item = Way>) -> Self {
        self.ways = ways.into_iter().collect();
        self
    }

    /// Whether tokio's clock stands still and jumps to the next timer when nothing else is to be done. Default
    /// `false`. With it, timers cost no time and runs repeat exactly; sockets, and databases with threads of their
    /// own, are better explored without.
    pub fn paused_time(mut self, paused: bool) -> Self {
        self.paused_time = paused;
        self
    }

    /// How many points under one budget are explored. Default 1 000. An operation that has more is a failure
    /// ([`Failure::is_incomplete`](crate::Failure::is_incomplete)): a cost that grows with the square of the number
    /// of points has to be asked for.
    pub fn max_points(mut self, points: usize) -> Self {
        self.max_points = points;
        self
    }

    /// How many polls an operation that nobody drops may take. Default 10 000. One that takes more is a failure
    /// ([`Failure::is_hang`](crate::Failure::is_hang)).
    pub fn max_polls(mut self, polls: usize) -> Self {
        self.max_polls = polls;
        self
    }

    /// How long, in real time, the setup and the check may take, and the operation may wait to be woken. Default
    /// 10 s. What takes longer is a failure ([`Failure::is_hang`](crate::Failure::is_hang)).
    pub fn hang_after(mut self, limit: Duration) -> Self {
        self.hang_after = limit;
        self
    }

    /// How long a run waits for spawned tasks to end before it drops (when settled) and before it checks. Default
    /// 5 ms; with paused time, 5 ms of tokio's clock too. Tasks spawned by the setup are not waited for. A run goes
    /// on as soon as all have ended; a run that goes on without is counted in
    /// [`Report::unsettled`](crate::Report::unsettled). Raise it when a spawned cleanup talks to a server.
    pub fn settle_for(mut self, patience: Duration) -> Self {
        self.settle_for = patience;
        self
    }

    /// How long the whole exploration may take. Default 120 s. What is not visited by then is a failure
    /// ([`Failure::is_incomplete`](crate::Failure::is_incomplete)).
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = limit;
        self
    }

    /// Explores this one run only, for a debugger. Every failure says how to call it. `None` is the natural budget.
    pub fn only(mut self, point: usize, way: Way, budget: impl Into<Option<u32>>) -> Self {
        self.only = Some(Plan { budget: budget.into(), point, way });
        self
    }

    /// Explores: for each point `setup` makes a fresh state, `operation` is polled to that point and dropped, and
    /// `check` judges the state.
    ///
    /// Nothing has to be `Send`. Each run has a runtime of its own, on which setup, operation, drop and check all
    /// run, so that a connection made in the setup can be used in the check; only [`Way::Shutdown`] ends that runtime
    /// and checks on a fresh one. A panic in any of the three is a failure, and so is one that does not end. The
    /// exploration itself always ends; it ends early at the first hang, because each hang costs its whole limit.
    ///
    /// # Panics
    ///
    /// If it is called inside a runtime (it belongs into a plain `#[test]`), if no runtime can be built, or if the
    /// environment variable `CANCEL_SAFE_ONLY` is set to something other than `point:way:budget`.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::cell::Cell;
    /// use std::time::Duration;
    ///
    /// use cancel_safe_testing::{Explore, Outcome};
    ///
    /// let report = Explore::new().paused_time(true).run(
    ///     async || Cell::new(0),
    ///     async |done| {
    ///         tokio::time::sleep(Duration::from_secs(1)).await;
    ///         done.set(1);
    ///     },
    ///     async |done, outcome| match outcome {
    ///         Outcome::Completed(()) if done.get() == 0 => Err("completed but not done".to_owned()),
    ///         Outcome::Dropped { .. } if done.get() == 1 => Err("dropped but done".to_owned()),
    ///         _ => Ok(()),
    ///     },
    /// );
    /// report.assert_clean();
    /// ```
    #[track_caller]
    pub fn run<S, T>(
        &self,
        setup: impl AsyncFn() -> S,
        operation: impl AsyncFn(&S) -> T,
        check: impl AsyncFn(&S, Outcome<T>) -> Result<(), String>,
    ) -> Report {
        let inside = tokio::runtime::Handle::try_current().is_ok();
        assert!(!inside, "Explore::run owns its runtimes: call it from a plain #[test], not from #[tokio::test]");
        let caller = Location::caller();
        let scene = Scene { options: self, setup, operation, check, watchdog: &Watchdog::new(self.hang_after) };
        let here = crash::Here::new(caller, std::any::type_name_of_val(&scene.setup));
        match here.role() {
            crash::Role::Victim(plan) => here.die(scene.victim(plan), caller),
            crash::Role::Bystander => Report::EMPTY,
            crash::Role::Explorer => {
                let only = match std::env::var(ONLY) {
                    Ok(text) => Some(text.parse().unwrap_or_else(|error| panic!("{error}"))),
                    Err(_) => self.only,
                };
                search(self, only, caller, &mut |plan| scene.visit(plan, &here))
            }
        }
    }
}
