//! A file that no rename can replace, written in place, with a copy of its old content beside it.
//!
//! Invariant: from before the first byte of the target changes until all of the new content is durable, a durable record
//! leads to a durable copy of the old content; and the record goes durably before the copy goes. A reader may find the
//! target half written; nobody else does.
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

use crate::commit::Gate;
use crate::platform::{self, Dir, Entry, Identity, Kind};
use crate::{Error, InPlace, WriteOptions};

/// What the name of a record begins with; 16 hexadecimal digits follow.
const PREFIX: &str = ".afs-place-";
const DIGITS: usize = 16;
/// What the name of the copy has beyond that of its record.
const COPY_SUFFIX: &str = "-old";
/// What no target's name begins with, in no record either.
const RESERVED_PREFIX: &str = ".afs-";
/// How many names are tried. A second one is needed only if a recovery took the copy before it could be locked.
const NAME_ATTEMPTS: usize = 32;
/// How long the lock of a target is waited for, which another writer in place, a recovery or a reader may hold.
const TARGET_PATIENCE: Duration = Duration::from_secs(5);
/// How often it is tried for meanwhile, and the gate looked at.
const PAUSE: Duration = Duration::from_millis(2);
/// How much is copied between two looks at the gate.
const CHUNK_BYTES: usize = 1 << 20;

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
        self.refuse_unrecovered()?;
        let old = Entry::of(&file.0).map_err(self.failed("look at"))?;
        let mut backup = Backup::take(self, &old)?;
        backup.fill(self, &file.0, gate)?;
        if mode.is_some_and(|mode| mode != old.mode) {
            // It changes nothing, but fails for whoever may not set the mode: better now than half way.
            platform::set_mode(&file.0, old.mode).map_err(self.failed("set the mode of"))?;
        }
        let mut reserved = Reserved::new(&file.0, old.size, length).map_err(self.failed("reserve space for"))?;
        backup.record(self, &file.0)?;
        let Some(passage) = gate.enter() else { return Err(self.interrupted()) };
        // From here on a panic too leaves the target to a recovery.
        backup.is_needed = true;
        reserved.is_used = true;
        let written = fill(&file.0, new, length, mode.unwrap_or(old.mode));
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
    fn refuse_unrecovered(&self) -> Result<(), Error> {
        for name in self.dir.list().map_err(self.failed("look for unfinished writes beside"))? {
            let is_ours = |record: Record| record.name == self.name;
            if Names::of_record(&name).is_some() && Record::read(self.dir, &name).is_ok_and(|r| r.is_some_and(is_ours))
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

fn torn(path: &Path, backup: PathBuf, source: io::Error) -> Error {
    Error::Torn { path: path.to_path_buf(), backup, source }
}

/// A target whose lock is held. It is given back by hand, because a process that is just being started by another thread
/// has a copy of the descriptor, and would keep the lock for a moment.
#[derive(Debug)]
struct Locked(File);

impl Locked {
    /// Waits on this thread of the blocking pool: whoever holds the lock already has the thread that it needs.
    fn wait(file: File, path: &Path, gate: &Gate) -> Result<Self, Error> {
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
    mode: u32,
    is_recorded: bool,
    /// Whether the old content is nowhere else, or may be after a power cut. If not, both go when this is dropped.
    is_needed: bool,
}

impl<'a> Backup<'a> {
    /// Creates and locks an empty copy, which nobody may read but who writes it.
    fn take(target: &Fixed<'a>, old: &Entry) -> Result<Self, Error> {
        let failed = || target.failed("create a backup beside");
        for _ in 0..NAME_ATTEMPTS {
            let Names { record, copy: copy_name } = Names::new(&format!("{:0DIGITS$x}", fastrand::u64(..)));
            let copy = match target.dir.create(&copy_name, 0o600) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                other => other.map_err(failed())?,
            };
            let (length, mode) = (old.size, old.mode);
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

/// Removes the record, if there is one, and then the copy: only once the record is gone for ever, because one without a
/// copy could not be recovered.
fn remove_both(dir: &Dir, record: Option<&OsString>, copy: &OsStr) -> io::Result<()> {
    if let Some(record) = record {
        remove(dir, record)?;
        dir.sync()?;
    }
    remove(dir, copy)
}

/// Removes a file, if it is there.
fn remove(dir: &Dir, name: &OsStr) -> io::Result<()> {
    match dir.remove(name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Whether `name` is still that of the open file.
fn is_at(dir: &Dir, name: &OsStr, file: &File) -> io::Result<bool> {
    let opened = Entry::of(file)?;
    Ok(dir.look(name)?.is_some_and(|now| now.kind == Kind::File && now.id == opened.id))
}

/// Makes `from` all of what is in `file`, with this mode, durably. Meanwhile it grants no more than before, nor than after.
fn fill(file: &File, from: &File, length: u64, mode: u32) -> io::Result<()> {
    let now = Entry::of(file)?.mode;
    if now & mode != now {
        platform::set_mode(file, now & mode)?;
    }
    copy(from, file, length, || false)?;
    file.set_len(length)?;
    // A write by who is not privileged has cleared the set-ID bits as well, and only the owner can set them again.
    if Entry::of(file)?.mode != mode {
        match platform::set_mode(file, mode) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            other => other?,
        }
    }
    file.sync_all()
}

/// Copies the first `length` bytes; `false` if it was cancelled.
fn copy(from: &File, to: &File, length: u64, is_cancelled: impl Fn() -> bool) -> io::Result<bool> {
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

/// The two names of one backup.
#[derive(Debug, PartialEq, Eq)]
struct Names {
    record: OsString,
    copy: OsString,
}

impl Names {
    fn new(id: &str) -> Self {
        let record = format!("{PREFIX}{id}");
        Self { copy: format!("{record}{COPY_SUFFIX}").into(), record: record.into() }
    }

    fn of_record(name: &OsStr) -> Option<Self> {
        let id = name.to_str()?.strip_prefix(PREFIX)?;
        (id.len() == DIGITS && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))).then(|| Self::new(id))
    }

    fn of_copy(name: &OsStr) -> Option<Self> {
        Self::of_record(name.to_str()?.strip_suffix(COPY_SUFFIX)?.as_ref())
    }
}

/// What a record says: `<mark of the copy>,<mark of the target>,<mode>/<name of the target>`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Record {
    /// By what the copy and the target are known, in this order.
    marks: [String; 2],
    mode: u32,
    name: OsString,
}

impl Record {
    fn encode(&self) -> PathBuf {
        let [copy, target] = &self.marks;
        let head = format!("{copy},{target},{:o}/", self.mode);
        OsString::from_vec([head.as_bytes(), self.name.as_bytes()].concat()).into()
    }

    /// `None` if it says anything else; above all, if it leads out of its directory.
    fn decode(link: &Path) -> Option<Self> {
        let bytes = link.as_os_str().as_bytes();
        let (head, name) = bytes.split_at_checked(bytes.iter().position(|&byte| byte == b'/')?)?;
        let name = OsStr::from_bytes(&name[1..]);
        let is_plain = Path::new(name).file_name() == Some(name) && !name.as_bytes().contains(&b'/');
        if !is_plain || name.as_bytes().starts_with(RESERVED_PREFIX.as_bytes()) {
            return None;
        }
        let [copy, target, mode] = std::str::from_utf8(head).ok()?.split(',').collect::<Vec<_>>()[..] else {
            return None;
        };
        let mode = u32::from_str_radix(mode, 8).ok().filter(|mode| *mode <= 0o7777)?;
        Some(Self { marks: [copy.to_owned(), target.to_owned()], mode, name: name.to_owned() })
    }

    /// Reads the record `name`; `None` if it is no record.
    fn read(dir: &Dir, name: &OsStr) -> io::Result<Option<Self>> {
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
    for names in names.iter().filter_map(|name| Names::of_record(name)) {
        match (Dead { dir, path, names: &names }).restore(gate) {
            Ok(Fate::Done) => found.restored += 1,
            Ok(Fate::Live) => found.live += 1,
            Ok(Fate::Vanished) => {}
            Err(error @ Error::Interrupted { .. }) => return Err(error),
            Err(error) => drop(refused.get_or_insert(error)),
        }
    }
    for names in names.iter().filter_map(|name| Names::of_copy(name)) {
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
fn remove_litter(dir: &Dir, names: &Names) -> io::Result<Fate> {
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
    names: &'a Names,
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
    fn a_recovery_knows_our_names_and_no_others() {
        let names = Names::of_record(".afs-place-0123456789abcdef".as_ref()).unwrap();
        assert_eq!(names.copy, ".afs-place-0123456789abcdef-old");
        assert_eq!(Names::of_copy(&names.copy), Some(names));
        for other in [".afs-place-", ".afs-place-0123456789ABCDEF", ".afs-place-0123456789abcdef-old", ".afs-tx-0", ""]
        {
            assert_eq!(Names::of_record(other.as_ref()), None, "{other}");
        }
        assert_eq!(Names::of_copy(".afs-place-0123456789abcdef".as_ref()), None);
    }

    #[test]
    fn a_record_says_what_it_was_told_and_leads_nowhere_else() {
        let name = OsString::from_vec([b"\xff,".as_slice(), &[b'n'; 253]].concat());
        let record = Record { marks: ["1.-2.3".into(), "4".into()], mode: 0o4751, name };
        assert_eq!(Record::decode(&record.encode()), Some(record));
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
