//! The record of each item, looked up in the file while a run resumes.
//!
//! Invariant: an item's last record counts, except that a failed attempt never hides a result. Results stay in the
//! file, which is read in pieces of at most 256 KiB, or of one result if that is larger.

use std::{collections::HashMap, io, sync::Arc};

use crate::{
    error::TaskError,
    index::{Index, Slot},
    log::{Chain, Damage, Header, Identity, Kind, check_offset, check_width},
    scan::{Block, Entry, ReadAt, SHORT, SHORT_PAYLOAD_BYTES, Scanner, Unread, next_record, take_neighbours},
    varint::{put_str, put_varint, take, take_str, take_varint},
};

/// How much to read ahead if a payload soon follows the one before it.
const READ_AHEAD_BYTES: u64 = 64 << 10;
/// The typical size of a record without its payload: the difference of its index and its length.
const RECORD_BYTES: u64 = 3;
/// The same for a neighbour's record with a short payload.
const SHORT_HEAD_BYTES: u64 = 2;

/// The file that results are read from.
pub(crate) type Source = Arc<dyn ReadAt + Send + Sync>;

/// How many items are in each state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) results: usize,
    pub(crate) quarantined: usize,
    pub(crate) uncertain: usize,
    pub(crate) failed: usize,
}

/// What earlier runs recorded of one item.
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
    /// It was started at most once, and it is unknown how that ended.
    Uncertain,
}

/// A checkpoint file, read and indexed.
#[derive(Debug)]
pub(crate) struct History {
    source: Source,
    reader: Reader,
    pub(crate) header: Header,
    by_position: Index,
    by_key: HashMap<Arc<str>, Slot>,
    /// How many items have a last record of each kind, by the kind's number.
    by_kind: [u64; 5],
    /// How many items of the input were read, the check bytes of each, and the whole fingerprint after some of them.
    marked: usize,
    checks: Vec<u8>,
    marks: Vec<(usize, u64)>,
    /// The next one for a caller that asks for one item after the other.
    next_mark: usize,
    /// The bytes of a file with only the current records.
    live_bytes: u64,
    /// How many sessions wrote to the file.
    pub(crate) epoch: u64,
    /// The content of the last seal, if nothing was written after it.
    pub(crate) sealed: Option<(u64, u64)>,
    /// Where the last intact block ends, and the next block's place in the chain.
    pub(crate) end: u64,
    pub(crate) chain: Chain,
    /// Bytes after the last intact block.
    pub(crate) torn_bytes: u64,
}

impl History {
    /// Reads the blocks of a whole file, which begin at `from`.
    pub(crate) fn read(source: Source, from: u64, header: Header) -> Result<Self, Unread> {
        let chain = Chain::new(header.salt);
        let mut scanner = Scanner::new(Arc::clone(&source), from, chain)?;
        let mut history = Self {
            source: Arc::clone(&source),
            reader: Reader::default(),
            header,
            by_position: Index::default(),
            by_key: HashMap::new(),
            by_kind: [0; 5],
            marked: 0,
            checks: Vec::new(),
            marks: Vec::new(),
            next_mark: 0,
            live_bytes: from,
            epoch: 0,
            sealed: None,
            end: from,
            chain,
            torn_bytes: 0,
        };
        while let Some(block) = scanner.next_block()? {
            let offset = block.offset;
            match history.enter_block(&block) {
                Ok(()) => {}
                Err(Unfit::Detail(detail)) => return Err(Damage::Bad { offset, detail }.into()),
                Err(Unfit::Io(error)) => return Err(error.into()),
            }
        }
        history.by_position.pack();
        (history.end, history.chain) = scanner.place();
        history.torn_bytes = scanner.size() - history.end;
        Ok(history)
    }

