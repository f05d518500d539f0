//! A new file on its way: created hidden beside its target, written, dressed, synced and renamed over it.
//!
//! Invariant: until the rename the target is not touched, and however this ends, no temporary file stays. All of it is
//! synchronous and runs inside one blocking job, so that whoever creates the file also owns its removal.

use std::ffi::{OsStr, OsString};
use std::fs::{File, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::commit::Gate;
use crate::error::{change_error, open_error, resolved_error};
#[cfg(unix)]
use crate::in_place;
use crate::names;
use crate::platform::{self, Dir, Entry, Guests, Kind, Moved};
use crate::{Durability, Error, Preserve, Symlinks, WriteOptions};

/// How many names are tried. A second one is needed only if a sweep took the file before it could be locked.
const NAME_ATTEMPTS: usize = 32;
/// As many links as Linux follows in one path.
const SYMLINK_LIMIT: usize = 40;
/// How much is written between two looks at the gate, and how much a writer buffers.
pub(crate) const CHUNK_BYTES: usize = 1 << 20;

/// What a temporary file is called.
#[derive(Clone, Debug)]
pub(crate) enum Naming {
    /// By chance; a sweep knows the name.
    File,
    /// As the transaction says that it is part of; a sweep leaves it alone.
    #[cfg(unix)]
    Fixed {
        name: OsString,
        /// Set if the file could not be removed.
        left: Arc<AtomicBool>,
    },
}

impl Naming {
    fn next(&self) -> OsString {
        match self {
            Self::File => names::temp(),
            #[cfg(unix)]
            Self::Fixed { name, .. } => name.clone(),
        }
    }

    fn left(&self) -> Option<Arc<AtomicBool>> {
        match self {
            Self::File => None,
            #[cfg(unix)]
            Self::Fixed { left, .. } => Some(left.clone()),
        }
    }
}

/// Writes all of `bytes` to `path` in one go.
pub(crate) fn write_whole(path: &Path, bytes: &[u8], options: WriteOptions, gate: &Gate) -> Result<(), Error> {
    let mut staged = Staged::create(path, options)?;
    staged.write_at(0, bytes, gate)?;
    // Some time has gone by since the first look.
    if bytes.len() > CHUNK_BYTES {
        staged.look_again()?;
    }
    staged.install(bytes.len() as u64, gate)
}

/// The directory and the name that a path stands for once its symlinks have been followed.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) dir: Arc<Dir>,
    pub(crate) name: OsString,
    /// The path by which `dir` was opened.
    #[cfg_attr(not(unix), expect(dead_code, reason = "only transactions note it"))]
    pub(crate) parent: PathBuf,
    /// What a symlink led to; `None` if none was followed.
    pub(crate) resolved: Option<PathBuf>,
    /// The file that is there now; `None` also for a link that is itself replaced, since it has no mode of its own.
    existing: Option<Entry>,
}

impl Target {
    /// How long the file is that is there now, in bytes.
    #[cfg(unix)]
    pub(crate) fn size(&self) -> u64 {
        self.existing.as_ref().map_or(0, |entry| entry.size)
    }

    pub(crate) fn resolve(path: &Path, options: WriteOptions) -> Result<Self, Error> {
        let (parent, _) = split(path, path)?;
        let dir = Dir::open(parent).map_err(|source| open_error(parent, source))?;
        Self::resolve_in(Arc::new(dir), path, options)
    }

