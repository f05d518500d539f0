//! The blocks of one range: the same blocks as in a checkpoint file, as a chain of its own.
//!
//! Invariant: a range that is read back is whole. A missing, damaged, doubled or foreign block is an error, and a
//! finished range ends with a seal that says so.

use std::path::Path;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::{
    error::TaskError,
    log::{Blocks, Chain, Damage, Identity, Kind},
    scan::{Entry, Unread, scan},
    varint::{take, take_str, take_varint},
};

/// What is known of one item of a range.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Known {
    #[default]
    Nothing,
    Failed(u32),
    Result,
    Quarantined,
}

/// A range, read back.
#[derive(Debug)]
pub(crate) struct Ledger {
    /// Where the next block belongs.
    pub(crate) chain: Chain,
    /// What is known of each item, starting with the first of the range.
    pub(crate) items: Vec<Known>,
}

/// Where the next append to a range belongs, and what comes before it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) chain: Chain,
    /// The number of existing rows.
    pub(crate) seq: i32,
    /// How many items are finished, and how many of those are in quarantine.
    pub(crate) done: i32,
    pub(crate) quarantined: i32,
}

/// One record of an item.
#[derive(Debug)]
pub(crate) struct Record<'a> {
    pub(crate) kind: Kind,
    /// The place of the item in its range.
    pub(crate) at: usize,
    pub(crate) key: Option<&'a str>,
    /// The result, or the number of attempts and the cause.
    pub(crate) payload: &'a [u8],
}

impl Ledger {
    pub(crate) fn new(salt: u64, n: i64, count: usize) -> Self {
        // A salt for each range, so that a block of one range is invalid in another.
        let salt = xxh3_64_with_seed(&n.to_le_bytes(), salt);
        Self { chain: Chain::new(salt), items: vec![Known::Nothing; count] }
    }

    /// Reads the blocks of a range, visits each record, and returns whether the seal is the last block.
    pub(crate) fn read(
        &mut self,
        first: u64,
        identity: Identity,
        blocks: &[u8],
        path: &Path,
        mut visit: impl FnMut(&Record<'_>),
    ) -> Result<bool, TaskError> {
        let (mut sealed, count) = (false, self.items.len() as u64);
        let items = &mut self.items;
        let read = scan(blocks, 0, &mut self.chain, |entry| {
            match entry {
                Entry::Record { kind, index, payload, .. } => {
                    let at = index.checked_sub(first).filter(|at| *at < count);
                    let at = at.ok_or("a record is of an item of another range")? as usize;
                    let (key, payload) = split(identity, payload).ok_or("a record has no key")?;
                    let is_final = matches!(kind, Kind::Result | Kind::Quarantine);
                    if is_final && matches!(items[at], Known::Result | Known::Quarantined) {
                        return Err("an item is recorded twice");
                    }
                    items[at] = known(kind, payload, &items[at]).ok_or("a record does not parse")?;
                    visit(&Record { kind, at, key, payload });
                    sealed = false;
                }
                Entry::Sealed { total, .. } if total == count => sealed = true,
                Entry::Sealed { .. } => return Err("the seal is of a range of another length"),
                Entry::InputMark { .. } | Entry::Open { .. } => return Err("a block is of no use in a range"),
            }
            Ok(())
        });
        let damaged = |offset, detail| TaskError::unreadable(path, Damage::Bad { offset, detail }.into());
        match read {
            Ok(end) if end == blocks.len() as u64 => Ok(sealed),
            Ok(end) => Err(damaged(end, "a block is damaged")),
            Err(Unread::Damage(damage)) => Err(TaskError::unreadable(path, damage.into())),
            Err(Unread::Io(_)) => Err(damaged(0, "it cannot be read")),
        }
    }

    /// How many items are finished, and how many of them are in quarantine.
    pub(crate) fn counts(&self) -> (i32, i32) {
        let count = |known: &[Known]| {
            let count = self.items.iter().filter(|item| known.contains(item)).count();
            i32::try_from(count).unwrap_or(i32::MAX)
        };
        (count(&[Known::Result, Known::Quarantined]), count(&[Known::Quarantined]))
    }
}

/// The bytes of the blocks, with a seal at the end if the range is finished.
pub(crate) fn sealed(blocks: &mut Blocks, chain: &mut Chain, finished: Option<usize>) -> Vec<u8> {
    if let Some(count) = finished {
        blocks.sealed(count as u64, 0);
    }
    blocks.seal(chain).to_vec()
}

fn split(identity: Identity, mut payload: &[u8]) -> Option<(Option<&str>, &[u8])> {
    if identity == Identity::Position {
        return Some((None, payload));
    }
    let length = usize::try_from(take_varint(&mut payload)?).ok()?;
    let key = std::str::from_utf8(take(&mut payload, length)?).ok()?;
    Some((Some(key), payload))
}

/// What is known after this record: a failed attempt does not hide a final outcome.
fn known(kind: Kind, payload: &[u8], before: &Known) -> Option<Known> {
    Some(match kind {
        Kind::Result => Known::Result,
        Kind::Quarantine => {
            failure(payload)?;
            Known::Quarantined
        }
        Kind::Failure if matches!(before, Known::Result | Known::Quarantined) => before.clone(),
        Kind::Failure => Known::Failed(failure(payload)?.0),
        Kind::Intent | Kind::InputMark | Kind::Open | Kind::Sealed => return None,
    })
}

/// The attempts and the cause of a failure.
pub(crate) fn failure(mut payload: &[u8]) -> Option<(u32, String)> {
    let attempts = u32::try_from(take_varint(&mut payload)?).ok()?;
    Some((attempts, take_str(&mut payload)?))
}
