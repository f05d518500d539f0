//! The drive loop: reads the input, runs the items, records what comes out.
//!
//! Invariant: it never waits for the store while an item could make progress, and whatever it hands out has been given
//! to the checkpoint before.

use std::{
    collections::{BTreeMap, VecDeque},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_core::Stream;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{sync::watch, time::Sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::{
    codec::Codec,
    error::TaskError,
    flight::{InFlight, Ticket, WaitingRoom},
    history::{History, Past, begin_payload, put_failure},
    intake::{Intake, KeyFn},
    item::{Done, ItemContext, ItemError, Quarantined, Retry, Verdict, describe},
    log::{Header, Identity, Kind, MAX_PAYLOAD_BYTES},
    progress::{Meter, Progress},
    proof::Prover,
    store::{self, Failed, FileStore, Log, OpenRequest, Opened, Seal},
};

/// What a run is to do, validated.
pub(crate) struct Plan<I, R> {
    pub(crate) job: String,
    pub(crate) version: String,
    pub(crate) accepted: Vec<String>,
    pub(crate) store: FileStore,
    pub(crate) codec: Codec,
    pub(crate) every: Duration,
    pub(crate) key: Option<KeyFn<I>>,
    pub(crate) revalidate: Option<RevalidateFn<I, R>>,
    pub(crate) concurrency: usize,
    pub(crate) max_ahead: usize,
    pub(crate) ordered: bool,
    pub(crate) at_most_once: bool,
    pub(crate) retry: Retry,
    pub(crate) max_defers: u32,
    pub(crate) quarantine: usize,
    pub(crate) retry_quarantined: bool,
    pub(crate) token: CancellationToken,
    pub(crate) grace: Duration,
}

pub(crate) type RevalidateFn<I, R> = Box<dyn Fn(&I, &R) -> bool + Send>;

/// What a run that reached the end of its input did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Summary {
    /// Items in the input.
    pub total: usize,
    /// Items this run completed.
    pub completed: usize,
    /// Items an earlier run had finished, those in quarantine included.
    pub restored: usize,
    /// Items in quarantine, from this run and from earlier ones.
    pub quarantined: usize,
    /// Bytes that a crash had left half-written behind the last intact block, and that were cut off.
    pub torn_bytes: u64,
}

pub(crate) struct Drive<I, R, S, F, Fut> {
    plan: Plan<I, R>,
    source: Option<S>,
    work: F,
    meter: Meter,
    history: History,
    /// Seeds the idempotency keys.
    seed: u64,
    intake: Intake,
    in_flight: InFlight<I, Fut>,
    /// With at-most-once, items that may start when the record of this number, their intent, is durable.
    announced: VecDeque<(u64, Ticket<I>)>,
    waiting: WaitingRoom<I>,
    /// Dropped after the items above: a successor that takes the file over never runs beside them.
    log: Log,
    log_is_full: bool,
    /// In ordered mode, what is finished and waits for an item before it.
    held: BTreeMap<usize, Done<R>>,
    emitted: usize,
    completed: usize,
    pushed_any: bool,
    prover: Prover,
    payload: Vec<u8>,
    cancelled: Pin<Box<WaitForCancellationFutureOwned>>,
    grace: Option<Pin<Box<Sleep>>>,
    ending: Ending,
}

enum Ending {
    Running,
    /// The store is being closed; then the run ends so, unless the store says worse.
    Closing(Result<(), TaskError>),
    Closed(Option<Result<Summary, TaskError>>),
}

/// What became of the wish to start one more item.
enum Next<R> {
    Started,
    Restored(Done<R>),
    NotNow,
}

/// Nothing in the loop is pinned in place: the source must be `Unpin`, and the futures live in boxes.
impl<I, R, S, F, Fut> Unpin for Drive<I, R, S, F, Fut> {}

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
        plan: Plan<I, R>,
        source: S,
        work: F,
        progress: watch::Sender<Progress>,
    ) -> Result<Self, TaskError> {
        let header = Header {
            salt: fastrand::u64(..),
            codec: plan.codec.number(),
            identity: if plan.key.is_some() { Identity::Key } else { Identity::Position },
            job: plan.job.clone(),
            version: plan.version.clone(),
            result_type: std::any::type_name::<R>().to_owned(),
        };
        let (store, accepted) = (plan.store.clone(), plan.accepted.clone());
        let opened =
            store::open(OpenRequest { store, header, accepted, every: plan.every, token: plan.token.clone() }).await;
        let gone = |_| Err(std::io::Error::other("the checkpoint thread could not be started").into());
        let Opened { log, history, salt } = opened.unwrap_or_else(gone)?;
        Ok(Self {
            source: Some(source),
            work,
            meter: Meter::new(progress),
            log,
            log_is_full: false,
            history,
            seed: xxh3_64_with_seed(plan.job.as_bytes(), salt),
            intake: Intake::new(plan.codec, salt),
            in_flight: InFlight::new(plan.concurrency),
            announced: VecDeque::new(),
            waiting: WaitingRoom::new(),
            held: BTreeMap::new(),
            emitted: 0,
            completed: 0,
            pushed_any: false,
            prover: Prover::new(plan.codec),
            payload: Vec::new(),
            cancelled: Box::pin(plan.token.clone().cancelled_owned()),
            grace: None,
            ending: Ending::Running,
            plan,
        })
    }

    /// The next finished item; `None` once everything is durable and the file unlocked.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Done<R>>> {
        loop {
            if let Some(done) = self.held.remove(&self.emitted) {
                self.emitted += 1;
                return Poll::Ready(Some(done));
            }
            match self.ending {
                Ending::Running => {}
                Ending::Closing(_) => {
                    ready!(self.poll_close(cx));
                    continue;
                }
                Ending::Closed(_) => return Poll::Ready(None),
            }
            // Items that are always ready must not keep the rest of the runtime from running.
            let coop = ready!(tokio::task::coop::poll_proceed(cx));
            match self.poll_step(cx) {
                Poll::Ready(Ok(Some(done))) => {
                    coop.made_progress();
                    self.meter.item_done(done.restored, done.result.is_err());
                    if self.meter.is_due() {
                        self.publish();
                    }
                    if !self.plan.ordered {
                        return Poll::Ready(Some(done));
                    }
                    self.held.insert(done.index, done);
                }
                Poll::Ready(Ok(None)) => self.close(Ok(())),
                Poll::Ready(Err(error)) => self.close(Err(error)),
                Poll::Pending => {
                    self.publish();
                    return Poll::Pending;
                }
            }
        }
    }

    /// How the run ended; `None` before it has, and after it was told once.
    pub(crate) fn take_outcome(&mut self) -> Option<Result<Summary, TaskError>> {
        match &mut self.ending {
            Ending::Closed(outcome) => outcome.take(),
            Ending::Running | Ending::Closing(_) => None,
        }
    }

    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Done<R>>, TaskError>> {
        loop {
            // Before the token is looked at: a result that is there is never thrown away.
            if let Poll::Ready((ticket, outcome)) = self.in_flight.poll_done(cx) {
                match self.settle(ticket, outcome)? {
                    Some(done) => return Poll::Ready(Ok(Some(done))),
                    None => continue,
                }
            }
            let all_read = self.source.as_ref().is_none_or(|source| source.size_hint().1 == Some(0));
            let all_done = self.started() == 0 && self.waiting.len() == 0;
            if self.plan.token.is_cancelled() && !(all_read && all_done) {
                ready!(self.poll_grace(cx));
                return Poll::Ready(Err(TaskError::Cancelled));
            }
            match self.start_next(cx)? {
                Next::Started => continue,
                Next::Restored(done) => return Poll::Ready(Ok(Some(done))),
                Next::NotNow => {}
            }
            if self.launch_announced(cx)? {
                continue;
            }
            if self.source.is_none() && all_done {
                return Poll::Ready(Ok(None));
            }
            // Registers for what else may wake the loop: an item that is due, the token, the store.
            let due = self.waiting.poll_due(cx).is_ready();
            let can_start = self.started() < self.plan.concurrency && !self.log_is_full;
            let cancelled = self.cancelled.as_mut().poll(cx).is_ready();
            let has_room = match self.log.poll_room(cx) {
                Poll::Ready(Err(Failed)) => return Poll::Ready(Err(self.store_failed())),
                room => room.is_ready(),
            };
            if !(due && can_start || cancelled || self.log_is_full && has_room) {
                return Poll::Pending;
            }
        }
    }

    /// The token has fired: nothing is started any more; becomes ready when what runs has had its time.
    fn poll_grace(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // Items that wait stay where they are: were the room emptied, the run would look complete once the rest has ended.
        if self.in_flight.len() == 0 || self.plan.grace.is_zero() {
            return Poll::Ready(());
        }
        let grace = self.plan.grace;
        self.grace.get_or_insert_with(|| Box::pin(tokio::time::sleep(grace))).as_mut().poll(cx)
    }

    /// Starts one more item if there is a slot, room in the buffer, and an item.
    fn start_next(&mut self, cx: &mut Context<'_>) -> Result<Next<R>, TaskError> {
        if self.started() >= self.plan.concurrency {
            return Ok(Next::NotNow);
        }
        if self.log_is_full {
            match self.log.poll_room(cx) {
                Poll::Ready(Ok(())) => self.log_is_full = false,
                Poll::Ready(Err(Failed)) => return Err(self.store_failed()),
                Poll::Pending => return Ok(Next::NotNow),
            }
        }
        if let Some(ticket) = self.waiting.take_due() {
            self.start(ticket)?;
            return Ok(Next::Started);
        }
        if self.waiting.len() + self.held.len() >= self.plan.max_ahead {
            return Ok(Next::NotNow);
        }
        let Some(source) = &mut self.source else { return Ok(Next::NotNow) };
        match Pin::new(source).poll_next(cx) {
            Poll::Ready(Some(item)) => self.admit(item),
            Poll::Ready(None) => {
                self.source = None;
                self.intake.finish(&self.history, self.plan.store.path())?;
                Ok(Next::NotNow)
            }
            Poll::Pending => Ok(Next::NotNow),
        }
    }

    /// Restores an item from the checkpoint, or starts it.
    #[inline]
    fn admit(&mut self, item: I) -> Result<Next<R>, TaskError> {
        let path = self.plan.store.path();
        let (index, key) = self.intake.admit(&item, self.plan.key.as_ref(), &self.history, path)?;
        let mut attempts = 0;
        match self.history.of(index, key.as_deref()) {
            Past::Nothing => {}
            Past::Failed { .. } if self.plan.retry.per_run => {}
            Past::Failed { attempts: before } => attempts = before,
            Past::Result(payload) => {
                let codec = self.plan.codec;
                let failed = |cause| self.history.unread(TaskError::unread::<R>(codec, index, payload, cause));
                let result: R = codec.decode(payload).map_err(failed)?;
                if self.plan.revalidate.as_ref().is_none_or(|is_valid| is_valid(&item, &result)) {
                    let result = Ok(result);
                    return Ok(Next::Restored(Done { index, key, restored: true, attempts: 0, result }));
                }
            }
            Past::Quarantined { attempts, cause } if !self.plan.retry_quarantined => {
                let result = Err(Quarantined { attempts, cause, uncertain: false });
                return Ok(Next::Restored(Done { index, key, restored: true, attempts, result }));
            }
            Past::Uncertain if !self.plan.retry_quarantined => {
                let result = Err(Quarantined::uncertain());
                return Ok(Next::Restored(Done { index, key, restored: true, attempts: 1, result }));
            }
            Past::Quarantined { .. } | Past::Uncertain => {}
        }
        self.meter.item_started();
        self.start(Ticket { index, key, item, attempts, defers: 0 })?;
        Ok(Next::Started)
    }

    #[inline]
    fn start(&mut self, ticket: Ticket<I>) -> Result<(), TaskError> {
        if self.plan.at_most_once {
            begin_payload(&mut self.payload, ticket.key.as_deref());
            let number = self.push(Kind::Intent, ticket.index)?;
            self.announced.push_back((number, ticket));
        } else {
            self.launch(ticket);
        }
        Ok(())
    }

    #[inline]
    fn launch(&mut self, ticket: Ticket<I>) {
        let (index, key, attempt) = (ticket.index, ticket.key.clone(), ticket.attempts + 1);
        let context = ItemContext { index, key, attempt, seed: self.seed };
        let future = (self.work)(context, ticket.item.clone());
        self.in_flight.start(ticket, future);
    }

    /// Launches the items whose intent has become durable and returns whether there were any.
    fn launch_announced(&mut self, cx: &mut Context<'_>) -> Result<bool, TaskError> {
        let Some((first, _)) = self.announced.front() else { return Ok(false) };
        let synced = match self.log.poll_synced(*first, cx) {
            Poll::Ready(Ok(synced)) => synced,
            Poll::Ready(Err(Failed)) => return Err(self.store_failed()),
            Poll::Pending => return Ok(false),
        };
        while let Some((number, _)) = self.announced.front()
            && *number <= synced
            && let Some((_, ticket)) = self.announced.pop_front()
        {
            self.launch(ticket);
        }
        Ok(true)
    }

    /// How many slots of the concurrency are taken.
    #[inline]
    fn started(&self) -> usize {
        self.in_flight.len() + self.announced.len()
    }

    /// Records how an attempt ended and returns the item if it is finished.
    #[inline]
    fn settle(&mut self, mut ticket: Ticket<I>, outcome: Result<R, ItemError>) -> Result<Option<Done<R>>, TaskError> {
        let error = match outcome {
            Ok(result) => {
                self.record_result(&ticket, &result)?;
                self.completed += 1;
                let Ticket { index, key, attempts, .. } = ticket;
                return Ok(Some(Done { index, key, restored: false, attempts: attempts + 1, result: Ok(result) }));
            }
            Err(error) => error,
        };
        if let Verdict::Defer(after) = error.verdict
            && ticket.defers < self.plan.max_defers
        {
            ticket.defers += 1;
            if self.plan.at_most_once {
                self.withdraw(&ticket)?;
            }
            self.waiting.enter(after, ticket);
            return Ok(None);
        }
        ticket.attempts += 1;
        let cause = describe(error.cause.as_ref());
        if error.verdict == Verdict::Permanent || ticket.attempts >= self.plan.retry.max_attempts {
            return self.quarantine(ticket, cause).map(Some);
        }
        self.record_failure(Kind::Failure, &ticket, &cause)?;
        self.waiting.enter(self.plan.retry.delay_after(ticket.attempts), ticket);
        Ok(None)
    }

    fn quarantine(&mut self, ticket: Ticket<I>, cause: String) -> Result<Done<R>, TaskError> {
        let limit = self.plan.quarantine;
        if self.meter.counts().failed >= limit {
            let (index, attempts) = (ticket.index, ticket.attempts);
            // Once the cause is mended, or the limit raised, the item has all its attempts again.
            self.record_failure(Kind::Failure, &Ticket { attempts: 0, ..ticket }, &cause)?;
            return Err(TaskError::QuarantineFull { limit, index, attempts, cause });
        }
        self.record_failure(Kind::Quarantine, &ticket, &cause)?;
        let Ticket { index, key, attempts, .. } = ticket;
        let result = Err(Quarantined { attempts, cause, uncertain: false });
        Ok(Done { index, key, restored: false, attempts, result })
    }

    #[inline]
    fn record_result(&mut self, ticket: &Ticket<I>, result: &R) -> Result<(), TaskError> {
        begin_payload(&mut self.payload, ticket.key.as_deref());
        // Into a buffer of its own: a serde implementation that fails or panics half-way must leave no half record.
        self.prover.encode(ticket.index, result, &mut self.payload)?;
        self.push(Kind::Result, ticket.index).map(drop)
    }

    fn close(&mut self, outcome: Result<(), TaskError>) {
        // What is still running is dropped before the file is let go: a successor never overlaps with it.
        self.in_flight.clear();
        self.withdraw_announced();
        self.publish();
        let seal = Seal { total: self.intake.position as u64, digest: self.intake.chain };
        let is_sealed = !self.pushed_any && self.history.sealed == Some((seal.total, seal.digest));
        self.log.stop((outcome.is_ok() && !is_sealed).then_some(seal));
        self.ending = Ending::Closing(outcome);
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let closed = ready!(self.log.poll_closed(cx));
        let counts = self.meter.counts();
        let summary = Summary {
            total: self.intake.position,
            completed: self.completed,
            restored: counts.restored,
            quarantined: counts.failed,
            torn_bytes: self.history.torn_bytes,
        };
        let Ending::Closing(outcome) = std::mem::replace(&mut self.ending, Ending::Closed(None)) else {
            return Poll::Ready(());
        };
        // A store that failed outranks all else: results handed out before may not be durable.
        let outcome = closed.map_err(TaskError::Io).and(outcome).map(|()| summary);
        self.ending = Ending::Closed(Some(outcome));
        Poll::Ready(())
    }

    fn publish(&mut self) {
        let ahead = self.source.as_ref().map_or(0, |source| source.size_hint().0);
        self.meter.publish(self.intake.position + ahead);
    }
}

