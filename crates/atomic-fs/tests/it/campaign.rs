//! Transactions under faults, kills and power cuts at every system call, the recovery included.
//!
//! By default each campaign takes a quick form; `CANCEL_SAFE_CAMPAIGN=full` visits every point with every fault.

use std::path::{Path, PathBuf};
use std::process::Command;

use cancel_safe_atomic_fs::{self as atomic_fs, MultiFileTransaction, RecoveryReport};
use tempfile::{TempDir, tempdir};

use crate::child;
use crate::strace::{self, Call, Run};
use crate::support::{names, temps};

/// Calls that change something, and of which none is made by the test harness of the child.
const DECISIVE: [&str; 6] = ["fsync", "renameat", "renameat2", "rename", "linkat", "unlinkat"];
/// How often the child does the same elsewhere first, so that the numbers of its calls are its own.
const OTHERS: usize = 2;

fn is_full() -> bool {
    std::env::var("CANCEL_SAFE_CAMPAIGN").is_ok_and(|form| form == "full")
}

/// Makes the directory anew, with the old files in it.
pub(crate) fn renew(dir: &Path) {
    match std::fs::remove_dir_all(dir) {
        Ok(()) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound),
    }
    std::fs::create_dir_all(dir.join("sub")).unwrap();
    for name in ["a", "b", "c", "d", "sub/f"] {
        std::fs::write(dir.join(name), format!("old {name}")).unwrap();
    }
    rustix::fs::syncfs(std::fs::File::open(dir).unwrap()).unwrap();
}

/// What the child does: every kind of change, in two directories.
pub(crate) async fn change_all(dir: &Path) -> Result<(), atomic_fs::Error> {
    let mut tx = MultiFileTransaction::begin(dir);
    tx.add_file(dir.join("a"), "new a").await?;
    tx.writer(dir.join("b")).await?.write_all(b"new b").await?;
    tx.add_file(dir.join("n"), "new n").await?;
    tx.add_file(dir.join("sub/f"), "new sub/f").await?;
    tx.remove_file(dir.join("c"))?;
    tx.rename(dir.join("d"), dir.join("e"))?;
    tx.commit().await
}

/// The child's side.
pub(crate) async fn change_all_after_others(dir: &Path) -> Result<(), atomic_fs::Error> {
    let other = dir.with_file_name("other");
    for _ in 0..OTHERS {
        renew(&other);
        // A fault that is meant for a later call may hit here.
        drop(change_all(&other).await);
    }
    change_all(dir).await
}

/// What the files are: all old, all new, or each whole but not together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Picture {
    Old,
    New,
    Mix,
}

/// Looks at all files; an error if one is torn, or missing although it never should be.
pub(crate) fn look(dir: &Path) -> Result<Picture, String> {
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).ok();
    let is = |name: &str, content: &str| read(name).is_some_and(|read| read == content);
    let (mut old, mut new) = (0, 0);
    for name in ["a", "b", "sub/f"] {
        match read(name) {
            Some(content) if content == format!("old {name}") => old += 1,
            Some(content) if content == format!("new {name}") => new += 1,
            other => return Err(format!("{name} is {other:?}")),
        }
    }
    for (name, then, now) in [("n", None, Some("new n")), ("c", Some("old c"), None), ("e", None, Some("old d"))] {
        match read(name) {
            content if content.as_deref() == then => old += 1,
            content if content.as_deref() == now => new += 1,
            other => return Err(format!("{name} is {other:?}")),
        }
    }
    match read("d") {
        Some(_) if is("d", "old d") => old += 1,
        None if is("e", "old d") => new += 1,
        other => return Err(format!("d is {other:?}, and e {:?}", read("e"))),
    }
    Ok(match (old, new) {
        (_, 0) => Picture::Old,
        (0, _) => Picture::New,
        _ => Picture::Mix,
    })
}

