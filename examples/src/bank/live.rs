//! The server's counts, and the events that show them. Invariant: a transfer is counted once, even when its handler is
//! dropped in the middle.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::response::sse::Event;
use cancel_safe_shutdown::Readiness;
use cancel_safe_tx_guard::TxPool;
use futures_core::Stream;
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::store::Bank;

/// How a request for a transfer can end.
#[derive(Debug, Clone, Copy)]
pub(super) enum End {
    Completed,
    Refused,
    Repeated,
    TimedOut,
    Failed,
    Unknown,
    /// The client has gone.
    Cut,
}

const NAMES: [&str; 7] = ["completed", "refused", "repeated", "timed out", "failed", "unknown", "cut"];

/// The live state of the server.
#[derive(Debug)]
pub(super) struct Live {
    started: Instant,
    readiness: watch::Receiver<Readiness>,
    slow_ms: AtomicU64,
    counts: [AtomicU64; NAMES.len()],
}

impl Live {
    pub(super) fn new(readiness: watch::Receiver<Readiness>) -> Self {
        let counts = Default::default();
        Self { started: Instant::now(), readiness, slow_ms: AtomicU64::new(0), counts }
    }

    pub(super) fn readiness(&self) -> watch::Receiver<Readiness> {
        self.readiness.clone()
    }

    /// How long each transfer pauses half-way.
    pub(super) fn pause(&self) -> Duration {
        Duration::from_millis(self.slow_ms.load(Ordering::Relaxed))
    }

    pub(super) fn set_pause(&self, pause_ms: u64) {
        self.slow_ms.store(pause_ms, Ordering::Relaxed);
    }

    /// Begins to count a transfer. It counts as cut unless its handler sets another end.
    pub(super) fn count(self: &Arc<Self>) -> Counted {
        Counted { live: Arc::clone(self), end: End::Cut }
    }

    async fn snapshot<DB: Bank>(&self, db: &TxPool<DB>) -> Value {
        let readiness = *self.readiness.borrow();
        let metrics = db.metrics();
        let ends: serde_json::Map<_, _> = (NAMES.iter().zip(&self.counts))
            .map(|(name, count)| ((*name).to_owned(), count.load(Ordering::Relaxed).into()))
            .collect();
        let (balances, database) = match DB::balances(db).await {
            Ok(balances) => (balances, metrics.to_string()),
            Err(error) => (Vec::new(), error.to_string()),
        };
        json!({
            "balances": balances,
            "sum": balances.iter().map(|(_, balance)| balance).sum::<i64>(),
            "ends": ends,
            "uptime_ms": u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            "slow_ms": self.slow_ms.load(Ordering::Relaxed),
            "workers": [
                { "name": "database", "state": database },
                { "name": "http", "state": readiness.to_string() },
            ],
            "transactions": {
                "committed": metrics.committed,
                "rolled back": metrics.rolled_back,
                "unknown": metrics.unknown,
                "cancels sent": metrics.cancels,
            },
        })
    }
}

/// A transfer that is being counted.
pub(super) struct Counted {
    live: Arc<Live>,
    end: End,
}

impl Counted {
    pub(super) fn ends(mut self, end: End) {
        self.end = end;
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.live.counts[self.end as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// The state of the bank, twice a second, until `token` fires: when the browser is gone, and on shutdown.
pub(super) fn events<DB: Bank>(
    live: Arc<Live>,
    db: TxPool<DB>,
    token: CancellationToken,
) -> impl Stream<Item = Result<Event, Infallible>> {
    stream::unfold(Duration::ZERO, move |wait| {
        let (live, db, token) = (Arc::clone(&live), db.clone(), token.clone());
        async move {
            token.run_until_cancelled(sleep(wait)).await?;
            let snapshot = token.run_until_cancelled(live.snapshot(&db)).await?;
            Some((Ok(Event::default().data(snapshot.to_string())), Duration::from_millis(500)))
        }
    })
}
