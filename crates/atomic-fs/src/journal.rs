//! Writing, finding and reading the journal, which says what a transaction changes, and the pointers to it in the other
//! directories that take part.
//!
//! Invariant: directories are named relative to the record's own, so that a tree may be moved or copied; no input makes
//! the reader panic, and what it does not understand it refuses.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use crate::chain::{Chain, Site, Spot, Trust};
use crate::error::io_error;
use crate::names::{COMMITTED, POINTER, PREPARED, Tag, is_name, is_reserved};
use crate::platform::{Dir, Entry, Identity, Kind, Moment, Moved};
use crate::{Durability, Error};

const MAGIC: &[u8; 8] = b"afs-tx2\n";
/// The magic of the previous version, whose journals name directories by absolute paths.
const FORMER_MAGIC: &[u8; 8] = b"afs-tx1\n";
/// No journal is larger than this. It would take more than 100,000 files with long names.
pub(crate) const LIMIT_BYTES: u64 = 64 << 20;

/// The content of a journal.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) tag: Tag,
    /// The mark that shows whether the journal is still where it was written.
    own: (u64, Option<Moment>),
    written: Moment,
    /// The directories, relative to the journal's, which is the empty path.
    pub(crate) sites: Vec<PathBuf>,
    pub(crate) chains: Vec<Line>,
}

/// A chain as recorded.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) carrier: Name,
    pub(crate) hidden: OsString,
    pub(crate) names: Vec<Name>,
    pub(crate) files: Vec<Option<Identity>>,
}

/// A name in one of the directories of the record.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Name {
    pub(crate) site: usize,
    pub(crate) name: OsString,
}

/// A journal that a crash left.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) name: &'static str,
    pub(crate) record: Record,
    pub(crate) trust: Trust,
}

/// Encodes what `chains` are to do, for the journal file `own`.
pub(crate) fn encode(tag: Tag, own: &Identity, home: &Site, chains: &[Chain]) -> Vec<u8> {
    let sites = sites(home, chains);
    let numbers: HashMap<_, _> = sites.iter().enumerate().map(|(number, site)| (site.id, number as u64)).collect();
    let put_spot = |out: &mut Vec<u8>, spot: &Spot| {
        put_number(out, numbers[&spot.site.id]);
        put_bytes(out, spot.name.as_bytes());
    };
    let mut out = MAGIC.to_vec();
    put_number(&mut out, tag.0);
    put_number(&mut out, own.inode);
    put_moment(&mut out, own.born);
    put_moment(&mut out, Some(own.modified));
    put_number(&mut out, sites.len() as u64);
    for site in sites {
        put_bytes(&mut out, way(&home.path, &site.path).as_os_str().as_bytes());
    }
    put_number(&mut out, chains.len() as u64);
    for chain in chains {
        put_spot(&mut out, &chain.carrier);
        put_bytes(&mut out, chain.hidden.as_bytes());
        put_number(&mut out, chain.names.len() as u64);
        chain.names.iter().for_each(|spot| put_spot(&mut out, spot));
        chain.files.iter().for_each(|file| put_identity(&mut out, file.as_ref()));
    }
    seal(out)
}

/// The directories of `chains`, each once, and `home` first.
pub(crate) fn sites<'a>(home: &'a Site, chains: &'a [Chain]) -> Vec<&'a Site> {
    let mut seen = HashSet::from([home.id]);
    let others = chains.iter().flat_map(Chain::spots).map(|spot| &*spot.site).filter(|site| seen.insert(site.id));
    std::iter::once(home).chain(others).collect()
}

/// The relative path from the directory `from` to the directory `to`; empty if they are the same.
pub(crate) fn way(from: &Path, to: &Path) -> PathBuf {
    let common = from.components().zip(to.components()).take_while(|(one, other)| one == other).count();
    let up = from.components().skip(common).map(|_| Component::ParentDir);
    up.chain(to.components().skip(common)).collect()
}

/// The content of a pointer: the transaction, and the path to the journal's directory.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Pointer {
    pub(crate) tag: Tag,
    pub(crate) home: PathBuf,
}

impl Pointer {
    /// Creates it in `site`. It is a symlink, so that it exists whole or not at all, and shows at a glance what it is.
    pub(crate) fn leave(&self, site: &Site) -> io::Result<()> {
        site.dir.symlink(&self.home.join(self.tag.note()), POINTER.as_ref())
    }

