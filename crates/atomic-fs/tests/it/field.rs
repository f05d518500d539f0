//! Transactions in practice: copied and moved trees, files of other users, large files, swapped names.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use cancel_safe_atomic_fs::{
    self as atomic_fs, AtomicFileWriter, Durability, Error, MultiFileTransaction, Preserve, Symlinks, TargetState,
};
use tempfile::{TempDir, tempdir};

use crate::child;
use crate::support::{names, temps};

/// A tree `tree` with the directories `a` and `b`, in each of which a transaction of both was killed: `a/x` is new, and
/// `b/y` is not yet.
fn killed_halfway() -> Option<TempDir> {
    let strace = child::strace("what a kill leaves is copied and moved")?;
    let dir = tempdir().unwrap();
    for (place, name) in [("a", "x"), ("b", "y")] {
        std::fs::create_dir_all(dir.path().join("tree").join(place)).unwrap();
        std::fs::write(dir.path().join("tree").join(place).join(name), "old").unwrap();
    }
    // The first renames the journal, the second exchanges `x`.
    let wrapper = [strace, "-f", "-qq", "-o", "/dev/null", "-e", "inject=renameat2:signal=SIGKILL:when=3"];
    let killed = child::outcome(child::command(&wrapper, "two directories", &dir.path().join("tree")));
    assert_eq!((killed, contents(&dir.path().join("tree"))), (None, ("new".into(), "old".into())));
    Some(dir)
}

fn contents(tree: &Path) -> (String, String) {
    let read = |name: &str| std::fs::read_to_string(tree.join(name)).unwrap();
    (read("a/x"), read("b/y"))
}

fn both(content: &str) -> (String, String) {
    (content.to_owned(), content.to_owned())
}

/// Copies a tree with its times, as backups do.
fn copy(from: &Path, to: &Path, how: &str) {
    let script = match how {
        "cp" => r#"cp -a "$0" "$1""#,
        // Times in whole seconds, and other numbers.
        "tar" => r#"mkdir "$1" && tar -C "$0" --format=ustar -cf - . | tar -C "$1" -xf -"#,
        other => panic!("{other}?"),
    };
    assert!(Command::new("sh").args(["-c", script]).args([from, to]).status().unwrap().success());
}

#[tokio::test]
async fn a_copy_of_a_crashed_tree_recovers_itself_and_leaves_the_original_alone() {
    let Some(dir) = killed_halfway() else { return };
    let [tree, copied] = ["tree", "copy"].map(|name| dir.path().join(name));
    copy(&tree, &copied, "cp");
    // From either directory: the second one leads to the journal in the first.
    for (place, start) in [(&copied, "b"), (&tree, "a")] {
        let before = contents(&tree);
        assert_eq!(atomic_fs::recover(place.join(start)).await.unwrap().rolled_forward, 1);
        assert_eq!(contents(place), both("new"));
        assert_eq!((temps(&place.join("a")), temps(&place.join("b"))), (vec![], vec![]));
        if place == &copied {
            assert_eq!(contents(&tree), before, "the original has been touched");
        }
    }
}

/// A kill before the commit point leaves abandoned staged files in both directories.
#[tokio::test]
async fn a_copy_of_what_was_staged_is_cleaned_and_the_original_keeps_what_its_own_recovery_removes() {
    let Some(strace) = child::strace("what a kill leaves staged is copied") else { return };
    let dir = tempdir().unwrap();
    let [tree, copied] = ["tree", "copy"].map(|name| dir.path().join(name));
    for place in ["a", "b"] {
        std::fs::create_dir_all(tree.join(place)).unwrap();
    }
    let wrapper = [strace, "-f", "-qq", "-o", "/dev/null", "-e", "inject=renameat2:signal=SIGKILL:when=1"];
    assert_eq!(child::outcome(child::command(&wrapper, "two directories", &tree)), None);
    copy(&tree, &copied, "cp");
    copy(&tree.join("a"), &tree.join("a2"), "cp");
    let litter = names(&tree.join("b"));
    assert_eq!(litter.len(), 3, "{litter:?}");
    // The copy of one directory only stands beside the original of the other.
    for place in [tree.join("a2"), copied.join("a")] {
        assert!(atomic_fs::recover(&place).await.unwrap().removed > 0);
        assert_eq!((names(&place), names(&tree.join("b"))), (vec![], litter.clone()));
    }
    assert_eq!(names(&copied.join("b")), [""; 0]);
    // From either directory.
    copy(&tree.join("b"), &tree.join("b2"), "cp");
    atomic_fs::recover(tree.join("a")).await.unwrap();
    assert_eq!((names(&tree.join("a")), names(&tree.join("b"))), (vec![], vec![]));
    assert!(atomic_fs::recover(tree.join("b2")).await.unwrap().removed > 0);
    assert_eq!(names(&tree.join("b2")), [""; 0]);
}

#[tokio::test]
async fn a_recovery_of_any_directory_leaves_what_is_staged_by_who_lives() {
    let (dir, at) = scene(&[]);
    for place in ["a", "b"] {
        std::fs::create_dir(at(place)).unwrap();
    }
    let mut tx = MultiFileTransaction::begin(at("a"));
    tx.add_files([(at("a/x"), "new"), (at("b/y"), "new")]).await.unwrap();
    for place in ["a", "b"] {
        let report = atomic_fs::recover(at(place)).await.unwrap();
        assert_eq!((report.removed, report.live), (0, 1), "{place}");
    }
    // While its journal's directory is elsewhere, its state is unknown.
    std::fs::rename(at("a"), at("moved")).unwrap();
    assert_eq!(atomic_fs::recover(at("b")).await.unwrap().removed, 0);
    std::fs::rename(at("moved"), at("a")).unwrap();
    tx.commit().await.unwrap();
    assert_eq!((names(&at("a")), names(&at("b"))), (vec!["x".to_owned()], vec!["y".to_owned()]));
    drop(dir);
}

#[tokio::test]
async fn a_tree_that_was_moved_recovers_where_it_is() {
    let Some(dir) = killed_halfway() else { return };
    std::fs::create_dir(dir.path().join("deeper")).unwrap();
    let moved = dir.path().join("deeper/tree");
    std::fs::rename(dir.path().join("tree"), &moved).unwrap();
    assert_eq!(atomic_fs::recover(moved.join("a")).await.unwrap().rolled_forward, 1);
    assert_eq!(contents(&moved), both("new"));
}

