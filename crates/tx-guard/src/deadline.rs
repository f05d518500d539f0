//! The moment by which a transaction has to be over.
//!
//! Invariant: what fails at or past that moment is told as a timeout, whoever was the first to notice. Only what may have
//! been committed is never told as one.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::TxError;

/// The end of the time that a transaction was given.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    at: Instant,
    timeout: Duration,
}

impl Deadline {
    /// From now on. None for a time that never ends.
    pub(crate) fn after(timeout: Duration) -> Option<Self> {
        Some(Self { at: Instant::now().checked_add(timeout)?, timeout })
    }

    pub(crate) fn at(&self) -> Instant {
        self.at
    }

    pub(crate) fn remaining(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    pub(crate) fn has_passed(&self) -> bool {
        Instant::now() >= self.at
    }

    pub(crate) fn error(&self) -> TxError {
        TxError::Timeout { timeout: self.timeout }
    }

    /// Gives `future` up at the deadline.
    pub(crate) async fn bound<T>(&self, future: impl Future<Output = T>) -> Result<T, TxError> {
        timeout_at(self.at, future).await.map_err(|_| self.error())
    }

    /// What `error` is to be told as. Errors of opening a connection say themselves what took so long.
    pub(crate) fn name(&self, error: TxError) -> TxError {
        let of_the_work = matches!(error, TxError::Database(_) | TxError::Aborted { .. } | TxError::Lost { .. });
        if of_the_work && self.has_passed() { self.error() } else { error }
    }
}
