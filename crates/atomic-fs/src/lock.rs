//! Who may change the files of a directory, and whose turn it is.
//!
//! Invariant: a lock is a file that only those can open who may write to the directory, so that nobody else holds them up.
//! Its last holder removes it; what a killed one leaves is taken over by the next. Whoever has to wait keeps others from
//! passing, so that neither readers that overlap keep out a writer, nor the other way round.

use std::ffi::OsStr;
use std::fs::{File, TryLockError};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::Error;
use crate::platform::{self, Dir, Entry, Guests};
use crate::site::Site;
use crate::staged::io_error;

/// How long a lock is waited for by default.
pub(crate) const LOCK_PATIENCE: Duration = Duration::from_secs(30);
/// Locked by whoever reads or changes the files of the directory.
const ROOM: &str = ".afs-lock";
/// Locked by whoever enters next.
const TURN: &str = ".afs-turn";
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

/// Whether `name` is that of a lock.
pub(crate) fn is_lock(name: &OsStr) -> bool {
    name == ROOM || name == TURN
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
            let opened = site.dir.open_file(name.as_ref()).or_else(|error| match error.kind() {
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