    /// The same where `dir`, the directory of `path`, is already open.
    pub(crate) fn resolve_in(mut dir: Arc<Dir>, path: &Path, options: WriteOptions) -> Result<Self, Error> {
        let mut resolved = None;
        let (parent, name) = split(path, path)?;
        let mut parent = parent.to_path_buf();
        let mut name = name.to_owned();
        for _ in 0..SYMLINK_LIMIT {
            let failed = |action| resolved_error(action, path, &resolved);
            let entry = dir.look(&name).map_err(failed("look at"))?;
            match entry {
                Some(_) if options.create_new => return Err(Error::AlreadyExists { path: path.to_path_buf() }),
                Some(Entry { kind: Kind::Other(kind), .. }) => {
                    return Err(Error::NotAFile { path: path.to_path_buf(), resolved, kind });
                }
                Some(Entry { kind: Kind::Symlink, .. }) if options.symlinks == Symlinks::Follow => {
                    let link = dir.read_link(&name).map_err(failed("read the symlink"))?;
                    let (next, last) = split(&link, path)?;
                    // A link to a neighbour stays in the same directory, which errors need not name with a dot.
                    if next != Path::new(".") {
                        parent.push(next);
                    }
                    dir = Arc::new(dir.open_dir(next).map_err(|source| open_error(&parent, source))?);
                    name = last.to_owned();
                    resolved = Some(parent.join(&name));
                }
                Some(Entry { kind: Kind::Symlink, .. }) | None => {
                    return Ok(Self { dir, name, parent, resolved, existing: None });
                }
                Some(Entry { kind: Kind::File, .. }) => {
                    return Ok(Self { dir, name, parent, resolved, existing: entry });
                }
            }
        }
        Err(Error::InvalidPath { path: path.to_path_buf(), reason: "its symlinks form a loop" })
    }
}

/// Splits `path` into the directory to open and the name within it; `given` is the caller's path, for errors.
pub(crate) fn split<'a>(path: &'a Path, given: &Path) -> Result<(&'a Path, &'a OsStr), Error> {
    let invalid = |reason| Error::InvalidPath { path: given.to_path_buf(), reason };
    let name = path.file_name().ok_or_else(|| invalid("it has no file name"))?;
    // `Path` quietly drops a slash at the end, but the system takes `name/` for a directory.
    if !path.as_os_str().as_encoded_bytes().ends_with(name.as_encoded_bytes()) {
        return Err(invalid("it ends like a directory"));
    }
    if names::is_reserved(name) {
        return Err(invalid("names that begin with .afs- are reserved for temporary files"));
    }
    Ok((directory(path.parent().unwrap_or(Path::new(""))), name))
}

/// The directory that is meant by what [`Path::parent`] says of a bare name, which is nothing.
pub(crate) fn directory(path: &Path) -> &Path {
    if path.as_os_str().is_empty() { Path::new(".") } else { path }
}

/// The path as seen from the working directory of now.
#[cfg(unix)]
pub(crate) fn absolute(path: &Path) -> PathBuf {
    // A working directory that is gone is for the first system call to complain of.
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

/// The name of the temporary file; removed when this is dropped, unless it has become the target's.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) target: Target,
    pub(crate) temp: OsString,
    /// Whether there is a file of ours by the name `temp`.
    pub(crate) taken: bool,
    /// Whom to tell if the file could not be removed.
    pub(crate) left: Option<Arc<AtomicBool>>,
}

impl Place {
    /// Creates a file under a fresh name, locked if a sweep knows such names.
    fn take(&mut self, mode: u32, naming: &Naming) -> io::Result<(File, Entry)> {
        for _ in 0..NAME_ATTEMPTS {
            self.temp = naming.next();
            let file = match self.target.dir.create(&self.temp, mode) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error),
            };
            self.taken = true;
            let fresh = match naming {
                Naming::File => lock_new(&file)?,
                // The lock of its transaction's note keeps it.
                #[cfg(unix)]
                Naming::Fixed { .. } => Some(Entry::of(&file)?),
            };
            if let Some(fresh) = fresh {
                return Ok((file, fresh));
            }
            // A sweep came between creation and lock, and took the file for litter.
            self.release();
        }
        Err(io::Error::new(io::ErrorKind::AlreadyExists, "every temporary name that was tried is taken"))
    }

    /// Removes the file of ours, if there is one, and says whether that worked.
    pub(crate) fn remove(&mut self) -> io::Result<()> {
        if !std::mem::take(&mut self.taken) {
            return Ok(());
        }
        match self.target.dir.remove(&self.temp) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                if let Some(left) = &self.left {
                    left.store(true, Ordering::Relaxed);
                }
                Err(error)
            }
            _ => Ok(()),
        }
    }

    /// Removes the file of ours, if there is one.
    fn release(&mut self) {
        if let Err(_error) = self.remove() {
            #[cfg(feature = "tracing")]
            tracing::warn!(temp = ?self.temp, error = %_error, "a temporary file stays until the next sweep or recovery");
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.release();
    }
}

