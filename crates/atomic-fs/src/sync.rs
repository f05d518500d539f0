//! Makes many files durable at once, so that the file system can join their commits.
//!
//! Invariant: when it returns, nothing of what it was given is open any more or being synced. It lends threads from the
//! blocking pool and waits for none of them to begin: with no thread to spare the caller's does it all.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::vec;

use tokio::runtime::Handle;

use crate::Error;
use crate::commit::Gate;
use crate::error::io_error;
use crate::platform::{Dir, Entry, Kind};
use crate::site::Site;

/// How many threads sync at once at most.
const THREADS: usize = 16;
/// How many files there are for each thread: to wake one takes about as long as to sync a file or two.
const FILES_PER_THREAD: usize = 4;

/// What must be durable before a committed journal speaks of it.
#[derive(Debug)]
pub(crate) enum Unsynced {
    New(Arc<Path>, Arc<File>),
    /// One that is to be renamed: by its new name it must survive a power cut as a new file does, although whoever wrote
    /// it may not have synced it.
    Old(Arc<Path>, Arc<Site>, OsString),
    /// The journal in this directory, before it is committed.
    Draft(Arc<Site>, File),
    /// A directory, so that a staged file is found after a power cut.
    Names(Arc<Site>),
}

impl Unsynced {
    fn sync(&self) -> Result<(), Error> {
        match self {
            Self::New(path, file) => file.sync_all().map_err(io_error("sync the new file for", path)),
            Self::Old(path, site, name) => match sync_old(&site.dir, name) {
                // There is none, or we may only rename it: then that is for whoever wrote it.
                Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {
                    Ok(())
                }
                other => other.map_err(io_error("sync the old file of", path)),
            },
            Self::Draft(home, file) => file.sync_all().map_err(io_error("sync a journal in", &home.path)),
            Self::Names(site) => site.dir.sync().map_err(io_error("sync the directory", &site.path)),
        }
    }
}

fn sync_old(dir: &Dir, name: &OsStr) -> io::Result<()> {
    match dir.look(name)? {
        Some(Entry { kind: Kind::File, .. }) => dir.read(name)?.sync_all(),
        _ => Ok(()),
    }
}

/// Syncs and closes the files, several at once; after the first failure, which is returned, no other sync begins, nor once
/// the gate is closed.
pub(crate) fn sync_files(files: Vec<Unsynced>, gate: &Gate) -> Result<(), Error> {
    let threads = files.len().div_ceil(FILES_PER_THREAD).min(THREADS);
    let batch = Arc::new(Batch::new(files));
    if let Ok(runtime) = Handle::try_current() {
        for _ in 1..threads {
            let batch = batch.clone();
            drop(runtime.spawn_blocking(move || batch.work()));
        }
    }
    while !gate.is_cancelled() && batch.work_once() {}
    batch.finish(gate.is_cancelled())
}

/// Files that several threads take from.
#[derive(Debug)]
struct Batch {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug)]
struct State {
    /// Taken out before they are synced, so that a thread that comes late keeps nothing open.
    files: vec::IntoIter<Unsynced>,
    running: usize,
    failure: Option<Error>,
}

impl Batch {
    fn new(files: Vec<Unsynced>) -> Self {
        let state = State { files: files.into_iter(), running: 0, failure: None };
        Self { state: Mutex::new(state), ended: Condvar::new() }
    }

    /// Syncs one file after the other until there are no more.
    fn work(&self) {
        while self.work_once() {}
    }

    /// `false` if there are no more.
    fn work_once(&self) -> bool {
        self.take().map(Running::sync).is_some()
    }

    fn take(&self) -> Option<Running<'_>> {
        let mut state = self.state();
        let file = state.files.next()?;
        state.running += 1;
        Some(Running { batch: self, file: Some(file) })
    }

    /// Waits for the syncs that have begun; a disk that hangs holds this thread as it would hold any that syncs.
    fn finish(&self, is_cancelled: bool) -> Result<(), Error> {
        if is_cancelled {
            let rest = std::mem::take(&mut self.state().files);
            drop(rest);
        }
        let state = self.ended.wait_while(self.state(), |state| state.running > 0);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        state.failure.take().map_or(Ok(()), Err)
    }

    /// Nothing panics while it is locked, so a poisoned lock has spoiled nothing.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A file that is being synced; counted until it is closed.
struct Running<'a> {
    batch: &'a Batch,
    file: Option<Unsynced>,
}

impl Running<'_> {
    fn sync(mut self) {
        let Some(file) = self.file.take() else { return };
        if let Err(error) = file.sync() {
            let mut state = self.batch.state();
            // Whoever reports a failure will have the rest closed unsynced; the files of one batch fall together.
            let rest = std::mem::take(&mut state.files);
            state.failure.get_or_insert(error);
            drop(state);
            drop(rest);
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.file = None;
        self.batch.state().running -= 1;
        self.batch.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(count: usize) -> (tempfile::TempDir, Vec<Unsynced>, std::sync::Weak<File>) {
        let dir = tempfile::tempdir().unwrap();
        let file = Arc::new(File::create(dir.path().join("file")).unwrap());
        let path = Arc::<Path>::from(dir.path());
        let list = (0..count).map(|_| Unsynced::New(path.clone(), file.clone())).collect();
        let watch = Arc::downgrade(&file);
        (dir, list, watch)
    }

    #[test]
    fn nothing_is_open_once_all_is_synced_with_and_without_threads_to_lend() {
        let (_dir, list, watch) = files(100);
        sync_files(list, &Gate::new()).unwrap();
        assert!(watch.upgrade().is_none());
        let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build().unwrap();
        let (_dir, list, watch) = files(100);
        // The only thread of the pool is the one that asks for others.
        runtime
            .block_on(async { tokio::task::spawn_blocking(|| sync_files(list, &Gate::new())).await.unwrap().unwrap() });
        assert!(watch.upgrade().is_none());
    }

    /// A pipe cannot be synced.
    fn pipe() -> Unsynced {
        let (_reader, writer) = io::pipe().unwrap();
        Unsynced::New(Arc::from(Path::new("pipe")), Arc::new(File::from(std::os::fd::OwnedFd::from(writer))))
    }

    #[test]
    fn after_a_failure_and_after_a_cancellation_no_sync_begins() {
        let (_dir, mut list, watch) = files(2);
        list.insert(0, pipe());
        let batch = Batch::new(list);
        assert!(batch.work_once());
        assert!(!batch.work_once());
        assert!(watch.upgrade().is_none());
        let gate = Gate::new();
        gate.cancel();
        sync_files(vec![pipe()], &gate).unwrap();
    }

    #[test]
    fn who_lends_a_hand_is_waited_for() {
        let (_dir, list, watch) = files(1);
        let batch = Batch::new(list);
        let running = batch.take().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Long enough that who does not wait is gone.
                std::thread::park_timeout(std::time::Duration::from_millis(50));
                running.sync();
            });
            batch.finish(false).unwrap();
            assert!(watch.upgrade().is_none());
        });
    }

    #[test]
    fn a_failure_is_told_and_closes_the_rest() {
        let (_dir, mut list, watch) = files(50);
        list.insert(7, pipe());
        let error = sync_files(list, &Gate::new()).unwrap_err();
        assert!(error.to_string().contains("sync the new file for"), "{error}");
        assert!(watch.upgrade().is_none());
    }
}
