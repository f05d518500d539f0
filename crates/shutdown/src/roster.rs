//! Which tasks of a group are alive, and how the others ended. A task is in exactly one of the two lists.

mod living;

use std::collections::VecDeque;
use std::fmt;
use std::panic::Location;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::places::{Block, Places};
use crate::report::{KEPT_TASKS, Ledger, TaskReport};
use crate::result::{Cut, TaskCounts, TaskGroupResult};
use crate::stop::{Stop, StopReason};
use crate::task::{StragglerState, TaskOutcome};
use crate::trace::{Kind, Name, Task, Trace};
use crate::tree::{Look, Node, Seen, ended};

/// How a task ended.
pub(crate) struct Ended<T, E> {
    name: Name,
    outcome: TaskOutcome<T, E>,
    /// What there is to say if its grace was over. Boxed, as there is room for it in every outcome.
    cut: Option<Box<Cut>>,
}

impl<T, E> Ended<T, E> {
    fn into_named(self) -> (String, TaskOutcome<T, E>) {
        (self.name.into_inner().into_owned(), self.outcome)
    }
}

/// Outcomes in the order in which the tasks ended.
pub(crate) type Outcomes<T, E> = VecDeque<Ended<T, E>>;

/// How a roster feeds an application's report: where to write, and how to render an outcome without its types.
pub(crate) struct Recorder<T, E> {
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) say: fn(&TaskOutcome<T, E>) -> TaskOutcome<(), String>,
    /// Whether the tasks are the application's workers, rather than the workers' tasks.
    pub(crate) workers: bool,
}

impl<T, E> Clone for Recorder<T, E> {
    fn clone(&self) -> Self {
        Self { ledger: Arc::clone(&self.ledger), say: self.say, workers: self.workers }
    }
}

/// The tasks of one group.
pub(crate) struct Roster<T, E> {
    path: String,
    stop: Arc<Stop>,
    recorder: Option<Recorder<T, E>>,
    state: Mutex<State<T, E>>,
}

/// What a group does by itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    /// How long tasks with a context may take after a cancel.
    pub(crate) grace: Duration,
    /// Whether the first failure stops the group.
    pub(crate) fail_fast: bool,
    /// Whether the group keeps only failures, and only a bounded number of them.
    pub(crate) discards: bool,
    /// Whether a stop leaves the group open: until it is cut, or dropped.
    pub(crate) lingers: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self { grace: Duration::from_secs(10), fail_fast: false, discards: false, lingers: false }
    }
}

struct State<T, E> {
    rules: Rules,
    counts: TaskCounts,
    places: Places<Roster<T, E>>,
    ended: Outcomes<T, E>,
    /// Whether a task of a group that fails fast has failed.
    failed: bool,
    closed: bool,
    /// Whether the group is closed and idle (for good), and has told its parent.
    gone: bool,
    /// The group above, until this one is gone. It is told of the end even if its own handle was dropped long before.
    parent: Option<Arc<dyn Node>>,
    children: Vec<Weak<dyn Node>>,
    open_children: usize,
    /// Woken when a task ends; and when none is left here, or a group below has ended too.
    next_waiters: Wakers,
    idle_waiters: Wakers,
}

impl<T, E> State<T, E> {
    fn is_empty(&self) -> bool {
        self.places.len() == 0
    }

    fn is_idle(&self) -> bool {
        self.is_empty() && self.open_children == 0
    }

    /// Adds a task to the ended; returns what is not kept, to be dropped without the lock.
    fn keep(&mut self, ended: Ended<T, E>) -> Option<Ended<T, E>> {
        let cut = ended.cut.is_some();
        self.counts.add(&ended.outcome, cut);
        if !self.rules.discards {
            self.ended.push_back(ended);
            return None;
        }
        let cut_short = matches!(ended.outcome, TaskOutcome::Aborted | TaskOutcome::Abandoned) && cut;
        if !cut_short && !ended.outcome.is_failed() && !ended.outcome.is_panicked() {
            return Some(ended);
        }
        self.ended.push_back(ended);
        if self.ended.len() > KEPT_TASKS { self.ended.pop_front() } else { None }
    }

    /// Moves the outcomes at hand to `taken` if that is empty. It moves all of them, so that a reader of many seldom
    /// takes the lock; but only one from a group that keeps only the latest.
    fn take(&mut self, taken: &mut Outcomes<T, E>) {
        if self.rules.discards {
            taken.extend(self.ended.pop_front());
        } else if taken.is_empty() {
            // A swap, so that neither list has to grow again.
            std::mem::swap(taken, &mut self.ended);
        }
    }

