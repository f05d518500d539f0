//! The locks of directories, the turns, and the waiting; and how readers get all files of a transaction, or none, with
//! or without a lock.
//!
//! Invariant: a lock is a file that only users with write permission to the directory can open, so that nobody else can
//! hold them up. Its last holder removes it; the next one takes over what a killed holder left. A waiting caller keeps
//! later ones from passing, so overlapping readers never keep a writer out, nor the other way round.
//!
//! A wait takes no thread of the blocking pool, because the lock's holder may need that thread, and no timer, because a
//! runtime may have none. It has a bound, and after a drop nothing is locked. One thread tries for all waiting callers,
//! and ends with the last of them. When a caller gets its lock, that thread also begins its job, so that no lock is
//! held for a future that is not polled.
//!
//! Files that are opened together all existed at one moment, while no transaction was exchanging any of them.

use std::fs::{File, TryLockError};
use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::chain::Site;
use crate::commit::{Gate, Job, current_runtime};
use crate::error::io_error;
use crate::journal::{Pointer, is_present, refuse_unfinished};
use crate::names::{ROOM, TURN, absolute, directory};
use crate::platform::{self, Dir, Entry, Guests, Identity};
use crate::staged::Target;
use crate::{Error, WriteOptions};

/// How long to wait for a lock by default.
pub(crate) const LOCK_PATIENCE: Duration = Duration::from_secs(30);
/// How often to open a lock file again because its last holder removed it meanwhile, or another caller created it.
const ATTEMPTS: usize = 32;
/// The shortest and the longest pause between two attempts, to lock directories or to open files that keep changing.
const PAUSES: [Duration; 2] = [Duration::from_micros(100), Duration::from_millis(5)];
/// How long a lock file without permission to open it counts as one that is just being created.
const MAKING: Duration = Duration::from_millis(200);

/// Who shares a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    Readers,
    Nobody,
}

/// Takes the exclusive lock if nobody holds it now, even if others are waiting.
pub(crate) fn try_alone(site: &Arc<Site>) -> io::Result<Option<Hold>> {
    Hold::take(site, ROOM, Share::Nobody)
}

/// Removes lock files that killed processes left here, as far as possible.
pub(crate) fn remove_dead(site: &Arc<Site>) {
    for name in [TURN, ROOM] {
        if matches!(site.dir.look(name.as_ref()), Ok(Some(_))) {
            // If it is held, or may not be opened, it is not ours to remove, and it does no harm.
            drop(Hold::take(site, name, Share::Nobody));
        }
    }
}

/// Keeps directories locked; the locks are released when this is dropped, or its process dies.
#[derive(Debug)]
pub(crate) struct Locks {
    _held: Vec<Hold>,
}

/// Directories that are being locked.
#[derive(Debug)]
pub(crate) struct Locking {
    /// The next one to lock is last.
    wanted: Vec<Arc<Site>>,
    held: Vec<Hold>,
    /// The right to be next in the directory that it is waiting for.
    turn: Option<Hold>,
    share: Share,
    begun: Instant,
    patience: Duration,
    /// Since when the lock file could not be opened for lack of permission.
    shut: Option<Instant>,
}

impl Locking {
    /// Begins to lock all of `sites`, always in the same order, so that no two transactions wait for each other.
    pub(crate) fn new<'a>(sites: impl IntoIterator<Item = &'a Arc<Site>>, share: Share, patience: Duration) -> Self {
        let mut wanted: Vec<_> = sites.into_iter().cloned().collect();
        wanted.sort_by_key(|site| std::cmp::Reverse(site.id));
        wanted.dedup_by_key(|site| site.id);
        Self { wanted, held: Vec::new(), turn: None, share, begun: Instant::now(), patience, shut: None }
    }

    /// The directory that is not locked yet.
    pub(crate) fn path(&self) -> &Path {
        self.wanted.last().map_or(Path::new(""), |site| &site.path)
    }

    /// Locks what it can without waiting, and keeps that; `None` if something is left to lock.
    pub(crate) fn attempt(&mut self) -> Result<Option<Locks>, Error> {
        while let Some(site) = self.wanted.last().cloned() {
            let taken = self.take(&site);
            match taken {
                Ok(Some(hold)) => {
                    self.held.push(hold);
                    (self.turn, self.shut) = (None, None);
                }
                Ok(None) if self.begun.elapsed() >= self.patience => {
                    return Err(Error::Busy { directory: site.path.clone(), waited: self.patience });
                }
                Ok(None) => {
                    self.shut = None;
                    return Ok(None);
                }
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied && self.is_being_made() => {
                    return Ok(None);
                }
                Err(source) => {
                    return Err(io_error("lock (which takes the right to write there) the directory", &site.path)(
                        source,
                    ));
                }
            }
            self.wanted.pop();
        }
        Ok(Some(Locks { _held: std::mem::take(&mut self.held) }))
    }

    fn take(&mut self, site: &Arc<Site>) -> io::Result<Option<Hold>> {
        if self.turn.is_none() && is_waited_for(site)? {
            return Ok(None);
        }
        let hold = Hold::take(site, ROOM, self.share)?;
        if hold.is_none() && self.turn.is_none() {
            self.turn = Hold::take(site, TURN, Share::Nobody)?;
        }
        Ok(hold)
    }

    /// Whether another user may just be creating the lock file, which for a moment only that user may open.
    fn is_being_made(&mut self) -> bool {
        self.shut.get_or_insert_with(Instant::now).elapsed() < MAKING.min(self.patience)
    }
}

