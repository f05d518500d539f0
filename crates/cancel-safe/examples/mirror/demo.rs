//! The demo: lets the plain loop and mirror fetch the same files, kills both with SIGKILL at random moments, starts them
//! again, and counts what is wrong at the end.
//!
//! Invariant: nothing is staged. Both sides have the same origin, the same kills and the same judge, and no child outlives
//! the demo, however it ends.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cancel_safe::shutdown::WorkerContext;
use tokio::process::{Child, ChildStdin, Command};
use url::Url;

use super::cli::{Args, Exit};
use super::job::Ending;
use super::judge::{self, Faults};
use super::origin::{Content, Origin, Progress, Scale};
use super::report::chain;
use super::screen::{Row, Screen, Standing};

/// What to do after the demo, in two lines.
pub(crate) const READ_NEXT: &str = "\
Read next: docs/src/mirror.md, on what is on disk at each moment; the plain loop, the kills and the judge are plain.rs, demo.rs
and judge.rs in crates/cancel-safe/examples/mirror. For code of your own: README.md, on which crate keeps what.";

/// How often each side is killed.
const KILLS: usize = 5;
/// How long a kill waits, at most, after its side has reached the drawn number of files.
const MAX_DELAY: Duration = Duration::from_millis(150);
/// A side that takes longer than this has failed.
const MAX_TIME: Duration = Duration::from_secs(180);
/// A side that receives nothing for this long is shown as waiting.
const PATIENCE: Duration = Duration::from_millis(700);

const NAMES: [&str; 2] = ["plain loop", "mirror"];
/// The directories of both, and their logs.
const PLACES: [&str; 2] = ["plain", "mirror"];
/// The list of served URLs, one per line.
const LIST: &str = "urls.txt";

/// Runs the demo in the directory `--out`. A stop ends it, and its children, at once.
pub(crate) async fn run(args: &Args, cx: &WorkerContext) -> Result<Ending, Ending> {
    tokio::select! {
        biased;
        () = cx.cancelled() => Err(ending(Exit::Interrupted, "stopped, and both clients with it; the next demo starts anew")),
        done = watch(args) => done,
    }
}

fn ending(exit: Exit, verdict: impl Into<String>) -> Ending {
    Ending { exit, verdict: verdict.into() }
}

async fn watch(args: &Args) -> Result<Ending, Ending> {
    let out = args.out();
    let scale = match (args.endless, args.short) {
        (true, _) => Scale::ENDLESS,
        (false, true) => Scale::SHORT,
        (false, false) => Scale::FULL,
    };
    let prepared = tokio::task::spawn_blocking(move || {
        let content = Content::new(scale);
        prepare(&out, &content).map(|lock| (content, lock))
    });
    let (content, _lock) = prepared.await.map_err(|panicked| ending(Exit::Write, panicked.to_string()))??;
    let content = Arc::new(content);
    // Short enough to be typed again.
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    let screen = Screen::new(args.json, NAMES, content.files.len());
    let bytes: usize = content.files.iter().map(|file| file.content.len()).sum();
    screen.note(format!(
        "{} files, {} MB, from five difficult hosts on loopback into {}, twice: by a plain loop (plain.rs) and \
         by mirror. Both are killed with SIGKILL {KILLS} times, at random moments, and started again. The seed is {seed}.",
        content.files.len(),
        bytes / 1_000_000,
        args.out().display(),
    ));
    let side = |index| Side::new(index, &content, &args.out());
    let sides = [side(0)?, side(1)?];
    let run = |index: usize| sides[index].run(fastrand::Rng::with_seed(seed), &screen);
    let both = async { tokio::join!(run(0), run(1)) };
    tokio::pin!(both);
    let mut ticks = tokio::time::interval(screen.interval());
    let ended = loop {
        tokio::select! {
            (plain, mirror) = &mut both => break [plain, mirror],
            _ = ticks.tick() => screen.show([sides[0].standing(), sides[1].standing()]),
        }
    };
    screen.show([sides[0].standing(), sides[1].standing()]);
    screen.note("comparing what both have left with what was served");
    let faults = [sides[0].judge().await?, sides[1].judge().await?];
    screen.table(seed, &table(&sides, &faults, &ended));
    Ok(verdict(&sides[1], &faults[1], &ended[1]))
}

