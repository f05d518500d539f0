//! What is done with a committed journal: apply it, undo it, judge what a crash left of it, and forget it.
//!
//! Invariant: nothing is touched before every slot has been judged; the journal goes, durably, before any file that it
//! speaks of.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tokio::runtime::Handle;

use crate::Error;
use crate::journal::{self, ABORTING, COMMITTED, Progress, Slot};
use crate::staged::{io_error, rename_error};
use crate::workspace::Site;

/// The directories of `slots`, each once.
pub(crate) fn sites(slots: &[Slot]) -> impl Iterator<Item = &Arc<Site>> {
    let mut seen = Vec::new();
    slots.iter().map(|slot| &slot.site).filter(move |site| {
        let fresh = !seen.contains(&site.id);
        if fresh {
            seen.push(site.id);
        }
        fresh
    })
}

/// Makes the commit point durable, and then every slot.
pub(crate) fn apply(home: &Site, slots: &[Slot]) -> Result<(), Error> {
    home.dir.sync().map_err(io_error("sync the journal in", &home.path))?;
    for slot in slots {
        slot.apply().map_err(|source| rename_error(slot.path(), source))?;
    }
    sync_sites(slots)
}

fn sync_sites(slots: &[Slot]) -> Result<(), Error> {
    sites(slots).try_for_each(|site| site.dir.sync().map_err(io_error("sync the directory", &site.path)))
}

/// Undoes what was applied; an error means that only a recovery can tell.
pub(crate) fn abort(home: &Site, slots: &[Slot]) -> io::Result<()> {
    // Durably first: after a power cut in the middle of undoing, nobody may take this for a commit.
    home.dir.rename(COMMITTED.as_ref(), ABORTING.as_ref())?;
    home.dir.sync()?;
    let undone = (|| {
        let progress = judge(home, ABORTING, slots)?;
        roll_back(home, slots, &progress)
    })();
    undone.map_err(io::Error::from)
}

/// Finds out how far each slot has come, and refuses if one cannot be told, or should not be touched.
pub(crate) fn judge(home: &Site, journal: &'static str, slots: &[Slot]) -> Result<Vec<Progress>, Error> {
    let is_known = |progress| match progress {
        // What somebody else put over an applied file is the last write, whichever way this goes.
        Progress::Before | Progress::After | Progress::Same | Progress::AfterReplaced => true,
        // To undo would lose what they wrote, and not to undo would keep what is being undone.
        Progress::AfterChanged => journal == COMMITTED,
        // To finish would overwrite it.
        Progress::BeforeChanged => journal == ABORTING,
        Progress::Unknown => false,
    };
    let judge_one = |slot: &Slot| {
        let progress = slot.progress().map_err(io_error("look at", &slot.path()))?;
        let unknown = || Error::UnknownFile { path: slot.path(), journal: home.path.join(journal) };
        is_known(progress).then_some(progress).ok_or_else(unknown)
    };
    slots.iter().map(judge_one).collect()
}

/// Applies what is not applied, and forgets the journal.
pub(crate) fn roll_forward(home: &Site, slots: &[Slot], progress: &[Progress]) -> Result<(), Error> {
    for (slot, progress) in slots.iter().zip(progress) {
        let settled = slot.settle();
        let done = if *progress == Progress::Before { settled.and_then(|()| slot.apply()) } else { settled };
        done.map_err(io_error("roll forward", &slot.path()))?;
    }
    sync_sites(slots)?;
    finish(home, COMMITTED, slots).map_err(io_error("finish the transaction in", &home.path))
}

/// Undoes what is applied, in reverse, and forgets the journal.
pub(crate) fn roll_back(home: &Site, slots: &[Slot], progress: &[Progress]) -> Result<(), Error> {
    for (slot, progress) in slots.iter().zip(progress).rev() {
        let settled = slot.settle();
        let done = if *progress == Progress::After { settled.and_then(|()| slot.undo()) } else { settled };
        done.map_err(io_error("roll back", &slot.path()))?;
    }
    sync_sites(slots)?;
    finish(home, ABORTING, slots).map_err(io_error("finish the transaction in", &home.path))
}

