//! Files that hold mostly obsolete records.

use std::{fs, path::Path, time::Duration};

use cancel_safe_resumable::{Checkpoint, FileStore, ItemError, ResumableTask, Retry, TaskError};
use futures_util::StreamExt;

use crate::support::{PATIENCE, checkpoint, complete, numbers};

/// Gives every item the result `generation` × 1000 + its number; returns how many had an older result.
async fn refresh(path: &Path, generation: u64, n: u64) -> Result<usize, TaskError> {
    let builder = numbers(path).concurrency(8).revalidate(move |_, result| *result >= generation * 1000);
    let run = builder.stream(0..n, move |_, x| async move { Ok(generation * 1000 + x) });
    run.finish().await.map(|summary| summary.completed)
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len()
}

#[tokio::test]
async fn a_file_that_is_refreshed_again_and_again_stays_small() {
    let (dir, path) = checkpoint();
    refresh(&path, 1, 1000).await.unwrap();
    let fresh = length(&path);
    for generation in 2..12 {
        assert_eq!(refresh(&path, generation, 1000).await.unwrap(), 1000);
        assert!(length(&path) <= 3 * fresh, "{} bytes instead of {fresh}", length(&path));
    }
    let read = Checkpoint::<u64>::read(&path).unwrap();
    assert!(read.is_sealed() && read.sessions() == 11);
    assert!(read.records().all(|done| done.is_ok_and(|done| done.result == Ok(11_000 + done.index as u64))));
    assert_eq!(read.records().count(), 1000);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn a_file_of_one_item_a_block_is_compacted_when_it_is_complete() {
    let (_dir, path) = checkpoint();
    let builder = numbers(&path).checkpoint_every(Duration::ZERO).concurrency(1).at_most_once();
    let run = builder.stream(0..300, |_, x| async move { Ok(x) });
    run.finish().await.unwrap();
    let read = Checkpoint::<u64>::read(&path).unwrap();
    assert!(read.is_sealed() && read.counts().results == 300);
    assert!(read.len_bytes() <= 4096 || read.len_bytes() <= 2 * read.live_bytes(), "{}", read.len_bytes());
}

#[tokio::test]
async fn what_a_killed_run_left_is_compacted_when_it_is_opened_and_goes_on() {
    let (_dir, path) = checkpoint();
    // An item that fails again and again: the run ends with little more than its failures recorded.
    let failing = |attempts| {
        let retry = Retry::attempts(attempts).backoff(Duration::ZERO, Duration::ZERO);
        ResumableTask::builder("numbers").store(FileStore::at(&path).wait(PATIENCE)).retry(retry).concurrency(8)
    };
    let cause = "no answer from the other side, which is long enough to matter".repeat(16);
    let work = move |_, x: u64| {
        let cause = cause.clone();
        async move { if x < 20 { Ok(x) } else { Err::<u64, _>(ItemError::retry(cause)) } }
    };
    assert!(failing(12).stream(0..100u64, work).finish().await.unwrap_err().is_quarantine_full());
    let before = Checkpoint::<u64>::read(&path).unwrap();
    assert!(before.len_bytes() > 2 * before.live_bytes(), "there is something to compact");
    let all = complete(&path, 100).await.unwrap();
    assert_eq!(all.iter().filter(|done| done.restored).count(), before.counts().results);
    assert!(length(&path) < before.len_bytes());
    assert!(complete(&path, 100).await.unwrap().iter().all(|done| done.restored));
}

#[tokio::test]
async fn compaction_keeps_everything_that_counts() {
    let (_dir, path) = checkpoint();
    for (name, entries) in [("fresh", 3), ("sealed", 5), ("mixed", 4), ("key", 3)] {
        fs::copy(format!("{}/tests/golden/format-1-{name}.ckpt", env!("CARGO_MANIFEST_DIR")), &path).unwrap();
        let facts = || {
            let read = Checkpoint::<u64>::read(&path).unwrap();
            let mut records: Vec<_> =
                read.raw().map(|done| done.map(|done| (done.key, done.result)).unwrap()).collect();
            records.sort_by_key(|(key, _)| key.clone());
            (records, read.counts(), read.is_sealed(), read.sessions(), read.job(), read.version())
        };
        let (before, length_before) = (facts(), length(&path));
        let saved = FileStore::at(&path).compact().unwrap();
        assert_eq!((saved.before_bytes, saved.after_bytes), (length_before, length(&path)), "{name}");
        assert!(saved.after_bytes <= saved.before_bytes);
        assert!(facts() == before && before.0.len() == entries, "{name}");
    }
}

#[tokio::test]
async fn an_input_that_was_edited_is_noticed_after_a_compaction() {
    let (_dir, path) = checkpoint();
    for generation in 1..4 {
        refresh(&path, generation, 9000).await.unwrap();
    }
    FileStore::at(&path).compact().unwrap();
    let edited = |at: u64| {
        numbers(&path).stream((0..9000).map(move |x| if x == at { 7 } else { x }), |_, x| async move { Ok(x) })
    };
    for at in [0, 500, 1023, 8999] {
        match edited(at).finish().await.unwrap_err() {
            TaskError::InputMismatch { index, .. } => assert_eq!(index as u64, at),
            other => panic!("{other}"),
        }
    }
    assert!(edited(3000).finish().await.unwrap_err().is_mismatch());
}

#[tokio::test]
async fn a_file_that_a_run_holds_or_that_is_damaged_is_not_compacted() {
    let (_dir, path) = checkpoint();
    let mut run = numbers(&path).stream(0..100, |_, x| async move { Ok(x) });
    run.next().await.unwrap();
    let hasty = FileStore::at(&path).wait(Duration::from_millis(5));
    assert!(hasty.compact().unwrap_err().is_busy());
    run.finish().await.unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[100] ^= 1;
    fs::write(&path, &bytes).unwrap();
    assert!(hasty.compact().unwrap_err().is_corrupt());
    assert_eq!(fs::read(&path).unwrap(), bytes);
    assert!(FileStore::at(path.with_extension("no")).compact().unwrap_err().is_io());
}

#[cfg(unix)]
#[tokio::test]
async fn a_compacted_file_keeps_its_mode_and_the_symlink_that_leads_to_it() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, path) = checkpoint();
    let real = dir.path().join("real.ckpt");
    std::os::unix::fs::symlink("real.ckpt", &path).unwrap();
    refresh(&path, 1, 1000).await.unwrap();
    fs::set_permissions(&real, fs::Permissions::from_mode(0o640)).unwrap();
    refresh(&path, 2, 1000).await.unwrap();
    FileStore::at(&path).compact().unwrap();
    assert!(fs::symlink_metadata(&path).unwrap().is_symlink());
    assert_eq!(fs::metadata(&real).unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(refresh(&real, 2, 1000).await.unwrap(), 0);
}

#[cfg(unix)]
#[tokio::test]
async fn what_a_killed_compaction_left_is_swept_beside_the_file_and_not_beside_a_link_to_it() {
    let (dir, path) = checkpoint();
    let elsewhere = dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    std::os::unix::fs::symlink("elsewhere/real.ckpt", &path).unwrap();
    refresh(&path, 1, 1000).await.unwrap();
    let left = |dir: &Path| dir.join(".afs-file-0123456789abcdef");
    let leave = || [dir.path(), &elsewhere].map(|dir| fs::write(left(dir), "half a file").unwrap());
    leave();
    FileStore::at(&path).compact().unwrap();
    assert!(left(dir.path()).exists() && !left(&elsewhere).exists(), "on demand");
    // About every other generation makes a compaction worth it when the run is complete.
    leave();
    for generation in 2..6 {
        refresh(&path, generation, 1000).await.unwrap();
    }
    assert!(left(dir.path()).exists() && !left(&elsewhere).exists(), "by a run");
}
