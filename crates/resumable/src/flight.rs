//! Items in flight: running, or waiting to run again.
//!
//! Invariant: an item is in exactly one place, and a waiting item takes no slot of the concurrency.

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
    /// The number of its attempt, counted over all items.
    pub(crate) launch: u64,
}

pin_project! {
    /// One attempt: the item's future, and the item itself.
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

/// A place for a future that stays put, and the item of that future.
pub(crate) struct Place<I, Fut> {
    /// `None` until the future has waited: an item that never waits is not moved around.
    ticket: Option<Ticket<I>>,
    future: Pin<Box<Option<Fut>>>,
}

impl<I, Fut> Place<I, Fut> {
    fn free() -> Self {
        Self { ticket: None, future: Box::pin(None) }
    }

    #[inline(always)]
    fn is_taken(&self) -> bool {
        self.ticket.is_some()
    }

    fn clear(&mut self) {
        self.ticket = None;
        self.future.set(None);
    }
}

/// Only the future is pinned, and it is in a box.
impl<I, Fut> Unpin for Place<I, Fut> {}

impl<I, Fut: Future> Place<I, Fut> {
    /// Polls a future for the first time, and keeps it if it waits.
    #[inline(always)]
    fn begin(&mut self, ticket: Ticket<I>, future: Fut, cx: &mut Context<'_>) -> Poll<(Ticket<I>, Fut::Output)> {
        self.future.set(Some(future));
        match self.poll_future(cx) {
            Poll::Ready(output) => Poll::Ready((ticket, output)),
            Poll::Pending => {
                self.ticket = Some(ticket);
                Poll::Pending
            }
        }
    }

    #[inline(always)]
    fn poll_future(&mut self, cx: &mut Context<'_>) -> Poll<Fut::Output> {
        let Some(future) = self.future.as_mut().as_pin_mut() else { return Poll::Pending };
        let output = ready!(future.poll(cx));
        self.future.set(None);
        Poll::Ready(output)
    }
}

impl<I, Fut: Future> Future for Place<I, Fut> {
    type Output = (Ticket<I>, Fut::Output);

    #[inline(always)]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if !self.is_taken() {
            return Poll::Pending;
        }
        let output = ready!(self.poll_future(cx));
        Poll::Ready((self.ticket.take().expect("a place is taken as long as there is a ticket"), output))
    }
}

/// The attempts that are running.
pub(crate) enum InFlight<I, R, Fut> {
    /// One at a time needs no list: its place is allocated once for the whole run.
    One(Place<I, Fut>),
    /// An item that does not wait needs no list either: it joins the others only if its first poll leaves it pending.
    Many { free: Place<I, Fut>, others: FuturesUnordered<Place<I, Fut>> },
    /// Each in its own task.
    Parallel { runtime: Handle, spawn: Spawn<R, Fut>, keeper: Keeper, tasks: FuturesUnordered<Attempt<I, Spawned<R>>> },
}

impl<I, R, Fut> InFlight<I, R, Fut> {
    pub(crate) fn new(concurrency: usize) -> Self {
        match concurrency {
            1 => Self::One(Place::free()),
            _ => Self::Many { free: Place::free(), others: FuturesUnordered::new() },
        }
    }

    pub(crate) fn parallel(runtime: Handle, spawn: Spawn<R, Fut>, keeper: Keeper) -> Self {
        Self::Parallel { runtime, spawn, keeper, tasks: FuturesUnordered::new() }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::One(place) => usize::from(place.is_taken()),
            Self::Many { others, .. } => others.len(),
            Self::Parallel { tasks, .. } => tasks.len(),
        }
    }

    /// Drops the futures that run here, and asks the tasks to end: a task is gone once `poll_done` has returned it.
    pub(crate) fn cut(&mut self) {
        match self {
            Self::One(place) => place.clear(),
            Self::Many { others, .. } => others.clear(),
            Self::Parallel { tasks, .. } => {
                Pin::new(tasks).iter_pin_mut().for_each(|task| task.project().future.abort())
            }
        }
    }
}

impl<I, R, Fut: Future<Output = Result<R, ItemError>>> InFlight<I, R, Fut> {
    /// Starts an attempt, and returns it if it has ended at once.
    #[inline(always)]
    pub(crate) fn start(
        &mut self,
        ticket: Ticket<I>,
        future: Fut,
        cx: &mut Context<'_>,
    ) -> Poll<(Ticket<I>, Option<Fut::Output>)> {
        match self {
            Self::One(place) => place.begin(ticket, future, cx).map(whole),
            Self::Many { free, others } => {
                if let Poll::Ready(ended) = free.begin(ticket, future, cx) {
                    return Poll::Ready(whole(ended));
                }
                others.push(std::mem::replace(free, Place::free()));
                // The list polls it again, with a waker of its own.
                Self::poll_list(others, cx).map(whole)
            }
            Self::Parallel { runtime, spawn, keeper, tasks } => {
                tasks.push(Attempt { ticket: Some(ticket), future: spawn(runtime, future, keeper.clone()) });
                Self::poll_list(tasks, cx)
            }
        }
    }

    fn poll_list<F: Future>(list: &mut FuturesUnordered<F>, cx: &mut Context<'_>) -> Poll<F::Output> {
        match Pin::new(list).poll_next(cx) {
            Poll::Ready(Some(ended)) => Poll::Ready(ended),
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }

    /// Returns an attempt that has ended, and how, unless its task was cut; `Pending` if there is none.
    #[inline(always)]
    pub(crate) fn poll_done(&mut self, cx: &mut Context<'_>) -> Poll<(Ticket<I>, Option<Fut::Output>)> {
        match self {
            Self::One(place) => Pin::new(place).poll(cx).map(whole),
            Self::Many { others, .. } if others.is_empty() => Poll::Pending,
            Self::Many { others, .. } => Self::poll_list(others, cx).map(whole),
            Self::Parallel { tasks, .. } => Self::poll_list(tasks, cx),
        }
    }
}

/// An attempt that was not cut.
#[inline(always)]
fn whole<I, T>((ticket, output): (Ticket<I>, T)) -> (Ticket<I>, Option<T>) {
    (ticket, Some(output))
}

/// Items that failed or were deferred, ordered by the time at which they may run again; ties go to the first to arrive.
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

    /// Returns the item that has been due longest, as soon as one is due; stays pending if none waits.
    #[inline(always)]
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
