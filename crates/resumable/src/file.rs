//! Opening the checkpoint file: created whole, locked before it is read, read before it is written.
//!
//! Invariant: a crash at any point leaves no checkpoint or a whole one, and a file that does not belong to this
//! computation is never changed.

use std::{
    fs::{File, TryLockError},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use cancel_safe_atomic_fs::{WriteOptions, blocking};

use crate::{
    codec::Codec,
    compact::{is_due, rewrite},
    disk::{directory_of, is_still_at, link_target, open_to_append, sync_directory},
    error::TaskError,
    history::History,
    log::Header,
    scan::read_header,
};

/// How often a successor looks whether the lock is free.
const LOCK_POLL: Duration = Duration::from_millis(2);
/// If a file comes and goes this often while it is being opened, something else is fighting over it.
const OPEN_TRIES: u32 = 100;

/// What to open.
#[derive(Debug)]
pub(crate) struct OpenRequest {
    pub(crate) path: PathBuf,
    /// How long to wait for a run that still holds the file.
    pub(crate) wait: Duration,
    /// The header of a new file. An existing file's header must match it, except for the salt.
    pub(crate) header: Header,
    /// Versions whose results are accepted although the version or the result type differs.
    pub(crate) accepted: Vec<String>,
}

/// An open checkpoint.
#[derive(Debug)]
pub(crate) enum OpenFile {
    /// Locked, for writing.
    Locked(Arc<File>, History),
    /// Complete, for reading only, with the reason why it cannot be written.
    Complete(History, TaskError),
}

/// Opens or creates the file, locks it, and reads what it holds.
///
/// Gives up waiting for the lock once the run is cancelled or gone. A complete file needs neither the lock nor write
/// access.
pub(crate) fn open_locked(request: &OpenRequest, is_cancelled: impl Fn() -> bool) -> Result<OpenFile, TaskError> {
    let (path, wait) = (&*request.path, request.wait);
    let (mut torn_bytes, mut was_compacted) = (0, false);
    for _ in 0..OPEN_TRIES {
        match open_to_append(path) {
            Ok(file) => {
                must_be_file(&file, path)?;
                match lock(&file, path, wait, &is_cancelled) {
                    Err(busy @ TaskError::Busy { .. }) => return complete(&file, request, busy),
                    locked => locked?,
                }
                if !is_still_at(&file, path).map_err(|error| TaskError::io("examine", path, error))? {
                    continue;
                }
                let file = Arc::new(file);
                let mut history = read(&file, request)?;
                cut_torn_tail(&file, &history, path)?;
                torn_bytes += history.torn_bytes;
                if !was_compacted && is_due(history.end, history.live_bytes()) {
                    was_compacted = true;
                    if compact(&mut history, &file, path)? {
                        continue;
                    }
                }
                history.torn_bytes = torn_bytes;
                if history.epoch == 0 {
                    // The run that created it never wrote to it, and may have been killed before the name was durable.
                    let synced = link_target(path).and_then(|target| sync_directory(&target));
                    synced.map_err(|error| TaskError::io("sync the directory of", path, error))?;
                }
                return Ok(OpenFile::Locked(file, history));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                create(path, &request.header).map_err(|error| TaskError::io("create checkpoint", path, error))?;
            }
            Err(error) => {
                let is_read_only =
                    matches!(error.kind(), io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied);
                let failed = TaskError::io("open checkpoint", path, error);
                return match File::open(path) {
                    Ok(file) if is_read_only => complete(&file, request, failed),
                    _ => Err(failed),
                };
            }
        }
    }
    Err(TaskError::io("open checkpoint", path, io::Error::other("it keeps appearing and disappearing")))
}

fn must_be_file(file: &File, path: &Path) -> Result<(), TaskError> {
    if file.metadata().map_err(|error| TaskError::io("examine", path, error))?.is_file() {
        return Ok(());
    }
    let error = io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
    Err(TaskError::io("use as a checkpoint", path, error))
}

/// Compacts a locked file and returns whether the path now leads to a new file, which is not locked yet.
fn compact(history: &mut History, file: &File, path: &Path) -> Result<bool, TaskError> {
    // Without compaction the file is only larger than necessary: a full disk or a read-only directory is no reason to
    // stop.
    let _compacted = rewrite(history, file, path);
    #[cfg(feature = "tracing")]
    match &_compacted {
        Ok(Some(bytes)) => {
            tracing::debug!(path = %path.display(), before = history.end, bytes, "compacted the checkpoint")
        }
        Ok(None) => {}
        Err(error) => tracing::warn!(path = %path.display(), %error, "the checkpoint could not be compacted"),
    }
    is_still_at(file, path).map(|is_old| !is_old).map_err(|error| TaskError::io("examine", path, error))
}

/// Compacts a file that a run has completed and still holds, if it is worth it.
pub(crate) fn compact_complete(file: &Arc<File>, path: &Path) -> Result<(), TaskError> {
    let mut history = read_any(file, path)?;
    if is_due(history.end, history.live_bytes()) {
        compact(&mut history, file, path)?;
    }
    Ok(())
}

/// Compacts a file that no run holds, and returns its length before and after.
pub(crate) fn compact_free(path: &Path, wait: Duration) -> Result<(u64, u64), TaskError> {
    for _ in 0..OPEN_TRIES {
        let file = open_to_append(path).map_err(|error| TaskError::io("open checkpoint", path, error))?;
        must_be_file(&file, path)?;
        lock(&file, path, wait, || false)?;
        if !is_still_at(&file, path).map_err(|error| TaskError::io("examine", path, error))? {
            continue;
        }
        let file = Arc::new(file);
        let mut history = read_any(&file, path)?;
        let before = history.end + history.torn_bytes;
        let after = rewrite(&mut history, &file, path);
        let after = after.map_err(|error| TaskError::io("compact checkpoint", path, error))?;
        return Ok((before, after.unwrap_or(before)));
    }
    Err(TaskError::io("open checkpoint", path, io::Error::other("it keeps appearing and disappearing")))
}

fn lock(file: &File, path: &Path, wait: Duration, is_cancelled: impl Fn() -> bool) -> Result<(), TaskError> {
    let started = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if is_cancelled() => return Err(TaskError::Cancelled),
            Err(TryLockError::WouldBlock) if started.elapsed() < wait => {
                thread::park_timeout(LOCK_POLL);
            }
            Err(TryLockError::WouldBlock) => return Err(TaskError::Busy { path: path.to_owned() }),
            Err(TryLockError::Error(error)) => return Err(TaskError::io("lock checkpoint", path, error)),
        }
    }
}

