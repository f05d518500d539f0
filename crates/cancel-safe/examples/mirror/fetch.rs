//! Fetches one URL into one durable file, and says of each failure whether it is worth another attempt.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use cancel_safe::atomic_fs::{self, AtomicFileWriter, Durability, TargetState, WriteOptions};
use cancel_safe::http_timeout::{Phase, RequestError, TimeoutClient};
use reqwest::{Response, StatusCode, header};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::catalogue::{Catalogue, CatalogueError, Change, Row};
use super::cli::Exit;
use super::durable::Directories;
use super::home::{Home, HomeError, blocking, digest, hex, is_of_name};
use super::hosts::Seat;
use super::parts::Part;
use super::report::{Reporter, chain};

/// The longest wait that a server may ask for; longer ones are shortened to this.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(120);

/// How soon and how late an open breaker is asked again.
const BREAKER_MIN: Duration = Duration::from_millis(50);
const BREAKER_MAX: Duration = Duration::from_secs(2);

/// How long a fetch waits when the process may open no more files.
const FILES_PAUSE: Duration = Duration::from_millis(250);
/// How often it does so where it must not fail.
const MAX_FILES_PAUSES: u32 = 40;

/// The longest body, in bytes, that is held in memory until it is complete.
const MAX_HELD: usize = 64 * 1024;

/// The outcome of a fetch.
#[derive(Debug)]
pub(crate) enum Fetched {
    /// The file is durable; its row is not yet committed.
    Stored(Row),
    /// The file is in its place, pending, and not yet durable.
    Late(Row),
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
    /// Not the URL's fault: put it back in the queue for this long.
    Later(Duration),
    /// Try again, up to the limit.
    Again,
    /// It would fail in the same way.
    Never,
    /// Nothing can be written any more: the run ends with this code.
    Stop(Exit),
}

/// Fetches into one directory and its catalogue.
#[derive(Clone)]
pub(crate) struct Fetcher {
    pub(crate) client: TimeoutClient,
    pub(crate) home: Arc<Home>,
    pub(crate) catalogue: Catalogue,
    pub(crate) report: Arc<Reporter>,
    /// A permit for each body that is there, until its file is in its place.
    pub(crate) desk: Arc<Semaphore>,
    /// The directories of new files.
    pub(crate) names: Arc<Directories>,
    /// Whether somebody else makes new files durable.
    pub(crate) is_late: bool,
}

/// What is to be fetched, and where to.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) url: Url,
    /// Relative to `DIR/files`.
    pub(crate) path: String,
    /// What the SHA-256 must be, in hexadecimal.
    pub(crate) sha256: Option<String>,
    /// What the length must be, in bytes.
    pub(crate) size: Option<u64>,
}

impl Target {
    /// Whether a row matches what the list asks for.
    fn fits(&self, row: &Row) -> bool {
        self.sha256.as_ref().is_none_or(|wanted| *wanted == row.sha256)
            && self.size.is_none_or(|wanted| i64::try_from(wanted) == Ok(row.bytes))
    }

    fn row(&self, bytes: i64, hasher: Sha256) -> Row {
        Row {
            url: self.url.as_str().to_owned(),
            path: self.path.clone(),
            bytes,
            sha256: hex(&hasher.finalize()),
            http_status: StatusCode::OK.as_u16().into(),
            final_url: self.url.as_str().to_owned(),
            etag: None,
            last_modified: None,
            fetched_at: now(),
        }
    }

    /// The row for a response's body, if it matches what the list asks for.
    fn row_of(&self, response: &Response, bytes: i64, hasher: Sha256) -> Result<Row, Trouble> {
        let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let row = Row {
            // The rest of a body is answered with 206, and the file is the whole.
            http_status: match response.status() {
                StatusCode::PARTIAL_CONTENT => StatusCode::OK.as_u16().into(),
                status => status.as_u16().into(),
            },
            final_url: without_secrets(response.url(), &self.url),
            etag: text(header::ETAG),
            last_modified: text(header::LAST_MODIFIED),
            ..self.row(bytes, hasher)
        };
        if self.fits(&row) {
            return Ok(row);
        }
        let cause = match self.size {
            Some(size) if i64::try_from(size) != Ok(bytes) => format!("{bytes} bytes came, and the list says {size}"),
            _ => format!("the SHA-256 is {}, and the list says {}", row.sha256, self.sha256.as_deref().unwrap_or("")),
        };
        Err(Trouble::new("digest", cause, Advice::Never))
    }
}

