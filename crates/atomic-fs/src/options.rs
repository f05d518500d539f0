//! How a file is written: permissions, durability, symlinks and what is kept of the file that it replaces.
//!
//! Invariant: no option but [`InPlace::WithBackup`] weakens "old or new, never torn" while the machine keeps running.

use std::ops::BitOr;

/// How far a write is on the disk when it has returned `Ok`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Durability {
    /// The file and its directory are synced: `Ok` means that the new file survives a power cut. The default.
    #[default]
    Full,
    /// The file is synced before the rename, its directory is not: after a power cut the target is old or new, whole.
    Ordered,
    /// Nothing is synced: after a power cut the target may be old, new, empty or torn. For what can be made again.
    None,
}

/// What happens if the target is a symlink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Symlinks {
    /// The file that the link points to is replaced, or created if the link dangles; the link stays. The default.
    #[default]
    Follow,
    /// The link itself is replaced by the new file; what it pointed to is not touched.
    Replace,
}

/// What happens if the target cannot be replaced by a rename, as a single file that is bind-mounted into a container.
///
/// Transactions take no notice of it: a mount point among their files is always
/// [an error](crate::Error::is_not_replaceable).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InPlace {
    /// That is [an error](crate::Error::is_not_replaceable), and the target stays as it is. The default.
    #[default]
    Never,
    /// The new content is written over the old one, of which a copy lies beside the target meanwhile.
    ///
    /// **This is not atomic for readers**: while it is written, which takes about as long as a write and a sync of the new
    /// content, they may find it old, new, or anything in between. A reader that holds a shared lock of the file itself
    /// ([`File::lock_shared`](std::fs::File::lock_shared)) finds it old or new, unless a crash came before.
    ///
    /// A full disk is noticed before anything is overwritten, where the file system can reserve space; a write that fails
    /// half way puts the old content back. After a crash or a power cut, [`recover`](crate::recover) of the target's
    /// directory puts it back; until then the target may be half written, and another such write is
    /// [refused](crate::Error::is_unrecovered). Recover before anybody else writes to the file, by another directory in which
    /// it is mounted or in another container, or that is undone.
    ///
    /// - The copy, `.afs-place-…-old`, lies in the directory of the mount point, not of what is mounted there; that must be
    ///   writable. In a container it is the container's own layer, which outlives a crash and a restart of the container,
    ///   but not its removal.
    /// - While a mount is absent its backup is [refused](crate::Error::is_refused), and not put back into the file below. So
    ///   it is if a file system numbers its files anew when it is mounted; then the error names the backup to copy by hand.
    /// - The file stays the one that it was, with its owner, its attributes and its access control list, whatever
    ///   [`preserve`](WriteOptions::preserve) says; its mode too, unless [one is given](WriteOptions::mode), of which the
    ///   group bits then limit that list. As with any write, set-ID bits go if whoever writes is not privileged.
    /// - What a recovery needs is synced, whatever [`durability`](WriteOptions::durability) says: five syncs beside that of
    ///   the temporary file.
    /// - Writers of one file take turns, also those in other containers and by other names: a lock of the file is waited for
    ///   up to 5 s, which then is [an error](crate::Error::is_busy). A file system without locks is one too. Whoever may
    ///   read the file can hold that lock, and so keep it from being written.
    /// - Dropped before the first byte is overwritten, it changes nothing. A drop that finds it begun blocks its thread until
    ///   all is written and synced, or put back.
    ///
    /// It needs Unix; elsewhere it is as `Never`.
    WithBackup,
}

/// What the new file keeps of the one that it replaces; a set, joined by `|`.
///
/// # Examples
///
/// ```
/// use cancel_safe_atomic_fs::Preserve;
///
/// let kept = Preserve::MODE | Preserve::OWNER;
/// assert!(kept.contains(Preserve::OWNER) && !kept.contains(Preserve::XATTR));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Preserve(u8);

