//! The validated options of a run.
//!
//! Invariant: a plan has been validated before a run holds it.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::{
    codec::Codec,
    intake::KeyFn,
    item::Retry,
    log::{Header, Identity},
    store::FileStore,
};

/// The options of a run, validated.
pub(crate) struct Plan<I, R> {
    pub(crate) job: String,
    pub(crate) version: String,
    pub(crate) accepted: Vec<String>,
    pub(crate) store: FileStore,
    pub(crate) codec: Codec,
    pub(crate) every: Duration,
    pub(crate) every_items: u64,
    pub(crate) key: Option<KeyFn<I>>,
    pub(crate) revalidate: Option<RevalidateFn<I, R>>,
    pub(crate) concurrency: usize,
    pub(crate) parallel: bool,
    pub(crate) max_ahead: usize,
    pub(crate) ordered: bool,
    pub(crate) at_most_once: bool,
    pub(crate) retry: Retry,
    pub(crate) max_defers: u32,
    pub(crate) quarantine: usize,
    pub(crate) retry_quarantined: bool,
    pub(crate) token: CancellationToken,
    pub(crate) grace: Duration,
}

impl<I, R> Plan<I, R> {
    /// The header of a checkpoint that begins now.
    pub(crate) fn header(&self) -> Header {
        Header {
            salt: fastrand::u64(..),
            codec: self.codec.number(),
            identity: if self.key.is_some() { Identity::Key } else { Identity::Position },
            job: self.job.clone(),
            version: self.version.clone(),
            result_type: std::any::type_name::<R>().to_owned(),
        }
    }
}

pub(crate) type RevalidateFn<I, R> = Box<dyn Fn(&I, &R) -> bool + Send>;
