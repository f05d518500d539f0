//! The progress of a checkpoint that another process writes.
//!
//! Invariant: each look reads only what was added since the last one, and only a complete file is a success.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, IsTerminal, Write},
    path::Path,
    thread,
    time::{Duration, SystemTime},
};

use indicatif::ProgressDrawTarget;
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    bar::{Drawn, sentence},
    checkpoint::is_cut_short,
    cli::{Failure, must_be_file},
    disk::is_still_at,
    error::TaskError,
    history::take_key,
    index::Slot,
    log::{Chain, Header, Identity, Kind},
    progress::Progress,
    scan::{Entry, Unread, read_header, scan},
};

/// How many looks in a row may meet a file that is just changing: a torn tail is cut off during the read, or another
/// file replaces this one.
const LOOK_TRIES: u32 = 5;
/// How soon after such a look the next one comes.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Shows the progress until the file is complete.
#[expect(clippy::disallowed_methods, reason = "a command has no executor whose thread could be blocked")]
pub(super) fn follow(path: &Path, total: Option<usize>, every: Duration, out: &mut dyn Write) -> Result<(), Failure> {
    let mut shown = Shown::new(total, out);
    let (mut watched, mut tries) = (None, 1);
    loop {
        match look(path, watched.take()) {
            Ok(now) if now.is_sealed => {
                shown.show(&now)?;
                return shown.end(&now);
            }
            Ok(now) => {
                shown.show(&now)?;
                (watched, tries) = (Some(now), 1);
                thread::sleep(every);
            }
            Err(error) if tries < LOOK_TRIES && may_pass(&error, shown.has_begun) => {
                tries += 1;
                thread::sleep(LOOK_AGAIN);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Reads what was added, or all of a file that was compacted or restarted. If that fails, it discards everything read
/// before, because some of it may have been unfinished or may be gone.
fn look(path: &Path, watched: Option<Watched>) -> Result<Watched, TaskError> {
    match watched {
        // A killed run's torn tail, read from the beginning.
        Some(now) if now.is_torn() && now.is_current(path)? && now.stamp(path)? == now.stamp => return Ok(now),
        Some(mut now) if !now.is_torn() && now.is_current(path)? => {
            now.read(path)?;
            if !now.is_torn() {
                return Ok(now);
            }
            // The new bytes may be a part of a block, or the middle of one if the file was cut and written again.
        }
        Some(_) | None => {}
    }
    let mut now = Watched::open(path)?;
    now.read(path)?;
    Ok(now)
}

/// Whether the next look may find the fault gone. A file that never existed is not waited for.
fn may_pass(error: &TaskError, was_there: bool) -> bool {
    let is_missing = matches!(error, TaskError::Io(error) if error.kind() == io::ErrorKind::NotFound);
    error.is_corrupt() || is_cut_short(error) || (is_missing && was_there)
}

/// The file, and what was read from it.
#[derive(Debug)]
struct Watched {
    file: File,
    header: Header,
    /// Where the next block begins, and its place in the chain.
    at: u64,
    chain: Chain,
    items: Items,
    is_sealed: bool,
    /// The file's length and modification time when it was read.
    stamp: (u64, Option<SystemTime>),
}

impl Watched {
    fn open(path: &Path) -> Result<Self, TaskError> {
        must_be_file(path)?;
        let file = File::open(path).map_err(|error| TaskError::io("open checkpoint", path, error))?;
        let (header, at) = read_header(&file).map_err(|unread| TaskError::unreadable(path, unread))?;
        let items = Items { by_key: header.identity == Identity::Key, ..Items::default() };
        Ok(Self { chain: Chain::new(header.salt), file, header, at, items, is_sealed: false, stamp: (0, None) })
    }

    /// Reads what was added.
    fn read(&mut self, path: &Path) -> Result<(), TaskError> {
        self.stamp = self.stamp(path)?;
        let (items, is_sealed) = (&mut self.items, &mut self.is_sealed);
        let end = scan(&self.file, self.at, &mut self.chain, |entry| {
            *is_sealed = matches!(entry, Entry::Sealed { .. });
            items.enter(entry)
        });
        self.at = end.map_err(|unread: Unread| TaskError::unreadable(path, unread))?;
        Ok(())
    }

    /// Whether bytes follow the last intact block.
    fn is_torn(&self) -> bool {
        self.at < self.stamp.0
    }

    /// Whether the path still leads to this file, and the file has not become shorter.
    fn is_current(&self, path: &Path) -> Result<bool, TaskError> {
        let is_there = is_still_at(&self.file, path).map_err(|error| TaskError::io("examine", path, error))?;
        Ok(is_there && self.stamp(path)?.0 >= self.at)
    }

    fn stamp(&self, path: &Path) -> Result<(u64, Option<SystemTime>), TaskError> {
        let read = self.file.metadata().map_err(|error| TaskError::io("examine", path, error))?;
        // If the file system keeps no times, only the length counts.
        Ok((read.len(), read.modified().ok()))
    }
}

/// The state of each item, and how many items have each state.
#[derive(Debug, Default)]
struct Items {
    by_key: bool,
    by_position: Vec<u8>,
    keyed: HashMap<u64, u8>,
    read: usize,
    finished: usize,
    quarantined: usize,
}

impl Items {
    fn enter(&mut self, entry: Entry<'_>) -> Result<(), &'static str> {
        let (kind, index, mut payload) = match entry {
            Entry::Record { kind, index, payload, .. } => (kind, index, payload),
            Entry::InputMark { count, .. } => {
                let count = usize::try_from(count).map_err(|_| "a fingerprint of the input is too long")?;
                self.read = self.read.saturating_add(count);
                return Ok(());
            }
            Entry::Open { .. } | Entry::Sealed { .. } => return Ok(()),
        };
        let state = if self.by_key {
            let key = take_key(&mut payload).ok_or("a record has no key")?;
            self.keyed.entry(xxh3_64(key.as_bytes())).or_default()
        } else {
            let index = usize::try_from(index).ok().filter(|index| *index < self.read);
            let index = index.ok_or("a result lies beyond the fingerprint of the input")?;
            if index >= self.by_position.len() {
                self.by_position.resize(index + 1, 0);
            }
            &mut self.by_position[index]
        };
        let before = Slot { kind: *state, ..Slot::default() };
        if before.gives_way_to(kind as u8) {
            let now = Slot { kind: kind as u8, ..Slot::default() };
            *state = now.kind;
            self.finished = self.finished + counts(now) - counts(before);
            self.quarantined = self.quarantined + is_bad(now) - is_bad(before);
        }
        Ok(())
    }
}

/// Whether an item is finished. An item started at most once counts only if its run has died, and only the next run can
/// tell.
fn counts(slot: Slot) -> usize {
    usize::from([Kind::Result as u8, Kind::Quarantine as u8].contains(&slot.kind))
}

fn is_bad(slot: Slot) -> usize {
    usize::from(slot.kind == Kind::Quarantine as u8)
}

/// The output: a bar on a terminal, otherwise lines.
struct Shown<'a> {
    total: Option<usize>,
    progress: Progress,
    has_begun: bool,
    bar: Option<Drawn>,
    out: &'a mut dyn Write,
    last: String,
}

impl<'a> Shown<'a> {
    fn new(total: Option<usize>, out: &'a mut dyn Write) -> Self {
        let progress = of_total(total);
        let bar = io::stderr().is_terminal().then(|| Drawn::on(ProgressDrawTarget::stderr()));
        Self { total, progress, has_begun: false, bar, out, last: String::new() }
    }

    fn show(&mut self, watched: &Watched) -> Result<(), Failure> {
        let items = &watched.items;
        if items.finished < self.progress.done {
            // The file was restarted.
            (self.progress, self.has_begun) = (of_total(self.total), false);
        }
        let added = items.finished.saturating_sub(self.progress.done);
        // Items finished before the first look say nothing about the speed.
        match self.has_begun {
            true => self.progress.advance(added),
            false => self.progress.restore(added),
        }
        self.has_begun = true;
        self.progress.failed = items.quarantined;
        if watched.is_sealed {
            self.progress.set_total(items.finished);
        }
        if let Some(bar) = &mut self.bar {
            bar.show(&self.progress);
            return Ok(());
        }
        let line = sentence(&self.progress);
        if line != self.last {
            writeln!(self.out, "{}: {line}", watched.header.job)?;
            self.out.flush()?;
            self.last = line;
        }
        Ok(())
    }

    fn end(self, watched: &Watched) -> Result<(), Failure> {
        if let Some(bar) = self.bar {
            bar.leave();
        }
        Ok(writeln!(self.out, "{}: complete", watched.header.job)?)
    }
}

fn of_total(total: Option<usize>) -> Progress {
    total.map_or_else(Progress::default, Progress::new)
}
