//! A worker's whole input in memory, because ranges may be claimed in any order, and more than once.
//!
//! Invariant: two inputs have one fingerprint only if they have the same items, or the same keys, in the same order.

use std::{collections::HashMap, sync::Arc};

use futures_core::Stream;
use futures_util::StreamExt;
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::{codec::Codec, error::TaskError, intake::KeyFn};

/// The items, and their keys if they have any.
#[derive(Debug)]
pub(crate) struct Input<T> {
    pub(crate) items: Vec<T>,
    pub(crate) keys: Option<Vec<Arc<str>>>,
}

impl<T: Serialize> Input<T> {
    /// Reads the source to its end and returns it with the fingerprint after each item.
    pub(crate) async fn read(
        source: impl Stream<Item = T>,
        mut key: Option<&mut KeyFn<T>>,
        codec: Codec,
        token: &CancellationToken,
    ) -> Result<(Self, Vec<u64>), TaskError> {
        let mut source = std::pin::pin!(source);
        let mut cancelled = std::pin::pin!(token.cancelled());
        let mut input = Self { items: Vec::new(), keys: key.is_some().then(Vec::new) };
        let (mut chain, mut seen, mut scratch) = (Vec::new(), HashMap::new(), Vec::new());
        let mut last = 0;
        loop {
            // A long input of ready items must not keep the rest of the runtime from running.
            tokio::task::coop::consume_budget().await;
            let next = futures_util::future::select(cancelled.as_mut(), source.next()).await;
            let item = match next {
                futures_util::future::Either::Left(_) => return Err(TaskError::Cancelled),
                futures_util::future::Either::Right((None, _)) => return Ok((input, chain)),
                futures_util::future::Either::Right((Some(item), _)) => item,
            };
            let index = input.items.len();
            scratch.clear();
            if let (Some(key), Some(keys)) = (&mut key, &mut input.keys) {
                let key: Arc<str> = key(&item).into();
                if let Some(first) = seen.insert(Arc::clone(&key), index) {
                    return Err(TaskError::DuplicateKey { first, index });
                }
                scratch.extend_from_slice(key.as_bytes());
                keys.push(key);
            } else {
                let encoded = codec.encode(&item, &mut scratch);
                encoded.map_err(|cause| TaskError::unwritten::<T>(codec, index, cause))?;
            }
            last = xxh3_64_with_seed(&scratch, last);
            chain.push(last);
            input.items.push(item);
        }
    }
}

impl<T> Input<T> {
    pub(crate) fn key(&self, index: usize) -> Option<Arc<str>> {
        self.keys.as_ref().and_then(|keys| keys.get(index).cloned())
    }
}
