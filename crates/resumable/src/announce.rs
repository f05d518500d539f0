//! Items that must not start before a durable record says that they are about to.
//!
//! Invariant: an item leaves here only after its announcement is durable or withdrawn.

use std::{
    collections::VecDeque,
    task::{Context, Poll, ready},
};

use crate::{error::TaskError, flight::Ticket, record::Recorder};

/// The announced items, in the order of their records. There are none unless the run is at most once.
#[derive(Debug)]
pub(crate) struct Announced<I> {
    queue: VecDeque<(u64, Ticket<I>)>,
    /// All records up to this one are known to be durable.
    synced: u64,
}

impl<I> Announced<I> {
    pub(crate) fn new() -> Self {
        Self { queue: VecDeque::new(), synced: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.queue.len()
    }

    pub(crate) fn announce(&mut self, ticket: Ticket<I>, recorder: &mut Recorder) -> Result<(), TaskError> {
        let number = recorder.intent(&ticket)?;
        self.queue.push_back((number, ticket));
        Ok(())
    }

    /// Returns an item whose announcement has become durable; `Pending` if there is none.
    pub(crate) fn poll_durable(
        &mut self,
        recorder: &Recorder,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Ticket<I>, TaskError>> {
        let Some((first, _)) = self.queue.front() else { return Poll::Pending };
        if *first > self.synced {
            self.synced = ready!(recorder.poll_synced(*first, cx))?;
        }
        match self.queue.pop_front() {
            Some((_, ticket)) => Poll::Ready(Ok(ticket)),
            None => Poll::Pending,
        }
    }

    /// Records that none of the waiting items was started.
    pub(crate) fn withdraw_all(&mut self, recorder: &mut Recorder) {
        for (_, ticket) in self.queue.drain(..) {
            // If the store has failed, the intent stays: the item then counts as uncertain, which is safe.
            drop(recorder.withdraw(&ticket));
        }
    }
}