    /// Reads the pointer of `site`, if there is one.
    pub(crate) fn find(site: &Site) -> Result<Option<Self>, Error> {
        let path = site.path.join(POINTER);
        let corrupt = |reason| Error::CorruptJournal { journal: path.clone(), reason };
        let found = site.dir.look(POINTER.as_ref());
        let link = found.and_then(|found| found.map(|_| site.dir.read_link(POINTER.as_ref())).transpose());
        match link {
            Ok(link) => link.map(|link| Self::parse(&link).ok_or(corrupt("it leads to no transaction"))).transpose(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Err(corrupt("it is not a symlink")),
            Err(error) => Err(io_error("read what leads to a journal elsewhere", &path)(error)),
        }
    }

    /// Where the pointer in `dir` leads, if there is one that leads to a journal's directory.
    pub(crate) fn home(dir: &Dir) -> io::Result<Option<PathBuf>> {
        match dir.look(POINTER.as_ref())? {
            None => Ok(None),
            Some(_) => match dir.read_link(POINTER.as_ref()) {
                Ok(link) => match Self::parse(&link) {
                    Some(pointer) => Ok(Some(pointer.home)),
                    None => Err(io::Error::new(io::ErrorKind::InvalidData, "what should lead to one does not")),
                },
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            },
        }
    }

    fn parse(link: &Path) -> Option<Self> {
        let tag = Tag::of_note(link.file_name()?)?;
        Some(Self { tag, home: link.parent()?.to_path_buf() })
    }
}

/// Removes the pointer to a journal elsewhere, if there is one.
pub(crate) fn remove_pointer(site: &Site) -> io::Result<()> {
    match site.dir.remove(POINTER.as_ref()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Whether there is a journal in `dir`.
pub(crate) fn is_present(dir: &Dir) -> io::Result<bool> {
    Ok(dir.look(COMMITTED.as_ref())?.is_some() || dir.look(PREPARED.as_ref())?.is_some())
}

/// Reads the journal of `home`, if there is one.
pub(crate) fn find(home: &Site) -> Result<Option<Found>, Error> {
    let mut found = None;
    for name in [PREPARED, COMMITTED] {
        let corrupt = |reason| Error::CorruptJournal { journal: home.path.join(name), reason };
        let Some((own, bytes)) = read(home, name)? else { continue };
        if found.is_some() {
            return Err(corrupt("there are two journals"));
        }
        let record = decode(&bytes).map_err(corrupt)?;
        let (inode, born) = record.own;
        let is_in_place = own.inode == inode && own.born.zip(born).is_none_or(|(one, other)| one == other);
        let trust = if is_in_place { Trust::Numbers { written: record.written } } else { Trust::Times };
        found = Some(Found { name, record, trust });
    }
    Ok(found)
}

/// Reads a journal whole, and looks at its file; `None` if there is none.
fn read(site: &Site, name: &'static str) -> Result<Option<(Identity, Vec<u8>)>, Error> {
    let path = site.path.join(name);
    match site.dir.look(name.as_ref()).map_err(io_error("look for the journal", &path))? {
        None => return Ok(None),
        Some(Entry { kind: Kind::File, .. }) => {}
        Some(_) => return Err(Error::CorruptJournal { journal: path, reason: "it is not a regular file" }),
    }
    let file = match site.dir.read(name.as_ref()) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("open the journal", &path)(error)),
    };
    let read = |file: File| -> io::Result<_> {
        let own = Identity::of(&file)?;
        let mut bytes = Vec::new();
        file.take(LIMIT_BYTES + 1).read_to_end(&mut bytes)?;
        Ok((own, bytes))
    };
    read(file).map(Some).map_err(io_error("read the journal", &path))
}

/// Refuses a directory with an unfinished transaction, because that may hold files of these very targets.
pub(crate) fn refuse_unfinished(site: &Site) -> Result<(), Error> {
    let failed = |source| io_error("look for a journal in", &site.path)(source);
    if is_present(&site.dir).map_err(failed)? {
        return Err(Error::Unrecovered { directory: site.path.clone() });
    }
    match elsewhere(site)? {
        Some(home) => Err(Error::Unrecovered { directory: home.path }),
        None => Ok(()),
    }
}

/// The directory with the journal of an unfinished transaction in which `site` takes part, if there is one.
pub(crate) fn elsewhere(site: &Site) -> Result<Option<Site>, Error> {
    let Some(pointer) = Pointer::find(site)? else { return Ok(None) };
    let directory = site.path.join(&pointer.home);
    let misplaced = |directory, reason| Error::Misplaced { journal: site.path.join(POINTER), directory, reason };
    let Ok(home) = Site::open(&directory) else { return Err(misplaced(directory, "cannot be opened")) };
    match find(&home)? {
        Some(found) if found.record.tag == pointer.tag => {
            let is_here = |way: &PathBuf| home.dir.open_dir(way).and_then(|dir| dir.id()).is_ok_and(|id| id == site.id);
            if found.record.sites.iter().any(is_here) {
                Ok(Some(home))
            } else {
                Err(misplaced(home.path, "has a journal that speaks of another directory than this one"))
            }
        }
        // If the journal there belongs to another transaction, or does not exist, the transaction of the pointer has
        // finished.
        _ => Ok(None),
    }
}

/// A journal that is not yet committed, and the pointers to it; dropped, they are removed.
pub(crate) struct Draft<'a> {
    home: &'a Site,
    /// Its present name; `None` once it is committed.
    name: Option<OsString>,
    pointed: Vec<Arc<Site>>,
    written: Moment,
}

