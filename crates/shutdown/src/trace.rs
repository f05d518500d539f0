//! What others may know of a task while it runs: name, origin, pulse, last mark; and how it is told to stop, or aborted.
//!
//! Invariant: a task writes its trace without a lock, everybody else under the lock of its group, where they see whether the
//! trace is still its own.

use std::borrow::Cow;
use std::panic::Location;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use crate::panics::{Panic, catch};
use crate::stop::OwnStop;
use crate::task::StragglerState;

/// What a cancel does to a task before its grace is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It knows nothing of a token: dropped at its next await.
    Plain,
    /// It has a context: told, and left alone until its grace is over.
    Contextual,
    /// A blocking closure: told, and dropped if it has not begun.
    Blocking,
}

/// A task that is alive, as its group lists it.
#[derive(Debug)]
pub(crate) struct Task {
    /// Unlike its place, no other task of the group ever has it.
    pub(crate) number: u64,
    pub(crate) name: Name,
    pub(crate) spawned_at: &'static Location<'static>,
}

/// The name of a task. What a plain task has no use for is not in here but behind `Own`: a server has one for each connection.
#[derive(Debug)]
pub(crate) enum Name {
    Plain(Cow<'static, str>),
    Own(Arc<Own>),
}

impl Name {
    #[inline]
    pub(crate) fn as_str(&self) -> &str {
        match self {
            Self::Plain(name) => name,
            Self::Own(own) => &own.name,
        }
    }

    /// The name alone, moved out where nobody else holds it any more.
    #[inline]
    pub(crate) fn into_inner(self) -> Cow<'static, str> {
        match self {
            Self::Plain(name) => name,
            Self::Own(own) => Arc::try_unwrap(own).map_or_else(|own| own.name.clone(), |own| own.name),
        }
    }

    pub(crate) fn kind(&self) -> Kind {
        self.own().map_or(Kind::Plain, |own| own.kind)
    }

    pub(crate) fn own(&self) -> Option<&Arc<Own>> {
        match self {
            Self::Plain(_) => None,
            Self::Own(own) => Some(own),
        }
    }

    #[inline]
    pub(crate) fn last_mark(&self) -> Option<String> {
        self.own()?.last_mark()
    }
}

/// What a task with a context has of its own.
#[derive(Debug)]
pub(crate) struct Own {
    pub(crate) name: Cow<'static, str>,
    kind: Kind,
    /// The stop of this task alone, beside that of its group.
    pub(crate) stop: OwnStop,
    mark: Mutex<Option<Cow<'static, str>>>,
}

impl Own {
    pub(crate) fn new(name: Cow<'static, str>, kind: Kind) -> Self {
        Self { name, kind, stop: OwnStop::default(), mark: Mutex::default() }
    }

    pub(crate) fn set_mark(&self, mark: Cow<'static, str>) {
        *self.mark.lock().unwrap_or_else(PoisonError::into_inner) = Some(mark);
    }

    fn last_mark(&self) -> Option<String> {
        self.mark.lock().unwrap_or_else(PoisonError::into_inner).as_deref().map(str::to_owned)
    }
}

/// The pulse of a blocking closure that must not begin any more.
const CALLED_OFF: u32 = u32::MAX;

/// What a task shows of itself while it runs.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    /// How to have the task look at `unwanted`, once it has been parked.
    waker: Mutex<Option<Waker>>,
    /// The number of polls begun and ended: odd inside a poll. Once it has begun, only the task writes it, so plain
    /// stores will do.
    pulse: AtomicU32,
    /// Whether it is to be dropped at its next await.
    unwanted: AtomicBool,
    /// Whether it was told to stop by itself, beside its group.
    called: AtomicBool,
    /// What it was doing when it was cut, as a number; zero if it was not.
    cut: AtomicU8,
}

impl Trace {
    /// As it was before its task: it is the next one's.
    #[inline]
    pub(crate) fn reset(&self) {
        // The lock of the group orders this with whatever the next task does.
        self.pulse.store(0, Ordering::Relaxed);
        self.unwanted.store(false, Ordering::Relaxed);
        self.called.store(false, Ordering::Relaxed);
        self.cut.store(0, Ordering::Relaxed);
    }

