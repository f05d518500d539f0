//! Opening the checkpoint file: created whole, locked before it is read, read before it is written.
//!
//! Invariant: a crash at any point leaves no checkpoint or a whole one, and a file that does not belong to this
//! computation is not changed.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, SeekFrom, Write},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use crate::{
    codec::Codec,
    error::TaskError,
    history::History,
    log::{Chain, Header},
    scan::{Unread, read_header},
    store::OpenRequest,
};

/// How often a successor looks whether the lock is free.
const LOCK_POLL: Duration = Duration::from_millis(2);
/// A file that comes and goes this often while it is being opened is fought over by something else.
const OPEN_TRIES: u32 = 100;

/// Opens or creates the file, locks it, and reads what it holds.
///
/// Gives up waiting for the lock once the run is cancelled or gone.
pub(crate) fn open_locked(
    request: &OpenRequest,
    is_cancelled: impl Fn() -> bool,
) -> Result<(File, History, Chain), TaskError> {
    let path = request.store.path();
    for _ in 0..OPEN_TRIES {
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(mut file) => {
                if !file.metadata().map_err(|error| TaskError::io("examine", path, error))?.is_file() {
                    let error = io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
                    return Err(TaskError::io("use as a checkpoint", path, error));
                }
                lock(&file, request, &is_cancelled)?;
                if !is_still_at(&file, path) {
                    continue;
                }
                remove_aliases(&file, path).map_err(|error| TaskError::io("tidy up beside", path, error))?;
                let (history, chain) = read(&mut file, request)?;
                if history.epoch == 0 {
                    // Whoever created it never wrote to it, and may have been killed before its name was durable.
                    sync_directory(path).map_err(|error| TaskError::io("sync the directory of", path, error))?;
                }
                return Ok((file, history, chain));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                match create(path, &request.header) {
                    Ok(Some(file)) => {
                        let chain = Chain::new(request.header.salt);
                        return Ok((file, History::of_new_file(request.header.identity), chain));
                    }
                    // Another starter was first: it has the file now.
                    Ok(None) => {}
                    Err(error) => return Err(TaskError::io("create checkpoint", path, error)),
                }
            }
            Err(error) => return Err(TaskError::io("open checkpoint", path, error)),
        }
    }
    Err(TaskError::io("open checkpoint", path, io::Error::other("it keeps appearing and disappearing")))
}

fn lock(file: &File, request: &OpenRequest, is_cancelled: impl Fn() -> bool) -> Result<(), TaskError> {
    let path = request.store.path();
    let started = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if is_cancelled() => return Err(TaskError::Cancelled),
            Err(TryLockError::WouldBlock) if started.elapsed() < request.store.wait => {
                thread::park_timeout(LOCK_POLL);
            }
            Err(TryLockError::WouldBlock) => return Err(TaskError::Busy { path: path.to_owned() }),
            Err(TryLockError::Error(error)) => return Err(TaskError::io("lock checkpoint", path, error)),
        }
    }
}

/// Whether the locked file is still the one at the path: it may have been moved away while this run waited for it, and
/// then another run may have created a new one already.
#[cfg(unix)]
fn is_still_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let (locked, named) = (file.metadata().map(identity), fs::metadata(path).map(identity));
    locked.is_ok_and(|locked| named.is_ok_and(|named| named == locked))
}

/// Elsewhere an open file cannot be moved away.
#[cfg(not(unix))]
fn is_still_at(_: &File, _: &Path) -> bool {
    true
}

