//! The integration tests of `cancel-safe-shutdown`, one binary.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod application;
mod cancel;
mod cancel_serve;
#[cfg(all(unix, feature = "signal"))]
mod child;
mod exercise;
mod group;
mod interleavings;
#[cfg(feature = "axum")]
mod load;
mod named;
mod panics;
#[cfg(all(unix, feature = "signal"))]
mod phases;
mod readiness;
#[cfg(feature = "axum")]
mod requests;
#[cfg(feature = "axum")]
mod server;
#[cfg(all(unix, feature = "signal"))]
#[path = "../../examples/service.rs"]
mod service;
#[cfg(all(unix, feature = "signal"))]
mod signals;
#[cfg(all(unix, feature = "signal"))]
mod silence;
mod structure;
#[cfg(all(unix, feature = "signal", feature = "systemd"))]
mod systemd;
#[cfg(feature = "test-util")]
mod test_run;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts itself as long as it lives: a value that a task owns, and that must be gone when the task is reported as
/// ended.
#[derive(Clone, Default)]
struct Alive(Arc<AtomicUsize>);

impl Alive {
    fn guest(&self) -> Guest {
        self.0.fetch_add(1, Ordering::SeqCst);
        Guest(Arc::clone(&self.0))
    }

    fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

struct Guest(Arc<AtomicUsize>);

impl Drop for Guest {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
