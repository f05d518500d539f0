//! The directory that is kept. One run at a time holds it, and a mark ties it to its catalogue.

use std::collections::HashSet;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::catalogue::CatalogueError;

/// The locked directory.
#[derive(Debug)]
pub(crate) struct Home {
    dir: PathBuf,
    /// Ties the catalogue to this directory, so that the wrong `--database` is refused instead of emptied.
    pub(crate) mark: String,
    /// Directories that are known to be durable.
    made: Mutex<HashSet<PathBuf>>,
    _lock: File,
}

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HomeError {
    #[error("another run holds {}; wait for it or stop it", .0.display())]
    Busy(PathBuf),
    #[error("{} cannot be written", .path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "the catalogue is new, but {} holds files: give the --database that knows them, or move them aside to start over",
        .0.display()
    )]
    Unknown(PathBuf),
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
}

/// Says at which path the system refused.
pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> HomeError + '_ {
    |source| HomeError::Io { path: path.to_owned(), source }
}

impl Home {
    /// Creates the directory if need be, and takes its lock.
    pub(crate) fn open(dir: &Path) -> Result<Self, HomeError> {
        let files = dir.join("files");
        std::fs::create_dir_all(&files).map_err(at(&files))?;
        let path = dir.join("mirror.id");
        let mut lock =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(at(&path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(HomeError::Busy(dir.to_owned())),
            Err(TryLockError::Error(error)) => return Err(at(&path)(error)),
        }
        let mark = mark(&mut lock).map_err(at(&path))?;
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(at(dir))?;
        Ok(Self { dir: dir.to_owned(), mark, made: Mutex::default(), _lock: lock })
    }

    /// The place of a path of the mapping.
    pub(crate) fn file(&self, path: &str) -> PathBuf {
        self.files().join(path)
    }

    /// The directory below which all files are.
    pub(crate) fn files(&self) -> PathBuf {
        self.dir.join("files")
    }

    /// Whether the directories above a file are known to be durable.
    pub(crate) fn has_parents(&self, file: &Path) -> bool {
        file.parent().is_none_or(|parent| self.made.lock().unwrap_or_else(PoisonError::into_inner).contains(parent))
    }

    /// Makes the directories above a file durable: a file is only as durable as the names that lead to it. Blocks.
    pub(crate) fn make_parents(&self, file: &Path) -> io::Result<()> {
        let Some(parent) = file.parent() else { return Ok(()) };
        if self.has_parents(file) {
            return Ok(());
        }
        if parent != self.dir {
            self.make_parents(parent)?;
            match std::fs::create_dir(parent) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists || !parent.is_dir() => return Err(error),
                _ => {}
            }
            File::open(parent.parent().unwrap_or(&self.dir))?.sync_all()?;
        }
        self.made.lock().unwrap_or_else(PoisonError::into_inner).insert(parent.to_owned());
        Ok(())
    }
}

/// Reads the mark of the directory, or makes it.
fn mark(lock: &mut File) -> io::Result<String> {
    let mut mark = String::new();
    lock.take(64).read_to_string(&mut mark)?;
    if mark.len() != 32 {
        // A crash cut the first run off before any catalogue could know the mark.
        mark = format!("{:032x}", fastrand::u128(..));
        lock.set_len(0)?;
        lock.rewind()?;
        lock.write_all(mark.as_bytes())?;
        lock.sync_all()?;
    }
    Ok(mark)
}

/// Bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
