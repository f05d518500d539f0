//! Recoveries under faults, kills and power cuts at every system call, and journals that are refused.

use std::path::Path;
use std::process::Command;

use cancel_safe_atomic_fs as atomic_fs;

use super::disk::{Disk, Kind};
use super::transaction::{look, verify};
use super::{EIO, Ground, KILL, Picture, Tally, aim, distinct, is_commit, is_decisive, is_full, pairs, sample};
use crate::strace::{Call, Run};
use crate::support::names;

/// The child's task; and a broken one, which has no journal for a while.
const RECOVER: &str = "recover";
const RECOVER_ASIDE: &str = "recover with the journal put aside";

impl Ground {
    fn recover(&self, inject: Option<&str>) -> Run {
        self.run(RECOVER, &self.dir, inject)
    }

    fn crashes(&self) -> Vec<Call> {
        crashes(&self.calls())
    }
}

/// The content of each file that is visible to others.
fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for place in [dir.to_owned(), dir.join("sub")] {
        let visible = names(&place).into_iter().filter(|name| !name.starts_with(".afs-") && name != "sub");
        all.extend(visible.map(|name| (name.clone(), std::fs::read(place.join(name)).unwrap())));
    }
    all
}

/// The calls at which a crash leaves something to recover.
fn crashes(calls: &[Call]) -> Vec<Call> {
    let committed = calls.iter().position(is_commit).unwrap();
    unfinished(calls[committed + 1..].iter().filter(|call| is_decisive(call)).cloned())
}

/// In the quick form, only the calls before the journal is removed: after that only litter is left.
fn unfinished(calls: impl IntoIterator<Item = Call>) -> Vec<Call> {
    calls.into_iter().take_while(|call| is_full() || call.name != "unlinkat").collect()
}

#[tokio::test]
async fn a_fault_or_a_kill_at_any_call_of_a_recovery_leaves_it_to_the_next_one() {
    let mut tally = Tally::new("recovery/faults");
    let Some(ground) = Ground::new(&tally.name) else { return };
    for crash in sample(ground.crashes(), 4) {
        let crash = aim(&crash, KILL);
        ground.change(Some(&crash));
        let run = ground.recover(None);
        assert_eq!(run.said.as_deref(), Some("Ok"), "{crash}: {}", run.complaint);
        let calls = distinct(run.calls, is_decisive);
        for (call, fault) in sample(pairs(&calls, &[KILL, EIO]), 8) {
            ground.change(Some(&crash));
            let before = contents(&ground.dir);
            let inject = aim(&call, fault);
            let run = ground.recover(Some(&inject));
            let is_told = run.said.as_ref().is_some_and(|said| said.starts_with("Unchanged"));
            let is_true = !is_told || contents(&ground.dir) == before;
            let verdict = verify(&ground.dir, None, false).await;
            let verdict = if is_true { verdict } else { Err("Unchanged, but it did change something".to_owned()) };
            tally.add(&format!("{crash}, then {inject}: {:?}", run.said), verdict);
        }
    }
    tally.close();
}

#[tokio::test]
async fn a_second_fault_in_a_recovery_leaves_it_to_the_next_one() {
    let mut tally = Tally::new("recovery/double-faults");
    let Some(ground) = Ground::new(&tally.name) else { return };
    // A transaction that failed and was killed while it was undone, so that there is something to roll back; and one
    // that was killed while it was applied.
    let crashes = ground.crashes();
    let failing = crashes.iter().rfind(|call| call.name == "renameat2").unwrap();
    let failing = aim(failing, EIO);
    let run = ground.change(Some(&failing));
    let failed = run.calls.iter().position(Call::is_injected).unwrap();
    let undoing = distinct(run.calls[failed + 1..].to_vec(), |call| is_decisive(call) && call.name != "renameat2");
    let undoing = unfinished(undoing);
    let aborts = undoing.iter().map(|call| format!("{failing}\n{}", aim(call, KILL)));
    let applies = crashes.iter().map(|call| aim(call, KILL));
    // Every third: three nested loops over all calls would take an hour.
    for crash in sample(aborts.chain(applies).step_by(3).collect(), 2) {
        fail_twice(&ground, RECOVER, &crash, &mut tally).await;
    }
    tally.close();
}

/// Lets `task` recover the state that `crash` leaves, with one fault and then another one or a kill.
async fn fail_twice(ground: &Ground, task: &str, crash: &str, tally: &mut Tally) {
    let recover = |inject: Option<&str>| {
        ground.change(Some(crash));
        ground.run(task, &ground.dir, inject)
    };
    for first in sample(distinct(recover(None).calls, is_decisive), 4) {
        let failing = aim(&first, EIO);
        let calls = distinct(recover(Some(&failing)).calls, |call| is_decisive(call) && call.name != first.name);
        for (call, fault) in sample(pairs(&calls, &[KILL, EIO]), 3) {
            let both = format!("{failing}\n{}", aim(&call, fault));
            recover(Some(&both));
            tally.add(&format!("{crash}, then {both}"), verify(&ground.dir, None, false).await);
        }
    }
}

