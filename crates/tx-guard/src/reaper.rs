//! What happens to a transaction after its caller has gone.
//!
//! Invariant: a connection goes back to its pool only after it was seen idle and clean. Whatever is dropped
//! before that, by a caller or by the end of the runtime, closes its connection instead.

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Either, select};
use sqlx::Connection;
use tokio::runtime::{EnterGuard, Handle};
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::TxError;
use crate::backend::{Activity, Backend, CommitMode, Rollback};
use crate::commit::{CommitOutcome, OutcomeCell};
use crate::events::TxEvent;
use crate::slot::{Shared, Slot};

/// How long a statement may go on after its transaction was dropped before it is cancelled. Most are about to end.
const DRAIN_GRACE: Duration = Duration::from_millis(1);

/// The same where the rollback keeps its thread too busy to look at the clock.
const BESIDE_GRACE: Duration = Duration::from_millis(3);

/// How long cancelling and rolling back may take before the session is terminated.
pub(crate) const SETTLE_LIMIT: Duration = Duration::from_secs(2);

/// How many errors of abandoned statements are read over before a connection is given up.
const REST_ATTEMPTS: usize = 16;

/// How long a cancel is given to show before it is repeated: so long at first, twice as long each time, up to the
/// longest. Within [`SETTLE_LIMIT`] that is about two dozen of them.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// How long the server may wait for a client that waits for the server, before the two are known to misunderstand each
/// other: a driver whose future was dropped in the middle of an answer may have lost its place in it.
const IDLE_LIMIT: Duration = Duration::from_millis(50);

/// How often a server is looked at that does not answer a caller, and how long one look may take.
const LOOK_PAUSE: Duration = Duration::from_millis(500);

/// For how long it must have been seen waiting for the client until no answer is expected any more. What was asked for last
/// may still be under way to it; what it had to say may be under way to the client for longer, if that is much.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(2);
pub(crate) const CATCH_UP_LIMIT: Duration = Duration::from_secs(5);

/// What is said then.
pub(crate) const OUT_OF_STEP: &str = "what a dropped statement has left behind could not be read";

/// A future that is polled in place, and that finishes on the runtime if it is dropped after its first poll.
pub(crate) struct Shield<T: Send + 'static> {
    future: Option<BoxFuture<'static, T>>,
    runtime: Handle,
    polled: bool,
    /// How long it may go on without its caller. None for a future that bounds itself.
    limit: Option<Duration>,
    late: Option<Late<T>>,
}

/// Outside any runtime nothing could be waited for. Where there is one it is left, because `runtime` may have ended.
pub(crate) fn enter_if_outside(runtime: &Handle) -> Option<EnterGuard<'_>> {
    Handle::try_current().is_err().then(|| runtime.enter())
}

/// Polls `future` where there are timers, wherever it is polled.
pub(crate) async fn inside<T>(runtime: &Handle, future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let poll = |cx: &mut Context<'_>| {
        let _entered = enter_if_outside(runtime);
        future.as_mut().poll(cx)
    };
    poll_fn(poll).await
}

/// What is done with an output that has come too late for the caller, or not at all.
type Late<T> = Box<dyn FnOnce(Option<T>) + Send>;

impl<T: Send + 'static> Shield<T> {
    pub(crate) fn new(runtime: Handle, future: impl Future<Output = T> + Send + 'static) -> Self {
        Self { future: Some(Box::pin(future)), runtime, polled: false, limit: None, late: None }
    }

    /// Lets the future go on for so long without its caller; then it is dropped, and the slot inside closes its
    /// connection. A peer that has vanished without a word would otherwise hold the slot for ever.
    pub(crate) fn alone_for(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Hands the output to `late` if the caller has gone before it came.
    pub(crate) fn or_late(mut self, late: impl FnOnce(Option<T>) + Send + 'static) -> Self {
        self.late = Some(Box::new(late));
        self
    }
}