impl Fetcher {
    /// Fetches what `target` names into its file. With `known`, asks whether that is still current.
    ///
    /// Dropped at any point, it leaves the old file or the new one, and no other.
    pub(crate) async fn fetch(&self, target: &Target, known: Option<&Row>, seat: Seat) -> Result<Fetched, Trouble> {
        let file = self.home.file(&target.path);
        if known.is_none() && file.symlink_metadata().is_ok_and(|found| !found.is_dir()) {
            return Err(Trouble::in_the_way(&file));
        }
        let mut request = self.client.get(target.url.clone());
        let current = known.filter(|row| target.fits(row));
        let part = self.home.parts.find(&target.url);
        if let Some(headers) = part.as_ref().and_then(Part::headers) {
            request = headers.into_iter().fold(request, |request, (name, value)| request.header(name, value));
        } else if let Some(etag) = current.and_then(|row| row.etag.as_ref()) {
            request = request.header(header::IF_NONE_MATCH, etag);
        } else if let Some(date) = current.and_then(|row| row.last_modified.as_ref()) {
            request = request.header(header::IF_MODIFIED_SINCE, date);
        }
        let response = request.send().await.map_err(Trouble::of_request)?;
        match (response.status(), current) {
            (StatusCode::NOT_MODIFIED, Some(row)) => Ok(Fetched::Unchanged(Row { fetched_at: now(), ..row.clone() })),
            // A proxy that has changed the body answers 203; any other success is not the file.
            (StatusCode::OK | StatusCode::NON_AUTHORITATIVE_INFORMATION, _) => {
                // It starts again: there is another representation now, or the server knows no ranges.
                part.into_iter().for_each(|part| self.home.parts.remove(part));
                // Where nothing can be kept, the whole is fetched all the same.
                let part = self.home.parts.begin(&target.url, &response).unwrap_or_default();
                self.store(target, &file, known, response, part, seat).await.map(|row| self.stored(row, known))
            }
            (status, _) => match part {
                Some(part) if part.is_continued_by(&response) => {
                    let stored = self.store(target, &file, known, response, Some(part), seat).await;
                    stored.map(|row| self.stored(row, known))
                }
                Some(part) if matches!(status, StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE) => {
                    self.home.parts.remove(part);
                    let cause = format!("the server answered {status}, which is not the rest of what was kept");
                    Err(Trouble::new("status", cause, Advice::Again))
                }
                _ => Err(Trouble::of_status(&response)),
            },
        }
    }

    fn stored(&self, row: Row, known: Option<&Row>) -> Fetched {
        if self.is_late && known.is_none() { Fetched::Late(row) } else { Fetched::Stored(row) }
    }

    /// Takes over the file that stands where `target` belongs, if it is what `wanted` says or, failing that, what the
    /// server has.
    pub(crate) async fn adopt(&self, target: &Target, wanted: Option<&str>) -> Result<Row, Trouble> {
        let file = self.home.file(&target.path);
        let place = file.clone();
        let found = tokio::task::spawn_blocking(move || {
            Ok((place.metadata()?.len(), digest(&place, &CancellationToken::new())?))
        });
        let found = found.await.map_err(io::Error::other).flatten();
        let (bytes, found) = found.map_err(|error: io::Error| Trouble::new("write", chain(&error), advice(&error)))?;
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        let row = Row { sha256: found, ..target.row(bytes, Sha256::new()) };
        if target.sha256.as_deref().or(wanted).is_some_and(|wanted| wanted == row.sha256) && target.fits(&row) {
            self.make_durable(target).await?;
            return Ok(row);
        }
        if target.sha256.is_some() {
            return Err(Trouble::in_the_way(&file));
        }
        let mut response = self.client.get(target.url.clone()).send().await.map_err(Trouble::of_request)?;
        if !matches!(response.status(), StatusCode::OK | StatusCode::NON_AUTHORITATIVE_INFORMATION) {
            return Err(Trouble::of_status(&response));
        }
        let (mut hasher, mut bytes) = (Sha256::new(), 0);
        while let Some(chunk) = response.chunk().await.map_err(|error| Trouble::of_request(error.into()))? {
            self.report.arrived(chunk.len());
            hasher.update(&chunk);
            bytes += chunk.len() as i64;
        }
        let theirs = target.row_of(&response, bytes, hasher)?;
        if theirs.sha256 != row.sha256 {
            return Err(Trouble::in_the_way(&file));
        }
        self.make_durable(target).await?;
        Ok(theirs)
    }

