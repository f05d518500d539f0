//! The place of each item's last record, for items identified by position.
//!
//! Invariant: a lookup finds what was entered last. If the records of neighbours lie together, the index keeps only
//! where they begin, and reads them again on a lookup, so that ten million small results take a few megabytes.

use std::{collections::VecDeque, io, ops::Range};

use crate::{
    log::{BLOCK_LINKED_HEAD, Kind, peek},
    scan::{ReadAt, next_record},
};

/// How many neighbours are kept together.
const CHUNK_ITEMS: usize = 1024;
/// Their records lie together if they are no further apart than this.
const REGION_BYTES: u64 = 256 << 10;
/// How many may lie elsewhere. With more of them, a list of all is not much larger.
const MOST_EXCEPTIONS: usize = 128;
/// How many times their own size the region may be. In a larger one, reading them again would take too long.
const MOST_SPREAD: u64 = 8;
/// A chunk that had to be read again this often while the file is read stays open as it is.
const MOST_REOPENED: u8 = 4;
/// How many chunks are open while a file is read. Records come nearly in the order of the items.
const MOST_OPEN: usize = 64;

/// The place of a record's payload, and its kind; 0 for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) at: u64,
    pub(crate) length: u32,
    pub(crate) kind: u8,
}

impl Slot {
    fn end(self) -> u64 {
        self.at + u64::from(self.length)
    }

    /// Whether a later record of this kind replaces this one: a failed attempt never hides a result.
    pub(crate) fn gives_way_to(self, kind: u8) -> bool {
        kind != FAILURE || matches!(self.kind, 0 | FAILURE | INTENT)
    }
}

/// About how many bytes a record takes.
fn record_bytes(slot: Slot) -> u64 {
    u64::from(slot.length) + 3
}

const RESULT: u8 = Kind::Result as u8;
const FAILURE: u8 = Kind::Failure as u8;
const INTENT: u8 = Kind::Intent as u8;

/// A record from which the following ones can be read: the record, its item, and the end of its block.
#[derive(Clone, Copy, Debug, Default)]
struct Start {
    slot: Slot,
    index: u64,
    block_end: u64,
}

#[derive(Debug, Default)]
enum Chunk {
    #[default]
    Empty,
    /// Results of neighbours in order, of which only the beginning and the end are kept.
    Run {
        region: Region,
        /// The place of the item after the last one.
        next: usize,
        /// How many bytes their records take.
        own: u64,
    },
    Open {
        slots: Box<[Slot]>,
        /// The first record that was entered, and the first since the chunk was opened again.
        starts: [Start; 2],
        reopened: u8,
    },
    Packed {
        region: Option<Region>,
        exceptions: Box<[(u16, Slot)]>,
        /// The first record that was entered.
        first: Start,
        reopened: u8,
    },
}

/// Where most records of a chunk lie: from the first to the end of the last.
#[derive(Clone, Copy, Debug)]
struct Region {
    start: Start,
    end: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Index {
    chunks: Vec<Chunk>,
    /// The chunks to pack once reading has moved on.
    open: VecDeque<usize>,
    cached: Cached,
}

/// The chunk of the last lookup, and the bytes of its region.
#[derive(Debug, Default)]
struct Cached {
    chunk: Option<usize>,
    slots: Vec<Slot>,
    at: u64,
    bytes: Vec<u8>,
}

impl Index {
    /// Enters the record of an item, or ignores it, and returns the slot before and the slot now.
    #[inline]
    pub(crate) fn enter<S: ReadAt + ?Sized>(
        &mut self,
        source: &S,
        index: usize,
        slot: Slot,
        block_end: u64,
    ) -> io::Result<(Slot, Slot)> {
        let (number, place) = (index / CHUNK_ITEMS, index % CHUNK_ITEMS);
        let start = Start { slot, index: index as u64, block_end };
        match self.chunks.get_mut(number) {
            Some(Chunk::Run { region, next, own }) => {
                *own += record_bytes(slot);
                let longer = Region { end: slot.end(), ..*region };
                if place == *next && slot.kind == RESULT && longer.is_small() && longer.holds_little_else(*own) {
                    (*region, *next) = (longer, place + 1);
                    return Ok((Slot::default(), slot));
                }
            }
            None | Some(Chunk::Empty) if slot.kind == RESULT => {
                if self.chunks.len() <= number {
                    self.chunks.resize_with(number + 1, Chunk::default);
                }
                let region = Region { start, end: slot.end() };
                self.chunks[number] = Chunk::Run { region, next: place + 1, own: record_bytes(slot) };
                return Ok((Slot::default(), slot));
            }
            _ => {}
        }
        if !matches!(self.chunks.get(number), Some(Chunk::Open { .. })) {
            self.open(source, number, start)?;
        }
        let Some(Chunk::Open { slots, .. }) = self.chunks.get_mut(number) else {
            return Err(io::Error::other("a chunk that was opened is open"));
        };
        let known = &mut slots[place];
        let before = *known;
        if before.gives_way_to(slot.kind) {
            *known = slot;
        }
        Ok((before, *known))
    }

