//! Readers get complete content as it was written, however many writers there are.

use std::io;
use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use cancel_safe_atomic_fs::{self as atomic_fs, AtomicFileWriter, Durability, Error, TargetState, blocking};
use tempfile::tempdir;
use tokio::task::JoinSet;

#[cfg(target_os = "linux")]
use crate::child;
use crate::support::{eventually, names, temps};

const MIB: usize = 1 << 20;

/// Content that reveals a missing, doubled or misplaced piece.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect()
}

#[tokio::test]
async fn write_creates_and_then_replaces_at_any_size() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    for length in [0, 1, 4096, MIB - 1, MIB, MIB + 1, 3 * MIB + 7] {
        let content = pattern(length);
        atomic_fs::write(&path, &content).await.unwrap();
        assert!(std::fs::read(&path).unwrap() == content, "{length} bytes");
        blocking::write(&path, b"between").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"between");
        atomic_fs::write_bytes(&path, content.clone()).await.unwrap();
        assert!(std::fs::read(&path).unwrap() == content, "{length} bytes");
    }
    assert_eq!(names(dir.path()), ["file"]);
}

#[tokio::test]
async fn write_takes_whatever_is_bytes() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    let owned = String::from("owned");
    atomic_fs::write(&path, b"array").await.unwrap();
    atomic_fs::write(&path, "str").await.unwrap();
    atomic_fs::write(&path, &owned).await.unwrap();
    atomic_fs::write(path.to_str().unwrap(), owned.into_bytes()).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"owned");
    atomic_fs::write_bytes(&path, "static").await.unwrap();
    atomic_fs::write_bytes(&path, vec![b'x'; 2]).await.unwrap();
    AtomicFileWriter::options().write_bytes(&path, String::from("owned again")).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"owned again");
}

#[cfg(target_os = "linux")]
#[test]
fn write_bytes_holds_no_copy_of_its_content() {
    let dir = tempdir().unwrap();
    let grown_kib = |task| -> usize {
        let said = child::outcome(child::command(&[], task, &dir.path().join("file"))).unwrap();
        said.parse().unwrap()
    };
    let (shared, copied) = (grown_kib("write bytes"), grown_kib("write a copy"));
    assert!(shared < child::LARGE_BYTES / 1024 / 4, "{shared} KiB");
    assert!(copied > child::LARGE_BYTES / 1024 / 2, "a copy must be caught: {copied} KiB");
}

#[tokio::test]
async fn a_writer_shows_nothing_before_its_commit() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "old").unwrap();
    let content = pattern(5 * MIB + 3);
    let mut writer = AtomicFileWriter::new(&path).await.unwrap();
    for piece in content.chunks(300_001) {
        writer.write_all(piece).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }
    writer.commit().await.unwrap();
    assert!(std::fs::read(&path).unwrap() == content);
    assert_eq!(names(dir.path()), ["file"]);
}

#[tokio::test]
async fn a_dropped_writer_leaves_the_old_file_and_no_other() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "old").unwrap();
    for length in [0, 10, 4 * MIB] {
        let mut writer = AtomicFileWriter::new(&path).await.unwrap();
        writer.write_all(&pattern(length)).await.unwrap();
        drop(writer);
        eventually("the temporary file goes", || temps(dir.path()).is_empty()).await;
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }
}

#[tokio::test]
async fn a_discarded_writer_leaves_nothing_at_once() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    for length in [0, 10, 4 * MIB] {
        let mut writer = AtomicFileWriter::new(&path).await.unwrap();
        writer.write_all(&pattern(length)).await.unwrap();
        writer.discard().await.unwrap();
        assert!(names(dir.path()).is_empty());
    }
}

#[tokio::test]
async fn a_detached_commit_lands_whether_or_not_its_handle_is_kept() {
    let dir = tempdir().unwrap();
    for (name, length) in [("a", 10), ("b", 3 * MIB)] {
        let path = dir.path().join(name);
        let mut writer = AtomicFileWriter::new(&path).await.unwrap();
        writer.write_all(&pattern(length)).await.unwrap();
        drop(writer.commit_detached());
        eventually("the commit lands", || path.exists()).await;
        assert!(std::fs::read(&path).unwrap() == pattern(length));

        let mut writer = AtomicFileWriter::new(&path).await.unwrap();
        writer.write_all(b"awaited").await.unwrap();
        writer.commit_detached().await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"awaited");
    }
}

