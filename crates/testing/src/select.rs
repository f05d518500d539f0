//! Looks into the source for the likely cause of a report that varies.
//!
//! Invariant: it only ever adds a hint; a source that cannot be read is no error.

use std::fs;

use crate::site::{Await, Site};

/// Lines below an await that may still belong to its macro's head.
const HEAD: usize = 3;

/// The await, if it is a `select!` that is not `biased`, which polls its branches in a random order.
pub(crate) fn at_random(place: &Await) -> Option<Site> {
    let sites = std::iter::once(place.site()).chain(place.callers());
    let mut frames = sites.zip(place.frames());
    frames.find_map(|(site, frame)| {
        let source = fs::read_to_string(&frame.path).ok()?;
        let from = usize::try_from(frame.line).ok()?.checked_sub(1)?;
        let mut head = source.lines().skip(from).take(HEAD);
        let opens = head.next().is_some_and(|line| line.contains("select!"));
        (opens && !head.any(|line| line.trim_start().starts_with("biased"))).then(|| site.clone())
    })
}
