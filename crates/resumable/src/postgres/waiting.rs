//! Items that failed or were deferred, until they may run again.
//!
//! Invariant: an item is in exactly one place, and a waiting item takes no slot of the concurrency.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::time::{Instant, Sleep};

use crate::postgres::shared::Hold;

/// An unfinished item of a range that this worker holds.
#[derive(Debug)]
pub(crate) struct Ticket<T> {
    pub(crate) hold: Hold,
    pub(crate) index: usize,
    pub(crate) key: Option<Arc<str>>,
    pub(crate) item: T,
    /// Failed attempts so far.
    pub(crate) attempts: u32,
    pub(crate) defers: u32,
    /// The number of its attempt, counted over all items.
    pub(crate) launch: u64,
}

/// Ordered by the time at which they may run; ties go to the first to arrive.
#[derive(Debug)]
pub(crate) struct Waiting<T> {
    tickets: BTreeMap<(Instant, u64), Ticket<T>>,
    arrivals: u64,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<T> Waiting<T> {
    pub(crate) fn new() -> Self {
        Self { tickets: BTreeMap::new(), arrivals: 0, timer: None }
    }

    pub(crate) fn len(&self) -> usize {
        self.tickets.len()
    }

    pub(crate) fn enter(&mut self, until: Instant, ticket: Ticket<T>) {
        self.arrivals += 1;
        self.tickets.insert((until, self.arrivals), ticket);
    }

    /// Returns the item that has been due longest.
    pub(crate) fn take_due(&mut self) -> Option<Ticket<T>> {
        let first = self.tickets.first_entry()?;
        (first.key().0 <= Instant::now()).then(|| first.remove())
    }

    /// Becomes ready when an item is due; stays pending if none waits.
    pub(crate) fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(((until, _), _)) = self.tickets.first_key_value() else { return Poll::Pending };
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(*until)));
        if timer.deadline() != *until {
            timer.as_mut().reset(*until);
        }
        timer.as_mut().poll(cx)
    }
}