/// Old and new have the same size here; only the time of writing distinguishes them, to the second.
#[tokio::test]
async fn a_copy_in_which_old_and_new_look_alike_is_refused_and_one_with_other_times_recovers() {
    let Some(dir) = killed_halfway() else { return };
    let [tree, alike, older] = ["tree", "alike", "older"].map(|name| dir.path().join(name));
    copy(&tree, &alike, "tar");
    match atomic_fs::recover(alike.join("a")).await {
        // A second passed in between.
        Ok(_) => assert_eq!(contents(&alike), both("new")),
        Err(error) => {
            assert!(error.is_refused() && error.target() == TargetState::Unchanged, "{error}");
            assert_eq!(contents(&alike), ("new".into(), "old".into()));
        }
    }
    // Without times there is no telling whether somebody has changed a file since.
    assert!(Command::new("cp").arg("-r").args([&tree, &older]).status().unwrap().success());
    let touched = Command::new("find").arg(&older).args(["-exec", "touch", "-d", "+5 seconds", "{}", "+"]).status();
    assert!(touched.unwrap().success());
    let error = atomic_fs::recover(older.join("a")).await.unwrap_err();
    assert!(error.is_refused() && error.to_string().contains("by hand"), "{error}");
    assert_eq!(contents(&older), ("new".into(), "old".into()));
}

#[tokio::test]
async fn one_directory_without_the_other_is_refused_and_the_error_names_both() {
    let Some(dir) = killed_halfway() else { return };
    let tree = dir.path().join("tree");
    // Beside the original: what lies where the other directory should be belongs to another copy.
    copy(&tree.join("a"), &tree.join("a2"), "cp");
    copy(&tree.join("b"), &tree.join("b2"), "cp");
    // And where there is none.
    copy(&tree.join("a"), &dir.path().join("a"), "cp");
    for place in [tree.join("a2"), dir.path().join("a")] {
        let before = (names(&place), contents(&tree));
        let error = atomic_fs::recover(&place).await.unwrap_err();
        assert!(matches!(error, Error::Misplaced { .. }) && error.is_refused(), "{error}");
        let text = error.to_string();
        assert!(text.contains(place.to_str().unwrap()) && text.contains("by hand"), "{text}");
        assert_eq!((names(&place), contents(&tree)), before);
    }
    // The copy of the other one leads to the original, whose transaction it is not.
    let error = atomic_fs::recover(tree.join("b2")).await.unwrap_err();
    assert!(error.is_refused() && error.to_string().contains(".afs-journal-elsewhere"), "{error}");
    assert_eq!(contents(&tree), ("new".into(), "old".into()));
    assert_eq!(atomic_fs::recover(tree.join("a")).await.unwrap().rolled_forward, 1);
    assert_eq!(contents(&tree), both("new"));
}

#[tokio::test]
async fn an_unfinished_transaction_is_noticed_in_each_of_its_directories() {
    let Some(dir) = killed_halfway() else { return };
    let tree = dir.path().join("tree");
    for place in ["a", "b"] {
        let error = atomic_fs::read_lock(tree.join(place)).await.unwrap_err();
        assert!(error.is_unrecovered() && error.to_string().contains("tree/a"), "{error}");
        for name in ["z", if place == "a" { "x" } else { "y" }] {
            let mut tx = MultiFileTransaction::new();
            tx.add_file(tree.join(place).join(name), "newer").await.unwrap();
            let error = tx.commit().await.unwrap_err();
            assert!(error.is_unrecovered() && error.to_string().contains("tree/a"), "{error}");
        }
    }
    assert_eq!(atomic_fs::recover(tree.join("b")).await.unwrap().rolled_forward, 1);
    assert_eq!(contents(&tree), both("new"));
    assert_eq!((names(&tree.join("a")), names(&tree.join("b"))), (vec!["x".to_owned()], vec!["y".to_owned()]));
    drop(atomic_fs::read_lock(tree.join("b")).await.unwrap());
}

/// A pointer to a finished journal stops nobody.
#[tokio::test]
async fn a_pointer_that_leads_nowhere_any_more_is_passed_over_and_one_into_the_void_is_refused() {
    let Some(dir) = killed_halfway() else { return };
    let tree = dir.path().join("tree");
    let pointer = tree.join("b/.afs-journal-elsewhere");
    let kept = std::fs::read_link(&pointer).unwrap();
    atomic_fs::recover(tree.join("a")).await.unwrap();
    std::os::unix::fs::symlink(&kept, &pointer).unwrap();
    let mut tx = MultiFileTransaction::new();
    tx.add_file(tree.join("b/y"), "newer").await.unwrap();
    tx.add_file(tree.join("a/x"), "newer").await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!((contents(&tree), names(&tree.join("a")).len()), (both("newer"), 1));
    // It was that of a journal in `a`, while this one was in `b`; a recovery takes it away.
    atomic_fs::recover(tree.join("b")).await.unwrap();
    assert_eq!(names(&tree.join("b")), ["y"]);
    std::os::unix::fs::symlink(&kept, &pointer).unwrap();
    std::fs::rename(tree.join("a"), tree.join("gone")).unwrap();
    let error = atomic_fs::recover(tree.join("b")).await.unwrap_err();
    assert!(error.is_refused() && error.to_string().contains(".afs-journal-elsewhere"), "{error}");
    for made_up in ["../a/x", ""] {
        std::fs::remove_file(&pointer).unwrap();
        match made_up {
            "" => std::fs::write(&pointer, "").unwrap(),
            link => std::os::unix::fs::symlink(link, &pointer).unwrap(),
        }
        assert!(matches!(atomic_fs::recover(tree.join("b")).await, Err(Error::CorruptJournal { .. })));
    }
}

