//! The redo journal: what a transaction replaces by what, how that is done and undone, and what a crash left of it.
//!
//! Invariant: from its rename to its committed name until its durable removal, a journal is enough to finish the
//! transaction or to undo it; every step looks at what is there, so that it may be repeated.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3Default;

use crate::Error;
use crate::platform::{Dir, Entry, Kind, Moved};
use crate::staged::io_error;
use crate::workspace::Site;

/// The journal once its transaction is committed. One a directory, since commits there wait for each other.
pub(crate) const COMMITTED: &str = ".afs-journal";
/// The same journal once its transaction is being undone.
pub(crate) const ABORTING: &str = ".afs-journal-aborting";
/// What a file's backup adds to its temporary name, where files cannot be exchanged.
const BACKUP_SUFFIX: &str = "b";
const MAGIC: &[u8; 8] = b"afs-tx1\n";
/// No journal is larger than this; it takes more than 100,000 files of long names to get there.
pub(crate) const LIMIT_BYTES: u64 = 64 << 20;

/// By what a file is known again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) inode: u64,
    pub(crate) size: u64,
    /// Of the content, or of where a symlink leads; `None` if we may not read it.
    pub(crate) digest: Option<u128>,
}

impl Identity {
    /// Looks at the file `name`; `None` if there is none.
    pub(crate) fn of(dir: &Dir, name: &OsStr) -> io::Result<Option<Self>> {
        let Some(entry) = dir.look(name)? else { return Ok(None) };
        let known = match entry.kind {
            Kind::File => Self::of_file(dir, name),
            Kind::Symlink => {
                dir.read_link(name).map(|link| Self::new(&entry, Some(digest(link.as_os_str().as_bytes()))))
            }
            Kind::Other(_) => return Err(io::ErrorKind::IsADirectory.into()),
        };
        match known {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(Some(Self::new(&entry, None))),
            // Somebody has removed it since it was looked at.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some),
        }
    }

    /// All of it from one opening, since by its name another file might be found in between.
    fn of_file(dir: &Dir, name: &OsStr) -> io::Result<Self> {
        let mut file = dir.read(name)?;
        let digest = digest_file(&mut file)?;
        Ok(Self::new(&Entry::of(&file)?, Some(digest)))
    }

    fn new(entry: &Entry, digest: Option<u128>) -> Self {
        Self { inode: entry.id.1, size: entry.size, digest }
    }

    fn same_content(&self, other: &Self) -> bool {
        self.size == other.size && self.digest.is_some() && self.digest == other.digest
    }

    fn same_inode(&self, other: &Self) -> bool {
        self.inode == other.inode && self.size == other.size
    }

    /// The same as far as one can tell without the content.
    fn same_unread(&self, other: &Self) -> bool {
        self.same_inode(other) && (self.digest.is_none() || other.digest.is_none())
    }
}

pub(crate) fn digest(bytes: &[u8]) -> u128 {
    xxhash_rust::xxh3::xxh3_128(bytes)
}

fn digest_file(file: &mut File) -> io::Result<u128> {
    let mut hasher = Xxh3Default::new();
    let mut buffer = vec![0; 128 << 10];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hasher.digest128()),
            Ok(length) => hasher.update(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// One name that a transaction changes.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) site: Arc<Site>,
    pub(crate) name: OsString,
    /// Beside it: first the new file, and once the slot is applied the old one.
    pub(crate) temp: OsString,
    pub(crate) old: Option<Identity>,
    pub(crate) new: Option<Identity>,
    /// Whether the old file gets another name.
    moved_out: bool,
    /// Whether the new file had another name.
    moved_in: bool,
}

/// Notes which files are moved from one name to another.
pub(crate) fn mark_moves(slots: &mut [Slot]) {
    let inodes = |known: fn(&Slot) -> Option<Identity>| -> HashSet<u64> {
        slots.iter().filter_map(known).map(|known| known.inode).collect()
    };
    // A file that was staged is none that was there.
    let (old, new) = (inodes(|slot| slot.old), inodes(|slot| slot.new));
    for slot in slots {
        slot.moved_out = slot.old.is_some_and(|known| new.contains(&known.inode));
        slot.moved_in = slot.new.is_some_and(|known| old.contains(&known.inode));
    }
}