    /// How many more results can be entered right behind this item, which was entered last, if they belong to the next
    /// items and each takes at most `most_bytes`.
    pub(crate) fn room_behind(&self, index: usize, most_bytes: u64) -> usize {
        match self.chunks.get(index / CHUNK_ITEMS) {
            Some(Chunk::Run { region, next, .. }) if *next == index % CHUNK_ITEMS + 1 => {
                let bytes = (region.start.slot.at + REGION_BYTES).saturating_sub(region.end);
                (CHUNK_ITEMS - next).min(usize::try_from(bytes / most_bytes).unwrap_or_default())
            }
            _ => 0,
        }
    }

    /// Enters the results of the next `items` items, which lie right behind this one, the last entered. There must be
    /// room for them.
    pub(crate) fn enter_neighbours(&mut self, index: usize, items: usize, bytes: u64) {
        if let Some(Chunk::Run { region, next, own }) = self.chunks.get_mut(index / CHUNK_ITEMS) {
            *next += items;
            *own += bytes;
            region.end += bytes;
        }
    }

    fn open<S: ReadAt + ?Sized>(&mut self, source: &S, number: usize, start: Start) -> io::Result<()> {
        if self.open.len() >= MOST_OPEN
            && let Some(left) = self.open.pop_front()
        {
            self.chunks[left].pack();
        }
        if self.chunks.len() <= number {
            self.chunks.resize_with(number + 1, Chunk::default);
        }
        let chunk = &mut self.chunks[number];
        let (mut slots, mut bytes) = (Vec::new(), Vec::new());
        match chunk {
            // Records in random order are not read again one by one.
            Chunk::Run { region: Region { start, end }, .. } if *end == start.slot.end() => {
                slots.resize(CHUNK_ITEMS, Slot::default());
                slots[start.index as usize % CHUNK_ITEMS] = start.slot;
            }
            _ => {
                chunk.unpack(source, number, &mut slots, &mut bytes)?;
            }
        }
        let (first, reopened) = match chunk {
            Chunk::Packed { first, reopened, .. } => (*first, *reopened + 1),
            Chunk::Run { region, .. } => (region.start, 0),
            Chunk::Empty | Chunk::Open { .. } => (start, 0),
        };
        *chunk = Chunk::Open { slots: slots.into(), starts: [first, start], reopened };
        if reopened < MOST_REOPENED {
            self.open.push_back(number);
        }
        Ok(())
    }

    /// Call it when everything is entered.
    pub(crate) fn pack(&mut self) {
        while let Some(left) = self.open.pop_front() {
            self.chunks[left].pack();
        }
    }

    /// Returns the place of an item's last record, and its payload if that is at hand.
    #[inline]
    pub(crate) fn of<S: ReadAt + ?Sized>(&mut self, source: &S, index: usize) -> io::Result<(Slot, Option<&[u8]>)> {
        let number = index / CHUNK_ITEMS;
        if self.cached.chunk != Some(number) {
            let Some(chunk) = self.chunks.get(number) else { return Ok((Slot::default(), None)) };
            let cached = &mut self.cached;
            cached.chunk = None;
            cached.at = chunk.unpack(source, number, &mut cached.slots, &mut cached.bytes)?;
            cached.chunk = Some(number);
        }
        let slot = self.cached.slots[index % CHUNK_ITEMS];
        Ok((slot, self.cached.payload(slot)))
    }

    /// Returns the payload of an item's last record, if it is of this kind and near the last lookup.
    #[inline]
    pub(crate) fn at_hand(&self, index: usize, kind: u8) -> Option<&[u8]> {
        let slot = self.cached.slots.get(index % CHUNK_ITEMS)?;
        let is_this = self.cached.chunk == Some(index / CHUNK_ITEMS) && slot.kind == kind;
        if is_this { self.cached.payload(*slot) } else { None }
    }
}

impl Cached {
    #[inline]
    fn payload(&self, slot: Slot) -> Option<&[u8]> {
        let start = usize::try_from(slot.at.checked_sub(self.at)?).ok()?;
        self.bytes.get(start..start.checked_add(slot.length as usize)?)
    }
}

impl Chunk {
    /// Keeps only where the records begin if nearly all lie together, or a list of them if they are few.
    fn pack(&mut self) {
        let Self::Open { slots, starts, reopened } = self else { return };
        let regions = starts.map(|start| start.region(slots));
        let region = regions.into_iter().map(Some).chain([None]).find(|region| {
            let outside = slots.iter().filter(|slot| !region.is_some_and(|region| region.holds(slot)));
            outside.filter(|slot| slot.kind != 0).count() <= MOST_EXCEPTIONS
                && region.is_none_or(|region| region.is_dense(slots))
        });
        let Some(region) = region else { return };
        let all = slots.iter().enumerate().filter(|(_, slot)| slot.kind != 0);
        let outside = all.filter(|(_, slot)| !region.is_some_and(|region| region.holds(slot)));
        // A chunk has 1024 items, so their numbers fit.
        let exceptions = outside.map(|(at, slot)| (at as u16, *slot)).collect();
        *self = Self::Packed { region, exceptions, first: starts[0], reopened: *reopened };
    }

