//! For readers who want all files of a transaction, or none.
//!
//! Invariant: while the lock is held, no transaction changes a file of its directory. Files that are opened together were
//! at one moment all there, while no transaction was exchanging any of them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::commit::{Gate, Job, current_runtime};
use crate::error::io_error;
use crate::journal::{Pointer, is_present, refuse_unfinished};
use crate::lock::{LOCK_PATIENCE, Locking, Locks, Share, with_locks};
use crate::names::{absolute, directory};
use crate::platform::Identity;
use crate::site::Site;
use crate::staged::Target;
use crate::{Error, WriteOptions};

/// Keeps transactions from changing the files of a directory, until it is dropped; made by [`read_lock`].
///
/// Any number of readers hold it at once.
#[derive(Debug)]
#[must_use = "a transaction may change the files as soon as this is dropped"]
pub struct ReadLock {
    _locks: Locks,
}

/// Waits until no transaction is changing files in the directory `dir`, and keeps others from beginning to.
///
/// `dir` is the directory of the files to be read, or that of the journal: a commit locks its journal's directory and
/// that of each target. A reader without it sees each file whole too, but may see the files of one transaction partly
/// old and partly new. Writes of single files, outside transactions, do not ask for the lock.
///
/// It takes the right to write to the directory: whoever holds it holds up every commit there, so it is not for
/// everybody who may read. A reader without that right, or one that wants to hold up nobody, calls [`open_together`].
///
/// A commit waits for readers, at most 30 s, so hold the lock briefly. Readers and writers get their turns: nobody who
/// comes later passes one that waits. So do not ask for the lock of a directory that you hold already: if a commit waits
/// in between, each waits for the other.
///
/// # Cancel safety
///
/// This method is cancel safe.
/// If dropped before completion, nothing is locked.
///
/// # Errors
///
/// The directory is [missing](Error::is_missing_directory) or stayed locked for 30 s ([`Error::is_busy`]); the
/// [permission](Error::is_permission_denied) to write to it is missing; or a crash left a transaction unfinished there
/// ([`Error::is_unrecovered`]): call [`recover`](crate::recover).
///
/// # Examples
///
/// ```
/// use cancel_safe_atomic_fs as atomic_fs;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> std::io::Result<()> {
/// # let dir = tempfile::tempdir()?;
/// # let dir = dir.path();
/// # std::fs::write(dir.join("cert.pem"), "c")?;
/// # std::fs::write(dir.join("key.pem"), "k")?;
/// let lock = atomic_fs::read_lock(dir).await?;
/// let pair = (std::fs::read(dir.join("cert.pem"))?, std::fs::read(dir.join("key.pem"))?);
/// drop(lock);
/// # assert_eq!(pair, (b"c".to_vec(), b"k".to_vec()));
/// # Ok(())
/// # }
/// ```
pub async fn read_lock(dir: impl AsRef<Path>) -> Result<ReadLock, Error> {
    let path = Arc::<Path>::from(directory(dir.as_ref()));
    let runtime = current_runtime(&path)?;
    let target = path.clone();
    let prepare = move |_: &Gate| {
        let site = Arc::new(Site::open(&target)?);
        let locking = Locking::new([&site], Share::Readers, LOCK_PATIENCE);
        Ok((site, locking))
    };
    let finish = |site: Arc<Site>, locks, _: &Gate| {
        refuse_unfinished(&site)?;
        Ok(ReadLock { _locks: locks })
    };
    with_locks(&runtime, &Gate::new(), &path, prepare, finish).await
}

/// How long files that keep changing are opened anew.
const PAUSES: [Duration; 2] = [Duration::from_micros(100), Duration::from_millis(5)];

/// Opens files so that of each transaction all of them are new or all are old, and holds up nobody.
///
/// It opens all files, and does so again as long as a transaction is exchanging files in one of their directories, or one
/// of the files has been replaced meanwhile. What is returned was at one moment the state of all these names. The files
/// are in the order of `paths`, open for reading, one descriptor each; no transaction and no [`write`](crate::write())
/// changes what is in them, so they can be read at leisure.
///
/// It takes the right to read the files and their directories, and no other: it makes no lock, works on a file system
/// that is mounted read-only, and no commit waits for it. So a service reads what only root may write. Symlinks are
/// followed. A caller with less patience than 30 s puts it in a timeout.
///
/// What is [written in place](crate::InPlace) is not replaced, and may be found half written here too.
///
/// # Cancel safety
///
/// This method is cancel safe.
/// If dropped before completion, nothing has changed.
///
/// # Errors
///
/// A file is not there, is [no file](Error::is_not_a_file), or may not be [read](Error::is_permission_denied). For 30 s a
/// transaction was unfinished, as after a crash ([`Error::is_unrecovered`]: call [`recover`](crate::recover) with the
/// rights of whoever writes), or the files changed all the time ([`Error::is_busy`]).
///
/// # Examples
///
/// ```
/// use cancel_safe_atomic_fs as atomic_fs;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> std::io::Result<()> {
/// # let dir = tempfile::tempdir()?;
/// # let dir = dir.path();
/// # std::fs::write(dir.join("cert.pem"), "c")?;
/// # std::fs::write(dir.join("key.pem"), "k")?;
/// let pair = [dir.join("cert.pem"), dir.join("key.pem")];
/// let files = atomic_fs::open_together(pair).await?;
/// let contents: Vec<_> = files
///     .into_iter()
///     .map(std::io::read_to_string)
///     .collect::<Result<_, _>>()?;
/// assert_eq!(contents, ["c", "k"]);
/// # Ok(())
/// # }
/// ```
pub async fn open_together<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Result<Vec<File>, Error> {
    open_within(paths.into_iter().map(|path| absolute(path.as_ref())).collect(), LOCK_PATIENCE).await
}

