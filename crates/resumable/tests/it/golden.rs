//! Files of format 1 can be continued for ever.

use std::path::PathBuf;

use cancel_safe_resumable::{Done, FileStore, ResumableTask, TaskError};
use futures_util::StreamExt;

use crate::support::checkpoint;

/// A copy of a golden file to continue.
fn golden(name: &str) -> (tempfile::TempDir, PathBuf) {
    let (dir, path) = checkpoint();
    let file = format!("{}/tests/golden/format-1-{name}.ckpt", env!("CARGO_MANIFEST_DIR"));
    std::fs::copy(file, &path).unwrap();
    (dir, path)
}

/// Multiplies the numbers below `n` by ten; returns for each whether it was restored, and the result.
async fn go_on(path: &PathBuf, n: u64, by_key: bool) -> Result<Vec<(bool, Result<u64, String>)>, TaskError> {
    let builder = ResumableTask::<u64>::builder::<u64>("golden").version("v1").store(FileStore::at(path)).ordered();
    let builder = if by_key { builder.key(u64::to_string) } else { builder };
    let mut run = builder.quarantine(9).stream(0..n, |_, x| async move { Ok(x * 10) });
    let mut all = Vec::new();
    while let Some(Done { restored, result, .. }) = run.next().await {
        all.push((restored, result.map_err(|quarantined| quarantined.cause)));
    }
    run.finish().await.map(|_| all)
}

#[tokio::test]
async fn a_file_of_a_killed_run_goes_on() {
    let (_dir, path) = golden("fresh");
    let all = go_on(&path, 5, false).await.unwrap();
    assert_eq!(all, [(true, Ok(0)), (true, Ok(10)), (true, Ok(20)), (false, Ok(30)), (false, Ok(40))]);
}

#[tokio::test]
async fn a_complete_file_is_the_result() {
    let (_dir, path) = golden("sealed");
    let before = std::fs::read(&path).unwrap();
    let all = go_on(&path, 5, false).await.unwrap();
    assert_eq!(all, [(true, Ok(0)), (true, Ok(10)), (true, Ok(20)), (true, Ok(30)), (true, Ok(40))]);
    assert_eq!(before, std::fs::read(&path).unwrap());
}

#[tokio::test]
async fn a_file_with_failures_and_intents_goes_on() {
    let (_dir, path) = golden("mixed");
    let all = go_on(&path, 6, false).await.unwrap();
    assert_eq!((&all[0], &all[1]), (&(true, Ok(0)), &(false, Ok(10))));
    assert_eq!((&all[2], &all[4], &all[5]), (&(true, Err("gone".to_owned())), &(true, Ok(40)), &(false, Ok(50))));
    assert!(all[3].0 && all[3].1.is_err(), "it was started at most once");
}

#[tokio::test]
async fn a_file_by_key_goes_on() {
    let (_dir, path) = golden("key");
    let all = go_on(&path, 3, true).await.unwrap();
    assert_eq!(all, [(true, Ok(0)), (true, Err("gone".to_owned())), (false, Ok(20))]);
}
