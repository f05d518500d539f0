//! The commit of a transaction: sync, lock, plan, write the journal, and pass the commit point.
//!
//! Invariant: before the commit point the targets are untouched and every failure removes what was staged; after it the
//! journal outlives every step, so that a crash at any moment leaves enough to finish or undo the whole transaction.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::vec;

use tokio::runtime::Handle;

use crate::apply::{abort, apply, forget, sync};
use crate::chain::{Chain, Site, Spot};
use crate::commit::Gate;
use crate::error::{io_error, remove_error, rename_error};
use crate::journal::{Draft, refuse_unfinished};
use crate::lock::{Locking, Locks, Share};
use crate::plan::Plan;
use crate::platform::{Dir, Entry, Identity, Kind};
use crate::staged::{Staged, Target};
use crate::staging::{Staging, Workspace};
use crate::{Durability, Error, Symlinks, WriteOptions};

/// If the files have more bytes than this in total, they are synced before the directories are locked, so that nobody
/// waits for them.
const QUICK_BYTES: u64 = 16 << 20;
/// The most threads that sync at once.
const THREADS: usize = 16;
/// How many files there must be for each thread: waking a thread takes about as long as syncing a file or two.
const FILES_PER_THREAD: usize = 4;

/// A new file with its final content and metadata.
#[derive(Debug)]
pub(crate) struct Sealed {
    pub(crate) path: Arc<Path>,
    pub(crate) staging: Staging,
    pub(crate) site: Arc<Site>,
    /// The name of the target in its directory.
    pub(crate) name: OsString,
    /// Open until it is synced.
    pub(crate) file: Option<Arc<File>>,
    /// Whether the target must not exist.
    is_new: bool,
    /// The durability of its content.
    durability: Durability,
    identity: Identity,
}

impl Sealed {
    pub(crate) fn new(staged: Staged, length: u64, path: &Arc<Path>, site: Arc<Site>) -> Result<Self, Error> {
        let WriteOptions { create_new: is_new, durability, .. } = staged.options();
        let (staging, file, name) = staged.seal(length)?;
        let identity = Identity::of(&file).map_err(io_error("look at the new file for", path))?;
        Ok(Self { path: path.clone(), staging, site, name, file: Some(file), is_new, durability, identity })
    }

    /// Takes its file, to be synced and closed. If it need not be synced, closes it here.
    pub(crate) fn take_unsynced(&mut self) -> Option<Unsynced> {
        let file = self.file.take()?;
        (self.durability != Durability::None).then(|| Unsynced::New(self.path.clone(), file))
    }
}

/// A prepared change of a transaction.
#[derive(Debug)]
pub(crate) enum Step {
    Put(Box<Sealed>),
    Remove(Arc<Path>),
    Rename { from: Arc<Path>, to: Arc<Path> },
}

/// A commit that is about to lock its directories.
#[derive(Debug)]
pub(crate) struct Prepared {
    moves: Vec<Move>,
    unsynced: Vec<Unsynced>,
    durability: Durability,
    workspace: Arc<Workspace>,
}

impl Prepared {
    pub(crate) fn new(
        workspace: Arc<Workspace>,
        steps: Vec<Step>,
        durability: Durability,
        patience: Duration,
        gate: &Gate,
    ) -> Result<(Self, Locking), Error> {
        let mut moves = steps.into_iter().map(|step| Move::new(&workspace, step)).collect::<Result<Vec<_>, _>>()?;
        let has_journal = !matches!(&moves[..], [Move::Put(_) | Move::Remove(_)]);
        let bytes: u64 = moves.iter().map(Move::bytes).sum();
        let mut unsynced: Vec<_> = moves.iter_mut().filter_map(|one| one.unsynced(durability)).collect();
        if !has_journal || bytes > QUICK_BYTES {
            sync_files(std::mem::take(&mut unsynced), gate)?;
        }
        let home = workspace.home();
        // Once these are locked, no other reader or writer that uses the locks can come in between.
        let locking = Locking::new(moves.iter().flat_map(Move::sites).chain([&home]), Share::Nobody, patience);
        Ok((Self { moves, unsynced, durability, workspace }, locking))
    }

    /// Makes all steps visible, or none.
    pub(crate) fn commit(self, _locks: Locks, gate: &Gate) -> Result<(), Error> {
        let Self { workspace, mut moves, unsynced, durability } = self;
        let mut asked = HashSet::new();
        for site in moves.iter().flat_map(Move::sites).chain([&workspace.home()]) {
            if asked.insert(site.id) {
                refuse_unfinished(site)?;
            }
        }
        if let [single] = &mut moves[..]
            && let Some(done) = single.alone(durability, gate)
        {
            return done;
        }
        let mut all = Committing::default();
        for one in moves {
            all.add(one)?;
        }
        all.commit(&workspace, unsynced, durability, gate)
    }
}