/// How far a slot has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    Before,
    /// Not applied, and somebody else has changed the target since.
    BeforeChanged,
    After,
    /// Applied, and somebody else has changed the target since, or removed it.
    AfterChanged,
    /// Applied, and somebody else has put another file there since, which is the last write.
    AfterReplaced,
    /// The target has the new content, and so has the temporary name. If both were the same from the beginning, and a
    /// backup was restored, nothing tells whether it was applied; and nothing need be done.
    Same,
    Unknown,
}

/// What was found by a name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    Old,
    New,
    /// The new file, written to in place since.
    Altered,
    Other,
    Nothing,
}

impl Slot {
    pub(crate) fn new(
        site: Arc<Site>,
        name: OsString,
        temp: OsString,
        old: Option<Identity>,
        new: Option<Identity>,
    ) -> Self {
        Self { site, name, temp, old, new, moved_out: false, moved_in: false }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.site.path.join(&self.name)
    }

    /// Puts the new file in place, or takes the old one away; the temporary name then holds the old one.
    pub(crate) fn apply(&self) -> io::Result<()> {
        match (&self.old, &self.new) {
            (Some(_), Some(_)) => self.swap(),
            (None, _) => self.move_new(&self.temp, &self.name),
            (Some(_), None) => self.move_new(&self.name, &self.temp),
        }
    }

    /// The reverse of [`apply`](Self::apply).
    pub(crate) fn undo(&self) -> io::Result<()> {
        match (&self.old, &self.new) {
            (Some(_), Some(_)) => self.swap(),
            (None, _) => self.move_new(&self.name, &self.temp),
            (Some(_), None) => self.move_new(&self.temp, &self.name),
        }
    }

    fn swap(&self) -> io::Result<()> {
        let dir = &self.site.dir;
        if dir.exchange(&self.temp, &self.name)? {
            return Ok(());
        }
        // Three steps instead of one, and at each of them the target's name has a file: the old, or the new.
        let backup = self.backup();
        dir.link(dir, &self.name, &backup)?;
        dir.rename(&self.temp, &self.name)?;
        dir.rename(&backup, &self.temp)
    }

    fn move_new(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        match self.site.dir.rename_new(from, to)? {
            Moved::Renamed => Ok(()),
            Moved::Linked => self.site.dir.remove(from),
        }
    }

    fn backup(&self) -> OsString {
        let mut name = self.temp.clone();
        name.push(BACKUP_SUFFIX);
        name
    }

    /// Finds out how far this slot has come, and touches nothing.
    pub(crate) fn progress(&self) -> io::Result<Progress> {
        let mut temp = self.see(&self.temp)?;
        let name = self.see(&self.name)?;
        if temp == Seen::Nothing {
            // Between the second and the third step of a swap without an exchange.
            temp = self.see(&self.backup())?;
        }
        if let (Some(old), Some(new)) = (&self.old, &self.new)
            && old.same_inode(new)
        {
            // Two names of one file: to exchange them is nothing, as often as one likes.
            return Ok(if name == Seen::Nothing { Progress::Unknown } else { Progress::Before });
        }
        Ok(match (&self.old, &self.new) {
            (None, None) => Progress::Unknown,
            (_, Some(_)) => match (temp, name) {
                // The old file comes to the temporary name in no other way.
                (Seen::Old, Seen::New) => Progress::After,
                (Seen::Old, Seen::Other) => Progress::AfterReplaced,
                (Seen::Old, _) => Progress::AfterChanged,
                (Seen::New, Seen::Old) => Progress::Before,
                (Seen::New, Seen::Nothing) if self.old.is_none() => Progress::Before,
                // A link of the new file, made where files can neither be exchanged nor moved to a free name.
                (Seen::New, Seen::New) if self.old.is_none() => Progress::Before,
                (Seen::New, Seen::New) => Progress::Same,
                (Seen::New, _) => Progress::BeforeChanged,
                // Whatever was replaced, if it was not what was expected: the last one to rename wins.
                (_, Seen::New) => Progress::After,
                // A file that was created has no old one to leave at the temporary name.
                (Seen::Nothing, Seen::Other) if self.old.is_none() => Progress::AfterReplaced,
                // Nor has one whose old file was already freed when a power cut brought the journal back.
                (Seen::Nothing, Seen::Altered) => Progress::AfterChanged,
                // Both are gone, with their directory most likely: there is nothing left to finish, nor to undo.
                (Seen::Nothing, Seen::Nothing) => Progress::BeforeChanged,
                _ => Progress::Unknown,
            },
            (Some(_), None) => match (temp, name) {
                (Seen::Old, Seen::Nothing) | (Seen::Nothing, Seen::Nothing) => Progress::After,
                // The same file, moved half-way by a link; or one like it, that somebody else has made.
                (Seen::Old, Seen::Old) if !self.is_one_file()? => Progress::AfterReplaced,
                (Seen::Old, Seen::Old) | (Seen::Nothing, Seen::Old) => Progress::Before,
                (Seen::Old, _) => Progress::AfterReplaced,
                (Seen::Nothing, _) => Progress::BeforeChanged,
                _ => Progress::Unknown,
            },
        })
    }

