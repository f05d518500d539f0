//! The guard: a transaction that cannot outlive its owner.
//!
//! Invariant: a guard that is dropped before `commit` was polled never commits, wherever and however it is dropped.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use crate::backend::Backend;
use crate::boxed::{BoxedWork, TxRef};
use crate::commit;
use crate::deadline::Deadline;
use crate::drive::{self, Driven};
use crate::events::TxEvent;
use crate::open::Open;
use crate::pool::PoolSource;
use crate::settle;
use crate::watch::{OUT_OF_STEP, Patience, unless_stuck};
use crate::{CommitError, CommitMode, CommitOutcome, OutcomeHandle, TxError};

/// A transaction that is rolled back at once when it is dropped, even while a statement runs.
///
/// It dereferences to the connection, so `&mut *tx` runs sqlx statements. Dropping it cancels the statement that is
/// still running on the server, rolls back, and returns the connection to its pool, all without the caller.
///
/// # Comparison with `sqlx::Transaction`
///
/// Dropping a `sqlx::Transaction` only queues a `ROLLBACK` behind whatever still runs; its row locks stay until then.
/// It offers no outcome, its `commit` returns `Ok` even if PostgreSQL has rolled back, and its type has a lifetime. A
/// guard has no lifetime and can be sent to any task.
#[must_use = "a guard that is dropped at once rolls its transaction back at once"]
pub struct TransactionGuard<DB: Backend> {
    /// Taken only by the methods that consume the guard, and by its drop.
    open: Option<Open<DB>>,
    doomed: Option<&'static str>,
    /// How many savepoints have been set and not ended. A dropped savepoint is never ended.
    savepoints: usize,
    /// After this, nothing is committed.
    deadline: Option<Deadline>,
}

/// A savepoint, and how many hooks there were when it was set.
struct Savepoint {
    level: usize,
    hooks: usize,
}

/// The proof behind the `expect`s below.
const HELD: &str = "the transaction is taken only by methods that consume the guard";

const SAVEPOINT_DROPPED: &str = "a savepoint was dropped, or failed, halfway";

impl<DB: Backend> TransactionGuard<DB> {
    pub(crate) fn hold(open: Open<DB>) -> Self {
        Self { open: Some(open), doomed: None, savepoints: 0, deadline: None }
    }

    /// Begins a transaction on `pool`. On a [`TxPool`](crate::TxPool) this is the same as
    /// [`begin`](crate::TxPool::begin); an `sqlx::Pool` is wrapped for this one transaction.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped while it waits for a connection, nothing was begun. If dropped while the
    /// transaction is being begun, it is rolled back and its connection returns to the pool, or is closed if no answer
    /// comes within the [`settle_timeout`](crate::TxPoolBuilder::settle_timeout).
    ///
    /// # Errors
    ///
    /// Same as [`TxPool::begin`](crate::TxPool::begin).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// use cancel_safe_tx_guard::{TransactionGuard, TxPool};
    /// use sqlx::Sqlite;
    ///
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let db = TxPool::<Sqlite>::connect("sqlite::memory:").await?;
    /// let mut tx: TransactionGuard<Sqlite> = TransactionGuard::new(&db).await?;
    /// sqlx::query("CREATE TABLE account (id INTEGER)").execute(&mut *tx).await?;
    /// tx.commit().await?;
    /// # Ok::<(), cancel_safe_tx_guard::TxError>(())
    /// # }).unwrap();
    /// # }
    /// ```
    pub async fn new<P: PoolSource<Database = DB>>(pool: &P) -> Result<Self, TxError> {
        pool.tx_pool().begin().await
    }

