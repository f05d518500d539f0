//! Watches the server over another connection while a caller waits for its answer: to cancel statements that still run
//! after a drop, and to notice when no answer can come any more.
//!
//! Invariant: when a watch has ended, none of its acknowledged cancels is still on its way, and no more will be sent.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use futures_util::future::{Either, select};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::backend::{Activity, Backend, Cancels, Unsignalled, Wanted};
use crate::events::TxEvent;
use crate::slot::Shared;
use crate::work::Tag;

/// When to cancel a statement whose reader keeps the thread too busy to check the clock: after a whole such time in which
/// the reader was reading. A reader that its machine does not let run yet has nothing to be cancelled.
const BESIDE_GRACE: Duration = Duration::from_millis(2);

/// How long a cancel has to take effect before it is repeated, in addition to the round trip to the server: this long
/// at first, twice as long each time, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// How long the server may wait for a client that waits for the server, before the two count as out of step: a driver
/// whose future was dropped in the middle of an answer may have lost its place in it. It is long, because a client on a
/// busy machine looks the same. Round trips to the server are added, because what is seen there is as old as they are.
const IDLE_LIMIT: Duration = Duration::from_millis(500);
const IDLE_ROUND_TRIPS: u32 = 4;

/// How often to check a server that does not answer a caller, and how long one check may take.
const LOOK_PAUSE: Duration = Duration::from_millis(500);

/// The same after a drop.
const SETTLE_LOOK_PAUSE: Duration = Duration::from_millis(100);

/// After a drop.
pub(crate) const SETTLE_PATIENCE: Patience = Patience { pause: SETTLE_LOOK_PAUSE, limit: IDLE_LIMIT };

/// The reason given then.
pub(crate) const OUT_OF_STEP: &str = "what a dropped statement has left behind could not be read";

/// How often to check the server, and how long it may be seen idle.
#[derive(Clone, Copy)]
pub(crate) struct Patience {
    pause: Duration,
    limit: Duration,
}

impl Patience {
    /// The patience while a caller waits: `limit` is how long the server must be seen waiting for the client before no
    /// answer is expected any more. The last request may still be on its way to the server, and a large answer may be
    /// on its way to the client for longer.
    pub(crate) fn caller(limit: Duration) -> Self {
        Self { pause: LOOK_PAUSE, limit }
    }
}

/// Waits for an answer, or until none can be expected: `None` if the server has waited for the client for too long.
pub(crate) async fn unless_stuck<DB: Backend, T>(
    shared: &Shared<DB>,
    probe: &DB::Probe,
    patience: Patience,
    answer: impl Future<Output = T>,
) -> Option<T> {
    if !DB::LOSES_ITS_PLACE {
        return Some(answer.await);
    }
    let mut answer = pin!(answer);
    let mut idle_since = None;
    loop {
        if let Ok(answer) = timeout(patience.pause, answer.as_mut()).await {
            return Some(answer);
        }
        let options = shared.options();
        let look = pin!(timeout(LOOK_PAUSE, shared.canceller.signal(&options, Wanted::Look, probe)));
        match select(answer.as_mut(), look).await {
            Either::Left((answer, _)) => return Some(answer),
            Either::Right((Ok(Ok(Activity::Idle)), _)) => {
                let since: &mut Instant = idle_since.get_or_insert_with(Instant::now);
                if since.elapsed() > patience.limit.saturating_add(shared.canceller.round_trip() * IDLE_ROUND_TRIPS) {
                    return None;
                }
            }
            Either::Right(_) => idle_since = None,
        }
    }
}

/// Cancels a running statement, when told to or after [`BESIDE_GRACE`], until it is told that nothing runs any more. It
/// works concurrently with the reader of the answers, because sqlx does not return from a poll as long as there are
/// rows to read, and a fast server always has some.
pub(crate) struct Watch {
    signals: Arc<Signals>,
    pub(crate) seen: JoinHandle<Seen>,
}

#[derive(Default)]
struct Signals {
    /// Whose turn it is: [`FREE`], [`CANCELLING`] or [`ENDED`].
    turn: AtomicU8,
    /// The reader has begun.
    is_reading: AtomicBool,
    /// Notified when the answer has been waited for long enough.
    overdue: Notify,
    /// Notified when nothing runs any more.
    ended: Notify,
}

/// No cancel is under way.
const FREE: u8 = 0;
/// A cancel is under way.
const CANCELLING: u8 = 1;
/// No cancel will be sent any more.
const ENDED: u8 = 2;

/// The outcome of the cancels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    /// There were none, or all were acknowledged.
    Settled,
    /// One was not acknowledged: it may still be on its way to the session, which must not be used again.
    Unanswered,
    /// There is no way to cancel anything: the server has no session left for it, or does not answer.
    Unreachable,
    /// The server waits for the client and the client for the server.
    Stuck,
}