/// Recovers, and holds the result against what the child had been told.
async fn verify(dir: &Path, said: Option<&str>, is_cut: bool) -> Result<Picture, String> {
    let before = look(dir)?;
    match said {
        Some("Ok") if before != Picture::New && !is_cut => return Err(format!("Ok, but {before:?}")),
        Some(said) if said.starts_with("Unchanged") && before != Picture::Old => {
            return Err(format!("{said}, but {before:?}"));
        }
        Some(said) if said.starts_with("Visible") => return Err(format!("{said} of several files")),
        _ => {}
    }
    let report = atomic_fs::recover(dir).await.map_err(|error| format!("the recovery failed: {error}"))?;
    let after = look(dir)?;
    let context = format!("{before:?}, then {after:?} by {report:?}");
    let wanted = match after {
        Picture::Old => vec!["a", "b", "c", "d", "sub"],
        Picture::New => vec!["a", "b", "e", "n", "sub"],
        Picture::Mix => return Err(format!("a mix after the recovery: {context}")),
    };
    match said {
        Some("Ok") if after != Picture::New => return Err(format!("Ok was undone: {context}")),
        Some(said) if said.starts_with("Unchanged") && after != Picture::Old => {
            return Err(format!("{said} was not final: {context}"));
        }
        _ => {}
    }
    if names(dir) != wanted || names(&dir.join("sub")) != ["f"] {
        return Err(format!("left: {:?} {:?}: {context}", temps(dir), temps(&dir.join("sub"))));
    }
    match atomic_fs::recover(dir).await {
        Ok(again) if again == RecoveryReport::default() => Ok(after),
        other => Err(format!("the second recovery did something: {other:?}")),
    }
}

/// A directory for a campaign, in memory if there is such a place: there a sync costs nothing.
struct Ground {
    _temp: TempDir,
    dir: PathBuf,
    log: PathBuf,
}

impl Ground {
    fn new() -> Option<Self> {
        child::strace()?;
        let memory = Path::new("/dev/shm");
        let temp = if memory.exists() { tempfile::tempdir_in(memory).unwrap() } else { tempdir().unwrap() };
        Some(Self { dir: temp.path().join("traced"), log: temp.path().join("log"), _temp: temp })
    }

    fn change(&self, inject: Option<&str>) -> Run {
        renew(&self.dir);
        strace::run("change all after others", &self.dir, "/traced", &self.log, inject)
    }

    fn recover(&self, inject: Option<&str>) -> Run {
        strace::run("recover", &self.dir, "/traced", &self.log, inject)
    }

    /// The calls of an undisturbed transaction, each number once.
    fn calls(&self) -> Vec<Call> {
        let run = self.change(None);
        assert_eq!(run.said.as_deref(), Some("Ok"), "{}", run.complaint);
        distinct(run.calls, |_| true)
    }
}

/// The calls at which a campaign stops, each aim once.
fn distinct(calls: Vec<Call>, is_wanted: impl Fn(&Call) -> bool) -> Vec<Call> {
    let mut seen = std::collections::HashSet::new();
    calls
        .into_iter()
        .filter(|call| !matches!(&*call.name, "close" | "write") || call.text.contains("traced/.afs"))
        .filter(|call| call.name != "close" && is_wanted(call))
        .filter(|call| seen.insert((call.name.clone(), call.number)))
        .collect()
}

fn aim(call: &Call, fault: &str) -> String {
    format!("{}:{fault}:when={}", call.name, call.number)
}

/// The journal is committed, so that from the next call on a crash leaves something to finish.
fn is_commit(call: &Call) -> bool {
    call.name.starts_with("rename") && call.text.contains("\".afs-journal\"")
}

/// Counts, and tells what a campaign found.
#[derive(Default)]
struct Tally {
    points: usize,
    violations: Vec<String>,
    old: usize,
    new: usize,
    astray: usize,
}

impl Tally {
    fn add(&mut self, at: &str, verdict: Result<Picture, String>) {
        self.points += 1;
        match verdict {
            Ok(Picture::Old) => self.old += 1,
            Ok(_) => self.new += 1,
            Err(violation) => self.violations.push(format!("{at}: {violation}")),
        }
    }

    fn close(self, name: &str) {
        let Self { points, violations, old, new, astray } = self;
        println!(
            "campaign {name}: {points} points, {} violations ({old} old, {new} new, {astray} astray)",
            violations.len()
        );
        assert!(violations.is_empty(), "{violations:#?}");
        assert!(old > 0 || new > 0, "nothing was visited");
        assert!(astray * 3 <= points, "the faults are badly aimed");
    }
}

