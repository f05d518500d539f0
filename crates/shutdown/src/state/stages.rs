//! The end of an application, as one state machine: `run`, the watchdog, the signals and the callbacks each have a
//! thread, and any of these threads may end the process.
//!
//! The tests compile this file a second time, beside a `sync` that is built from loom's types, and explore the
//! interleavings of those threads. So it uses nothing of this crate but its sibling `sync`.
//!
//! Invariant: the stage only advances, one thread gets the voice, and no thread that waits for a stage misses it.

use std::task::{Context, Poll, Waker};
use std::time::Instant;

use super::sync::Monitor;

/// How far the end has progressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// No stop was requested.
    Running,
    /// The deadline is set.
    Stopping,
    /// One thread has the voice and reports; no other does.
    Telling,
    /// The callbacks have returned.
    Told,
    /// `run` is about to return, and the process is no longer ours to end.
    Over,
}

/// The stage and its data. `V` is the voice.
#[derive(Debug)]
pub(crate) struct Ending<V> {
    state: Monitor<State<V>>,
}

#[derive(Debug)]
struct State<V> {
    stage: Stage,
    deadline: Option<Instant>,
    /// The thread that takes it ends the application.
    voice: Option<V>,
    /// Whether the stop must end at once; used where the process cannot simply be ended.
    hurried: bool,
    /// Waits to be hurried.
    supervisor: Option<Waker>,
}

impl<V> State<V> {
    fn advance(&mut self, stage: Stage) {
        self.stage = self.stage.max(stage);
    }
}

impl<V> Ending<V> {
    pub(crate) fn new() -> Self {
        let state = State { stage: Stage::Running, deadline: None, voice: None, hurried: false, supervisor: None };
        Self { state: Monitor::new(state) }
    }

    pub(crate) fn give_voice(&self, voice: V) {
        self.state.lock().voice = Some(voice);
    }

    /// Begins a stop that ends at `deadline`, unless one has begun.
    pub(crate) fn begin(&self, deadline: Instant) {
        self.change(|state| {
            state.deadline.get_or_insert(deadline);
            state.advance(Stage::Stopping);
        });
    }

    /// Takes the voice, and with it the duty to report and to end the application. `None` if another thread has it.
    pub(crate) fn claim(&self) -> Option<V> {
        self.change(|state| {
            state.advance(Stage::Telling);
            state.voice.take()
        })
    }

    pub(crate) fn told(&self) {
        self.change(|state| state.advance(Stage::Told));
    }

    pub(crate) fn over(&self) {
        self.change(|state| state.advance(Stage::Over));
    }

    /// Waits for a stop to begin and returns its deadline; `None` if the application is over without one.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let mut state = self.state.lock();
        while state.deadline.is_none() && state.stage < Stage::Over {
            (state, _) = self.state.wait(state, None);
        }
        state.deadline.filter(|_| state.stage < Stage::Over)
    }

    /// Waits for `stage` or one beyond it, and returns whether it was reached by `deadline`.
    pub(crate) fn reached(&self, stage: Stage, deadline: Instant) -> bool {
        let mut state = self.state.lock();
        let mut elapsed = false;
        while state.stage < stage && !elapsed {
            (state, elapsed) = self.state.wait(state, Some(deadline));
        }
        state.stage >= stage
    }

    /// Ends the grace of a stop.
    pub(crate) fn hurry(&self) {
        let waker = self.change(|state| {
            state.hurried = true;
            state.supervisor.take()
        });
        waker.into_iter().for_each(Waker::wake);
    }

    /// Ready once the stop must end at once. For one task.
    pub(crate) fn poll_hurried(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.state.lock();
        if state.hurried {
            return Poll::Ready(());
        }
        let before = state.supervisor.replace(cx.waker().clone());
        drop(state);
        // Outside the lock, because dropping a waker runs foreign code.
        drop(before);
        Poll::Pending
    }

    fn change<R>(&self, change: impl FnOnce(&mut State<V>) -> R) -> R {
        let mut state = self.state.lock();
        let result = change(&mut state);
        drop(state);
        self.state.announce();
        result
    }
}
