//! Unix: system calls below a directory handle.
//!
//! Invariant: a name is never resolved from the root or the working directory, only below an open directory.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};

use super::{Entry, Guests, Identity, Kind, Moved};

/// An open directory.
#[derive(Debug)]
pub(crate) struct Dir(File);

impl Dir {
    /// Opens the directory `path`.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::open_at(rustix::fs::CWD, path)
    }

    /// Opens `path` as seen from this directory.
    pub(crate) fn open_dir(&self, path: &Path) -> io::Result<Self> {
        Self::open_at(&self.0, path)
    }

    fn open_at(from: impl rustix::fd::AsFd, path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(File::from(rustix::fs::openat(from, path, flags, Mode::empty())?)))
    }

    /// Looks at `name` without following it; `None` if there is none.
    pub(crate) fn look(&self, name: &OsStr) -> io::Result<Option<Entry>> {
        match rustix::fs::statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(Entry::from_stat(&stat))),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Reads where the symlink `name` points.
    pub(crate) fn read_link(&self, name: &OsStr) -> io::Result<PathBuf> {
        use std::os::unix::ffi::OsStringExt;
        let bytes = rustix::fs::readlinkat(&self.0, name, Vec::new())?.into_bytes();
        Ok(PathBuf::from(OsString::from_vec(bytes)))
    }

    /// Creates the file `name`, which must not exist, and opens it for reading too; the umask applies to `mode`.
    pub(crate) fn create(&self, name: &OsStr, mode: u32) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(File::from(rustix::fs::openat(&self.0, name, flags, mode_bits(mode))?))
    }

    /// Opens the file `name` for reading, without following a symlink or waiting for a FIFO.
    pub(crate) fn read(&self, name: &OsStr) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(&self.0, name, flags, Mode::empty())?))
    }

    /// Opens the file `name` for reading and writing, without following a symlink or waiting for a FIFO.
    pub(crate) fn update(&self, name: &OsStr) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(&self.0, name, flags, Mode::empty())?))
    }

    /// Renames `from` to `to`, replacing what is there.
    pub(crate) fn rename(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.0, from, &self.0, to)?)
    }

    /// Renames `from` to `to`, which must not exist.
    pub(crate) fn rename_new(&self, from: &OsStr, to: &OsStr) -> io::Result<Moved> {
        self.move_new(from, self, to)
    }

    /// Moves the file `from` to the directory `target` as `to`, which must not exist.
    pub(crate) fn move_new(&self, from: &OsStr, target: &Self, to: &OsStr) -> io::Result<Moved> {
        #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
        {
            use rustix::fs::RenameFlags;
            use rustix::io::Errno;
            match rustix::fs::renameat_with(&self.0, from, &target.0, to, RenameFlags::NOREPLACE) {
                // The kernel or the file system does not know the flag.
                Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {}
                other => return Ok(other.map(|()| Moved::Renamed)?),
            }
        }
        // A hard link is refused if the name is taken. It does no harm that the file has two names for a moment.
        rustix::fs::linkat(&self.0, from, &target.0, to, AtFlags::empty())?;
        Ok(Moved::Linked)
    }

    /// Moves the file `from` to the directory `target` as `to`, replacing what is there.
    pub(crate) fn move_over(&self, from: &OsStr, target: &Self, to: &OsStr) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.0, from, &target.0, to)?)
    }

    /// Removes the file `name`.
    pub(crate) fn remove(&self, name: &OsStr) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.0, name, AtFlags::empty())?)
    }

    /// Looks at this directory.
    pub(crate) fn entry(&self) -> io::Result<Entry> {
        Entry::of(&self.0)
    }

    /// Device and inode of this directory.
    pub(crate) fn id(&self) -> io::Result<(u64, u64)> {
        Ok(self.entry()?.id)
    }

    /// Whether this directory is on an overlay of several layers.
    pub(crate) fn is_layered(&self) -> io::Result<bool> {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        {
            const OVERLAYFS_SUPER_MAGIC: u32 = 0x794c_7630;
            match rustix::fs::fstatfs(&self.0) {
                // The width and the sign of this field differ between architectures.
                Ok(found) => Ok(found.f_type as u32 == OVERLAYFS_SUPER_MAGIC),
                // Some sandboxes, which have their own file system.
                Err(rustix::io::Errno::NOSYS | rustix::io::Errno::PERM) => Ok(false),
                Err(errno) => Err(errno.into()),
            }
        }
        #[cfg(not(any(target_os = "linux", target_os = "android")))]
        Ok(false)
    }

    /// The identity by which this directory is recognised.
    pub(crate) fn identity(&self) -> io::Result<Identity> {
        Identity::of(&self.0)
    }

    /// The names in this directory.
    pub(crate) fn list(&self) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.0)? {
            names.push(OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned());
        }
        Ok(names)
    }

    /// Gives the file `from` of the directory `source` a second name here.
    pub(crate) fn link(&self, source: &Self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        Ok(rustix::fs::linkat(&source.0, from, &self.0, to, AtFlags::empty())?)
    }

    /// Makes the symlink `name`, which must not exist.
    pub(crate) fn symlink(&self, to: &Path, name: &OsStr) -> io::Result<()> {
        Ok(rustix::fs::symlinkat(to, &self.0, name)?)
    }

    /// Exchanges the file `one` with the file `other` of the directory `target`, so that neither name is ever without a
    /// file; `false` if the system cannot do that.
    pub(crate) fn exchange(&self, one: &OsStr, target: &Self, other: &OsStr) -> io::Result<bool> {
        #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
        {
            use rustix::fs::RenameFlags;
            use rustix::io::Errno;
            match rustix::fs::renameat_with(&self.0, one, &target.0, other, RenameFlags::EXCHANGE) {
                Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {}
                other => return Ok(other.map(|()| true)?),
            }
        }
        let _ = (one, target, other);
        Ok(false)
    }

    /// Reads the identity of the file `name`, without following it; `None` if there is none.
    pub(crate) fn identify(&self, name: &OsStr) -> io::Result<Option<Identity>> {
        match identity_at(&self.0, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(identity) => Ok(Some(identity)),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Makes the names in this directory durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        match self.0.sync_all() {
            // Some file systems do not sync directories; nothing more can be done there.
            Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
            other => other,
        }
    }

    /// The users and groups that may use the file `name` in addition to those covered by its mode.
    pub(crate) fn guests(&self, name: &OsStr) -> io::Result<Guests> {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        return super::xattr::guests(self, &self.0, name);
        #[cfg(not(any(target_os = "linux", target_os = "android")))]
        {
            let _ = name;
            Ok(Guests::Unsupported)
        }
    }

    /// Copies to `file` the extended attributes of the file `name` that it does not already have.
    pub(crate) fn copy_xattrs(&self, name: &OsStr, file: &File) -> io::Result<()> {
        #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
        match self.read(name) {
            Ok(old) => super::xattr::copy(&old, file)?,
            // The old file has been removed; there is nothing left to keep.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        #[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
        let _ = (name, file);
        Ok(())
    }
}

impl Identity {
    /// Inode number and birth time, as one word: it stays the same unless the file is copied.
    pub(crate) fn mark(&self) -> String {
        match self.born {
            Some((seconds, nanoseconds)) => format!("{}.{seconds}.{nanoseconds}", self.inode),
            None => self.inode.to_string(),
        }
    }

    /// The identity of an open file.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        let flags = AtFlags::EMPTY_PATH;
        #[cfg(not(any(target_os = "linux", target_os = "android")))]
        let flags = AtFlags::empty();
        Ok(identity_at(file, OsStr::new(""), flags)?)
    }
}

