//! The tutorial's exercises, and the examples that solve them.

use std::{path::PathBuf, time::Duration};

use cancel_safe_resumable::{ResumableTask, TaskError};
use tokio_util::sync::CancellationToken;

use crate::support::checkpoint;

#[path = "../../examples/crawl.rs"]
#[expect(dead_code, reason = "the example's main")]
mod crawl;
#[path = "../../examples/run_with_timeout_and_resume.rs"]
#[expect(dead_code, reason = "the example's main")]
mod run_with_timeout_and_resume;

#[tokio::test]
async fn exercise_3_is_cancelled_and_resumed() {
    let (_dir, path) = checkpoint();
    let processor = |x: u64| async move {
        tokio::time::sleep(Duration::from_millis(1)).await;
        x * 2
    };
    let items: Vec<u64> = (0..1000).collect();
    let cancel = CancellationToken::new();
    let mut task = ResumableTask::new(items.clone(), path.clone(), cancel.clone());

    // Start processing
    let handle = tokio::spawn(async move { task.process(processor).await });
    // Cancel after short time
    tokio::time::sleep(Duration::from_millis(100)).await;
    cancel.cancel();
    let result = handle.await.unwrap();
    assert!(matches!(result, Err(TaskError::Cancelled)));

    // Resume
    let mut task2 = ResumableTask::new(items, path, CancellationToken::new());
    let result = task2.process(processor).await.unwrap();
    assert_eq!(result.len(), 1000);
    assert_eq!(result[999], 1998);
    assert!((task2.progress() - 1.0).abs() < 1e-9);
    let summary = task2.summary().unwrap();
    assert_eq!(summary.restored + summary.completed, 1000);
}

#[tokio::test]
async fn the_computation_with_a_timeout_goes_on_where_it_was() {
    let (_dir, path) = checkpoint();
    let run = |path: PathBuf, limit| {
        let items: Vec<u64> = (0..60).collect();
        run_with_timeout_and_resume::run_with_timeout_and_resume(path, items, limit)
    };
    // Sixty items of ten milliseconds cannot be done in a fifth of a second.
    assert_eq!(run(path.clone(), Duration::from_millis(200)).await.unwrap(), None);
    let results = run(path.clone(), Duration::from_secs(600)).await.unwrap().unwrap();
    assert_eq!(results, (0..60).map(|x| x * 2).collect::<Vec<u64>>());
    assert_eq!(run(path, Duration::from_secs(600)).await.unwrap(), Some(results), "the checkpoint is the result");
}

#[tokio::test]
async fn the_crawl_keeps_what_it_has_and_quarantines_what_is_gone() {
    let (_dir, path) = checkpoint();
    let urls = |pages: std::ops::Range<u32>| pages.map(|page| format!("https://example.org/{page}")).collect();
    let first = crawl::crawl(&path, urls(0..50), CancellationToken::new()).await.unwrap();
    assert_eq!((first.completed, first.restored, first.quarantined), (45, 0, 5));
    let second = crawl::crawl(&path, urls(20..70), CancellationToken::new()).await.unwrap();
    assert_eq!((second.completed, second.restored, second.quarantined), (18, 30, 5));
}
