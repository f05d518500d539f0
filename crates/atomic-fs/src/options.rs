//! How to write a file: permissions, durability, symlinks, and what to keep of the file that it replaces.
//!
//! Invariant: no option but [`InPlace::WithBackup`] weakens "old or new, never torn" while the machine keeps running.

use std::ops::BitOr;

/// How durable a write is when it has returned `Ok`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Durability {
    /// The file and its directory are synced: `Ok` means that the new file survives a power cut. The default.
    #[default]
    Full,
    /// The file is synced before the rename, but its directory is not: after a power cut the target is old or new,
    /// whole.
    Ordered,
    /// Nothing is synced: after a power cut the target may be old, new, empty or torn. Use it for files that can be
    /// made again.
    None,
}

/// What happens if the target is a symlink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Symlinks {
    /// Replaces the file that the link points to, or creates it if the link dangles; the link stays. The default.
    #[default]
    Follow,
    /// Replaces the link itself with the new file, and does not touch the file that it pointed to.
    Replace,
}

/// What happens if no rename can replace the target, such as a single file that is bind-mounted into a container.
///
/// Transactions ignore it: a mount point among their files is always [an error](crate::Error::is_not_replaceable).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InPlace {
    /// Returns [an error](crate::Error::is_not_replaceable), and the target stays as it is. The default.
    #[default]
    Never,
    /// Writes the new content over the old one, and meanwhile keeps a copy of the old content beside the target.
    ///
    /// **This is not atomic for readers**: during the write, which takes about as long as a write and a sync of the new
    /// content, they may find it old, new, or anything in between. A reader that holds a shared lock on the file itself
    /// ([`File::lock_shared`](std::fs::File::lock_shared)) finds it old or new, unless a crash came before.
    ///
    /// If the file system can reserve space, a full disk is noticed before anything is overwritten. A write that fails
    /// halfway puts the old content back. After a crash or a power cut, [`recover`](crate::recover) of the target's
    /// directory puts it back; until then the target may be half written, and another such write is
    /// [refused](crate::Error::is_unrecovered). Recover before anybody writes to the file by way of another directory
    /// where it is mounted or in another container; otherwise the recovery undoes that write.
    ///
    /// - The copy, `.afs-place-…-old`, is in the directory of the mount point, not of the mounted file; this directory
    ///   must be writable. In a container it is the container's own layer, which outlives a crash and a restart of the
    ///   container, but not its removal.
    /// - While a mount is absent, its backup is [refused](crate::Error::is_refused), and not put back into the file
    ///   below. The same happens if a file system renumbers its files when it is mounted; the error then names the
    ///   backup to copy by hand.
    /// - The file stays the same file, with its owner, its attributes and its access control list, whatever
    ///   [`preserve`](WriteOptions::preserve) says. It also keeps its mode, unless [one is given](WriteOptions::mode);
    ///   the group bits of that mode then limit the list. As with any write, set-ID bits are lost if the writer is not
    ///   privileged.
    /// - Everything that a recovery needs is synced, whatever [`durability`](WriteOptions::durability) says: five syncs
    ///   besides the one of the temporary file.
    /// - Writers of one file take turns, also from other containers and under other names. A writer waits at most 5 s
    ///   for a lock on the file, then returns [an error](crate::Error::is_busy). A file system without locks is an
    ///   error too. Anybody who may read the file can hold that lock, and so keep the file from being written.
    /// - If it is dropped before the first byte is overwritten, it changes nothing. A later drop blocks its thread
    ///   until everything is written and synced, or put back.
    ///
    /// It needs Unix; elsewhere it works like `Never`.
    WithBackup,
}

/// What the new file keeps of the one that it replaces. It is a set: join members with `|`.
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
    /// Nothing: the new file is like any newly created file.
    pub const NONE: Self = Self(0);
    /// The permission bits and, on Linux, the POSIX access control list, which belongs to them.
    ///
    /// The new file never grants more access than the old one did. If the owner changes, the owner's bits apply to the
    /// writer, and the set-user-ID bit is dropped. If the group changes, the new group and all others keep only what
    /// the old group and all others both had (0640 becomes 0600, 0664 becomes 0644), and the set-group-ID bit is
    /// dropped. Users and groups that a list names keep what it grants them. A default list of the directory is not
    /// applied.
    pub const MODE: Self = Self(1);
    /// The owner and the group. To keep another user's, the writer needs a privilege; without it the write fails and
    /// the target is untouched.
    pub const OWNER: Self = Self(2);
    /// The extended attributes, such as security labels. They do not include POSIX access control lists, which belong
    /// to the mode.
    pub const XATTR: Self = Self(4);
    /// All of them.
    pub const ALL: Self = Self(7);

    /// Returns whether all of `other` is in this set.
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
/// | [`mode`](Self::mode) | the mode of the file being replaced, or what the umask, or the directory's default list, leaves of 0666 |
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
    /// Sets the permission bits exactly. The umask, the bits of the replaced file and (for new files too) a default
    /// access control list of the directory do not apply.
    ///
    /// Bits beyond the twelve permission bits are ignored.
    #[must_use = "options do nothing until a file is opened or written with them"]
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = Some(mode & 0o7777);
        self
    }

    /// Sets how durable a write is when it has returned `Ok`.
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
    /// It keeps what the replaced file has at the time of the commit.
    #[must_use = "options do nothing until a file is opened or written with them"]
    pub fn preserve(mut self, preserve: Preserve) -> Self {
        self.preserve = preserve;
        self
    }

    /// Sets whether the target must not exist, not even as a dangling symlink.
    ///
    /// The rename itself decides this: if many writers create one file, exactly one gets `Ok`.
    #[must_use = "options do nothing until a file is opened or written with them"]
    pub fn create_new(mut self, create_new: bool) -> Self {
        self.create_new = create_new;
        self
    }

    /// Sets what happens if no rename can replace the target. Transactions ignore it.
    #[must_use = "options do nothing until a file is opened or written with them"]
    pub fn in_place(mut self, in_place: InPlace) -> Self {
        self.in_place = in_place;
        self
    }
}
