//! The block log, format 1: a pure codec between records and bytes, without a file in sight.
//!
//! Invariant: whatever bytes it is given, [`scan`] visits a prefix of what was written or returns an error.
//!
//! ```text
//! file   = header block*
//! header = magic[8] format:u16 min_reader:u16 len:u32 crc:u32 body[len]
//!          body = salt:u64 codec:u8 identity:u8 job:str version:str result_type:str     (str = varint length, UTF-8)
//! block  = magic:u32 len:u32 crc:u32 type:u8 body[len]          crc = CRC-32C of len, type, salt, body
//!          Result, Intent, Failure, Quarantine: body = (zigzag varint of index - previous - 1, varint length, payload)*
//!          InputMark: first:varint count:varint chain:u64 checks (for each item the low bytes of the chain after it:
//!                    4 for each of the first 1024 items of the input, 1 for each later one)
//!          Open: epoch:varint pid:varint          Sealed: total:varint digest:u64
//! ```
//! All integers are little-endian. The first index of a block is relative to -1, so that each block reads by itself.

use crate::varint::{put_str, put_varint, take, take_str, take_u64, take_varint, unzigzag, zigzag};

/// The format this code writes, and the newest it can read.
pub(crate) const FORMAT: u16 = 1;

/// The longest payload of one record. A length field must never overflow, however many records share a block.
pub(crate) const MAX_PAYLOAD_BYTES: usize = 256 << 20;

/// A block of this size takes no more records, so that one never outgrows its length field.
const LARGE_BLOCK_BYTES: usize = 1 << 20;

/// Like PNG's: a byte no text begins with, and line ends that a text-mode copy would break.
const FILE_MAGIC: [u8; 8] = *b"\x89RSUME\r\n";
const BLOCK_MAGIC: [u8; 4] = *b"\xb7BLK";
/// This many items of the input have four check bytes.
const EXACT_CHECKS: u64 = 1024;
const FILE_HEAD: usize = 20;
const BLOCK_HEAD: usize = 13;

/// How an item is recognised when a run resumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Identity {
    Position = 0,
    Key = 1,
}

/// What a checkpoint file says about the computation it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Mixed into each block's checksum: neither a payload nor recycled disk space can pose as a block of this file.
    pub(crate) salt: u64,
    pub(crate) codec: u8,
    pub(crate) identity: Identity,
    pub(crate) job: String,
    pub(crate) version: String,
    pub(crate) result_type: String,
}

/// Why bytes are not a log: where, and what is wrong there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Damage {
    Bad { offset: usize, detail: &'static str },
    NewerFormat { needs: u16 },
}

impl Header {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut body = self.salt.to_le_bytes().to_vec();
        body.extend_from_slice(&[self.codec, self.identity as u8]);
        for text in [&self.job, &self.version, &self.result_type] {
            put_str(&mut body, text);
        }
        let mut bytes = FILE_MAGIC.to_vec();
        bytes.extend_from_slice(&FORMAT.to_le_bytes());
        bytes.extend_from_slice(&FORMAT.to_le_bytes());
        bytes.extend_from_slice(&length_of(&body).to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[8..16]), &body);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// Reads the header and returns it with its length, which is where the first block begins.
    pub(crate) fn decode(bytes: &[u8]) -> Result<(Self, usize), Damage> {
        let bad = |detail| Damage::Bad { offset: 0, detail };
        if bytes.len() < FILE_HEAD || bytes[..8] != FILE_MAGIC {
            return Err(bad("this is not a checkpoint file"));
        }
        let end = FILE_HEAD.saturating_add(u32_at(bytes, 12) as usize);
        let body = bytes.get(FILE_HEAD..end).ok_or(bad("the header is cut off"))?;
        if crc32c::crc32c_append(crc32c::crc32c(&bytes[8..16]), body) != u32_at(bytes, 16) {
            return Err(bad("the header fails its checksum"));
        }
        let needs = u16::from_le_bytes([bytes[10], bytes[11]]);
        if needs > FORMAT {
            return Err(Damage::NewerFormat { needs });
        }
        let header = Self::decode_body(body).ok_or(bad("the header does not parse"))?;
        Ok((header, end))
    }

    fn decode_body(mut body: &[u8]) -> Option<Self> {
        let body = &mut body;
        let salt = take_u64(body)?;
        let codec = take(body, 1)?[0];
        let identity = match take(body, 1)?[0] {
            0 => Identity::Position,
            1 => Identity::Key,
            _ => return None,
        };
        let (job, version, result_type) = (take_str(body)?, take_str(body)?, take_str(body)?);
        body.is_empty().then_some(Self { salt, codec, identity, job, version, result_type })
    }
}