impl<'a> Draft<'a> {
    /// Writes the journal and its pointers, and leaves the syncs to the caller.
    pub(crate) fn begin(tag: Tag, home: &'a Site, chains: &[Chain]) -> Result<(Self, File), Error> {
        let failed = || io_error("write a journal in", &home.path);
        let name = tag.draft();
        let mut file = home.dir.create(&name, 0o600).map_err(failed())?;
        let mut draft = Self { home, name: Some(name), pointed: Vec::new(), written: Moment::default() };
        let own = Identity::of(&file).map_err(failed())?;
        draft.written = own.modified;
        let bytes = encode(tag, &own, home, chains);
        if bytes.len() as u64 > LIMIT_BYTES {
            return Err(failed()(io::ErrorKind::FileTooLarge.into()));
        }
        file.write_all(&bytes).map_err(failed())?;
        for site in chains.iter().flat_map(Chain::spots).map(|spot| &spot.site) {
            if site.id != home.id && draft.pointed.iter().all(|known| known.id != site.id) {
                draft.point(tag, site)?;
            }
        }
        Ok((draft, file))
    }

    /// Creates a pointer to the journal in another directory, so that it is not overlooked there.
    fn point(&mut self, tag: Tag, site: &Arc<Site>) -> Result<(), Error> {
        let pointer = Pointer { tag, home: way(&site.path, &self.home.path) };
        // An existing pointer leads nowhere; otherwise this transaction would have been refused.
        let left = remove_pointer(site).and_then(|()| pointer.leave(site));
        left.map_err(io_error("leave what leads to the journal in", &site.path))?;
        self.pointed.push(site.clone());
        Ok(())
    }

    /// Gives the journal the name by which a recovery finds it, once it is whole and its pointers are durable.
    pub(crate) fn prepare(&mut self, durability: Durability) -> Result<(), Error> {
        let failed = || io_error("prepare the journal in", &self.home.path);
        let Some(name) = &self.name else { return Ok(()) };
        let moved = self.home.dir.rename_new(name, PREPARED.as_ref()).map_err(failed())?;
        let draft = self.name.replace(PREPARED.into());
        if let (Moved::Linked, Some(draft)) = (moved, draft) {
            self.home.dir.remove(&draft).map_err(failed())?;
        }
        // From here on the files may be exchanged: a recovery would put them back.
        if durability == Durability::None { Ok(()) } else { self.home.dir.sync().map_err(failed()) }
    }

    /// Commits the journal, and returns how to recognise its files. There is no sync: if the commit is lost, what
    /// follows is lost too, or undone.
    pub(crate) fn commit(mut self) -> Result<Trust, Error> {
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
        // A journal that cannot be removed now is left to a recovery.
        let _left = self.home.dir.remove(name);
        if name == PREPARED {
            // A rename may have taken effect although it failed. So the removal is synced before the pointers are
            // removed.
            let _left = self.home.dir.remove(COMMITTED.as_ref());
            let _left = self.home.dir.sync();
        }
        for site in &self.pointed {
            let _left = remove_pointer(site);
        }
    }
}

fn decode(bytes: &[u8]) -> Result<Record, &'static str> {
    if bytes.starts_with(FORMER_MAGIC) {
        return Err("it is of version 1: recover with the release that wrote it");
    }
    let mut rest = open(bytes)?;
    let record = take_record(&mut rest).ok_or("it is cut off")?;
    if !rest.is_empty() {
        return Err("it goes on behind its end");
    }
    record.chains.iter().all(|line| line.is_sound(&record)).then_some(record).ok_or("it names what is no file of its")
}

