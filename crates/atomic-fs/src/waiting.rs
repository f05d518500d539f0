//! Where those wait who want a lock that others hold.
//!
//! Invariant: a wait takes no thread of the blocking pool, which those who hold the lock may need to get on; it has a
//! bound; and who drops it has, from then on, locked nothing. One thread tries for all, and ends with the last of them. It
//! also begins the job of whoever gets the lock, so that no lock is held for a future that nobody polls.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::Error;
use crate::commit::{Gate, Job};
use crate::lock::{Locking, Locks};
use crate::staged::io_error;

/// The shortest and the longest pause between two attempts.
const PAUSES: [Duration; 2] = [Duration::from_micros(100), Duration::from_millis(5)];

static ROOM: Mutex<Room> = Mutex::new(Room { guests: Vec::new(), is_attended: false });

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
        let mut room = open(&ROOM);
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
        let mut room = open(&ROOM);
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