    /// The waiters whose condition may have come true. Wake them outside the lock.
    fn waiters(&mut self) -> Option<Waiters> {
        if self.next_waiters.is_empty() && self.idle_waiters.is_empty() {
            return None;
        }
        let idle = if self.is_empty() { std::mem::take(&mut self.idle_waiters) } else { Wakers::default() };
        Some((std::mem::take(&mut self.next_waiters), idle))
    }
}

/// The reason to stop a group that fails fast, if this outcome is a failure.
fn failure<T, E>(outcome: &TaskOutcome<T, E>, task: &str) -> Option<StopReason> {
    match outcome {
        TaskOutcome::Failed(_) => Some(StopReason::Failed { worker: task.to_owned() }),
        TaskOutcome::Panicked { .. } => Some(StopReason::Panicked { worker: task.to_owned() }),
        _ => None,
    }
}

/// Those who wait for the next end, and those who wait for the last.
type Waiters = (Wakers, Wakers);

/// Wakers, of which there is seldom more than one.
#[derive(Default)]
struct Wakers {
    first: Option<Waker>,
    others: Vec<Waker>,
}

impl Wakers {
    fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    fn add(&mut self, waker: &Waker) {
        match &self.first {
            None => self.first = Some(waker.clone()),
            Some(first) => {
                if !first.will_wake(waker) && !self.others.iter().any(|other| other.will_wake(waker)) {
                    self.others.push(waker.clone());
                }
            }
        }
    }

    fn wake(self) {
        self.first.into_iter().chain(self.others).for_each(Waker::wake);
    }
}

#[inline]
fn wake(waiters: Option<Waiters>) {
    if let Some((next, idle)) = waiters {
        next.wake();
        idle.wake();
    }
}

impl<T: Send + 'static, E: Send + 'static> Roster<T, E> {
    pub(crate) fn root(path: String, recorder: Option<Recorder<T, E>>) -> Arc<Self> {
        Arc::new(Self::with_parent(path, recorder, None, Rules::default()))
    }

    /// A group below `parent`, which stops it and waits for it. It is closed from the start if `parent` is closed.
    pub(crate) fn below(
        parent: &Arc<dyn Node>,
        path: String,
        recorder: Option<Recorder<T, E>>,
        rules: Rules,
    ) -> Arc<Self> {
        let lingers = rules.lingers;
        let child = Arc::new(Self::with_parent(path, recorder, Some(Arc::clone(parent)), rules));
        let erased: Arc<dyn Node> = child.clone();
        if !parent.adopt(Arc::downgrade(&erased), lingers) {
            let never_taken = {
                let mut state = child.state();
                state.gone = true;
                state.parent.take()
            };
            drop(never_taken);
            child.close();
        }
        // A stop of the parent that comes later finds the child in its list.
        if let Some(stopping) = parent.stop().get() {
            child.stop.request(stopping.clone());
        }
        child
    }

    fn with_parent(
        path: String,
        recorder: Option<Recorder<T, E>>,
        parent: Option<Arc<dyn Node>>,
        rules: Rules,
    ) -> Self {
        let state = State {
            rules,
            counts: TaskCounts::default(),
            places: Places::default(),
            ended: Outcomes::default(),
            failed: false,
            closed: false,
            gone: false,
            parent,
            children: Vec::new(),
            open_children: 0,
            next_waiters: Wakers::default(),
            idle_waiters: Wakers::default(),
        };
        Self { path, stop: Arc::default(), recorder, state: Mutex::new(state) }
    }

    pub(crate) fn recorder(&self) -> Option<&Recorder<T, E>> {
        self.recorder.as_ref()
    }

    pub(crate) fn set_grace(&self, grace: Duration) {
        self.state().rules.grace = grace;
    }

    pub(crate) fn grace(&self) -> Duration {
        self.state().rules.grace
    }

    pub(crate) fn fail_fast(&self) {
        self.state().rules.fail_fast = true;
    }

    pub(crate) fn discard(&self) {
        self.state().rules.discards = true;
    }

    pub(crate) fn counts(&self) -> TaskCounts {
        self.state().counts
    }

    /// Enters a task, which has its place until it ends. A closed group hands its name back.
    pub(crate) fn enter(
        self: &Arc<Self>,
        name: Name,
        spawned_at: &'static Location<'static>,
    ) -> Result<(Arc<Block<Self>>, u32), Name> {
        let mut state = self.state();
        if state.closed { Err(name) } else { state.places.enter(self, name, spawned_at) }
    }

