//! A transaction with everything that belongs to it, held by its guard, its commit, or the settling after a drop.
//!
//! Invariant: a connection returns to its pool only through a release, which is called only after it was seen idle and
//! clean. A drop before that, by a caller or by the end of the runtime, closes the connection instead.

use std::sync::Arc;

use futures_util::FutureExt;
use sqlx::Connection;
use tokio::runtime::Handle;
use tokio::time::timeout;

use crate::backend::{Backend, CommitMode};
use crate::outcome::OutcomeCell;
use crate::slot::{Shared, Slot};
use crate::work::Ticket;

/// A transaction and everything that belongs to it. The order of the fields is the order of their drops: the connection
/// is given back or closed, then the outcome is reported, and only then does the pool count the transaction as ended.
pub(crate) struct Open<DB: Backend> {
    pub(crate) slot: Slot<DB>,
    pub(crate) outcome: OutcomeCell,
    pub(crate) runtime: Handle,
    pub(crate) ticket: Arc<Ticket>,
    pub(crate) shared: Arc<Shared<DB>>,
    pub(crate) hooks: Vec<Hook>,
    pub(crate) commit_mode: CommitMode,
}

/// A hook that runs once after a commit.
pub(crate) type Hook = Box<dyn FnOnce() + Send>;

impl<DB: Backend> Open<DB> {
    /// Gives the connection back. Only for a connection that was seen idle and clean.
    pub(crate) async fn release(self) {
        let closed = self.shared.work.is_closed();
        self.slot.release(closed).await;
    }

    /// Gives the connection back when the last message was answered; no caller waits for that. The client's own TCP
    /// holds back a message that follows sooner, so another connection serves the next caller better. Without an answer
    /// within the settle timeout, the connection is closed.
    pub(crate) async fn release_answered(mut self) {
        if self.slot.takes_unsent() {
            return self.release().await;
        }
        match self.slot.parts().0.flush().now_or_never() {
            Some(Ok(())) => self.release().await,
            Some(Err(_)) => {}
            None => {
                self.ticket.settling();
                let (runtime, limit) = (self.runtime.clone(), self.shared.limits.settle_timeout);
                drop(runtime.spawn(async move {
                    if let Ok(Ok(())) = timeout(limit, self.slot.parts().0.flush()).await {
                        self.release().await;
                    }
                }));
            }
        }
    }
}
