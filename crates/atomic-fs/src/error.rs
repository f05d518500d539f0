//! What can go wrong, and what that means for the target.
//!
//! Invariant: [`Error::target`] alone tells whether the target was changed, and `Unchanged` is final.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What a failed call means for its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TargetState {
    /// The target is as it was, and the failed call will never change it.
    Unchanged,
    /// The target is the new file, whole, but it may not survive a power cut.
    Visible,
    /// For a transaction: each of its files is old or new, whole, and [`recover`](crate::recover) makes them all old or
    /// all new. Until then a reader may find a mix. For a file that was [written in place](crate::InPlace): it may be
    /// half written, and [`recover`](crate::recover) restores the old content.
    Undecided,
}

/// Why a file could not be written, or a directory not be swept.
///
/// It names the target's path as the caller gave it; transactions name an absolute path. [`target`](Error::target) says
/// what became of the target, and the `is_*` predicates say what a caller can do about it.
///
/// It converts into [`io::Error`], so `?` works in a function that returns [`io::Result`].
///
/// # Examples
///
/// ```
/// use cancel_safe_atomic_fs::{self as atomic_fs, TargetState};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// # let dir = tempfile::tempdir().unwrap();
/// let error = atomic_fs::write(dir.path(), "this is a directory").await.unwrap_err();
/// assert!(error.is_not_a_file());
/// assert_eq!(error.target(), TargetState::Unchanged);
/// # }
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The path cannot be the target of a write. Choose another.
    #[error("{path:?} does not name a file: {reason}")]
    InvalidPath {
        /// The target, as the caller gave it.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The directory that should hold the target does not exist. Create it first; this crate never does.
    #[error("the directory {directory:?} does not exist")]
    MissingDirectory {
        /// The directory that is missing.
        directory: PathBuf,
    },
    /// The target is a directory, a FIFO, a socket or a device. No file replaces those.
    #[error("{} is a {kind}, not a regular file", named(.path, .resolved))]
    NotAFile {
        /// The target, as the caller gave it.
        path: PathBuf,
        /// What the path leads to, if it is a symlink that was followed.
        resolved: Option<PathBuf>,
        /// What it is.
        kind: &'static str,
    },
    /// The target exists, but the caller asked for [`create_new`](crate::WriteOptions::create_new).
    #[error("{path:?} already exists")]
    AlreadyExists {
        /// The target, as the caller gave it.
        path: PathBuf,
    },
    /// The target is a mount point, such as a file that is bind-mounted into a container. No rename replaces one. See
    /// [`InPlace`](crate::InPlace).
    #[error("{} cannot be replaced or removed, because it is a mount point", named(.path, .resolved))]
    NotReplaceable {
        /// The target, as the caller gave it.
        path: PathBuf,
        /// The mount point, if the path is a symlink that was followed there.
        resolved: Option<PathBuf>,
        /// The error of the rename or the removal.
        source: io::Error,
    },
    /// A system call failed before the target was touched.
    #[error("could not {action} {}", named(.path, .resolved))]
    Io {
        /// What was attempted.
        action: &'static str,
        /// The target, as the caller gave it, or the directory that was swept.
        path: PathBuf,
        /// What the path leads to, if it is a symlink that was followed.
        resolved: Option<PathBuf>,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The new file is in place, but syncing its directory failed: a power cut may still bring the old one back.
    ///
    /// Do not retry the sync. Write the file again, or tell the user.
    #[error("{path:?} is installed, but whether it is durable is unknown")]
    NotDurable {
        /// The target, as the caller gave it.
        path: PathBuf,
        /// The error of the directory sync.
        source: io::Error,
    },
    /// The time ran out before the rename began, so this call will never change the target.
    #[error("{path:?} was not written within {timeout:?}")]
    TimedOut {
        /// The target, as the caller gave it.
        path: PathBuf,
        /// The time that the call was given.
        timeout: Duration,
    },
    /// The runtime was shut down before the rename began.
    #[error("the runtime was shut down before {path:?} was written")]
    Interrupted {
        /// The target, as the caller gave it.
        path: PathBuf,
    },
    /// An earlier write to this writer, or the sync of a file of this transaction, failed, so nothing of it is
    /// published.
    #[error("{path:?} cannot be written, because an earlier write failed")]
    Broken {
        /// The target, as the caller gave it.
        path: PathBuf,
    },
    /// A transaction names the same target twice, possibly by way of a symlink. Nothing was done.
    #[error("{path:?} is changed twice in one transaction")]
    RepeatedTarget {
        /// The target, as the caller gave it the second time.
        path: PathBuf,
    },
    /// A target is on a different file system from the journal, or the two paths of a rename are on two file systems.
    #[error("{path:?} is not on the file system of its transaction")]
    OtherFileSystem {
        /// The target, as the caller gave it.
        path: PathBuf,
    },
    /// Other transactions or readers held the lock of a directory all the time, or files that were to be opened
    /// together kept changing. Try again, or find out what holds the lock.
    #[error("the directory {directory:?} was busy for {waited:?}")]
    Busy {
        /// The directory.
        directory: PathBuf,
        /// How long the call waited.
        waited: Duration,
    },
    /// Another holder kept the lock of a file to be [written in place](crate::InPlace). Try again.
    #[error("{path:?} was locked for {waited:?}")]
    FileBusy {
        /// The target.
        path: PathBuf,
        /// How long the call waited.
        waited: Duration,
    },
    /// A crash left a transaction, or a write in place of this target, unfinished in this directory. Call
    /// [`recover`](crate::recover) first.
    #[error("the directory {directory:?} holds an unfinished transaction or write in place")]
    Unrecovered {
        /// The directory with the journal or the backup.
        directory: PathBuf,
    },
    /// A transaction could be neither finished nor undone, because the disk failed. [`recover`](crate::recover) decides
    /// it. If `recover` itself returned this error, call it again.
    #[error("the transaction in {directory:?} is undecided until it is recovered")]
    Undecided {
        /// The directory with the journal.
        directory: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// A write in place failed, and the old content could not be put back, because the disk failed twice.
    /// [`recover`](crate::recover) puts it back. If `recover` itself returned this error, call it again.
    ///
    /// To repair it by hand: copy the backup over the target, and remove the backup and the entry of the same name
    /// without `-old`.
    #[error("{path:?} may be half written: recover its directory, or copy {backup:?} over it by hand")]
    Torn {
        /// The target, as the caller gave it.
        path: PathBuf,
        /// Where its old content is.
        backup: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// A crash cut a write in place, and its backup is not put back, because nothing proves that it belongs there. The
    /// target was not touched.
    ///
    /// To repair it by hand: mount what was mounted there and recover again; or copy the backup to where it belongs,
    /// and remove the backup and the record.
    #[error(
        "{record:?} is of a write in place that was cut, but {reason}; the target was not touched: set that right and \
         recover again, or copy {backup:?} to where it belongs and remove both by hand"
    )]
    UnusableBackup {
        /// What should lead from the backup to its target.
        record: PathBuf,
        /// Where the old content of the target is.
        backup: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
    /// A journal cannot be read. Nothing was touched.
    ///
    /// To repair it by hand: restore the journal from a backup. Or look at the targets, keep the file that you want of
    /// each (the name beside it that begins with `.afs-tx-` holds the other one), and remove the journal.
    #[error("the journal {journal:?} is not valid ({reason}); nothing was touched: restore it, or remove it by hand")]
    CorruptJournal {
        /// The journal.
        journal: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A file is neither what it was before the transaction nor what it should become. Nothing was touched.
    ///
    /// To repair it by hand: move that file out of the way; or decide for yourself what each target should be, and
    /// remove the journal.
    #[error(
        "{path:?} is neither the old nor the new file of the transaction {journal:?}; nothing was touched: \
         move it out of the way and recover again, or set the targets right and remove the journal by hand"
    )]
    UnknownFile {
        /// The target.
        path: PathBuf,
        /// The journal.
        journal: PathBuf,
    },
    /// A transaction spans two directories, and one of them is not where the other says. Nothing was touched.
    ///
    /// To repair it by hand: move both back to their old places relative to each other, or copy or move the directory
    /// that contains both. Or decide for yourself what each target should be, and remove the journal or the pointer to
    /// it.
    #[error(
        "{journal:?} is of a transaction that has to do with the directory {directory:?}, which {reason}; nothing was \
         touched: bring the directories back to where they were in relation to each other and recover again, or set \
         the targets right and remove {journal:?} by hand"
    )]
    Misplaced {
        /// The journal, or the pointer to it in each other directory that takes part.
        journal: PathBuf,
        /// Where the other directory should be.
        directory: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The call was made outside a tokio runtime.
    #[error("{path:?} cannot be written outside a tokio runtime")]
    NoRuntime {
        /// The target, as the caller gave it.
        path: PathBuf,
    },
    /// The value could not be turned into JSON.
    #[cfg(feature = "json")]
    #[error("the value for {path:?} could not be turned into JSON")]
    Serialize {
        /// The target, as the caller gave it.
        path: PathBuf,
        /// The error of the serializer.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Error {
    /// Returns what the failure means for the target.
    pub fn target(&self) -> TargetState {
        match self {
            Self::NotDurable { .. } => TargetState::Visible,
            Self::Undecided { .. } | Self::Torn { .. } => TargetState::Undecided,
            _ => TargetState::Unchanged,
        }
    }

    /// Returns whether the time ran out.
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::TimedOut { .. })
    }

    /// Returns whether the directory that should hold the target is missing.
    pub fn is_missing_directory(&self) -> bool {
        matches!(self, Self::MissingDirectory { .. })
    }

    /// Returns whether the target is a directory, a FIFO, a socket or a device.
    pub fn is_not_a_file(&self) -> bool {
        matches!(self, Self::NotAFile { .. })
    }

    /// Returns whether the target exists although it must not.
    pub fn is_already_exists(&self) -> bool {
        matches!(self, Self::AlreadyExists { .. })
    }

    /// Returns whether the target is a mount point.
    ///
    /// Such a file can only be written in place, and readers may find it half written. If you prefer that to no new
    /// content at all, ask for it with [`InPlace::WithBackup`](crate::InPlace::WithBackup).
    pub fn is_not_replaceable(&self) -> bool {
        matches!(self, Self::NotReplaceable { .. })
    }

    /// Returns whether a transaction names the same target twice.
    pub fn is_repeated_target(&self) -> bool {
        matches!(self, Self::RepeatedTarget { .. })
    }

    /// Returns whether a target is on a different file system from its transaction.
    pub fn is_other_file_system(&self) -> bool {
        matches!(self, Self::OtherFileSystem { .. })
    }

    /// Returns whether a directory, or a file to be written in place, stayed locked by others.
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Busy { .. } | Self::FileBusy { .. })
    }

    /// Returns whether an unfinished transaction or write in place, left by a crash or a failing disk, must be
    /// recovered first.
    pub fn is_unrecovered(&self) -> bool {
        matches!(self, Self::Unrecovered { .. } | Self::Undecided { .. } | Self::Torn { .. })
    }

    /// Returns whether a recovery refused to touch anything, so a person has to look.
    pub fn is_refused(&self) -> bool {
        matches!(
            self,
            Self::CorruptJournal { .. }
                | Self::UnknownFile { .. }
                | Self::Misplaced { .. }
                | Self::UnusableBackup { .. }
        )
    }

    /// Returns whether the disk or the quota is full.
    pub fn is_storage_full(&self) -> bool {
        matches!(self.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }

    /// Returns whether permission to create or replace the file, or to set its metadata, is missing.
    pub fn is_permission_denied(&self) -> bool {
        self.kind() == io::ErrorKind::PermissionDenied
    }

    /// Returns whether the file system is mounted read-only.
    pub fn is_read_only(&self) -> bool {
        self.kind() == io::ErrorKind::ReadOnlyFilesystem
    }

    /// Returns the kind that the same failure has as an [`io::Error`].
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Self::InvalidPath { .. } => io::ErrorKind::InvalidInput,
            Self::MissingDirectory { .. } => io::ErrorKind::NotFound,
            Self::NotAFile { kind: "directory", .. } => io::ErrorKind::IsADirectory,
            Self::NotAFile { .. } => io::ErrorKind::InvalidInput,
            Self::AlreadyExists { .. } => io::ErrorKind::AlreadyExists,
            Self::NotReplaceable { source, .. } | Self::Io { source, .. } | Self::NotDurable { source, .. } => {
                source.kind()
            }
            Self::TimedOut { .. } => io::ErrorKind::TimedOut,
            Self::RepeatedTarget { .. } => io::ErrorKind::InvalidInput,
            Self::OtherFileSystem { .. } => io::ErrorKind::CrossesDevices,
            Self::Busy { .. } | Self::FileBusy { .. } => io::ErrorKind::ResourceBusy,
            Self::Undecided { source, .. } | Self::Torn { source, .. } => source.kind(),
            Self::CorruptJournal { .. }
            | Self::UnknownFile { .. }
            | Self::Misplaced { .. }
            | Self::UnusableBackup { .. } => io::ErrorKind::InvalidData,
            // Not `ErrorKind::Interrupted`, because std's loops retry on that.
            Self::Interrupted { .. } | Self::Broken { .. } | Self::NoRuntime { .. } | Self::Unrecovered { .. } => {
                io::ErrorKind::Other
            }
            #[cfg(feature = "json")]
            Self::Serialize { .. } => io::ErrorKind::InvalidData,
        }
    }
}

