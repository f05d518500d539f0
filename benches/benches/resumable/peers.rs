//! Two embedded stores, and a crate with the same purpose.

use std::path::Path;

use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use scanstate::{Entry, WriteAheadJournal};
use tokio::runtime::Runtime;

use super::{ITEMS, Interval, Recorded};

const TABLE: TableDefinition<'_, u64, u64> = TableDefinition::new("result");
/// It syncs each entry.
const SYNCED_ITEMS: u64 = 2000;

pub(super) fn contestants() -> Vec<(&'static str, u64, Recorded, Recorded)> {
    vec![
        ("redb", ITEMS, redb_record, redb_read),
        ("fjall", ITEMS, fjall_record, fjall_read),
        ("scanstate", SYNCED_ITEMS, scanstate_record, scanstate_read),
    ]
}

fn redb_record(_: &Runtime, dir: &Path, items: u64) {
    let db = Database::create(dir.join("redb")).expect("the directory is writable");
    let mut items = (0..items).peekable();
    while items.peek().is_some() {
        let mut tx = db.begin_write().expect("nobody else writes");
        tx.set_durability(Durability::Immediate).expect("that is the default");
        {
            let (mut table, mut interval) = (tx.open_table(TABLE).expect("it is ours"), Interval::begin());
            for item in items.by_ref() {
                table.insert(item, item * 2).expect("there is room");
                if interval.is_over() {
                    break;
                }
            }
        }
        tx.commit().expect("there is room");
    }
}

fn redb_read(_: &Runtime, dir: &Path, items: u64) {
    let db = Database::open(dir.join("redb")).expect("it is there");
    let tx = db.begin_read().expect("it is open");
    let table = tx.open_table(TABLE).expect("it is ours");
    let sum: u64 = table.iter().expect("it is whole").map(|row| row.expect("it is whole").1.value()).sum();
    assert_eq!(sum, items * (items - 1));
}

fn fjall_open(dir: &Path) -> (fjall::Keyspace, fjall::PartitionHandle) {
    let keyspace = fjall::Config::new(dir.join("fjall")).open().expect("the directory is writable");
    let results = keyspace.open_partition("result", fjall::PartitionCreateOptions::default());
    (keyspace, results.expect("the directory is writable"))
}

fn fjall_record(_: &Runtime, dir: &Path, items: u64) {
    let ((keyspace, results), mut interval) = (fjall_open(dir), Interval::begin());
    for item in 0..items {
        results.insert(item.to_be_bytes(), (item * 2).to_le_bytes()).expect("there is room");
        if interval.is_over() || item + 1 == items {
            keyspace.persist(fjall::PersistMode::SyncData).expect("there is room");
        }
    }
}

fn fjall_read(_: &Runtime, dir: &Path, items: u64) {
    let (_keyspace, results) = fjall_open(dir);
    let values = results.iter().map(|row| row.expect("it is whole").1);
    let sum: u64 = values.map(|value| u64::from_le_bytes((*value).try_into().expect("eight bytes"))).sum();
    assert_eq!(sum, items * (items - 1));
}

/// It can store no result except a count.
fn entry(item: u64) -> Entry {
    let (target_id, status) = (item.to_string(), "completed".to_owned());
    Entry { target_id, status, timestamp: 1, findings_count: item as usize * 2 }
}

fn scanstate_record(_: &Runtime, dir: &Path, items: u64) {
    let journal = WriteAheadJournal::new(dir.join("scanstate"));
    (0..items).for_each(|item| journal.append(&entry(item)).expect("the directory is writable"));
}

fn scanstate_read(_: &Runtime, dir: &Path, items: u64) {
    let entries = WriteAheadJournal::new(dir.join("scanstate")).replay().expect("it is whole");
    assert_eq!(entries.iter().map(|entry| entry.findings_count as u64).sum::<u64>(), items * (items - 1));
}
