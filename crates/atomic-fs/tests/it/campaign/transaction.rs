//! Transactions under faults, kills and power cuts at every system call.

use std::path::Path;

use cancel_safe_atomic_fs::{self as atomic_fs, MultiFileTransaction, RecoveryReport};
use tempfile::tempdir;

use super::disk::{Disk, Kind};
use super::{
    EIO, ENOSPC, Ground, KILL, Layout, Picture, Tally, WITHOUT_SYNCS, aim, distinct, is_commit, is_decisive, is_full,
    is_look, pairs, sample,
};
use crate::strace::{Call, Run};
use crate::support::{names, temps};

/// How often the child does the same elsewhere first, so that the numbers of its calls are its own.
const OTHERS: usize = 2;
const TASK: &str = "change all after others";

/// The file that is in another directory, if there are two.
fn far(dir: &Path) -> &'static str {
    if dir.join("sub").exists() { "sub/f" } else { "f" }
}

/// Recreates the directory with the old files.
pub(super) fn renew(dir: &Path, layout: Layout) {
    match std::fs::remove_dir_all(dir) {
        Ok(()) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound),
    }
    std::fs::create_dir_all(dir).unwrap();
    if layout == Layout::TwoDirectories {
        std::fs::create_dir(dir.join("sub")).unwrap();
    }
    for name in ["a", "b", "blue", "c", "d", "green", "log", "log.1", "log.2", far(dir)] {
        std::fs::write(dir.join(name), format!("old {name}")).unwrap();
    }
    rustix::fs::syncfs(std::fs::File::open(dir).unwrap()).unwrap();
}

/// The same for a replay.
pub(crate) fn renew_for_replay(dir: &Path, is_one: bool) {
    renew(dir, if is_one { Layout::OneDirectory } else { Layout::TwoDirectories });
}

/// The same for a replay, in which the power was always cut.
pub(crate) async fn verify_for_replay(dir: &Path, said: Option<&str>) -> Result<(), String> {
    verify(dir, said, true).await.map(drop)
}

/// The child's task: every kind of change, in two directories.
pub(crate) async fn change_all(dir: &Path) -> Result<(), atomic_fs::Error> {
    let mut tx = MultiFileTransaction::begin(dir);
    tx.add_file(dir.join("a"), "new a").await?;
    tx.writer(dir.join("b")).await?.write_all(b"new b").await?;
    tx.add_file(dir.join("n"), "new n").await?;
    tx.add_file(dir.join(far(dir)), format!("new {}", far(dir))).await?;
    tx.remove_file(dir.join("c"))?;
    tx.rename(dir.join("d"), dir.join("e"))?;
    tx.rename(dir.join("blue"), dir.join("green"))?;
    tx.rename(dir.join("green"), dir.join("blue"))?;
    // Each of these files has only a hidden name for a while.
    tx.rename(dir.join("log.1"), dir.join("log.2"))?;
    tx.rename(dir.join("log"), dir.join("log.1"))?;
    tx.add_file(dir.join("log"), "new log").await?;
    tx.commit().await
}

/// The child's part.
pub(crate) async fn change_all_after_others(dir: &Path, other: &Path) -> Result<(), atomic_fs::Error> {
    let layout = if far(dir) == "f" { Layout::OneDirectory } else { Layout::TwoDirectories };
    for _ in 0..OTHERS {
        renew(other, layout);
        // A fault for a later call may hit here.
        drop(change_all(other).await);
    }
    change_all(dir).await
}

