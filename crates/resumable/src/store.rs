//! The file and the thread that owns it.
//!
//! Invariant: the thread holds the lock from before its first read until after its last sync, and only the holder of
//! the lock writes. The run that feeds it never waits for the disk.

use std::{
    fs::File,
    io,
    path::{self, Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    thread,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::{
    compact::is_due,
    disk::{append, check_place},
    error::{TaskError, in_context},
    file::{OpenFile, OpenRequest, compact_complete, compact_free, open_locked},
    history::History,
    item::LONGEST_WAIT,
    log::{Blocks, Chain, Kind},
};

/// A full buffer of this size is written without waiting for the interval; it is synced when the interval is over.
const WRITE_AT_BYTES: usize = 256 << 10;
/// A buffer of this size is full: no new item is started until the thread has taken it.
const FULL_AT_BYTES: usize = 4 << 20;
/// How often an idle thread checks whether the file is still where it was.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often a write that met a full disk is tried again.
const TRY_EVERY: Duration = Duration::from_secs(1);

/// A checkpoint in a local file.
///
/// One run at a time holds it: the file is locked (advisory, `flock` on Unix) as long as that run lives. The file stays
/// when the run completes, because it *is* the result: the same call again returns it without running anything.
#[derive(Clone, Debug)]
pub struct FileStore {
    path: PathBuf,
    pub(crate) wait: Duration,
    pub(crate) longest_full: Duration,
}

impl FileStore {
    /// Names the checkpoint at `path`. A missing file means a first run; its directory must exist.
    ///
    /// A relative path starts at the working directory at the moment the file is opened: a process that changes
    /// directory afterwards does not lose its checkpoint.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), wait: Duration::from_secs(1), longest_full: Duration::from_secs(600) }
    }

    /// Sets how long to wait for a run that still holds the file before [`TaskError::Busy`]. Default: 1 second, enough
    /// for a run that was just dropped to sync and release the file.
    #[must_use]
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// Sets how long a run waits for room on a full disk, or in a full quota, before it ends with [`TaskError::Io`].
    /// Default: 10 minutes. Zero ends it at once.
    ///
    /// The run pauses: no item starts, [`Progress::paused`](crate::Progress::paused) says why, and the write is tried again
    /// every second. What had been written is synced first; what is completed later stays in memory until there is room,
    /// and a kill loses it. A run that is cancelled, dropped or at its end does not wait, and says what it could not write.
    /// If only a sync finds the disk full, as on some network file systems, that is a failed sync, which is final.
    #[must_use]
    pub fn wait_for_room(mut self, longest: Duration) -> Self {
        self.longest_full = longest;
        self
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the path absolute. The store checks again and again whether the path still leads to the file, and anything
    /// in the process may change the working directory.
    pub(crate) fn anchored(mut self) -> Result<Self, TaskError> {
        let absolute = path::absolute(&self.path);
        self.path = absolute.map_err(|error| TaskError::io("find the directory of checkpoint", &self.path, error))?;
        Ok(self)
    }

    /// Rewrites the checkpoint with only its current records, and returns its length before and after, in bytes. This
    /// drops replaced results, overcome failures and a torn tail; nothing else changes.
    ///
    /// A run does this by itself when it opens or completes a file that is more than twice as large as its current
    /// records. It leaves files of up to 4 KiB as they are. However this ends, the path leads to the whole old file or
    /// to the whole new one. It blocks the thread meanwhile.
    ///
    /// # Errors
    ///
    /// [`TaskError::Busy`] if a run holds the file for longer than [`wait`](Self::wait), [`TaskError::Corrupt`] and
    /// [`TaskError::NewerFormat`] if it cannot be read; then it is not changed. [`TaskError::Io`] if it does not exist
    /// or the file system fails.
    pub fn compact(&self) -> Result<Compacted, TaskError> {
        let store = self.clone().anchored()?;
        let (before_bytes, after_bytes) = compact_free(&store.path, store.wait)?;
        Ok(Compacted { before_bytes, after_bytes })
    }
}

/// What a compaction has saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Compacted {
    /// The length of the file before.
    pub before_bytes: u64,
    /// The length of the file now.
    pub after_bytes: u64,
}

/// When the thread syncs, and how long it waits for room on a full disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    pub(crate) every: Duration,
    /// As many unsynced records end the interval.
    pub(crate) every_items: u64,
    pub(crate) longest_full: Duration,
}

/// An open checkpoint: what it holds, and the way to add to it.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) log: Log,
    pub(crate) history: History,
    pub(crate) salt: u64,
}

