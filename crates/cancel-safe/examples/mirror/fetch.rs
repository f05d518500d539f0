//! Fetches one URL into one durable file, and says of each failure whether it is worth another attempt.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use cancel_safe::atomic_fs::{self, AtomicFileWriter, TargetState};
use cancel_safe::http_timeout::{Phase, RequestError, TimeoutClient};
use reqwest::{Response, StatusCode, header};
use sha2::{Digest, Sha256};
use url::Url;

use super::catalogue::{Catalogue, CatalogueError, Change, Row};
use super::cli::Exit;
use super::home::{Home, hex};
use super::report::chain;

/// The longest wait that a server may ask for; a longer one is taken as this.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(120);

/// How soon and how late an open breaker is asked again.
const BREAKER_MIN: Duration = Duration::from_millis(50);
const BREAKER_MAX: Duration = Duration::from_secs(2);

/// What came of a fetch.
#[derive(Debug)]
pub(crate) enum Fetched {
    /// The file is durable; its row is not yet committed.
    Stored(Row),
    /// The server says that the file is as it was.
    Unchanged(Row),
}

/// Why there is no file.
#[derive(Debug, thiserror::Error)]
#[error("{phase}: {cause}")]
pub(crate) struct Trouble {
    pub(crate) phase: &'static str,
    pub(crate) cause: String,
    pub(crate) advice: Advice,
}

/// What to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Advice {
    /// Not the URL's fault: put it back in the queue for so long.
    Later(Duration),
    /// Try again, up to the limit.
    Again,
    /// It would fail in the same way.
    Never,
    /// Nothing can be written any more: the run ends so.
    Stop(Exit),
}

/// Fetches into one directory and its catalogue.
#[derive(Debug, Clone)]
pub(crate) struct Fetcher {
    pub(crate) client: TimeoutClient,
    pub(crate) home: Arc<Home>,
    pub(crate) catalogue: Catalogue,
}

impl Fetcher {
    /// Fetches `url` into the file at `path` of the mapping. With `known`, asks whether that is still current.
    ///
    /// Dropped at any point, it leaves the old file or the new one, and no other.
    pub(crate) async fn fetch(&self, url: &Url, path: &str, known: Option<&Row>) -> Result<Fetched, Trouble> {
        let mut request = self.client.get(url.as_str());
        if let Some(etag) = known.and_then(|row| row.etag.as_ref()) {
            request = request.header(header::IF_NONE_MATCH, etag);
        } else if let Some(date) = known.and_then(|row| row.last_modified.as_ref()) {
            request = request.header(header::IF_MODIFIED_SINCE, date);
        }
        let response = request.send().await.map_err(Trouble::of_request)?;
        match (response.status(), known) {
            (StatusCode::NOT_MODIFIED, Some(row)) => Ok(Fetched::Unchanged(Row { fetched_at: now(), ..row.clone() })),
            (status, _) if status.is_success() => self.store(url, path, known, response).await.map(Fetched::Stored),
            _ => Err(Trouble::of_status(&response)),
        }
    }

    async fn store(&self, url: &Url, path: &str, known: Option<&Row>, mut response: Response) -> Result<Row, Trouble> {
        let file = self.home.file(path);
        if !self.home.has_parents(&file) {
            let (home, file) = (Arc::clone(&self.home), file.clone());
            let made = tokio::task::spawn_blocking(move || home.make_parents(&file)).await;
            made.map_err(std::io::Error::other).flatten().map_err(Trouble::of_directory)?;
        }
        let mut writer = AtomicFileWriter::new(&file).await.map_err(Trouble::of_write)?;
        let (mut hasher, mut bytes) = (Sha256::new(), 0);
        while let Some(chunk) = response.chunk().await.map_err(|error| Trouble::of_request(error.into()))? {
            hasher.update(&chunk);
            bytes += chunk.len() as i64;
            writer.write_all(&chunk).await.map_err(Trouble::of_write)?;
        }
        if known.is_some() {
            // A row must never stand for bytes that are not its own: from here to the new row there is none.
            let gone = Change::Withdraw { url: url.as_str().to_owned(), path: path.to_owned() };
            self.catalogue.apply(gone).await.map_err(Trouble::of_catalogue)?;
        } else {
            self.catalogue.announce(url.as_str(), path);
        }
        if let Err(error) = writer.commit().await {
            if let (Some(row), TargetState::Unchanged) = (known, error.target()) {
                let back = Change::Put(Box::new(row.clone()));
                self.catalogue.apply(back).await.map_err(Trouble::of_catalogue)?;
            }
            return Err(Trouble::of_write(error));
        }
        let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        Ok(Row {
            url: url.as_str().to_owned(),
            path: path.to_owned(),
            bytes,
            sha256: hex(&hasher.finalize()),
            http_status: response.status().as_u16().into(),
            final_url: response.url().as_str().to_owned(),
            etag: text(header::ETAG),
            last_modified: text(header::LAST_MODIFIED),
            fetched_at: now(),
        })
    }
}

