//! Several processes at once, and processes that are killed at any moment.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cancel_safe_atomic_fs as atomic_fs;
use tempfile::tempdir;

use crate::child;
use crate::support::names;

/// How often a process is killed.
const KILLS: usize = 15;

#[test]
fn two_processes_of_four_tasks_write_one_file_and_a_reader_never_finds_it_torn_or_missing() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, vec![b'z'; 20_000 + usize::from(b'z')]).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut reads, mut seen) = (0, std::collections::BTreeSet::new());
            while !done.load(Ordering::Relaxed) {
                let content = std::fs::read(&path).expect("the file is never missing");
                let letter = content[0];
                let is_whole =
                    content.len() == 20_000 + usize::from(letter) && content.iter().all(|&byte| byte == letter);
                assert!(is_whole, "torn: {} bytes", content.len());
                seen.insert(letter);
                reads += 1;
            }
            (reads, seen)
        });
        let children = [0, 1].map(|_| child::command(&[], "four writers", &path).spawn().unwrap());
        let outputs = children.map(|child| child.wait_with_output().unwrap());
        done.store(true, Ordering::Relaxed);
        for output in outputs {
            assert_eq!(
                child::last_word(&output.stdout).as_deref(),
                Some("Ok"),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        let (reads, seen) = reader.join().unwrap();
        println!("{reads} reads saw {} different contents", seen.len());
        assert!(reads > 0 && seen.len() > 1);
    });
    assert_eq!(names(dir.path()), ["file"]);
}

/// Kills the child at a random moment after its first message; returns the last number that it reported.
fn kill_at_random(mut child: Child, random: &mut fastrand::Rng) -> u64 {
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut text = String::new();
    while child::last_word(text.as_bytes()).is_none() {
        assert!(out.read_line(&mut text).unwrap() > 0, "the child ended by itself: {text}");
    }
    // This does not wait for anything: any moment will do.
    std::thread::park_timeout(Duration::from_micros(random.u64(0..30_000)));
    child.kill().unwrap();
    child.wait().unwrap();
    out.read_to_string(&mut text).unwrap();
    // The last line may have been cut.
    let (whole, _) = text.rsplit_once('\n').unwrap();
    child::last_word(whole.as_bytes()).unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_process_killed_at_random_has_written_what_it_was_told_and_nothing_torn() {
    let mut random = fastrand::Rng::new();
    println!("seed {}", random.get_seed());
    for _ in 0..KILLS {
        let dir = tempdir().unwrap();
        let path = dir.path().join("file");
        let child = child::command(&[], "count files", &path).spawn().unwrap();
        let acknowledged = kill_at_random(child, &mut random);
        let found: u64 = std::fs::read_to_string(&path).unwrap().parse().unwrap();
        assert!(found == acknowledged || found == acknowledged + 1, "{acknowledged} acknowledged, {found} found");
        let report = atomic_fs::sweep(dir.path()).await.unwrap();
        assert!(report.live == 0 && report.failed == 0 && names(dir.path()) == ["file"], "{report:?}");
    }
}

#[tokio::test]
async fn a_process_killed_at_random_leaves_transactions_that_recover_to_what_it_was_told() {
    let mut random = fastrand::Rng::new();
    println!("seed {}", random.get_seed());
    let number = |path: &Path| -> u64 { std::fs::read_to_string(path).unwrap().parse().unwrap() };
    for _ in 0..KILLS {
        let dir = tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        let child = child::command(&[], "count transactions", dir.path()).spawn().unwrap();
        let acknowledged = kill_at_random(child, &mut random);
        let report = atomic_fs::recover(dir.path()).await.unwrap();
        let found = ["a", "b", "sub/c"].map(|name| number(&dir.path().join(name)));
        assert!(found.iter().all(|one| *one == found[0]), "{acknowledged} acknowledged, {found:?} found, {report:?}");
        assert!(
            found[0] == acknowledged || found[0] == acknowledged + 1,
            "{acknowledged} acknowledged, {found:?} found"
        );
        assert_eq!(
            (names(dir.path()), names(&dir.path().join("sub"))),
            (vec!["a".into(), "b".into(), "sub".into()], vec!["c".into()])
        );
    }
}

#[test]
fn the_first_exercise_of_the_tutorial_leaves_no_file() {
    let dir = tempdir().unwrap();
    assert_eq!(child::outcome(child::command(&[], "exercise", dir.path())).as_deref(), Some("done"));
    assert!(names(dir.path()).is_empty(), "{:?}", names(dir.path()));
}

#[test]
fn a_transaction_that_moves_away_still_changes_the_files_where_it_began() {
    let dir = tempdir().unwrap();
    for place in ["here", "there"] {
        std::fs::create_dir(dir.path().join(place)).unwrap();
        for name in ["a", "b", "c"] {
            std::fs::write(dir.path().join(place).join(name), name).unwrap();
        }
    }
    let said = child::outcome(child::command(&[], "transaction moves away", dir.path()));
    assert_eq!(said.as_deref(), Some("Ok"));
    assert_eq!(names(&dir.path().join("there")), ["a", "b", "c"], "the files of the other directory are not ours");
    assert_eq!(names(&dir.path().join("here")), ["a", "d"]);
    assert_eq!(std::fs::read(dir.path().join("here/a")).unwrap(), b"new");
}

#[test]
fn a_rename_that_crosses_devices_is_a_typed_error() {
    let Some(strace) = child::strace("a_rename_that_crosses_devices_is_a_typed_error") else { return };
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "old").unwrap();
    // As with project quotas on ext4 and xfs, which cannot be counted on here.
    let wrapper = [strace, "-f", "-qq", "-o", "/dev/null", "-e", "inject=renameat:error=EXDEV"];
    let said = child::outcome(child::command(&wrapper, "write", &path)).unwrap();
    assert!(said.starts_with("Unchanged CrossesDevices") && said.contains("cannot be replaced"), "{said}");
    assert_eq!((std::fs::read(&path).unwrap(), names(dir.path()).len()), (b"old".to_vec(), 1));
}