/// Reads a locked file, checks that it belongs to this computation, and cuts off a torn tail.
fn read(file: &mut File, request: &OpenRequest) -> Result<(History, Chain), TaskError> {
    let path = request.store.path();
    let mut bytes = Vec::new();
    let failed = |error| TaskError::io("read checkpoint", path, error);
    file.read_to_end(&mut bytes).map_err(failed)?;
    let unread = |error| match error {
        Unread::Io(error) => failed(error),
        Unread::Damage(damage) => TaskError::damaged(path, damage),
    };
    let length = bytes.len() as u64;
    let (stored, from) = read_header(&bytes[..]).map_err(unread)?;
    check_header(request, &stored)?;
    let (history, end, chain) = History::read(bytes, from, &stored).map_err(unread)?;
    if end < length {
        #[cfg(feature = "tracing")]
        tracing::warn!(path = %path.display(), bytes = history.torn_bytes, "cut a torn tail off the checkpoint");
        // Synced before anything is appended: else a power cut could leave old bytes behind new ones.
        let cut = file.set_len(end).and_then(|()| file.sync_all());
        cut.map_err(|error| TaskError::io("cut the torn tail off checkpoint", path, error))?;
    }
    file.seek(SeekFrom::Start(end)).map_err(failed)?;
    Ok((history, chain))
}

fn check_header(request: &OpenRequest, stored: &Header) -> Result<(), TaskError> {
    let given = &request.header;
    let mismatch = |field, stored: &str, given: &str| {
        let (stored, given) = (stored.to_owned(), given.to_owned());
        Err(TaskError::VersionMismatch { path: request.store.path().to_owned(), field, stored, given })
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
    // The name of the result type is for messages: a type that was moved is the type of before.
    Ok(())
}

/// Creates the file so that it appears at once with its header and already locked; `None` if another one was there first.
///
/// The header is written and synced under another name, which a hard link then publishes: a crash leaves either no
/// checkpoint or a whole one, and a second starter finds either no file or one that is locked. A rename would replace
/// the file of a starter who was first.
fn create(path: &Path, header: &Header) -> io::Result<Option<File>> {
    let directory = directory_of(path);
    let prefix = prefix_of_new(path)?;
    sweep(directory, &prefix)?;
    let temporary = directory.join(format!("{prefix}{:016x}", fastrand::u64(..)));
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&temporary)?;
    let published = file.try_lock().map_err(io::Error::from).and_then(|()| {
        file.write_all(&header.encode())?;
        file.sync_all()?;
        fs::hard_link(&temporary, path)
    });
    match (published, fs::remove_file(&temporary)) {
        // Another starter may have swept the name; what it named is published.
        (Ok(()), Err(error)) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        (Ok(()), _) => {}
        // Another starter was first, or is about to sweep the file that it has locked before this one could.
        (Err(error), _) if matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::WouldBlock) => {
            return Ok(None);
        }
        // Another starter swept the file before it was locked.
        (Err(error), Err(_)) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        (Err(error), _) => return Err(error),
    }
    // Without this a power cut could take the name away again after results in it were called durable.
    sync_directory(path)?;
    Ok(Some(file))
}

/// Makes the names in the checkpoint's directory durable.
#[cfg(unix)]
fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(directory_of(path))?.sync_all()
}

/// Elsewhere a directory cannot be opened to be synced.
#[cfg(not(unix))]
fn sync_directory(_: &Path) -> io::Result<()> {
    Ok(())
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// What the names begin with under which checkpoints are prepared.
fn prefix_of_new(path: &Path) -> io::Result<String> {
    let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path names no file"))?;
    Ok(format!(".{}.new-", name.to_string_lossy()))
}

/// Removes the other name of a checkpoint whose starter was killed right after it had published it.
#[cfg(unix)]
fn remove_aliases(file: &File, path: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let locked = file.metadata()?;
    if locked.nlink() == 1 {
        return Ok(());
    }
    let prefix = prefix_of_new(path)?;
    for entry in fs::read_dir(directory_of(path))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&prefix)
            && entry.metadata().is_ok_and(|found| (found.dev(), found.ino()) == (locked.dev(), locked.ino()))
        {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Elsewhere the number of a file's names cannot be asked for.
#[cfg(not(unix))]
fn remove_aliases(_: &File, _: &Path) -> io::Result<()> {
    Ok(())
}

/// Removes what starters left that were killed between creating the file and publishing it.
fn sweep(directory: &Path, prefix: &str) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(prefix) {
            continue;
        }
        // A live one is locked or about to be; one that is swept too early tries again.
        if File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok()) {
            let _gone_already = fs::remove_file(entry.path());
        }
    }
    Ok(())
}
