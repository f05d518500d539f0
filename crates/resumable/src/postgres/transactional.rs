//! Items whose effect and result are one transaction.
//!
//! Invariant: the transaction in which the item took effect also appends the result, under the epoch of its range: the
//! database has both or neither. A commit whose answer was lost is looked up by its block before the item is tried
//! again.

use std::{
    future::poll_fn,
    marker::PhantomData,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures_core::Stream;
use futures_util::{StreamExt, stream::FuturesUnordered};
use serde::{Serialize, de::DeserializeOwned};
use sqlx::PgConnection;
use tokio::sync::watch;

use crate::{
    drive::Summary,
    error::TaskError,
    item::ItemError,
    plan::Plan,
    postgres::{
        PgStore,
        leases::{Leases, Standing},
        queue::{Failed, Queue},
        shared::{Hold, LetGo, Shared, Told},
        transaction::{After, End, Job, Note, Turn, What, Worker},
        waiting::Ticket,
    },
    progress::Progress,
    proof::Prover,
};

/// Asks the keeper to end when the run ends, however it ends.
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
    let (queue, shared) = Queue::open(&mut plan, store.clone(), source, progress).await?;
    let prover = std::sync::Mutex::new(Prover::new(plan.codec));
    let worker = Worker { store, work, prover, codec: plan.codec, of: PhantomData };
    let mut run = Loop {
        queue,
        shared: Arc::clone(&shared),
        leases: None,
        standing: Standing::default(),
        completed: 0,
        quarantined: 0,
        fenced: None,
        is_over: false,
        plan,
    };
    // Dropped after the items, so that a successor never runs beside them.
    let _stop = Stop(Arc::clone(&shared));
    let ended = run.drive(&worker).await;
    let failed = match ended {
        Ok(standing) => return Ok(run.summary(standing)),
        Err(error) => error,
    };
    if !run.is_over {
        // The ranges are given back before this returns.
        shared.stop();
        poll_fn(|cx| run.poll_ended(cx)).await?;
    }
    Err(failed)
}

enum Event<T> {
    Heard,
    Start(Ticket<T>),
    Ended((Ticket<T>, End)),
    Over(Result<Standing, TaskError>),
}

struct Loop<T, R> {
    plan: Plan<T, R>,
    /// Keeps with each range the place of its next append.
    queue: Queue<T, Arc<Turn>>,
    shared: Arc<Shared>,
    leases: Option<Leases>,
    standing: Standing,
    completed: usize,
    quarantined: usize,
    fenced: Option<TaskError>,
    /// Whether the keeper has ended.
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
                if token.is_cancelled() {
                    return Poll::Pending;
                }
                match ready!(self.queue.poll_next(running.len(), cx)) {
                    Ok(ticket) => Poll::Ready(Event::Start(ticket)),
                    Err(error) => Poll::Ready(Event::Over(Err(error))),
                }
            })
            .await;
            match event {
                Event::Heard => {}
                Event::Ended((ticket, end)) => {
                    if let Some(job) = self.settle(ticket, end, running.len())? {
                        running.push(worker.run(job));
                    }
                }
                Event::Start(ticket) => {
                    if let Some(job) = self.job(ticket, What::Attempt) {
                        running.push(worker.run(job));
                    }
                }
                Event::Over(ended) => return ended,
            }
        }
    }

    /// The job for a ticket in its range; `None` if the range is lost.
    fn job(&mut self, ticket: Ticket<T>, what: What) -> Option<Job<T>> {
        let range = self.queue.range(ticket.hold)?;
        let (turn, count) = (Arc::clone(&range.own), range.known.len());
        Some(Job { ticket, what, turn, count, leases: self.leases.clone()? })
    }

    /// Processes the keeper's messages and returns whether there were any.
    fn hear(&mut self, cx: &Context<'_>) -> bool {
        let (told, _) = self.shared.hear(cx.waker());
        let heard = !told.is_empty();
        for told in told {
            match told {
                Told::Opened { leases, .. } => self.leases = Some(leases),
                Told::Granted { hold, first, items, place } => {
                    self.queue.take_on(hold, first, items, Arc::new(Turn::new(place)));
                }
                Told::Appended { hold, .. } | Told::Lost(hold) => drop(self.queue.let_go(hold)),
                Told::Standing(standing) => self.standing = standing,
                Told::Fenced(error) => self.fenced = Some(error),
            }
        }
        self.publish();
        heard
    }

    /// Processes the end of a job, and returns the next job for its item.
    fn settle(&mut self, ticket: Ticket<T>, end: End, running: usize) -> Result<Option<Job<T>>, TaskError> {
        let error = match end {
            End::Failed(error) => error,
            End::Recorded => {
                self.completed += 1;
                self.queue.ended(&ticket);
                self.look_at(ticket.hold);
                return Ok(None);
            }
            End::Noted(Note { cause, after, .. }) => {
                match after {
                    After::Retry => self.queue.retry(ticket),
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
                self.queue.ended(&ticket);
                self.shared.let_go(ticket.hold, LetGo::Lost);
                return Ok(None);
            }
            End::Broken(error) => return Err(error),
        };
        let Some(Failed { ticket, cause, is_last }) = self.queue.failed(ticket, error, running) else {
            return Ok(None);
        };
        let (attempts, after) = match is_last {
            false => (ticket.attempts, After::Retry),
            true if self.failed() < self.plan.quarantine => (ticket.attempts, After::Quarantine),
            // Once the cause is fixed, or the limit raised, the item has all its attempts again.
            true => (0, After::Full),
        };
        Ok(self.job(ticket, What::Note(Note { attempts, cause, after })))
    }

    /// Releases a range whose last item has just been recorded.
    fn look_at(&mut self, hold: Hold) {
        let Some(range) = self.queue.range(hold) else { return };
        if range.own.is_finished(range.known.len()) {
            self.queue.let_go(hold);
            self.shared.let_go(hold, LetGo::Finished);
        }
    }

    /// How many items of the job are in quarantine, as far as is known.
    fn failed(&self) -> usize {
        usize::try_from(self.standing.quarantined).unwrap_or_default().max(self.quarantined)
    }

    fn publish(&mut self) {
        let own = self.completed + self.quarantined;
        let done = usize::try_from(self.standing.done).unwrap_or_default().max(own);
        self.queue.publish(done, own, self.failed());
    }

    fn summary(&self, standing: Standing) -> Summary {
        let done = usize::try_from(standing.done).unwrap_or_default();
        Summary {
            total: self.queue.total(),
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