/// In a directory with two transactions, the recovery of one leaves the files that the other needs.
#[tokio::test]
async fn what_leads_to_one_transaction_stays_when_the_litter_of_another_is_removed() {
    let Some(strace) = child::strace("two kills in one directory") else { return };
    let (dir, at) = scene(&[]);
    for place in ["a", "b", "c"] {
        std::fs::create_dir(at(place)).unwrap();
    }
    let kill = |number: usize, task: &str| {
        let inject = format!("inject=renameat2:signal=SIGKILL:when={number}");
        let wrapper = [strace, "-f", "-qq", "-o", "/dev/null", "-e", &inject];
        assert_eq!(child::outcome(child::command(&wrapper, task, dir.path())), None);
    };
    // The first was never committed, the second was.
    kill(1, "two directories");
    kill(3, "random c put:c/z:new put:b/y:newer");
    let pointer = std::fs::read_link(at("b/.afs-journal-elsewhere")).unwrap();
    assert!(atomic_fs::recover(at("a")).await.unwrap().removed > 0);
    assert_eq!(std::fs::read_link(at("b/.afs-journal-elsewhere")).unwrap(), pointer);
    assert_eq!(atomic_fs::recover(at("b")).await.unwrap().rolled_forward, 1);
    assert_eq!(
        (names(&at("a")), all(&at("b")), all(&at("c"))),
        (vec![], pairs(&[("y", "newer")]), pairs(&[("z", "new")]))
    );
    // Who has locked the other directory may be just about to put its own there.
    kill(1, "two directories");
    let lock = crate::support::lock_free(&at("b"), true).unwrap();
    atomic_fs::recover(at("a")).await.unwrap();
    assert_eq!((names(&at("a")), temps(&at("b"))), (vec![], vec![".afs-journal-elsewhere".to_owned()]));
    drop(lock);
    atomic_fs::recover(at("b")).await.unwrap();
    assert_eq!(names(&at("b")), ["y"]);
}

/// As in a shared directory in which everyone may write.
#[tokio::test]
async fn a_recovery_leaves_what_others_have_staged_whose_note_it_may_not_read() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, at) = scene(&[]);
    if !rustix::process::geteuid().is_root() {
        crate::support::not_run("a_recovery_leaves_what_others_have_staged", "only root has files of somebody else");
        return;
    }
    std::os::unix::fs::chown(dir.path(), Some(65534), Some(65534)).unwrap();
    let theirs = [".afs-tx-0123456789abcdef", ".afs-tx-0123456789abcdef-1"];
    for name in theirs {
        std::fs::write(at(name), "").unwrap();
        std::fs::set_permissions(at(name), PermissionsExt::from_mode(0o600)).unwrap();
    }
    std::fs::write(at(".afs-tx-fedcba9876543210-1"), "nobody's, without a note").unwrap();
    let said = child::outcome(child::command(&[], "recover as nobody", dir.path()));
    assert_eq!((said.as_deref(), names(dir.path())), (Some("Ok"), theirs.map(String::from).to_vec()));
}

/// Whichever removal fails or is not reached, the journal's directory leads to the remains.
#[tokio::test]
async fn what_a_failed_transaction_could_not_remove_is_found_by_the_recovery_of_its_journals_directory() {
    let Some(strace) = child::strace("removals that fail") else { return };
    for fault in ["error=EIO", "signal=SIGKILL"] {
        for number in 1.. {
            let (dir, at) = scene(&[]);
            for place in ["a", "b"] {
                std::fs::create_dir(at(place)).unwrap();
            }
            // The journal cannot be prepared.
            let fail = "inject=renameat2:error=EIO:when=1";
            let inject = format!("inject=unlinkat:{fault}:when={number}");
            let wrapper = [strace, "-f", "-qq", "-o", "/dev/null", "-e", fail, "-e", &inject];
            let said = child::outcome(child::command(&wrapper, "two directories", dir.path()));
            assert!(said.as_ref().is_none_or(|said| said.starts_with("Unchanged")), "{fault} {number}: {said:?}");
            let litter = [names(&at("a")), names(&at("b"))];
            if litter == [[""; 0]; 2] {
                // The draft, a pointer and two staged files; on another thread a link and the note.
                assert!(number > 5, "{fault} {number}");
                break;
            }
            atomic_fs::recover(at("a")).await.unwrap();
            let left = [names(&at("a")), names(&at("b"))];
            // A pointer by itself leads nowhere and stops nobody.
            let is_pointer = litter[0].is_empty() && litter[1] == [".afs-journal-elsewhere"];
            let wanted = if is_pointer { litter.clone() } else { [vec![], vec![]] };
            assert_eq!(left, wanted, "{fault} {number}: {litter:?}");
        }
    }
}

/// The journal is gone, so only the note still names the other directory.
#[tokio::test]
async fn what_a_disk_that_failed_behind_the_commit_point_has_left_is_found_by_the_recovery_of_the_journals_directory() {
    let Some(strace) = child::strace("syncs that fail") else { return };
    // Undone, because the second file cannot be put in its place; and all in place, but not cleaned up.
    for (old, fail, end) in [(None, "inject=renameat2:error=EIO:when=3", "Undecided"), (Some("old"), "trace=all", "Ok")]
    {
        let mut found = 0;
        for number in 1..=12 {
            let (dir, at) = scene(&[]);
            for (place, file) in [("a", "a/x"), ("b", "b/y")] {
                std::fs::create_dir(at(place)).unwrap();
                old.map_or(Ok(()), |old| std::fs::write(at(file), old)).unwrap();
            }
            let inject = format!("inject=fsync:error=EIO:when={number}");
            let wrapper = [strace, "-f", "-qq", "-o", "/dev/null", "-e", fail, "-e", &inject];
            let said = child::outcome(child::command(&wrapper, "two directories", dir.path())).unwrap();
            let is_left = |place| names(&at(place)).iter().any(|name| name.starts_with(".afs-tx-"));
            found += usize::from(said.starts_with(end) && is_left("b"));
            atomic_fs::recover(at("a")).await.unwrap();
            // What leads to a journal that has gone stops nobody, and the next who finds it removes it.
            assert!(!is_left("a") && !is_left("b"), "{number}: {said}, {:?}", names(&at("b")));
        }
        assert!(found > 0, "{end}: no sync that failed has left anything");
    }
}

