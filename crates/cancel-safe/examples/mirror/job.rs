//! The main job: settles the directory, then drives every URL through fetch, catalogue and checkpoint, in this order.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use cancel_safe::guard::Guard;
use cancel_safe::http_timeout::{BreakerConfig, BuildError, TimeoutClient};
use cancel_safe::resumable::{FileStore, ItemContext, ItemError, ResumableTask, Retry, TaskError};
use cancel_safe::shutdown::WorkerContext;
use futures_util::StreamExt;
use reqwest::header::{HeaderMap, HeaderValue};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::catalogue::{CatalogueError, Change, Row};
use super::cli::{Args, Durability, Exit};
use super::fetch::{Advice, Fetched, Fetcher, Target, Trouble};
use super::home::{Home, HomeError};
use super::hosts::{self, Hosts, MAX_OUTAGE, Seat};
use super::late::Late;
use super::list::{Line, List};
use super::manifest::Manifest;
use super::report::{Event, Reporter, chain, host_of};
use super::settle::{self, Settled, Wanted};
use super::store::{self, Opened};
use super::turns::{Turn, Turns};

/// For each fetch in flight, so many URLs whose body is there may wait for the disk and the catalogue. Both take a while,
/// and do many at once for the price of one.
const TO_DISK: usize = 3;
/// The most URLs that wait to be tried again.
const MAX_AHEAD: usize = 1 << 16;
/// How often an open breaker or a `Retry-After` may put one URL back in the queue before that counts as a failure.
const MAX_DEFERS: u32 = 300;
/// How long an open breaker lets nothing through, at first and at most.
const BREAKER_FIRST: Duration = Duration::from_secs(1);
const BREAKER_LONGEST: Duration = Duration::from_secs(30);

/// How the job ended, with the message.
#[derive(Debug)]
pub(crate) struct Ending {
    pub(crate) exit: Exit,
    pub(crate) verdict: String,
}

impl Ending {
    fn new(exit: Exit, verdict: impl Into<String>) -> Self {
        Self { exit, verdict: verdict.into() }
    }
}

impl From<HomeError> for Ending {
    fn from(error: HomeError) -> Self {
        let exit = match &error {
            HomeError::Busy(_) => Exit::Busy,
            HomeError::Io { .. } => Exit::Write,
            HomeError::Unknown(_) | HomeError::Catalogue(CatalogueError::Foreign { .. } | CatalogueError::Url(_)) => {
                Exit::Usage
            }
            HomeError::Catalogue(error) if error.is_disk_full() => Exit::Write,
            HomeError::Catalogue(_) => Exit::Database,
        };
        Self::new(exit, chain(&error))
    }
}

impl From<CatalogueError> for Ending {
    fn from(error: CatalogueError) -> Self {
        HomeError::Catalogue(error).into()
    }
}

