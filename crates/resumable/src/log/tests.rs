//! Tests of the block log: golden files, damage of every kind, round trips.

use std::{cell::Cell, sync::Arc};

use proptest::prelude::*;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::*;
use crate::{
    history::{History, Past, begin_payload, put_failure},
    scan::{Entry, ReadAt, Unread, read_header, scan},
    varint::{take_varint, unzigzag},
};

thread_local! {
    /// How many bytes this thread has checksummed.
    pub(super) static CHECKSUMMED: Cell<u64> = const { Cell::new(0) };
}

const FRESH: &[u8] = include_bytes!("../../tests/golden/format-1-fresh.ckpt");
const SEALED: &[u8] = include_bytes!("../../tests/golden/format-1-sealed.ckpt");
const MIXED: &[u8] = include_bytes!("../../tests/golden/format-1-mixed.ckpt");
const BY_KEY: &[u8] = include_bytes!("../../tests/golden/format-1-key.ckpt");
const SALT: u64 = 0x0123_4567_89ab_cdef;

fn header(identity: Identity) -> Header {
    let (job, version, result_type) = ("golden".to_owned(), "v1".to_owned(), "u64".to_owned());
    Header { salt: SALT, codec: 1, identity, job, version, result_type }
}

/// The fingerprint of the first items of the input 0, 1, 2, … as MessagePack, and their check bytes.
fn fingerprint(items: u8) -> (u64, Vec<u8>) {
    let (mut chain, mut checks) = (SALT, Vec::new());
    for item in 0..items {
        chain = xxh3_64_with_seed(&[item], chain);
        checks.extend_from_slice(&chain.to_le_bytes()[..4]);
    }
    (chain, checks)
}

fn failure(key: Option<&str>, attempts: u32, cause: &str) -> Vec<u8> {
    let mut payload = Vec::new();
    begin_payload(&mut payload, key);
    put_failure(&mut payload, attempts, cause);
    payload
}

fn file(identity: Identity, fill: impl FnOnce(&mut Blocks)) -> Vec<u8> {
    let mut blocks = Blocks::default();
    blocks.open(1, 4242);
    fill(&mut blocks);
    [&header(identity).encode(), blocks.seal(&mut Chain::new(SALT))].concat()
}

/// A run that was killed: 3 of 5 items have a result, ten times their number.
fn fresh() -> Vec<u8> {
    let (chain, checks) = fingerprint(5);
    file(Identity::Position, |blocks| {
        blocks.input_mark(0, 5, chain, &checks);
        blocks.record(Kind::Result, 0, b"\x00");
        blocks.record(Kind::Result, 2, b"\x14");
        blocks.record(Kind::Result, 1, b"\x0a");
    })
}

/// A complete run over 5 items in two sessions, the second of which replaced a result.
fn sealed() -> Vec<u8> {
    let (chain, checks) = fingerprint(5);
    file(Identity::Position, |blocks| {
        blocks.input_mark(0, 5, chain, &checks);
        blocks.record(Kind::Result, 0, b"\x01");
        blocks.record(Kind::Result, 2, b"\x14");
        blocks.record(Kind::Result, 1, b"\x0a");
        blocks.open(2, 4243);
        blocks.record(Kind::Result, 3, b"\x1e");
        blocks.record(Kind::Result, 4, b"\x28");
        blocks.record(Kind::Result, 0, b"\x00");
        blocks.sealed(5, chain);
    })
}

/// A run with an entry of each kind.
fn mixed() -> Vec<u8> {
    let (chain, checks) = fingerprint(6);
    file(Identity::Position, |blocks| {
        blocks.input_mark(0, 6, chain, &checks);
        blocks.record(Kind::Result, 0, b"\x00");
        blocks.record(Kind::Failure, 1, &failure(None, 2, "timed out"));
        blocks.record(Kind::Failure, 2, &failure(None, 1, "timed out"));
        blocks.record(Kind::Quarantine, 2, &failure(None, 3, "gone"));
        blocks.record(Kind::Intent, 3, b"");
        blocks.record(Kind::Intent, 4, b"");
        blocks.record(Kind::Result, 4, b"\x28");
    })
}

