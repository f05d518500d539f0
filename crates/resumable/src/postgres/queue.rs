//! The items of the ranges that a worker holds: waiting to start, or to start again.
//!
//! Invariant: the queue gives out an item only while its range is held, no more items than may run at once, and none
//! while the run waits as a whole.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures_core::Stream;
use serde::Serialize;
use tokio::{sync::watch, time::Instant};

use crate::{
    error::TaskError,
    gate::Gate,
    item::{ItemError, Retry, Verdict, describe, later},
    plan::Plan,
    postgres::{
        PgStore,
        input::Input,
        job::Offer,
        keeper,
        ledger::Known,
        range::Range,
        shared::{Hold, Shared},
        waiting::{Ticket, Waiting},
    },
    progress::{Meter, Pause, Progress},
};

/// The items of a job as one worker sees them. `X` is what its loop keeps with a range.
pub(crate) struct Queue<T, X> {
    input: Input<T>,
    shared: Arc<Shared>,
    ranges: HashMap<i64, Range<X>>,
    /// Ranges with unstarted items, in the order in which to work on them.
    fresh: VecDeque<Hold>,
    waiting: Waiting<T>,
    gate: Gate,
    pub(crate) meter: Meter,
    concurrency: usize,
    max_ahead: usize,
    max_defers: u32,
    retry: Retry,
}

/// A failed attempt that counts.
pub(crate) struct Failed<T> {
    /// Its attempts include this one.
    pub(crate) ticket: Ticket<T>,
    pub(crate) cause: String,
    /// Whether no attempts are left.
    pub(crate) is_last: bool,
}

impl<T: Serialize, X> Queue<T, X> {
    /// Reads the input and starts the keeper, which opens the job.
    pub(crate) async fn open<R>(
        plan: &mut Plan<T, R>,
        store: PgStore,
        source: impl Stream<Item = T>,
        progress: watch::Sender<Progress>,
    ) -> Result<(Self, Arc<Shared>), TaskError> {
        let (input, chain) = Input::read(source, plan.key.as_mut(), plan.codec, &plan.token).await?;
        let offer =
            Offer { header: plan.header(), accepted: plan.accepted.clone(), chain, range_items: store.range_items };
        let shared = Arc::new(Shared::default());
        keeper::start(store, &shared, offer, plan.every)?;
        let queue = Self {
            input,
            shared: Arc::clone(&shared),
            ranges: HashMap::new(),
            fresh: VecDeque::new(),
            waiting: Waiting::new(),
            gate: Gate::new(plan.concurrency),
            meter: Meter::new(progress),
            concurrency: plan.concurrency,
            max_ahead: plan.max_ahead,
            max_defers: plan.max_defers,
            retry: plan.retry,
        };
        Ok((queue, shared))
    }
}

impl<T: Clone, X> Queue<T, X> {
    /// Becomes ready with the next item that may start, while `running` items run.
    pub(crate) fn poll_next(&mut self, running: usize, cx: &mut Context<'_>) -> Poll<Result<Ticket<T>, TaskError>> {
        if ready!(self.gate.poll_open(cx))? {
            self.meter.pause(None);
        }
        if running >= self.concurrency {
            return Poll::Pending;
        }
        let mut ticket = loop {
            match self.waiting.take_due() {
                Some(ticket) if self.range(ticket.hold).is_some() => break ticket,
                Some(_) => continue,
                None => {}
            }
            if self.waiting.len() < self.max_ahead
                && let Some(ticket) = self.take_fresh()
            {
                break ticket;
            }
            ready!(self.waiting.poll_due(cx));
        };
        self.gate.item_starts();
        ticket.launch = self.gate.launch();
        Poll::Ready(Ok(ticket))
    }

    fn take_fresh(&mut self) -> Option<Ticket<T>> {
        while let Some(&hold) = self.fresh.front() {
            let next = self.range(hold).and_then(Range::next);
            if let Some((index, attempts)) = next
                && let Some(item) = self.input.items.get(index).cloned()
            {
                let attempts = if self.retry.per_run { 0 } else { attempts };
                self.meter.item_started();
                return Some(Ticket { hold, index, key: self.input.key(index), item, attempts, defers: 0, launch: 0 });
            }
            self.fresh.pop_front();
            self.shared.exhausted(hold);
        }
        None
    }
}

impl<T, X> Queue<T, X> {
    /// How many items the job has.
    pub(crate) fn total(&self) -> usize {
        self.input.items.len()
    }

    pub(crate) fn take_on(&mut self, hold: Hold, first: usize, known: Vec<Known>, own: X) {
        self.ranges.insert(hold.n, Range { hold, first, known, next: 0, own });
        self.fresh.push_back(hold);
    }

    /// The range, if it is still held.
    pub(crate) fn range(&mut self, hold: Hold) -> Option<&mut Range<X>> {
        self.ranges.get_mut(&hold.n).filter(|range| range.hold == hold)
    }

    /// Releases a range, and returns it if it was still held.
    pub(crate) fn let_go(&mut self, hold: Hold) -> Option<Range<X>> {
        self.range(hold)?;
        self.ranges.remove(&hold.n)
    }

    /// Notes that an attempt has ended without an error of its item.
    pub(crate) fn ended(&mut self, ticket: &Ticket<T>) {
        self.gate.attempt_ended(ticket.launch);
    }

    /// Notes that an attempt has failed while `running` others run. `None` if it does not count and its item waits for
    /// another try.
    pub(crate) fn failed(&mut self, mut ticket: Ticket<T>, error: ItemError, running: usize) -> Option<Failed<T>> {
        let cause = describe(error.cause.as_ref());
        match error.verdict {
            Verdict::Pause(until) => {
                self.pause(until, &cause);
                self.waiting.enter(until, ticket);
                return None;
            }
            Verdict::Defer(until) if ticket.defers < self.max_defers => {
                ticket.defers += 1;
                let wait = until.saturating_duration_since(Instant::now());
                if let Some(wait) = self.gate.attempt_deferred(ticket.launch, wait, running) {
                    self.pause(later(wait), &cause);
                }
                self.waiting.enter(until, ticket);
                return None;
            }
            Verdict::Defer(_) | Verdict::Retry | Verdict::Permanent => self.gate.attempt_ended(ticket.launch),
        }
        ticket.attempts += 1;
        let is_last = error.verdict == Verdict::Permanent || ticket.attempts >= self.retry.max_attempts;
        Some(Failed { ticket, cause, is_last })
    }

    /// Puts an item whose attempt has failed back into the queue.
    pub(crate) fn retry(&mut self, ticket: Ticket<T>) {
        self.waiting.enter(later(self.retry.delay_after(ticket.attempts)), ticket);
    }

    /// Starts no item of this worker before `until`.
    fn pause(&mut self, until: Instant, cause: &str) {
        self.meter.pause(Some(Pause::new(self.gate.close(until), cause)));
    }

    /// Publishes the progress of the job: how many items are done, and how many of them this run has finished.
    pub(crate) fn publish(&mut self, done: usize, own: usize, failed: usize) {
        self.meter.stand_at(done, done.saturating_sub(own), failed);
        self.meter.publish(self.total(), (0, Some(0)));
    }
}
