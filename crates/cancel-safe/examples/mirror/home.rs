//! The mirrored directory. One run at a time holds it, and a mark ties it to its catalogue.

use std::collections::HashSet;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::catalogue::CatalogueError;
use super::parts::Parts;
use super::paths::Rules;

/// Up to this many files are made durable one by one.
const MANY: usize = 64;

/// The locked directory.
#[derive(Debug)]
pub(crate) struct Home {
    dir: PathBuf,
    /// Ties the catalogue to this directory, so that the wrong `--database` is refused instead of emptied.
    pub(crate) mark: String,
    /// Bodies that were cut.
    pub(crate) parts: Parts,
    /// Directories that are known to be durable.
    made: Mutex<HashSet<PathBuf>>,
    /// How its file system treats names.
    pub(crate) rules: Rules,
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
        "the catalogue is new, but {} holds files: give the --database that knows them, let --adopt take \
         over those whose bytes match, or move them aside to start over",
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
        let parts = Parts::below(dir.join("mirror.parts"));
        Ok(Self { dir: dir.to_owned(), mark, parts, made: Mutex::default(), rules: probe(dir), _lock: lock })
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

    /// Makes files in their final places durable, whichever program wrote them, with the names that lead to them.
    /// Blocks.
    pub(crate) fn make_durable<'a>(&self, paths: impl ExactSizeIterator<Item = &'a str>) -> Result<(), HomeError> {
        // One `syncfs` costs more than syncing a few files, and far less than syncing thousands.
        if paths.len() > MANY
            && let Some(synced) = sync_file_system(&self.files())
        {
            return synced.map_err(at(&self.files()));
        }
        let mut directories = HashSet::new();
        for path in paths {
            let path = self.file(path);
            self.make_parents(&path).and_then(|()| File::open(&path)?.sync_all()).map_err(at(&path))?;
            directories.extend(path.parent().map(Path::to_owned));
        }
        directories.iter().try_for_each(|path| File::open(path).and_then(|path| path.sync_all()).map_err(at(path)))
    }
}

/// Makes all of a file system durable, where the system can.
fn sync_file_system(files: &Path) -> Option<io::Result<()>> {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    return Some(File::open(files).and_then(|files| Ok(rustix::fs::syncfs(files)?)));
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    {
        let _unused = files;
        None
    }
}

/// Whether the error says that the file system refuses the name.
pub(crate) fn is_of_name(error: &io::Error) -> bool {
    // EILSEQ, on Linux and elsewhere.
    matches!(error.raw_os_error(), Some(84 | 92))
        || matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidFilename)
}

/// Finds out how the file system treats names. The lock is held, so its name exists and no other run probes.
fn probe(dir: &Path) -> Rules {
    let odd = dir.join("mirror.probe:");
    // A full disk is another matter.
    let refuses = File::create(&odd).err().is_some_and(|error| is_of_name(&error));
    // Some systems have created a file of another name, or one that cannot be removed.
    let _gone = std::fs::remove_file(&odd);
    Rules { folds: dir.join("MIRROR.ID").exists(), refuses }
}

/// Reads the mark of the directory, or makes it.
fn mark(lock: &mut File) -> io::Result<String> {
    let mut mark = String::new();
    lock.take(64).read_to_string(&mut mark)?;
    if mark.len() != 32 {
        // A crash ended the first run before any catalogue could know the mark.
        mark = format!("{:032x}", fastrand::u128(..));
        lock.set_len(0)?;
        lock.rewind()?;
        lock.write_all(mark.as_bytes())?;
        lock.sync_all()?;
    }
    Ok(mark)
}

/// Runs blocking work on a thread for it. If the returned future is dropped, the work is told to stop.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce(&CancellationToken) -> Result<T, HomeError> + Send + 'static,
) -> Result<T, HomeError> {
    let stop = CancellationToken::new();
    let dropped = stop.clone().drop_guard();
    let done = tokio::task::spawn_blocking(move || work(&stop)).await;
    drop(dropped);
    done.unwrap_or_else(|panicked| Err(at(Path::new("a worker thread"))(io::Error::other(panicked))))
}

/// Bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The SHA-256 of a file, in hexadecimal. Blocks.
pub(crate) fn digest(path: &Path, stop: &CancellationToken) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 || stop.is_cancelled() {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..count]);
    }
}
