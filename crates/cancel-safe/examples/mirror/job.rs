//! The main job: settles the directory, then drives every URL through fetch, catalogue and checkpoint, in this order.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use cancel_safe::guard::Guard;
use cancel_safe::http_timeout::{BreakerConfig, BuildError, TimeoutClient};
use cancel_safe::resumable::{FileStore, ItemContext, ItemError, ResumableTask, Retry, TaskError};
use cancel_safe::shutdown::WorkerContext;
use futures_util::StreamExt;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::catalogue::{Catalogue, CatalogueError, Change, Opened, Row};
use super::cli::{Args, Exit};
use super::fetch::{Advice, Fetched, Fetcher, Trouble};
use super::home::{Home, HomeError};
use super::hosts::{Hosts, MAX_OUTAGE};
use super::manifest::Manifest;
use super::report::{Event, Reporter, chain, host_of};
use super::settle::{self, Settled};

/// How often an open breaker or a `Retry-After` may put one URL back in the queue before that counts as a failure.
const MAX_DEFERS: u32 = 300;
/// How long an open breaker lets nothing through, at first and at most.
const BREAKER_FIRST: Duration = Duration::from_secs(1);
const BREAKER_LONGEST: Duration = Duration::from_secs(30);

/// How the job ended, and in which words.
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

