//! The names that callers give to their files, and the names that this crate gives to its own files.
//!
//! Invariant: the crate's own names begin with a prefix that no target's name has; and if the creator of a file is
//! killed, the file's name tells what removes it.
//!
//! | name | what it is | removed by |
//! |---|---|---|
//! | `.afs-file-<id>` | a single file that is being written | a sweep |
//! | `.afs-tx-<id>` | the note of a transaction, or the link that leads to it | a recovery |
//! | `.afs-tx-<id>-<more>` | what that transaction has staged | a recovery |
//! | `.afs-journal` and others | a journal, and the pointers to it | a recovery, when it has finished or undone it |
//! | `.afs-place-<id>` | a write in place: the record | a recovery, when it has put the old content back |
//! | `.afs-place-<id>-old` | the copy of the old content | the same |
//! | `.afs-lock`, `.afs-turn` | locks of a directory | the next caller that locks it |
#![cfg_attr(not(unix), expect(dead_code, reason = "only transactions and writes in place give most of these names"))]

use std::ffi::{OsStr, OsString};
use std::path::Path;
#[cfg(unix)]
use std::path::PathBuf;

use crate::Error;

/// The prefix of every name that this crate gives. No target may have it, because it could be taken for litter.
const RESERVED_PREFIX: &str = ".afs-";
const TEMP_PREFIX: &str = ".afs-file-";
const TRANSACTION_PREFIX: &str = ".afs-tx-";
const RECORD_PREFIX: &str = ".afs-place-";
/// The suffix that distinguishes the name of the copy from its record's.
const COPY_SUFFIX: &str = "-old";
/// The journal once its transaction is committed. A directory has at most one, because commits there wait for each
/// other.
pub(crate) const COMMITTED: &str = ".afs-journal";
/// The same journal before the commit, and again while its transaction is being undone: its changes must be undone.
pub(crate) const PREPARED: &str = ".afs-journal-prepared";
/// The pointer from another directory of a transaction to its journal.
pub(crate) const POINTER: &str = ".afs-journal-elsewhere";
/// Locked by callers that read or change the files of the directory.
pub(crate) const ROOM: &str = ".afs-lock";
/// Locked by the caller that enters next.
pub(crate) const TURN: &str = ".afs-turn";
/// How many hexadecimal digits an identity has.
const ID_DIGITS: usize = 16;

/// Whether `name` is reserved for this crate.
pub(crate) fn is_reserved(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(RESERVED_PREFIX.as_bytes())
}

/// Whether `name` is a plain file name within a directory.
pub(crate) fn is_name(name: &OsStr) -> bool {
    Path::new(name).file_name() == Some(name)
}

/// Whether `name` is the name of a lock.
pub(crate) fn is_lock(name: &OsStr) -> bool {
    name == ROOM || name == TURN
}

/// Splits `path` into the directory to open and the name within it; `given` is the caller's path, for errors.
pub(crate) fn split<'a>(path: &'a Path, given: &Path) -> Result<(&'a Path, &'a OsStr), Error> {
    let invalid = |reason| Error::InvalidPath { path: given.to_path_buf(), reason };
    let name = path.file_name().ok_or_else(|| invalid("it has no file name"))?;
    // `Path` quietly drops a slash at the end, but the system takes `name/` for a directory.
    if !path.as_os_str().as_encoded_bytes().ends_with(name.as_encoded_bytes()) {
        return Err(invalid("it ends like a directory"));
    }
    if is_reserved(name) {
        return Err(invalid("names that begin with .afs- are reserved for temporary files"));
    }
    Ok((directory(path.parent().unwrap_or(Path::new(""))), name))
}

/// The directory of `path`. For a bare name [`Path::parent`] returns the empty path, which means the working directory.
pub(crate) fn directory(path: &Path) -> &Path {
    if path.as_os_str().is_empty() { Path::new(".") } else { path }
}