    /// Fills in the slots of all items and the bytes of the region, and returns the region's offset.
    fn unpack<S: ReadAt + ?Sized>(
        &self,
        source: &S,
        number: usize,
        slots: &mut Vec<Slot>,
        bytes: &mut Vec<u8>,
    ) -> io::Result<u64> {
        slots.clear();
        bytes.clear();
        match self {
            Self::Empty => slots.resize(CHUNK_ITEMS, Slot::default()),
            Self::Open { slots: all, .. } => slots.extend_from_slice(all),
            Self::Run { region, .. } => return region.unpack(source, number, slots, bytes),
            Self::Packed { region, exceptions, .. } => {
                let at = match region {
                    Some(region) => region.unpack(source, number, slots, bytes)?,
                    None => {
                        slots.resize(CHUNK_ITEMS, Slot::default());
                        0
                    }
                };
                for (at, slot) in exceptions {
                    slots[usize::from(*at)] = *slot;
                }
                return Ok(at);
            }
        }
        Ok(0)
    }
}

impl Region {
    /// Fills in the slots of a chunk from the records here and their bytes, and returns the bytes' offset.
    fn unpack<S: ReadAt + ?Sized>(
        self,
        source: &S,
        number: usize,
        slots: &mut Vec<Slot>,
        bytes: &mut Vec<u8>,
    ) -> io::Result<u64> {
        let Self { start, end } = self;
        slots.resize(CHUNK_ITEMS, Slot::default());
        bytes.resize(usize::try_from(end - start.slot.at).map_err(io::Error::other)?, 0);
        source.read_exact_at(start.slot.at, bytes)?;
        let items = number * CHUNK_ITEMS..(number + 1) * CHUNK_ITEMS;
        let changed = || io::Error::new(io::ErrorKind::InvalidData, "it is not what it was a moment ago");
        start.replay(bytes, &items, slots).ok_or_else(changed)?;
        Ok(start.slot.at)
    }

    fn is_small(self) -> bool {
        self.end - self.start.slot.at <= REGION_BYTES
    }

    /// Whether records of `own` bytes fill most of it.
    fn holds_little_else(self, own: u64) -> bool {
        self.end - self.start.slot.at <= own.saturating_mul(MOST_SPREAD)
    }

    /// Whether the current record of an item lies in it.
    fn holds(&self, slot: &Slot) -> bool {
        slot.kind != 0 && slot.at >= self.start.slot.at && slot.end() <= self.end
    }

    /// Whether the current records of these items fill most of it.
    fn is_dense(&self, slots: &[Slot]) -> bool {
        self.holds_little_else(slots.iter().filter(|slot| self.holds(slot)).map(|slot| record_bytes(*slot)).sum())
    }
}

impl Start {
    /// The region from here to the end of the last of these records that is near enough.
    fn region(self, slots: &[Slot]) -> Region {
        let (from, to) = (self.slot.at, self.slot.at.saturating_add(REGION_BYTES));
        let near = slots.iter().filter(|slot| slot.kind != 0 && slot.at >= from && slot.end() <= to);
        Region { start: self, end: near.map(|slot| slot.end()).max().unwrap_or(self.slot.end()) }
    }

    /// Enters those records of `items` that lie in `bytes`, from this record on.
    fn replay(&self, bytes: &[u8], items: &Range<usize>, slots: &mut [Slot]) -> Option<()> {
        let base = self.slot.at;
        let mut enter = |index: u64, slot: Slot| {
            if let Some(index) = usize::try_from(index).ok().filter(|index| items.contains(index)) {
                let known = &mut slots[index - items.start];
                if known.gives_way_to(slot.kind) {
                    *known = slot;
                }
            }
        };
        enter(self.index, self.slot);
        let (mut kind, mut previous) = (self.slot.kind, self.index);
        let (mut at, mut block_end) = (self.slot.length as usize, usize::try_from(self.block_end - base).ok()?);
        while at < bytes.len() {
            if at >= block_end {
                let (next, length) = peek(bytes.get(at..)?)?;
                block_end = at.checked_add(length)?;
                at = if next.is_record() { at + BLOCK_LINKED_HEAD } else { block_end };
                (kind, previous) = (next as u8, u64::MAX);
                continue;
            }
            // The region ends with a record, which need not be the last of its block.
            let mut rest = bytes.get(at..block_end.min(bytes.len()))?;
            let before = rest.len();
            let (index, payload) = next_record(&mut rest, &mut previous)?;
            let place = base + (at + before - rest.len() - payload.len()) as u64;
            enter(index, Slot { at: place, length: u32::try_from(payload.len()).ok()?, kind });
            at += before - rest.len();
        }
        (at == bytes.len()).then_some(())
    }
}

#[cfg(test)]
mod tests;
