//! The directories of transactions, and the chains: changes of one name, or of several names between which files move.
//! It does them, undoes them, and recognises them after a crash.
//!
//! Invariant: a `Site` stays the directory that was opened, whatever happens to its path. A chain changes by steps of
//! one system call each, and the files at its names tell how many steps were made. Every step checks what it finds, if
//! necessary, and may be repeated.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::Error;
use crate::error::open_error;
use crate::platform::{Dir, Identity, Moment, Moved};

/// The suffix of a backup's hidden name, used where files cannot be exchanged.
const BACKUP_SUFFIX: &str = "b";

/// A directory that a transaction changes files in.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) dir: Arc<Dir>,
    /// Absolute and without symlinks, so that it still leads here when the process has changed its working directory.
    pub(crate) path: PathBuf,
    pub(crate) id: (u64, u64),
    /// Whether it is on an overlay, where a file in a lower layer is copied as soon as it is changed.
    pub(crate) is_layered: bool,
}

impl Site {
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let dir = Dir::open(path).map_err(|source| open_error(path, source))?;
        Self::of(Arc::new(dir), path)
    }

    /// The directory that was opened by `path`.
    pub(crate) fn of(dir: Arc<Dir>, path: &Path) -> Result<Self, Error> {
        let failed = |source| open_error(path, source);
        let (id, is_layered) = (dir.id().map_err(failed)?, dir.is_layered().map_err(failed)?);
        let canonical = std::fs::canonicalize(path).map_err(failed)?;
        // The directory was opened before its path was resolved; it may have been renamed in between.
        if Dir::open(&canonical).and_then(|dir| dir.id()).map_err(failed)? != id {
            return Err(failed(io::Error::other("it was moved while it was opened")));
        }
        Ok(Self { dir, path: canonical, id, is_layered })
    }

    /// The mark by which the directory is recognised. On an overlay it leaves out the birth time, because a copy is
    /// born later.
    pub(crate) fn mark(&self) -> io::Result<String> {
        let identity = self.dir.identity()?;
        Ok(Identity { born: identity.born.filter(|_| !self.is_layered), ..identity }.mark())
    }
}

/// A name in a directory.
#[derive(Clone, Debug)]
pub(crate) struct Spot {
    pub(crate) site: Arc<Site>,
    pub(crate) name: OsString,
}

impl Spot {
    pub(crate) fn path(&self) -> PathBuf {
        self.site.path.join(&self.name)
    }

    pub(crate) fn dir(&self) -> &Dir {
        &self.site.dir
    }

    fn identify(&self) -> io::Result<Option<Identity>> {
        self.dir().identify(&self.name)
    }

    fn remove(&self) -> io::Result<()> {
        self.dir().remove(&self.name)
    }

    /// Moves the file to the upper layer of an overlay, by giving it the name `spare` for a moment, and identifies it.
    pub(crate) fn lift(&self, spare: &OsStr) -> io::Result<Option<Identity>> {
        let dir = self.dir();
        match dir.link(dir, &self.name, spare) {
            Ok(()) => {
                dir.remove(spare)?;
                self.identify()
            }
            // The system may forbid links to other users' files. The file's copy will keep the number, unless the file
            // has several names.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                match dir.look(&self.name)? {
                    Some(entry) if entry.links > 1 => return Err(error),
                    _ => {}
                }
                Ok(self.identify()?.map(|found| Identity { born: None, ..found }))
            }
            Err(error) => Err(error),
        }
    }
}

