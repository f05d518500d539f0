//! What works when nothing goes wrong.

use std::{path::PathBuf, time::Duration};

use cancel_safe_resumable::{FileStore, ItemError, ResumableTask, Retry, TaskError, map};
use futures_util::StreamExt;
use tokio_util::sync::CancellationToken;

#[tokio::test]
async fn a_cancelled_task_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join("test.checkpoint");
    let items: Vec<u64> = (0..1000).collect();
    let cancel = CancellationToken::new();
    let mut task = ResumableTask::new(items.clone(), path.clone(), cancel.clone());
    let slow = |x: u64| async move {
        tokio::time::sleep(Duration::from_millis(2)).await;
        x * 2
    };
    let handle = tokio::spawn(async move { task.process(slow).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    cancel.cancel();
    assert!(matches!(handle.await.unwrap(), Err(TaskError::Cancelled)));

    let mut task = ResumableTask::new(items.clone(), path.clone(), CancellationToken::new());
    let results = task.process(|x| async move { x * 2 }).await.unwrap();
    assert_eq!(results, items.iter().map(|x| x * 2).collect::<Vec<_>>());
    let summary = task.summary().unwrap();
    assert!(summary.restored > 0 && summary.completed > 0, "{summary:?}");
}

#[tokio::test]
async fn a_stream_hands_out_each_item_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("crawl.ckpt");
    for round in 0..2 {
        let mut run = ResumableTask::builder("crawl")
            .version("v2")
            .store(FileStore::at(&path))
            .key(|u: &String| u.clone())
            .concurrency(64)
            .retry(Retry::exponential(3))
            .quarantine(100)
            .stream((0..500).map(|n| format!("url {n}")), |cx, u| async move {
                if cx.index() == 3 {
                    return Err(ItemError::permanent("gone"));
                }
                Ok(u.len() as u64)
            });
        let mut seen = vec![0; 500];
        while let Some(done) = run.next().await {
            seen[done.index] += 1;
            assert_eq!(done.restored, round == 1);
            assert_eq!(done.result.is_err(), done.index == 3);
        }
        assert!(seen.iter().all(|times| *times == 1));
        let summary = run.finish().await.unwrap();
        assert_eq!((summary.total, summary.quarantined), (500, 1));
    }
}

#[tokio::test]
async fn map_restores_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.ckpt");
    let first = map(&path, 0..10u64, |x| async move { x + 1 }).await.unwrap();
    let second: Vec<u64> = map(&path, 0..10u64, |_| async move { unreachable!() }).await.unwrap();
    assert_eq!(first, second);
}
