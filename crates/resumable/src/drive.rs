//! The drive loop: reads the input, runs the items, records the results.
//!
//! Invariant: it never waits for the store while an item could make progress, and it gives everything to the checkpoint
//! before it hands it out. No turn of the loop passes without something started, finished or handed out.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures_core::Stream;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{runtime::Handle, sync::watch, time::Instant};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::{
    announce::Announced,
    emit::Emission,
    error::TaskError,
    file::OpenRequest,
    flight::{InFlight, Ticket, WaitingRoom},
    gate::Gate,
    history::History,
    intake::Intake,
    item::{Done, ItemContext, ItemError, Quarantined, Verdict, describe, later},
    plan::Plan,
    progress::{Meter, Pause, Progress},
    record::Recorder,
    spawned::Spawn,
    stop::Stop,
    store::{self, Opened, Pace, Seal},
    timer::Timer,
};

mod restore;

/// What a run that reached the end of its input did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Summary {
    /// Items in the input.
    pub total: usize,
    /// Items this run completed.
    pub completed: usize,
    /// Items that earlier runs had finished, including those in quarantine.
    pub restored: usize,
    /// Items in quarantine, from this run and from earlier ones.
    pub quarantined: usize,
    /// Bytes cut off because a crash had left them half-written after the last intact block.
    pub torn_bytes: u64,
}

pub(crate) struct Drive<I, R, S, F, Fut> {
    plan: Plan<I, R>,
    stop: Stop,
    /// `None` once it has ended.
    source: Option<S>,
    intake: Intake,
    history: History,
    work: F,
    /// Seeds the idempotency keys.
    seed: u64,
    in_flight: InFlight<I, R, Fut>,
    announced: Announced<I>,
    waiting: WaitingRoom<I>,
    gate: Gate,
    /// Dropped after the items above: a successor that takes the file over never runs beside them.
    recorder: Recorder,
    emission: Emission<R>,
    meter: Meter,
    ending: Ending,
    /// How much was restored since the loop last asked the runtime whether other tasks should run.
    restored_bytes: u64,
}

enum Ending {
    Running,
    /// The running items are finishing; then the store is closed.
    Draining(Result<(), TaskError>),
    /// The store is closing; then the run ends with this, unless the store reports something worse.
    Closing(Result<(), TaskError>),
    Closed(Option<Result<Summary, TaskError>>),
}

/// Boxed, because this is returned for each item and should be small; an error is large and rare.
type Failure = Box<TaskError>;

/// The outcome of a step of the loop.
enum Step<R> {
    Finished(Done<R>),
    /// An attempt has ended, but its item has not.
    Again,
    Complete,
}

/// The outcome of trying to start one more item.
enum Next<R> {
    /// It runs now, or will once its announcement is durable.
    Started,
    /// It was restored, or finished without waiting.
    Ended(Step<R>),
}

/// Nothing in the loop is pinned in place: the source must be `Unpin`, and the futures live in boxes.
impl<I, R, S, F, Fut> Unpin for Drive<I, R, S, F, Fut> {}