impl<T: Send + 'static> Future for Shield<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        self.polled = true;
        let runtime = self.runtime.clone();
        let _entered = enter_if_outside(&runtime);
        // Taken out for the poll, so that a future that panics in it is not polled again by the runtime.
        let mut future = self.future.take().expect("a future is not polled again after it has completed");
        let polled = future.as_mut().poll(cx);
        if polled.is_pending() {
            self.future = Some(future);
        }
        polled
    }
}

impl<T: Send + 'static> Drop for Shield<T> {
    fn drop(&mut self) {
        if let Some(future) = self.future.take_if(|_| self.polled) {
            let (limit, late) = (self.limit, self.late.take());
            // A runtime that has shut down drops the future here, and the slot inside closes its connection.
            drop(self.runtime.spawn(async move {
                // A hook of the user's may panic, after a commit of which is to be told all the same.
                let future = AssertUnwindSafe(future).catch_unwind();
                let output = match limit {
                    Some(limit) => timeout(limit, future).await.ok(),
                    None => Some(future.await),
                };
                let (output, panic) = match output.transpose() {
                    Ok(output) => (output, None),
                    Err(panic) => (None, Some(panic)),
                };
                if let Some(late) = late {
                    late(output);
                }
                if let Some(panic) = panic {
                    resume_unwind(panic);
                }
            }));
        }
    }
}

/// A transaction and all that belongs to it. The order of the fields is the order of their drops: the connection is
/// given back or closed, then the outcome is told, and only then does the pool count the transaction as ended.
pub(crate) struct Open<DB: Backend> {
    pub(crate) slot: Slot<DB>,
    pub(crate) outcome: OutcomeCell,
    pub(crate) runtime: Handle,
    pub(crate) ticket: Arc<Ticket>,
    pub(crate) shared: Arc<Shared<DB>>,
    pub(crate) hooks: Vec<Hook>,
    pub(crate) commit_mode: CommitMode,
}

/// What runs once after a commit.
pub(crate) type Hook = Box<dyn FnOnce() + Send>;

impl<DB: Backend> Open<DB> {
    /// Gives the connection back. Only for one that was seen idle and clean.
    pub(crate) async fn release(self) {
        let closed = self.shared.work.is_closed();
        self.slot.release(closed).await;
    }
}

impl<DB: Backend> Open<DB> {
    /// Gives the connection back when what was left to be sent has its answer, for which nobody waits: a message that
    /// follows sooner is held back by the client's own TCP until then, so another connection serves the next caller
    /// better. One without an answer within [`SETTLE_LIMIT`] is closed.
    pub(crate) async fn release_answered(mut self) {
        if self.slot.takes_unsent() {
            return self.release().await;
        }
        match self.slot.parts().0.flush().now_or_never() {
            Some(Ok(())) => self.release().await,
            Some(Err(_)) => {}
            None => {
                self.ticket.settling();
                let runtime = self.runtime.clone();
                drop(runtime.spawn(async move {
                    if let Ok(Ok(())) = timeout(SETTLE_LIMIT, self.slot.parts().0.flush()).await {
                        self.release().await;
                    }
                }));
            }
        }
    }
}

