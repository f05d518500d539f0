//! What a killed process left behind.
//!
//! Invariant: nothing is removed but a temporary file whose writer is dead: a living one holds its file's lock.

use std::ffi::OsStr;
use std::fs::TryLockError;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::Error;
use crate::commit::{Gate, Job};
use crate::file::current_runtime;
use crate::platform::{Dir, Entry, Kind};
use crate::staged::is_temp_name;

/// What a [`sweep`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SweepReport {
    /// Temporary files that were removed.
    pub removed: usize,
    /// Temporary files whose writer lives; they were left alone.
    pub live: usize,
    /// Temporary files that could not be opened, locked or removed, for want of a permission or of file locks.
    pub failed: usize,
}

/// Removes from the directory `dir` the temporary files of writers that were killed.
///
/// Call it when a program starts. It looks at regular files named `.afs-file-` and 16 hexadecimal digits, and at
/// nothing else; it does not descend into directories. Living writers, in this process or another, are not disturbed:
/// each locks its file, and the lock dies with its process. On a network file system whose locks are not seen by
/// other machines, only sweep while none of them writes.
///
/// # Cancel safety
///
/// This method is cancel safe.
/// If dropped before completion, some files have been removed, and none is removed from then on. Call it again.
///
/// # Errors
///
/// If `dir` cannot be opened or listed. A single file that cannot be removed is counted in
/// [`failed`](SweepReport::failed) instead.
///
/// # Examples
///
/// ```
/// use cancel_safe_atomic_fs as atomic_fs;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> std::io::Result<()> {
/// # let dir = tempfile::tempdir()?;
/// # let dir = dir.path();
/// std::fs::write(dir.join(".afs-file-00112233445566ff"), "of a killed writer")?;
/// let report = atomic_fs::sweep(dir).await?;
/// assert_eq!((report.removed, report.live), (1, 0));
/// # Ok(())
/// # }
/// ```
pub async fn sweep(dir: impl AsRef<Path>) -> Result<SweepReport, Error> {
    let path = Arc::<Path>::from(dir.as_ref());
    let runtime = current_runtime(&path)?;
    let target = path.clone();
    let work = move |gate: &Gate| {
        sweep_all(&target, gate)
            .map_err(|source| Error::Io { action: "sweep", path: target.to_path_buf(), source })?
            .ok_or_else(|| Error::Interrupted { path: target.to_path_buf() })
    };
    Job::spawn(&runtime, &Gate::new(), &path, work).await
}

/// `None` if it was cancelled.
fn sweep_all(path: &Path, gate: &Gate) -> io::Result<Option<SweepReport>> {
    let dir = Dir::open(path)?;
    let mut report = SweepReport::default();
    for entry in std::fs::read_dir(path)? {
        let name = entry?.file_name();
        if !is_temp_name(&name) {
            continue;
        }
        // Each removal passes the gate by itself, so that a dropped sweep removes nothing more.
        let Some(_passage) = gate.enter() else { return Ok(None) };
        match sweep_one(&dir, &name) {
            Ok(Found::Dead) => report.removed += 1,
            Ok(Found::Live) => report.live += 1,
            Ok(Found::Vanished) => {}
            Err(_error) => {
                #[cfg(feature = "tracing")]
                tracing::warn!(?name, error = %_error, "a temporary file could not be swept");
                report.failed += 1;
            }
        }
    }
    Ok(Some(report))
}

/// What became of one temporary file.
enum Found {
    Dead,
    Live,
    /// Committed, removed or not ours: there is nothing to do.
    Vanished,
}

fn sweep_one(dir: &Dir, name: &OsStr) -> io::Result<Found> {
    let Some(Entry { kind: Kind::File, .. }) = dir.look(name)? else { return Ok(Found::Vanished) };
    let file = match dir.read(name) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Vanished),
        Err(error) => return Err(error),
    };
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(Found::Live),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    // Its writer may have committed between the opening and the lock: then this is the target, and the name is gone.
    let opened = Entry::of(&file)?;
    match dir.look(name)? {
        Some(now) if now.id == opened.id => dir.remove(name).map(|()| Found::Dead),
        _ => Ok(Found::Vanished),
    }
}