/// Names whose files change places. Step `i` exchanges what the carrier has with what is at `names[i - 1]`.
///
/// | change | carrier | names | files |
/// |---|---|---|---|
/// | put a new file | hidden, the new file | the target | new; old or none |
/// | remove | hidden, nothing | the target | none; old |
/// | rename over a file | hidden, nothing | from, to | none; the moved one; old |
/// | rotate two logs and begin a third | hidden, the new file | `log`, `log.1` | new; `log`; `log.1` or none |
/// | rename to a free name | from | to | the moved one; none |
/// | swap | one | the other | one; the other |
#[derive(Debug)]
pub(crate) struct Chain {
    pub(crate) carrier: Spot,
    /// The transaction's own name beside the first name. It is the carrier's name, unless the carrier is itself a
    /// target.
    pub(crate) hidden: OsString,
    pub(crate) names: Vec<Spot>,
    /// The file of the carrier before the first step, then the file of each name; one more than there are names.
    pub(crate) files: Vec<Option<Identity>>,
}

/// How many steps of a chain are made, and how many there should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Way {
    pub(crate) from: usize,
    pub(crate) to: usize,
}

/// The state to which to bring a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Aim {
    Forward,
    Back,
}

/// How to recognise the files of a journal.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Trust {
    /// The journal is where it was written, and so are the files: they have the recorded inode numbers.
    Numbers {
        /// A file modified later is not the one that the journal names.
        written: Moment,
    },
    /// The journal was copied, together with its files: they have the recorded sizes and times.
    Times,
}

impl Chain {
    pub(crate) fn steps(&self) -> usize {
        self.names.len()
    }

    /// Whether the carrier's name is not a target, so that its file is removed at the end.
    pub(crate) fn is_hidden(&self) -> bool {
        self.carrier.name == self.hidden
    }

    pub(crate) fn spots(&self) -> impl Iterator<Item = &Spot> {
        std::iter::once(&self.carrier).chain(&self.names)
    }

    /// The path that stands for the whole chain in a message.
    pub(crate) fn path(&self) -> PathBuf {
        self.names.first().map_or_else(|| self.carrier.path(), Spot::path)
    }

    /// Makes step `number`, counted from 1, on the assumption that everything is as planned.
    pub(crate) fn step(&self, number: usize) -> io::Result<()> {
        let name = &self.names[number - 1];
        match (&self.files[number - 1], &self.files[number]) {
            (Some(_), Some(_)) => self.swap(name),
            (Some(_), None) => move_new(&self.carrier, name),
            (None, Some(_)) => move_new(name, &self.carrier),
            (None, None) => Ok(()),
        }
    }

    /// Makes or undoes step `number`, whatever it finds: an exchange is its own inverse.
    pub(crate) fn shift(&self, number: usize) -> io::Result<()> {
        let name = &self.names[number - 1];
        match (self.carrier.identify()?.is_some(), name.identify()?.is_some()) {
            (true, true) => self.swap(name),
            (true, false) => move_new(&self.carrier, name),
            (false, true) => move_new(name, &self.carrier),
            (false, false) => Ok(()),
        }
    }

    fn swap(&self, name: &Spot) -> io::Result<()> {
        let (carrier, backup) = (&self.carrier, self.backup());
        if carrier.dir().exchange(&carrier.name, name.dir(), &name.name)? {
            return Ok(());
        }
        // Several calls instead of one. At every moment between them, each target has its old or its new file.
        backup.dir().link(name.dir(), &name.name, &backup.name)?;
        if self.is_hidden() {
            carrier.dir().move_over(&carrier.name, name.dir(), &name.name)?;
            return backup.dir().move_over(&backup.name, carrier.dir(), &carrier.name);
        }
        let second = self.second();
        second.dir().link(carrier.dir(), &carrier.name, &second.name)?;
        backup.dir().move_over(&backup.name, carrier.dir(), &carrier.name)?;
        second.dir().move_over(&second.name, name.dir(), &name.name)
    }

    /// A second name of the carrier's file, if the carrier is itself a target, while files are exchanged by links.
    fn second(&self) -> Spot {
        Spot { site: self.carrier.site.clone(), name: self.hidden.clone() }
    }

    fn backup(&self) -> Spot {
        let mut name = self.hidden.clone();
        name.push(BACKUP_SUFFIX);
        Spot { site: self.carrier.site.clone(), name }
    }

