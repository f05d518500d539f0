//! A timer that is created at its first use.
//!
//! Invariant: a runtime without a time driver causes an error, not a panic.

use std::{
    panic::catch_unwind,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    runtime::Handle,
    time::{Instant, Sleep, sleep_until},
};

use crate::error::TaskError;

/// Rings at one time after the other.
#[derive(Debug, Default)]
pub(crate) struct Timer(Option<Pin<Box<Sleep>>>);

impl Timer {
    /// Sets the timer. It cannot fail if it was set before.
    pub(crate) fn set(&mut self, until: Instant) -> Result<(), TaskError> {
        match &mut self.0 {
            Some(sleep) if sleep.deadline() == until => {}
            Some(sleep) => sleep.as_mut().reset(until),
            None => {
                let none = TaskError::Config(
                    "an item that is to wait, for a retry or because it says so, and a grace need tokio's time driver: \
                     build the runtime with `enable_time`",
                );
                // It panics if there is no driver, and there is no other way to find out.
                let sleep = Handle::try_current().ok().and_then(|_| catch_unwind(|| sleep_until(until)).ok());
                self.0 = Some(Box::pin(sleep.ok_or(none)?));
            }
        }
        Ok(())
    }

    /// Becomes ready at the time that was set last; stays pending if none was set.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.0 {
            Some(sleep) => sleep.as_mut().poll(cx),
            None => Poll::Pending,
        }
    }
}
