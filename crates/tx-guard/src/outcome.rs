//! How a transaction ended, and the handle that reports it.
//!
//! Invariant: every transaction gets exactly one outcome, and its handle always learns it, because the drop of the
//! transaction's owner sends it, whatever path led there.

use std::fmt;
use std::sync::Arc;

use tokio::sync::watch;

use crate::metrics::Counters;

/// How a transaction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CommitOutcome {
    /// The database has confirmed the commit.
    Committed,
    /// The transaction was rolled back: on request, by a drop, or by the database.
    RolledBack,
    /// COMMIT was sent, and the connection or the runtime ended before its answer came.
    Unknown,
}

/// Reports how a transaction ended, even if its `commit()` was dropped.
///
/// Take it with [`TransactionGuard::outcome_handle`](crate::TransactionGuard::outcome_handle) before the commit, or
/// find it in [`CommitError::Pending`](crate::CommitError::Pending). Clones report the same.
#[derive(Clone)]
pub struct OutcomeHandle {
    receiver: watch::Receiver<Option<CommitOutcome>>,
}

impl OutcomeHandle {
    /// Waits until the transaction has ended, and returns how.
    ///
    /// The wait lasts as long as the transaction does. To bound it, put a timeout around it.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, nothing is lost: a later call returns the same answer.
    pub async fn outcome(&self) -> CommitOutcome {
        let mut receiver = self.receiver.clone();
        match receiver.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.unwrap_or(CommitOutcome::Unknown),
            // The sender always sends before it is dropped; if it sent nothing, the outcome is in doubt.
            Err(_) => CommitOutcome::Unknown,
        }
    }

    /// Returns the outcome, if the transaction has already ended.
    #[must_use]
    pub fn try_outcome(&self) -> Option<CommitOutcome> {
        *self.receiver.borrow()
    }
}

impl fmt::Debug for OutcomeHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OutcomeHandle").field("outcome", &self.try_outcome()).finish()
    }
}

/// The sending half: sends when it is dropped.
pub(crate) struct OutcomeCell {
    sender: watch::Sender<Option<CommitOutcome>>,
    /// The outcome that would be true if nothing more happened.
    standing: CommitOutcome,
    counters: Arc<Counters>,
}

impl OutcomeCell {
    pub(crate) fn new(counters: Arc<Counters>) -> Self {
        Self { sender: watch::Sender::new(None), standing: CommitOutcome::RolledBack, counters }
    }

    pub(crate) fn handle(&self) -> OutcomeHandle {
        OutcomeHandle { receiver: self.sender.subscribe() }
    }

    pub(crate) fn stands(&mut self, outcome: CommitOutcome) {
        self.standing = outcome;
    }

    /// Reports the outcome before the drop.
    pub(crate) fn announce(&mut self, outcome: CommitOutcome) {
        self.standing = outcome;
        self.sender.send_replace(Some(outcome));
    }
}

impl Drop for OutcomeCell {
    fn drop(&mut self) {
        self.counters.ended(match self.standing {
            CommitOutcome::Committed => Some(true),
            CommitOutcome::RolledBack => Some(false),
            CommitOutcome::Unknown => None,
        });
        self.sender.send_replace(Some(self.standing));
    }
}
