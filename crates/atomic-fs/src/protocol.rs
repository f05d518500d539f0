//! The commit of a transaction: sync, lock, plan, write the journal, and pass the commit point.
//!
//! Invariant: before the commit point the targets are untouched and every failure removes what was staged; after it the
//! journal outlives every step, so that a crash at any moment leaves enough to finish or to undo the whole.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::apply::{abort, apply, forget, sync};
use crate::chain::{Chain, Spot, Trust};
use crate::commit::Gate;
use crate::error::{io_error, remove_error, rename_error};
use crate::journal::{self, Pointer};
use crate::lock::{Locking, Locks, Share};
use crate::names::{COMMITTED, POINTER, PREPARED};
use crate::plan::Plan;
use crate::platform::{Identity, Moment, Moved};
use crate::site::Site;
use crate::staged::{Staged, Target};
use crate::staging::{Staging, Workspace};
use crate::sync::{Unsynced, sync_files};
use crate::{Durability, Error, Symlinks, WriteOptions};

/// Files of more bytes than this altogether are synced before the directories are locked, so that nobody waits for them.
const QUICK_BYTES: u64 = 16 << 20;

/// A new file with its final content and metadata.
#[derive(Debug)]
pub(crate) struct Sealed {
    pub(crate) path: Arc<Path>,
    pub(crate) staging: Staging,
    pub(crate) site: Arc<Site>,
    /// That of the target in its directory.
    pub(crate) name: OsString,
    /// Open until it is synced.
    pub(crate) file: Option<Arc<File>>,
    /// Whether the target must not exist.
    is_new: bool,
    /// That of its content.
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

    /// Its file, to be synced and closed; one that is not to be synced is closed here.
    pub(crate) fn take_unsynced(&mut self) -> Option<Unsynced> {
        let file = self.file.take()?;
        (self.durability != Durability::None).then(|| Unsynced::New(self.path.clone(), file))
    }
}

/// What a transaction is to do, ready to be done.
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
        // Once these are locked, nobody else who asks for them, reader or writer, is in between.
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

/// An unfinished transaction may have files of these very targets in its hands.
pub(crate) fn refuse_unfinished(site: &Site) -> Result<(), Error> {
    let failed = |source| io_error("look for a journal in", &site.path)(source);
    if journal::is_present(&site.dir).map_err(failed)? {
        return Err(Error::Unrecovered { directory: site.path.clone() });
    }
    match elsewhere(site)? {
        Some(home) => Err(Error::Unrecovered { directory: home.path }),
        None => Ok(()),
    }
}

/// The directory with the journal of a transaction in which `site` takes part, if it has not been finished.
pub(crate) fn elsewhere(site: &Site) -> Result<Option<Site>, Error> {
    let Some(pointer) = Pointer::find(site)? else { return Ok(None) };
    let directory = site.path.join(&pointer.home);
    let misplaced = |directory, reason| Error::Misplaced { journal: site.path.join(POINTER), directory, reason };
    let Ok(home) = Site::open(&directory) else { return Err(misplaced(directory, "cannot be opened")) };
    match journal::find(&home)? {
        Some(found) if found.record.tag == pointer.tag => {
            let is_here = |way: &PathBuf| home.dir.open_dir(way).and_then(|dir| dir.id()).is_ok_and(|id| id == site.id);
            if found.record.sites.iter().any(is_here) {
                Ok(Some(home))
            } else {
                Err(misplaced(home.path, "has a journal that speaks of another directory than this one"))
            }
        }
        // If it speaks of another transaction, or of none, then the one that led there has been finished.
        _ => Ok(None),
    }
}

/// A path whose directory is open and one of the transaction's.
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

    /// A removal and a rename act on a symlink itself, as those of the system do.
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

    /// How much there is to sync, as far as is known.
    fn bytes(&self) -> u64 {
        match self {
            Self::Put(sealed) => sealed.identity.size,
            Self::Remove(_) => 0,
            Self::Rename { from, .. } => from.target.size(),
        }
    }

    /// What is to be synced: the new file, and one that gets another name, whoever has written it.
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

    /// Does this step as the only one: a single system call is atomic without a journal.
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

/// What is to become visible, under the locks of all its directories.
#[derive(Debug, Default)]
struct Committing {
    plan: Plan,
    /// The new files, which go unless the commit comes.
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
        let (mut draft, journal) = Draft::begin(workspace, &home, &chains)?;
        // The names beside the journal are synced together with its own.
        let others = chains.iter().flat_map(Chain::spots).map(|spot| &spot.site).filter(|site| site.id != home.id);
        let others: HashMap<_, _> = others.map(|site| (site.id, site.clone())).collect();
        if durability != Durability::None {
            unsynced.extend(others.into_values().map(Unsynced::Names));
            unsynced.push(journal);
        }
        // With that the new files are closed, and unlocked, before they become the targets.
        sync_files(unsynced, gate)?;
        draft.prepare(durability)?;
        let Some(mut passage) = gate.enter() else { return Err(Error::Interrupted { path: home.path.clone() }) };
        let trust = draft.commit()?;
        // The commit point is passed, or will be: what was staged is now the journal's.
        self.staged.iter_mut().for_each(Staging::give_away);
        let applied = apply(&chains).and_then(|()| {
            // Who drops the commit from here on finds all files new, and need not wait for the disk.
            passage.settle();
            if durability == Durability::None { Ok(()) } else { sync(&home, &chains) }
        });
        let Err(error) = applied else {
            passage.done();
            // Nobody who drops the commit can change anything any more, and everything is durable.
            if let Err(_error) = forget(&home, &chains) {
                workspace.stay();
                #[cfg(feature = "tracing")]
                tracing::warn!(error = %_error, "a committed transaction is to be cleaned up by a recovery");
            }
            return Ok(());
        };
        // Otherwise somebody has seen the files new, and been told that they stay.
        let undone = if passage.undo() { abort(&home, &chains, trust).map(|()| error) } else { Err(error.into()) };
        match undone {
            Ok(error) => Err(error),
            Err(source) => {
                workspace.stay();
                // Who has dropped the commit does not hear of it, and the next one finds the directory unrecovered.
                #[cfg(feature = "tracing")]
                tracing::error!(directory = ?home.path, error = %source, "a transaction is undecided until a recovery");
                // The passage stays open until here, so that a drop waits for this too.
                passage.done();
                Err(Error::Undecided { directory: home.path.clone(), source })
            }
        }
    }
}

