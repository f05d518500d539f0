//! The exploration as the user configures it: every setter, and the three questions.
//!
//! Invariant: this is the top of the crate, and nothing else in it knows that this room exists.

use std::fmt::Debug;
use std::panic::Location;
use std::time::Duration;

use crate::act::Bounds;
use crate::calls::Calls;
use crate::crash;
use crate::options::Options;
use crate::panics::Quietly;
use crate::plan::{ONLY, Plan, Question};
use crate::report::Report;
use crate::rival::Rivals;
use crate::search::search;
use crate::seen::Visit;
use crate::visit::Scene;
use crate::way::{Outcome, Way};

/// Drops an operation at every await point, and checks what it leaves behind.
#[derive(Debug, Clone)]
#[must_use = "nothing is explored until run() is called"]
pub struct Explore {
    options: Options,
    only: Option<Plan>,
}

impl Default for Explore {
    fn default() -> Self {
        Self::new()
    }
}

impl Explore {
    /// Creates an exploration with every option at its default.
    pub fn new() -> Self {
        Self { options: Options::default(), only: None }
    }

    /// Sets the starved budgets to explore besides the natural one, in units of tokio's cooperative budget. Default
    /// `[0, 1, 2, 3]`.
    ///
    /// With a budget of one, every tokio leaf that would be ready at once yields first, except the very first leaf.
    /// Production may drop it at such a point under load, and an undisturbed test never would. With a budget of 0 the
    /// first leaf yields too, once. The rest is as with a budget of one, so only that point is visited, and only in the
    /// first of the ways.
    pub fn budgets(mut self, budgets: impl IntoIterator<Item = u32>) -> Self {
        self.options.budgets = budgets.into_iter().collect();
        self
    }

    /// Sets the ways to drop the operation. Default: eager, settled and shutdown. The default leaves out shutdown if
    /// the setup leaves tasks running, because these end with their runtime, and then the state is dead.
    ///
    /// [`cancel_safe`](Explore::cancel_safe) and [`suspended`](Explore::suspended) support only eager and settled, and
    /// leave out the others.
    pub fn ways(mut self, ways: impl IntoIterator<Item = Way>) -> Self {
        self.options.ways = Some(ways.into_iter().collect());
        self
    }

    /// Sets how many results make a run of [`cancel_safe`](Explore::cancel_safe). Default 1; 0 counts as 1. With
    /// several results, an exploration also finds a drop that spoils a later call.
    pub fn calls(mut self, calls: usize) -> Self {
        self.options.calls = calls.max(1);
        self
    }

    /// Sets whether an operation with its own tasks is also dropped between any two polls of tasks, under the natural
    /// budget. Its tasks then stand at their own awaits. Default `true`.
    ///
    /// Each of these points costs a run. One exploration visits at most 256 of them, evenly spread, and the report says
    /// out of how many ([`Report::task_points`], [`Report::notes`]).
    pub fn tasks(mut self, explored: bool) -> Self {
        self.options.tasks = explored;
        self
    }

    /// Sets whether a rival of [`suspended`](Explore::suspended) may wait for the operation. Default `false`: it is a
    /// failure if a rival waits for something that the operation holds. Set `true` for locks that are meant to be
    /// waited for: the operation then continues whenever the rival waits. What both leave behind is checked all the
    /// same.
    pub fn allow_waiting(mut self, allowed: bool) -> Self {
        self.options.waiting = allowed;
        self
    }

    /// Sets whether tokio's clock stands still and jumps to the next timer when nothing else can run. Default `false`.
    /// With it, timers cost no time and runs repeat exactly. Sockets, and databases with their own threads, are better
    /// explored without it.
    pub fn paused_time(mut self, paused: bool) -> Self {
        self.options.paused_time = paused;
        self
    }

    /// Sets how many points are explored under one budget. Default 1 000. An operation with more points is a failure
    /// ([`Failure::is_incomplete`](crate::Failure::is_incomplete)): the cost grows with the square of the number of
    /// points, so you have to ask for more.
    pub fn max_points(mut self, points: usize) -> Self {
        self.options.max_points = points;
        self
    }

    /// Sets how many polls an operation may take if it is not dropped. Default 10 000. An operation that takes more is
    /// a failure ([`Failure::is_hang`](crate::Failure::is_hang)).
    pub fn max_polls(mut self, polls: usize) -> Self {
        self.options.max_polls = polls;
        self
    }

    /// Sets how long, in real time, the setup and the check may take, and the operation may wait to be woken. Default
    /// 10 s. Anything longer is a failure ([`Failure::is_hang`](crate::Failure::is_hang)).
    pub fn hang_after(mut self, limit: Duration) -> Self {
        self.options.hang_after = limit;
        self
    }

