//! Who is alive in a group and how the others ended. A task is in exactly one of the two lists.

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
    /// The name, moved out where nobody else holds the slot any more.
    pub(crate) fn into_named(self) -> (String, TaskOutcome<T, E>) {
        let name = Arc::try_unwrap(self.slot).map_or_else(|slot| slot.name.clone(), |slot| slot.name);
        (name.into_owned(), self.outcome)
    }
}

/// A list of tasks as an application's report wants it: where to write, and how to say an outcome without its types.
pub(crate) struct Recorder<T, E> {
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) say: fn(&TaskOutcome<T, E>) -> TaskOutcome<(), String>,
    /// Whether the tasks are the application's workers, rather than tasks of theirs.
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

/// What a group does of itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    /// How long tasks with a context may take after a cancel.
    pub(crate) grace: Duration,
    /// Whether the first failure stops the group.
    pub(crate) fail_fast: bool,
    /// Whether only failures are kept, and a bounded number of them.
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
    /// A slab: a task's index is its place until it ends, then the place is vacant.
    live: Vec<Option<Arc<Slot>>>,
    vacant: Vec<usize>,
    /// How many tasks there ever were.
    entered: u64,
    ended: VecDeque<Ended<T, E>>,
    /// Whether a task of a group that fails fast has failed.
    failed: bool,
    closed: bool,
    /// Whether the group is closed and idle, which it then stays, and the parent has been told.
    gone: bool,
    /// The group above, until this one is gone: it is told even if its own handle was dropped long before.
    parent: Option<Arc<dyn Node>>,
    children: Vec<Weak<dyn Node>>,
    open_children: usize,
    /// Woken when a task ends; and when none is left here, or a group below has ended too.
    next_waiters: Vec<Waker>,
    idle_waiters: Vec<Waker>,
}

impl<T, E> State<T, E> {
    fn is_empty(&self) -> bool {
        self.live.len() == self.vacant.len()
    }

    fn is_idle(&self) -> bool {
        self.is_empty() && self.open_children == 0
    }

    /// Moves a task from the living to the ended; returns what is not kept, to be dropped without the lock.
    fn leave(&mut self, index: usize, outcome: TaskOutcome<T, E>) -> Option<Ended<T, E>> {
        let slot = self.live.get_mut(index).and_then(Option::take)?;
        self.vacant.push(index);
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

    /// The waiters whose condition may have come true. To be woken without the lock.
    fn waiters(&mut self) -> (Vec<Waker>, Vec<Waker>) {
        let idle = if self.is_empty() { std::mem::take(&mut self.idle_waiters) } else { Vec::new() };
        (std::mem::take(&mut self.next_waiters), idle)
    }
}

/// What a group that fails fast is stopped for, if this outcome is a failure.
fn failure<T, E>(outcome: &TaskOutcome<T, E>, task: &str) -> Option<StopReason> {
    match outcome {
        TaskOutcome::Failed(_) => Some(StopReason::Failed { worker: task.to_owned() }),
        TaskOutcome::Panicked { .. } => Some(StopReason::Panicked { worker: task.to_owned() }),
        _ => None,
    }
}

fn wake((next, idle): (Vec<Waker>, Vec<Waker>)) {
    next.into_iter().for_each(Waker::wake);
    idle.into_iter().for_each(Waker::wake);
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

    /// A group below `parent`, stopped with it and awaited by it. Closed from the start if `parent` is.
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
            live: Vec::new(),
            vacant: Vec::new(),
            entered: 0,
            ended: VecDeque::new(),
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

    /// Enters a task, which has its place until it ends. A closed group hands its name back.
    pub(crate) fn enter(&self, slot: Slot) -> Result<(Arc<Slot>, usize), Cow<'static, str>> {
        // Allocated without the lock, for which every task that ends contends.
        let slot = Arc::new(slot);
        let place = Arc::clone(&slot);
        let mut state = self.state();
        if state.closed {
            drop(state);
            drop(place);
            return Err(Arc::try_unwrap(slot).map_or_else(|slot| slot.name.clone(), |slot| slot.name));
        }
        state.entered += 1;
        let index = match state.vacant.pop() {
            Some(index) => {
                state.live[index] = Some(place);
                index
            }
            None => {
                state.live.push(Some(place));
                state.live.len() - 1
            }
        };
        Ok((slot, index))
    }

    /// The next outcome, if one is at hand.
    pub(crate) fn next(&self) -> Option<Ended<T, E>> {
        self.state().ended.pop_front()
    }