/// Checks all files; an error if one is torn, or if one is missing that must always exist.
pub(super) fn look(dir: &Path) -> Result<Picture, String> {
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).ok();
    let is = |name: &str, content: &str| read(name).is_some_and(|read| read == content);
    let (mut old, mut new) = (0, 0);
    for name in ["a", "b", far(dir)] {
        match read(name) {
            Some(content) if content == format!("old {name}") => old += 1,
            Some(content) if content == format!("new {name}") => new += 1,
            other => return Err(format!("{name} is {other:?}")),
        }
    }
    for (name, then, now) in [
        ("n", None, Some("new n")),
        ("c", Some("old c"), None),
        ("e", None, Some("old d")),
        ("blue", Some("old blue"), Some("old green")),
        ("green", Some("old green"), Some("old blue")),
        ("log", Some("old log"), Some("new log")),
        ("log.1", Some("old log.1"), Some("old log")),
        ("log.2", Some("old log.2"), Some("old log.1")),
    ] {
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

/// Recovers, and compares the result with what the child was told.
pub(super) async fn verify(dir: &Path, said: Option<&str>, is_cut: bool) -> Result<Picture, String> {
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
    if let (true, Some(other)) = (is_cut, dir.join(far(dir)).parent()) {
        // Each directory's own recovery handles removed names that came back after a cut.
        atomic_fs::recover(other).await.map_err(|error| format!("the other recovery failed: {error}"))?;
    }
    let after = look(dir)?;
    let context = format!("{before:?}, then {after:?} by {report:?}");
    let (first, last) = if far(dir) == "f" { ("f", "") } else { ("", "sub") };
    let mut wanted = match after {
        Picture::Old => vec!["a", "b", "blue", "c", "d", first, "green", "log", "log.1", "log.2", last],
        Picture::New => vec!["a", "b", "blue", "e", first, "green", "log", "log.1", "log.2", "n", last],
        Picture::Mix => return Err(format!("a mix after the recovery: {context}")),
    };
    match said {
        Some("Ok") if after != Picture::New => return Err(format!("Ok was undone: {context}")),
        Some(said) if said.starts_with("Unchanged") && after != Picture::Old => {
            return Err(format!("{said} was not final: {context}"));
        }
        _ => {}
    }
    wanted.retain(|name| !name.is_empty());
    let beside_far = dir.join(far(dir)).parent().map(names);
    if names(dir) != wanted || beside_far.as_ref().is_some_and(|there| *there != ["f"] && *there != wanted) {
        return Err(format!("left: {:?} {beside_far:?}: {context}", temps(dir)));
    }
    match atomic_fs::recover(dir).await {
        Ok(again) if again == RecoveryReport::default() => Ok(after),
        other => Err(format!("the second recovery did something: {other:?}")),
    }
}

impl Ground {
    pub(super) fn change(&self, inject: Option<&str>) -> Run {
        self.attempt(TASK, inject)
    }

    /// Lets `task` change the files.
    fn attempt(&self, task: &str, inject: Option<&str>) -> Run {
        renew(&self.dir, self.layout);
        self.run(task, &self.dir, inject)
    }

    /// The calls of an undisturbed transaction, each number once.
    pub(super) fn calls(&self) -> Vec<Call> {
        let run = self.change(None);
        assert_eq!(run.said.as_deref(), Some("Ok"), "{}", run.complaint);
        distinct(run.calls, |_| true)
    }
}

impl Disk {
    pub(super) fn change(&self, inject: Option<&str>) -> Run {
        renew(&self.dir(), self.layout);
        self.run(TASK, &self.dir(), inject)
    }
}

#[tokio::test]
async fn a_fault_or_a_kill_at_any_call_of_a_transaction_leaves_all_old_or_all_new() {
    for layout in Layout::ALL {
        let mut tally = Tally::new(layout.campaign("transaction/faults"));
        let Some(ground) = Ground::new(&tally.name).map(|ground| ground.with(layout)) else { return };
        let mut calls = ground.calls();
        // In the quick form only the calls that change something.
        calls.retain(|call| is_full() || is_decisive(call) || call.name == "openat");
        for (call, fault) in sample(pairs(&calls, &[EIO, KILL, ENOSPC]), 20) {
            let inject = aim(&call, fault);
            let run = ground.change(Some(&inject));
            let is_hit = run.calls.iter().any(Call::is_injected);
            tally.astray += usize::from(fault != KILL && !is_hit);
            let mut verdict = verify(&ground.dir, run.said.as_deref(), false).await;
            if run.said.is_none() && fault != KILL && is_hit {
                verdict = Err(format!("the child died: {}", run.complaint));
            }
            tally.add(&inject, verdict);
        }
        tally.close();
    }
}

#[tokio::test]
async fn a_second_fault_while_a_failed_transaction_is_undone_leaves_all_old_or_all_new() {
    for layout in Layout::ALL {
        let mut tally = Tally::new(layout.campaign("transaction/double-faults"));
        let Some(ground) = Ground::new(&tally.name).map(|ground| ground.with(layout)) else { return };
        let calls = ground.calls();
        let committed = calls.iter().position(is_commit).unwrap();
        let mut first = calls[committed + 1..].to_vec();
        first.retain(|call| is_decisive(call) && call.name != "unlinkat");
        for call in sample(first, 2) {
            fail_twice(&ground, TASK, &call, &mut tally).await;
        }
        tally.close();
    }
}

/// Makes `task` fail at `call`, and visits the calls after that with a second fault or a kill.
async fn fail_twice(ground: &Ground, task: &str, call: &Call, tally: &mut Tally) {
    let failing = aim(call, EIO);
    let run = ground.attempt(task, Some(&failing));
    let Some(failed) = run.calls.iter().position(Call::is_injected) else { return };
    let mut rest = distinct(run.calls[failed + 1..].to_vec(), is_decisive);
    // strace keeps one fault for each name of a call.
    rest.retain(|next| next.name != call.name);
    for (next, fault) in sample(pairs(&rest, &[KILL, EIO]), 4) {
        let both = format!("{failing}\n{}", aim(&next, fault));
        let run = ground.attempt(task, Some(&both));
        tally.add(&both, verify(&ground.dir, run.said.as_deref(), false).await);
    }
}

#[tokio::test]
async fn a_system_that_cannot_exchange_files_gets_by_with_links() {
    let mut tally = Tally::new("transaction/links");
    let Some(ground) = Ground::new(&tally.name) else { return };
    let run = ground.change(Some("renameat2:error=EINVAL"));
    assert_eq!(run.said.as_deref(), Some("Ok"), "{}", run.complaint);
    assert_eq!(verify(&ground.dir, Some("Ok"), false).await, Ok(Picture::New));
    let calls = distinct(run.calls, |call| is_decisive(call) && call.name != "renameat2");
    for (call, fault) in sample(pairs(&calls, &[KILL, EIO]), 8) {
        let both = format!("renameat2:error=EINVAL\n{}", aim(&call, fault));
        let run = ground.change(Some(&both));
        tally.add(&both, verify(&ground.dir, run.said.as_deref(), false).await);
    }
    tally.close();
}

#[tokio::test]
async fn a_power_cut_at_any_call_of_a_transaction_leaves_all_old_or_all_new_on_ext4() {
    cut_everywhere(Kind::Ext4).await;
}

#[tokio::test]
async fn a_power_cut_at_any_call_of_a_transaction_leaves_all_old_or_all_new_on_xfs() {
    cut_everywhere(Kind::Xfs).await;
}

async fn cut_everywhere(kind: Kind) {
    for layout in Layout::ALL {
        let mut tally = Tally::new(layout.campaign(&format!("transaction/power-cuts-{}", kind.name())));
        let Some(disk) = Disk::new(kind, &tally.name).map(|disk| disk.with(layout)) else { continue };
        let run = disk.change(None);
        disk.cut();
        tally.add("after Ok", verify(&disk.dir(), run.said.as_deref(), true).await);
        let calls = distinct(run.calls, |call| if is_full() { !is_look(call) } else { is_decisive(call) });
        let points = calls.iter().flat_map(|call| [(call, false), (call, true)]).collect();
        for (call, elsewhere) in sample(points, 6) {
            cut_at(&disk, &aim(call, KILL), elsewhere, &mut tally).await;
        }
        tally.close();
    }
}

/// A durable change of the file `a` after the transaction, by any program.
#[derive(Clone, Copy, Debug)]
enum Later {
    Append,
    /// In place, and of the same length as before.
    Overwrite,
    Write,
    Remove,
    /// Like programs that sync the file but not its directory; something else makes it durable.
    RenameAndSyncElsewhere,
    TransactionElsewhere,
}

impl Later {
    const ALL: [Self; 6] = [
        Self::Append,
        Self::Overwrite,
        Self::Write,
        Self::Remove,
        Self::RenameAndSyncElsewhere,
        Self::TransactionElsewhere,
    ];

    /// Makes the change and returns the new content of the file.
    async fn make(self, disk: &Disk) -> Option<&'static str> {
        let (dir, path) = (disk.dir(), disk.dir().join("a"));
        match self {
            Self::Append => {
                let mut file = std::fs::File::options().append(true).open(path).unwrap();
                std::io::Write::write_all(&mut file, b", and more").unwrap();
                file.sync_all().unwrap();
                return Some("new a, and more");
            }
            Self::Overwrite => {
                let mut file = std::fs::File::options().write(true).open(path).unwrap();
                std::io::Write::write_all(&mut file, b"newer").unwrap();
                // Less than a full sync, which would make the removal of the journal durable as well.
                file.sync_data().unwrap();
            }
            Self::Write => atomic_fs::write(path, "newer").await.unwrap(),
            Self::Remove => {
                std::fs::remove_file(path).unwrap();
                std::fs::File::open(dir).unwrap().sync_all().unwrap();
                return None;
            }
            Self::RenameAndSyncElsewhere => {
                let temp = dir.join("a.tmp");
                std::fs::write(&temp, "newer").unwrap();
                std::fs::File::open(&temp).unwrap().sync_all().unwrap();
                std::fs::rename(temp, path).unwrap();
                disk.sync_elsewhere();
            }
            Self::TransactionElsewhere => {
                let home = dir.with_file_name("home");
                std::fs::create_dir_all(&home).unwrap();
                let mut tx = MultiFileTransaction::begin(&home);
                tx.add_file(path, "newer").await.unwrap();
                tx.add_file(home.join("other"), "newer").await.unwrap();
                tx.commit().await.unwrap();
            }
        }
        Some("newer")
    }
}

