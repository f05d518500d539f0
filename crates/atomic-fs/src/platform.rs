//! The system calls that differ between systems, below one directory handle.
//!
//! Invariant: every name is resolved below a directory that was opened once, so that neither `chdir` nor a renamed
//! parent can send half of an operation elsewhere. No other room asks which system it runs on.

pub(crate) use imp::{Dir, set_mode, set_owner};

/// What a directory entry is, without following it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Symlink,
    /// Something a rename must not replace; its name is for the error message.
    Other(&'static str),
}

/// What a look at a directory entry, or at an open file, told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    /// The twelve permission bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Device and inode: whether two looks saw the same file.
    pub(crate) id: (u64, u64),
    /// How many names the file has; none once it has been unlinked.
    pub(crate) links: u64,
    /// The length in bytes.
    #[cfg(unix)]
    pub(crate) size: u64,
}

/// With whom the lock of a directory is shared.
#[cfg(unix)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    Readers,
    Nobody,
}

/// How a file came to its new name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moved {
    /// The old name is gone.
    Renamed,
    /// The old name is still there and is the caller's to remove.
    Linked,
}

#[cfg(unix)]
mod imp {
    use std::ffi::{OsStr, OsString};
    use std::fs::{File, Permissions, TryLockError};
    use std::io;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
    use std::path::{Path, PathBuf};

    use rustix::fs::{AtFlags, FileType, Mode, OFlags};

    use super::{Entry, Kind, Moved, Share};

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

        /// Creates the file `name`, which must not exist; the umask applies to `mode`.
        pub(crate) fn create(&self, name: &OsStr, mode: u32) -> io::Result<File> {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            Ok(File::from(rustix::fs::openat(&self.0, name, flags, mode_bits(mode))?))
        }

        /// Opens the file `name` for reading, following no symlink and waiting for no FIFO.
        pub(crate) fn read(&self, name: &OsStr) -> io::Result<File> {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            Ok(File::from(rustix::fs::openat(&self.0, name, flags, Mode::empty())?))
        }

        /// Renames `from` to `to`, replacing what is there.
        pub(crate) fn rename(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
            Ok(rustix::fs::renameat(&self.0, from, &self.0, to)?)
        }

        /// Renames `from` to `to`, which must not exist.
        pub(crate) fn rename_new(&self, from: &OsStr, to: &OsStr) -> io::Result<Moved> {
            #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
            {
                use rustix::fs::RenameFlags;
                use rustix::io::Errno;
                match rustix::fs::renameat_with(&self.0, from, &self.0, to, RenameFlags::NOREPLACE) {
                    // The kernel or the file system does not know the flag.
                    Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {}
                    other => return Ok(other.map(|()| Moved::Renamed)?),
                }
            }
            // A hard link is refused if the name is taken. That the file has two names for a moment harms nobody.
            rustix::fs::linkat(&self.0, from, &self.0, to, AtFlags::empty())?;
            Ok(Moved::Linked)
        }

        /// Removes the file `name`.
        pub(crate) fn remove(&self, name: &OsStr) -> io::Result<()> {
            Ok(rustix::fs::unlinkat(&self.0, name, AtFlags::empty())?)
        }

        /// Device and inode of this directory.
        pub(crate) fn id(&self) -> io::Result<(u64, u64)> {
            Ok(Entry::of(&self.0)?.id)
        }

        /// The names in this directory.
        pub(crate) fn list(&self) -> io::Result<Vec<OsString>> {
            let mut names = Vec::new();
            for entry in rustix::fs::Dir::read_from(&self.0)? {
                names.push(OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned());
            }
            Ok(names)
        }

        /// Tries to lock this directory against others that do so; the lock lives as long as this handle.
        pub(crate) fn try_lock(&self, share: Share) -> Result<(), TryLockError> {
            match share {
                Share::Readers => self.0.try_lock_shared(),
                Share::Nobody => self.0.try_lock(),
            }
        }

