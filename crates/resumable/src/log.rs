//! The block log, format 1: a pure codec between records and bytes, which knows nothing of files.
//!
//! Invariant: a block says where it belongs. A lost, doubled, moved or foreign block never passes for the next one.
//!
//! ```text
//! log    = header block*
//! header = magic[8] format:u16 min_reader:u16 len:u32 crc:u32 body[len]
//!          body = salt:u64 codec:u8 identity:u8 job:str version:str result_type:str     (str = varint length, UTF-8)
//! block  = magic:u32 len:u32 crc:u32 type:u8 body[len]          crc = CRC-32C of len, type, salt, body
//!          body = sequence:u64 previous:u32 check:u32 content
//!                 sequence counts the blocks of a log from 0; previous is the crc of the block before, 0 for the first;
//!                 check = CRC-32C of salt, len, type, sequence, previous
//!          Result, Intent, Failure, Quarantine: content = (zigzag varint of index - previous - 1, varint length, payload)*
//!          InputMark: first:varint count:varint chain:u64 checks (for each item the low bytes of the chain after it:
//!                    4 for each of the first 1024 items of the input, 1 for each later one)
//!          Open: epoch:varint pid:varint          Sealed: total:varint digest:u64
//! ```
//! All integers are little-endian. The first index of a block is relative to -1, so that each block can be read on its
//! own. The salted check shows that a head belongs to this log, before its length is trusted or its body is read.
//!
//! To write blocks anywhere, fill [`Blocks`] and [`seal`](Blocks::seal) them with the [`Chain`] of the log, which then
//! moves on to the next block. To read them, give the same chain to [`scan`](crate::scan::scan). A chain is three
//! numbers (salt, sequence, previous checksum), so that any store can keep it beside its blocks.

use crate::varint::{put_str, put_varint, take, take_str, take_u64, zigzag};

/// The format that this code writes, and the newest that it can read.
pub(crate) const FORMAT: u16 = 1;

/// The longest payload of one record. A length field must never overflow, however many records share a block.
pub(crate) const MAX_PAYLOAD_BYTES: usize = 256 << 20;

/// A block of this size takes no more records, so that one never outgrows its length field.
const LARGE_BLOCK_BYTES: usize = 1 << 20;

/// Like PNG's: a byte that no text begins with, and line ends that a text-mode copy would break.
const FILE_MAGIC: [u8; 8] = *b"\x89RSUME\r\n";
pub(crate) const BLOCK_MAGIC: [u8; 4] = *b"\xb7BLK";
/// The fault of a file that is not a checkpoint.
pub(crate) const FOREIGN: &str = "this is not a checkpoint file";
/// This many items of the input have four check bytes.
const EXACT_CHECKS: u64 = 1024;
/// The bytes of the header before its body.
pub(crate) const FILE_HEAD: usize = 20;
/// The bytes of a block before its body, and before its content.
const BLOCK_HEAD: usize = 13;
pub(crate) const BLOCK_LINKED_HEAD: usize = BLOCK_HEAD + 16;

/// How an item is recognised when a run resumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Identity {
    Position = 0,
    Key = 1,
}

/// What a checkpoint file says about the computation it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Mixed into each block's checksum, so that neither a payload nor recycled disk space can pass for a block of this
    /// file.
    pub(crate) salt: u64,
    pub(crate) codec: u8,
    pub(crate) identity: Identity,
    pub(crate) job: String,
    pub(crate) version: String,
    pub(crate) result_type: String,
}

/// Why bytes are not a log: the place, and the fault there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Damage {
    Bad { offset: u64, detail: &'static str },
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
        let crc = checksum([&bytes[8..16], &body]);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// How many bytes the header takes that begins with `head`, if `head` is the beginning of one.
    pub(crate) fn length(head: &[u8; FILE_HEAD]) -> Option<u64> {
        (head[..8] == FILE_MAGIC).then(|| FILE_HEAD as u64 + u64::from(u32_at(head, 12)))
    }

    /// Reads the header and returns it with its length, which is where the first block begins.
    pub(crate) fn decode(bytes: &[u8]) -> Result<(Self, usize), Damage> {
        let bad = |detail| Damage::Bad { offset: 0, detail };
        if bytes.len() < FILE_HEAD || bytes[..8] != FILE_MAGIC {
            return Err(bad(FOREIGN));
        }
        let end = FILE_HEAD.saturating_add(u32_at(bytes, 12) as usize);
        let body = bytes.get(FILE_HEAD..end).ok_or(bad("the header is cut off"))?;
        if checksum([&bytes[8..16], body]) != u32_at(bytes, 16) {
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
    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        use Kind::{Failure, InputMark, Intent, Open, Quarantine, Result, Sealed};
        [Result, Intent, Failure, Quarantine, InputMark, Open, Sealed].into_iter().find(|kind| *kind as u8 == byte)
    }

    /// Whether blocks of this type hold records of items.
    pub(crate) fn is_record(self) -> bool {
        matches!(self, Self::Result | Self::Intent | Self::Failure | Self::Quarantine)
    }
}

/// Where an item's check bytes begin in the row of all check bytes.
///
/// With four bytes, an edit is found at the edited item. With one byte, it is found there in 255 of 256 cases
/// (otherwise at the next item, or at the end of the mark), and a long input does not cost four bytes per item.
#[inline]
pub(crate) fn check_offset(index: u64) -> u64 {
    index.saturating_add(index.min(EXACT_CHECKS) * 3)
}

/// How many bytes of the chain are kept for an item.
#[inline]
pub(crate) fn check_width(index: u64) -> usize {
    if index < EXACT_CHECKS { 4 } else { 1 }
}

/// The type and the length of the block whose head begins here, in a log that has been verified.
pub(crate) fn peek(head: &[u8]) -> Option<(Kind, usize)> {
    let head = head.get(..BLOCK_LINKED_HEAD)?;
    Some((Kind::from_byte(head[12])?, BLOCK_HEAD.checked_add(u32_at(head, 4) as usize)?))
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
        let mut head = [0; BLOCK_LINKED_HEAD];
        head[12] = kind as u8;
        self.bytes.extend_from_slice(&head);
        self.previous = u64::MAX;
    }

    /// Completes every block with its magic, length, place in the chain and checksum, and returns the bytes to append to
    /// the log. The chain goes on to the block after them.
    pub(crate) fn seal(&mut self, chain: &mut Chain) -> &[u8] {
        for at in 0..self.starts.len() {
            let start = self.starts[at];
            let end = self.starts.get(at + 1).copied().unwrap_or(self.bytes.len());
            chain.complete(&mut self.bytes[start..end]);
        }
        &self.bytes
    }
}

