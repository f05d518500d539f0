//! The moment by which a transaction has to end.
//!
//! Invariant: a failure at or after that moment is reported as a timeout, whichever side notices first, unless the
//! transaction may have been committed.

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
    /// The deadline `timeout` from now. `None` for a time that never ends.
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

    /// Runs `future`, but gives it up at the deadline.
    pub(crate) async fn bound<T>(&self, future: impl Future<Output = T>) -> Result<T, TxError> {
        timeout_at(self.at, future).await.map_err(|_| self.error())
    }

    /// The error to report instead of `error`. A timeout says that the transaction is rolled back, which is unknown of
    /// a lost one. Errors of opening a connection say themselves what took so long.
    pub(crate) fn name(&self, error: TxError) -> TxError {
        let is_rolled_back = matches!(error, TxError::Database(_) | TxError::Aborted { .. });
        if is_rolled_back && self.has_passed() { self.error() } else { error }
    }
}
