//! One item in its transaction: its work, and the append of its result.
//!
//! Invariant: the transaction in which the item took effect also makes the append, and a commit whose answer was lost
//! is looked up by its block before anything else is appended to its range.

use std::{
    marker::PhantomData,
    pin::pin,
    sync::{Arc, PoisonError},
};

use futures_util::future::{Either, select};
use serde::{Serialize, de::DeserializeOwned};
use sqlx::{Connection, PgConnection, Postgres, Transaction};
use tokio::{
    sync::{Mutex, MutexGuard, watch},
    time::Instant,
};

use crate::{
    codec::Codec,
    error::TaskError,
    history::{begin_payload, put_failure},
    item::ItemError,
    log::{Blocks, Kind, MAX_PAYLOAD_BYTES},
    postgres::{
        PgStore, keeper,
        leases::{Append, Leases},
        ledger::{Place, sealed},
        session::{Session, answered, is_passing, is_refusal},
        shared::Hold,
        waiting::Ticket,
    },
    proof::Prover,
};

/// The place of the next append to a range. One item at a time holds it, from its append until the outcome is known,
/// because appends follow each other.
#[derive(Debug)]
pub(crate) struct Turn {
    place: Mutex<Place>,
    /// Whether the holder is looking up the outcome of its commit.
    in_doubt: watch::Sender<bool>,
}

impl Turn {
    pub(crate) fn new(place: Place) -> Self {
        Self { place: Mutex::new(place), in_doubt: watch::Sender::new(false) }
    }

    /// Waits for the place. Returns `None` if the holder needs a connection, because all connections may be waiting
    /// here.
    async fn take(&self) -> Option<MutexGuard<'_, Place>> {
        let mut in_doubt = self.in_doubt.subscribe();
        match select(pin!(self.place.lock()), pin!(in_doubt.wait_for(|in_doubt| *in_doubt))).await {
            Either::Left((place, _)) => Some(place),
            Either::Right(_) => None,
        }
    }

    /// Waits until nothing holds the place.
    async fn free(&self) {
        drop(self.place.lock().await);
    }

    /// Whether all items of the range are finished.
    pub(crate) fn is_finished(&self, count: usize) -> bool {
        self.place.try_lock().is_ok_and(|place| is_finished(&place, count))
    }
}

/// What to do for an item, in a range that is held.
pub(crate) struct Job<T> {
    pub(crate) ticket: Ticket<T>,
    pub(crate) what: What,
    pub(crate) turn: Arc<Turn>,
    /// How many items the range has.
    pub(crate) count: usize,
    pub(crate) leases: Leases,
}

pub(crate) enum What {
    Attempt,
    /// Record a failure alone: what the item did is rolled back.
    Note(Note),
}

#[derive(Clone)]
pub(crate) struct Note {
    pub(crate) attempts: u32,
    pub(crate) cause: String,
    pub(crate) after: After,
}

/// What a failure means for its item.
#[derive(Clone, Copy)]
pub(crate) enum After {
    Retry,
    Quarantine,
    /// There is no room in the quarantine.
    Full,
}

/// How it ended.
pub(crate) enum End {
    Recorded,
    Failed(ItemError),
    Noted(Note),
    /// Another worker has the range; what the item did is rolled back.
    Lost,
    Broken(TaskError),
}

/// What runs the items.
pub(crate) struct Worker<F, R> {
    pub(crate) store: PgStore,
    pub(crate) work: F,
    pub(crate) prover: std::sync::Mutex<Prover>,
    pub(crate) codec: Codec,
    pub(crate) of: PhantomData<fn() -> R>,
}

/// How one try of a transaction ended.
enum Tried {
    Committed,
    /// It is rolled back, and the item is to blame.
    Failed(ItemError),
    Lost,
    /// The database failed, and nothing of the transaction remains.
    Again(sqlx::Error),
    /// It is rolled back, because another item of the range needs its connection.
    GaveWay,
    Broken(TaskError),
}

