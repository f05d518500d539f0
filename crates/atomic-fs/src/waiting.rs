//! Where those wait who want a lock that others hold.
//!
//! Invariant: a wait takes no thread of the blocking pool, which those who hold the lock may need to get on; it has a
//! bound; and who drops it has, from then on, locked nothing. One thread tries for all, and ends with the last of them.

use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::runtime::Handle;

use crate::Error;
use crate::commit::{Gate, Job};
use crate::staged::io_error;
use crate::workspace::{Locking, Locks};

/// The shortest and the longest pause between two attempts.
const PAUSES: [Duration; 2] = [Duration::from_micros(100), Duration::from_millis(5)];

static ROOM: Mutex<Room> = Mutex::new(Room { guests: Vec::new(), is_attended: false });

/// In the order in which they came.
struct Room {
    guests: Vec<Arc<Mutex<Guest>>>,
    is_attended: bool,
}

#[derive(Debug)]
enum Guest {
    Waiting(Locking, Option<Waker>),
    Served(Result<Locks, Error>),
    Gone,
}

/// Waits until everything is locked, at most as long as [`Locking`] is patient.
#[derive(Debug)]
#[must_use = "nothing is locked for who does not wait"]
struct Wait(Arc<Mutex<Guest>>);

/// Prepares on the blocking pool, locks, and finishes there: in the same job, unless others hold one of the locks.
pub(crate) async fn with_locks<S: Send + 'static, T: Send + 'static>(
    runtime: &Handle,
    path: &Arc<Path>,
    prepare: impl FnOnce(&Gate) -> Result<(S, Locking), Error> + Send + 'static,
    finish: impl FnOnce(S, Locks, &Gate) -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let first = Job::spawn(runtime, &Gate::new(), path, move |gate| {
        let (state, mut locking) = prepare(gate)?;
        Ok(match locking.attempt()? {
            Some(locks) => Ok(finish(state, locks, gate)?),
            None => Err((state, locking, finish)),
        })
    });
    let (state, locking, finish) = match first.await? {
        Ok(done) => return Ok(done),
        Err(waiting) => waiting,
    };
    let locks = Wait::begin(locking)?.await?;
    Job::spawn(runtime, &Gate::new(), path, move |gate| finish(state, locks, gate)).await
}

/// Nothing panics while one of these is locked, so a poisoned lock has spoiled nothing.
fn open<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wait {
    fn begin(locking: Locking) -> Result<Self, Error> {
        let path = locking.path().to_path_buf();
        let wait = Self(Arc::new(Mutex::new(Guest::Waiting(locking, None))));
        let mut room = open(&ROOM);
        if !room.is_attended {
            let attendant = std::thread::Builder::new().name("afs-locks".to_owned());
            attendant.spawn(attend).map_err(io_error("wait for the lock of", &path))?;
            room.is_attended = true;
        }
        room.guests.push(wait.0.clone());
        Ok(wait)
    }
}

impl Future for Wait {
    type Output = Result<Locks, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut guest = open(&self.0);
        if let Guest::Waiting(_, waker) = &mut *guest {
            *waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        match std::mem::replace(&mut *guest, Guest::Gone) {
            Guest::Served(served) => Poll::Ready(served),
            // Polled after its end.
            _ => Poll::Pending,
        }
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        *open(&self.0) = Guest::Gone;
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
        guests.iter().for_each(|guest| attempt(guest));
        std::thread::park_timeout(pause);
    }
}

fn attempt(guest: &Mutex<Guest>) {
    let mut guest = open(guest);
    let Guest::Waiting(locking, waker) = &mut *guest else { return };
    let Some(served) = locking.attempt().transpose() else { return };
    let waker = waker.take();
    *guest = Guest::Served(served);
    // Whoever is woken looks at once.
    drop(guest);
    if let Some(waker) = waker {
        waker.wake();
    }
}
