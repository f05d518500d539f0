//! Who may change the files of a directory, whose turn it is, and where the others wait.
//!
//! Invariant: a lock is a file that only those can open who may write to the directory, so that nobody else holds them up.
//! Its last holder removes it; what a killed one leaves is taken over by the next. Whoever has to wait keeps others from
//! passing, so that neither readers that overlap keep out a writer, nor the other way round.
//!
//! A wait takes no thread of the blocking pool, which those who hold the lock may need to get on, and no timer, which a
//! runtime may not have; it has a bound; and who drops it has, from then on, locked nothing. One thread tries for all, and
//! ends with the last of them. It also begins the job of whoever gets the lock, so that no lock is held for a future that
//! nobody polls.

use std::fs::{File, TryLockError};
use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::Error;
use crate::commit::{Gate, Job};
use crate::error::io_error;
use crate::names::{ROOM, TURN};
use crate::platform::{self, Dir, Entry, Guests};
use crate::site::Site;

/// How long a lock is waited for by default.
pub(crate) const LOCK_PATIENCE: Duration = Duration::from_secs(30);
/// How often one is opened anew because its last holder removed it meanwhile, or another one made it.
const ATTEMPTS: usize = 32;
/// How long a lock that may not be opened is taken for one that is just being made.
const MAKING: Duration = Duration::from_millis(200);

/// With whom a lock is shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    Readers,
    Nobody,
}

/// Takes a lock that nobody holds now, shared with nobody, whatever others wait for.
pub(crate) fn try_alone(site: &Arc<Site>) -> io::Result<Option<Hold>> {
    Hold::take(site, ROOM, Share::Nobody)
}

/// Removes what killed processes left of their locks here, as far as that is possible.
pub(crate) fn remove_dead(site: &Arc<Site>) {
    for name in [TURN, ROOM] {
        if matches!(site.dir.look(name.as_ref()), Ok(Some(_))) {
            // Where it is held, or may not be opened, it is not ours to remove; and it harms nobody.
            drop(Hold::take(site, name, Share::Nobody));
        }
    }
}

/// Keeps directories locked; the locks go when this is dropped, or its process dies.
#[derive(Debug)]
pub(crate) struct Locks {
    _held: Vec<Hold>,
}

/// Directories on the way to being locked.
#[derive(Debug)]
pub(crate) struct Locking {
    /// The next one last.
    wanted: Vec<Arc<Site>>,
    held: Vec<Hold>,
    /// The right to be the next in the directory that is waited for.
    turn: Option<Hold>,
    share: Share,
    begun: Instant,
    patience: Duration,
    /// Since when the lock may not be opened.
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

    /// Locks what it can without waiting, which then stays so; `None` if something is left to be locked.
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

    /// Another user who makes a lock file may open it for a moment before others may.
    fn is_being_made(&mut self) -> bool {
        self.shut.get_or_insert_with(Instant::now).elapsed() < MAKING.min(self.patience)
    }
}

/// Whether it is somebody's turn already.
fn is_waited_for(site: &Arc<Site>) -> io::Result<bool> {
    // What a killed process left can be taken, and goes when it is dropped.
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
            // Its last holder may have removed it between the opening and the lock, and others have made another.
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
        // With others who read, it is for the last of them to remove it: each tries to be that, and one of them is.
        if self.share == Share::Nobody || self.file.try_lock().is_ok() {
            // What cannot be removed, as a file of another user in a sticky directory, stays for the next one.
            let _left = self.site.dir.remove(self.name.as_ref());
        }
    }
}

/// Makes a lock file that those may open who may write to the directory, and nobody else.
fn make(dir: &Dir, name: &str) -> io::Result<File> {
    let file = dir.create(name.as_ref(), 0o600)?;
    let (of, fresh) = (dir.entry()?, Entry::of(&file)?);
    let mut group = of.mode & 0o020;
    if (of.uid, of.gid) != (fresh.uid, fresh.gid) {
        // To give it to the directory's owner takes a privilege, to give it to its group, to be a member.
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

/// The shortest and the longest pause between two attempts.
const PAUSES: [Duration; 2] = [Duration::from_micros(100), Duration::from_millis(5)];

static WAITING: Mutex<Room> = Mutex::new(Room { guests: Vec::new(), is_attended: false });

/// In the order in which they came.
struct Room {
    guests: Vec<Arc<Mutex<Guest>>>,
    is_attended: bool,
}

enum Guest {
    Waiting(Locking, Begin),
    Gone,
}

/// What is done with the locks, or with the reason why there are none.
type Begin = Box<dyn FnOnce(Result<Locks, Error>) + Send>;

/// Waits until everything is locked, at most as long as [`Locking`] is patient, and for the job that then begins.
#[must_use = "nothing is locked for who does not wait"]
struct Wait<T> {
    guest: Arc<Mutex<Guest>>,
    path: Arc<Path>,
    job: oneshot::Receiver<Result<Job<T>, Error>>,
}

/// Prepares on the blocking pool, locks, and finishes there: in the same job, unless others hold one of the locks. From its
/// first poll on it gets there without being polled.
pub(crate) async fn with_locks<S: Send + 'static, T: Send + 'static>(
    runtime: &Handle,
    gate: &Arc<Gate>,
    path: &Arc<Path>,
    prepare: impl FnOnce(&Gate) -> Result<(S, Locking), Error> + Send + 'static,
    finish: impl FnOnce(S, Locks, &Gate) -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    // One gate for both jobs: who drops this closes it to the second one, wherever that stands.
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

/// Nothing panics while one of these is locked, so a poisoned lock has spoiled nothing.
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
        // If there are no locks, the files that wait for them go before anybody hears of it. Who has gone hears nothing.
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
    /// First this, and then the job, if it has begun: one that begins in between would be nobody's.
    fn drop(&mut self) {
        let left = std::mem::replace(&mut *open(&self.guest), Guest::Gone);
        // Outside the lock, because files may have to be removed.
        drop(left);
    }
}

/// Tries for all guests in turn, until there are none.
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
        // If somebody came or went, the next one may soon have its turn.
        pause = if guests.len() == count { (pause * 2).min(longest) } else { PAUSES[0] };
        count = guests.len();
        for guest in &guests {
            // A waker of the caller's may panic, or a runtime without threads; the others wait for theirs all the same.
            drop(catch_unwind(AssertUnwindSafe(|| attempt(guest))));
        }
        std::thread::park_timeout(pause);
    }
}

fn attempt(guest: &Mutex<Guest>) {
    let mut guest = open(guest);
    let Guest::Waiting(locking, _) = &mut *guest else { return };
    let Some(locks) = locking.attempt().transpose() else { return };
    // Under the guest's lock: whoever drops the wait finds it waiting, or finds the job.
    if let Guest::Waiting(locking, begin) = std::mem::replace(&mut *guest, Guest::Gone) {
        // Nothing is held of what was not locked as a whole, before anybody hears of it.
        drop(locking);
        begin(locks);
    }
}