    /// Makes a file durable that another program has written, because a row claims that its file is durable.
    async fn make_durable(&self, target: &Target) -> Result<(), Trouble> {
        let (home, path) = (Arc::clone(&self.home), target.path.clone());
        let synced = blocking(move |_| home.make_durable([path.as_str()].into_iter())).await;
        synced.map_err(|error| Trouble::new("write", chain(&error), of_system(&error).map_or(Advice::Never, advice)))
    }

    /// Writes the kept part, if any, and the body of `response` as one file. If the body is cut, the part that arrived
    /// is kept.
    async fn store(
        &self,
        target: &Target,
        file: &Path,
        known: Option<&Row>,
        mut response: Response,
        part: Option<Part>,
        seat: Seat,
    ) -> Result<Row, Trouble> {
        self.make_parents(file).await?;
        let durability = match known {
            Some(_) => Durability::Full,
            None if self.is_late => Durability::None,
            // Its name is made durable together with those that come into the same directory meanwhile.
            None => Durability::Ordered,
        };
        // Without a row there is no file of ours that could be replaced.
        let options = AtomicFileWriter::options().create_new(known.is_none()).durability(durability);
        let mut body = Body::Held(Vec::new());
        let (mut hasher, mut bytes) = (Sha256::new(), 0_u64);
        let total = part.as_ref().map(Part::total);
        let kept = part.as_ref().map_or(0, |part| part.have);
        let mut part = part.map(Arc::new);
        while let Some(kept_part) = part.as_ref().filter(|_| bytes < kept) {
            let (kept_part, at) = (Arc::clone(kept_part), bytes);
            let piece = tokio::task::spawn_blocking(move || kept_part.read(at)).await;
            let piece = match piece.map_err(io::Error::other).flatten() {
                Ok(piece) => piece,
                Err(error) if is_out_of_files(&error) => {
                    return Err(Trouble::new("write", chain(&error), Advice::Later(FILES_PAUSE)));
                }
                Err(error) => {
                    // The next attempt asks for the whole.
                    part.take().and_then(Arc::into_inner).into_iter().for_each(|part| self.home.parts.remove(part));
                    return Err(Trouble::new("write", chain(&error), Advice::Again));
                }
            };
            hasher.update(&piece);
            bytes += piece.len() as u64;
            body = body.take(&piece, options, file).await.map_err(|error| Trouble::of_write(error, file))?;
        }
        let mut part = part.take().and_then(Arc::into_inner);
        loop {
            let chunk = match response.chunk().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => break,
                Err(error) => {
                    write_down(part).await;
                    return Err(Trouble::of_request(error.into()));
                }
            };
            self.report.arrived(chunk.len());
            seat.heard();
            hasher.update(&chunk);
            bytes += chunk.len() as u64;
            if part.as_mut().is_some_and(|part| part.take(&chunk)) {
                part = write_down(part).await;
            }
            body = body.take(&chunk, options, file).await.map_err(|error| Trouble::of_write(error, file))?;
        }
        // What is left to do is the disk's. Only so many bodies wait for that, so that a kill makes few be fetched again.
        let desk = self.desk.acquire().await;
        drop(seat);
        let row = match total {
            Some(total) if total != bytes => {
                let cause = format!("{bytes} bytes came of {total}");
                Err(Trouble::new("body", cause, Advice::Again))
            }
            _ => target.row_of(&response, i64::try_from(bytes).unwrap_or(i64::MAX), hasher),
        };
        let row = match row {
            Ok(row) => self.install(row, file, body.commit(options, file)).await,
            Err(trouble) => Err(trouble),
        };
        drop(desk);
        if row.is_ok() && durability == Durability::Ordered {
            self.sync_names(file).await?;
        }
        // The file is there, or what came was not the file.
        part.into_iter().for_each(|part| self.home.parts.remove(part));
        row
    }

    /// Records the intended row, then lets `commit` put the file in place. The caller records the final row.
    async fn install(
        &self,
        row: Row,
        file: &Path,
        commit: impl Future<Output = Result<(), atomic_fs::Error>>,
    ) -> Result<Row, Trouble> {
        // Whatever ends the process between here and the new row, the digest tells the next start which file is there.
        self.catalogue.apply(Change::Intend(Box::new(row.clone()))).await.map_err(Trouble::of_catalogue)?;
        if let Err(error) = commit.await {
            if error.target() == TargetState::Unchanged {
                let back = Change::Forget(row.url);
                self.catalogue.apply(back).await.map_err(Trouble::of_catalogue)?;
            }
            return Err(Trouble::of_write(error, file));
        }
        Ok(row)
    }

    /// Makes the name of a new file durable. From its rename on it must not fail for want of a file to open: what has no row
    /// would be taken for somebody else's.
    async fn sync_names(&self, file: &Path) -> Result<(), Trouble> {
        let directory = file.parent().unwrap_or(file);
        let mut attempt = 0;
        loop {
            attempt += 1;
            match self.names.sync(directory).await {
                Err(error) if is_out_of_files(&error) && attempt < MAX_FILES_PAUSES => {
                    tokio::time::sleep(FILES_PAUSE).await;
                }
                Err(error) => return Err(Trouble::new("write", chain(&error), Advice::Stop(Exit::Write))),
                Ok(()) => return Ok(()),
            }
        }
    }

    async fn make_parents(&self, file: &Path) -> Result<(), Trouble> {
        if self.home.has_parents(file) {
            return Ok(());
        }
        let (home, file) = (Arc::clone(&self.home), file.to_owned());
        let made = tokio::task::spawn_blocking(move || home.make_parents(&file)).await;
        made.map_err(io::Error::other).flatten().map_err(Trouble::of_directory)
    }
}