/// The type byte of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Result = 1,
    Intent = 2,
    Failure = 3,
    Quarantine = 4,
    InputMark = 5,
    Open = 6,
    Sealed = 7,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        use Kind::{Failure, InputMark, Intent, Open, Quarantine, Result, Sealed};
        [Result, Intent, Failure, Quarantine, InputMark, Open, Sealed].into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// One thing a log says, in the order in which it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry<'a> {
    /// `at` is the offset of the payload in the scanned bytes.
    Record {
        kind: Kind,
        index: u64,
        at: usize,
        payload: &'a [u8],
    },
    /// Items `first..first + count` of the input were read; `chain` is the fingerprint after the last of them.
    InputMark {
        first: u64,
        count: u64,
        chain: u64,
        checks: &'a [u8],
    },
    Open {
        epoch: u64,
        pid: u64,
    },
    Sealed {
        total: u64,
        digest: u64,
    },
}

/// Where the check bytes of an item begin if those of all items are put in a row.
///
/// An edit is found at the very item with four bytes, and in 255 of 256 cases with one (else at the next, or at the end
/// of the mark); a long input is not to cost four bytes an item.
pub(crate) fn check_offset(index: u64) -> u64 {
    index.saturating_add(index.min(EXACT_CHECKS) * 3)
}

/// How many bytes of the chain are kept for an item.
pub(crate) fn check_width(index: u64) -> usize {
    if index < EXACT_CHECKS { 4 } else { 1 }
}

/// Blocks under construction. Checksums are left to [`Blocks::seal`], so that adding a record is little more than a copy.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    bytes: Vec<u8>,
    starts: Vec<usize>,
    previous: u64,
}

impl Blocks {
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.starts.clear();
    }

    /// Adds a record to the current block, or to a new one if the current one is large or of another kind.
    pub(crate) fn record(&mut self, kind: Kind, index: u64, payload: &[u8]) {
        let fits = |start: usize| self.bytes[start + 12] == kind as u8 && self.bytes.len() - start < LARGE_BLOCK_BYTES;
        if !self.starts.last().is_some_and(|&start| fits(start)) {
            self.begin(kind);
        }
        let delta = index.wrapping_sub(self.previous).wrapping_sub(1);
        self.previous = index;
        put_varint(&mut self.bytes, zigzag(delta));
        put_varint(&mut self.bytes, payload.len() as u64);
        self.bytes.extend_from_slice(payload);
    }

    pub(crate) fn input_mark(&mut self, first: u64, count: u64, chain: u64, checks: &[u8]) {
        self.begin(Kind::InputMark);
        put_varint(&mut self.bytes, first);
        put_varint(&mut self.bytes, count);
        self.bytes.extend_from_slice(&chain.to_le_bytes());
        self.bytes.extend_from_slice(checks);
    }

    pub(crate) fn open(&mut self, epoch: u64, pid: u64) {
        self.begin(Kind::Open);
        put_varint(&mut self.bytes, epoch);
        put_varint(&mut self.bytes, pid);
    }

    pub(crate) fn sealed(&mut self, total: u64, digest: u64) {
        self.begin(Kind::Sealed);
        put_varint(&mut self.bytes, total);
        self.bytes.extend_from_slice(&digest.to_le_bytes());
    }

    fn begin(&mut self, kind: Kind) {
        self.starts.push(self.bytes.len());
        self.bytes.extend_from_slice(&[0; BLOCK_HEAD]);
        if let Some(last) = self.bytes.last_mut() {
            *last = kind as u8;
        }
        self.previous = u64::MAX;
    }

    /// Completes every block with its magic, length and checksum, and returns the bytes to append to the file.
    pub(crate) fn seal(&mut self, salt: u64) -> &[u8] {
        let mut end = self.bytes.len();
        for &start in self.starts.iter().rev() {
            let (head, body) = self.bytes[start..end].split_at_mut(BLOCK_HEAD);
            head[..4].copy_from_slice(&BLOCK_MAGIC);
            head[4..8].copy_from_slice(&length_of(body).to_le_bytes());
            let crc = block_crc(head, salt, body);
            head[8..12].copy_from_slice(&crc.to_le_bytes());
            end = start;
        }
        &self.bytes
    }
}