/// The path as seen from the present working directory.
#[cfg(unix)]
pub(crate) fn absolute(path: &Path) -> PathBuf {
    // If the working directory is gone, the first system call reports it.
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

/// A random name for a single file that is being written.
pub(crate) fn temp() -> OsString {
    format!("{TEMP_PREFIX}{:0ID_DIGITS$x}", fastrand::u64(..)).into()
}

/// Whether `name` is one that [`temp`] may give.
pub(crate) fn is_temp(name: &OsStr) -> bool {
    name.to_str().and_then(|name| name.strip_prefix(TEMP_PREFIX)).and_then(id).is_some()
}

/// The number that `digits` encode, if they have this crate's format.
fn id(digits: &str) -> Option<u64> {
    let is_ours = digits.len() == ID_DIGITS && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    u64::from_str_radix(digits, 16).ok().filter(|_| is_ours)
}

/// The random number of a transaction, which marks its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tag(pub(crate) u64);

impl Tag {
    pub(crate) fn by_chance() -> Self {
        Self(fastrand::u64(..))
    }

    /// The name of the note. Every other name of this transaction begins with it.
    pub(crate) fn note(self) -> String {
        format!("{TRANSACTION_PREFIX}{:0ID_DIGITS$x}", self.0)
    }

    /// The name of the journal before it is whole.
    pub(crate) fn draft(self) -> OsString {
        format!("{}-journal", self.note()).into()
    }

    /// The transaction to which this note belongs.
    pub(crate) fn of_note(name: &OsStr) -> Option<Self> {
        Self::parse(name).filter(|(_, rest)| rest.is_empty()).map(|(tag, _)| tag)
    }

    /// Splits a transaction's name into its number and the part after the hyphen, which a note does not have.
    pub(crate) fn parse(name: &OsStr) -> Option<(Self, &str)> {
        let (digits, rest) = name.to_str()?.strip_prefix(TRANSACTION_PREFIX)?.split_at_checked(ID_DIGITS)?;
        let rest = if rest.is_empty() { rest } else { rest.strip_prefix('-').filter(|rest| !rest.is_empty())? };
        Some((Self(id(digits)?), rest))
    }

    /// Whether `name` is one that this transaction gives to a file.
    pub(crate) fn is_of(self, name: &OsStr) -> bool {
        name.as_encoded_bytes().strip_prefix(self.note().as_bytes()).is_some_and(|rest| rest.starts_with(b"-"))
    }
}

/// The two names of the backup of a file that is written in place.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Backup {
    pub(crate) record: OsString,
    pub(crate) copy: OsString,
}

impl Backup {
    pub(crate) fn by_chance() -> Self {
        Self::new(fastrand::u64(..))
    }

    fn new(id: u64) -> Self {
        let record = format!("{RECORD_PREFIX}{id:0ID_DIGITS$x}");
        Self { copy: format!("{record}{COPY_SUFFIX}").into(), record: record.into() }
    }

    pub(crate) fn of_record(name: &OsStr) -> Option<Self> {
        name.to_str()?.strip_prefix(RECORD_PREFIX).and_then(id).map(Self::new)
    }

    pub(crate) fn of_copy(name: &OsStr) -> Option<Self> {
        Self::of_record(name.to_str()?.strip_suffix(COPY_SUFFIX)?.as_ref())
    }
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
    fn a_sweep_knows_the_names_of_single_files_and_no_others() {
        assert!(is_temp(".afs-file-0123456789abcdef".as_ref()) && is_temp(&temp()));
        for other in [".afs-file-", ".afs-file-0123456789ABCDEF", ".afs-file-0123456789abcdef0", ".afs-tx-0", "x", ""] {
            assert!(!is_temp(other.as_ref()), "{other}");
        }
    }

    #[test]
    fn a_recovery_knows_the_names_of_transactions_and_no_others() {
        let tag = Tag(0x0123_4567_89ab_cdef);
        assert_eq!(Tag::parse(".afs-tx-0123456789abcdef".as_ref()), Some((tag, "")));
        assert_eq!(Tag::parse(".afs-tx-0123456789abcdef-7".as_ref()), Some((tag, "7")));
        for other in [".afs-tx-", ".afs-tx-0123456789abcdef-", ".afs-tx-0123456789ABCDEF", ".afs-file-0123456789abcdef"]
        {
            assert_eq!(Tag::parse(other.as_ref()), None, "{other}");
        }
    }

    #[test]
    fn a_recovery_knows_the_names_of_backups_and_no_others() {
        let names = Backup::of_record(".afs-place-0123456789abcdef".as_ref()).unwrap();
        assert_eq!(names.copy, ".afs-place-0123456789abcdef-old");
        assert_eq!(Backup::of_copy(&names.copy), Some(names));
        for other in [".afs-place-", ".afs-place-0123456789ABCDEF", ".afs-place-0123456789abcdef-old", ".afs-tx-0", ""]
        {
            assert_eq!(Backup::of_record(other.as_ref()), None, "{other}");
        }
        assert_eq!(Backup::of_copy(".afs-place-0123456789abcdef".as_ref()), None);
    }
}