/// Where the next block of a log belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) salt: u64,
    /// The number of the next block, counted from 0.
    pub(crate) sequence: u64,
    /// The checksum of the block before it; 0 for the first block.
    pub(crate) previous: u32,
}

impl Chain {
    /// The place of the first block of a log.
    pub(crate) fn new(salt: u64) -> Self {
        Self { salt, sequence: 0, previous: 0 }
    }

    fn complete(&mut self, block: &mut [u8]) {
        let length = length_of(&block[BLOCK_HEAD..]);
        block[..4].copy_from_slice(&BLOCK_MAGIC);
        block[4..8].copy_from_slice(&length.to_le_bytes());
        block[13..21].copy_from_slice(&self.sequence.to_le_bytes());
        block[21..25].copy_from_slice(&self.previous.to_le_bytes());
        let check = head_check(block, self.salt);
        block[25..29].copy_from_slice(&check.to_le_bytes());
        let crc = block_crc(block, self.salt);
        block[8..12].copy_from_slice(&crc.to_le_bytes());
        self.advance(crc);
    }

    fn advance(&mut self, crc: u32) {
        self.sequence += 1;
        self.previous = crc;
    }
}

/// The head of a log's block, which the salted check has proven to be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// The bytes of the whole block.
    pub(crate) length: u64,
    pub(crate) kind: u8,
    sequence: u64,
    previous: u32,
    crc: u32,
}

impl Head {
    /// Reads a head from the first [`BLOCK_LINKED_HEAD`] bytes; `None` if they are not one of the log with this salt.
    pub(crate) fn read(bytes: &[u8], salt: u64) -> Option<Self> {
        let bytes = bytes.get(..BLOCK_LINKED_HEAD)?;
        if bytes[..4] != BLOCK_MAGIC || head_check(bytes, salt) != u32_at(bytes, 25) {
            return None;
        }
        let sequence = take_u64(&mut &bytes[13..21])?;
        let (previous, crc, kind) = (u32_at(bytes, 21), u32_at(bytes, 8), bytes[12]);
        let length = BLOCK_HEAD as u64 + u64::from(u32_at(bytes, 4));
        (length >= BLOCK_LINKED_HEAD as u64).then_some(Self { length, kind, sequence, previous, crc })
    }

    /// Whether the block belongs at this place of the log.
    pub(crate) fn follows(&self, chain: &Chain) -> bool {
        (self.sequence, self.previous) == (chain.sequence, chain.previous)
    }

    /// Returns the content of the whole block if it is intact, and moves the chain behind it.
    pub(crate) fn verify<'a>(&self, block: &'a [u8], chain: &mut Chain) -> Option<&'a [u8]> {
        if block_crc(block, chain.salt) != self.crc {
            return None;
        }
        chain.advance(self.crc);
        block.get(BLOCK_LINKED_HEAD..)
    }
}

/// The checksum of a block: its length, its type, the log's salt and its body.
fn block_crc(block: &[u8], salt: u64) -> u32 {
    checksum([&block[4..8], &block[12..13], &salt.to_le_bytes(), &block[BLOCK_HEAD..]])
}

/// The checksum of a head: the log's salt, the block's length, its type and its place.
fn head_check(block: &[u8], salt: u64) -> u32 {
    checksum([&salt.to_le_bytes(), &block[4..8], &block[12..13], &block[13..25]])
}

/// CRC-32C of all parts in a row.
fn checksum<const N: usize>(parts: [&[u8]; N]) -> u32 {
    #[cfg(test)]
    tests::CHECKSUMMED.set(tests::CHECKSUMMED.get() + parts.iter().map(|part| part.len() as u64).sum::<u64>());
    parts.into_iter().fold(0, crc32c::crc32c_append)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn length_of(body: &[u8]) -> u32 {
    u32::try_from(body.len()).expect("a block is less than 1 MiB before its last record, which is at most 256 MiB")
}

#[cfg(test)]
mod tests;