impl Watch {
    /// The answers are read from now on.
    pub(crate) fn begins(&self) {
        self.signals.is_reading.store(true, Ordering::Release);
    }

    pub(crate) fn over<DB: Backend>(shared: &Arc<Shared<DB>>, probe: &DB::Probe, tag: Tag) -> Self {
        let signals = Arc::<Signals>::default();
        let beside = DB::Canceller::beside().unwrap_or_else(Handle::current);
        let seen = beside.spawn(watch_over(Arc::downgrade(shared), probe.clone(), tag, Arc::clone(&signals)));
        Self { signals, seen }
    }

    /// Says that the statement has been waited for long enough.
    pub(crate) fn is_overdue(&self) {
        self.signals.overdue.notify_one();
    }

    /// Nothing runs any more. Does not wait where no cancel is under way, as after most drops.
    pub(crate) async fn end(&mut self) -> Seen {
        match self.signals.end() {
            CANCELLING => (&mut self.seen).await.unwrap_or(Seen::Unanswered),
            _ => Seen::Settled,
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // A caller that gives up waiting for the answer to a cancel gives up the cancel.
        if self.signals.end() == CANCELLING {
            self.seen.abort();
        }
    }
}

impl Signals {
    /// Waits until a cancel is due, or all has ended.
    async fn due(&self) {
        loop {
            let was_reading = self.is_reading.load(Ordering::Acquire);
            let told = timeout(BESIDE_GRACE, self.overdue.notified()).await;
            if told.is_ok() || was_reading || self.turn.load(Ordering::Acquire) == ENDED {
                return;
            }
        }
    }

    fn end(&self) -> u8 {
        let was = self.turn.swap(ENDED, Ordering::AcqRel);
        self.ended.notify_one();
        was
    }

    /// Passes the turn on, unless everything has ended.
    fn pass(&self, from: u8, to: u8) -> bool {
        self.turn.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

/// After a failed cancel the turn stays [`CANCELLING`], so that the end of the watch asks how it failed.
async fn watch_over<DB: Backend>(shared: Weak<Shared<DB>>, probe: DB::Probe, tag: Tag, signals: Arc<Signals>) -> Seen {
    signals.due().await;
    if !signals.pass(FREE, CANCELLING) {
        return Seen::Settled;
    }
    let Some(shared) = shared.upgrade() else { return Seen::Settled };
    shared.teller.tell(TxEvent::CancelSent, tag);
    let mut pause = FIRST_PAUSE;
    let mut idle_since = None;
    // A cancel that comes before the server has read the statement has no effect, so it is repeated. It is never
    // dropped halfway while the session may be used again.
    loop {
        let cancelled = shared.canceller.signal(&shared.options(), Wanted::Cancel, &probe).await;
        let round_trip = shared.canceller.round_trip();
        match cancelled {
            Ok(Activity::Unseen) => idle_since = None,
            Ok(Activity::Idle) => {
                let since: &mut Instant = idle_since.get_or_insert_with(Instant::now);
                if since.elapsed() > IDLE_LIMIT + round_trip * IDLE_ROUND_TRIPS {
                    return Seen::Stuck;
                }
            }
            Err(Unsignalled::Unanswered) => return Seen::Unanswered,
            Err(Unsignalled::Unreachable) => return Seen::Unreachable,
        }
        if !signals.pass(CANCELLING, FREE) {
            return Seen::Settled;
        }
        drop(timeout(pause + round_trip, signals.ended.notified()).await);
        if !signals.pass(FREE, CANCELLING) {
            return Seen::Settled;
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_has_not_begun_is_not_cancelled() {
        let signals = Signals::default();
        let mut due = pin!(signals.due());
        assert!(timeout(BESIDE_GRACE * 100, due.as_mut()).await.is_err());
        signals.is_reading.store(true, Ordering::Release);
        let start = tokio::time::Instant::now();
        due.await;
        assert!((BESIDE_GRACE..BESIDE_GRACE * 4).contains(&start.elapsed()));
        // One that has ended before is none.
        let signals = Signals::default();
        signals.end();
        signals.due().await;
    }

    #[tokio::test]
    async fn who_gives_up_waiting_for_the_answer_to_a_cancel_gives_up_the_cancel() {
        let (held, released) = oneshot::channel::<()>();
        let signals = Arc::new(Signals { turn: AtomicU8::new(CANCELLING), ..Signals::default() });
        // A cancel on its way to a server that does not answer.
        let seen = tokio::spawn(async move {
            let _held = held;
            pending().await
        });
        let mut watch = Watch { signals, seen };
        assert!(timeout(Duration::from_millis(10), watch.end()).await.is_err(), "nobody has answered");
        watch.signals.turn.store(CANCELLING, Ordering::Release);
        drop(watch);
        let released = timeout(Duration::from_secs(10), released).await;
        assert!(released.expect("the cancel goes on").is_err());
    }
}
