//! Metrics: what a pool has done so far, and what it is doing now.
//!
//! Invariant: each session is counted once when it is opened, and once, with the reason, when it is closed.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// A snapshot of a pool. From [`TxPool::metrics`](crate::TxPool::metrics).
///
/// The first five fields describe this moment. The others count from the beginning of the pool and never go down, so
/// you can derive rates from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub struct Metrics {
    /// Sessions that are open, or being opened. For a wrapped pool, the sessions that its guards hold.
    pub size: usize,
    /// Sessions that are not in use.
    pub idle: usize,
    /// Callers that wait for a session.
    pub waiting: usize,
    /// Transactions that their users hold.
    pub in_use: usize,
    /// Transactions that are being committed or rolled back.
    pub settling: usize,
    /// Sessions that were opened. For a wrapped pool, connections that were taken from it.
    pub opened: u64,
    /// Sessions that were closed because of their age.
    pub closed_expired: u64,
    /// Sessions that were closed because they had been idle for too long.
    pub closed_idle: u64,
    /// Sessions that were closed because they could not be restored, or because a hook rejected them.
    pub closed_unfit: u64,
    /// Sessions that were closed because they had failed, did not answer, or were in doubt.
    pub closed_failed: u64,
    /// Sessions that were closed with their pool.
    pub closed_with_pool: u64,
    /// Transactions for which cancels were sent.
    pub cancels: u64,
    /// Sessions that were ended from outside.
    pub terminated: u64,
    /// Transactions that were committed.
    pub committed: u64,
    /// Transactions that were rolled back.
    pub rolled_back: u64,
    /// Transactions whose outcome is unknown.
    pub unknown: u64,
}

impl fmt::Display for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} sessions, {} idle, {} transactions in use, {} settling, {} callers waiting",
            self.size, self.idle, self.in_use, self.settling, self.waiting
        )
    }
}

/// Why a session was closed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Closed {
    Expired,
    Idle,
    Unfit,
    Failed,
    WithPool,
}

/// The counters since the beginning of the pool.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    opened: AtomicU64,
    closed: [AtomicU64; 5],
    pub(crate) cancels: AtomicU64,
    pub(crate) terminated: AtomicU64,
    outcomes: [AtomicU64; 3],
}

impl Counters {
    pub(crate) fn opened(&self) {
        up(&self.opened);
        #[cfg(feature = "tracing")]
        tracing::debug!("session opened");
    }

    pub(crate) fn closed(&self, why: Closed) {
        up(&self.closed[why as usize]);
        #[cfg(feature = "tracing")]
        tracing::debug!(?why, "session closed");
    }

    /// Counts a transaction that has ended; `committed` says whether by a commit, if known.
    pub(crate) fn ended(&self, committed: Option<bool>) {
        let [committed_ones, rolled_back, unknown] = &self.outcomes;
        up(match committed {
            Some(true) => committed_ones,
            Some(false) => rolled_back,
            None => unknown,
        });
    }

    pub(crate) fn read(&self) -> Metrics {
        let [expired, idle, unfit, failed, with_pool] = &self.closed;
        let [committed, rolled_back, unknown] = &self.outcomes;
        Metrics {
            opened: get(&self.opened),
            closed_expired: get(expired),
            closed_idle: get(idle),
            closed_unfit: get(unfit),
            closed_failed: get(failed),
            closed_with_pool: get(with_pool),
            cancels: get(&self.cancels),
            terminated: get(&self.terminated),
            committed: get(committed),
            rolled_back: get(rolled_back),
            unknown: get(unknown),
            ..Metrics::default()
        }
    }
}

/// Raises a counter. No other memory access depends on its order.
pub(crate) fn up(count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
}

fn get(count: &AtomicU64) -> u64 {
    count.load(Ordering::Relaxed)
}
