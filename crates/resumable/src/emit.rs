//! Finished items on their way out, in the requested order.
//!
//! Invariant: each item leaves once, and in an ordered run none leaves before its predecessor.

use std::collections::BTreeMap;

use crate::item::Done;

/// The finished items that wait for their turn.
#[derive(Debug)]
pub(crate) struct Emission<R> {
    is_ordered: bool,
    held: BTreeMap<usize, Done<R>>,
    /// In an ordered run, the item whose turn it is.
    turn: usize,
}

impl<R> Emission<R> {
    pub(crate) fn new(is_ordered: bool) -> Self {
        Self { is_ordered, held: BTreeMap::new(), turn: 0 }
    }

    /// Returns whether a finished item leaves at once; otherwise hold it.
    #[inline]
    pub(crate) fn pass(&mut self, index: usize) -> bool {
        let passes = !self.is_ordered || index == self.turn;
        self.turn += usize::from(passes);
        passes
    }

    /// Keeps a finished item until its turn has come.
    pub(crate) fn hold(&mut self, done: Done<R>) {
        self.held.insert(done.index, done);
    }

    /// Returns a held item whose turn has come.
    #[inline]
    pub(crate) fn next(&mut self) -> Option<Done<R>> {
        if self.held.is_empty() {
            return None;
        }
        let first = self.held.first_entry().filter(|first| *first.key() == self.turn)?;
        self.turn += 1;
        Some(first.remove())
    }

    /// How many items wait for their turn.
    #[inline]
    pub(crate) fn held(&self) -> usize {
        self.held.len()
    }
}
