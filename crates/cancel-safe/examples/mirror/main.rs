//! Keeps a directory equal to a list of URLs, and survives everything: `cargo demo` runs it on an embedded origin.
//!
//! The crates of `cancel-safe` at work together: files are written through `atomic_fs`, rows through `tx_guard`, requests
//! go through `http_timeout`, progress through `resumable`, and the whole ends through `shutdown`. A partial body starts
//! again from its beginning; there are no range requests.

mod catalogue;
mod cli;
mod fetch;
mod home;
mod hosts;
mod job;
mod manifest;
mod origin;
mod paths;
mod report;
mod settle;

use std::io::{self, BufReader};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cancel_safe::shutdown::{Application, Report, StopReason, WorkerContext};
use sha2::{Digest, Sha256};

use cli::{Args, Exit};
use job::Ending;
use manifest::Manifest;
use origin::Origin;
use report::{Reporter, chain};

/// What the orderly end may take beyond the grace of the fetches, before the process is ended as it is.
const MARGIN: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let args = match Args::read() {
        Ok(args) => args,
        Err((error, exit)) => {
            // Nothing is left to be told to, if even this cannot be written.
            let _closed = error.print();
            return ExitCode::from(exit as u8);
        }
    };
    let report = Arc::new(Reporter::new(args.json));
    let ending: Arc<Mutex<Option<Ending>>> = Arc::default();
    let budget = args.grace + MARGIN;
    let (told, exit, voice) = (Arc::clone(&ending), Arc::clone(&ending), Arc::clone(&report));
    Application::new("mirror")
        .worker("mirror", move |cx: WorkerContext| async move {
            let outcome = work(&args, &report, &cx).await.unwrap_or_else(|ending| ending);
            *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
            Ok::<(), std::convert::Infallible>(())
        })
        .shutdown_timeout(budget)
        .exit_code(move |stop: &Report| {
            let ending = exit.lock().unwrap_or_else(PoisonError::into_inner);
            let code = ending.as_ref().map(|ending| (ending.exit, &ending.verdict));
            Some(match (code, stop.reason()) {
                (Some((Exit::Interrupted, _)), StopReason::Signal(15)) => Exit::Terminated as u8,
                (Some((exit, _)), _) => exit as u8,
                // The signal came before the worker had begun: that is a stop like any other.
                (None, StopReason::Signal(15)) if stop.is_clean() => Exit::Terminated as u8,
                (None, StopReason::Signal(_)) if stop.is_clean() => Exit::Interrupted as u8,
                (None, _) => return None,
            })
        })
        .on_report(move |stop| match &*ending.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(ending) => voice.summary(&ending.verdict),
            None => voice.summary(&format!("cut short: {stop}")),
        })
        .run()
}

async fn work(args: &Args, report: &Arc<Reporter>, cx: &WorkerContext) -> Result<Ending, Ending> {
    let Some(path) = args.manifest.clone() else { return demo(args, report, cx).await };
    let manifest = job::until_stopped(cx, read(path)).await?;
    job::run(args, manifest, &[], report, cx).await
}

/// Reads a manifest on a thread of its own: standard input may never end, and a stop does not wait for it.
async fn read(path: PathBuf) -> Result<Manifest, Ending> {
    let unusable = |why: String| Ending { exit: Exit::Usage, verdict: why };
    let shown = path.display().to_string();
    let (done, manifest) = tokio::sync::oneshot::channel();
    let reader = std::thread::Builder::new().name("manifest".to_owned()).spawn(move || {
        let manifest = if path.as_os_str() == "-" {
            Manifest::read(io::stdin().lock())
        } else {
            std::fs::File::open(path).map_err(Into::into).and_then(|file| Manifest::read(BufReader::new(file)))
        };
        // Nobody waits any more once the program is told to stop.
        drop(done.send(manifest));
    });
    reader.map_err(|error| unusable(format!("no thread can be started: {error}")))?;
    match manifest.await {
        Ok(Ok(manifest)) => Ok(manifest),
        Ok(Err(error)) => Err(unusable(format!("{shown}: {}", chain(&error)))),
        Err(_) => Err(unusable(format!("{shown}: its reader has panicked"))),
    }
}

/// Mirrors the embedded origin, then compares every file with what the origin serves.
async fn demo(args: &Args, report: &Arc<Reporter>, cx: &WorkerContext) -> Result<Ending, Ending> {
    let origin = async {
        Origin::start().await.map_err(|error| Ending {
            exit: Exit::Usage,
            verdict: format!("the embedded origin cannot be started: {error}"),
        })
    };
    let origin = job::until_stopped(cx, origin).await?;
    let manifest = Manifest { urls: origin.files.keys().cloned().collect(), duplicates: 0 };
    report.notice(&format!(
        "{} files of {} hosts into {}",
        origin.files.len(),
        origin.hosts.len(),
        args.out().display()
    ));
    let ending = job::run(args, manifest, &origin.hosts, report, cx).await?;
    if ending.exit != Exit::Complete {
        return Ok(ending);
    }
    let paths = paths::assign(origin.files.keys());
    let differs = tokio::task::block_in_place(|| {
        let differs = |(url, digest): &(&url::Url, &String)| {
            let file = args.out().join("files").join(&paths[*url]);
            std::fs::read(file).map(|bytes| home::hex(&Sha256::digest(bytes)) != **digest).unwrap_or(true)
        };
        origin.files.iter().filter(differs).count()
    });
    let verdict = format!(
        "{}; {} of {} match the origin's digests",
        ending.verdict,
        origin.files.len() - differs,
        origin.files.len()
    );
    Ok(Ending { exit: if differs == 0 { Exit::Complete } else { Exit::Failures }, verdict })
}