        /// Gives the file `from` of the directory `source` a second name here.
        pub(crate) fn link(&self, source: &Self, from: &OsStr, to: &OsStr) -> io::Result<()> {
            Ok(rustix::fs::linkat(&source.0, from, &self.0, to, AtFlags::empty())?)
        }

        /// Exchanges two files, so that neither name is ever without one; `false` if the system cannot do that.
        pub(crate) fn exchange(&self, one: &OsStr, other: &OsStr) -> io::Result<bool> {
            #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
            {
                use rustix::fs::RenameFlags;
                use rustix::io::Errno;
                match rustix::fs::renameat_with(&self.0, one, &self.0, other, RenameFlags::EXCHANGE) {
                    Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {}
                    other => return Ok(other.map(|()| true)?),
                }
            }
            let _ = (one, other);
            Ok(false)
        }

        /// Makes the names in this directory durable.
        pub(crate) fn sync(&self) -> io::Result<()> {
            match self.0.sync_all() {
                // Some file systems do not let a directory be synced; there is nothing more that one could do there.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
                other => other,
            }
        }

        /// Copies to `file` the extended attributes of the file `name` that it does not already have.
        pub(crate) fn copy_xattrs(&self, name: &OsStr, file: &File) -> io::Result<()> {
            #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
            match self.read(name) {
                Ok(old) => super::xattr::copy(&old, file)?,
                // Somebody has removed the old file; there is nothing left to keep.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            #[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
            let _ = (name, file);
            Ok(())
        }
    }

    impl Entry {
        /// Looks at an open file.
        pub(crate) fn of(file: &File) -> io::Result<Self> {
            let meta = file.metadata()?;
            Ok(Self {
                kind: if meta.is_file() { Kind::File } else { Kind::Other("special file") },
                mode: meta.mode() & 0o7777,
                uid: meta.uid(),
                gid: meta.gid(),
                id: (meta.dev(), meta.ino()),
                links: meta.nlink(),
                size: meta.size(),
            })
        }

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

    fn mode_bits(mode: u32) -> Mode {
        Mode::from_bits_truncate(mode as rustix::fs::RawMode)
    }
}

#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
mod xattr {
    use std::ffi::{CStr, CString};
    use std::fs::File;
    use std::io;

    use rustix::fs::{XattrFlags, fgetxattr, flistxattr, fsetxattr};
    use rustix::io::Errno;

    /// The kernel's own limit for one value and for the list of names.
    const LIMIT_BYTES: usize = 64 << 10;

    /// Copies every attribute of `from` that `to` does not already have with the same value.
    pub(super) fn copy(from: &File, to: &File) -> io::Result<()> {
        for name in names(from)? {
            // An attribute that vanished since it was listed is not there to be kept.
            let Some(value) = get(from, &name)? else { continue };
            // Security labels are often set by the kernel itself, and setting them again may need a privilege.
            if get(to, &name)?.as_ref() != Some(&value) {
                fsetxattr(to, &*name, &value, XattrFlags::empty())?;
            }
        }
        Ok(())
    }

    fn names(file: &File) -> io::Result<Vec<CString>> {
        let mut list = vec![0; LIMIT_BYTES];
        let length = match flistxattr(file, &mut list[..]) {
            Ok(length) => length,
            // A file system without attributes has none to keep.
            Err(Errno::NOTSUP) => 0,
            Err(errno) => return Err(errno.into()),
        };
        let names = list[..length].split_inclusive(|&byte| byte == 0);
        Ok(names.filter_map(|name| CStr::from_bytes_with_nul(name).ok()).map(CStr::to_owned).collect())
    }