/// Locks a file that has just been created, so that no sweep takes it while its writer lives.
///
/// Returns what the file is like, or `None` if a sweep was faster.
pub(crate) fn lock_new(file: &File) -> io::Result<Option<Entry>> {
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        // A file system without locks: a sweep gets none there either, and therefore removes nothing.
        Err(TryLockError::Error(_)) => {}
    }
    let entry = Entry::of(file)?;
    // The sweep may have come and gone before the lock was taken; then the file has no name any more.
    Ok((entry.links > 0).then_some(entry))
}

/// A new file that is not yet the target.
#[derive(Debug)]
pub(crate) struct Staged {
    path: PathBuf,
    options: WriteOptions,
    // Before `file`, so that when this is dropped the name goes while the lock is still held.
    place: Place,
    file: File,
    /// What the file was like when it had just been created.
    fresh: Entry,
    /// Where the file's cursor stands, in bytes.
    cursor: u64,
    /// How long the file is, in bytes.
    length: u64,
}

impl Staged {
    /// Resolves `path` and creates the temporary file beside what it stands for.
    pub(crate) fn create(path: &Path, options: WriteOptions) -> Result<Self, Error> {
        Self::create_at(path, Target::resolve(path, options)?, options, &Naming::File)
    }

    /// Creates the temporary file beside `target`, which `path` stands for.
    pub(crate) fn create_at(
        path: &Path,
        target: Target,
        options: WriteOptions,
        naming: &Naming,
    ) -> Result<Self, Error> {
        let mode = creation_mode(&target, options);
        let mut place = Place { target, temp: OsString::new(), taken: false, left: naming.left() };
        let failed = resolved_error("create a temporary file beside", path, &place.target.resolved);
        let (file, fresh) = place.take(mode, naming).map_err(failed)?;
        let mut staged = Self { path: path.to_path_buf(), options, place, file, fresh, cursor: 0, length: 0 };
        // Before there is any content, so that at no time a group may read it that may not read the final file.
        staged.take_owner()?;
        Ok(staged)
    }

    /// Writes `bytes` at `offset`, looking at the gate after each chunk.
    pub(crate) fn write_at(&mut self, offset: u64, bytes: &[u8], gate: &Gate) -> Result<(), Error> {
        let failed = self.failed("write the new content of");
        if self.cursor != offset {
            let failed = self.failed("seek in the new file for");
            self.file.seek(SeekFrom::Start(offset)).map_err(failed)?;
            self.cursor = offset;
        }
        for chunk in bytes.chunks(CHUNK_BYTES) {
            if gate.is_cancelled() {
                return Err(Error::Interrupted { path: self.path.clone() });
            }
            if let Err(source) = self.file.write_all(chunk) {
                return Err(failed(source));
            }
            self.cursor += chunk.len() as u64;
        }
        self.length = self.length.max(self.cursor);
        Ok(())
    }

    /// Looks at the target once more, for a file that was created a while ago: what is kept of the replaced one is what
    /// it has now. A file that was made private meanwhile must not become public again.
    pub(crate) fn look_again(&mut self) -> Result<(), Error> {
        let failed = self.failed("look at");
        let Target { dir, name, existing, .. } = &mut self.place.target;
        // What is gone, or no file any more, is for the rename to find out.
        if let Some(entry @ Entry { kind: Kind::File, .. }) = dir.look(name).map_err(failed)? {
            *existing = Some(entry);
        }
        self.take_owner()
    }

