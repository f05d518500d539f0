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
use tokio::time::Instant;

use crate::{error::TaskError, timer::Timer};

pub(crate) use crate::item::LONGEST_WAIT;

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
pub(crate) enum InFlight<I, Fut> {
    /// One at a time needs no list: its place is allocated once for the whole run.
    One(Pin<Box<Option<Attempt<I, Fut>>>>),
    Many(FuturesUnordered<Attempt<I, Fut>>),
}

impl<I, Fut: Future> InFlight<I, Fut> {
    pub(crate) fn new(concurrency: usize) -> Self {
        if concurrency == 1 { Self::One(Box::pin(None)) } else { Self::Many(FuturesUnordered::new()) }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::One(slot) => usize::from(slot.is_some()),
            Self::Many(set) => set.len(),
        }
    }

    pub(crate) fn start(&mut self, ticket: Ticket<I>, future: Fut) {
        let attempt = Attempt { ticket: Some(ticket), future };
        match self {
            Self::One(slot) => slot.set(Some(attempt)),
            Self::Many(set) => set.push(attempt),
        }
    }

    /// Drops all that is running.
    pub(crate) fn clear(&mut self) {
        match self {
            Self::One(slot) => slot.set(None),
            Self::Many(set) => set.clear(),
        }
    }

    /// Returns a finished attempt, or `Pending` if there is none.
    #[inline]
    pub(crate) fn poll_done(&mut self, cx: &mut Context<'_>) -> Poll<(Ticket<I>, Fut::Output)> {
        match self {
            Self::One(slot) => {
                let Some(attempt) = slot.as_mut().as_pin_mut() else { return Poll::Pending };
                let done = ready!(attempt.poll(cx));
                slot.set(None);
                Poll::Ready(done)
            }
            Self::Many(set) => match Pin::new(set).poll_next(cx) {
                Poll::Ready(Some(done)) => Poll::Ready(done),
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