/// The identity of the file `name` below `dir`, or of `dir` itself if `name` is empty.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn identity_at(dir: &File, name: &OsStr, flags: AtFlags) -> rustix::io::Result<Identity> {
    use rustix::fs::StatxFlags;
    use rustix::io::Errno;
    let moment = |time: rustix::fs::StatxTimestamp| (time.tv_sec, time.tv_nsec);
    match rustix::fs::statx(dir, name, flags, StatxFlags::BASIC_STATS | StatxFlags::BTIME) {
        Ok(found) => Ok(Identity {
            inode: found.stx_ino,
            born: (found.stx_mask & StatxFlags::BTIME.bits() != 0).then(|| moment(found.stx_btime)),
            size: found.stx_size,
            modified: moment(found.stx_mtime),
        }),
        // Kernels before 4.11, and some sandboxes.
        Err(Errno::NOSYS | Errno::PERM) => stat_identity(dir, name, flags),
        Err(errno) => Err(errno),
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
use stat_identity as identity_at;

fn stat_identity(dir: &File, name: &OsStr, flags: AtFlags) -> rustix::io::Result<Identity> {
    let found = match name.is_empty() {
        true => rustix::fs::fstat(dir)?,
        false => rustix::fs::statat(dir, name, flags)?,
    };
    // The widths of these fields differ between systems.
    let modified = (found.st_mtime as i64, found.st_mtime_nsec as u32);
    Ok(Identity { inode: found.st_ino as u64, born: None, size: found.st_size as u64, modified })
}

/// Looks at an open file.
pub(super) fn look_at(file: &File) -> io::Result<Entry> {
    let meta = file.metadata()?;
    Ok(Entry {
        kind: if meta.is_file() { Kind::File } else { Kind::Other("special file") },
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        id: (meta.dev(), meta.ino()),
        links: meta.nlink(),
        size: meta.size(),
    })
}

impl Entry {
    #[expect(clippy::unnecessary_cast, reason = "the widths of these fields differ between systems")]
    fn from_stat(stat: &rustix::fs::Stat) -> Self {
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Kind::File,
            FileType::Symlink => Kind::Symlink,
            FileType::Directory => Kind::Other("directory"),
            FileType::Fifo => Kind::Other("FIFO"),
            FileType::Socket => Kind::Other("socket"),
            _ => Kind::Other("device"),
        };
        Self {
            kind,
            mode: stat.st_mode as u32 & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            id: (stat.st_dev as u64, stat.st_ino as u64),
            links: stat.st_nlink as u64,
            size: stat.st_size as u64,
        }
    }
}