/// Everything on an item's path is always inlined: passing an item on in memory costs as much as all other work for a
/// trivial item.
impl<I, R, S, F, Fut> Drive<I, R, S, F, Fut>
where
    I: Serialize + Clone,
    R: Serialize + DeserializeOwned,
    S: Stream<Item = I> + Unpin,
    F: Fn(ItemContext, I) -> Fut,
    Fut: Future<Output = Result<R, ItemError>>,
{
    /// Opens the checkpoint.
    pub(crate) async fn open(
        mut plan: Plan<I, R>,
        source: S,
        work: F,
        spawn: Option<Spawn<R, Fut>>,
        progress: watch::Sender<Progress>,
    ) -> Result<Self, TaskError> {
        if plan.retry.max_attempts > 1 || !plan.grace.is_zero() {
            Timer::default().set(Instant::now())?;
        }
        if spawn.is_some() {
            runtime()?;
        }
        let header = plan.header();
        plan.store = plan.store.anchored()?;
        let (path, wait) = (plan.store.path().to_owned(), plan.store.wait);
        let request = OpenRequest { path, wait, header, accepted: plan.accepted.clone() };
        let (every, every_items, longest_full) = (plan.every, plan.every_items, plan.store.longest_full);
        let pace = Pace { every, every_items, longest_full };
        let opened = store::open(request, pace, plan.token.clone()).await;
        let gone = |_| Err(std::io::Error::other("the checkpoint thread could not be started").into());
        let Opened { log, history, salt } = opened.unwrap_or_else(gone)?;
        let recorder = Recorder::new(log, plan.store.path().to_owned(), plan.codec);
        let in_flight = match spawn {
            Some(spawn) => InFlight::parallel(runtime()?, spawn, recorder.keeper()),
            None => InFlight::new(plan.concurrency),
        };
        Ok(Self {
            stop: Stop::new(plan.token.clone(), plan.grace),
            source: Some(source),
            intake: Intake::new(plan.codec, salt),
            history,
            work,
            seed: xxh3_64_with_seed(plan.job.as_bytes(), salt),
            in_flight,
            announced: Announced::new(),
            waiting: WaitingRoom::new(),
            gate: Gate::new(plan.concurrency),
            recorder,
            emission: Emission::new(plan.ordered),
            meter: Meter::new(progress),
            ending: Ending::Running,
            restored_bytes: 0,
            plan,
        })
    }

    /// The next finished item; `None` once everything is durable and the file unlocked.
    #[inline]
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Done<R>>> {
        let index = self.intake.position;
        match self.restore(index, cx) {
            // Built in place: moving an item once more costs as much as restoring it.
            Some(result) => {
                Poll::Ready(Some(Done { index, key: None, restored: true, attempts: 0, result: Ok(result) }))
            }
            None => self.poll_finished(cx),
        }
    }

    #[inline(never)]
    fn poll_finished(&mut self, cx: &mut Context<'_>) -> Poll<Option<Done<R>>> {
        loop {
            if let Some(done) = self.emission.next() {
                return Poll::Ready(Some(done));
            }
            match self.ending {
                Ending::Running => {}
                Ending::Draining(_) => {
                    match ready!(self.poll_drained(cx)) {
                        Some(done) => {
                            self.meter.item_done(&done);
                            if self.emission.pass(done.index) {
                                return Poll::Ready(Some(done));
                            }
                            self.emission.hold(done);
                        }
                        None => self.close(),
                    }
                    continue;
                }
                Ending::Closing(_) => {
                    ready!(self.poll_close(cx));
                    continue;
                }
                Ending::Closed(_) => return Poll::Ready(None),
            }
            // Items that are always ready must not keep the rest of the runtime from running.
            let coop = ready!(tokio::task::coop::poll_proceed(cx));
            self.restored_bytes = 0;
            match self.poll_step(cx) {
                Poll::Ready(Ok(Step::Finished(done))) => {
                    coop.made_progress();
                    self.meter.item_done(&done);
                    if self.meter.is_due() {
                        self.publish();
                    }
                    if self.emission.pass(done.index) {
                        return Poll::Ready(Some(done));
                    }
                    self.emission.hold(done);
                }
                Poll::Ready(Ok(Step::Again)) => coop.made_progress(),
                Poll::Ready(Ok(Step::Complete)) => self.end(Ok(())),
                Poll::Ready(Err(error)) => self.end(Err(*error)),
                Poll::Pending => {
                    self.publish();
                    return Poll::Pending;
                }
            }
        }
    }

    /// How the run ended; `None` before its end, and after this was taken once.
    pub(crate) fn take_outcome(&mut self) -> Option<Result<Summary, TaskError>> {
        match &mut self.ending {
            Ending::Closed(outcome) => outcome.take(),
            Ending::Running | Ending::Draining(_) | Ending::Closing(_) => None,
        }
    }

    /// Goes on until an attempt or the run has ended. Each turn starts an item, and the number of items is limited.
    #[inline(always)]
    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<Result<Step<R>, Failure>> {
        loop {
            // Before the token is checked, because an available result is never thrown away.
            if let Poll::Ready((ticket, outcome)) = self.in_flight.poll_done(cx) {
                return Poll::Ready(self.settle(ticket, outcome));
            }
            if self.stop.is_asked_for() {
                return self.poll_cancelled(cx);
            }
            match self.poll_start(cx)? {
                Poll::Ready(Next::Started) => continue,
                Poll::Ready(Next::Ended(step)) => return Poll::Ready(Ok(step)),
                Poll::Pending => {}
            }
            if !self.gate.is_closed()
                && let Poll::Ready(ticket) = self.announced.poll_durable(&self.recorder, cx)?
            {
                match self.launch(ticket, cx)? {
                    Next::Started => continue,
                    Next::Ended(step) => return Poll::Ready(Ok(step)),
                }
            }
            if self.source.is_none() && self.is_idle() {
                return Poll::Ready(Ok(Step::Complete));
            }
            self.watch_store(cx)?;
            if self.stop.poll_asked_for(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }

    /// Lets the store wake the task, and reports a pause if all items wait for the store.
    fn watch_store(&mut self, cx: &mut Context<'_>) -> Result<(), TaskError> {
        let full_until = self.recorder.watch(cx)?;
        if self.gate.is_closed() {
            return Ok(());
        }
        match full_until {
            Some(until) => self.meter.pause(Some(Pause::new(until.into(), "the disk of the checkpoint is full"))),
            None if self.meter.is_paused() => self.meter.pause(None),
            None => {}
        }
        Ok(())
    }

    /// The token has fired: starts nothing more, and gives running items their grace.
    fn poll_cancelled(&mut self, cx: &mut Context<'_>) -> Poll<Result<Step<R>, Failure>> {
        if self.is_idle() && self.has_ended(cx)? {
            return Poll::Ready(Ok(Step::Complete));
        }
        // Waiting items stay where they are: without them, the run would look complete once the rest has ended.
        if self.in_flight.len() > 0 {
            ready!(self.stop.poll_grace(cx))?;
        }
        Poll::Ready(Err(TaskError::Cancelled.into()))
    }

    /// Returns whether there is no item left to read. A source that claims so is polled; if it then waits, it has not
    /// ended.
    fn has_ended(&mut self, cx: &mut Context<'_>) -> Result<bool, TaskError> {
        if let Some(source) = &mut self.source
            && source.size_hint().1 == Some(0)
            && let Poll::Ready(None) = Pin::new(source).poll_next(cx)
        {
            self.end_input()?;
        }
        Ok(self.source.is_none())
    }

    fn end_input(&mut self) -> Result<(), TaskError> {
        self.source = None;
        self.intake.finish(&self.history, self.plan.store.path())
    }

    /// Starts one more item, or restores it, as soon as there is a slot, room in the buffer, and an item.
    #[inline(always)]
    fn poll_start(&mut self, cx: &mut Context<'_>) -> Poll<Result<Next<R>, Failure>> {
        if ready!(self.gate.poll_open(cx))? {
            self.meter.pause(None);
        }
        if self.started() >= self.plan.concurrency {
            return Poll::Pending;
        }
        ready!(self.recorder.poll_room(cx))?;
        if self.meter.is_paused() {
            self.meter.pause(None);
        }
        if let Poll::Ready(ticket) = self.waiting.poll_due(cx)? {
            return Poll::Ready(self.start(ticket, cx));
        }
        if self.waiting.len() + self.emission.held() >= self.plan.max_ahead {
            return Poll::Pending;
        }
        let Some(source) = &mut self.source else { return Poll::Pending };
        match ready!(Pin::new(source).poll_next(cx)) {
            Some(item) => Poll::Ready(self.admit(item, cx)),
            None => {
                self.end_input()?;
                Poll::Pending
            }
        }
    }

    /// Restores an item from the checkpoint, or starts it.
    #[inline(always)]
    fn admit(&mut self, item: I, cx: &mut Context<'_>) -> Result<Next<R>, Failure> {
        let path = self.plan.store.path();
        let (index, key) =
            self.intake.admit(&item, self.plan.key.as_ref(), &mut self.history, path, &mut self.recorder.marks)?;
        let attempts = match self.recall(index, &key, &item)? {
            Ok(attempts) => attempts,
            Err(done) => return Ok(Next::Ended(Step::Finished(done))),
        };
        self.recorder.must_take_more()?;
        self.meter.item_started();
        self.start(Ticket { index, key, item, attempts, defers: 0, launch: 0 }, cx)
    }

    #[inline(always)]
    fn start(&mut self, ticket: Ticket<I>, cx: &mut Context<'_>) -> Result<Next<R>, Failure> {
        self.gate.item_starts();
        if self.plan.at_most_once {
            self.announced.announce(ticket, &mut self.recorder)?;
            return Ok(Next::Started);
        }
        self.launch(ticket, cx)
    }

    #[inline(always)]
    fn launch(&mut self, mut ticket: Ticket<I>, cx: &mut Context<'_>) -> Result<Next<R>, Failure> {
        ticket.launch = self.gate.launch();
        let (index, key, attempt) = (ticket.index, ticket.key.clone(), ticket.attempts + 1);
        let context = ItemContext { index, key, attempt, seed: self.seed };
        let future = (self.work)(context, ticket.item.clone());
        match self.in_flight.start(ticket, future, cx) {
            Poll::Pending => Ok(Next::Started),
            Poll::Ready((ticket, outcome)) => self.settle(ticket, outcome).map(Next::Ended),
        }
    }

    /// How many slots of the concurrency are taken.
    #[inline]
    fn started(&self) -> usize {
        self.in_flight.len() + self.announced.len()
    }

    /// Whether every item that was read is finished.
    fn is_idle(&self) -> bool {
        self.started() == 0 && self.waiting.len() == 0
    }

    /// Records how an attempt ended.
    #[inline(always)]
    fn settle(&mut self, mut ticket: Ticket<I>, outcome: Option<Result<R, ItemError>>) -> Result<Step<R>, Failure> {
        // A task that its runtime cuts has not failed: the run ends with the runtime.
        let error = match outcome.ok_or(TaskError::Cancelled)? {
            Ok(result) => {
                self.gate.attempt_ended(ticket.launch);
                return self.finish(ticket, result).map(Step::Finished);
            }
            Err(error) => error,
        };
        let cause = describe(error.cause.as_ref());
        match error.verdict {
            Verdict::Pause(until) => {
                self.pause(until, &cause);
                return self.put_back(ticket, until);
            }
            Verdict::Defer(until) if ticket.defers < self.plan.max_defers => {
                ticket.defers += 1;
                let wait = until.saturating_duration_since(Instant::now());
                if let Some(wait) = self.gate.attempt_deferred(ticket.launch, wait, self.in_flight.len()) {
                    self.pause(later(wait), &cause);
                }
                return self.put_back(ticket, until);
            }
            Verdict::Defer(_) | Verdict::Retry | Verdict::Permanent => self.gate.attempt_ended(ticket.launch),
        }
        ticket.attempts += 1;
        if error.verdict == Verdict::Permanent || ticket.attempts >= self.plan.retry.max_attempts {
            return self.quarantine(ticket, cause).map(Step::Finished);
        }
        self.recorder.failure(&ticket, ticket.attempts, &cause)?;
        self.waiting.enter(later(self.plan.retry.delay_after(ticket.attempts)), ticket)?;
        Ok(Step::Again)
    }

    #[inline(always)]
    fn finish(&mut self, ticket: Ticket<I>, result: R) -> Result<Done<R>, Failure> {
        self.recorder.result(&ticket, &result)?;
        let Ticket { index, key, attempts, .. } = ticket;
        Ok(Done { index, key, restored: false, attempts: attempts + 1, result: Ok(result) })
    }

    /// Starts no item before `until`.
    fn pause(&mut self, until: Instant, cause: &str) {
        let until = self.gate.close(until);
        self.meter.pause(Some(Pause::new(until, cause)));
    }

    /// Puts an item back into the queue without counting its attempt.
    fn put_back(&mut self, ticket: Ticket<I>, until: Instant) -> Result<Step<R>, Failure> {
        if self.plan.at_most_once {
            self.recorder.withdraw(&ticket)?;
        }
        self.waiting.enter(until, ticket)?;
        Ok(Step::Again)
    }

    fn quarantine(&mut self, ticket: Ticket<I>, cause: String) -> Result<Done<R>, Failure> {
        let limit = self.plan.quarantine;
        if self.meter.failed() >= limit {
            let (index, attempts) = (ticket.index, ticket.attempts);
            // Once the cause is fixed, or the limit raised, the item has all its attempts again.
            self.recorder.failure(&ticket, 0, &cause)?;
            return Err(TaskError::QuarantineFull { limit, index, attempts, cause }.into());
        }
        self.recorder.quarantine(&ticket, &cause)?;
        let Ticket { index, key, attempts, .. } = ticket;
        let result = Err(Quarantined { attempts, cause, uncertain: false });
        Ok(Done { index, key, restored: false, attempts, result })
    }

    fn end(&mut self, outcome: Result<(), TaskError>) {
        // Running items are dropped before the file is released, so a successor never overlaps with them.
        self.in_flight.cut();
        self.ending = Ending::Draining(outcome);
    }

    /// Waits until nothing runs any more. A task that finishes before the cut reaches it counts as finished.
    fn poll_drained(&mut self, cx: &mut Context<'_>) -> Poll<Option<Done<R>>> {
        while self.in_flight.len() > 0 {
            if let (ticket, Some(Ok(result))) = ready!(self.in_flight.poll_done(cx))
                && let Ok(done) = self.finish(ticket, result)
            {
                return Poll::Ready(Some(done));
            }
        }
        Poll::Ready(None)
    }

    fn close(&mut self) {
        let Ending::Draining(outcome) = std::mem::replace(&mut self.ending, Ending::Running) else { return };
        self.announced.withdraw_all(&mut self.recorder);
        self.publish();
        let (total, digest) = (self.intake.position as u64, self.intake.chain);
        let seal = Seal { total, digest, kept_bytes: self.recorder.kept_bytes };
        let is_sealed = !self.recorder.wrote && self.history.sealed == Some((seal.total, seal.digest));
        self.recorder.stop((outcome.is_ok() && !is_sealed).then_some(seal));
        self.ending = Ending::Closing(outcome);
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let closed = ready!(self.recorder.poll_closed(cx));
        let summary = Summary {
            total: self.intake.position,
            completed: self.meter.completed(),
            restored: self.meter.restored(),
            quarantined: self.meter.failed(),
            torn_bytes: self.history.torn_bytes,
        };
        let Ending::Closing(outcome) = std::mem::replace(&mut self.ending, Ending::Closed(None)) else {
            return Poll::Ready(());
        };
        // A failed store outranks everything else: results already handed out may not be durable.
        let outcome = closed.map_err(TaskError::Io).and(outcome).map(|()| summary);
        self.ending = Ending::Closed(Some(outcome));
        Poll::Ready(())
    }

    fn publish(&mut self) {
        let ahead = self.source.as_ref().map_or((0, Some(0)), |source| source.size_hint());
        self.meter.publish(self.intake.position, ahead);
    }
}

/// Withdraws the announcements of items that were not started. This needs none of the input's types.
impl<I, R, S, F, Fut> Drop for Drive<I, R, S, F, Fut> {
    fn drop(&mut self) {
        self.announced.withdraw_all(&mut self.recorder);
    }
}

fn runtime() -> Result<Handle, TaskError> {
    Handle::try_current().map_err(|_| TaskError::Config("items in tasks of their own need tokio's runtime"))
}