    fn enter_block(&mut self, block: &Block<'_>) -> Result<(), Unfit> {
        if self.header.identity == Identity::Position
            && let Some(records) = block.results()
        {
            return self.enter_results(records, block.end());
        }
        let mut failed = None;
        let visited = block.entries(&mut |entry| {
            self.enter(entry, block.end()).map_err(|unfit| match unfit {
                Unfit::Detail(detail) => detail,
                Unfit::Io(error) => {
                    failed = Some(error);
                    ""
                }
            })
        });
        failed.map_or(visited.map_err(Unfit::Detail), |error| Err(Unfit::Io(error)))
    }

    /// Enters a block of results; neighbours are entered together.
    fn enter_results(&mut self, mut records: &[u8], block_end: u64) -> Result<(), Unfit> {
        self.sealed = None;
        let mut previous = u64::MAX;
        while !records.is_empty() {
            let (index, payload) = next_record(&mut records, &mut previous).ok_or(SHORT)?;
            let at = block_end - (records.len() + payload.len()) as u64;
            self.enter_record(Kind::Result, index, at, payload, block_end)?;
            // The fingerprint covers the item, so its number fits a `usize`.
            let index = index as usize;
            let room = self.by_position.room_behind(index, RECORD_BYTES + SHORT_PAYLOAD_BYTES);
            let before = records.len();
            let items = take_neighbours(&mut records, room.min(self.marked - index - 1));
            let bytes = (before - records.len()) as u64;
            self.by_position.enter_neighbours(index, items, bytes);
            previous += items as u64;
            self.live_bytes += bytes + items as u64 * (RECORD_BYTES - SHORT_HEAD_BYTES);
            self.by_kind[usize::from(RESULT)] += items as u64;
        }
        Ok(())
    }

    fn enter(&mut self, entry: Entry<'_>, block_end: u64) -> Result<(), Unfit> {
        self.sealed = None;
        match entry {
            Entry::Record { kind, index, at, payload } => self.enter_record(kind, index, at, payload, block_end)?,
            Entry::InputMark { first, count, chain, checks } => {
                if first != self.marked as u64 {
                    return Err("a fingerprint of the input does not follow the one before".into());
                }
                self.checks.extend_from_slice(checks);
                self.live_bytes += checks.len() as u64;
                self.marked += usize::try_from(count).map_err(|_| "a fingerprint of the input is too long")?;
                self.marks.push((self.marked, chain));
            }
            Entry::Open { epoch, .. } => self.epoch = epoch,
            Entry::Sealed { total, digest } => {
                self.check_seal(total, digest)?;
                self.sealed = Some((total, digest));
            }
        }
        Ok(())
    }

