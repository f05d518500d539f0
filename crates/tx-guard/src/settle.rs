//! What happens to a transaction after its caller has gone.
//!
//! Invariant: a connection is released only after a rollback that began when nothing ran on it any more and no cancel
//! was on its way to it: that rollback is the clean round trip that keeps a late cancel off the next transaction.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, select};
use tokio::time::timeout;

use crate::TxError;
use crate::backend::{Backend, Cancels, Rollback, Wanted};
use crate::events::TxEvent;
use crate::open::Open;
use crate::outcome::CommitOutcome;
use crate::slot::Shared;
use crate::watch::{SETTLE_PATIENCE, Seen, Watch, unless_stuck};
use crate::work::Tag;

/// How long a statement may continue after its transaction was dropped before it is cancelled. Most are about to end.
const DRAIN_GRACE: Duration = Duration::from_millis(1);

/// How many errors of abandoned statements are skipped before a connection is given up.
const QUIET_ATTEMPTS: usize = 16;

/// The reason if there was no transaction any more.
pub(crate) const ENDED_BEFORE: &str = "its SQL, or the database itself, had ended the transaction already";

/// Ends a transaction whose statement may still run: a moment to finish, then a cancel from outside, then the rollback.
/// After the settle timeout the session is terminated, which may take the same time again.
///
/// # Errors
///
/// [`TxError::Database`]: the connection failed and was closed; the server rolls back what it had. [`TxError::Lost`]:
/// there was nothing to be rolled back any more. [`TxError::Unconfirmed`]: the server has not answered in time, and the
/// connection was closed.
pub(crate) async fn settle<DB: Backend>(mut open: Open<DB>) -> Result<(), TxError> {
    open.ticket.settling();
    let shared = Arc::clone(&open.shared);
    let tag = open.ticket.tag;
    let (conn, probe) = open.slot.parts();
    let ended_before = DB::may_have_committed(conn);
    if ended_before {
        open.outcome.stands(CommitOutcome::Unknown);
    }
    let limit = shared.limits.settle_timeout;
    let unconfirmed = || TxError::Unconfirmed { target: DB::target(&shared.options()), waited: limit };
    let ended = match timeout(limit, come_to_rest::<DB>(&shared, conn, probe, tag)).await {
        Ok(Ok((found, rest))) => {
            if found == Rollback::TooLate {
                open.outcome.stands(CommitOutcome::Unknown);
            }
            match rest {
                Rest::Clean => open.release().await,
                // It is rolled back, but must not be used again: the drop closes it.
                Rest::Doubtful => drop(open),
            }
            Ok(found)
        }
        // A lost connection has ended its session, or will as soon as the server notices.
        Ok(Err(Unrest::Failed(error @ sqlx::Error::Io(_)))) => Err(TxError::Database(error)),
        Ok(Err(Unrest::Failed(error))) => {
            terminate(&mut open).await;
            Err(TxError::Database(error))
        }
        // The session can be neither cancelled nor terminated. While a statement runs, the server checks whether its
        // client has gone, so the sooner the connection is closed, the sooner its locks are free.
        Ok(Err(Unrest::Unreachable)) => {
            shared.teller.tell(TxEvent::SessionTerminated, open.ticket.tag);
            Err(unconfirmed())
        }
        Ok(Err(Unrest::Stuck)) | Err(_) => match terminate(&mut open).await {
            true => Ok(Rollback::Done),
            false => Err(unconfirmed()),
        },
    };
    match ended {
        // The end of the session has rolled back what was open, but not what was committed before.
        _ if ended_before => Err(TxError::Lost { reason: ENDED_BEFORE }),
        Ok(Rollback::Done) => Ok(()),
        Ok(Rollback::TooLate) => Err(TxError::Lost { reason: ENDED_BEFORE }),
        Err(error) => Err(error),
    }
}

/// How a session came to rest.
enum Rest {
    /// Rolled back, idle, and beyond the reach of any cancel.
    Clean,
    /// Rolled back, but a cancel may still be on its way to it.
    Doubtful,
}

/// Why a session did not come to rest.
enum Unrest {
    Failed(sqlx::Error),
    /// The server waits for the client and the client for the server.
    Stuck,
    /// A statement runs, and there is no way to cancel it.
    Unreachable,
}

