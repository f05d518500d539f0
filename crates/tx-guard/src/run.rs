//! Running a closure as a transaction: begin, work, commit, and again where the database asks for it.
//!
//! Invariant: a commit whose end is not known is never repeated, unless the caller has said that it may be.

use std::fmt;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, sleep, timeout_at};

use crate::backend::{Backend, CommitMode, Isolation, Mode};
use crate::{CommitError, TransactionGuard, TxError, TxPool};

/// How often, and how fast, a transaction is run again after a transient failure. The default is three attempts in
/// all, with random pauses that double from 10 ms up to 1 s.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    attempts: u32,
    first_pause: Duration,
    longest_pause: Duration,
}

impl Retry {
    /// One attempt, no retry.
    #[must_use]
    pub fn none() -> Self {
        Self::attempts(1)
    }

    /// As the default, with so many attempts in all. Zero counts as one.
    #[must_use]
    pub fn attempts(attempts: u32) -> Self {
        Self {
            attempts: attempts.max(1),
            first_pause: Duration::from_millis(10),
            longest_pause: Duration::from_secs(1),
        }
    }

    /// The bounds of the pauses: each is random between nothing and `first`, doubled with each attempt up to `longest`.
    #[must_use]
    pub fn pauses(mut self, first: Duration, longest: Duration) -> Self {
        self.first_pause = first;
        self.longest_pause = longest;
        self
    }

    /// Random from zero up, so that those who have hindered each other do not meet again.
    fn pause(&self, attempt: u32) -> Duration {
        let doubled = self.first_pause.saturating_mul(2_u32.saturating_pow(attempt - 1));
        doubled.min(self.longest_pause).mul_f64(fastrand::f64())
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self::attempts(3)
    }
}

/// A transaction to be run as a closure. From [`TxPool::tx`].
#[must_use = "nothing is begun until run() is awaited"]
pub struct Tx<DB: Backend> {
    pool: TxPool<DB>,
    mode: Mode,
    timeout: Option<Duration>,
    retry: Retry,
    idempotent: bool,
    commit_mode: CommitMode,
}

impl<DB: Backend> TxPool<DB> {
    /// A transaction that is run as a closure, with its options: isolation, timeout, retry.
    pub fn tx(&self) -> Tx<DB> {
        let (mode, commit_mode) = (Mode::default(), self.commit_mode());
        Tx { pool: self.clone(), mode, timeout: None, retry: Retry::none(), idempotent: false, commit_mode }
    }
}

impl<DB: Backend> Tx<DB> {
    /// The isolation. Default: the database's own. SQLite knows only one, the strictest.
    pub fn isolation(mut self, isolation: Isolation) -> Self {
        self.mode.isolation = Some(isolation);
        self
    }

    /// The strictest isolation. On SQLite, where it always holds, this takes the lock for writing at the beginning.
    pub fn serializable(self) -> Self {
        self.isolation(Isolation::Serializable)
    }

    /// Nothing is written: PostgreSQL and MySQL refuse each statement that would, SQLite the commit.
    pub fn read_only(mut self) -> Self {
        self.mode.read_only = true;
        self
    }