    /// The next outcome; `None` when there is neither one nor a task that could still yield one.
    pub(crate) fn poll_next(&self, cx: &mut Context<'_>) -> Poll<Option<Ended<T, E>>> {
        let mut state = self.state();
        if let Some(ended) = state.ended.pop_front() {
            return Poll::Ready(Some(ended));
        }
        if state.is_empty() {
            return Poll::Ready(None);
        }
        register(&mut state.next_waiters, cx);
        Poll::Pending
    }

    /// An outcome on its way to whoever asked for it: a panic among them has been noticed.
    pub(crate) fn hand_out(&self, ended: Ended<T, E>) -> (String, TaskOutcome<T, E>) {
        if let (TaskOutcome::Panicked { .. }, Some(recorder)) = (&ended.outcome, &self.recorder) {
            recorder.ledger.notice_panics(1);
        }
        ended.into_named()
    }

    /// The outcomes that nobody has asked for, sorted.
    pub(crate) fn take_result(&self) -> TaskGroupResult<E> {
        let (ended, counts) = {
            let mut state = self.state();
            (std::mem::take(&mut state.ended), state.counts)
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
        self.state().live.iter().flatten().cloned().collect()
    }

    /// The tasks of this name that are alive, with their places.
    pub(crate) fn named(&self, name: &str) -> Vec<(usize, Arc<Slot>)> {
        self.placed(|slot| slot.name == name)
    }

    /// Ready when these tasks have ended and their outcomes are at hand.
    pub(crate) fn poll_ended(&self, tasks: &[(usize, Arc<Slot>)], cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        let lives = |(index, slot): &(usize, Arc<Slot>)| matches!(state.live.get(*index), Some(Some(live)) if Arc::ptr_eq(live, slot));
        if !tasks.iter().any(lives) {
            return Poll::Ready(());
        }
        register(&mut state.next_waiters, cx);
        Poll::Pending
    }

    /// Tells these tasks as abandoned, but a blocking closure that has not begun as cancelled: it never will.
    pub(crate) fn abandon_tasks(&self, tasks: impl IntoIterator<Item = (usize, Arc<Slot>)>) {
        for (index, slot) in tasks {
            let outcome = if slot.call_off() { TaskOutcome::Cancelled } else { TaskOutcome::Abandoned };
            self.tell(index, &slot, outcome, |_, _| {});
        }
    }

    fn placed(&self, chosen: impl Fn(&Slot) -> bool) -> Vec<(usize, Arc<Slot>)> {
        let state = self.state();
        let live = state.live.iter().enumerate();
        live.filter_map(|(index, slot)| Some((index, slot.clone().filter(|slot| chosen(slot))?))).collect()
    }

    pub(crate) fn len(&self) -> usize {
        let state = self.state();
        state.live.len() - state.vacant.len()
    }
}

impl<T, E> Roster<T, E> {
    fn state(&self) -> MutexGuard<'_, State<T, E>> {
        // No code of the user's runs under this lock, so a poisoned one holds a sound state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves a task from the living to the ended, unless that has been done. Where the first failure ends a group, that
    /// failure closes it and `stop` does the rest.
    pub(crate) fn tell(
        &self,
        index: usize,
        slot: &Slot,
        outcome: TaskOutcome<T, E>,
        stop: impl FnOnce(StopReason, Duration),
    ) {
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
        let vacated = state.leave(index, outcome);
        // In the step that makes the failure known, so that whoever learns of it finds the group closed.
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

    /// Whether this group has just ended for good; if so, the one above that has to be told.
    fn above_if_gone(&self, state: &mut State<T, E>) -> Option<Arc<dyn Node>> {
        if !state.closed || !state.is_idle() || std::mem::replace(&mut state.gone, true) {
            return None;
        }
        // Given away, so that a long chain of groups is let go of one by one.
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
        self.state().live.iter().flatten().filter(|slot| slot.kind != Kind::Blocking).count()
    }

    fn children(&self) -> Vec<Arc<dyn Node>> {
        let children: Vec<_> = self.state().children.iter().filter_map(Weak::upgrade).collect();
        // Without this lock, so that no two groups are ever locked at once.
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
        // Swept only when full, so that a server with a group for each connection pays a constant for each.
        if state.children.len() == state.children.capacity() {
            state.children.retain(|child| child.strong_count() > 0);
        }
        state.children.push(child);
        state.open_children += 1;
        true
    }

    fn abandon(&self) {
        self.abandon_tasks(self.placed(|_| true));
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