    /// Nobody can spawn here any more: keeps no memory for tasks to come.
    pub(crate) fn orphan(&self) {
        self.state().places.end();
    }

    /// Takes the outcomes at hand, for one reader; returns whether there are any.
    pub(crate) fn take(&self, taken: &mut Outcomes<T, E>) -> bool {
        self.state().take(taken);
        !taken.is_empty()
    }

    /// Takes outcomes as `take` does, or waits for some. Ready with false when there is neither an outcome nor a task
    /// that could still yield one.
    pub(crate) fn poll_take(&self, taken: &mut Outcomes<T, E>, cx: &mut Context<'_>) -> Poll<bool> {
        let mut state = self.state();
        state.take(taken);
        if !taken.is_empty() || state.is_empty() {
            return Poll::Ready(!taken.is_empty());
        }
        state.next_waiters.add(cx.waker());
        Poll::Pending
    }

    /// Hands an outcome to the caller that asked for it. If it is a panic, it counts as noticed.
    pub(crate) fn hand_out(&self, ended: Ended<T, E>) -> (String, TaskOutcome<T, E>) {
        if let (TaskOutcome::Panicked { .. }, Some(recorder)) = (&ended.outcome, &self.recorder) {
            recorder.ledger.notice_panics(1);
        }
        ended.into_named()
    }

    /// The outcomes not yet read, sorted; first those that a reader had already taken.
    pub(crate) fn take_result(&self, mut ended: Outcomes<T, E>) -> TaskGroupResult<E> {
        let counts = {
            let mut state = self.state();
            ended.append(&mut state.ended);
            state.counts
        };
        let mut result = TaskGroupResult::new(counts, self.ledger().cloned());
        for ended in ended {
            result.add(ended.name.into_inner().into_owned(), ended.outcome, ended.cut.map(|cut| *cut));
        }
        result
    }

    pub(crate) fn len(&self) -> usize {
        self.state().places.len()
    }
}

impl<T, E> Roster<T, E> {
    fn state(&self) -> MutexGuard<'_, State<T, E>> {
        // None of the user's code runs under this lock, so a poisoned lock holds a sound state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves a task from the living to the ended, unless that has been done, and takes its place back: nothing of the task
    /// looks at its trace any more. Where the first failure ends a group, that failure closes it and `stop` does the rest.
    pub(crate) fn tell(
        &self,
        place: u32,
        trace: &Trace,
        outcome: TaskOutcome<T, E>,
        stop: impl FnOnce(StopReason, Duration),
    ) {
        let said = self.said(&outcome);
        let mut state = self.state();
        let cut = trace.straggling();
        if let Some(task) = state.places.leave(place) {
            self.conclude(state, task, cut, outcome, said, stop);
        }
    }

    /// The outcome as the report wants it. To be made without the lock: it may be an error of the user's that says it.
    fn said(&self, outcome: &TaskOutcome<T, E>) -> Option<TaskOutcome<(), String>> {
        self.recorder.as_ref().map(|recorder| (recorder.say)(outcome))
    }

    fn conclude(
        &self,
        mut state: MutexGuard<'_, State<T, E>>,
        task: Task,
        cut: Option<StragglerState>,
        outcome: TaskOutcome<T, E>,
        said: Option<TaskOutcome<(), String>>,
        stop: impl FnOnce(StopReason, Duration),
    ) {
        if let (Some(recorder), Some(said)) = (&self.recorder, said) {
            // Under the lock, so that a task which is alive no more is on the list already.
            recorder.ledger.record(TaskReport::new(&task, cut, &self.path, recorder.workers, said));
        }
        // In the step that makes the failure known, so that whoever learns of it finds the group closed.
        let fails = state.rules.fail_fast && !state.failed;
        let first = if fails { failure(&outcome, task.name.as_str()) } else { None };
        state.failed |= first.is_some();
        state.closed |= first.is_some();
        let cut = cut.map(|state| Box::new((state, task.spawned_at, task.name.last_mark())));
        let vacated = state.keep(Ended { name: task.name, outcome, cut });
        let grace = state.rules.grace;
        let waiters = state.waiters();
        let above = self.above_if_gone(&mut state);
        drop(state);
        drop(vacated);
        if let Some(reason) = first {
            stop(reason, grace);
        }
        wake(waiters);
        if above.is_some() {
            ended(above);
        }
    }

    /// Where the task in this place was spawned, unless its end was told.
    pub(crate) fn origin(&self, place: u32) -> Option<&'static Location<'static>> {
        self.state().places.at(place).map(|task| task.spawned_at)
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.is_set()
    }