    /// Checks a seal: it claims that every item is finished, so every item must have a record.
    fn check_seal(&self, total: u64, digest: u64) -> Result<(), &'static str> {
        let is_whole = match self.header.identity {
            // The fingerprint of an empty input is the salt it begins with.
            Identity::Position => {
                let chain = self.marks.last().map_or(self.chain.salt, |(_, chain)| *chain);
                (total, digest) == (self.marked as u64, chain) && self.finished() == total
            }
            // An input with keys may have fewer items than an earlier one.
            Identity::Key => self.finished() >= total,
        };
        if is_whole { Ok(()) } else { Err("the seal does not agree with what is recorded before it") }
    }

    fn enter_record(&mut self, kind: Kind, index: u64, at: u64, payload: &[u8], block_end: u64) -> Result<(), Unfit> {
        let (mut rest, mut key) = (payload, None);
        if self.header.identity == Identity::Key {
            key = Some(take_key(&mut rest).ok_or("a record has no key")?);
        }
        if matches!(kind, Kind::Failure | Kind::Quarantine) && read_failure(rest).is_none() {
            return Err("the record of a failure does not parse".into());
        }
        let length = u32::try_from(rest.len()).map_err(|_| "a record is too long")?;
        let slot = Slot { at: at + (payload.len() - rest.len()) as u64, length, kind: kind as u8 };
        let (before, now) = match key {
            Some(key) => {
                let known = self.by_key.entry(key.into()).or_default();
                let before = *known;
                if before.gives_way_to(slot.kind) {
                    *known = slot;
                }
                (before, *known)
            }
            None => {
                // The fingerprint is written before the results it covers, so a result cannot be ahead of it.
                let index = usize::try_from(index).ok().filter(|index| *index < self.marked);
                let index = index.ok_or("a result lies beyond the fingerprint of the input")?;
                self.by_position.enter(&*self.source, index, slot, block_end).map_err(Unfit::Io)?
            }
        };
        let around = RECORD_BYTES + (payload.len() - rest.len()) as u64;
        let size = |slot: Slot| if slot.kind == 0 { 0 } else { u64::from(slot.length) + around };
        self.live_bytes = self.live_bytes + size(now) - size(before);
        if before.kind != 0 {
            self.by_kind[usize::from(before.kind)] -= 1;
        }
        self.by_kind[usize::from(now.kind)] += 1;
        Ok(())
    }

    /// How many items need no more work, including those whose end is unknown.
    fn finished(&self) -> u64 {
        [RESULT, QUARANTINE, INTENT].iter().map(|kind| self.by_kind[usize::from(*kind)]).sum()
    }

    /// Returns how many items are in each state.
    pub(crate) fn counts(&self) -> Counts {
        let of = |kind: u8| usize::try_from(self.by_kind[usize::from(kind)]).unwrap_or(usize::MAX);
        Counts { results: of(RESULT), quarantined: of(QUARANTINE), uncertain: of(INTENT), failed: of(FAILURE) }
    }

    /// Returns about how many bytes the file would have with only the current records.
    pub(crate) fn live_bytes(&self) -> u64 {
        self.live_bytes
    }

    /// Returns all keys, in the order of their last records; `None` if the file goes by position.
    pub(crate) fn keys(&self) -> Option<Vec<Arc<str>>> {
        if self.header.identity == Identity::Position {
            return None;
        }
        let mut keys: Vec<_> = self.by_key.iter().map(|(key, slot)| (slot.at, key)).collect();
        keys.sort_unstable_by_key(|(at, _)| *at);
        Some(keys.into_iter().map(|(_, key)| Arc::clone(key)).collect())
    }

    /// Returns what is known of an item, by key if the file goes by keys, otherwise by index.
    #[inline]
    pub(crate) fn of(&mut self, index: usize, key: Option<&str>) -> io::Result<Past<'_>> {
        let (kind, payload) = self.last(index, key)?;
        match kind {
            0 => return Ok(Past::Nothing),
            RESULT => return Ok(Past::Result(payload)),
            INTENT => return Ok(Past::Uncertain),
            _ => {}
        }
        let changed = || io::Error::new(io::ErrorKind::InvalidData, "it is not what it was a moment ago");
        let (attempts, cause) = read_failure(payload).ok_or_else(changed)?;
        Ok(if kind == FAILURE { Past::Failed { attempts } } else { Past::Quarantined { attempts, cause } })
    }

    /// Returns the result of an item if its last record is a result and is already in memory; never with keys.
    #[inline]
    pub(crate) fn result_at_hand(&self, index: usize) -> Option<&[u8]> {
        self.by_position.at_hand(index, RESULT)
    }

    /// Fills in the payload of an item's last record, with its key, and returns the record's kind.
    pub(crate) fn record(
        &mut self,
        index: usize,
        key: Option<&str>,
        payload: &mut Vec<u8>,
    ) -> io::Result<Option<Kind>> {
        let (kind, rest) = self.last(index, key)?;
        begin_payload(payload, key);
        payload.extend_from_slice(rest);
        Ok(Kind::from_byte(kind))
    }

    /// The kind of the last record of an item, 0 for none, and its payload.
    #[inline]
    fn last(&mut self, index: usize, key: Option<&str>) -> io::Result<(u8, &[u8])> {
        let (slot, payload) = match key {
            Some(key) => (self.by_key.get(key).copied().unwrap_or_default(), None),
            None if index < self.marked => self.by_position.of(&*self.source, index)?,
            None => return Ok((0, &[])),
        };
        let payload = match payload {
            _ if slot.kind == 0 || slot.length == 0 => &[],
            Some(payload) => payload,
            None => self.reader.payload(&*self.source, self.end, slot)?,
        };
        Ok((slot.kind, payload))
    }

    /// The whole fingerprint after some items, by their number.
    pub(crate) fn marks(&self) -> &[(usize, u64)] {
        &self.marks
    }

    /// The check bytes in this range.
    pub(crate) fn checks_of(&self, from: u64, to: u64) -> &[u8] {
        self.checks.get(from as usize..to as usize).unwrap_or_default()
    }

    /// Adds to the error of an unreadable result the type and version for which the file was created.
    #[cold]
    pub(crate) fn unread(&self, error: TaskError) -> TaskError {
        error.of_checkpoint(&self.header.result_type, &self.header.version)
    }

    /// Returns how many items of the input have a fingerprint in the file.
    pub(crate) fn marked(&self) -> usize {
        self.marked
    }

    /// Returns whether the fingerprint after an item may be `chain`; `None` if the file does not know the item. Call it
    /// in the order of the items.
    #[inline]
    pub(crate) fn confirms(&mut self, index: usize, chain: u64) -> Option<bool> {
        if index >= self.marked {
            return None;
        }
        let (at, width) = (check_offset(index as u64) as usize, check_width(index as u64));
        let same = match width {
            // Nearly every item has one byte, and comparing slices would be a function call.
            1 => self.checks.get(at) == Some(&(chain as u8)),
            _ => self.checks.get(at..at + width) == Some(&chain.to_le_bytes()[..width]),
        };
        while self.marks.get(self.next_mark).is_some_and(|(end, _)| *end <= index) {
            self.next_mark += 1;
        }
        let mark = self.marks.get(self.next_mark).filter(|(end, _)| *end == index + 1);
        Some(same && mark.is_none_or(|(_, mark)| *mark == chain))
    }
}

