//! Recovery of transactions and writes in place that a killed process left behind.
//!
//! Invariant: a transaction is finished as a whole or undone as a whole, or nothing is touched; old content is put back
//! only if it provably belongs to the target; and nothing that belongs to a live process is removed.

use std::ffi::{OsStr, OsString};
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chain::{Chain, Site, Spot, Trust};
use crate::commit::{Gate, current_runtime};
use crate::error::io_error;
use crate::in_place::{Locked, Record, fill, is_at, remove_both, torn};
use crate::journal::{self, Pointer, elsewhere};
use crate::lock::{self, Locking, Locks, Share, with_locks};
use crate::names::{self, POINTER, PREPARED, Tag, directory, is_lock, is_reserved, is_temp};
use crate::platform::{Dir, Entry, Kind};
use crate::staging::foreign_sites;
use crate::{Error, apply};

/// What a [`recover`] call found and did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecoveryReport {
    /// Committed transactions that are now finished: all of their files are new.
    pub rolled_forward: usize,
    /// Transactions that were prepared but not committed, or were being undone: all of their files are old.
    pub rolled_back: usize,
    /// Files that uncommitted transactions had staged or noted, and copies that writes in place no longer need; they
    /// were removed.
    pub removed: usize,
    /// Live transactions that are not yet committed, and live writes in place; they were left alone.
    pub live: usize,
    /// Files that were being [written in place](crate::InPlace); their old content was put back.
    pub restored: usize,
}

/// How often a recovery starts over because it finds another journal than the one for which it locked directories.
const LOCK_ATTEMPTS: usize = 8;