/// Starts the checkpoint thread, which opens the file and then writes to it until its [`Log`] is closed or dropped. The
/// token ends a wait for another run that holds the file.
pub(crate) fn open(
    request: OpenRequest,
    pace: Pace,
    token: CancellationToken,
) -> oneshot::Receiver<Result<Opened, TaskError>> {
    let (reply, opened) = oneshot::channel();
    // A failed spawn drops the sender with the closure, and the receiver reports the thread as gone.
    let _detached =
        thread::Builder::new().name("checkpoint".to_owned()).spawn(move || run(&request, pace, &token, reply));
    opened
}

/// Items of the input that were read since the last push: how many, their check bytes, and the fingerprint after them.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    pub(crate) first: u64,
    pub(crate) count: u64,
    pub(crate) chain: u64,
    pub(crate) checks: Vec<u8>,
}

/// The seal of a complete run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seal {
    pub(crate) total: u64,
    pub(crate) digest: u64,
    /// The least number of bytes of the results that this run found and kept.
    pub(crate) kept_bytes: u64,
}

/// A record in the buffer: its number, counted from 1, and whether there is room for more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pushed {
    pub(crate) number: u64,
    pub(crate) has_room: bool,
}

/// The store failed. Closing it returns the cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failed;

/// The way to add to the checkpoint. Dropping it lets the thread write, sync and unlock on its own.
#[derive(Debug)]
pub(crate) struct Log {
    shared: Arc<Shared>,
    keeper: Keeper,
    closed: oneshot::Receiver<io::Result<()>>,
    /// Why nothing can be added, if the checkpoint is open for reading only.
    refusal: Option<TaskError>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    blocks: Blocks,
    marks: Marks,
    /// How many records were ever pushed, and how many of them are durable.
    pushed: u64,
    synced: u64,
    /// The bytes of the records that end an item. In a complete file they are current.
    ends_bytes: u64,
    /// As many unsynced records end the interval.
    every_items: u64,
    /// Whether something waits for a sync, which ends the interval.
    hurry: bool,
    stop: bool,
    seal: Option<Seal>,
    /// When the next write is tried, if the disk is full.
    full_until: Option<Instant>,
    failed: bool,
    waiting: Option<Waker>,
}

impl State {
    /// How many bytes of a complete file are certainly current.
    fn counted_bytes(&self) -> Option<u64> {
        self.seal.map(|seal| seal.kept_bytes + self.ends_bytes)
    }

    /// Whether there is room for more records.
    fn has_room(&self) -> bool {
        self.blocks.len() < FULL_AT_BYTES && self.full_until.is_none()
    }

    /// Wakes the run to check again what it waits for.
    fn wake(&mut self) {
        if let Some(waker) = self.waiting.take() {
            waker.wake();
        }
    }
}

