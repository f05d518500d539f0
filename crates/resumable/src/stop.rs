//! How a run learns that it is to stop, and how long what it runs may still go on.
//!
//! Invariant: a token that has fired is never waited for again.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::Sleep;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::flight::LONGEST_WAIT;

/// The token of a run and the grace after it has fired.
#[derive(Debug)]
pub(crate) struct Stop {
    token: CancellationToken,
    fired: Pin<Box<WaitForCancellationFutureOwned>>,
    grace: Duration,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Stop {
    pub(crate) fn new(token: CancellationToken, grace: Duration) -> Self {
        let fired = Box::pin(token.clone().cancelled_owned());
        Self { token, fired, grace, timer: None }
    }

    #[inline]
    pub(crate) fn is_asked_for(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Becomes ready when the token fires.
    pub(crate) fn poll_asked_for(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.fired.as_mut().poll(cx)
    }

    /// Becomes ready when what runs has had its time since the first call.
    pub(crate) fn poll_grace(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.grace.is_zero() {
            return Poll::Ready(());
        }
        let grace = self.grace.min(LONGEST_WAIT);
        self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(grace))).as_mut().poll(cx)
    }
}
