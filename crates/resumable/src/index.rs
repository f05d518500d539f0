//! Where the last record of each item lies, for items known by their position.
//!
//! Invariant: what is found is what was entered last. Where the records of neighbours lie together, only where they begin
//! is kept, and they are read again when they are asked for, so that ten million small results take a few megabytes.

use std::{collections::VecDeque, io, ops::Range};

use crate::{
    log::{BLOCK_LINKED_HEAD, Kind, peek},
    scan::{ReadAt, next_record},
};

/// So many neighbours are kept together.
const CHUNK_ITEMS: usize = 1024;
/// Their records lie together if they are no further apart than this.
const REGION_BYTES: u64 = 256 << 10;
/// So many may lie elsewhere: beyond, a list of all is not much larger.
const MOST_EXCEPTIONS: usize = 128;
/// And so much else may lie between them: else reading them again would take more than its share.
const MOST_SPREAD: u64 = 8;
/// A chunk that had to be read again so often while the file is read stays as it is.
const MOST_REOPENED: u8 = 4;
/// So many chunks are open while a file is read: records come nearly in the order of the items.
const MOST_OPEN: usize = 64;

/// Where a record's payload lies, and its kind; 0 for none.
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

    /// Whether a later record of this kind counts instead: a failed attempt never hides a result.
    pub(crate) fn gives_way_to(self, kind: u8) -> bool {
        kind != FAILURE || matches!(self.kind, 0 | FAILURE | INTENT)
    }
}

const FAILURE: u8 = Kind::Failure as u8;
const INTENT: u8 = Kind::Intent as u8;

/// A record from which the ones behind it can be read: itself, its item, and the end of its block.
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

/// Where most records of a chunk lie: from one to the end of the last.
#[derive(Clone, Copy, Debug)]
struct Region {
    start: Start,
    end: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Index {
    chunks: Vec<Chunk>,
    /// Those that are to be packed once they are left.
    open: VecDeque<usize>,
    cached: Cached,
}

/// The chunk that was asked for last, and the bytes of its region.
#[derive(Debug, Default)]
struct Cached {
    chunk: Option<usize>,
    slots: Vec<Slot>,
    at: u64,
    bytes: Vec<u8>,
}

impl Index {
    /// Enters the record of an item, which may be ignored, and returns what was there before and what is there now.
    #[inline]
    pub(crate) fn enter<S: ReadAt + ?Sized>(
        &mut self,
        source: &S,
        index: usize,
        slot: Slot,
        block_end: u64,
    ) -> io::Result<(Slot, Slot)> {
        let number = index / CHUNK_ITEMS;
        let start = Start { slot, index: index as u64, block_end };
        if !matches!(self.chunks.get(number), Some(Chunk::Open { .. })) {
            self.open(source, number, start)?;
        }
        let Some(Chunk::Open { slots, .. }) = self.chunks.get_mut(number) else {
            return Err(io::Error::other("a chunk that was opened is open"));
        };
        let known = &mut slots[index % CHUNK_ITEMS];
        let before = *known;
        if before.gives_way_to(slot.kind) {
            *known = slot;
        }
        Ok((before, *known))
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
        chunk.unpack(source, number, &mut slots, &mut bytes)?;
        let (first, reopened) = match chunk {
            Chunk::Packed { first, reopened, .. } => (*first, *reopened + 1),
            Chunk::Empty | Chunk::Open { .. } => (start, 0),
        };
        *chunk = Chunk::Open { slots: slots.into(), starts: [first, start], reopened };
        if reopened < MOST_REOPENED {
            self.open.push_back(number);
        }
        Ok(())
    }

    /// To be called when all is entered.
    pub(crate) fn pack(&mut self) {
        while let Some(left) = self.open.pop_front() {
            self.chunks[left].pack();
        }
    }

    /// Returns where the last record of an item lies, and its payload if that is at hand.
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
}

impl Cached {
    #[inline]
    fn payload(&self, slot: Slot) -> Option<&[u8]> {
        let start = usize::try_from(slot.at.checked_sub(self.at)?).ok()?;
        self.bytes.get(start..start.checked_add(slot.length as usize)?)
    }
}

impl Chunk {
    /// Keeps only where the records begin, if nearly all lie together, or a list of them if they are few.
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
        // A chunk has 1024 items, whose numbers fit.
        let exceptions = outside.map(|(at, slot)| (at as u16, *slot)).collect();
        *self = Self::Packed { region, exceptions, first: starts[0], reopened: *reopened };
    }

    /// Fills in the slots of all items, and the bytes of the region, whose offset is returned.
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
            Self::Packed { region, exceptions, .. } => {
                slots.resize(CHUNK_ITEMS, Slot::default());
                if let Some(Region { start, end }) = region {
                    bytes.resize(usize::try_from(end - start.slot.at).map_err(io::Error::other)?, 0);
                    source.read_exact_at(start.slot.at, bytes)?;
                    let items = number * CHUNK_ITEMS..(number + 1) * CHUNK_ITEMS;
                    let changed = || io::Error::new(io::ErrorKind::InvalidData, "it is not what it was a moment ago");
                    start.replay(bytes, &items, slots).ok_or_else(changed)?;
                }
                for (at, slot) in exceptions {
                    slots[usize::from(*at)] = *slot;
                }
                return Ok(region.map_or(0, |region| region.start.slot.at));
            }
        }
        Ok(0)
    }
}

impl Region {
    /// Whether what counts of an item lies in it.
    fn holds(&self, slot: &Slot) -> bool {
        slot.kind != 0 && slot.at >= self.start.slot.at && slot.end() <= self.end
    }

    /// Whether it has little else in it than what counts of these items.
    fn is_dense(&self, slots: &[Slot]) -> bool {
        let own: u64 = slots.iter().filter(|slot| self.holds(slot)).map(|slot| u64::from(slot.length) + 3).sum();
        self.end - self.start.slot.at <= own.saturating_mul(MOST_SPREAD)
    }
}

impl Start {
    /// The region that begins here and ends with the last of these records that is near enough.
    fn region(self, slots: &[Slot]) -> Region {
        let (from, to) = (self.slot.at, self.slot.at.saturating_add(REGION_BYTES));
        let near = slots.iter().filter(|slot| slot.kind != 0 && slot.at >= from && slot.end() <= to);
        Region { start: self, end: near.map(|slot| slot.end()).max().unwrap_or(self.slot.end()) }
    }

    /// Enters the records of these items that lie in the bytes from this record on.
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
