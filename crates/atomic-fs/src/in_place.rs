//! Writing a file in place, if no rename can replace it, with a copy of its old content beside it.
//!
//! Invariant: from before the first byte of the target changes until all of the new content is durable, a durable
//! record leads to a durable copy of the old content. Only a reader without the lock, or a recovery, may find the
//! target half written. The record is removed, durably, before the copy, and neither is removed by others while the
//! writer lives.
//!
//! The record is a symlink that leads nowhere, because a symlink can be created and removed in one step. Its text names
//! the copied file, and has marks to recognise both files: if a mount is absent during a recovery, the recovery must
//! not write the old content into the empty file below it and remove the only copy.

use std::ffi::{OsStr, OsString};
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::commit::{CHUNK_BYTES, Gate};
use crate::error::resolved_error;
use crate::names::{self, is_name, is_reserved};
use crate::platform::{self, Dir, Entry, Identity, Kind};
use crate::{Error, InPlace, WriteOptions};

/// How many names to try. A second one is needed only if a recovery took the copy before it could be locked.
const NAME_ATTEMPTS: usize = 32;
/// How long to wait for the lock of a target. Another writer in place, a recovery or a reader may hold it.
const TARGET_PATIENCE: Duration = Duration::from_secs(5);
/// How often to try for the lock, and check the gate, meanwhile.
const PAUSE: Duration = Duration::from_millis(2);

/// Whether to write in place after a rename has failed in this way.
pub(crate) fn is_wanted(options: WriteOptions, failure: &io::Error) -> bool {
    let is_fixed = matches!(failure.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::CrossesDevices);
    is_fixed && options.in_place == InPlace::WithBackup && !options.create_new
}

