//! The old content of a file that is written in place: how it lies beside that, and how it is put back.
//!
//! Invariant: the record goes, durably, before the copy goes, and neither while its writer lives. What cannot be told to
//! belong to a target is not put back there.
//!
//! The record is a symlink that leads nowhere, since it can be made and removed in one step. Its text says which file the
//! copy is of, and by what both are known: a mount that is absent when it comes to a recovery must not have the old content
//! written into the empty file below it, and the only copy removed.

use std::ffi::{OsStr, OsString};
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::Error;
use crate::commit::Gate;
use crate::names::{self, is_name, is_reserved};
use crate::platform::{self, Dir, Entry, Identity, Kind};

/// How long the lock of a target is waited for, which another writer in place, a recovery or a reader may hold.
const TARGET_PATIENCE: Duration = Duration::from_secs(5);
/// How often it is tried for meanwhile, and the gate looked at.
const PAUSE: Duration = Duration::from_millis(2);
/// How much is copied between two looks at the gate.
const CHUNK_BYTES: usize = 1 << 20;

/// What a record says: `<mark of the copy>,<mark of the target>,<mode>/<name of the target>`. The mode is `-` if that is
/// not to be put back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// By what the copy and the target are known, in this order.
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

    /// `None` if it says anything else; above all, if it leads out of its directory.
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

    /// Whether these are the files that it speaks of: both are what they were, or both were copied. If only the target is
    /// another one, it was replaced since, or is the one below a mount that is absent.
    fn is_of(&self, copy: &File, target: &File) -> io::Result<bool> {
        let marks = [Identity::of(copy)?.mark(), Identity::of(target)?.mark()];
        let [is_copy, is_target] = [0, 1].map(|end| marks[end] == self.marks[end]);
        Ok(is_copy == is_target)
    }
}

pub(crate) fn torn(path: &Path, backup: PathBuf, source: io::Error) -> Error {
    Error::Torn { path: path.to_path_buf(), backup, source }
}

/// A target whose lock is held. It is given back by hand, because a process that is just being started by another thread
/// has a copy of the descriptor, and would keep the lock for a moment.
#[derive(Debug)]
pub(crate) struct Locked(pub(crate) File);

impl Locked {
    /// Waits on this thread of the blocking pool: whoever holds the lock already has the thread that it needs.
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
                // Without locks two writers would mix, and each take the other's half for the old content.
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

/// Removes the record, if there is one, and then the copy: only once the record is gone for ever, because one without a
/// copy could not be recovered.
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

/// Whether `name` is still that of the open file.
pub(crate) fn is_at(dir: &Dir, name: &OsStr, file: &File) -> io::Result<bool> {
    let opened = Entry::of(file)?;
    Ok(dir.look(name)?.is_some_and(|now| now.kind == Kind::File && now.id == opened.id))
}

/// Makes `from` all of what is in `file`, durably, with this mode if there is one. Meanwhile the file grants no more than
/// before, nor than after.
pub(crate) fn fill(file: &File, from: &File, length: u64, mode: Option<u32>) -> io::Result<()> {
    if let Some(mode) = mode {
        let now = Entry::of(file)?.mode;
        if now & mode != now {
            platform::set_mode(file, now & mode)?;
            // A power cut must not leave content with a mode that was never its own, so neither overtakes the other.
            file.sync_all()?;
        }
    }
    copy(from, file, length, || false)?;
    file.set_len(length)?;
    // Without one it is left alone: somebody may have made the file private meanwhile.
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

/// What a recovery found of writes in place.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Found {
    /// Targets whose old content was put back.
    pub(crate) restored: usize,
    /// Copies that nothing led to.
    pub(crate) removed: usize,
    /// Writers that live.
    pub(crate) live: usize,
}

impl Found {
    pub(crate) fn and(self, other: Self) -> Self {
        let Self { restored, removed, live } = other;
        Self { restored: self.restored + restored, removed: self.removed + removed, live: self.live.max(live) }
    }
}

/// What became of one record or copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Done,
    Live,
    /// Its writer has just ended, or it was none.
    Vanished,
}

/// Puts back what writers that are dead have left half written in `dir`, and removes the copies that nothing leads to.
///
/// One that is refused does not keep the others from being put back; it is told afterwards. Each passes the gate by itself.
pub(crate) fn recover(dir: &Dir, path: &Path, gate: &Gate) -> Result<Found, Error> {
    let failed = |source| Error::Io { action: "recover", path: path.to_path_buf(), resolved: None, source };
    let (mut found, mut refused) = (Found::default(), None);
    let names = dir.list().map_err(failed)?;
    for names in names.iter().filter_map(|name| names::Backup::of_record(name)) {
        match (Dead { dir, path, names: &names }).restore(gate) {
            Ok(Fate::Done) => found.restored += 1,
            Ok(Fate::Live) => found.live += 1,
            Ok(Fate::Vanished) => {}
            Err(error @ Error::Interrupted { .. }) => return Err(error),
            Err(error) => drop(refused.get_or_insert(error)),
        }
    }
    for names in names.iter().filter_map(|name| names::Backup::of_copy(name)) {
        let Some(_passage) = gate.enter() else { return Err(Error::Interrupted { path: path.to_path_buf() }) };
        match remove_litter(dir, &names).map_err(failed)? {
            Fate::Done => found.removed += 1,
            Fate::Live => found.live += 1,
            Fate::Vanished => {}
        }
    }
    refused.map_or(Ok(found), Err)
}

