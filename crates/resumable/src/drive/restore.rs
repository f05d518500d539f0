//! Results that an earlier run has recorded, handed out on a short path.
//!
//! Invariant: an item restored here is checked like any other, and the loop yields to the runtime often enough for
//! other tasks to run.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_core::Stream;
use serde::{Serialize, de::DeserializeOwned};

use super::{Drive, Ending, Failure};
use crate::{
    error::TaskError,
    history::Past,
    item::{Done, ItemContext, ItemError, Quarantined},
};

/// How much to restore before asking the runtime again, and how much an item counts in addition to its result.
const RESTORED_AT_ONCE_BYTES: u64 = 4096;
const RESTORED_ITEM_BYTES: u64 = 256;

impl<I, R, S, F, Fut> Drive<I, R, S, F, Fut>
where
    I: Serialize + Clone,
    R: Serialize + DeserializeOwned,
    S: Stream<Item = I> + Unpin,
    F: Fn(ItemContext, I) -> Fut,
    Fut: Future<Output = Result<R, ItemError>>,
{
    /// Takes the result of the next item from the checkpoint, if it is at hand and nothing else needs doing. This uses
    /// no slot, no future and no room in the log, because ten million of them should take only a moment.
    #[inline]
    pub(super) fn restore(&mut self, index: usize, cx: &mut Context<'_>) -> Option<R> {
        let is_all = self.history.result_at_hand(index).is_some()
            && self.plan.revalidate.is_none()
            && self.restored_bytes < RESTORED_AT_ONCE_BYTES
            && matches!(self.ending, Ending::Running)
            && self.is_idle()
            && self.emission.held() == 0
            && !self.stop.is_asked_for();
        // If the source waits, the step knows what else to wait for.
        let Poll::Ready(item) = Pin::new(self.source.as_mut().filter(|_| is_all)?).poll_next(cx) else { return None };
        let restored = match item {
            Some(item) => self.restored(index, &item),
            None => return self.end_input().err().and_then(|error| self.fail(error)),
        };
        let result = match restored {
            Ok(result) => result,
            Err(error) => return self.fail(*error),
        };
        self.emission.pass(index);
        self.meter.item_restored();
        if self.meter.is_due() {
            self.publish();
        }
        Some(result)
    }

    /// Checks the identity of an item whose result is at hand, and returns the result.
    #[inline]
    fn restored(&mut self, index: usize, item: &I) -> Result<R, Failure> {
        let (path, marks) = (self.plan.store.path(), &mut self.recorder.marks);
        self.intake.admit_position(item, &mut self.history, path, marks)?;
        let payload = self.history.result_at_hand(index).unwrap_or_default();
        self.restored_bytes += RESTORED_ITEM_BYTES + payload.len() as u64;
        self.recorder.kept_bytes += payload.len() as u64;
        self.decoded(index, payload)
    }

    #[inline]
    fn decoded(&self, index: usize, payload: &[u8]) -> Result<R, Failure> {
        let codec = self.plan.codec;
        let read = codec.decode(payload).map_err(|cause| TaskError::unread::<R>(codec, index, payload, cause));
        read.map_err(|error| self.history.unread(error).into())
    }

    #[cold]
    fn fail(&mut self, error: TaskError) -> Option<R> {
        self.end(Err(error));
        None
    }

    /// Looks up what earlier runs recorded of an item: how often it failed, or its final outcome.
    #[inline(always)]
    pub(super) fn recall(
        &mut self,
        index: usize,
        key: &Option<Arc<str>>,
        item: &I,
    ) -> Result<Result<u32, Done<R>>, Failure> {
        let mut attempts = 0;
        let past = self.history.of(index, key.as_deref());
        match past.map_err(|error| TaskError::io("read checkpoint", self.plan.store.path(), error))? {
            Past::Nothing => {}
            Past::Failed { .. } if self.plan.retry.per_run => {}
            Past::Failed { attempts: before } => attempts = before,
            Past::Result(payload) => {
                let codec = self.plan.codec;
                let (read, length) = (codec.decode(payload), payload.len() as u64);
                let read = read.map_err(|cause| TaskError::unread::<R>(codec, index, payload, cause));
                let result: R = read.map_err(|error| self.history.unread(error))?;
                if self.plan.revalidate.as_ref().is_none_or(|is_valid| is_valid(item, &result)) {
                    self.recorder.kept_bytes += length;
                    let result = Ok(result);
                    return Ok(Err(Done { index, key: key.clone(), restored: true, attempts: 0, result }));
                }
            }
            Past::Quarantined { attempts, cause } if !self.plan.retry_quarantined => {
                let result = Err(Quarantined { attempts, cause, uncertain: false });
                return Ok(Err(Done { index, key: key.clone(), restored: true, attempts, result }));
            }
            Past::Uncertain if !self.plan.retry_quarantined => {
                let result = Err(Quarantined::uncertain());
                return Ok(Err(Done { index, key: key.clone(), restored: true, attempts: 1, result }));
            }
            Past::Quarantined { .. } | Past::Uncertain => {}
        }
        Ok(Ok(attempts))
    }
}