/// Whether another caller is already next.
fn is_waited_for(site: &Arc<Site>) -> io::Result<bool> {
    // A file left by a killed process can be taken, and is removed when the hold is dropped.
    Ok(site.dir.look(TURN.as_ref())?.is_some() && Hold::take(site, TURN, Share::Nobody)?.is_none())
}

/// A locked file; the last holder removes it.
#[derive(Debug)]
pub(crate) struct Hold {
    site: Arc<Site>,
    name: &'static str,
    file: File,
    share: Share,
}

impl Hold {
    /// `None` if others hold it.
    fn take(site: &Arc<Site>, name: &'static str, share: Share) -> io::Result<Option<Self>> {
        for _ in 0..ATTEMPTS {
            let opened = site.dir.update(name.as_ref()).or_else(|error| match error.kind() {
                io::ErrorKind::NotFound => make(&site.dir, name),
                _ => Err(error),
            });
            let file = match opened {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                other => other?,
            };
            let locked = match share {
                Share::Readers => file.try_lock_shared(),
                Share::Nobody => file.try_lock(),
            };
            match locked {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(error),
            }
            // Its last holder may have removed it between opening and locking, and another caller may have created a
            // new one.
            let id = Entry::of(&file)?.id;
            if site.dir.look(name.as_ref())?.is_some_and(|named| named.id == id) {
                return Ok(Some(Self { site: site.clone(), name, file, share }));
            }
        }
        Ok(None)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // A shared lock file is removed by its last reader: each reader tries to lock it alone, and one of them
        // succeeds.
        if self.share == Share::Nobody || self.file.try_lock().is_ok() {
            // A file that cannot be removed, such as another user's in a sticky directory, stays for the next holder.
            let _left = self.site.dir.remove(self.name.as_ref());
        }
    }
}

/// Creates a lock file that exactly the users with write permission to the directory may open.
fn make(dir: &Dir, name: &str) -> io::Result<File> {
    let file = dir.create(name.as_ref(), 0o600)?;
    let (of, fresh) = (dir.entry()?, Entry::of(&file)?);
    let mut group = of.mode & 0o020;
    if (of.uid, of.gid) != (fresh.uid, fresh.gid) {
        // Giving it to the directory's owner takes a privilege; giving it to the directory's group takes membership.
        let ours = Entry { uid: fresh.uid, ..of };
        if platform::set_owner(&file, &of).or_else(|_| platform::set_owner(&file, &ours)).is_err() {
            group = 0;
        }
    }
    let mode = 0o600 | group << 1 | group | (of.mode & 0o002) << 1 | of.mode & 0o002;
    if mode != 0o600 {
        let guests = match group {
            0 => Guests::None,
            _ => dir.guests(".".as_ref())?.for_writers(),
        };
        platform::set_access(&file, fresh.mode, mode, &guests)?;
    }
    Ok(file)
}

static WAITING: Mutex<Room> = Mutex::new(Room { guests: Vec::new(), is_attended: false });

/// The waiting callers, in the order of their arrival.
struct Room {
    guests: Vec<Arc<Mutex<Guest>>>,
    is_attended: bool,
}

enum Guest {
    Waiting(Locking, Begin),
    Gone,
}

/// What to do with the locks, or with the reason why there are none.
type Begin = Box<dyn FnOnce(Result<Locks, Error>) + Send>;