    /// Commits, and returns `Ok` only when the database has confirmed it.
    ///
    /// A statement whose future was dropped may still be running. The commit waits for it, and commits what it does. A
    /// [`rollback`](Self::rollback) or a drop cancels it.
    ///
    /// # Cancel safety
    ///
    /// Once polled, it runs to completion even if dropped. If dropped before completion, COMMIT runs to its end on the
    /// runtime, and a handle taken earlier with [`outcome_handle`](Self::outcome_handle) reports how it ended. A COMMIT
    /// that has no answer after another ten minutes ([`commit_timeout`](crate::TxPoolBuilder::commit_timeout)) is
    /// abandoned, and its outcome is unknown. If it is never polled, the transaction is rolled back.
    ///
    /// # Errors
    ///
    /// - [`TxError::Aborted`]: an earlier statement failed, so PostgreSQL could only roll back.
    /// - [`TxError::Lost`]: the transaction had ended behind the guard's back. Or, on MySQL, what a dropped statement
    ///   left to be read did not arrive within the [`catch_up_timeout`](crate::TxPoolBuilder::catch_up_timeout), and
    ///   the transaction is rolled back.
    /// - [`TxError::Database`]: the database refused, by a deferred constraint for example, and rolled back.
    /// - [`TxError::Unknown`]: the connection failed during COMMIT. Do not simply repeat the work. With
    ///   [`CommitMode::Resolvable`], the guard asks PostgreSQL how it ended, and the outcome is unknown only if
    ///   PostgreSQL cannot answer.
    /// - [`TxError::Timeout`]: the [`timeout`](crate::Tx::timeout) of the transaction had passed when this was polled, or
    ///   when the database refused. It is rolled back.
    pub async fn commit(mut self) -> Result<(), TxError> {
        let deadline = self.deadline;
        if let Some(deadline) = deadline.filter(Deadline::has_passed) {
            return match self.rollback().await {
                // The transaction's own SQL may have committed it.
                Err(lost @ TxError::Lost { .. }) => Err(lost),
                // It is rolled back, whatever has become of the connection.
                Ok(()) | Err(_) => Err(deadline.error()),
            };
        }
        self.driven_commit().await.map_err(|error| match deadline {
            Some(deadline) => deadline.name(error),
            None => error,
        })
    }

    /// Commits, but waits no longer than `within`.
    ///
    /// # Cancel safety
    ///
    /// Once polled, it runs to completion even if dropped. If dropped before completion, the commit continues as after
    /// [`commit`](Self::commit).
    ///
    /// # Errors
    ///
    /// [`CommitError::Pending`] with a handle if the time has run out and the commit continues, and
    /// [`CommitError::Failed`] with the error of [`commit`](Self::commit).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// use std::time::Duration;
    /// use cancel_safe_tx_guard::{CommitOutcome, TxPool};
    ///
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// # let db = TxPool::<sqlx::Sqlite>::connect("sqlite::memory:").await.unwrap();
    /// let tx = db.begin().await.unwrap();
    /// let handle = tx.outcome_handle();
    /// let outcome = match tx.commit_within(Duration::from_secs(1)).await {
    ///     Ok(()) => CommitOutcome::Committed,
    ///     // Still under way, or ended without success, which need not be a rollback.
    ///     Err(_) => handle.outcome().await,
    /// };
    /// assert_eq!(outcome, CommitOutcome::Committed);
    /// # });
    /// # }
    /// ```
    pub async fn commit_within(self, within: Duration) -> Result<(), CommitError> {
        let handle = self.outcome_handle();
        let committed = {
            let runtime = self.held().runtime.clone();
            let _entered = drive::enter_if_outside(&runtime);
            timeout(within, self.commit())
        };
        match committed.await {
            Ok(committed) => Ok(committed?),
            Err(_) => Err(CommitError::Pending(handle)),
        }
    }

    /// Rolls back, and cancels a statement that a dropped future has left running.
    ///
    /// # Cancel safety
    ///
    /// Once polled, it runs to completion even if dropped. If dropped before completion, or never polled, the
    /// transaction is rolled back all the same.
    ///
    /// # Errors
    ///
    /// - [`TxError::Database`]: the connection failed. Nothing was committed in that case either: the server rolls back
    ///   what a closed connection leaves behind.
    /// - [`TxError::Unconfirmed`]: the server did not answer within the
    ///   [`settle_timeout`](crate::TxPoolBuilder::settle_timeout), nor acknowledge the end of its session within the
    ///   same time again. Nothing is committed, but locks may be held until the server notices that the connection is
    ///   closed.
    /// - [`TxError::Lost`]: the transaction had ended behind the guard's back, and it is unknown whether by a commit.
    ///   The guard notices this on PostgreSQL after a raw `COMMIT` or `ROLLBACK`, and on MySQL after a cancelled nested
    ///   `begin` of sqlx.
    pub async fn rollback(mut self) -> Result<(), TxError> {
        let open = self.take();
        Driven::new(open.runtime.clone(), settle::settle(open)).await
    }

