//! The list of URLs: on disk, with three words per URL in memory, so that a million lines are no problem.
//!
//! Invariant: each URL is there once, whatever its hash; a slot leads to its line and, once names are given, to a path that
//! no other slot has.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::sync::{Mutex, PoisonError};

use url::Url;

use super::paths::{Names, Rules, Wish, short_hash};
use super::report::host_of;

/// What the list says of one URL.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Line {
    /// Normalised.
    pub(crate) url: String,
    /// What the SHA-256 of the file must be, in hexadecimal.
    pub(crate) sha256: Option<String>,
    /// What its length must be, in bytes.
    pub(crate) size: Option<u64>,
    /// Where it belongs below `files`, instead of where its URL leads.
    pub(crate) out: Option<String>,
}

impl Line {
    fn write(&self, file: &mut impl Write) -> io::Result<u64> {
        let size = self.size.map(|size| size.to_string());
        let field = |field: &Option<String>| field.clone().unwrap_or_default();
        let text = format!("{}\t{}\t{}\t{}\n", self.url, field(&self.sha256), field(&size), field(&self.out));
        file.write_all(text.as_bytes())?;
        Ok(text.len() as u64)
    }

    fn read(text: &str) -> Self {
        let mut fields = text.trim_end_matches('\n').split('\t').map(str::to_owned);
        let url = fields.next().unwrap_or_default();
        let mut field = || fields.next().filter(|field| !field.is_empty());
        Self { url, sha256: field(), size: field().and_then(|size| size.parse().ok()), out: field() }
    }
}

/// A URL in memory: where its line is, and what is known of it.
#[derive(Debug, Clone, Copy)]
struct Slot {
    hash: u64,
    /// The offset of its line, and the flags below.
    at: u64,
}

/// It cannot have the name that its URL asks for.
const HASHED: u64 = 1 << 63;
/// Its file is there.
const COMPLETE: u64 = 1 << 62;
/// It is in the catalogue and not in the list.
const LEFT: u64 = 1 << 61;
/// Its file is there, and not what the list asks for.
const STALE: u64 = 1 << 60;
const OFFSET: u64 = STALE - 1;

/// How many bytes of the lines are read at once.
const PIECE: u64 = 4096;

/// The next slot of a host, where there is none.
const NONE: u32 = u32::MAX;

/// A list that is being read, or is in use.
#[derive(Debug)]
pub(crate) struct List {
    lines: Mutex<Lines>,
    end: u64,
    /// By hash.
    slots: Vec<Slot>,
    rules: Rules,
    /// The next slot of the same host, for each slot.
    after: Vec<u32>,
    hosts: Vec<Queue>,
}

/// The lines on disk.
#[derive(Debug)]
struct Lines {
    /// It has no name, so that nothing is left of it.
    file: BufWriter<File>,
    /// What was read last, and where in the file it begins: lines are mostly asked for in their order.
    piece: Vec<u8>,
    start: u64,
}

impl Lines {
    /// The line that begins at `at`.
    fn read(&mut self, at: u64) -> io::Result<Line> {
        let known = at.checked_sub(self.start).and_then(|skipped| self.piece.get(usize::try_from(skipped).ok()?..));
        if let Some(line) = known.and_then(first_line) {
            return Ok(Line::read(&String::from_utf8_lossy(line)));
        }
        let file = self.file.get_mut();
        file.seek(SeekFrom::Start(at))?;
        (self.start, self.piece) = (at, Vec::new());
        // Most lines are short; of a long one the rest is read as well.
        while first_line(&self.piece).is_none() && file.take(PIECE).read_to_end(&mut self.piece)? > 0 {}
        // What comes next is written at the end.
        file.seek(SeekFrom::End(0))?;
        let line = first_line(&self.piece).unwrap_or(&self.piece);
        Ok(Line::read(&String::from_utf8_lossy(line)))
    }
}

/// What is before the first end of a line.
fn first_line(text: &[u8]) -> Option<&[u8]> {
    let end = text.iter().position(|byte| *byte == b'\n')?;
    Some(&text[..end])
}

