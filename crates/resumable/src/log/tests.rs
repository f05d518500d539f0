//! Tests of the block log: golden files, damage of every kind, round trips.

use proptest::prelude::*;

use super::*;
use crate::history::{History, Past};

const BY_POSITION: &[u8] = include_bytes!("../../tests/golden/format-1-position.ckpt");
const BY_KEY: &[u8] = include_bytes!("../../tests/golden/format-1-key.ckpt");
const CHAIN: u64 = 0x1122_3344_5566_7788;
/// Four check bytes for each of five items; the last are those of the chain.
const CHECKS: [u8; 20] = [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 0x88, 0x77, 0x66, 0x55];

fn header(identity: Identity) -> Header {
    let result_type = if identity == Identity::Key { "alloc::string::String" } else { "u64" };
    Header {
        salt: 0x0123_4567_89ab_cdef,
        codec: if identity == Identity::Key { 2 } else { 1 },
        identity,
        job: "crawl".to_owned(),
        version: "v2".to_owned(),
        result_type: result_type.to_owned(),
    }
}

/// A log with a block of each kind, written by the code under test.
fn sample() -> Vec<u8> {
    let mut blocks = Blocks::default();
    blocks.open(1, 4242);
    blocks.input_mark(0, 5, CHAIN, &CHECKS);
    blocks.record(Kind::Result, 0, b"\x07");
    blocks.record(Kind::Result, 2, b"\xcd\x01\x2c");
    blocks.record(Kind::Result, 1, b"");
    blocks.record(Kind::Failure, 3, b"\x02\x09timed out");
    blocks.record(Kind::Quarantine, 3, b"\x03\x04gone");
    blocks.record(Kind::Intent, 4, b"");
    blocks.record(Kind::Result, 4, &[0; 200]);
    blocks.sealed(5, CHAIN);
    let header = header(Identity::Position);
    [&header.encode(), blocks.seal(header.salt)].concat()
}

/// All entries of a file as text, and where the last good block ends.
fn entries(bytes: &[u8]) -> Result<(Vec<String>, usize), Damage> {
    let (header, from) = Header::decode(bytes)?;
    let mut seen = Vec::new();
    let end = scan(bytes, from, header.salt, |entry| {
        seen.push(format!("{entry:?}"));
        Ok(())
    })?;
    Ok((seen, end))
}

#[test]
fn the_golden_file_is_written_byte_for_byte() {
    assert_eq!(sample(), BY_POSITION);
}

#[test]
fn the_golden_file_by_position_reads_as_it_did() {
    let (stored, from) = Header::decode(BY_POSITION).unwrap();
    assert_eq!(stored, header(Identity::Position));
    let (history, end) = History::read(BY_POSITION.to_vec(), from, &stored).unwrap();
    assert_eq!((end, history.torn_bytes, history.epoch), (BY_POSITION.len(), 0, 1));
    assert_eq!(history.sealed, Some((5, CHAIN)));
    assert_eq!(history.marked(), 5);
    assert_eq!(history.confirms(3, 0x0404_0404), Some(true));
    assert_eq!(history.confirms(3, 0x0404_0405), Some(false));
    assert_eq!(history.confirms(4, CHAIN), Some(true));
    // Its check bytes are right, but the mark that ends there has the whole chain.
    assert_eq!(history.confirms(4, CHAIN & 0xffff_ffff), Some(false));
    assert_eq!(history.confirms(5, CHAIN), None);
    assert_eq!(history.of(2, None), Past::Result(b"\xcd\x01\x2c"));
    assert_eq!(history.of(1, None), Past::Result(b""));
    assert_eq!(history.of(3, None), Past::Quarantined { attempts: 3, cause: "gone".to_owned() });
    assert_eq!(history.of(4, None), Past::Result(&[0; 200]));
    assert_eq!(history.of(5, None), Past::Nothing);
}