#[tokio::test]
async fn a_directory_whose_pointer_is_of_another_transaction_is_not_taken_for_the_one_that_took_part() {
    let Some(dir) = killed_halfway() else { return };
    let tree = dir.path().join("tree");
    let pointer = tree.join("b/.afs-journal-elsewhere");
    std::fs::remove_file(&pointer).unwrap();
    std::os::unix::fs::symlink("../a/.afs-tx-0123456789abcdef", &pointer).unwrap();
    let error = atomic_fs::recover(tree.join("a")).await.unwrap_err();
    assert!(matches!(error, Error::Misplaced { .. }) && error.to_string().contains("another transaction"), "{error}");
    assert_eq!(contents(&tree), ("new".into(), "old".into()));
}

/// A changed old file counts only if it changed after the journal was written.
#[tokio::test]
async fn an_old_file_that_was_written_before_the_journal_is_replaced_and_one_written_later_is_not() {
    let Some(strace) = child::strace("an old file is written before or after the journal") else { return };
    for (seconds, is_replaced) in [(1_200_000_000, true), (9_000_000_000, false)] {
        let (dir, at) = scene(&[]);
        let set = |path: PathBuf, seconds| {
            let moment = std::time::UNIX_EPOCH + Duration::from_secs(seconds);
            std::fs::File::options().write(true).open(path).unwrap().set_modified(moment).unwrap();
        };
        for name in ["a", "b"] {
            std::fs::write(at(name), "old").unwrap();
            set(at(name), 1_000_000_000);
        }
        let wrapper = [strace, "-f", "-qq", "-o", "/dev/null", "-e", "inject=renameat2:signal=SIGKILL:when=3"];
        assert_eq!(child::outcome(child::command(&wrapper, "pair new new", dir.path())), None);
        set(at("b"), seconds);
        let recovered = atomic_fs::recover(dir.path()).await;
        assert_eq!(recovered.is_ok(), is_replaced, "{recovered:?}");
        let content = if is_replaced { "new" } else { "old" };
        assert_eq!(std::fs::read_to_string(at("b")).unwrap(), content);
    }
}

/// It has locked the directories that it expected to need, which is no longer enough.
#[tokio::test]
async fn a_recovery_that_waited_while_a_journal_appeared_locks_the_directories_of_that_one() {
    let Some(dir) = killed_halfway() else { return };
    let tree = dir.path().join("tree");
    let (journal, aside) = (tree.join("a/.afs-journal"), dir.path().join("aside"));
    std::fs::rename(&journal, &aside).unwrap();
    let [here, there] = ["a", "b"].map(|place| crate::support::lock_free(&tree.join(place), true).unwrap());
    let recovery = tokio::spawn(atomic_fs::recover(tree.join("a")));
    // So that it has looked, which does not matter to what is right here.
    tokio::time::sleep(Duration::from_millis(50)).await;
    std::fs::rename(&aside, &journal).unwrap();
    drop(here);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(contents(&tree), ("new".into(), "old".into()), "somebody reads it");
    drop(there);
    assert_eq!(recovery.await.unwrap().unwrap().rolled_forward, 1);
    assert_eq!(contents(&tree), both("new"));
}

/// A pointer to a journal is skipped if another transaction's journal has taken its place.
#[tokio::test]
async fn a_pointer_to_the_journal_of_another_transaction_stops_nobody() {
    let Some(dir) = killed_halfway() else { return };
    let tree = dir.path().join("tree");
    let pointer = tree.join("b/.afs-journal-elsewhere");
    let kept = std::fs::read_link(&pointer).unwrap();
    atomic_fs::recover(tree.join("a")).await.unwrap();
    std::os::unix::fs::symlink(&kept, &pointer).unwrap();
    let wrapper = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "inject=renameat2:signal=SIGKILL:when=2"];
    assert_eq!(child::outcome(child::command(&wrapper, "pair new new", &tree.join("a"))), None);
    let mut tx = MultiFileTransaction::new();
    tx.add_file(tree.join("b/y"), "newer").await.unwrap();
    tx.add_file(tree.join("b/z"), "newer").await.unwrap();
    tx.commit().await.unwrap();
    drop(atomic_fs::read_lock(tree.join("b")).await.unwrap());
    let report = atomic_fs::recover(tree.join("b")).await.unwrap();
    assert_eq!((report.rolled_forward, names(&tree.join("b"))), (0, vec!["y".to_owned(), "z".to_owned()]));
    assert_eq!(atomic_fs::recover(tree.join("a")).await.unwrap().rolled_forward, 1);
    // One that leads nowhere gives way to the next.
    std::os::unix::fs::symlink(&kept, &pointer).unwrap();
    let mut tx = MultiFileTransaction::begin(tree.join("a"));
    tx.add_files([(tree.join("a/x"), "last"), (tree.join("b/y"), "last")]).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!((contents(&tree), temps(&tree.join("b"))), (both("last"), vec![]));
}

/// A directory with files whose content is their name.
fn scene(files: &[&str]) -> (TempDir, impl Fn(&str) -> PathBuf) {
    let dir = tempdir().unwrap();
    for file in files {
        std::fs::write(dir.path().join(file), file).unwrap();
    }
    let path = dir.path().to_owned();
    (dir, move |name| path.join(name))
}

fn all(dir: &Path) -> Vec<(String, String)> {
    let read = |name: String| (name.clone(), std::fs::read_to_string(dir.join(name)).unwrap());
    names(dir).into_iter().map(read).collect()
}

fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(name, content)| ((*name).to_owned(), (*content).to_owned())).collect()
}

#[tokio::test]
async fn files_change_places() {
    let (dir, at) = scene(&["a", "b", "c", "d"]);
    std::fs::create_dir(at("sub")).unwrap();
    let mut tx = MultiFileTransaction::new();
    tx.rename(at("a"), at("b")).unwrap();
    tx.rename(at("b"), at("a")).unwrap();
    tx.commit().await.unwrap();
    std::fs::rename(at("c"), at("sub/c")).unwrap();
    let mut tx = MultiFileTransaction::new();
    tx.rename(at("sub/c"), at("d")).unwrap();
    tx.rename(at("d"), at("sub/c")).unwrap();
    tx.commit().await.unwrap();
    assert_eq!((std::fs::read(at("sub/c")).unwrap(), names(&at("sub"))), (b"d".to_vec(), vec!["c".to_owned()]));
    std::fs::rename(at("sub/c"), at("c")).unwrap();
    std::fs::remove_dir(at("sub")).unwrap();
    assert_eq!(all(dir.path()), pairs(&[("a", "b"), ("b", "a"), ("c", "d"), ("d", "c")]));
    // Three in a circle: the last one closes it.
    let mut tx = MultiFileTransaction::new();
    tx.rename(at("a"), at("b")).unwrap();
    tx.rename(at("c"), at("a")).unwrap();
    tx.rename(at("b"), at("c")).unwrap();
    tx.add_file(at("e"), "e").await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(all(dir.path()), pairs(&[("a", "d"), ("b", "b"), ("c", "a"), ("d", "c"), ("e", "e")]));
}