/// The URLs of one host, in the order of the list.
#[derive(Debug, Clone, Copy)]
struct Queue {
    first: u32,
    last: u32,
}

impl List {
    /// An empty list.
    pub(crate) fn new() -> io::Result<Self> {
        let file = BufWriter::with_capacity(1 << 16, tempfile::tempfile()?);
        let lines = Mutex::new(Lines { file, piece: Vec::new(), start: 0 });
        let (slots, after, hosts) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { lines, end: 0, slots, rules: Rules::default(), after, hosts })
    }

    fn file_mut(&mut self) -> &mut BufWriter<File> {
        &mut self.lines.get_mut().unwrap_or_else(PoisonError::into_inner).file
    }

    /// How many slots there are.
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Takes one more line of the list.
    pub(crate) fn push(&mut self, line: &Line) -> io::Result<()> {
        self.add(line, 0)
    }

    /// Takes the URL of a file that is kept although the list has lost it, and the place that it asks for, if any.
    pub(crate) fn push_left(&mut self, url: String, out: Option<String>) -> io::Result<()> {
        self.add(&Line { url, out, ..Line::default() }, LEFT)
    }

    fn add(&mut self, line: &Line, flags: u64) -> io::Result<()> {
        if self.slots.len() >= NONE as usize {
            return Err(io::Error::other("the list has more than 4,294,967,294 URLs"));
        }
        self.slots.push(Slot { hash: short_hash(&line.url), at: self.end | flags });
        self.end += line.write(&mut self.file_mut())?;
        Ok(())
    }

    /// Sorts the slots, and drops those whose URL came before; returns how many it dropped.
    pub(crate) fn sort(&mut self) -> io::Result<usize> {
        self.file_mut().flush()?;
        self.slots.sort_unstable_by_key(|slot| (slot.hash, slot.at & OFFSET));
        let before = self.slots.len();
        let mut kept: Vec<Slot> = std::mem::take(&mut self.slots);
        let mut length = 0;
        for next in 0..kept.len() {
            let twins = kept[..length].iter().rev().take_while(|slot| slot.hash == kept[next].hash).count();
            let mut is_twin = false;
            for twin in length - twins..length {
                is_twin = is_twin || self.line_at(kept[twin].at)?.url == self.line_at(kept[next].at)?.url;
            }
            if !is_twin {
                kept[length] = kept[next];
                length += 1;
            }
        }
        kept.truncate(length);
        self.slots = kept;
        Ok(before - length)
    }

    /// The slot of a URL.
    pub(crate) fn find(&self, url: &str) -> io::Result<Option<u32>> {
        let hash = short_hash(url);
        let first = self.slots.partition_point(|slot| slot.hash < hash);
        for (slot, found) in self.slots.iter().enumerate().skip(first).take_while(|(_, slot)| slot.hash == hash) {
            if self.line_at(found.at)?.url == url {
                return Ok(u32::try_from(slot).ok());
            }
        }
        Ok(None)
    }

    /// The line of a slot.
    pub(crate) fn line(&self, slot: u32) -> io::Result<Line> {
        self.line_at(self.slots[slot as usize].at)
    }

    fn line_at(&self, at: u64) -> io::Result<Line> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).read(at & OFFSET)
    }

    /// Gives each slot its name, and each host its URLs. `go_on` says now and then whether that is still wanted.
    pub(crate) fn give_names(&mut self, rules: Rules, go_on: impl Fn() -> bool) -> io::Result<()> {
        self.rules = rules;
        self.after = vec![NONE; self.slots.len()];
        let (mut names, mut by_host) = (Names::default(), HashMap::new());
        let mut lines = self.file_mut().get_ref().try_clone()?;
        lines.seek(SeekFrom::Start(0))?;
        let mut lines = BufReader::with_capacity(1 << 16, lines);
        // A search for each line's slot would take longer than all the rest.
        let mut slots: Vec<(u64, u32)> = self.slots.iter().zip(0..).map(|(slot, at)| (slot.at & OFFSET, at)).collect();
        slots.sort_unstable();
        let mut slots = slots.into_iter().peekable();
        let (mut text, mut at, mut count) = (String::new(), 0, 0_u32);
        loop {
            text.clear();
            let length = lines.read_line(&mut text)?;
            count += 1;
            if length == 0 || (count.is_multiple_of(1024) && !go_on()) {
                break;
            }
            let offset = at;
            at += length as u64;
            let Some((_, slot)) = slots.next_if(|(at, _)| *at == offset) else { continue };
            let line = Line::read(&text);
            names.add(slot, &Wish::of(&line.url, line.out.as_deref(), rules), rules);
            if self.slots[slot as usize].at & LEFT == 0 {
                let host = *by_host.entry(short_hash(host_of(&line.url))).or_insert_with(|| {
                    self.hosts.push(Queue { first: NONE, last: NONE });
                    self.hosts.len() - 1
                });
                self.append(host, slot);
            }
        }
        self.file_mut().get_mut().seek(SeekFrom::End(0))?;
        // A place that a line asks for is not held against it by a URL that has left the list.
        let order = |slot: u32, line: Line| (line.out.is_none(), line.out.is_some() && self.is_left(slot), line.url);
        let contested = names.contested(|slot| self.line(slot).map(|line| order(slot, line)))?;
        for slot in contested {
            self.slots[slot as usize].at |= HASHED;
        }
        Ok(())
    }

    fn append(&mut self, host: usize, slot: u32) {
        let queue = &mut self.hosts[host];
        match queue.last {
            NONE => queue.first = slot,
            last => self.after[last as usize] = slot,
        }
        queue.last = slot;
    }

    /// The path of a slot below `files`, once names are given.
    pub(crate) fn path(&self, slot: u32) -> io::Result<String> {
        Ok(self.entry(slot)?.2)
    }

    /// The line of a slot, its URL, and its path below `files`, once names are given.
    pub(crate) fn entry(&self, slot: u32) -> io::Result<(Line, Url, String)> {
        let line = self.line(slot)?;
        let url = Url::parse(&line.url).map_err(io::Error::other)?;
        let wish = Wish::of(&line.url, line.out.as_deref(), self.rules);
        let is_hashed = self.slots[slot as usize].at & HASHED != 0;
        let path = wish.plain().filter(|_| !is_hashed).unwrap_or_else(|| wish.hashed(&url));
        Ok((line, url, path))
    }

    /// The file of a slot is there.
    pub(crate) fn complete(&mut self, slot: u32) {
        self.slots[slot as usize].at |= COMPLETE;
    }

    /// The file of a slot is there, and not what the list asks for.
    pub(crate) fn stale(&mut self, slot: u32) {
        self.slots[slot as usize].at |= STALE;
    }

    /// The file of a slot is not there after all.
    pub(crate) fn forget(&mut self, slot: u32) {
        self.slots[slot as usize].at &= !(COMPLETE | STALE);
    }

    /// Whether the catalogue had a row of a slot, when the run began.
    pub(crate) fn has_row(&self, slot: u32) -> bool {
        self.slots[slot as usize].at & (COMPLETE | STALE) != 0
    }

    /// Whether the file of a slot was there when the run began.
    pub(crate) fn is_complete(&self, slot: u32) -> bool {
        self.slots[slot as usize].at & COMPLETE != 0
    }

    /// Whether a slot is in the catalogue alone.
    pub(crate) fn is_left(&self, slot: u32) -> bool {
        self.slots[slot as usize].at & LEFT != 0
    }

    /// The first slot of each host.
    pub(crate) fn firsts(&self) -> impl Iterator<Item = u32> {
        self.hosts.iter().map(|queue| queue.first)
    }

    /// The slot that follows among those of its host.
    pub(crate) fn next(&self, slot: u32) -> Option<u32> {
        self.after.get(slot as usize).copied().filter(|next| *next != NONE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(urls: &[&str]) -> List {
        let mut list = List::new().unwrap();
        for url in urls {
            list.push(&Line { url: (*url).to_owned(), ..Line::default() }).unwrap();
        }
        list
    }

    #[test]
    fn a_line_comes_back_as_it_was() {
        let digest = Some("0".repeat(64));
        let line = Line { url: "http://h/a".into(), sha256: digest, size: Some(7), out: Some("b/c".into()) };
        let long = Line { url: format!("http://h/{}", "x".repeat(9000)), ..Line::default() };
        let mut list = List::new().unwrap();
        for line in [&line, &long] {
            list.push(line).unwrap();
        }
        assert_eq!(list.sort().unwrap(), 0);
        for wanted in [line, long] {
            let slot = list.find(&wanted.url).unwrap().unwrap();
            assert_eq!(list.line(slot).unwrap(), wanted);
        }
        assert_eq!(list.find("http://h/b").unwrap(), None);
    }

    #[test]
    fn a_url_is_there_once_and_the_first_of_its_lines_counts() {
        let mut list = list(&["http://h/a", "http://h/b", "http://h/a", "http://h/a"]);
        list.push(&Line { url: "http://h/b".into(), size: Some(1), ..Line::default() }).unwrap();
        assert_eq!((list.sort().unwrap(), list.len()), (3, 2));
        let slot = list.find("http://h/b").unwrap().unwrap();
        assert_eq!(list.line(slot).unwrap().size, None);
    }

    #[test]
    fn what_left_the_list_keeps_its_name_and_is_in_no_queue() {
        let mut list = list(&["http://h/z", "http://i/a", "http://h/b"]);
        list.sort().unwrap();
        list.push_left("http://h/z/y".to_owned(), None).unwrap();
        list.sort().unwrap();
        list.give_names(Rules::default(), || true).unwrap();
        let mut queues: Vec<Vec<String>> = Vec::new();
        for first in list.firsts() {
            let slots = std::iter::successors(Some(first), |slot| list.next(*slot));
            queues.push(slots.map(|slot| list.path(slot).unwrap()).collect());
        }
        assert!(queues[0][0].starts_with("h/z~") && queues[0][1] == "h/b" && queues[1] == ["i/a"], "{queues:?}");
        let left = list.find("http://h/z/y").unwrap().unwrap();
        assert!(list.is_left(left) && list.path(left).unwrap() == "h/z/y");
        list.complete(left);
        assert!(list.is_complete(left));
        let other = list.find("http://h/b").unwrap().unwrap();
        assert!(!list.has_row(other));
        list.stale(other);
        assert!(list.has_row(other) && !list.is_complete(other));
        list.forget(other);
        assert!(!list.has_row(other));
    }

    #[test]
    fn what_left_the_list_keeps_the_place_it_was_given_until_a_line_asks_for_that() {
        let names = |lines: &[Line]| {
            let mut list = List::new().unwrap();
            lines.iter().for_each(|line| list.push(line).unwrap());
            list.push_left("http://h/left".to_owned(), Some("x/y".to_owned())).unwrap();
            list.sort().unwrap();
            list.give_names(Rules::default(), || true).unwrap();
            ["http://h/left", "http://h/new"].map(|url| {
                let slot = list.find(url).unwrap();
                slot.map(|slot| list.path(slot).unwrap()).unwrap_or_default()
            })
        };
        let new = |out: &str| Line { url: "http://h/new".into(), out: Some(out.into()), ..Line::default() };
        assert_eq!(names(&[]), ["x/y", ""]);
        assert_eq!(names(&[new("x/z")]), ["x/y", "x/z"]);
        let [left, taken] = names(&[new("x/y")]);
        assert!(left.starts_with("x/y~") && taken == "x/y", "{left}, {taken}");
        // What asks for nothing makes room.
        let plain = Line { url: "http://x/y".into(), ..Line::default() };
        assert_eq!(names(&[plain]), ["x/y", ""]);
    }
}