/// Opens the copy and takes its lock; if that is not to be had, what that means.
fn open_dead(dir: &Dir, copy: &OsStr) -> io::Result<Result<File, Fate>> {
    let file = match dir.read(copy) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Err(Fate::Vanished)),
        // Somebody else's; what we may not read we leave to them.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(Err(Fate::Live)),
        other => other?,
    };
    match file.try_lock() {
        Ok(()) if is_at(dir, copy, &file)? => Ok(Ok(file)),
        Ok(()) => Ok(Err(Fate::Vanished)),
        Err(TryLockError::WouldBlock) => Ok(Err(Fate::Live)),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Removes a copy that no record leads to. One that has a record is for [`Dead::restore`].
fn remove_litter(dir: &Dir, names: &names::Backup) -> io::Result<Fate> {
    if dir.look(&names.record)?.is_some() || !matches!(dir.look(&names.copy)?, Some(Entry { kind: Kind::File, .. })) {
        return Ok(Fate::Vanished);
    }
    let _lock = match open_dead(dir, &names.copy)? {
        Ok(lock) => lock,
        Err(fate) => return Ok(fate),
    };
    // Its writer may have made the record, and died, since that was looked for.
    if dir.look(&names.record)?.is_some() {
        return Ok(Fate::Vanished);
    }
    remove(dir, &names.copy).map(|()| Fate::Done)
}

/// A record whose writer may be dead.
struct Dead<'a> {
    dir: &'a Dir,
    path: &'a Path,
    names: &'a names::Backup,
}

impl Dead<'_> {
    /// Puts the old content back. Interrupted at any moment, it can be done again.
    fn restore(&self, gate: &Gate) -> Result<Fate, Error> {
        let Self { dir, names, .. } = self;
        let Some(Entry { kind: Kind::Symlink, .. }) = dir.look(&names.record).map_err(self.failed("look at"))? else {
            return Ok(Fate::Vanished);
        };
        let record = match Record::read(dir, &names.record) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Fate::Vanished),
            other => other.map_err(self.failed("read the record"))?,
        };
        let copy = match dir.look(&names.copy).map_err(self.failed("look at the backup of"))? {
            Some(Entry { kind: Kind::File, .. }) => open_dead(dir, &names.copy),
            None => Ok(Err(Fate::Vanished)),
            Some(_) => return Err(self.refused("its backup is no regular file")),
        };
        let copy = match copy.map_err(self.failed("lock the backup of"))? {
            Ok(copy) => copy,
            Err(Fate::Vanished) if self.is_there()? => return Err(self.refused("its backup is missing")),
            Err(fate) => return Ok(fate),
        };
        // Its writer may have ended since, and taken the record with it.
        if !self.is_there()? {
            return Ok(Fate::Vanished);
        }
        let Some(record) = record else { return Err(self.refused("it does not say what the backup is of")) };
        self.put_back(&record, &copy, gate)?;
        Ok(Fate::Done)
    }

    fn put_back(&self, record: &Record, copy: &File, gate: &Gate) -> Result<(), Error> {
        let Self { dir, path, names } = self;
        let target = path.join(&record.name);
        let failed = |action| {
            let path = target.clone();
            move |source| Error::Io { action, path, resolved: None, source }
        };
        match dir.look(&record.name).map_err(failed("look at"))?.map(|entry| entry.kind) {
            Some(Kind::File) => {}
            Some(_) => return Err(self.refused("what the backup is of is no regular file any more")),
            None => return Err(self.refused("the file that the backup is of is gone")),
        }
        let file = dir.update(&record.name).map_err(failed("open"))?;
        let file = Locked::wait(file, &target, gate)?;
        let is_known = is_at(dir, &record.name, &file.0)
            .and_then(|is_there| Ok(is_there && record.is_of(copy, &file.0)?))
            .map_err(failed("look at"))?;
        if !is_known {
            return Err(
                self.refused("another file is now where the one was that the backup is of, or its mount is absent")
            );
        }
        let length = Entry::of(copy).map_err(failed("look at the backup of"))?.size;
        let Some(_passage) = gate.enter() else { return Err(Error::Interrupted { path: path.to_path_buf() }) };
        fill(&file.0, copy, length, record.mode).map_err(|source| torn(&target, path.join(&names.copy), source))?;
        remove_both(dir, Some(&names.record), &names.copy).map_err(failed("remove the backup of"))
    }

    fn is_there(&self) -> Result<bool, Error> {
        let entry = self.dir.look(&self.names.record).map_err(self.failed("look at"))?;
        Ok(entry.is_some_and(|entry| entry.kind == Kind::Symlink))
    }

    fn refused(&self, reason: &'static str) -> Error {
        let [record, backup] = [&self.names.record, &self.names.copy].map(|name| self.path.join(name));
        Error::UnusableBackup { record, backup, reason }
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> Error + use<> {
        let path = self.path.join(&self.names.record);
        move |source| Error::Io { action, path, resolved: None, source }
    }
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
