//! How a run learns that it must stop, and how long its items may still continue.
//!
//! Invariant: a token that has fired is never waited for again.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use futures_util::task::AtomicWaker;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::{error::TaskError, item::later, timer::Timer};

/// The token of a run and the grace after it has fired.
#[derive(Debug)]
pub(crate) struct Stop {
    fired: Pin<Box<WaitForCancellationFutureOwned>>,
    news: Arc<News>,
    is_asked_for: bool,
    grace: Duration,
    is_set: bool,
    timer: Timer,
}

/// Whether the token has news. This is checked before each item, because checking the token itself takes a lock.
#[derive(Debug)]
struct News {
    are_there: AtomicBool,
    run: AtomicWaker,
}

impl Wake for News {
    fn wake(self: Arc<Self>) {
        // Before the run is woken and looks; otherwise it would go back to sleep.
        self.are_there.store(true, Ordering::Release);
        self.run.wake();
    }
}

impl Stop {
    pub(crate) fn new(token: CancellationToken, grace: Duration) -> Self {
        let fired = Box::pin(token.cancelled_owned());
        // It may have fired before.
        let news = Arc::new(News { are_there: AtomicBool::new(true), run: AtomicWaker::new() });
        Self { fired, news, is_asked_for: false, grace, is_set: false, timer: Timer::default() }
    }

    #[inline]
    pub(crate) fn is_asked_for(&mut self) -> bool {
        if self.news.are_there.load(Ordering::Acquire) {
            self.look();
        }
        self.is_asked_for
    }

    /// Polls the token and registers for its firing. A wake-up may be spurious; then the token is polled again.
    #[cold]
    fn look(&mut self) {
        self.news.are_there.store(false, Ordering::Relaxed);
        let waker = Waker::from(Arc::clone(&self.news));
        self.is_asked_for = self.is_asked_for || self.fired.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
    }

    /// Becomes ready when the token fires.
    pub(crate) fn poll_asked_for(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.news.run.register(cx.waker());
        if self.is_asked_for() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Becomes ready when the running items have had their grace since the first call.
    pub(crate) fn poll_grace(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TaskError>> {
        if self.grace.is_zero() {
            return Poll::Ready(Ok(()));
        }
        if !self.is_set {
            self.timer.set(later(self.grace))?;
            self.is_set = true;
        }
        self.timer.poll(cx).map(Ok)
    }
}
