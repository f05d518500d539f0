//! A session for queries without a transaction.
//!
//! Invariant: it returns to its pool only when nothing runs on it any more and no cancel can reach it; otherwise it is
//! closed.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use sqlx::Connection;
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout, timeout_at};

use crate::backend::{Backend, Cancels, Wanted, depth};
use crate::events::TxEvent;
use crate::settings::FOREVER;
use crate::settle;
use crate::slot::{Shared, Slot};
use crate::work::Ticket;
use crate::{TxError, TxPool};

/// A session that was used within this time is not checked for being alive.
const FRESH: Duration = Duration::from_secs(1);

/// A session of a pool for reads without a transaction. From [`TxPool::reader`].
///
/// It dereferences to the connection, so `&mut *reader` runs sqlx queries. Dropping it, even while a query runs,
/// cancels the query on the server and returns the session to its pool.
///
/// # Limitations
///
/// - The crate's own pools refuse a write: PostgreSQL and MySQL because the session is read-only, SQLite when the write
///   would be committed. SQL that begins its own transaction escapes that.
/// - On a wrapped pool of PostgreSQL or MySQL the session is the user's own, and a write is committed as with plain
///   sqlx. SQLite refuses it there, too.
/// - Behind a [`PoolerMode::Transaction`](crate::PoolerMode) a write is not refused either, and a dropped query is not
///   cancelled: its connection is closed.
#[must_use = "a reader that is dropped at once has read nothing"]
pub struct Reader<DB: Backend> {
    /// Taken only by the drop.
    slot: Option<Slot<DB>>,
    shared: Arc<Shared<DB>>,
    ticket: Arc<Ticket>,
    runtime: Handle,
}

/// The proof behind the `expect`s below.
const HELD: &str = "the session is taken only by the drop";

impl<DB: Backend> TxPool<DB> {
    /// Takes a session for reads that need no transaction, which saves `BEGIN` and `COMMIT`.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, what was opened is kept for others.
    ///
    /// # Errors
    ///
    /// Same as [`begin`](Self::begin).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// # use cancel_safe_tx_guard::TxPool;
    /// let db = TxPool::<sqlx::Sqlite>::connect("sqlite::memory:").await?;
    /// let mut reader = db.reader().await?;
    /// let two: i64 = sqlx::query_scalar("SELECT 1 + 1").fetch_one(&mut *reader).await?;
    /// assert_eq!(two, 2);
    /// # Ok::<(), cancel_safe_tx_guard::TxError>(())
    /// # }).unwrap();
    /// # }
    /// ```
    pub async fn reader(&self) -> Result<Reader<DB>, TxError> {
        let runtime = Handle::try_current().map_err(|_| TxError::NoRuntime)?;
        let shared = self.shared();
        let limit = shared.limits.acquire_timeout.min(FOREVER);
        let until = Instant::now() + limit;
        // As with `begin`: each failure has closed a session.
        let mut left = shared.limits.max_connections;
        loop {
            let mut slot = shared.acquire(until, limit).await?;
            let ticket = Ticket::new(&shared.work, None);
            // The ticket is counted before this check, so either this sees that the pool is closed, or closing it sees
            // the ticket.
            if shared.work.is_closed() {
                slot.pass_on();
                return Err(TxError::Closed);
            }
            let answer = until.min(Instant::now() + shared.limits.begin_timeout.min(FOREVER));
            let recognised = timeout_at(answer, slot.recognise(&shared.known)).await;
            let (shared, runtime) = (Arc::clone(shared), runtime.clone());
            let mut reader = Reader { slot: Some(slot), shared, ticket, runtime };
            let is_recognised = matches!(recognised, Ok(Ok(())));
            if is_recognised && matches!(timeout_at(answer, reader.make_ready()).await, Ok(Ok(()))) {
                return Ok(reader);
            }
            // Dropping it closes it.
            drop(reader.slot.take());
            if left == 0 || Instant::now() >= until {
                let target = DB::target(&self.shared().options());
                return Err(TxError::ConnectTimeout { target, timeout: limit });
            }
            left -= 1;
        }
    }
}

impl<DB: Backend> Reader<DB> {
    fn slot(&self) -> &Slot<DB> {
        self.slot.as_ref().expect(HELD)
    }

    /// Prepares the session, and checks that it answers unless it was used just now.
    async fn make_ready(&mut self) -> Result<(), sqlx::Error> {
        let (conn, probe) = self.parts();
        let has_answered = DB::count_none(conn, probe).await?;
        if !has_answered && self.slot().is_used_before(FRESH) {
            self.parts().0.ping().await?;
        }
        DB::begin_read(self.parts().1);
        Ok(())
    }

    fn parts(&mut self) -> (&mut DB::Connection, &DB::Probe) {
        self.slot.as_mut().expect(HELD).parts()
    }
}

impl<DB: Backend> Deref for Reader<DB> {
    type Target = DB::Connection;

    fn deref(&self) -> &DB::Connection {
        self.slot().connection()
    }
}

impl<DB: Backend> DerefMut for Reader<DB> {
    fn deref_mut(&mut self) -> &mut DB::Connection {
        self.parts().0
    }
}

impl<DB: Backend> Drop for Reader<DB> {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            let (shared, ticket) = (Arc::clone(&self.shared), Arc::clone(&self.ticket));
            ticket.settling();
            // A runtime that has shut down drops the task at once, and the connection is closed.
            drop(self.runtime.spawn(finish(slot, shared, ticket)));
        }
    }
}

impl<DB: Backend> fmt::Debug for Reader<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").finish_non_exhaustive()
    }
}

/// Cancels a running statement, and gives the session back or closes it.
async fn finish<DB: Backend>(mut slot: Slot<DB>, shared: Arc<Shared<DB>>, ticket: Arc<Ticket>) {
    let (conn, probe) = slot.parts();
    let ends = async {
        // A session in a transaction that nobody holds is of no use.
        depth::<DB>(conn) == 0
            && settle::is_quiet::<DB>(&shared, conn, probe, ticket.tag).await
            && DB::end_read(conn, probe).await.is_ok()
    };
    let limit = shared.limits.settle_timeout;
    if let Ok(true) = timeout(limit, ends).await {
        slot.release(shared.work.is_closed()).await;
    } else {
        shared.teller.tell(TxEvent::SessionTerminated, ticket.tag);
        let (_, probe) = slot.parts();
        let options = shared.options();
        let terminated = shared.canceller.signal(&options, Wanted::Terminate, probe);
        // If the session cannot be ended from outside, the server ends it when it sees that its client has gone.
        drop(timeout(limit, terminated).await);
    }
    // Until here, closing the pool waits.
    drop(ticket);
}