/// Visits every entry of the blocks that begin at `from`, in order, and returns where the last good block ends.
///
/// If that is before the end of `bytes`, the rest is a torn tail: no block in it is whole. A bad block with a good one
/// after it is damage, never a tail: what follows it had been written later.
pub(crate) fn scan<'a>(
    bytes: &'a [u8],
    from: usize,
    salt: u64,
    mut visit: impl FnMut(Entry<'a>) -> Result<(), &'static str>,
) -> Result<usize, Damage> {
    let mut offset = from;
    while offset < bytes.len() {
        let Some(end) = block_at(bytes, offset, salt) else {
            return if holds_block(bytes, offset + 1, salt) {
                Err(Damage::Bad { offset, detail: "a block fails its checksum and intact blocks follow it" })
            } else {
                Ok(offset)
            };
        };
        visit_block(bytes, offset, end, &mut visit).map_err(|detail| Damage::Bad { offset, detail })?;
        offset = end;
    }
    Ok(offset)
}

/// Where the block that begins at `offset` ends, if it is whole and intact.
fn block_at(bytes: &[u8], offset: usize, salt: u64) -> Option<usize> {
    let head = bytes.get(offset..offset.checked_add(BLOCK_HEAD)?)?;
    if head[..4] != BLOCK_MAGIC {
        return None;
    }
    let end = (offset + BLOCK_HEAD).checked_add(u32_at(head, 4) as usize)?;
    let body = bytes.get(offset + BLOCK_HEAD..end)?;
    (block_crc(head, salt, body) == u32_at(head, 8)).then_some(end)
}

fn holds_block(bytes: &[u8], from: usize, salt: u64) -> bool {
    let rest = bytes.get(from..).unwrap_or_default();
    let candidates = rest.windows(BLOCK_MAGIC.len()).enumerate().filter(|(_, window)| *window == BLOCK_MAGIC);
    candidates.into_iter().any(|(distance, _)| block_at(bytes, from + distance, salt).is_some())
}

fn visit_block<'a>(
    bytes: &'a [u8],
    offset: usize,
    end: usize,
    visit: &mut impl FnMut(Entry<'a>) -> Result<(), &'static str>,
) -> Result<(), &'static str> {
    const SHORT: &str = "an intact block does not parse";
    let body = &mut &bytes[offset + BLOCK_HEAD..end];
    let kind = Kind::from_byte(bytes[offset + 12]).ok_or("an intact block is of an unknown type")?;
    match kind {
        Kind::Result | Kind::Intent | Kind::Failure | Kind::Quarantine => {
            let mut previous = u64::MAX;
            while !body.is_empty() {
                let delta = unzigzag(take_varint(body).ok_or(SHORT)?);
                let index = previous.wrapping_add(1).wrapping_add(delta);
                previous = index;
                let length = usize::try_from(take_varint(body).ok_or(SHORT)?).map_err(|_| SHORT)?;
                let at = end - body.len();
                let payload = take(body, length).ok_or(SHORT)?;
                visit(Entry::Record { kind, index, at, payload })?;
            }
            return Ok(());
        }
        Kind::InputMark => {
            let first = take_varint(body).ok_or(SHORT)?;
            let count = take_varint(body).ok_or(SHORT)?;
            let chain = take_u64(body).ok_or(SHORT)?;
            let checks = std::mem::take(body);
            let last = first.checked_add(count).ok_or(SHORT)?;
            if checks.len() as u64 != check_offset(last) - check_offset(first) {
                return Err(SHORT);
            }
            visit(Entry::InputMark { first, count, chain, checks })?;
        }
        Kind::Open => {
            let (epoch, pid) = (take_varint(body).ok_or(SHORT)?, take_varint(body).ok_or(SHORT)?);
            visit(Entry::Open { epoch, pid })?;
        }
        Kind::Sealed => {
            let (total, digest) = (take_varint(body).ok_or(SHORT)?, take_u64(body).ok_or(SHORT)?);
            visit(Entry::Sealed { total, digest })?;
        }
    }
    if body.is_empty() { Ok(()) } else { Err(SHORT) }
}

/// The checksum of a block: its length, its type, the file's salt and its body.
fn block_crc(head: &[u8], salt: u64, body: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&head[4..8]);
    let crc = crc32c::crc32c_append(crc, &head[12..13]);
    let crc = crc32c::crc32c_append(crc, &salt.to_le_bytes());
    crc32c::crc32c_append(crc, body)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn length_of(body: &[u8]) -> u32 {
    u32::try_from(body.len()).expect("a block is less than 1 MiB before its last record, which is at most 256 MiB")
}

#[cfg(test)]
mod tests;
