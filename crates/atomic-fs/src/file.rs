//! Single files: written whole in one call, or through a writer, whose content arrives in pieces and becomes the target
//! as a whole.
//!
//! Invariant: up to 1 MiB, and for JSON and [`Bytes`] of any size, one call is one hop to the blocking pool. A writer
//! has at most three buffers of 1 MiB, whatever the size; one fills while others are on their way to the disk. A
//! dropped `write_all` takes back what it had taken in, so that the content never has part of a piece.

use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
#[cfg(feature = "json")]
use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncWrite;
use tokio::runtime::Handle;
use tokio::task::{JoinHandle, coop};
#[cfg(feature = "json")]
use tokio::time::Instant;

use crate::commit::{CHUNK_BYTES, Gate, Job, current_runtime, cut_short};
use crate::staged::{Staged, write_whole};
use crate::{Error, WriteOptions};

/// The first allocation of a buffer. From here it doubles, so that many small files cost little.
const FIRST_BUFFER_BYTES: usize = 8 << 10;

/// Replaces or creates the file `path` with `bytes` as its content.
///
/// Every reader sees the old file or the new one, whole. `Ok` means that the new file survives a power cut. Concurrent
/// calls all succeed, and the last one to rename wins. For options see
/// [`AtomicFileWriter::options`](crate::AtomicFileWriter::options). It copies `bytes`, at most 3 MiB at a time;
/// [`write_bytes`] copies nothing.
///
/// # Cancel safety
///
/// This method is cancel safe. If dropped before completion, the target is the old file or the new one, and this call
/// never changes it afterwards; the temporary file is removed as soon as the system call in progress returns.
///
/// # Errors
///
/// Same as [`WriteOptions::open`] and [`AtomicFileWriter::commit`](crate::AtomicFileWriter::commit).
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

/// Replaces or creates the file `path` with `content`, which it does not copy.
///
/// It is [`write()`] for owned or shared content: a `Vec<u8>`, a `String`, a `&'static str`, or a [`Bytes`], which is
/// cheap to clone. Whatever its size, one call is one hop to the blocking pool, and the content is released when the
/// write has ended.
///
/// # Cancel safety
///
/// This method is cancel safe. If dropped before completion, the target is the old file or the new one, and this call
/// never changes it afterwards; the temporary file is removed, and the content released, as soon as the system call in
/// progress returns.
///
/// # Errors
///
/// Same as [`write()`].
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
    /// Replaces or creates the file `path` with `bytes`, as [`write()`] does with the defaults.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, the target is the old file or the new one, and this
    /// call never changes it afterwards; the temporary file is removed as soon as the system call in progress returns.
    ///
    /// # Errors
    ///
    /// Same as [`open`](Self::open) and [`AtomicFileWriter::commit`](crate::AtomicFileWriter::commit).
    pub async fn write(self, path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> Result<(), Error> {
        let bytes = bytes.as_ref();
        if bytes.len() <= CHUNK_BYTES {
            return write_job(path.as_ref(), bytes.to_vec(), self, Gate::new())?.await;
        }
        // Copying everything at once would double the memory; this way it is copied in pieces while others are written.
        let mut writer = self.open(path).await?;
        writer.write_all(bytes).await?;
        writer.commit().await
    }

    /// Replaces or creates the file `path` with `content`, which it does not copy, as [`write_bytes()`] does with the
    /// defaults.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, the target is the old file or the new one, and this
    /// call never changes it afterwards; the temporary file is removed, and the content released, as soon as the system
    /// call in progress returns.
    ///
    /// # Errors
    ///
    /// Same as [`open`](Self::open) and [`AtomicFileWriter::commit`](crate::AtomicFileWriter::commit).
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

/// Replaces or creates the file `path` with `value` as pretty-printed JSON.
///
/// The value is serialized before anything is touched.
///
/// # Cancel safety
///
/// This method is cancel safe. If dropped before completion, the target is the old file or the new one, and this call
/// never changes it afterwards.
///
/// # Errors
///
/// [`Error::Serialize`], or as [`write()`].
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

/// Replaces or creates the file `path` with `value` as pretty-printed JSON, if the rename begins within `timeout`.
///
/// [`TimedOut`](Error::TimedOut) means that the target is unchanged, and that this call will never change it: no rename
/// begins after `timeout`, even if the executor is too busy to notice. Once the rename has begun the timeout no longer
/// applies, and the call waits until it knows whether the new file is durable.
///
/// When the time is up, the call waits up to 100 ms longer for its temporary file to be removed.
///
/// # Cancel safety
///
/// This method is cancel safe. If dropped before completion, the target is the old file or the new one, and this call
/// never changes it afterwards.
///
/// # Errors
///
/// [`Error::TimedOut`], or as [`write_json`].
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
/// let late = atomic_fs::write_json_with_timeout(&path, &"other", Duration::ZERO).await;
/// let late = late.unwrap_err();
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
    // A timeout beyond the range of `Instant` means no timeout.
    let gate = Gate::with_deadline(Instant::now().checked_add(timeout));
    write_job(path, to_json(path, value)?, WriteOptions::default(), gate)?.within(timeout).await
}

