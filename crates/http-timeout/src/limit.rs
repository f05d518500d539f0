//! How many calls may be in flight: in all, to one origin, and waiting for their turn.
//!
//! Invariant: `Permits` are held from the first attempt until the body has ended or was dropped, and go back in `drop`.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{error::RequestError, origins::Origin};

/// The limits of one client.
#[derive(Debug)]
pub(crate) struct Limits {
    in_flight: Arc<Semaphore>,
    concurrency: usize,
    waiting: AtomicUsize,
    max_waiting: usize,
}

/// The right of one call to be in flight.
#[derive(Debug)]
pub(crate) struct Permits {
    _origin: Option<OwnedSemaphorePermit>,
    _client: OwnedSemaphorePermit,
    /// Keeps the origin known, because a forgotten origin would come back with a full set of permits.
    _known: Arc<Origin>,
}

impl Limits {
    pub(crate) fn new(concurrency: usize, max_waiting: usize) -> Self {
        Self {
            in_flight: Arc::new(Semaphore::new(concurrency)),
            concurrency,
            waiting: AtomicUsize::new(0),
            max_waiting,
        }
    }

    /// Waits for the origin's permit first, so that the queue of a slow origin holds nothing that others need.
    pub(crate) async fn acquire(&self, origin: &Arc<Origin>) -> Result<Permits, RequestError> {
        let of_origin = match &origin.permits {
            Some(permits) => Some(self.take(permits).await?),
            None => None,
        };
        let of_client = self.take(&self.in_flight).await?;
        Ok(Permits { _origin: of_origin, _client: of_client, _known: Arc::clone(origin) })
    }

    async fn take(&self, permits: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, RequestError> {
        // Free permits exist only while nobody waits, so this does not jump the queue.
        if let Ok(permit) = Arc::clone(permits).try_acquire_owned() {
            return Ok(permit);
        }
        let _queued = self.queue()?;
        Ok(Arc::clone(permits).acquire_owned().await.expect("the semaphore is open: nothing in this crate closes one"))
    }

    fn queue(&self) -> Result<Queued<'_>, RequestError> {
        let queued = Queued(&self.waiting);
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= self.max_waiting {
            return Err(RequestError::Overloaded { limit: self.max_waiting });
        }
        Ok(queued)
    }

    pub(crate) fn concurrency(&self) -> usize {
        self.concurrency
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.concurrency - self.in_flight.available_permits()
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