/// A body on its way to the disk. A small one is held until it is whole, and written by a single job.
enum Body {
    Held(Vec<u8>),
    Writer(AtomicFileWriter),
}

impl Body {
    /// Takes the next piece. Dropped or failed, it leaves nothing.
    async fn take(self, piece: &[u8], options: WriteOptions, file: &Path) -> Result<Self, atomic_fs::Error> {
        let mut writer = match self {
            Self::Held(mut held) if held.len() + piece.len() <= MAX_HELD => {
                held.extend_from_slice(piece);
                return Ok(Self::Held(held));
            }
            Self::Held(held) => {
                let mut writer = options.open(file).await?;
                writer.write_all(&held).await?;
                writer
            }
            Self::Writer(writer) => writer,
        };
        writer.write_all(piece).await?;
        Ok(Self::Writer(writer))
    }

    /// Puts the file in its place.
    async fn commit(self, options: WriteOptions, file: &Path) -> Result<(), atomic_fs::Error> {
        match self {
            Self::Held(held) => options.write_bytes(file, held).await,
            Self::Writer(writer) => writer.commit().await,
        }
    }
}

impl Trouble {
    fn new(phase: &'static str, cause: String, advice: Advice) -> Self {
        Self { phase, cause, advice }
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
            RequestError::BodyTooLarge { .. } => ("body", Advice::Never),
            RequestError::InvalidRequest(_) => ("request", Advice::Never),
            _ if error.is_redirect() => ("redirect", Advice::Never),
            error if of_system(error).is_some_and(is_out_of_files) => ("files", Advice::Later(FILES_PAUSE)),
            error if error.report().phase == Phase::Body => ("body", Advice::Again),
            error if error.is_connect() => ("connect", Advice::Again),
            _ => ("response", Advice::Again),
        };
        // It includes its sources' messages without secrets; the URL is shown beside it.
        let text = error.to_string();
        let cause = text.strip_prefix(&format!("{}: ", error.report())).unwrap_or(&text).to_owned();
        Self::new(phase, cause, advice)
    }

    fn of_status(response: &Response) -> Self {
        let status = response.status();
        let asked =
            response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()).and_then(retry_after);
        let advice = match (status, asked) {
            (StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE, Some(wait)) => Advice::Later(wait),
            (StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS, _) => Advice::Again,
            (StatusCode::ACCEPTED, _) => Advice::Again,
            _ if status.is_server_error() => Advice::Again,
            _ => Advice::Never,
        };
        let meaning = match status {
            StatusCode::ACCEPTED => ": the file is not ready",
            StatusCode::PARTIAL_CONTENT => ": a part, where the whole was asked for",
            status if status.is_success() => ": that is not the file",
            _ => "",
        };
        Self::new("status", format!("the server answered {status}{meaning}"), advice)
    }

    fn of_write(error: atomic_fs::Error, file: &Path) -> Self {
        if error.is_already_exists() {
            return Self::in_the_way(file);
        }
        // What stands in the way of one path does not stand in the way of the others.
        if error.is_not_a_file() || error.is_not_replaceable() {
            return Self::new("write", chain(&error), Advice::Never);
        }
        let advice = of_system(&error).map_or(Advice::Stop(Exit::Write), advice);
        Self::new("write", chain(&error), advice)
    }

    fn of_directory(error: io::Error) -> Self {
        if matches!(error.kind(), ErrorKind::NotADirectory | ErrorKind::AlreadyExists) {
            return Self::new("write", format!("something stands where a directory belongs: {error}"), Advice::Never);
        }
        Self::new("write", chain(&error), advice(&error))
    }

    /// A file that the catalogue does not know stands where this one belongs.
    fn in_the_way(path: &Path) -> Self {
        let cause = format!(
            "{} is not ours and was left alone; move it aside, or let --adopt take it over if its bytes match",
            path.display()
        );
        Self::new("write", cause, Advice::Never)
    }

    /// Files could not be made durable together, or their rows not be written.
    pub(crate) fn of_home(error: HomeError) -> Self {
        match error {
            HomeError::Catalogue(error) => Self::of_catalogue(error),
            error => Self::new("write", chain(&error), Advice::Stop(Exit::Write)),
        }
    }

    /// The catalogue cannot be written.
    pub(crate) fn of_catalogue(error: CatalogueError) -> Self {
        let exit = if error.is_disk_full() { Exit::Write } else { Exit::Database };
        Self::new("catalogue", chain(&error), Advice::Stop(exit))
    }
}

