//! Single files under faults, kills and power cuts at every system call.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use cancel_safe_atomic_fs as atomic_fs;
use rustix::fs::XattrFlags;

use super::disk::{Disk, Kind};
use super::{EIO, ENOSPC, Ground, KILL, Picture, Tally, WITHOUT_SYNCS, aim, distinct, pairs, sample};
use crate::child::{SIZE_BYTES, STREAM_BYTES};
use crate::strace::{Call, Run};
use crate::support::{names, temps};

/// One way of writing a file.
#[derive(Clone, Copy, Debug)]
struct Way {
    /// For the table.
    name: &'static str,
    /// What the child does.
    task: &'static str,
    length: usize,
    /// Whether the new file has the owner and the attributes of the old one.
    keeps_all: bool,
    /// Whether there is no old file.
    creates: bool,
    /// Whether a power cut may bring back the old file although the write has returned.
    may_be_undone: bool,
    /// A fault that applies in every round.
    always: Option<&'static str>,
}

/// A write by a thread that may block.
const WRITE: Way = Way {
    name: "write",
    task: "write after others",
    length: SIZE_BYTES,
    keeps_all: false,
    creates: false,
    may_be_undone: false,
    always: None,
};
const KEEP_ALL: Way = Way { name: "write-keeping-all", task: "keep all after others", keeps_all: true, ..WRITE };
const STREAM: Way = Way { name: "stream", task: "stream after others", length: STREAM_BYTES, ..WRITE };
const ORDERED: Way = Way { name: "write-ordered", task: "ordered after others", may_be_undone: true, ..WRITE };
const CREATE: Way = Way { name: "create-new", task: "create after others", creates: true, ..WRITE };
/// On a system whose rename always replaces.
const CREATE_BY_LINK: Way = Way { name: "create-new-by-link", always: Some("renameat2:error=EINVAL"), ..CREATE };
/// A transaction of one file, which needs no journal.
const ALONE: Way = Way { name: "transaction-of-one", task: "transaction of one after others", ..WRITE };
const ALL: [Way; 7] = [WRITE, KEEP_ALL, STREAM, ORDERED, CREATE, CREATE_BY_LINK, ALONE];
const IN_PLACE: Way = Way { name: "write/twin", task: "write in place", ..WRITE };
const PUT_BACK: Way = Way { name: "write/twin", task: "write in place and put back", ..WRITE };

const OLD: &[u8] = b"old";
const OLD_MODE: u32 = 0o640;
const OLD_OWNER: (u32, u32) = (1234, 4321);
const COLOUR: &str = "user.colour";

impl Way {
    /// The calls at which to stop.
    fn calls(&self, run: Run) -> Vec<Call> {
        // strace keeps one fault for each name of a call.
        let is_taken = |call: &Call| self.always.is_some_and(|fault| fault.starts_with(&format!("{}:", call.name)));
        distinct(run.calls, |call| !is_taken(call))
    }

    /// A fault, together with the permanent one.
    fn inject(&self, fault: Option<&str>) -> Option<String> {
        let faults: Vec<_> = self.always.into_iter().chain(fault).collect();
        (!faults.is_empty()).then(|| faults.join("\n"))
    }

    /// Whether it is the call that makes the new file the target.
    fn is_install(&self, call: &Call) -> bool {
        call.name.starts_with("rename") || call.name == "linkat"
    }
}

/// The visible state of a file: its content and its metadata.
#[derive(Debug, PartialEq, Eq)]
struct Sight {
    is_old: bool,
    mode: u32,
    owner: (u32, u32),
    has_colour: bool,
}

/// There is no file.
const NOTHING: Sight = Sight { is_old: true, mode: 0, owner: (0, 0), has_colour: false };

/// The directory that contains only the file.
fn place(dir: &Path) -> PathBuf {
    dir.join("file")
}

/// Recreates the directory, with an old file that has everything that a write can keep.
///
/// Returns its visible state: without the privilege, or on a file system without attributes, it has less.
fn renew(way: Way, dir: &Path) -> Sight {
    if dir.exists() {
        std::fs::remove_dir_all(dir).unwrap();
    }
    std::fs::create_dir(dir).unwrap();
    let path = place(dir);
    if way.creates {
        return NOTHING;
    }
    std::fs::write(&path, OLD).unwrap();
    let owned = chown(&path, Some(OLD_OWNER.0), Some(OLD_OWNER.1)).is_ok();
    let coloured = rustix::fs::setxattr(&path, COLOUR, b"green", XattrFlags::empty()).is_ok();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(OLD_MODE)).unwrap();
    rustix::fs::syncfs(std::fs::File::open(dir).unwrap()).unwrap();
    let seen = see(way, &path).unwrap();
    assert!((!owned || seen.owner == OLD_OWNER) && (!coloured || seen.has_colour), "{seen:?}");
    seen
}

