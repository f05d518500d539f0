//! Operations on a committed journal: apply it, undo it, judge what a crash left, and forget it.
//!
//! Invariant: nothing is touched before every chain has been judged; no step of a chain is made before the previous one
//! is durable; the journal is removed, durably, before any file that it names.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tokio::runtime::Handle;

use crate::Error;
use crate::chain::{Aim, Chain, Site, Spot, Trust, Way};
use crate::error::{io_error, remove_error, rename_error};
use crate::journal::{self, Pointer, Record};
use crate::names::{COMMITTED, PREPARED};

/// Makes every step. None is durable yet; if a power cut preserves some of them, the journal undoes or finishes them.
pub(crate) fn apply(chains: &[Chain]) -> Result<(), Error> {
    for number in 1..=longest(chains) {
        // Puts before removals: a renamed file gets its new name before it loses the old one.
        for chain in chains.iter().filter(|chain| number <= chain.steps()) {
            let failed = if chain.files[number - 1].is_none() { remove_error } else { rename_error };
            chain.step(number).map_err(|source| failed(chain.names[number - 1].path(), source))?;
        }
        sync_sites(chains.iter().filter(|chain| number < chain.steps()))?;
    }
    Ok(())
}

/// Makes the commit point durable, and all names.
pub(crate) fn sync(home: &Site, chains: &[Chain]) -> Result<(), Error> {
    let sync_one = |site: &Site| site.dir.sync().map_err(io_error("sync the directory", &site.path));
    journal::sites(home, chains).into_iter().try_for_each(sync_one)
}

fn longest(chains: &[Chain]) -> usize {
    chains.iter().map(Chain::steps).max().unwrap_or_default()
}

/// Makes the names of these chains durable.
fn sync_sites<'a>(chains: impl Iterator<Item = &'a Chain>) -> Result<(), Error> {
    let mut synced = Vec::new();
    for site in chains.flat_map(Chain::spots).map(|spot| &spot.site) {
        if !synced.contains(&site.id) {
            site.dir.sync().map_err(io_error("sync the directory", &site.path))?;
            synced.push(site.id);
        }
    }
    Ok(())
}

/// Undoes what was applied; an error means that only a recovery can tell.
pub(crate) fn abort(home: &Site, chains: &[Chain], trust: Trust) -> io::Result<()> {
    // Without a sync: as long as the outcome was reported to nobody, a recovery may as well finish it.
    home.dir.rename(COMMITTED.as_ref(), PREPARED.as_ref())?;
    let undone = (|| {
        let ways = judge(home, PREPARED, chains, trust)?;
        roll(home, PREPARED, chains, &ways)
    })();
    undone.map_err(io::Error::from)
}

/// Finds out how far each chain has come, and refuses if that cannot be told, or if a chain should not be touched.
pub(crate) fn judge(home: &Site, name: &'static str, chains: &[Chain], trust: Trust) -> Result<Vec<Way>, Error> {
    let aim = if name == PREPARED { Aim::Back } else { Aim::Forward };
    let judge_one = |chain: &Chain| {
        let judged = chain.judge(trust, aim).map_err(io_error("look at", &chain.path()))?;
        judged.map_err(|path| Error::UnknownFile { path, journal: home.path.join(name) })
    };
    chains.iter().map(judge_one).collect()
}

/// Brings every chain to where it should be, and forgets the journal `name`.
pub(crate) fn roll(home: &Site, name: &'static str, chains: &[Chain], ways: &[Way]) -> Result<(), Error> {
    let action = if name == PREPARED { "roll back" } else { "roll forward" };
    for chain in chains {
        chain.settle().map_err(io_error(action, &chain.path()))?;
    }
    let shift = |number: usize, is_due: fn(&Way, usize) -> bool| {
        let due: Vec<_> = ways.iter().map(|way| is_due(way, number)).collect();
        for (chain, _) in chains.iter().zip(&due).filter(|(_, is_due)| **is_due) {
            chain.shift(number).map_err(io_error(action, &chain.path()))?;
        }
        // Only before another step: the last steps are synced together.
        let goes_on = |way: &Way| is_due(way, number) && way.from.abs_diff(way.to) > 1;
        sync_sites(chains.iter().zip(ways).filter(|(_, way)| goes_on(way)).map(|(chain, _)| chain))
    };
    for number in 1..=longest(chains) {
        shift(number, |way, number| way.from < number && number <= way.to)?;
    }
    for number in (1..=longest(chains)).rev() {
        shift(number, |way, number| way.to < number && number <= way.from)?;
    }
    sync(home, chains)?;
    finish(home, name, chains).map_err(io_error("finish the transaction in", &home.path))
}

