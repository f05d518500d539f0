//! What the tests share.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
    time::Duration,
};

use cancel_safe_campaign::{publish_campaign, publish_not_run};
use cancel_safe_resumable::{Builder, Done, FileStore, ItemError, ResumableTask, TaskError};
use futures_util::StreamExt;
use tokio_util::sync::CancellationToken;

/// How long a successor waits for the last sync of a run that was dropped: far longer than any disk takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Whether `cargo xtask crash` asks for the whole campaign.
pub(crate) fn in_full() -> bool {
    std::env::var("CANCEL_SAFE_CAMPAIGN").is_ok_and(|form| form == "full")
}

/// Tells the closing table of `cargo xtask` what could not be run here, and why. A test that reports nothing has run.
pub(crate) fn not_run(what: &str, why: &str) {
    publish_not_run("resumable", what, why);
}

/// Tells the closing table what a campaign has visited. It has found no violation; otherwise its test would have
/// failed.
pub(crate) fn visited(campaign: &str, points: usize) {
    publish_campaign("resumable", campaign, points, 0);
}

/// A directory and the path of a checkpoint in it.
pub(crate) fn checkpoint() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.ckpt");
    (dir, path)
}

/// A run over numbers, by position.
pub(crate) fn numbers(path: &Path) -> Builder<u64, u64> {
    ResumableTask::builder("numbers").store(FileStore::at(path).wait(PATIENCE))
}

/// The item's function in most tests.
pub(crate) async fn double(x: u64) -> Result<u64, ItemError> {
    Ok(x * 2)
}

/// Runs the numbers below `n` to the end and returns the results in input order.
pub(crate) async fn complete(path: &Path, n: u64) -> Result<Vec<Done<u64>>, TaskError> {
    let mut run = numbers(path).concurrency(8).ordered().stream(0..n, |_, x| double(x));
    let mut all = Vec::new();
    while let Some(done) = run.next().await {
        all.push(done);
    }
    run.finish().await.map(|_| all)
}

/// The numbers below `n` for which a checkpoint has results. Nothing is recorded.
pub(crate) async fn restored(path: &Path, n: u64) -> Vec<usize> {
    let (token, begun) = (CancellationToken::new(), Arc::new(AtomicUsize::new(0)));
    let (cancel, counter) = (token.clone(), Arc::clone(&begun));
    let mut run = numbers(path).concurrency(n as usize).cancel(token).stream(0..n, move |_, _| {
        counter.fetch_add(1, Ordering::Relaxed);
        std::future::pending()
    });
    let mut indexes = Vec::new();
    // Once all items are either restored or begun there is nothing more to see.
    while let Some(done) = std::future::poll_fn(|cx| match run.poll_next_unpin(cx) {
        Poll::Pending if indexes.len() + begun.load(Ordering::Relaxed) == n as usize => Poll::Ready(None),
        polled => polled,
    })
    .await
    {
        indexes.push(done.index);
    }
    cancel.cancel();
    drop(run.finish().await);
    indexes.sort_unstable();
    indexes
}

/// Waits until a condition holds, for at most a minute.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..12_000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("not within a minute: {what}");
}
