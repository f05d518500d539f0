//! The commit of a transaction: sync, lock, plan, write the journal, and pass the commit point.
//!
//! Invariant: before the commit point the targets are untouched and every failure removes what was staged; after it the
//! journal outlives every step, so that a crash at any moment leaves enough to finish or to undo the whole.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::apply::{abort, apply, forget, sites};
use crate::commit::Gate;
use crate::journal::{self, COMMITTED, Identity, Slot};
use crate::platform::{Entry, Moved, Share};
use crate::staged::{Place, Staged, Target, io_error, rename_error};
use crate::sync::{Unsynced, sync_files};
use crate::workspace::{Locking, Locks, Site, Workspace};
use crate::{Error, Symlinks, WriteOptions};

/// Files of more bytes than this altogether are synced before the directories are locked, so that nobody waits for them.
const QUICK_BYTES: u64 = 16 << 20;

/// A new file with its final content and metadata.
#[derive(Debug)]
pub(crate) struct Sealed {
    pub(crate) path: Arc<Path>,
    pub(crate) place: Place,
    pub(crate) site: Arc<Site>,
    /// Open until it is synced.
    pub(crate) file: Option<Arc<File>>,
    identity: Identity,
    // Last, so that the note goes after the file.
    workspace: Arc<Workspace>,
}

impl Sealed {
    /// `digest` is that of the content, if it is known.
    pub(crate) fn new(
        staged: Staged,
        length: u64,
        digest: Option<u128>,
        path: &Arc<Path>,
        site: Arc<Site>,
        workspace: Arc<Workspace>,
    ) -> Result<Self, Error> {
        let (place, file) = staged.seal(length)?;
        let failed = |source| io_error("look at the new file for", path)(source);
        let identity = match digest {
            Some(_) => {
                let entry = Entry::of(&file).map_err(failed)?;
                Identity { inode: entry.id.1, size: entry.size, digest }
            }
            // Read back, for it may have been written in pieces, and some of them taken back.
            None => Identity::of(&site.dir, &place.temp)
                .and_then(|found| found.ok_or_else(|| io::ErrorKind::NotFound.into()))
                .map_err(failed)?,
        };
        Ok(Self { path: path.clone(), place, site, file: Some(Arc::new(file)), identity, workspace })
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
    // Last, so that the note goes after the files.
    workspace: Arc<Workspace>,
}

impl Prepared {
    pub(crate) fn new(workspace: Arc<Workspace>, steps: Vec<Step>) -> Result<(Self, Locking), Error> {
        let mut moves = steps.into_iter().map(|step| Move::new(&workspace, step)).collect::<Result<Vec<_>, _>>()?;
        let has_journal = !matches!(&moves[..], [Move::Put(_) | Move::Remove(_)]);
        let bytes: u64 = moves.iter().map(Move::bytes).sum();
        let mut unsynced: Vec<_> = moves.iter_mut().flat_map(|one| one.unsynced(has_journal)).collect();
        if !has_journal || bytes > QUICK_BYTES {
            sync_files(std::mem::take(&mut unsynced))?;
        }
        let home = workspace.home();
        // Once these are locked, nobody else who asks for them, reader or writer, is in between.
        let locking = Locking::new(moves.iter().flat_map(Move::sites).chain([&home]), Share::Nobody);
        Ok((Self { moves, unsynced, workspace }, locking))
    }

    /// Makes all steps visible, or none.
    pub(crate) fn commit(self, _locks: Locks, gate: &Gate) -> Result<(), Error> {
        let Self { workspace, moves, unsynced } = self;
        for site in moves.iter().flat_map(Move::sites).chain([&workspace.home()]) {
            refuse_unfinished(site)?;
        }
        if let [single] = &moves[..]
            && let Some(done) = single.alone(gate)
        {
            return done;
        }
        let mut plan = Plan::default();
        for one in moves {
            plan.add(&workspace, one)?;
        }
        plan.commit(&workspace, unsynced, gate)
    }
}

/// An unfinished transaction may have files of these very targets in its hands.
pub(crate) fn refuse_unfinished(site: &Site) -> Result<(), Error> {
    match journal::is_present(&site.dir) {
        Ok(false) => Ok(()),
        Ok(true) => Err(Error::Unrecovered { directory: site.path.clone() }),
        Err(source) => Err(io_error("look for a journal in", &site.path)(source)),
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
            Self::Put(sealed) => sealed.identity.size + sealed.place.target.size(),
            Self::Remove(named) => named.target.size(),
            Self::Rename { from, to } => from.target.size() + to.target.size(),
        }
    }

