//! The turns of the scheduler, which run tasks one poll at a time.
//!
//! Invariant: between two turns no task runs, and a turn is "idle" only if none was ready.
//!
//! Stock tokio does not report that it has polled a task. But a current-thread runtime with an event interval of one
//! polls a driver that has woken itself after every task. And it runs its tasks in turn: if our own task, the sentinel,
//! is queued behind all others and is the next to be polled, nothing else was ready.

use std::future::poll_fn;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use crate::lock::lock;

/// The outcome of one step of the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// A task was polled.
    Ran,
    /// None was ready.
    Idle,
}

/// Hands out the turns of the runtime on which it was created.
#[derive(Debug)]
pub(crate) struct Turns(Arc<Mutex<Sentinel>>);

/// A task that only reports that it had its turn.
#[derive(Debug, Default)]
struct Sentinel {
    polled: bool,
    waker: Option<Waker>,
}

impl Sentinel {
    fn poll(&mut self, cx: &Context<'_>) -> Poll<()> {
        self.polled = true;
        self.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Turns {
    /// Starts the sentinel. Must be called on the runtime.
    pub(crate) fn begin() -> Self {
        let sentinel = Arc::new(Mutex::new(Sentinel::default()));
        let ours = Arc::clone(&sentinel);
        drop(tokio::spawn(poll_fn(move |cx| lock(&ours).poll(cx))));
        Self(sentinel)
    }

    /// Polls the next ready task, if there is one, and lets everything that is due at once happen.
    pub(crate) async fn step(&self) -> Step {
        // A task made ready by another task or by the driver is queued behind the sentinel, so the sentinel has to get
        // two turns.
        for _ in 0..2 {
            if self.next().await == Step::Ran {
                return Step::Ran;
            }
        }
        Step::Idle
    }

    /// One round of the scheduler: `Idle` if it was the sentinel's turn.
    pub(crate) async fn next(&self) -> Step {
        let mut begun = false;
        poll_fn(|cx| {
            if begun {
                let ran = !std::mem::take(&mut lock(&self.0).polled);
                return Poll::Ready(if ran { Step::Ran } else { Step::Idle });
            }
            begun = true;
            let waker = {
                let mut sentinel = lock(&self.0);
                sentinel.polled = false;
                sentinel.waker.take()
            };
            // Without a waker it is already in the queue.
            if let Some(waker) = waker {
                waker.wake();
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await
    }
}
