//! A task as its runtime holds it. It reports its end exactly once, however it ends, and only after everything it owned
//! is gone.

use std::panic::Location;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use pin_project_lite::pin_project;

use crate::context::WorkerContext;
use crate::panics::{Panic, catch};
use crate::places::Block;
use crate::roster::Roster;
use crate::stop::{Stopping, after};
use crate::task::{TaskOutcome, TaskOutput};
use crate::trace::{Trace, guarded};
use crate::tree::{Node, stop_tree};

/// A task's obligation to report how it ended: explicitly, or else when it is dropped.
pub(crate) struct Ticket<T: Send + 'static, E: Send + 'static> {
    block: Arc<Block<Roster<T, E>>>,
    place: u32,
    /// Whether its trace has its waker.
    is_parked: bool,
    is_told: bool,
}

impl<T: Send + 'static, E: Send + 'static> Ticket<T, E> {
    pub(crate) fn new((block, place): (Arc<Block<Roster<T, E>>>, u32)) -> Self {
        Self { block, place, is_parked: false, is_told: false }
    }

    pub(crate) fn trace(&self) -> &Trace {
        self.block.trace(self.place)
    }

    fn roster(&self) -> &Arc<Roster<T, E>> {
        self.block.group()
    }

    /// How a task ends that panicked.
    pub(crate) fn panicked(&self, panic: Panic) -> TaskOutcome<T, E> {
        let Panic { message, location } = panic;
        let origin = || self.roster().origin(self.place).unwrap_or_else(Location::caller).into();
        TaskOutcome::Panicked { message, location: location.unwrap_or_else(origin) }
    }

    /// How a task ends whose future is dropped: by its group, or else by a cut or by the end of the runtime.
    fn dropped(&self) -> TaskOutcome<T, E> {
        let told = self.roster().is_stopped() || self.trace().is_called();
        if told && self.trace().straggling().is_none() { TaskOutcome::Cancelled } else { TaskOutcome::Aborted }
    }

    /// Lets whoever aborts the task wake it. A task of tokio's has the same waker for life, so this is done once.
    fn park(&mut self, waker: &Waker) {
        if !std::mem::replace(&mut self.is_parked, true) {
            self.trace().park(waker);
        }
    }

    /// Nothing looks at the trace from now on.
    fn let_go(&mut self) {
        self.is_told = true;
        if self.is_parked {
            self.trace().unpark();
        }
    }
}

impl<T: Send + 'static, E: Send + 'static> Ticket<T, E> {
    /// Says how the task ended. Whatever it owned must be gone by then.
    pub(crate) fn finish(&mut self, outcome: TaskOutcome<T, E>) {
        self.let_go();
        self.roster().tell(self.place, self.trace(), outcome, |reason, grace| {
            let node: Arc<dyn Node> = self.roster().clone();
            stop_tree(&node, &Stopping { reason, deadline: after(grace) });
        });
    }
}

impl<T: Send + 'static, E: Send + 'static> Drop for Ticket<T, E> {
    fn drop(&mut self) {
        if !self.is_told {
            self.finish(self.dropped());
        }
    }
}

/// A closure for a blocking thread. Dropped unrun, as by a runtime that ends, it reports its end like a task.
pub(crate) struct Closure<W, T: Send + 'static, E: Send + 'static> {
    /// Declared before the ticket, and dropped before it.
    work: Option<W>,
    ticket: Ticket<T, E>,
}

impl<W, T: Send + 'static, E: Send + 'static> Closure<W, T, E> {
    pub(crate) fn new(work: W, ticket: Ticket<T, E>) -> Self {
        Self { work: Some(work), ticket }
    }

    pub(crate) fn run<R: TaskOutput<T, E>>(mut self, cx: WorkerContext)
    where
        W: FnOnce(WorkerContext) -> R,
    {
        // Otherwise it was called off or aborted.
        if self.ticket.trace().begin()
            && let Some(work) = self.work.take()
        {
            // Without a beat: it has one from its beginning.
            let outcome = catch(|| work(cx).into_outcome()).unwrap_or_else(|panic| self.ticket.panicked(panic));
            self.ticket.finish(outcome);
        }
    }
}

impl<W, T: Send + 'static, E: Send + 'static> Drop for Closure<W, T, E> {
    fn drop(&mut self) {
        if let Some(work) = self.work.take()
            && let Err(panic) = catch(|| drop(work))
        {
            let panicked = self.ticket.panicked(panic);
            self.ticket.finish(panicked);
        }
    }
}

pin_project! {
    // The future is declared before the ticket and so is dropped before it: even when a task is aborted, its
    // destructors have run when its end is reported.
    pub(crate) struct Tracked<F, T, E>
    where
        T: Send,
        T: 'static,
        E: Send,
        E: 'static,
    {
        #[pin]
        future: Option<F>,
        ticket: Ticket<T, E>,
    }

    impl<F, T, E> PinnedDrop for Tracked<F, T, E>
    where
        T: Send,
        T: 'static,
        E: Send,
        E: 'static,
    {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            if this.future.is_some() {
                // A destructor that panics is how the task ended, also of one that is cancelled or cut.
                if let Err(panic) = guarded(this.ticket.trace(), || this.future.set(None)) {
                    let panicked = this.ticket.panicked(panic);
                    this.ticket.finish(panicked);
                }
            }
        }
    }
}

impl<F, T: Send + 'static, E: Send + 'static> Tracked<F, T, E> {
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
        let is_wanted = !this.ticket.trace().is_unwanted();
        // Kept out here, so that one whose destructor panics is not dropped while another panic unwinds.
        let mut output = None;
        let polled = guarded(this.ticket.trace(), || {
            // Once it was ready, it is gone, and nobody polls it again.
            let Some(future) = this.future.as_mut().as_pin_mut().filter(|_| is_wanted) else {
                return this.future.set(None);
            };
            if let Poll::Ready(returned) = future.poll(cx) {
                output = Some(returned.into_outcome());
                // What it owns is dropped before its end is reported. If a destructor panics, the panic is the outcome.
                this.future.set(None);
            }
        });
        let outcome = match (polled, output) {
            (Ok(()), None) if is_wanted => {
                this.ticket.park(cx.waker());
                return Poll::Pending;
            }
            (Ok(()), None) => this.ticket.dropped(),
            (Ok(()), Some(outcome)) => outcome,
            (Err(panic), output) => {
                let emptied = guarded(this.ticket.trace(), || {
                    this.future.set(None);
                    drop(output);
                });
                this.ticket.panicked(emptied.err().unwrap_or(panic))
            }
        };
        this.ticket.finish(outcome);
        Poll::Ready(())
    }
}
