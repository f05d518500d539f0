//! A file that no rename can replace, written in place, with a copy of its old content beside it.
//!
//! Invariant: from before the first byte of the target changes until all of the new content is durable, a durable record
//! leads to a durable copy of the old content. Nobody but a reader without the lock may find the
//! target half written, and a recovery.

use std::ffi::{OsStr, OsString};
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use crate::backup::{Locked, Record, copy, fill, is_at, remove, remove_both, torn};
use crate::commit::Gate;
use crate::names;
use crate::platform::{self, Dir, Entry, Identity, Kind};
use crate::{Error, InPlace, WriteOptions};

/// How many names are tried. A second one is needed only if a recovery took the copy before it could be locked.
const NAME_ATTEMPTS: usize = 32;

/// Whether a rename that has failed in this way is to be made up for by a write in place.
pub(crate) fn is_wanted(options: WriteOptions, failure: &io::Error) -> bool {
    let is_fixed = matches!(failure.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::CrossesDevices);
    is_fixed && options.in_place == InPlace::WithBackup && !options.create_new
}

/// A target that stays the file that it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fixed<'a> {
    /// As given, for errors.
    pub(crate) path: &'a Path,
    pub(crate) resolved: &'a Option<PathBuf>,
    pub(crate) dir: &'a Dir,
    /// The path by which `dir` was opened.
    pub(crate) parent: &'a Path,
    pub(crate) name: &'a OsStr,
}

impl Fixed<'_> {
    /// Writes the first `length` bytes of `new` over the target, and sets its mode if one is given.
    ///
    /// Everything is synced, whatever durability is asked for: without that the copy would be good for nothing.
    pub(crate) fn write(&self, new: &File, length: u64, mode: Option<u32>, gate: &Gate) -> Result<(), Error> {
        // Dropped last, so that the next writer finds neither record nor copy.
        let file = self.lock(gate)?;
        self.refuse_unrecovered(&file.0)?;
        let old = Entry::of(&file.0).map_err(self.failed("look at"))?;
        let mode = mode.filter(|mode| *mode != old.mode);
        let mut backup = Backup::take(self, old.size, mode.map(|_| old.mode))?;
        backup.fill(self, &file.0, gate)?;
        if mode.is_some() {
            // It changes nothing, but fails for whoever may not set the mode: better now than half way.
            platform::set_mode(&file.0, old.mode).map_err(self.failed("set the mode of"))?;
        }
        let mut reserved = Reserved::new(&file.0, old.size, length).map_err(self.failed("reserve space for"))?;
        backup.record(self, &file.0)?;
        let Some(passage) = gate.enter() else { return Err(self.interrupted()) };
        // From here on a panic too leaves the target to a recovery.
        backup.is_needed = true;
        reserved.is_used = true;
        let written = fill(&file.0, new, length, mode);
        // Once there is no record, nothing undoes it any more: whoever drops the future waits until here.
        match written.and_then(|()| remove(self.dir, &backup.record)) {
            Ok(()) => {
                passage.done();
                // Until that is durable, a power cut brings the record back, and with it the old content.
                let synced = self.dir.sync();
                synced.map_err(|source| Error::NotDurable { path: self.path.to_path_buf(), source })?;
                (backup.is_recorded, backup.is_needed) = (false, false);
                Ok(())
            }
            // A sync that failed is not tried again: all of the old content is written once more before the next one.
            Err(error) => match backup.put_back(&file.0) {
                Ok(()) => {
                    backup.is_needed = false;
                    // Before the passage goes, so that whoever waits for that finds everything as it was.
                    drop(backup);
                    Err(self.failed("write in place")(error))
                }
                Err(source) => {
                    passage.done();
                    #[cfg(feature = "tracing")]
                    tracing::error!(path = ?self.path, error = %source, "a file is half written until a recovery");
                    Err(torn(self.path, self.parent.join(&backup.copy_name), source))
                }
            },
        }
    }

    /// Opens the target and locks it against other writers in place, also those that know it by another name.
    fn lock(&self, gate: &Gate) -> Result<Locked, Error> {
        let failed = || self.failed("open for a write in place");
        if !matches!(self.dir.look(self.name).map_err(self.failed("look at"))?, Some(Entry { kind: Kind::File, .. })) {
            return Err(failed()(io::Error::other("it is no regular file any more")));
        }
        let file = self.dir.update(self.name).map_err(failed())?;
        let file = Locked::wait(file, self.path, gate)?;
        if !is_at(self.dir, self.name, &file.0).map_err(self.failed("look at"))? {
            return Err(failed()(io::Error::other("it was replaced meanwhile")));
        }
        Ok(file)
    }

    /// What a crash left half written must not be taken for the old content. Under the lock no living writer has a record.
    fn refuse_unrecovered(&self, file: &File) -> Result<(), Error> {
        let mark = Identity::of(file).map_err(self.failed("look at"))?.mark();
        for name in self.dir.list().map_err(self.failed("look for unfinished writes beside"))? {
            // By this name; or by another one, if the same file is mounted twice.
            let is_ours = |record: Record| record.name == self.name || record.marks[1] == mark;
            if names::Backup::of_record(&name).is_some()
                && Record::read(self.dir, &name).is_ok_and(|r| r.is_some_and(is_ours))
            {
                return Err(Error::Unrecovered { directory: self.parent.to_path_buf() });
            }
        }
        Ok(())
    }

    fn interrupted(&self) -> Error {
        Error::Interrupted { path: self.path.to_path_buf() }
    }

    /// The error of a call that was to do `action`.
    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> Error + use<> {
        let (path, resolved) = (self.path.to_path_buf(), self.resolved.clone());
        move |source| Error::Io { action, path, resolved, source }
    }
}