/// Finishes or undoes the transaction that a crash left in the directory `dir`. It also puts back the old content of
/// files that were being [written in place](crate::InPlace) there, and removes what other dead transactions had staged.
///
/// `dir` is where the journal is: the directory of a transaction's first target, or the one that it began with. Call it
/// when a program starts, before it writes to these files. A recovery rolls a transaction forward if its journal was
/// committed, and back if it was being undone; afterwards its files are all new or all old. If there is nothing to do,
/// it changes nothing. So you may call it at any time, again, and from several processes; the next recovery also
/// handles a crash during a recovery. It does not disturb live transactions, and waits for one that is committing.
///
/// `dir` may also be any other directory where the transaction was to change files: it leads to the journal.
///
/// It recognises files by their inode and birth time; in a copied or restored tree by size and time, and then it
/// touches only the copy. A renamed file may be written to meanwhile, as a log is. If another program has replaced a
/// file that was already exchanged, that is the last write, and it stays.
///
/// A journal says which files to exchange, in any directory. So recover only directories where everybody with write
/// permission may be trusted with all files that you can write to.
///
/// # Cancel safety
///
/// This method is cancel safe. If dropped before completion, the recovery has been done or has not begun; if it has
/// begun, the drop waits for it. This applies separately to the transaction and to each file that was being written in
/// place.
///
/// # Errors
///
/// - A journal that [cannot be read](Error::CorruptJournal), a target that is [neither old nor
///   new](Error::UnknownFile), or a directory that [is not where it was](Error::Misplaced). Then nothing of the
///   transaction was touched ([`Error::is_refused`]), and the message says how to repair it by hand.
/// - A backup of a file that was being written in place [that may not belong there](Error::UnusableBackup), or that a
///   failing disk [keeps from being put back](Error::Torn). Everything else has then been recovered.
/// - The directory is missing or [busy](Error::is_busy).
/// - After any other error call it again. If the disk failed after the recovery had begun, that is
///   [`Error::Undecided`].
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
pub async fn recover(dir: impl AsRef<Path>) -> Result<RecoveryReport, Error> {
    let mut path = Arc::<Path>::from(directory(dir.as_ref()));
    let runtime = current_runtime(&path)?;
    let mut placed = Ok(Found::default());
    for _ in 0..LOCK_ATTEMPTS {
        let target = path.clone();
        let prepare = move |_: &Gate| Recovering::new(&target);
        let (found, recovered) = with_locks(&runtime, &Gate::new(), &path, prepare, Recovering::finish).await?;
        placed = placed.and_then(|before| Ok(before.and(found?)));
        match recovered {
            Recovered::Done(report) => {
                let Found { restored, removed, live } = placed?;
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
struct Recovering {
    home: Arc<Site>,
    /// The directories to lock; none if there is nothing to recover.
    sites: Vec<Arc<Site>>,
}

/// The outcome of recovering one directory.
enum Recovered {
    Done(RecoveryReport),
    /// This directory takes part in a transaction that is unfinished there.
    Elsewhere(PathBuf),
    /// There is now another journal, which names other directories.
    Again,
}

impl Recovering {
    fn new(path: &Path) -> Result<(Self, Locking), Error> {
        let home = Arc::new(Site::open(path)?);
        let names = home.dir.list().map_err(io_error("list", path))?;
        if !names.iter().any(|name| is_reserved(name) && !is_temp(name) && !is_lock(name)) {
            // There is nothing to do, and that needs no write permission.
            lock::remove_dead(&home);
            let locking = Locking::new([], Share::Nobody, lock::LOCK_PATIENCE);
            return Ok((Self { home, sites: Vec::new() }, locking));
        }
        // Only to learn which directories to lock: a journal read without a lock may belong to a live transaction.
        let foreseen = find(&home).ok().flatten().map(|left| left.chains).unwrap_or_default();
        let spots = foreseen.iter().flat_map(Chain::spots).map(|spot| spot.site.clone());
        let sites: Vec<_> = spots.chain([home.clone()]).collect();
        let locking = Locking::new(&sites, Share::Nobody, lock::LOCK_PATIENCE);
        Ok((Self { home, sites }, locking))
    }

    /// The result for writes in place is separate, because they have nothing to do with the transaction.
    fn finish(self, _locks: Locks, gate: &Gate) -> Result<(Result<Found, Error>, Recovered), Error> {
        if self.sites.is_empty() {
            return Ok((Ok(Found::default()), Recovered::Done(RecoveryReport::default())));
        }
        let placed = recover_in_place(&self.home.dir, &self.home.path, gate);
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
struct Left {
    name: &'static str,
    chains: Vec<Chain>,
    trust: Trust,
}

fn find(home: &Arc<Site>) -> Result<Option<Left>, Error> {
    let Some(journal::Found { name, record, trust }) = journal::find(home)? else { return Ok(None) };
    Ok(Some(Left { name, chains: apply::reopen(home, name, record)?, trust }))
}

fn recover_locked(home: &Site, left: Option<Left>, gate: &Gate) -> Result<RecoveryReport, Error> {
    let mut report = RecoveryReport::default();
    let Some(passage) = gate.enter() else { return Err(Error::Interrupted { path: home.path.clone() }) };
    // Once a target may have been touched, an error must not claim that all are unchanged.
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
        removed.and_then(|()| remove_litter(home)).map_err(io_error("clean up", &home.path))
    });
    let litter = cleaned.map_err(|error| if has_journal { undecided(error) } else { error })?;
    (report.removed, report.live) = (litter.removed, litter.live);
    passage.done();
    Ok(report)
}

/// What recoveries removed of transactions that were never committed.
#[derive(Debug, Default)]
struct Litter {
    removed: usize,
    /// Transactions that are still being staged.
    live: usize,
}

/// Removes what dead transactions staged from `home`, and from the directories to which its notes lead.
///
/// Only under the lock of `home`, and only if it has no journal: after a commit these files are the data.
fn remove_litter(home: &Site) -> io::Result<Litter> {
    let names = home.dir.list()?;
    let mut litter = Litter::default();
    let mut notes = Vec::new();
    for name in &names {
        let Some(tag) = Tag::of_note(name) else { continue };
        match Note::open(home, name) {
            Ok(Some(Note::Dead(note))) => notes.push((tag, name, note)),
            Ok(Some(Note::Live)) => litter.live += 1,
            // Something that is not a file is not ours, whatever its name; or its transaction has just ended.
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Another user's: what we may not read, we leave to its owner.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => litter.live += 1,
            Err(error) => return Err(error),
        }
    }
    for (tag, _, note) in &notes {
        let Some(note) = note else { continue };
        for foreign in foreign_sites(note)? {
            let Some(site) = foreign.open(note, home).map(Arc::new) else { continue };
            let names = site.dir.list()?;
            litter.removed += remove_where(&site.dir, &names, |found, rest| found == *tag && !rest.is_empty())?;
            litter.removed += usize::from(remove_stale_pointer(&site, *tag)?);
            litter.removed += remove_where(&site.dir, &names, |found, rest| found == *tag && rest.is_empty())?;
        }
    }
    // A file without a note belongs to no live transaction. Checked now, because a note may have been created after the
    // names were listed.
    let is_noted = |tag: Tag| !matches!(home.dir.look(tag.note().as_ref()), Ok(None));
    let is_dead = |tag| notes.iter().any(|(dead, ..)| *dead == tag) || !is_noted(tag);
    litter.removed += remove_where(&home.dir, &names, |tag, rest| !rest.is_empty() && is_dead(tag))?;
    for (_, name, _) in &notes {
        litter.removed += usize::from(remove(&home.dir, name)?);
    }
    Ok(litter)
}

/// The state of the transaction to which this note belongs.
enum Note {
    Live,
    /// The note itself, locked, if it is in this directory.
    Dead(Option<File>),
}

impl Note {
    /// Inspects an entry that is named like a note; `None` if it is not a note.
    fn open(site: &Site, name: &OsStr) -> io::Result<Option<Self>> {
        match site.dir.look(name)?.map(|entry| entry.kind) {
            Some(Kind::File) => Self::lock(site.dir.read(name)?).map(Some),
            Some(Kind::Symlink) => {
                let link = site.dir.read_link(name)?;
                // A missing directory may have been moved while its transaction lives.
                let Ok(home) = site.dir.open_dir(link.parent().unwrap_or(Path::new("/"))) else {
                    return Ok(Some(Self::Live));
                };
                match home.read(name) {
                    Ok(note) => Ok(Some(match Self::lock(note)? {
                        Self::Live => Self::Live,
                        Self::Dead(_) => Self::Dead(None),
                    })),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Some(Self::Dead(None))),
                    Err(error) => Err(error),
                }
            }
            _ => Ok(None),
        }
    }

    fn lock(note: File) -> io::Result<Self> {
        match note.try_lock() {
            Ok(()) => Ok(Self::Dead(Some(note))),
            Err(TryLockError::WouldBlock) => Ok(Self::Live),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

/// Removes the pointer to a journal that was never committed.
fn remove_stale_pointer(site: &Arc<Site>, tag: Tag) -> io::Result<bool> {
    // A transaction that is committing here may just be creating its own pointer.
    let Some(_alone) = lock::try_alone(site)? else { return Ok(false) };
    match Pointer::find(site) {
        Ok(Some(pointer)) if pointer.tag == tag => remove(&site.dir, POINTER.as_ref()),
        // A pointer that cannot be read is left to a recovery of that directory.
        _ => Ok(false),
    }
}

/// Removes a file; `false` if it was already gone, for example because its transaction has just ended.
fn remove(dir: &Dir, name: &OsStr) -> io::Result<bool> {
    match dir.remove(name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        other => other.map(|()| true),
    }
}

/// Removes those of `names` whose transaction and remainder are `wanted`; returns how many.
fn remove_where(dir: &Dir, names: &[OsString], wanted: impl Fn(Tag, &str) -> bool) -> io::Result<usize> {
    let mut removed = 0;
    for name in names {
        if Tag::parse(name).is_some_and(|(tag, rest)| wanted(tag, rest)) {
            // A directory is not ours. A symlink may be, because a transaction that renames one gives it a second name.
            if !matches!(dir.look(name)?, Some(Entry { kind: Kind::Other(_), .. })) {
                removed += usize::from(remove(dir, name)?);
            }
        }
    }
    Ok(removed)
}

/// What a recovery found of writes in place.
#[derive(Clone, Copy, Debug, Default)]
struct Found {
    /// Targets whose old content was put back.
    restored: usize,
    /// Copies that nothing led to.
    removed: usize,
    /// Live writers.
    live: usize,
}

impl Found {
    fn and(self, other: Self) -> Self {
        let Self { restored, removed, live } = other;
        Self { restored: self.restored + restored, removed: self.removed + removed, live: self.live.max(live) }
    }
}

/// The state of one record or copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Done,
    Live,
    /// Its writer has just ended, or it was not a record or copy.
    Vanished,
}

/// Restores what dead writers have left half written in `dir`, and removes copies without a record.
///
/// If one is refused, the others are still restored, and the refusal is returned afterwards. Each passes the gate
/// separately.
fn recover_in_place(dir: &Dir, path: &Path, gate: &Gate) -> Result<Found, Error> {
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
        match remove_copy(dir, &names).map_err(failed)? {
            Fate::Done => found.removed += 1,
            Fate::Live => found.live += 1,
            Fate::Vanished => {}
        }
    }
    refused.map_or(Ok(found), Err)
}

/// Opens the copy and takes its lock; if it cannot have the lock, returns what that means.
fn open_dead(dir: &Dir, copy: &OsStr) -> io::Result<Result<File, Fate>> {
    let file = match dir.read(copy) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Err(Fate::Vanished)),
        // Another user's: what we may not read, we leave to its owner.
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
fn remove_copy(dir: &Dir, names: &names::Backup) -> io::Result<Fate> {
    if dir.look(&names.record)?.is_some() || !matches!(dir.look(&names.copy)?, Some(Entry { kind: Kind::File, .. })) {
        return Ok(Fate::Vanished);
    }
    let _lock = match open_dead(dir, &names.copy)? {
        Ok(lock) => lock,
        Err(fate) => return Ok(fate),
    };
    // Its writer may have created the record, and died, after the names were listed.
    if dir.look(&names.record)?.is_some() {
        return Ok(Fate::Vanished);
    }
    remove(dir, &names.copy).map(|_| Fate::Done)
}

/// A record whose writer may be dead.
struct Dead<'a> {
    dir: &'a Dir,
    path: &'a Path,
    names: &'a names::Backup,
}

impl Dead<'_> {
    /// Puts the old content back. It can be interrupted at any moment and repeated.
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