impl<R: Serialize + DeserializeOwned, F> Worker<F, R> {
    /// Runs the job in transactions until one ends because of the item, and not because of the database.
    pub(crate) async fn run<T>(&self, job: Job<T>) -> (Ticket<T>, End)
    where
        T: Clone,
        F: AsyncFn(&mut PgConnection, T) -> Result<R, ItemError>,
    {
        let (mut fails_since, mut wait) = (None, keeper::FIRST_WAIT);
        let end = loop {
            let error = match self.try_once(&job).await {
                Tried::Committed => match &job.what {
                    What::Attempt => break End::Recorded,
                    What::Note(note) => break End::Noted(note.clone()),
                },
                Tried::Failed(error) => break End::Failed(error),
                Tried::Lost => break End::Lost,
                Tried::Broken(error) => break End::Broken(error),
                Tried::GaveWay => {
                    job.turn.free().await;
                    continue;
                }
                Tried::Again(error) => error,
            };
            let fails_since = *fails_since.get_or_insert_with(Instant::now);
            if !is_passing(&error) || fails_since.elapsed() >= self.store.outage {
                break End::Broken(TaskError::Database { action: "run a transaction", source: error.into() });
            }
            tokio::time::sleep(wait.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            wait = (wait * 2).min(keeper::LONGEST_WAIT);
        };
        (job.ticket, end)
    }

    async fn try_once<T>(&self, job: &Job<T>) -> Tried
    where
        T: Clone,
        F: AsyncFn(&mut PgConnection, T) -> Result<R, ItemError>,
    {
        let (bounds, within) = (self.store.bounds(), self.store.answer_within);
        let mut session = match Session::acquire(&self.store.pool).await {
            Ok(session) => session,
            Err(error) => return Tried::Again(error),
        };
        let connection = match session.connection() {
            Ok(connection) => connection,
            Err(error) => return Tried::Again(error),
        };
        let mut tx = match answered(within, connection.begin_with(bounds.begin())).await {
            Ok(tx) => tx,
            Err(error) => return Tried::Again(error),
        };
        let (kind, payload) = match &job.what {
            What::Note(note) => note_of(job, note),
            What::Attempt => match (self.work)(&mut tx, job.ticket.item.clone()).await {
                Ok(result) => match self.encode(job, &result) {
                    Ok(payload) => (Kind::Result, payload),
                    Err(error) => return Tried::Broken(error),
                },
                Err(error) => {
                    return match answered(within, tx.rollback()).await {
                        Ok(()) => {
                            session.give_back();
                            Tried::Failed(error)
                        }
                        // The connection is gone, through no fault of the item.
                        Err(error) => Tried::Again(error),
                    };
                }
            },
        };
        let appended = self.append(job, tx, kind, &payload).await;
        match appended {
            Appended::Committed => session.give_back(),
            // The session is released before the lookup, which needs a connection too: there may be no other.
            Appended::InDoubt(_) | Appended::Not(_) => drop(session),
        }
        match appended {
            Appended::Committed => Tried::Committed,
            Appended::InDoubt(doubt) => self.resolve(job, doubt).await,
            Appended::Not(tried) => tried,
        }
    }

    fn encode<T>(&self, job: &Job<T>, result: &R) -> Result<Vec<u8>, TaskError> {
        let (mut payload, index) = (Vec::new(), job.ticket.index);
        begin_payload(&mut payload, job.ticket.key.as_deref());
        self.prover.lock().unwrap_or_else(PoisonError::into_inner).encode(index, result, &mut payload)?;
        if payload.len() > MAX_PAYLOAD_BYTES {
            let cause = format!("it takes more than {MAX_PAYLOAD_BYTES} bytes").into();
            return Err(TaskError::unwritten::<R>(self.codec, index, cause));
        }
        Ok(payload)
    }
}

/// How a transaction with a record in it ended.
enum Appended<'a> {
    Committed,
    InDoubt(Doubt<'a>),
    Not(Tried),
}

/// A COMMIT was sent and never answered. Nothing else is appended to the range before its outcome is known.
struct Doubt<'a> {
    place: MutexGuard<'a, Place>,
    append: Append,
    next: Place,
    error: sqlx::Error,
}