/// A path as given, and where it leads.
fn named(path: &Path, resolved: &Option<PathBuf>) -> String {
    match resolved {
        Some(resolved) => format!("{path:?} (which leads to {resolved:?})"),
        None => format!("{path:?}"),
    }
}

impl From<Error> for io::Error {
    /// Keeps the kind, with the whole error inside.
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error)
    }
}

/// The error of a call that was to do `action` to `path`.
pub(crate) fn io_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + use<'a> {
    resolved_error(action, path, &None)
}

/// The error of a call that was to do `action` to what `path` leads to.
pub(crate) fn resolved_error<'a>(
    action: &'static str,
    path: &'a Path,
    resolved: &'a Option<PathBuf>,
) -> impl FnOnce(io::Error) -> Error + use<'a> {
    move |source| Error::Io { action, path: path.to_path_buf(), resolved: resolved.clone(), source }
}

/// The error of opening a directory.
pub(crate) fn open_error(directory: &Path, source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::NotFound => Error::MissingDirectory { directory: directory.to_path_buf() },
        _ => io_error("open the directory", directory)(source),
    }
}

/// The error of a rename to `path`.
#[cfg(unix)]
pub(crate) fn rename_error(path: PathBuf, source: io::Error) -> Error {
    change_error("rename the new file to", &path, &None, source)
}

/// The error of the removal of `path`.
#[cfg(unix)]
pub(crate) fn remove_error(path: PathBuf, source: io::Error) -> Error {
    change_error("remove", &path, &None, source)
}

pub(crate) fn change_error(action: &'static str, path: &Path, resolved: &Option<PathBuf>, source: io::Error) -> Error {
    let (path, resolved) = (path.to_path_buf(), resolved.clone());
    match source.kind() {
        io::ErrorKind::AlreadyExists => Error::AlreadyExists { path },
        io::ErrorKind::IsADirectory => Error::NotAFile { path, resolved, kind: "directory" },
        io::ErrorKind::ResourceBusy | io::ErrorKind::CrossesDevices => Error::NotReplaceable { path, resolved, source },
        _ => Error::Io { action, path, resolved, source },
    }
}
