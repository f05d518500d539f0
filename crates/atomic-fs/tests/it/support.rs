//! Shared helpers: checking a directory, and waiting for a condition with a bound.

use std::path::Path;
use std::time::{Duration, Instant};

/// The names of locks. A lock that is held, or that a killed process left, does no harm; `lock.rs` tests them.
pub(crate) const LOCKS: [&str; 2] = [".afs-lock", ".afs-turn"];

/// The limit after which something counts as hanging: on a busy disk a sync may take seconds, and an exploration
/// assumes that a job that runs for a quarter of this waits for another one.
pub(crate) const SLOW_DISK: Duration = Duration::from_secs(60);

/// The names in `dir` except locks, sorted.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| !LOCKS.contains(&name.as_str())).collect();
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

/// Locks an unlocked directory, exclusively or shared.
///
/// This succeeds at once, except while a child of another test is starting: until its exec it has a copy of every
/// descriptor of this process, and with it the lock.
#[cfg(unix)]
pub(crate) fn lock_free(dir: &Path, shared: bool) -> Result<Locked, String> {
    let begun = Instant::now();
    loop {
        let path = dir.join(LOCKS[0]);
        let file = std::fs::File::create(&path).unwrap();
        match if shared { file.try_lock_shared() } else { file.try_lock() } {
            Ok(()) => return Ok(Locked { _file: file, path }),
            Err(error) if begun.elapsed() > Duration::from_secs(2) => return Err(format!("still locked: {error}")),
            Err(_) => std::thread::yield_now(),
        }
    }
}

/// A lock that only its holder removes.
#[cfg(unix)]
#[derive(Debug)]
pub(crate) struct Locked {
    _file: std::fs::File,
    path: std::path::PathBuf,
}

#[cfg(unix)]
impl Drop for Locked {
    fn drop(&mut self) {
        std::fs::remove_file(&self.path).unwrap();
    }
}

/// Runs every job that is queued or running on a pool of one thread to its end.
pub(crate) async fn drain_pool() {
    tokio::task::spawn_blocking(|| ()).await.unwrap();
}

/// Publishes that something does not run here, and why.
#[cfg(unix)]
pub(crate) fn not_run(what: &str, why: &str) {
    cancel_safe_campaign::publish_not_run("atomic-fs", what, why);
}