/// Waits until everything is locked, at most as long as [`Locking`] is patient, and for the job that then begins.
#[must_use = "nothing is locked for who does not wait"]
struct Wait<T> {
    guest: Arc<Mutex<Guest>>,
    path: Arc<Path>,
    job: oneshot::Receiver<Result<Job<T>, Error>>,
}

/// Prepares on the blocking pool, locks, and finishes there: in the same job, unless others hold one of the locks.
/// After its first poll it needs no further polls to get there.
pub(crate) async fn with_locks<S: Send + 'static, T: Send + 'static>(
    runtime: &Handle,
    gate: &Arc<Gate>,
    path: &Arc<Path>,
    prepare: impl FnOnce(&Gate) -> Result<(S, Locking), Error> + Send + 'static,
    finish: impl FnOnce(S, Locks, &Gate) -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    // One gate for both jobs: a drop closes it to the second job, however far that is.
    let (handle, shared, for_job) = (runtime.clone(), gate.clone(), path.clone());
    let first = Job::spawn(runtime, gate, path, move |gate| {
        let (state, mut locking) = prepare(gate)?;
        if let Some(locks) = locking.attempt()? {
            return finish(state, locks, gate).map(Ok);
        }
        let path = for_job.clone();
        let begin = move |locks| Job::spawn(&handle, &shared, &path, move |gate| finish(state, locks, gate));
        Wait::begin(&for_job, locking, begin).map(Err)
    });
    match first.await? {
        Ok(done) => Ok(done),
        Err(wait) => wait.await?.await,
    }
}

/// Nothing panics while one of these is locked, so a poisoned lock holds a sound state.
fn open<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T: Send + 'static> Wait<T> {
    fn begin(
        path: &Arc<Path>,
        locking: Locking,
        begin: impl FnOnce(Locks) -> Job<T> + Send + 'static,
    ) -> Result<Self, Error> {
        let (tell, job) = oneshot::channel();
        let directory = locking.path().to_path_buf();
        // If there are no locks, the files that wait for them are removed before the caller is told. A caller that has
        // gone is told nothing.
        let begin: Begin = Box::new(move |locks| drop(tell.send(locks.map(begin))));
        let wait = Self { guest: Arc::new(Mutex::new(Guest::Waiting(locking, begin))), path: path.clone(), job };
        let mut room = open(&WAITING);
        if !room.is_attended {
            let attendant = std::thread::Builder::new().name("afs-locks".to_owned());
            attendant.spawn(attend).map_err(io_error("wait for the lock of", &directory))?;
            room.is_attended = true;
        }
        room.guests.push(wait.guest.clone());
        Ok(wait)
    }
}

impl<T> Future for Wait<T> {
    type Output = Result<Job<T>, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let told = ready!(Pin::new(&mut self.job).poll(cx));
        Poll::Ready(told.unwrap_or_else(|_| Err(Error::Interrupted { path: self.path.to_path_buf() })))
    }
}

impl<T> Drop for Wait<T> {
    /// Removes the wait first, and then the job, if it has begun: otherwise a job could begin in between, without an
    /// owner.
    fn drop(&mut self) {
        let left = std::mem::replace(&mut *open(&self.guest), Guest::Gone);
        // Outside the lock, because the drop may remove files.
        drop(left);
    }
}

/// Tries to lock for all guests in turn, until there are none.
fn attend() {
    let [mut pause, longest] = PAUSES;
    let mut count = 0;
    loop {
        let mut room = open(&WAITING);
        room.guests.retain(|guest| matches!(*open(guest), Guest::Waiting(..)));
        if room.guests.is_empty() {
            room.is_attended = false;
            return;
        }
        let guests = room.guests.clone();
        drop(room);
        // If a guest came or went, the next one may soon have its turn.
        pause = if guests.len() == count { (pause * 2).min(longest) } else { PAUSES[0] };
        count = guests.len();
        for guest in &guests {
            // A caller's waker may panic, or a runtime that has no threads; the other guests must still get their turn.
            drop(catch_unwind(AssertUnwindSafe(|| attempt(guest))));
        }
        std::thread::park_timeout(pause);
    }
}

fn attempt(guest: &Mutex<Guest>) {
    let mut guest = open(guest);
    let Guest::Waiting(locking, _) = &mut *guest else { return };
    let Some(locks) = locking.attempt().transpose() else { return };
    // Under the guest's lock, so that a drop of the wait finds either the waiting guest or the job.
    if let Guest::Waiting(locking, begin) = std::mem::replace(&mut *guest, Guest::Gone) {
        // Partial locks are released before the caller is told.
        drop(locking);
        begin(locks);
    }
}