/// A path whose directory is open and belongs to the transaction.
#[derive(Debug)]
struct Named {
    path: Arc<Path>,
    target: Target,
    site: Arc<Site>,
}

impl Named {
    fn spot(&self) -> Spot {
        Spot { site: self.site.clone(), name: self.target.name.clone() }
    }

    /// A removal and a rename act on a symlink itself, like the system's own.
    fn new(workspace: &Workspace, path: Arc<Path>) -> Result<Self, Error> {
        let options = WriteOptions { symlinks: Symlinks::Replace, ..WriteOptions::default() };
        let target = Target::resolve(&path, options)?;
        let site = workspace.adopt(target.dir.clone(), &target.parent, &path)?;
        Ok(Self { path, target, site })
    }
}

/// A step whose directories are known.
#[derive(Debug)]
enum Move {
    Put(Box<Sealed>),
    Remove(Named),
    Rename { from: Named, to: Named },
}

impl Move {
    fn new(workspace: &Workspace, step: Step) -> Result<Self, Error> {
        Ok(match step {
            Step::Put(sealed) => Self::Put(sealed),
            Step::Remove(path) => Self::Remove(Named::new(workspace, path)?),
            Step::Rename { from, to } => {
                Self::Rename { from: Named::new(workspace, from)?, to: Named::new(workspace, to)? }
            }
        })
    }

    /// How many bytes there are to sync, as far as is known.
    fn bytes(&self) -> u64 {
        match self {
            Self::Put(sealed) => sealed.identity.size,
            Self::Remove(_) => 0,
            Self::Rename { from, .. } => from.target.size(),
        }
    }

    /// The file to sync: the new file, or the renamed one, whichever program has written it.
    fn unsynced(&mut self, durability: Durability) -> Option<Unsynced> {
        match self {
            Self::Put(sealed) => sealed.take_unsynced(),
            Self::Remove(_) => None,
            Self::Rename { .. } if durability == Durability::None => None,
            Self::Rename { from, .. } => {
                Some(Unsynced::Old(from.path.clone(), from.site.clone(), from.target.name.clone()))
            }
        }
    }

    fn sites(&self) -> impl Iterator<Item = &Arc<Site>> {
        let (one, other) = match self {
            Self::Put(sealed) => (&sealed.site, None),
            Self::Remove(named) => (&named.site, None),
            Self::Rename { from, to } => (&from.site, Some(&to.site)),
        };
        [one].into_iter().chain(other)
    }

    /// Makes this step if it is the only one: a single system call is atomic without a journal.
    fn alone(&mut self, durability: Durability, gate: &Gate) -> Option<Result<(), Error>> {
        let (path, site) = match self {
            Self::Put(sealed) => (sealed.path.clone(), sealed.site.clone()),
            Self::Remove(named) => (named.path.clone(), named.site.clone()),
            Self::Rename { .. } => return None,
        };
        let Some(passage) = gate.enter() else { return Some(Err(Error::Interrupted { path: path.to_path_buf() })) };
        let made = match self {
            Self::Put(sealed) => {
                let renamed = sealed.staging.rename(&sealed.name, sealed.is_new);
                renamed.map_err(|source| rename_error(path.to_path_buf(), source))
            }
            Self::Remove(named) => {
                let removed = site.dir.remove(&named.target.name);
                removed.map_err(|source| remove_error(path.to_path_buf(), source))
            }
            Self::Rename { .. } => return None,
        };
        Some(made.and_then(|()| {
            passage.done();
            let synced = if durability == Durability::Full { site.dir.sync() } else { Ok(()) };
            synced.map_err(|source| Error::NotDurable { path: path.to_path_buf(), source })
        }))
    }
}

/// The changes that are to become visible, under the locks of all their directories.
#[derive(Debug, Default)]
struct Committing {
    plan: Plan,
    /// The new files, which are removed unless the commit succeeds.
    staged: Vec<Staging>,
}

