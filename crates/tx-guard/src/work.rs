//! How many transactions of a pool are under way, so that closing it can wait for them.
//!
//! Invariant: a transaction is counted from before anything is sent for it until the last task that works on it is
//! done.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

/// How many transactions of a pool are under way.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Load {
    /// In the hands of their users.
    pub(crate) open: usize,
    /// Being committed or rolled back.
    pub(crate) settling: usize,
    closed: bool,
}

impl Load {
    fn is_idle(&self) -> bool {
        self.open + self.settling == 0
    }
}

/// Counts the transactions of a pool, so that closing it can wait for them.
#[derive(Debug, Default)]
pub(crate) struct Work {
    load: Mutex<Load>,
    /// No transaction is under way any more.
    idle: Notify,
}

impl Work {
    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    pub(crate) fn close(&self) {
        self.lock().closed = true;
    }

    pub(crate) fn load(&self) -> Load {
        *self.lock()
    }

    /// Waits until no transaction is under way.
    pub(crate) async fn idle(&self) {
        loop {
            let mut idle = pin!(self.idle.notified());
            // Before the count is checked, so that a transaction that ends in between is noticed.
            idle.as_mut().enable();
            if self.lock().is_idle() {
                return;
            }
            idle.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Load> {
        self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Identifies the transaction that an event is about.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tag {
    /// A number that is unique in the process.
    pub(crate) id: u64,
    pub(crate) name: Option<&'static str>,
    pub(crate) begun: Instant,
}

impl Tag {
    pub(crate) fn new(name: Option<&'static str>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed), name, begun: Instant::now() }
    }
}

/// One transaction's place in the count, kept until the last task that works on it is done.
pub(crate) struct Ticket {
    pub(crate) tag: Tag,
    work: Arc<Work>,
    settling: AtomicBool,
}

impl Ticket {
    pub(crate) fn new(work: &Arc<Work>, name: Option<&'static str>) -> Arc<Self> {
        work.lock().open += 1;
        Arc::new(Self { tag: Tag::new(name), work: Arc::clone(work), settling: AtomicBool::new(false) })
    }

    /// Counts the transaction as settling, and no longer as its user's.
    pub(crate) fn settling(&self) {
        if !self.settling.swap(true, Ordering::Relaxed) {
            let mut load = self.work.lock();
            load.open -= 1;
            load.settling += 1;
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let settling = *self.settling.get_mut();
        let mut load = self.work.lock();
        match settling {
            true => load.settling -= 1,
            false => load.open -= 1,
        }
        if load.is_idle() {
            self.work.idle.notify_waiters();
        }
    }
}
