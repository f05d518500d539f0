//! Two clocks: tokio's, which tests may pause, and the system's, on a thread that no task can hold up. And a probe from
//! outside: an empty task that shows whether the runtime still runs anything.
//!
//! Each of those tasks also wakes a thread of the runtime. Otherwise a thread that holds the timers while it polls a
//! task for ever would keep the others asleep (tokio#4730). Invariant: a deadline on the system's clock needs no
//! runtime, and each asking thread has at most one probe in flight.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;

/// The clock that enforces a deadline.
#[derive(Debug, Clone)]
pub(crate) enum Clock {
    /// The timers of the runtime that polls the future.
    Tokio,
    /// The thread that is inside [`drive`] with this alarm.
    System(Arc<Alarm>),
}

/// When the thread that drives a future has to poll it again.
#[derive(Debug, Default)]
pub(crate) struct Alarm(Mutex<Option<Instant>>);

impl Alarm {
    fn set(&self, due: Instant) {
        let mut set = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *set = Some(set.map_or(due, |earlier| earlier.min(due)));
    }

    fn take(&self) -> Option<Instant> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Clock {
    /// Polls `future` to its end, or drops it at `deadline`.
    pub(crate) async fn timeout_at<F: Future>(&self, deadline: Instant, future: F) -> Option<F::Output> {
        let alarm = match self {
            Self::Tokio => return tokio::time::timeout_at(deadline, future).await.ok(),
            Self::System(alarm) => alarm,
        };
        let mut future = pin!(future);
        poll_fn(|cx| match future.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if Instant::now() >= deadline => Poll::Ready(None),
            Poll::Pending => {
                alarm.set(deadline);
                Poll::Pending
            }
        })
        .await
    }

    pub(crate) async fn sleep(&self, duration: Duration) {
        let _elapsed = self.timeout_at(Instant::now() + duration, std::future::pending::<()>()).await;
    }
}

/// Drives a future to its end on this thread. The future wakes it through `alarm`, which it sets anew at each poll.
/// Before each sleep, `between` is called and returns the longest time to sleep.
pub(crate) fn drive<F: Future>(alarm: &Alarm, future: F, mut between: impl FnMut() -> Option<Duration>) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        let due = alarm.take().map(|due| due.saturating_duration_since(Instant::now()));
        match due.into_iter().chain(between()).min() {
            Some(longest) => thread::park_timeout(longest),
            None => thread::park(),
        }
    }
}

/// How often to probe the runtime while an application stops.
pub(crate) const TICK: Duration = Duration::from_millis(20);

/// Counts the probes and their answers.
#[derive(Debug, Default)]
pub(crate) struct Probe {
    asked: AtomicU64,
    answered: Arc<AtomicU64>,
}

impl Probe {
    /// Sends a probe, unless the last one is still unanswered. For one thread.
    pub(crate) fn ask(&self, runtime: &Handle) {
        if self.open() == 0 {
            self.ask_for(runtime, || {});
        }
    }

    /// Sends a probe that calls `tell` when it runs. If the runtime ends first, `tell` is dropped without a call.
    pub(crate) fn ask_for(&self, runtime: &Handle, tell: impl FnOnce() + Send + 'static) {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let answered = Arc::clone(&self.answered);
        drop(runtime.spawn(async move {
            answered.fetch_add(1, Ordering::Relaxed);
            tell();
        }));
    }

    /// How many probes have been answered.
    pub(crate) fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// How many probes are in flight.
    pub(crate) fn open(&self) -> u64 {
        self.asked.load(Ordering::Relaxed).saturating_sub(self.answered())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_clock_keeps_a_deadline_without_a_runtime_and_prefers_what_is_ready() {
        let alarm = Arc::new(Alarm::default());
        let clock = Clock::System(Arc::clone(&alarm));
        let begun = Instant::now();
        let deadline = begun + Duration::from_millis(20);
        let (never, ready) = drive(
            &alarm,
            async {
                let never = clock.timeout_at(deadline, std::future::pending::<()>()).await;
                (never, clock.timeout_at(deadline, async { 7 }).await)
            },
            || None,
        );
        assert_eq!((never, ready), (None, Some(7)));
        assert!(begun.elapsed() >= Duration::from_millis(20));
    }
}
