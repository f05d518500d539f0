//! The attempts at a transaction, one after another: when the next one may be made, and when no further one may.
//!
//! Invariant: an attempt begins only after the previous one has ended and is known not to be committed. After a commit
//! with an unknown outcome there is another attempt only if the caller has declared the work idempotent.

use std::fmt;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{sleep, timeout};

use crate::backend::{Backend, Mode};
use crate::deadline::Deadline;
use crate::transient::{Verdict, verdict, verdict_of_any};
use crate::tx::Tx;
use crate::{CommitError, CommitOutcome, OutcomeHandle, TransactionGuard, TxError};

/// How long an attempt waits for the end of the previous one. The pool bounds that more tightly, unless a guard is
/// kept.
const END_LIMIT: Duration = Duration::from_secs(10);

/// The attempts at a transaction, for code where a closure does not fit. From [`Tx::attempts`].
///
/// Each turn of the loop takes a guard from [`next`](Self::next), works with it, and gives the guard and the result to
/// [`end`](Self::end), which commits or rolls back. `end` returns `None` if the same work must be done again.
///
/// # Comparison with `Tx::run`
///
/// The attempts, pauses, deadline and hooks are the same. There is no closure, so the loop compiles wherever the work
/// itself does: behind `&self`, with borrowed arguments, inside an axum handler or [`tokio::spawn`].
///
/// ```
/// # #[cfg(feature = "sqlite")] {
/// use std::time::Duration;
/// use cancel_safe_tx_guard::{Retry, TxError, TxPool};
/// use sqlx::Sqlite;
///
/// struct Accounts {
///     db: TxPool<Sqlite>,
/// }
///
/// impl Accounts {
///     async fn open(&self, owner: &str) -> Result<i64, TxError> {
///         let tx = self.db.tx().timeout(Duration::from_secs(2)).retry(Retry::default());
///         let mut attempts = tx.attempts();
///         loop {
///             let mut tx = attempts.next().await?;
///             let work = async {
///                 let insert = sqlx::query("INSERT INTO account (owner) VALUES ($1)");
///                 let inserted = insert.bind(owner).execute(&mut *tx).await?;
///                 Ok::<_, TxError>(inserted.last_insert_rowid())
///             };
///             let worked = attempts.within(work).await;
///             if let Some(id) = attempts.end(tx, worked).await? {
///                 return Ok(id);
///             }
///         }
///     }
/// }
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// # let db = TxPool::<Sqlite>::connect("sqlite::memory:").await?;
/// # let mut tx = db.begin().await?;
/// # sqlx::query("CREATE TABLE account (id INTEGER PRIMARY KEY, owner TEXT)").execute(&mut *tx).await?;
/// # tx.commit().await?;
/// # assert_eq!(Accounts { db }.open("Ada").await?, 1);
/// # Ok::<(), TxError>(())
/// # }).unwrap();
/// # }
/// ```
#[must_use = "nothing is begun until next() is awaited"]
pub struct Attempts<DB: Backend> {
    tx: Tx<DB>,
    /// The clock starts with the first attempt.
    deadline: Option<Deadline>,
    made: u32,
    /// The outcome handle of the previous attempt.
    last: Option<OutcomeHandle>,
    /// Why there is no further attempt.
    over: Option<&'static str>,
}

const COMMITTED: &str = "the work is committed";
const IN_DOUBT: &str = "whether the last attempt was committed is not known";
const STILL_OPEN: &str = "the last attempt has not ended";
const FAILED: &str = "the work has failed for good";
const ALL_MADE: &str = "all attempts have been made";

impl<DB: Backend> Attempts<DB> {
    pub(crate) fn new(tx: Tx<DB>) -> Self {
        Self { tx, deadline: None, made: 0, last: None, over: None }
    }

    /// Begins the next attempt: the first at once, later ones after a pause.
    ///
    /// It waits for the previous attempt to end, even if its guard was dropped.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, the effect is that of a dropped
    /// [`begin`](crate::TxPool::begin): what was begun is rolled back. A later call makes the next attempt.
    ///
    /// # Errors
    ///
    /// - [`TxError::Timeout`]: the time ran out.
    /// - [`TxError::NoAttempt`]: [`end`](Self::end) has already returned how the work ended, or all attempts were made,
    ///   or the previous attempt may have been committed.
    /// - The errors of [`begin`](crate::TxPool::begin). A transient one counts as an attempt, and is returned only if
    ///   there is no attempt left.
    pub async fn next(&mut self) -> Result<TransactionGuard<DB>, TxError> {
        Handle::try_current().map_err(|_| TxError::NoRuntime)?;
        if self.made == 0 {
            self.deadline = self.tx.timeout.and_then(Deadline::after);
        }
        self.look_back().await?;
        loop {
            if self.made > 0 {
                self.bound(sleep(self.tx.retry.pause(self.made))).await?;
            }
            self.made += 1;
            match self.begin().await {
                Ok(tx) => return Ok(tx),
                Err(error) if self.may_repeat(verdict(&error)) => {}
                Err(error) => {
                    self.over = Some(FAILED);
                    return Err(error);
                }
            }
        }
    }

    /// Drives `work`, and abandons it at the deadline of the transaction.
    ///
    /// Without a [`timeout`](Tx::timeout) this is `work.await`. Give the result to [`end`](Self::end).
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, `work` is dropped.
    ///
    /// # Errors
    ///
    /// The error of `work`, or [`TxError::Timeout`].
    pub async fn within<T, E>(&self, work: impl Future<Output = Result<T, E>>) -> Result<T, E>
    where
        E: From<TxError>,
    {
        match self.deadline {
            None => work.await,
            Some(deadline) => match deadline.bound(work).await? {
                // The server may have noticed first.
                Err(_) if deadline.has_passed() => Err(deadline.error().into()),
                worked => worked,
            },
        }
    }