/// A run over items with the keys `"0"`, `"1"`, `"ß"`.
fn by_key() -> Vec<u8> {
    file(Identity::Key, |blocks| {
        blocks.record(Kind::Result, 0, b"\x010\x00");
        blocks.record(Kind::Result, 2, b"\x02\xc3\x9f\xcd\x01\x2c");
        blocks.record(Kind::Quarantine, 1, &failure(Some("1"), 3, "gone"));
        blocks.sealed(3, 99);
    })
}

/// Reads the blocks of a file to a damage or to the end of the last good one.
fn visit(bytes: &[u8], mut visit: impl FnMut(Entry<'_>)) -> Result<u64, Damage> {
    let damage = |unread| match unread {
        Unread::Damage(damage) => damage,
        Unread::Io(error) => panic!("bytes in memory can be read: {error}"),
    };
    let (header, from) = read_header(bytes).map_err(damage)?;
    let visit = |entry: Entry<'_>| {
        visit(entry);
        Ok(())
    };
    scan(bytes, from, &mut Chain::new(header.salt), visit).map_err(damage)
}

/// All entries of a file as text, and where the last good block ends.
fn entries(bytes: &[u8]) -> Result<(Vec<String>, u64), Damage> {
    let mut seen = Vec::new();
    let end = visit(bytes, |entry| seen.push(format!("{entry:?}")))?;
    Ok((seen, end))
}

fn history(bytes: &[u8]) -> Result<History, Unread> {
    let (header, from) = read_header(bytes)?;
    History::read(Arc::new(bytes.to_vec()), from, header)
}

/// Where the header ends, and the blocks.
fn bounds(bytes: &[u8]) -> Vec<usize> {
    let mut bounds = vec![FILE_HEAD + u32_at(bytes, 12) as usize];
    while let Some(start) = bounds.last().copied().filter(|start| *start < bytes.len()) {
        bounds.push(start + BLOCK_HEAD + u32_at(bytes, start + 4) as usize);
    }
    bounds
}

#[test]
fn the_golden_files_are_written_byte_for_byte() {
    assert_eq!(fresh(), FRESH);
    assert_eq!(sealed(), SEALED);
    assert_eq!(mixed(), MIXED);
    assert_eq!(by_key(), BY_KEY);
}

#[test]
fn the_golden_files_read_as_they_did() {
    let (header_of_sealed, _) = read_header(SEALED).unwrap();
    assert_eq!(header_of_sealed, header(Identity::Position));
    let (chain, _) = fingerprint(5);
    let mut past = history(SEALED).unwrap();
    assert_eq!((past.torn_bytes, past.epoch, past.sealed, past.marked()), (0, 2, Some((5, chain)), 5));
    assert_eq!(past.of(0, None).unwrap(), Past::Result(b"\x00"));
    assert_eq!(past.of(4, None).unwrap(), Past::Result(b"\x28"));
    assert_eq!((past.confirms(4, chain), past.confirms(4, chain ^ 1)), (Some(true), Some(false)));
    // Its check bytes are right, but the mark that ends there has the whole chain.
    assert_eq!((past.confirms(4, chain & 0xffff_ffff), past.confirms(5, chain)), (Some(false), None));

    let mut past = history(FRESH).unwrap();
    assert_eq!((past.epoch, past.sealed), (1, None));
    assert_eq!(past.of(1, None).unwrap(), Past::Result(b"\x0a"));
    assert_eq!(past.of(3, None).unwrap(), Past::Nothing);

    let mut past = history(MIXED).unwrap();
    assert_eq!(past.of(1, None).unwrap(), Past::Failed { attempts: 2 });
    assert_eq!(past.of(3, None).unwrap(), Past::Uncertain);
    assert_eq!(past.of(2, None).unwrap(), Past::Quarantined { attempts: 3, cause: "gone".to_owned() });
    assert_eq!(past.of(4, None).unwrap(), Past::Result(b"\x28"));
    assert_eq!(past.of(5, None).unwrap(), Past::Nothing);

    let mut past = history(BY_KEY).unwrap();
    assert_eq!(past.of(0, Some("0")).unwrap(), Past::Result(b"\x00"));
    assert_eq!(past.of(0, Some("ß")).unwrap(), Past::Result(b"\xcd\x01\x2c"));
    assert_eq!(past.of(5, Some("1")).unwrap(), Past::Quarantined { attempts: 3, cause: "gone".to_owned() });
    assert_eq!(past.of(5, Some("other")).unwrap(), Past::Nothing);
    assert_eq!(past.sealed, Some((3, 99)));
}