/// A journal that is not yet committed, and the pointers to it; dropped, they are removed.
struct Draft<'a> {
    home: &'a Site,
    /// By which name it is there; none once it is committed.
    name: Option<OsString>,
    pointed: Vec<Arc<Site>>,
    written: Moment,
}

impl<'a> Draft<'a> {
    /// Writes it, and what leads to it, and leaves all to be synced.
    fn begin(workspace: &Workspace, home: &'a Arc<Site>, chains: &[Chain]) -> Result<(Self, Unsynced), Error> {
        let failed = || io_error("write a journal in", &home.path);
        let name = workspace.draft();
        let mut file = home.dir.create(&name, 0o600).map_err(failed())?;
        let mut draft = Self { home, name: Some(name), pointed: Vec::new(), written: Moment::default() };
        let own = Identity::of(&file).map_err(failed())?;
        draft.written = own.modified;
        let bytes = journal::encode(workspace.tag, &own, home, chains);
        if bytes.len() as u64 > journal::LIMIT_BYTES {
            return Err(failed()(io::ErrorKind::FileTooLarge.into()));
        }
        file.write_all(&bytes).map_err(failed())?;
        for site in chains.iter().flat_map(Chain::spots).map(|spot| &spot.site) {
            if site.id != home.id && draft.pointed.iter().all(|known| known.id != site.id) {
                draft.point(workspace, site)?;
            }
        }
        Ok((draft, Unsynced::Draft(home.clone(), file)))
    }

    /// Leaves in another directory what leads to the journal, so that nobody overlooks it there.
    fn point(&mut self, workspace: &Workspace, site: &Arc<Site>) -> Result<(), Error> {
        let pointer = Pointer { tag: workspace.tag, home: journal::way(&site.path, &self.home.path) };
        // One that is there leads nowhere, or this transaction would have been refused.
        let left = journal::remove_pointer(site).and_then(|()| pointer.leave(site));
        left.map_err(io_error("leave what leads to the journal in", &site.path))?;
        self.pointed.push(site.clone());
        Ok(())
    }

    /// Gives it the name by which a recovery finds it, once it is whole and what leads to it is durable.
    fn prepare(&mut self, durability: Durability) -> Result<(), Error> {
        let failed = || io_error("prepare the journal in", &self.home.path);
        let Some(name) = &self.name else { return Ok(()) };
        let moved = self.home.dir.rename_new(name, PREPARED.as_ref()).map_err(failed())?;
        let draft = self.name.replace(PREPARED.into());
        if let (Moved::Linked, Some(draft)) = (moved, draft) {
            self.home.dir.remove(&draft).map_err(failed())?;
        }
        // From here on the files may change places: a recovery will put them back.
        if durability == Durability::None { Ok(()) } else { self.home.dir.sync().map_err(failed()) }
    }

    /// Commits it, and says by what its files are known. No sync: if that is lost, so is what follows, or it is undone.
    fn commit(mut self) -> Result<Trust, Error> {
        let renamed = self.home.dir.rename(PREPARED.as_ref(), COMMITTED.as_ref());
        renamed.map_err(io_error("commit the journal in", &self.home.path))?;
        self.name = None;
        self.pointed.clear();
        Ok(Trust::Numbers { written: self.written })
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        let Some(name) = &self.name else { return };
        // What cannot be removed now is left to a recovery.
        let _left = self.home.dir.remove(name);
        if name == PREPARED {
            // A rename may have taken effect although it failed. Then durably, before what leads here goes.
            let _left = self.home.dir.remove(COMMITTED.as_ref());
            let _left = self.home.dir.sync();
        }
        for site in &self.pointed {
            let _left = journal::remove_pointer(site);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As on a network file system: the rename that was to commit it took effect, and reported an error.
    #[test]
    fn a_journal_that_was_not_committed_goes_by_either_of_its_names_and_takes_what_leads_to_it_along() {
        let scratch = tempfile::tempdir().expect("the temporary directory has room");
        let [home, other] = ["home", "other"].map(|name| {
            std::fs::create_dir(scratch.path().join(name)).expect("the directory is ours");
            Arc::new(Site::open(&scratch.path().join(name)).expect("it is there"))
        });
        for name in [PREPARED, COMMITTED] {
            std::fs::write(home.path.join(name), "").expect("the directory is ours");
        }
        std::fs::write(other.path.join(POINTER), "").expect("the directory is ours");
        let pointed = vec![other.clone()];
        drop(Draft { home: &home, name: Some(PREPARED.into()), pointed, written: Moment::default() });
        for site in [home, other] {
            assert!(site.dir.list().expect("it is there").iter().all(|name| name == "." || name == ".."), "{site:?}");
        }
    }
}
