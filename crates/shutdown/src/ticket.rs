//! A task as its runtime holds it. It reports its end exactly once, however it ends, and only after everything it owned
//! is gone.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use pin_project_lite::pin_project;

use crate::roster::Roster;
use crate::stop::{Stopping, after};
use crate::task::{Slot, TaskOutcome, TaskOutput, guarded};
use crate::tree::{Node, stop_tree};

/// A task's obligation to report how it ended: explicitly, or else when it is dropped.
pub(crate) struct Ticket<T, E> {
    pub(crate) slot: Arc<Slot>,
    roster: Arc<Roster<T, E>>,
}

impl<T, E> Ticket<T, E> {
    pub(crate) fn new(slot: Arc<Slot>, roster: Arc<Roster<T, E>>) -> Self {
        Self { slot, roster }
    }
}

impl<T: Send + 'static, E: Send + 'static> Ticket<T, E> {
    /// Reports how the task ended. Everything it owned must be gone by then.
    pub(crate) fn finish(&self, outcome: TaskOutcome<T, E>) {
        self.roster.tell(&self.slot, outcome, |reason, grace| {
            let node: Arc<dyn Node> = self.roster.clone();
            stop_tree(&node, &Stopping { reason, deadline: after(grace) });
        });
    }
}

impl<T, E> Drop for Ticket<T, E> {
    fn drop(&mut self) {
        if self.slot.is_told() {
            return;
        }
        // Dropped before its end, by its group, by a cut, or by the end of the runtime.
        let told = self.roster.is_stopped() || self.slot.is_called();
        let cancelled = told && self.slot.straggling().is_none();
        let outcome = if cancelled { TaskOutcome::Cancelled } else { TaskOutcome::Aborted };
        self.roster.tell(&self.slot, outcome, |_, _| {});
    }
}

pin_project! {
    // The future is declared before the ticket and so is dropped before it: even when a task is aborted, its
    // destructors have run when its end is reported.
    pub(crate) struct Tracked<F, T, E> {
        #[pin]
        future: Option<F>,
        ticket: Ticket<T, E>,
    }

    impl<F, T, E> PinnedDrop for Tracked<F, T, E> {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            if this.future.is_some() {
                let slot = Arc::clone(&this.ticket.slot);
                // If a destructor panics, the panic is the task's outcome, even if the task is cancelled or cut.
                if let Err(panicked) = guarded(&slot, || this.future.set(None)) {
                    this.ticket.roster.tell(&slot, panicked, |_, _| {});
                }
            }
        }
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
    T: Send + 'static,
    E: Send + 'static,
{
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        let slot = &this.ticket.slot;
        // Kept out here, so that an output whose destructor panics is not dropped while another panic unwinds.
        let mut output = None;
        let polled = guarded(slot, || {
            // Once the future was ready, it is gone, and is not polled again.
            let Some(future) = this.future.as_mut().as_pin_mut() else { return };
            if let Poll::Ready(returned) = future.poll(cx) {
                output = Some(returned);
                // What it owns is dropped before its end is reported. If a destructor panics, the panic is the outcome.
                this.future.set(None);
            }
        });
        let outcome = match (polled, output) {
            (Ok(()), None) => return Poll::Pending,
            (Ok(()), Some(output)) => output.into_outcome(),
            (Err(panicked), output) => {
                let emptied = guarded(slot, || {
                    this.future.set(None);
                    drop(output);
                });
                emptied.map_or_else(|again| again, |()| panicked)
            }
        };
        this.ticket.finish(outcome);
        Poll::Ready(())
    }
}