    /// What is to be synced: the new file, and what a journal would speak of.
    fn unsynced(&mut self, has_journal: bool) -> Vec<Unsynced> {
        let old = |named: &Named| Unsynced::Old(named.path.clone(), named.site.clone(), named.target.name.clone());
        let mut files = Vec::new();
        match self {
            Self::Put(sealed) => {
                let (path, site, name) = (&sealed.path, &sealed.site, &sealed.place.target.name);
                files.extend(has_journal.then(|| Unsynced::Old(path.clone(), site.clone(), name.clone())));
                files.extend(sealed.file.take().map(|file| Unsynced::New(sealed.path.clone(), file)));
            }
            Self::Remove(named) => files.extend(has_journal.then(|| old(named))),
            Self::Rename { from, to } => files.extend([old(from), old(to)]),
        }
        files
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
    fn alone(&self, gate: &Gate) -> Option<Result<(), Error>> {
        let (path, site) = match self {
            Self::Put(sealed) => (&sealed.path, &sealed.site),
            Self::Remove(named) => (&named.path, &named.site),
            Self::Rename { .. } => return None,
        };
        let Some(passage) = gate.enter() else { return Some(Err(Error::Interrupted { path: path.to_path_buf() })) };
        let made = match self {
            // The place finds no file when it wants to remove it, which it does not mind.
            Self::Put(sealed) => site.dir.rename(&sealed.place.temp, &sealed.place.target.name),
            Self::Remove(named) => site.dir.remove(&named.target.name),
            Self::Rename { .. } => return None,
        };
        Some(made.map_err(|source| rename_error(path.to_path_buf(), source)).and_then(|()| {
            passage.done();
            site.dir.sync().map_err(|source| Error::NotDurable { path: path.to_path_buf(), source })
        }))
    }
}

/// What becomes of each name.
#[derive(Debug, Default)]
struct Plan {
    slots: Vec<Slot>,
    /// Of each slot: whether a rename took its file away, and nothing has been put there since.
    vacated: Vec<bool>,
    /// Where among the slots a name of a directory is.
    positions: HashMap<((u64, u64), OsString), usize>,
    /// The staged files, which go unless the commit comes.
    places: Vec<Place>,
    /// Last, so that the notes go after the files.
    keep: Vec<Arc<Workspace>>,
}

impl Plan {
    fn add(&mut self, workspace: &Workspace, one: Move) -> Result<(), Error> {
        match one {
            Move::Put(sealed) => {
                let Sealed { path, place, site, identity, workspace, .. } = *sealed;
                self.keep.push(workspace);
                let (name, temp) = (place.target.name.clone(), place.temp.clone());
                self.places.push(place);
                self.put(path, site, name, temp, identity)
            }
            Move::Remove(named) => {
                let temp = workspace.name(&named.site);
                self.take_away(named, temp, false).map(drop)
            }
            Move::Rename { from, to } => {
                let (source, old_name, given) = (from.site.clone(), from.target.name.clone(), from.path.clone());
                let temp = workspace.name(&from.site);
                let identity = self.take_away(from, temp, true)?;
                // The new place gets a second name of the same file, so that it is at no time without a name.
                let temp = workspace.name(&to.site);
                to.site.dir.link(&source.dir, &old_name, &temp).map_err(|source| match source.kind() {
                    io::ErrorKind::CrossesDevices => Error::OtherFileSystem { path: to.path.to_path_buf() },
                    _ => io_error("link the file", &given)(source),
                })?;
                let name = to.target.name.clone();
                self.places.push(Place {
                    target: to.target,
                    temp: temp.clone(),
                    taken: true,
                    left: Some(workspace.left.clone()),
                });
                self.put(to.path, to.site, name, temp, identity)
            }
        }
    }

    fn put(
        &mut self,
        path: Arc<Path>,
        site: Arc<Site>,
        name: OsString,
        temp: OsString,
        new: Identity,
    ) -> Result<(), Error> {
        if let Some(&position) = self.positions.get(&(site.id, name.clone())) {
            if !std::mem::take(&mut self.vacated[position]) {
                return Err(Error::RepeatedTarget { path: path.to_path_buf() });
            }
            let slot = &mut self.slots[position];
            (slot.temp, slot.new) = (temp, Some(new));
            return Ok(());
        }
        let old = Identity::of(&site.dir, &name).map_err(io_error("look at", &path))?;
        self.push(Slot::new(site, name, temp, old, Some(new)), false);
        Ok(())
    }