impl Preserve {
    /// Nothing: the new file is as any that is newly created.
    pub const NONE: Self = Self(0);
    /// The permission bits and, on Linux, the POSIX access control list, which belongs to them.
    ///
    /// The new file grants nobody what the old one did not. If the owner changes, the owner's bits are those of whoever
    /// writes, and the set-user-ID bit is dropped. If the group changes, the new group and all others keep only what the
    /// old group and all others both had (0640 becomes 0600, 0664 becomes 0644), and the set-group-ID bit is dropped;
    /// users and groups that a list names keep what it grants them. A default list of the directory is not applied.
    pub const MODE: Self = Self(1);
    /// The owner and the group. Keeping those of others needs a privilege; without it the write fails, target untouched.
    pub const OWNER: Self = Self(2);
    /// The extended attributes, such as security labels. POSIX access control lists are not among them: they go with the
    /// mode.
    pub const XATTR: Self = Self(4);
    /// All of them.
    pub const ALL: Self = Self(7);

    /// Whether all of `other` is in this set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl Default for Preserve {
    /// Permission bits and access control list only, so that a private file stays private.
    fn default() -> Self {
        Self::MODE
    }
}

impl BitOr for Preserve {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// How a file is written; made by [`AtomicFileWriter::options`](crate::AtomicFileWriter::options).
///
/// | option | default |
/// |---|---|
/// | [`mode`](Self::mode) | that of the file being replaced, or what the umask, or the directory's default list, leaves of 0666 |
/// | [`durability`](Self::durability) | [`Durability::Full`] |
/// | [`symlinks`](Self::symlinks) | [`Symlinks::Follow`] |
/// | [`preserve`](Self::preserve) | [`Preserve::MODE`] |
/// | [`create_new`](Self::create_new) | `false` |
/// | [`in_place`](Self::in_place) | [`InPlace::Never`] |
///
/// # Examples
///
/// ```
/// use cancel_safe_atomic_fs::AtomicFileWriter;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> std::io::Result<()> {
/// # let dir = tempfile::tempdir()?;
/// let path = dir.path().join("secret");
/// AtomicFileWriter::options().mode(0o600).create_new(true).write(&path, "xyzzy").await?;
/// assert_eq!(std::fs::read(&path)?, b"xyzzy");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct WriteOptions {
    pub(crate) mode: Option<u32>,
    pub(crate) durability: Durability,
    pub(crate) symlinks: Symlinks,
    pub(crate) preserve: Preserve,
    pub(crate) create_new: bool,
    pub(crate) in_place: InPlace,
}

impl WriteOptions {
    /// Sets the permission bits, exactly: neither does the umask apply, nor what the replaced file had, nor, for new files
    /// too, a default access control list of the directory.
    ///
    /// Bits beyond the twelve permission bits are ignored.
    #[must_use = "options do nothing until a file is opened or written with them"]
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = Some(mode & 0o7777);
        self
    }

    /// Sets how far a write is on the disk when it has returned `Ok`.
    #[must_use = "options do nothing until a file is opened or written with them"]
    pub fn durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    /// Sets what happens if the target is a symlink.
    #[must_use = "options do nothing until a file is opened or written with them"]
    pub fn symlinks(mut self, symlinks: Symlinks) -> Self {
        self.symlinks = symlinks;
        self
    }

    /// Sets what the new file keeps of the one that it replaces.
    ///
    /// What is kept is what the replaced file has at the commit.
    #[must_use = "options do nothing until a file is opened or written with them"]
    pub fn preserve(mut self, preserve: Preserve) -> Self {
        self.preserve = preserve;
        self
    }

    /// Sets whether the target must not exist, not even as a dangling symlink.
    ///
    /// This is decided by the rename itself: of many writers that create one file, exactly one gets `Ok`.
    #[must_use = "options do nothing until a file is opened or written with them"]
    pub fn create_new(mut self, create_new: bool) -> Self {
        self.create_new = create_new;
        self
    }

    /// Sets what happens if the target cannot be replaced by a rename. Transactions take no notice of it.
    #[must_use = "options do nothing until a file is opened or written with them"]
    pub fn in_place(mut self, in_place: InPlace) -> Self {
        self.in_place = in_place;
        self
    }
}