impl Shared {
    /// No code that can panic half-way runs under this lock, so a poisoned lock holds a sound state.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits a moment for room on the disk, unless it is too late for that or the run is ending.
    fn wait_for_room(&self, deadline: Option<Instant>) -> bool {
        let mut state = self.lock();
        let next = Instant::now() + TRY_EVERY;
        if state.stop || deadline.is_some_and(|deadline| deadline < next) {
            return false;
        }
        state.full_until = Some(next);
        state.wake();
        loop {
            let left = next.saturating_duration_since(Instant::now());
            if state.stop || left.is_zero() {
                return true;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Notes that there is room again.
    fn has_found_room(&self) {
        let mut state = self.lock();
        state.full_until = None;
        state.wake();
    }
}

impl Log {
    /// A log that refuses every record.
    fn refusing(refusal: TaskError) -> Self {
        let (done, closed) = oneshot::channel();
        drop(done.send(Ok(())));
        let shared = Arc::default();
        Self { keeper: Keeper::of(&shared), shared, closed, refusal: Some(refusal) }
    }

    /// Call it before the first item starts: a complete checkpoint may be open for reading only, and then no work may
    /// be left.
    #[inline]
    pub(crate) fn must_take_more(&mut self) -> Result<(), TaskError> {
        self.refusal.take().map_or(Ok(()), Err)
    }

    /// Adds a record, and before it the marks of the input read so far, which it empties.
    ///
    /// A record is never refused for lack of room; the answer says whether there is room for more.
    #[inline]
    pub(crate) fn push(&self, kind: Kind, index: usize, payload: &[u8], marks: &mut Marks) -> Result<Pushed, Failed> {
        let mut state = self.shared.lock();
        if state.failed {
            return Err(Failed);
        }
        if marks.count > 0 {
            if state.marks.count == 0 {
                state.marks.first = marks.first;
            }
            state.marks.count += std::mem::take(&mut marks.count);
            state.marks.chain = marks.chain;
            state.marks.checks.append(&mut marks.checks);
        }
        let before = state.blocks.len();
        state.blocks.record(kind, index as u64, payload);
        let after = state.blocks.len();
        state.pushed += 1;
        if matches!(kind, Kind::Result | Kind::Quarantine) {
            state.ends_bytes += payload.len() as u64;
        }
        let number = state.pushed;
        let is_due = number - state.synced >= state.every_items && !std::mem::replace(&mut state.hurry, true);
        let has_room = state.has_room();
        drop(state);
        // The first record starts the interval, and a big buffer or enough records end it. In between, the thread need
        // not be woken.
        if before == 0 || is_due || (before < WRITE_AT_BYTES && after >= WRITE_AT_BYTES) {
            self.shared.changed.notify_one();
        }
        Ok(Pushed { number, has_room })
    }

    /// Becomes ready once the record with this number is durable, and returns up to which number all are. Until then,
    /// the thread does not wait for the end of the interval.
    pub(crate) fn poll_synced(&self, number: u64, cx: &mut Context<'_>) -> Poll<Result<u64, Failed>> {
        let mut state = self.shared.lock();
        if state.failed {
            return Poll::Ready(Err(Failed));
        }
        if state.synced >= number {
            return Poll::Ready(Ok(state.synced));
        }
        state.waiting = Some(cx.waker().clone());
        let asked = std::mem::replace(&mut state.hurry, true);
        drop(state);
        if !asked {
            self.shared.changed.notify_one();
        }
        Poll::Pending
    }

    /// Becomes ready once there is room again; the task is also woken if the store fails.
    pub(crate) fn poll_room(&self, cx: &mut Context<'_>) -> Poll<Result<(), Failed>> {
        let mut state = self.shared.lock();
        if state.failed {
            return Poll::Ready(Err(Failed));
        }
        state.waiting = Some(cx.waker().clone());
        if state.has_room() { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    /// When the next write is tried, if the disk is full.
    pub(crate) fn full_until(&self) -> Option<Instant> {
        self.shared.lock().full_until
    }

    /// Keeps the file locked after the log is gone.
    pub(crate) fn keeper(&self) -> Keeper {
        self.keeper.clone()
    }

    /// Asks the thread to write everything, the seal last, sync it and unlock the file.
    pub(crate) fn stop(&self, seal: Option<Seal>) {
        let mut state = self.shared.lock();
        state.stop = true;
        state.seal = seal;
        drop(state);
        self.shared.changed.notify_one();
    }

    /// Becomes ready when everything pushed before [`Log::stop`] is durable and the file is unlocked.
    pub(crate) fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let gone = |_| Err(io::Error::other("the checkpoint thread is gone"));
        Future::poll(std::pin::Pin::new(&mut self.closed), cx).map(|closed| closed.unwrap_or_else(gone))
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.shared.lock().waiting = None;
    }
}

/// The file is locked as long as there is one of these, or until [`Log::stop`].
#[derive(Clone, Debug)]
pub(crate) struct Keeper {
    _last: Arc<StopOnDrop>,
}

impl Keeper {
    fn of(shared: &Arc<Shared>) -> Self {
        Self { _last: Arc::new(StopOnDrop(Arc::clone(shared))) }
    }
}

#[derive(Debug)]
struct StopOnDrop(Arc<Shared>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        if !std::mem::replace(&mut self.0.lock().stop, true) {
            self.0.changed.notify_one();
        }
    }
}

/// The life of the checkpoint thread.
fn run(
    request: &OpenRequest,
    pace: Pace,
    token: &CancellationToken,
    reply: oneshot::Sender<Result<Opened, TaskError>>,
) {
    let path = &request.path;
    // If there is no receiver, here and below, the run was dropped while it opened.
    let (file, history) = match open_locked(request, || reply.is_closed() || token.is_cancelled()) {
        Ok(OpenFile::Locked(file, history)) => (file, history),
        Ok(OpenFile::Complete(history, refusal)) => {
            let (log, salt) = (Log::refusing(refusal), history.chain.salt);
            drop(reply.send(Ok(Opened { log, history, salt })));
            return;
        }
        Err(error) => {
            drop(reply.send(Err(error)));
            return;
        }
    };
    let shared = Arc::new(Shared::default());
    shared.lock().every_items = pace.every_items;
    let (done, closed) = oneshot::channel();
    let (epoch, chain, end) = (history.epoch + 1, history.chain, history.end);
    let log = Log { keeper: Keeper::of(&shared), shared: Arc::clone(&shared), closed, refusal: None };
    // If the run is gone, the failed send returns the value, and it is dropped here. That stops the loop below before
    // it writes anything.
    drop(reply.send(Ok(Opened { log, history, salt: chain.salt })));
    let longest_full = pace.longest_full;
    let mut writer = Writer { file, path, shared: &shared, chain, end, epoch, longest_full, wrote: false };
    let outcome = write_until_stopped(&shared, &mut writer, pace.every);
    let counted = shared.lock().counted_bytes();
    if outcome.is_ok() && counted.is_some_and(|counted| is_due(writer.end, counted)) {
        // The file is whole and durable with or without it.
        drop(compact_complete(&writer.file, path));
    }
    if outcome.is_err() {
        let mut state = shared.lock();
        state.failed = true;
        state.wake();
    }
    // Unlocked explicitly and not by closing: the run may still read from the file, and a child process that is just
    // being forked may hold a copy of the handle and keep the lock until its exec.
    let unlocked = writer.file.unlock();
    drop(writer);
    let outcome = outcome.and(unlocked).map_err(|error| in_context("write checkpoint", path, error));
    // The receiver is gone if the run was dropped; then the next run reads what is in the file.
    drop(done.send(outcome));
}

struct Writer<'a> {
    file: Arc<File>,
    path: &'a Path,
    shared: &'a Shared,
    /// The place of the next block: in the chain, and in the file.
    chain: Chain,
    end: u64,
    epoch: u64,
    longest_full: Duration,
    wrote: bool,
}

impl Writer<'_> {
    fn write(&mut self, marks: &mut Marks, blocks: &mut Blocks) -> io::Result<()> {
        let mut before = Blocks::default();
        if !self.wrote {
            before.open(self.epoch, u64::from(std::process::id()));
            self.wrote = true;
        }
        if marks.count > 0 {
            before.input_mark(marks.first, marks.count, marks.chain, &marks.checks);
            marks.count = 0;
            marks.checks.clear();
        }
        self.append(&mut before)?;
        self.append(blocks)?;
        blocks.clear();
        Ok(())
    }

    fn append(&mut self, blocks: &mut Blocks) -> io::Result<()> {
        let bytes = blocks.seal(&mut self.chain);
        if let Err(error) = append(&self.file, self.end, bytes) {
            self.append_when_there_is_room(bytes, error)?;
        }
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Keeps trying as long as the disk is full, up to the limit.
    fn append_when_there_is_room(&self, bytes: &[u8], mut error: io::Error) -> io::Result<()> {
        let deadline = Instant::now().checked_add(self.longest_full);
        while matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            // A part may have been written. Cut the file back to a whole block and sync it: what was written before
            // must not wait for its sync as long as this waits for room.
            self.file.set_len(self.end)?;
            self.file.sync_data()?;
            self.look()?;
            if !self.shared.wait_for_room(deadline) {
                break;
            }
            match append(&self.file, self.end, bytes) {
                Ok(()) => {
                    self.shared.has_found_room();
                    return Ok(());
                }
                Err(again) => error = again,
            }
        }
        Err(error)
    }

    /// Checks the file: it is the checkpoint only as long as the path leads to it and nothing else changes it.
    fn look(&self) -> io::Result<()> {
        check_place(&self.file, self.path, self.end)
    }
}

/// Takes the shared buffer when it is big or the interval is over, writes it, and syncs once an interval.
fn write_until_stopped(shared: &Shared, writer: &mut Writer<'_>, every: Duration) -> io::Result<()> {
    let (mut blocks, mut marks, every) = (Blocks::default(), Marks::default(), every.min(LONGEST_WAIT));
    // When the oldest unsynced byte must be durable. An earlier run may have been killed before it synced what it
    // wrote, and this run hands those results out as durable.
    let mut due = (writer.epoch > 1).then(Instant::now);
    loop {
        let mut state = shared.lock();
        let looked = Instant::now();
        while !state.stop && !state.hurry && state.blocks.len() < WRITE_AT_BYTES {
            if due.is_none() && !state.blocks.is_empty() {
                due = Some(Instant::now() + every);
            }
            let next_look = looked + LOOK_EVERY;
            let left = due.map_or(next_look, |due| due.min(next_look)).saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        std::mem::swap(&mut state.blocks, &mut blocks);
        std::mem::swap(&mut state.marks, &mut marks);
        let (stop, seal, pushed) = (state.stop, state.seal, state.pushed);
        let hurry = std::mem::take(&mut state.hurry);
        state.wake();
        drop(state);
        if let Some(Seal { total, digest, .. }) = seal {
            blocks.sealed(total, digest);
        }
        if !blocks.is_empty() {
            writer.write(&mut marks, &mut blocks)?;
            due = due.or(Some(Instant::now() + every));
        }
        let is_due = due.is_some_and(|due| stop || hurry || due <= Instant::now());
        if is_due {
            // A failed fsync is final: the kernel may have dropped the pages, and a second one would say all is well.
            writer.file.sync_data()?;
            due = None;
        }
        writer.look()?;
        if is_due {
            let mut state = shared.lock();
            state.synced = pushed;
            state.wake();
        }
        if stop {
            return Ok(());
        }
    }
}
