//! What a run is to do.
//!
//! Invariant: it has been validated before a run holds it.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::{codec::Codec, intake::KeyFn, item::Retry, store::FileStore};

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

pub(crate) type RevalidateFn<I, R> = Box<dyn Fn(&I, &R) -> bool + Send>;