    /// Runs `work` in a savepoint. If it returns `Ok`, its changes stand; if it returns an error, they are undone.
    ///
    /// The transaction continues in both cases. Savepoints nest. The error can be any type that a [`TxError`] converts
    /// into, so name it if nothing else does: `Ok::<_, TxError>(())`. If the work borrows and its future must be
    /// [`Send`], see [`savepoint_boxed`](Self::savepoint_boxed).
    ///
    /// # Cancel safety
    ///
    /// This method is not cancel safe. If dropped before completion, `work` may be half done, so the transaction is
    /// doomed: [`commit`](Self::commit) rolls it back and returns [`TxError::Lost`].
    ///
    /// # Errors
    ///
    /// - The error of `work`.
    /// - [`TxError::Database`]: the database refused the savepoint or its end, and what `work` has done is undone as
    ///   well. Or, on MySQL, what a dropped statement left to be read did not arrive within the
    ///   [`catch_up_timeout`](crate::TxPoolBuilder::catch_up_timeout), which dooms the transaction.
    /// - [`TxError::Lost`]: a savepoint inside `work` was dropped halfway.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// use cancel_safe_tx_guard::{TxError, TxPool};
    ///
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// # let db = TxPool::<sqlx::Sqlite>::connect("sqlite::memory:").await?;
    /// let mut tx = db.begin().await?;
    /// sqlx::query("CREATE TABLE t (n INTEGER PRIMARY KEY)").execute(&mut *tx).await?;
    /// let tried = tx
    ///     .savepoint(async move |sp| {
    ///         sqlx::query("INSERT INTO t VALUES (1)").execute(&mut **sp).await?;
    ///         sqlx::query("INSERT INTO t VALUES (1)").execute(&mut **sp).await?;
    ///         Ok::<_, TxError>(())
    ///     })
    ///     .await;
    /// assert!(tried.is_err());
    /// let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM t").fetch_one(&mut *tx).await?;
    /// assert_eq!(rows, 0);
    /// tx.commit().await?;
    /// # Ok::<(), TxError>(())
    /// # }).unwrap();
    /// # }
    /// ```
    pub async fn savepoint<T, E, F>(&mut self, work: F) -> Result<T, E>
    where
        F: AsyncFnOnce(&mut Self) -> Result<T, E>,
        E: From<TxError>,
    {
        let savepoint = self.set_savepoint().await?;
        let result = work(self).await;
        self.end_savepoint(savepoint, result).await
    }

    /// Works like [`savepoint`](Self::savepoint), for work that borrows and whose future must be [`Send`]: it takes a
    /// closure that returns a boxed future. See [`Tx::run_boxed`](crate::Tx::run_boxed).
    ///
    /// # Cancel safety
    ///
    /// This method is not cancel safe. If dropped before completion, the transaction is doomed, as with
    /// [`savepoint`](Self::savepoint).
    ///
    /// # Errors
    ///
    /// Same as [`savepoint`](Self::savepoint).
    pub async fn savepoint_boxed<'env, T, E, F>(&mut self, work: F) -> Result<T, E>
    where
        F: for<'tx> FnOnce(TxRef<'tx, 'env, DB>) -> BoxedWork<'tx, T, E>,
        E: From<TxError>,
    {
        let savepoint = self.set_savepoint().await?;
        let result = work(TxRef::new(self)).await;
        self.end_savepoint(savepoint, result).await
    }

    /// Sets a savepoint, to be ended by [`end_savepoint`](Self::end_savepoint).
    async fn set_savepoint(&mut self) -> Result<Savepoint, TxError> {
        let hooks = self.held().hooks.len();
        self.savepoints += 1;
        let level = self.savepoints;
        let set = self.run_sql(format!("SAVEPOINT txg_{level}")).await;
        if matches!(set, Err(sqlx::Error::Database(_))) {
            // The savepoint was refused, so there is none to end. After any other error, nobody knows whether there is
            // one.
            self.savepoints = level - 1;
        }
        set?;
        Ok(Savepoint { level, hooks })
    }

    async fn end_savepoint<T, E>(&mut self, set: Savepoint, mut result: Result<T, E>) -> Result<T, E>
    where
        E: From<TxError>,
    {
        let Savepoint { level, hooks } = set;
        if self.savepoints != level {
            return Err(TxError::Lost { reason: SAVEPOINT_DROPPED }.into());
        }
        if result.is_ok() {
            match self.run_sql(format!("RELEASE SAVEPOINT txg_{level}")).await {
                Ok(()) => {
                    self.savepoints = level - 1;
                    return result;
                }
                Err(error) => result = Err(TxError::from(error).into()),
            }
        }
        self.held_mut().hooks.truncate(hooks);
        let undo = format!("ROLLBACK TO SAVEPOINT txg_{level}; RELEASE SAVEPOINT txg_{level}");
        if self.run_sql(undo).await.is_ok() {
            self.savepoints = level - 1;
        }
        result
    }

