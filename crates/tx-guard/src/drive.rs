//! A future that continues without its caller, and the runtime on which it does so.
//!
//! Invariant: a future that was polled once is driven to its end, or to its limit, and its output goes to the handler
//! that was set for it. A future that was never polled does nothing.

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::runtime::{EnterGuard, Handle};
use tokio::time::timeout;

/// A future that is polled in place, and that finishes on the runtime if it is dropped after its first poll.
pub(crate) struct Driven<T: Send + 'static> {
    future: Option<BoxFuture<'static, T>>,
    runtime: Handle,
    polled: bool,
    /// How long it may continue without its caller. `None` for a future that bounds itself.
    limit: Option<Duration>,
    late: Option<Late<T>>,
}

/// Enters `runtime` outside any runtime, because nothing could be waited for there. Inside a runtime it does nothing,
/// because `runtime` may have ended.
pub(crate) fn enter_if_outside(runtime: &Handle) -> Option<EnterGuard<'_>> {
    Handle::try_current().is_err().then(|| runtime.enter())
}

/// Polls `future` inside `runtime` if necessary, so that it always has timers.
pub(crate) async fn inside<T>(runtime: &Handle, future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let poll = |cx: &mut Context<'_>| {
        let _entered = enter_if_outside(runtime);
        future.as_mut().poll(cx)
    };
    poll_fn(poll).await
}

/// What to do with an output that came too late for the caller, or not at all.
type Late<T> = Box<dyn FnOnce(Option<T>) + Send>;

impl<T: Send + 'static> Driven<T> {
    pub(crate) fn new(runtime: Handle, future: impl Future<Output = T> + Send + 'static) -> Self {
        Self { future: Some(Box::pin(future)), runtime, polled: false, limit: None, late: None }
    }

    /// Lets the future continue for this long without its caller. Then it is dropped, and the slot inside closes its
    /// connection. Otherwise a peer that vanished silently would hold the slot for ever.
    pub(crate) fn alone_for(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Passes the output to `late` if the caller has gone by then.
    pub(crate) fn or_late(mut self, late: impl FnOnce(Option<T>) + Send + 'static) -> Self {
        self.late = Some(Box::new(late));
        self
    }
}

impl<T: Send + 'static> Future for Driven<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        self.polled = true;
        let runtime = self.runtime.clone();
        let _entered = enter_if_outside(&runtime);
        // Taken out for the poll: if the future panics there, the runtime must not poll it again.
        let mut future = self.future.take().expect("a future is not polled again after it has completed");
        let polled = future.as_mut().poll(cx);
        if polled.is_pending() {
            self.future = Some(future);
        }
        polled
    }
}

impl<T: Send + 'static> Drop for Driven<T> {
    fn drop(&mut self) {
        if let Some(future) = self.future.take_if(|_| self.polled) {
            let (limit, late) = (self.limit, self.late.take());
            // A runtime that has shut down drops the future here, and the slot inside closes its connection.
            drop(self.runtime.spawn(async move {
                // A user's hook may panic after the commit. The commit is reported all the same.
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