impl Line {
    /// Whether this can be a chain of that transaction, which touches only targets and its own names.
    fn is_sound(&self, record: &Record) -> bool {
        let is_target = |name: &Name| is_name(&name.name) && name.site < record.sites.len() && !is_reserved(&name.name);
        let is_hidden = self.carrier.name == self.hidden && self.carrier.site < record.sites.len();
        let is_ours = is_name(&self.hidden) && record.tag.is_of(&self.hidden);
        let is_step = |pair: &[Option<Identity>]| pair.iter().any(Option::is_some);
        is_ours
            && (is_hidden || is_target(&self.carrier))
            && self.names.iter().all(is_target)
            && self.files.windows(2).all(is_step)
    }
}

/// Adds the checksum.
fn seal(mut out: Vec<u8>) -> Vec<u8> {
    let sum = crc32c::crc32c(&out);
    out.extend_from_slice(&sum.to_le_bytes());
    out
}

/// The content of a record after the magic, if its checksum is right.
fn open(bytes: &[u8]) -> Result<&[u8], &'static str> {
    if bytes.len() as u64 > LIMIT_BYTES {
        return Err("it is too long");
    }
    let (body, sum) = bytes.split_last_chunk::<4>().ok_or("it is too short")?;
    if crc32c::crc32c(body) != u32::from_le_bytes(*sum) {
        return Err("its checksum is wrong");
    }
    body.strip_prefix(MAGIC).ok_or("it is of another version")
}

fn put_number(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(&number.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_number(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn put_moment(out: &mut Vec<u8>, moment: Option<Moment>) {
    out.push(moment.is_some().into());
    let (seconds, nanoseconds) = moment.unwrap_or_default();
    out.extend_from_slice(&seconds.to_le_bytes());
    out.extend_from_slice(&nanoseconds.to_le_bytes());
}

fn put_identity(out: &mut Vec<u8>, file: Option<&Identity>) {
    out.push(file.is_some().into());
    if let Some(Identity { inode, born, size, modified }) = file {
        put_number(out, *inode);
        put_moment(out, *born);
        put_number(out, *size);
        put_moment(out, Some(*modified));
    }
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

fn take_flag(rest: &mut &[u8]) -> Option<bool> {
    match take(rest, 1)?[0] {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

fn take_moment(rest: &mut &[u8]) -> Option<Option<Moment>> {
    let is_known = take_flag(rest)?;
    let seconds = i64::from_le_bytes(take(rest, 8)?.try_into().ok()?);
    let nanoseconds = u32::from_le_bytes(take(rest, 4)?.try_into().ok()?);
    Some(is_known.then_some((seconds, nanoseconds)))
}

fn take_identity(rest: &mut &[u8]) -> Option<Option<Identity>> {
    if !take_flag(rest)? {
        return Some(None);
    }
    let (inode, born) = (take_number(rest)?, take_moment(rest)?);
    Some(Some(Identity { inode, born, size: take_number(rest)?, modified: take_moment(rest)?? }))
}

/// Takes as many items as the count says. Nothing is allocated in advance, because the count may be anything; and each
/// item takes some bytes, so the loop ends.
fn take_many<T>(rest: &mut &[u8], one: impl Fn(&mut &[u8]) -> Option<T>) -> Option<Vec<T>> {
    let count = take_number(rest)?;
    (0..count).map(|_| one(rest)).collect()
}

fn take_record(rest: &mut &[u8]) -> Option<Record> {
    let tag = Tag(take_number(rest)?);
    let own = (take_number(rest)?, take_moment(rest)?);
    let written = take_moment(rest)??;
    let sites = take_many(rest, |rest| take_name(rest).map(PathBuf::from))?;
    Some(Record { tag, own, written, sites, chains: take_many(rest, take_line)? })
}

fn take_place(rest: &mut &[u8]) -> Option<Name> {
    Some(Name { site: usize::try_from(take_number(rest)?).ok()?, name: take_name(rest)? })
}

fn take_line(rest: &mut &[u8]) -> Option<Line> {
    let (carrier, hidden) = (take_place(rest)?, take_name(rest)?);
    let names = take_many(rest, take_place)?;
    // A chain without names changes nothing, and is invalid here.
    let files = (0..=names.len()).map(|_| take_identity(rest)).collect::<Option<Vec<_>>>()?;
    (!names.is_empty()).then_some(Line { carrier, hidden, names, files })
}

#[cfg(test)]
mod tests;