/// Reads a file that cannot be locked or written to. That is enough if the file is complete.
fn complete(file: &File, request: &OpenRequest, refusal: TaskError) -> Result<OpenFile, TaskError> {
    let Ok(file) = file.try_clone() else { return Err(refusal) };
    match read(&Arc::new(file), request) {
        Ok(history) if history.sealed.is_some() && history.torn_bytes == 0 => Ok(OpenFile::Complete(history, refusal)),
        Err(error) if error.is_mismatch() => Err(error),
        // Any other fault of the file is left to the run that can lock it.
        Ok(_) | Err(_) => Err(refusal),
    }
}

/// Reads a file and checks that it belongs to this computation.
fn read(file: &Arc<File>, request: &OpenRequest) -> Result<History, TaskError> {
    let path = &*request.path;
    let unread = |unread| TaskError::unreadable(path, unread);
    let (stored, from) = read_header(&**file).map_err(unread)?;
    check_header(request, &stored)?;
    History::read(Arc::clone(file) as _, from, stored).map_err(unread)
}

/// Reads a file, whichever computation it belongs to.
fn read_any(file: &Arc<File>, path: &Path) -> Result<History, TaskError> {
    let unreadable = |unread| TaskError::unreadable(path, unread);
    let (header, from) = read_header(&**file).map_err(unreadable)?;
    History::read(Arc::clone(file) as _, from, header).map_err(unreadable)
}

fn cut_torn_tail(file: &File, history: &History, path: &Path) -> Result<(), TaskError> {
    if history.torn_bytes == 0 {
        return Ok(());
    }
    #[cfg(feature = "tracing")]
    tracing::warn!(path = %path.display(), bytes = history.torn_bytes, "cut a torn tail off the checkpoint");
    // Synced before anything is appended; otherwise a power cut could leave old bytes after new ones.
    let cut = file.set_len(history.end).and_then(|()| file.sync_all());
    cut.map_err(|error| TaskError::io("cut the torn tail off checkpoint", path, error))
}

fn check_header(request: &OpenRequest, stored: &Header) -> Result<(), TaskError> {
    let given = &request.header;
    let mismatch = |field, stored: &str, given: &str| {
        let (stored, given) = (stored.to_owned(), given.to_owned());
        Err(TaskError::VersionMismatch { path: request.path.clone(), field, stored, given })
    };
    if stored.job != given.job {
        return mismatch("job", &stored.job, &given.job);
    }
    if stored.codec != given.codec {
        return mismatch("codec", &Codec::name_of(stored.codec), &Codec::name_of(given.codec));
    }
    if stored.identity != given.identity {
        return mismatch("identity", &format!("{:?}", stored.identity), &format!("{:?}", given.identity));
    }
    if request.accepted.contains(&stored.version) {
        return Ok(());
    }
    if stored.version != given.version {
        return mismatch("version", &stored.version, &given.version);
    }
    // The name of the result type is only for messages: a type that was moved is still the same type.
    Ok(())
}

/// Creates the file so that it appears at once with its header, and its name is durable. Another run may be first: then
/// its file stays.
fn create(path: &Path, header: &Header) -> io::Result<()> {
    let target = link_target(path)?;
    // Removes what a process killed at this point left. It does no harm if it stays.
    drop(blocking::sweep(directory_of(&target)));
    match blocking::write_with(&target, header.encode(), WriteOptions::default().create_new(true)) {
        Err(error) if !error.is_already_exists() => Err(error.into()),
        Ok(()) | Err(_) => Ok(()),
    }
}
