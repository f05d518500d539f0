//! How many calls may be in flight, and how many may wait for a permit: for the whole client, and for one origin.
//!
//! Invariant: `Permits` are held from the first attempt until the body has ended or was dropped, and go back in `drop`.
//! The queues are separate, so that a slow origin's queue takes no place that calls to other origins need.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Lets a limited number of calls through at a time, and lets a limited number wait.
#[derive(Debug)]
pub(crate) struct Gate {
    permits: Arc<Semaphore>,
    size: usize,
    waiting: AtomicUsize,
    max_waiting: usize,
}

/// The most calls are already waiting at a gate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Full {
    pub(crate) limit: usize,
}

/// The right of one call to be in flight.
#[derive(Debug)]
pub(crate) struct Permits {
    _origin: Option<OwnedSemaphorePermit>,
    _client: OwnedSemaphorePermit,
}

impl Permits {
    /// Waits at the origin's gate first, so that a slow origin's queue holds nothing that others need.
    pub(crate) async fn acquire(client: &Gate, origin: Option<&Gate>) -> Result<Self, Full> {
        let of_origin = match origin {
            Some(gate) => Some(gate.enter().await?),
            None => None,
        };
        Ok(Self { _client: client.enter().await?, _origin: of_origin })
    }

    /// Acquires the permits without waiting, if possible.
    pub(crate) fn try_acquire(client: &Gate, origin: Option<&Gate>) -> Option<Self> {
        let of_origin = match origin {
            Some(gate) => Some(gate.try_enter()?),
            None => None,
        };
        Some(Self { _client: client.try_enter()?, _origin: of_origin })
    }
}

impl Gate {
    /// Lets `size` calls through at a time, and `max_waiting` wait.
    pub(crate) fn new(size: usize, max_waiting: usize) -> Self {
        Self { permits: Arc::new(Semaphore::new(size)), size, waiting: AtomicUsize::new(0), max_waiting }
    }

    async fn enter(&self) -> Result<OwnedSemaphorePermit, Full> {
        // Free permits exist only while no call waits, so this does not jump the queue.
        if let Some(permit) = self.try_enter() {
            return Ok(permit);
        }
        let _queued = self.queue()?;
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        Ok(permit.expect("the semaphore is open: nothing in this crate closes one"))
    }

    fn try_enter(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.permits).try_acquire_owned().ok()
    }

    fn queue(&self) -> Result<Queued<'_>, Full> {
        let queued = Queued(&self.waiting);
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= self.max_waiting {
            return Err(Full { limit: self.max_waiting });
        }
        Ok(queued)
    }

    /// How many calls it lets through at a time.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.size - self.permits.available_permits()
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }
}

/// One place in the queue, left in `drop`.
struct Queued<'a>(&'a AtomicUsize);

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