#[cfg(feature = "json")]
pub(crate) fn to_json<T: serde::Serialize + ?Sized>(path: &Path, value: &T) -> Result<Vec<u8>, Error> {
    serde_json::to_vec_pretty(value)
        .map_err(|error| Error::Serialize { path: path.to_path_buf(), source: error.into() })
}

/// Writes one file in pieces, and makes it the target as a whole on [`commit`](Self::commit).
///
/// If it is dropped without a commit, the target stays as it was. The temporary file is removed at once, or, if a piece
/// is being written just then, as soon as that is done.
///
/// Memory: a writer buffers up to 1 MiB of content; beyond that, up to three buffers of 1 MiB take turns. The blocking
/// pool of the runtime where the writer was opened writes them, in one job as long as content keeps coming.
///
/// It implements [`AsyncWrite`], so it can be the destination of a [`tokio::io::copy`]. There `flush` and `shutdown` do
/// nothing: only a commit makes content visible.
///
/// # Examples
///
/// ```
/// use cancel_safe_atomic_fs::AtomicFileWriter;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> std::io::Result<()> {
/// # let dir = tempfile::tempdir()?;
/// let path = dir.path().join("report.txt");
/// let mut writer = AtomicFileWriter::new(&path).await?;
/// writer.write_all(b"header\n").await?;
/// writer.write_all(b"body\n").await?;
/// assert!(!path.exists());
/// writer.commit().await?;
/// assert_eq!(std::fs::read_to_string(&path)?, "header\nbody\n");
/// # Ok(())
/// # }
/// ```
#[must_use = "a writer that is dropped without a commit leaves the target as it was"]
pub struct AtomicFileWriter {
    runtime: Handle,
    gate: Arc<Gate>,
    path: Arc<Path>,
    stage: Stage,
    /// Content that is not yet on its way to the file.
    buffer: Vec<u8>,
    lane: Arc<Lane>,
    /// Where in the file the buffer begins.
    base: u64,
}

/// Where the new file is.
enum Stage {
    Idle(Box<Staged>),
    /// In a job that writes buffers, and hands it back when there are no more.
    Busy(Job<Box<Staged>>),
    /// Nowhere: it was committed or discarded, or a write failed.
    Gone,
}

impl AtomicFileWriter {
    /// Opens a writer for `path` with the default [options](WriteOptions).
    ///
    /// The directory must exist; the target need not.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, the target is as it was, and a temporary file that was
    /// already created is removed.
    ///
    /// # Errors
    ///
    /// Same as [`WriteOptions::open`].
    pub async fn new(path: impl AsRef<Path>) -> Result<Self, Error> {
        WriteOptions::default().open(path).await
    }

    /// Returns the default options; change them, then open or write with them.
    pub fn options() -> WriteOptions {
        WriteOptions::default()
    }

    /// Takes in all of `data`.
    ///
    /// It only copies content up to 1 MiB; beyond that it waits for the disk.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, none of `data` is part of the file: anything already
    /// taken in is taken back.
    ///
    /// # Errors
    ///
    /// Disk errors ([`is_storage_full`](Error::is_storage_full) and others). After one the writer is
    /// [`Broken`](Error::Broken): it takes in nothing more and cannot be committed; the target stays as it was.
    pub async fn write_all(&mut self, data: &[u8]) -> Result<(), Error> {
        let mut attempt = Attempt { start: self.position(), writer: self, complete: false };
        let mut rest = data;
        while !rest.is_empty() {
            let taken = poll_fn(|cx| attempt.writer.poll_take(cx, rest)).await?;
            rest = &rest[taken..];
        }
        attempt.complete = true;
        Ok(())
    }

