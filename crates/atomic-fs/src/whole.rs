//! Whole files in one call.
//!
//! Invariant: up to 1 MiB, and for JSON and [`Bytes`] of any size, one call is one hop to the blocking pool.

use std::path::Path;
use std::sync::Arc;
#[cfg(feature = "json")]
use std::time::Duration;

use bytes::Bytes;
#[cfg(feature = "json")]
use tokio::time::Instant;

use crate::commit::{Gate, Job, current_runtime};
use crate::staged::{CHUNK_BYTES, write_whole};
use crate::{Error, WriteOptions};

/// Replaces the file `path` by one that contains `bytes`, or creates it.
///
/// Every reader sees the old file or the new one, whole. `Ok` means that the new one survives a power cut. Of several
/// concurrent calls each succeeds, and the last one to rename wins. For options see
/// [`AtomicFileWriter::options`](crate::AtomicFileWriter::options). It copies `bytes`, at most 3 MiB of them at a time;
/// [`write_bytes`] copies nothing.
///
/// # Cancel safety
///
/// This method is cancel safe.
/// If dropped before completion, the target is the old file or the new one, and from then on never changes because of
/// this call; the temporary file is removed as soon as the system call in progress returns.
///
/// # Errors
///
/// As [`WriteOptions::open`] and [`AtomicFileWriter::commit`](crate::AtomicFileWriter::commit).
///
/// # Examples
///
/// ```
/// use cancel_safe_atomic_fs as atomic_fs;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> std::io::Result<()> {
/// # let dir = tempfile::tempdir()?;
/// let path = dir.path().join("greeting");
/// atomic_fs::write(&path, "hello").await?;
/// assert_eq!(std::fs::read(&path)?, b"hello");
/// # Ok(())
/// # }
/// ```
pub async fn write(path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> Result<(), Error> {
    WriteOptions::default().write(path, bytes).await
}

/// Replaces the file `path` by one that contains `content`, or creates it, without copying `content`.
///
/// It is [`write()`] for content that is owned, or shared: a `Vec<u8>`, a `String`, a `&'static str`, or a [`Bytes`], of
/// which a clone is cheap. Whatever its size, one call is one hop to the blocking pool, and the content is let go when the
/// write has ended.
///
/// # Cancel safety
///
/// This method is cancel safe.
/// If dropped before completion, the target is the old file or the new one, and from then on never changes because of
/// this call; the temporary file is removed, and the content let go, as soon as the system call in progress returns.
///
/// # Errors
///
/// As [`write()`].
///
/// # Examples
///
/// ```
/// use bytes::Bytes;
/// use cancel_safe_atomic_fs as atomic_fs;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> std::io::Result<()> {
/// # let dir = tempfile::tempdir()?;
/// let content = Bytes::from(vec![b'x'; 2 << 20]);
/// for name in ["one", "other"] {
///     atomic_fs::write_bytes(dir.path().join(name), content.clone()).await?;
/// }
/// assert_eq!(std::fs::read(dir.path().join("other"))?, content);
/// # Ok(())
/// # }
/// ```
pub async fn write_bytes(path: impl AsRef<Path>, content: impl Into<Bytes>) -> Result<(), Error> {
    WriteOptions::default().write_bytes(path, content).await
}

impl WriteOptions {
    /// Replaces the file `path` by one that contains `bytes`, or creates it, as [`write()`] does with the defaults.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe.
    /// If dropped before completion, the target is the old file or the new one, and from then on never changes because
    /// of this call; the temporary file is removed as soon as the system call in progress returns.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open) and [`AtomicFileWriter::commit`](crate::AtomicFileWriter::commit).
    pub async fn write(self, path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> Result<(), Error> {
        let bytes = bytes.as_ref();
        if bytes.len() <= CHUNK_BYTES {
            return write_job(path.as_ref(), bytes.to_vec(), self, Gate::new())?.await;
        }
        // A copy of it all would double the memory; this way it is copied in pieces while others are written.
        let mut writer = self.open(path).await?;
        writer.write_all(bytes).await?;
        writer.commit().await
    }

    /// Replaces the file `path` by one that contains `content`, or creates it, without copying `content`, as
    /// [`write_bytes()`] does with the defaults.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe.
    /// If dropped before completion, the target is the old file or the new one, and from then on never changes because
    /// of this call; the temporary file is removed, and the content let go, as soon as the system call in progress
    /// returns.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open) and [`AtomicFileWriter::commit`](crate::AtomicFileWriter::commit).
    pub async fn write_bytes(self, path: impl AsRef<Path>, content: impl Into<Bytes>) -> Result<(), Error> {
        write_job(path.as_ref(), content.into(), self, Gate::new())?.await
    }
}

/// One hop: everything happens inside this job, and the content goes with it.
fn write_job(
    path: &Path,
    content: impl AsRef<[u8]> + Send + 'static,
    options: WriteOptions,
    gate: Arc<Gate>,
) -> Result<Job<()>, Error> {
    let path = Arc::<Path>::from(path);
    let runtime = current_runtime(&path)?;
    let target = path.clone();
    Ok(Job::spawn(&runtime, &gate, &path, move |gate| write_whole(&target, content.as_ref(), options, gate)))
}

/// Replaces the file `path` by `value` as pretty-printed JSON, or creates it.
///
/// The value is serialized before anything is touched.
///
/// # Cancel safety
///
/// This method is cancel safe.
/// If dropped before completion, the target is the old file or the new one, and from then on never changes because of
/// this call.
///
/// # Errors
///
/// [`Error::Serialize`], and as [`write()`].
///
/// # Examples
///
/// ```
/// use cancel_safe_atomic_fs as atomic_fs;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> std::io::Result<()> {
/// # let dir = tempfile::tempdir()?;
/// let path = dir.path().join("list.json");
/// atomic_fs::write_json(&path, &[1, 2]).await?;
/// assert_eq!(std::fs::read_to_string(&path)?, "[\n  1,\n  2\n]");
/// # Ok(())
/// # }
/// ```
#[cfg(feature = "json")]
pub async fn write_json<T: serde::Serialize + ?Sized>(path: impl AsRef<Path>, value: &T) -> Result<(), Error> {
    let path = path.as_ref();
    write_job(path, to_json(path, value)?, WriteOptions::default(), Gate::new())?.await
}

/// Replaces the file `path` by `value` as pretty-printed JSON, unless the rename has not begun within `timeout`.
///
/// [`TimedOut`](Error::TimedOut) means that the target is unchanged, for ever: no rename begins after `timeout`, even if
/// the executor is too busy to notice. Once the rename has begun the timeout no longer applies, and the call waits until
/// it is known whether the new file is durable.
///
/// After the time is up the call waits up to 100 ms more for its temporary file to be removed.
///
/// # Cancel safety
///
/// This method is cancel safe.
/// If dropped before completion, the target is the old file or the new one, and from then on never changes because of
/// this call.
///
/// # Errors
///
/// [`Error::TimedOut`], and as [`write_json`].
///
/// # Panics
///
/// If the runtime has no timer, or the call is polled after its runtime was shut down.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use cancel_safe_atomic_fs as atomic_fs;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> std::io::Result<()> {
/// # let dir = tempfile::tempdir()?;
/// let path = dir.path().join("config.json");
/// atomic_fs::write_json_with_timeout(&path, &"value", Duration::from_secs(60)).await?;
///
/// let late = atomic_fs::write_json_with_timeout(&path, &"other", Duration::ZERO).await.unwrap_err();
/// assert!(late.is_timeout());
/// assert_eq!(std::fs::read_to_string(&path)?, "\"value\"");
/// # Ok(())
/// # }
/// ```
#[cfg(feature = "json")]
pub async fn write_json_with_timeout<T: serde::Serialize + ?Sized>(
    path: impl AsRef<Path>,
    value: &T,
    timeout: Duration,
) -> Result<(), Error> {
    let path = path.as_ref();
    // A timeout beyond the end of time is none.
    let gate = Gate::with_deadline(Instant::now().checked_add(timeout));
    write_job(path, to_json(path, value)?, WriteOptions::default(), gate)?.within(timeout).await
}

#[cfg(feature = "json")]
pub(crate) fn to_json<T: serde::Serialize + ?Sized>(path: &Path, value: &T) -> Result<Vec<u8>, Error> {
    serde_json::to_vec_pretty(value)
        .map_err(|error| Error::Serialize { path: path.to_path_buf(), source: error.into() })
}
