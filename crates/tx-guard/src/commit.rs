//! The commit: sent once, proved, and driven to its end.
//!
//! Invariant: it returns `Ok` only after the database has confirmed, and "failed" only if nothing can have been
//! committed. Everything between is unknown.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use crate::TxError;
use crate::backend::{Backend, CommitFailure, Receipt};
use crate::open::{Hook, Open};
use crate::outcome::CommitOutcome;
use crate::settle::{self, ENDED_BEFORE};
use crate::watch::{OUT_OF_STEP, Patience, unless_stuck};

/// Commits, and returns when the outcome is known. Runs shielded.
pub(crate) async fn commit<DB: Backend>(mut open: Open<DB>, doomed: Option<&'static str>) -> Result<(), TxError> {
    let (conn, probe) = open.slot.parts();
    let lost = doomed.or_else(|| DB::is_lost(conn, probe).then_some("a nested begin was cancelled inside the guard"));
    if let Some(reason) = lost {
        // The error of the rollback adds nothing: its connection is closed, which rolls back as well.
        drop(settle::settle(open).await);
        return Err(TxError::Lost { reason });
    }
    let shared = Arc::clone(&open.shared);
    let failed = match unless_stuck(
        &shared,
        probe,
        Patience::caller(shared.limits.catch_up_timeout),
        DB::catch_up(conn),
    )
    .await
    {
        Some(Ok(())) => None,
        Some(Err(error)) => Some(TxError::Database(error)),
        None => Some(TxError::Lost { reason: OUT_OF_STEP }),
    };
    if let Some(error) = failed {
        drop(settle::settle(open).await);
        return Err(error);
    }
    // From here until the answer, a drop by the runtime's shutdown leaves the outcome in doubt.
    open.outcome.stands(CommitOutcome::Unknown);
    let commit = DB::commit(conn, probe, open.commit_mode);
    let answer = unless_stuck(&shared, probe, Patience::caller(shared.limits.answer_timeout), commit).await;
    let stuck = || Err(CommitFailure::Unknown(sqlx::Error::Protocol(OUT_OF_STEP.into())));
    let failure = match answer.unwrap_or_else(stuck) {
        Ok(()) => {
            open.outcome.announce(CommitOutcome::Committed);
            let hooks = std::mem::take(&mut open.hooks);
            let (conn, probe) = open.slot.parts();
            if DB::is_nothing_due(conn, probe) {
                open.release_answered().await;
            } else {
                // No caller has to wait for the empty transaction behind the commit.
                let runtime = open.runtime.clone();
                drop(runtime.spawn(settle::clear(open)));
            }
            run_hooks(hooks);
            return Ok(());
        }
        Err(failure) => failure,
    };
    let error = match failure {
        // The connection is in doubt as well, so dropping `open` closes it.
        CommitFailure::Unknown(source) => return Err(TxError::Unknown { source }),
        CommitFailure::Resolvable(source, receipt) => return resolve(open, source, &receipt).await,
        CommitFailure::Ended => {
            drop(settle::settle(open).await);
            return Err(TxError::Lost { reason: ENDED_BEFORE });
        }
        CommitFailure::Aborted(source) => TxError::Aborted { source },
        CommitFailure::Lost(reason) => TxError::Lost { reason },
        CommitFailure::Refused(source) => TxError::Database(source),
    };
    open.outcome.stands(CommitOutcome::RolledBack);
    drop(settle::settle(open).await);
    Err(error)
}

/// Asks on another connection how a commit ended whose own connection was lost. The drop of `open` closes that one.
async fn resolve<DB: Backend>(mut open: Open<DB>, source: sqlx::Error, receipt: &Receipt) -> Result<(), TxError> {
    let shared = Arc::clone(&open.shared);
    let (_, probe) = open.slot.parts();
    match DB::resolve(&shared.canceller, &shared.options(), probe, receipt, shared.limits.resolve_timeout).await {
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

/// Runs all hooks in the order in which they were added. If one panics, the panic resumes after all have run.
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
