//! The same functions for threads that may block, and for programs without a runtime.
//!
//! Invariant: everything but cancellation works as in the async functions, because it is the same code. Only
//! [`write()`] runs on the calling thread; the others make it wait for this crate's own threads.

use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, Wake};
use std::thread::Thread;
#[cfg(unix)]
use std::{fmt, fs::File, time::Duration};

use tokio::runtime::{Builder, Runtime};
use tokio::task::coop::unconstrained;

use crate::commit::Gate;
use crate::staged::write_whole;
use crate::{Error, SweepReport, WriteOptions};
#[cfg(unix)]
use crate::{ReadLock, RecoveryReport};

/// Replaces or creates the file `path` with `bytes` as its content, and blocks the thread until it is durable.
///
/// # Errors
///
/// Same as [`write`](crate::write()).
///
/// # Examples
///
/// ```
/// use cancel_safe_atomic_fs::blocking;
///
/// # fn main() -> std::io::Result<()> {
/// # let dir = tempfile::tempdir()?;
/// let path = dir.path().join("greeting");
/// blocking::write(&path, "hello")?;
/// assert_eq!(std::fs::read(&path)?, b"hello");
/// # Ok(())
/// # }
/// ```
pub fn write(path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> Result<(), Error> {
    write_with(path, bytes, WriteOptions::default())
}

/// Works like [`write()`], with these [options](WriteOptions).
///
/// # Errors
///
/// Same as [`write`](crate::write()).
pub fn write_with(path: impl AsRef<Path>, bytes: impl AsRef<[u8]>, options: WriteOptions) -> Result<(), Error> {
    write_whole(path.as_ref(), bytes.as_ref(), options, &Gate::new())
}

/// Replaces or creates the file `path` with `value` as pretty-printed JSON, as [`write()`] does.
///
/// # Errors
///
/// Same as [`write_json`](crate::write_json).
#[cfg(feature = "json")]
pub fn write_json<T: serde::Serialize + ?Sized>(path: impl AsRef<Path>, value: &T) -> Result<(), Error> {
    let path = path.as_ref();
    write(path, crate::file::to_json(path, value)?)
}

/// Removes the temporary files of killed writers from the directory `dir`.
///
/// # Errors
///
/// Same as [`sweep`](crate::sweep).
pub fn sweep(dir: impl AsRef<Path>) -> Result<SweepReport, Error> {
    wait(crate::sweep(dir))
}

/// Finishes or undoes the transaction that a crash left in the directory `dir`.
///
/// # Errors
///
/// Same as [`recover`](crate::recover).
#[cfg(unix)]
pub fn recover(dir: impl AsRef<Path>) -> Result<RecoveryReport, Error> {
    wait(crate::recover(dir))
}

/// Waits until no transaction is changing files in the directory `dir`, and keeps others from starting to.
///
/// # Errors
///
/// Same as [`read_lock`](crate::read_lock).
#[cfg(unix)]
pub fn read_lock(dir: impl AsRef<Path>) -> Result<ReadLock, Error> {
    wait(crate::read_lock(dir))
}

/// Opens files together: for each transaction, either all of its files are new or all are old.
///
/// # Errors
///
/// Same as [`open_together`](crate::open_together).
#[cfg(unix)]
pub fn open_together<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Result<Vec<File>, Error> {
    wait(crate::open_together(paths))
}

/// [`AtomicFileWriter`](crate::AtomicFileWriter) for threads that may block: an [`io::Write`] whose file appears as a
/// whole. If it is dropped without a [`commit`](Self::commit), the target stays as it was.
///
/// It buffers 1 MiB, and needs no `BufWriter`.
///
/// # Examples
///
/// ```
/// use std::io::Write;
/// use cancel_safe_atomic_fs::blocking::AtomicFileWriter;
///
/// # fn main() -> std::io::Result<()> {
/// # let dir = tempfile::tempdir()?;
/// let path = dir.path().join("report");
/// let mut writer = AtomicFileWriter::new(&path)?;
/// writeln!(writer, "total: {}", 7)?;
/// assert!(!path.exists());
/// writer.commit()?;
/// assert_eq!(std::fs::read_to_string(&path)?, "total: 7\n");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a writer that is dropped without a commit leaves the target as it was"]
pub struct AtomicFileWriter(crate::AtomicFileWriter);

impl AtomicFileWriter {
    /// Opens a writer for `path` with the default [options](WriteOptions).
    ///
    /// # Errors
    ///
    /// Same as [`WriteOptions::open`].
    pub fn new(path: impl AsRef<Path>) -> Result<Self, Error> {
        Self::open(path, WriteOptions::default())
    }

    /// Opens a writer for `path` with these options.
    ///
    /// # Errors
    ///
    /// Same as [`WriteOptions::open`].
    pub fn open(path: impl AsRef<Path>, options: WriteOptions) -> Result<Self, Error> {
        wait(options.open(path)).map(Self)
    }

    /// Makes the written content the target: syncs it, renames it, and syncs its directory.
    ///
    /// # Errors
    ///
    /// Same as [`commit`](crate::AtomicFileWriter::commit).
    pub fn commit(self) -> Result<(), Error> {
        wait(self.0.commit())
    }

    /// Discards what was written and waits until the temporary file is gone.
    ///
    /// # Errors
    ///
    /// Same as [`discard`](crate::AtomicFileWriter::discard).
    pub fn discard(self) -> Result<(), Error> {
        wait(self.0.discard())
    }
}

/// A write takes in all of `data`, or none of it.
impl io::Write for AtomicFileWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        Lent(&mut self.0).write(data)
    }

    /// Nothing becomes visible before the commit, so there is nothing to do.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Lent<'a>(&'a mut crate::AtomicFileWriter);

