//! A crawler built on three of the crates. All its code is in this package's room `crawler`.
//!
//! ```text
//! cargo run -p cancel-safe-examples --example crawler                # a site of its own, on loopback
//! cargo run -p cancel-safe-examples --example crawler -- DIRECTORY URL...
//! ```
//!
//! Stop it with Ctrl-C, or kill it, and run it again: it does not request the pages that it already has.
#![expect(clippy::print_stdout, reason = "an example speaks through its output")]

use std::error::Error;
use std::path::PathBuf;

use axum::Router;
use axum::extract::Path;
use axum::http::StatusCode;
use axum::routing::get;
use cancel_safe_examples::crawler::crawl;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// A thousand pages, some of which are not there.
async fn site() -> Result<Vec<String>, Box<dyn Error + Send + Sync>> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let page = async |Path(page): Path<u32>| match page % 100 {
        99 => Err(StatusCode::NOT_FOUND),
        _ => Ok(format!("<h1>{page}</h1>")),
    };
    let router = Router::new().route("/{page}", get(page));
    drop(tokio::spawn(axum::serve(listener, router).into_future()));
    Ok((0..1000).map(|page| format!("http://{address}/{page}")).collect())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().map(PathBuf::from);
    let urls: Vec<String> = arguments.collect();
    let urls = if urls.is_empty() { site().await? } else { urls };
    let temporary = tempfile::tempdir()?;
    let directory = directory.as_deref().unwrap_or(temporary.path());

    let cancel = CancellationToken::new();
    let on_signal = cancel.clone();
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            on_signal.cancel();
        }
    });
    let summary = crawl(urls, directory, cancel, |url, why| println!("{url}: {why}")).await?;
    println!("{} fetched, {} known, {} broken", summary.completed, summary.restored, summary.quarantined);
    Ok(())
}