#[tokio::test]
async fn a_file_that_seems_to_be_renamed_twice_is_refused_unless_that_closes_a_circle() {
    let (dir, at) = scene(&["a", "b", "c"]);
    let mut tx = MultiFileTransaction::new();
    tx.rename(at("a"), at("b")).unwrap();
    // Is it the file that comes to `b`, or the one that was there?
    assert!(tx.rename(at("b"), at("c")).unwrap_err().is_repeated_target());
    assert!(tx.rename(at("c"), at("b")).unwrap_err().is_repeated_target());
    tx.rename(at("b"), at("a")).unwrap();
    for name in ["a", "b"] {
        assert!(tx.rename(at(name), at("c")).unwrap_err().is_repeated_target());
        assert!(tx.rename(at("c"), at(name)).unwrap_err().is_repeated_target());
        assert!(tx.remove_file(at(name)).unwrap_err().is_repeated_target());
        assert!(tx.add_file(at(name), "new").await.unwrap_err().is_repeated_target());
    }
    tx.commit().await.unwrap();
    // By another path that the transaction cannot know to be the same.
    let mut tx = MultiFileTransaction::new();
    let around = dir.path().join("..").join(dir.path().file_name().unwrap());
    tx.rename(at("a"), at("b")).unwrap();
    tx.rename(around.join("b"), at("c")).unwrap();
    let error = tx.commit().await.unwrap_err();
    assert!(error.is_repeated_target() && error.target() == TargetState::Unchanged, "{error}");
    assert_eq!(all(dir.path()), pairs(&[("a", "b"), ("b", "a"), ("c", "c")]));
    // Into a circle that is closed there is no way.
    let mut tx = MultiFileTransaction::new();
    tx.rename(at("a"), at("b")).unwrap();
    tx.rename(at("b"), at("a")).unwrap();
    tx.rename(at("c"), around.join("a")).unwrap();
    assert!(tx.commit().await.unwrap_err().is_repeated_target());
    // A circle is one by whatever path.
    let mut tx = MultiFileTransaction::new();
    tx.rename(at("a"), at("b")).unwrap();
    tx.rename(around.join("b"), around.join("a")).unwrap();
    tx.commit().await.unwrap();
    assert_eq!(all(dir.path()), pairs(&[("a", "a"), ("b", "b"), ("c", "c")]));
}

#[tokio::test]
async fn what_is_removed_by_one_path_is_not_replaced_by_another() {
    let (dir, at) = scene(&["a", "b"]);
    let around = dir.path().join("..").join(dir.path().file_name().unwrap());
    for is_renamed in [false, true] {
        let mut tx = MultiFileTransaction::new();
        tx.remove_file(at("a")).unwrap();
        // By the same path that is seen at once, and by another one when it is committed.
        assert!(tx.add_file(at("a"), "new").await.unwrap_err().is_repeated_target());
        assert!(tx.writer(at("a")).await.map(drop).unwrap_err().is_repeated_target());
        if is_renamed {
            tx.rename(at("b"), around.join("a")).unwrap();
        } else {
            tx.add_file(around.join("a"), "new").await.unwrap();
        }
        let error = tx.commit().await.unwrap_err();
        assert!(error.is_repeated_target() && error.target() == TargetState::Unchanged, "{error}");
        assert_eq!(all(dir.path()), pairs(&[("a", "a"), ("b", "b")]));
    }
}

/// As a log of many gigabytes: a rename costs what rename(2) costs, whatever is in the file.
#[tokio::test]
async fn a_large_file_is_renamed_and_replaced_without_being_read() {
    let (dir, at) = scene(&["other"]);
    let large = std::fs::File::create(at("log")).unwrap();
    if large.set_len(1 << 40).is_err() {
        crate::support::not_run("a_large_file_is_renamed", "the file system has no files of 1 TiB");
        return;
    }
    let begun = Instant::now();
    let mut tx = MultiFileTransaction::new();
    tx.rename(at("log"), at("log.1")).unwrap();
    tx.add_file(at("log"), "").await.unwrap();
    tx.commit().await.unwrap();
    let mut tx = MultiFileTransaction::new();
    tx.add_file(at("log.1"), "short").await.unwrap();
    tx.remove_file(at("other")).unwrap();
    tx.commit().await.unwrap();
    // To read it would take minutes.
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!(all(dir.path()), pairs(&[("log", ""), ("log.1", "short")]));
}

/// In the user's own directory rename(2) may move other users' files, but a hard link to them may be forbidden.
#[tokio::test]
async fn a_file_of_somebody_else_is_renamed_where_the_system_allows_that() {
    let (dir, at) = scene(&["f", "over", "replaced"]);
    if !rustix::process::geteuid().is_root() {
        crate::support::not_run("a_file_of_somebody_else_is_renamed", "only root has files of somebody else");
        return;
    }
    std::os::unix::fs::chown(dir.path(), Some(65534), Some(65534)).unwrap();
    let said = child::outcome(child::command(&[], "rename as nobody", dir.path()));
    assert_eq!((said.as_deref(), all(dir.path())), (Some("Ok"), pairs(&[("g", "f"), ("replaced", "over")])));
    assert!(std::fs::symlink_metadata(at("f")).is_err());
}