/// Gives `file` the owner and group of `entry`.
pub(crate) fn set_owner(file: &File, entry: &Entry) -> io::Result<()> {
    fchown(file, Some(entry.uid), Some(entry.gid))
}

/// Gives `file` exactly these permission bits.
pub(crate) fn set_mode(file: &File, mode: u32) -> io::Result<()> {
    file.set_permissions(Permissions::from_mode(mode))
}

/// Reserves space for `length` bytes in `file`, without making it longer; does nothing where that is not supported.
pub(crate) fn reserve(file: &File, length: u64) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    if length > 0 {
        use rustix::fs::FallocateFlags;
        use rustix::io::{Errno, retry_on_intr};
        match retry_on_intr(|| rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, 0, length)) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::PERM) => {}
            other => other?,
        }
    }
    let _ = (file, length);
    Ok(())
}

fn mode_bits(mode: u32) -> Mode {
    Mode::from_bits_truncate(mode as rustix::fs::RawMode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_taken_is_not_created_and_what_is_no_file_is_not_read() {
        let scratch = tempfile::tempdir().expect("the temporary directory has room");
        let dir = Dir::open(scratch.path()).expect("it is there");
        drop(dir.create("file".as_ref(), 0o600).expect("the directory is ours"));
        dir.symlink(Path::new("file"), "link".as_ref()).expect("the directory is ours");
        dir.symlink(Path::new("nowhere"), "dangling".as_ref()).expect("the directory is ours");
        for name in ["file", "link", "dangling"] {
            let error = dir.create(name.as_ref(), 0o600).expect_err(name);
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists, "{name}");
        }
        assert!(dir.read("file".as_ref()).is_ok());
        assert!(dir.read("link".as_ref()).is_err() && dir.read("dangling".as_ref()).is_err());
    }
}