#[test]
fn every_flipped_bit_yields_a_prefix_or_an_error() {
    for whole in [FRESH, SEALED, MIXED, BY_KEY] {
        let (all, _) = entries(whole).unwrap();
        let bounds = bounds(whole);
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let start = bounds.iter().rfind(|start| **start <= bit / 8).copied().unwrap_or_default();
            match entries(&bytes) {
                Ok((seen, end)) => {
                    assert!(end < bytes.len() as u64, "bit {bit} went unnoticed");
                    assert!(all.starts_with(&seen) && seen.len() < all.len(), "bit {bit} changed an entry");
                    assert_eq!(start, bounds[bounds.len() - 2], "bit {bit} was taken for a torn tail");
                }
                Err(Damage::Bad { offset, .. }) => assert_eq!(offset, start as u64, "bit {bit} is found where it is"),
                Err(Damage::NewerFormat { .. }) => panic!("bit {bit} was believed"),
            }
        }
    }
}

#[test]
fn every_truncation_yields_a_prefix_or_an_error() {
    for whole in [FRESH, SEALED, MIXED, BY_KEY] {
        let ((all, _), bounds) = (entries(whole).unwrap(), bounds(whole));
        for length in 0..whole.len() {
            match entries(&whole[..length]) {
                Ok((seen, end)) => {
                    assert!(all.starts_with(&seen) && end <= length as u64 && length >= bounds[0]);
                    assert!(bounds.contains(&(end as usize)), "a prefix ends where a block does");
                }
                Err(_) => assert!(length < bounds[0], "a truncation at {length} is a torn tail, not damage"),
            }
        }
    }
}

/// Where a file with rearranged blocks counts as damaged.
fn damage_of(pieces: &[&[u8]]) -> Option<u64> {
    match entries(&pieces.concat()) {
        Ok(_) => None,
        Err(Damage::Bad { offset, .. }) => Some(offset),
        Err(Damage::NewerFormat { .. }) => panic!("the header was not touched"),
    }
}

#[test]
fn a_block_that_is_cut_out_doubled_exchanged_or_moved_is_damage_and_named() {
    for whole in [FRESH, SEALED, MIXED, BY_KEY] {
        let bounds = bounds(whole);
        let blocks: Vec<&[u8]> = bounds.windows(2).map(|block| &whole[block[0]..block[1]]).collect();
        let header = &whole[..bounds[0]];
        let with = |blocks: &[&[u8]]| damage_of(&[&[header], blocks].concat());
        assert_eq!(with(&blocks), None);
        for (at, block) in blocks.iter().enumerate() {
            let mut rest = blocks.clone();
            rest.remove(at);
            let is_last = at == rest.len();
            assert_eq!(with(&rest), (!is_last).then_some(bounds[at] as u64), "block {at} cut out");
            for to in 0..=blocks.len() {
                let mut doubled = blocks.clone();
                doubled.insert(to, block);
                let first_wrong = if to == at { to + 1 } else { to };
                assert_eq!(with(&doubled), Some(bounds[first_wrong] as u64), "block {at} again at {to}");
                let mut moved = rest.clone();
                if to < at {
                    moved.insert(to, block);
                    assert_eq!(with(&moved), Some(bounds[to] as u64), "block {at} moved to {to}");
                }
            }
            for other in at + 1..blocks.len() {
                let mut exchanged = blocks.clone();
                exchanged.swap(at, other);
                assert_eq!(with(&exchanged), Some(bounds[at] as u64), "blocks {at} and {other} exchanged");
            }
        }
    }
}

#[test]
fn an_old_block_behind_a_torn_tail_is_damage() {
    let bounds = bounds(SEALED);
    let torn = &SEALED[..SEALED.len() - 1];
    for block in bounds.windows(2) {
        let last = bounds[bounds.len() - 2];
        assert_eq!(damage_of(&[torn, &SEALED[block[0]..block[1]]]), Some(last as u64));
        // Even a piece of a block that does not belong there is damage.
        assert_eq!(damage_of(&[SEALED, &SEALED[block[0]..block[1] - 1]]), Some(SEALED.len() as u64));
    }
}