#[tokio::test]
async fn a_power_cut_at_any_call_of_a_recovery_leaves_it_to_the_next_one_on_ext4() {
    cut_everywhere(Kind::Ext4).await;
}

#[tokio::test]
async fn a_power_cut_at_any_call_of_a_recovery_leaves_it_to_the_next_one_on_xfs() {
    cut_everywhere(Kind::Xfs).await;
}

async fn cut_everywhere(kind: Kind) {
    let mut tally = Tally::new(format!("recovery/power-cuts-{}", kind.name()));
    let Some(disk) = Disk::new(kind, &tally.name) else { return };
    let calls = distinct(disk.change(None).calls, is_decisive);
    // In turns: as it is, with the old files and a journal; and with everything that was exchanged.
    for (number, crash) in sample(crashes(&calls), 2).iter().enumerate() {
        cut_recoveries(&disk, RECOVER, &aim(crash, KILL), number % 2 == 1, is_decisive, &mut tally).await;
    }
    tally.close();
}

/// Cuts the power after `crash`, and again at each call of a recovery that is `wanted`.
async fn cut_recoveries(
    disk: &Disk,
    task: &str,
    crash: &str,
    elsewhere: bool,
    wanted: fn(&Call) -> bool,
    tally: &mut Tally,
) {
    let recover = |inject: Option<&str>| {
        disk.change(Some(crash));
        if elsewhere {
            disk.sync_elsewhere();
        }
        disk.cut();
        disk.run(task, &disk.dir(), inject)
    };
    for call in sample(distinct(recover(None).calls, wanted), 3) {
        let inject = aim(&call, KILL);
        recover(Some(&inject));
        disk.cut();
        tally.add(&format!("{crash}, elsewhere: {elsewhere}, then {inject}"), verify(&disk.dir(), None, true).await);
    }
}

#[tokio::test]
async fn the_same_check_catches_a_recovery_that_only_tidies_up() {
    let mut tally = Tally::new("recovery/faults/twin");
    let Some(ground) = Ground::new(&tally.name) else { return };
    assert_eq!(crash_in_the_middle(&ground), Picture::Mix);
    for name in names(&ground.dir).iter().filter(|name| name.starts_with(".afs-")) {
        std::fs::remove_file(ground.dir.join(name)).unwrap();
    }
    tally.add("no journal, no temporary files", verify(&ground.dir, None, false).await);
    tally.assert_caught("a mix");
}

#[tokio::test]
async fn the_same_checks_catch_a_recovery_that_puts_its_journal_aside() {
    let mut tally = Tally::new("recovery/double-faults/twin");
    let Some(ground) = Ground::new(&tally.name) else { return };
    fail_twice(&ground, RECOVER_ASIDE, &second_exchange(&ground.calls()), &mut tally).await;
    tally.assert_caught("a mix");
    let mut tally = Tally::new("recovery/power-cuts-ext4/twin");
    let Some(disk) = Disk::new(Kind::Ext4, &tally.name) else { return };
    let crash = second_exchange(&disk.change(None).calls);
    cut_recoveries(&disk, RECOVER_ASIDE, &crash, true, |call| call.name == "rename", &mut tally).await;
    tally.assert_caught("a mix");
}

/// A kill at the second exchange.
fn second_exchange(calls: &[Call]) -> String {
    let committed = calls.iter().position(is_commit).unwrap();
    aim(calls[committed + 1..].iter().filter(|call| call.name == "renameat2").nth(1).unwrap(), KILL)
}

/// Leaves the directory in the state after a crash at the second exchange.
fn crash_in_the_middle(ground: &Ground) -> Picture {
    let run = ground.change(Some(&second_exchange(&ground.calls())));
    assert_eq!(run.said, None);
    look(&ground.dir).unwrap()
}

#[tokio::test]
async fn a_target_that_somebody_changed_after_the_crash_is_refused_and_nothing_is_touched() {
    let Some(ground) = Ground::new("recovery/refusals") else { return };
    let (dir, victim) = (&ground.dir, ground.dir.join("sub/f"));
    let aside = dir.with_file_name("aside");
    // In place, and as another file; the last one resembles the old file in everything but content and time.
    for (content, in_place) in [("by somebody else", true), ("own sub/f", true), ("own sub/f", false)] {
        assert_eq!(crash_in_the_middle(&ground), Picture::Mix);
        if !in_place {
            std::fs::remove_file(&victim).unwrap();
        }
        std::fs::write(&victim, content).unwrap();
        let left = names(dir);
        let error = atomic_fs::recover(dir).await.unwrap_err();
        assert!(error.is_refused() && error.to_string().contains("by hand"), "{error}");
        assert!(error.to_string().contains("sub/f"), "{error}");
        assert_eq!((names(dir), std::fs::read_to_string(&victim).unwrap()), (left, content.to_owned()));
        // The remedy from the error text; nothing that others wrote is lost.
        std::fs::rename(&victim, &aside).unwrap();
        let report = atomic_fs::recover(dir).await.unwrap();
        assert_eq!((report.rolled_forward, look(dir)), (1, Ok(Picture::New)));
        assert_eq!(std::fs::read_to_string(&aside).unwrap(), content);
    }
}