    /// Takes in all of `data`, exactly as [`write_all`](Self::write_all) does.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe.
    /// If dropped before completion, none of `data` is part of the file.
    ///
    /// # Errors
    ///
    /// Same as [`write_all`](Self::write_all).
    pub async fn write(&mut self, data: &[u8]) -> Result<(), Error> {
        self.write_all(data).await
    }

    /// Makes the written content the target: syncs it, renames it, and syncs its directory.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, the target is the old file or the new one, whole, and
    /// this call never changes it afterwards. If the rename has been entered, the drop waits for that one system call;
    /// if it has not begun, what was written is discarded. To continue regardless, call
    /// [`commit_detached`](Self::commit_detached). If the target is being [written in place](crate::InPlace), the drop
    /// waits until all of it is written and synced, or put back.
    ///
    /// # Errors
    ///
    /// [`Error::target`] says whether the target is [`Unchanged`](crate::TargetState::Unchanged) for good, or
    /// [`Visible`](crate::TargetState::Visible) but not known to be durable. Only if it was [written in
    /// place](crate::InPlace) can it be [`Undecided`](crate::TargetState::Undecided).
    pub async fn commit(mut self) -> Result<(), Error> {
        poll_fn(|cx| self.poll_idle(cx)).await?;
        let (runtime, gate, path) = (self.runtime.clone(), self.gate.clone(), self.path.clone());
        // The writer itself moves into the job: if this is dropped while the job waits for a thread, the writer removes
        // its file as always.
        let job = Job::spawn(&runtime, &gate, &path, move |gate| {
            let (mut staged, base, tail) = self.into_staged()?;
            staged.write_at(base, &tail, gate)?;
            staged.look_again()?;
            staged.install(base + tail.len() as u64, gate)
        });
        job.await
    }

    /// Starts a [`commit`](Self::commit) that no drop can cancel, only a shutdown of the runtime.
    ///
    /// # Cancel safety
    ///
    /// Once polled, it runs to completion even if dropped. It need not even be polled: the commit is in progress when
    /// this returns, and the handle only reports how it ended.
    pub fn commit_detached(self) -> CommitHandle {
        let (gate, path, runtime) = (self.gate.clone(), self.path.clone(), self.runtime.clone());
        CommitHandle::new(gate, path, Ok(runtime.spawn(self.commit())))
    }

    /// Discards what was written and waits until the temporary file is gone.
    ///
    /// # Cancel safety
    ///
    /// Once polled, it runs to completion even if dropped. The target stays as it was; the temporary file is removed in
    /// any case.
    ///
    /// # Errors
    ///
    /// Returns the error of the removal; [`sweep`](crate::sweep) removes the file later.
    pub async fn discard(mut self) -> Result<(), Error> {
        // A write that has failed has already removed its file, so its error no longer matters.
        let _failed_before = poll_fn(|cx| self.poll_idle(cx)).await;
        let Stage::Idle(staged) = std::mem::replace(&mut self.stage, Stage::Gone) else { return Ok(()) };
        Job::spawn(&self.runtime, &self.gate, &self.path, move |_| staged.discard()).await
    }

    /// A writer over a file that a transaction has staged.
    #[cfg(unix)]
    pub(crate) fn over(staged: Staged, path: Arc<Path>, runtime: Handle) -> Self {
        let stage = Stage::Idle(Box::new(staged));
        Self { runtime, gate: Gate::new(), path, stage, buffer: Vec::new(), lane: Lane::new(), base: 0 }
    }

    /// Where its jobs run.
    #[cfg(unix)]
    pub(crate) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// Waits until nothing is being written.
    #[cfg(unix)]
    pub(crate) async fn settle(&mut self) -> Result<(), Error> {
        poll_fn(|cx| self.poll_idle(cx)).await
    }

    /// Hands over the file, the last piece, and the piece's offset. The writer must have settled.
    pub(crate) fn into_staged(mut self) -> Result<(Box<Staged>, u64, Vec<u8>), Error> {
        match std::mem::replace(&mut self.stage, Stage::Gone) {
            Stage::Idle(staged) => Ok((staged, self.base, std::mem::take(&mut self.buffer))),
            other => {
                self.stage = other;
                Err(self.broken())
            }
        }
    }

    /// How many bytes have been taken in.
    fn position(&self) -> u64 {
        self.base + self.buffer.len() as u64
    }

