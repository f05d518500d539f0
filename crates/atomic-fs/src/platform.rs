//! The system calls that differ between systems, below one directory handle.
//!
//! Invariant: every name is resolved below a directory that was opened once, so neither `chdir` nor a renamed parent
//! can send half of an operation elsewhere. Only this room depends on the system.

use std::fs::File;
use std::io;

#[cfg(any(target_os = "linux", target_os = "android"))]
mod acl;
#[cfg(any(not(unix), test))]
mod portable;
#[cfg(unix)]
mod unix;
#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
mod xattr;

#[cfg(not(unix))]
use portable as imp;
#[cfg(unix)]
use unix as imp;

#[cfg(unix)]
pub(crate) use imp::reserve;
pub(crate) use imp::{Dir, set_mode, set_owner};
#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(crate) use no_lists::set_access;
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(crate) use xattr::set_access;

/// What a directory entry is, without following it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Symlink,
    /// Something a rename must not replace; its name is for the error message.
    Other(&'static str),
}

/// The metadata of a directory entry, or of an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    /// The twelve permission bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Device and inode: they tell whether two looks saw the same file.
    pub(crate) id: (u64, u64),
    /// How many names the file has; none once it has been unlinked.
    pub(crate) links: u64,
    /// The length in bytes.
    pub(crate) size: u64,
}

/// A moment on the clock of a file system: seconds and nanoseconds.
#[cfg(unix)]
pub(crate) type Moment = (i64, u32);

/// The identity by which a file is recognised, without reading it.
#[cfg(unix)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) inode: u64,
    /// When it was created, if the file system records that. It distinguishes a reused inode number.
    pub(crate) born: Option<Moment>,
    pub(crate) size: u64,
    pub(crate) modified: Moment,
}

/// The users and groups that may use a file in addition to those covered by its mode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Guests {
    /// Here no file has an access control list.
    Unsupported,
    /// Nobody.
    None,
    #[cfg(any(target_os = "linux", target_os = "android"))]
    Listed(acl::List),
    /// The file was removed before its list could be read, so it is unknown whether its group bits were a list's mask.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    Unknown,
}

impl Guests {
    /// For a directory: its writers, as they should be allowed to write to a file in it.
    #[cfg(unix)]
    pub(crate) fn for_writers(self) -> Self {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        if let Self::Listed(list) = self {
            return Self::Listed(list.for_writers());
        }
        self
    }

    /// Those who keep access when the file has another group.
    pub(crate) fn for_another_group(self) -> Self {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        if let Self::Listed(list) = self {
            return Self::Listed(list.for_another_group());
        }
        self
    }
}

/// Systems whose access control lists, if they have any, are not POSIX ones.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
mod no_lists {
    use std::fs::File;
    use std::io;

    use super::Guests;

    /// Gives `file` exactly these permission bits; `now` are its present ones.
    pub(crate) fn set_access(file: &File, now: u32, mode: u32, _guests: &Guests) -> io::Result<()> {
        super::change_mode(file, now, mode)
    }
}

/// Gives `file`, which has no access control list, the permission bits `mode` instead of `now`.
///
/// Bits that it already has are not set again: on a file system that gives all its files the same bits, such as FAT,
/// the files belong to another user, and only that user may set bits.
fn change_mode(file: &File, now: u32, mode: u32) -> io::Result<()> {
    if now == mode { Ok(()) } else { set_mode(file, mode) }
}

/// How a file came to its new name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moved {
    /// The old name is gone.
    Renamed,
    /// The old name is still there, and the caller has to remove it.
    Linked,
}

impl Entry {
    /// Looks at an open file.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        imp::look_at(file)
    }
}