#[tokio::test]
async fn a_fault_or_a_kill_at_any_call_of_a_transaction_leaves_all_old_or_all_new() {
    let Some(ground) = Ground::new() else { return };
    let faults = ["error=EIO", "signal=SIGKILL", "error=ENOSPC"];
    let mut tally = Tally::default();
    for (position, call) in ground.calls().iter().enumerate() {
        // In the quick form each call that changes something, and some of the others, with one fault each.
        let is_visited = DECISIVE.contains(&&*call.name) || position % 4 == 0;
        for (_, fault) in
            faults.iter().enumerate().filter(|(turn, _)| is_full() || (is_visited && position % 3 == *turn))
        {
            let inject = aim(call, fault);
            let run = ground.change(Some(&inject));
            let is_hit = run.calls.iter().any(Call::is_injected);
            tally.astray += usize::from(!fault.contains("KILL") && !is_hit);
            let mut verdict = verify(&ground.dir, run.said.as_deref(), false).await;
            if run.said.is_none() && !fault.contains("KILL") && is_hit {
                verdict = Err(format!("the child died: {}", run.complaint));
            }
            tally.add(&inject, verdict);
        }
    }
    tally.close("transaction/faults");
}

#[tokio::test]
async fn a_kill_while_a_failed_transaction_is_undone_leaves_all_old_or_all_new() {
    let Some(ground) = Ground::new() else { return };
    let calls = ground.calls();
    let committed = calls.iter().position(is_commit).unwrap();
    let decisive = |call: &&Call| DECISIVE.contains(&&*call.name);
    let first: Vec<_> = calls[committed + 1..].iter().filter(decisive).filter(|call| call.name != "unlinkat").collect();
    let mut tally = Tally::default();
    for (turn, call) in first.iter().enumerate().filter(|(turn, _)| is_full() || *turn == 2) {
        let failing = aim(call, "error=EIO");
        let run = ground.change(Some(&failing));
        let Some(failed) = run.calls.iter().position(Call::is_injected) else { continue };
        let rest = distinct(run.calls[failed + 1..].to_vec(), |next| decisive(&next));
        // strace keeps one fault for each name of a call.
        for next in rest.iter().filter(|next| next.name != call.name) {
            for fault in
                ["signal=SIGKILL", "error=EIO"].iter().filter(|fault| is_full() || fault.contains("KILL") || turn == 2)
            {
                let both = format!("{failing}\n{}", aim(next, fault));
                let run = ground.change(Some(&both));
                tally.add(&both, verify(&ground.dir, run.said.as_deref(), false).await);
            }
        }
    }
    tally.close("transaction/double-faults");
}

#[tokio::test]
async fn a_fault_or_a_kill_at_any_call_of_a_recovery_leaves_it_to_the_next_one() {
    let Some(ground) = Ground::new() else { return };
    let calls = ground.calls();
    let committed = calls.iter().position(is_commit).unwrap();
    let decisive = |call: &&Call| DECISIVE.contains(&&*call.name);
    let crashes: Vec<_> = calls[committed..].iter().filter(decisive).collect();
    let mut tally = Tally::default();
    for (_, crash) in crashes.iter().enumerate().filter(|(turn, _)| is_full() || *turn == 3) {
        let crash = aim(crash, "signal=SIGKILL");
        ground.change(Some(&crash));
        let run = ground.recover(None);
        assert_eq!(run.said.as_deref(), Some("Ok"), "{crash}: {}", run.complaint);
        for call in distinct(run.calls, |call| decisive(&call)) {
            for fault in ["signal=SIGKILL", "error=EIO"] {
                ground.change(Some(&crash));
                let inject = aim(&call, fault);
                let run = ground.recover(Some(&inject));
                let verdict = verify(&ground.dir, None, false).await;
                tally.add(&format!("{crash}, then {inject}: {:?}", run.said), verdict);
            }
        }
    }
    tally.close("recovery/faults");
}

#[tokio::test]
async fn a_system_that_cannot_exchange_files_gets_by_with_links() {
    let Some(ground) = Ground::new() else { return };
    let calls = {
        let run = ground.change(Some("renameat2:error=EINVAL"));
        assert_eq!(run.said.as_deref(), Some("Ok"), "{}", run.complaint);
        assert_eq!(verify(&ground.dir, Some("Ok"), false).await, Ok(Picture::New));
        distinct(run.calls, |call| DECISIVE.contains(&&*call.name) && call.name != "renameat2")
    };
    let mut tally = Tally::default();
    for (position, call) in calls.iter().enumerate() {
        for (_, fault) in
            ["signal=SIGKILL", "error=EIO"].iter().enumerate().filter(|(turn, _)| is_full() || position % 4 == *turn)
        {
            let both = format!("renameat2:error=EINVAL\n{}", aim(call, fault));
            let run = ground.change(Some(&both));
            tally.add(&both, verify(&ground.dir, run.said.as_deref(), false).await);
        }
    }
    tally.close("transaction/links");
}