    fn get(file: &File, name: &CStr) -> io::Result<Option<Vec<u8>>> {
        let mut value = vec![0; LIMIT_BYTES];
        match fgetxattr(file, name, &mut value[..]) {
            Ok(length) => {
                value.truncate(length);
                Ok(Some(value))
            }
            #[cfg(any(target_os = "linux", target_os = "android"))]
            Err(Errno::NODATA) => Ok(None),
            #[cfg(target_vendor = "apple")]
            Err(Errno::NOATTR) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

#[cfg(not(unix))]
mod imp {
    use std::ffi::OsStr;
    use std::fs::{self, File, Metadata, OpenOptions};
    use std::io;
    use std::path::{Path, PathBuf};

    use super::{Entry, Kind, Moved};

    /// A directory by its absolute path, for systems without calls below a directory handle.
    #[derive(Debug)]
    pub(crate) struct Dir(PathBuf);

    impl Dir {
        /// Opens the directory `path`.
        pub(crate) fn open(path: &Path) -> io::Result<Self> {
            let path = std::path::absolute(path)?;
            if fs::metadata(&path)?.is_dir() { Ok(Self(path)) } else { Err(io::ErrorKind::NotADirectory.into()) }
        }

        /// Opens `path` as seen from this directory.
        pub(crate) fn open_dir(&self, path: &Path) -> io::Result<Self> {
            Self::open(&self.0.join(path))
        }

        /// Looks at `name` without following it; `None` if there is none.
        pub(crate) fn look(&self, name: &OsStr) -> io::Result<Option<Entry>> {
            match fs::symlink_metadata(self.0.join(name)) {
                Ok(meta) => Ok(Some(Entry::from_metadata(&meta))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            }
        }

        /// Reads where the symlink `name` points.
        pub(crate) fn read_link(&self, name: &OsStr) -> io::Result<PathBuf> {
            fs::read_link(self.0.join(name))
        }

        /// Creates the file `name`, which must not exist.
        pub(crate) fn create(&self, name: &OsStr, _mode: u32) -> io::Result<File> {
            File::create_new(self.0.join(name))
        }

        /// Opens the file `name` for reading.
        pub(crate) fn read(&self, name: &OsStr) -> io::Result<File> {
            OpenOptions::new().read(true).open(self.0.join(name))
        }

        /// Renames `from` to `to`, replacing what is there.
        pub(crate) fn rename(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
            fs::rename(self.0.join(from), self.0.join(to))
        }

        /// Renames `from` to `to`, which must not exist.
        pub(crate) fn rename_new(&self, from: &OsStr, to: &OsStr) -> io::Result<Moved> {
            fs::hard_link(self.0.join(from), self.0.join(to))?;
            Ok(Moved::Linked)
        }

        /// Removes the file `name`.
        pub(crate) fn remove(&self, name: &OsStr) -> io::Result<()> {
            fs::remove_file(self.0.join(name))
        }

        /// These systems have no call that syncs a directory.
        pub(crate) fn sync(&self) -> io::Result<()> {
            Ok(())
        }

        /// These systems have no extended attributes that std or rustix could copy.
        pub(crate) fn copy_xattrs(&self, _name: &OsStr, _file: &File) -> io::Result<()> {
            Ok(())
        }
    }

    impl Entry {
        /// Looks at an open file.
        pub(crate) fn of(file: &File) -> io::Result<Self> {
            Ok(Self::from_metadata(&file.metadata()?))
        }

        fn from_metadata(meta: &Metadata) -> Self {
            let kind = if meta.is_file() {
                Kind::File
            } else if meta.is_symlink() {
                Kind::Symlink
            } else {
                Kind::Other("directory")
            };
            Self { kind, mode: 0, uid: 0, gid: 0, id: (0, 0), links: 1 }
        }
    }

    /// These systems have no owner to set.
    pub(crate) fn set_owner(_file: &File, _entry: &Entry) -> io::Result<()> {
        Ok(())
    }

    /// These systems have no permission bits to set.
    pub(crate) fn set_mode(_file: &File, _mode: u32) -> io::Result<()> {
        Ok(())
    }
}