    /// Plans that a name loses its file, and says which one that is.
    fn take_away(&mut self, named: Named, temp: OsString, vacated: bool) -> Result<Identity, Error> {
        let Named { path, target, site } = named;
        if self.positions.contains_key(&(site.id, target.name.clone())) {
            return Err(Error::RepeatedTarget { path: path.to_path_buf() });
        }
        let found = Identity::of(&site.dir, &target.name)
            .and_then(|found| found.ok_or_else(|| io::ErrorKind::NotFound.into()))
            .map_err(io_error("find the file", &path))?;
        self.push(Slot::new(site, target.name, temp, Some(found), None), vacated);
        Ok(found)
    }

    fn push(&mut self, slot: Slot, vacated: bool) {
        self.positions.insert((slot.site.id, slot.name.clone()), self.slots.len());
        self.slots.push(slot);
        self.vacated.push(vacated);
    }

    fn commit(mut self, workspace: &Workspace, mut unsynced: Vec<Unsynced>, gate: &Gate) -> Result<(), Error> {
        // First what is put somewhere, so that a file that is renamed has its new name before it loses the old one.
        self.slots.sort_by_key(|slot| slot.new.is_none());
        journal::mark_moves(&mut self.slots);
        let home = workspace.home();
        let (draft, file) = Draft::write(workspace, &home, &self.slots)?;
        unsynced.push(Unsynced::Draft(home.clone(), file));
        // The names beside the journal are synced together with its own.
        unsynced.extend(sites(&self.slots).filter(|site| site.id != home.id).cloned().map(Unsynced::Names));
        // With that the new files are closed, and unlocked, before they become the targets.
        sync_files(unsynced)?;
        let Some(passage) = gate.enter() else { return Err(Error::Interrupted { path: home.path.clone() }) };
        draft.commit()?;
        // The commit point is passed, or will be: what was staged is now the journal's.
        self.places.iter_mut().for_each(|place| place.taken = false);
        let Err(error) = apply(&home, &self.slots) else {
            passage.done();
            // Nobody who drops the commit can change anything any more, and everything is durable.
            if let Err(_error) = forget(&home, &self.slots) {
                workspace.left.store(true, Ordering::Relaxed);
                #[cfg(feature = "tracing")]
                tracing::warn!(error = %_error, "a committed transaction is to be cleaned up by a recovery");
            }
            return Ok(());
        };
        match abort(&home, &self.slots) {
            Ok(()) => Err(error),
            Err(source) => {
                workspace.left.store(true, Ordering::Relaxed);
                // The passage stays open until here, so that a drop waits for this too.
                passage.done();
                Err(Error::Undecided { directory: home.path.clone(), source })
            }
        }
    }
}

/// A journal that is not yet committed; dropped, it is removed.
struct Draft<'a> {
    home: &'a Site,
    name: OsString,
    /// Whether there is still a file of this name.
    taken: bool,
}

impl<'a> Draft<'a> {
    /// Writes it, and leaves it to be synced.
    fn write(workspace: &Workspace, home: &'a Site, slots: &[Slot]) -> Result<(Self, File), Error> {
        let failed = || io_error("write a journal in", &home.path);
        let bytes = journal::encode(home, slots);
        if bytes.len() as u64 > journal::LIMIT_BYTES {
            return Err(failed()(io::ErrorKind::FileTooLarge.into()));
        }
        let name = workspace.draft();
        let mut file = home.dir.create(&name, 0o600).map_err(failed())?;
        let draft = Self { home, name, taken: true };
        file.write_all(&bytes).map_err(failed())?;
        Ok((draft, file))
    }

    fn commit(mut self) -> Result<(), Error> {
        let renamed = self.home.dir.rename_new(&self.name, COMMITTED.as_ref());
        let moved = renamed.map_err(io_error("commit the journal in", &self.home.path))?;
        self.taken = moved == Moved::Linked;
        Ok(())
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if self.taken {
            // What cannot be removed now is left to a recovery.
            let _left = self.home.dir.remove(&self.name);
        }
    }
}
