//! A range that this worker holds.
//!
//! Invariant: each of its unfinished items is given out once.

use crate::postgres::{ledger::Known, shared::Hold};

/// A range in work, and what the loop keeps with it.
pub(crate) struct Range<X> {
    pub(crate) hold: Hold,
    pub(crate) first: usize,
    pub(crate) known: Vec<Known>,
    /// The place of the next item to look at.
    pub(crate) next: usize,
    pub(crate) own: X,
}

impl<X> Range<X> {
    /// The index and the failed attempts of the next item that is not finished.
    pub(crate) fn next(&mut self) -> Option<(usize, u32)> {
        while let Some(known) = self.known.get(self.next) {
            let index = self.first + self.next;
            self.next += 1;
            match known {
                Known::Nothing => return Some((index, 0)),
                Known::Failed(attempts) => return Some((index, *attempts)),
                Known::Result | Known::Quarantined => {}
            }
        }
        None
    }
}
