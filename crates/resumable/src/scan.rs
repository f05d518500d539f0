//! Reading a log: its header, its blocks in order, and where they end.
//!
//! Invariant: for any bytes, a scan visits a prefix of what was written or returns an error, reads each byte at most
//! twice, and holds no more than one block.

use std::{fmt, io, sync::Arc};

use crate::{
    log::{BLOCK_LINKED_HEAD, BLOCK_MAGIC, Chain, Damage, FILE_HEAD, Head, Header, Kind, check_offset},
    varint::{take, take_u64, take_varint, unzigzag},
};

/// How much is read at once.
const WINDOW_BYTES: u64 = 256 << 10;

/// Bytes that do not change while they are read.
pub(crate) trait ReadAt: fmt::Debug {
    fn size(&self) -> io::Result<u64>;
    fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
}

impl<T: ReadAt + ?Sized> ReadAt for &T {
    fn size(&self) -> io::Result<u64> {
        (**self).size()
    }

    fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        (**self).read_exact_at(offset, into)
    }
}

impl<T: ReadAt + ?Sized> ReadAt for Arc<T> {
    fn size(&self) -> io::Result<u64> {
        (**self).size()
    }

    fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        (**self).read_exact_at(offset, into)
    }
}

impl ReadAt for [u8] {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(offset).ok().and_then(|offset| self.get(offset..)?.get(..into.len()));
        into.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

#[cfg(test)]
impl ReadAt for Vec<u8> {
    fn size(&self) -> io::Result<u64> {
        self[..].size()
    }

    fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self[..].read_exact_at(offset, into)
    }
}

/// Why a log could not be read.
#[derive(Debug)]
pub(crate) enum Unread {
    Io(io::Error),
    Damage(Damage),
}

impl From<io::Error> for Unread {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Damage> for Unread {
    fn from(damage: Damage) -> Self {
        Self::Damage(damage)
    }
}

/// One entry of a log, in the order of writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry<'a> {
    /// `at` is the offset of the payload in the log.
    Record {
        kind: Kind,
        index: u64,
        at: u64,
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

/// Reads the header of a log and returns it with the offset of the first block.
pub(crate) fn read_header(source: impl ReadAt) -> Result<(Header, u64), Unread> {
    let size = source.size()?;
    let mut head = [0; FILE_HEAD];
    let present = head.len().min(usize::try_from(size).unwrap_or(usize::MAX));
    source.read_exact_at(0, &mut head[..present])?;
    let length = Header::length(&head).unwrap_or_default().max(present as u64).min(size);
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
    source.read_exact_at(0, &mut bytes)?;
    let (header, end) = Header::decode(&bytes)?;
    Ok((header, end as u64))
}

/// Visits every entry of the blocks that begin at `from` and at this place of the chain, in order. Returns where the last
/// good block ends, and leaves the chain there.
///
/// If that is before the end of the bytes, the rest is a torn tail: it may begin with a part of the next block, and
/// holds no other block of this log. If it does hold one, the log is damaged, because that block was written later.
#[cfg(any(test, feature = "cli", feature = "postgres"))]
pub(crate) fn scan<S: ReadAt>(
    source: S,
    from: u64,
    chain: &mut Chain,
    mut visit: impl FnMut(Entry<'_>) -> Result<(), &'static str>,
) -> Result<u64, Unread> {
    let mut scanner = Scanner::new(source, from, *chain)?;
    while let Some(block) = scanner.next_block()? {
        block.entries(&mut visit).map_err(|detail| Damage::Bad { offset: block.offset, detail })?;
    }
    let (end, next) = scanner.place();
    *chain = next;
    Ok(end)
}

/// Goes through a log block by block.
#[derive(Debug)]
pub(crate) struct Scanner<S> {
    window: Window<S>,
    /// Where the next block begins, and its place in the chain.
    offset: u64,
    chain: Chain,
}

impl<S: ReadAt> Scanner<S> {
    pub(crate) fn new(source: S, from: u64, chain: Chain) -> io::Result<Self> {
        Ok(Self { window: Window::new(source)?, offset: from, chain })
    }

    /// The next block; `None` at the end of the log, with or without a torn tail.
    pub(crate) fn next_block(&mut self) -> Result<Option<Block<'_>>, Unread> {
        const MISSING: &str = "a block is missing before this one, or it is not where it was written";
        const FOLLOWED: &str = "a block fails its checksum, and what follows was written later";
        let offset = self.offset;
        if offset >= self.window.size {
            return Ok(None);
        }
        let head = self.window.head(offset)?.and_then(|bytes| Head::read(bytes, self.chain.salt));
        if head.is_some_and(|head| !head.follows(&self.chain)) {
            return Err(Damage::Bad { offset, detail: MISSING }.into());
        }
        if let Some(head) = head
            && offset.checked_add(head.length).is_some_and(|end| end <= self.window.size)
        {
            let block = self.window.bytes(offset, head.length)?;
            // Looked up twice, because the borrow checker extends a borrow that is returned on one path to all paths.
            if head.verify(block, &mut self.chain).is_some() {
                self.offset += head.length;
                let content = self.window.bytes(offset, head.length)?.get(BLOCK_LINKED_HEAD..).unwrap_or_default();
                return Ok(Some(Block { offset, kind: head.kind, content }));
            }
        }
        if self.window.holds_head(offset + 1, self.chain.salt)? {
            return Err(Damage::Bad { offset, detail: FOLLOWED }.into());
        }
        Ok(None)
    }

    /// Where the next block begins, and its place in the chain.
    pub(crate) fn place(&self) -> (u64, Chain) {
        (self.offset, self.chain)
    }

    /// How many bytes there were when the scan began.
    pub(crate) fn size(&self) -> u64 {
        self.window.size
    }
}

/// The fault of an intact block that does not parse.
pub(crate) const SHORT: &str = "an intact block does not parse";

/// An intact block in its proper place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block<'a> {
    pub(crate) offset: u64,
    kind: u8,
    content: &'a [u8],
}

impl<'a> Block<'a> {
    pub(crate) fn end(&self) -> u64 {
        self.offset + (BLOCK_LINKED_HEAD + self.content.len()) as u64
    }

