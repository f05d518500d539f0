//! Kills, faults and power cuts at every system call: the shared part of all campaigns.
//!
//! By default each campaign runs in a quick form, all of them together within a minute; `CANCEL_SAFE_CAMPAIGN=full`
//! visits every point with every fault. The visited points, and the parts that could not be run, are published for the
//! closing table of `cargo xtask`.

mod disk;
mod file;
mod recovery;
mod transaction;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use cancel_safe_campaign::publish_campaign;
use tempfile::{TempDir, tempdir};

use crate::child;
use crate::strace::{self, Call, Run};

pub(crate) use transaction::{change_all_after_others, renew_for_replay as renew, verify_for_replay as verify};

/// Calls that change something, and that the test harness of the child never makes.
const DECISIVE: [&str; 6] = ["fsync", "renameat", "renameat2", "rename", "linkat", "unlinkat"];
const KILL: &str = "signal=SIGKILL";
const EIO: &str = "error=EIO";
const ENOSPC: &str = "error=ENOSPC";
/// The fault that skips every sync, and reports it as done.
const WITHOUT_SYNCS: &str = "fsync:retval=0";

pub(crate) fn is_full() -> bool {
    std::env::var("CANCEL_SAFE_CAMPAIGN").is_ok_and(|form| form == "full")
}

fn is_decisive(call: &Call) -> bool {
    DECISIVE.contains(&&*call.name)
}

/// Whether a call leaves the file system unchanged, so that a power cut at it equals a power cut at the next changing
/// call.
fn is_look(call: &Call) -> bool {
    const LOOKS: [&str; 16] = [
        "read",
        "readlinkat",
        "readlink",
        "statx",
        "newfstatat",
        "fstat",
        "fstatfs",
        "lseek",
        "getdents64",
        "flock",
        "fgetxattr",
        "flistxattr",
        "fcntl",
        "pread64",
        "close",
        "access",
    ];
    LOOKS.contains(&&*call.name) || (call.name == "openat" && !call.text.contains("O_CREAT"))
}

/// All of `points`; in the quick form about as many as `quick`, spread evenly.
fn sample<T>(points: Vec<T>, quick: usize) -> Vec<T> {
    let mut step = if is_full() { 1 } else { points.len().div_ceil(quick).max(1) };
    // If the points are calls with two or three faults each, the faults take turns.
    while step > 1 && (step % 2 == 0 || step % 3 == 0) {
        step += 1;
    }
    // From the middle, where a crash leaves the most to do.
    points.into_iter().skip(step / 2).step_by(step).collect()
}

/// Each call with each fault, in the order of the calls.
fn pairs<'a>(calls: &[Call], faults: &[&'a str]) -> Vec<(Call, &'a str)> {
    calls.iter().flat_map(|call| faults.iter().map(|&fault| (call.clone(), fault))).collect()
}

/// The calls at which a campaign stops, each aim once.
fn distinct(calls: Vec<Call>, is_wanted: impl Fn(&Call) -> bool) -> Vec<Call> {
    let mut seen = HashSet::new();
    calls
        .into_iter()
        .filter(|call| call.name != "write" || call.text.contains("/traced/"))
        .filter(|call| call.name != "close" && is_wanted(call))
        .filter(|call| seen.insert((call.name.clone(), call.number)))
        .collect()
}

fn aim(call: &Call, fault: &str) -> String {
    format!("{}:{fault}:when={}", call.name, call.number)
}

/// Whether the call commits the journal, so that from the next call on a crash leaves something to finish.
fn is_commit(call: &Call) -> bool {
    call.name.starts_with("rename") && call.text.contains("\".afs-journal\"")
}

/// A directory in memory, if there is such a place: there a sync costs nothing.
pub(crate) fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.exists() { tempfile::tempdir_in(memory).unwrap() } else { tempdir().unwrap() }
}

/// Where the files of a transaction are. In one directory, the clean-up is different.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    OneDirectory,
    TwoDirectories,
}

impl Layout {
    const ALL: [Self; 2] = [Self::TwoDirectories, Self::OneDirectory];

    /// The name of a campaign of transactions.
    fn campaign(self, what: &str) -> String {
        match self {
            Self::OneDirectory => format!("{what}-in-one-directory"),
            Self::TwoDirectories => what.to_owned(),
        }
    }
}

/// Where a campaign without power cuts takes place.
struct Ground {
    scratch: TempDir,
    dir: PathBuf,
    layout: Layout,
}

impl Ground {
    /// `None`, which is also published, if `campaign` cannot run here.
    fn new(campaign: &str) -> Option<Self> {
        child::strace(campaign)?;
        let scratch = scratch();
        Some(Self { dir: scratch.path().join("traced"), scratch, layout: Layout::TwoDirectories })
    }

    fn with(self, layout: Layout) -> Self {
        Self { layout, ..self }
    }

    fn run(&self, task: &str, path: &Path, inject: Option<&str>) -> Run {
        strace::run(task, path, self.scratch.path(), inject)
    }
}

/// Counts and reports what a campaign found.
struct Tally {
    name: String,
    points: usize,
    violations: Vec<String>,
    old: usize,
    new: usize,
    /// Faults that hit nothing, or something else.
    astray: usize,
}

impl Tally {
    fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), points: 0, violations: Vec::new(), old: 0, new: 0, astray: 0 }
    }

    fn add(&mut self, at: &str, verdict: Result<Picture, String>) {
        self.points += 1;
        if self.points.is_multiple_of(25) {
            // A full campaign is long, and silence would look like a hang.
            println!("{}: {} points so far", self.name, self.points);
        }
        match verdict {
            Ok(Picture::Old) => self.old += 1,
            Ok(_) => self.new += 1,
            Err(violation) => self.violations.push(format!("{at}: {violation}")),
        }
    }

    fn close(self) {
        let Self { name, points, violations, old, new, astray } = self;
        publish_campaign("atomic-fs", &name, points, violations.len());
        println!("{name}: {old} old, {new} new, {astray} astray");
        assert!(violations.is_empty(), "{violations:#?}");
        assert!(old > 0 || new > 0, "nothing was visited");
        assert!(astray * 3 <= points, "the faults are badly aimed");
    }

    /// For a deliberately broken twin: asserts that the check has found the fault.
    fn assert_caught(&self, what: &str) {
        println!("{}: {} of {} points show {what}", self.name, self.violations.len(), self.points);
        let is_caught = self.violations.iter().any(|violation| violation.contains(what));
        assert!(is_caught, "no point shows {what}: {:#?}", self.violations);
    }
}

/// The state of the files: all old, all new, or each whole but mixed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Picture {
    Old,
    New,
    Mix,
}