#[tokio::test]
async fn a_writer_is_the_end_of_a_copy() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    let content = pattern(2 * MIB + 5);
    let mut writer = AtomicFileWriter::new(&path).await.unwrap();
    tokio::io::copy(&mut &content[..], &mut writer).await.unwrap();
    tokio::io::AsyncWriteExt::shutdown(&mut writer).await.unwrap();
    assert!(!path.exists(), "a shutdown is no commit");
    writer.commit().await.unwrap();
    assert!(std::fs::read(&path).unwrap() == content);
}

#[tokio::test]
async fn a_loop_of_writes_that_is_cut_by_a_timeout_leaves_no_file() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("test.txt");
    let mut writer = AtomicFileWriter::new(&path).await.unwrap();
    let result = tokio::time::timeout(Duration::from_millis(10), async {
        // Without an end, so that only the timeout can end it; small writes must yield for that.
        for i in 0_u64.. {
            writer.write(format!("Line {i}\n").as_bytes()).await.unwrap();
        }
        writer.commit().await
    })
    .await;
    assert!(result.is_err() && !path.exists());
}

#[tokio::test]
async fn each_durability_replaces_the_file() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    for (durability, text) in [(Durability::Full, "full"), (Durability::Ordered, "ordered"), (Durability::None, "none")]
    {
        AtomicFileWriter::options().durability(durability).write(&path, text).await.unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }
}

#[cfg(feature = "json")]
#[tokio::test]
async fn json_is_pretty_and_a_value_that_is_none_changes_nothing() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("config.json");
    let config = std::collections::BTreeMap::from([("retries", 3)]);
    atomic_fs::write_json(&path, &config).await.unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\n  \"retries\": 3\n}");

    let no_json = std::collections::BTreeMap::from([((1, 2), 3)]);
    let error = atomic_fs::write_json(&path, &no_json).await.unwrap_err();
    assert!(matches!(error, Error::Serialize { .. }) && error.target() == TargetState::Unchanged);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\n  \"retries\": 3\n}");
}

#[cfg(feature = "json")]
#[tokio::test]
async fn a_write_whose_time_is_up_never_lands() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(&path, "old").unwrap();
    for timeout in [Duration::ZERO, Duration::from_nanos(1)] {
        let error = atomic_fs::write_json_with_timeout(&path, &"new", timeout).await.unwrap_err();
        assert!(error.is_timeout() && error.target() == TargetState::Unchanged);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
    }
    for timeout in [Duration::from_secs(60), Duration::MAX] {
        atomic_fs::write_json_with_timeout(&path, &"new", timeout).await.unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "\"new\"");
    }
    eventually("the temporary files go", || names(dir.path()) == ["config.json"]).await;
}

