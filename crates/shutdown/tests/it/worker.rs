//! One worker by hand.

use std::future::pending;
use std::time::Duration;

use cancel_safe_shutdown::{BackgroundWorker, TaskOutcome};
use tokio::task::yield_now;
use tokio_util::sync::CancellationToken;

use crate::Alive;

#[tokio::test(start_paused = true)]
async fn a_worker_stops_with_its_token() {
    let token = CancellationToken::new();
    let mut worker = BackgroundWorker::new("ticker", token.clone());
    assert_eq!(worker.name(), "ticker");
    worker
        .start(|token: CancellationToken| async move {
            while token.run_until_cancelled(tokio::time::sleep(Duration::from_secs(1))).await.is_some() {}
        })
        .unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    token.cancel();
    assert!(matches!(worker.join().await, TaskOutcome::Completed(())));
}

#[tokio::test]
async fn the_outcome_tells_errors_and_panics() {
    let mut worker = BackgroundWorker::new("broken", CancellationToken::new());
    worker.start(|_| async { Err::<(), _>(std::io::Error::other("full")) }).unwrap();
    assert!(matches!(worker.join().await, TaskOutcome::Failed(error) if error.to_string() == "full"));

    let mut worker = BackgroundWorker::new("broken", CancellationToken::new());
    worker.start(|_| async { panic!("burst") }).unwrap();
    assert!(matches!(worker.join().await, TaskOutcome::Panicked { message, .. } if message == "burst"));
}

#[tokio::test]
async fn a_running_worker_is_not_started_twice_and_one_that_has_ended_is() {
    let token = CancellationToken::new();
    let mut worker = BackgroundWorker::new("once", token.clone());
    let (ended, end) = tokio::sync::oneshot::channel::<()>();
    worker.start(|_| async move { (ended, pending::<()>().await).1 }).unwrap();
    assert!(worker.start(|_| async {}).is_err());
    drop(worker);
    end.await.unwrap_err();

    let mut worker = BackgroundWorker::new("again", token);
    let (ended, end) = tokio::sync::oneshot::channel();
    worker.start(|_| async move { ended.send(()).unwrap() }).unwrap();
    end.await.unwrap();
    while worker.start(|_| async { Err::<(), _>(std::io::Error::other("the second")) }).is_err() {
        yield_now().await;
    }
    assert!(worker.join().await.is_failed(), "the outcome of the first run");
}

#[tokio::test]
async fn a_worker_that_was_never_started_is_cancelled() {
    assert!(BackgroundWorker::new("idle", CancellationToken::new()).join().await.is_cancelled());
}

#[tokio::test]
async fn a_dropped_worker_is_aborted() {
    let alive = Alive::default();
    let mut worker = BackgroundWorker::new("dropped", CancellationToken::new());
    let guest = alive.guest();
    worker.start(|_| async move { (guest, pending::<()>().await).1 }).unwrap();
    yield_now().await;
    drop(worker);
    while alive.count() > 0 {
        yield_now().await;
    }
}
