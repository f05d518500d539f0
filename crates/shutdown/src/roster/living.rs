//! What is done to single tasks of a group, for as long as they are alive: looks, stops and aborts.
//!
//! Invariant: a task that has ended is not taken for the one that has its place now, and nothing of the user's runs under the
//! lock.

use std::task::{Context, Poll, Waker};

use crate::places::{Places, TaskId};
use crate::roster::Roster;
use crate::stop::Stopping;
use crate::task::TaskOutcome;
use crate::trace::{Kind, Task, Trace};
use crate::tree::Look;

impl<T: Send + 'static, E: Send + 'static> Roster<T, E> {
    /// The tasks of this name that are alive.
    pub(crate) fn named(&self, name: &str) -> Vec<TaskId> {
        let state = self.state();
        let named = state.places.iter().filter(|(_, task, _)| task.name.as_str() == name);
        named.map(|(id, ..)| id).collect()
    }

    /// What `read` makes of each task that is alive. It runs under the lock.
    pub(crate) fn read_all<R>(&self, read: impl Fn(&Task, &Trace) -> R) -> Vec<R> {
        self.state().places.iter().map(|(_, task, trace)| read(task, trace)).collect()
    }

    /// Ready when these tasks have ended and their outcomes are at hand.
    pub(crate) fn poll_ended(&self, tasks: &[TaskId], cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        if !tasks.iter().any(|id| state.places.get(*id).is_some()) {
            return Poll::Ready(());
        }
        state.next_waiters.add(cx.waker());
        Poll::Pending
    }

    /// Tells these tasks alone to stop: a plain one is dropped at its next await, as is a closure that has not begun.
    pub(crate) fn tell_to_stop(&self, tasks: &[TaskId], stopping: &Stopping) {
        let owns: Vec<_> = {
            let state = self.state();
            tasks.iter().filter_map(|id| state.places.get(*id)?.0.name.own().cloned()).collect()
        };
        // The reason first, so that whoever finds the task called finds it. Without the lock, as it wakes those who wait.
        owns.iter().for_each(|own| own.stop.request(stopping.clone()));
        self.abort_each(|places| {
            let called = tasks.iter().filter_map(|id| places.get(*id));
            let called = called.inspect(|(_, trace)| trace.set_called());
            called.filter(|(task, _)| task.name.kind() != Kind::Contextual).map(|(_, trace)| trace).collect()
        });
    }

    /// A look at those of these tasks that are alive.
    pub(crate) fn look_at(&self, tasks: &[TaskId]) -> Vec<Look> {
        let state = self.state();
        let alive = tasks.iter().filter_map(|id| Some((*id, state.places.get(*id)?.1.pulse())));
        alive.map(|(task, pulse)| Look { task, pulse }).collect()
    }

    /// Aborts these tasks, as far as they are alive.
    pub(crate) fn abort(&self, tasks: &[TaskId]) {
        self.abort_each(|places| tasks.iter().filter_map(|id| places.get(*id)).map(|(_, trace)| trace).collect());
    }

    pub(super) fn abort_each(&self, which: impl FnOnce(&Places<Self>) -> Vec<&Trace>) {
        let wakers: Vec<Waker> = {
            let state = self.state();
            which(&state.places).into_iter().filter_map(Trace::abort).collect()
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Tells these tasks as abandoned, but a blocking closure that has not begun as cancelled: it never will.
    pub(crate) fn abandon_tasks(&self, tasks: &[TaskId]) {
        for id in tasks {
            let mut state = self.state();
            let Some((task, trace)) = state.places.get(*id) else { continue };
            let is_off = task.name.kind() == Kind::Blocking && trace.call_off();
            let outcome = if is_off { TaskOutcome::Cancelled } else { TaskOutcome::Abandoned };
            let cut = trace.straggling();
            // Of these two, no code of the user's has anything to say.
            let said = self.said(&outcome);
            if let Some(task) = state.places.abandon(*id) {
                self.conclude(state, task, cut, outcome, said, |_, _| {});
            }
        }
    }
}
