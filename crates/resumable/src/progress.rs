//! How far a run has come, and how long it will still take.
//!
//! Invariant: the rate is this session's own; restored items never make it look faster than it is.

use std::time::Duration;

use tokio::{sync::watch, time::Instant};

use crate::item::Done;

/// A busy loop publishes after this many items: a reader sees 1/1000 of a long run, a trivial item costs nothing more.
const PUBLISH_EVERY_ITEMS: u32 = 1024;

/// How far a run has come.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Progress {
    /// Items that need no more work: completed now, restored, or quarantined.
    pub done: usize,
    /// Those of `done` that an earlier run had finished.
    pub restored: usize,
    /// Those of `done` that are in quarantine.
    pub failed: usize,
    /// All items: exact for a source that knows its length, else what is known of so far.
    pub total: usize,
    /// Items finished per second by this session alone.
    pub session_rate: f64,
    /// The time the rest takes at this session's rate, once there is one.
    pub eta: Option<Duration>,
}

impl Progress {
    /// Returns the finished part, from 0.0 to 1.0, restored items included; 1.0 if there are no items.
    #[must_use]
    pub fn fraction(&self) -> f64 {
        if self.total == 0 { 1.0 } else { self.done as f64 / self.total as f64 }
    }

    /// Returns [`Progress::fraction`] in percent.
    #[must_use]
    pub fn percent(&self) -> f64 {
        self.fraction() * 100.0
    }
}

/// Counts on the hot path, publishes off it.
#[derive(Debug)]
pub(crate) struct Meter {
    sender: watch::Sender<Progress>,
    now: Progress,
    completed: usize,
    started: Option<Instant>,
    unpublished: u32,
}

impl Meter {
    pub(crate) fn new(sender: watch::Sender<Progress>) -> Self {
        Self { sender, now: Progress::default(), completed: 0, started: None, unpublished: 0 }
    }

    /// The first item of this session starts: from here on the rate is counted.
    pub(crate) fn item_started(&mut self) {
        if self.started.is_none() {
            self.started = Some(Instant::now());
        }
    }

    #[inline]
    pub(crate) fn item_done<R>(&mut self, done: &Done<R>) {
        self.now.done += 1;
        self.now.restored += usize::from(done.restored);
        self.now.failed += usize::from(done.result.is_err());
        self.completed += usize::from(!done.restored && done.result.is_ok());
        self.unpublished += 1;
    }

    /// Sets the counts of a run that is not the only one at work.
    #[cfg(feature = "postgres")]
    pub(crate) fn stand_at(&mut self, done: usize, restored: usize, failed: usize) {
        (self.now.done, self.now.restored, self.now.failed) = (done, restored, failed);
    }

    /// How many items this session has completed.
    pub(crate) fn completed(&self) -> usize {
        self.completed
    }

    pub(crate) fn counts(&self) -> Progress {
        self.now
    }

    pub(crate) fn is_due(&self) -> bool {
        self.unpublished >= PUBLISH_EVERY_ITEMS
    }

    pub(crate) fn publish(&mut self, total: usize) {
        self.unpublished = 0;
        self.now.total = total;
        let seconds = self.started.map_or(0.0, |started| started.elapsed().as_secs_f64());
        let own = (self.now.done - self.now.restored) as f64;
        self.now.session_rate = if seconds > 0.0 { own / seconds } else { 0.0 };
        let left = total.saturating_sub(self.now.done) as f64;
        self.now.eta = if left == 0.0 {
            Some(Duration::ZERO)
        } else {
            Duration::try_from_secs_f64(left / self.now.session_rate).ok()
        };
        let now = self.now;
        self.sender.send_if_modified(|shown| {
            let changed = (shown.done, shown.total) != (now.done, now.total);
            *shown = now;
            changed
        });
    }
}
