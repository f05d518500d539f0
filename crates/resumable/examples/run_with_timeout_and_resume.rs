//! A computation of ten seconds that gets two at a time, and goes on where it was each time it is run again.
//!
//! ```text
//! cargo run -p cancel-safe-resumable --example run_with_timeout_and_resume
//! ```
//!
//! Run it five times. In between, kill it (`kill -9`) or run two at once: nothing done is lost, and nothing is done twice.
#![expect(clippy::print_stdout, reason = "an example speaks through its output")]

use std::path::PathBuf;
use std::time::Duration;

use cancel_safe_resumable::{ResumableTask, TaskError};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

async fn expensive_operation(item: u64) -> u64 {
    sleep(Duration::from_millis(10)).await;
    item * 2
}

/// Returns all results, or nothing if the time was too short: the results so far are in the checkpoint.
pub(crate) async fn run_with_timeout_and_resume(
    checkpoint: PathBuf,
    items: Vec<u64>,
    limit: Duration,
) -> Result<Option<Vec<u64>>, TaskError> {
    let cancel_token = CancellationToken::new();
    let mut computation = ResumableTask::new(items, checkpoint, cancel_token.clone());

    let mut progress = computation.subscribe();
    let reporter = tokio::spawn(async move {
        while progress.changed().await.is_ok() {
            println!("Progress: {:.1} %", progress.borrow_and_update().percent());
            sleep(Duration::from_millis(500)).await;
        }
    });
    let timeout = tokio::spawn(async move {
        sleep(limit).await;
        println!("Timeout reached, cancelling computation...");
        cancel_token.cancel();
    });

    // The run itself returns when everything is safe: there is no need to wait and hope.
    let ended = computation.process(expensive_operation).await;
    timeout.abort();
    reporter.abort();
    if let Some(summary) = computation.summary() {
        println!("{} items were done before, {} in this run", summary.restored, summary.completed);
    }
    match ended {
        Ok(results) => Ok(Some(results)),
        Err(TaskError::Cancelled) => Ok(None),
        Err(error) => Err(error),
    }
}

#[tokio::main]
async fn main() -> Result<(), TaskError> {
    let items: Vec<u64> = (0..1000).collect();
    let checkpoint = PathBuf::from("computation.checkpoint");
    match run_with_timeout_and_resume(checkpoint, items, Duration::from_secs(2)).await? {
        Some(results) => println!("Computation completed: {} results", results.len()),
        None => println!("Computation was cancelled and checkpointed: run it again to go on"),
    }
    Ok(())
}