/// Ends a transaction whose statement may still run: a moment to finish, then a cancel from outside, then the
/// rollback. Past [`SETTLE_LIMIT`] the session is terminated.
///
/// # Errors
///
/// [`TxError::Database`]: the connection failed and was closed; the server rolls back what it had. [`TxError::Lost`]:
/// there was nothing to be rolled back any more.
pub(crate) async fn settle<DB: Backend>(mut open: Open<DB>) -> Result<(), TxError> {
    open.ticket.settling();
    let shared = Arc::clone(&open.shared);
    let (conn, probe) = open.slot.parts();
    let ended_before = DB::may_have_committed(conn);
    if ended_before {
        open.outcome.stands(CommitOutcome::Unknown);
    }
    let ended = match timeout(SETTLE_LIMIT, come_to_rest::<DB>(&shared, conn, probe)).await {
        Ok(Ok((found, rest))) => {
            if found == Rollback::TooLate {
                open.outcome.stands(CommitOutcome::Unknown);
            }
            match rest {
                Rest::Clean => open.release().await,
                // Rolled back, but not to be used again: the drop closes it.
                Rest::Doubtful => drop(open),
            }
            Ok(found)
        }
        // A connection that was lost has ended its session, or will as soon as the server knows.
        Ok(Err(Unrest::Failed(error @ sqlx::Error::Io(_)))) => Err(error),
        Ok(Err(Unrest::Failed(error))) => {
            terminate(&mut open).await;
            Err(error)
        }
        Ok(Err(Unrest::Stuck)) | Err(_) => {
            terminate(&mut open).await;
            Ok(Rollback::Done)
        }
    };
    match ended {
        // The end of the session has rolled back what there was, but not what was committed before.
        _ if ended_before => Err(TxError::Lost { reason: ENDED_BEFORE }),
        Ok(Rollback::Done) => Ok(()),
        Ok(Rollback::TooLate) => Err(TxError::Lost { reason: ENDED_BEFORE }),
        Err(error) => Err(TxError::Database(error)),
    }
}

/// Who has found no transaction any more says so.
pub(crate) const ENDED_BEFORE: &str = "its SQL, or the database itself, had ended the transaction already";

/// How a session has come to rest.
enum Rest {
    /// Rolled back, idle, and beyond the reach of any cancel.
    Clean,
    /// Rolled back, but a cancel may still be on its way to it.
    Doubtful,
}

/// Why a session has not come to rest.
enum Unrest {
    Failed(sqlx::Error),
    /// The server waits for the client and the client for the server.
    Stuck,
}

impl From<sqlx::Error> for Unrest {
    fn from(error: sqlx::Error) -> Self {
        Self::Failed(error)
    }
}

/// Waits for an answer, or until none is to be expected: `None` if the server has waited for the client for `limit`.
pub(crate) async fn unless_stuck<DB: Backend, T>(
    shared: &Shared<DB>,
    probe: &DB::Probe,
    limit: Duration,
    answer: impl Future<Output = T>,
) -> Option<T> {
    if !DB::LOSES_ITS_PLACE {
        return Some(answer.await);
    }
    let mut answer = pin!(answer);
    let mut idle_since = None;
    loop {
        if let Ok(answer) = timeout(LOOK_PAUSE, answer.as_mut()).await {
            return Some(answer);
        }
        // Bounded, because the cancels of others wait for it.
        let look = pin!(timeout(LOOK_PAUSE, DB::look(&shared.canceller, &shared.options, probe)));
        match select(answer.as_mut(), look).await {
            Either::Left((answer, _)) => return Some(answer),
            Either::Right((Ok(Ok(Activity::Idle)), _)) => {
                let since: &mut Instant = idle_since.get_or_insert_with(Instant::now);
                if since.elapsed() > limit {
                    return None;
                }
            }
            Either::Right(_) => idle_since = None,
        }
    }
}

async fn come_to_rest<DB: Backend>(
    shared: &Arc<Shared<DB>>,
    conn: &mut DB::Connection,
    probe: &DB::Probe,
) -> Result<(Rollback, Rest), Unrest> {
    // First, because the rollback may not come back from its first poll before the last row was read.
    let mut watch = Watch::over(shared, probe);
    let ended = {
        let mut rollback = pin!(DB::rollback(conn, probe));
        match timeout(DRAIN_GRACE, rollback.as_mut()).await {
            Ok(ended) => ended,
            Err(_) => {
                watch.signals.overdue.notify_one();
                match select(rollback, &mut watch.seen).await {
                    Either::Left((ended, _)) => ended,
                    Either::Right((Ok(Seen::Stuck), _)) => return Err(Unrest::Stuck),
                    // Another cancel could only add to the doubt.
                    Either::Right((_, rollback)) => return Ok((rollback.await?, Rest::Doubtful)),
                }
            }
        }
    };
    let seen = watch.end().await;
    let found = ended?;
    match seen {
        Seen::Nothing => return Ok((found, Rest::Clean)),
        Seen::Unanswered => return Ok((found, Rest::Doubtful)),
        Seen::Acknowledged | Seen::Stuck => {}
    }
    // The acknowledged cancels are behind this round trip.
    rest::<DB>(conn, probe).await?;
    Ok((found, Rest::Clean))
}