/// Forgets the journal of a transaction whose files are all in place, and removes what it no longer needs.
///
/// Here the removal of the journal need not be durable before the rest is removed: if a power cut brings the journal
/// back, its recovery finds each target new and is done, whether or not the old file still exists. But a later, durable
/// change of a target must not survive together with a journal that came back. In the journal's directory that cannot
/// happen, because the sync that makes the change durable also makes the journal's removal durable; for any other
/// directory the removal is synced here.
pub(crate) fn forget(home: &Site, chains: &[Chain]) -> io::Result<()> {
    if journal::sites(home, chains).len() > 1 {
        return finish(home, COMMITTED, chains);
    }
    let mut held = Held::default();
    held.open(home, COMMITTED.as_ref(), 0);
    home.dir.remove(COMMITTED.as_ref())?;
    for chain in chains {
        if let Some(Some(old)) = chain.files.last()
            && chain.is_hidden()
        {
            held.open(&chain.carrier.site, &chain.carrier.name, old.size);
        }
        chain.clear()?;
    }
    Ok(())
}

/// Files that lose their names. As long as they are open, the system only notes the removal, and frees their space when
/// they are closed. That takes longer than the rest of the clean-up, so the blocking pool does it, meanwhile and
/// afterwards.
#[derive(Default)]
struct Held {
    files: Vec<File>,
    bytes: u64,
    /// The files of this transaction that are not freed yet.
    pending: Arc<Pending>,
}

#[derive(Default)]
struct Pending {
    files: AtomicUsize,
    bytes: AtomicU64,
}

impl Held {
    /// How many files are handed over together.
    const BATCH: usize = 64;
    /// The most files that are held open. Handles are few, so the removal itself frees the others.
    const FILES: usize = 256;
    /// The most bytes that are held open, so that hardly any space is still taken when the commit has returned.
    const BYTES: u64 = 4 << 20;

    fn open(&mut self, site: &Site, name: &std::ffi::OsStr, bytes: u64) {
        let Pending { files: open, bytes: taken } = &*self.pending;
        if open.load(Ordering::Relaxed) >= Self::FILES || taken.load(Ordering::Relaxed) + bytes > Self::BYTES {
            return;
        }
        // If a file cannot be opened, its removal frees it.
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
        // Outside a runtime, or if it is shut down, the files are closed here.
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
fn finish(home: &Site, journal: &str, chains: &[Chain]) -> io::Result<()> {
    home.dir.remove(journal.as_ref())?;
    // With a sync; otherwise a journal that survives a power cut would ask for files that have been removed.
    home.dir.sync()?;
    chains.iter().try_for_each(Chain::clear)?;
    // Only then the pointers to it. A pointer that stays leads nowhere, and the next transaction or recovery removes
    // it.
    journal::sites(home, chains).into_iter().skip(1).try_for_each(journal::remove_pointer)
}

/// The chains that a journal names, with their directories open. Refuses a directory that did not take part.
pub(crate) fn reopen(home: &Arc<Site>, name: &str, record: Record) -> Result<Vec<Chain>, Error> {
    let tag = record.tag;
    let open = |way: &std::path::PathBuf| {
        if way.as_os_str().is_empty() {
            return Ok(home.clone());
        }
        let (journal, directory) = (home.path.join(name), home.path.join(way));
        let misplaced = |reason| Error::Misplaced { journal, directory, reason };
        let Ok(site) = Site::open(&home.path.join(way)) else { return Err(misplaced("cannot be opened")) };
        match Pointer::find(&site)? {
            Some(pointer) if pointer.tag == tag && leads_to(&site, &pointer, home) => Ok(Arc::new(site)),
            Some(_) => Err(misplaced("belongs to another transaction, or another copy of this one")),
            None => Err(misplaced("has nothing that leads to this journal")),
        }
    };
    let sites = record.sites.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let spot = |name: journal::Name| Spot { site: sites[name.site].clone(), name: name.name };
    let chain = |line: journal::Line| Chain {
        carrier: spot(line.carrier),
        hidden: line.hidden,
        names: line.names.into_iter().map(spot).collect(),
        files: line.files,
    };
    Ok(record.chains.into_iter().map(chain).collect())
}

/// Whether the pointer in `site` leads to exactly the directory `home`.
fn leads_to(site: &Site, pointer: &Pointer, home: &Site) -> bool {
    site.dir.open_dir(&pointer.home).and_then(|dir| dir.id()).is_ok_and(|id| id == home.id)
}