/// An error if the file is neither old nor new, but missing or torn.
fn see(way: Way, path: &Path) -> Result<Sight, String> {
    let content = match std::fs::read(path) {
        Err(error) if way.creates && error.kind() == std::io::ErrorKind::NotFound => return Ok(NOTHING),
        other => other.map_err(|error| format!("missing: {error}"))?,
    };
    let is_old = content == OLD && !way.creates;
    if !is_old && (content.len() != way.length || content.iter().any(|&byte| byte != b'N')) {
        return Err(format!("torn: {} bytes", content.len()));
    }
    let meta = std::fs::metadata(path).map_err(|error| format!("missing: {error}"))?;
    let mut value = [0; 16];
    let has_colour =
        rustix::fs::getxattr(path, COLOUR, &mut value[..]).is_ok_and(|length| &value[..length] == b"green");
    Ok(Sight { is_old, mode: meta.mode() & 0o7777, owner: (meta.uid(), meta.gid()), has_colour })
}

/// Compares the state with what the child was told, and sweeps.
async fn verify(way: Way, dir: &Path, old: &Sight, run: &Run, is_cut: bool) -> Result<Picture, String> {
    let now = see(way, &place(dir))?;
    // Content and metadata change together.
    let is_alike = (now.owner, now.has_colour) == (old.owner, old.has_colour) || !(now.is_old || way.keeps_all);
    // The rights of a group go with it.
    let mode = if now.is_old || now.owner.1 == old.owner.1 { old.mode } else { old.mode & 0o700 };
    let belongs_together = way.creates || (is_alike && now.mode == mode);
    if !belongs_together {
        return Err(format!("content and metadata do not belong together: {now:?}"));
    }
    let installed = run.calls.iter().any(|call| way.is_install(call) && call.is_done());
    if !is_cut && installed == now.is_old {
        return Err(format!("the rename was made: {installed}, but {now:?}"));
    }
    match run.said.as_deref() {
        Some("Ok") if now.is_old && !(is_cut && way.may_be_undone) => return Err(format!("Ok was undone: {now:?}")),
        Some(said) if said.starts_with("Unchanged") && !now.is_old => return Err(format!("{said}, but {now:?}")),
        Some(said) if said.starts_with("Visible") && now.is_old && !is_cut => {
            return Err(format!("{said}, but {now:?}"));
        }
        _ => {}
    }
    // A child that lives to report has also cleaned up, unless the disk refuses.
    let is_stuck = run.calls.iter().any(|call| call.name == "unlinkat" && call.is_injected());
    if run.said.is_some() && !is_cut && !is_stuck && !temps(dir).is_empty() {
        return Err(format!("left behind: {:?}", temps(dir)));
    }
    let recovered = atomic_fs::recover(dir).await.map_err(|error| format!("the recovery failed: {error}"))?;
    let report = atomic_fs::sweep(dir).await.map_err(|error| format!("the sweep failed: {error}"))?;
    let left = if now == NOTHING { vec![] } else { vec!["file"] };
    if report.failed > 0 || names(dir) != left || see(way, &place(dir))? != now {
        return Err(format!("after {recovered:?} and {report:?}: {:?}", names(dir)));
    }
    Ok(if now.is_old { Picture::Old } else { Picture::New })
}

/// Checks the reported consequence of a fault, beyond the state of the file.
fn is_reported(call: &Call, fault: &str, run: &Run) -> Result<(), String> {
    match run.said.as_deref() {
        // A file system may lack locks, and one that refuses to remove files leaves litter; anything else is an error.
        Some("Ok") if run.is_hit && !matches!(&*call.name, "flock" | "unlinkat") => {
            Err("it was not reported".to_owned())
        }
        None if fault != KILL && run.is_hit => Err(format!("the child died: {}", run.complaint)),
        _ => Ok(()),
    }
}

/// Visits each call of `way` with each fault.
async fn visit(way: Way, ground: &Ground, quick: usize, tally: &mut Tally) {
    let path = place(&ground.dir);
    renew(way, &ground.dir);
    let run = ground.run(way.task, &path, way.inject(None).as_deref());
    assert_eq!(run.said.as_deref(), Some("Ok"), "{}", run.complaint);
    for (call, fault) in sample(pairs(&way.calls(run), &[EIO, ENOSPC, KILL]), quick) {
        let old = renew(way, &ground.dir);
        let inject = aim(&call, fault);
        let run = ground.run(way.task, &path, way.inject(Some(&inject)).as_deref());
        let is_hit = way.always.is_some() || run.is_hit;
        tally.astray += usize::from(fault != KILL && !is_hit);
        let verdict = verify(way, &ground.dir, &old, &run, false).await;
        let reported = if way.always.is_some() { Ok(()) } else { is_reported(&call, fault, &run) };
        tally.add(&format!("{inject}: {:?}", run.said), reported.and(verdict));
    }
}

#[tokio::test]
async fn a_fault_or_a_kill_at_any_call_of_a_write_leaves_old_or_new() {
    for way in ALL {
        let mut tally = Tally::new(format!("{}/faults", way.name));
        let Some(ground) = Ground::new(&tally.name) else { return };
        visit(way, &ground, 16, &mut tally).await;
        tally.close();
    }
}

