//! Commit and how it ended.
//!
//! Invariant: every transaction gets exactly one outcome, and its handle always learns it: the outcome is sent
//! by the drop of what carries the transaction, whatever path led there.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use tokio::sync::watch;

use crate::TxError;
use crate::backend::{Backend, CommitFailure, Receipt, depth};
use crate::reaper::{self, Hook, Open};

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

/// Tells how a transaction ended, even if its `commit()` was dropped.
///
/// Taken with [`TransactionGuard::outcome_handle`](crate::TransactionGuard::outcome_handle) before the commit, or
/// found in [`CommitError::Pending`](crate::CommitError::Pending). Clones tell the same.
#[derive(Clone)]
pub struct OutcomeHandle {
    receiver: watch::Receiver<Option<CommitOutcome>>,
}

impl OutcomeHandle {
    /// Waits until the transaction has ended and says how.
    ///
    /// The wait lasts as long as the transaction does; put a timeout around it to bound it.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, nothing is lost: a later call gives the same answer.
    pub async fn outcome(&self) -> CommitOutcome {
        let mut receiver = self.receiver.clone();
        match receiver.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.unwrap_or(CommitOutcome::Unknown),
            // The sender always sends before it is dropped; a value it did not send is in doubt.
            Err(_) => CommitOutcome::Unknown,
        }
    }

    /// The outcome, if the transaction has ended already.
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
    /// What would be true if nothing more happened.
    standing: CommitOutcome,
}

impl OutcomeCell {
    pub(crate) fn new() -> Self {
        Self { sender: watch::Sender::new(None), standing: CommitOutcome::RolledBack }
    }

    pub(crate) fn handle(&self) -> OutcomeHandle {
        OutcomeHandle { receiver: self.sender.subscribe() }
    }

    pub(crate) fn stands(&mut self, outcome: CommitOutcome) {
        self.standing = outcome;
    }

    /// Tells the outcome ahead of the drop.
    fn announce(&mut self, outcome: CommitOutcome) {
        self.standing = outcome;
        self.sender.send_replace(Some(outcome));
    }
}

impl Drop for OutcomeCell {
    fn drop(&mut self) {
        self.sender.send_replace(Some(self.standing));
    }
}

/// Commits, and comes back when the outcome is known. Runs shielded.
pub(crate) async fn commit<DB: Backend>(mut open: Open<DB>, doomed: Option<&'static str>) -> Result<(), TxError> {
    let (conn, probe) = open.slot.parts();
    let lost = doomed.or_else(|| DB::is_lost(conn, probe).then_some("a nested begin was cancelled inside the guard"));
    if let Some(reason) = lost {
        // The error of the rollback adds nothing: its connection is closed, which rolls back as well.
        drop(reaper::settle(open).await);
        return Err(TxError::Lost { reason });
    }
    let shared = Arc::clone(&open.shared);
    let failed = match reaper::unless_stuck(&shared, probe, reaper::CATCH_UP_LIMIT, DB::catch_up(conn)).await {
        Some(Ok(())) => None,
        Some(Err(error)) => Some(TxError::Database(error)),
        None => Some(TxError::Lost { reason: reaper::OUT_OF_STEP }),
    };
    if let Some(error) = failed {
        drop(reaper::settle(open).await);
        return Err(error);
    }
    // From here to the answer a drop by the runtime's shutdown leaves the outcome in doubt.
    open.outcome.stands(CommitOutcome::Unknown);
    let commit = DB::commit(conn, probe, open.commit_mode);
    let answer = reaper::unless_stuck(&shared, probe, reaper::ANSWER_LIMIT, commit).await;
    let stuck = || Err(CommitFailure::Unknown(sqlx::Error::Protocol(reaper::OUT_OF_STEP.into())));
    let failure = match answer.unwrap_or_else(stuck) {
        Ok(()) => {
            open.outcome.announce(CommitOutcome::Committed);
            let hooks = std::mem::take(&mut open.hooks);
            if depth::<DB>(open.slot.parts().0) == 0 {
                open.release_answered().await;
            } else {
                // The empty transaction behind the commit is nobody's to wait for.
                let runtime = open.runtime.clone();
                drop(runtime.spawn(reaper::clear(open)));
            }
            run_hooks(hooks);
            return Ok(());
        }
        Err(failure) => failure,
    };
    let error = match failure {
        // The connection is in doubt as well, so it is closed by the drop of `open`.
        CommitFailure::Unknown(source) => return Err(TxError::Unknown { source }),
        CommitFailure::Resolvable(source, receipt) => return resolve(open, source, &receipt).await,
        CommitFailure::Ended => {
            drop(reaper::settle(open).await);
            return Err(TxError::Lost { reason: reaper::ENDED_BEFORE });
        }
        CommitFailure::Aborted(source) => TxError::Aborted { source },
        CommitFailure::Lost(reason) => TxError::Lost { reason },
        CommitFailure::Refused(source) => TxError::Database(source),
    };
    open.outcome.stands(CommitOutcome::RolledBack);
    drop(reaper::settle(open).await);
    Err(error)
}

/// Asks on another connection how a commit ended whose own connection was lost, and is closed by the drop of `open`.
async fn resolve<DB: Backend>(mut open: Open<DB>, source: sqlx::Error, receipt: &Receipt) -> Result<(), TxError> {
    let shared = Arc::clone(&open.shared);
    let (_, probe) = open.slot.parts();
    match DB::resolve(&shared.canceller, &shared.options, probe, receipt).await {
        Some(true) => {
            open.outcome.announce(CommitOutcome::Committed);
            let hooks = std::mem::take(&mut open.hooks);
            drop(open);
            run_hooks(hooks);
            Ok(())
        }
        Some(false) => {
            open.outcome.stands(CommitOutcome::RolledBack);
            Err(TxError::Database(source))
        }
        None => Err(TxError::Unknown { source }),
    }
}

/// Runs them all, in the order in which they were given. A panic of one goes on when all have run.
fn run_hooks(hooks: Vec<Hook>) {
    let mut panicked = None;
    for hook in hooks {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(hook)) {
            panicked.get_or_insert(panic);
        }
    }
    if let Some(panic) = panicked {
        resume_unwind(panic);
    }
}
