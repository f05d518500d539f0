//! Task groups: named tasks that end together. Nothing detaches: a group is awaited, or it is dropped together with its
//! tasks.

mod ending;
pub(crate) mod named;
pub(crate) mod scope;

use std::borrow::Cow;
use std::fmt;
use std::panic::Location;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::context::WorkerContext;
use crate::panics::watch;
use crate::report::{Ledger, say};
use crate::result::{Rejected, TaskCounts};
use crate::roster::{Outcomes, Recorder, Roster, Rules};
use crate::stop::{StopReason, Stopping};
use crate::task::{BoxError, TaskOutput};
use crate::ticket::{Closure, Ticket, Tracked};
use crate::trace::{Kind, Name, Own};
use crate::tree::{Node, abort_tree, bounded, stop_tree};

/// The longest path of a group, in bytes. Beyond it, only the group's own name is shown.
const LONGEST_PATH: usize = 256;

/// A group of named tasks.
///
/// Dropping it cancels its tasks, and the tasks of the groups below it, without any grace: futures at their next await,
/// blocking closures only if they have not begun. The group keeps the outcome of each task until you ask for it with
/// [`join_next`](Self::join_next), [`wait`](Self::wait) or [`shutdown`](Self::shutdown). A server that runs for months
/// never asks, and uses a [`discarding`](Self::discarding) group.
///
/// # Panics of tasks
///
/// A task that panics does not disturb the others, unless the group [fails fast](Self::fail_fast). In an application it
/// makes the exit code 101 unless its outcome was read: taken with `join_next` or a related method, or asked for with
/// [`is_clean`](crate::TaskGroupResult::is_clean) or [`into_result`](crate::TaskGroupResult::into_result). Dropping a
/// result does not count as reading it.
///
/// # Comparison to `JoinSet`
///
/// A [`JoinSet`](tokio::task::JoinSet) aborts its tasks too. But it does not know their names and gives no grace, and
/// its `shutdown` waits without a bound for a task that never yields or for a blocking closure.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use cancel_safe_shutdown::TaskGroup;
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let group = TaskGroup::new();
/// group.spawn("fast", async {})?;
/// group.spawn("slow", tokio::time::sleep(Duration::from_secs(3600)))?;
///
/// tokio::time::sleep(Duration::from_millis(1)).await;
/// group.cancel_all().await;
/// let result = group.wait().await;
/// assert_eq!(result.completed, ["fast"]);
/// assert_eq!(result.cancelled, ["slow"]);
/// # Ok(())
/// # }
/// ```
#[must_use = "a group that is dropped cancels its tasks"]
pub struct TaskGroup<T: Send + 'static = (), E: Send + 'static = BoxError> {
    pub(crate) roster: Arc<Roster<T, E>>,
    /// The outcomes that `join_next` has taken from the roster. The lock is never contended; it makes the group `Sync`
    /// even if its values are not.
    taken: Mutex<Outcomes<T, E>>,
}

impl TaskGroup {
    /// Creates a group of tasks that return nothing, or `Result<(), BoxError>`.
    pub fn new() -> Self {
        Self::with_results()
    }

    /// Creates a group that forgets each task as it ends, for servers: it uses memory only for the tasks that are
    /// alive.
    ///
    /// It [counts](Self::counts) every task. It keeps outcomes only for the latest 1,024 tasks that failed, panicked or
    /// outlived their grace; [`join_next`](Self::join_next) and [`wait`](Self::wait) see no others.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_shutdown::TaskGroup;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let connections = TaskGroup::discarding();
    /// for number in 0..3 {
    ///     connections.spawn(format!("connection {number}"), async {})?;
    /// }
    /// let result = connections.wait().await;
    /// assert_eq!((result.completed.len(), result.counts.completed), (0, 3));
    /// # Ok(())
    /// # }
    /// ```
    pub fn discarding() -> Self {
        let group = Self::new();
        group.roster.discard();
        group
    }

    /// The workers of one phase, recorded in `ledger` as they end.
    pub(crate) fn of_workers(ledger: Arc<Ledger>, phase: String) -> Self {
        let recorder = Recorder { ledger, say, workers: true };
        Self::on(Roster::root(phase, Some(recorder)))
    }

    /// A group for the tasks that a task of `above` spawns, recorded in the same ledger.
    pub(crate) fn below(above: &Arc<dyn Node>, path: String) -> Self {
        let ledger = above.ledger().cloned();
        let recorder = ledger.map(|ledger| Recorder { ledger, say, workers: false });
        Self::on(Roster::below(above, path, recorder, Rules::default()))
    }