    /// Ends the attempt: commits if the work has succeeded, and rolls back otherwise.
    ///
    /// `None` means that the attempt failed in a transient way and is rolled back, and that the work must be done
    /// again.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before COMMIT is sent, the transaction is rolled back. If dropped after
    /// that, the commit runs to completion on the runtime.
    ///
    /// # Errors
    ///
    /// The error of the work or of the [`commit`](TransactionGuard::commit), if the work is not repeated. If the time
    /// had run out by then, [`TxError::Timeout`] takes its place; if the time ran out during the commit,
    /// [`TxError::Pending`].
    pub async fn end<T, E>(&mut self, tx: TransactionGuard<DB>, worked: Result<T, E>) -> Result<Option<T>, E>
    where
        E: From<TxError> + 'static,
    {
        // The clock could not be checked while the work kept its thread busy.
        if let Some(deadline) = self.deadline.filter(Deadline::has_passed) {
            self.over = Some(FAILED);
            return Err(deadline.error().into());
        }
        match worked {
            Ok(value) => match self.commit(tx).await {
                Ok(()) => {
                    self.over = Some(COMMITTED);
                    Ok(Some(value))
                }
                Err(error) if self.may_repeat(verdict(&error)) => Ok(None),
                Err(error) => {
                    self.over = Some(FAILED);
                    Err(error.into())
                }
            },
            Err(error) => {
                let again = self.may_repeat(self.verdict_of_work(&error));
                if !again {
                    // Set before the wait, so that a caller that drops it cannot go on.
                    self.over = Some(FAILED);
                }
                let handle = tx.outcome_handle();
                // This attempt has to be over before the next one starts. If its connection fails, that changes
                // nothing, and a rollback that is slower than the deadline goes on without its caller.
                drop(self.bound(tx.rollback()).await);
                // The work may have ended the transaction itself, with a commit in its SQL.
                let in_doubt = handle.try_outcome() == Some(CommitOutcome::Unknown);
                let again = again && (!in_doubt || self.tx.idempotent);
                if again {
                    return Ok(None);
                }
                self.over = Some(FAILED);
                Err(error)
            }
        }
    }

    /// Checks that another attempt may be made.
    async fn look_back(&mut self) -> Result<(), TxError> {
        if let Some(reason) = self.over {
            return Err(TxError::NoAttempt { reason });
        }
        let none = |reason| Err(TxError::NoAttempt { reason });
        if let Some(last) = self.last.clone() {
            match self.bound(timeout(END_LIMIT, last.outcome())).await? {
                Ok(CommitOutcome::RolledBack) => {}
                Ok(CommitOutcome::Committed) => return none(COMMITTED),
                Ok(CommitOutcome::Unknown) if self.tx.idempotent => {}
                Ok(CommitOutcome::Unknown) => return none(IN_DOUBT),
                Err(_) => return none(STILL_OPEN),
            }
        }
        if self.made >= self.tx.retry.attempts { none(ALL_MADE) } else { Ok(()) }
    }

    async fn begin(&mut self) -> Result<TransactionGuard<DB>, TxError> {
        let mode = Mode { remaining: self.deadline.map(|deadline| deadline.remaining()), ..self.tx.mode };
        let begin = self.tx.pool.begin_in(mode, self.deadline.map(|deadline| deadline.at()));
        let begun = self.bound(begin).await.flatten();
        let mut tx = match (begun, self.deadline) {
            (Err(error), Some(deadline)) => return Err(deadline.name(error)),
            (begun, _) => begun?,
        };
        tx.set_commit_mode(self.tx.commit_mode);
        tx.set_deadline(self.deadline);
        self.last = Some(tx.outcome_handle());
        Ok(tx)
    }

    async fn commit(&self, tx: TransactionGuard<DB>) -> Result<(), TxError> {
        let Some(deadline) = self.deadline else { return tx.commit().await };
        match tx.commit_within(deadline.remaining()).await {
            Ok(()) => Ok(()),
            Err(CommitError::Pending(handle)) => Err(TxError::Pending(handle)),
            Err(CommitError::Failed(error)) => Err(error),
        }
    }

    async fn bound<T>(&self, future: impl Future<Output = T>) -> Result<T, TxError> {
        match self.deadline {
            None => Ok(future.await),
            Some(deadline) => deadline.bound(future).await,
        }
    }

    fn verdict_of_work<E: 'static>(&self, error: &E) -> Verdict {
        match verdict_of_any(error) {
            // If the transaction may have been committed, the caller cannot declare the error transient.
            Verdict::Lasting if self.tx.retry_if.iter().any(|is_transient| is_transient(error)) => Verdict::Transient,
            verdict => verdict,
        }
    }

    fn may_repeat(&self, verdict: Verdict) -> bool {
        let allowed = match verdict {
            Verdict::Transient => true,
            Verdict::Unknown => self.tx.idempotent,
            Verdict::Pending | Verdict::Lasting => false,
        };
        allowed && self.made < self.tx.retry.attempts
    }
}

impl<DB: Backend> fmt::Debug for Attempts<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attempts")
            .field("tx", &self.tx)
            .field("made", &self.made)
            .field("over", &self.over)
            .finish_non_exhaustive()
    }
}