/// Reads payloads anywhere in the file.
#[derive(Debug, Default)]
struct Reader {
    at: u64,
    bytes: Vec<u8>,
}

impl Reader {
    fn payload<S: ReadAt + ?Sized>(&mut self, source: &S, end: u64, slot: Slot) -> io::Result<&[u8]> {
        let (from, length) = (slot.at, u64::from(slot.length));
        let to = from + length;
        let known_to = self.at + self.bytes.len() as u64;
        if from < self.at || to > known_to {
            // Records are mostly read in file order.
            let comes_next = from >= self.at && from <= known_to + READ_AHEAD_BYTES;
            let wanted = if comes_next { length.max(READ_AHEAD_BYTES) } else { length };
            let wanted = usize::try_from(wanted.min(end.saturating_sub(from))).map_err(io::Error::other)?;
            self.at = from;
            self.bytes.resize(wanted, 0);
            let filled = source.read_exact_at(from, &mut self.bytes);
            if filled.is_err() {
                self.bytes.clear();
            }
            filled?;
        }
        let start = usize::try_from(from - self.at).map_err(io::Error::other)?;
        let end = start + slot.length as usize;
        self.bytes.get(start..end).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

/// Why an entry does not fit what came before it.
enum Unfit {
    Detail(&'static str),
    Io(io::Error),
}

impl From<&'static str> for Unfit {
    fn from(detail: &'static str) -> Self {
        Self::Detail(detail)
    }
}

const RESULT: u8 = Kind::Result as u8;
const INTENT: u8 = Kind::Intent as u8;
const FAILURE: u8 = Kind::Failure as u8;
const QUARANTINE: u8 = Kind::Quarantine as u8;

/// Begins the payload of a record, with the item's key if the file goes by keys.
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

pub(crate) fn take_key<'a>(payload: &mut &'a [u8]) -> Option<&'a str> {
    let length = usize::try_from(take_varint(payload)?).ok()?;
    std::str::from_utf8(take(payload, length)?).ok()
}

fn read_failure(mut payload: &[u8]) -> Option<(u32, String)> {
    let attempts = u32::try_from(take_varint(&mut payload)?).ok()?;
    Some((attempts, take_str(&mut payload)?))
}