#[tokio::test]
async fn the_same_check_catches_a_write_in_place() {
    let mut tally = Tally::new("write/faults/twin");
    let Some(ground) = Ground::new(&tally.name) else { return };
    visit(IN_PLACE, &ground, usize::MAX, &mut tally).await;
    tally.assert_caught("torn");
}

#[tokio::test]
async fn a_second_fault_while_a_failed_write_tidies_up_leaves_old_or_new() {
    let mut tally = Tally::new("write/double-faults");
    let Some(ground) = Ground::new(&tally.name) else { return };
    renew(WRITE, &ground.dir);
    let first = distinct(ground.run(WRITE.task, &place(&ground.dir), None).calls, |_| true);
    for call in sample(first, 4) {
        fail_twice(WRITE, &ground, &call, &mut tally).await;
    }
    tally.close();
}

/// Makes a write fail at `call`, and visits the calls after that with a second fault or a kill.
async fn fail_twice(way: Way, ground: &Ground, call: &Call, tally: &mut Tally) {
    let path = place(&ground.dir);
    let failing = aim(call, EIO);
    renew(way, &ground.dir);
    let run = ground.run(way.task, &path, Some(&failing));
    let Some(failed) = run.calls.iter().position(Call::is_injected) else { return };
    // strace keeps one fault for each name of a call.
    let rest = distinct(run.calls[failed + 1..].to_vec(), |next| next.name != call.name);
    for (next, fault) in sample(pairs(&rest, &[KILL, EIO]), 2) {
        let old = renew(way, &ground.dir);
        let both = format!("{failing}\n{}", aim(&next, fault));
        let run = ground.run(way.task, &path, Some(&both));
        tally.add(&both, verify(way, &ground.dir, &old, &run, false).await);
    }
}

#[tokio::test]
async fn the_same_check_catches_a_write_in_place_that_is_put_back_by_hand() {
    let mut tally = Tally::new("write/double-faults/twin");
    let Some(ground) = Ground::new(&tally.name) else { return };
    renew(PUT_BACK, &ground.dir);
    let calls = distinct(ground.run(PUT_BACK.task, &place(&ground.dir), None).calls, |call| call.name == "write");
    fail_twice(PUT_BACK, &ground, &calls[0], &mut tally).await;
    tally.assert_caught("torn");
}

#[tokio::test]
async fn a_power_cut_at_any_call_of_a_write_leaves_old_or_new_on_ext4() {
    cut_everywhere(Kind::Ext4).await;
}

#[tokio::test]
async fn a_power_cut_at_any_call_of_a_write_leaves_old_or_new_on_xfs() {
    cut_everywhere(Kind::Xfs).await;
}

async fn cut_everywhere(kind: Kind) {
    let mut tally = Tally::new(format!("write/power-cuts-{}", kind.name()));
    let Some(disk) = Disk::new(kind, &tally.name) else { return };
    for way in ALL {
        let calls = way.calls(cut_at(way, &disk, None, false, &mut tally).await);
        let points = calls.iter().flat_map(|call| [(call, false), (call, true)]).collect();
        for (call, elsewhere) in sample(points, 2) {
            cut_at(way, &disk, Some(&aim(call, KILL)), elsewhere, &mut tally).await;
        }
    }
    tally.close();
}

/// Writes with a fault, cuts the power, and checks what is left.
async fn cut_at(way: Way, disk: &Disk, inject: Option<&str>, elsewhere: bool, tally: &mut Tally) -> Run {
    let dir = disk.dir();
    let old = renew(way, &dir);
    let run = disk.run(way.task, &place(&dir), way.inject(inject).as_deref());
    if elsewhere {
        disk.sync_elsewhere();
    }
    disk.cut();
    let at = format!("{} {inject:?}, elsewhere: {elsewhere}: {:?}", way.name, run.said);
    tally.add(&at, verify(way, &dir, &old, &run, true).await);
    run
}

#[tokio::test]
async fn the_same_check_catches_a_write_that_skips_either_sync() {
    for kind in Kind::ALL {
        let name = format!("write/power-cuts-{}/twin", kind.name());
        let Some(disk) = Disk::new(kind, &name) else { continue };
        renew(WRITE, &disk.dir());
        let run = disk.run(WRITE.task, &place(&disk.dir()), None);
        let syncs = distinct(run.calls, |call| call.name == "fsync");
        let [of_file, of_directory] = &syncs[..] else { panic!("{syncs:?}") };
        for (sync, elsewhere, what) in [(of_file, true, "torn"), (of_directory, false, "Ok was undone")] {
            let mut tally = Tally::new(format!("{name}, without {}", sync.text));
            let skipped = aim(sync, "retval=0");
            cut_at(WRITE, &disk, Some(&skipped), elsewhere, &mut tally).await;
            if tally.violations.is_empty() {
                // The one remaining sync may have written the data of the skipped one.
                let none = WITHOUT_SYNCS;
                cut_at(WRITE, &disk, Some(none), elsewhere, &mut tally).await;
            }
            tally.assert_caught(what);
        }
    }
}
