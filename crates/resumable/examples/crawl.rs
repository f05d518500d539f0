//! Many pages at once, with retries, a quarantine for pages that stay broken, and results as they come.
//!
//! ```text
//! cargo run -p cancel-safe-resumable --example crawl
//! ```
//!
//! Stop it with Ctrl-C and run it again: pages that are done are not fetched again.
#![expect(clippy::print_stdout, reason = "an example speaks through its output")]

use std::path::Path;
use std::time::Duration;

use cancel_safe_resumable::{FileStore, ItemError, ResumableTask, Retry, Summary, TaskError};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// The record of a page.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Page {
    status: u16,
    length: usize,
}

#[derive(Debug, thiserror::Error)]
#[error("connection reset")]
struct Reset;

/// Stands in for an HTTP client: some pages are gone, and some answer only at the second try.
async fn fetch(url: &str, attempt: u32) -> Result<Page, Reset> {
    sleep(Duration::from_millis(5)).await;
    match url.bytes().last() {
        Some(b'7') => Ok(Page { status: 404, length: 0 }),
        Some(b'3') if attempt == 1 => Err(Reset),
        _ => Ok(Page { status: 200, length: url.len() }),
    }
}

pub(crate) async fn crawl(
    checkpoint: &Path,
    urls: Vec<String>,
    cancel: CancellationToken,
) -> Result<Summary, TaskError> {
    let mut run = ResumableTask::builder("crawl")
        .version("1")
        .store(FileStore::at(checkpoint))
        .key(|url: &String| url.clone()) // URLs may come and go between runs
        .concurrency(16)
        .retry(Retry::attempts(3).backoff(Duration::from_millis(10), Duration::from_secs(1)))
        .quarantine(100)
        .cancel(cancel)
        .stream(urls, |cx, url| async move {
            let page = fetch(&url, cx.attempt()).await?; // an error is another attempt
            match page.status {
                404 => Err(ItemError::permanent("there is no such page")),
                _ => Ok(page),
            }
        });
    while let Some(done) = run.next().await {
        if let Err(quarantined) = &done.result {
            println!("{}: {quarantined}", done.key.as_deref().unwrap_or_default());
        }
    }
    run.finish().await
}

#[tokio::main]
async fn main() -> Result<(), TaskError> {
    let cancel = CancellationToken::new();
    let on_signal = cancel.clone();
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            on_signal.cancel();
        }
    });
    let urls = (0..2000).map(|page| format!("https://example.org/{page}")).collect();
    let summary = crawl(Path::new("crawl.checkpoint"), urls, cancel).await?;
    println!("{} fetched, {} known, {} broken", summary.completed, summary.restored, summary.quarantined);
    Ok(())
}
