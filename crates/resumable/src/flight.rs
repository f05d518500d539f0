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

/// A place for an attempt, which stays where it is.
pub(crate) struct Place<I, Fut>(Pin<Box<Option<Attempt<I, Fut>>>>);

impl<I, Fut> Place<I, Fut> {
    fn free() -> Self {
        Self(Box::pin(None))
    }

    #[inline]
    fn is_taken(&self) -> bool {
        self.0.is_some()
    }

    #[inline]
    fn set(&mut self, attempt: Option<Attempt<I, Fut>>) {
        self.0.set(attempt);
    }
}

impl<I, Fut: Future> Future for Place<I, Fut> {
    type Output = (Ticket<I>, Fut::Output);

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(attempt) = self.0.as_mut().as_pin_mut() else { return Poll::Pending };
        attempt.poll(cx)
    }
}

/// The attempts that are running.
pub(crate) enum InFlight<I, R, Fut> {
    /// One at a time needs no list: its place is allocated once for the whole run.
    One(Place<I, Fut>),
    /// An item that does not wait needs none either: it joins the others if it is not done when it is polled first.
    Many { first: Place<I, Fut>, others: FuturesUnordered<Place<I, Fut>> },
    /// Each in a task of its own.
    Parallel { runtime: Handle, spawn: Spawn<R, Fut>, keeper: Keeper, tasks: FuturesUnordered<Attempt<I, Spawned<R>>> },
}

impl<I, R, Fut> InFlight<I, R, Fut> {
    pub(crate) fn new(concurrency: usize) -> Self {
        match concurrency {
            1 => Self::One(Place::free()),
            _ => Self::Many { first: Place::free(), others: FuturesUnordered::new() },
        }
    }

    pub(crate) fn parallel(runtime: Handle, spawn: Spawn<R, Fut>, keeper: Keeper) -> Self {
        Self::Parallel { runtime, spawn, keeper, tasks: FuturesUnordered::new() }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::One(place) => usize::from(place.is_taken()),
            Self::Many { first, others } => usize::from(first.is_taken()) + others.len(),
            Self::Parallel { tasks, .. } => tasks.len(),
        }
    }

    /// Drops what runs here, and asks what runs in tasks to end: that is out of the way when it has left `poll_done`.
    pub(crate) fn cut(&mut self) {
        match self {
            Self::One(place) => place.set(None),
            Self::Many { first, others } => {
                first.set(None);
                others.clear();
            }
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
            Self::One(place) => place.set(Some(Attempt { ticket, future })),
            Self::Many { first, others } => {
                if first.is_taken() {
                    others.push(std::mem::replace(first, Place::free()));
                }
                first.set(Some(Attempt { ticket, future }));
            }
            Self::Parallel { runtime, spawn, keeper, tasks } => {
                tasks.push(Attempt { ticket, future: spawn(runtime, future, keeper.clone()) });
            }
        }
    }

    /// Returns an attempt that has ended, and how, unless its task was cut; `Pending` if there is none.
    #[inline]
    pub(crate) fn poll_done(&mut self, cx: &mut Context<'_>) -> Poll<(Ticket<I>, Option<Fut::Output>)> {
        match self {
            Self::One(place) => {
                let (ticket, outcome) = ready!(Pin::new(&mut *place).poll(cx));
                place.set(None);
                Poll::Ready((ticket, Some(outcome)))
            }
            Self::Many { first, others } => {
                // Those that waited come first: items that are always ready must not keep them from being polled.
                if !others.is_empty()
                    && let Poll::Ready(Some((ticket, outcome))) = Pin::new(&mut *others).poll_next(cx)
                {
                    return Poll::Ready((ticket, Some(outcome)));
                }
                if !first.is_taken() {
                    return Poll::Pending;
                }
                if let Poll::Ready((ticket, outcome)) = Pin::new(&mut *first).poll(cx) {
                    first.set(None);
                    return Poll::Ready((ticket, Some(outcome)));
                }
                others.push(std::mem::replace(first, Place::free()));
                // It is polled again, with a waker of its own.
                match Pin::new(others).poll_next(cx) {
                    Poll::Ready(Some((ticket, outcome))) => Poll::Ready((ticket, Some(outcome))),
                    Poll::Ready(None) | Poll::Pending => Poll::Pending,
                }
            }
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