    /// Takes in as much of `data` as there is room for; waits if there is none.
    fn poll_take(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize, Error>> {
        // Without this, a loop of small writes would never yield, and no timeout around it could fire.
        let budget = ready!(coop::poll_proceed(cx));
        if let Stage::Gone = self.stage {
            return Poll::Ready(Err(self.broken()));
        }
        if self.buffer.len() == CHUNK_BYTES {
            ready!(self.poll_send(cx))?;
        }
        let taken = data.len().min(CHUNK_BYTES - self.buffer.len());
        let needed = self.buffer.len() + taken;
        if needed > self.buffer.capacity() {
            let capacity = needed.next_power_of_two().clamp(FIRST_BUFFER_BYTES, CHUNK_BYTES);
            self.buffer.reserve_exact(capacity - self.buffer.len());
        }
        self.buffer.extend_from_slice(&data[..taken]);
        budget.made_progress();
        Poll::Ready(Ok(taken))
    }

    /// Waits for the job that is writing a buffer, if there is one.
    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        match &mut self.stage {
            Stage::Idle(_) => Poll::Ready(Ok(())),
            Stage::Gone => Poll::Ready(Err(self.broken())),
            Stage::Busy(job) => match ready!(Pin::new(job).poll(cx)) {
                Ok(staged) => {
                    self.stage = Stage::Idle(staged);
                    Poll::Ready(Ok(()))
                }
                Err(error) => {
                    self.stage = Stage::Gone;
                    Poll::Ready(Err(error))
                }
            },
        }
    }

    /// Sends the buffer on its way, to the running job or to a new one; waits if one is already waiting there.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let mut piece = Piece { offset: self.base, bytes: std::mem::take(&mut self.buffer) };
        let end = piece.offset + piece.bytes.len() as u64;
        if let Stage::Busy(_) = self.stage {
            piece = match self.lane.offer(cx, piece) {
                Ok(()) => return self.sent(end),
                Err(piece) => piece,
            };
        }
        // Either there is no job, or its end, as well as room for this piece, wakes the caller.
        match self.poll_idle(cx) {
            Poll::Ready(Ok(())) => {}
            other => {
                self.buffer = piece.bytes;
                return other;
            }
        }
        if let Stage::Idle(staged) = std::mem::replace(&mut self.stage, Stage::Gone) {
            let lane = self.lane.clone();
            lane.open();
            let work = move |gate: &Gate| lane.drain(staged, piece, gate);
            self.stage = Stage::Busy(Job::spawn(&self.runtime, &self.gate, &self.path, work));
        }
        self.sent(end)
    }

    /// Continues with an empty buffer at `end`.
    fn sent(&mut self, end: u64) -> Poll<Result<(), Error>> {
        self.buffer = self.lane.buffer();
        self.base = end;
        Poll::Ready(Ok(()))
    }

    /// Takes back everything after `position`. What is already in the file is overwritten, or cut off at the end.
    fn rewind(&mut self, position: u64) {
        let kept = position.saturating_sub(self.base);
        self.buffer.truncate(usize::try_from(kept).unwrap_or(usize::MAX));
        self.base = self.base.min(position);
    }

    fn broken(&self) -> Error {
        Error::Broken { path: self.path.to_path_buf() }
    }
}

/// A piece of content, and where in the file it belongs.
#[derive(Debug)]
struct Piece {
    offset: u64,
    bytes: Vec<u8>,
}

/// The lane between a writer, which fills buffers, and the blocking job that writes them: at most one buffer waits in it.
///
/// A job lives as long as the writer stays ahead of it, so a fast stream is one job.
#[derive(Debug, Default)]
struct Lane(Mutex<LaneState>);

#[derive(Debug, Default)]
struct LaneState {
    waiting: Option<Piece>,
    /// Set by a job that found nothing waiting: it will not look again.
    closed: bool,
    /// A buffer that has been written, to be filled anew.
    written: Option<Vec<u8>>,
    /// The task to wake when there is room.
    writer: Option<Waker>,
}

impl Lane {
    fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Prepares the lane for a new job.
    fn open(&self) {
        self.state().closed = false;
    }

    /// Leaves a piece for the running job; hands it back if one is already waiting, or if the job is about to end.
    ///
    /// If it is handed back, the caller is woken when there is room. The caller itself has to wait for the end of the
    /// job.
    fn offer(&self, cx: &mut Context<'_>, piece: Piece) -> Result<(), Piece> {
        let mut state = self.state();
        if state.closed || state.waiting.is_some() {
            state.writer = Some(cx.waker().clone());
            return Err(piece);
        }
        state.waiting = Some(piece);
        Ok(())
    }

