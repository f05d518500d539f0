//! The loop of a run that shares its job with other workers. It runs the items of the ranges it holds.
//!
//! Invariant: an item is handed out after the append of its result is committed, so only one worker does it. An item of
//! a range that another worker has taken over is dropped where it is.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures_core::Stream;
use futures_util::stream::FuturesUnordered;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{sync::watch, time::Sleep};
use tokio_util::sync::WaitForCancellationFutureOwned;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::{
    drive::Summary,
    error::TaskError,
    history::{begin_payload, put_failure},
    item::{Done, ItemContext, ItemError, Quarantined},
    log::{Kind, MAX_PAYLOAD_BYTES},
    plan::Plan,
    postgres::{
        PgStore,
        leases::Standing,
        ledger::Known,
        queue::{Failed, Queue},
        shared::{Hold, Means, Shared, Told},
        waiting::Ticket,
    },
    progress::Progress,
    proof::Prover,
    run::Engine,
};

type Work<T, R> = Box<dyn Fn(ItemContext, T) -> Running<R> + Send>;
pub(crate) type Running<R> = Pin<Box<dyn Future<Output = Result<R, ItemError>> + Send>>;

/// How many items to process before reading the keeper's messages again.
const BURST: usize = 64;

/// One attempt: the item's future, and the item itself.
struct Attempt<T, R> {
    ticket: Option<Ticket<T>>,
    future: Running<R>,
}

/// Only the future is pinned, and it is in a box.
impl<T, R> Unpin for Attempt<T, R> {}

impl<T, R> Future for Attempt<T, R> {
    type Output = (Ticket<T>, Result<R, ItemError>);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let output = ready!(self.future.as_mut().poll(cx));
        Poll::Ready((self.ticket.take().expect("a future that is ready is not polled again"), output))
    }
}

/// What the loop keeps with a range.
struct Kept<R> {
    /// How many items are unfinished.
    left: usize,
    /// The items that are recorded but not yet known to be durable, each with the number of its record.
    held: VecDeque<(usize, Done<R>)>,
}

enum Ending {
    Running,
    /// The keeper was asked to end; then the run ends with this, unless the keeper reports something worse.
    Stopping(TaskError),
    Ended(Option<Result<Summary, TaskError>>),
}

/// The progress of the job and of this run.
#[derive(Debug, Default)]
struct Counts {
    /// The keeper's last word on the whole job.
    standing: Standing,
    /// This run's durable results and items in quarantine.
    completed: usize,
    quarantined: usize,
    /// How many of them the standing does not include yet.
    done_since: usize,
    quarantined_since: usize,
    /// Items in quarantine that are recorded but not yet durable.
    quarantined_held: usize,
}

impl Counts {
    fn done(&self) -> usize {
        as_usize(self.standing.done) + self.done_since
    }

    fn failed(&self) -> usize {
        as_usize(self.standing.quarantined) + self.quarantined_since + self.quarantined_held
    }

    fn own(&self) -> usize {
        self.completed + self.quarantined
    }
}

/// A run on PostgreSQL.
pub(crate) struct PgDrive<T, R> {
    plan: Plan<T, R>,
    queue: Queue<T, Kept<R>>,
    work: Work<T, R>,
    in_flight: FuturesUnordered<Attempt<T, R>>,
    shared: Arc<Shared>,
    has_room: bool,
    ready: VecDeque<Done<R>>,
    seed: u64,
    counts: Counts,
    prover: Prover,
    payload: Vec<u8>,
    cancelled: Pin<Box<WaitForCancellationFutureOwned>>,
    grace: Option<Pin<Box<Sleep>>>,
    ending: Ending,
}

/// Nothing in the loop is pinned in place.
impl<T, R> Unpin for PgDrive<T, R> {}

