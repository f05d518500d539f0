//! A transaction and all that belongs to it, whoever has it: its guard, its commit, or what follows a drop.
//!
//! Invariant: a connection goes back to its pool only by a release, which is called for one that was seen idle and clean.
//! Whatever is dropped before that, by a caller or by the end of the runtime, closes its connection instead.

use std::sync::Arc;

use futures_util::FutureExt;
use sqlx::Connection;
use tokio::runtime::Handle;
use tokio::time::timeout;

use crate::backend::{Backend, CommitMode};
use crate::outcome::OutcomeCell;
use crate::slot::{Shared, Slot};
use crate::work::Ticket;

/// A transaction and all that belongs to it. The order of the fields is the order of their drops: the connection is
/// given back or closed, then the outcome is told, and only then does the pool count the transaction as ended.
pub(crate) struct Open<DB: Backend> {
    pub(crate) slot: Slot<DB>,
    pub(crate) outcome: OutcomeCell,
    pub(crate) runtime: Handle,
    pub(crate) ticket: Arc<Ticket>,
    pub(crate) shared: Arc<Shared<DB>>,
    pub(crate) hooks: Vec<Hook>,
    pub(crate) commit_mode: CommitMode,
}

/// What runs once after a commit.
pub(crate) type Hook = Box<dyn FnOnce() + Send>;

impl<DB: Backend> Open<DB> {
    /// Gives the connection back. Only for one that was seen idle and clean.
    pub(crate) async fn release(self) {
        let closed = self.shared.work.is_closed();
        self.slot.release(closed).await;
    }

    /// Gives the connection back when what was left to be sent has its answer, for which nobody waits: a message that
    /// follows sooner is held back by the client's own TCP until then, so another connection serves the next caller
    /// better. One without an answer within the settle timeout is closed.
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
