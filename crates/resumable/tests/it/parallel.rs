//! Items in tasks of their own.

use std::{
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use cancel_safe_resumable::{FileStore, ItemError};
use futures_util::StreamExt;
use tokio_util::sync::CancellationToken;

use crate::support::{PATIENCE, checkpoint, double, eventually, numbers, restored};

/// Counts the living items, however they end.
struct Alive(Arc<AtomicUsize>);

impl Alive {
    fn enter(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(count))
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn items_that_compute_run_at_the_same_time() {
    let (_dir, path) = checkpoint();
    let (sender, receiver) = mpsc::channel();
    // In one task, the first of them would wait for the second for ever.
    let together = Arc::new(Barrier::new(2));
    let run = numbers(&path).parallel(2).stream(0..20, move |_, x| {
        let together = Arc::clone(&together);
        async move {
            together.wait();
            Ok(x)
        }
    });
    tokio::spawn(async move { sender.send(run.finish().await) });
    let ended = tokio::task::spawn_blocking(move || receiver.recv_timeout(PATIENCE)).await.unwrap();
    assert_eq!(ended.expect("it hangs").unwrap().completed, 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_order_the_retries_and_panics_are_as_in_one_task() {
    let (_dir, path) = checkpoint();
    let tries = Arc::new(Mutex::new(vec![0; 100]));
    let seen = Arc::clone(&tries);
    let retry = cancel_safe_resumable::Retry::attempts(2).backoff(Duration::ZERO, Duration::ZERO);
    let results = numbers(&path).parallel(8).retry(retry).collect(0..100, move |cx, x| {
        seen.lock().unwrap()[x as usize] += 1;
        async move {
            tokio::time::sleep(Duration::from_millis(x % 5)).await;
            assert!(x % 10 != 3 || cx.attempt() == 2, "the first time");
            if x % 10 == 7 && cx.attempt() == 1 { Err(ItemError::retry("once")) } else { Ok(x) }
        }
    });
    assert_eq!(results.await.unwrap(), (0..100).collect::<Vec<_>>());
    assert_eq!(tries.lock().unwrap().iter().sum::<usize>(), 120);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_checkpoint_stays_locked_until_the_last_task_of_a_dropped_run_has_ended() {
    let (_dir, path) = checkpoint();
    let alive = Arc::new(AtomicUsize::new(0));
    let (release, blocked) = mpsc::channel::<()>();
    let blocked = Arc::new(Mutex::new(blocked));
    let entered = Arc::clone(&alive);
    let mut run = numbers(&path).parallel(3).stream(0..3, move |_, _| {
        let (entered, blocked) = (Arc::clone(&entered), Arc::clone(&blocked));
        async move {
            let _alive = Alive::enter(&entered);
            // One item computes without an await; the others wait for it, or for ever.
            if let Ok(blocked) = blocked.try_lock() {
                assert!(blocked.recv().is_err());
            }
            std::future::pending().await
        }
    });
    assert!(futures_util::poll!(run.next()).is_pending());
    let polling = tokio::spawn(async move { run.next().await.is_some() });
    eventually("all of them run", || alive.load(Ordering::SeqCst) == 3).await;
    polling.abort();
    assert!(polling.await.unwrap_err().is_cancelled());
    let briefly = numbers(&path).store(FileStore::at(&path).wait(Duration::from_millis(50)));
    let error = briefly.stream(0..3, |_, x| double(x)).finish().await.unwrap_err();
    assert!(error.is_busy(), "{error}");
    drop(release);
    let seen = Arc::clone(&alive);
    let next = numbers(&path).stream(0..3, move |_, x| {
        assert_eq!(seen.load(Ordering::SeqCst), 0, "it runs beside one of before");
        double(x)
    });
    assert_eq!(next.finish().await.unwrap().completed, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_two_starters_none_runs_beside_a_task_of_the_other() {
    let (_dir, path) = checkpoint();
    let mut before = Arc::new(AtomicUsize::new(0));
    for round in 0..25 {
        let alive = Arc::new(AtomicUsize::new(0));
        let (own, others) = (Arc::clone(&alive), Arc::clone(&before));
        let mut run = numbers(&path).parallel(8).stream(0..10_000, move |_, x| {
            let (own, others) = (Arc::clone(&own), Arc::clone(&others));
            async move {
                let _alive = Alive::enter(&own);
                assert_eq!(others.load(Ordering::SeqCst), 0, "one of the run before is still at work");
                tokio::task::yield_now().await;
                Ok(x)
            }
        });
        // The drop comes while some are at work; the next run starts at once.
        for _ in 0..fastrand::usize(1..40) {
            let done = run.next().await.unwrap();
            assert!(done.result.is_ok(), "round {round}: {done:?}");
        }
        before = alive;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn when_a_cancel_returns_no_task_is_at_work_and_what_was_done_is_recorded() {
    let (_dir, path) = checkpoint();
    let (alive, done) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let token = CancellationToken::new();
    let (entered, finished) = (Arc::clone(&alive), Arc::clone(&done));
    let mut run = numbers(&path).parallel(8).cancel(token.clone()).stream(0..10_000, move |_, x| {
        let (entered, finished) = (Arc::clone(&entered), Arc::clone(&finished));
        async move {
            let _alive = Alive::enter(&entered);
            tokio::time::sleep(Duration::from_millis(x % 3)).await;
            finished.fetch_add(1, Ordering::SeqCst);
            Ok(x)
        }
    });
    for _ in 0..100 {
        run.next().await.unwrap();
    }
    token.cancel();
    assert!(run.finish().await.unwrap_err().is_cancelled());
    assert_eq!(alive.load(Ordering::SeqCst), 0);
    assert_eq!(restored(&path, 10_000).await.len(), done.load(Ordering::SeqCst));
}

#[test]
fn tasks_need_a_runtime_and_end_with_it() {
    let (_dir, path) = checkpoint();
    let run = numbers(&path).parallel(2).stream(0..3, |_, x| double(x)).finish();
    let error = futures_util::FutureExt::now_or_never(run).unwrap().unwrap_err();
    assert!(matches!(error, cancel_safe_resumable::TaskError::Config(_)) && !path.exists(), "{error}");
}