/// What a file has beside its content: owner, group, mode and one attribute.
fn dress(path: &Path) -> (u32, u32, u32, Option<Vec<u8>>) {
    use std::os::unix::fs::MetadataExt;
    let meta = std::fs::metadata(path).unwrap();
    let mut value = [0; 64];
    let length = rustix::fs::getxattr(path, "user.kept", &mut value[..]).ok();
    let kept = length.map(|length| value[..length].to_vec());
    (meta.uid(), meta.gid(), meta.mode() & 0o7777, kept)
}

#[tokio::test]
async fn a_transaction_writes_with_the_options_that_it_was_given() {
    let (dir, at) = scene(&["a", "b", "real"]);
    let is_root = rustix::process::geteuid().is_root();
    for name in ["a", "b"] {
        std::fs::set_permissions(at(name), std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
        // Where there are such attributes.
        let _none = rustix::fs::setxattr(at(name), "user.kept", b"yes", rustix::fs::XattrFlags::empty());
        if is_root {
            std::os::unix::fs::chown(at(name), Some(65534), Some(65534)).unwrap();
        }
    }
    std::os::unix::fs::symlink("real", at("link")).unwrap();
    let before = [dress(&at("a")), dress(&at("b"))];
    let options = AtomicFileWriter::options();
    let mut tx = MultiFileTransaction::new().options(options.preserve(Preserve::ALL));
    tx.add_file(at("a"), "new").await.unwrap();
    tx.writer(at("b")).await.unwrap().write_all(b"new").await.unwrap();
    tx = tx.options(options.mode(0o604).symlinks(Symlinks::Replace));
    tx.add_file(at("link"), "new").await.unwrap();
    tx = tx.options(options.create_new(true).mode(0o600));
    assert!(tx.add_file(at("real"), "new").await.unwrap_err().is_already_exists());
    tx.add_file(at("fresh"), "new").await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!([dress(&at("a")), dress(&at("b"))], before);
    assert_eq!((dress(&at("link")).2, dress(&at("fresh")).2), (0o604, 0o600));
    assert!(std::fs::symlink_metadata(at("link")).unwrap().is_file());
    assert_eq!(
        all(dir.path()),
        pairs(&[("a", "new"), ("b", "new"), ("fresh", "new"), ("link", "new"), ("real", "real")])
    );
}

#[tokio::test]
async fn a_file_that_must_be_new_and_has_appeared_since_fails_the_whole_transaction() {
    let (dir, at) = scene(&["a"]);
    for others in [0, 1] {
        let mut tx = MultiFileTransaction::new().options(AtomicFileWriter::options().create_new(true));
        tx.add_file(at("fresh"), "new").await.unwrap();
        for _ in 0..others {
            tx.remove_file(at("a")).unwrap();
        }
        std::fs::write(at("fresh"), "by somebody else").unwrap();
        let error = tx.commit().await.unwrap_err();
        assert!(error.is_already_exists() && error.target() == TargetState::Unchanged, "{error}");
        assert_eq!(all(dir.path()), pairs(&[("a", "a"), ("fresh", "by somebody else")]));
        std::fs::remove_file(at("fresh")).unwrap();
    }
}

#[tokio::test]
async fn without_durability_all_files_still_change_together() {
    let (dir, at) = scene(&["a", "log", "log.1"]);
    let mut tx = MultiFileTransaction::new().options(AtomicFileWriter::options().durability(Durability::None));
    tx.add_files([(at("a"), "new"), (at("b"), "new")]).await.unwrap();
    tx.rename(at("log"), at("log.1")).unwrap();
    tx.commit().await.unwrap();
    assert_eq!(all(dir.path()), pairs(&[("a", "new"), ("b", "new"), ("log.1", "log")]));
}

#[tokio::test]
async fn many_files_are_added_together_or_not_at_all() {
    let (dir, at) = scene(&["a"]);
    std::fs::create_dir(at("sub")).unwrap();
    let mut tx = MultiFileTransaction::new();
    tx.add_files((0..0).map(|_| ("", ""))).await.unwrap();
    tx.add_file(at("a"), "new").await.unwrap();
    let numbers = |range: std::ops::Range<u32>| range.map(|number| (at(&format!("f{number}")), number.to_string()));
    // The last one is no file, is named twice, or is one of the transaction's already; and one path is none.
    for wrong in ["sub", "f7", "a"] {
        let files = numbers(0..150).chain([(at(wrong), String::new())]);
        let error = tx.add_files(files).await.unwrap_err();
        assert!(error.is_repeated_target() || error.is_not_a_file(), "{wrong}: {error}");
        assert_eq!(names(dir.path()).len(), 4, "what was staged for nothing is gone");
    }
    let error = tx.add_files([(at("b"), ""), (at(".."), "")]).await.unwrap_err();
    assert!(matches!(error, Error::InvalidPath { .. }), "{error}");
    tx.add_files(numbers(0..150)).await.unwrap();
    tx.commit().await.unwrap();
    std::fs::remove_dir(at("sub")).unwrap();
    assert_eq!(all(dir.path()).len(), 151);
    assert_eq!(std::fs::read_to_string(at("f149")).unwrap(), "149");
}

/// Counts only the files below `dir`, because other tests of this process have files open too.
fn open_files(dir: &Path) -> usize {
    let is_ours = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.and_then(|entry| entry.path().read_link()).is_ok_and(|target| target.starts_with(dir))
    };
    std::fs::read_dir("/proc/self/fd").unwrap().map(is_ours).filter(|is_ours| *is_ours).count()
}

#[tokio::test]
async fn writers_that_were_lent_do_not_keep_their_files_open() {
    let (dir, at) = scene(&[]);
    let mut tx = MultiFileTransaction::new().options(AtomicFileWriter::options().durability(Durability::None));
    for number in 0..500 {
        let writer = tx.writer(at(&number.to_string())).await.unwrap();
        writer.write_all(b"in ").await.unwrap();
        writer.write_all(number.to_string().as_bytes()).await.unwrap();
    }
    let open = open_files(dir.path());
    assert!(open < 200, "{open} are open");
    tx.commit().await.unwrap();
    assert_eq!(names(dir.path()).len(), 500);
    assert_eq!(std::fs::read_to_string(at("499")).unwrap(), "in 499");
}

