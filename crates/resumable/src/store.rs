//! The file and the thread that owns it.
//!
//! Invariant: the thread holds the lock from before its first read until after its last sync, and nobody but the holder
//! of the lock writes. Whoever feeds it never waits for the disk.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    thread,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use crate::{
    codec::Codec,
    error::{TaskError, in_context},
    history::History,
    log::{Blocks, Header, Kind},
};

/// A full buffer of this size is written without waiting for the interval; it is synced when the interval is over.
const WRITE_AT_BYTES: usize = 256 << 10;
/// A buffer of this size is full: no new item is started until the thread has taken it.
const FULL_AT_BYTES: usize = 4 << 20;
/// How often a successor looks whether the lock is free.
const LOCK_POLL: Duration = Duration::from_millis(2);
/// A file that comes and goes this often while it is being opened is fought over by something else.
const OPEN_TRIES: u32 = 100;

/// A checkpoint in a local file.
///
/// One run at a time holds it: it is locked (advisory, `flock` on Unix) as long as that run lives. It is kept when the
/// run completes, because it *is* the result: the same call again returns it without running anything.
#[derive(Clone, Debug)]
pub struct FileStore {
    path: PathBuf,
    wait: Duration,
}

impl FileStore {
    /// The checkpoint at `path`. A missing file means a first run; its directory must exist.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), wait: Duration::from_secs(1) }
    }

    /// Sets how long to wait for a run that still holds the file before [`TaskError::Busy`]. Default: 1 second, enough
    /// for one that was dropped a moment ago to sync and let go.
    #[must_use]
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// What the thread needs to know to open the file.
#[derive(Debug)]
pub(crate) struct OpenRequest {
    pub(crate) store: FileStore,
    /// The header of a new file, and what that of an existing one must say, but for the salt.
    pub(crate) header: Header,
    /// Versions whose results are accepted although version or result type differ.
    pub(crate) accepted: Vec<String>,
    pub(crate) every: Duration,
}

/// An open checkpoint: what it holds, and the way to add to it.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) log: Log,
    pub(crate) history: History,
    pub(crate) salt: u64,
}

/// Starts the checkpoint thread, which opens the file and then writes to it until its [`Log`] is closed or dropped.
pub(crate) fn open(request: OpenRequest) -> oneshot::Receiver<Result<Opened, TaskError>> {
    let (reply, opened) = oneshot::channel();
    // A failed spawn drops the sender with the closure, and the receiver reports the thread as gone.
    let _detached = thread::Builder::new().name("checkpoint".to_owned()).spawn(move || run(request, reply));
    opened
}

/// Items of the input that were read since the last push: their check bytes, and the fingerprint after them.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    pub(crate) first: u64,
    pub(crate) chain: u64,
    pub(crate) checks: Vec<u8>,
}

/// The seal of a complete run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seal {
    pub(crate) total: u64,
    pub(crate) digest: u64,
}

/// The store failed; why is what closing it returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failed;

/// The way to add to the checkpoint. Dropping it lets the thread write, sync and unlock on its own.
#[derive(Debug)]
pub(crate) struct Log {
    shared: Arc<Shared>,
    closed: oneshot::Receiver<io::Result<()>>,
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
    stop: bool,
    seal: Option<Seal>,
    failed: bool,
    waiting: Option<Waker>,
}

impl Shared {
    /// No code that can panic half-way runs under this lock, so a poisoned one holds nothing broken.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Log {
    /// Adds a record, and before it the marks of the input read so far, which it empties.
    ///
    /// Returns whether there is room for more; a record is never refused for lack of room.
    #[inline]
    pub(crate) fn push(&self, kind: Kind, index: usize, payload: &[u8], marks: &mut Marks) -> Result<bool, Failed> {
        let mut state = self.shared.lock();
        if state.failed {
            return Err(Failed);
        }
        if !marks.checks.is_empty() {
            if state.marks.checks.is_empty() {
                state.marks.first = marks.first;
            }
            state.marks.chain = marks.chain;
            state.marks.checks.append(&mut marks.checks);
        }
        let before = state.blocks.len();
        state.blocks.record(kind, index as u64, payload);
        let after = state.blocks.len();
        drop(state);
        // The first record starts the interval, a big buffer ends it; between them the thread need not hear of anything.
        if before == 0 || (before < WRITE_AT_BYTES && after >= WRITE_AT_BYTES) {
            self.shared.changed.notify_one();
        }
        Ok(after < FULL_AT_BYTES)
    }

