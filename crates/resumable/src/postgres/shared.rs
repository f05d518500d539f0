//! The messages between the loop that drives the items and the task that keeps the ranges.
//!
//! Invariant: neither waits for the other while it holds the lock, and the keeper takes what the loop recorded as a
//! whole: the records of a range, and the number of finished items after them.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    task::Waker,
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use crate::{
    error::TaskError,
    log::{Blocks, Kind},
    postgres::{
        leases::{Leases, Standing},
        ledger::{Known, Place},
    },
};

/// Once this much waits for an append, the keeper does not wait for the interval.
const APPEND_AT_BYTES: usize = 1 << 20;
/// While this much waits for an append, no new item is started.
const FULL_AT_BYTES: usize = 8 << 20;

/// A range that this worker holds: its number, and an epoch that no other worker has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Hold {
    pub(crate) n: i64,
    pub(crate) epoch: i64,
}

/// What the keeper tells the loop.
#[derive(Debug)]
pub(crate) enum Told {
    /// The job is open; its salt seeds the idempotency keys.
    Opened { salt: u64, leases: Leases },
    /// A range to work on, with what is known of its items, and the place of its next append.
    Granted { hold: Hold, first: usize, items: Vec<Known>, place: Place },
    /// This many records of a range are durable.
    Appended { hold: Hold, records: usize },
    /// Another worker has the range.
    Lost(Hold),
    /// The standing of the whole job.
    Standing(Standing),
    /// More ranges are lost than the run may lose: it must end with this error.
    Fenced(TaskError),
}

/// What a record means for its item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Means {
    Finished,
    Quarantined,
    /// It will be tried again.
    Open,
}

/// A record in the buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recorded {
    /// Its number in its range, counted from 1.
    pub(crate) number: usize,
    pub(crate) has_room: bool,
}

/// A range at work.
#[derive(Debug)]
pub(crate) struct Open {
    pub(crate) epoch: i64,
    pub(crate) count: i32,
    blocks: Blocks,
    records: usize,
    done: i32,
    quarantined: i32,
    /// Whether all its items have been started.
    is_exhausted: bool,
    granted: Instant,
}

/// The records of a range to append.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) hold: Hold,
    pub(crate) blocks: Blocks,
    pub(crate) records: usize,
    pub(crate) done: i32,
    pub(crate) quarantined: i32,
    /// The number of items, once all are finished.
    pub(crate) finished: Option<usize>,
}

#[derive(Debug, Default)]
pub(crate) struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    open: BTreeMap<i64, Open>,
    told: VecDeque<Told>,
    ended: Option<Result<Standing, TaskError>>,
    waker: Option<Waker>,
    /// The bytes of all records that are not yet appended, and since when there are any.
    bytes: usize,
    dirty_since: Option<Instant>,
    is_range_finished: bool,
    /// How long the loop took for the last range it exhausted, until the keeper reads it.
    pace: Option<Duration>,
    /// Ranges that the loop itself has finished, or found to be lost.
    let_go: Vec<(Hold, LetGo)>,
    stop: bool,
    is_over: bool,
}

/// Why the loop released a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LetGo {
    Finished,
    Lost,
}

/// What the keeper sees on a look.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) stop: bool,
    pub(crate) dirty_since: Option<Instant>,
    /// Whether to append the records now.
    pub(crate) hurry: bool,
    /// How many ranges have unstarted items.
    pub(crate) fresh: usize,
    pub(crate) pace: Option<Duration>,
    pub(crate) let_go: Vec<(Hold, LetGo)>,
    pub(crate) has_room: bool,
}

impl Shared {
    /// No code that can panic half-way runs under this lock, so a poisoned lock holds a sound state.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a record to a range; `None` if the range is lost.
    pub(crate) fn record(
        &self,
        hold: Hold,
        kind: Kind,
        index: usize,
        payload: &[u8],
        means: Means,
    ) -> Option<Recorded> {
        let mut state = self.lock();
        let range = state.open.get_mut(&hold.n).filter(|range| range.epoch == hold.epoch)?;
        let before = range.blocks.len();
        range.blocks.record(kind, index as u64, payload);
        range.records += 1;
        range.done += i32::from(means != Means::Open);
        range.quarantined += i32::from(means == Means::Quarantined);
        let (number, added) = (range.records, range.blocks.len() - before);
        let finished = range.done >= range.count;
        let first = state.dirty_since.is_none();
        if first {
            state.dirty_since = Some(Instant::now());
        }
        let small = state.bytes < APPEND_AT_BYTES;
        state.bytes += added;
        state.is_range_finished |= finished;
        let has_room = state.bytes < FULL_AT_BYTES;
        let notify = first || finished || (small && state.bytes >= APPEND_AT_BYTES);
        drop(state);
        if notify {
            self.changed.notify_one();
        }
        Some(Recorded { number, has_room })
    }

    /// Notes that all items of a range have been started.
    pub(crate) fn exhausted(&self, hold: Hold) {
        let mut state = self.lock();
        let Some(range) = state.open.get_mut(&hold.n).filter(|range| range.epoch == hold.epoch) else { return };
        range.is_exhausted = true;
        let pace = range.granted.elapsed();
        state.pace = Some(pace);
        drop(state);
        self.changed.notify_one();
    }