/// What it takes to record something needs none of the types of the input, and so is there when the run is dropped.
impl<I, R, S, F, Fut> Drive<I, R, S, F, Fut> {
    /// Records of all items that wait for their intent to be durable that they were not started.
    fn withdraw_announced(&mut self) {
        while let Some((_, ticket)) = self.announced.pop_front() {
            // If the store has failed, its intent stays: the item is then held to be uncertain, which is safe.
            drop(self.withdraw(&ticket));
        }
    }

    /// Records that the announced attempt of an item did not take place.
    fn withdraw(&mut self, ticket: &Ticket<I>) -> Result<(), TaskError> {
        self.record_failure(Kind::Failure, ticket, "not started")
    }

    fn record_failure(&mut self, kind: Kind, ticket: &Ticket<I>, cause: &str) -> Result<(), TaskError> {
        begin_payload(&mut self.payload, ticket.key.as_deref());
        put_failure(&mut self.payload, ticket.attempts, cause);
        self.push(kind, ticket.index).map(drop)
    }

    /// Gives the checkpoint a record and returns its number.
    #[inline]
    fn push(&mut self, kind: Kind, index: usize) -> Result<u64, TaskError> {
        if self.payload.len() > MAX_PAYLOAD_BYTES {
            let cause = format!("it takes more than {MAX_PAYLOAD_BYTES} bytes").into();
            return Err(TaskError::unwritten::<R>(self.plan.codec, index, cause));
        }
        self.pushed_any = true;
        match self.log.push(kind, index, &self.payload, &mut self.intake.marks) {
            Ok(pushed) => {
                self.log_is_full = !pushed.has_room;
                Ok(pushed.number)
            }
            Err(Failed) => Err(self.store_failed()),
        }
    }

    /// Stands in until the store is closed, which tells what really happened.
    fn store_failed(&self) -> TaskError {
        TaskError::io("write checkpoint", self.plan.store.path(), std::io::Error::other("the store has failed"))
    }
}

impl<I, R, S, F, Fut> Drop for Drive<I, R, S, F, Fut> {
    fn drop(&mut self) {
        self.withdraw_announced();
    }
}