#[tokio::test]
async fn a_writer_whose_write_was_cut_short_has_none_of_it_when_the_transaction_goes_on() {
    let (dir, at) = scene(&[]);
    let mut tx = MultiFileTransaction::new();
    let writer = tx.writer(at("a")).await.unwrap();
    writer.write_all(b"whole").await.unwrap();
    let large = vec![b'x'; 8 << 20];
    // Unless the disk is so fast that there is nothing to wait for.
    let is_cut = tokio::time::timeout(Duration::ZERO, writer.write_all(&large)).await.is_err();
    tx.add_file(at("b"), "b").await.unwrap();
    tx.commit().await.unwrap();
    let length = std::fs::metadata(at("a")).unwrap().len();
    assert_eq!(length, if is_cut { 5 } else { 5 + (8 << 20) });
    assert_eq!(names(dir.path()), ["a", "b"]);
}

#[tokio::test]
async fn a_detached_commit_goes_on_and_a_bounded_one_leaves_all_old() {
    let (dir, at) = scene(&["a", "b"]);
    let lock = atomic_fs::read_lock(dir.path()).await.unwrap();
    let change = async |content: &str| {
        let mut tx = MultiFileTransaction::new();
        tx.add_files([(at("a"), content), (at("b"), content)]).await.unwrap();
        tx
    };
    let begun = Instant::now();
    let error = change("late").await.commit_within(Duration::from_millis(50)).await.unwrap_err();
    assert!(error.kind() == std::io::ErrorKind::TimedOut && error.target() == TargetState::Unchanged, "{error}");
    let impatient = change("busy").await.patience(Duration::from_millis(50)).commit().await.unwrap_err();
    assert!(impatient.is_busy() && impatient.to_string().contains("50ms"), "{impatient}");
    assert!(begun.elapsed() < Duration::from_secs(15));
    let detached = change("new").await.commit_detached();
    drop(lock);
    drop(detached);
    let is_new = |name| std::fs::read_to_string(at(name)).unwrap() == "new";
    let ended = || is_new("a") && is_new("b") && names(dir.path()) == ["a", "b"];
    crate::support::eventually("it changes all, and goes", ended).await;
    change("newer").await.commit_detached().await.unwrap();
    change("newest").await.commit_within(Duration::MAX).await.unwrap();
    assert_eq!(all(dir.path()), pairs(&[("a", "newest"), ("b", "newest")]));
    MultiFileTransaction::new().commit_detached().await.unwrap();
    MultiFileTransaction::new().commit_within(Duration::ZERO).await.unwrap();
    let outside = std::thread::spawn(|| MultiFileTransaction::new().commit_detached()).join().unwrap();
    assert!(matches!(outside.await, Err(Error::NoRuntime { .. })));
}

/// Every sync of the directory takes three seconds here; a drop that finds the files exchanged waits for none.
#[tokio::test]
async fn a_dropped_commit_of_many_files_waits_for_no_sync() {
    let Some(strace) = child::strace("a drop while syncs are slow") else { return };
    let (dir, at) = scene(&[]);
    let place = dir.path().canonicalize().unwrap();
    let slow = ["-P", place.to_str().unwrap(), "-e", "inject=fsync:delay_enter=3000000"];
    let wrapper = [&[strace, "-f", "-qq", "-o", "/dev/null"][..], &slow].concat();
    let said = child::outcome(child::command(&wrapper, "drop a commit when its journal is committed", dir.path()));
    assert_eq!(said.as_deref(), Some("Ok"));
    let report = atomic_fs::recover(dir.path()).await.unwrap();
    assert_eq!((report.rolled_back, names(dir.path()).len()), (0, 200));
    assert_eq!(std::fs::read_to_string(at("199")).unwrap(), "new");
}

/// This way either the old or the new file always exists.
#[tokio::test]
async fn what_is_put_somewhere_comes_before_what_is_removed() {
    let Some(strace) = child::strace("a kill between a put and a removal") else { return };
    let (dir, _at) = scene(&["old", "taken"]);
    let wrapper = [strace, "-f", "-qq", "-o", "/dev/null", "-e", "inject=renameat2:signal=SIGKILL:when=4"];
    assert_eq!(child::outcome(child::command(&wrapper, "remove and add", dir.path())), None);
    let seen: Vec<_> = names(dir.path()).into_iter().filter(|name| !name.starts_with('.')).collect();
    assert_eq!(seen, ["new", "old", "taken"]);
    assert_eq!(std::fs::read_to_string(dir.path().join("taken")).unwrap(), "new");
    atomic_fs::recover(dir.path()).await.unwrap();
    assert_eq!(names(dir.path()), ["new", "taken"]);
}

/// A single system call moves it there.
#[tokio::test]
async fn a_file_that_is_renamed_to_a_free_name_is_never_without_a_visible_one() {
    let Some(strace) = child::strace("kills before and behind a rename to a free name") else { return };
    for number in 1.. {
        let (_dir, at) = scene(&[]);
        std::fs::create_dir(at("one")).unwrap();
        std::fs::write(at("one/a"), "moved").unwrap();
        let inject = format!("inject=renameat2:signal=SIGKILL:when={number}");
        let wrapper = [strace, "-f", "-qq", "-o", "/dev/null", "-e", &inject];
        let said = child::outcome(child::command(&wrapper, "random - put:one/c:new rename:one/a:one/b", &at("")));
        let seen: Vec<_> = ["one/a", "one/b"].into_iter().filter(|name| at(name).exists()).collect();
        assert_eq!(seen.len(), 1, "killed at {number}: {seen:?}");
        if said.is_some() {
            assert_eq!((said.as_deref(), number > 3), (Some("Ok"), true));
            break;
        }
    }
}

/// Two names of one file, which nothing tells apart, stay two names of one file.
#[tokio::test]
async fn two_names_of_one_file_that_change_places_are_both_there_after_a_kill() {
    let Some(strace) = child::strace("a kill while two names of one file are swapped") else { return };
    let task = "random - put:one/c:new rename:one/a:one/b rename:one/b:one/a";
    for kill in 1..=3 {
        let (dir, at) = scene(&[]);
        std::fs::create_dir(at("one")).unwrap();
        std::fs::write(at("one/a"), "same").unwrap();
        std::fs::hard_link(at("one/a"), at("one/b")).unwrap();
        let inject = format!("inject=renameat2:signal=SIGKILL:when={kill}");
        let wrapper = [strace, "-f", "-qq", "-o", "/dev/null", "-e", &inject];
        assert_eq!(child::outcome(child::command(&wrapper, task, dir.path())), None);
        atomic_fs::recover(at("one")).await.unwrap();
        let both = pairs(&[("a", "same"), ("b", "same")]);
        let wanted = if kill == 1 { both } else { [both, pairs(&[("c", "new")])].concat() };
        assert_eq!(all(&at("one")), wanted, "killed at {kill}");
    }
}