    /// Sets how long a run waits for spawned tasks to end before it checks. In the settled way, a run also waits this
    /// long before the drop, for spawned tasks and for whatever wakes the operation. Default 5 ms; with paused time, 5
    /// ms of tokio's clock too.
    ///
    /// Work that needs no time is done in any case. The wait before the check leaves out tasks that the setup spawned.
    /// A run continues as soon as all have ended; [`Report::unsettled`](crate::Report::unsettled) counts the runs that
    /// continue without that. Raise it if a spawned cleanup talks to a server.
    pub fn settle_for(mut self, patience: Duration) -> Self {
        self.options.settle_for = patience;
        self
    }

    /// Sets how long, in real time, the drop of the operation may take in [`run`](Explore::run). By default there is no
    /// limit. A drop that takes longer, twice at the same point, is a failure
    /// ([`Failure::is_blocking_drop`](crate::Failure::is_blocking_drop)): a destructor that waits or works for long
    /// blocks the thread and every other task on it. One second is long for a drop, and short for a busy machine.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use cancel_safe_testing::Explore;
    ///
    /// struct BadResource;
    ///
    /// impl Drop for BadResource {
    ///     fn drop(&mut self) {
    ///         std::thread::sleep(Duration::from_millis(20)); // 5 s in the field
    ///     }
    /// }
    ///
    /// let limit = Duration::from_millis(10);
    /// let report = Explore::new().paused_time(true).drop_within(limit).run(
    ///     async || (),
    ///     async |()| {
    ///         let _resource = BadResource;
    ///         tokio::time::sleep(Duration::from_secs(1)).await;
    ///     },
    ///     async |(), _outcome| Ok(()),
    /// );
    /// assert!(report.failures()[0].is_blocking_drop());
    /// ```
    pub fn drop_within(mut self, limit: Duration) -> Self {
        self.options.drop_within = Some(limit);
        self
    }

