//! Items whose effect and result are one transaction.
//!
//! Invariant: the result is appended, under the epoch of its range, in the transaction in which the item took effect:
//! both are there or neither. A commit whose answer was lost is looked up by its block before the item is tried again.

use std::{
    collections::{HashMap, VecDeque},
    future::poll_fn,
    marker::PhantomData,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
};

use futures_core::Stream;
use futures_util::{StreamExt, stream::FuturesUnordered};
use serde::{Serialize, de::DeserializeOwned};
use sqlx::PgConnection;
use tokio::{sync::watch, time::Sleep};

use crate::{
    drive::Summary,
    error::TaskError,
    item::{ItemError, Verdict, describe, later},
    log::{Header, Identity},
    plan::Plan,
    postgres::{
        PgStore,
        input::Input,
        job::Offer,
        keeper,
        leases::{Leases, Standing},
        ledger::Known,
        shared::{Hold, LetGo, Shared, Told},
        transaction::{After, End, Job, Note, Turn, What, Worker},
        waiting::{Ticket, Waiting},
    },
    progress::{Meter, Progress},
    proof::Prover,
};

/// A range at work.
struct Range {
    hold: Hold,
    first: usize,
    known: Vec<Known>,
    next: usize,
    turn: Arc<Turn>,
}

/// Asks the keeper to end when the run does, however it does.
struct Stop(Arc<Shared>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Runs every item in a transaction of its own, until the whole job is complete.
pub(crate) async fn process<T, R, F>(
    mut plan: Plan<T, R>,
    store: PgStore,
    source: impl Stream<Item = T>,
    work: F,
    progress: watch::Sender<Progress>,
) -> Result<Summary, TaskError>
where
    T: Serialize + Clone,
    R: Serialize + DeserializeOwned,
    F: AsyncFn(&mut PgConnection, T) -> Result<R, ItemError>,
{
    let (input, chain) = Input::read(source, plan.key.as_mut(), plan.codec, &plan.token).await?;
    let header = Header {
        salt: fastrand::u64(..),
        codec: plan.codec.number(),
        identity: if plan.key.is_some() { Identity::Key } else { Identity::Position },
        job: plan.job.clone(),
        version: plan.version.clone(),
        result_type: std::any::type_name::<R>().to_owned(),
    };
    let offer = Offer { header, accepted: plan.accepted.clone(), chain, range_items: store.range_items };
    let shared = Arc::new(Shared::default());
    keeper::start(store.clone(), &shared, offer, plan.every)?;
    let prover = std::sync::Mutex::new(Prover::new(plan.codec));
    let worker = Worker { store, work, prover, codec: plan.codec, of: PhantomData };
    let mut run = Loop {
        input,
        shared: Arc::clone(&shared),
        leases: None,
        ranges: HashMap::new(),
        fresh: VecDeque::new(),
        waiting: Waiting::new(),
        meter: Meter::new(progress),
        standing: Standing::default(),
        completed: 0,
        quarantined: 0,
        fenced: None,
        paused: None,
        is_over: false,
        plan,
    };
    // Dropped after the items: a successor never runs beside them.
    let _stop = Stop(Arc::clone(&shared));
    let ended = run.drive(&worker).await;
    let failed = match ended {
        Ok(standing) => return Ok(run.summary(standing)),
        Err(error) => error,
    };
    if !run.is_over {
        // The ranges are given back before the caller hears of it.
        shared.stop();
        poll_fn(|cx| run.poll_ended(cx)).await?;
    }
    Err(failed)
}

enum Event<T> {
    Heard,
    Ended((Ticket<T>, End)),
    Over(Result<Standing, TaskError>),
}

struct Loop<T, R> {
    plan: Plan<T, R>,
    input: Input<T>,
    shared: Arc<Shared>,
    leases: Option<Leases>,
    ranges: HashMap<i64, Range>,
    fresh: VecDeque<Hold>,
    waiting: Waiting<T>,
    meter: Meter,
    standing: Standing,
    completed: usize,
    quarantined: usize,
    fenced: Option<TaskError>,
    /// No item starts before this is over.
    paused: Option<Pin<Box<Sleep>>>,
    /// The keeper has ended.
    is_over: bool,
}

impl<T: Serialize + Clone, R: Serialize + DeserializeOwned> Loop<T, R> {
    async fn drive<F>(&mut self, worker: &Worker<F, R>) -> Result<Standing, TaskError>
    where
        F: AsyncFn(&mut PgConnection, T) -> Result<R, ItemError>,
    {
        let (token, grace) = (self.plan.token.clone(), self.plan.grace);
        let mut running = FuturesUnordered::new();
        let mut stopped = pin!(async {
            token.cancelled().await;
            tokio::time::sleep(grace).await;
        });
        loop {
            while running.len() < self.plan.concurrency
                && !token.is_cancelled()
                && self.paused.is_none()
                && let Some(ticket) = self.next()
            {
                let Some(job) = self.job(ticket, What::Attempt) else { continue };
                running.push(worker.run(job));
            }
            let event = poll_fn(|cx| {
                if let Poll::Ready(Some(ended)) = running.poll_next_unpin(cx) {
                    return Poll::Ready(Event::Ended(ended));
                }
                if self.hear(cx) {
                    return Poll::Ready(Event::Heard);
                }
                if let Some(error) = self.fenced.take() {
                    return Poll::Ready(Event::Over(Err(error)));
                }
                if let Some(ended) = self.shared.ended() {
                    self.is_over = true;
                    return Poll::Ready(Event::Over(ended));
                }
                if stopped.as_mut().poll(cx).is_ready() || token.is_cancelled() && running.is_empty() {
                    return Poll::Ready(Event::Over(Err(TaskError::Cancelled)));
                }
                if let Some(paused) = &mut self.paused {
                    if paused.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                    self.paused = None;
                    return Poll::Ready(Event::Heard);
                }
                let can_start = running.len() < self.plan.concurrency && !token.is_cancelled();
                if can_start && self.waiting.poll_due(cx).is_ready() {
                    Poll::Ready(Event::Heard)
                } else {
                    Poll::Pending
                }
            })
            .await;
            match event {
                Event::Heard => {}
                Event::Ended((ticket, end)) => {
                    if let Some(job) = self.settle(ticket, end)? {
                        running.push(worker.run(job));
                    }
                }
                Event::Over(ended) => return ended,
            }
        }
    }

    /// What is to be done in the range of a ticket; `None` if it is lost.
    fn job(&self, ticket: Ticket<T>, what: What) -> Option<Job<T>> {
        let range = self.ranges.get(&ticket.hold.n).filter(|range| range.hold == ticket.hold)?;
        let (turn, count) = (Arc::clone(&range.turn), range.known.len());
        Some(Job { ticket, what, turn, count, leases: self.leases.clone()? })
    }

    /// The next item that may run.
    fn next(&mut self) -> Option<Ticket<T>> {
        if let Some(ticket) = self.waiting.take_due() {
            return Some(ticket);
        }
        if self.waiting.len() >= self.plan.max_ahead {
            return None;
        }
        while let Some(&hold) = self.fresh.front() {
            if let Some(range) = self.ranges.get_mut(&hold.n).filter(|range| range.hold == hold) {
                while let Some(known) = range.known.get(range.next) {
                    let index = range.first + range.next;
                    range.next += 1;
                    let attempts = match known {
                        Known::Nothing => 0,
                        Known::Failed(_) if self.plan.retry.per_run => 0,
                        Known::Failed(attempts) => *attempts,
                        Known::Result | Known::Quarantined => continue,
                    };
                    let item = self.input.items.get(index).cloned()?;
                    self.meter.item_started();
                    return Some(Ticket {
                        hold,
                        index,
                        key: self.input.key(index),
                        item,
                        attempts,
                        defers: 0,
                        launch: 0,
                    });
                }
            }
            self.fresh.pop_front();
            self.shared.exhausted(hold);
        }
        None
    }

    /// Takes in what the keeper has told and returns whether there was anything.
    fn hear(&mut self, cx: &Context<'_>) -> bool {
        let (told, _) = self.shared.hear(cx.waker());
        let heard = !told.is_empty();
        for told in told {
            match told {
                Told::Opened { leases, .. } => self.leases = Some(leases),
                Told::Granted { hold, first, items, place } => {
                    let turn = Arc::new(Turn::new(place));
                    self.ranges.insert(hold.n, Range { hold, first, known: items, next: 0, turn });
                    self.fresh.push_back(hold);
                }
                Told::Appended { hold, .. } | Told::Lost(hold) => {
                    if self.ranges.get(&hold.n).is_some_and(|range| range.hold == hold) {
                        self.ranges.remove(&hold.n);
                    }
                }
                Told::Standing(standing) => self.standing = standing,
                Told::Fenced(error) => self.fenced = Some(error),
            }
        }
        self.publish();
        heard
    }

    /// Takes in how something ended, and returns what is to be done next for its item.
    fn settle(&mut self, mut ticket: Ticket<T>, end: End) -> Result<Option<Job<T>>, TaskError> {
        let error = match end {
            End::Failed(error) => error,
            End::Recorded => {
                self.completed += 1;
                self.look_at(ticket.hold);
                return Ok(None);
            }
            End::Noted(Note { attempts, cause, after }) => {
                match after {
                    After::Retry => self.waiting.enter(later(self.plan.retry.delay_after(attempts)), ticket),
                    After::Quarantine => {
                        self.quarantined += 1;
                        self.look_at(ticket.hold);
                    }
                    After::Full => {
                        let (limit, index, attempts) = (self.plan.quarantine, ticket.index, ticket.attempts);
                        return Err(TaskError::QuarantineFull { limit, index, attempts, cause });
                    }
                }
                return Ok(None);
            }
            End::Lost => {
                self.shared.let_go(ticket.hold, LetGo::Lost);
                return Ok(None);
            }
            End::Broken(error) => return Err(error),
        };
        match error.verdict {
            Verdict::Pause(until) => {
                let until = self.paused.as_ref().map_or(until, |paused| paused.deadline().max(until));
                self.paused = Some(Box::pin(tokio::time::sleep_until(until)));
                self.waiting.enter(until, ticket);
                return Ok(None);
            }
            Verdict::Defer(until) if ticket.defers < self.plan.max_defers => {
                ticket.defers += 1;
                self.waiting.enter(until, ticket);
                return Ok(None);
            }
            Verdict::Defer(_) | Verdict::Retry | Verdict::Permanent => {}
        }
        ticket.attempts += 1;
        let cause = describe(error.cause.as_ref());
        let is_last = error.verdict == Verdict::Permanent || ticket.attempts >= self.plan.retry.max_attempts;
        let failed = usize::try_from(self.standing.quarantined).unwrap_or_default().max(self.quarantined);
        let (attempts, after) = match is_last {
            false => (ticket.attempts, After::Retry),
            true if failed < self.plan.quarantine => (ticket.attempts, After::Quarantine),
            // Once the cause is mended, or the limit raised, the item has all its attempts again.
            true => (0, After::Full),
        };
        Ok(self.job(ticket, What::Note(Note { attempts, cause, after })))
    }

    /// Lets go of a range whose last item has just been recorded.
    fn look_at(&mut self, hold: Hold) {
        let Some(range) = self.ranges.get(&hold.n).filter(|range| range.hold == hold) else { return };
        if range.turn.is_finished(range.known.len()) {
            self.ranges.remove(&hold.n);
            self.shared.let_go(hold, LetGo::Finished);
        }
    }

    fn publish(&mut self) {
        let done = usize::try_from(self.standing.done).unwrap_or_default().max(self.completed + self.quarantined);
        let failed = usize::try_from(self.standing.quarantined).unwrap_or_default().max(self.quarantined);
        self.meter.stand_at(done, done - self.completed - self.quarantined, failed);
        self.meter.publish(self.input.items.len(), (0, Some(0)));
    }

    fn summary(&self, standing: Standing) -> Summary {
        let done = usize::try_from(standing.done).unwrap_or_default();
        Summary {
            total: self.input.items.len(),
            completed: self.completed,
            restored: done.saturating_sub(self.completed + self.quarantined),
            quarantined: usize::try_from(standing.quarantined).unwrap_or_default(),
            torn_bytes: 0,
        }
    }

    fn poll_ended(&mut self, cx: &Context<'_>) -> Poll<Result<Standing, TaskError>> {
        drop(self.shared.hear(cx.waker()));
        self.shared.ended().map_or(Poll::Pending, Poll::Ready)
    }
}