#[tokio::test]
async fn what_follows_a_commit_survives_a_power_cut_and_the_recovery() {
    for (kind, layout) in Kind::ALL.into_iter().flat_map(|kind| Layout::ALL.map(|layout| (kind, layout))) {
        let mut tally = Tally::new(layout.campaign(&format!("transaction/later-changes-{}", kind.name())));
        let Some(disk) = Disk::new(kind, &tally.name).map(|disk| disk.with(layout)) else { continue };
        for later in sample(Later::ALL.to_vec(), if layout == Layout::OneDirectory { Later::ALL.len() } else { 1 }) {
            follow(&disk, later, &mut tally, |_| {}).await;
        }
        tally.close();
    }
}

/// Makes a change after a commit, cuts the power and recovers; before that, `meddle` may do something to the directory.
async fn follow(disk: &Disk, later: Later, tally: &mut Tally, meddle: impl Fn(&Path)) {
    assert_eq!(disk.change(None).said.as_deref(), Some("Ok"));
    let wanted = later.make(disk).await;
    disk.cut();
    let dir = disk.dir();
    meddle(&dir);
    let mut recovered = atomic_fs::recover(&dir).await;
    let home = dir.with_file_name("home");
    if recovered.is_ok() && home.exists() {
        // The recovery of the other transaction's own directory handles its remains here.
        recovered = atomic_fs::recover(&home).await;
        std::fs::remove_dir_all(&home).unwrap();
    }
    let found = std::fs::read_to_string(dir.join("a")).ok();
    let verdict = if recovered.is_ok() && found.as_deref() == wanted {
        std::fs::write(dir.join("a"), "new a").unwrap();
        verify(&dir, Some("Ok"), true).await
    } else {
        Err(format!("{found:?} instead of {wanted:?}, {recovered:?}"))
    };
    tally.add(&format!("{later:?}"), verdict);
}

