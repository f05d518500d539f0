//! Other programs that change the same directory at the same time, without any locks.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cancel_safe_atomic_fs::{
    self as atomic_fs, AtomicFileWriter, Durability, Error, MultiFileTransaction, TargetState,
};
use tempfile::tempdir;
use tokio::task::JoinSet;

use crate::support::names;

const ROUNDS: u32 = 100;

/// Runs `work` until `done`, and returns how often.
fn meanwhile<F: Future<Output = ()> + Send + 'static>(
    done: &Arc<AtomicBool>,
    work: impl Fn() -> F + Send + 'static,
) -> tokio::task::JoinHandle<u32> {
    let done = done.clone();
    tokio::spawn(async move {
        let mut rounds = 0;
        while !done.load(Ordering::Relaxed) {
            work().await;
            rounds += 1;
            tokio::task::yield_now().await;
        }
        rounds
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sweeps_and_recoveries_without_a_pause_disturb_no_writer() {
    let dir = tempdir().unwrap();
    let path = Arc::<Path>::from(dir.path());
    let done = Arc::new(AtomicBool::new(false));
    let place = path.clone();
    let sweeper = meanwhile(&done, move || {
        let place = place.clone();
        async move { assert_eq!(atomic_fs::sweep(place).await.unwrap().failed, 0) }
    });
    let place = path.clone();
    let recoverer = meanwhile(&done, move || {
        let place = place.clone();
        async move { assert_eq!(atomic_fs::recover(place).await.unwrap().rolled_back, 0) }
    });
    let mut writers = JoinSet::new();
    for task in 0..3 {
        let path = path.clone();
        writers.spawn(async move {
            for round in 0..ROUNDS {
                let content = format!("{task} {round}");
                let options = AtomicFileWriter::options().durability(Durability::None);
                options.write(path.join("shared"), &content).await.unwrap();
                let own = path.join(format!("own {task}"));
                options.write(&own, &content).await.unwrap();
                assert_eq!(std::fs::read_to_string(own).unwrap(), content);
                let mut tx = MultiFileTransaction::new();
                tx.add_file(path.join(format!("pair {task}")), &content).await.unwrap();
                tx.add_file(path.join(format!("pair {task}'")), &content).await.unwrap();
                if round % 10 == 0 {
                    tx.commit().await.unwrap();
                }
            }
        });
    }
    while let Some(result) = writers.join_next().await {
        result.unwrap();
    }
    done.store(true, Ordering::Relaxed);
    println!("{} sweeps, {} recoveries", sweeper.await.unwrap(), recoverer.await.unwrap());
    let mut expected: Vec<_> =
        (0..3).flat_map(|task| [format!("own {task}"), format!("pair {task}"), format!("pair {task}'")]).collect();
    expected.push("shared".to_owned());
    expected.sort();
    assert_eq!(names(&path), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_and_single_writes_of_the_same_files_each_win_or_lose_whole() {
    let dir = tempdir().unwrap();
    let path = Arc::<Path>::from(dir.path());
    for name in ["a", "b"] {
        std::fs::write(path.join(name), "0").unwrap();
    }
    let done = Arc::new(AtomicBool::new(false));
    let place = path.clone();
    let single = meanwhile(&done, move || {
        let place = place.clone();
        async move {
            let options = AtomicFileWriter::options().durability(Durability::None);
            options.write(place.join("a"), "single").await.unwrap();
        }
    });
    for round in 0..ROUNDS {
        let mut tx = MultiFileTransaction::new();
        tx.add_file(path.join("a"), format!("tx {round}")).await.unwrap();
        tx.add_file(path.join("b"), format!("tx {round}")).await.unwrap();
        tx.commit().await.unwrap();
        let a = std::fs::read_to_string(path.join("a")).unwrap();
        assert!(a == "single" || a == format!("tx {round}"), "{a}");
        assert_eq!(std::fs::read_to_string(path.join("b")).unwrap(), format!("tx {round}"));
    }
    done.store(true, Ordering::Relaxed);
    assert!(single.await.unwrap() > 0);
    assert_eq!(names(&path), ["a", "b"]);
}

/// A file that another program creates after the planning of a transaction is not removed by undoing: nothing of others
/// is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_appears_or_goes_during_a_commit_is_an_error_that_changes_nothing() {
    let dir = tempdir().unwrap();
    let path = Arc::<Path>::from(dir.path());
    std::fs::write(path.join("b"), "0").unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let place = path.clone();
    let other = meanwhile(&done, move || {
        let place = place.clone();
        async move {
            let options = AtomicFileWriter::options().durability(Durability::None);
            options.write(place.join("a"), "other").await.unwrap();
            match std::fs::remove_file(place.join("a")) {
                Ok(()) => {}
                // The transaction had put its file there, and another program removed it.
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound),
            }
        }
    });
    let (mut succeeded, mut refused) = (0, 0);
    for round in 1..=ROUNDS * 3 {
        let before = std::fs::read_to_string(path.join("b")).unwrap();
        let mut tx = MultiFileTransaction::new();
        tx.add_file(path.join("b"), format!("{round}")).await.unwrap();
        tx.add_file(path.join("a"), "tx").await.unwrap();
        match tx.commit().await {
            Ok(()) => {
                succeeded += 1;
                assert_eq!(std::fs::read_to_string(path.join("b")).unwrap(), format!("{round}"));
            }
            Err(error) => {
                refused += 1;
                assert_eq!(error.target(), TargetState::Unchanged, "{error:?}");
                assert_eq!(std::fs::read_to_string(path.join("b")).unwrap(), before);
            }
        }
    }
    done.store(true, Ordering::Relaxed);
    other.await.unwrap();
    println!("{succeeded} succeeded, {refused} refused");
    assert!(succeeded > 0);
    assert!(names(&path).iter().all(|name| name == "a" || name == "b"), "{:?}", names(&path));
}

#[tokio::test]
async fn a_target_whose_directory_is_removed_meanwhile_is_an_error_and_nothing_else_is_touched() {
    let dir = tempdir().unwrap();
    let gone = dir.path().join("gone");
    std::fs::write(dir.path().join("a"), "old").unwrap();
    for in_transaction in [false, true] {
        std::fs::create_dir(&gone).unwrap();
        let error: Error = if in_transaction {
            let mut tx = MultiFileTransaction::new();
            tx.add_file(dir.path().join("a"), "new").await.unwrap();
            tx.add_file(gone.join("b"), "new").await.unwrap();
            std::fs::remove_dir_all(&gone).unwrap();
            tx.commit().await.unwrap_err()
        } else {
            let mut writer = AtomicFileWriter::new(gone.join("b")).await.unwrap();
            writer.write(b"new").await.unwrap();
            std::fs::remove_dir_all(&gone).unwrap();
            writer.commit().await.unwrap_err()
        };
        assert_eq!((error.target(), error.kind()), (TargetState::Unchanged, std::io::ErrorKind::NotFound), "{error:?}");
        assert_eq!(std::fs::read(dir.path().join("a")).unwrap(), b"old");
        assert_eq!(names(dir.path()), ["a"]);
    }
}

#[tokio::test]
async fn a_temporary_file_that_somebody_removes_is_an_error_and_the_old_file_stays() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "old").unwrap();
    let mut writer = AtomicFileWriter::new(&path).await.unwrap();
    writer.write(b"new").await.unwrap();
    std::fs::remove_file(dir.path().join(&crate::support::temps(dir.path())[0])).unwrap();
    let error = writer.commit().await.unwrap_err();
    assert_eq!((error.target(), std::fs::read(&path).unwrap()), (TargetState::Unchanged, b"old".to_vec()), "{error:?}");
    assert_eq!(names(dir.path()), ["file"]);
}

#[tokio::test]
async fn a_directory_or_a_symlink_by_a_reserved_name_does_not_stop_a_recovery() {
    let dir = tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "kept").unwrap();
    std::fs::create_dir(dir.path().join(".afs-tx-0123456789abcdef")).unwrap();
    std::fs::create_dir(dir.path().join(".afs-tx-0123456789abcdee-1")).unwrap();
    std::os::unix::fs::symlink("file", dir.path().join(".afs-tx-0123456789abcded")).unwrap();
    std::os::unix::fs::symlink("file", dir.path().join(".afs-tx-0123456789abcdec-1")).unwrap();
    atomic_fs::recover(dir.path()).await.unwrap();
    let mut tx = MultiFileTransaction::new();
    tx.add_file(dir.path().join("a"), "new").await.unwrap();
    tx.add_file(dir.path().join("b"), "new").await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(std::fs::read(dir.path().join("file")).unwrap(), b"kept");
}