#[test]
fn a_seal_that_disagrees_with_what_is_before_it_is_damage() {
    let (chain, checks) = fingerprint(2);
    let seal = |total, digest, results: u64| {
        let bytes = file(Identity::Position, |blocks| {
            blocks.input_mark(0, 2, chain, &checks);
            (0..results).for_each(|index| blocks.record(Kind::Result, index, b"\x07"));
            blocks.sealed(total, digest);
        });
        history(&bytes).is_ok()
    };
    assert!(seal(2, chain, 2));
    assert!(!seal(2, chain, 1), "a result is missing");
    assert!(!seal(1, chain, 2) && !seal(3, chain, 2) && !seal(2, chain ^ 1, 2));
    let keyed = |total| {
        let bytes = file(Identity::Key, |blocks| {
            blocks.record(Kind::Result, 0, b"\x01a\x07");
            blocks.record(Kind::Failure, 1, &failure(Some("b"), 1, "no answer"));
            blocks.sealed(total, 0);
        });
        history(&bytes).is_ok()
    };
    assert!(keyed(1) && !keyed(2), "a failure is not an end");
    assert!(history(&file(Identity::Position, |blocks| blocks.sealed(0, SALT))).is_ok(), "an empty input");
}

/// Bytes that count how much of them is read.
#[derive(Debug)]
struct Counted<'a>(&'a [u8], Cell<u64>);

impl ReadAt for Counted<'_> {
    fn size(&self) -> std::io::Result<u64> {
        self.0.size()
    }

    fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.1.set(self.1.get() + into.len() as u64);
        self.0.read_exact_at(offset, into)
    }
}

#[test]
fn opening_takes_work_in_proportion_to_the_length_whatever_the_bytes_are() {
    let (length, mut tails) = (4 << 20, Vec::new());
    // Heads that claim to reach to the end, as close together as possible.
    for spacing in [4, 17, BLOCK_LINKED_HEAD] {
        let mut tail = vec![0; length];
        for at in (0..length - spacing).step_by(spacing) {
            tail[at..at + 4].copy_from_slice(&BLOCK_MAGIC);
            if spacing > 8 {
                tail[at + 4..at + 8].copy_from_slice(&((length - at - BLOCK_HEAD) as u32).to_le_bytes());
                tail[at + 12] = 1;
            }
        }
        tails.push(tail);
    }
    // One real block of a file, torn, with the same heads in its payload; and many small blocks, the last of them torn.
    let mut blocks = Blocks::default();
    blocks.record(Kind::Result, 0, &tails[1]);
    let large = blocks.seal(&mut Chain::new(SALT)).to_vec();
    tails.push(large[..large.len() - 1].to_vec());
    for tail in tails {
        let bytes = [&header(Identity::Position).encode(), &tail[..]].concat();
        let source = Counted(&bytes, Cell::default());
        let (before, (stored, from)) = (CHECKSUMMED.get(), read_header(&source).unwrap());
        let end = scan(&source, from, &mut Chain::new(stored.salt), |_| Ok(())).unwrap();
        assert_eq!(end, from, "the heads are torn");
        let (read, checksummed) = (source.1.get(), CHECKSUMMED.get() - before);
        assert!(read <= 3 * bytes.len() as u64, "{read} bytes were read of {}", bytes.len());
        assert!(checksummed <= 8 * bytes.len() as u64, "{checksummed} bytes were checksummed of {}", bytes.len());
    }
}

#[test]
fn a_block_of_another_file_is_not_taken_for_one_of_this() {
    let mut blocks = Blocks::default();
    blocks.record(Kind::Result, 0, b"forged");
    let mut place = Chain::new(SALT);
    entries(FRESH).unwrap();
    for _ in 1..bounds(FRESH).len() {
        let mut filler = Blocks::default();
        filler.open(1, 1);
        filler.seal(&mut place);
    }
    // It even has the right number.
    let foreign = blocks.seal(&mut Chain { salt: 99, ..place });
    assert_eq!(entries(&[FRESH, foreign].concat()), entries(FRESH));
}

#[test]
fn a_payload_that_holds_a_whole_log_is_still_a_payload() {
    let (inner, chain) = (sealed(), Chain::new(7));
    let mut blocks = Blocks::default();
    blocks.record(Kind::Result, 0, &inner);
    let bytes = blocks.seal(&mut chain.clone()).to_vec();
    let mut payloads = Vec::new();
    let visit = |entry: Entry<'_>| {
        if let Entry::Record { payload, .. } = entry {
            payloads.push(payload.to_vec());
        }
        Ok(())
    };
    assert_eq!(scan(&bytes[..], 0, &mut chain.clone(), visit).unwrap(), bytes.len() as u64);
    assert_eq!(payloads, [inner]);
    // Torn, its inner blocks bear another salt: a tail, not damage.
    assert_eq!(scan(&bytes[..bytes.len() - 1], 0, &mut chain.clone(), |_| Ok(())).unwrap(), 0);
}