#[tokio::test]
async fn what_was_written_over_an_applied_file_before_the_recovery_is_kept() {
    let Some(ground) = Ground::new("recovery/refusals") else { return };
    let committed = kill_before_the_journal_goes(&ground);
    // A file that was replaced, and one that was created.
    for name in ["a", "n"] {
        assert_eq!(ground.change(Some(&committed)).said, None);
        atomic_fs::write(ground.dir.join(name), "newer").await.unwrap();
        let report = atomic_fs::recover(&ground.dir).await.unwrap();
        assert_eq!(report.rolled_forward, 1);
        assert_eq!(std::fs::read_to_string(ground.dir.join(name)).unwrap(), "newer", "{name}");
        std::fs::write(ground.dir.join(name), format!("new {name}")).unwrap();
        assert_eq!(verify(&ground.dir, None, false).await, Ok(Picture::New));
    }
}

#[tokio::test]
async fn what_was_written_over_a_file_before_a_failed_transaction_is_undone_is_kept() {
    let Some(ground) = Ground::new("recovery/refusals") else { return };
    let committed = kill_before_the_journal_goes(&ground);
    for name in ["a", "n"] {
        assert_eq!(ground.change(Some(&committed)).said, None);
        // As if its last sync had failed.
        std::fs::rename(ground.dir.join(".afs-journal"), ground.dir.join(".afs-journal-prepared")).unwrap();
        atomic_fs::write(ground.dir.join(name), "newer").await.unwrap();
        let report = atomic_fs::recover(&ground.dir).await.unwrap();
        assert_eq!(report.rolled_back, 1);
        assert_eq!(std::fs::read_to_string(ground.dir.join(name)).unwrap(), "newer", "{name}");
        match name {
            "a" => std::fs::write(ground.dir.join(name), "old a").unwrap(),
            _ => std::fs::remove_file(ground.dir.join(name)).unwrap(),
        }
        assert_eq!(verify(&ground.dir, None, false).await, Ok(Picture::Old));
    }
}

#[tokio::test]
async fn a_file_that_is_made_again_after_its_removal_is_kept() {
    let Some(ground) = Ground::new("recovery/refusals") else { return };
    let committed = kill_before_the_journal_goes(&ground);
    // With its old content, and with different content.
    for content in ["old c", "newer"] {
        assert_eq!(ground.change(Some(&committed)).said, None);
        atomic_fs::write(ground.dir.join("c"), content).await.unwrap();
        assert_eq!(atomic_fs::recover(&ground.dir).await.unwrap().rolled_forward, 1);
        assert_eq!(std::fs::read_to_string(ground.dir.join("c")).unwrap(), content);
        std::fs::remove_file(ground.dir.join("c")).unwrap();
        assert_eq!(verify(&ground.dir, None, false).await, Ok(Picture::New));
    }
}

#[tokio::test]
async fn a_new_file_that_was_written_to_in_place_is_not_undone_by_guess() {
    let Some(ground) = Ground::new("recovery/refusals") else { return };
    let committed = kill_before_the_journal_goes(&ground);
    for (is_aborting, is_freed) in [(false, false), (false, true), (true, false)] {
        assert_eq!(ground.change(Some(&committed)).said, None);
        let is_staged = |name: &String| name.starts_with(".afs-tx-");
        for name in names(&ground.dir).into_iter().filter(|name| is_freed && is_staged(name)) {
            std::fs::remove_file(ground.dir.join(name)).unwrap();
        }
        let (journal, aborting) = (ground.dir.join(".afs-journal"), ground.dir.join(".afs-journal-prepared"));
        if is_aborting {
            std::fs::rename(journal, aborting).unwrap();
        }
        let mut file = std::fs::File::options().append(true).open(ground.dir.join("a")).unwrap();
        std::io::Write::write_all(&mut file, b", and more").unwrap();
        let recovered = atomic_fs::recover(&ground.dir).await;
        assert_eq!(std::fs::read_to_string(ground.dir.join("a")).unwrap(), "new a, and more");
        match recovered {
            Ok(report) => assert!(!is_aborting && report.rolled_forward == 1, "{report:?}"),
            Err(error) => assert!(is_aborting && error.is_refused(), "{error}"),
        }
    }
}

