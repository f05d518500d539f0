//! What happens behind the callers' backs, told to whoever wants to know.
//!
//! Invariant: telling never waits. A listener that is too slow misses events and is told how many.

use std::sync::Arc;

use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::metrics::{Counters, up};
use crate::{CommitOutcome, TxError};

/// How many events a listener may be behind before it misses some.
const BACKLOG: usize = 256;

/// Something the pool did after a caller had gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TxEvent {
    /// A guard was dropped without a commit or a rollback; its transaction is being rolled back.
    ImplicitRollback,
    /// A transaction that was dropped or rolled back did not end at once, so what still ran in it was cancelled.
    CancelSent,
    /// A session did not come to rest, or not in time, and was ended.
    SessionTerminated,
    /// A commit whose caller had gone ended so.
    LateOutcome(CommitOutcome),
    /// The listener was too slow for so many events.
    Missed(u64),
}

/// A listener. From [`TxPool::events`](crate::TxPool::events).
#[derive(Debug)]
pub struct TxEvents(broadcast::Receiver<TxEvent>);

impl TxEvents {
    /// The next event, or `None` when the pool and all its guards are gone.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, no event is lost.
    pub async fn next(&mut self) -> Option<TxEvent> {
        match self.0.recv().await {
            Ok(event) => Some(event),
            Err(RecvError::Lagged(missed)) => Some(TxEvent::Missed(missed)),
            Err(RecvError::Closed) => None,
        }
    }
}

/// The telling half.
#[derive(Debug)]
pub(crate) struct Teller {
    listeners: broadcast::Sender<TxEvent>,
    counters: Arc<Counters>,
}

impl Teller {
    pub(crate) fn new(counters: Arc<Counters>) -> Self {
        Self { listeners: broadcast::Sender::new(BACKLOG), counters }
    }

    pub(crate) fn listen(&self) -> TxEvents {
        TxEvents(self.listeners.subscribe())
    }

    pub(crate) fn tell(&self, event: TxEvent) {
        match event {
            TxEvent::CancelSent => up(&self.counters.cancels),
            TxEvent::SessionTerminated => up(&self.counters.terminated),
            _ => {}
        }
        #[cfg(feature = "tracing")]
        match event {
            TxEvent::SessionTerminated | TxEvent::LateOutcome(CommitOutcome::Unknown) => {
                tracing::warn!(?event, "transaction");
            }
            _ => tracing::debug!(?event, "transaction"),
        }
        // Fails when nobody listens, which is no failure.
        drop(self.listeners.send(event));
    }

    /// Tells how a commit ended whose caller had gone. Its error is logged, because nobody else is told of it.
    pub(crate) fn tell_late(&self, outcome: CommitOutcome, error: Option<&TxError>) {
        #[cfg(feature = "tracing")]
        if let Some(error) = error {
            tracing::warn!(error = error as &dyn std::error::Error, ?outcome, "a commit whose caller had gone failed");
        }
        #[cfg(not(feature = "tracing"))]
        let _ = error;
        self.tell(TxEvent::LateOutcome(outcome));
    }
}