/// Cancels what still runs, when it is told to or after [`BESIDE_GRACE`], until the rollback has ended. It does so beside
/// the rollback, because sqlx does not come back from a poll as long as there are rows to be read, and a fast server
/// always has some.
struct Watch {
    signals: Arc<Signals>,
    /// Tells of the end by its drop.
    end: Option<oneshot::Sender<()>>,
    seen: JoinHandle<Seen>,
    /// No cancel is under way, nor will be.
    is_over: bool,
}

#[derive(Default)]
struct Signals {
    /// Set by who comes first: the first cancel, or the end of the rollback, after which there is none.
    taken: AtomicBool,
    /// The rollback has been waited for long enough.
    overdue: Notify,
}

/// What has become of the cancels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// There was none.
    Nothing,
    /// Each was acknowledged.
    Acknowledged,
    /// One was not: it may still be on its way to the session, which must not be used again.
    Unanswered,
    /// The server waits for the client and the client for the server.
    Stuck,
}

impl Watch {
    fn over<DB: Backend>(shared: &Arc<Shared<DB>>, probe: &DB::Probe) -> Self {
        let signals = Arc::<Signals>::default();
        let (end, ended) = oneshot::channel();
        let beside = DB::beside().unwrap_or_else(Handle::current);
        let seen = beside.spawn(watch_over(Arc::downgrade(shared), probe.clone(), Arc::clone(&signals), ended));
        Self { signals, end: Some(end), seen, is_over: false }
    }

    /// The rollback has ended. Does not wait where nothing was cancelled, as after most drops.
    async fn end(&mut self) -> Seen {
        drop(self.end.take());
        let seen = match self.signals.taken.swap(true, Ordering::AcqRel) {
            false => Seen::Nothing,
            true => (&mut self.seen).await.unwrap_or(Seen::Unanswered),
        };
        self.is_over = true;
        seen
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Given up before its end: a cancel that has no answer would keep those of others waiting.
        if !self.is_over && self.signals.taken.swap(true, Ordering::AcqRel) {
            self.seen.abort();
        }
    }
}