/// Keeps transactions from changing the files of a directory until it is dropped; made by [`read_lock`].
///
/// Any number of readers can hold it at once.
#[derive(Debug)]
#[must_use = "a transaction may change the files as soon as this is dropped"]
pub struct ReadLock {
    _locks: Locks,
}

/// Waits until no transaction is changing files in the directory `dir`, and keeps others from starting to.
///
/// `dir` is the directory of the files to be read, or of the journal: a commit locks its journal's directory and the
/// directory of each target. A reader without the lock also sees each file whole, but may see some files of a
/// transaction old and others new. Writes of single files, outside transactions, do not take the lock.
///
/// It needs permission to write to the directory: a lock holder holds up every commit there, so not every reader may
/// take it. A reader without that permission, or one that wants to hold up nobody, calls [`open_together`].
///
/// A commit waits at most 30 s for readers, so hold the lock briefly. Readers and writers take turns: a later caller
/// never passes a waiting one. So do not lock a directory that you have already locked: if a commit waits in between,
/// the two deadlock.
///
/// # Cancel safety
///
/// This method is cancel safe.
/// If dropped before completion, nothing is locked.
///
/// # Errors
///
/// The directory is [missing](Error::is_missing_directory) or stayed locked for 30 s ([`Error::is_busy`]);
/// [permission](Error::is_permission_denied) to write to it is missing; or a crash left a transaction unfinished there
/// ([`Error::is_unrecovered`]): call [`recover`](crate::recover).
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

/// Opens files together, and holds up nobody: for each transaction, either all of its files are new or all are old.
///
/// It opens all files. It does so again while a transaction is exchanging files in one of their directories, or if one
/// of the files was replaced meanwhile. The result was the state of all these names at one moment. The files are in the
/// order of `paths`, open for reading, one descriptor each. No transaction and no [`write`](crate::write()) changes
/// their content, so you can take your time to read them.
///
/// It needs only permission to read the files and their directories. It makes no lock, works on a read-only file
/// system, and no commit waits for it. So a service can read what only root may write. It follows symlinks. A caller
/// that does not want to wait 30 s puts it in a timeout.
///
/// A file that is [written in place](crate::InPlace) is not replaced, so it may be found half written here too.
///
/// # Cancel safety
///
/// This method is cancel safe.
/// If dropped before completion, nothing has changed.
///
/// # Errors
///
/// A file is missing, is [no file](Error::is_not_a_file), or may not be [read](Error::is_permission_denied). A
/// transaction stayed unfinished for 30 s, as after a crash ([`Error::is_unrecovered`]: call
/// [`recover`](crate::recover) with the writer's permissions). Or the files kept changing for 30 s
/// ([`Error::is_busy`]).
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
/// let pair = [dir.join("cert.pem"), dir.join("key.pem")];
/// let files = atomic_fs::open_together(pair).await?;
/// let contents: Vec<_> = files
///     .into_iter()
///     .map(std::io::read_to_string)
///     .collect::<Result<_, _>>()?;
/// assert_eq!(contents, ["c", "k"]);
/// # Ok(())
/// # }
/// ```
pub async fn open_together<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Result<Vec<File>, Error> {
    open_within(paths.into_iter().map(|path| absolute(path.as_ref())).collect(), LOCK_PATIENCE).await
}

async fn open_within(paths: Arc<[PathBuf]>, patience: Duration) -> Result<Vec<File>, Error> {
    let Some(first) = paths.first().map(|path| Arc::<Path>::from(&**path)) else { return Ok(Vec::new()) };
    let runtime = current_runtime(&first)?;
    let begun = Instant::now();
    let [mut pause, longest] = PAUSES;
    loop {
        let paths = paths.clone();
        // One hop for each attempt and its pause: between attempts the thread is free for a commit that may need it.
        let attempt = Job::spawn(&runtime, &Gate::new(), &first, move |_| {
            let opened = open_at_once(&paths)?;
            if opened.is_err() {
                std::thread::park_timeout(pause);
            }
            Ok(opened)
        });
        match attempt.await? {
            Ok(files) => return Ok(files),
            Err(obstacle) if begun.elapsed() >= patience => return Err(obstacle),
            Err(_) => pause = (pause * 2).min(longest),
        }
    }
}