/// A name that has become free must not be filled if another program has filled it.
#[tokio::test]
async fn what_somebody_put_where_a_renamed_file_was_is_not_moved_by_undoing_that() {
    let Some(strace) = child::strace("a kill behind a rename to a free name") else { return };
    let (dir, at) = scene(&[]);
    std::fs::create_dir(at("one")).unwrap();
    std::fs::write(at("one/a"), "moved").unwrap();
    let wrapper = [strace, "-f", "-qq", "-o", "/dev/null", "-e", "inject=unlinkat:signal=SIGKILL:when=1"];
    let task = "random - put:one/c:new rename:one/a:one/b";
    assert_eq!(child::outcome(child::command(&wrapper, task, dir.path())), None);
    // As if its last sync had failed.
    std::fs::rename(at("one/.afs-journal"), at("one/.afs-journal-prepared")).unwrap();
    std::fs::write(at("one/a"), "by somebody else").unwrap();
    let error = atomic_fs::recover(at("one")).await.unwrap_err();
    assert!(error.is_refused() && error.to_string().contains("one/a"), "{error}");
    assert_eq!(std::fs::read_to_string(at("one/a")).unwrap(), "by somebody else");
    assert_eq!(std::fs::read_to_string(at("one/b")).unwrap(), "moved");
    std::fs::rename(at("one/a"), at("aside")).unwrap();
    assert_eq!(atomic_fs::recover(at("one")).await.unwrap().rolled_back, 1);
    assert_eq!(all(&at("one")), pairs(&[("a", "moved")]));
}

/// The right to give a file to its owner is missing: then nothing is changed, by a single write and by a transaction.
#[tokio::test]
async fn an_owner_that_cannot_be_kept_fails_a_transaction_as_it_fails_a_write() {
    let (dir, at) = scene(&["ours", "theirs"]);
    if !rustix::process::geteuid().is_root() {
        crate::support::not_run("an_owner_that_cannot_be_kept", "only root has files of somebody else");
        return;
    }
    for path in [dir.path().to_owned(), at("ours")] {
        std::os::unix::fs::chown(path, Some(65534), Some(65534)).unwrap();
    }
    let said = child::outcome(child::command(&[], "keep owners as nobody", dir.path()));
    assert_eq!(said.as_deref(), Some("PermissionDenied PermissionDenied"));
    assert_eq!(all(dir.path()), pairs(&[("ours", "ours"), ("theirs", "theirs")]));
}

#[tokio::test]
async fn each_content_is_as_durable_as_it_was_added_and_the_names_as_they_are_committed() {
    let Some(strace) = child::strace("which files of a transaction are synced") else { return };
    for (task, synced, are_names_synced) in [("none, then full", "full", true), ("full, then none", "full", false)] {
        let (dir, at) = scene(&[]);
        let place = dir.path().canonicalize().unwrap();
        let log = tempdir().unwrap();
        let log = log.path().join("calls");
        let wrapper = [strace, "-f", "-qq", "-y", "-e", "trace=fsync,openat", "-o", log.to_str().unwrap()];
        assert_eq!(child::outcome(child::command(&wrapper, task, dir.path())).as_deref(), Some("Ok"));
        let log = std::fs::read_to_string(log).unwrap();
        let syncs: Vec<_> = log.lines().filter(|line| line.contains("fsync(")).collect();
        // By the number in the hidden name: the first 70 were added first.
        let is_of = |line: &&&str, range: std::ops::RangeInclusive<u32>| {
            let number = line.split_once(".afs-tx-").and_then(|(_, rest)| rest.split_once('-'));
            number
                .and_then(|(_, rest)| rest.split('>').next()?.parse().ok())
                .is_some_and(|number| range.contains(&number))
        };
        let count =
            |range: std::ops::RangeInclusive<u32>| syncs.iter().filter(|line| is_of(line, range.clone())).count();
        let (first, last) = (count(1..=70), count(71..=140));
        let wanted = if task.starts_with(synced) { (70, 0) } else { (0, 70) };
        assert_eq!((first, last), wanted, "{task}");
        let of_journal = syncs.iter().filter(|line| line.contains("-journal>")).count();
        let of_names = syncs.iter().filter(|line| line.contains(&format!("<{}>", place.display()))).count();
        assert_eq!((of_journal > 0, of_names > 0), (are_names_synced, are_names_synced), "{task}");
        assert_eq!((names(dir.path()).len(), std::fs::read(at("full69")).unwrap()), (140, b"full".to_vec()));
    }
}

/// Under its new name it must survive a power cut, even if its writer has not synced it.
#[tokio::test]
async fn what_is_renamed_is_synced_before_the_commit() {
    let Some(strace) = child::strace("whether a renamed file is synced") else { return };
    let (dir, at) = scene(&[]);
    std::fs::create_dir(at("one")).unwrap();
    for name in ["one/a", "one/over", "one/c"] {
        std::fs::write(at(name), name).unwrap();
    }
    let log = tempdir().unwrap();
    let log = log.path().join("calls");
    let wrapper = [strace, "-f", "-qq", "-y", "-e", "trace=fsync,renameat", "-o", log.to_str().unwrap()];
    let task = "random - rename:one/a:one/b rename:one/over:one/c";
    assert_eq!(child::outcome(child::command(&wrapper, task, dir.path())).as_deref(), Some("Ok"));
    let log = std::fs::read_to_string(log).unwrap();
    let line = |wanted: &str| log.lines().position(|line| line.contains(wanted)).unwrap_or_else(|| panic!("{log}"));
    let committed = line("\".afs-journal\"");
    for name in ["/one/a>", "/one/over>"] {
        assert!(line(name) < committed, "{name}: {log}");
    }
}