    /// Sets how long the whole exploration may take. Default 120 s. If points are left by then, that is a failure
    /// ([`Failure::is_incomplete`](crate::Failure::is_incomplete)).
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.options.timeout = limit;
        self
    }

    /// Explores only this one run, for a debugger; by default, all. Every failure says how to call it. `None` is the
    /// natural budget.
    pub fn only(mut self, point: usize, way: Way, budget: impl Into<Option<u32>>) -> Self {
        self.only = Some(Plan::new(budget.into(), point, way));
        self
    }

    /// Explores the operation. For each point, `setup` makes a fresh state, `operation` is polled to that point and
    /// dropped, and `check` judges the state.
    ///
    /// Nothing has to be `Send`. Each run has its own runtime, and setup, operation, drop and check all run on it. So
    /// the check can use a connection that the setup made. Only [`Way::Shutdown`] ends that runtime and checks on a
    /// fresh one. It is a failure if any of the three panics or does not end. The exploration itself always ends; it
    /// ends early at the first hang, because each hang costs its whole limit.
    ///
    /// # Panics
    ///
    /// If it is called inside a runtime (it belongs in a plain `#[test]`), if no runtime can be built, or if the
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
    ///         Outcome::Completed(()) if done.get() == 0 => {
    ///             Err("completed but not done".to_owned())
    ///         }
    ///         Outcome::Dropped { .. } if done.get() == 1 => {
    ///             Err("dropped but done".to_owned())
    ///         }
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
        let caller = Location::caller();
        let here = crash::Here::new(caller, std::any::type_name_of_val(&setup));
        let bounds = Bounds::new(&self.options);
        let scene = Scene { bounds: &bounds, setup, operation, check };
        match here.role() {
            crash::Role::Victim(plan) => {
                here.die(scene.victim(plan), caller);
                Report::EMPTY
            }
            crash::Role::Bystander => Report::EMPTY,
            crash::Role::Explorer => self.search(Question::Run, caller, &mut |plan| scene.visit(plan, &here)),
        }
    }

    /// Asks whether `call` is cancel safe in the sense of tokio's documentation: if it is dropped at any await and
    /// called again, the result is as good as without the drop. There is no check to write: undisturbed calls are the
    /// oracle.
    ///
    /// A run makes a state, calls until it has [`calls`](Explore::calls) results, and observes the state. First the
    /// call is dropped once at each point, [eager and settled](Explore::ways), and called again until it completes.
    /// Then every call is dropped at its first pending, each time after something has woken it, as `select!` in a loop
    /// may do; then every call at its second pending, and at its third. The results and the observation must equal
    /// those of the undisturbed calls; [`Report::verdict`] says whether they do.
    ///
    /// Keep in the state whatever a call borrows or keeps between calls, such as a reader's buffer. Anything local to
    /// `call` is lost with it, and that is the point. `observe` returns what the results do not show, such as what a
    /// peer has received; use `async |_| ()` if there is nothing. Let a call return its error instead of unwrapping it:
    /// an error is a result that can be compared, but a panic is not judged.
    ///
    /// # Panics
    ///
    /// Same as [`run`](Explore::run).
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_testing::{Explore, Verdict};
    /// use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    ///
    /// let setup = async || {
    ///     let (here, mut there) = duplex(4);
    ///     tokio::spawn(async move { there.write_all(b"12345678").await });
    ///     here
    /// };
    /// let explore = Explore::new().paused_time(true);
    ///
    /// // A read takes what is there, or nothing.
    /// let read = explore.cancel_safe(
    ///     setup,
    ///     async |pipe| pipe.read(&mut [0; 2]).await.unwrap(),
    ///     async |_| (),
    /// );
    /// read.assert_safe();
    ///
    /// // Half of eight bytes is forgotten with the future that had read it.
    /// let read_u64 = explore.cancel_safe(
    ///     setup,
    ///     async |pipe| pipe.read_u64().await.ok(),
    ///     async |_| (),
    /// );
    /// assert!(matches!(read_u64.verdict(), Verdict::NotSafe { .. }));
    /// ```
    #[track_caller]
    pub fn cancel_safe<S, T, O>(
        &self,
        setup: impl AsyncFn() -> S,
        call: impl AsyncFn(&mut S) -> T,
        observe: impl AsyncFn(&mut S) -> O,
    ) -> Report
    where
        T: PartialEq + Debug,
        O: PartialEq + Debug,
    {
        let caller = Location::caller();
        let here = crash::Here::new(caller, std::any::type_name_of_val(&setup));
        let bounds = Bounds::new(&self.options);
        let calls = Calls::new(&bounds, setup, call, observe);
        match here.role() {
            crash::Role::Victim(_) | crash::Role::Bystander => Report::EMPTY,
            crash::Role::Explorer => self.search(Question::CancelSafe, caller, &mut |plan| calls.visit(plan)),
        }
    }

    /// Asks what waits for an operation that is alive but not polled. A `select!` over `&mut future` leaves one in that
    /// state, and so does a busy consumer of `buffer_unordered`.
    ///
    /// At each point, eager and settled, the operation is left alone while `rival` runs. If the rival can make no
    /// progress, but continues once the operation is dropped, it waits for something that the operation holds. That is
    /// a *futurelock* ([`Failure::is_futurelock`](crate::Failure::is_futurelock)), reported with the lines of both.
    /// Otherwise the operation is dropped in one run and polled to its end in another, and `check` judges what both
    /// left. This also finds a half-done state that the rival has seen.
    ///
    /// The operation must be able to end without the rival: it first runs undisturbed, and the rival runs after it.
    ///
    /// The exploration knows within a second that nothing can make progress, if no socket is watched, no timer is due,
    /// no blocking job runs, and nothing wakes any task for half of that second. Otherwise it knows after
    /// [`hang_after`](Explore::hang_after).
    ///
    /// # Panics
    ///
    /// Same as [`run`](Explore::run).
    ///
    /// # Examples
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use cancel_safe_testing::Explore;
    /// use tokio::sync::Mutex;
    /// use tokio::time::sleep;
    ///
    /// let report = Explore::new().paused_time(true).suspended(
    ///     async || Mutex::new(0),
    ///     async |count| {
    ///         let mut count = count.lock().await;
    ///         sleep(Duration::from_millis(1)).await; // left here, it holds the lock
    ///         *count += 1;
    ///     },
    ///     async |count| *count.lock().await += 1,
    ///     async |_count, _outcome, ()| Ok(()),
    /// );
    /// assert!(report.failures()[0].is_futurelock());
    /// ```
    #[track_caller]
    pub fn suspended<S, T, R>(
        &self,
        setup: impl AsyncFn() -> S,
        operation: impl AsyncFn(&S) -> T,
        rival: impl AsyncFn(&S) -> R,
        check: impl AsyncFn(&S, Outcome<T>, R) -> Result<(), String>,
    ) -> Report {
        let caller = Location::caller();
        let here = crash::Here::new(caller, std::any::type_name_of_val(&setup));
        let bounds = Bounds::new(&self.options);
        let rivals = Rivals { bounds: &bounds, setup, operation, rival, check };
        match here.role() {
            crash::Role::Victim(_) | crash::Role::Bystander => Report::EMPTY,
            crash::Role::Explorer => self.search(Question::Suspended, caller, &mut |plan| rivals.visit(plan)),
        }
    }

    fn search(
        &self,
        question: Question,
        caller: &'static Location<'static>,
        visit: &mut dyn FnMut(Plan) -> Visit,
    ) -> Report {
        let inside = tokio::runtime::Handle::try_current().is_ok();
        assert!(!inside, "Explore owns its runtimes: call it from a plain #[test], not from #[tokio::test]");
        let only = match std::env::var(ONLY) {
            Ok(text) => Some(text.parse().unwrap_or_else(|error| panic!("{error}"))),
            Err(_) => self.only,
        };
        let _quietly = Quietly::begin();
        search(&self.options, question, only, caller, visit)
    }
}
