//! The functions for threads that may block, wherever they are called: without a runtime, on its threads, and in a task.

use std::io::Write;
use std::path::Path;

use cancel_safe_atomic_fs::{AtomicFileWriter as Async, Error, TargetState, blocking};
use tempfile::tempdir;

use crate::support::names;

/// Everything once, in the directory `dir`.
fn do_everything(dir: &Path) {
    let at = |name: &str| dir.join(name);
    let read = |name: &str| std::fs::read_to_string(at(name)).unwrap();
    blocking::write(at("a"), "written").unwrap();
    blocking::write_with(at("b"), "with", Async::options().create_new(true)).unwrap();
    let again = blocking::write_with(at("b"), "again", Async::options().create_new(true)).unwrap_err();
    assert!(again.is_already_exists() && read("b") == "with");
    #[cfg(feature = "json")]
    {
        blocking::write_json(at("json"), &[1]).unwrap();
        assert_eq!(read("json"), "[\n  1\n]");
        std::fs::remove_file(at("json")).unwrap();
    }

    let mut writer = blocking::AtomicFileWriter::new(at("a")).unwrap();
    // More than the buffer holds, in pieces.
    for _ in 0..40 {
        writer.write_all(&[b'x'; 100_000]).unwrap();
    }
    writer.flush().unwrap();
    assert_eq!((read("a"), names(dir).len()), ("written".to_owned(), 3));
    writer.commit().unwrap();
    assert_eq!(read("a").len(), 4_000_000);
    let mut given_up = blocking::AtomicFileWriter::open(at("a"), Async::options().mode(0o600)).unwrap();
    given_up.write_all(b"y").unwrap();
    given_up.discard().unwrap();
    drop(blocking::AtomicFileWriter::new(at("c")).unwrap());
    let missing = blocking::AtomicFileWriter::new(at("missing/c")).unwrap_err();
    assert!(missing.is_missing_directory() && missing.target() == TargetState::Unchanged);
    assert_eq!(blocking::sweep(dir).unwrap().live, 0);
    assert_eq!(names(dir), ["a", "b"]);
    #[cfg(unix)]
    change_together(dir);
}

#[cfg(unix)]
fn change_together(dir: &Path) {
    use blocking::MultiFileTransaction;
    use std::time::Duration;

    let at = |name: &str| dir.join(name);
    let read = |name: &str| std::fs::read_to_string(at(name)).unwrap();
    let mut tx = MultiFileTransaction::begin(dir).options(Async::options().mode(0o640));
    tx.add_file(at("a"), "new a").unwrap();
    tx.add_files([(at("c"), "new c"), (at("d"), "new d")]).unwrap();
    tx.writer(at("e")).unwrap().write_all(b"new e").unwrap();
    tx.rename(at("b"), at("f")).unwrap();
    assert!(tx.remove_file(at("a")).unwrap_err().is_repeated_target());
    tx.commit().unwrap();
    assert_eq!(
        (names(dir), read("e"), read("f")),
        (["a", "c", "d", "e", "f"].map(str::to_owned).to_vec(), "new e".into(), "with".into())
    );
    let files = blocking::open_together([at("a"), at("c")]).unwrap();
    assert_eq!(
        files.into_iter().map(|file| std::io::read_to_string(file).unwrap()).collect::<Vec<_>>(),
        ["new a", "new c"]
    );

    let lock = blocking::read_lock(dir).unwrap();
    let mut impatient = MultiFileTransaction::default().patience(Duration::from_millis(20));
    impatient.add_files(["a", "c"].map(|name| (at(name), "late"))).unwrap();
    assert!(matches!(impatient.commit(), Err(Error::Busy { .. })));
    drop(lock);
    let mut given_up = MultiFileTransaction::new();
    given_up.remove_file(at("a")).unwrap();
    given_up.add_file(at("g"), "").unwrap();
    given_up.rollback().unwrap();
    let mut dropped = MultiFileTransaction::new();
    dropped.add_file(at("g"), "").unwrap();
    drop(dropped);
    assert_eq!(blocking::recover(dir).unwrap(), Default::default());
    assert_eq!(names(dir), ["a", "c", "d", "e", "f"]);
}

#[test]
fn everything_can_be_done_on_a_thread_without_a_runtime() {
    let dir = tempdir().unwrap();
    do_everything(dir.path());
}

#[test]
fn everything_can_be_done_on_a_blocking_thread_and_in_a_task_of_any_runtime() {
    for mut builder in [tokio::runtime::Builder::new_current_thread(), tokio::runtime::Builder::new_multi_thread()] {
        let runtime = builder.worker_threads(1).max_blocking_threads(1).build().unwrap();
        runtime.block_on(async {
            let dir = tempdir().unwrap();
            let path = dir.path().to_owned();
            tokio::task::spawn_blocking(move || do_everything(&path)).await.unwrap();
            let dir = tempdir().unwrap();
            let path = dir.path().to_owned();
            // This is rude to other tasks, but it neither panics nor hangs.
            tokio::spawn(async move { do_everything(&path) }).await.unwrap();
        });
    }
}

#[cfg(unix)]
#[test]
fn many_threads_at_once_are_served() {
    let dir = tempdir().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..16 {
            let dir = dir.path();
            scope.spawn(move || {
                for round in 0..5 {
                    let mut tx = blocking::MultiFileTransaction::new();
                    tx.add_files(["a", "b"].map(|name| (dir.join(name), format!("{thread} {round}")))).unwrap();
                    tx.commit().unwrap();
                }
            });
        }
    });
    let [a, b] = ["a", "b"].map(|name| std::fs::read(dir.path().join(name)).unwrap());
    assert_eq!((a, names(dir.path())), (b, vec!["a".to_owned(), "b".to_owned()]));
}