    /// Finds out how far this chain is and where to bring it, and touches nothing. The inner error names a file that
    /// cannot be identified, or should not be touched.
    pub(crate) fn judge(&self, trust: Trust, aim: Aim) -> io::Result<Result<Way, PathBuf>> {
        let seen = self.look()?;
        let from = match trust {
            Trust::Numbers { .. } => seen.made(&self.files, aim),
            Trust::Times => seen.made_of_copies(&self.files),
        };
        let Some(from) = from else { return Ok(Err(self.path())) };
        let obstacle = match (aim, trust) {
            (Aim::Forward, Trust::Numbers { written }) => self.before_going_forward(&seen, from, written),
            (Aim::Back, Trust::Numbers { written }) => self.before_going_back(&seen, from, written),
            // Everything is exactly as recorded; otherwise the number of steps could not have been told.
            (_, Trust::Times) => Ok(match aim {
                Aim::Forward => self.steps(),
                Aim::Back => 0,
            }),
        };
        // A carrier that is itself a target, and has a foreign file, cannot carry ours.
        let is_ours = self.is_hidden()
            || matches!((seen.carried, self.files[from]), (Some(found), Some(file)) if found.is(&file));
        let is_free = seen.carried.is_none() && self.files[from].is_none();
        Ok(match obstacle {
            Ok(to) if from != to && !is_ours && !is_free && matches!(trust, Trust::Numbers { .. }) => {
                Err(self.carrier.path())
            }
            other => other.map(|to| Way { from, to }),
        })
    }

    /// The files at the names, as if no step had been cut short.
    fn look(&self) -> io::Result<Seen> {
        let mut carried = self.carrier.identify()?;
        let mut held = self.names.iter().map(Spot::identify).collect::<io::Result<Vec<_>>>()?;
        if !self.is_hidden() {
            // In a swap without an exchange call, only the last call counts.
            carried = self.second().identify()?.or(carried);
        } else if carried.is_none() {
            // Between its second and its third step.
            carried = self.backup().identify()?;
        }
        // A file with two names was being moved by a link.
        if let Some(found) = carried
            && let Some(double) = held.iter().position(|held| held.is_some_and(|held| held.is(&found)))
        {
            match self.half_moved(double) {
                Some(Half::ToCarrier) => carried = None,
                Some(Half::ToName) => held[double] = None,
                // Two names of one file are to change places.
                None => {}
            }
        }
        Ok(Seen { carried, held })
    }

    /// Checks that the next steps overwrite only files that were to be replaced.
    fn before_going_forward(&self, seen: &Seen, from: usize, written: Moment) -> Result<usize, PathBuf> {
        let last = self.steps();
        for number in from + 1..=last {
            let name = &self.names[number - 1];
            // A file that has been moved away is not overwritten.
            let Some(found) = seen.held[number - 1] else { continue };
            let is_lost = number == last && self.is_hidden();
            if !self.files[number].is_some_and(|file| found.is(&file) && !(is_lost && file.is_older(&found, written))) {
                return Err(name.path());
            }
        }
        Ok(last)
    }

    /// Checks that going back removes only files that had been staged.
    fn before_going_back(&self, seen: &Seen, from: usize, written: Moment) -> Result<usize, PathBuf> {
        for number in (1..=from).rev() {
            let name = &self.names[number - 1];
            let Some(found) = seen.held[number - 1] else { continue };
            let is_lost = number == 1 && self.is_hidden();
            match self.files[number - 1] {
                Some(file) if found.is(&file) && !(is_lost && file.is_older(&found, written)) => {}
                // If another program has replaced an applied file, that is the last write, and it stays.
                known if self.steps() == 1 && !known.is_some_and(|file| found.is(&file)) => return Ok(from),
                _ => return Err(name.path()),
            }
        }
        // The old file of the last name is gone, so it cannot be put back.
        let is_gone = from > 0 && seen.carried.is_none() && self.files[from].is_some();
        if is_gone { Err(self.path()) } else { Ok(0) }
    }