async fn watch_over<DB: Backend>(
    shared: Weak<Shared<DB>>,
    probe: DB::Probe,
    signals: Arc<Signals>,
    mut ended: oneshot::Receiver<()>,
) -> Seen {
    drop(timeout(BESIDE_GRACE, signals.overdue.notified()).await);
    if signals.taken.swap(true, Ordering::AcqRel) {
        return Seen::Nothing;
    }
    let Some(shared) = shared.upgrade() else { return Seen::Nothing };
    shared.teller.tell(TxEvent::CancelSent);
    let mut pause = FIRST_PAUSE;
    let mut idle_since = None;
    // A cancel that comes before the server has read the statement is no cancel, so it is repeated. It is never dropped
    // halfway while the session may be used again.
    loop {
        match DB::cancel(&shared.canceller, &shared.options, &probe).await {
            Ok(Activity::Unseen) => idle_since = None,
            Ok(Activity::Idle) => {
                let since: &mut Instant = idle_since.get_or_insert_with(Instant::now);
                if since.elapsed() > IDLE_LIMIT {
                    return Seen::Stuck;
                }
            }
            Err(_) => return Seen::Unanswered,
        }
        if timeout(pause, &mut ended).await.is_ok() {
            return Seen::Acknowledged;
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Ends the session from outside. If this fails as well, the server finds out by itself that the client has closed.
async fn terminate<DB: Backend>(open: &mut Open<DB>) {
    let shared = Arc::clone(&open.shared);
    shared.teller.tell(TxEvent::SessionTerminated);
    let (_, probe) = open.slot.parts();
    drop(timeout(SETTLE_LIMIT, DB::terminate(&shared.canceller, &shared.options, probe)).await);
}

/// Rolls back the empty transaction that a verified commit leaves behind. Nothing runs there that could be cancelled.
pub(crate) async fn clear<DB: Backend>(mut open: Open<DB>) {
    open.ticket.settling();
    let (conn, probe) = open.slot.parts();
    if let Ok(Ok(_)) = timeout(SETTLE_LIMIT, DB::rollback(conn, probe)).await {
        open.release().await;
    }
}

async fn rest<DB: Backend>(conn: &mut DB::Connection, probe: &DB::Probe) -> Result<(), sqlx::Error> {
    for _ in 0..REST_ATTEMPTS {
        match DB::rest(conn, probe).await {
            Err(sqlx::Error::Database(_)) => {}
            answered => return answered,
        }
    }
    Err(sqlx::Error::Protocol("the connection does not come to rest".into()))
}

/// How many transactions of a pool are under way.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Load {
    /// In the hands of their users.
    pub(crate) open: usize,
    /// Being committed or rolled back.
    pub(crate) settling: usize,
    closed: bool,
}

/// Counts the transactions of a pool, so that closing it can wait for them.
#[derive(Debug, Default)]
pub(crate) struct Work(watch::Sender<Load>);

impl Work {
    pub(crate) fn is_closed(&self) -> bool {
        self.0.borrow().closed
    }

    pub(crate) fn close(&self) {
        self.0.send_modify(|load| load.closed = true);
    }

    pub(crate) fn load(&self) -> Load {
        *self.0.borrow()
    }

    /// Waits until no transaction is under way.
    pub(crate) async fn idle(&self) {
        // The sender is borrowed here, so it is not gone and the wait cannot fail.
        drop(self.0.subscribe().wait_for(|load| load.open + load.settling == 0).await);
    }
}

/// One transaction's place in the count, kept until the last who has to do with it is done.
pub(crate) struct Ticket {
    work: Arc<Work>,
    settling: AtomicBool,
}

impl Ticket {
    pub(crate) fn new(work: &Arc<Work>) -> Arc<Self> {
        work.0.send_modify(|load| load.open += 1);
        Arc::new(Self { work: Arc::clone(work), settling: AtomicBool::new(false) })
    }

    /// Moves the transaction from its user's hands to ours.
    pub(crate) fn settling(&self) {
        if !self.settling.swap(true, Ordering::Relaxed) {
            self.work.0.send_modify(|load| {
                load.open -= 1;
                load.settling += 1;
            });
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let settling = *self.settling.get_mut();
        self.work.0.send_modify(|load| match settling {
            true => load.settling -= 1,
            false => load.open -= 1,
        });
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    #[tokio::test]
    async fn who_gives_up_waiting_for_the_answer_to_a_cancel_gives_up_the_cancel() {
        let (end, ended) = oneshot::channel();
        let (held, released) = oneshot::channel::<()>();
        let signals = Arc::new(Signals { taken: AtomicBool::new(true), overdue: Notify::new() });
        // A cancel on its way to a server that does not answer, which keeps the connection for cancelling.
        let seen = tokio::spawn(async move {
            let _held = held;
            drop(ended.await);
            pending().await
        });
        let mut watch = Watch { signals, end: Some(end), seen, is_over: false };
        assert!(timeout(Duration::from_millis(10), watch.end()).await.is_err(), "nobody has answered");
        drop(watch);
        let released = timeout(Duration::from_secs(10), released).await;
        assert!(released.expect("it still keeps the connection").is_err());
    }
}