    /// The same, discarding, and open until it is dropped, so that a draining task can still spawn what it needs.
    #[cfg(feature = "tower")]
    pub(crate) fn lingering_below(above: &Arc<dyn Node>, path: String) -> Self {
        let recorder = above.ledger().cloned().map(|ledger| Recorder { ledger, say, workers: false });
        let rules = Rules { discards: true, lingers: true, ..Rules::default() };
        Self::on(Roster::below(above, path, recorder, rules))
    }

    /// The same, [`discarding`](Self::discarding).
    pub(crate) fn discarding_below(above: &Arc<dyn Node>, path: String) -> Self {
        let group = Self::below(above, path);
        group.roster.discard();
        group
    }
}

impl<T: Send + 'static, E: Send + 'static> TaskGroup<T, E> {
    /// Creates a group of tasks that return `Result<T, E>`.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_shutdown::{TaskGroup, TaskOutcome};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let mut group = TaskGroup::<u32, String>::with_results();
    /// group.spawn("answer", async { Ok(42) })?;
    /// let answer = ("answer".to_owned(), TaskOutcome::Completed(42));
    /// assert_eq!(group.join_next().await, Some(answer));
    /// assert_eq!(group.join_next().await, None);
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_results() -> Self {
        Self::on(Roster::root(String::new(), None))
    }

    fn on(roster: Arc<Roster<T, E>>) -> Self {
        Self { roster, taken: Mutex::default() }
    }