/// Creates the directories and the list of URLs. It removes what an earlier demo left, and touches nothing else: a
/// directory without the demo's mark that holds anything of those names belongs to somebody else.
fn prepare(out: &Path, content: &Content) -> Result<File, Ending> {
    let refuse = |path: PathBuf| {
        move |error: io::Error| ending(Exit::Write, format!("{} cannot be written: {}", path.display(), chain(&error)))
    };
    fs::create_dir_all(out).map_err(refuse(out.to_owned()))?;
    let lock_path = out.join("demo.lock");
    let is_ours = lock_path.exists();
    let places = PLACES.map(|place| out.join(place));
    let list = out.join(LIST);
    let made = PLACES.map(log).map(|name| out.join(name)).into_iter().chain(places.clone()).chain([list.clone()]);
    if let Some(other) = made.into_iter().find(|place| !is_ours && place.symlink_metadata().is_ok()) {
        let verdict = format!("{} is not a demo's; move it aside, or give another --out", other.display());
        return Err(ending(Exit::Usage, verdict));
    }
    let lock = File::create(&lock_path).map_err(refuse(lock_path.clone()))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(ending(Exit::Busy, format!("another demo runs in {}", out.display())));
        }
        Err(TryLockError::Error(error)) => return Err(refuse(lock_path)(error)),
    }
    for place in places {
        match fs::remove_dir_all(&place) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(refuse(place)(error)),
            _ => fs::create_dir(&place).map_err(refuse(place))?,
        }
    }
    let urls: String = content.files.iter().map(|file| format!("{}\n", file.url)).collect();
    fs::write(&list, urls).map_err(refuse(list))?;
    Ok(lock)
}

/// The log file of the client at a place.
fn log(place: &str) -> String {
    format!("{place}.log")
}

/// One of the two clients, with an origin of its own.
struct Side {
    index: usize,
    content: Arc<Content>,
    out: PathBuf,
    origin: Origin,
    started: Instant,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    kills: usize,
    /// Files that were truncated when a writer had just been killed.
    torn: BTreeSet<Url>,
    took: Option<Duration>,
    /// When it last received something, and its progress at that time.
    last: Option<(Instant, Progress)>,
}

/// How a side ended.
#[derive(Debug)]
enum Ended {
    Exit(ExitStatus),
    /// It could not be started, or took too long.
    Failed(String),
}

