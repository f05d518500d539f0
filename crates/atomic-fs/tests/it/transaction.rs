//! Transactions: all files or none, whatever the changes and whichever other programs are at work.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cancel_safe_atomic_fs::{self as atomic_fs, Error, MultiFileTransaction, RecoveryReport, TargetState};
use tempfile::{TempDir, tempdir};

use crate::support::{lock_free, names, not_run};

/// A directory with files whose content is their name.
fn scene(files: &[&str]) -> TempDir {
    let dir = tempdir().unwrap();
    for file in files {
        std::fs::write(dir.path().join(file), file).unwrap();
    }
    dir
}

fn read(dir: &Path, name: &str) -> String {
    std::fs::read_to_string(dir.join(name)).unwrap()
}

#[tokio::test]
async fn a_commit_writes_replaces_removes_and_renames() {
    let dir = scene(&["a", "b", "c", "d"]);
    let dir = dir.path();
    let mut tx = MultiFileTransaction::new();
    tx.add_file(dir.join("a"), "new a").await.unwrap();
    tx.add_file(dir.join("new"), b"new").await.unwrap();
    let writer = tx.writer(dir.join("big")).await.unwrap();
    writer.write_all(&vec![b'x'; 3 << 20]).await.unwrap();
    writer.write_all(b"end").await.unwrap();
    tx.remove_file(dir.join("b")).unwrap();
    tx.rename(dir.join("c"), dir.join("d")).unwrap();
    tx.rename(dir.join("d"), dir.join("e")).unwrap_err();
    assert_eq!(read(dir, "a"), "a");
    tx.commit().await.unwrap();
    assert_eq!(names(dir), ["a", "big", "d", "new"]);
    assert_eq!((read(dir, "a"), read(dir, "d"), read(dir, "new")), ("new a".into(), "c".into(), "new".into()));
    assert_eq!(std::fs::metadata(dir.join("big")).unwrap().len(), (3 << 20) + 3);
    assert_eq!(std::fs::metadata(dir.join("d")).unwrap().nlink(), 1);
    assert_eq!(atomic_fs::recover(dir).await.unwrap(), RecoveryReport::default());
}

#[tokio::test]
async fn a_transaction_of_nothing_does_nothing() {
    MultiFileTransaction::new().commit().await.unwrap();
    MultiFileTransaction::begin("/does/not/exist").rollback().await.unwrap();
}

#[tokio::test]
async fn a_transaction_of_one_change_needs_no_journal() {
    let dir = scene(&["a", "b", "c"]);
    let dir = dir.path();
    let mut tx = MultiFileTransaction::new();
    tx.add_file(dir.join("a"), "new").await.unwrap();
    tx.commit().await.unwrap();
    let mut tx = MultiFileTransaction::new();
    tx.remove_file(dir.join("b")).unwrap();
    tx.commit().await.unwrap();
    let mut tx = MultiFileTransaction::new();
    tx.rename(dir.join("c"), dir.join("d")).unwrap();
    tx.commit().await.unwrap();
    assert_eq!((names(dir), read(dir, "a"), read(dir, "d")), (vec!["a".into(), "d".into()], "new".into(), "c".into()));
}

#[tokio::test]
async fn a_chain_of_renames_rotates_logs() {
    let dir = scene(&["log", "log.1", "log.2"]);
    let dir = dir.path();
    let mut tx = MultiFileTransaction::new();
    tx.rename(dir.join("log.1"), dir.join("log.2")).unwrap();
    tx.rename(dir.join("log"), dir.join("log.1")).unwrap();
    tx.add_file(dir.join("log"), "fresh").await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(names(dir), ["log", "log.1", "log.2"]);
    assert_eq!(
        (read(dir, "log"), read(dir, "log.1"), read(dir, "log.2")),
        ("fresh".into(), "log".into(), "log.1".into())
    );
}

