//! The records that a run adds to its checkpoint.
//!
//! Invariant: a record is whole before the checkpoint gets it, and a store that has failed gets no more records.

use std::{
    io,
    path::PathBuf,
    task::{Context, Poll, ready},
    time::Instant,
};

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    codec::Codec,
    error::TaskError,
    flight::Ticket,
    history::{begin_payload, put_failure},
    log::{Kind, MAX_PAYLOAD_BYTES},
    proof::Prover,
    store::{Failed, Keeper, Log, Marks, Seal},
};

/// The way from the items to the log. Dropping it lets the checkpoint be written, synced and unlocked.
#[derive(Debug)]
pub(crate) struct Recorder {
    log: Log,
    path: PathBuf,
    codec: Codec,
    prover: Prover,
    /// Fingerprints of read items that the checkpoint lacks. They go there with the next record.
    pub(crate) marks: Marks,
    /// A separate buffer: a serde implementation that fails or panics half-way must not leave half a record.
    payload: Vec<u8>,
    is_full: bool,
    /// Whether this run has added anything.
    pub(crate) wrote: bool,
    /// The bytes of the results that this run found in the checkpoint and kept.
    pub(crate) kept_bytes: u64,
}

impl Recorder {
    pub(crate) fn new(log: Log, path: PathBuf, codec: Codec) -> Self {
        let (prover, marks) = (Prover::new(codec), Marks::default());
        Self { log, path, codec, prover, marks, payload: Vec::new(), is_full: false, wrote: false, kept_bytes: 0 }
    }

    /// Call it before an item starts: a complete checkpoint may be open for reading only.
    #[inline]
    pub(crate) fn must_take_more(&mut self) -> Result<(), TaskError> {
        self.log.must_take_more()
    }

    #[inline]
    pub(crate) fn result<I, R>(&mut self, ticket: &Ticket<I>, result: &R) -> Result<(), TaskError>
    where
        R: Serialize + DeserializeOwned,
    {
        begin_payload(&mut self.payload, ticket.key.as_deref());
        self.prover.encode(ticket.index, result, &mut self.payload)?;
        if self.payload.len() > MAX_PAYLOAD_BYTES {
            return Err(too_long::<R>(self.codec, ticket.index));
        }
        self.push(Kind::Result, ticket.index).map(drop)
    }

    /// Records that an item is about to be started and returns the number of that record.
    pub(crate) fn intent<I>(&mut self, ticket: &Ticket<I>) -> Result<u64, TaskError> {
        begin_payload(&mut self.payload, ticket.key.as_deref());
        self.push(Kind::Intent, ticket.index)
    }

    /// Records that an announced attempt did not take place, or does not count.
    pub(crate) fn withdraw<I>(&mut self, ticket: &Ticket<I>) -> Result<(), TaskError> {
        self.failure(ticket, ticket.attempts, "not started")
    }

    /// Records that an item has failed `attempts` times.
    pub(crate) fn failure<I>(&mut self, ticket: &Ticket<I>, attempts: u32, cause: &str) -> Result<(), TaskError> {
        self.failed(Kind::Failure, ticket, attempts, cause)
    }

    /// Records that an item has failed for good.
    pub(crate) fn quarantine<I>(&mut self, ticket: &Ticket<I>, cause: &str) -> Result<(), TaskError> {
        self.failed(Kind::Quarantine, ticket, ticket.attempts, cause)
    }

    fn failed<I>(&mut self, kind: Kind, ticket: &Ticket<I>, attempts: u32, cause: &str) -> Result<(), TaskError> {
        begin_payload(&mut self.payload, ticket.key.as_deref());
        put_failure(&mut self.payload, attempts, cause);
        self.push(kind, ticket.index).map(drop)
    }

    /// Gives the checkpoint a record and returns its number.
    #[inline]
    fn push(&mut self, kind: Kind, index: usize) -> Result<u64, TaskError> {
        if self.payload.len() > MAX_PAYLOAD_BYTES {
            // It can only be the key.
            return Err(too_long::<str>(self.codec, index));
        }
        self.wrote = true;
        match self.log.push(kind, index, &self.payload, &mut self.marks) {
            Ok(pushed) => {
                self.is_full = !pushed.has_room;
                Ok(pushed.number)
            }
            Err(Failed) => Err(self.store_failed()),
        }
    }

    /// Becomes ready when there is room for the record of one more item.
    #[inline]
    pub(crate) fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TaskError>> {
        if self.is_full {
            if ready!(self.log.poll_room(cx)).is_err() {
                return Poll::Ready(Err(self.store_failed()));
            }
            self.is_full = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Becomes ready once the record with this number is durable, and returns up to which number all are.
    pub(crate) fn poll_synced(&self, number: u64, cx: &mut Context<'_>) -> Poll<Result<u64, TaskError>> {
        self.log.poll_synced(number, cx).map_err(|Failed| self.store_failed())
    }

    /// Wakes the task if the store fails, if the disk is full, or as soon as there is room again. If the disk is full,
    /// returns when the next write is tried.
    pub(crate) fn watch(&mut self, cx: &mut Context<'_>) -> Result<Option<Instant>, TaskError> {
        match self.log.poll_room(cx) {
            Poll::Ready(Err(Failed)) => Err(self.store_failed()),
            Poll::Ready(Ok(())) => Ok(None),
            Poll::Pending => {
                self.is_full = true;
                Ok(self.log.full_until())
            }
        }
    }

    /// Keeps the file locked after the rest of the run is gone.
    pub(crate) fn keeper(&self) -> Keeper {
        self.log.keeper()
    }

    /// Asks the store to make everything durable, the seal last, and to unlock the file.
    pub(crate) fn stop(&self, seal: Option<Seal>) {
        self.log.stop(seal);
    }

    /// Becomes ready when that is done.
    pub(crate) fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.log.poll_closed(cx)
    }

    /// A placeholder until the store is closed and reports the real cause.
    fn store_failed(&self) -> TaskError {
        TaskError::io("write checkpoint", &self.path, io::Error::other("the store has failed"))
    }
}

#[cold]
fn too_long<T: ?Sized>(codec: Codec, index: usize) -> TaskError {
    TaskError::unwritten::<T>(codec, index, format!("it takes more than {MAX_PAYLOAD_BYTES} bytes").into())
}
