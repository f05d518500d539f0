//! Which tasks of a group are alive, and how the others ended. A task is in exactly one of the two lists.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::report::{KEPT_TASKS, Ledger, TaskReport};
use crate::result::{TaskCounts, TaskGroupResult};
use crate::stop::{Stop, StopReason};
use crate::task::{Kind, Slot, TaskOutcome};
use crate::tree::{Node, ended};

/// How a task ended, with its traces.
pub(crate) struct Ended<T, E> {
    pub(crate) slot: Arc<Slot>,
    pub(crate) outcome: TaskOutcome<T, E>,
}

impl<T, E> Ended<T, E> {
    /// The name, moved out if nothing else holds the slot any more.
    pub(crate) fn into_named(self) -> (String, TaskOutcome<T, E>) {
        let name = Arc::try_unwrap(self.slot).map_or_else(|slot| slot.name.clone(), |slot| slot.name);
        (name.into_owned(), self.outcome)
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
    /// A slab: a task has its place until it ends, and then the place is vacant.
    places: Vec<Place>,
    /// The first vacant place. If there is none, the end of the slab.
    vacant: u32,
    len: usize,
    /// How many tasks there ever were.
    entered: u64,
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
    /// The first are woken when a task ends; the others when no task is left here, or a group below has ended too.
    next_waiters: Vec<Waker>,
    idle_waiters: Vec<Waker>,
}

enum Place {
    Taken(Arc<Slot>),
    /// The next vacant place.
    Vacant(u32),
}

impl Place {
    fn slot(&self) -> Option<&Arc<Slot>> {
        match self {
            Self::Taken(slot) => Some(slot),
            Self::Vacant(_) => None,
        }
    }
}

impl<T, E> State<T, E> {
    fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn live(&self) -> impl Iterator<Item = &Arc<Slot>> {
        self.places.iter().filter_map(Place::slot)
    }

    /// Gives a task the first vacant place. Returns false if the numbers of places run out; memory runs out long
    /// before.
    fn settle(&mut self, slot: &Arc<Slot>) -> bool {
        let (number, taken) = (self.vacant, Place::Taken(Arc::clone(slot)));
        slot.set_place(number);
        match self.places.get_mut(number as usize) {
            Some(place) => {
                if let Place::Vacant(next) = std::mem::replace(place, taken) {
                    self.vacant = next;
                }
            }
            None => {
                let Some(next) = number.checked_add(1) else { return false };
                self.places.push(taken);
                self.vacant = next;
            }
        }
        self.len += 1;
        true
    }

    fn is_idle(&self) -> bool {
        self.is_empty() && self.open_children == 0
    }

