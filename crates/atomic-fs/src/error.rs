//! What can go wrong, and what it means for the target.
//!
//! Invariant: whether the target was changed is told by [`Error::target`] alone, and `Unchanged` is final.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What a failed call means for its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TargetState {
    /// The target is as it was, and the call that failed will never change it.
    Unchanged,
    /// The target is the new file, whole; only whether it would survive a power cut is unknown.
    Visible,
    /// Of a transaction: each of its files is old or new, whole, and [`recover`](crate::recover) makes them all the one or
    /// all the other. Until then a reader may find a mix. Of a file that was [written in place](crate::InPlace): it may be
    /// half written, and [`recover`](crate::recover) makes it the old one.
    Undecided,
}

/// Why a file could not be written, or a directory not be swept.
///
/// The target's path is named as the caller gave it, by transactions as an absolute path. Ask
/// [`target`](Error::target) what became of the target, and the `is_*` predicates for what a caller can do about it.
///
/// It converts into [`io::Error`], so that `?` works in a function that returns [`io::Result`].
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
    /// The path cannot be that of a file of ours. Choose another.
    #[error("{path:?} does not name a file: {reason}")]
    InvalidPath {
        /// The target as given.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The directory that should hold the target does not exist. It is not created by itself: create it first.
    #[error("the directory {directory:?} does not exist")]
    MissingDirectory {
        /// The directory that is missing.
        directory: PathBuf,
    },
    /// The target is a directory, a FIFO, a socket or a device, which no file replaces.
    #[error("{} is a {kind}, not a regular file", named(.path, .resolved))]
    NotAFile {
        /// The target as given.
        path: PathBuf,
        /// What the path leads to, if it is a symlink that was followed.
        resolved: Option<PathBuf>,
        /// What it is.
        kind: &'static str,
    },
    /// The target exists although [`create_new`](crate::WriteOptions::create_new) was asked for.
    #[error("{path:?} already exists")]
    AlreadyExists {
        /// The target as given.
        path: PathBuf,
    },
    /// The target is a mount point (a file that is bind-mounted into a container, say), which no rename replaces. See
    /// [`InPlace`](crate::InPlace).
    #[error("{} cannot be replaced or removed, because it is a mount point", named(.path, .resolved))]
    NotReplaceable {
        /// The target as given.
        path: PathBuf,
        /// The mount point, if the path is a symlink that was followed there.
        resolved: Option<PathBuf>,
        /// What the rename or the removal said.
        source: io::Error,
    },
    /// A system call failed before the target was touched.
    #[error("could not {action} {}", named(.path, .resolved))]
    Io {
        /// What was attempted.
        action: &'static str,
        /// The target as given, or the directory that was swept.
        path: PathBuf,
        /// What the path leads to, if it is a symlink that was followed.
        resolved: Option<PathBuf>,
        /// What the system said.
        source: io::Error,
    },
    /// The new file is in place, but syncing its directory failed: a power cut may still bring the old one back.
    ///
    /// Do not retry the sync. Write the file again, or tell the user.
    #[error("{path:?} is installed, but whether it is durable is unknown")]
    NotDurable {
        /// The target as given.
        path: PathBuf,
        /// What the sync of the directory said.
        source: io::Error,
    },
    /// The time was up before the rename began, so the target will never change because of this call.
    #[error("{path:?} was not written within {timeout:?}")]
    TimedOut {
        /// The target as given.
        path: PathBuf,
        /// The time it was given.
        timeout: Duration,
    },
    /// The runtime was shut down before the rename began.
    #[error("the runtime was shut down before {path:?} was written")]
    Interrupted {
        /// The target as given.
        path: PathBuf,
    },
    /// An earlier write to this writer, or the sync of a file of this transaction, failed; so nothing of it is published.
    #[error("{path:?} cannot be written, because an earlier write failed")]
    Broken {
        /// The target as given.
        path: PathBuf,
    },
    /// A transaction names the same target twice, if only by way of a symlink. Nothing was done.
    #[error("{path:?} is changed twice in one transaction")]
    RepeatedTarget {
        /// The target as given the second time.
        path: PathBuf,
    },
    /// A target lies on another file system than the journal, or the two paths of a rename lie on two.
    #[error("{path:?} is not on the file system of its transaction")]
    OtherFileSystem {
        /// The target as given.
        path: PathBuf,
    },
    /// Other transactions or readers held the lock of a directory all the time, or files that were to be opened together
    /// kept changing. Try again, or look for who holds it.
    #[error("the directory {directory:?} was busy for {waited:?}")]
    Busy {
        /// The directory.
        directory: PathBuf,
        /// How long was waited.
        waited: Duration,
    },
    /// Others held the lock of a file that is to be [written in place](crate::InPlace) all the time. Try again.
    #[error("{path:?} was locked for {waited:?}")]
    FileBusy {
        /// The target.
        path: PathBuf,
        /// How long was waited.
        waited: Duration,
    },
    /// A crash left a transaction, or a write in place of this target, unfinished in this directory. Call
    /// [`recover`](crate::recover) first.
    #[error("the directory {directory:?} holds an unfinished transaction or write in place")]
    Unrecovered {
        /// The directory with the journal or the backup.
        directory: PathBuf,
    },
    /// A transaction could be neither finished nor undone, because the disk failed. [`recover`](crate::recover) decides; if
    /// this is its own error, call it again.
    #[error("the transaction in {directory:?} is undecided until it is recovered")]
    Undecided {
        /// The directory with the journal.
        directory: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A write in place failed, and the old content could not be put back, because the disk failed twice.
    /// [`recover`](crate::recover) puts it back; if this is its own error, call it again.
    ///
    /// The way out by hand: copy the backup over the target, and remove the backup and what has the same name without
    /// `-old`.
    #[error("{path:?} may be half written: recover its directory, or copy {backup:?} over it by hand")]
    Torn {
        /// The target as given.
        path: PathBuf,
        /// Where its old content is.
        backup: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A write in place was cut by a crash, and its backup is not put back, because it cannot be told that it belongs there.
    /// The target was not touched.
    ///
    /// The way out by hand: mount what was mounted there and recover again; or copy the backup to where it belongs, and
    /// remove both it and the record.
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
    /// The way out by hand: restore the journal from a backup; or look at the targets, keep of each the file that you
    /// want (the name that begins with `.afs-tx-` beside it holds the other one), and remove the journal.
    #[error("the journal {journal:?} is not valid ({reason}); nothing was touched: restore it, or remove it by hand")]
    CorruptJournal {
        /// The journal.
        journal: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A file is neither what it was before the transaction nor what it should become. Nothing was touched.
    ///
    /// The way out by hand: move that file out of the way; or decide for yourself what each target should be, and remove
    /// the journal.
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
    /// A transaction took place in two directories, and one of them is not where the other says. Nothing was touched.
    ///
    /// The way out by hand: bring both back to where they were in relation to each other, or copy or move what contains
    /// both; or decide for yourself what each target should be, and remove the journal or the pointer to it.
    #[error(
        "{journal:?} is of a transaction that has to do with the directory {directory:?}, which {reason}; nothing was \
         touched: bring the directories back to where they were in relation to each other and recover again, or set \
         the targets right and remove {journal:?} by hand"
    )]
    Misplaced {
        /// The journal; or the pointer to it, which lies in each other directory that takes part.
        journal: PathBuf,
        /// Where the other directory should be.
        directory: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The call was made outside a tokio runtime.
    #[error("{path:?} cannot be written outside a tokio runtime")]
    NoRuntime {
        /// The target as given.
        path: PathBuf,
    },
    /// The value could not be turned into JSON.
    #[cfg(feature = "json")]
    #[error("the value for {path:?} could not be turned into JSON")]
    Serialize {
        /// The target as given.
        path: PathBuf,
        /// What the serializer said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Error {
    /// Tells what the failure means for the target.
    pub fn target(&self) -> TargetState {
        match self {
            Self::NotDurable { .. } => TargetState::Visible,
            Self::Undecided { .. } | Self::Torn { .. } => TargetState::Undecided,
            _ => TargetState::Unchanged,
        }
    }

    /// Whether the time was up.
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::TimedOut { .. })
    }

    /// Whether the directory that should hold the target is missing.
    pub fn is_missing_directory(&self) -> bool {
        matches!(self, Self::MissingDirectory { .. })
    }

    /// Whether the target is a directory, a FIFO, a socket or a device.
    pub fn is_not_a_file(&self) -> bool {
        matches!(self, Self::NotAFile { .. })
    }

    /// Whether the target exists although it must not.
    pub fn is_already_exists(&self) -> bool {
        matches!(self, Self::AlreadyExists { .. })
    }

    /// Whether the target is a mount point.
    ///
    /// Such a file can only be written in place, where readers may find it half written. Whoever prefers that to no new
    /// content at all asks for it: [`InPlace::WithBackup`](crate::InPlace::WithBackup).
    pub fn is_not_replaceable(&self) -> bool {
        matches!(self, Self::NotReplaceable { .. })
    }

    /// Whether a transaction names the same target twice.
    pub fn is_repeated_target(&self) -> bool {
        matches!(self, Self::RepeatedTarget { .. })
    }

    /// Whether a target lies on another file system than its transaction.
    pub fn is_other_file_system(&self) -> bool {
        matches!(self, Self::OtherFileSystem { .. })
    }

    /// Whether a directory, or a file that is to be written in place, stayed locked by others.
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Busy { .. } | Self::FileBusy { .. })
    }

    /// Whether a transaction, or a write in place, that a crash or a failing disk left unfinished has to be recovered first.
    pub fn is_unrecovered(&self) -> bool {
        matches!(self, Self::Unrecovered { .. } | Self::Undecided { .. } | Self::Torn { .. })
    }

    /// Whether a recovery refused to touch anything, so that somebody has to look.
    pub fn is_refused(&self) -> bool {
        matches!(
            self,
            Self::CorruptJournal { .. }
                | Self::UnknownFile { .. }
                | Self::Misplaced { .. }
                | Self::UnusableBackup { .. }
        )
    }

    /// Whether the disk or the quota is full.
    pub fn is_storage_full(&self) -> bool {
        matches!(self.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }

    /// Whether the permission to create, replace or dress the file is missing.
    pub fn is_permission_denied(&self) -> bool {
        self.kind() == io::ErrorKind::PermissionDenied
    }

    /// Whether the file system is mounted read-only.
    pub fn is_read_only(&self) -> bool {
        self.kind() == io::ErrorKind::ReadOnlyFilesystem
    }

    /// The kind that the same failure has as an [`io::Error`].
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
            // Not `ErrorKind::Interrupted`, which std's loops take as an invitation to try again.
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
    /// Keeps the kind, and the whole error as the inner one.
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
