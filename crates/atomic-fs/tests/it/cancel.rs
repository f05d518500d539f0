//! Dropped at any moment: the file is old or new, nothing changes later, and no temporary file stays.

use std::path::Path;
use std::time::Duration;

use cancel_safe_atomic_fs::{self as atomic_fs, blocking};
use tempfile::tempdir;

use crate::support::{drain_pool, names};

/// Cancels `rounds` writes after random times and counts the late changes and the litter.
///
/// The pool has one thread, so that it can be drained: then every job that could still do something has ended.
fn cancel_at_random<F: Future>(rounds: u32, write: impl Fn(&Path) -> F) -> (u32, u32, u32) {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    let (mut cancelled, mut late, mut litter) = (0, 0, 0);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        for _ in 0..rounds {
            std::fs::write(&path, "old").unwrap();
            let mut write = Box::pin(write(&path));
            let begun = std::time::Instant::now();
            let limit = Duration::from_micros(random.u64(..1500));
            // Not a timer, which would only ever fire on the millisecond.
            let ended = std::future::poll_fn(|cx| {
                if write.as_mut().poll(cx).is_ready() {
                    return std::task::Poll::Ready(true);
                }
                if begun.elapsed() >= limit {
                    return std::task::Poll::Ready(false);
                }
                cx.waker().wake_by_ref();
                std::task::Poll::Pending
            })
            .await;
            drop(write);
            let after_drop = std::fs::read(&path).unwrap();
            drain_pool().await;
            if !ended {
                cancelled += 1;
                late += u32::from(std::fs::read(&path).unwrap() != after_drop);
            }
            litter += u32::from(names(dir.path()) != ["file"]);
        }
    });
    (cancelled, late, litter)
}

#[test]
fn a_write_that_is_dropped_at_random_never_lands_later() {
    let (cancelled, late, litter) = cancel_at_random(400, |path| atomic_fs::write(path.to_owned(), vec![b'N'; 65536]));
    println!("cancelled {cancelled}, late {late}, litter {litter}");
    assert!(cancelled > 0, "nothing was tested");
    assert_eq!((late, litter), (0, 0));
}

#[test]
fn the_same_check_catches_a_write_without_the_gate() {
    let (_, late, _) = cancel_at_random(200, |path| {
        let path = path.to_owned();
        tokio::task::spawn_blocking(move || blocking::write(path, vec![b'N'; 65536]))
    });
    assert!(late > 0, "a blocking job that runs on after its future is gone must be caught");
}

#[test]
fn a_cancelled_write_does_not_undo_the_one_that_was_acknowledged_after_it() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        for round in 0..100_u32 {
            let first = tokio::time::timeout(
                Duration::from_micros(u64::from(round) * 20),
                atomic_fs::write(&path, vec![b'A'; 300_000]),
            );
            drop(first.await);
            atomic_fs::write(&path, "B").await.unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"B");
        }
        drop(runtime.handle().clone());
    });
    drop(runtime);
    assert_eq!((std::fs::read(&path).unwrap(), names(dir.path())), (b"B".to_vec(), vec!["file".to_owned()]));
}