#[tokio::test]
async fn a_transaction_that_is_dropped_or_rolled_back_leaves_nothing() {
    let dir = scene(&["a"]);
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    for rolled_back in [true, false] {
        let mut tx = MultiFileTransaction::begin(dir.path());
        tx.add_file(dir.path().join("a"), "new").await.unwrap();
        tx.add_file(other.join("b"), "new").await.unwrap();
        tx.writer(dir.path().join("c")).await.unwrap().write_all(b"new").await.unwrap();
        tx.remove_file(dir.path().join("x")).unwrap();
        assert_eq!(names(dir.path()).len(), 5);
        if rolled_back {
            tx.rollback().await.unwrap();
        } else {
            drop(tx);
        }
        assert_eq!(
            (names(dir.path()), names(&other).len(), read(dir.path(), "a")),
            (vec!["a".into(), "other".into()], 0, "a".into())
        );
    }
}

#[tokio::test]
async fn a_target_may_be_named_once_only() {
    let dir = scene(&["a", "b"]);
    let at = |name: &str| dir.path().join(name);
    symlink("a", at("link")).unwrap();
    let mut tx = MultiFileTransaction::new();
    tx.add_file(at("a"), "1").await.unwrap();
    assert!(tx.add_file(at("a"), "2").await.unwrap_err().is_repeated_target());
    assert!(tx.add_file(at("link"), "2").await.unwrap_err().is_repeated_target());
    assert!(tx.writer(dir.path().join(".").join("a")).await.unwrap_err().is_repeated_target());
    assert!(tx.remove_file(at("a")).unwrap_err().is_repeated_target());
    assert!(tx.rename(at("a"), at("c")).unwrap_err().is_repeated_target());
    assert!(tx.rename(at("b"), at("a")).unwrap_err().is_repeated_target());
    assert!(tx.rename(at("b"), at("b")).unwrap_err().is_repeated_target());
    // It can be continued, and only the commit sees that this is the same file.
    tx.remove_file(dir.path().join("../").join(dir.path().file_name().unwrap()).join("a")).unwrap();
    let error = tx.commit().await.unwrap_err();
    assert!(error.is_repeated_target() && error.target() == TargetState::Unchanged, "{error}");
    assert_eq!((names(dir.path()), read(dir.path(), "a")), (vec!["a".into(), "b".into(), "link".into()], "a".into()));
}

#[tokio::test]
async fn what_is_no_file_is_refused_and_nothing_is_changed() {
    let dir = scene(&["a"]);
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("sub")).unwrap();
    let mut tx = MultiFileTransaction::new();
    tx.add_file(at("a"), "new").await.unwrap();
    assert!(tx.add_file(at("sub"), "x").await.unwrap_err().is_not_a_file());
    assert!(matches!(tx.remove_file(at("..")), Err(Error::InvalidPath { .. })));
    assert!(matches!(tx.rename(at("a2"), at(".afs-x")), Err(Error::InvalidPath { .. })));
    tx.remove_file(at("sub")).unwrap();
    assert!(tx.commit().await.unwrap_err().is_not_a_file());
    for missing in [false, true] {
        let mut tx = MultiFileTransaction::new();
        tx.add_file(at("a"), "new").await.unwrap();
        let to = if missing { at("b") } else { at("sub") };
        tx.rename(at("missing"), to).unwrap();
        let error = tx.commit().await.unwrap_err();
        assert_eq!(error.kind() == std::io::ErrorKind::NotFound, missing, "{error}");
        assert_eq!(error.target(), TargetState::Unchanged);
    }
    assert_eq!((names(dir.path()), read(dir.path(), "a")), (vec!["a".into(), "sub".into()], "a".into()));
}

#[tokio::test]
async fn a_target_on_another_file_system_is_a_typed_error() {
    let (dir, other) = (scene(&["a"]), Path::new("/dev/shm"));
    if !other.exists() || std::fs::metadata(other).unwrap().dev() == std::fs::metadata(dir.path()).unwrap().dev() {
        not_run("a_target_on_another_file_system_is_a_typed_error", "there is no other file system at /dev/shm");
        return;
    }
    let mut tx = MultiFileTransaction::begin(other);
    let error = tx.add_file(dir.path().join("a"), "new").await.unwrap_err();
    assert!(error.is_other_file_system() && error.kind() == std::io::ErrorKind::CrossesDevices, "{error}");
    let mut tx = MultiFileTransaction::new();
    tx.rename(dir.path().join("a"), other.join("a")).unwrap();
    assert!(tx.commit().await.unwrap_err().is_other_file_system());
    assert_eq!(names(dir.path()), ["a"]);
}