impl<T, R> PgDrive<T, R>
where
    T: Serialize + Clone,
    R: Serialize + DeserializeOwned,
{
    /// Reads the input and starts the keeper, which opens the job.
    pub(crate) async fn open(
        mut plan: Plan<T, R>,
        store: PgStore,
        source: impl Stream<Item = T>,
        work: Work<T, R>,
        progress: watch::Sender<Progress>,
    ) -> Result<Self, TaskError> {
        let (queue, shared) = Queue::open(&mut plan, store, source, progress).await?;
        Ok(Self {
            queue,
            work,
            in_flight: FuturesUnordered::new(),
            shared,
            has_room: true,
            ready: VecDeque::new(),
            seed: 0,
            counts: Counts::default(),
            prover: Prover::new(plan.codec),
            payload: Vec::new(),
            cancelled: Box::pin(plan.token.clone().cancelled_owned()),
            grace: None,
            ending: Ending::Running,
            plan,
        })
    }

    /// Starts and settles some items, and returns whether there were any.
    fn step(&mut self, cx: &mut Context<'_>) -> Result<bool, TaskError> {
        for step in 0..BURST {
            // Before the token is checked, because an available result is never thrown away.
            if let Poll::Ready(Some((ticket, outcome))) = Pin::new(&mut self.in_flight).poll_next(cx) {
                self.settle(ticket, outcome)?;
                continue;
            }
            if self.plan.token.is_cancelled() {
                if self.poll_grace(cx).is_ready() {
                    return Err(TaskError::Cancelled);
                }
                return Ok(step > 0);
            }
            if self.has_room
                && let Poll::Ready(ticket) = self.queue.poll_next(self.in_flight.len(), cx)?
            {
                self.launch(ticket);
                continue;
            }
            // Registers for the token, which may wake the loop too.
            return Ok(step > 0 || self.cancelled.as_mut().poll(cx).is_ready());
        }
        Ok(true)
    }

    /// The token has fired: nothing more is started. Becomes ready when the running items have had their grace.
    fn poll_grace(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.in_flight.is_empty() || self.plan.grace.is_zero() {
            return Poll::Ready(());
        }
        let grace = self.plan.grace;
        self.grace.get_or_insert_with(|| Box::pin(tokio::time::sleep(grace))).as_mut().poll(cx)
    }

    fn launch(&mut self, ticket: Ticket<T>) {
        let (index, key, attempt) = (ticket.index, ticket.key.clone(), ticket.attempts + 1);
        let context = ItemContext { index, key, attempt, seed: self.seed };
        let future = (self.work)(context, ticket.item.clone());
        self.in_flight.push(Attempt { ticket: Some(ticket), future });
    }

    /// Records how an attempt ended.
    fn settle(&mut self, ticket: Ticket<T>, outcome: Result<R, ItemError>) -> Result<(), TaskError> {
        let error = match outcome {
            Ok(result) => {
                self.queue.ended(&ticket);
                return self.finish(ticket, result);
            }
            Err(error) => error,
        };
        let Some(Failed { ticket, cause, is_last }) = self.queue.failed(ticket, error, self.in_flight.len()) else {
            return Ok(());
        };
        if is_last {
            return self.quarantine(ticket, cause);
        }
        self.record_failure(Kind::Failure, &ticket, ticket.attempts, &cause, Means::Open)?;
        self.queue.retry(ticket);
        Ok(())
    }

    fn finish(&mut self, ticket: Ticket<T>, result: R) -> Result<(), TaskError> {
        begin_payload(&mut self.payload, ticket.key.as_deref());
        self.prover.encode(ticket.index, &result, &mut self.payload)?;
        let number = self.push(Kind::Result, &ticket, Means::Finished)?;
        let Ticket { hold, index, key, attempts, .. } = ticket;
        let done = Done { index, key, restored: false, attempts: attempts + 1, result: Ok(result) };
        self.hold_back(hold, number, done);
        Ok(())
    }

    fn quarantine(&mut self, ticket: Ticket<T>, cause: String) -> Result<(), TaskError> {
        let limit = self.plan.quarantine;
        let (index, attempts) = (ticket.index, ticket.attempts);
        if self.counts.failed() >= limit {
            // Once the cause is fixed, or the limit raised, the item has all its attempts again.
            self.record_failure(Kind::Failure, &ticket, 0, &cause, Means::Open)?;
            return Err(TaskError::QuarantineFull { limit, index, attempts, cause });
        }
        let number = self.record_failure(Kind::Quarantine, &ticket, attempts, &cause, Means::Quarantined)?;
        self.counts.quarantined_held += usize::from(number.is_some());
        let result = Err(Quarantined { attempts, cause, uncertain: false });
        let done = Done { index, key: ticket.key, restored: false, attempts, result };
        self.hold_back(ticket.hold, number, done);
        Ok(())
    }

    fn record_failure(
        &mut self,
        kind: Kind,
        ticket: &Ticket<T>,
        attempts: u32,
        cause: &str,
        means: Means,
    ) -> Result<Option<usize>, TaskError> {
        begin_payload(&mut self.payload, ticket.key.as_deref());
        put_failure(&mut self.payload, attempts, cause);
        self.push(kind, ticket, means)
    }

    /// Gives the keeper a record and returns its number; `None` if the range is lost.
    fn push(&mut self, kind: Kind, ticket: &Ticket<T>, means: Means) -> Result<Option<usize>, TaskError> {
        let index = ticket.index;
        if self.payload.len() > MAX_PAYLOAD_BYTES {
            let cause = format!("it takes more than {MAX_PAYLOAD_BYTES} bytes").into();
            return Err(TaskError::unwritten::<R>(self.plan.codec, index, cause));
        }
        let recorded = self.shared.record(ticket.hold, kind, index, &self.payload, means);
        if let Some(recorded) = recorded {
            self.has_room = recorded.has_room;
        }
        Ok(recorded.map(|recorded| recorded.number))
    }

    /// Keeps a finished item until its record is durable.
    fn hold_back(&mut self, hold: Hold, number: Option<usize>, done: Done<R>) {
        if let Some(number) = number
            && let Some(range) = self.queue.range(hold)
        {
            range.own.left = range.own.left.saturating_sub(1);
            range.own.held.push_back((number, done));
        }
    }
}