    /// Removes what an interrupted step has left over, so that every step can be made again.
    pub(crate) fn settle(&self) -> io::Result<()> {
        let (carrier, backup) = (&self.carrier, self.backup());
        if !self.is_hidden() && self.second().identify()?.is_some() {
            let second = self.second();
            second.dir().move_over(&second.name, carrier.dir(), &carrier.name)?;
            // Renaming a file over another name of the same file does nothing.
            ignore_missing(second.remove())?;
        }
        if backup.identify()?.is_some() {
            match carrier.identify()? {
                Some(_) => backup.remove()?,
                None => backup.dir().move_over(&backup.name, carrier.dir(), &carrier.name)?,
            }
        }
        let Some(found) = carrier.identify()? else { return Ok(()) };
        for (position, name) in self.names.iter().enumerate() {
            if name.identify()?.is_some_and(|held| held.is(&found)) {
                // Half moved by a link: it keeps the name that it had before.
                return match self.half_moved(position) {
                    Some(Half::ToCarrier) => carrier.remove(),
                    Some(Half::ToName) => name.remove(),
                    None => Ok(()),
                };
            }
        }
        Ok(())
    }

    /// In which direction a file was moving that both the carrier and this name have.
    fn half_moved(&self, position: usize) -> Option<Half> {
        if position == 0 && self.files[0].is_none() {
            return Some(Half::ToCarrier);
        }
        self.files[position + 1].is_none().then_some(Half::ToName)
    }

    /// Removes the file of the hidden name at the end.
    pub(crate) fn clear(&self) -> io::Result<()> {
        if !self.is_hidden() {
            return Ok(());
        }
        ignore_missing(self.carrier.remove())
    }
}

fn ignore_missing(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn move_new(from: &Spot, to: &Spot) -> io::Result<()> {
    match from.dir().move_new(&from.name, to.dir(), &to.name)? {
        Moved::Renamed => Ok(()),
        Moved::Linked => from.remove(),
    }
}

/// An unfinished move by a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Half {
    ToCarrier,
    ToName,
}

/// The files at the names of a chain.
struct Seen {
    carried: Option<Identity>,
    held: Vec<Option<Identity>>,
}

impl Seen {
    /// How many steps were made, if the inode numbers of the files tell that.
    fn made(&self, files: &[Option<Identity>], aim: Aim) -> Option<usize> {
        let steps = self.held.len();
        let is = |found: &Option<Identity>, file: &Option<Identity>| {
            found.zip(*file).is_some_and(|(found, file)| found.is(&file))
        };
        if self.carried.is_some()
            && let Some(position) = files.iter().position(|file| is(&self.carried, file))
        {
            return Some(position);
        }
        let reached = (1..=steps).rev().find(|&number| is(&self.held[number - 1], &files[number - 1]));
        let is_untouched = |number: usize| is(&self.held[number - 1], &files[number]);
        if self.carried.is_some() {
            // A foreign file was at the target's place when the step was made.
            return reached.or((steps == 1 && files[0].is_some() && !is_untouched(1)).then_some(1));
        }
        if files[0].is_none() && is_untouched(1) {
            return Some(0);
        }
        // The staged file was removed before it came to its place, or the new file is nowhere.
        let is_old =
            (1..=steps).all(|number| is_untouched(number) || (self.held[number - 1], files[number]) == (None, None));
        let is_nowhere = files[0].is_some() && reached.is_none() && self.held[0].is_none();
        if is_old || is_nowhere {
            return (aim == Aim::Back && is_old).then_some(0);
        }
        // Everything is done and cleared, unless a file is still where it was.
        (!(1..=steps).any(is_untouched)).then_some(steps)
    }