#[cfg(feature = "json")]
#[test]
fn a_write_that_is_stuck_in_the_queue_times_out_and_never_lands() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("config.json");
    let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let (release, released) = std::sync::mpsc::channel::<()>();
        let busy = tokio::task::spawn_blocking(move || released.recv());
        let error = atomic_fs::write_json_with_timeout(&path, &1, Duration::from_millis(5)).await.unwrap_err();
        assert!(error.is_timeout());
        release.send(()).unwrap();
        busy.await.unwrap().unwrap();
        crate::support::drain_pool().await;
        assert!(names(dir.path()).is_empty());
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_writers_of_one_file_all_succeed_and_readers_see_it_whole() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, vec![b'z'; 10]).unwrap();
    let done = std::sync::Arc::new(AtomicBool::new(false));
    let reader = {
        let (path, done) = (path.clone(), done.clone());
        std::thread::spawn(move || {
            while !done.load(Ordering::Relaxed) {
                let content = std::fs::read(&path).expect("the file is never missing");
                let wanted = if content[0] == b'z' { 10 } else { 20_000 + usize::from(content[0]) };
                assert!(content.len() == wanted && content.iter().all(|&b| b == content[0]), "torn");
            }
        })
    };
    let mut writers = JoinSet::new();
    for letter in b'a'..=b'd' {
        let path = path.clone();
        writers.spawn(async move {
            for round in 0..100 {
                let content = vec![letter; 20_000 + usize::from(letter)];
                let options = AtomicFileWriter::options();
                // Only some rounds are synced: the races are the same, and the test is faster.
                let options = if round % 10 == 0 { options } else { options.durability(Durability::None) };
                options.write(&path, content).await.unwrap();
            }
        });
    }
    while let Some(result) = writers.join_next().await {
        result.unwrap();
    }
    done.store(true, Ordering::Relaxed);
    reader.join().unwrap();
    assert_eq!(names(dir.path()), ["file"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_writers_that_create_one_file_exactly_one_succeeds() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    let mut writers = JoinSet::new();
    for i in 0..8_u8 {
        let path = path.clone();
        writers.spawn(async move {
            // Opened while there is no file, so that only the rename can decide.
            let mut writer = AtomicFileWriter::options().create_new(true).open(&path).await?;
            writer.write(&[i]).await?;
            writer.commit().await.map(|()| i)
        });
    }
    let results = writers.join_all().await;
    let winners: Vec<_> = results.iter().flatten().collect();
    assert_eq!(winners.len(), 1, "{results:?}");
    assert_eq!(std::fs::read(&path).unwrap(), [*winners[0]]);
    assert!(results.iter().filter_map(|result| result.as_ref().err()).all(Error::is_already_exists), "{results:?}");
    assert_eq!(names(dir.path()), ["file"]);
}

#[tokio::test]
async fn many_small_writers_may_be_open_at_once() {
    let dir = tempdir().unwrap();
    let mut writers = Vec::new();
    for i in 0..32 {
        let mut writer = AtomicFileWriter::new(dir.path().join(format!("{i}"))).await.unwrap();
        writer.write(b"small").await.unwrap();
        writers.push(writer);
    }
    let report = atomic_fs::sweep(dir.path()).await.unwrap();
    assert_eq!((report.removed, report.live, report.failed), (0, 32, 0), "a sweep takes no living one's file");
    for writer in writers {
        writer.commit().await.unwrap();
    }
    assert_eq!(names(dir.path()).len(), 32);
}

#[tokio::test]
async fn a_sweep_leaves_alone_what_is_not_a_temporary_file() {
    let dir = tempdir().unwrap();
    let others = [".afs-tx-1-0", ".afs-file-0123", "file", "note.tmp"];
    for name in others {
        std::fs::write(dir.path().join(name), "kept").unwrap();
    }
    std::fs::create_dir(dir.path().join(".afs-file-aaaaaaaaaaaaaaaa")).unwrap();
    std::fs::write(dir.path().join(".afs-file-bbbbbbbbbbbbbbbb"), "litter").unwrap();
    let report = atomic_fs::sweep(dir.path()).await.unwrap();
    assert_eq!((report.removed, report.live, report.failed), (1, 0, 0));
    assert_eq!(names(dir.path()).len(), others.len() + 1);
    let missing = atomic_fs::sweep(dir.path().join("missing")).await.unwrap_err();
    assert_eq!(missing.kind(), io::ErrorKind::NotFound);
}

#[tokio::test]
async fn an_error_becomes_an_io_error_of_the_same_kind() {
    async fn save(path: &Path) -> io::Result<()> {
        atomic_fs::write(path, "x").await?;
        Ok(())
    }
    let dir = tempdir().unwrap();
    let error = save(&dir.path().join("missing/file")).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    assert!(error.to_string().contains("missing"), "{error}");
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()).unwrap();
    assert!(inner.is_missing_directory() && !dir.path().join("missing").exists());
}

#[test]
fn outside_a_runtime_the_error_is_typed() {
    let mut future = pin!(atomic_fs::write("never", "x"));
    let Poll::Ready(Err(error)) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) else {
        panic!("it must fail at once")
    };
    assert!(matches!(error, Error::NoRuntime { .. }));
}

#[test]
fn a_shutdown_of_the_runtime_ends_a_detached_commit_one_way_or_the_other() {
    let dir = tempdir().unwrap();
    for round in 0..20 {
        let path = dir.path().join(format!("{round}"));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut handle = None;
        runtime.block_on(async {
            let mut writer = AtomicFileWriter::new(&path).await.unwrap();
            writer.write(b"new").await.unwrap();
            handle = Some(writer.commit_detached());
        });
        drop(runtime);
        let outcome = tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(handle.unwrap());
        match outcome {
            Ok(()) => assert!(path.exists()),
            Err(error) => assert_eq!(path.exists(), error.target() == TargetState::Visible, "{error}"),
        }
        assert!(temps(dir.path()).is_empty());
    }
}

#[test]
fn writers_and_their_futures_can_move_between_threads() {
    fn is_send<T: Send>(_: &T) {}
    is_send(&atomic_fs::write("never", [1_u8]));
    is_send(&atomic_fs::sweep("never"));
    is_send(&async {
        let mut writer = AtomicFileWriter::new("never").await?;
        writer.write(b"x").await?;
        writer.commit().await
    });
}
