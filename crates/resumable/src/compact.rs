//! Compaction: rewrites a file that holds mostly outdated records.
//!
//! Invariant: at every moment the path leads to the whole old file, or to the whole and durable new one. The compacting
//! thread holds the lock of the old file.

use std::{fs::File, io, io::Write, path::Path};

use cancel_safe_atomic_fs::blocking::{self, AtomicFileWriter};

use crate::{
    disk::{directory_of, is_still_at, link_target},
    history::History,
    log::{Blocks, Chain, Kind, check_offset},
};

/// A file of up to this size takes one disk block, however little it holds.
const SMALL_BYTES: u64 = 4096;
/// How much to gather before a write.
const PIECE_BYTES: usize = 256 << 10;
/// Fingerprints that cover fewer items than this are joined.
const MARK_ITEMS: usize = 4096;

/// Whether a file of this length holds more than twice the bytes that count.
pub(crate) fn is_due(length: u64, live: u64) -> bool {
    length > SMALL_BYTES && length > live.saturating_mul(2)
}

/// Replaces the file that the history was read from with one that holds only the current records, and returns its
/// length; `None` if it would not be smaller.
///
/// If it fails, the path leads to one of the two.
pub(crate) fn rewrite(history: &mut History, file: &File, path: &Path) -> io::Result<Option<u64>> {
    // Removes what a process killed at this point left: it lies beside the file, not beside a link to it.
    drop(blocking::sweep(directory_of(&link_target(path)?)));
    let writer = AtomicFileWriter::new(path)?;
    let chain = Chain::new(history.header.salt);
    let mut copy = Copy { writer, blocks: Blocks::default(), chain, length: 0 };
    copy.bytes(&history.header.encode())?;
    if history.epoch > 0 {
        copy.blocks.open(history.epoch, u64::from(std::process::id()));
    }
    copy.marks(history)?;
    copy.records(history)?;
    if let Some((total, digest)) = history.sealed {
        copy.blocks.sealed(total, digest);
    }
    copy.flush(0)?;
    // If the file was removed or replaced meanwhile, it must not come back.
    if copy.length >= history.end || !is_still_at(file, path)? {
        copy.writer.discard()?;
        return Ok(None);
    }
    copy.writer.commit()?;
    Ok(Some(copy.length))
}

struct Copy {
    writer: AtomicFileWriter,
    blocks: Blocks,
    chain: Chain,
    length: u64,
}

impl Copy {
    /// The fingerprint of the input, which comes before the results it covers.
    fn marks(&mut self, history: &History) -> io::Result<()> {
        let mut first = 0;
        let all = history.marks();
        for (at, (end, chain)) in all.iter().enumerate() {
            if end - first < MARK_ITEMS && at + 1 < all.len() {
                continue;
            }
            let checks = history.checks_of(check_offset(first as u64), check_offset(*end as u64));
            self.blocks.input_mark(first as u64, (end - first) as u64, *chain, checks);
            first = *end;
            self.flush(PIECE_BYTES)?;
        }
        Ok(())
    }

    /// The last record of each item, kind by kind: blocks hold records of one kind.
    fn records(&mut self, history: &mut History) -> io::Result<()> {
        let keys = history.keys();
        let count = keys.as_ref().map_or(history.marked(), Vec::len);
        let mut others = Vec::new();
        let mut payload = Vec::new();
        let key_of = |at: usize| keys.as_ref().and_then(|keys| keys.get(at));
        for at in 0..count {
            match history.record(at, key_of(at).map(|key| &**key), &mut payload)? {
                Some(Kind::Result) => {
                    self.blocks.record(Kind::Result, at as u64, &payload);
                    self.flush(PIECE_BYTES)?;
                }
                Some(kind) => others.push((kind as u8, at)),
                None => {}
            }
        }
        others.sort_unstable();
        for (_, at) in others {
            if let Some(kind) = history.record(at, key_of(at).map(|key| &**key), &mut payload)? {
                self.blocks.record(kind, at as u64, &payload);
                self.flush(PIECE_BYTES)?;
            }
        }
        Ok(())
    }

    /// Writes what was gathered if it is more than `more_than` bytes.
    fn flush(&mut self, more_than: usize) -> io::Result<()> {
        if self.blocks.len() <= more_than {
            return Ok(());
        }
        let mut blocks = std::mem::take(&mut self.blocks);
        let mut chain = self.chain;
        self.bytes(blocks.seal(&mut chain))?;
        self.chain = chain;
        blocks.clear();
        self.blocks = blocks;
        Ok(())
    }

    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.length += bytes.len() as u64;
        self.writer.write_all(bytes)
    }
}