impl From<sqlx::Error> for Unrest {
    fn from(error: sqlx::Error) -> Self {
        Self::Failed(error)
    }
}

async fn come_to_rest<DB: Backend>(
    shared: &Arc<Shared<DB>>,
    conn: &mut DB::Connection,
    probe: &DB::Probe,
    tag: Tag,
) -> Result<(Rollback, Rest), Unrest> {
    let rest = come_to_quiet(shared, conn, probe, tag).await?;
    match unless_stuck(shared, probe, SETTLE_PATIENCE, DB::rollback(conn, probe)).await {
        Some(found) => Ok((found?, rest)),
        None => Err(Unrest::Stuck),
    }
}

/// Waits in the same way for a statement outside a transaction. Returns false if the session must not be used again.
pub(crate) async fn is_quiet<DB: Backend>(
    shared: &Arc<Shared<DB>>,
    conn: &mut DB::Connection,
    probe: &DB::Probe,
    tag: Tag,
) -> bool {
    matches!(come_to_quiet(shared, conn, probe, tag).await, Ok(Rest::Clean))
}

/// Waits until nothing runs any more, and cancels a statement that takes too long. An idle connection is quiet at the
/// first poll, so nothing is ever sent for it.
async fn come_to_quiet<DB: Backend>(
    shared: &Arc<Shared<DB>>,
    conn: &mut DB::Connection,
    probe: &DB::Probe,
    tag: Tag,
) -> Result<Rest, Unrest> {
    // The watch comes first, because the wait may not return from its first poll before the last row is read.
    let mut watch = Watch::over(shared, probe, tag);
    let mut left = pin!(quiet::<DB>(conn, probe));
    watch.begins();
    match timeout(DRAIN_GRACE, left.as_mut()).await {
        Ok(quiet) => quiet?,
        Err(_) => {
            watch.is_overdue();
            match select(left, &mut watch.seen).await {
                Either::Left((quiet, _)) => quiet?,
                Either::Right((Ok(Seen::Stuck), _)) => return Err(Unrest::Stuck),
                Either::Right((Ok(Seen::Unreachable), _)) => return Err(Unrest::Unreachable),
                // Another cancel could only add to the doubt.
                Either::Right((_, left)) => {
                    left.await?;
                    return Ok(Rest::Doubtful);
                }
            }
        }
    }
    match watch.end().await {
        // A statement that could not be cancelled has ended by itself.
        Seen::Settled | Seen::Unreachable | Seen::Stuck => Ok(Rest::Clean),
        Seen::Unanswered => Ok(Rest::Doubtful),
    }
}

/// Skips the answers to abandoned statements, each of which may be an error.
async fn quiet<DB: Backend>(conn: &mut DB::Connection, probe: &DB::Probe) -> Result<(), sqlx::Error> {
    for _ in 0..QUIET_ATTEMPTS {
        match DB::quiet(conn, probe).await {
            Err(sqlx::Error::Database(_)) => {}
            read => return read,
        }
    }
    Err(sqlx::Error::Protocol("the connection does not come to rest".into()))
}

/// Ends the session from outside, and returns whether the server has acknowledged that. If not, the server finds out by
/// itself that the client has closed.
async fn terminate<DB: Backend>(open: &mut Open<DB>) -> bool {
    let shared = Arc::clone(&open.shared);
    shared.teller.tell(TxEvent::SessionTerminated, open.ticket.tag);
    let (_, probe) = open.slot.parts();
    let options = shared.options();
    let terminated = shared.canceller.signal(&options, Wanted::Terminate, probe);
    matches!(timeout(shared.limits.settle_timeout, terminated).await, Ok(Ok(_)))
}

/// Rolls back the empty transaction that a verified commit leaves behind. Nothing runs in it that could be cancelled.
pub(crate) async fn clear<DB: Backend>(mut open: Open<DB>) {
    let limit = open.shared.limits.settle_timeout;
    let (conn, probe) = open.slot.parts();
    if let Ok(Ok(_)) = timeout(limit, DB::rollback(conn, probe)).await {
        open.release().await;
    }
}
