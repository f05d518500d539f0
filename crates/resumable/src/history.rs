//! What a checkpoint says of each item, held in memory while a run resumes.
//!
//! Invariant: of the records of one item the last one counts, except that a failed attempt never hides a result.

use std::collections::HashMap;

use crate::{
    error::TaskError,
    log::{Chain, Header, Identity, Kind, check_offset, check_width},
    scan::{Entry, Unread, scan},
    varint::{put_str, put_varint, take, take_str, take_varint},
};

/// What an earlier run left of one item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Past<'a> {
    Nothing,
    Failed {
        attempts: u32,
    },
    Result(&'a [u8]),
    Quarantined {
        attempts: u32,
        cause: String,
    },
    /// It was started at most once, and how that ended is not known.
    Uncertain,
}

/// A checkpoint file, read and indexed.
#[derive(Debug)]
pub(crate) struct History {
    bytes: Vec<u8>,
    identity: Identity,
    by_position: Vec<Slot>,
    by_key: HashMap<Box<[u8]>, Slot>,
    finished: u64,
    /// How many items of the input were read, the check bytes of each, and the whole fingerprint after some of them.
    marked: usize,
    checks: Vec<u8>,
    marks: Vec<(usize, u64)>,
    /// The result type and the version that the file was created with.
    created_for: (String, String),
    /// How many sessions wrote to the file.
    pub(crate) epoch: u64,
    /// What the last seal says, if nothing was written after it.
    pub(crate) sealed: Option<(u64, u64)>,
    /// Bytes that were cut off behind the last intact block.
    pub(crate) torn_bytes: u64,
}

/// Where an item's last record lies: its kind, and the place of its payload. Offset 0 is the header: no record.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    at: u64,
    length: u32,
    kind: u8,
}

impl Slot {
    /// Whether the item needs no more work, be it that nobody knows how it ended.
    fn is_finished(self) -> bool {
        !matches!(self.kind, 0 | FAILURE)
    }
}

impl History {
    pub(crate) fn of_new_file(identity: Identity) -> Self {
        Self {
            bytes: Vec::new(),
            identity,
            by_position: Vec::new(),
            by_key: HashMap::new(),
            finished: 0,
            marked: 0,
            checks: Vec::new(),
            marks: Vec::new(),
            created_for: Default::default(),
            epoch: 0,
            sealed: None,
            torn_bytes: 0,
        }
    }

    /// Reads the blocks of a whole file and returns what they say, the offset at which the next one belongs, and its place
    /// in the chain.
    pub(crate) fn read(bytes: Vec<u8>, from: u64, header: &Header) -> Result<(Self, u64, Chain), Unread> {
        let (mut history, mut chain) = (Self::of_new_file(header.identity), Chain::new(header.salt));
        let end = scan(&bytes[..], from, &mut chain, |entry| history.enter(entry, header.salt))?;
        history.created_for = (header.result_type.clone(), header.version.clone());
        history.torn_bytes = bytes.len() as u64 - end;
        history.bytes = bytes;
        history.bytes.truncate(usize::try_from(end).unwrap_or(usize::MAX));
        Ok((history, end, chain))
    }

    fn enter(&mut self, entry: Entry<'_>, salt: u64) -> Result<(), &'static str> {
        self.sealed = None;
        match entry {
            Entry::Record { kind, index, at, payload } => self.enter_record(kind, index, at, payload)?,
            Entry::InputMark { first, count, chain, checks } => {
                if first != self.marked as u64 {
                    return Err("a fingerprint of the input does not follow the one before");
                }
                self.checks.extend_from_slice(checks);
                self.marked += usize::try_from(count).map_err(|_| "a fingerprint of the input is too long")?;
                self.marks.push((self.marked, chain));
            }
            Entry::Open { epoch, .. } => self.epoch = epoch,
            Entry::Sealed { total, digest } => {
                self.check_seal(total, digest, salt)?;
                self.sealed = Some((total, digest));
            }
        }
        Ok(())
    }

    /// A seal says that every item of an input is finished, and so they must be here.
    fn check_seal(&self, total: u64, digest: u64, salt: u64) -> Result<(), &'static str> {
        let is_whole = match self.identity {
            // Without any item the fingerprint is the salt it begins with.
            Identity::Position => {
                let chain = self.marks.last().map_or(salt, |(_, chain)| *chain);
                (total, digest) == (self.marked as u64, chain) && self.finished == total
            }
            // An input with keys may have had fewer items than those before it.
            Identity::Key => self.finished >= total,
        };
        if is_whole { Ok(()) } else { Err("the seal does not agree with what is recorded before it") }
    }

