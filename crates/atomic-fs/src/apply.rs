//! What is done with a committed journal: apply it, undo it, judge what a crash left of it, and forget it.
//!
//! Invariant: nothing is touched before every slot has been judged; the journal goes, durably, before any file that it
//! speaks of.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

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

/// Forgets the journal, and then removes what it no longer needs.
pub(crate) fn finish(home: &Site, journal: &str, slots: &[Slot]) -> io::Result<()> {
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
        slots.push(Slot { site, name, temp, old, new });
    }
    Ok(slots)
}