impl Committing {
    fn add(&mut self, one: Move) -> Result<(), Error> {
        match one {
            Move::Put(sealed) => {
                let Sealed { path, staging, site, name, is_new, identity, .. } = *sealed;
                let temp = staging.name().to_owned();
                self.staged.push(staging);
                self.plan.put(&path, Spot { site, name }, temp, identity, is_new)
            }
            Move::Remove(named) => self.plan.remove(&named.path, named.spot()),
            Move::Rename { from, to } if from.site.id.0 != to.site.id.0 => {
                Err(Error::OtherFileSystem { path: to.path.to_path_buf() })
            }
            Move::Rename { from, to } => self.plan.rename((&from.path, from.spot()), (&to.path, to.spot())),
        }
    }

    fn commit(
        mut self,
        workspace: &Workspace,
        mut unsynced: Vec<Unsynced>,
        durability: Durability,
        gate: &Gate,
    ) -> Result<(), Error> {
        self.plan.lift(workspace)?;
        let chains = self.plan.chains(workspace);
        let home = workspace.home();
        let (mut draft, journal) = Draft::begin(workspace.tag, &home, &chains)?;
        // The names in the journal's directory are synced together with the journal's own.
        let others = chains.iter().flat_map(Chain::spots).map(|spot| &spot.site).filter(|site| site.id != home.id);
        let others: HashMap<_, _> = others.map(|site| (site.id, site.clone())).collect();
        if durability != Durability::None {
            unsynced.extend(others.into_values().map(Unsynced::Names));
            unsynced.push(Unsynced::Draft(home.clone(), journal));
        }
        // This also closes and unlocks the new files before they become the targets.
        sync_files(unsynced, gate)?;
        draft.prepare(durability)?;
        let Some(mut passage) = gate.enter() else { return Err(Error::Interrupted { path: home.path.clone() }) };
        let trust = draft.commit()?;
        // The commit point is passed, or will be: from now on the staged files belong to the journal.
        self.staged.iter_mut().for_each(Staging::give_away);
        let applied = apply(&chains).and_then(|()| {
            // From here on, a drop of the commit leaves all files new, and need not wait for the disk.
            passage.settle();
            if durability == Durability::None { Ok(()) } else { sync(&home, &chains) }
        });
        let Err(error) = applied else {
            passage.done();
            // A drop of the commit can change nothing any more, and everything is durable.
            if let Err(_error) = forget(&home, &chains) {
                workspace.stay();
                #[cfg(feature = "tracing")]
                tracing::warn!(error = %_error, "a committed transaction is to be cleaned up by a recovery");
            }
            return Ok(());
        };
        // Otherwise a dropped commit has already left the files new, and they have to stay.
        let undone = if passage.undo() { abort(&home, &chains, trust).map(|()| error) } else { Err(error.into()) };
        match undone {
            Ok(error) => Err(error),
            Err(source) => {
                workspace.stay();
                // If the commit was dropped, nobody gets the error, and the next commit finds the directory
                // unrecovered.
                #[cfg(feature = "tracing")]
                tracing::error!(directory = ?home.path, error = %source, "a transaction is undecided until a recovery");
                // The passage stays open until here, so that a drop waits for this too.
                passage.done();
                Err(Error::Undecided { directory: home.path.clone(), source })
            }
        }
    }
}

/// What must be durable before a committed journal refers to it.
#[derive(Debug)]
pub(crate) enum Unsynced {
    New(Arc<Path>, Arc<File>),
    /// A file to be renamed. Under its new name it must survive a power cut as a new file does, although its writer may
    /// not have synced it.
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
                // It does not exist, or we may only rename it: then its writer is responsible for the sync.
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

/// Syncs and closes the files, several at once, and returns the first failure. After a failure, or once the gate is
/// closed, no other sync begins.
///
/// Several at once let the file system join their commits. When it returns, none of the files is open or being synced
/// any more. It borrows threads from the blocking pool and does not wait for them to begin: if none is free, the
/// caller's thread does all the work.
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

/// A list of files that several threads share.
#[derive(Debug)]
struct Batch {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug)]
struct State {
    /// A file is taken out before its sync, so that a late thread keeps nothing open.
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

    /// Waits for the syncs that have begun. A hanging disk holds this thread as it would hold any other that syncs.
    fn finish(&self, is_cancelled: bool) -> Result<(), Error> {
        if is_cancelled {
            let rest = std::mem::take(&mut self.state().files);
            drop(rest);
        }
        let state = self.ended.wait_while(self.state(), |state| state.running > 0);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        state.failure.take().map_or(Ok(()), Err)
    }

    /// Nothing panics while it is locked, so a poisoned lock holds a sound state.
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
            // After a failure the rest is closed without a sync: the files of one batch fail together.
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
        // The pool's only thread is the one that asks for others.
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
                // Long enough for a caller that does not wait to be gone.
                std::thread::park_timeout(Duration::from_millis(50));
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