    /// How many steps were made, if everything except the inode numbers is exactly as recorded.
    fn made_of_copies(&self, files: &[Option<Identity>]) -> Option<usize> {
        let steps = self.held.len();
        let is = |found: &Option<Identity>, file: &Option<Identity>| match (found, file) {
            (Some(found), Some(file)) => found.is_copy_of(file),
            (None, None) => true,
            _ => false,
        };
        let are_held = |made: usize| {
            (1..=steps).all(|number| {
                let file = if number <= made { &files[number - 1] } else { &files[number] };
                is(&self.held[number - 1], file)
            })
        };
        let mut matching = (0..=steps).filter(|&made| {
            let is_cleared = made == steps && self.carried.is_none();
            are_held(made) && (is_cleared || is(&self.carried, &files[made]))
        });
        let made = matching.next()?;
        // Files that cannot be told apart prove nothing.
        matching.next().is_none().then_some(made)
    }
}

impl Identity {
    /// Whether it is the same file, even if it was written to meanwhile.
    fn is(&self, other: &Self) -> bool {
        let is_born_together = self.born.zip(other.born).is_none_or(|(one, other)| one == other);
        self.inode == other.inode && is_born_together
    }

    /// Whether `found`, which is the same file, has been written to since the journal was `written`.
    fn is_older(&self, found: &Self, written: Moment) -> bool {
        found.modified > self.modified.max(written)
    }

    /// Whether it looks like a copy of `file`, which is elsewhere or was here before.
    fn is_copy_of(&self, file: &Self) -> bool {
        let (seconds, fraction) = self.modified;
        // Some archives and file systems keep only seconds, and some only every other second.
        let is_near = fraction == 0 && (0..2).contains(&(file.modified.0 - seconds));
        self.size == file.size && (self.modified == file.modified || is_near)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITTEN: Moment = (100, 0);

    fn file(number: u64) -> Option<Identity> {
        (number > 0).then_some(Identity { inode: number, born: Some((7, 0)), size: 1, modified: (50, 0) })
    }

    fn written_later(number: u64) -> Option<Identity> {
        file(number).map(|file| Identity { modified: (101, 0), ..file })
    }

    fn files(numbers: &[u64]) -> Vec<Option<Identity>> {
        numbers.iter().copied().map(file).collect()
    }

    fn seen(carried: Option<Identity>, held: &[Option<Identity>]) -> Seen {
        Seen { carried, held: held.to_vec() }
    }

    /// A chain whose carrier is hidden, or a name like the others.
    fn chain(numbers: &[u64], is_hidden: bool) -> Chain {
        let site = Arc::new(Site::open(Path::new(".")).expect("it is there"));
        let spot = |name: String| Spot { site: site.clone(), name: name.into() };
        let carrier = spot(if is_hidden { "hidden".to_owned() } else { "carrier".to_owned() });
        let names = (1..numbers.len()).map(|number| spot(number.to_string())).collect();
        Chain { carrier, hidden: "hidden".into(), names, files: files(numbers) }
    }

    /// 1 is the new file, 2 the old one, 3 a moved one, 9 a foreign one; 0 is none.
    #[test]
    fn how_many_steps_were_made_is_told_from_what_lies_by_the_names() {
        let (forward, back) = (&[Aim::Forward][..], &[Aim::Back][..]);
        let both = &[Aim::Forward, Aim::Back][..];
        type Case<'a> = (&'a [u64], u64, &'a [u64], &'a [Aim], Option<usize>);
        let cases: [Case<'_>; 24] = [
            // A put over a file.
            (&[1, 2], 1, &[2], both, Some(0)),
            (&[1, 2], 2, &[1], both, Some(1)),
            (&[1, 2], 0, &[1], both, Some(1)),
            (&[1, 2], 2, &[9], both, Some(1)),
            (&[1, 2], 0, &[9], both, Some(1)),
            // A foreign file was exchanged.
            (&[1, 2], 9, &[1], both, Some(1)),
            (&[1, 2], 9, &[9], both, Some(1)),
            // The staged file is missing, and the old file is there.
            (&[1, 2], 9, &[2], both, None),
            (&[1, 2], 0, &[2], forward, None),
            (&[1, 2], 0, &[2], back, Some(0)),
            (&[1, 2], 0, &[0], both, None),
            // A put to a free name.
            (&[1, 0], 1, &[0], both, Some(0)),
            (&[1, 0], 0, &[1], both, Some(1)),
            (&[1, 0], 0, &[0], forward, None),
            (&[1, 0], 0, &[0], back, Some(0)),
            // A removal.
            (&[0, 2], 0, &[2], both, Some(0)),
            (&[0, 2], 2, &[0], both, Some(1)),
            (&[0, 2], 0, &[0], both, Some(1)),
            (&[0, 2], 0, &[9], both, Some(1)),
            // A rename over a file.
            (&[0, 3, 2], 0, &[3, 2], both, Some(0)),
            (&[0, 3, 2], 3, &[0, 2], both, Some(1)),
            (&[0, 3, 2], 2, &[0, 3], both, Some(2)),
            (&[0, 3, 2], 0, &[0, 3], both, Some(2)),
            // The moved file is nowhere, and the old one where it was.
            (&[0, 3, 2], 0, &[0, 2], both, None),
        ];
        for (planned, carried, held, aims, wanted) in cases {
            for &aim in aims {
                let made = seen(file(carried), &files(held)).made(&files(planned), aim);
                assert_eq!(made, wanted, "{planned:?}: {carried} {held:?} {aim:?}");
            }
        }
    }