#[test]
fn large_records_do_not_pile_up_in_one_block() {
    let mut blocks = Blocks::default();
    let large = vec![7; LARGE_BLOCK_BYTES];
    for index in 0..3 {
        blocks.record(Kind::Result, index, &large);
    }
    assert_eq!(blocks.starts.len(), 3);
    let mut indexes = Vec::new();
    let bytes = blocks.seal(&mut Chain::new(1)).to_vec();
    let visit = |entry: Entry<'_>| {
        if let Entry::Record { index, .. } = entry {
            indexes.push(index);
        }
        Ok(())
    };
    assert_eq!(scan(&bytes[..], 0, &mut Chain::new(1), visit).unwrap(), bytes.len() as u64);
    assert_eq!(indexes, [0, 1, 2]);
}

#[test]
fn a_file_of_a_later_format_is_named_as_such() {
    let mut bytes = header(Identity::Position).encode();
    bytes[10] = 2;
    let body = bytes[FILE_HEAD..].to_vec();
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[8..16]), &body);
    bytes[16..20].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(Header::decode(&bytes), Err(Damage::NewerFormat { needs: 2 }));
}

#[test]
fn a_varint_that_does_not_fit_is_refused() {
    let too_long = [0xff; 10];
    assert_eq!(take_varint(&mut &too_long[..]), None);
    assert_eq!(take_varint(&mut &too_long[..3]), None);
}

fn record() -> impl Strategy<Value = (Kind, u64, Vec<u8>)> {
    let kind = prop::sample::select(vec![Kind::Result, Kind::Intent, Kind::Failure, Kind::Quarantine]);
    (kind, any::<u64>(), prop::collection::vec(any::<u8>(), 0..300))
}

proptest! {
    #[test]
    fn any_varint_comes_back(value: u64) {
        let mut bytes = Vec::new();
        put_varint(&mut bytes, value);
        prop_assert_eq!(take_varint(&mut &bytes[..]), Some(value));
        prop_assert_eq!(unzigzag(zigzag(value)), value);
    }

    #[test]
    fn any_records_come_back_in_order(records in prop::collection::vec(record(), 0..60), salt: u64) {
        let mut blocks = Blocks::default();
        for (kind, index, payload) in &records {
            blocks.record(*kind, *index, payload);
        }
        // In pieces, as a store writes them.
        let mut chain = Chain::new(salt);
        let mut bytes = blocks.seal(&mut chain).to_vec();
        blocks.clear();
        blocks.record(Kind::Result, 7, b"last");
        bytes.extend_from_slice(blocks.seal(&mut chain));
        let (mut read, mut again) = (Vec::new(), Chain::new(salt));
        let end = scan(&bytes[..], 0, &mut again, |entry| {
            if let Entry::Record { kind, index, at, payload } = entry {
                let at = at as usize;
                assert_eq!(payload, &bytes[at..at + payload.len()]);
                read.push((kind, index, payload.to_vec()));
            }
            Ok(())
        });
        prop_assert_eq!((end.unwrap(), again), (bytes.len() as u64, chain));
        prop_assert_eq!(read.pop(), Some((Kind::Result, 7, b"last".to_vec())));
        prop_assert_eq!(read, records);
    }

    #[test]
    fn any_header_comes_back(salt: u64, codec: u8, job: String, version: String, result_type: String) {
        let header = Header { salt, codec, identity: Identity::Key, job, version, result_type };
        let bytes = header.encode();
        prop_assert_eq!(Header::decode(&bytes), Ok((header, bytes.len())));
    }

    #[test]
    fn no_bytes_make_the_reader_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..400), at in 0..400usize) {
        if at + 4 < bytes.len() {
            bytes[at..at + 4].copy_from_slice(&BLOCK_MAGIC);
        }
        let read = scan(&bytes[..], 0, &mut Chain::new(0), |_| Ok(()));
        prop_assert!(read.is_err() || read.is_ok_and(|end| end <= bytes.len() as u64));
        drop(Header::decode(&bytes));
    }
}
