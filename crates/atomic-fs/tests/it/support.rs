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

/// Prints `line` and, if `CANCEL_SAFE_POINTS_FILE` names a file, appends it there, for the closing table of
/// `cargo xtask`: what a test prints is captured.
#[cfg(unix)]
pub(crate) fn publish(line: &str) {
    use std::io::Write;
    println!("{line}");
    if let Some(path) = std::env::var_os("CANCEL_SAFE_POINTS_FILE") {
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
        // One write of a whole line: lines of tests that run at the same time do not mix.
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    }
}

/// Says that something is not run here, and why.
#[cfg(unix)]
pub(crate) fn not_run(what: &str, why: &str) {
    publish(&format!("not-run atomic-fs {what}: {why}"));
}