/// A target that stays the same file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fixed<'a> {
    /// The path as given, for errors.
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
    /// Everything is synced, whatever durability was requested: without that the copy would be useless.
    pub(crate) fn write(&self, new: &File, length: u64, mode: Option<u32>, gate: &Gate) -> Result<(), Error> {
        // This is dropped last, so that the next writer finds neither record nor copy.
        let file = self.lock(gate)?;
        self.refuse_unrecovered(&file.0)?;
        let old = Entry::of(&file.0).map_err(self.failed("look at"))?;
        let mode = mode.filter(|mode| *mode != old.mode);
        let mut backup = Backup::take(self, old.size, mode.map(|_| old.mode))?;
        backup.fill(self, &file.0, gate)?;
        if mode.is_some() {
            // This changes nothing, but fails if the process may not set the mode: better now than half-way.
            platform::set_mode(&file.0, old.mode).map_err(self.failed("set the mode of"))?;
        }
        let mut reserved = Reserved::new(&file.0, old.size, length).map_err(self.failed("reserve space for"))?;
        backup.record(self, &file.0)?;
        let Some(passage) = gate.enter() else { return Err(self.interrupted()) };
        // From here on, a panic too leaves the target to a recovery.
        backup.is_needed = true;
        reserved.is_used = true;
        let written = fill(&file.0, new, length, mode);
        // Once the record is gone, nothing undoes the write any more. A drop of the future waits until here.
        match written.and_then(|()| remove(self.dir, &backup.record)) {
            Ok(()) => {
                passage.done();
                // Until the removal is durable, a power cut may bring the record back, and with it the old content.
                let synced = self.dir.sync();
                synced.map_err(|source| Error::NotDurable { path: self.path.to_path_buf(), source })?;
                (backup.is_recorded, backup.is_needed) = (false, false);
                Ok(())
            }
            // A failed sync is not retried: all of the old content is written again before the next sync.
            Err(error) => match backup.put_back(&file.0) {
                Ok(()) => {
                    backup.is_needed = false;
                    // Before the passage is dropped, so that a caller that waits for it finds everything as it was.
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

    /// Opens the target and locks it against other writers in place, including those that use another name for it.
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

    /// Refuses a target that a crash left half written, because that is not the old content. Under the lock, no live
    /// writer has a record.
    fn refuse_unrecovered(&self, file: &File) -> Result<(), Error> {
        let mark = Identity::of(file).map_err(self.failed("look at"))?.mark();
        for name in self.dir.list().map_err(self.failed("look for unfinished writes beside"))? {
            // The target has this name, or another one if the same file is mounted twice.
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

    /// Makes the error of a call that tried to `action` the target.
    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> Error {
        resolved_error(action, self.path, self.resolved)
    }
}

/// Reserved space for content that is longer than the file. What is not used is given back.
struct Reserved<'a> {
    file: &'a File,
    old_length: u64,
    is_used: bool,
}

impl<'a> Reserved<'a> {
    /// Reserves the space, so that a full disk is noticed before anything is overwritten. If the file system cannot
    /// reserve space, the copy alone protects the old content.
    fn new(file: &'a File, old_length: u64, length: u64) -> io::Result<Self> {
        let reserved = Self { file, old_length, is_used: length <= old_length };
        platform::reserve(file, length)?;
        Ok(reserved)
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if !self.is_used {
            // Cutting the file where it ends frees the space beyond.
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
    /// The mode of the old content, if the write sets another one.
    mode: Option<u32>,
    is_recorded: bool,
    /// Whether the old content exists only here, or may do so after a power cut. If not, copy and record are removed
    /// when this is dropped.
    is_needed: bool,
}

impl<'a> Backup<'a> {
    /// Creates and locks an empty copy that only its writer may read.
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
                // A recovery came between creation and lock, and took the copy for litter.
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
        // Before the record exists, so that a power cut never leaves a record without a copy.
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
        // Even if the call failed, because it may have taken effect.
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
        // Explicitly, as for the target.
        let _closed_anyway = self.copy.unlock();
    }
}

/// The content of a record: `<mark of the copy>,<mark of the target>,<mode>/<name of the target>`. The mode is `-` if
/// it is not to be restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// The marks by which the copy and the target are recognised, in this order.
    pub(crate) marks: [String; 2],
    pub(crate) mode: Option<u32>,
    pub(crate) name: OsString,
}

impl Record {
    pub(crate) fn encode(&self) -> PathBuf {
        let [copy, target] = &self.marks;
        let mode = self.mode.map_or("-".to_owned(), |mode| format!("{mode:o}"));
        let head = format!("{copy},{target},{mode}/");
        OsString::from_vec([head.as_bytes(), self.name.as_bytes()].concat()).into()
    }

    /// `None` if it says anything else; in particular, if it leads out of its directory.
    fn decode(link: &Path) -> Option<Self> {
        let bytes = link.as_os_str().as_bytes();
        let (head, name) = bytes.split_at_checked(bytes.iter().position(|&byte| byte == b'/')?)?;
        let name = OsStr::from_bytes(&name[1..]);
        if !is_name(name) || is_reserved(name) {
            return None;
        }
        let [copy, target, mode] = std::str::from_utf8(head).ok()?.split(',').collect::<Vec<_>>()[..] else {
            return None;
        };
        let mode = match mode {
            "-" => None,
            mode => Some(u32::from_str_radix(mode, 8).ok().filter(|mode| *mode <= 0o7777)?),
        };
        Some(Self { marks: [copy.to_owned(), target.to_owned()], mode, name: name.to_owned() })
    }

    /// Reads the record `name`; `None` if it is no record.
    pub(crate) fn read(dir: &Dir, name: &OsStr) -> io::Result<Option<Self>> {
        Ok(Self::decode(&dir.read_link(name)?))
    }

    /// Whether these are the files that the record names: both are the same as before, or both were copied. If only the
    /// target differs, it was replaced since, or is the file below an absent mount.
    pub(crate) fn is_of(&self, copy: &File, target: &File) -> io::Result<bool> {
        let marks = [Identity::of(copy)?.mark(), Identity::of(target)?.mark()];
        let [is_copy, is_target] = [0, 1].map(|end| marks[end] == self.marks[end]);
        Ok(is_copy == is_target)
    }
}

pub(crate) fn torn(path: &Path, backup: PathBuf, source: io::Error) -> Error {
    Error::Torn { path: path.to_path_buf(), backup, source }
}

/// A target whose lock is held. It is unlocked explicitly, because a process that another thread is just starting may
/// have a copy of the descriptor, and would keep the lock for a moment.
#[derive(Debug)]
pub(crate) struct Locked(pub(crate) File);

impl Locked {
    /// Waits on this thread of the blocking pool. That cannot deadlock: the holder of the lock already has the thread
    /// that it needs.
    pub(crate) fn wait(file: File, path: &Path, gate: &Gate) -> Result<Self, Error> {
        let begun = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self(file)),
                Err(TryLockError::WouldBlock) if gate.is_cancelled() || gate.is_late() => {
                    return Err(Error::Interrupted { path: path.to_path_buf() });
                }
                Err(TryLockError::WouldBlock) if begun.elapsed() >= TARGET_PATIENCE => {
                    return Err(Error::FileBusy { path: path.to_path_buf(), waited: TARGET_PATIENCE });
                }
                Err(TryLockError::WouldBlock) => std::thread::park_timeout(PAUSE),
                // Without locks, two writers would mix their content, and each would take the other's half for the old
                // content.
                Err(TryLockError::Error(source)) => {
                    let (path, action) = (path.to_path_buf(), "lock");
                    return Err(Error::Io { action, path, resolved: None, source });
                }
            }
        }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        let _closed_anyway = self.0.unlock();
    }
}

/// Removes the record, if there is one, and then the copy, but only after the record's removal is durable, because a
/// record without a copy could not be recovered.
pub(crate) fn remove_both(dir: &Dir, record: Option<&OsString>, copy: &OsStr) -> io::Result<()> {
    if let Some(record) = record {
        remove(dir, record)?;
        dir.sync()?;
    }
    remove(dir, copy)
}

/// Removes a file, if it is there.
pub(crate) fn remove(dir: &Dir, name: &OsStr) -> io::Result<()> {
    match dir.remove(name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Whether `name` still names the open file.
pub(crate) fn is_at(dir: &Dir, name: &OsStr, file: &File) -> io::Result<bool> {
    let opened = Entry::of(file)?;
    Ok(dir.look(name)?.is_some_and(|now| now.kind == Kind::File && now.id == opened.id))
}

/// Makes the content of `from` the whole content of `file`, durably, with this mode if one is given. Meanwhile the file
/// grants no more access than before, and no more than after.
pub(crate) fn fill(file: &File, from: &File, length: u64, mode: Option<u32>) -> io::Result<()> {
    if let Some(mode) = mode {
        let now = Entry::of(file)?.mode;
        if now & mode != now {
            platform::set_mode(file, now & mode)?;
            // A power cut must not leave content with a mode that never belonged to it, so neither may overtake the
            // other.
            file.sync_all()?;
        }
    }
    copy(from, file, length, || false)?;
    file.set_len(length)?;
    // Without a given mode, the mode stays: the file may have been made private meanwhile.
    if let Some(mode) = mode {
        file.sync_all()?;
        platform::set_mode(file, mode)?;
    }
    file.sync_all()
}

/// Copies the first `length` bytes; `false` if it was cancelled.
pub(crate) fn copy(from: &File, to: &File, length: u64, is_cancelled: impl Fn() -> bool) -> io::Result<bool> {
    let mut buffer = vec![0; usize::try_from(length).unwrap_or(usize::MAX).min(CHUNK_BYTES)];
    let mut at = 0;
    while at < length {
        if is_cancelled() {
            return Ok(false);
        }
        let wanted = usize::try_from(length - at).unwrap_or(usize::MAX).min(buffer.len());
        let taken = match from.read_at(&mut buffer[..wanted], at) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        to.write_all_at(&buffer[..taken], at)?;
        at += taken as u64;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_says_what_it_was_told_and_leads_nowhere_else() {
        let name = OsString::from_vec([b"\xff,".as_slice(), &[b'n'; 253]].concat());
        for mode in [Some(0o4751), None] {
            let record = Record { marks: ["1.-2.3".into(), "4".into()], mode, name: name.clone() };
            assert_eq!(Record::decode(&record.encode()), Some(record));
        }
        for other in
            ["", "file", "/etc/passwd", "../file", "1,2,644/", "1,2,644/..", "1,2,644/.", "1,2,644/a/b", "1,2,644//a"]
        {
            assert_eq!(Record::decode(other.as_ref()), None, "{other}");
        }
        for other in ["1,2,644/a/", "1,2,644/.afs-journal", "1,2,10000/a", "1,2,a/a", "1,2/a", "1,2,3,4/a", "1,2,-1/a"]
        {
            assert_eq!(Record::decode(other.as_ref()), None, "{other}");
        }
    }
}