impl Side {
    fn new(index: usize, content: &Arc<Content>, out: &Path) -> Result<Self, Ending> {
        let origin = Origin::start(content)
            .map_err(|error| ending(Exit::Usage, format!("the embedded origin cannot be started: {error}")))?;
        Ok(Self {
            index,
            content: Arc::clone(content),
            out: out.to_owned(),
            origin,
            started: Instant::now(),
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dir(&self) -> PathBuf {
        self.out.join(PLACES[self.index])
    }

    fn log(&self) -> PathBuf {
        self.out.join(log(PLACES[self.index]))
    }

    /// Runs it to its end, through all kills.
    async fn run(&self, random: fastrand::Rng, screen: &Screen) -> Ended {
        let ended = match tokio::time::timeout(MAX_TIME, self.start_and_kill(random, screen)).await {
            Ok(Ok(status)) => Ended::Exit(status),
            Ok(Err(error)) => Ended::Failed(format!("it cannot be run: {error}")),
            Err(_) => Ended::Failed(format!("it was not through after {MAX_TIME:?}: {}", self.origin.waits())),
        };
        let took = self.started.elapsed();
        self.state().took = Some(took);
        screen.note(format!("{:10} through after {:.1} s", NAMES[self.index], took.as_secs_f64()));
        ended
    }

    async fn start_and_kill(&self, mut random: fastrand::Rng, screen: &Screen) -> io::Result<ExitStatus> {
        let files = self.content.files.len();
        let log = File::create(self.log())?;
        // Not at the very end, where a kill would come too late.
        let mut moments: Vec<usize> = (0..KILLS).map(|_| random.usize(1..=files * 9 / 10)).collect();
        moments.sort_unstable();
        let mut progress = self.origin.progress();
        for (count, moment) in moments.into_iter().enumerate() {
            let delay = MAX_DELAY.mul_f64(random.f64());
            let (mut child, _lifeline) = self.start(&log)?;
            let come = async {
                // The origin lives as long as this side.
                drop(progress.wait_for(|progress| progress.files >= moment).await);
                tokio::time::sleep(delay).await;
            };
            tokio::select! {
                status = child.wait() => return status,
                () = come => {}
            }
            child.start_kill()?;
            let status = child.wait().await?;
            if status.success() {
                // It finished at that very moment.
                return Ok(status);
            }
            let torn = judge::truncated(&self.content.files, &self.dir().join("files"));
            {
                let mut state = self.state();
                state.kills = count + 1;
                state.torn.extend(torn.iter().copied().cloned());
            }
            let come = self.origin.progress().borrow().files;
            screen.note(format!("{:10} killed at {come}/{files} files; {} truncated", NAMES[self.index], torn.len()));
        }
        let (mut child, _lifeline) = self.start(&log)?;
        child.wait().await
    }

    /// Starts the client. It ends when the other end of its standard input is dropped, and so when this process dies.
    fn start(&self, log: &File) -> io::Result<(Child, Option<ChildStdin>)> {
        let mut command = Command::new(std::env::current_exe()?);
        if self.index == 0 {
            command.arg("--plain");
        } else {
            // The demo's options are passed to mirror; if an option comes twice, the last one counts.
            command.args(std::env::args_os().skip(1));
        }
        command.arg("--lifeline").arg("--manifest").arg(self.out.join(LIST)).arg("--out").arg(self.dir());
        for (host, address) in &self.origin.hosts {
            command.arg(format!("--resolve={host}={address}"));
        }
        command.stdin(Stdio::piped()).stdout(log.try_clone()?).stderr(log.try_clone()?).kill_on_drop(true);
        let mut child = command.spawn()?;
        // `Child::wait` would close it.
        let lifeline = child.stdin.take();
        Ok((child, lifeline))
    }

    fn standing(&self) -> Standing {
        let progress = *self.origin.progress().borrow();
        let mut state = self.state();
        let now = Instant::now();
        let since = match state.last {
            Some((since, last)) if last == progress => since,
            _ => now,
        };
        state.last = Some((since, progress));
        let waits = (now - since > PATIENCE).then(|| self.origin.waits()).filter(|waits| !waits.is_empty());
        Standing { progress, kills: state.kills, took: state.took, waits }
    }

    /// Compares what it left with what the origin serves.
    async fn judge(&self) -> Result<Faults, Ending> {
        let dir = self.dir();
        let records = if self.index == 0 {
            judge::progress_file(&dir.join("progress.json"))
        } else {
            // A mirror that was killed before it created a catalogue has no records, and that is counted.
            judge::catalogue(&dir.join("catalog.db")).await.unwrap_or_default()
        };
        let content = Arc::clone(&self.content);
        let judged = tokio::task::spawn_blocking(move || judge::judge(&content.files, &dir.join("files"), &records));
        let unreadable = |why: String| ending(Exit::Write, format!("{} cannot be read: {why}", self.dir().display()));
        judged.await.map_err(|panicked| unreadable(panicked.to_string()))?.map_err(|error| unreadable(chain(&error)))
    }
}

fn table(sides: &[Side; 2], faults: &[Faults; 2], ended: &[Ended; 2]) -> Vec<Row> {
    let of_sides = |count: fn(&Side) -> usize| [count(&sides[0]), count(&sides[1])];
    let of_faults = |count: fn(&Faults) -> usize| [count(&faults[0]), count(&faults[1])];
    let seconds = [&sides[0], &sides[1]].map(|side| side.state().took.unwrap_or_default().as_secs_f64());
    let exits = [&ended[0], &ended[1]].map(|ended| match ended {
        Ended::Exit(status) => status.code().map_or_else(|| status.to_string(), |code| code.to_string()),
        Ended::Failed(_) => "none".to_owned(),
    });
    vec![
        Row::new("killed with SIGKILL", "kills", of_sides(|side| side.state().kills)),
        Row::new(
            "truncated files under their final name, after the kills",
            "torn",
            of_sides(|side| side.state().torn.len()),
        ),
        Row::new(
            "truncated files under their final name, at the end",
            "truncated",
            of_faults(|faults| faults.truncated),
        ),
        Row::new("wrong digests", "wrong", of_faults(|faults| faults.wrong)),
        Row::new("files that are not there", "missing", of_faults(|faults| faults.missing)),
        Row::new("missing records", "unrecorded", of_faults(|faults| faults.unrecorded)),
        Row::new("wrong records", "misrecorded", of_faults(|faults| faults.misrecorded)),
        Row::new("files fetched again", "fetched_again", of_sides(|side| side.origin.fetched_again())),
        Row::new("exit code of the last run", "exit", exits),
        Row::new("seconds", "seconds", seconds),
    ]
}

/// The demo is fine if mirror is; the other side is whatever it is.
fn verdict(mirror: &Side, faults: &Faults, ended: &Ended) -> Ending {
    let log = mirror.log();
    let (torn, kills) = {
        let state = mirror.state();
        (state.torn.len(), state.kills)
    };
    match ended {
        Ended::Exit(status) if status.success() && faults.sum() + torn == 0 => {
            ending(Exit::Complete, format!("mirror has nothing wrong after {kills} kills"))
        }
        Ended::Exit(status) if status.success() => {
            let verdict =
                format!("mirror has {} fault(s) and left {torn} truncated file(s) when it was killed", faults.sum());
            ending(Exit::Failures, verdict)
        }
        Ended::Exit(status) => {
            let exit = if status.code() == Some(Exit::Write as i32) { Exit::Write } else { Exit::Failures };
            let said = fs::read_to_string(&log).unwrap_or_default();
            let last = said.lines().rfind(|line| !line.is_empty()).unwrap_or("nothing");
            ending(exit, format!("mirror ended with {status} and said: {last} (all of it is in {})", log.display()))
        }
        Ended::Failed(why) => ending(Exit::Failures, format!("mirror failed: {why} (see {})", log.display())),
    }
}