    /// How long everything may take: all attempts, their pauses, and the wait for a connection. Default: no limit.
    ///
    /// PostgreSQL and MariaDB are told as well, so a transaction whose client has vanished ends there a second or two later;
    /// MySQL can only be told how long a `SELECT` and the wait for a lock may take.
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.timeout = timeout.into();
        self
    }

    /// Runs the closure again after a transient failure: a serialization failure or deadlock of PostgreSQL (40001,
    /// 40P01), a busy or locked SQLite, a deadlock or a lock waited for too long on MySQL (1213, 1205). Default:
    /// [`Retry::none`].
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// Running the work twice does no more than running it once, so it may be retried after a commit of which nobody
    /// knows whether it happened.
    pub fn idempotent(mut self) -> Self {
        self.idempotent = true;
        self
    }

    /// What is done if the connection is lost inside `COMMIT`. Default: what the pool does.
    pub fn commit_mode(mut self, mode: CommitMode) -> Self {
        self.commit_mode = mode;
        self
    }

    /// Begins, runs `work`, and commits; if `work` returns an error, rolls back.
    ///
    /// `work` is called anew for each attempt. Inside [`tokio::spawn`], write it as `async move |tx|`.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before COMMIT is sent, everything is rolled back. If dropped after that,
    /// the commit is driven to its end on the runtime, and hooks given with
    /// [`after_commit`](TransactionGuard::after_commit) run.
    ///
    /// # Errors
    ///
    /// The error of `work`, of [`begin`](TxPool::begin) or of [`commit`](TransactionGuard::commit) in the last
    /// attempt; [`TxError::Timeout`] if the time has passed before the commit, and [`TxError::Pending`] if it has
    /// passed while the commit was under way. If it has passed while a connection was waited for, the error is that of
    /// `begin`, which says why: all are in use, or the server does not answer.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")] {
    /// use std::time::Duration;
    /// use cancel_safe_tx_guard::{Retry, TxError, TxPool};
    ///
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// # let db = TxPool::<sqlx::Sqlite>::connect("sqlite::memory:").await?;
    /// let n = db
    ///     .tx()
    ///     .serializable()
    ///     .timeout(Duration::from_secs(2))
    ///     .retry(Retry::default())
    ///     .run(async move |tx| {
    ///         let n: i64 = sqlx::query_scalar("SELECT 41 + 1").fetch_one(&mut **tx).await?;
    ///         tx.after_commit(|| println!("now others see it"));
    ///         Ok(n)
    ///     })
    ///     .await?;
    /// assert_eq!(n, 42);
    /// # Ok::<(), TxError>(())
    /// # }).unwrap();
    /// # }
    /// ```
    pub async fn run<T, F>(self, mut work: F) -> Result<T, TxError>
    where
        F: AsyncFnMut(&mut TransactionGuard<DB>) -> Result<T, TxError>,
    {
        Handle::try_current().map_err(|_| TxError::NoRuntime)?;
        let deadline = self.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut attempt = 1;
        loop {
            let error = match self.attempt(deadline, &mut work).await {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if attempt >= self.retry.attempts || !self.may_repeat(&error) {
                return Err(error);
            }
            self.before(deadline, sleep(self.retry.pause(attempt))).await?;
            attempt += 1;
        }
    }

    async fn attempt<T, F>(&self, deadline: Option<Instant>, work: &mut F) -> Result<T, TxError>
    where
        F: AsyncFnMut(&mut TransactionGuard<DB>) -> Result<T, TxError>,
    {
        let remaining = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let mode = Mode { remaining, ..self.mode };
        let worked = self.before(deadline, async {
            let mut tx = self.pool.begin_in(mode, deadline).await?;
            tx.set_commit_mode(self.commit_mode);
            match work(&mut tx).await {
                Ok(value) => Ok((tx, value)),
                Err(error) => {
                    // Before the next attempt, this one has to be over. Its connection failing changes nothing.
                    drop(tx.rollback().await);
                    Err(error)
                }
            }
        });
        let (tx, value) = worked.await??;
        // Nobody could look at the clock while the work kept its thread busy.
        if let (Some(deadline), Some(timeout)) = (deadline, self.timeout)
            && Instant::now() >= deadline
        {
            return Err(TxError::Timeout { timeout });
        }
        match deadline {
            None => tx.commit().await?,
            Some(deadline) => match tx.commit_within(deadline.saturating_duration_since(Instant::now())).await {
                Ok(()) => {}
                Err(CommitError::Pending(handle)) => return Err(TxError::Pending(handle)),
                Err(CommitError::Failed(error)) => return Err(error),
            },
        }
        Ok(value)
    }

    async fn before<T>(&self, deadline: Option<Instant>, future: impl Future<Output = T>) -> Result<T, TxError> {
        let (Some(deadline), Some(timeout)) = (deadline, self.timeout) else { return Ok(future.await) };
        timeout_at(deadline, future).await.map_err(|_| TxError::Timeout { timeout })
    }

    fn may_repeat(&self, error: &TxError) -> bool {
        match error {
            // PostgreSQL may say it in the answer to the commit, ahead of COMMIT itself.
            TxError::Database(error) | TxError::Aborted { source: error } => DB::is_transient(error),
            TxError::Unknown { .. } => self.idempotent,
            _ => false,
        }
    }
}

impl<DB: Backend> fmt::Debug for Tx<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tx")
            .field("mode", &self.mode)
            .field("timeout", &self.timeout)
            .field("retry", &self.retry)
            .field("idempotent", &self.idempotent)
            .field("commit_mode", &self.commit_mode)
            .finish_non_exhaustive()
    }
}
