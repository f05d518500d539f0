//! How a transaction begins: in bounded time, and on a session that is in no transaction.
//!
//! Invariant: a transaction begins only after the database has confirmed that there was none before; a session without
//! that confirmation is closed. No caller waits longer than the pool's acquire timeout.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, timeout_at};

use crate::backend::{Backend, Mode};
use crate::drive::Driven;
use crate::open::Open;
use crate::outcome::OutcomeCell;
use crate::settings::FOREVER;
use crate::slot::{Shared, Slot};
use crate::work::Ticket;
use crate::{TransactionGuard, TxError};

/// Why a transaction could not begin on a session.
enum Refusal {
    /// It has not answered.
    Silent(Duration),
    /// It had ended without us.
    Dead(sqlx::Error),
    /// It is in a transaction of other code.
    Occupied(sqlx::Error),
    /// The user's hook rejected it.
    Rejected(sqlx::Error),
    /// The database refused to begin.
    Refused(sqlx::Error),
}

/// Begins within the acquire timeout, and no later than the deadline. A session that turns out to be unusable is
/// closed, and another one is taken.
pub(crate) async fn begin<DB: Backend>(
    shared: &Arc<Shared<DB>>,
    mode: Mode,
    deadline: Option<Instant>,
) -> Result<TransactionGuard<DB>, TxError> {
    let runtime = Handle::try_current().map_err(|_| TxError::NoRuntime)?;
    let start = Instant::now();
    let until = start + shared.limits.acquire_timeout.min(FOREVER);
    let until = deadline.map_or(until, |deadline| deadline.min(until));
    let limit = until.saturating_duration_since(start);
    // Each failure has closed a session. After this many, newly opened sessions are of no use either.
    let mut left = shared.limits.max_connections;
    loop {
        let slot = shared.acquire(until, limit).await?;
        let is_used = slot.is_used();
        let refusal = match begin_on(shared, &runtime, slot, mode, until).await? {
            Ok(guard) => return Ok(guard),
            Err(refusal) => refusal,
        };
        let again = match &refusal {
            // The sessions that are idle beside it have most likely died with it.
            Refusal::Silent(_) | Refusal::Dead(_) => {
                shared.forget_idle();
                is_used
            }
            Refusal::Occupied(_) | Refusal::Rejected(_) => true,
            Refusal::Refused(_) => false,
        };
        if !again || left == 0 || Instant::now() >= until {
            let target = DB::target(&shared.options());
            return Err(match refusal {
                Refusal::Silent(waited) => TxError::ConnectTimeout { target, timeout: limit.max(waited) },
                Refusal::Dead(error)
                | Refusal::Occupied(error)
                | Refusal::Rejected(error)
                | Refusal::Refused(error) => TxError::Database(error),
            });
        }
        left -= 1;
    }
}

/// This is shielded. It starts in the same poll in which the session was taken, so a caller that has gone while it
/// waited begins nothing.
async fn begin_on<DB: Backend>(
    shared: &Arc<Shared<DB>>,
    runtime: &Handle,
    mut slot: Slot<DB>,
    mode: Mode,
    until: Instant,
) -> Result<Result<TransactionGuard<DB>, Refusal>, TxError> {
    let ticket = Ticket::new(&shared.work, mode.name);
    // The ticket is counted before this check, so either this sees that the pool is closed, or closing it sees the
    // ticket.
    if shared.work.is_closed() {
        slot.pass_on();
        return Err(TxError::Closed);
    }
    let (shared, runtime, alone) = (Arc::clone(shared), runtime.clone(), shared.limits.settle_timeout);
    let begun = Driven::new(runtime.clone(), async move {
        let start = Instant::now();
        // A session that was opened just now has shown that it answers, and may take its time.
        let answer = start + shared.limits.begin_timeout.min(FOREVER);
        let answer = if slot.is_used() { until.min(answer) } else { until };
        let mut rejected = false;
        let begun = {
            let begin = async {
                slot.recognise(&shared.known).await?;
                let (conn, probe) = slot.parts();
                if let Some(before_begin) = &shared.upkeep.before_begin {
                    DB::count_none(conn, probe).await?;
                    rejected = true;
                    before_begin(conn).await?;
                    rejected = false;
                }
                DB::begin(conn, probe, &mode).await
            };
            match DB::IS_REMOTE {
                true => timeout_at(answer, begin).await.ok(),
                // It waits for its lock as long as its owner has configured.
                false => Some(begin.await),
            }
        };
        match begun {
            Some(Ok(())) => {}
            Some(Err(error)) if rejected => return Err(Refusal::Rejected(error)),
            Some(Err(error)) if is_dead(&error) => return Err(Refusal::Dead(error)),
            Some(Err(error)) if DB::is_occupied(&error) => return Err(Refusal::Occupied(error)),
            Some(Err(error)) => return Err(Refusal::Refused(error)),
            None => return Err(Refusal::Silent(start.elapsed())),
        }
        let outcome = OutcomeCell::new(Arc::clone(&shared.counters));
        let (hooks, commit_mode) = (Vec::new(), shared.commit_mode);
        Ok(TransactionGuard::hold(Open { slot, outcome, runtime, ticket, shared, hooks, commit_mode }))
    });
    Ok(begun.alone_for(alone).await)
}

/// Whether the session has ended without us. 57P is PostgreSQL's class for a server that ends its sessions; MySQL has
/// 08 for that, and 70100 for a killed session. An answer that does not fit BEGIN belongs to something else on the
/// session, and cannot be interpreted any more.
fn is_dead(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::Protocol(_) | sqlx::Error::BeginFailed => true,
        sqlx::Error::Database(error) => {
            error.code().is_some_and(|code| code.starts_with("57P") || code.starts_with("08") || code == "70100")
        }
        _ => false,
    }
}