/// Like a log during its rotation. Whatever its name, it is the same file, so nothing must be lost or refused.
#[tokio::test]
async fn a_file_that_is_moved_while_somebody_writes_to_it_is_recovered_with_what_they_wrote() {
    let Some(ground) = Ground::new("recovery/moved-files") else { return };
    let calls = ground.calls();
    let moves = [("d", "e"), ("log", "log.1"), ("log.1", "log.2")];
    let applied = kill_before_the_journal_goes(&ground);
    for (crash, is_applied, is_aborting) in [
        (second_exchange(&calls), false, false),
        (second_exchange(&calls), false, true),
        (applied.clone(), true, false),
        (applied, true, true),
    ] {
        assert_eq!(ground.change(Some(&crash)).said, None);
        let dir = &ground.dir;
        if is_aborting {
            std::fs::rename(dir.join(".afs-journal"), dir.join(".afs-journal-prepared")).unwrap();
        }
        for (from, to) in moves {
            // Two grow, and one does not keep its old content.
            let path = dir.join(if is_applied { to } else { from });
            let mut file = std::fs::File::options().write(true).append(from != "log").open(path).unwrap();
            std::io::Write::write_all(&mut file, b"and more").unwrap();
        }
        let context = format!("applied: {is_applied}, aborting: {is_aborting}");
        let report = atomic_fs::recover(dir).await.map_err(|error| format!("{context}: {error}")).unwrap();
        assert_eq!(
            (report.rolled_back, report.rolled_forward),
            (is_aborting.into(), (!is_aborting).into()),
            "{context}"
        );
        for ((from, to), wanted) in moves.into_iter().zip(["old dand more", "and more", "old log.1and more"]) {
            let path = dir.join(if is_aborting { from } else { to });
            assert_eq!(std::fs::read_to_string(path).unwrap(), wanted, "{context}, {from} to {to}");
        }
        assert_eq!(crate::support::temps(dir), [""; 0], "{context}");
    }
}

/// A kill when everything is applied, just before the journal is removed.
fn kill_before_the_journal_goes(ground: &Ground) -> String {
    let removal = |call: &&Call| call.name == "unlinkat" && call.text.contains("\".afs-journal\"");
    aim(ground.calls().iter().find(removal).unwrap(), KILL)
}

/// Like a restored backup: the same content with other inodes.
fn restore(dir: &Path) {
    let backup = dir.with_file_name("backup");
    for (from, to) in [(dir, &*backup), (&*backup, dir)] {
        let copied = Command::new("cp").arg("-a").args([from, to]).status().unwrap();
        assert!(copied.success());
        std::fs::remove_dir_all(from).unwrap();
    }
}

#[tokio::test]
async fn a_restored_backup_recovers_although_every_inode_is_another() {
    let Some(ground) = Ground::new("recovery/refusals") else { return };
    assert_eq!(crash_in_the_middle(&ground), Picture::Mix);
    restore(&ground.dir);
    assert_eq!(verify(&ground.dir, None, false).await, Ok(Picture::New));
}

#[tokio::test]
async fn a_restored_backup_recovers_where_a_file_was_replaced_by_the_same_content() {
    let Some(ground) = Ground::new("recovery/refusals") else { return };
    let read = |name: &str| std::fs::read_to_string(ground.dir.join(name)).unwrap();
    // Of two files, the unchanged one is exchanged first, or last; and the process is killed before, between and after.
    for (a, b) in [("same", "new"), ("new", "same")] {
        for exchange in 2..=4 {
            if ground.dir.exists() {
                std::fs::remove_dir_all(&ground.dir).unwrap();
            }
            std::fs::create_dir(&ground.dir).unwrap();
            std::fs::write(ground.dir.join("a"), a.replace("new", "old")).unwrap();
            std::fs::write(ground.dir.join("b"), b.replace("new", "old")).unwrap();
            // The first renames the journal, the next two exchange a file each.
            let inject = format!("renameat2:{KILL}:when={exchange}");
            let run = ground.run(&format!("pair {a} {b}"), &ground.dir, Some(&inject));
            assert_eq!(run.said.as_deref(), if exchange == 4 { Some("Ok") } else { None }, "{}", run.complaint);
            restore(&ground.dir);
            atomic_fs::recover(&ground.dir).await.unwrap();
            assert_eq!((read("a").as_str(), read("b").as_str()), (a, b), "killed at {exchange}");
            assert_eq!(names(&ground.dir), ["a", "b"]);
        }
    }
}

#[tokio::test]
async fn a_journal_that_is_altered_anywhere_is_refused() {
    let Some(ground) = Ground::new("recovery/refusals") else { return };
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
