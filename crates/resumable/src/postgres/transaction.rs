//! One item in its transaction: what it does, and the append of its result.
//!
//! Invariant: the append is made in the transaction in which the item took effect, and a commit whose answer was lost is
//! looked up by its block before the item is tried again.

use std::{
    marker::PhantomData,
    sync::{Arc, PoisonError},
};

use serde::{Serialize, de::DeserializeOwned};
use sqlx::{Connection, PgConnection};
use tokio::{sync::Mutex, time::Instant};

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
        session::is_passing,
        shared::Hold,
        waiting::Ticket,
    },
    proof::Prover,
};

/// What is to be done for an item, in a range that is there.
pub(crate) struct Job<T> {
    pub(crate) ticket: Ticket<T>,
    pub(crate) what: What,
    pub(crate) place: Arc<Mutex<Place>>,
    /// How many items the range has.
    pub(crate) count: usize,
    pub(crate) leases: Leases,
}

pub(crate) enum What {
    Attempt,
    /// To record a failure by itself: what the item did is rolled back.
    Note {
        attempts: u32,
        cause: String,
        after: After,
    },
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
    Noted {
        attempts: u32,
        cause: String,
        after: After,
    },
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
    End(End),
    /// The database failed before the commit was sent: nothing of it is there.
    Again(sqlx::Error),
}

impl<R: Serialize + DeserializeOwned, F> Worker<F, R> {
    pub(crate) async fn run<T>(&self, job: Job<T>) -> (Ticket<T>, End)
    where
        T: Clone,
        F: AsyncFn(&mut PgConnection, T) -> Result<R, ItemError>,
    {
        let end = match &job.what {
            What::Attempt => self.attempt(&job).await,
            What::Note { attempts, cause, after } => self.note(&job, *attempts, cause, *after).await,
        };
        (job.ticket, end)
    }

    /// Runs an item in transactions until one of them has ended by what the item did, and not by the database.
    async fn attempt<T>(&self, job: &Job<T>) -> End
    where
        T: Clone,
        F: AsyncFn(&mut PgConnection, T) -> Result<R, ItemError>,
    {
        let (started, mut wait) = (Instant::now(), keeper::FIRST_WAIT);
        loop {
            let error = match self.try_once(job).await {
                Tried::End(end) => return end,
                Tried::Again(error) => error,
            };
            if !is_passing(&error) || started.elapsed() >= self.store.outage {
                return End::Broken(TaskError::Database { action: "run a transaction", source: error.into() });
            }
            tokio::time::sleep(wait.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            wait = (wait * 2).min(keeper::LONGEST_WAIT);
        }
    }

    async fn try_once<T>(&self, job: &Job<T>) -> Tried
    where
        T: Clone,
        F: AsyncFn(&mut PgConnection, T) -> Result<R, ItemError>,
    {
        let mut connection = match self.store.pool.acquire().await {
            Ok(connection) => connection,
            Err(error) => return Tried::Again(error),
        };
        let mut tx = match connection.begin_with(self.store.bounds().begin()).await {
            Ok(tx) => tx,
            Err(error) => return Tried::Again(error),
        };
        let result = match (self.work)(&mut tx, job.ticket.item.clone()).await {
            Ok(result) => result,
            Err(error) => {
                let rolled_back = tx.rollback().await;
                return match rolled_back {
                    Ok(()) => Tried::End(End::Failed(error)),
                    // The connection is gone, and no fault of the item's.
                    Err(error) => {
                        connection.close_on_drop();
                        Tried::Again(error)
                    }
                };
            }
        };
        let payload = match self.encode(job, &result) {
            Ok(payload) => payload,
            Err(error) => return Tried::End(End::Broken(error)),
        };
        let mut place = job.place.lock().await;
        let (append, next) = next_append(&place, job, Kind::Result, &payload);
        let appends = [append];
        match job.leases.append_on(&mut tx, &appends).await {
            Ok(taken) if !taken.is_empty() => {}
            Ok(_) => {
                drop(tx.rollback().await);
                connection.close_on_drop();
                // Another worker has the range, or it is a repeat of a commit whose answer was lost and that came late.
                return Tried::End(self.resolve(job, &appends, &mut place, next, End::Lost).await);
            }
            Err(error) => {
                drop(tx);
                connection.close_on_drop();
                return match error {
                    // A statement of the item has failed, and the item has not said so.
                    sqlx::Error::Database(error) if error.code().as_deref() == Some("25P02") => {
                        Tried::End(End::Failed(ItemError::retry(sqlx::Error::Database(error))))
                    }
                    error => Tried::Again(error),
                };
            }
        }
        match tx.commit().await {
            Ok(()) => {
                *place = next;
                Tried::End(End::Recorded)
            }
            Err(error) => {
                connection.close_on_drop();
                // It may have been committed. If it is not there it may come late: then the next append finds it.
                match self.there(job, &appends).await {
                    Ok(true) => {
                        *place = next;
                        Tried::End(End::Recorded)
                    }
                    Ok(false) => Tried::Again(error),
                    Err(error) => Tried::End(End::Broken(error)),
                }
            }
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

    /// Records a failure in a transaction of its own.
    async fn note<T>(&self, job: &Job<T>, attempts: u32, cause: &str, after: After) -> End {
        let mut payload = Vec::new();
        begin_payload(&mut payload, job.ticket.key.as_deref());
        put_failure(&mut payload, attempts, cause);
        let kind = if let After::Quarantine = after { Kind::Quarantine } else { Kind::Failure };
        let mut place = job.place.lock().await;
        let (append, next) = next_append(&place, job, kind, &payload);
        let appends = [append];
        let noted = End::Noted { attempts, cause: cause.to_owned(), after };
        match self.store.patiently("append", || job.leases.append(&appends)).await {
            Ok(taken) if !taken.is_empty() => {
                *place = next;
                noted
            }
            Ok(_) => match self.resolve(job, &appends, &mut place, next, End::Lost).await {
                End::Recorded => noted,
                end => end,
            },
            Err(error) => End::Broken(error),
        }
    }

    /// What became of an append that took no row.
    async fn resolve<T>(&self, job: &Job<T>, appends: &[Append], place: &mut Place, next: Place, else_: End) -> End {
        match self.there(job, appends).await {
            Ok(true) => {
                *place = next;
                End::Recorded
            }
            Ok(false) => else_,
            Err(error) => End::Broken(error),
        }
    }

    async fn there<T>(&self, job: &Job<T>, appends: &[Append]) -> Result<bool, TaskError> {
        let there = self.store.patiently("look for a block", || job.leases.look(appends)).await?;
        Ok(!there.is_empty())
    }
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

pub(crate) fn is_finished(place: &Place, count: usize) -> bool {
    usize::try_from(place.done).is_ok_and(|done| done >= count)
}