impl io::Write for Lent<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        wait(self.0.write_all(data))?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// [`MultiFileTransaction`](crate::MultiFileTransaction) for threads that may block.
///
/// # Examples
///
/// ```
/// use std::io::Write;
/// use cancel_safe_atomic_fs::blocking::{self, MultiFileTransaction};
///
/// # fn main() -> std::io::Result<()> {
/// # let dir = tempfile::tempdir()?;
/// # let dir = dir.path();
/// // When the program starts.
/// blocking::recover(dir)?;
///
/// let mut tx = MultiFileTransaction::new();
/// tx.add_file(dir.join("cert.pem"), "certificate")?;
/// tx.writer(dir.join("key.pem"))?.write_all(b"key")?;
/// tx.commit()?;
/// assert_eq!(std::fs::read(dir.join("key.pem"))?, b"key");
/// # Ok(())
/// # }
/// ```
#[cfg(unix)]
#[must_use = "a transaction that is dropped without a commit changes nothing"]
pub struct MultiFileTransaction(crate::MultiFileTransaction);

#[cfg(unix)]
impl MultiFileTransaction {
    /// Creates an empty transaction. Its journal will be in the directory of the first path that it is given.
    pub fn new() -> Self {
        Self(crate::MultiFileTransaction::new())
    }

    /// Creates an empty transaction. Its journal will be in the directory `journal_dir`.
    pub fn begin(journal_dir: impl AsRef<Path>) -> Self {
        Self(crate::MultiFileTransaction::begin(journal_dir))
    }

    /// Sets how files that are added from now on are written; see [`options`](crate::MultiFileTransaction::options).
    pub fn options(self, options: WriteOptions) -> Self {
        Self(self.0.options(options))
    }

    /// Sets how long the commit waits for directories that others have locked. The default is 30 s.
    pub fn patience(self, patience: Duration) -> Self {
        Self(self.0.patience(patience))
    }

    /// Stages `content` to become the file `path`.
    ///
    /// # Errors
    ///
    /// Same as [`add_file`](crate::MultiFileTransaction::add_file).
    pub fn add_file(&mut self, path: impl AsRef<Path>, content: impl AsRef<[u8]>) -> Result<(), Error> {
        wait(self.0.add_file(path, content))
    }

    /// Stages several files, each a path and its content.
    ///
    /// # Errors
    ///
    /// Same as [`add_files`](crate::MultiFileTransaction::add_files).
    pub fn add_files<P: AsRef<Path>, C: AsRef<[u8]>>(
        &mut self,
        files: impl IntoIterator<Item = (P, C)>,
    ) -> Result<(), Error> {
        wait(self.0.add_files(files))
    }

    /// Stages a file to become the file `path`, and lends a writer for its content.
    ///
    /// # Errors
    ///
    /// Same as [`writer`](crate::MultiFileTransaction::writer).
    pub fn writer(&mut self, path: impl AsRef<Path>) -> Result<impl io::Write + '_, Error> {
        wait(self.0.writer(path)).map(Lent)
    }

    /// Adds the removal of the file `path`.
    ///
    /// # Errors
    ///
    /// Same as [`remove_file`](crate::MultiFileTransaction::remove_file).
    pub fn remove_file(&mut self, path: impl AsRef<Path>) -> Result<(), Error> {
        self.0.remove_file(path)
    }

    /// Adds the renaming of the file `from` to `to`.
    ///
    /// # Errors
    ///
    /// Same as [`rename`](crate::MultiFileTransaction::rename).
    pub fn rename(&mut self, from: impl AsRef<Path>, to: impl AsRef<Path>) -> Result<(), Error> {
        self.0.rename(from, to)
    }

    /// Makes all changes, durably, or none.
    ///
    /// # Errors
    ///
    /// Same as [`commit`](crate::MultiFileTransaction::commit).
    pub fn commit(self) -> Result<(), Error> {
        wait(self.0.commit())
    }

    /// Discards all changes and waits until the staged files are gone.
    ///
    /// # Errors
    ///
    /// Same as [`rollback`](crate::MultiFileTransaction::rollback).
    pub fn rollback(self) -> Result<(), Error> {
        wait(self.0.rollback())
    }
}

#[cfg(unix)]
impl Default for MultiFileTransaction {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(unix)]
impl fmt::Debug for MultiFileTransaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Only its threads are used, and they end after 10 s of idling. Nothing drives the runtime, and it has no drivers.
static THREADS: LazyLock<io::Result<Runtime>> =
    LazyLock::new(|| Builder::new_current_thread().thread_name("afs-blocking").build());

/// Blocks the thread until `future` is ready, even inside a task of another runtime.
fn wait<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    // Without a runtime, the future itself returns the error.
    let _entered = THREADS.as_ref().ok().map(Runtime::enter);
    let waker = Arc::new(Unpark(std::thread::current())).into();
    let mut cx = Context::from_waker(&waker);
    // Inside a task, this thread could not renew the task's budget, and the future would yield for ever.
    let mut future = pin!(unconstrained(future));
    loop {
        match future.as_mut().poll(&mut cx) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}