    /// Runs `hook` once after this transaction was committed, even if the caller dropped the commit.
    ///
    /// Hooks run in the order in which they were added, on the task that drives the commit, after its handle knows the
    /// outcome. They do not run if the transaction is rolled back, if its outcome is unknown, or if the savepoint in
    /// which they were added is undone. A hook that panics does not stop the others, and does not undo the commit.
    pub fn after_commit(&mut self, hook: impl FnOnce() + Send + 'static) {
        self.held_mut().hooks.push(Box::new(hook));
    }

    /// Sets what happens if the connection is lost inside `COMMIT`, for this transaction alone.
    pub fn set_commit_mode(&mut self, mode: CommitMode) {
        self.held_mut().commit_mode = mode;
    }

    /// Sets the time after which nothing is committed.
    pub(crate) fn set_deadline(&mut self, deadline: Option<Deadline>) {
        self.deadline = deadline;
    }

    /// Returns a handle that reports how this transaction ends, even after a dropped commit.
    #[must_use]
    pub fn outcome_handle(&self) -> OutcomeHandle {
        self.held().outcome.handle()
    }

    fn held(&self) -> &Open<DB> {
        self.open.as_ref().expect(HELD)
    }

    fn held_mut(&mut self) -> &mut Open<DB> {
        self.open.as_mut().expect(HELD)
    }

    /// Runs our own SQL.
    async fn run_sql(&mut self, sql: String) -> Result<(), sqlx::Error> {
        // This dereference checks the depth.
        let _: &mut DB::Connection = self;
        let open = self.held_mut();
        let (shared, runtime) = (Arc::clone(&open.shared), open.runtime.clone());
        let (conn, probe) = open.slot.parts();
        let stuck = || Err(sqlx::Error::Protocol(OUT_OF_STEP.into()));
        let run =
            unless_stuck(&shared, probe, Patience::caller(shared.limits.catch_up_timeout), DB::run_sql(conn, sql));
        drive::inside(&runtime, run).await.unwrap_or_else(stuck)
    }

    fn take(&mut self) -> Open<DB> {
        self.open.take().expect(HELD)
    }

    fn driven_commit(&mut self) -> Driven<Result<(), TxError>> {
        let open = self.take();
        open.ticket.settling();
        let doomed = self.doomed.or((self.savepoints > 0).then_some(SAVEPOINT_DROPPED));
        let (shared, limit) = (Arc::clone(&open.shared), open.shared.limits.commit_timeout);
        let handle = open.outcome.handle();
        // The ticket makes closing the pool wait for the hooks, and for what is reported here.
        let ticket = Arc::clone(&open.ticket);
        Driven::new(open.runtime.clone(), commit::commit(open, doomed)).alone_for(limit).or_late(move |ended| {
            let outcome = handle.try_outcome().unwrap_or(CommitOutcome::Unknown);
            shared.teller.tell_late(outcome, ended.and_then(Result::err).as_ref(), ticket.tag);
            drop(ticket);
        })
    }
}

impl<DB: Backend> Deref for TransactionGuard<DB> {
    type Target = DB::Connection;

    fn deref(&self) -> &DB::Connection {
        self.held().slot.connection()
    }
}

impl<DB: Backend> DerefMut for TransactionGuard<DB> {
    /// Looks at the transaction's depth on the way: a nested `begin` that was cancelled has ended this transaction,
    /// and what is run after it must not be committed statement by statement.
    fn deref_mut(&mut self) -> &mut DB::Connection {
        let Open { slot, outcome, .. } = self.open.as_mut().expect(HELD);
        let (conn, probe) = slot.parts();
        if self.doomed.is_none() && DB::is_lost(conn, probe) {
            self.doomed = Some("a nested begin was cancelled inside the guard, or the database rolled back by itself");
            // Before the fence, because behind it nobody could tell any more.
            if DB::may_have_committed(conn) {
                outcome.stands(CommitOutcome::Unknown);
            }
            DB::fence(conn, probe);
        }
        conn
    }
}

impl<DB: Backend> Drop for TransactionGuard<DB> {
    fn drop(&mut self) {
        if let Some(open) = self.open.take() {
            open.ticket.settling();
            open.shared.teller.tell(TxEvent::ImplicitRollback, open.ticket.tag);
            // This works on any thread, inside a runtime or not. A runtime that has shut down drops the task at once,
            // and the connection is closed.
            drop(open.runtime.clone().spawn(settle::settle(open)));
        }
    }
}

impl<DB: Backend> fmt::Debug for TransactionGuard<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransactionGuard").field("doomed", &self.doomed).finish_non_exhaustive()
    }
}
