//! Events: what happens behind the callers' backs, for listeners.
//!
//! Invariant: sending an event never waits. A listener that is too slow misses events and learns how many.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::metrics::{Counters, up};
use crate::work::Tag;
use crate::{CommitOutcome, TxError};

/// How many events a listener may lag behind before it misses some.
const BACKLOG: usize = 256;

/// Something the pool did after a caller had gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TxEvent {
    /// A guard was dropped without a commit or a rollback; its transaction is being rolled back.
    ImplicitRollback,
    /// A transaction that was dropped or rolled back did not end at once, so what was still running in it was
    /// cancelled.
    CancelSent,
    /// A session did not come to rest in time, and was ended.
    SessionTerminated,
    /// A commit whose caller had gone ended this way.
    LateOutcome(CommitOutcome),
    /// The listener was too slow and missed this many events.
    Missed(u64),
}

/// An event, and the transaction that it is about. From [`TxEvents::record`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct TxRecord {
    /// What happened.
    pub event: TxEvent,
    /// The number of the transaction, or of the query outside one, in this process. Zero for [`TxEvent::Missed`].
    pub transaction: u64,
    /// Its name, given by its owner: see [`Tx::named`](crate::Tx::named).
    pub name: Option<&'static str>,
    /// How long after its `begin` it happened.
    pub after: Duration,
}

/// A listener. From [`TxPool::events`](crate::TxPool::events).
#[derive(Debug)]
pub struct TxEvents(broadcast::Receiver<TxRecord>);

impl TxEvents {
    /// Returns the next event, or `None` when the pool and all its guards are gone.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, no event is lost.
    pub async fn next(&mut self) -> Option<TxEvent> {
        self.record().await.map(|record| record.event)
    }

    /// Returns the same, with the transaction that it is about.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, no event is lost.
    pub async fn record(&mut self) -> Option<TxRecord> {
        match self.0.recv().await {
            Ok(record) => Some(record),
            Err(RecvError::Lagged(missed)) => {
                let event = TxEvent::Missed(missed);
                Some(TxRecord { event, transaction: 0, name: None, after: Duration::ZERO })
            }
            Err(RecvError::Closed) => None,
        }
    }
}

/// The sending half.
#[derive(Debug)]
pub(crate) struct Teller {
    listeners: broadcast::Sender<TxRecord>,
    counters: Arc<Counters>,
}

impl Teller {
    pub(crate) fn new(counters: Arc<Counters>) -> Self {
        Self { listeners: broadcast::Sender::new(BACKLOG), counters }
    }

    pub(crate) fn listen(&self) -> TxEvents {
        TxEvents(self.listeners.subscribe())
    }

    pub(crate) fn tell(&self, event: TxEvent, about: Tag) {
        match event {
            TxEvent::CancelSent => up(&self.counters.cancels),
            TxEvent::SessionTerminated => up(&self.counters.terminated),
            _ => {}
        }
        let Tag { id: transaction, name, begun } = about;
        let after = begun.elapsed();
        #[cfg(feature = "tracing")]
        match event {
            TxEvent::SessionTerminated | TxEvent::LateOutcome(CommitOutcome::Unknown) => {
                tracing::warn!(?event, transaction, name, ?after, "transaction");
            }
            _ => tracing::debug!(?event, transaction, name, ?after, "transaction"),
        }
        // This fails if nobody listens, which does not matter.
        drop(self.listeners.send(TxRecord { event, transaction, name, after }));
    }

    /// Reports how a commit ended whose caller had gone. Its error is logged, because nothing else receives it.
    pub(crate) fn tell_late(&self, outcome: CommitOutcome, error: Option<&TxError>, about: Tag) {
        #[cfg(feature = "tracing")]
        if let Some(error) = error {
            let Tag { id: transaction, name, .. } = about;
            let error = error as &dyn std::error::Error;
            tracing::warn!(error, ?outcome, transaction, name, "a commit whose caller had gone failed");
        }
        #[cfg(not(feature = "tracing"))]
        let _ = error;
        self.tell(TxEvent::LateOutcome(outcome), about);
    }
}