/// Waits for what comes before the first fetch; a stop ends it at once, because all of it may be begun anew.
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
    hosts: &[(&'static str, SocketAddr)],
    report: &Arc<Reporter>,
    cx: &WorkerContext,
) -> Result<Ending, Ending> {
    let home = Arc::new(Home::open(&args.out())?);
    let out = args.out();
    let opening = Catalogue::open(args.database.as_deref(), &out, &home.mark);
    let Opened { catalogue, writer, rows, is_new } = until_stopped(cx, opening).await?;
    let job = async {
        // The writer ends when the last handle of the catalogue does, and this block owns it.
        let catalogue = catalogue;
        let settling = settle::settle(&home, &manifest.urls, rows, is_new, &catalogue, args.verify);
        let settled = until_stopped(cx, settling).await?;
        tell(&settled, &manifest, report);
        let known_hosts = Arc::new(Hosts::new(args.per_host.into()));
        let client = client(args, hosts, &known_hosts)?;
        let shared = Arc::new(Shared {
            fetcher: Fetcher { client, home: Arc::clone(&home), catalogue, report: Arc::clone(report) },
            settled,
            refresh: args.refresh,
            retries: args.retries,
            hosts: known_hosts,
            report: Arc::clone(report),
            stop: cx.token().child_token(),
            fatal: OnceLock::new(),
            cut: Mutex::default(),
        });
        let ending = drive(args, manifest, &shared).await;
        // A fetch that was cut between its file and its row. Where the catalogue is gone, the next start looks again.
        let _next_start = settle::resolve(&home, &shared.fetcher.catalogue).await;
        for (origin, trips) in shared.fetcher.client.trips() {
            report.count(&origin, |host| host.trips += trips);
        }
        Ok(ending)
    };
    let (ending, ()) = tokio::join!(job, writer);
    ending
}

/// Says what settling found, where it is worth a word.
fn tell(settled: &Settled, manifest: &Manifest, report: &Reporter) {
    let facts = [
        (manifest.duplicates, "duplicate line(s) in the manifest, counted once"),
        (settled.lost, "file(s) were not as the catalogue says; they are fetched again"),
        (settled.removed, "file(s) of an interrupted run removed"),
        (settled.strangers, "file(s) below files/ are not ours and were left alone"),
        (settled.left.len(), "URL(s) in the catalogue have left the manifest; their files are kept"),
    ];
    for (count, text) in facts {
        if count > 0 {
            report.notice(&format!("{count} {text}"));
        }
    }
    for url in &settled.left {
        report.event("left", &Event { url, ..Event::default() });
    }
}

fn client(args: &Args, hosts: &[(&'static str, SocketAddr)], known: &Arc<Hosts>) -> Result<TimeoutClient, Ending> {
    let known = Arc::clone(known);
    let built = TimeoutClient::builder()
        .configure(|mut inner| {
            // Bytes as sent, also where some other crate of a build switches decompression on.
            inner = inner.no_gzip().no_brotli().no_zstd().no_deflate();
            inner = inner.user_agent(concat!("mirror/", env!("CARGO_PKG_VERSION")));
            inner = inner.pool_max_idle_per_host(args.per_host.into());
            for (host, address) in hosts {
                // The demonstration never leaves the machine, whatever proxy the environment names.
                inner = inner.resolve(host, *address).no_proxy();
            }
            inner
        })
        .redirects(10)
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
    settled: Settled,
    refresh: bool,
    retries: u32,
    hosts: Arc<Hosts>,
    report: Arc<Reporter>,
    /// No new fetches: the application is told to stop, or nothing can be written any more.
    stop: CancellationToken,
    fatal: OnceLock<(Exit, String)>,
    /// URLs whose fetch was dropped.
    cut: Mutex<Vec<String>>,
}

/// Puts every URL through a resumable task whose checkpoint is `DIR/mirror.ckpt`.
async fn drive(args: &Args, manifest: Manifest, shared: &Arc<Shared>) -> Ending {
    let report = &shared.report;
    report.set_total(manifest.urls.len());
    let checkpoint: PathBuf = args.out().join("mirror.ckpt");
    let (revalidate, refresh) = (Arc::clone(shared), args.refresh);
    let worker = Arc::clone(shared);
    let mut run = ResumableTask::builder("mirror")
        .version("1")
        .store(FileStore::at(&checkpoint))
        .key(|url: &String| url.clone())
        .concurrency(args.concurrency.into())
        // A run that is killed while a host is down must not use up the attempts of the next one.
        .retry(Retry::attempts(args.retries + 1).per_run())
        .max_defers(MAX_DEFERS)
        // As many as there are URLs may wait or fail: one dead host must not hold up the others.
        .max_ahead(manifest.urls.len().max(1))
        .quarantine(usize::MAX)
        .retry_quarantined(args.retry_failed || args.refresh)
        .revalidate(move |url: &String, _: &u64| !refresh && revalidate.settled.complete.contains_key(url))
        .cancel(shared.stop.clone())
        .grace(args.grace)
        .stream(by_turns(manifest.urls), move |cx, url| one(Arc::clone(&worker), cx, url));
    let mut failures = BTreeMap::new();
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
        report.advance();
        match done.result {
            Ok(_) if done.restored => report.count(url, |host| host.restored += 1),
            Ok(_) => {}
            // The file of an earlier success is there, whatever the checkpoint says of a later attempt.
            Err(_) if done.restored && shared.settled.complete.contains_key(url) => {
                report.count(url, |host| host.restored += 1)
            }
            Err(failure) => {
                report.count(url, |host| host.failures += 1);
                failures.insert(url.to_owned(), failure);
            }
        }
    }
    let finished = run.finish().await;
    for (url, failure) in &failures {
        let (phase, cause) = failure.cause.split_once(": ").unwrap_or(("unknown", &failure.cause));
        let event =
            Event { url, phase: Some(phase), cause: Some(cause), attempts: Some(failure.attempts), ..Event::default() };
        report.event("failed", &event);
    }
    let cut = std::mem::take(&mut *shared.cut.lock().unwrap_or_else(PoisonError::into_inner));
    for url in &cut {
        report.event("cut", &Event { url, ..Event::default() });
    }
    if let Some((exit, cause)) = shared.fatal.get() {
        return Ending::new(*exit, cause.clone());
    }
    match finished {
        Ok(_) if !failures.is_empty() => {
            Ending::new(Exit::Failures, format!("{} URL(s) failed; --retry-failed tries them again", failures.len()))
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

/// One URL of each host in turn, so that no host's limit holds up the slots of the others.
fn by_turns(urls: Vec<Url>) -> impl Iterator<Item = String> {
    let mut turns: BTreeMap<String, usize> = BTreeMap::new();
    let mut urls: Vec<(usize, Url)> = urls
        .into_iter()
        .map(|url| {
            let turn = turns.entry(host_of(url.as_str())).or_default();
            *turn += 1;
            (*turn, url)
        })
        .collect();
    urls.sort_by_key(|(turn, _)| *turn);
    urls.into_iter().map(|(_, url)| url.into())
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
async fn one(shared: Arc<Shared>, cx: ItemContext, url: String) -> Result<u64, ItemError> {
    let known = shared.settled.complete.get(&url);
    if let (Some(row), false) = (known, shared.refresh) {
        shared.report.count(&url, |host| host.restored += 1);
        return Ok(row.bytes.unsigned_abs());
    }
    let host = host_of(&url);
    let gate = shared.hosts.gate(&host);
    let _permit = tokio::select! {
        biased;
        () = shared.stop.cancelled() => return Err(ItemError::defer(Duration::ZERO, "not begun")),
        permit = gate.acquire_owned() => permit,
    };
    let started = Instant::now();
    let dropped = Guard::new(|| shared.cut.lock().unwrap_or_else(PoisonError::into_inner).push(url.clone()));
    let outcome = attempt(&shared, &url, known).await;
    dropped.disarm();
    match outcome {
        Ok((name, row)) => {
            shared.hosts.answered(&host);
            shared.report.count(&url, |host| {
                if name == "unchanged" {
                    host.restored += 1;
                } else {
                    host.files += 1;
                    host.bytes += row.bytes.unsigned_abs();
                }
            });
            let event = Event {
                url: &url,
                path: Some(&row.path),
                bytes: Some(row.bytes),
                sha256: Some(&row.sha256),
                attempts: Some(cx.attempt()),
                elapsed: Some(started.elapsed()),
                ..Event::default()
            };
            shared.report.event(name, &event);
            Ok(row.bytes.unsigned_abs())
        }
        Err(trouble) => Err(shared.refuse(&cx, &url, trouble, started.elapsed())),
    }
}

async fn attempt(shared: &Shared, url: &str, known: Option<&Row>) -> Result<(&'static str, Row), Trouble> {
    let never = |cause: String| Trouble { phase: "mapping", cause, advice: Advice::Never };
    let parsed = Url::parse(url).map_err(|error| never(error.to_string()))?;
    let path = shared.settled.paths.get(&parsed).ok_or_else(|| never("the URL has no path".to_owned()))?;
    let (name, row) = match shared.fetcher.fetch(&parsed, path, known).await? {
        Fetched::Stored(row) => ("fetched", row),
        Fetched::Unchanged(row) => ("unchanged", row),
    };
    let put = Change::Put(Box::new(row.clone()));
    shared.fetcher.catalogue.apply(put).await.map_err(Trouble::of_catalogue)?;
    Ok((name, row))
}

impl Shared {
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

    /// Tells of a failed attempt, and turns it into what the task shall do about it.
    fn refuse(&self, cx: &ItemContext, url: &str, trouble: Trouble, elapsed: Duration) -> ItemError {
        let event = Event {
            url,
            attempts: Some(cx.attempt()),
            phase: Some(trouble.phase),
            cause: Some(&trouble.cause),
            elapsed: Some(elapsed),
            ..Event::default()
        };
        let is_lost = self.is_lost(&host_of(url), &trouble);
        match trouble.advice {
            Advice::Later(_) | Advice::Again if is_lost => ItemError::permanent(Trouble {
                cause: format!("no answer from the host for {} s: {}", MAX_OUTAGE.as_secs(), trouble.cause),
                ..trouble
            }),
            Advice::Later(after) => {
                // Of an open breaker the summary tells; a line for each URL that waits for it would drown the rest.
                if trouble.phase != "breaker" {
                    self.report.count(url, |host| host.retries += 1);
                    self.report.event("deferred", &event);
                }
                ItemError::defer(after, trouble)
            }
            Advice::Again => {
                // The last failure is told as such when the task gives the URL up.
                if cx.attempt() <= self.retries {
                    self.report.count(url, |host| host.retries += 1);
                    self.report.event("retry", &event);
                }
                ItemError::retry(trouble)
            }
            Advice::Never => ItemError::permanent(trouble),
            Advice::Stop(exit) => {
                // The first cause is the one to tell; those that follow are of the same kind.
                let _first_wins = self.fatal.set((exit, format!("{url}: {trouble}")));
                self.stop.cancel();
                // Not the URL's fault: it keeps its attempts for the next run.
                ItemError::defer(Duration::ZERO, trouble)
            }
        }
    }
}
