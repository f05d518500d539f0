//! Staged files: hidden beside the targets until they take the targets' places.
//!
//! Invariant: a staged file has one owner, a [`Staging`], and is removed when that is dropped. The owner also holds the
//! sign that it is alive, the lock of a single file or the locked note of a transaction, and releases it only after the
//! file, whatever the order of other drops. So if neither is locked, a staged file belongs to no live process.

use std::ffi::{OsStr, OsString};
use std::fs::{File, TryLockError};
use std::io;
use std::path::Path;
use std::sync::Arc;
#[cfg(unix)]
use std::{
    io::{Read, Write},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::Error;
use crate::commit::{Gate, Job, current_runtime};
use crate::error::{io_error, open_error};
use crate::names::{self, directory, is_temp};
use crate::platform::{Dir, Entry, Kind, Moved};
#[cfg(unix)]
use crate::{chain::Site, journal, names::Tag, platform::Identity};

/// How many names to try. A second one is needed only if a sweep took the file for litter before it could be locked.
const NAME_ATTEMPTS: usize = 32;
/// No note is larger than this, so that a recovery never reads a huge file.
#[cfg(unix)]
const NOTE_LIMIT_BYTES: u64 = 16 << 20;

/// Our own file with a hidden name. It is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Staging {
    dir: Arc<Dir>,
    name: OsString,
    /// Whether our file still has that name.
    is_ours: bool,
    /// The lock of a single file, which tells a sweep that its creator lives.
    _lock: Option<Arc<File>>,
    /// The lock of the note, which tells a recovery that the creator of a transaction's file lives.
    #[cfg(unix)]
    note: Option<Arc<Workspace>>,
}

impl Staging {
    /// Creates a file in `dir`, locks it against sweeps, and returns its metadata.
    pub(crate) fn create(dir: &Arc<Dir>, mode: u32) -> io::Result<(Self, Arc<File>, Entry)> {
        for _ in 0..NAME_ATTEMPTS {
            let name = names::temp();
            let file = match dir.create(&name, mode) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                other => Arc::new(other?),
            };
            // From here on its drop removes it.
            let staging = Self {
                dir: dir.clone(),
                name,
                is_ours: true,
                _lock: Some(file.clone()),
                #[cfg(unix)]
                note: None,
            };
            if let Some(fresh) = lock_new(&file)? {
                return Ok((staging, file, fresh));
            }
            // A sweep came between creation and lock, and took the file for litter.
        }
        Err(io::Error::new(io::ErrorKind::AlreadyExists, "every temporary name that was tried is taken"))
    }

    /// Creates a file in `dir` as a part of a transaction, and returns its metadata.
    #[cfg(unix)]
    pub(crate) fn create_for(
        workspace: &Arc<Workspace>,
        dir: &Arc<Dir>,
        mode: u32,
    ) -> io::Result<(Self, Arc<File>, Entry)> {
        let name = workspace.name();
        let file = Arc::new(dir.create(&name, mode)?);
        let staging = Self { dir: dir.clone(), name, is_ours: true, _lock: None, note: Some(workspace.clone()) };
        let fresh = Entry::of(&file)?;
        Ok((staging, file, fresh))
    }

    #[cfg(unix)]
    pub(crate) fn name(&self) -> &OsStr {
        &self.name
    }

    /// Gives the file the name of its target, which may have to be free.
    pub(crate) fn rename(&mut self, target: &OsStr, must_be_new: bool) -> io::Result<()> {
        let moved = if must_be_new {
            self.dir.rename_new(&self.name, target)?
        } else {
            self.dir.rename(&self.name, target).map(|()| Moved::Renamed)?
        };
        // The old name, if it is still there, is removed when this is dropped.
        self.is_ours = moved == Moved::Linked;
        Ok(())
    }

    /// From now on the file belongs to the journal.
    #[cfg(unix)]
    pub(crate) fn give_away(&mut self) {
        self.is_ours = false;
    }

    /// Removes the file, unless it was given away, and returns whether that worked.
    pub(crate) fn end(mut self) -> io::Result<()> {
        self.remove()
    }

    fn remove(&mut self) -> io::Result<()> {
        if !std::mem::take(&mut self.is_ours) {
            return Ok(());
        }
        match self.dir.remove(&self.name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                #[cfg(unix)]
                if let Some(note) = &self.note {
                    note.stay();
                }
                Err(error)
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(_error) = self.remove() {
            #[cfg(feature = "tracing")]
            tracing::warn!(temp = ?self.name, error = %_error, "a temporary file stays until the next sweep or recovery");
        }
    }
}

/// Locks a file that has just been created, so that no sweep takes it while its writer lives.
///
/// Returns the file's metadata, or `None` if a sweep was faster.
fn lock_new(file: &File) -> io::Result<Option<Entry>> {
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        // The file system has no locks: a sweep gets none there either, and therefore removes nothing.
        Err(TryLockError::Error(_)) => {}
    }
    let entry = Entry::of(file)?;
    // The sweep may have come and gone before the lock was taken; then the file has no name any more.
    Ok((entry.links > 0).then_some(entry))
}

