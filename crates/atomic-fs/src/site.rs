//! The directories of transactions, and the names that these give to files of their own.
//!
//! Invariant: a name tells whose it is, by the random number of its transaction.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::Error;
use crate::platform::{Dir, Identity};
use crate::staged::open_error;

/// What every name of a transaction begins with; 16 hexadecimal digits follow, which are its identity.
pub(crate) const PREFIX: &str = ".afs-tx-";
const ID_DIGITS: usize = 16;

/// A directory that a transaction changes files in.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) dir: Arc<Dir>,
    /// Without symlinks, so that it still leads here when the process has gone elsewhere.
    pub(crate) path: PathBuf,
    pub(crate) id: (u64, u64),
    /// Whether it is on an overlay, where what lies in a lower layer is copied as soon as it is changed.
    pub(crate) is_layered: bool,
}

impl Site {
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let dir = Dir::open(path).map_err(|source| open_error(path, source))?;
        Self::of(Arc::new(dir), path)
    }

    /// The directory that was opened by `path`.
    pub(crate) fn of(dir: Arc<Dir>, path: &Path) -> Result<Self, Error> {
        let failed = |source| open_error(path, source);
        let (id, is_layered) = (dir.id().map_err(failed)?, dir.is_layered().map_err(failed)?);
        let canonical = std::fs::canonicalize(path).map_err(failed)?;
        // It was opened before the path was asked for; a directory renamed in between must not be mistaken.
        if Dir::open(&canonical).and_then(|dir| dir.id()).map_err(failed)? != id {
            return Err(failed(io::Error::other("it was moved while it was opened")));
        }
        Ok(Self { dir, path: canonical, id, is_layered })
    }

    /// By what the directory itself is known again: on an overlay not by its birth, since its copy is born later.
    pub(crate) fn mark(&self) -> io::Result<String> {
        let identity = self.dir.identity()?;
        Ok(Identity { born: identity.born.filter(|_| !self.is_layered), ..identity }.mark())
    }
}

/// The random number of a transaction, by which what is its own is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tag(pub(crate) u64);

impl Tag {
    /// The name of the note, with which every other name of this transaction begins.
    pub(crate) fn note(self) -> String {
        format!("{PREFIX}{:0ID_DIGITS$x}", self.0)
    }

    /// Whose note this is.
    pub(crate) fn of_note(name: &OsStr) -> Option<Self> {
        let (id, rest) = parse(name)?;
        u64::from_str_radix(id, 16).ok().filter(|_| rest.is_empty()).map(Self)
    }

    /// Whether `name` is one that this transaction gives to a file.
    pub(crate) fn is_of(self, name: &OsStr) -> bool {
        name.as_bytes().strip_prefix(self.note().as_bytes()).is_some_and(|rest| rest.starts_with(b"-"))
    }
}

/// Splits a transaction's name into its identity and what follows the hyphen, which a note has not.
pub(crate) fn parse(name: &OsStr) -> Option<(&str, &str)> {
    let (id, rest) = name.to_str()?.strip_prefix(PREFIX)?.split_at_checked(ID_DIGITS)?;
    let rest = if rest.is_empty() { rest } else { rest.strip_prefix('-').filter(|rest| !rest.is_empty())? };
    id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')).then_some((id, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recovery_knows_the_names_of_transactions_and_no_others() {
        assert_eq!(parse(".afs-tx-0123456789abcdef".as_ref()), Some(("0123456789abcdef", "")));
        assert_eq!(parse(".afs-tx-0123456789abcdef-7".as_ref()), Some(("0123456789abcdef", "7")));
        for other in [".afs-tx-", ".afs-tx-0123456789abcdef-", ".afs-tx-0123456789ABCDEF", ".afs-file-0123456789abcdef"]
        {
            assert_eq!(parse(other.as_ref()), None, "{other}");
        }
    }
}
