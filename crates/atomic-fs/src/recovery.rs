//! What a killed process left behind.
//!
//! Invariant: nothing is removed but a temporary file whose writer is dead: a living one holds its file's lock. Of a
//! transaction either everything is finished or everything is undone, or nothing is touched.

use std::ffi::OsStr;
use std::fs::TryLockError;
use std::io;
use std::path::Path;
#[cfg(unix)]
use std::path::PathBuf;
use std::sync::Arc;

use crate::Error;
use crate::commit::{Gate, Job};
use crate::error::{io_error, open_error};
use crate::file::current_runtime;
use crate::names::is_temp;
use crate::platform::{Dir, Entry, Kind};
use crate::staged::directory;
#[cfg(unix)]
use crate::{
    apply, backup,
    chain::{Chain, Spot, Trust},
    journal,
    lock::{self, Locking, Locks, Share, with_locks},
    names::{PREPARED, is_lock, is_reserved},
    protocol::elsewhere,
    site::Site,
    workspace,
};

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
/// nothing else: it does not descend into directories, and leaves what transactions have staged to their recovery.
/// Living writers, in this process or another, are not disturbed: each locks its file, and the lock dies with its
/// process. On a network file system whose locks are not seen by other machines, only sweep while none of them writes.
///
/// # Cancel safety
///
/// This method is cancel safe.
/// If dropped before completion, some files have been removed, and none is removed from then on. Call it again.
///
/// # Errors
///
/// If `dir` is [missing](Error::is_missing_directory), or cannot be opened or listed. A single file that cannot be removed
/// is counted in [`failed`](SweepReport::failed) instead.
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
    let path = Arc::<Path>::from(directory(dir.as_ref()));
    let runtime = current_runtime(&path)?;
    let target = path.clone();
    let work = move |gate: &Gate| {
        let dir = Dir::open(&target).map_err(|source| open_error(&target, source))?;
        sweep_all(&dir, &target, gate)
            .map_err(io_error("sweep", &target))?
            .ok_or_else(|| Error::Interrupted { path: target.to_path_buf() })
    };
    Job::spawn(&runtime, &Gate::new(), &path, work).await
}

/// `None` if it was cancelled.
fn sweep_all(dir: &Dir, path: &Path, gate: &Gate) -> io::Result<Option<SweepReport>> {
    let mut report = SweepReport::default();
    for entry in std::fs::read_dir(path)? {
        let name = entry?.file_name();
        if !is_temp(&name) {
            continue;
        }
        // Each removal passes the gate by itself, so that a dropped sweep removes nothing more.
        let Some(_passage) = gate.enter() else { return Ok(None) };
        match sweep_one(dir, &name) {
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
        Some(now) if now.id == opened.id => {}
        _ => return Ok(Found::Vanished),
    }
    match dir.remove(name) {
        // A living writer that could not lock its file, because of this very lock, removes it and takes another.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Found::Vanished),
        other => other.map(|()| Found::Dead),
    }
}

/// What a [`recover`] found and did.
#[cfg(unix)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecoveryReport {
    /// Transactions that had been committed, and are now finished: all of their files are new.
    pub rolled_forward: usize,
    /// Transactions that were prepared but not committed, or were being undone: all of their files are old.
    pub rolled_back: usize,
    /// Files that transactions had staged, or noted, which never were committed, and copies that writes in place no longer
    /// need; they were removed.
    pub removed: usize,
    /// Transactions that live and are not yet committed, and living writes in place; they were left alone.
    pub live: usize,
    /// Files that were being [written in place](crate::InPlace): their old content was put back.
    pub restored: usize,
}

/// How often a recovery that finds another journal than when it looked for its directories begins anew.
#[cfg(unix)]
const LOCK_ATTEMPTS: usize = 8;

/// Finishes or undoes the transaction that a crash left in the directory `dir`, puts back the old content of files that
/// were being [written in place](crate::InPlace) there, and removes what others had staged.
///
/// `dir` is where the journal lives: the directory of a transaction's first target, or the one that it began with. Call
/// it when a program starts, before it writes to these files. A transaction whose journal was committed is rolled
/// forward, one that was being undone is rolled back; afterwards its files are all new or all old. Without anything to
/// do it changes nothing, so it may be called at any time, again, and by several processes; a crash during a recovery
/// is recovered by the next one. Living transactions are not disturbed: one that commits is waited for.
///
/// `dir` may also be any other directory in which the transaction was to change files: it leads to the journal.
///
/// It knows files again by their inode and birth; in a tree that was copied or restored, by size and time, so that only
/// the copy is touched. A file that is renamed may be written to meanwhile, as a log is. What somebody else has put in the
/// place of a file that was already exchanged is the last write, and stays.
///
/// A journal says which files are to be exchanged, in whatever directory: recover only where nobody can write whom you
/// would not trust with the files that you can write to.
///
/// # Cancel safety
///
/// This method is cancel safe.
/// If dropped before completion, the recovery has been done or has not begun; a drop that finds it begun waits for it. That
/// goes for the transaction, and for each file that was being written in place, by itself.
///
/// # Errors
///
/// A journal that [cannot be read](Error::CorruptJournal), a target that is [neither old nor new](Error::UnknownFile), or
/// a directory that [is not where it was](Error::Misplaced): then nothing of the transaction was touched
/// ([`Error::is_refused`]), and the message names the way out by hand. A backup of a file that was being written in place
/// [which may not belong there](Error::UnusableBackup), or which a disk that fails [keeps from being put
/// back](Error::Torn); everything else has then been recovered. The directory is missing or [busy](Error::is_busy). After
/// any other error call it again; if the disk failed when it had begun, that is [`Error::Undecided`].
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
/// let report = atomic_fs::recover(dir).await?;
/// assert_eq!(report, atomic_fs::RecoveryReport::default(), "there was nothing to do");
/// # Ok(())
/// # }
/// ```
#[cfg(unix)]
pub async fn recover(dir: impl AsRef<Path>) -> Result<RecoveryReport, Error> {
    let mut path = Arc::<Path>::from(directory(dir.as_ref()));
    let runtime = current_runtime(&path)?;
    let mut placed = Ok(backup::Found::default());
    for _ in 0..LOCK_ATTEMPTS {
        let target = path.clone();
        let prepare = move |_: &Gate| Recovering::new(&target);
        let (found, recovered) = with_locks(&runtime, &Gate::new(), &path, prepare, Recovering::finish).await?;
        placed = placed.and_then(|before| Ok(before.and(found?)));
        match recovered {
            Recovered::Done(report) => {
                let backup::Found { restored, removed, live } = placed?;
                return Ok(RecoveryReport {
                    restored,
                    removed: report.removed + removed,
                    live: report.live + live,
                    ..report
                });
            }
            Recovered::Elsewhere(home) => path = home.into(),
            Recovered::Again => {}
        }
    }
    Err(Error::Busy { directory: path.to_path_buf(), waited: lock::LOCK_PATIENCE })
}