/// What a [`sweep`] call found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SweepReport {
    /// Temporary files that were removed.
    pub removed: usize,
    /// Temporary files of live writers; they were left alone.
    pub live: usize,
    /// Temporary files that could not be opened, locked or removed, for lack of permission or of file locks.
    pub failed: usize,
}

/// Removes the temporary files of killed writers from the directory `dir`.
///
/// Call it when a program starts. It looks only at regular files named `.afs-file-` plus 16 hexadecimal digits. It does
/// not descend into directories, and leaves the staged files of transactions to their recovery. It does not disturb
/// live writers, in this process or another: each locks its file, and the lock dies with its process. On a network file
/// system whose locks other machines do not see, sweep only while none of them writes.
///
/// # Cancel safety
///
/// This method is cancel safe. If dropped before completion, some files have been removed, and no more are removed
/// afterwards. Call it again.
///
/// # Errors
///
/// If `dir` is [missing](Error::is_missing_directory), or cannot be opened or listed. A single file that cannot be
/// removed only counts in [`failed`](SweepReport::failed).
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

/// The outcome for one temporary file.
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
        // A live writer that could not lock its file because of this very lock removes it and creates another.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Found::Vanished),
        other => other.map(|()| Found::Dead),
    }
}

/// The shared state of a transaction's jobs: its directories, and the note that says which files are its own.
///
/// The note is created and locked before the first staged file, and removed after the last. In other directories than
/// the journal's, a symlink to the note takes its place.
#[cfg(unix)]
#[derive(Debug)]
pub(crate) struct Workspace {
    pub(crate) tag: Tag,
    /// The journal's directory first.
    sites: Mutex<Vec<Arc<Site>>>,
    /// The note, which is locked as long as this lives.
    note: File,
    /// How many names have been used.
    given: AtomicU64,
    stays: AtomicBool,
}

#[cfg(unix)]
impl Workspace {
    /// Begins a transaction in the directory `journal_dir`.
    pub(crate) fn begin(journal_dir: &Path) -> Result<Self, Error> {
        let home = Arc::new(Site::open(journal_dir)?);
        for _ in 0..NAME_ATTEMPTS {
            let tag = Tag::by_chance();
            let note = match home.dir.create(tag.note().as_ref(), 0o600) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                other => other.map_err(io_error("create a transaction's note in", journal_dir))?,
            };
            // From here on its drop removes it.
            let (sites, given, stays) = (Mutex::new(vec![home.clone()]), AtomicU64::new(0), AtomicBool::new(false));
            let workspace = Self { tag, sites, note, given, stays };
            if lock_new(&workspace.note).map_err(io_error("lock a transaction's note in", journal_dir))?.is_some() {
                return Ok(workspace);
            }
        }
        Err(io_error("create a transaction's note in", journal_dir)(io::ErrorKind::AlreadyExists.into()))
    }

    /// The journal's directory.
    pub(crate) fn home(&self) -> Arc<Site> {
        self.sites()[0].clone()
    }

    /// A fresh name for a staged file.
    #[cfg(unix)]
    pub(crate) fn name(&self) -> OsString {
        format!("{}-{}", self.tag.note(), self.given.fetch_add(1, Ordering::Relaxed) + 1).into()
    }

    /// Adds the directory `dir`, opened as `parent`, to this transaction; `path` is the target, for errors.
    pub(crate) fn adopt(&self, dir: Arc<Dir>, parent: &Path, path: &Path) -> Result<Arc<Site>, Error> {
        let id = dir.id().map_err(|source| open_error(parent, source))?;
        let mut sites = self.sites();
        if let Some(known) = sites.iter().find(|site| site.id == id) {
            return Ok(known.clone());
        }
        if sites[0].id.0 != id.0 {
            return Err(Error::OtherFileSystem { path: path.to_path_buf() });
        }
        let site = Arc::new(Site::of(dir, parent)?);
        // First the entry by which a recovery of the journal's directory finds this one, and everything that follows;
        // then the symlink that protects the files that will be staged here. Neither is synced: if a power cut removes
        // them, the files belong to nobody.
        let foreign = Foreign::new(&self.note, &sites[0], &site);
        let noted = foreign.and_then(|foreign| (&self.note).write_all(&foreign.encode()));
        let link = journal::way(&site.path, &sites[0].path).join(self.tag.note());
        let linked = noted.and_then(|()| site.dir.symlink(&link, self.tag.note().as_ref()));
        linked.map_err(io_error("note the directory of", path))?;
        sites.push(site.clone());
        Ok(site)
    }

    /// Keeps the note for a recovery, because the transaction left something behind that can only be found through the
    /// note.
    pub(crate) fn stay(&self) {
        self.stays.store(true, Ordering::Relaxed);
    }

    /// Nothing panics in the middle of a change while it is locked.
    fn sites(&self) -> MutexGuard<'_, Vec<Arc<Site>>> {
        self.sites.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(unix)]
