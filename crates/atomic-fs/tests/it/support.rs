//! What several modules share: looking at a directory, and waiting for a condition with a bound.

use std::path::Path;
use std::time::{Duration, Instant};

/// The names in `dir`, sorted.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The names of our temporary files in `dir`.
pub(crate) fn temps(dir: &Path) -> Vec<String> {
    names(dir).into_iter().filter(|name| name.starts_with(".afs-")).collect()
}

/// Waits until `condition` holds, and fails the test if that takes half a minute.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(30), "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Runs every job that is queued or running on a pool of one thread to its end.
pub(crate) async fn drain_pool() {
    tokio::task::spawn_blocking(|| ()).await.unwrap();
}

/// Says that something is not run here, and why.
#[cfg(unix)]
pub(crate) fn not_run(what: &str, why: &str) {
    cancel_safe_campaign::publish_not_run("atomic-fs", what, why);
}
