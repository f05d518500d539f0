//! A new file in the making: created hidden beside its target, written, given its metadata, synced and renamed over the
//! target.
//!
//! Invariant: until the rename the target is not touched, and however this ends, no temporary file stays. Everything is
//! synchronous and runs inside one blocking job, so the creator of the file also owns its removal.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::commit::{CHUNK_BYTES, Gate};
use crate::error::{change_error, open_error, resolved_error};
#[cfg(unix)]
use crate::in_place;
use crate::names::split;
use crate::platform::{self, Dir, Entry, Guests, Kind};
use crate::staging::Staging;
use crate::{Durability, Error, Preserve, Symlinks, WriteOptions};

/// As many links as Linux follows in one path.
const SYMLINK_LIMIT: usize = 40;

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

/// The directory and the name of a path after its symlinks have been followed.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) dir: Arc<Dir>,
    pub(crate) name: OsString,
    /// The path by which `dir` was opened.
    #[cfg_attr(not(unix), expect(dead_code, reason = "only transactions note it"))]
    pub(crate) parent: PathBuf,
    /// What a symlink led to; `None` if none was followed.
    pub(crate) resolved: Option<PathBuf>,
    /// The file that is there now. Also `None` for a symlink that is itself replaced, because it has no mode.
    existing: Option<Entry>,
}

impl Target {
    /// The length of the file that is there now, in bytes.
    #[cfg(unix)]
    pub(crate) fn size(&self) -> u64 {
        self.existing.as_ref().map_or(0, |entry| entry.size)
    }

    pub(crate) fn resolve(path: &Path, options: WriteOptions) -> Result<Self, Error> {
        let (parent, _) = split(path, path)?;
        let dir = Dir::open(parent).map_err(|source| open_error(parent, source))?;
        Self::resolve_in(Arc::new(dir), path, options)
    }

    /// Works like `resolve`, with `dir`, the directory of `path`, already open.
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
                    // A link to a file beside it stays in the same directory, and errors need not show that as a dot.
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

/// A new file that is not yet the target.
#[derive(Debug)]
pub(crate) struct Staged {
    path: PathBuf,
    options: WriteOptions,
    target: Target,
    staging: Staging,
    file: Arc<File>,
    /// The file's metadata right after its creation.
    fresh: Entry,
    /// The position of the file's cursor, in bytes.
    cursor: u64,
    /// How long the file is, in bytes.
    length: u64,
}

impl Staged {
    /// Resolves `path` and creates the temporary file beside what it stands for.
    pub(crate) fn create(path: &Path, options: WriteOptions) -> Result<Self, Error> {
        Self::create_at(path, Target::resolve(path, options)?, options, Staging::create)
    }

    /// Lets `create` create the temporary file beside `target`, the resolved `path`.
    pub(crate) fn create_at(
        path: &Path,
        target: Target,
        options: WriteOptions,
        create: impl FnOnce(&Arc<Dir>, u32) -> io::Result<(Staging, Arc<File>, Entry)>,
    ) -> Result<Self, Error> {
        let created = create(&target.dir, creation_mode(&target, options));
        let failed = resolved_error("create a temporary file beside", path, &target.resolved);
        let (staging, file, fresh) = created.map_err(failed)?;
        let path = path.to_path_buf();
        let mut staged = Self { path, options, target, staging, file, fresh, cursor: 0, length: 0 };
        // Before there is any content, so that no group can ever read it that may not read the final file.
        staged.take_owner()?;
        Ok(staged)
    }

    /// Writes `bytes` at `offset`, and checks the gate after each chunk.
    pub(crate) fn write_at(&mut self, offset: u64, bytes: &[u8], gate: &Gate) -> Result<(), Error> {
        if self.cursor != offset {
            (&*self.file).seek(SeekFrom::Start(offset)).map_err(self.failed("seek in the new file for"))?;
            self.cursor = offset;
        }
        for chunk in bytes.chunks(CHUNK_BYTES) {
            if gate.is_cancelled() {
                return Err(Error::Interrupted { path: self.path.clone() });
            }
            (&*self.file).write_all(chunk).map_err(self.failed("write the new content of"))?;
            self.cursor += chunk.len() as u64;
        }
        self.length = self.length.max(self.cursor);
        Ok(())
    }

    /// Looks at the target once more, if this file was created a while ago: it keeps what the replaced file has now. A
    /// file that was made private meanwhile must not become public again.
    pub(crate) fn look_again(&mut self) -> Result<(), Error> {
        let now = self.target.dir.look(&self.target.name).map_err(self.failed("look at"))?;
        // If the target is gone, or no file any more, the rename finds out.
        if let Some(Entry { kind: Kind::File, .. }) = now {
            self.target.existing = now;
        }
        self.take_owner()
    }

