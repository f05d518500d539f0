//! Whatever the order of the records, each item is found with its last one.

use std::collections::HashMap;

use proptest::prelude::*;

use crate::{
    history::{History, Past},
    log::{Blocks, Chain, Header, Identity, Kind},
    scan::{Unread, read_header},
};

/// Writes a log of these results, in blocks of `in_a_block`, and compares what it says about each item.
fn compare(items: u64, records: &[(u64, Vec<u8>)], in_a_block: usize, ask: impl Iterator<Item = u64>) {
    let mut history = read(items, records, in_a_block).unwrap();
    let last: HashMap<u64, &[u8]> = records.iter().map(|(index, payload)| (*index, &payload[..])).collect();
    // Every item counts once, with about what its last record takes.
    assert_eq!(history.counts().results, last.len());
    let counted: u64 = last.values().map(|payload| payload.len() as u64 + 3).sum();
    assert_eq!(history.live_bytes(), header().encode().len() as u64 + crate::log::check_offset(items) + counted);
    for index in ask {
        let expected = last.get(&index).map_or(Past::Nothing, |payload| Past::Result(payload));
        assert_eq!(history.of(index as usize, None).unwrap(), expected, "item {index}");
    }
}

fn header() -> Header {
    Header {
        salt: 7,
        codec: 1,
        identity: Identity::Position,
        job: "index".to_owned(),
        version: "1".to_owned(),
        result_type: "u64".to_owned(),
    }
}

fn read(items: u64, records: &[(u64, Vec<u8>)], in_a_block: usize) -> Result<History, Unread> {
    let (mut bytes, mut chain, mut blocks) = (header().encode(), Chain::new(7), Blocks::default());
    let checks = vec![0; crate::log::check_offset(items) as usize];
    blocks.input_mark(0, items, 1, &checks);
    for some in records.chunks(in_a_block) {
        some.iter().for_each(|(index, payload)| blocks.record(Kind::Result, *index, payload));
        // Something else lies between the blocks of records.
        blocks.open(1, 1);
    }
    bytes.extend_from_slice(blocks.seal(&mut chain));
    let (header, from) = read_header(&bytes[..])?;
    History::read(std::sync::Arc::new(bytes), from, header)
}

const MANY: u64 = 80 * 1024 + 100;

fn result(index: u64) -> (u64, Vec<u8>) {
    (index, index.to_le_bytes()[..3].to_vec())
}

#[test]
fn results_in_order_are_found() {
    let records: Vec<_> = (0..MANY).map(result).collect();
    compare(MANY, &records, 30_000, (0..MANY).step_by(7));
    compare(MANY, &records, 100, (0..MANY).rev().step_by(501));
}

#[test]
fn results_nearly_in_order_and_stragglers_are_found() {
    let mut random = fastrand::Rng::with_seed(3);
    let mut records: Vec<_> = (0..MANY).map(result).collect();
    records.chunks_mut(100).for_each(|some| random.shuffle(some));
    // One in a hundred comes at the end; some are missing.
    let (late, mut records): (Vec<_>, Vec<_>) = records.into_iter().partition(|_| random.u8(..) < 3);
    records.extend(late.into_iter().skip(50));
    compare(MANY, &records, 1000, (0..MANY).step_by(7));
}

#[test]
fn a_second_session_that_replaces_all_or_some_is_found() {
    let mut records: Vec<_> = (0..MANY).map(result).collect();
    records.extend((0..MANY).step_by(3).map(|index| (index, vec![9; 5])));
    records.extend((0..MANY / 2).map(|index| (index, vec![8; 2])));
    compare(MANY, &records, 5000, (0..MANY).step_by(7));
}

#[test]
fn results_in_any_order_are_found() {
    let mut records: Vec<_> = (0..MANY).map(result).collect();
    fastrand::Rng::with_seed(5).shuffle(&mut records);
    compare(MANY, &records, 5000, (0..MANY).step_by(7));
}

/// Results of one chunk are kept together unless they are too long, or too far from each other.
#[test]
fn results_of_any_length_in_order_are_found() {
    for lengths in [[0, 0, 0], [1, 127, 128], [129, 300, 2], [126, 0, 5000]] {
        let records: Vec<_> = (0..5000).map(|index| (index, vec![index as u8; lengths[index as usize % 3]])).collect();
        compare(5000, &records, 700, 0..5000);
        // From the middle of a chunk on, and in pieces.
        compare(5000, &records[500..], 33, (0..5000).rev());
        let pieces = [&records[1500..1600], &records[..900], &records[1700..]].concat();
        compare(5000, &pieces, 50, 0..5000);
    }
}

#[test]
fn a_result_beyond_the_fingerprint_is_damage_also_behind_its_neighbours() {
    let records: Vec<_> = (0..10).map(result).collect();
    assert!(read(10, &records, 10).is_ok());
    for known in 0..10 {
        assert!(matches!(read(known, &records, 10), Err(Unread::Damage(_))), "{known} items are known");
    }
}

#[test]
fn large_results_are_found() {
    let records: Vec<_> = (0..3000).map(|index| (index, vec![index as u8; 1000 * (index as usize % 5)])).collect();
    compare(3000, &records, 50, 0..3000);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_records_are_found(
        records in prop::collection::vec((0..5000u64, prop::collection::vec(any::<u8>(), 0..20)), 0..400),
        in_a_block in 1..50usize,
    ) {
        compare(5000, &records, in_a_block, 0..5000);
    }
}
