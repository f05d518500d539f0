//! The progress of a run, and how much longer it will take.
//!
//! Invariant: the rate is this session's recent rate; restored items never make it look faster than it is, and unknown
//! values are not guessed.

use std::{fmt, time::Duration};

use tokio::{sync::watch, time::Instant};

use crate::{item::Done, rate::Rate};

/// A busy loop publishes after this many items: a reader sees steps of 1/1000 of a long run, and the cost per trivial
/// item stays negligible.
const PUBLISH_EVERY_ITEMS: u32 = 1024;
/// The longest reason of a pause that is kept, so that a [`Progress`] can be copied.
const REASON_BYTES: usize = 120;

/// How far a computation has come.
///
/// A run publishes it ([`subscribe`](crate::Run::subscribe)). You can also use it alone, for work without a checkpoint:
///
/// ```
/// use cancel_safe_resumable::Progress;
/// use tokio::sync::watch;
///
/// let progress = watch::Sender::new(Progress::new(200));
/// let seen = progress.subscribe(); // for a bar, a log line, a page
/// progress.send_modify(|progress| progress.advance(50));
/// assert_eq!(seen.borrow().percent(), 25.0);
/// ```
#[derive(Clone, Copy, Default)]
#[non_exhaustive]
pub struct Progress {
    /// Items that need no more work: completed now, restored, or quarantined.
    pub done: usize,
    /// Items in `done` that an earlier run had finished.
    pub restored: usize,
    /// Items in `done` that are in quarantine.
    pub failed: usize,
    /// All items, if [`is_total_known`](Self::is_total_known); otherwise the items known so far.
    pub total: usize,
    /// Items per second that this session finished recently: over the last 20 seconds of work, or over the last four
    /// items if they took longer.
    pub session_rate: f64,
    /// The time for the rest at this rate, plus what is left of a pause. `None` while there is no rate, or while the
    /// total is unknown.
    pub eta: Option<Duration>,
    /// Whether all items wait, until when, and why.
    pub paused: Option<Pause>,
    is_total_known: bool,
    rate: Rate,
}

impl Progress {
    /// Creates a progress of `total` items, none of them done. [`Progress::default`] is the same without a known total.
    #[must_use]
    pub fn new(total: usize) -> Self {
        Self { total, is_total_known: true, rate: Rate::begun(Instant::now()), ..Self::default() }
    }

    /// The progress of a source before it is read, from the least and the most items that it may have.
    pub(crate) fn of_source((least, most): (usize, Option<usize>)) -> Self {
        Self { total: least, is_total_known: most == Some(least), ..Self::default() }
    }

    /// Counts `items` more items as finished just now.
    pub fn advance(&mut self, items: usize) {
        self.done = self.done.saturating_add(items);
        self.count(Instant::now());
    }

    /// Counts `items` more items as finished by an earlier session. They do not make this session look faster.
    pub fn restore(&mut self, items: usize) {
        self.restored = self.restored.saturating_add(items);
        self.done = self.done.saturating_add(items);
        self.count(Instant::now());
    }

    /// Sets how many items there are in all, once that is known.
    pub fn set_total(&mut self, total: usize) {
        (self.total, self.is_total_known) = (total, true);
        self.count(Instant::now());
    }

    /// Returns whether `total` is the number of all items. It is not before the end of a source that does not know its
    /// length, such as a filter or a channel.
    #[must_use]
    pub fn is_total_known(&self) -> bool {
        self.is_total_known
    }

    /// Returns the finished part, from 0.0 to 1.0, restored items included; 1.0 if there are no items, and 0.0 while
    /// the total is unknown.
    #[must_use]
    pub fn fraction(&self) -> f64 {
        match (self.is_total_known, self.total) {
            (false, _) => 0.0,
            (true, 0) => 1.0,
            (true, total) => (self.done as f64 / total as f64).min(1.0),
        }
    }

    /// Returns [`Progress::fraction`] in percent.
    #[must_use]
    pub fn percent(&self) -> f64 {
        self.fraction() * 100.0
    }

    fn count(&mut self, now: Instant) {
        self.rate.count(now, self.done.saturating_sub(self.restored) as u64);
        self.session_rate = self.rate.per_second();
        self.eta = self.is_total_known.then(|| self.left(now)).flatten();
    }

    fn left(&self, now: Instant) -> Option<Duration> {
        let left = self.total.saturating_sub(self.done) as f64;
        if left == 0.0 {
            return Some(Duration::ZERO);
        }
        let pause = self.paused.map_or(Duration::ZERO, |pause| pause.until.saturating_duration_since(now));
        Duration::try_from_secs_f64(left / self.session_rate).ok()?.checked_add(pause)
    }
}