impl<T, R> PgDrive<T, R> {
    /// Processes the keeper's messages and returns whether there were any.
    fn hear(&mut self, cx: &Context<'_>) -> bool {
        let (told, has_room) = self.shared.hear(cx.waker());
        let mut changed = !told.is_empty() || has_room && !self.has_room;
        self.has_room = has_room;
        for told in told {
            match told {
                Told::Opened { salt, .. } => self.seed = xxh3_64_with_seed(self.plan.job.as_bytes(), salt),
                Told::Granted { hold, first, items, .. } => self.take_on(hold, first, items),
                Told::Appended { hold, records } => self.release(hold, records),
                Told::Lost(hold) => self.lose(hold),
                Told::Standing(standing) => {
                    self.counts.standing = standing;
                    (self.counts.done_since, self.counts.quarantined_since) = (0, 0);
                    changed |= self.publish();
                }
                Told::Fenced(error) => self.stop(error),
            }
        }
        changed
    }

    fn take_on(&mut self, hold: Hold, first: usize, known: Vec<Known>) {
        let left = known.iter().filter(|known| matches!(known, Known::Nothing | Known::Failed(_))).count();
        self.queue.take_on(hold, first, known, Kept { left, held: VecDeque::new() });
    }

    /// Hands out what is durable now.
    fn release(&mut self, hold: Hold, records: usize) {
        let Some(range) = self.queue.range(hold).map(|range| &mut range.own) else { return };
        while range.held.front().is_some_and(|(number, _)| *number <= records)
            && let Some((_, done)) = range.held.pop_front()
        {
            self.counts.done_since += 1;
            if done.result.is_ok() {
                self.counts.completed += 1;
            } else {
                self.counts.quarantined += 1;
                self.counts.quarantined_since += 1;
                self.counts.quarantined_held -= 1;
            }
            self.ready.push_back(done);
        }
        if range.left == 0 && range.held.is_empty() {
            self.queue.let_go(hold);
        }
    }