#[tokio::test]
async fn the_same_check_catches_a_journal_that_comes_back_after_a_later_change() {
    let mut tally = Tally::new("transaction/later-changes-ext4/twin");
    let Some(disk) = Disk::new(Kind::Ext4, &tally.name).map(|disk| disk.with(Layout::OneDirectory)) else { return };
    let calls = disk.change(None).calls;
    let committed = calls.iter().position(is_commit).unwrap();
    let exchange = calls[committed + 1..].iter().find(|call| call.name == "renameat2").unwrap();
    assert_eq!(disk.change(Some(&aim(exchange, KILL))).said, None);
    // As if neither the exchanges nor the removals had become durable before the later change was.
    let aside = tempdir().unwrap();
    let copy = |from: &Path, to: &Path| {
        for name in temps(from) {
            std::fs::copy(from.join(&name), to.join(&name)).unwrap();
        }
    };
    copy(&disk.dir(), aside.path());
    follow(&disk, Later::Write, &mut tally, |dir| copy(aside.path(), dir)).await;
    tally.assert_caught("instead of");
}

/// Runs the transaction with a fault, cuts the power, and checks what is left.
async fn cut_at(disk: &Disk, inject: &str, elsewhere: bool, tally: &mut Tally) {
    let run = disk.change(Some(inject));
    if elsewhere {
        disk.sync_elsewhere();
    }
    disk.cut();
    tally.add(&format!("{inject}, elsewhere: {elsewhere}"), verify(&disk.dir(), run.said.as_deref(), true).await);
}

