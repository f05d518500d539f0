//! The plain loop, which the demo compares with mirror: a downloader that one writes in an hour, and that passes every
//! test unless it is killed.
//!
//! Invariant: it is honest. It checks statuses, tries again, limits what is in flight and what is in memory, remembers what
//! it has, and goes on from there, as `wget -nc` does; it uses nothing of these crates.

use std::collections::BTreeMap;
use std::error::Error;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use tokio::fs;
use tokio::io::AsyncWriteExt;
use tokio::sync::Mutex;
use url::Url;

/// The size of each file that is there, by its URL.
type Done = BTreeMap<String, u64>;

const IN_FLIGHT: usize = 32;
const ATTEMPTS: u32 = 8;
const SAVE_EVERY: usize = 10;

/// Downloads every URL of a list below `out`; returns how many could not be fetched. `hosts` says where the demo's hosts are.
#[tokio::main]
#[expect(clippy::print_stderr, reason = "it is a program of its own, and its output a log")]
pub(crate) async fn download(
    list: PathBuf,
    out: PathBuf,
    hosts: Vec<(String, SocketAddr)>,
) -> Result<usize, Box<dyn Error>> {
    let urls: Vec<Url> = fs::read_to_string(list).await?.lines().map(Url::parse).collect::<Result<_, _>>()?;
    let client = reqwest::Client::builder().timeout(Duration::from_secs(60)).no_proxy();
    let client = hosts.iter().fold(client, |client, (host, address)| client.resolve(host, *address)).build()?;
    let files = out.join("files");
    let progress = out.join("progress.json");
    let done: Done = match fs::read(&progress).await {
        Ok(json) => serde_json::from_slice(&json).unwrap_or_default(),
        Err(_) => Done::new(),
    };
    let (done, failed) = (Mutex::new(done), AtomicUsize::new(0));
    futures_util::stream::iter(urls)
        .for_each_concurrent(IN_FLIGHT, |url| async {
            let url = url;
            if done.lock().await.contains_key(url.as_str()) {
                return;
            }
            if let Err(error) = one(&client, &url, &path(&files, &url), &done, &progress).await {
                eprintln!("{url}: {error}");
                failed.fetch_add(1, Ordering::Relaxed);
            }
        })
        .await;
    fs::write(&progress, serde_json::to_vec(&*done.lock().await)?).await?;
    Ok(failed.into_inner())
}

async fn one(
    client: &reqwest::Client,
    url: &Url,
    path: &Path,
    done: &Mutex<Done>,
    progress: &Path,
) -> Result<(), Box<dyn Error>> {
    let bytes = match fs::metadata(path).await {
        // An earlier run fetched it after it had saved its progress for the last time.
        Ok(file) => file.len(),
        Err(_) => fetch(client, url, path).await?,
    };
    let mut done = done.lock().await;
    done.insert(url.to_string(), bytes);
    if done.len().is_multiple_of(SAVE_EVERY) {
        fs::write(progress, serde_json::to_vec(&*done)?).await?;
    }
    Ok(())
}

async fn fetch(client: &reqwest::Client, url: &Url, path: &Path) -> Result<u64, Box<dyn Error>> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).await?;
    }
    let mut pause = Duration::from_millis(250);
    for _ in 1..ATTEMPTS {
        if let Ok(bytes) = get(client, url, path).await {
            return Ok(bytes);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(2));
    }
    get(client, url, path).await
}

#[expect(clippy::disallowed_methods, reason = "this is the plain loop: what clippy.toml forbids, most programs do")]
async fn get(client: &reqwest::Client, url: &Url, path: &Path) -> Result<u64, Box<dyn Error>> {
    let mut response = client.get(url.clone()).send().await?.error_for_status()?;
    let mut file = fs::File::create(path).await?;
    let mut bytes = 0;
    while let Some(chunk) = response.chunk().await? {
        file.write_all(&chunk).await?;
        bytes += chunk.len() as u64;
    }
    file.flush().await?;
    Ok(bytes)
}

/// Where the file of a URL belongs.
fn path(files: &Path, url: &Url) -> PathBuf {
    files.join(url.host_str().unwrap_or_default()).join(url.path().trim_start_matches('/'))
}