impl Trouble {
    fn new(phase: &'static str, cause: String, advice: Advice) -> Self {
        Self { phase, cause, advice }
    }

    fn stop(cause: String) -> Self {
        Self::new("write", cause, Advice::Stop(Exit::Write))
    }

    fn of_request(error: RequestError) -> Self {
        let (phase, advice) = match &error {
            // A probe that is under way usually ends long before its lease, which is all that `retry_after` can promise.
            RequestError::CircuitOpen { retry_after, .. } => {
                ("breaker", Advice::Later((*retry_after).clamp(BREAKER_MIN, BREAKER_MAX)))
            }
            RequestError::Timeout { phase: Phase::Permit, .. } | RequestError::Overloaded { .. } => {
                ("permit", Advice::Again)
            }
            RequestError::Timeout { phase: Phase::Body, .. } => ("body", Advice::Again),
            RequestError::BodyTooLarge { .. } => ("body", Advice::Never),
            RequestError::InvalidRequest(_) => ("request", Advice::Never),
            RequestError::Network(why) if why.is_redirect() => ("redirect", Advice::Never),
            RequestError::Network(why) if why.is_body() || why.is_decode() => ("body", Advice::Again),
            error if error.is_connect() => ("connect", Advice::Again),
            _ => ("response", Advice::Again),
        };
        Self::new(phase, chain(&error), advice)
    }

    fn of_status(response: &Response) -> Self {
        let status = response.status();
        let asked =
            response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()).and_then(retry_after);
        let advice = match (status, asked) {
            (StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE, Some(wait)) => Advice::Later(wait),
            (StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS, _) => Advice::Again,
            _ if status.is_server_error() => Advice::Again,
            _ => Advice::Never,
        };
        Self::new("status", format!("the server answered {status}"), advice)
    }

    fn of_write(error: atomic_fs::Error) -> Self {
        // What stands in the way of one path does not stand in the way of the others.
        if error.is_not_a_file() || error.is_not_replaceable() {
            return Self::new("write", chain(&error), Advice::Never);
        }
        Self::stop(chain(&error))
    }

    fn of_directory(error: std::io::Error) -> Self {
        if matches!(error.kind(), ErrorKind::NotADirectory | ErrorKind::AlreadyExists) {
            return Self::new("write", format!("something stands where a directory belongs: {error}"), Advice::Never);
        }
        Self::stop(chain(&error))
    }

    /// The catalogue cannot be written.
    pub(crate) fn of_catalogue(error: CatalogueError) -> Self {
        let exit = if error.is_disk_full() { Exit::Write } else { Exit::Database };
        Self::new("catalogue", chain(&error), Advice::Stop(exit))
    }
}

/// The wait that a `Retry-After` asks for: seconds or a date.
fn retry_after(value: &str) -> Option<Duration> {
    let wait = match value.trim().parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(value.trim()).ok()?.duration_since(SystemTime::now()).unwrap_or_default(),
    };
    Some(wait.min(MAX_RETRY_AFTER))
}

fn now() -> i64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |age| i64::try_from(age.as_millis()).unwrap_or(i64::MAX))
}