/// Space for content that is longer than the file; what was not used is given back.
struct Reserved<'a> {
    file: &'a File,
    old_length: u64,
    is_used: bool,
}

impl<'a> Reserved<'a> {
    /// A full disk is to be met before anything is overwritten. Where space cannot be reserved, the copy has to do.
    fn new(file: &'a File, old_length: u64, length: u64) -> io::Result<Self> {
        let reserved = Self { file, old_length, is_used: length <= old_length };
        platform::reserve(file, length)?;
        Ok(reserved)
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if !self.is_used {
            // To be cut where it ends frees what lies beyond.
            let _kept = self.file.set_len(self.old_length);
        }
    }
}

/// The copy of the old content, locked as long as its writer lives, and the record that leads to it.
#[derive(Debug)]
struct Backup<'a> {
    dir: &'a Dir,
    record: OsString,
    copy_name: OsString,
    copy: File,
    length: u64,
    /// That of the old content, if another one is to be set.
    mode: Option<u32>,
    is_recorded: bool,
    /// Whether the old content is nowhere else, or may be after a power cut. If not, both go when this is dropped.
    is_needed: bool,
}

impl<'a> Backup<'a> {
    /// Creates and locks an empty copy, which nobody may read but who writes it.
    fn take(target: &Fixed<'a>, length: u64, mode: Option<u32>) -> Result<Self, Error> {
        let failed = || target.failed("create a backup beside");
        for _ in 0..NAME_ATTEMPTS {
            let names::Backup { record, copy: copy_name } = names::Backup::by_chance();
            let copy = match target.dir.create(&copy_name, 0o600) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                other => other.map_err(failed())?,
            };
            // From here on its drop removes it.
            let backup =
                Self { dir: target.dir, record, copy_name, copy, length, mode, is_recorded: false, is_needed: false };
            match backup.copy.try_lock() {
                Ok(()) if Entry::of(&backup.copy).map_err(failed())?.links > 0 => return Ok(backup),
                // A recovery came between creation and lock, and took it for litter.
                Ok(()) | Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(source)) => return Err(target.failed("lock the backup of")(source)),
            }
        }
        Err(failed()(io::ErrorKind::AlreadyExists.into()))
    }

    /// Copies the old content, durably.
    fn fill(&self, target: &Fixed<'_>, old: &File, gate: &Gate) -> Result<(), Error> {
        let failed = || target.failed("back up");
        if !copy(old, &self.copy, self.length, || gate.is_cancelled()).map_err(failed())? {
            return Err(target.interrupted());
        }
        self.copy.sync_all().map_err(failed())?;
        // Before there is a record: one that leads to no copy is then never the work of a power cut.
        self.dir.sync().map_err(failed())
    }

    /// From here on a recovery puts the old content back.
    fn record(&mut self, target: &Fixed<'_>, file: &File) -> Result<(), Error> {
        let failed = || target.failed("record the backup of");
        let marks = [&self.copy, file].map(|file| Identity::of(file).map(|known| known.mark()));
        let [copy, file] = marks;
        let record = Record {
            marks: [copy.map_err(failed())?, file.map_err(failed())?],
            mode: self.mode,
            name: target.name.into(),
        };
        // Also if it failed: it may have taken effect.
        self.is_recorded = true;
        self.dir.symlink(&record.encode(), &self.record).map_err(failed())?;
        self.dir.sync().map_err(failed())
    }

    fn put_back(&self, file: &File) -> io::Result<()> {
        fill(file, &self.copy, self.length, self.mode)
    }

    fn remove(&self) -> io::Result<()> {
        remove_both(self.dir, self.is_recorded.then_some(&self.record), &self.copy_name)
    }
}

impl Drop for Backup<'_> {
    fn drop(&mut self) {
        if !self.is_needed
            && let Err(_error) = self.remove()
        {
            #[cfg(feature = "tracing")]
            tracing::warn!(backup = ?self.copy_name, error = %_error, "a backup stays until the next recovery");
        }
        // As that of the target.
        let _closed_anyway = self.copy.unlock();
    }
}
