//! Items on their way: being run, or waiting to be run again.
//!
//! Invariant: an item is in exactly one place, and one that waits takes no slot of the concurrency.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures_core::Stream;
use futures_util::stream::FuturesUnordered;
use pin_project_lite::pin_project;
use tokio::{runtime::Handle, time::Instant};

use crate::{
    error::TaskError,
    item::ItemError,
    spawned::{Spawn, Spawned},
    store::Keeper,
    timer::Timer,
};

/// An item that is not finished.
#[derive(Debug)]
pub(crate) struct Ticket<I> {
    pub(crate) index: usize,
    pub(crate) key: Option<Arc<str>>,
    pub(crate) item: I,
    /// Failed attempts so far.
    pub(crate) attempts: u32,
    pub(crate) defers: u32,
    /// The number of its attempt among those of all items.
    pub(crate) launch: u64,
}

pin_project! {
    /// One attempt: the item's future, and the item it comes from.
    pub(crate) struct Attempt<I, Fut> {
        ticket: Option<Ticket<I>>,
        #[pin]
        future: Fut,
    }
}

impl<I, Fut: Future> Future for Attempt<I, Fut> {
    type Output = (Ticket<I>, Fut::Output);

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let output = ready!(this.future.poll(cx));
        Poll::Ready((this.ticket.take().expect("a future that is ready is not polled again"), output))
    }
}

/// The attempts that are running.
pub(crate) enum InFlight<I, R, Fut> {
    /// One at a time needs no list: its place is allocated once for the whole run.
    One(Pin<Box<Option<Attempt<I, Fut>>>>),
    Many(FuturesUnordered<Attempt<I, Fut>>),
    /// Each in a task of its own.
    Parallel {
        runtime: Handle,
        spawn: Spawn<R, Fut>,
        keeper: Keeper,
        tasks: FuturesUnordered<Attempt<I, Spawned<R>>>,
    },
}

impl<I, R, Fut> InFlight<I, R, Fut> {
    pub(crate) fn new(concurrency: usize) -> Self {
        if concurrency == 1 { Self::One(Box::pin(None)) } else { Self::Many(FuturesUnordered::new()) }
    }

    pub(crate) fn parallel(runtime: Handle, spawn: Spawn<R, Fut>, keeper: Keeper) -> Self {
        Self::Parallel { runtime, spawn, keeper, tasks: FuturesUnordered::new() }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::One(slot) => usize::from(slot.is_some()),
            Self::Many(set) => set.len(),
            Self::Parallel { tasks, .. } => tasks.len(),
        }
    }

    /// Drops what runs here, and asks what runs in tasks to end: that is out of the way when it has left `poll_done`.
    pub(crate) fn cut(&mut self) {
        match self {
            Self::One(slot) => slot.set(None),
            Self::Many(set) => set.clear(),
            Self::Parallel { tasks, .. } => {
                Pin::new(tasks).iter_pin_mut().for_each(|task| task.project().future.abort())
            }
        }
    }
}

impl<I, R, Fut: Future<Output = Result<R, ItemError>>> InFlight<I, R, Fut> {
    pub(crate) fn start(&mut self, ticket: Ticket<I>, future: Fut) {
        let ticket = Some(ticket);
        match self {
            Self::One(slot) => slot.set(Some(Attempt { ticket, future })),
            Self::Many(set) => set.push(Attempt { ticket, future }),
            Self::Parallel { runtime, spawn, keeper, tasks } => {
                tasks.push(Attempt { ticket, future: spawn(runtime, future, keeper.clone()) });
            }
        }
    }

    /// Returns an attempt that has ended, and how, unless its task was cut; `Pending` if there is none.
    #[inline]
    pub(crate) fn poll_done(&mut self, cx: &mut Context<'_>) -> Poll<(Ticket<I>, Option<Fut::Output>)> {
        match self {
            Self::One(slot) => {
                let Some(attempt) = slot.as_mut().as_pin_mut() else { return Poll::Pending };
                let (ticket, outcome) = ready!(attempt.poll(cx));
                slot.set(None);
                Poll::Ready((ticket, Some(outcome)))
            }
            Self::Many(set) => match Pin::new(set).poll_next(cx) {
                Poll::Ready(Some((ticket, outcome))) => Poll::Ready((ticket, Some(outcome))),
                Poll::Ready(None) | Poll::Pending => Poll::Pending,
            },
            Self::Parallel { tasks, .. } => match Pin::new(tasks).poll_next(cx) {
                Poll::Ready(Some(ended)) => Poll::Ready(ended),
                Poll::Ready(None) | Poll::Pending => Poll::Pending,
            },
        }
    }
}

/// Items that failed or were deferred, by the time at which they may run again; of equal times the first to come is first.
pub(crate) struct WaitingRoom<I> {
    tickets: BTreeMap<(Instant, u64), Ticket<I>>,
    arrivals: u64,
    timer: Timer,
}

impl<I> WaitingRoom<I> {
    pub(crate) fn new() -> Self {
        Self { tickets: BTreeMap::new(), arrivals: 0, timer: Timer::default() }
    }

    pub(crate) fn len(&self) -> usize {
        self.tickets.len()
    }

    pub(crate) fn enter(&mut self, until: Instant, ticket: Ticket<I>) -> Result<(), TaskError> {
        self.timer.set(until)?;
        self.arrivals += 1;
        self.tickets.insert((until, self.arrivals), ticket);
        Ok(())
    }

    /// Returns the item that has been due for longest as soon as there is one; never if none waits.
    #[inline]
    pub(crate) fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<Result<Ticket<I>, TaskError>> {
        let Some(first) = self.tickets.first_entry() else { return Poll::Pending };
        let until = first.key().0;
        if until > Instant::now() {
            self.timer.set(until)?;
            ready!(self.timer.poll(cx));
        }
        Poll::Ready(Ok(first.remove()))
    }
}