impl<R, F> Worker<F, R> {
    /// Adds a record to its range, in the transaction of its item, and commits.
    async fn append<'a, T>(
        &self,
        job: &'a Job<T>,
        mut tx: Transaction<'_, Postgres>,
        kind: Kind,
        payload: &[u8],
    ) -> Appended<'a> {
        let within = self.store.answer_within;
        let Some(mut place) = job.turn.take().await else { return Appended::Not(Tried::GaveWay) };
        let (append, next) = next_append(&place, job, kind, payload);
        let appends = [append];
        match answered(within, job.leases.append_on(&mut tx, &appends)).await {
            Ok(taken) if !taken.is_empty() => {}
            // The place follows our last append, so another worker has the range.
            Ok(_) => return Appended::Not(Tried::Lost),
            // A statement of the item has failed, and the item did not return the error.
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("25P02") => {
                return Appended::Not(Tried::Failed(ItemError::retry(sqlx::Error::Database(error))));
            }
            Err(error) => return Appended::Not(Tried::Again(error)),
        }
        match answered(within, tx.commit()).await {
            Ok(()) => {
                *place = next;
                Appended::Committed
            }
            Err(error) if is_refusal(&error) => Appended::Not(match job.what {
                What::Attempt => Tried::Failed(ItemError::retry(error)),
                What::Note(_) => Tried::Again(error),
            }),
            Err(error) => {
                let [append] = appends;
                Appended::InDoubt(Doubt { place, append, next, error })
            }
        }
    }

    /// Looks up the outcome of a commit whose answer was lost.
    async fn resolve<T>(&self, job: &Job<T>, doubt: Doubt<'_>) -> Tried {
        let Doubt { mut place, append, next, error } = doubt;
        job.turn.in_doubt.send_replace(true);
        let appends = [append];
        let there = self.store.patiently("look for a block", || job.leases.look(&appends)).await;
        job.turn.in_doubt.send_replace(false);
        match there {
            Ok(there) if there.is_empty() => Tried::Again(error),
            Ok(_) => {
                *place = next;
                Tried::Committed
            }
            Err(error) => Tried::Broken(error),
        }
    }
}

/// The record of a failure.
fn note_of<T>(job: &Job<T>, note: &Note) -> (Kind, Vec<u8>) {
    let mut payload = Vec::new();
    begin_payload(&mut payload, job.ticket.key.as_deref());
    put_failure(&mut payload, note.attempts, &note.cause);
    let kind = if let After::Quarantine = note.after { Kind::Quarantine } else { Kind::Failure };
    (kind, payload)
}

/// The append of one record to a range, and the place after it.
fn next_append<T>(place: &Place, job: &Job<T>, kind: Kind, payload: &[u8]) -> (Append, Place) {
    let mut next = *place;
    next.seq += 1;
    next.done += i32::from(kind != Kind::Failure);
    next.quarantined += i32::from(kind == Kind::Quarantine);
    let mut blocks = Blocks::default();
    blocks.record(kind, job.ticket.index as u64, payload);
    let finished = is_finished(&next, job.count).then_some(job.count);
    let body = sealed(&mut blocks, &mut next.chain, finished);
    let Hold { n, epoch } = job.ticket.hold;
    (Append { n, epoch, seq: place.seq, done: next.done, quarantined: next.quarantined, body }, next)
}

fn is_finished(place: &Place, count: usize) -> bool {
    usize::try_from(place.done).is_ok_and(|done| done >= count)
}