    /// Moves a task from the living to the ended. Returns what is not kept, to be dropped outside the lock.
    fn leave(&mut self, slot: &Slot, outcome: TaskOutcome<T, E>) -> Option<Ended<T, E>> {
        let place = self.places.get_mut(slot.place() as usize)?;
        let Place::Taken(slot) = std::mem::replace(place, Place::Vacant(self.vacant)) else { return None };
        self.vacant = slot.place();
        self.len -= 1;
        let cut = slot.straggling().is_some();
        self.counts.add(&outcome, cut);
        let ended = Ended { slot, outcome };
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
        let idle = if self.is_empty() { std::mem::take(&mut self.idle_waiters) } else { Vec::new() };
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

/// The waiters for the next end, and the waiters for the last.
type Waiters = (Vec<Waker>, Vec<Waker>);

fn wake(waiters: Option<Waiters>) {
    if let Some((next, idle)) = waiters {
        next.into_iter().chain(idle).for_each(Waker::wake);
    }
}

fn register(waiters: &mut Vec<Waker>, cx: &Context<'_>) {
    if !waiters.iter().any(|waiter| waiter.will_wake(cx.waker())) {
        waiters.push(cx.waker().clone());
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
        let child = Arc::new(Self::with_parent(path, recorder, Some(Arc::clone(parent)), rules));
        let erased: Arc<dyn Node> = child.clone();
        if !parent.adopt(Arc::downgrade(&erased)) {
            let never_taken = {
                let mut state = child.state();
                state.gone = true;
                state.parent.take()
            };
            drop(never_taken);
            child.close();
            if let Some(stopping) = parent.stop().get() {
                child.stop.request(stopping.clone());
            }
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
            places: Vec::new(),
            vacant: 0,
            len: 0,
            entered: 0,
            ended: Outcomes::default(),
            failed: false,
            closed: false,
            gone: false,
            parent,
            children: Vec::new(),
            open_children: 0,
            next_waiters: Vec::new(),
            idle_waiters: Vec::new(),
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

    /// Enters a task, which keeps its place until it ends. A closed group hands the name back.
    pub(crate) fn enter(&self, slot: Slot) -> Result<Arc<Slot>, Cow<'static, str>> {
        // Allocated outside the lock, because every task that ends contends for it.
        let slot = Arc::new(slot);
        let mut state = self.state();
        if state.closed || !state.settle(&slot) {
            drop(state);
            return Err(Arc::try_unwrap(slot).map_or_else(|slot| slot.name.clone(), |slot| slot.name));
        }
        state.entered += 1;
        Ok(slot)
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
        register(&mut state.next_waiters, cx);
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
            let (spawned_at, state, mark) = (ended.slot.spawned_at, ended.slot.straggling(), ended.slot.last_mark());
            let (name, outcome) = ended.into_named();
            result.add(name, outcome, state.map(|state| (state, spawned_at, mark)));
        }
        result
    }

    /// The tasks that are alive.
    pub(crate) fn slots(&self) -> Vec<Arc<Slot>> {
        self.state().live().cloned().collect()
    }

    /// The tasks of this name that are alive.
    pub(crate) fn named(&self, name: &str) -> Vec<Arc<Slot>> {
        self.state().live().filter(|slot| slot.name == name).cloned().collect()
    }

    /// Ready when these tasks have ended and their outcomes are at hand.
    pub(crate) fn poll_ended(&self, tasks: &[Arc<Slot>], cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        let lives = |slot: &Arc<Slot>| {
            let there = state.places.get(slot.place() as usize).and_then(Place::slot);
            there.is_some_and(|there| Arc::ptr_eq(there, slot))
        };
        if !tasks.iter().any(lives) {
            return Poll::Ready(());
        }
        register(&mut state.next_waiters, cx);
        Poll::Pending
    }

    /// Records these tasks as abandoned, but a blocking closure that has not begun as cancelled, because it never will
    /// begin.
    pub(crate) fn abandon_tasks(&self, tasks: impl IntoIterator<Item = Arc<Slot>>) {
        for slot in tasks {
            let outcome = if slot.call_off() { TaskOutcome::Cancelled } else { TaskOutcome::Abandoned };
            self.tell(&slot, outcome, |_, _| {});
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.state().len
    }
}

impl<T, E> Roster<T, E> {
    fn state(&self) -> MutexGuard<'_, State<T, E>> {
        // None of the user's code runs under this lock, so a poisoned lock holds a sound state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves a task from the living to the ended, unless it is there already. If the group fails fast, the first
    /// failure closes it, and `stop` does the rest.
    pub(crate) fn tell(&self, slot: &Slot, outcome: TaskOutcome<T, E>, stop: impl FnOnce(StopReason, Duration)) {
        let claimed = match &self.recorder {
            Some(recorder) => {
                let report = TaskReport::new(slot, &self.path, recorder.workers, (recorder.say)(&outcome));
                recorder.ledger.record(report, || slot.claim())
            }
            None => slot.claim(),
        };
        if !claimed {
            return;
        }
        slot.detach();
        let failure = failure(&outcome, &slot.name);
        let mut state = self.state();
        let vacated = state.leave(slot, outcome);
        // In the same step that publishes the failure, so that a task that sees the failure finds the group closed.
        let first = failure.filter(|_| state.rules.fail_fast && !std::mem::replace(&mut state.failed, true));
        state.closed |= first.is_some();
        let grace = state.rules.grace;
        let waiters = state.waiters();
        let above = self.above_if_gone(&mut state);
        drop(state);
        drop(vacated);
        if let Some(reason) = first {
            stop(reason, grace);
        }
        wake(waiters);
        ended(above);
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

    fn live(&self) -> Vec<Arc<Slot>> {
        self.slots()
    }

    fn live_futures(&self) -> usize {
        self.state().live().filter(|slot| slot.kind != Kind::Blocking).count()
    }

    fn children(&self) -> Vec<Arc<dyn Node>> {
        let children: Vec<_> = self.state().children.iter().filter_map(Weak::upgrade).collect();
        // Outside this lock, so that no two groups are ever locked at once.
        children.into_iter().filter(|child| !child.is_gone()).collect()
    }

    fn is_gone(&self) -> bool {
        self.state().gone
    }

    fn adopt(&self, child: Weak<dyn Node>) -> bool {
        let mut state = self.state();
        if state.closed {
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
        self.abandon_tasks(self.slots());
    }

    fn entered_if_empty(&self) -> Option<u64> {
        let state = self.state();
        state.is_empty().then_some(state.entered)
    }

    fn poll_empty(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        if state.is_empty() {
            return Poll::Ready(());
        }
        register(&mut state.idle_waiters, cx);
        Poll::Pending
    }

    fn poll_idle(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        if state.is_idle() {
            return Poll::Ready(());
        }
        register(&mut state.idle_waiters, cx);
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
