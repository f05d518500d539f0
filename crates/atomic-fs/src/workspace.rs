//! What the jobs of one transaction share: its directories, and the note that says which files are its own.
//!
//! Invariant: the note is made, and locked, before the first staged file, and goes after the last; in another directory
//! than the journal's a symlink that leads there takes its place. So a staged file of which there is no locked note
//! belongs to nobody that lives.

use std::ffi::{OsStr, OsString};
use std::fs::{File, TryLockError};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::Error;
use crate::error::{io_error, open_error};
use crate::journal::{self, Pointer};
use crate::lock;
use crate::names::{POINTER, Tag};
use crate::platform::{Dir, Entry, Identity, Kind};
use crate::site::Site;
use crate::staged::lock_new;

/// How often a note is made anew, because a recovery took it before it could be locked.
const NOTE_ATTEMPTS: usize = 32;
/// No note is larger than this, so that a recovery need not read a file of any size.
const NOTE_LIMIT_BYTES: u64 = 16 << 20;

/// What the jobs of one transaction share.
#[derive(Debug)]
pub(crate) struct Workspace {
    pub(crate) tag: Tag,
    /// The journal's directory first.
    sites: Mutex<Vec<Arc<Site>>>,
    /// The note, locked as long as this lives.
    note: File,
    /// How many names have been given.
    given: Mutex<u64>,
    /// Whether a file was left, so that the note is kept for a recovery.
    pub(crate) left: Arc<AtomicBool>,
}

impl Workspace {
    /// Begins in the directory `journal_dir`.
    pub(crate) fn begin(journal_dir: &Path) -> Result<Self, Error> {
        let home = Arc::new(Site::open(journal_dir)?);
        for _ in 0..NOTE_ATTEMPTS {
            let tag = Tag::by_chance();
            let note = match home.dir.create(tag.note().as_ref(), 0o600) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                other => other.map_err(io_error("create a transaction's note in", journal_dir))?,
            };
            // From here on its drop removes it.
            let workspace =
                Self { tag, sites: Mutex::new(vec![home.clone()]), note, given: Mutex::new(0), left: Arc::default() };
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
    pub(crate) fn name(&self) -> OsString {
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        *given += 1;
        format!("{}-{given}", self.tag.note()).into()
    }

    /// The name of the journal before it is committed.
    pub(crate) fn draft(&self) -> OsString {
        format!("{}-journal", self.tag.note()).into()
    }

    /// Makes the directory `dir`, opened by `parent`, one of this transaction's; `path` is the target, for errors.
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
        // First what a recovery of the journal's directory knows this one by, so that it finds all that follows; then what
        // keeps the files alive that will be staged here. Neither is synced: if a power cut takes them, the files are
        // nobody's.
        let foreign = Foreign::new(&self.note, &sites[0], &site);
        let noted = foreign.and_then(|foreign| (&self.note).write_all(&foreign.encode()));
        let link = journal::way(&site.path, &sites[0].path).join(self.tag.note());
        let linked = noted.and_then(|()| site.dir.symlink(&link, self.tag.note().as_ref()));
        linked.map_err(io_error("note the directory of", path))?;
        sites.push(site.clone());
        Ok(site)
    }