    /// Whether both names are of one file.
    fn is_one_file(&self) -> io::Result<bool> {
        let (temp, name) = (self.site.dir.look(&self.temp)?, self.site.dir.look(&self.name)?);
        Ok(temp.zip(name).is_some_and(|(temp, name)| temp.id == name.id))
    }

    /// Removes what a step that was cut short has left over, so that every step can be taken again.
    pub(crate) fn settle(&self) -> io::Result<()> {
        let (dir, backup) = (&self.site.dir, self.backup());
        if dir.look(&backup)?.is_some() {
            match dir.look(&self.temp)? {
                Some(_) => dir.remove(&backup)?,
                None => dir.rename(&backup, &self.temp)?,
            }
        }
        // A file that has both names was being moved by a link, and is moved anew.
        let (temp, name) = (dir.look(&self.temp)?, dir.look(&self.name)?);
        match (temp, name) {
            (Some(temp), Some(name)) if temp.id == name.id && self.old.is_none() => dir.remove(&self.name),
            (Some(temp), Some(name)) if temp.id == name.id && self.new.is_none() => dir.remove(&self.temp),
            _ => Ok(()),
        }
    }

    /// Removes what the temporary name holds at the end.
    pub(crate) fn clear(&self) -> io::Result<()> {
        match self.site.dir.remove(&self.temp) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn see(&self, name: &OsStr) -> io::Result<Seen> {
        let found = match Identity::of(&self.site.dir, name) {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(Seen::Nothing),
            // A directory, most likely made by hand.
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => return Ok(Seen::Other),
            Err(error) => return Err(error),
        };
        let matches = |test: fn(&Identity, &Identity) -> bool| {
            let is = |known: &Option<Identity>| known.as_ref().is_some_and(|known| test(&found, known));
            (is(&self.old), is(&self.new))
        };
        // The number alone is enough for a file that keeps a name of ours all the time, so that it cannot be given anew:
        // one that is moved, whoever goes on writing to it; and the old one, once it is here.
        let by_number = |known: &Option<Identity>, is_kept: bool| {
            known.is_some_and(|known| found.same_unread(&known) || (is_kept && found.inode == known.inode))
        };
        // Otherwise the content comes first: a number may be that of another file, since it is given anew as soon as a
        // file is gone, or of a file that was changed in place. It decides where the contents are the same.
        Ok(match (matches(Identity::same_content), matches(Identity::same_inode)) {
            ((true, false), _) | ((true, true), (true, _)) => Seen::Old,
            ((false, true), _) | ((true, true), _) => Seen::New,
            _ if by_number(&self.old, self.moved_out || name != self.name) => Seen::Old,
            _ if by_number(&self.new, self.moved_in) => Seen::New,
            _ if self.new.as_ref().is_some_and(|new| new.inode == found.inode) => Seen::Altered,
            _ => Seen::Other,
        })
    }
}

/// Writes the slots down.
pub(crate) fn encode(home: &Site, slots: &[Slot]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    put_number(&mut out, slots.len() as u64);
    for slot in slots {
        // Files beside the journal are named relative to it, so that a directory may be moved with its journal.
        let local = slot.site.id == home.id;
        put_bytes(&mut out, if local { b"" } else { slot.site.path.as_os_str().as_bytes() });
        put_bytes(&mut out, slot.name.as_bytes());
        put_bytes(&mut out, slot.temp.as_bytes());
        for identity in [&slot.old, &slot.new] {
            let Some(identity) = identity else {
                out.push(0);
                continue;
            };
            out.push(if identity.digest.is_some() { 2 } else { 1 });
            put_number(&mut out, identity.inode);
            put_number(&mut out, identity.size);
            out.extend_from_slice(&identity.digest.unwrap_or_default().to_le_bytes());
        }
    }
    let sum = crc32c::crc32c(&out);
    out.extend_from_slice(&sum.to_le_bytes());
    out
}

fn put_number(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(&number.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_number(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// A slot as it was written down; its directory is empty if it is the journal's.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) directory: PathBuf,
    pub(crate) name: OsString,
    pub(crate) temp: OsString,
    pub(crate) old: Option<Identity>,
    pub(crate) new: Option<Identity>,
}

/// A journal that a crash left.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) name: &'static str,
    pub(crate) lines: Vec<Line>,
}

/// Whether there is a journal in `dir`.
pub(crate) fn is_present(dir: &Dir) -> io::Result<bool> {
    Ok(dir.look(COMMITTED.as_ref())?.is_some() || dir.look(ABORTING.as_ref())?.is_some())
}

/// Reads the journal of `home`, if there is one.
pub(crate) fn find(home: &Site) -> Result<Option<Found>, Error> {
    let mut found = None;
    for name in [ABORTING, COMMITTED] {
        let path = home.path.join(name);
        let corrupt = |reason| Error::CorruptJournal { journal: path.clone(), reason };
        match home.dir.look(name.as_ref()).map_err(io_error("look for the journal", &path))? {
            None => continue,
            Some(Entry { kind: Kind::File, .. }) => {}
            Some(_) => return Err(corrupt("it is not a regular file")),
        }
        let file = match home.dir.read(name.as_ref()) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(io_error("open the journal", &path)(error)),
        };
        if found.is_some() {
            return Err(corrupt("there are two journals"));
        }
        let mut bytes = Vec::new();
        file.take(LIMIT_BYTES + 1).read_to_end(&mut bytes).map_err(io_error("read the journal", &path))?;
        let lines = decode(&bytes).map_err(corrupt)?;
        found = Some(Found { name, lines });
    }
    Ok(found)
}

fn decode(bytes: &[u8]) -> Result<Vec<Line>, &'static str> {
    if bytes.len() as u64 > LIMIT_BYTES {
        return Err("it is too long");
    }
    let (body, sum) = bytes.split_last_chunk::<4>().ok_or("it is too short")?;
    if crc32c::crc32c(body) != u32::from_le_bytes(*sum) {
        return Err("its checksum is wrong");
    }
    let mut rest = body.strip_prefix(MAGIC).ok_or("it is of another version")?;
    let count = take_number(&mut rest).ok_or("it is cut off")?;
    // Not allocated in advance: each line is far longer than one byte, but the number may be anything.
    let lines = (0..count).map(|_| take_line(&mut rest)).collect::<Option<Vec<_>>>().ok_or("it is cut off")?;
    if !rest.is_empty() {
        return Err("it goes on behind its end");
    }
    let is_name = |name: &OsStr| Path::new(name).file_name() == Some(name);
    let is_sound =
        |line: &Line| is_name(&line.name) && is_name(&line.temp) && (line.old.is_some() || line.new.is_some());
    lines.iter().all(is_sound).then_some(lines).ok_or("it names what is no file")
}

fn take<'a>(rest: &mut &'a [u8], length: u64) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(usize::try_from(length).ok()?)?;
    *rest = left;
    Some(taken)
}

fn take_number(rest: &mut &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(take(rest, 8)?.try_into().ok()?))
}

fn take_name(rest: &mut &[u8]) -> Option<OsString> {
    let length = take_number(rest)?;
    Some(OsString::from_vec(take(rest, length)?.to_vec()))
}

fn take_line(rest: &mut &[u8]) -> Option<Line> {
    let directory = take_name(rest)?.into();
    let (name, temp) = (take_name(rest)?, take_name(rest)?);
    Some(Line { directory, name, temp, old: take_identity(rest)?, new: take_identity(rest)? })
}

fn take_identity(rest: &mut &[u8]) -> Option<Option<Identity>> {
    let kind = take(rest, 1)?[0];
    if kind == 0 {
        return Some(None);
    }
    let (inode, size) = (take_number(rest)?, take_number(rest)?);
    let digest = u128::from_le_bytes(take(rest, 16)?.try_into().ok()?);
    match kind {
        1 => Some(Some(Identity { inode, size, digest: None })),
        2 => Some(Some(Identity { inode, size, digest: Some(digest) })),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