#[tokio::test]
async fn symlinks_are_followed_by_content_and_not_by_removals() {
    let dir = scene(&["real"]);
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("sub")).unwrap();
    std::fs::write(at("sub/far"), "far").unwrap();
    std::fs::set_permissions(at("sub/far"), PermissionsExt::from_mode(0o640)).unwrap();
    symlink("sub/far", at("link")).unwrap();
    symlink("real", at("gone")).unwrap();
    let mut tx = MultiFileTransaction::new();
    tx.add_file(at("link"), "new").await.unwrap();
    tx.remove_file(at("gone")).unwrap();
    tx.commit().await.unwrap();
    assert_eq!((read(dir.path(), "sub/far"), read(dir.path(), "real")), ("new".into(), "real".into()));
    assert_eq!(std::fs::metadata(at("sub/far")).unwrap().mode() & 0o7777, 0o640);
    assert!(std::fs::symlink_metadata(at("link")).unwrap().is_symlink());
    assert_eq!(
        (names(dir.path()), names(&at("sub"))),
        (vec!["link".into(), "real".into(), "sub".into()], vec!["far".into()])
    );
}

#[tokio::test]
async fn a_name_of_255_bytes_and_a_thousand_files_work() {
    let dir = tempdir().unwrap();
    let mut tx = MultiFileTransaction::new();
    tx.add_file(dir.path().join("n".repeat(255)), "long").await.unwrap();
    for number in 0..1000 {
        tx.add_file(dir.path().join(number.to_string()), number.to_string()).await.unwrap();
    }
    // Only the files of this test, because other tests of this process have files open too.
    let is_ours = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.and_then(|entry| entry.path().read_link()).is_ok_and(|target| target.starts_with(dir.path()))
    };
    let open =
        std::fs::read_dir("/proc/self/fd").map(|entries| entries.map(is_ours).filter(|is_ours| *is_ours).count());
    assert!(open.is_err() || open.unwrap() < 300, "staged files are not all kept open");
    tx.commit().await.unwrap();
    assert_eq!(names(dir.path()).len(), 1001);
    assert_eq!(read(dir.path(), "999"), "999");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_transactions_over_the_same_files_each_win_or_lose_as_a_whole() {
    let dir = scene(&["a", "b", "c"]);
    let path = Arc::<Path>::from(dir.path());
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..4 {
        let path = path.clone();
        tasks.spawn(async move {
            for round in 0..10 {
                // In different orders, so that a lock for each file would be a deadlock.
                let mut files = ["a", "b", "c"];
                files.rotate_left(task % 3);
                let mut tx = MultiFileTransaction::new();
                for file in files {
                    tx.add_file(path.join(file), format!("{task} {round}")).await.unwrap();
                }
                tx.commit().await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    assert_eq!(names(&path), ["a", "b", "c"]);
    assert!(read(&path, "a") == read(&path, "b") && read(&path, "b") == read(&path, "c"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_never_miss_a_file_and_with_the_lock_never_see_a_mix() {
    // In memory, if there is such a place: there a thousand transactions take seconds, and the races are the same.
    let memory = Path::new("/dev/shm");
    let dir = if memory.exists() { tempfile::tempdir_in(memory).unwrap() } else { scene(&[]) };
    let files: Vec<PathBuf> = ["a", "b", "c"].iter().map(|name| dir.path().join(name)).collect();
    files.iter().for_each(|file| std::fs::write(file, "0").unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let (loose, stopped) = (files.clone(), stop.clone());
    let reader = std::thread::spawn(move || {
        let mut reads = 0;
        while !stopped.load(Ordering::Relaxed) {
            for file in &loose {
                assert!(!std::fs::read(file).unwrap().is_empty(), "torn");
                reads += 1;
            }
        }
        reads
    });
    let (locked, stopped, place) = (files.clone(), stop.clone(), dir.path().to_owned());
    let polite = tokio::spawn(async move {
        let mut seen = 0;
        while !stopped.load(Ordering::Relaxed) {
            let lock = atomic_fs::read_lock(&place).await.unwrap();
            let contents: Vec<_> = locked.iter().map(|file| std::fs::read(file).unwrap()).collect();
            drop(lock);
            assert!(contents.iter().all(|content| *content == contents[0]), "a mix");
            seen += 1;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        seen
    });
    for round in 0..1000 {
        let mut tx = MultiFileTransaction::new();
        for file in &files {
            tx.add_file(file, round.to_string()).await.unwrap();
        }
        tx.commit().await.unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    let (reads, seen) = (reader.join().unwrap(), polite.await.unwrap());
    println!("{reads} reads without the lock, {seen} with it");
    assert!(reads > 0 && seen > 0);
}

#[tokio::test]
async fn a_commit_waits_for_a_reader_and_a_dropped_one_lets_go() {
    let dir = scene(&["a", "b"]);
    let lock = atomic_fs::read_lock(dir.path()).await.unwrap();
    let _second = atomic_fs::read_lock(dir.path()).await.unwrap();
    let mut tx = MultiFileTransaction::new();
    tx.add_file(dir.path().join("a"), "new").await.unwrap();
    tx.add_file(dir.path().join("b"), "new").await.unwrap();
    let mut commit = Box::pin(tx.commit());
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut commit).await.is_err());
    assert_eq!(read(dir.path(), "a"), "a");
    drop(commit);
    crate::support::eventually("what was staged goes", || names(dir.path()) == ["a", "b"]).await;
    drop(lock);
    assert_eq!(read(dir.path(), "a"), "a");
}

#[tokio::test]
async fn a_commit_that_waits_for_a_lock_gets_on_without_being_polled() {
    let dir = tempdir().unwrap();
    let [one, other] = ["one", "other"].map(|name| dir.path().join(name));
    for path in [&one, &other] {
        std::fs::create_dir(path).unwrap();
    }
    for (round, held) in [("0", &one), ("1", &other)] {
        let lock = atomic_fs::read_lock(held).await.unwrap();
        let mut commit = Box::pin(change_both([one.clone(), other.clone()], round));
        // Polled until it waits; from here on it is like one of several in a stream whose consumer is busy.
        assert!(tokio::time::timeout(Duration::from_millis(500), &mut commit).await.is_err());
        drop(lock);
        let is_new = |path: &PathBuf| std::fs::read_to_string(path.join("y")).is_ok_and(|y| y == round);
        let changed = || [&one, &other].into_iter().all(is_new);
        crate::support::eventually("the files change", changed).await;
        for path in [&one, &other] {
            let lock = tokio::time::timeout(Duration::from_secs(20), atomic_fs::read_lock(path)).await;
            drop(lock.expect("a lock is held for a commit that nobody polls").unwrap());
        }
        commit.await.unwrap();
        assert!([&one, &other].iter().all(|path| names(path) == ["x", "y"]));
    }
}

#[tokio::test]
async fn a_waker_that_panics_harms_nobody_else_who_waits_for_a_lock() {
    struct Bomb;
    impl std::task::Wake for Bomb {
        fn wake(self: Arc<Self>) {
            panic!("a waker of the test's");
        }
    }
    let dir = tempdir().unwrap();
    let change = |content| change_both([dir.path().to_owned(), dir.path().join("other")], content);
    std::fs::create_dir(dir.path().join("other")).unwrap();
    let lock = atomic_fs::read_lock(dir.path()).await.unwrap();
    let mut first = Box::pin(change("first"));
    let mut second = Box::pin(change("second"));
    for commit in [&mut first, &mut second] {
        assert!(tokio::time::timeout(Duration::from_millis(500), commit).await.is_err());
    }
    let bomb = std::task::Waker::from(Arc::new(Bomb));
    assert!(first.as_mut().poll(&mut std::task::Context::from_waker(&bomb)).is_pending());
    drop(lock);
    let second = tokio::time::timeout(Duration::from_secs(20), second).await;
    second.expect("nobody tries for those who wait any more").unwrap();
    first.await.unwrap();
}

#[test]
fn who_waits_for_a_lock_leaves_the_only_thread_of_the_pool_to_who_holds_it() {
    let dir = scene(&["a", "b"]);
    let dir = dir.path();
    let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let lock = atomic_fs::read_lock(dir).await.unwrap();
        let mut tx = MultiFileTransaction::new();
        tx.add_file(dir.join("a"), "new").await.unwrap();
        tx.add_file(dir.join("b"), "new").await.unwrap();
        let commit = tokio::spawn(tx.commit());
        let recovery = tokio::spawn(atomic_fs::recover(dir.to_owned()));
        for _ in 0..20 {
            // Less than the patience of the waiting commit, and far more than this takes.
            let read = tokio::time::timeout(Duration::from_secs(20), tokio::fs::read(dir.join("a"))).await;
            assert_eq!(read.expect("there is no thread for the reader").unwrap(), b"a");
        }
        assert!(!commit.is_finished() && !recovery.is_finished());
        drop(lock);
        commit.await.unwrap().unwrap();
        recovery.await.unwrap().unwrap();
        assert_eq!(
            (read(dir, "a"), read(dir, "b"), names(dir)),
            ("new".into(), "new".into(), vec!["a".into(), "b".into()])
        );
    });
}

/// A transaction that changes `x` and `y` in both directories.
async fn change_both(dirs: [PathBuf; 2], content: &str) -> Result<(), Error> {
    let mut tx = MultiFileTransaction::new();
    for dir in dirs {
        for name in ["x", "y"] {
            tx.add_file(dir.join(name), content).await?;
        }
    }
    tx.commit().await
}

#[tokio::test]
async fn a_dropped_wait_for_a_lock_has_at_once_locked_nothing() {
    let dir = tempdir().unwrap();
    let [one, other] = ["one", "other"].map(|name| dir.path().join(name));
    for path in [&one, &other] {
        std::fs::create_dir(path).unwrap();
    }
    for (free, held) in [(&one, &other), (&other, &one)] {
        for _ in 0..20 {
            let lock = atomic_fs::read_lock(held).await.unwrap();
            let commit = change_both([one.clone(), other.clone()], "new");
            // It may have locked the first of the two by then, and waits for the second.
            let waiting = async {
                let staged = || names(free).len() + names(held).len() == 6;
                crate::support::eventually("the four files, the note and what leads to it are there", staged).await;
                tokio::time::sleep(Duration::from_millis(20)).await;
            };
            tokio::select! {
                ended = commit => panic!("it did not wait: {ended:?}"),
                () = waiting => {}
            }
            for path in [free, held] {
                drop(lock_free(path, true).unwrap());
            }
            drop(lock_free(free, false).unwrap());
            drop(lock);
            drop(lock_free(held, false).unwrap());
        }
        assert_eq!((names(free), names(held)), (vec![], vec![]));
    }
}

#[test]
fn readers_and_transactions_in_opposite_orders_all_get_their_turn_on_one_thread() {
    let dir = tempdir().unwrap();
    let dirs = ["one", "other"].map(|name| dir.path().join(name));
    for path in &dirs {
        std::fs::create_dir(path).unwrap();
        for name in ["x", "y"] {
            std::fs::write(path.join(name), "old").unwrap();
        }
    }
    let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let done = Arc::new(AtomicBool::new(false));
        let mut readers = tokio::task::JoinSet::new();
        for dir in dirs.iter().cycle().take(4) {
            let (dir, done) = (dir.clone(), done.clone());
            readers.spawn(async move {
                while !done.load(Ordering::Relaxed) {
                    let lock = atomic_fs::read_lock(&dir).await.unwrap();
                    let x = tokio::fs::read(dir.join("x")).await.unwrap();
                    assert_eq!(x, tokio::fs::read(dir.join("y")).await.unwrap());
                    drop(lock);
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            });
        }
        let mut writers = tokio::task::JoinSet::new();
        for writer in 0..8 {
            let [one, other] = dirs.clone();
            let dirs = if writer % 2 == 0 { [one, other] } else { [other, one] };
            writers.spawn(async move {
                for round in 0..5 {
                    change_both(dirs.clone(), &format!("{writer} {round}")).await.unwrap();
                }
            });
        }
        writers.join_all().await;
        done.store(true, Ordering::Relaxed);
        readers.join_all().await;
    });
    let read = |dir: &Path| (read(dir, "x"), read(dir, "y"), names(dir).len());
    assert_eq!(read(&dirs[0]), read(&dirs[1]));
}

#[tokio::test]
async fn a_recovery_and_a_sweep_do_not_disturb_a_transaction_that_lives() {
    let dir = scene(&["a"]);
    let mut tx = MultiFileTransaction::new();
    tx.add_file(dir.path().join("a"), "new").await.unwrap();
    tx.add_file(dir.path().join("b"), "new").await.unwrap();
    let report = atomic_fs::recover(dir.path()).await.unwrap();
    assert_eq!((report.removed, report.live), (0, 1));
    assert_eq!(atomic_fs::sweep(dir.path()).await.unwrap().removed, 0);
    tx.commit().await.unwrap();
    assert_eq!((names(dir.path()), read(dir.path(), "a")), (vec!["a".into(), "b".into()], "new".into()));
}

/// The parent of a bare name.
#[tokio::test]
async fn a_directory_without_a_name_is_the_working_directory_and_a_missing_one_a_typed_error() {
    let here = Path::new("file").parent().unwrap();
    assert_eq!(atomic_fs::recover(here).await.unwrap(), RecoveryReport::default());
    assert_eq!(atomic_fs::sweep(here).await.unwrap().removed, 0);
    drop(atomic_fs::read_lock(here).await.unwrap());
    let dir = scene(&[]);
    let missing = dir.path().join("missing");
    for error in [
        atomic_fs::recover(&missing).await.unwrap_err(),
        atomic_fs::sweep(&missing).await.unwrap_err(),
        atomic_fs::read_lock(&missing).await.unwrap_err(),
    ] {
        assert!(error.is_missing_directory(), "{error:?}");
    }
}

#[tokio::test]
async fn a_journal_that_is_cut_or_altered_is_refused_and_nothing_is_touched() {
    let dir = scene(&["a"]);
    let (journal, staged) = (dir.path().join(".afs-journal"), dir.path().join(".afs-tx-0123456789abcdef-1"));
    std::fs::write(&staged, "data").unwrap();
    for content in [&b""[..], b"afs-tx1\n", b"afs-tx1\n\0\0\0\0\0\0\0\0\0\0\0\0", &[0xff; 200]] {
        std::fs::write(&journal, content).unwrap();
        let error = atomic_fs::recover(dir.path()).await.unwrap_err();
        assert!(error.is_refused() && matches!(error, Error::CorruptJournal { .. }), "{error}");
        assert!(error.to_string().contains("by hand"), "{error}");
        assert_eq!(names(dir.path()), [".afs-journal", ".afs-tx-0123456789abcdef-1", "a"]);
        assert!(atomic_fs::read_lock(dir.path()).await.unwrap_err().is_unrecovered());
        let mut tx = MultiFileTransaction::new();
        tx.add_file(dir.path().join("a"), "new").await.unwrap();
        assert!(tx.commit().await.unwrap_err().is_unrecovered());
    }
    std::fs::remove_file(&journal).unwrap();
    std::fs::create_dir(&journal).unwrap();
    let a_directory = atomic_fs::recover(dir.path()).await.unwrap_err();
    std::fs::remove_dir(&journal).unwrap();
    symlink("a", &journal).unwrap();
    let a_symlink = atomic_fs::recover(dir.path()).await.unwrap_err();
    assert!(a_directory.is_refused() && a_symlink.is_refused(), "{a_directory}, {a_symlink}");
    std::fs::remove_file(&journal).unwrap();
    assert_eq!(atomic_fs::recover(dir.path()).await.unwrap().removed, 1);
    assert_eq!((names(dir.path()), read(dir.path(), "a")), (vec!["a".into()], "a".into()));
}