/// A file system of its own on a loop device, whose power can be cut.
struct Disk {
    temp: TempDir,
    point: PathBuf,
}

impl Disk {
    fn new() -> Option<Self> {
        child::strace()?;
        let temp = tempdir().unwrap();
        let (image, point) = (temp.path().join("image"), temp.path().join("disk"));
        std::fs::create_dir(&point).unwrap();
        std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let disk = Self { temp, point };
        let works = rustix::process::geteuid().is_root()
            && Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image).status().is_ok_and(|status| status.success())
            && disk.mount()
            && disk.cut();
        if !works {
            println!("power cuts: not run, because they need root, mkfs.ext4, loop mounts and python3");
            return None;
        }
        Some(disk)
    }

    /// Without what ext4 does by default to hide a missing sync.
    fn mount(&self) -> bool {
        let mut mount = Command::new("mount");
        mount.args(["-t", "ext4", "-o", "loop,noauto_da_alloc"]).arg(self.temp.path().join("image")).arg(&self.point);
        mount.status().is_ok_and(|status| status.success())
    }

    /// Cuts the power: nothing more reaches the disk. Then the machine starts again.
    fn cut(&self) -> bool {
        // FS_IOC_GOINGDOWN without flushing the log.
        const SCRIPT: &str = "import fcntl,os,struct,sys\n\
            fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack('I', 2))";
        let went_down = Command::new("python3").args(["-c", SCRIPT]).arg(&self.point).status();
        went_down.is_ok_and(|status| status.success()) && self.unmount() && self.mount()
    }

    fn unmount(&self) -> bool {
        Command::new("umount").arg(&self.point).status().is_ok_and(|status| status.success())
    }

    fn dir(&self) -> PathBuf {
        self.point.join("traced")
    }

    fn run(&self, task: &str, inject: Option<&str>) -> Run {
        strace::run(task, &self.dir(), "/traced", &self.temp.path().join("log"), inject)
    }

    fn change(&self, inject: Option<&str>) -> Run {
        renew(&self.dir());
        self.run("change all after others", inject)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Not if it never was mounted.
        let _gone = Command::new("umount").arg("-q").arg(&self.point).status();
    }
}

/// Makes the file system write its log, as any other program may do at any time.
fn sync_elsewhere(disk: &Disk) {
    let file = std::fs::File::create(disk.point.join("elsewhere")).unwrap();
    file.sync_all().unwrap();
}

#[tokio::test]
async fn a_power_cut_at_any_call_of_a_transaction_leaves_all_old_or_all_new() {
    let Some(disk) = Disk::new() else { return };
    let run = disk.change(None);
    assert!(disk.cut());
    let mut tally = Tally::default();
    tally.add("after Ok", verify(&disk.dir(), run.said.as_deref(), true).await);
    let decisive = |call: &Call| is_full() || DECISIVE.contains(&&*call.name);
    for (position, call) in distinct(run.calls, decisive).iter().enumerate() {
        for (_, elsewhere) in [false, true].iter().enumerate().filter(|(turn, _)| is_full() || position % 2 == *turn) {
            let inject = aim(call, "signal=SIGKILL");
            let run = disk.change(Some(&inject));
            if *elsewhere {
                sync_elsewhere(&disk);
            }
            assert!(disk.cut());
            tally.add(&inject, verify(&disk.dir(), run.said.as_deref(), true).await);
        }
    }
    tally.close("transaction/power-cuts");
}

#[tokio::test]
async fn a_power_cut_at_any_call_of_a_recovery_leaves_it_to_the_next_one() {
    let Some(disk) = Disk::new() else { return };
    let calls = distinct(disk.change(None).calls, |call| DECISIVE.contains(&&*call.name));
    let committed = calls.iter().position(is_commit).unwrap();
    let mut tally = Tally::default();
    let crashes = calls[committed + 1..].iter().enumerate();
    for (_, crash) in crashes.filter(|(turn, _)| is_full() || *turn == 4) {
        let crash = aim(crash, "signal=SIGKILL");
        disk.change(Some(&crash));
        assert!(disk.cut());
        let run = disk.run("recover", None);
        for call in distinct(run.calls, |call| DECISIVE.contains(&&*call.name)) {
            disk.change(Some(&crash));
            assert!(disk.cut());
            let inject = aim(&call, "signal=SIGKILL");
            disk.run("recover", Some(&inject));
            assert!(disk.cut());
            tally.add(&format!("{crash}, then {inject}"), verify(&disk.dir(), None, true).await);
        }
    }
    tally.close("recovery/power-cuts");
}

