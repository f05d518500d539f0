//! The exploration as the user states it: every setter, and the three questions.
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
    /// An exploration with every option at its default.
    pub fn new() -> Self {
        Self { options: Options::default(), only: None }
    }

    /// The starved budgets to explore besides the natural one, in units of tokio's cooperative budget. Default
    /// `[0, 1, 2, 3]`.
    ///
    /// With a budget of one, every leaf of tokio's that would be ready at once yields first, but for the first leaf of
    /// all: a point where production may drop it under load, and an undisturbed test never would. With a budget of 0 the
    /// first leaf yields too, once; what follows is as with a budget of one, so only that point is visited, and in the
    /// first of the ways only.
    pub fn budgets(mut self, budgets: impl IntoIterator<Item = u32>) -> Self {
        self.options.budgets = budgets.into_iter().collect();
        self
    }

    /// The ways to drop the operation. Default: eager, settled and shutdown, the last unless the setup leaves tasks
    /// running: these end with their runtime, and then the state is dead.
    ///
    /// [`cancel_safe`](Explore::cancel_safe) and [`suspended`](Explore::suspended) know eager and settled only, and
    /// leave out the others.
    pub fn ways(mut self, ways: impl IntoIterator<Item = Way>) -> Self {
        self.options.ways = Some(ways.into_iter().collect());
        self
    }

    /// How many results make a run of [`cancel_safe`](Explore::cancel_safe). Default 1; 0 is taken for 1. With several, a
    /// drop can also spoil a later call.
    pub fn calls(mut self, calls: usize) -> Self {
        self.options.calls = calls.max(1);
        self
    }

    /// Whether an operation that has tasks of its own is also dropped between any two polls of tasks, under the natural
    /// budget: then its tasks stand at awaits of theirs. Default `true`.
    ///
    /// It costs a run for each of these points. One exploration visits at most 256 of them, evenly spread, and the
    /// report says of how many ([`Report::task_points`], [`Report::notes`]).
    pub fn tasks(mut self, explored: bool) -> Self {
        self.options.tasks = explored;
        self
    }

    /// Whether a rival of [`suspended`](Explore::suspended) may wait for the operation. Default `false`: a rival that
    /// waits for what the operation holds is a failure. With `true` the operation goes on whenever the rival waits, for
    /// locks that are meant to be waited for; what both leave behind is checked all the same.
    pub fn allow_waiting(mut self, allowed: bool) -> Self {
        self.options.waiting = allowed;
        self
    }

    /// Whether tokio's clock stands still and jumps to the next timer when nothing else is to be done. Default
    /// `false`. With it, timers cost no time and runs repeat exactly; sockets, and databases with threads of their
    /// own, are better explored without.
    pub fn paused_time(mut self, paused: bool) -> Self {
        self.options.paused_time = paused;
        self
    }

    /// How many points under one budget are explored. Default 1 000. An operation that has more is a failure
    /// ([`Failure::is_incomplete`](crate::Failure::is_incomplete)): a cost that grows with the square of the number
    /// of points has to be asked for.
    pub fn max_points(mut self, points: usize) -> Self {
        self.options.max_points = points;
        self
    }

    /// How many polls an operation that nobody drops may take. Default 10 000. One that takes more is a failure
    /// ([`Failure::is_hang`](crate::Failure::is_hang)).
    pub fn max_polls(mut self, polls: usize) -> Self {
        self.options.max_polls = polls;
        self
    }

    /// How long, in real time, the setup and the check may take, and the operation may wait to be woken. Default
    /// 10 s. What takes longer is a failure ([`Failure::is_hang`](crate::Failure::is_hang)).
    pub fn hang_after(mut self, limit: Duration) -> Self {
        self.options.hang_after = limit;
        self
    }

    /// How long a run waits for spawned tasks to end before it checks, and, when settled, for them and for what wakes
    /// the operation before it drops. Default 5 ms; with paused time, 5 ms of tokio's clock too. What needs no time is
    /// done in any case. Before the check, tasks spawned by the setup are not waited for. A run goes on as soon as all
    /// have ended; a run that goes on without is counted in [`Report::unsettled`](crate::Report::unsettled). Raise it
    /// when a spawned cleanup talks to a server.
    pub fn settle_for(mut self, patience: Duration) -> Self {
        self.options.settle_for = patience;
        self
    }

    /// How long, in real time, the drop of the operation may take in [`run`](Explore::run). By default nothing is asked. A
    /// drop that takes longer, twice at the same point, is a failure
    /// ([`Failure::is_blocking_drop`](crate::Failure::is_blocking_drop)): a destructor that waits, or works for long,
    /// blocks the thread and every other task on it. A second is much for a drop, and little for a busy machine.
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

    /// How long the whole exploration may take. Default 120 s. What is not visited by then is a failure
    /// ([`Failure::is_incomplete`](crate::Failure::is_incomplete)).
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.options.timeout = limit;
        self
    }

    /// Explores this one run only, for a debugger; by default, all. Every failure says how to call it. `None` is the natural budget.
    pub fn only(mut self, point: usize, way: Way, budget: impl Into<Option<u32>>) -> Self {
        self.only = Some(Plan::new(budget.into(), point, way));
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

    /// Asks whether `call` is cancel safe as tokio's documentation means it: dropped at any await and called again, it
    /// is as good as if it had not been dropped. There is no check to write: undisturbed calls are the oracle.
    ///
    /// A run makes a state, calls until [`calls`](Explore::calls) results are there, and observes the state. The call is
    /// dropped once at each point, [eager and settled](Explore::ways), and called again until it completes. Then every
    /// call is dropped at its first pending, each time after something has woken it, as `select!` in a loop may do; then
    /// every call at its second pending, and at its third. What the results and the observation must be is what they
    /// were when nobody disturbed: [`Report::verdict`] tells.
    ///
    /// Leave in the state whatever a call borrows or keeps between calls, such as the buffer of a reader: what is local
    /// to `call` is lost with it, and that is the point. `observe` sees what the results do not show, such as what a peer
    /// has received; `async |_| ()` is fine where there is nothing. Let a call return its error instead of unwrapping it:
    /// an error is a result that can be compared, a panic is not judged.
    ///
    /// # Panics
    ///
    /// As [`run`](Explore::run).
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

    /// Asks who waits for an operation that is alive and that nobody polls, as `select!` over `&mut future` leaves it, or
    /// a busy consumer of `buffer_unordered`.
    ///
    /// At each point, eager and settled, the operation is left alone while `rival` runs. A rival that can make no
    /// progress, but goes on once the operation is dropped, waits for something that the operation holds: a *futurelock*
    /// ([`Failure::is_futurelock`](crate::Failure::is_futurelock)), told with the lines of both. Otherwise the operation
    /// is dropped in one run, and polled to its end in another, and `check` judges what both left: a state that the rival
    /// saw half done is found as well.
    ///
    /// The operation has to come to its end without the rival: it is first run undisturbed, and the rival after it.
    ///
    /// That nothing can make progress is known within a second where no socket is watched, no timer is due and no
    /// blocking job runs, and nothing woke anybody for half of it; elsewhere after [`hang_after`](Explore::hang_after).
    ///
    /// # Panics
    ///
    /// As [`run`](Explore::run).
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
