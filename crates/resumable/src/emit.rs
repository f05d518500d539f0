//! Finished items on their way out, in the order that was asked for.
//!
//! Invariant: each leaves once, and in an ordered run none leaves before the one before it.

use std::collections::BTreeMap;

use crate::item::Done;

/// What is finished and waits for its turn.
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

    /// Returns whether a finished item leaves at once; else it is to be held.
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
