//! Atomic files for async Rust: a file is old or new, and a dropped write never lands later.
//!
//! # The problem
//!
//! This saves a file the usual way: write a temporary file, sync it, rename it. Then a timeout fires.
//!
//! ```no_run
//! # use std::{io, path::Path, time::Duration};
//! # use tokio::io::AsyncWriteExt;
//! async fn save(path: &Path, content: &[u8]) -> io::Result<()> {
//!     let temp = path.with_extension("tmp");
//!     let mut file = tokio::fs::File::create(&temp).await?;
//!     file.write_all(content).await?;
//!     file.sync_all().await?;
//!     tokio::fs::rename(&temp, path).await
//! }
//!
//! # async fn caller(path: &Path, content: &[u8]) {
//! let result = tokio::time::timeout(Duration::from_secs(2), save(path, content)).await;
//! // Err(Elapsed). What is in the file now? And in a second?
//! # }
//! ```
//!
//! - Every step runs on a pool of blocking threads, where nothing stops it once it is queued. **The rename may land
//!   after the timeout has been reported**, and undo a later, acknowledged write.
//! - The temporary file stays behind. A guard that removes it is not enough: the file may be created after the guard ran.
//! - `write_all` does not report disk errors. On a full disk, `write_all`, `sync_all` and `rename` can all succeed and
//!   publish only the beginning of the content.
//! - Two writers share `path.tmp`, and mix their contents.
//! - The directory is never synced, so a power cut undoes what was reported as done.
//!
//! # The solution
//!
//! ```
//! use std::time::Duration;
//! use cancel_safe_atomic_fs::{self as atomic_fs, AtomicFileWriter};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> std::io::Result<()> {
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("settings");
//! // In one call. However this ends, the file is old or new, and stays what it is
//! // from then on.
//! let write = atomic_fs::write(&path, "content");
//! let result = tokio::time::timeout(Duration::from_secs(2), write).await;
//! # result.unwrap()?;
//!
//! // In pieces. Nothing is visible before the commit, and nothing is left if it never
//! // comes.
//! let mut writer = AtomicFileWriter::options().mode(0o600).open(&path).await?;
//! writer.write_all(b"first, ").await?;
//! writer.write_all(b"second").await?;
//! writer.commit().await?;
//! # assert_eq!(std::fs::read_to_string(&path)?, "first, second");
//! # Ok(())
//! # }
//! ```
//!
//! The whole sequence runs inside one blocking job. A gate stands between the job and the future that waits for it. The
//! job asks the gate right before the rename; dropping the future closes the gate. If the job has already entered the
//! rename, the drop waits for that one system call. So once the drop returns, this call never changes the target.
//!
//! A transaction changes several files together, and a reader that takes the lock never sees half of it:
//!
//! ```
//! # #[cfg(unix)]
//! # mod unix {
//! use cancel_safe_atomic_fs::{self as atomic_fs, MultiFileTransaction};
//!
//! # pub async fn main() -> std::io::Result<()> {
//! # let dir = tempfile::tempdir()?;
//! # let dir = dir.path();
//! // When the program starts: finishes or undoes what a crash interrupted.
//! atomic_fs::recover(dir).await?;
//!
//! let mut tx = MultiFileTransaction::new();
//! tx.add_file(dir.join("cert.pem"), "certificate").await?;
//! tx.add_file(dir.join("key.pem"), "key").await?;
//! tx.commit().await?;
//!
//! let lock = atomic_fs::read_lock(dir).await?;
//! let cert = std::fs::read(dir.join("cert.pem"))?;
//! let key = std::fs::read(dir.join("key.pem"))?;
//! drop(lock);
//! # assert_eq!((&cert[..], &key[..]), (&b"certificate"[..], &b"key"[..]));
//! # Ok(())
//! # }
//! # }
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> std::io::Result<()> {
//! # #[cfg(unix)]
//! # unix::main().await?;
//! # Ok(())
//! # }
//! ```
//!
//! # Guarantees
//!
//! | event | the target | left behind |
//! |---|---|---|
//! | `Ok` | new, and survives a power cut ([`Durability::Full`]) | nothing |
//! | an error whose [`target`](Error::target) is [`Unchanged`](TargetState::Unchanged) | old, and stays old | nothing |
//! | an error whose [`target`](Error::target) is [`Visible`](TargetState::Visible) | new; a power cut may bring back the old one | nothing |
//! | the future is dropped | old or new, decided before the drop returns | nothing, once the system call in progress returns |
//! | a panic, an abort of the task, a shutdown of the runtime | as if dropped | as if dropped |
//! | the process is killed | old or new | a hidden file `.afs-file-…`, until [`sweep`] |
//! | a power cut | old or new | the same |
//! | a kill or a power cut, while it is [written in place](InPlace) | may be half written, until [`recover`] puts the old one back | `.afs-place-…` and `.afs-place-…-old`, until then |
//! | several writers at once | each gets `Ok`, the last rename wins | nothing |
//!
//! For the files of a transaction:
//!
//! | event | the targets | left behind |
//! |---|---|---|
//! | `Ok` | all new, and survive a power cut | nothing; if the clean-up failed, or a power cut follows, hidden files until [`recover`] of their directory |
//! | an error whose target is [`Unchanged`](TargetState::Unchanged) | all old, and stay old | nothing |
//! | an error whose target is [`Undecided`](TargetState::Undecided): the disk failed twice | each old or new, until [`recover`] makes them all old or all new | a journal and hidden files, until then |
//! | the commit is dropped | all old or all new, decided before the drop returns | nothing, once the job has ended |
//! | the transaction is dropped | all old | nothing |
//! | the process is killed, or a power cut | each old or new; after [`recover`] all old or all new | `.afs-journal` and hidden files `.afs-tx-…`, until [`recover`]; an empty `.afs-lock` or `.afs-turn`, which blocks nobody and goes with the next transaction |
//! | transactions that share a directory | one after the other, in turns with readers that lock it | nothing |
//! | a reader | it finds each file whole and never missing; with [`open_together`] or [`read_lock`], all old or all new | |
//! | a user who may only read the directory | cannot hold up a commit | |
//!
//! Content and metadata change together. A temporary file is created beside the resolved target. It is locked while its
//! writer lives, and never grants more access than the final file will. A failed sync is never retried, because the
//! kernel may have dropped the data and would report success. Names of 255 bytes work.
//!
//! Names that begin with **`.afs-`** are reserved: they are refused as a target, and a program that lists a directory
//! should skip them.
//!
//! # Limitations
//!
//! Every file:
//!
//! - A missing directory is an error; it is never created.
//! - A hard link is cut: the target becomes a new file, the other names keep the old one.
//! - If the rename has been entered, a drop blocks its thread for that one system call.
//! - No rename can replace a mount point, such as a file that is bind-mounted into a container. That is [an
//!   error](Error::is_not_replaceable), unless [`InPlace::WithBackup`] asks for a write in place. Readers may find such
//!   a write half done, and a drop waits for it.
//! - By default a write keeps the permission bits, on Linux with the POSIX access control list; see [`Preserve`]. If
//!   the group is not kept, the bits that would apply to other people are dropped: 0640 becomes 0600.
//! - Other kinds of access control lists (NFSv4, macOS, Windows) are not kept, or copied as attributes if at all.
//! - A directory that is writable but not readable is an error, because it cannot be synced.
//! - In an append-only directory nothing can be renamed or removed: a write fails, and its temporary file stays.
//! - [`sweep`] needs file locks; without them it removes nothing.
//!
//! Transactions:
//!
//! - They need Unix, one file system for all targets and the journal, and file locks.
//! - A reader without [`open_together`] or [`read_lock`] may find some files old and others new: during the exchange,
//!   which takes microseconds per file, or after a crash until [`recover`]. No file system offers better.
//! - A file that is renamed over another briefly has only a hidden name; every visible name has its old or its new
//!   file. If three or more change places in a circle, the first name shows the others in turn.
//! - If another process creates or removes a file while a commit exchanges it, the commit fails and all files stay
//!   unchanged.
//! - A caller waits at most 30 s for a lock; see [`patience`](MultiFileTransaction::patience). One thread, `afs-locks`,
//!   tries for all callers of a process. If a file system hangs on a lock request, all of them wait.
//! - A drop during the exchange waits for its end: microseconds per file, plus a sync of the directory for each rename
//!   that replaces a file. [`MultiFileTransaction::commit_detached`] blocks nobody.
//! - If the file system cannot exchange files in one step, three steps by way of a hard link do it just as safely.
//! - On overlayfs, files of a lower layer are copied before they are replaced, renamed or removed. If links to other
//!   users' files are restricted, such a file with several names makes the commit fail, and all files stay unchanged.
//! - A transaction refuses mount points, whatever [`InPlace`] says.
//!
//! Recovery:
//!
//! - [`recover`] believes the journal and the backup that it finds. Call it only in directories where everybody with
//!   write permission may be trusted with your files; not in `/tmp` itself.
//! - Recover before you write. A target that has changed since the crash may be neither the old nor the new file. Then
//!   nothing is touched, and the error says what to do by hand.
//! - A copied or restored tree recovers if the copy has the times of its files (`cp -a`, `tar`, `rsync -a`) and all
//!   directories of the transaction. Otherwise it is refused.
//!
//! Systems:
//!
//! - `Ok` is only as good as the disk's promise. A file system that refuses to sync a directory is taken at its word.
//! - On a network file system a rename may take effect and still report an error, and locks may be visible to one
//!   machine only. Sweep and recover while no other machine writes.
//! - Linux is where every guarantee is tested. On macOS syncs use `F_FULLFSYNC`.
//! - On Windows there are no modes, owners and directory syncs. A target that another program has open without sharing
//!   cannot be replaced. The crate tries for half a second, and a drop may have to wait for that. For a moment after
//!   the rename a reader may find the new file locked.
//!
//! # Comparison
//!
//! - [`tempfile`](https://docs.rs/tempfile) makes a good temporary file for blocking code. It syncs neither the file
//!   nor its directory, and inside `spawn_blocking` its `persist` lands even if nobody waits any more.
//! - `std::fs::write` in place is right for a file that may be torn and made again.
//! - If nothing ever drops your future (no timeout, no `select!`, no shutdown), [`blocking`] inside `spawn_blocking` is
//!   all you need. A program without a runtime uses it directly.
//!
//! # Features
//!
//! | feature | default | adds |
//! |---|---|---|
//! | `json` | yes | [`write_json`] and [`write_json_with_timeout`] |
//! | `tracing` | no | a warning if a temporary file could not be removed, or a committed transaction not cleaned up; an error if a transaction is left undecided, or a file half written |
//!
//! # Minimum supported Rust version
//!
//! 1.89. It is raised only in a minor release.

#[cfg(unix)]
mod apply;
#[cfg(unix)]
mod chain;
mod commit;
mod error;
mod file;
#[cfg(unix)]
mod in_place;
#[cfg(unix)]
mod journal;
#[cfg(unix)]
mod lock;
mod names;
mod options;
#[cfg(unix)]
mod plan;
mod platform;
#[cfg(unix)]
mod protocol;
#[cfg(unix)]
mod recovery;
mod staged;
mod staging;
#[cfg(unix)]
mod transaction;

pub mod blocking;

pub use error::{Error, TargetState};
pub use file::{AtomicFileWriter, CommitHandle, write, write_bytes};
#[cfg(feature = "json")]
pub use file::{write_json, write_json_with_timeout};
#[cfg(unix)]
pub use lock::{ReadLock, open_together, read_lock};
pub use options::{Durability, InPlace, Preserve, Symlinks, WriteOptions};
#[cfg(unix)]
pub use recovery::{RecoveryReport, recover};
pub use staging::{SweepReport, sweep};
#[cfg(unix)]
pub use transaction::MultiFileTransaction;

// The examples of the README compile.
#[cfg(all(doctest, feature = "json"))]
#[doc = include_str!("../README.md")]
struct Readme;