    /// Makes the first `length` bytes the target: cuts, sets the metadata, syncs, renames, syncs the directory.
    pub(crate) fn install(self, length: u64, gate: &Gate) -> Result<(), Error> {
        self.finish(length)?;
        if self.options.durability != Durability::None {
            // Everything, not only the data: mode, owner and attributes must survive together with the content.
            self.file.sync_all().map_err(self.failed("sync the new file for"))?;
        }
        let Self { path, options, target, mut staging, file, .. } = self;
        let Some(passage) = gate.enter() else { return Err(Error::Interrupted { path }) };
        let renamed = staging.rename(&target.name, options.create_new);
        #[cfg(unix)]
        if let Err(failure) = &renamed
            && in_place::is_wanted(options, failure)
        {
            // The rename has changed nothing; the write in place passes the gate by itself.
            drop(passage);
            let Target { dir, name, parent, resolved, .. } = &target;
            let fixed = in_place::Fixed { path: &path, resolved, dir, parent, name };
            return fixed.write(&file, length, options.mode, gate);
        }
        renamed.map_err(|source| change_error("rename the new file to", &path, &target.resolved, source))?;
        passage.done();
        // This also releases the lock, before the slow sync: others may want to lock what is now the target.
        drop((staging, file));
        if options.durability == Durability::Full {
            target.dir.sync().map_err(|source| Error::NotDurable { path, source })?;
        }
        Ok(())
    }

    /// The name of the target in its directory.
    #[cfg(unix)]
    pub(crate) fn target_name(&self) -> &OsString {
        &self.target.name
    }

    /// Whether no symlink was followed on the way to the target.
    #[cfg(unix)]
    pub(crate) fn is_direct(&self) -> bool {
        self.target.resolved.is_none()
    }

    /// How it is written.
    #[cfg(unix)]
    pub(crate) fn options(&self) -> WriteOptions {
        self.options
    }

    /// Hands the file over to a transaction, cut to `length` and with its metadata but not synced, with the name of its
    /// target.
    #[cfg(unix)]
    pub(crate) fn seal(self, length: u64) -> Result<(Staging, Arc<File>, OsString), Error> {
        self.finish(length)?;
        Ok((self.staging, self.file, self.target.name))
    }

    /// Gives the file its final length and metadata.
    fn finish(&self, length: u64) -> Result<(), Error> {
        if self.length > length {
            self.file.set_len(length).map_err(self.failed("cut the new file for"))?;
        }
        self.dress()
    }

    /// Removes the file and returns whether that worked.
    pub(crate) fn discard(self) -> Result<(), Error> {
        let Self { path, target, staging, .. } = self;
        staging.end().map_err(resolved_error("remove the temporary file of", &path, &target.resolved))
    }

    /// Removes the name at once, and hands back the open file: closing it frees its space, which may take a while.
    pub(crate) fn unlink(self) -> Arc<File> {
        drop(self.staging);
        self.file
    }

    /// Makes the error of a call that tried to `action` the target.
    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> Error + use<'_> {
        resolved_error(action, &self.path, &self.target.resolved)
    }

    /// Gives the new file the owner of the old one, if that is requested and the owners differ.
    fn take_owner(&mut self) -> Result<(), Error> {
        if let Some(old) = kept(&self.target, self.options, Preserve::OWNER)
            && (old.uid, old.gid) != (self.fresh.uid, self.fresh.gid)
        {
            platform::set_owner(&self.file, old).map_err(self.failed("keep the owner of"))?;
            (self.fresh.uid, self.fresh.gid) = (old.uid, old.gid);
        }
        Ok(())
    }

    /// Gives the new file its attributes and its mode. After the content, because a write clears set-user-ID bits.
    fn dress(&self) -> Result<(), Error> {
        let Target { dir, name, .. } = &self.target;
        if kept(&self.target, self.options, Preserve::XATTR).is_some() {
            dir.copy_xattrs(name, &self.file).map_err(self.failed("keep the extended attributes of"))?;
        }
        let (mode, guests) = if let Some(mode) = self.options.mode {
            (mode, Guests::None)
        } else if let Some(old) = kept(&self.target, self.options, Preserve::MODE) {
            let guests = dir.guests(name).map_err(self.failed("read the access control list of"))?;
            (kept_mode(old, &self.fresh), kept_guests(guests, old, &self.fresh))
        } else {
            return Ok(());
        };
        platform::set_access(&self.file, self.fresh.mode, mode, &guests).map_err(self.failed("set the mode of"))
    }
}

/// The replaced file, if there is one and the options keep `what` of it.
fn kept(target: &Target, options: WriteOptions, what: Preserve) -> Option<&Entry> {
    target.existing.as_ref().filter(|_| options.preserve.contains(what))
}

/// The mode to create the temporary file with: never more than the final file will grant.
fn creation_mode(target: &Target, options: WriteOptions) -> u32 {
    // Like any new file: the kernel applies the umask, or the directory's default access control list.
    const NEW_FILE: u32 = 0o666;
    let Some(mode) = options.mode.or(kept(target, options, Preserve::MODE).map(|old| old.mode)) else {
        return NEW_FILE;
    };
    // Attributes can only be set on a file that its owner may write.
    let xattr = if kept(target, options, Preserve::XATTR).is_some() { 0o200 } else { 0 };
    // Only the owner's bits. Until the group is the final one, the other bits may apply to the wrong people, and they
    // would activate a list that the directory gives to new files.
    mode & 0o600 | xattr
}

/// The mode of the replaced file, without bits that would apply to other people, or give a privilege, under another
/// owner or group.
fn kept_mode(old: &Entry, new: &Entry) -> u32 {
    let set_user_id = if old.uid == new.uid { 0 } else { 0o4000 };
    if old.gid == new.gid {
        return old.mode & !set_user_id;
    }
    // The new group may be anybody, and members of the old group now count as others: both get only what both had.
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