    /// The roster, and the outcomes that have been taken from it.
    fn reader(&mut self) -> (&Roster<T, E>, &mut Outcomes<T, E>) {
        (&self.roster, self.taken.get_mut().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sets how long tasks with a context may take after [`cancel_all`](Self::cancel_all). The default is 10 seconds.
    pub fn grace(self, grace: Duration) -> Self {
        self.roster.set_grace(grace);
        self
    }

    /// Makes the first task that fails or panics cancel the others, with their grace.
    ///
    /// That failure is then [the result](crate::TaskGroupResult::into_result) of the group. The
    /// [reason](WorkerContext::reason) that the others see names the task. Groups below this one are cancelled too; a
    /// failure in one of them does not cancel this one.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_shutdown::TaskGroup;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let group = TaskGroup::new().fail_fast();
    /// group.spawn("reader", async { Err("end of file".into()) })?;
    /// group.spawn("writer", std::future::pending::<()>())?;
    /// let result = group.wait().await;
    /// assert_eq!(result.cancelled, ["writer"]);
    /// let failure = result.into_result().unwrap_err();
    /// assert_eq!(failure.to_string(), "task `reader` failed: end of file");
    /// # Ok(())
    /// # }
    /// ```
    pub fn fail_fast(self) -> Self {
        self.roster.fail_fast();
        self
    }

    /// Spawns a task without a token: a cancel drops it at its next await.
    ///
    /// # Errors
    ///
    /// If the group was cancelled, it is closed: the error returns the future, never polled.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    #[track_caller]
    pub fn spawn<F>(&self, name: impl Into<Cow<'static, str>>, future: F) -> Result<(), Rejected<F>>
    where
        F: Future + Send + 'static,
        F::Output: TaskOutput<T, E>,
    {
        match self.enter(Name::Plain(name.into()), Location::caller()) {
            Ok(ticket) => {
                drop(tokio::spawn(Tracked::new(future, ticket)));
                Ok(())
            }
            Err(name) => Err(Rejected::new(name, future)),
        }
    }

    /// Spawns a task on the runtime of `handle`, from inside or outside any runtime. Otherwise it works like
    /// [`spawn`](Self::spawn).
    ///
    /// # Errors
    ///
    /// If the group was cancelled, it is closed: the error returns the future, never polled.
    #[track_caller]
    pub fn spawn_on<F>(&self, name: impl Into<Cow<'static, str>>, future: F, handle: &Handle) -> Result<(), Rejected<F>>
    where
        F: Future + Send + 'static,
        F::Output: TaskOutput<T, E>,
    {
        match self.enter(Name::Plain(name.into()), Location::caller()) {
            Ok(ticket) => {
                drop(handle.spawn(Tracked::new(future, ticket)));
                Ok(())
            }
            Err(name) => Err(Rejected::new(name, future)),
        }
    }

    /// Spawns a task that is not `Send`, on the current [`LocalSet`](tokio::task::LocalSet). Otherwise it works like
    /// [`spawn`](Self::spawn).
    ///
    /// # Errors
    ///
    /// If the group was cancelled, it is closed: the error returns the future, never polled.
    ///
    /// # Panics
    ///
    /// Outside a `LocalSet`.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::rc::Rc;
    /// use cancel_safe_shutdown::TaskGroup;
    /// use tokio::task::LocalSet;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let run = async {
    ///     let group = TaskGroup::new();
    ///     let page = Rc::new("one thread only".to_owned());
    ///     group.spawn_local("renderer", async move { drop(page) }).expect("an open group");
    ///     group.wait().await
    /// };
    /// assert_eq!(LocalSet::new().run_until(run).await.completed, ["renderer"]);
    /// # }
    /// ```
    #[track_caller]
    pub fn spawn_local<F>(&self, name: impl Into<Cow<'static, str>>, future: F) -> Result<(), Rejected<F>>
    where
        F: Future + 'static,
        F::Output: TaskOutput<T, E>,
    {
        match self.enter(Name::Plain(name.into()), Location::caller()) {
            Ok(ticket) => {
                drop(tokio::task::spawn_local(Tracked::new(future, ticket)));
                Ok(())
            }
            Err(name) => Err(Rejected::new(name, future)),
        }
    }

    /// Spawns a task with its own context: a cancel tells it to stop, and drops it only when the grace is over.
    ///
    /// # Errors
    ///
    /// If the group was cancelled, it is closed: the error returns `work`, never called.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    #[track_caller]
    pub fn spawn_with<W, F>(&self, name: impl Into<Cow<'static, str>>, work: W) -> Result<(), Rejected<W>>
    where
        W: FnOnce(WorkerContext) -> F + Send + 'static,
        F: Future + Send + 'static,
        F::Output: TaskOutput<T, E>,
    {
        self.spawn_contextual(name.into(), Location::caller(), work)
    }

    pub(crate) fn spawn_contextual<W, F>(
        &self,
        name: Cow<'static, str>,
        spawned_at: &'static Location<'static>,
        work: W,
    ) -> Result<(), Rejected<W>>
    where
        W: FnOnce(WorkerContext) -> F + Send + 'static,
        F: Future + Send + 'static,
        F::Output: TaskOutput<T, E>,
    {
        match self.enter_with(name, spawned_at, Kind::Contextual) {
            Ok((ticket, cx)) => {
                // Called inside the task, so that a panic of `work` itself is the task's and not the caller's.
                drop(tokio::spawn(Tracked::new(async move { work(cx).await }, ticket)));
                Ok(())
            }
            Err(name) => Err(Rejected::new(name, work)),
        }
    }

    /// Spawns a closure on the runtime's blocking threads.
    ///
    /// A cancel drops the closure if it has not begun; otherwise it tells its context. Nothing can stop a closure that
    /// does not check [`is_cancelled`](WorkerContext::is_cancelled). A closure that outlives the grace is reported as a
    /// straggler.
    ///
    /// # Errors
    ///
    /// If the group was cancelled, it is closed: the error returns `work`, never called.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    #[track_caller]
    pub fn spawn_blocking<W, R>(&self, name: impl Into<Cow<'static, str>>, work: W) -> Result<(), Rejected<W>>
    where
        W: FnOnce(WorkerContext) -> R + Send + 'static,
        R: TaskOutput<T, E>,
    {
        let (ticket, cx) = match self.enter_with(name.into(), Location::caller(), Kind::Blocking) {
            Ok(entered) => entered,
            Err(name) => return Err(Rejected::new(name, work)),
        };
        let closure = Closure::new(work, ticket);
        drop(tokio::task::spawn_blocking(move || closure.run(cx)));
        Ok(())
    }

    /// Creates a group below this one. It is cancelled with this one, and this group's [`wait`](Self::wait) waits for
    /// it. The name is for the report of an application.
    ///
    /// Its holder reads the outcomes of its tasks.
    pub fn child(&self, name: impl Into<String>) -> Self {
        let (name, above) = (name.into(), self.roster.path());
        // Only reports show a path. It stays short however deep the nesting.
        let path = match self.roster.recorder() {
            None => String::new(),
            Some(_) if above.len() + name.len() > LONGEST_PATH => format!("…/{name}"),
            Some(_) => format!("{above}/{name}"),
        };
        let recorder = self.roster.recorder().cloned();
        let rules = Rules { grace: self.roster.grace(), ..Rules::default() };
        Self::on(Roster::below(&self.node(), path, recorder, rules))
    }

    /// Returns the number of tasks that have not ended.
    pub fn len(&self) -> usize {
        self.roster.len()
    }

    /// Returns whether every task has ended.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns how many tasks have ended, and how, whether or not their outcomes have been read.
    pub fn counts(&self) -> TaskCounts {
        self.roster.counts()
    }

    pub(crate) fn stop(&self, reason: StopReason, deadline: Instant) {
        stop_tree(&self.node(), &Stopping { reason, deadline });
    }

    /// Cancels every task without a grace, and does not wait.
    pub(crate) fn end_now(&self) {
        let root = self.node();
        if root.is_gone() {
            return;
        }
        self.stop(StopReason::Requested, Instant::now());
        abort_tree(&root);
    }

    /// Waits until no task is alive. At the end of a stop's grace, cuts what is left.
    pub(crate) async fn idle(&self) {
        bounded(&self.node(), |cx| self.roster.poll_idle(cx)).await;
    }

    pub(crate) fn node(&self) -> Arc<dyn Node> {
        self.roster.clone()
    }

    fn enter(&self, name: Name, spawned_at: &'static Location<'static>) -> Result<Ticket<T, E>, Cow<'static, str>> {
        watch();
        match self.roster.enter(name, spawned_at) {
            Ok(seat) => Ok(Ticket::new(seat)),
            Err(name) => Err(name.into_inner()),
        }
    }

    fn enter_with(
        &self,
        name: Cow<'static, str>,
        spawned_at: &'static Location<'static>,
        kind: Kind,
    ) -> Result<(Ticket<T, E>, WorkerContext), Cow<'static, str>> {
        let own = Arc::new(Own::new(name, kind));
        let ticket = self.enter(Name::Own(Arc::clone(&own)), spawned_at)?;
        Ok((ticket, WorkerContext::new(own, self.node())))
    }
}

impl Default for TaskGroup {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Send + 'static, E: Send + 'static> Drop for TaskGroup<T, E> {
    fn drop(&mut self) {
        self.end_now();
        self.roster.orphan();
    }
}

impl<T: Send + 'static, E: Send + 'static> fmt::Debug for TaskGroup<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TaskGroup")
            .field("live", &self.len())
            .field("grace", &self.roster.grace())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stop::after;

    #[tokio::test]
    async fn a_task_that_is_cut_before_it_is_spawned_is_aborted_all_the_same() {
        let group = TaskGroup::new();
        let Ok((ticket, _)) = group.enter_with("late".into(), Location::caller(), Kind::Contextual) else {
            panic!("an open group");
        };
        group.stop(StopReason::Requested, after(Duration::from_secs(10)));
        abort_tree(&group.node());
        drop(tokio::spawn(Tracked::new(std::future::pending::<()>(), ticket)));
        let ended = tokio::time::timeout(Duration::from_secs(5), group.wait()).await.expect("it was not aborted");
        assert_eq!(ended.cancelled, ["late"]);
    }

    #[tokio::test]
    async fn a_task_that_has_ended_leaves_nothing_in_its_trace() {
        let group = TaskGroup::new();
        let Ok((block, place)) = group.roster.enter(Name::Plain("parked".into()), Location::caller()) else {
            panic!("an open group");
        };
        let ticket = Ticket::new((Arc::clone(&block), place));
        drop(tokio::spawn(Tracked::new(tokio::task::yield_now(), ticket)));
        while !block.trace(place).holds_task() {
            tokio::task::yield_now().await;
        }
        group.idle().await;
        assert!(!block.trace(place).holds_task(), "the memory of the task is kept");
        assert_eq!(block.trace(place).pulse(), 0, "the next task in this place begins with another's pulse");
    }

    #[tokio::test]
    async fn a_group_and_its_last_task_leave_nothing_of_it_behind() {
        let waited = TaskGroup::new();
        let after_wait = Arc::downgrade(&waited.roster);
        waited.spawn("done", async {}).expect("an open group");
        drop(waited.wait().await);
        assert!(after_wait.upgrade().is_none(), "the places of the group keep it");

        let dropped = TaskGroup::new();
        let after_drop = Arc::downgrade(&dropped.roster);
        let (release, released) = std::sync::mpsc::channel::<()>();
        let (begun, running) = tokio::sync::oneshot::channel();
        let work = move |_| {
            begun.send(()).expect("it is awaited");
            assert!(released.recv().is_err(), "nothing is sent");
        };
        dropped.spawn_blocking("closure", work).expect("an open group");
        running.await.expect("it begins");
        drop(dropped);
        assert!(after_drop.upgrade().is_some(), "the closure has not told its end");
        drop(release);
        let gone = async {
            while after_drop.strong_count() > 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), gone).await.expect("the places of the group keep it");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_task_has_one_waker_for_life() {
        // The group keeps the first one. If this changes, `Ticket::park` has to look at each.
        let polls = |count: usize| async move {
            let mut first: Option<std::task::Waker> = None;
            for _ in 0..count {
                let waker = std::future::poll_fn(|cx| std::task::Poll::Ready(cx.waker().clone())).await;
                assert!(first.get_or_insert_with(|| waker.clone()).will_wake(&waker));
                tokio::task::yield_now().await;
            }
        };
        let group = TaskGroup::new();
        for _ in 0..8 {
            group.spawn("task", polls(1_000)).expect("an open group");
        }
        let local = tokio::task::LocalSet::new();
        let result = local.run_until(async {
            group.spawn_local("local", polls(1_000)).expect("an open group");
            group.wait().await
        });
        assert_eq!(result.await.completed.len(), 9);
    }
}