    fn enter_record(&mut self, kind: Kind, index: u64, at: u64, payload: &[u8]) -> Result<(), &'static str> {
        let mut rest = payload;
        let slot = match self.identity {
            Identity::Key => {
                let key = take_key(&mut rest).ok_or("a record has no key")?;
                self.by_key.entry(key.into()).or_default()
            }
            Identity::Position => {
                // The fingerprint is written before the results it covers, so a result can not be ahead of it.
                let index = usize::try_from(index).ok().filter(|index| *index < self.marked);
                let index = index.ok_or("a result lies beyond the fingerprint of the input")?;
                if self.by_position.len() <= index {
                    self.by_position.resize(self.marked, Slot::default());
                }
                &mut self.by_position[index]
            }
        };
        if kind == Kind::Failure && !matches!(slot.kind, 0 | FAILURE | INTENT) {
            return Ok(());
        }
        if matches!(kind, Kind::Failure | Kind::Quarantine) && read_failure(rest).is_none() {
            return Err("the record of a failure does not parse");
        }
        let length = u32::try_from(rest.len()).map_err(|_| "a record is too long")?;
        let was_finished = slot.is_finished();
        *slot = Slot { at: at + (payload.len() - rest.len()) as u64, length, kind: kind as u8 };
        self.finished = self.finished + u64::from(slot.is_finished()) - u64::from(was_finished);
        Ok(())
    }

    /// Returns what is known of an item. The key counts if the file goes by keys, else the index.
    #[inline]
    pub(crate) fn of(&self, index: usize, key: Option<&str>) -> Past<'_> {
        let slot = match key {
            Some(key) => self.by_key.get(key.as_bytes()),
            None => self.by_position.get(index),
        };
        let Some(slot) = slot.filter(|slot| slot.kind != 0) else { return Past::Nothing };
        let at = slot.at as usize;
        let payload = self.bytes.get(at..at + slot.length as usize).unwrap_or_default();
        match slot.kind {
            RESULT => Past::Result(payload),
            INTENT => Past::Uncertain,
            kind => match read_failure(payload) {
                Some((attempts, _)) if kind == FAILURE => Past::Failed { attempts },
                Some((attempts, cause)) => Past::Quarantined { attempts, cause },
                None => Past::Nothing,
            },
        }
    }

    /// Adds to the error of a result that cannot be read what the file was created for.
    #[cold]
    pub(crate) fn unread(&self, error: TaskError) -> TaskError {
        let (of_type, of_version) = &self.created_for;
        error.of_checkpoint(of_type, of_version)
    }

    /// Returns how many items of the input have a fingerprint in the file.
    pub(crate) fn marked(&self) -> usize {
        self.marked
    }

    /// Returns whether the fingerprint after an item may be `chain`; `None` if the file does not know the item.
    #[inline]
    pub(crate) fn confirms(&self, index: usize, chain: u64) -> Option<bool> {
        if index >= self.marked {
            return None;
        }
        let (at, width) = (check_offset(index as u64) as usize, check_width(index as u64));
        let same = self.checks.get(at..at + width) == Some(&chain.to_le_bytes()[..width]);
        let mark = self.marks.binary_search_by_key(&(index + 1), |(end, _)| *end);
        Some(same && mark.map_or(true, |mark| self.marks[mark].1 == chain))
    }
}

const RESULT: u8 = Kind::Result as u8;
const INTENT: u8 = Kind::Intent as u8;
const FAILURE: u8 = Kind::Failure as u8;

/// Begins the payload of a record: with its key, if the file goes by keys.
pub(crate) fn begin_payload(payload: &mut Vec<u8>, key: Option<&str>) {
    payload.clear();
    if let Some(key) = key {
        put_str(payload, key);
    }
}

/// The rest of the payload of a failure or a quarantine.
pub(crate) fn put_failure(payload: &mut Vec<u8>, attempts: u32, cause: &str) {
    put_varint(payload, u64::from(attempts));
    put_str(payload, cause);
}

fn take_key<'a>(payload: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(take_varint(payload)?).ok()?;
    take(payload, length)
}

fn read_failure(mut payload: &[u8]) -> Option<(u32, String)> {
    let attempts = u32::try_from(take_varint(&mut payload)?).ok()?;
    Some((attempts, take_str(&mut payload)?))
}