    /// Makes the first `length` bytes the target: cut, dress, sync, rename, sync the directory.
    pub(crate) fn install(self, length: u64, gate: &Gate) -> Result<(), Error> {
        self.finish(length)?;
        if self.options.durability != Durability::None {
            // Everything, not only the data: mode, owner and attributes must survive together with the content.
            self.file.sync_all().map_err(self.failed("sync the new file for"))?;
        }
        // The file is named before the place, so that it is dropped, and unlocked, after the name is gone.
        let Self { path, options, file, mut place, .. } = self;
        let Some(passage) = gate.enter() else { return Err(Error::Interrupted { path }) };
        let Target { dir, name, .. } = &place.target;
        let renamed = if options.create_new {
            dir.rename_new(&place.temp, name)
        } else {
            dir.rename(&place.temp, name).map(|()| Moved::Renamed)
        };
        #[cfg(unix)]
        if let Err(failure) = &renamed
            && in_place::is_wanted(options, failure)
        {
            // The rename has changed nothing; the write in place asks the gate for itself.
            drop(passage);
            let Target { dir, name, parent, resolved, .. } = &place.target;
            let fixed = in_place::Fixed { path: &path, resolved, dir, parent, name };
            return fixed.write(&file, length, options.mode, gate);
        }
        let moved =
            renamed.map_err(|source| change_error("rename the new file to", &path, &place.target.resolved, source))?;
        passage.done();
        place.taken = moved == Moved::Linked;
        place.release();
        // The lock goes with the file, before the slow sync: others may want to lock what is now the target.
        drop(file);
        if options.durability == Durability::Full {
            place.target.dir.sync().map_err(|source| Error::NotDurable { path, source })?;
        }
        Ok(())
    }

    /// The name of the target in its directory.
    #[cfg(unix)]
    pub(crate) fn target_name(&self) -> &OsStr {
        &self.place.target.name
    }

    /// Whether no symlink was followed on the way to the target.
    #[cfg(unix)]
    pub(crate) fn is_direct(&self) -> bool {
        self.place.target.resolved.is_none()
    }

    /// How it is written.
    #[cfg(unix)]
    pub(crate) fn options(&self) -> WriteOptions {
        self.options
    }

    /// Hands over the file, cut to `length` and dressed but not synced, to a transaction.
    #[cfg(unix)]
    pub(crate) fn seal(self, length: u64) -> Result<(Place, File), Error> {
        self.finish(length)?;
        Ok((self.place, self.file))
    }

    /// Gives the file its final length and metadata.
    fn finish(&self, length: u64) -> Result<(), Error> {
        if self.length > length {
            self.file.set_len(length).map_err(self.failed("cut the new file for"))?;
        }
        self.dress()
    }

    /// Removes the file and says whether that worked.
    pub(crate) fn discard(mut self) -> Result<(), Error> {
        let failed = self.failed("remove the temporary file of");
        self.place.remove().map_err(failed)
    }

    /// Removes the name at once, and hands back the open file: closing it frees its space, which may take a while.
    pub(crate) fn unlink(mut self) -> File {
        self.place.release();
        self.file
    }

    /// The error of a call that was to do `action`.
    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> Error + use<> {
        resolved_error(action, &self.path, &self.place.target.resolved)
    }

    /// Gives the new file the owner of the old one, if that is asked for and it has another.
    fn take_owner(&mut self) -> Result<(), Error> {
        if let Some(old) = kept(&self.place.target, self.options, Preserve::OWNER)
            && (old.uid, old.gid) != (self.fresh.uid, self.fresh.gid)
        {
            platform::set_owner(&self.file, old).map_err(self.failed("keep the owner of"))?;
            (self.fresh.uid, self.fresh.gid) = (old.uid, old.gid);
        }
        Ok(())
    }

    /// Gives the new file its attributes and its mode. After the content, since a write clears set-user-ID bits.
    fn dress(&self) -> Result<(), Error> {
        let Target { dir, name, .. } = &self.place.target;
        if kept(&self.place.target, self.options, Preserve::XATTR).is_some() {
            dir.copy_xattrs(name, &self.file).map_err(self.failed("keep the extended attributes of"))?;
        }
        let (mode, guests) = if let Some(mode) = self.options.mode {
            (mode, Guests::None)
        } else if let Some(old) = kept(&self.place.target, self.options, Preserve::MODE) {
            let guests = dir.guests(name).map_err(self.failed("read the access control list of"))?;
            (kept_mode(old, &self.fresh), kept_guests(guests, old, &self.fresh))
        } else {
            return Ok(());
        };
        platform::set_access(&self.file, self.fresh.mode, mode, &guests).map_err(self.failed("set the mode of"))
    }
}