#[test]
fn the_golden_file_by_key_reads_as_it_did() {
    let (stored, from) = Header::decode(BY_KEY).unwrap();
    assert_eq!(stored, header(Identity::Key));
    let (history, _) = History::read(BY_KEY.to_vec(), from, &stored).unwrap();
    assert_eq!(history.of(0, Some("https://a")), Past::Result(b"\x01x"));
    assert_eq!(history.of(0, Some("ß")), Past::Result(b"\x00"));
    assert_eq!(history.of(5, Some("other")), Past::Nothing);
}

#[test]
fn every_flipped_bit_yields_a_prefix_or_an_error() {
    let whole = sample();
    let (all, _) = entries(&whole).unwrap();
    for bit in 0..whole.len() * 8 {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        if let Ok((seen, end)) = entries(&bytes) {
            assert!(end < bytes.len(), "bit {bit} went unnoticed");
            assert!(all.starts_with(&seen) && seen.len() < all.len(), "bit {bit} changed an entry");
        }
    }
}

#[test]
fn a_flipped_bit_before_the_last_block_is_corruption_and_not_a_tail() {
    let whole = sample();
    let last = whole.windows(4).rposition(|window| window == BLOCK_MAGIC).unwrap();
    for bit in 0..last * 8 {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(entries(&bytes).is_err(), "bit {bit} was taken for a torn tail");
    }
}

#[test]
fn every_truncation_yields_a_prefix_or_an_error() {
    let whole = sample();
    let (all, _) = entries(&whole).unwrap();
    let (_, from) = Header::decode(&whole).unwrap();
    for length in 0..whole.len() {
        match entries(&whole[..length]) {
            Ok((seen, end)) => assert!(all.starts_with(&seen) && end <= length && length >= from),
            Err(_) => assert!(length < from, "a truncation at {length} is a torn tail, not damage"),
        }
    }
}

#[test]
fn a_block_of_another_file_is_not_taken_for_one_of_this() {
    let (whole, foreign) = (sample(), {
        let mut blocks = Blocks::default();
        blocks.record(Kind::Result, 0, b"forged");
        blocks.seal(99).to_vec()
    });
    let (all, end) = entries(&whole).unwrap();
    assert_eq!(entries(&[&whole[..], &foreign].concat()), Ok((all, end)));
}

#[test]
fn a_payload_that_holds_a_whole_log_is_still_a_payload() {
    let (inner, salt) = (sample(), 7);
    let mut blocks = Blocks::default();
    blocks.record(Kind::Result, 0, &inner);
    let bytes = blocks.seal(salt).to_vec();
    let mut payloads = Vec::new();
    let visit = |entry: Entry<'_>| {
        if let Entry::Record { payload, .. } = entry {
            payloads.push(payload.to_vec());
        }
        Ok(())
    };
    assert_eq!(scan(&bytes, 0, salt, visit), Ok(bytes.len()));
    assert_eq!(payloads, [inner]);
    // Torn, its inner blocks bear another salt: a tail, not damage.
    assert_eq!(scan(&bytes[..bytes.len() - 1], 0, salt, |_| Ok(())), Ok(0));
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
    let bytes = blocks.seal(1).to_vec();
    let visit = |entry: Entry<'_>| {
        if let Entry::Record { index, .. } = entry {
            indexes.push(index);
        }
        Ok(())
    };
    assert_eq!(scan(&bytes, 0, 1, visit), Ok(bytes.len()));
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
        let bytes = blocks.seal(salt).to_vec();
        let mut read = Vec::new();
        let end = scan(&bytes, 0, salt, |entry| {
            if let Entry::Record { kind, index, at, payload } = entry {
                assert_eq!(payload, &bytes[at..at + payload.len()]);
                read.push((kind, index, payload.to_vec()));
            }
            Ok(())
        });
        prop_assert_eq!(end, Ok(bytes.len()));
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
        let read = scan(&bytes, 0, 0, |_| Ok(()));
        prop_assert!(read.is_err() || read.is_ok_and(|end| end <= bytes.len()));
        drop(Header::decode(&bytes));
    }
}