    /// Drops everything that belongs to a range that another worker has taken over.
    fn lose(&mut self, hold: Hold) {
        let Some(range) = self.queue.let_go(hold) else { return };
        self.counts.quarantined_held -= range.own.held.iter().filter(|(_, done)| done.result.is_err()).count();
        let of_others = |attempt: &Attempt<T, R>| attempt.ticket.as_ref().is_some_and(|ticket| ticket.hold != hold);
        self.in_flight = std::mem::take(&mut self.in_flight).into_iter().filter(of_others).collect();
    }

    /// Ends the run once the recorded results are durable. Drops the running items first, so that a successor never
    /// overlaps with them.
    fn stop(&mut self, error: TaskError) {
        if let Ending::Running = self.ending {
            self.in_flight.clear();
            self.ending = Ending::Stopping(error);
            self.shared.stop();
        }
    }

    fn end(&mut self, ended: Result<Standing, TaskError>) {
        self.in_flight.clear();
        let before = std::mem::replace(&mut self.ending, Ending::Ended(None));
        let outcome = match (before, ended) {
            (_, Err(error)) | (Ending::Stopping(error), Ok(_)) => Err(error),
            (Ending::Running | Ending::Ended(_), Ok(standing)) => Ok(self.summary(standing)),
        };
        self.publish();
        self.ending = Ending::Ended(Some(outcome));
    }

    fn summary(&self, standing: Standing) -> Summary {
        Summary {
            total: self.queue.total(),
            completed: self.counts.completed,
            restored: as_usize(standing.done).saturating_sub(self.counts.own()),
            quarantined: as_usize(standing.quarantined),
            torn_bytes: 0,
        }
    }

    fn publish(&mut self) -> bool {
        self.queue.publish(self.counts.done(), self.counts.own(), self.counts.failed());
        false
    }
}

impl<T, R> Engine<R> for PgDrive<T, R>
where
    T: Serialize + Clone + Send,
    R: Serialize + DeserializeOwned + Send,
{
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Done<R>>> {
        loop {
            if let Some(done) = self.ready.pop_front() {
                return Poll::Ready(Some(done));
            }
            if let Ending::Ended(_) = self.ending {
                return Poll::Ready(None);
            }
            // Items that are always ready must not keep the rest of the runtime from running.
            let coop = ready!(tokio::task::coop::poll_proceed(cx));
            let heard = self.hear(cx);
            if let Some(ended) = self.shared.ended() {
                self.end(ended);
                continue;
            }
            let stepped = match self.ending {
                Ending::Running => self.step(cx),
                Ending::Stopping(_) | Ending::Ended(_) => Ok(false),
            };
            match stepped {
                Ok(false) if !heard => {
                    self.publish();
                    return Poll::Pending;
                }
                Ok(_) => {}
                Err(error) => self.stop(error),
            }
            coop.made_progress();
        }
    }

    fn take_outcome(&mut self) -> Option<Result<Summary, TaskError>> {
        match &mut self.ending {
            Ending::Ended(outcome) => outcome.take(),
            Ending::Running | Ending::Stopping(_) => None,
        }
    }
}

impl<T, R> Drop for PgDrive<T, R> {
    fn drop(&mut self) {
        // Before the keeper gives the ranges back, so that a successor never runs beside these items.
        self.in_flight.clear();
        self.shared.stop();
    }
}

fn as_usize(count: i64) -> usize {
    usize::try_from(count).unwrap_or_default()
}
