//! The lock for readers who want all files of a transaction, or none.
//!
//! Invariant: while it is held, no transaction changes a file of this directory.

use std::path::Path;
use std::sync::Arc;

use crate::Error;
use crate::commit::Gate;
use crate::file::current_runtime;
use crate::platform::Share;
use crate::protocol::refuse_unfinished;
use crate::site::Site;
use crate::staged::directory;
use crate::waiting::with_locks;
use crate::workspace::{LOCK_PATIENCE, Locking, Locks};

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
/// It is an advisory lock on the directory itself (`flock`), so that a reader needs no permission to write. A commit
/// waits for readers, at most 30 s; so hold it briefly.
///
/// # Cancel safety
///
/// This method is cancel safe.
/// If dropped before completion, nothing is locked.
///
/// # Errors
///
/// The directory is [missing](Error::is_missing_directory) or stayed locked for 30 s ([`Error::is_busy`]), or a crash
/// left a transaction unfinished there ([`Error::is_unrecovered`]): call [`recover`](crate::recover).
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