/// Only the public fields count.
impl PartialEq for Progress {
    fn eq(&self, other: &Self) -> bool {
        let seen = |it: &Self| (it.done, it.restored, it.failed, it.total, it.is_total_known, it.eta, it.paused);
        seen(self) == seen(other) && self.session_rate == other.session_rate
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress")
            .field("done", &self.done)
            .field("restored", &self.restored)
            .field("failed", &self.failed)
            .field("total", &self.total)
            .field("is_total_known", &self.is_total_known)
            .field("session_rate", &self.session_rate)
            .field("eta", &self.eta)
            .field("paused", &self.paused)
            .finish_non_exhaustive()
    }
}

/// Why no item starts, and until when.
#[derive(Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pause {
    /// When items start again.
    pub until: Instant,
    bytes: [u8; REASON_BYTES],
    length: u8,
}

impl Pause {
    pub(crate) fn new(until: Instant, reason: &str) -> Self {
        let length = (0..=REASON_BYTES.min(reason.len())).rev().find(|&end| reason.is_char_boundary(end));
        let length = length.unwrap_or_default();
        let mut bytes = [0; REASON_BYTES];
        bytes[..length].copy_from_slice(&reason.as_bytes()[..length]);
        Self { until, bytes, length: length as u8 }
    }

    /// Returns why, cut after 120 bytes.
    #[must_use]
    pub fn reason(&self) -> &str {
        self.bytes.get(..self.length.into()).and_then(|bytes| std::str::from_utf8(bytes).ok()).unwrap_or_default()
    }
}

impl fmt::Debug for Pause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pause").field("until", &self.until).field("reason", &self.reason()).finish()
    }
}

/// Counts on the hot path, and publishes off it.
#[derive(Debug)]
pub(crate) struct Meter {
    sender: watch::Sender<Progress>,
    now: Progress,
    completed: usize,
    unpublished: u32,
}

impl Meter {
    pub(crate) fn new(sender: watch::Sender<Progress>) -> Self {
        Self { sender, now: Progress::default(), completed: 0, unpublished: 0 }
    }

    /// Notes that an item starts. The first one of this session starts the rate's clock.
    pub(crate) fn item_started(&mut self) {
        if !self.now.rate.has_begun() {
            self.now.rate = Rate::begun(Instant::now());
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

    /// Notes that the result of an earlier session was handed out.
    #[inline]
    pub(crate) fn item_restored(&mut self) {
        self.now.done += 1;
        self.now.restored += 1;
        self.unpublished += 1;
    }

    /// Sets the counts of a run that shares its job with others.
    #[cfg(feature = "postgres")]
    pub(crate) fn stand_at(&mut self, done: usize, restored: usize, failed: usize) {
        (self.now.done, self.now.restored, self.now.failed) = (done, restored, failed);
    }

    /// How many items this session has completed.
    pub(crate) fn completed(&self) -> usize {
        self.completed
    }

    /// How many items are in quarantine.
    pub(crate) fn failed(&self) -> usize {
        self.now.failed
    }

    /// How many items an earlier session had finished.
    pub(crate) fn restored(&self) -> usize {
        self.now.restored
    }

    #[inline]
    pub(crate) fn is_due(&self) -> bool {
        self.unpublished >= PUBLISH_EVERY_ITEMS
    }

    /// Notes that all items wait, or that the wait is over. Time in a pause does not lower the rate.
    pub(crate) fn pause(&mut self, paused: Option<Pause>) {
        let now = Instant::now();
        match (self.now.paused.is_some(), paused.is_some()) {
            (false, true) => self.now.rate.halt(now),
            (true, false) => self.now.rate.go_on(now),
            (true, true) | (false, false) => {}
        }
        self.now.paused = paused;
    }

    /// Whether all items wait, as far as is known.
    #[inline]
    pub(crate) fn is_paused(&self) -> bool {
        self.now.paused.is_some()
    }

    /// Publishes the progress of the run, given the least and the most items that the source still has.
    pub(crate) fn publish(&mut self, read: usize, (least, most): (usize, Option<usize>)) {
        self.unpublished = 0;
        self.now.total = read + least;
        self.now.is_total_known = most == Some(least);
        self.now.count(Instant::now());
        let now = self.now;
        self.sender.send_if_modified(|shown| {
            let seen = |it: &Progress| (it.done, it.total, it.is_total_known, it.paused);
            let changed = seen(shown) != seen(&now);
            *shown = now;
            changed
        });
    }
}