#[tokio::test]
async fn the_same_check_catches_a_transaction_that_skips_its_syncs() {
    for kind in Kind::ALL {
        let mut tally = Tally::new(format!("transaction/power-cuts-{}/twin", kind.name()));
        let Some(disk) = Disk::new(kind, &tally.name) else { continue };
        cut_at(&disk, WITHOUT_SYNCS, false, &mut tally).await;
        tally.assert_caught("Ok was undone");
    }
}

#[tokio::test]
async fn the_same_check_catches_one_write_after_the_other() {
    let mut tally = Tally::new("transaction/faults/twin");
    let Some(ground) = Ground::new(&tally.name) else { return };
    renew(&ground.dir, ground.layout);
    let calls = ground.run("one after the other", &ground.dir, None).calls;
    for call in distinct(calls, |call| call.name == "renameat") {
        renew(&ground.dir, ground.layout);
        let inject = aim(&call, KILL);
        let run = ground.run("one after the other", &ground.dir, Some(&inject));
        tally.add(&inject, verify(&ground.dir, run.said.as_deref(), false).await);
    }
    tally.assert_caught("a mix");
}

#[tokio::test]
async fn the_same_check_catches_files_that_are_put_back_by_hand() {
    let mut tally = Tally::new("transaction/double-faults/twin");
    let Some(ground) = Ground::new(&tally.name) else { return };
    let calls = distinct(ground.attempt("undone by hand", None).calls, |call| call.name == "renameat");
    fail_twice(&ground, "undone by hand", &calls[2], &mut tally).await;
    tally.assert_caught("but Mix");
    tally.assert_caught("a mix after the recovery");
}

#[tokio::test]
async fn the_same_check_catches_a_torn_file_without_a_process_of_its_own() {
    let dir = tempdir().unwrap();
    let dir = dir.path().join("traced");
    renew(&dir, Layout::TwoDirectories);
    atomic_fs::write(dir.join("a"), "new a").await.unwrap();
    assert_eq!(look(&dir), Ok(Picture::Mix));
    assert!(verify(&dir, None, false).await.unwrap_err().contains("a mix"));
    std::fs::write(dir.join("a"), "").unwrap();
    assert!(verify(&dir, None, false).await.unwrap_err().contains("a is"));
}
