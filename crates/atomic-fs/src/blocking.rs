//! The same write for threads that may block; it needs no runtime.
//!
//! Invariant: everything but cancellation is as in the async function, because it is the same code.

use std::path::Path;

use crate::commit::Gate;
use crate::staged::write_whole;
use crate::{Error, WriteOptions};

/// Replaces the file `path` by one that contains `bytes`, or creates it, and blocks the thread until it is durable.
///
/// # Errors
///
/// As [`write`](crate::write).
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
    write_whole(path.as_ref(), bytes.as_ref(), WriteOptions::default(), &Gate::new())
}
