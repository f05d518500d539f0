//! Who is alive in a group and how the others ended. A task is in exactly one of the two lists.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker, ready};

use pin_project_lite::pin_project;

use crate::report::{Ledger, TaskReport};
use crate::stop::Stop;
use crate::task::{Slot, TaskOutcome, TaskOutput, guarded};
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
    parent: Option<Weak<dyn Node>>,
    state: Mutex<State<T, E>>,
}

struct State<T, E> {
    /// A slab: a task's index is its place until it ends, then the place is vacant.
    live: Vec<Option<Arc<Slot>>>,
    vacant: Vec<usize>,
    /// How many tasks there ever were.
    entered: u64,
    ended: VecDeque<Ended<T, E>>,
    closed: bool,
    /// Whether the group is closed and idle, which it then stays, and the parent has been told.
    gone: bool,
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

    /// The waiters whose condition may have come true. To be woken without the lock.
    fn waiters(&mut self) -> (Vec<Waker>, Vec<Waker>) {
        let idle = if self.is_empty() { std::mem::take(&mut self.idle_waiters) } else { Vec::new() };
        (std::mem::take(&mut self.next_waiters), idle)
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
        Arc::new(Self::with_parent(path, recorder, None))
    }

    /// A group below `parent`, stopped with it and awaited by it. Closed from the start if `parent` is.
    pub(crate) fn below(parent: &Arc<dyn Node>, path: String, recorder: Option<Recorder<T, E>>) -> Arc<Self> {
        let child = Arc::new(Self::with_parent(path, recorder, Some(Arc::downgrade(parent))));
        let erased: Arc<dyn Node> = child.clone();
        if !parent.adopt(Arc::downgrade(&erased)) {
            child.state().gone = true;
            child.close();
            if let Some(stopping) = parent.stop().get() {
                child.stop.request(stopping.clone());
            }
        }
        child
    }

    fn with_parent(path: String, recorder: Option<Recorder<T, E>>, parent: Option<Weak<dyn Node>>) -> Self {
        let state = State {
            live: Vec::new(),
            vacant: Vec::new(),
            entered: 0,
            ended: VecDeque::new(),
            closed: false,
            gone: false,
            children: Vec::new(),
            open_children: 0,
            next_waiters: Vec::new(),
            idle_waiters: Vec::new(),
        };
        Self { path, stop: Arc::default(), recorder, parent, state: Mutex::new(state) }
    }

    pub(crate) fn recorder(&self) -> Option<&Recorder<T, E>> {
        self.recorder.as_ref()
    }

    /// Enters a task. A closed group hands its name back.
    pub(crate) fn enter(self: &Arc<Self>, slot: Slot) -> Result<Ticket<T, E>, Cow<'static, str>> {
        let mut state = self.state();
        if state.closed {
            return Err(slot.name);
        }
        state.entered += 1;
        let slot = Arc::new(slot);
        let index = match state.vacant.pop() {
            Some(index) => {
                state.live[index] = Some(Arc::clone(&slot));
                index
            }
            None => {
                state.live.push(Some(Arc::clone(&slot)));
                state.live.len() - 1
            }
        };
        drop(state);
        Ok(Ticket { slot, roster: Arc::clone(self), index })
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

    pub(crate) fn take_ended(&self) -> VecDeque<Ended<T, E>> {
        std::mem::take(&mut self.state().ended)
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

    /// Moves a task from the living to the ended, unless that has been done.
    fn tell(&self, index: usize, slot: &Slot, outcome: TaskOutcome<T, E>) {
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
        let mut state = self.state();
        if let Some(slot) = state.live.get_mut(index).and_then(Option::take) {
            state.vacant.push(index);
            state.ended.push_back(Ended { slot, outcome });
        }
        let waiters = state.waiters();
        let above = self.above_if_gone(&mut state);
        drop(state);
        wake(waiters);
        ended(above);
    }

    /// Whether this group has just ended for good; if so, the one above that has to be told.
    fn above_if_gone(&self, state: &mut State<T, E>) -> Option<Arc<dyn Node>> {
        if !state.closed || !state.is_idle() || std::mem::replace(&mut state.gone, true) {
            return None;
        }
        self.parent.as_ref()?.upgrade()
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

    fn close_if_empty(&self) -> bool {
        let mut state = self.state();
        let is_empty = state.is_empty();
        state.closed |= is_empty;
        is_empty
    }

    fn live(&self) -> Vec<Arc<Slot>> {
        self.state().live.iter().flatten().cloned().collect()
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
        let live: Vec<_> = {
            let state = self.state();
            state.live.iter().enumerate().filter_map(|(index, slot)| Some((index, slot.clone()?))).collect()
        };
        for (index, slot) in live {
            let outcome = if slot.call_off() { TaskOutcome::Cancelled } else { TaskOutcome::Abandoned };
            self.tell(index, &slot, outcome);
        }
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

/// A task's obligation to say how it ended: by itself, or else when it is dropped.
pub(crate) struct Ticket<T, E> {
    pub(crate) slot: Arc<Slot>,
    roster: Arc<Roster<T, E>>,
    index: usize,
}

impl<T, E> Ticket<T, E> {
    /// Says how the task ended. Whatever it owned must be gone by then.
    pub(crate) fn tell(&self, outcome: TaskOutcome<T, E>) {
        self.roster.tell(self.index, &self.slot, outcome);
    }
}

impl<T, E> Drop for Ticket<T, E> {
    fn drop(&mut self) {
        if self.slot.is_told() {
            return;
        }
        // Dropped before its end: by its group, or else by a cut or by the end of the runtime.
        let cancelled = self.roster.stop.is_set() && self.slot.straggling().is_none();
        let outcome = if cancelled { TaskOutcome::Cancelled } else { TaskOutcome::Aborted };
        self.tell(outcome);
    }
}

pin_project! {
    // The future is declared before the ticket and so is dropped before it: also when a task is aborted, its destructors
    // have run when its end is told, even if one of them panicked.
    pub(crate) struct Tracked<F, T, E> {
        #[pin]
        future: Option<F>,
        ticket: Ticket<T, E>,
    }
}

impl<F, T, E> Tracked<F, T, E> {
    pub(crate) fn new(future: F, ticket: Ticket<T, E>) -> Self {
        Self { future: Some(future), ticket }
    }
}

impl<F, T, E> Future for Tracked<F, T, E>
where
    F: Future,
    F::Output: TaskOutput<T, E>,
{
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        let slot = &this.ticket.slot;
        // Once it was ready, it is gone, and nobody polls it again.
        let Some(future) = this.future.as_mut().as_pin_mut() else { return Poll::Ready(()) };
        let ended = match guarded(slot, || future.poll(cx)) {
            Ok(output) => ready!(output).into_outcome(),
            Err(panicked) => panicked,
        };
        // What it owns goes before its end is told. A destructor may panic too.
        let outcome = guarded(slot, || this.future.set(None)).map_or_else(|panicked| panicked, |()| ended);
        this.ticket.tell(outcome);
        Poll::Ready(())
    }
}