#[tokio::test]
async fn the_same_check_catches_one_rename_after_the_other() {
    let dir = tempdir().unwrap();
    let dir = dir.path().join("traced");
    renew(&dir);
    // As a process would that is killed between two commits.
    atomic_fs::write(dir.join("a"), "new a").await.unwrap();
    assert_eq!(look(&dir), Ok(Picture::Mix));
    assert!(verify(&dir, None, false).await.unwrap_err().contains("a mix"));
    std::fs::write(dir.join("a"), "").unwrap();
    assert!(verify(&dir, None, false).await.unwrap_err().contains("a is"));
}

/// Leaves `dir` as a crash at the second exchange does; `false` without strace.
fn crash_in_the_middle(ground: &Ground) -> Picture {
    let calls = ground.calls();
    let committed = calls.iter().position(is_commit).unwrap();
    let exchange = calls[committed + 1..].iter().filter(|call| call.name == "renameat2").nth(1).unwrap();
    let run = ground.change(Some(&aim(exchange, "signal=SIGKILL")));
    assert_eq!(run.said, None);
    look(&ground.dir).unwrap()
}

#[tokio::test]
async fn a_target_that_somebody_changed_after_the_crash_is_refused_and_nothing_is_touched() {
    let Some(ground) = Ground::new() else { return };
    assert_eq!(crash_in_the_middle(&ground), Picture::Mix);
    let (dir, victim) = (&ground.dir, ground.dir.join("sub/f"));
    let aside = dir.with_file_name("aside");
    std::fs::rename(&victim, &aside).unwrap();
    std::fs::write(&victim, "by somebody else").unwrap();
    let left = names(dir);
    let error = atomic_fs::recover(dir).await.unwrap_err();
    assert!(error.is_refused() && error.to_string().contains("by hand"), "{error}");
    assert!(error.to_string().contains("sub/f"), "{error}");
    assert_eq!(names(dir), left);
    // What was put aside is put back: the way out that the error names.
    std::fs::rename(&aside, &victim).unwrap();
    assert_eq!(verify(dir, None, false).await, Ok(Picture::New));
}

#[tokio::test]
async fn a_restored_backup_recovers_although_every_inode_is_another() {
    let Some(ground) = Ground::new() else { return };
    assert_eq!(crash_in_the_middle(&ground), Picture::Mix);
    let backup = ground.dir.with_file_name("backup");
    let copied = Command::new("cp").arg("-a").args([&ground.dir, &backup]).status().unwrap();
    assert!(copied.success());
    std::fs::remove_dir_all(&ground.dir).unwrap();
    let restored = Command::new("cp").arg("-a").args([&backup, &ground.dir]).status().unwrap();
    assert!(restored.success());
    assert_eq!(verify(&ground.dir, None, false).await, Ok(Picture::New));
}

#[tokio::test]
async fn a_journal_that_is_altered_anywhere_is_refused() {
    let Some(ground) = Ground::new() else { return };
    assert_eq!(crash_in_the_middle(&ground), Picture::Mix);
    let journal = ground.dir.join(".afs-journal");
    let whole = std::fs::read(&journal).unwrap();
    let left = names(&ground.dir);
    for position in (0..whole.len()).step_by(7) {
        let mut altered = whole.clone();
        altered[position] ^= 0x10;
        for content in [&altered[..], &whole[..position]] {
            std::fs::write(&journal, content).unwrap();
            let error = atomic_fs::recover(&ground.dir).await.unwrap_err();
            assert!(matches!(error, atomic_fs::Error::CorruptJournal { .. }), "{position}: {error}");
        }
    }
    assert_eq!((names(&ground.dir), look(&ground.dir)), (left, Ok(Picture::Mix)));
    std::fs::write(&journal, whole).unwrap();
    assert_eq!(verify(&ground.dir, None, false).await, Ok(Picture::New));
}