    /// Notes that a loop which appends by itself has finished a range, or found that another worker has it.
    pub(crate) fn let_go(&self, hold: Hold, why: LetGo) {
        let mut state = self.lock();
        if why == LetGo::Finished {
            state.open.remove(&hold.n);
        }
        state.let_go.push((hold, why));
        drop(state);
        self.changed.notify_one();
    }

    /// The keeper's messages since the last call, and whether there is room for more records. The waker is woken when
    /// there is more.
    pub(crate) fn hear(&self, waker: &Waker) -> (VecDeque<Told>, bool) {
        let mut state = self.lock();
        if !state.waker.as_ref().is_some_and(|known| known.will_wake(waker)) {
            state.waker = Some(waker.clone());
        }
        (std::mem::take(&mut state.told), state.bytes < FULL_AT_BYTES)
    }

    /// How the keeper ended, once it has ended and all its messages were read.
    pub(crate) fn ended(&self) -> Option<Result<Standing, TaskError>> {
        let mut state = self.lock();
        if state.told.is_empty() { state.ended.take() } else { None }
    }

    /// Asks the keeper to append what there is, give the ranges back and end.
    pub(crate) fn stop(&self) {
        self.lock().stop = true;
        self.changed.notify_one();
    }

    pub(crate) fn tell(&self, told: Told) {
        let mut state = self.lock();
        state.told.push_back(told);
        wake(state);
    }

    /// Notes how the keeper has ended. Only the first call counts.
    pub(crate) fn tell_end(&self, ended: impl FnOnce() -> Result<Standing, TaskError>) {
        let mut state = self.lock();
        if std::mem::replace(&mut state.is_over, true) {
            return;
        }
        state.ended = Some(ended());
        wake(state);
    }

    /// Hands a range to the loop.
    pub(crate) fn grant(&self, hold: Hold, first: usize, items: Vec<Known>, place: Place) {
        let Place { done, quarantined, .. } = place;
        let count = i32::try_from(items.len()).unwrap_or(i32::MAX);
        let mut state = self.lock();
        // If a worker died after the last item but before the end of its range, an append without records finishes the
        // range.
        state.is_range_finished |= done >= count;
        let range = Open {
            epoch: hold.epoch,
            count,
            blocks: Blocks::default(),
            records: 0,
            done,
            quarantined,
            is_exhausted: false,
            granted: Instant::now(),
        };
        state.open.insert(hold.n, range);
        state.told.push_back(Told::Granted { hold, first, items, place });
        wake(state);
    }

    /// Takes records of ranges, about `limit_bytes` at most, and the finished ranges.
    pub(crate) fn take(&self, limit_bytes: usize) -> Vec<Batch> {
        let mut state = self.lock();
        let (mut batches, mut bytes, mut is_all): (Vec<Batch>, _, _) = (Vec::new(), 0, true);
        for (&n, range) in &mut state.open {
            let finished = range.done >= range.count;
            if range.blocks.is_empty() && !finished {
                continue;
            }
            if bytes >= limit_bytes {
                is_all = false;
                break;
            }
            bytes += range.blocks.len();
            batches.push(Batch {
                hold: Hold { n, epoch: range.epoch },
                blocks: std::mem::take(&mut range.blocks),
                records: range.records,
                done: range.done,
                quarantined: range.quarantined,
                finished: finished.then_some(usize::try_from(range.count).unwrap_or_default()),
            });
        }
        // Nothing is added to a finished range any more.
        for batch in batches.iter().filter(|batch| batch.finished.is_some()) {
            state.open.remove(&batch.hold.n);
        }
        state.bytes = state.bytes.saturating_sub(bytes);
        if is_all {
            state.dirty_since = None;
            state.is_range_finished = false;
        }
        wake(state);
        batches
    }

    /// Takes back a range that another worker has.
    pub(crate) fn lose(&self, hold: Hold) {
        let mut state = self.lock();
        if state.open.get(&hold.n).is_some_and(|range| range.epoch == hold.epoch)
            && let Some(range) = state.open.remove(&hold.n)
        {
            state.bytes = state.bytes.saturating_sub(range.blocks.len());
        }
        state.told.push_back(Told::Lost(hold));
        wake(state);
    }

    pub(crate) fn see(&self) -> Seen {
        let mut state = self.lock();
        Seen {
            pace: state.pace.take(),
            let_go: std::mem::take(&mut state.let_go),
            stop: state.stop,
            dirty_since: state.dirty_since,
            hurry: state.is_range_finished || state.bytes >= APPEND_AT_BYTES,
            fresh: state.open.values().filter(|range| !range.is_exhausted).count(),
            has_room: state.bytes < FULL_AT_BYTES,
        }
    }

    /// Waits until the loop has something new, or until `until`.
    pub(crate) async fn changed(&self, until: Instant) {
        drop(tokio::time::timeout_at(until, self.changed.notified()).await);
    }
}

/// Lets the loop look again.
fn wake(mut state: MutexGuard<'_, State>) {
    let waker = state.waker.take();
    drop(state);
    if let Some(waker) = waker {
        waker.wake();
    }
}