    /// An empty buffer, a used one if there is one.
    fn buffer(&self) -> Vec<u8> {
        self.state().written.take().unwrap_or_default()
    }

    /// Writes `piece` and all pieces that arrive here meanwhile.
    fn drain(&self, mut staged: Box<Staged>, mut piece: Piece, gate: &Gate) -> Result<Box<Staged>, Error> {
        loop {
            staged.write_at(piece.offset, &piece.bytes, gate)?;
            piece.bytes.clear();
            let mut state = self.state();
            state.written = Some(piece.bytes);
            match state.waiting.take() {
                Some(next) => piece = next,
                None => {
                    state.closed = true;
                    return Ok(staged);
                }
            }
            let writer = state.writer.take();
            drop(state);
            if let Some(writer) = writer {
                writer.wake();
            }
        }
    }

    /// Nothing panics while it is locked, so a poisoned lock holds a sound state.
    fn state(&self) -> MutexGuard<'_, LaneState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WriteOptions {
    /// Opens a writer for `path`: resolves it, inspects what is there, and creates a temporary file beside it.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, the target is as it was, and a temporary file that was
    /// already created is removed.
    ///
    /// # Errors
    ///
    /// The directory is [missing](Error::is_missing_directory); the target is [not a file](Error::is_not_a_file), or
    /// [exists](Error::is_already_exists) although it must not; the path [names no file](Error::InvalidPath); or
    /// [permission](Error::is_permission_denied) or [space](Error::is_storage_full) is missing.
    pub async fn open(self, path: impl AsRef<Path>) -> Result<AtomicFileWriter, Error> {
        let path = Arc::<Path>::from(path.as_ref());
        let runtime = current_runtime(&path)?;
        let gate = Gate::new();
        let target = path.clone();
        let staged = Job::spawn(&runtime, &gate, &path, move |_| Staged::create(&target, self)).await?;
        let stage = Stage::Idle(Box::new(staged));
        Ok(AtomicFileWriter { runtime, gate, path, stage, buffer: Vec::new(), lane: Lane::new(), base: 0 })
    }
}

/// One `write_all`, which takes back what it had taken in unless it completes.
struct Attempt<'a> {
    writer: &'a mut AtomicFileWriter,
    start: u64,
    complete: bool,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if !self.complete {
            self.writer.rewind(self.start);
        }
    }
}

impl AsyncWrite for AtomicFileWriter {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().poll_take(cx, data).map_err(io::Error::from)
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Drop for AtomicFileWriter {
    fn drop(&mut self) {
        if let Stage::Idle(staged) = std::mem::replace(&mut self.stage, Stage::Gone) {
            // The name is removed here and now. Closing a large file frees its space, which may take long, so the pool
            // does it. A runtime that is shutting down drops the closure, which closes the file at once.
            let file = staged.unlink();
            drop(self.runtime.spawn_blocking(move || drop(file)));
        }
    }
}

impl fmt::Debug for AtomicFileWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AtomicFileWriter").field("path", &self.path).field("bytes", &self.position()).finish()
    }
}

/// Reports how a detached commit ended, whether of [a writer](AtomicFileWriter::commit_detached) or of a transaction.
/// Dropping it does not cancel the commit.
///
/// # Cancel safety
///
/// Once polled, it runs to completion even if dropped. The commit is in progress whether or not this is polled.
#[derive(Debug)]
#[must_use = "without it nobody learns whether the commit succeeded"]
pub struct CommitHandle {
    gate: Arc<Gate>,
    path: Arc<Path>,
    /// The commit; or the reason why it could not begin, until that was returned.
    begun: Result<JoinHandle<Result<(), Error>>, Option<Error>>,
}

impl CommitHandle {
    pub(crate) fn new(gate: Arc<Gate>, path: Arc<Path>, begun: Result<JoinHandle<Result<(), Error>>, Error>) -> Self {
        Self { gate, path, begun: begun.map_err(Some) }
    }
}

impl Future for CommitHandle {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let handle = match &mut this.begun {
            Ok(handle) => handle,
            Err(error) => {
                let again = || Error::NoRuntime { path: this.path.to_path_buf() };
                return Poll::Ready(Err(error.take().unwrap_or_else(again)));
            }
        };
        Poll::Ready(match ready!(Pin::new(handle).poll(cx)) {
            Ok(result) => result,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(cut_short(&this.gate, &this.path)),
        })
    }
}