/// Opens the files as they are at one moment; the inner error says what was in the way this time.
fn open_at_once(paths: &[PathBuf]) -> Result<Result<Vec<File>, Error>, Error> {
    let resolve = |path: &PathBuf| Target::resolve(path, WriteOptions::default());
    let targets = paths.iter().map(resolve).collect::<Result<Vec<_>, _>>()?;
    let mut files = Vec::with_capacity(paths.len());
    for (path, target) in paths.iter().zip(&targets) {
        files.push(target.dir.read(&target.name).map_err(io_error("open", path))?);
    }
    // From here until the second look at the names, they all stay the same, or the second look shows that they did not.
    // If a directory had no journal at some moment in between, none of its transactions was in the middle of exchanging
    // these files.
    for (path, target) in paths.iter().zip(&targets) {
        if is_exchanging(target).map_err(io_error("look for a journal beside", path))? {
            return Ok(Err(Error::Unrecovered { directory: target.parent.clone() }));
        }
    }
    for ((path, target), file) in paths.iter().zip(&targets).zip(&files) {
        let now = resolve(path)?;
        let (opened, named) = (Identity::of(file), now.dir.identify(&now.name));
        let failed = || io_error("look at", path);
        let (opened, named) = (opened.map_err(failed())?, named.map_err(failed())?);
        if named.is_none_or(|named| (named.inode, named.born) != (opened.inode, opened.born)) {
            return Ok(Err(Error::Busy { directory: target.parent.clone(), waited: LOCK_PATIENCE }));
        }
    }
    Ok(Ok(files))
}

/// Whether a transaction may be exchanging files in the directory of `target`. Its journal need not be readable.
fn is_exchanging(target: &Target) -> io::Result<bool> {
    if is_present(&target.dir)? {
        return Ok(true);
    }
    let Some(home) = Pointer::home(&target.dir)? else { return Ok(false) };
    // If the pointer leads to no journal, its transaction has ended. If that cannot be checked, it may still be going
    // on.
    target.dir.open_dir(&home).map_or(Ok(true), |home| is_present(&home))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::names::{COMMITTED, POINTER, PREPARED};

    #[tokio::test]
    async fn nothing_is_opened_while_files_of_its_directory_may_be_exchanged() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for place in ["one", "other"] {
            std::fs::create_dir(at(place)).unwrap();
            std::fs::write(at(place).join("file"), place).unwrap();
        }
        let opened = async || {
            let paths = ["one", "other"].map(|place| at(place).join("file"));
            open_within(paths.into(), Duration::from_millis(20)).await
        };
        assert_eq!(opened().await.unwrap().len(), 2);
        for journal in [PREPARED, COMMITTED] {
            std::fs::write(at("other").join(journal), "").unwrap();
            let error = opened().await.unwrap_err();
            assert!(error.is_unrecovered() && error.to_string().contains("other"), "{error}");
            std::fs::remove_file(at("other").join(journal)).unwrap();
        }
        // A pointer to a removed journal stops nobody; a pointer into nowhere does, and so does anything that is no
        // pointer.
        symlink("../.afs-tx-0123456789abcdef", at("one").join(POINTER)).unwrap();
        assert_eq!(opened().await.unwrap().len(), 2);
        std::fs::write(at(COMMITTED), "").unwrap();
        assert!(opened().await.unwrap_err().is_unrecovered());
        for (link, is_unrecovered) in [("../gone/.afs-tx-0123456789abcdef", true), ("../file", false)] {
            std::fs::remove_file(at("one").join(POINTER)).unwrap();
            symlink(link, at("one").join(POINTER)).unwrap();
            let error = opened().await.unwrap_err();
            assert_eq!(error.is_unrecovered(), is_unrecovered, "{error}");
            assert!(error.to_string().contains("one"), "{error}");
        }
    }

    #[test]
    fn what_has_been_replaced_since_it_was_opened_is_opened_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        // Opened first as the one, and looked at again as the other.
        let [one, other] = ["one", "other"].map(|name| dir.path().join(name));
        for target in [&one, &other] {
            std::fs::write(target, "").unwrap();
        }
        symlink(&one, &path).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let mut counts = [0, 0];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    for target in [&one, &other] {
                        let fresh = dir.path().join("fresh");
                        symlink(target, &fresh).unwrap();
                        std::fs::rename(&fresh, &path).unwrap();
                    }
                }
            });
            while counts.contains(&0) {
                let opened = open_at_once(std::slice::from_ref(&path)).unwrap();
                counts[usize::from(opened.is_err_and(|error| error.is_busy()))] += 1;
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