    /// The records of a block of results.
    pub(crate) fn results(&self) -> Option<&'a [u8]> {
        (self.kind == Kind::Result as u8).then_some(self.content)
    }

    /// Visits what the block says.
    pub(crate) fn entries(
        &self,
        visit: &mut impl FnMut(Entry<'a>) -> Result<(), &'static str>,
    ) -> Result<(), &'static str> {
        let mut rest = self.content;
        let body = &mut rest;
        let kind = Kind::from_byte(self.kind).ok_or("an intact block is of an unknown type")?;
        match kind {
            Kind::Result | Kind::Intent | Kind::Failure | Kind::Quarantine => {
                let (end, mut previous) = (self.end(), u64::MAX);
                while !body.is_empty() {
                    let (index, payload) = next_record(body, &mut previous).ok_or(SHORT)?;
                    let at = end - (body.len() + payload.len()) as u64;
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
}

/// Takes a record off the content of a block; `previous` is the index of the one before, [`u64::MAX`] for the first.
#[inline]
pub(crate) fn next_record<'a>(body: &mut &'a [u8], previous: &mut u64) -> Option<(u64, &'a [u8])> {
    let delta = unzigzag(take_varint(body)?);
    *previous = previous.wrapping_add(1).wrapping_add(delta);
    let length = usize::try_from(take_varint(body)?).ok()?;
    Some((*previous, take(body, length)?))
}

/// The longest payload of a record that [`take_neighbours`] takes.
pub(crate) const SHORT_PAYLOAD_BYTES: u64 = 0x7f;

/// Takes up to `most` records off the content of a block, as long as each belongs to the next item and its payload is
/// short. Returns how many it took.
///
/// Records of items that ran one after the other all qualify, and ten million of them should not cost a look each.
pub(crate) fn take_neighbours(body: &mut &[u8], most: usize) -> usize {
    let mut taken = 0;
    while taken < most
        && let [0, length @ 0..0x80, rest @ ..] = *body
        && let Some(rest) = rest.get(usize::from(*length)..)
    {
        *body = rest;
        taken += 1;
    }
    taken
}

/// The bytes of a log around where it is read.
#[derive(Debug)]
struct Window<S> {
    source: S,
    /// The length when the scan began: a log that grows meanwhile is read up to here.
    size: u64,
    at: u64,
    bytes: Vec<u8>,
}

impl<S: ReadAt> Window<S> {
    fn new(source: S) -> io::Result<Self> {
        let size = source.size()?;
        Ok(Self { source, size, at: 0, bytes: Vec::new() })
    }

    /// The bytes in which the head of a block that begins at `offset` must lie; `None` if there are too few.
    fn head(&mut self, offset: u64) -> io::Result<Option<&[u8]>> {
        if self.size.saturating_sub(offset) < BLOCK_LINKED_HEAD as u64 {
            return Ok(None);
        }
        self.bytes(offset, BLOCK_LINKED_HEAD as u64).map(Some)
    }

    /// These bytes, which must be there.
    fn bytes(&mut self, offset: u64, length: u64) -> io::Result<&[u8]> {
        let end = offset + length;
        if offset < self.at || end > self.at + self.bytes.len() as u64 {
            self.load(offset, length.max(WINDOW_BYTES))?;
        }
        let start = usize::try_from(offset - self.at).map_err(io::Error::other)?;
        let length = usize::try_from(length).map_err(io::Error::other)?;
        self.bytes.get(start..start + length).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// Moves the window to `offset`, without reading again what it already has.
    fn load(&mut self, offset: u64, length: u64) -> io::Result<()> {
        let length = usize::try_from(length.min(self.size.saturating_sub(offset))).map_err(io::Error::other)?;
        let known = match offset.checked_sub(self.at).and_then(|skipped| usize::try_from(skipped).ok()) {
            Some(skipped) if skipped < self.bytes.len() => {
                self.bytes.drain(..skipped);
                self.bytes.len()
            }
            _ => 0,
        };
        self.at = offset;
        self.bytes.resize(length, 0);
        let filled = self.source.read_exact_at(offset + known as u64, &mut self.bytes[known..]);
        if filled.is_err() {
            self.bytes.clear();
        }
        filled
    }

    /// Whether the head of a block of this log begins anywhere from `from` on. It looks only at heads: their check
    /// tells them from any other bytes, so the work does not depend on the lengths they claim.
    fn holds_head(&mut self, mut from: u64, salt: u64) -> io::Result<bool> {
        let overlap = BLOCK_LINKED_HEAD as u64 - 1;
        while self.size.saturating_sub(from) > overlap {
            let length = WINDOW_BYTES.min(self.size - from);
            let bytes = self.bytes(from, length)?;
            let mut candidates = bytes.windows(BLOCK_LINKED_HEAD).filter(|window| window[..4] == BLOCK_MAGIC);
            if candidates.any(|window| Head::read(window, salt).is_some()) {
                return Ok(true);
            }
            from += length - overlap;
        }
        Ok(false)
    }
}