    #[test]
    fn nothing_is_overwritten_that_is_not_what_was_to_be_replaced() {
        let forward = |numbers: &[u64], is_hidden, held: &[Option<Identity>], from| {
            chain(numbers, is_hidden).before_going_forward(&seen(None, held), from, WRITTEN).ok()
        };
        assert_eq!(forward(&[1, 2], true, &[file(2)], 0), Some(1));
        assert_eq!(forward(&[1, 2], true, &[None], 0), Some(1));
        assert_eq!(forward(&[1, 2], true, &[file(9)], 0), None);
        assert_eq!(forward(&[1, 2], true, &[written_later(2)], 0), None);
        // One that only gets another name may be written to meanwhile.
        assert_eq!(forward(&[2, 3], false, &[written_later(3)], 0), Some(1));
        assert_eq!(forward(&[0, 3, 2], true, &[written_later(3), file(2)], 0), Some(2));
        assert_eq!(forward(&[0, 3, 2], true, &[file(3), written_later(2)], 0), None);
    }

    #[test]
    fn nothing_is_removed_that_is_not_what_was_staged() {
        let back = |numbers: &[u64], is_hidden, carried, held: &[Option<Identity>], from| {
            chain(numbers, is_hidden).before_going_back(&seen(carried, held), from, WRITTEN).ok()
        };
        assert_eq!(back(&[1, 2], true, file(2), &[file(1)], 1), Some(0));
        assert_eq!(back(&[1, 2], true, file(2), &[None], 1), Some(0));
        // A foreign file is the last write; and our file was written to since.
        assert_eq!(back(&[1, 2], true, file(2), &[file(9)], 1), Some(1));
        assert_eq!(back(&[1, 2], true, file(2), &[written_later(1)], 1), None);
        assert_eq!(back(&[2, 3], false, file(3), &[written_later(2)], 1), Some(0));
        // The old file is gone.
        assert_eq!(back(&[1, 2], true, None, &[file(1)], 1), None);
        assert_eq!(back(&[1, 0], true, None, &[file(1)], 1), Some(0));
        // None of several steps can be left out.
        assert_eq!(back(&[0, 3, 2], true, file(2), &[None, file(3)], 2), Some(0));
        assert_eq!(back(&[0, 3, 2], true, file(2), &[None, file(9)], 2), None);
    }
}