/// Forgets the journal of a transaction whose files are all in place, durably, and removes what it no longer needs.
///
/// Here the journal need not be gone durably before the rest is: if a power cut brings it back, its recovery finds each
/// target new and is done, whether or not the old file is still there. Only a later, durable change of a target must not
/// survive where the journal came back. In the journal's directory it cannot, because the sync that makes the change
/// durable does so for the removal of the journal as well; for any other directory the removal is synced here.
pub(crate) fn forget(home: &Site, slots: &[Slot]) -> io::Result<()> {
    if slots.iter().any(|slot| slot.site.id != home.id) {
        return finish(home, COMMITTED, slots);
    }
    let mut held = Held::default();
    held.open(home, COMMITTED.as_ref(), 0);
    home.dir.remove(COMMITTED.as_ref())?;
    for slot in slots {
        if let Some(old) = &slot.old {
            held.open(&slot.site, &slot.temp, old.size);
        }
        slot.clear()?;
    }
    Ok(())
}

/// Files that lose their names: as long as they are open, the system only notes that, and frees their space when they
/// are closed. That takes longer than all the rest of the clean-up, so the blocking pool does it meanwhile and afterwards.
#[derive(Default)]
struct Held {
    files: Vec<File>,
    bytes: u64,
    /// What of this transaction is not freed yet.
    pending: Arc<Pending>,
}

#[derive(Default)]
struct Pending {
    files: AtomicUsize,
    bytes: AtomicU64,
}

impl Held {
    /// So many are handed over together.
    const BATCH: usize = 64;
    /// So many are open at most; the others are freed by their removal, for handles are few.
    const FILES: usize = 256;
    /// So much of them is open at most, that hardly any space is still taken when the commit has returned.
    const BYTES: u64 = 4 << 20;

    fn open(&mut self, site: &Site, name: &OsStr, bytes: u64) {
        let Pending { files: open, bytes: taken } = &*self.pending;
        if open.load(Ordering::Relaxed) >= Self::FILES || taken.load(Ordering::Relaxed) + bytes > Self::BYTES {
            return;
        }
        // A file that cannot be opened is freed by its removal, too.
        let Ok(file) = site.dir.read(name) else { return };
        open.fetch_add(1, Ordering::Relaxed);
        taken.fetch_add(bytes, Ordering::Relaxed);
        self.files.push(file);
        self.bytes += bytes;
        if self.files.len() == Self::BATCH {
            self.hand_over();
        }
    }

    fn hand_over(&mut self) {
        let (files, bytes, pending) =
            (std::mem::take(&mut self.files), std::mem::take(&mut self.bytes), self.pending.clone());
        // Outside a runtime, or in one that is shut down, they are closed here.
        if let Ok(runtime) = Handle::try_current() {
            drop(runtime.spawn_blocking(move || {
                let count = files.len();
                drop(files);
                pending.files.fetch_sub(count, Ordering::Relaxed);
                pending.bytes.fetch_sub(bytes, Ordering::Relaxed);
            }));
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.hand_over();
    }
}

/// Forgets the journal, and then removes what it no longer needs.
fn finish(home: &Site, journal: &str, slots: &[Slot]) -> io::Result<()> {
    home.dir.remove(journal.as_ref())?;
    // Durably, or after a power cut a journal would ask for files that have been removed.
    home.dir.sync()?;
    slots.iter().try_for_each(Slot::clear)
}

/// The slots that a journal names, with their directories open.
pub(crate) fn reopen(home: &Arc<Site>, lines: Vec<journal::Line>) -> Result<Vec<Slot>, Error> {
    let mut sites: Vec<(PathBuf, Arc<Site>)> = Vec::new();
    let mut slots = Vec::new();
    for journal::Line { directory, name, temp, old, new } in lines {
        let site = if directory.as_os_str().is_empty() {
            home.clone()
        } else if let Some((_, site)) = sites.iter().find(|(path, _)| *path == directory) {
            site.clone()
        } else {
            let site = Arc::new(Site::open(&directory)?);
            sites.push((directory, site.clone()));
            site
        };
        slots.push(Slot::new(site, name, temp, old, new));
    }
    journal::mark_moves(&mut slots);
    Ok(slots)
}