    /// Becomes ready once there is room again; the task is also woken if the store fails.
    pub(crate) fn poll_room(&self, cx: &mut Context<'_>) -> Poll<Result<(), Failed>> {
        let mut state = self.shared.lock();
        if state.failed {
            return Poll::Ready(Err(Failed));
        }
        state.waiting = Some(cx.waker().clone());
        if state.blocks.len() < FULL_AT_BYTES { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    /// Asks the thread to write what there is, the seal last, sync it and unlock the file.
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
        let mut state = self.shared.lock();
        state.waiting = None;
        let stopped = std::mem::replace(&mut state.stop, true);
        drop(state);
        if !stopped {
            self.shared.changed.notify_one();
        }
    }
}

/// The life of the checkpoint thread.
fn run(request: OpenRequest, reply: oneshot::Sender<Result<Opened, TaskError>>) {
    let path = request.store.path.clone();
    let (file, history, salt) = match open_file(&request, &reply) {
        Ok(opened) => opened,
        Err(error) => {
            // Nobody to tell means that the run was dropped while it opened.
            let _unheard = reply.send(Err(error));
            return;
        }
    };
    let shared = Arc::new(Shared::default());
    let (done, closed) = oneshot::channel();
    let epoch = history.epoch + 1;
    let log = Log { shared: Arc::clone(&shared), closed };
    // If the run is gone, what comes back is dropped here, which stops the loop below before it writes anything.
    let _unheard = reply.send(Ok(Opened { log, history, salt }));
    let mut writer = Writer { file, salt, epoch, wrote: false };
    let outcome = write_until_stopped(&shared, &mut writer, request.every);
    if outcome.is_err() {
        let mut state = shared.lock();
        state.failed = true;
        if let Some(waker) = state.waiting.take() {
            waker.wake();
        }
    }
    // Unlocked by name and not by closing: a child process being forked just now may hold a copy of the handle, and
    // would keep the lock until its exec.
    let unlocked = writer.file.unlock();
    drop(writer);
    let outcome = outcome.and(unlocked).map_err(|error| in_context("write checkpoint", &path, error));
    // The other side is gone if the run was dropped; then the next one reads what is in the file.
    let _unheard = done.send(outcome);
}

struct Writer {
    file: File,
    salt: u64,
    epoch: u64,
    wrote: bool,
}

impl Writer {
    fn write(&mut self, marks: &mut Marks, blocks: &mut Blocks) -> io::Result<()> {
        let mut before = Blocks::default();
        if !self.wrote {
            before.open(self.epoch, u64::from(std::process::id()));
            self.wrote = true;
        }
        if !marks.checks.is_empty() {
            before.input_mark(marks.first, marks.chain, &marks.checks);
            marks.checks.clear();
        }
        self.file.write_all(before.seal(self.salt))?;
        self.file.write_all(blocks.seal(self.salt))?;
        blocks.clear();
        Ok(())
    }
}

/// Takes the shared buffer when it is big or the interval is over, writes it, and syncs once an interval.
fn write_until_stopped(shared: &Shared, writer: &mut Writer, every: Duration) -> io::Result<()> {
    let (mut blocks, mut marks) = (Blocks::default(), Marks::default());
    // When the oldest byte that is not yet durable has to be.
    let mut due: Option<Instant> = None;
    loop {
        let mut state = shared.lock();
        while !state.stop && state.blocks.len() < WRITE_AT_BYTES {
            if due.is_none() && !state.blocks.is_empty() {
                due = Some(Instant::now() + every);
            }
            let Some(due) = due else {
                state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        std::mem::swap(&mut state.blocks, &mut blocks);
        std::mem::swap(&mut state.marks, &mut marks);
        let (stop, seal, waiting) = (state.stop, state.seal, state.waiting.take());
        drop(state);
        if let Some(waker) = waiting {
            waker.wake();
        }
        if let Some(Seal { total, digest }) = seal {
            blocks.sealed(total, digest);
        }
        if !blocks.is_empty() {
            writer.write(&mut marks, &mut blocks)?;
            due = due.or(Some(Instant::now() + every));
        }
        if due.is_some_and(|due| stop || due <= Instant::now()) {
            // A failed fsync is final: the kernel may have dropped the pages, and a second one would say all is well.
            writer.file.sync_data()?;
            due = None;
        }
        if stop {
            return Ok(());
        }
    }
}

/// Opens or creates the file, locks it, and reads what it holds.
fn open_file(
    request: &OpenRequest,
    reply: &oneshot::Sender<Result<Opened, TaskError>>,
) -> Result<(File, History, u64), TaskError> {
    let path = &request.store.path;
    for _ in 0..OPEN_TRIES {
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(mut file) => {
                if !file.metadata().map_err(|error| TaskError::io("examine", path, error))?.is_file() {
                    let error = io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
                    return Err(TaskError::io("use as a checkpoint", path, error));
                }
                lock(&file, request, reply)?;
                let (history, salt) = read(&mut file, request)?;
                return Ok((file, history, salt));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                match create(path, &request.header) {
                    Ok(Some(file)) => {
                        return Ok((file, History::of_new_file(request.header.identity), request.header.salt));
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

fn lock(
    file: &File,
    request: &OpenRequest,
    reply: &oneshot::Sender<Result<Opened, TaskError>>,
) -> Result<(), TaskError> {
    let path = &request.store.path;
    let started = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if started.elapsed() < request.store.wait && !reply.is_closed() => {
                thread::park_timeout(LOCK_POLL);
            }
            Err(TryLockError::WouldBlock) => return Err(TaskError::Busy { path: path.clone() }),
            Err(TryLockError::Error(error)) => return Err(TaskError::io("lock checkpoint", path, error)),
        }
    }
}

/// Reads a locked file, checks that it belongs to this computation, and cuts off a torn tail.
fn read(file: &mut File, request: &OpenRequest) -> Result<(History, u64), TaskError> {
    let path = &request.store.path;
    let mut bytes = Vec::new();
    let failed = |error| TaskError::io("read checkpoint", path, error);
    file.read_to_end(&mut bytes).map_err(failed)?;
    let length = bytes.len();
    let (stored, from) = Header::decode(&bytes).map_err(|damage| TaskError::damaged(path, damage))?;
    check_header(request, &stored)?;
    let (history, end) = History::read(bytes, from, &stored).map_err(|damage| TaskError::damaged(path, damage))?;
    if end < length {
        #[cfg(feature = "tracing")]
        tracing::warn!(path = %path.display(), bytes = history.torn_bytes, "cut a torn tail off the checkpoint");
        // Synced before anything is appended: else a power cut could leave old bytes behind new ones.
        let cut = file.set_len(end as u64).and_then(|()| file.sync_all());
        cut.map_err(|error| TaskError::io("cut the torn tail off checkpoint", path, error))?;
    }
    file.seek(SeekFrom::Start(end as u64)).map_err(failed)?;
    Ok((history, stored.salt))
}

fn check_header(request: &OpenRequest, stored: &Header) -> Result<(), TaskError> {
    let given = &request.header;
    let mismatch = |field, stored: &str, given: &str| {
        let (stored, given) = (stored.to_owned(), given.to_owned());
        Err(TaskError::VersionMismatch { path: request.store.path.clone(), field, stored, given })
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
    if stored.result_type != given.result_type {
        return mismatch("result type", &stored.result_type, &given.result_type);
    }
    Ok(())
}

/// Creates the file so that it appears at once with its header and already locked; `None` if another one was there first.
///
/// The header is written and synced under another name, which a hard link then publishes: a crash leaves either no
/// checkpoint or a whole one, and a second starter finds either no file or one that is locked. A rename would replace
/// the file of a starter who was first.
fn create(path: &Path, header: &Header) -> io::Result<Option<File>> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path names no file"))?;
    let prefix = format!(".{}.new-", name.to_string_lossy());
    sweep(directory, &prefix)?;
    let temporary = directory.join(format!("{prefix}{:016x}", fastrand::u64(..)));
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&temporary)?;
    let published = file.try_lock().map_err(io::Error::from).and_then(|()| {
        file.write_all(&header.encode())?;
        file.sync_all()?;
        fs::hard_link(&temporary, path)
    });
    match (published, fs::remove_file(&temporary)) {
        (Ok(()), removed) => removed?,
        (Err(error), _) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(None),
        // Another starter swept the file before it was locked.
        (Err(error), Err(_)) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        (Err(error), _) => return Err(error),
    }
    // Without this a power cut could take the name away again after results in it were called durable.
    File::open(directory)?.sync_all()?;
    Ok(Some(file))
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
