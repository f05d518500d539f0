//! How a run learns that it is to stop, and how long what it runs may still go on.
//!
//! Invariant: a token that has fired is never waited for again.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::{error::TaskError, item::later, timer::Timer};

/// The token of a run and the grace after it has fired.
#[derive(Debug)]
pub(crate) struct Stop {
    token: CancellationToken,
    fired: Pin<Box<WaitForCancellationFutureOwned>>,
    grace: Duration,
    is_set: bool,
    timer: Timer,
}

impl Stop {
    pub(crate) fn new(token: CancellationToken, grace: Duration) -> Self {
        let fired = Box::pin(token.clone().cancelled_owned());
        Self { token, fired, grace, is_set: false, timer: Timer::default() }
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