impl Drop for Workspace {
    fn drop(&mut self) {
        if self.stays.load(Ordering::Relaxed) {
            return;
        }
        // The note goes last: as long as a link to it remains, a recovery must be able to find that link through the
        // note.
        for site in self.sites().iter().rev() {
            match site.dir.remove(self.tag.note().as_ref()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return,
                _ => {}
            }
        }
    }
}

/// Another directory in which files are staged, as a note names it.
#[cfg(unix)]
pub(crate) struct Foreign {
    /// The marks that show whether the note is where it was written, and by which that directory is recognised.
    marks: [String; 2],
    /// The path from the note's directory to that one; relative, so that a copy of both does not lead to the original.
    way: PathBuf,
}

#[cfg(unix)]
impl Foreign {
    fn new(note: &File, home: &Site, site: &Site) -> io::Result<Self> {
        let marks = [Identity::of(note)?.mark(), site.mark()?];
        Ok(Self { marks, way: journal::way(&home.path, &site.path) })
    }

    /// Marked at both ends, so that an entry cut off by a full disk does not spoil the next one.
    fn encode(&self) -> Vec<u8> {
        let [note, site] = &self.marks;
        [format!("\0{note}/{site}/").as_bytes(), self.way.as_os_str().as_bytes(), b"\0"].concat()
    }

    fn decode(line: &[u8]) -> Option<Self> {
        let mut parts = line.splitn(3, |&byte| byte == b'/');
        let mut mark = || Some(std::str::from_utf8(parts.next()?).ok()?.to_owned());
        let marks = [mark()?, mark()?];
        Some(Self { marks, way: OsString::from_vec(parts.next()?.to_vec()).into() })
    }

    /// The directory, if it provably is the right one: both are where they were, or both were copied. A directory that
    /// has since been moved or removed is out of reach, and harmless.
    pub(crate) fn open(&self, note: &File, home: &Site) -> Option<Site> {
        let site = Site::open(&home.path.join(&self.way)).ok()?;
        let marks = [Identity::of(note).ok()?.mark(), site.mark().ok()?];
        let [is_note, is_site] = [0, 1].map(|end| marks[end] == self.marks[end]);
        // An overlay with layers on several file systems renumbers its directories when it is mounted.
        (is_note == is_site || (is_note && site.is_layered)).then_some(site)
    }
}

/// The other directories that a note names. An entry that a crash cut off was not yet in use.
#[cfg(unix)]
pub(crate) fn foreign_sites(note: &File) -> io::Result<Vec<Foreign>> {
    let mut bytes = Vec::new();
    note.take(NOTE_LIMIT_BYTES).read_to_end(&mut bytes)?;
    let whole = bytes.split_inclusive(|&byte| byte == 0).filter_map(|line| line.strip_suffix(&[0]));
    Ok(whole.filter_map(Foreign::decode).collect())
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn what_tells_that_a_staged_file_lives_goes_after_it_whatever_is_dropped_first() {
        let scratch = tempfile::tempdir().expect("the temporary directory has room");
        let dir = Arc::new(Dir::open(scratch.path()).expect("it is there"));
        let names = || std::fs::read_dir(scratch.path()).expect("it is there").count();

        let (staging, file, _) = Staging::create(&dir, 0o600).expect("the directory is ours");
        drop(file);
        let sweeper = dir.read(staging.name()).expect("it is there");
        assert!(matches!(sweeper.try_lock(), Err(TryLockError::WouldBlock)));
        drop(staging);
        assert_eq!(names(), 0);
        assert!(sweeper.try_lock().is_ok());

        let workspace = Arc::new(Workspace::begin(scratch.path()).expect("the directory is ours"));
        let [one, other] = [1, 2].map(|_| Staging::create_for(&workspace, &dir, 0o600).expect("the directory is ours"));
        drop(workspace);
        drop(one);
        assert_eq!(names(), 2, "the other, and the note");
        let (staging, file, _) = other;
        assert!(staging.end().is_ok());
        assert_eq!(names(), 0);
        drop(file);
    }

    #[test]
    fn the_note_stays_if_a_file_does_and_what_was_given_away_is_not_removed() {
        let scratch = tempfile::tempdir().expect("the temporary directory has room");
        let dir = Arc::new(Dir::open(scratch.path()).expect("it is there"));
        let names = || std::fs::read_dir(scratch.path()).expect("it is there").count();

        let workspace = Arc::new(Workspace::begin(scratch.path()).expect("the directory is ours"));
        let (mut staging, ..) = Staging::create_for(&workspace, &dir, 0o600).expect("the directory is ours");
        drop(workspace);
        staging.give_away();
        drop(staging);
        assert_eq!(names(), 1, "the file, which somebody else has now");

        let workspace = Arc::new(Workspace::begin(scratch.path()).expect("the directory is ours"));
        let (staging, ..) = Staging::create_for(&workspace, &dir, 0o600).expect("the directory is ours");
        drop(workspace);
        // A directory cannot be removed as files are.
        dir.remove(staging.name()).expect("it is ours");
        std::fs::create_dir(scratch.path().join(staging.name())).expect("the name is free");
        assert!(staging.end().is_err());
        assert_eq!(names(), 3, "and the note");
    }
}