    /// Nothing panics in the middle of a change while it is locked.
    fn sites(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Site>>> {
        self.sites.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if self.left.load(Ordering::Relaxed) {
            return;
        }
        // The note last: as long as something stays that leads to it, a recovery must find that by it.
        for site in self.sites().iter().rev() {
            match site.dir.remove(self.tag.note().as_ref()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return,
                _ => {}
            }
        }
    }
}

/// What recoveries removed of transactions that never were committed.
#[derive(Debug, Default)]
pub(crate) struct Litter {
    pub(crate) removed: usize,
    /// Transactions that are still being staged.
    pub(crate) live: usize,
}

/// Removes from `home`, and from where its notes lead, what dead transactions staged.
///
/// Only under the lock of `home`, and when no journal is there: after a commit these files are the data.
pub(crate) fn remove_litter(home: &Site) -> io::Result<Litter> {
    let names = home.dir.list()?;
    let mut litter = Litter::default();
    let mut notes = Vec::new();
    for name in &names {
        let Some(tag) = Tag::of_note(name) else { continue };
        match Note::open(home, name) {
            Ok(Some(Note::Dead(note))) => notes.push((tag, name, note)),
            Ok(Some(Note::Live)) => litter.live += 1,
            // What is no file is not ours, whatever its name; or its transaction has just ended.
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Somebody else's; what we may not read we leave to them.
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
    // A file without a note is nobody's. Looked for now, since a note may have been made after the names had been listed.
    let is_noted = |tag: Tag| !matches!(home.dir.look(tag.note().as_ref()), Ok(None));
    let is_dead = |tag| notes.iter().any(|(dead, ..)| *dead == tag) || !is_noted(tag);
    litter.removed += remove_where(&home.dir, &names, |tag, rest| !rest.is_empty() && is_dead(tag))?;
    for (_, name, _) in &notes {
        litter.removed += usize::from(remove(&home.dir, name)?);
    }
    Ok(litter)
}

/// What became of the transaction whose note this is.
enum Note {
    Live,
    /// The note itself, locked, if it is in this directory.
    Dead(Option<File>),
}

impl Note {
    /// Looks at what is called as notes are; `None` if it is none.
    fn open(site: &Site, name: &OsStr) -> io::Result<Option<Self>> {
        match site.dir.look(name)?.map(|entry| entry.kind) {
            Some(Kind::File) => Self::lock(site.dir.read(name)?).map(Some),
            Some(Kind::Symlink) => {
                let link = site.dir.read_link(name)?;
                // A directory that is not there may have been moved, while its transaction lives.
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

/// Removes the pointer to a journal that never was committed.
fn remove_stale_pointer(site: &Arc<Site>, tag: Tag) -> io::Result<bool> {
    // Whoever commits here now may just be putting a pointer of its own there.
    let Some(_alone) = lock::try_alone(site)? else { return Ok(false) };
    match Pointer::find(site) {
        Ok(Some(pointer)) if pointer.tag == tag => remove(&site.dir, POINTER.as_ref()),
        // One that cannot be read is for a recovery of that directory.
        _ => Ok(false),
    }
}

/// Removes a file; `false` if somebody else was faster, as a transaction is that has just ended.
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
            // A directory is not ours. A symlink may be: a transaction that renames one has given it a second name.
            if !matches!(dir.look(name)?, Some(Entry { kind: Kind::Other(_), .. })) {
                removed += usize::from(remove(dir, name)?);
            }
        }
    }
    Ok(removed)
}

/// Another directory in which files are staged, as a note names it.
struct Foreign {
    /// By what the note itself is known to lie where it was written, and by what that directory is.
    marks: [String; 2],
    /// From the note's directory to that one, so that a copy of both does not lead to the original.
    way: PathBuf,
}

impl Foreign {
    fn new(note: &File, home: &Site, site: &Site) -> io::Result<Self> {
        let marks = [Identity::of(note)?.mark(), site.mark()?];
        Ok(Self { marks, way: journal::way(&home.path, &site.path) })
    }

    /// Marked at both ends, so that what a full disk has cut off does not spoil the next one.
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

    /// The directory, if it can be told that it is the one: both are where they were, or both were copied. What has been
    /// moved or removed since is out of reach, and harmless.
    fn open(&self, note: &File, home: &Site) -> Option<Site> {
        let site = Site::open(&home.path.join(&self.way)).ok()?;
        let marks = [Identity::of(note).ok()?.mark(), site.mark().ok()?];
        let [is_note, is_site] = [0, 1].map(|end| marks[end] == self.marks[end]);
        // The directories of an overlay whose layers are on several file systems are numbered anew when it is mounted.
        (is_note == is_site || (is_note && site.is_layered)).then_some(site)
    }
}

/// The other directories that a note names. What was cut off by a crash was not yet used.
fn foreign_sites(note: &File) -> io::Result<Vec<Foreign>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    note.take(NOTE_LIMIT_BYTES).read_to_end(&mut bytes)?;
    let whole = bytes.split_inclusive(|&byte| byte == 0).filter_map(|line| line.strip_suffix(&[0]));
    Ok(whole.filter_map(Foreign::decode).collect())
}
