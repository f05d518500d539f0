//! Keeps a directory equal to a list of URLs, and survives everything: `cargo demo` shows it beside a plain loop.
//!
//! The crates of `cancel-safe` at work together: files are written through `atomic_fs`, rows through `tx_guard`, requests
//! go through `http_timeout`, progress through `resumable`, and the whole ends through `shutdown`. If a large body was
//! cut, its beginning is kept, and a later request asks for the rest if the server can prove that it is the same body.

mod catalogue;
mod cli;
mod demo;
mod durable;
mod fetch;
mod home;
mod hosts;
mod job;
mod judge;
mod late;
mod list;
mod manifest;
mod moves;
mod origin;
mod parts;
mod paths;
mod plain;
mod report;
mod screen;
mod settle;
mod store;
mod turns;

use std::io::{self, BufReader, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cancel_safe::shutdown::{Application, Report, StopReason, WorkerContext};

use cli::{Args, Exit};
use job::Ending;
use manifest::Manifest;
use report::{Reporter, chain};

/// How long the orderly end may take beyond the grace of the fetches, before the process is ended without it.
const MARGIN: Duration = Duration::from_secs(10);

/// How often to report that a long list is still being read.
const READING_EVERY: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let args = match Args::read() {
        Ok(args) => args,
        Err((error, exit)) => {
            // If even this cannot be written, there is nowhere left to report it.
            let _closed = error.print();
            return ExitCode::from(exit as u8);
        }
    };
    if args.lifeline {
        end_with_input();
    }
    if args.plain {
        return plain_loop(args);
    }
    let report = Arc::new(Reporter::new(args.json));
    let ending: Arc<Mutex<Option<Ending>>> = Arc::default();
    let budget = args.grace + MARGIN;
    let is_read_next_due = args.manifest.is_none() && !args.json;
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
            Some(ending) => {
                voice.summary(&ending.verdict);
                if is_read_next_due && ending.exit == Exit::Complete {
                    drop(writeln!(io::stdout().lock(), "\n{}", demo::READ_NEXT));
                }
            }
            None => voice.summary(&format!("cut short: {stop}")),
        })
        .run()
}

async fn work(args: &Args, report: &Arc<Reporter>, cx: &WorkerContext) -> Result<Ending, Ending> {
    let Some(path) = args.manifest.clone() else { return demo::run(args, cx).await };
    let manifest = job::until_stopped(cx, read(path, Arc::clone(report))).await?;
    job::run(args, manifest, &args.resolve, report, cx).await
}

/// Ends the process, as hard as a kill would, when standard input ends. A demo child's input ends when the demo does.
fn end_with_input() {
    std::thread::spawn(|| {
        drop(io::copy(&mut io::stdin().lock(), &mut io::sink()));
        std::process::exit(1);
    });
}

/// The other side of the demo.
fn plain_loop(args: Args) -> ExitCode {
    match plain::download(args.manifest.unwrap_or_default(), args.out.unwrap_or_default(), args.resolve) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            drop(writeln!(io::stderr().lock(), "{error}"));
            ExitCode::FAILURE
        }
    }
}

/// Reads a manifest on a thread of its own: standard input may never end, and a stop does not wait for it.
async fn read(path: PathBuf, report: Arc<Reporter>) -> Result<Manifest, Ending> {
    let unusable = |why: String| Ending { exit: Exit::Usage, verdict: why };
    let shown = path.display().to_string();
    let (done, manifest) = tokio::sync::oneshot::channel();
    let reader = std::thread::Builder::new().name("manifest".to_owned()).spawn(move || {
        let mut next = Instant::now() + READING_EVERY;
        let told = |lines: usize| {
            if lines.is_multiple_of(4096) && Instant::now() >= next {
                next = Instant::now() + READING_EVERY;
                report.notice(&format!("reading the list: {lines} lines so far"));
            }
        };
        let manifest = if path.as_os_str() == "-" {
            Manifest::read(io::stdin().lock(), told)
        } else {
            let file = std::fs::File::open(path).map_err(Into::into);
            file.and_then(|file| Manifest::read(BufReader::with_capacity(1 << 16, file), told))
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