    /// Returns the group above, to be told, if this group has just ended for good.
    fn above_if_gone(&self, state: &mut State<T, E>) -> Option<Arc<dyn Node>> {
        if !state.closed || !state.is_idle() || std::mem::replace(&mut state.gone, true) {
            return None;
        }
        // Moved out, so that a long chain of groups is released one by one.
        state.parent.take()
    }
}

impl<T: Send + 'static, E: Send + 'static> Node for Roster<T, E> {
    fn path(&self) -> &str {
        &self.path
    }

    fn stop(&self) -> &Arc<Stop> {
        &self.stop
    }

    fn ledger(&self) -> Option<&Arc<Ledger>> {
        self.recorder.as_ref().map(|recorder| &recorder.ledger)
    }

    fn close(&self) {
        self.state().closed = true;
    }

    fn close_on_stop(&self) {
        let mut state = self.state();
        state.closed |= !state.rules.lingers;
    }

    fn close_if_empty(&self) -> bool {
        let mut state = self.state();
        let is_empty = state.is_empty();
        state.closed |= is_empty;
        is_empty
    }

    fn look(&self) -> Vec<Look> {
        self.state().places.iter().map(|(task, _, trace)| Look { task, pulse: trace.pulse() }).collect()
    }

    fn seen(&self, looks: &[Look]) -> Vec<Seen> {
        let state = self.state();
        let seen = looks.iter().filter_map(|look| {
            let (task, trace) = state.places.get(look.task)?;
            Some(Seen {
                name: task.name.as_str().to_owned(),
                spawned_at: task.spawned_at,
                last_mark: task.name.last_mark(),
                state: trace.judge(task.name.kind(), look.pulse, false),
            })
        });
        seen.collect()
    }

    fn cut(&self, looks: &[Look], starved: bool) {
        let state = self.state();
        for look in looks {
            if let Some((task, trace)) = state.places.get(look.task) {
                trace.cut(trace.judge(task.name.kind(), look.pulse, starved));
            }
        }
    }

    fn abort_all(&self) {
        self.abort_each(|places| places.iter().map(|(_, _, trace)| trace).collect());
    }

    fn abort_uninformed(&self) {
        self.abort_each(|places| {
            let tasks = places.iter().filter(|(_, task, _)| task.name.kind() != Kind::Contextual);
            tasks.map(|(_, _, trace)| trace).collect()
        });
    }

    fn live_futures(&self) -> usize {
        self.state().places.iter().filter(|(_, task, _)| task.name.kind() != Kind::Blocking).count()
    }

    fn children(&self) -> Vec<Arc<dyn Node>> {
        let children: Vec<_> = self.state().children.iter().filter_map(Weak::upgrade).collect();
        // Outside this lock, so that no two groups are ever locked at once.
        children.into_iter().filter(|child| !child.is_gone()).collect()
    }

    fn is_gone(&self) -> bool {
        self.state().gone
    }

    fn adopt(&self, child: Weak<dyn Node>, lingers: bool) -> bool {
        let mut state = self.state();
        if state.gone || (state.closed && !lingers) {
            return false;
        }
        // Swept only when full, so that a server with a group for each connection pays a constant cost for each.
        if state.children.len() == state.children.capacity() {
            state.children.retain(|child| child.strong_count() > 0);
        }
        state.children.push(child);
        state.open_children += 1;
        true
    }

    fn abandon(&self) {
        let tasks: Vec<_> = self.state().places.iter().map(|(task, ..)| task).collect();
        self.abandon_tasks(&tasks);
    }

    fn entered_if_empty(&self) -> Option<u64> {
        let state = self.state();
        state.is_empty().then(|| state.places.entered())
    }

    fn poll_empty(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        if state.is_empty() {
            return Poll::Ready(());
        }
        state.idle_waiters.add(cx.waker());
        Poll::Pending
    }

    fn poll_idle(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        if state.is_idle() {
            return Poll::Ready(());
        }
        state.idle_waiters.add(cx.waker());
        Poll::Pending
    }

    fn end(&self) -> Option<Arc<dyn Node>> {
        self.above_if_gone(&mut self.state())
    }

    fn child_ended(&self) {
        let mut state = self.state();
        state.open_children -= 1;
        let waiters = state.waiters();
        drop(state);
        wake(waiters);
    }
}

impl<T, E> fmt::Debug for Roster<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Roster").field("path", &self.path).field("stop", &self.stop).finish_non_exhaustive()
    }
}