    #[inline]
    fn beat(&self) {
        self.pulse.store(self.pulse.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    /// Begins a blocking closure, unless it has been called off or aborted.
    pub(crate) fn begin(&self) -> bool {
        !self.is_unwanted() && self.pulse.compare_exchange(0, 1, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Calls a blocking closure off, unless it has begun.
    pub(crate) fn call_off(&self) -> bool {
        self.pulse.compare_exchange(0, CALLED_OFF, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    pub(crate) fn pulse(&self) -> u32 {
        self.pulse.load(Ordering::Relaxed)
    }

    /// What the task is doing, given its pulse some milliseconds ago and whether its runtime runs nothing.
    pub(crate) fn judge(&self, kind: Kind, earlier: u32, starved: bool) -> StragglerState {
        let now = self.pulse();
        match kind {
            Kind::Blocking => StragglerState::BlockingClosure,
            Kind::Plain | Kind::Contextual if now == earlier && now % 2 == 1 => StragglerState::BlockedInPoll,
            Kind::Plain | Kind::Contextual if starved => StragglerState::Starved,
            Kind::Plain | Kind::Contextual => StragglerState::ParkedAtAwait,
        }
    }

    pub(crate) fn is_inside_poll(&self) -> bool {
        let pulse = self.pulse();
        pulse % 2 == 1 && pulse != CALLED_OFF
    }

    /// Notes that this task alone was told to stop, which it has been by now.
    pub(crate) fn set_called(&self) {
        self.called.store(true, Ordering::Release);
    }

    /// Whether this task alone was told to stop.
    #[inline]
    pub(crate) fn is_called(&self) -> bool {
        self.called.load(Ordering::Acquire)
    }

    /// Records that the task outlived its grace. The first judgement stands.
    pub(crate) fn cut(&self, state: StragglerState) {
        // Relaxed will do: what reads it is the end of the task, which the abort that follows brings about.
        let _first = self.cut.compare_exchange(0, state.number(), Ordering::Relaxed, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn straggling(&self) -> Option<StragglerState> {
        StragglerState::of(self.cut.load(Ordering::Relaxed))
    }

    /// Whether the task is to be dropped instead of polled.
    #[inline]
    pub(crate) fn is_unwanted(&self) -> bool {
        self.unwanted.load(Ordering::Acquire)
    }

    /// Has the task dropped when it is polled next. That is now if it is parked: whoever is returned must be woken, without
    /// any lock.
    #[must_use]
    pub(crate) fn abort(&self) -> Option<Waker> {
        // Before the lock: a task that parks itself sees it under the lock, or else its waker is found there.
        self.unwanted.store(true, Ordering::Release);
        self.waker().take()
    }

    /// The task is parked from now on, and `waker` has it polled.
    pub(crate) fn park(&self, waker: &Waker) {
        let mut held = self.waker();
        let before = held.replace(waker.clone());
        let unwanted = if self.is_unwanted() { held.take() } else { None };
        drop(held);
        drop(before);
        if let Some(waker) = unwanted {
            waker.wake();
        }
    }

    /// Lets go of the waker, which keeps the memory of the task.
    pub(crate) fn unpark(&self) {
        let waker = self.waker().take();
        drop(waker);
    }

    #[cfg(test)]
    pub(crate) fn holds_task(&self) -> bool {
        self.waker().is_some()
    }

    fn waker(&self) -> MutexGuard<'_, Option<Waker>> {
        self.waker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs `call` inside a beat of the task's pulse, and catches its panic.
pub(crate) fn guarded<R>(trace: &Trace, call: impl FnOnce() -> R) -> Result<R, Panic> {
    trace.beat();
    let result = catch(call);
    trace.beat();
    result
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn an_aborted_task_is_woken_once_whether_it_parks_before_or_after() {
        let wakes = Arc::new(Wakes::default());
        let waker = Waker::from(Arc::clone(&wakes));
        let woken = || wakes.0.load(Ordering::Relaxed);

        let parked = Trace::default();
        parked.park(&waker);
        assert!(!parked.is_unwanted() && woken() == 0);
        parked.abort().expect("the waker of a parked task").wake();
        assert!(parked.is_unwanted() && parked.abort().is_none() && woken() == 1);

        let running = Trace::default();
        assert!(running.abort().is_none());
        running.park(&waker);
        assert!(woken() == 2 && !running.holds_task());
    }

    #[test]
    fn a_closure_begins_unless_it_was_called_off_or_aborted_and_is_not_called_off_afterwards() {
        let (begun, off, aborted) = (Trace::default(), Trace::default(), Trace::default());
        assert!(begun.begin() && !begun.call_off() && begun.is_inside_poll());
        assert!(off.call_off() && !off.begin() && !off.is_inside_poll());
        assert!(aborted.abort().is_none() && !aborted.begin());
    }

    #[test]
    fn a_task_is_judged_by_two_looks_at_its_pulse() {
        let trace = Trace::default();
        let (plain, closure) = (Kind::Plain, Kind::Blocking);
        assert_eq!(trace.judge(plain, 0, false), StragglerState::ParkedAtAwait);
        assert_eq!(trace.judge(plain, 0, true), StragglerState::Starved);
        assert_eq!(trace.judge(closure, 0, true), StragglerState::BlockingClosure);
        trace.beat();
        assert_eq!(trace.judge(plain, 1, true), StragglerState::BlockedInPoll);
        // Inside another poll than before.
        trace.beat();
        trace.beat();
        assert_eq!(trace.judge(Kind::Contextual, 1, false), StragglerState::ParkedAtAwait);
        trace.cut(StragglerState::Starved);
        trace.cut(StragglerState::ParkedAtAwait);
        assert_eq!(trace.straggling(), Some(StragglerState::Starved), "the first judgement stands");
    }
}
