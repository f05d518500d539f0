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

    /// Takes a finished item, and gives it back if it may leave at once.
    #[inline]
    pub(crate) fn offer(&mut self, done: Done<R>) -> Option<Done<R>> {
        if !self.is_ordered {
            return Some(done);
        }
        if done.index == self.turn {
            self.turn += 1;
            return Some(done);
        }
        self.held.insert(done.index, done);
        None
    }

    /// Returns a held item whose turn has come.
    #[inline]
    pub(crate) fn next(&mut self) -> Option<Done<R>> {
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
