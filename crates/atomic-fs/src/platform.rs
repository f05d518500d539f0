//! The system calls that differ between systems, below one directory handle.
//!
//! Invariant: every name is resolved below a directory that was opened once, so that neither `chdir` nor a renamed
//! parent can send half of an operation elsewhere. No other room asks which system it runs on.

use std::fs::File;
use std::io;

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
    pub(crate) size: u64,
}

/// A moment on the clock of a file system: seconds and nanoseconds.
#[cfg(unix)]
pub(crate) type Moment = (i64, u32);

/// By what a file is known again, without reading it.
#[cfg(unix)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) inode: u64,
    /// When it was created, where the file system tells: then a number that was given anew is no confusion.
    pub(crate) born: Option<Moment>,
    pub(crate) size: u64,
    pub(crate) modified: Moment,
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

impl Entry {
    /// Looks at an open file.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        imp::look_at(file)
    }
}