async fn open_within(paths: Arc<[PathBuf]>, patience: Duration) -> Result<Vec<File>, Error> {
    let Some(first) = paths.first().map(|path| Arc::<Path>::from(&**path)) else { return Ok(Vec::new()) };
    let runtime = current_runtime(&first)?;
    let begun = Instant::now();
    let [mut pause, longest] = PAUSES;
    loop {
        let paths = paths.clone();
        // A hop for each attempt, and the pause in it: so no thread is kept that whoever commits may need.
        let attempt = Job::spawn(&runtime, &Gate::new(), &first, move |_| {
            let opened = open_at_once(&paths)?;
            if opened.is_err() {
                std::thread::park_timeout(pause);
            }
            Ok(opened)
        });
        match attempt.await? {
            Ok(files) => return Ok(files),
            Err(obstacle) if begun.elapsed() >= patience => return Err(obstacle),
            Err(_) => pause = (pause * 2).min(longest),
        }
    }
}

/// Opens the files as they are at one moment; or tells, inside, what was in the way this time.
fn open_at_once(paths: &[PathBuf]) -> Result<Result<Vec<File>, Error>, Error> {
    let resolve = |path: &PathBuf| Target::resolve(path, WriteOptions::default());
    let targets = paths.iter().map(resolve).collect::<Result<Vec<_>, _>>()?;
    let mut files = Vec::with_capacity(paths.len());
    for (path, target) in paths.iter().zip(&targets) {
        files.push(target.dir.read(&target.name).map_err(io_error("open", path))?);
    }
    // From here until the names are looked at again they all stay the same, or it is seen that they did not. If within
    // that time there was once no journal in a directory, none of its transactions had begun to exchange these files
    // without having finished.
    for (path, target) in paths.iter().zip(&targets) {
        if is_exchanging(target).map_err(io_error("look for a journal beside", path))? {
            return Ok(Err(Error::Unrecovered { directory: target.parent.clone() }));
        }
    }
    for ((path, target), file) in paths.iter().zip(&targets).zip(&files) {
        let now = resolve(path)?;
        let (opened, named) = (Identity::of(file), now.dir.identify(&now.name));
        let failed = || io_error("look at", path);
        let (opened, named) = (opened.map_err(failed())?, named.map_err(failed())?);
        if named.is_none_or(|named| (named.inode, named.born) != (opened.inode, opened.born)) {
            return Ok(Err(Error::Busy { directory: target.parent.clone(), waited: LOCK_PATIENCE }));
        }
    }
    Ok(Ok(files))
}

/// Whether a transaction may be exchanging files in the directory of `target`. Its journal need not be readable.
fn is_exchanging(target: &Target) -> std::io::Result<bool> {
    if is_present(&target.dir)? {
        return Ok(true);
    }
    let Some(home) = Pointer::home(&target.dir)? else { return Ok(false) };
    // Where that leads to no journal, its transaction has ended. What cannot be looked at may go on.
    target.dir.open_dir(&home).map_or(Ok(true), |home| is_present(&home))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::names::{COMMITTED, POINTER, PREPARED};

    #[tokio::test]
    async fn nothing_is_opened_while_files_of_its_directory_may_be_exchanged() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for place in ["one", "other"] {
            std::fs::create_dir(at(place)).unwrap();
            std::fs::write(at(place).join("file"), place).unwrap();
        }
        let opened = async || {
            let paths = ["one", "other"].map(|place| at(place).join("file"));
            open_within(paths.into(), Duration::from_millis(20)).await
        };
        assert_eq!(opened().await.unwrap().len(), 2);
        for journal in [PREPARED, COMMITTED] {
            std::fs::write(at("other").join(journal), "").unwrap();
            let error = opened().await.unwrap_err();
            assert!(error.is_unrecovered() && error.to_string().contains("other"), "{error}");
            std::fs::remove_file(at("other").join(journal)).unwrap();
        }
        // What leads to a journal that is not there any more stops nobody; what leads nowhere does, and what is no such thing.
        symlink("../.afs-tx-0123456789abcdef", at("one").join(POINTER)).unwrap();
        assert_eq!(opened().await.unwrap().len(), 2);
        std::fs::write(at(COMMITTED), "").unwrap();
        assert!(opened().await.unwrap_err().is_unrecovered());
        for (link, is_unrecovered) in [("../gone/.afs-tx-0123456789abcdef", true), ("../file", false)] {
            std::fs::remove_file(at("one").join(POINTER)).unwrap();
            symlink(link, at("one").join(POINTER)).unwrap();
            let error = opened().await.unwrap_err();
            assert_eq!(error.is_unrecovered(), is_unrecovered, "{error}");
            assert!(error.to_string().contains("one"), "{error}");
        }
    }

    #[test]
    fn what_has_been_replaced_since_it_was_opened_is_opened_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        // Opened first as the one, and looked at again as the other.
        let [one, other] = ["one", "other"].map(|name| dir.path().join(name));
        for target in [&one, &other] {
            std::fs::write(target, "").unwrap();
        }
        symlink(&one, &path).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let mut counts = [0, 0];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    for target in [&one, &other] {
                        let fresh = dir.path().join("fresh");
                        symlink(target, &fresh).unwrap();
                        std::fs::rename(&fresh, &path).unwrap();
                    }
                }
            });
            while counts.contains(&0) {
                let opened = open_at_once(std::slice::from_ref(&path)).unwrap();
                counts[usize::from(opened.is_err_and(|error| error.is_busy()))] += 1;
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