/// Writes the received part of a body to disk. A part that cannot be written is given up.
async fn write_down(part: Option<Part>) -> Option<Part> {
    let mut part = part?;
    tokio::task::spawn_blocking(move || part.write().ok().map(|()| part)).await.ok().flatten()
}

/// What a system error means: for this file alone, for now, or for all.
fn advice(error: &io::Error) -> Advice {
    match error.kind() {
        _ if is_out_of_files(error) => Advice::Later(FILES_PAUSE),
        _ if is_of_name(error) => Advice::Never,
        // A directory that somebody has closed to us.
        ErrorKind::PermissionDenied | ErrorKind::IsADirectory | ErrorKind::NotADirectory => Advice::Never,
        // More than the file system, or the shell, lets a file have.
        ErrorKind::FileTooLarge => Advice::Never,
        _ => Advice::Stop(Exit::Write),
    }
}

/// Whether the process, or the system, has as many files and sockets open as it may: ENFILE and EMFILE.
fn is_out_of_files(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(23 | 24))
}

/// The error of the system that lies below another one.
fn of_system<'a>(mut error: &'a (dyn std::error::Error + 'static)) -> Option<&'a io::Error> {
    loop {
        match error.downcast_ref::<io::Error>() {
            Some(found) if found.raw_os_error().is_some() => return Some(found),
            _ => error = error.source()?,
        }
    }
}

/// Where the redirects led, without anything that may be a credential, unless the list has it too.
fn without_secrets(found: &Url, asked: &Url) -> String {
    let mut found = found.clone();
    if found != *asked {
        found.set_query(None);
        found.set_fragment(None);
        // A URL that cannot have them has none.
        let _none = found.set_username("").and_then(|()| found.set_password(None));
    }
    found.into()
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