/// A recovery that is about to lock its directories.
#[cfg(unix)]
struct Recovering {
    home: Arc<Site>,
    /// Those that it will have locked; none if there is nothing to recover.
    sites: Vec<Arc<Site>>,
}

/// What a recovery of one directory came to.
#[cfg(unix)]
enum Recovered {
    Done(RecoveryReport),
    /// This directory takes part in a transaction that is unfinished there.
    Elsewhere(PathBuf),
    /// There is another journal now, of other directories.
    Again,
}

#[cfg(unix)]
impl Recovering {
    fn new(path: &Path) -> Result<(Self, Locking), Error> {
        let home = Arc::new(Site::open(path)?);
        let names = home.dir.list().map_err(io_error("list", path))?;
        if !names.iter().any(|name| is_reserved(name) && !is_temp(name) && !is_lock(name)) {
            // Nothing is to be done, which needs no right to write here.
            lock::remove_dead(&home);
            let locking = Locking::new([], Share::Nobody, lock::LOCK_PATIENCE);
            return Ok((Self { home, sites: Vec::new() }, locking));
        }
        // Only for the directories to lock: a journal seen without a lock may be that of a living transaction.
        let foreseen = find(&home).ok().flatten().map(|left| left.chains).unwrap_or_default();
        let spots = foreseen.iter().flat_map(Chain::spots).map(|spot| spot.site.clone());
        let sites: Vec<_> = spots.chain([home.clone()]).collect();
        let locking = Locking::new(&sites, Share::Nobody, lock::LOCK_PATIENCE);
        Ok((Self { home, sites }, locking))
    }

    /// What was being written in place is told apart: it has nothing to do with the transaction.
    fn finish(self, _locks: Locks, gate: &Gate) -> Result<(Result<backup::Found, Error>, Recovered), Error> {
        if self.sites.is_empty() {
            return Ok((Ok(backup::Found::default()), Recovered::Done(RecoveryReport::default())));
        }
        let placed = backup::recover(&self.home.dir, &self.home.path, gate);
        Ok((placed, self.finish_transaction(gate)?))
    }

    fn finish_transaction(self, gate: &Gate) -> Result<Recovered, Error> {
        let left = find(&self.home)?;
        let chains = left.as_ref().map(|left| &left.chains[..]).unwrap_or_default();
        let is_locked = |spot: &Spot| self.sites.iter().any(|site| site.id == spot.site.id);
        if !chains.iter().flat_map(Chain::spots).all(is_locked) {
            return Ok(Recovered::Again);
        }
        if let (None, Some(home)) = (&left, elsewhere(&self.home)?) {
            return Ok(Recovered::Elsewhere(home.path));
        }
        recover_locked(&self.home, left, gate).map(Recovered::Done)
    }
}

/// A transaction that a crash left, with its directories open.
#[cfg(unix)]
struct Left {
    name: &'static str,
    chains: Vec<Chain>,
    trust: Trust,
}

#[cfg(unix)]
fn find(home: &Arc<Site>) -> Result<Option<Left>, Error> {
    let Some(journal::Found { name, record, trust }) = journal::find(home)? else { return Ok(None) };
    Ok(Some(Left { name, chains: apply::reopen(home, name, record)?, trust }))
}

#[cfg(unix)]
fn recover_locked(home: &Site, left: Option<Left>, gate: &Gate) -> Result<RecoveryReport, Error> {
    let mut report = RecoveryReport::default();
    let Some(passage) = gate.enter() else { return Err(Error::Interrupted { path: home.path.clone() }) };
    // Once a target may have been touched, an error must not say that all are unchanged.
    let undecided = |error: Error| Error::Undecided { directory: home.path.clone(), source: error.into() };
    let has_journal = left.is_some();
    if let Some(Left { name, chains, trust }) = left {
        let ways = apply::judge(home, name, &chains, trust)?;
        apply::roll(home, name, &chains, &ways).map_err(undecided)?;
        if name == PREPARED {
            report.rolled_back = 1;
        } else {
            report.rolled_forward = 1;
        }
    }
    let is_stale = elsewhere(home).map(|home| home.is_none());
    let cleaned = is_stale.and_then(|is_stale| {
        let removed = if is_stale { journal::remove_pointer(home) } else { Ok(()) };
        removed.and_then(|()| workspace::remove_litter(home)).map_err(io_error("clean up", &home.path))
    });
    let litter = cleaned.map_err(|error| if has_journal { undecided(error) } else { error })?;
    (report.removed, report.live) = (litter.removed, litter.live);
    passage.done();
    Ok(report)
}
