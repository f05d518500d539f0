//! A crawler in one room: it keeps pages as files, can be stopped at any moment, and goes on from there.
//!
//! Invariant: a page that is recorded as done is whole, durable, and under its own name.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cancel_safe_atomic_fs as atomic_fs;
use cancel_safe_http_timeout::{Retry as NoRetry, TimeoutClient};
use cancel_safe_resumable::{FileStore, ItemError, ResumableTask, Retry, Summary};
use futures_util::StreamExt as _;
use http::StatusCode;
use http::header::RETRY_AFTER;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

/// The longest wait that a server may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The record of a page.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Page {
    /// The name of its file.
    pub file: String,
    /// Its size in bytes.
    pub size: usize,
}

/// Keeps each of the pages as a file in `directory`. The checkpoint is there too, as `.crawl`: after a kill, a cancel
/// or an error, the same call goes on, and does not request pages again that are there. `told` is called for each page
/// that stays broken.
///
/// # Cancel safety
///
/// This method is not cancel safe. If dropped, the recorded pages stay, and the next call requests the pages in flight
/// again. No file is ever half of a page.
///
/// # Errors
///
/// If the directory cannot be used, another run holds the checkpoint, more than a hundred pages are broken, or the
/// token fires.
pub async fn crawl(
    urls: Vec<String>,
    directory: &Path,
    cancel: CancellationToken,
    mut told: impl FnMut(&str, &str),
) -> Result<Summary, Box<dyn Error + Send + Sync>> {
    // Removes hidden files that a killed run may have left.
    atomic_fs::sweep(directory).await?;
    // One deadline for the whole call. The run below retries, and remembers how often it did.
    let client = TimeoutClient::builder()
        .timeout(Duration::from_secs(20))
        .concurrency_per_host(8)
        .retry(NoRetry::none())
        .build()?;
    let into: Arc<Path> = directory.into();
    let mut run = ResumableTask::builder("crawl")
        .version("1")
        .store(FileStore::at(directory.join(".crawl")))
        .key(|url: &String| url.clone()) // URLs may come and go between runs
        .concurrency(16)
        .retry(Retry::attempts(4).backoff(Duration::from_millis(100), Duration::from_secs(5)))
        .quarantine(100)
        .cancel(cancel)
        .stream(urls, move |_, url| {
            let (client, into) = (client.clone(), Arc::clone(&into));
            async move { fetch(&client, &url, &into).await }
        });
    while let Some(done) = run.next().await {
        if let Err(broken) = &done.result {
            told(done.key.as_deref().unwrap_or_default(), &broken.to_string());
        }
    }
    Ok(run.finish().await?)
}

/// Fetches one page and puts it into its file, in this order: a page is recorded when its file is there.
async fn fetch(client: &TimeoutClient, url: &str, directory: &Path) -> Result<Page, ItemError> {
    let response = client.get(url).send().await?; // any error is another attempt
    match response.status() {
        StatusCode::OK => {}
        StatusCode::NOT_FOUND | StatusCode::GONE => return Err(ItemError::permanent("there is no such page")),
        // The whole run waits, and no page is blamed.
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
            let asked = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
            let pause = Duration::from_secs(asked.unwrap_or(1)).min(LONGEST_PAUSE);
            return Err(ItemError::pause(Instant::now() + pause).because("the server asks for a pause"));
        }
        status => return Err(ItemError::retry(format!("the server answered {status}"))),
    }
    let body = response.bytes().await?;
    let page = Page { file: name(url), size: body.len() };
    // Old or new, never torn, durable when this returns.
    atomic_fs::write_bytes(directory.join(&page.file), body).await?;
    Ok(page)
}

/// A name that every file system takes, and that no two URLs share.
pub fn name(url: &str) -> String {
    let digest = Sha256::digest(url);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
