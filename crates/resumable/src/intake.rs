//! The input, checked item by item.
//!
//! Invariant: no item ever gets a result that was computed for another. Without keys a chained fingerprint proves that
//! the items are the same as before; with keys each result carries its key.

use std::{collections::HashMap, path::Path, sync::Arc};

use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::{codec::Codec, error::TaskError, history::History, log::check_width, store::Marks};

pub(crate) type KeyFn<I> = Box<dyn Fn(&I) -> String + Send>;

#[derive(Debug)]
pub(crate) struct Intake {
    codec: Codec,
    /// How many items were read.
    pub(crate) position: usize,
    /// The fingerprint of all of them: the hash of each item is seeded with the hash of the items before it.
    pub(crate) chain: u64,
    seen: HashMap<Arc<str>, usize>,
    scratch: Vec<u8>,
}

impl Intake {
    pub(crate) fn new(codec: Codec, salt: u64) -> Self {
        Self { codec, position: 0, chain: salt, seen: HashMap::new(), scratch: Vec::new() }
    }

    /// Gives the next item its index, and its key if it has one. Fingerprints that the checkpoint lacks go into
    /// `marks`.
    #[inline]
    pub(crate) fn admit<I: Serialize>(
        &mut self,
        item: &I,
        key: Option<&KeyFn<I>>,
        history: &mut History,
        path: &Path,
        marks: &mut Marks,
    ) -> Result<(usize, Option<Arc<str>>), Box<TaskError>> {
        let index = self.position;
        let key = match key {
            Some(key) => Some(self.admit_key(key(item))?),
            None => {
                self.admit_position(item, history, path, marks)?;
                None
            }
        };
        Ok((index, key))
    }

    fn admit_key(&mut self, key: String) -> Result<Arc<str>, TaskError> {
        let index = self.position;
        self.position += 1;
        self.chain = xxh3_64_with_seed(key.as_bytes(), self.chain);
        let key: Arc<str> = key.into();
        match self.seen.insert(Arc::clone(&key), index) {
            Some(first) => Err(TaskError::DuplicateKey { first, index }),
            None => Ok(key),
        }
    }

    /// Does the same for an item that has no key.
    #[inline(always)]
    pub(crate) fn admit_position<I: Serialize>(
        &mut self,
        item: &I,
        history: &mut History,
        path: &Path,
        marks: &mut Marks,
    ) -> Result<(), Box<TaskError>> {
        let index = self.position;
        self.position += 1;
        self.scratch.clear();
        let encoded = self.codec.encode(item, &mut self.scratch);
        encoded.map_err(|cause| TaskError::unwritten::<I>(self.codec, index, cause))?;
        self.chain = xxh3_64_with_seed(&self.scratch, self.chain);
        match history.confirms(index, self.chain) {
            None => self.mark(index, marks),
            Some(true) => {}
            Some(false) => return Err(mismatch(path, index)),
        }
        Ok(())
    }

    /// Notes an item that the checkpoint does not know yet.
    #[inline]
    fn mark(&self, index: usize, marks: &mut Marks) {
        if marks.count == 0 {
            marks.first = index as u64;
        }
        marks.count += 1;
        marks.chain = self.chain;
        marks.checks.extend_from_slice(&self.chain.to_le_bytes()[..check_width(index as u64)]);
    }

    /// Checks the length at the end of the source: an input shorter than before is not the same input.
    pub(crate) fn finish(&self, history: &History, path: &Path) -> Result<(), TaskError> {
        if self.position >= history.marked() {
            return Ok(());
        }
        let detail = "the input ends here and had more items when the checkpoint was written";
        Err(TaskError::InputMismatch { path: path.to_owned(), index: self.position, detail })
    }
}

#[cold]
fn mismatch(path: &Path, index: usize) -> Box<TaskError> {
    let detail = "it is not the item that was there when the checkpoint was written";
    TaskError::InputMismatch { path: path.to_owned(), index, detail }.into()
}
