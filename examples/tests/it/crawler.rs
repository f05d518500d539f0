//! The crawler against a site that fails, asks for pauses and counts: stopped again and again, and then complete.

use std::collections::HashMap;
use std::path::Path as FsPath;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use cancel_safe_examples::crawler::{crawl, name};
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

const MINUTE: Duration = Duration::from_secs(60);
const PAGES: usize = 200;

/// How often each page was answered with its body.
type Answered = Arc<Mutex<HashMap<usize, u32>>>;

fn body(page: usize) -> String {
    format!("page {page} ").repeat(200)
}

async fn page(State((answered, asked)): State<(Answered, Answered)>, Path(page): Path<usize>) -> Response {
    sleep(Duration::from_millis(2)).await;
    let times = {
        let mut asked = asked.lock().unwrap();
        let times = asked.entry(page).or_default();
        *times += 1;
        *times
    };
    match (page, times) {
        // Never there.
        (7, _) => StatusCode::NOT_FOUND.into_response(),
        // Broken at first.
        (13, 1) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        // A quota.
        (50, 1) => {
            let mut headers = HeaderMap::new();
            headers.insert("retry-after", HeaderValue::from_static("1"));
            (StatusCode::TOO_MANY_REQUESTS, headers).into_response()
        }
        _ => {
            *answered.lock().unwrap().entry(page).or_default() += 1;
            body(page).into_response()
        }
    }
}

fn whole(directory: &FsPath, urls: &[String]) -> usize {
    let kept = |(page, url): (usize, &String)| match std::fs::read(directory.join(name(url))) {
        Ok(content) => {
            assert_eq!(content, body(page).into_bytes(), "{url} is not what was sent");
            true
        }
        Err(_) => false,
    };
    urls.iter().enumerate().filter(|entry| kept(*entry)).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crawl_that_is_stopped_at_any_moment_ends_with_every_page_whole_and_asks_for_few_again() {
    let (answered, asked) = (Answered::default(), Answered::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().route("/{page}", get(page)).with_state((Arc::clone(&answered), asked));
    let serving = tokio::spawn(axum::serve(listener, router).into_future());
    let urls: Vec<String> = (0..PAGES).map(|page| format!("http://{address}/{page}")).collect();
    let directory = tempfile::tempdir().unwrap();

    let mut stops = 0;
    for patience in [5, 20, 40, 80] {
        // Dropped, with everything in flight.
        let run = crawl(urls.clone(), directory.path(), CancellationToken::new(), |_, _| {});
        if timeout(Duration::from_millis(patience), run).await.is_err() {
            stops += 1;
        }
        whole(directory.path(), &urls);
    }
    assert_ne!(stops, 0, "nothing was stopped");

    let mut broken = Vec::new();
    let told = |url: &str, why: &str| broken.push(format!("{url}: {why}"));
    let summary = timeout(MINUTE, crawl(urls.clone(), directory.path(), CancellationToken::new(), told));
    let summary = summary.await.unwrap().unwrap();
    assert_eq!((summary.total, summary.quarantined), (PAGES, 1), "{summary:?}");
    assert_eq!(broken, [format!("http://{address}/7: in quarantine after 1 attempt: there is no such page")]);
    assert_eq!(whole(directory.path(), &urls), PAGES - 1);
    // The pages in flight at a stop, and those not yet recorded: sixteen at once, and a tenth of a second.
    let again: u32 = answered.lock().unwrap().values().map(|times| times - 1).sum();
    let most = u32::try_from(PAGES).unwrap() * stops;
    assert!(again < most, "{again} pages were asked for again in {stops} stops");

    // A run of a complete job requests nothing.
    let before: u32 = answered.lock().unwrap().values().sum();
    let summary = crawl(urls, directory.path(), CancellationToken::new(), |_, _| {}).await.unwrap();
    assert_eq!((summary.completed, answered.lock().unwrap().values().sum::<u32>()), (0, before));
    serving.abort();
}