/// Waits for a step before the first fetch. A stop ends it at once, because every such step can be started over.
pub(crate) async fn until_stopped<T, E: Into<Ending>>(
    cx: &WorkerContext,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, Ending> {
    tokio::select! {
        biased;
        done = work => done.map_err(Into::into),
        () = cx.cancelled() => Err(Ending::new(Exit::Interrupted, "stopped before the first fetch; run it again")),
    }
}

/// Runs the job to its end. Cancelled through `cx`, it starts no new fetch and gives those in flight their grace.
pub(crate) async fn run(
    args: &Args,
    manifest: Manifest,
    hosts: &[(String, SocketAddr)],
    report: &Arc<Reporter>,
    cx: &WorkerContext,
) -> Result<Ending, Ending> {
    let args = &args.within_limits();
    let home = Arc::new(Home::open(&args.out())?);
    let out = args.out();
    let usage = |why: String| Ending::new(Exit::Usage, why);
    let opening = store::open(args.database().map_err(usage)?, &out, &home.mark);
    let Opened { catalogue, writer, is_new } = until_stopped(cx, opening).await?;
    let job = async {
        // The writer ends when the last handle of the catalogue does, and this block owns it.
        let catalogue = catalogue;
        let wanted = Wanted {
            home: &home,
            catalogue: &catalogue,
            is_new,
            verify: args.verify,
            adopt: args.adopt,
            refresh: args.refresh,
            report,
        };
        let (list, settled) = until_stopped(cx, settle::settle(&wanted, manifest.list)).await?;
        tell(&settled, manifest.duplicates, report);
        let known_hosts = Arc::new(Hosts::new(args.concurrency.into(), args.per_host.into()));
        let client = client(args, hosts, &known_hosts)?;
        let catalogue = catalogue.clone();
        let shared = Arc::new(Shared {
            fetcher: Fetcher {
                client,
                home: Arc::clone(&home),
                catalogue,
                report: Arc::clone(report),
                desk: Arc::new(Semaphore::new(args.concurrency.into())),
                names: Arc::default(),
                is_late: args.durability == Durability::End,
            },
            late: Late::default(),
            list: Arc::new(list),
            adopt: args.adopt,
            recorded: Mutex::default(),
            retries: args.retries,
            hosts: known_hosts,
            report: Arc::clone(report),
            stop: cx.token().child_token(),
            fatal: OnceLock::new(),
            cut: Mutex::default(),
        });
        let ending = drive(args, &settled, &shared).await;
        // Settles fetches that were cut between file and row. If the catalogue is gone, the next start settles them.
        let _next_start = settle::resolve(&home, &shared.fetcher.catalogue).await;
        for (origin, trips) in shared.fetcher.client.trips() {
            let host = Url::parse(&origin).map(|origin| hosts::name_of(&origin)).unwrap_or_default();
            report.count(&host, |host| host.trips += trips);
        }
        Ok(ending)
    };
    let (ending, ()) = tokio::join!(job, writer);
    ending
}

/// Reports what settling found, if it is worth mentioning.
fn tell(settled: &Settled, duplicates: usize, report: &Reporter) {
    let facts = [
        (duplicates, "duplicate line(s) in the manifest, counted once"),
        (settled.lost, "file(s) were not as the catalogue says; they are fetched again"),
        (settled.removed, "file(s) of an interrupted run removed"),
        (settled.strangers, "file(s) below files/ are not ours and were left alone"),
        (settled.left, "URL(s) in the catalogue have left the manifest; their files are kept"),
    ];
    for (count, text) in facts {
        if count > 0 {
            report.notice(&format!("{count} {text}"));
        }
    }
}

fn client(args: &Args, hosts: &[(String, SocketAddr)], known: &Arc<Hosts>) -> Result<TimeoutClient, Ending> {
    let known = Arc::clone(known);
    let mut certificates = Vec::new();
    for path in &args.ca {
        let read = || reqwest::Certificate::from_pem_bundle(&std::fs::read(path)?).map_err(std::io::Error::other);
        let unusable = |error| Ending::new(Exit::Usage, format!("--ca {}: {}", path.display(), chain(&error)));
        certificates.extend(read().map_err(unusable)?);
    }
    let (mut headers, mut names) = (HeaderMap::new(), Vec::new());
    for (name, value) in args.headers().map_err(|why| Ending::new(Exit::Usage, why))? {
        names.push(name.to_string());
        headers.append(name, value);
    }
    let agent =
        args.user_agent.clone().unwrap_or(HeaderValue::from_static(concat!("mirror/", env!("CARGO_PKG_VERSION"))));
    let built = TimeoutClient::builder()
        .configure(|mut inner| {
            // Bytes as sent, even if another crate in the build switches decompression on.
            inner = inner.no_gzip().no_brotli().no_zstd().no_deflate();
            inner = inner.user_agent(agent).pool_max_idle_per_host(args.per_host.into());
            if !certificates.is_empty() {
                inner = inner.tls_certs_merge(certificates);
            }
            for (host, address) in hosts {
                // The demonstration never leaves the machine, whatever proxy the environment names.
                inner = inner.resolve(host, *address).no_proxy();
            }
            inner
        })
        .redirects(10)
        .default_headers(headers)
        .sensitive_headers(names)
        .connect_timeout(args.timeout)
        .timeout(args.max_time)
        .attempt_timeout(None)
        .idle_timeout(args.timeout)
        .max_body(args.max_body)
        .concurrency(args.concurrency.into())
        .breaker(BreakerConfig::builder().open_for(BREAKER_FIRST, BREAKER_LONGEST).build().map_err(unusable)?)
        .classify(move |response| known.class_of(response))
        .build();
    built.map_err(unusable)
}

fn unusable(error: BuildError) -> Ending {
    Ending::new(Exit::Usage, format!("the HTTP client cannot be built: {}", chain(&error)))
}

/// What every fetch in flight shares.
struct Shared {
    fetcher: Fetcher,
    /// New files that are not yet durable.
    late: Late,
    list: Arc<List>,
    adopt: bool,
    /// The digests that the checkpoint has of files without a row, by URL, where they are to be adopted.
    recorded: Mutex<HashMap<String, String>>,
    retries: u32,
    hosts: Arc<Hosts>,
    report: Arc<Reporter>,
    /// No new fetches: the application was told to stop, or nothing can be written any more.
    stop: CancellationToken,
    fatal: OnceLock<(Exit, String)>,
    /// URLs whose fetch was dropped.
    cut: Mutex<Vec<String>>,
}

/// Puts every URL through a resumable task whose checkpoint is `DIR/mirror.ckpt`.
async fn drive(args: &Args, settled: &Settled, shared: &Arc<Shared>) -> Ending {
    let (report, list) = (&shared.report, &shared.list);
    let total = list.len() - settled.left;
    let complete = if args.refresh { 0 } else { settled.complete };
    report.set_total(total);
    report.advance(complete);
    let checkpoint: PathBuf = args.out().join("mirror.ckpt");
    let (worker, earlier) = (Arc::clone(shared), Arc::clone(shared));
    let turns = Turns::new(Arc::clone(list), Arc::clone(&shared.hosts), args.refresh, total - complete);
    let mut run = ResumableTask::builder("mirror")
        .version("2")
        .store(FileStore::at(&checkpoint))
        .key(|(_, url): &Turn| url.clone())
        // Besides those whose body is on its way.
        .concurrency(usize::from(args.concurrency) * (1 + TO_DISK))
        // A run that is killed while a host is down must not use up the attempts of the next one.
        .retry(Retry::attempts(args.retries + 1).per_run())
        .max_defers(MAX_DEFERS)
        // Each host has a bounded number of waiting URLs, so this many hosts can be down without holding up the others.
        .max_ahead(MAX_AHEAD)
        .quarantine(usize::MAX)
        .retry_quarantined(args.retry_failed || args.refresh)
        // Complete URLs are never in the stream: here the file or its row is gone, whatever the checkpoint says.
        .revalidate(move |(_, url): &Turn, digest: &String| {
            if earlier.adopt {
                earlier.recorded().insert(url.clone(), digest.clone());
            }
            false
        })
        .cancel(shared.stop.clone())
        .grace(args.grace)
        .stream_from(turns, move |cx, turn| one(Arc::clone(&worker), cx, turn));
    let mut failures = 0;
    let mut ticks = tokio::time::interval(report.interval());
    ticks.reset();
    loop {
        let done = tokio::select! {
            biased;
            done = run.next() => done,
            _ = ticks.tick() => {
                report.tick(shared.fetcher.client.open_origins().len(), &shared.hosts.waits());
                continue;
            }
        };
        let Some(done) = done else { break };
        let url = done.key.as_deref().unwrap_or_default();
        let host = host_of(url);
        report.advance(1);
        shared.hosts.end(host, url);
        if let Err(failure) = done.result {
            // The file of an earlier success is there, whatever the checkpoint says of a later attempt.
            if done.restored && list.find(url).is_ok_and(|slot| slot.is_some_and(|slot| list.is_complete(slot))) {
                report.count(host, |host| host.restored += 1);
                continue;
            }
            report.count(host, |host| host.failures += 1);
            failures += 1;
            let (phase, cause) = failure.cause.split_once(": ").unwrap_or(("unknown", &failure.cause));
            let event = Event {
                url,
                phase: Some(phase),
                cause: Some(cause),
                attempts: Some(failure.attempts),
                ..Event::default()
            };
            report.event("failed", &event);
        }
    }
    let finished = run.finish().await;
    let cut = std::mem::take(&mut *shared.cut.lock().unwrap_or_else(PoisonError::into_inner));
    for url in &cut {
        report.event("cut", &Event { url, ..Event::default() });
    }
    let flushed = shared.late.flush(&shared.fetcher.home, &shared.fetcher.catalogue).await;
    if let Some((exit, cause)) = shared.fatal.get() {
        return Ending::new(*exit, cause.clone());
    }
    if let Err(error) = flushed {
        return error.into();
    }
    match finished {
        Ok(_) if failures > 0 => {
            Ending::new(Exit::Failures, format!("{failures} URL(s) failed; --retry-failed tries them again"))
        }
        Ok(_) if report.sum().files == 0 => Ending::new(Exit::Complete, "nothing to do: all files are there"),
        Ok(_) => Ending::new(Exit::Complete, "all files are there"),
        Err(TaskError::Cancelled) if cut.is_empty() => Ending::new(Exit::Interrupted, "stopped; run it again to go on"),
        Err(TaskError::Cancelled) => {
            let verdict = format!(
                "stopped; {} fetch(es) did not end within the grace and were cut; run it again to go on",
                cut.len()
            );
            Ending::new(Exit::Grace, verdict)
        }
        Err(error) => refused(&error, &checkpoint),
    }
}

fn refused(error: &TaskError, checkpoint: &std::path::Path) -> Ending {
    let exit = match error {
        TaskError::Corrupt { .. } | TaskError::VersionMismatch { .. } | TaskError::NewerFormat { .. } => Exit::Corrupt,
        TaskError::Busy { .. } => Exit::Busy,
        _ => Exit::Write,
    };
    let mut verdict = chain(error);
    if exit == Exit::Corrupt {
        let path = checkpoint.display();
        verdict += &format!(
            "\nTo go on without it, move it aside: mv '{path}' '{path}.corrupt'\n\
             Nothing that is complete is fetched again: the catalogue knows it."
        );
    }
    Ending::new(exit, verdict)
}

/// One URL: file durable, then row committed; the checkpoint records it after this has returned.
async fn one(shared: Arc<Shared>, cx: ItemContext, (slot, url): Turn) -> Result<String, ItemError> {
    let host = host_of(&url);
    let seat = shared.hosts.begin(host, &url);
    let outcome = at_its_host(&shared, &cx, slot, &url, host, seat).await;
    if outcome.is_err() {
        shared.hosts.pause(host, &url);
    }
    outcome
}

async fn at_its_host(
    shared: &Arc<Shared>,
    cx: &ItemContext,
    slot: u32,
    url: &str,
    host: &str,
    mut seat: Seat,
) -> Result<String, ItemError> {
    tokio::select! {
        biased;
        () = shared.stop.cancelled() => return Err(ItemError::defer(Duration::ZERO, "not begun")),
        () = seat.sit_down() => {}
    }
    let started = Instant::now();
    let dropped = Guard::new(|| shared.cut.lock().unwrap_or_else(PoisonError::into_inner).push(url.to_owned()));
    let outcome = attempt(shared, slot, seat).await;
    dropped.disarm();
    match outcome {
        Ok((name, row)) => {
            shared.hosts.answered(host);
            shared.report.count(host, |host| {
                if name != "fetched" {
                    host.restored += 1;
                } else {
                    host.files += 1;
                    host.bytes += row.bytes.unsigned_abs();
                }
            });
            let event = Event {
                url,
                path: Some(&row.path),
                bytes: Some(row.bytes),
                sha256: Some(&row.sha256),
                attempts: Some(cx.attempt()),
                elapsed: Some(started.elapsed()),
                ..Event::default()
            };
            shared.report.event(name, &event);
            Ok(row.sha256)
        }
        Err(trouble) => Err(shared.refuse(cx, url, host, trouble, started.elapsed())),
    }
}

async fn attempt(shared: &Shared, slot: u32, seat: Seat) -> Result<(&'static str, Row), Trouble> {
    let never = |error: std::io::Error| Trouble { phase: "list", cause: chain(&error), advice: Advice::Never };
    let (Line { sha256, size, .. }, url, path) = shared.list.entry(slot).map_err(never)?;
    let target = Target { path, url, sha256, size };
    let catalogue = &shared.fetcher.catalogue;
    let known = match shared.list.has_row(slot) {
        true => catalogue.row(target.url.as_str()).await.map_err(Trouble::of_catalogue)?,
        false => None,
    };
    let is_there = || shared.fetcher.home.file(&target.path).symlink_metadata().is_ok_and(|found| found.is_file());
    let (name, row) = if shared.adopt && known.is_none() && is_there() {
        let recorded = shared.recorded().remove(target.url.as_str());
        ("adopted", shared.fetcher.adopt(&target, recorded.as_deref()).await?)
    } else {
        match shared.fetcher.fetch(&target, known.as_ref(), seat).await? {
            Fetched::Late(row) => {
                let added = shared.late.add(row.clone(), &shared.fetcher.home, catalogue).await;
                return added.map(|()| ("fetched", row)).map_err(Trouble::of_home);
            }
            Fetched::Stored(row) => ("fetched", row),
            Fetched::Unchanged(row) => ("unchanged", row),
        }
    };
    catalogue.apply(Change::Put(Box::new(row.clone()))).await.map_err(Trouble::of_catalogue)?;
    Ok((name, row))
}

impl Shared {
    fn recorded(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what a failed fetch says of its host; returns whether that has been silent for too long to be waited for.
    fn is_lost(&self, host: &str, trouble: &Trouble) -> bool {
        match (trouble.phase, trouble.advice) {
            ("breaker", Advice::Later(after)) => self.hosts.blocked(host, after),
            ("connect" | "response", _) => self.hosts.silent(host),
            ("status" | "redirect" | "body", _) => self.hosts.answered(host),
            _ => return false,
        }
        self.hosts.is_lost(host)
    }

    /// Reports a failed attempt, and tells the task what to do about it.
    fn refuse(&self, cx: &ItemContext, url: &str, host: &str, trouble: Trouble, elapsed: Duration) -> ItemError {
        let event = Event {
            url,
            attempts: Some(cx.attempt()),
            phase: Some(trouble.phase),
            cause: Some(&trouble.cause),
            elapsed: Some(elapsed),
            ..Event::default()
        };
        let is_lost = self.is_lost(host, &trouble);
        match trouble.advice {
            Advice::Later(_) | Advice::Again if is_lost => ItemError::permanent(Trouble {
                cause: format!("no answer from the host for {} s: {}", MAX_OUTAGE.as_secs(), trouble.cause),
                ..trouble
            }),
            Advice::Later(after) => {
                // The summary mentions open breakers; a line for each URL that waits for one would drown the rest.
                if trouble.phase != "breaker" {
                    self.report.count(host, |host| host.retries += 1);
                    self.report.event("deferred", &event);
                }
                ItemError::defer(after, trouble)
            }
            Advice::Again => {
                // The last failure is reported when the task gives the URL up.
                if cx.attempt() <= self.retries {
                    self.report.count(host, |host| host.retries += 1);
                    self.report.event("retry", &event);
                }
                ItemError::retry(trouble)
            }
            Advice::Never => ItemError::permanent(trouble),
            Advice::Stop(exit) => {
                // Only the first cause is reported; the following ones are of the same kind.
                let _first_wins = self.fatal.set((exit, format!("{url}: {trouble}")));
                self.stop.cancel();
                // Not the URL's fault: it keeps its attempts for the next run.
                ItemError::defer(Duration::ZERO, trouble)
            }
        }
    }
}
