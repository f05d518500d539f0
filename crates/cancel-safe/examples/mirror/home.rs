//! The directory that is kept: one run at a time holds it, and what an earlier run left is put in order before this one starts.
//!
//! After [`Home::settle`] the catalogue equals the disk: each row has its file, with its size, at the path that the mapping
//! gives today; a file of ours without a row is gone (it is fetched again); a stranger's file is left alone and reported.

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use cancel_safe::atomic_fs;
use sha2::{Digest, Sha256};
use url::Url;

use super::catalogue::{Catalogue, CatalogueError, Change, Row};
use super::paths;

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
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> HomeError + '_ {
    |source| HomeError::Io { path: path.to_owned(), source }
}

/// What [`Home::settle`] found and did.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    /// The path of every URL, of the manifest and of the catalogue.
    pub(crate) paths: BTreeMap<Url, String>,
    /// The rows whose files are there.
    pub(crate) complete: BTreeMap<String, Row>,
    /// Rows whose file was missing or had another size or, with `--verify`, another digest.
    pub(crate) lost: usize,
    /// Files of ours that had no row, and temporary files of dead writers.
    pub(crate) removed: usize,
    /// Files below `files` that no URL maps to.
    pub(crate) strangers: usize,
    /// Rows whose URL has left the manifest; their files are kept.
    pub(crate) left: Vec<String>,
}

impl Home {
    /// Creates the directory if need be, and takes its lock.
    pub(crate) fn open(dir: &Path) -> Result<Self, HomeError> {
        let files = dir.join("files");
        std::fs::create_dir_all(&files).map_err(at(&files))?;
        let path = dir.join("mirror.lock");
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
        self.dir.join("files").join(path)
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

    /// Puts in order what an earlier run left.
    pub(crate) async fn settle(
        &self,
        manifest: &[Url],
        rows: Vec<Row>,
        catalogue: &Catalogue,
        verify: bool,
    ) -> Result<Settled, HomeError> {
        let wanted: HashSet<&Url> = manifest.iter().collect();
        let known: Vec<Url> = rows.iter().filter_map(|row| Url::parse(&row.url).ok()).collect();
        let mut settled = Settled {
            paths: paths::assign(manifest.iter().chain(&known))
                .into_iter()
                .map(|(url, path)| (url.clone(), path))
                .collect(),
            left: known.iter().filter(|url| !wanted.contains(url)).map(|url| url.as_str().to_owned()).collect(),
            ..Settled::default()
        };
        let (kept, lost) = blocking(|| self.inspect(rows, verify))?;
        settled.lost = lost.len();
        for row in lost {
            catalogue.apply(Change::Delete(row.url)).await?;
            remove(&self.file(&row.path)).map_err(at(&self.dir))?;
        }
        self.relocate(kept, &mut settled, catalogue).await?;
        let ours: HashSet<PathBuf> = settled.paths.values().map(|path| self.file(path)).collect();
        let complete: HashSet<PathBuf> = settled.complete.values().map(|row| self.file(&row.path)).collect();
        let mut directories = vec![self.dir.join("files")];
        while let Some(directory) = directories.pop() {
            settled.removed +=
                atomic_fs::sweep(&directory).await.map_err(|error| at(&directory)(error.into()))?.removed;
            for entry in std::fs::read_dir(&directory).map_err(at(&directory))? {
                let entry = entry.map_err(at(&directory))?;
                let (path, kind) = (entry.path(), entry.file_type().map_err(at(&directory))?);
                if kind.is_dir() {
                    directories.push(path);
                } else if complete.contains(&path) {
                } else if ours.contains(&path) {
                    remove(&path).map_err(at(&path))?;
                    settled.removed += 1;
                } else {
                    settled.strangers += 1;
                }
            }
        }
        Ok(settled)
    }

    /// Tells the rows whose files are there from those whose are not.
    fn inspect(&self, rows: Vec<Row>, verify: bool) -> Result<(Vec<Row>, Vec<Row>), HomeError> {
        let (mut kept, mut lost) = (Vec::new(), Vec::new());
        for row in rows {
            let path = self.file(&row.path);
            let whole = match std::fs::symlink_metadata(&path) {
                Ok(found) if found.is_file() && i64::try_from(found.len()) == Ok(row.bytes) => {
                    !verify || digest(&path).map_err(at(&path))? == row.sha256
                }
                Ok(_) => false,
                Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => false,
                Err(error) => return Err(at(&path)(error)),
            };
            if whole { kept.push(row) } else { lost.push(row) }
        }
        Ok((kept, lost))
    }

    /// Moves files whose path depends on URLs that have come or gone.
    async fn relocate(&self, rows: Vec<Row>, settled: &mut Settled, catalogue: &Catalogue) -> Result<(), HomeError> {
        let path_of = |row: &Row| {
            Url::parse(&row.url)
                .ok()
                .and_then(|url| settled.paths.get(&url).cloned())
                .unwrap_or_else(|| row.path.clone())
        };
        let mut rows: Vec<(Row, String)> = rows
            .into_iter()
            .map(|row| {
                let path = path_of(&row);
                (row, path)
            })
            .collect();
        // Plain paths are made free before they are taken; a hashed path is never in anybody's way.
        rows.sort_by_key(|(_, path)| !paths::is_hashed(path));
        for (mut row, path) in rows {
            if row.path != path {
                let (from, to) = (self.file(&row.path), self.file(&path));
                // A crash between the two leaves a row without a file and a file without a row: fetched again, never wrong.
                blocking(|| self.make_parents(&to).and_then(|()| std::fs::rename(&from, &to))).map_err(at(&to))?;
                catalogue.apply(Change::Move { url: row.url.clone(), path: path.clone() }).await?;
                row.path = path;
            }
            settled.complete.insert(row.url.clone(), row);
        }
        Ok(())
    }
}

/// Runs what blocks where the runtime allows for it.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    tokio::task::block_in_place(work)
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

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Err(error),
        _ => Ok(()),
    }
}

/// The SHA-256 of a file, in hexadecimal. Blocks.
fn digest(path: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..count]);
    }
}

/// Bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
