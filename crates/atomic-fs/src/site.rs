//! The directories of transactions.
//!
//! Invariant: whoever has one has the directory that was opened, whatever becomes of its path.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::Error;
use crate::error::open_error;
use crate::platform::{Dir, Identity};

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