/// The replaced file, if there is one and `what` of it is to be kept.
fn kept(target: &Target, options: WriteOptions, what: Preserve) -> Option<&Entry> {
    target.existing.as_ref().filter(|_| options.preserve.contains(what))
}

/// The mode to create the temporary file with: never more than the final file will grant.
fn creation_mode(target: &Target, options: WriteOptions) -> u32 {
    // As any new file: the kernel applies the umask, or the directory's default access control list.
    const NEW_FILE: u32 = 0o666;
    let Some(mode) = options.mode.or(kept(target, options, Preserve::MODE).map(|old| old.mode)) else {
        return NEW_FILE;
    };
    // Attributes can only be set on a file that its owner may write.
    let xattr = if kept(target, options, Preserve::XATTR).is_some() { 0o200 } else { 0 };
    // The owner's bits alone. The others may mean other people as long as the group is not the final one, and they would
    // put a list into force that the directory gives to new files.
    mode & 0o600 | xattr
}

/// The mode of the replaced file, without what would mean other people, or be a privilege, under another owner or group.
fn kept_mode(old: &Entry, new: &Entry) -> u32 {
    let set_user_id = if old.uid == new.uid { 0 } else { 0o4000 };
    if old.gid == new.gid {
        return old.mode & !set_user_id;
    }
    // The new group may be anybody, and members of the old one are now among all others: both get what both had.
    let both = old.mode >> 3 & old.mode & 0o7;
    old.mode & !(set_user_id | 0o2077) | both << 3 | both
}

/// The access control list of the replaced file, in the same way.
fn kept_guests(guests: Guests, old: &Entry, new: &Entry) -> Guests {
    if old.gid == new.gid { guests } else { guests.for_another_group() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_split_where_the_system_splits_it() {
        let parts =
            |path: &str| split(path.as_ref(), path.as_ref()).map(|(d, n)| format!("{} {}", d.display(), n.display()));
        assert_eq!(parts("a").unwrap(), ". a");
        assert_eq!(parts("a/b").unwrap(), "a b");
        assert_eq!(parts("/a").unwrap(), "/ a");
        assert_eq!(parts("../a").unwrap(), ".. a");
        for path in ["", "/", ".", "..", "a/", "a/.", "a/..", "d/.afs-x"] {
            assert!(matches!(parts(path), Err(Error::InvalidPath { .. })), "{path}");
        }
    }

    #[test]
    fn a_job_that_is_cancelled_writes_no_more_and_leaves_nothing() {
        let dir = tempfile::tempdir().expect("the temporary directory has room");
        let gate = Gate::new();
        let path = dir.path().join("file");
        let mut staged = Staged::create(&path, WriteOptions::default()).expect("the directory is ours");
        staged.write_at(0, b"begun", &gate).expect("nobody has cancelled");
        gate.cancel();
        assert!(matches!(staged.write_at(5, b"more", &gate), Err(Error::Interrupted { .. })));
        assert_eq!(staged.file.metadata().expect("it is open").len(), 5);
        drop(staged);
        assert!(std::fs::read_dir(dir.path()).expect("it is there").next().is_none());
    }

    #[test]
    fn set_id_bits_go_with_their_owner() {
        let id = |uid, gid| Entry { kind: Kind::File, mode: 0o6755, uid, gid, id: (0, 0), links: 1, size: 0 };
        assert_eq!(kept_mode(&id(1, 2), &id(1, 2)), 0o6755);
        assert_eq!(kept_mode(&id(1, 2), &id(3, 2)), 0o2755);
        assert_eq!(kept_mode(&id(1, 2), &id(1, 3)), 0o4755);
    }

    #[test]
    fn another_group_and_all_others_get_what_both_had() {
        let id = |gid, mode| Entry { kind: Kind::File, mode, uid: 1, gid, id: (0, 0), links: 1, size: 0 };
        for (mode, under_another) in
            [(0o640, 0o600), (0o664, 0o644), (0o604, 0o600), (0o755, 0o755), (0o750, 0o700), (0o1666, 0o1666)]
        {
            assert_eq!(kept_mode(&id(1, mode), &id(1, 0)), mode);
            assert_eq!(kept_mode(&id(1, mode), &id(2, 0)), under_another, "{mode:o}");
        }
    }
}
