//! The end of a process, peer by peer: real signals to a child that runs one worker called `outbox`, and how it ended.
//!
//! Each peer is used as in its own documentation, with a deadline of two seconds. `JoinSet`, `JoinMap`, `TaskTracker`
//! and `async-shutdown` handle neither signals nor exit codes: they share the usual handwritten lines.
#![expect(clippy::print_stderr, reason = "a child speaks to its parent")]

use std::future::pending;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use cancel_safe_benches::Table;
use cancel_safe_shutdown::{Application, WorkerContext};
use rustix::process::{Pid, Signal, kill_process};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_graceful_shutdown::{SubsystemBuilder, SubsystemHandle, Toplevel};
use tokio_util::sync::CancellationToken;
use tokio_util::task::{JoinMap, TaskTracker};

/// The variable that turns this process into a child.
const CHILD: &str = "SHUTDOWN_BENCH_CHILD";
const DEADLINE: Duration = Duration::from_secs(2);
/// How much an end may miss its bound.
const SLACK: Duration = Duration::from_millis(100);
/// How long work that must be stopped continues, and when a child counts as hanging.
const STALL: Duration = Duration::from_secs(12);
const HANGS: Duration = Duration::from_secs(15);

type Run = fn(Runtime, What) -> ExitCode;

/// How each peer runs the worker. Ours brings its own runtime.
const PEERS: [(&str, Run); 6] = [
    ("cancel-safe-shutdown", |_, _| ExitCode::FAILURE),
    ("tokio-graceful-shutdown", graceful),
    ("async-shutdown", |runtime, what| runtime.block_on(async_shutdown(what))),
    ("TaskTracker", |runtime, what| runtime.block_on(tracker(what))),
    ("JoinSet", |runtime, what| runtime.block_on(set(what))),
    ("JoinMap", |runtime, what| runtime.block_on(map(what))),
];

/// What the worker does.
#[derive(Debug, Clone, Copy, PartialEq)]
enum What {
    Drains,
    /// The same, in a program with a pause between its setup and its run.
    StartsLate,
    IsDeaf,
    Panics,
    Fails,
    Blocks,
    Spins,
}

const ALL: [What; 7] =
    [What::Drains, What::StartsLate, What::IsDeaf, What::Panics, What::Fails, What::Blocks, What::Spins];

/// One scenario: what the worker does, on how many threads, the signals and the time between them, and the expected
/// end.
struct Scenario {
    title: &'static str,
    what: What,
    threads: usize,
    signals: &'static [(Signal, Duration)],
    must: Must,
}

enum Must {
    /// Exit 0, and the work in hand is done.
    Drain,
    /// Not 0, by the deadline, with the name of the worker.
    CutByDeadline,
    /// Not 0, at once.
    EndAtOnce,
    /// Not 0, with this text.
    Tell(&'static str),
}

const NOW: Duration = Duration::ZERO;
const SCENARIOS: [Scenario; 11] = [
    Scenario { title: "SIGTERM", what: What::Drains, threads: 2, signals: &[(Signal::TERM, NOW)], must: Must::Drain },
    Scenario { title: "SIGINT", what: What::Drains, threads: 2, signals: &[(Signal::INT, NOW)], must: Must::Drain },
    Scenario {
        title: "SIGTERM between setup and run",
        what: What::StartsLate,
        threads: 2,
        signals: &[(Signal::TERM, NOW)],
        must: Must::Drain,
    },
    Scenario {
        title: "SIGTERM twice, 20 ms apart",
        what: What::Drains,
        threads: 2,
        signals: &[(Signal::TERM, NOW), (Signal::TERM, Duration::from_millis(20))],
        must: Must::Drain,
    },
    Scenario {
        title: "the worker ignores its token",
        what: What::IsDeaf,
        threads: 2,
        signals: &[(Signal::INT, NOW)],
        must: Must::CutByDeadline,
    },
    Scenario {
        title: "the same, SIGINT again at 1.3 s",
        what: What::IsDeaf,
        threads: 2,
        signals: &[(Signal::INT, NOW), (Signal::INT, Duration::from_millis(1300))],
        must: Must::EndAtOnce,
    },
    Scenario {
        title: "the worker panics",
        what: What::Panics,
        threads: 2,
        signals: &[],
        must: Must::Tell("the pipe burst"),
    },
    Scenario {
        title: "the worker returns an error",
        what: What::Fails,
        threads: 2,
        signals: &[],
        must: Must::Tell("the disk is full"),
    },
    Scenario {
        title: "12 s of `spawn_blocking`",
        what: What::Blocks,
        threads: 2,
        signals: &[(Signal::INT, NOW)],
        must: Must::CutByDeadline,
    },
    Scenario {
        title: "the worker never yields, two threads",
        what: What::Spins,
        threads: 2,
        signals: &[(Signal::INT, NOW)],
        must: Must::CutByDeadline,
    },
    Scenario {
        title: "the worker never yields, one thread",
        what: What::Spins,
        threads: 0,
        signals: &[(Signal::INT, NOW)],
        must: Must::CutByDeadline,
    },
];

/// Runs this process as a child if it is one.
pub(crate) fn child() -> Option<ExitCode> {
    let order = std::env::var(CHILD).ok()?;
    let mut words = order.split(' ');
    let peer = words.next()?;
    let what = words.next().and_then(|word| ALL.into_iter().find(|what| format!("{what:?}") == word))?;
    let mut builder =
        if words.next() == Some("0") { Builder::new_current_thread() } else { Builder::new_multi_thread() };
    builder.enable_all();
    if peer == PEERS[0].0 {
        return Some(ours(builder, what));
    }
    let (_, run) = PEERS.iter().find(|(name, _)| *name == peer)?;
    Some(run(builder.worker_threads(2).build().ok()?, what))
}

/// Prints the table of all scenarios.
pub(crate) fn run_all() {
    let mut table = Table::new(std::iter::once("").chain(PEERS.iter().map(|(name, _)| *name)));
    let mut passed = PEERS.map(|_| 0_usize);
    for scenario in &SCENARIOS {
        let cells: Vec<_> = PEERS.iter().map(|(peer, _)| scenario.run(peer)).collect();
        for (count, (_, is_right)) in passed.iter_mut().zip(&cells) {
            *count += usize::from(*is_right);
        }
        table.row(scenario.title, cells.into_iter().map(|(cell, _)| cell));
    }
    table.row(&format!("right, of {}", SCENARIOS.len()), passed.map(|count| count.to_string()));
    table.print();
}

impl Scenario {
    fn run(&self, peer: &str) -> (String, bool) {
        let order = format!("{peer} {:?} {}", self.what, self.threads);
        let exe = std::env::current_exe().expect("this file is there");
        let mut child = Command::new(exe)
            .env(CHILD, order)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("this file runs");
        let lines = listen(&mut child);
        let mut text = String::new();
        let mut last = Instant::now();
        if !self.signals.is_empty() {
            while !text.contains("READY") {
                text += &lines.recv_timeout(HANGS).expect("it is ready");
            }
            for (signal, after) in self.signals {
                pause(*after);
                last = Instant::now();
                // An error is a child that has ended.
                let _ended = kill_process(Pid::from_child(&child), *signal);
            }
        }
        let ended = loop {
            if let Some(status) = child.try_wait().expect("a child of ours") {
                break Some((status, last.elapsed()));
            }
            if last.elapsed() > HANGS {
                drop(child.kill());
                drop(child.wait());
                break None;
            }
            pause(Duration::from_millis(1));
        };
        text.extend(lines.iter());
        let Some((status, elapsed)) = ended else { return ("hangs".to_owned(), false) };
        let named = text.split("READY").last().is_some_and(|text| text.contains("outbox"));
        let failed = status.code() != Some(0);
        let (is_right, note) = match self.must {
            Must::Drain => {
                (!failed && text.contains("DRAINED"), if text.contains("DRAINED") { "" } else { ", not drained" })
            }
            Must::CutByDeadline => {
                (failed && named && elapsed <= DEADLINE + SLACK, if named { "" } else { ", unnamed" })
            }
            Must::EndAtOnce => (failed && elapsed <= SLACK, ""),
            Must::Tell(cause) => (failed && text.contains(cause), if text.contains(cause) { "" } else { ", silent" }),
        };
        let code = status.code().map_or_else(|| "killed".to_owned(), |code| code.to_string());
        let mark = if is_right { "" } else { "**wrong**: " };
        (format!("{mark}{code} after {:.2} s{note}", elapsed.as_secs_f64()), is_right)
    }
}

/// The lines of the standard error as they arrive.
fn listen(child: &mut Child) -> Receiver<String> {
    let stderr = BufReader::new(child.stderr.take().expect("it is piped"));
    let (send, lines) = channel();
    std::thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| send.send(line + "\n")));
    lines
}

#[expect(clippy::disallowed_methods, reason = "nothing but time is waited for here")]
fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// The setup is done, and the run is next.
fn set_up(what: What) {
    if what == What::StartsLate {
        eprintln!("READY");
        pause(Duration::from_millis(300));
    }
}

/// The worker. `told` is the peer's request to stop.
async fn work(what: What, told: impl Future<Output = ()>) -> Result<(), std::io::Error> {
    match what {
        What::Panics => panic!("the pipe burst"),
        What::Fails => return Err(std::io::Error::other("the disk is full")),
        What::StartsLate => {}
        _ => eprintln!("READY"),
    }
    match what {
        What::IsDeaf => pending().await,
        What::Blocks => drop(tokio::task::spawn_blocking(|| pause(STALL)).await),
        What::Spins => pause(STALL),
        _ => {
            told.await;
            sleep(Duration::from_millis(50)).await;
            eprintln!("DRAINED");
        }
    }
    Ok(())
}

fn ours(runtime: Builder, what: What) -> ExitCode {
    let worker = move |cx: WorkerContext| async move { work(what, cx.cancelled_owned()).await };
    let app = Application::new("bench").runtime(runtime).shutdown_timeout(DEADLINE).worker("outbox", worker);
    set_up(what);
    if what == What::StartsLate {
        // A worker that is told to stop before it starts has nothing in hand.
        eprintln!("DRAINED");
    }
    app.run()
}

fn graceful(runtime: Runtime, what: What) -> ExitCode {
    let ended = runtime.block_on(async {
        let outbox = async move |subsystem: &mut SubsystemHandle| work(what, subsystem.on_shutdown_requested()).await;
        let top = Toplevel::new(async move |top: &mut SubsystemHandle| {
            top.start(SubsystemBuilder::new("outbox", outbox));
        });
        set_up(what);
        top.catch_signals().handle_shutdown_requests(DEADLINE).await
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:?}");
            ExitCode::FAILURE
        }
    }
}

/// Waits for one of the two signals.
async fn told() {
    let mut terminate = signal(SignalKind::terminate()).expect("a handler");
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}

fn late(name: &str) -> ExitCode {
    eprintln!("not ended in time: {name}");
    ExitCode::from(70)
}

async fn async_shutdown(what: What) -> ExitCode {
    let shutdown = async_shutdown::ShutdownManager::<u8>::new();
    set_up(what);
    let (stop, worker) = (shutdown.clone(), shutdown.clone());
    tokio::spawn(async move {
        told().await;
        drop(stop.trigger_shutdown(0));
    });
    tokio::spawn(async move {
        let Ok(_delay) = worker.delay_shutdown_token() else { return };
        // Its end stops everything, even if it panics.
        let _critical = worker.trigger_shutdown_token(1);
        let stopping = async {
            worker.wait_shutdown_triggered().await;
        };
        if let Err(error) = work(what, stopping).await {
            eprintln!("outbox: {error}");
        }
    });
    shutdown.wait_shutdown_triggered().await;
    match timeout(DEADLINE, shutdown.wait_shutdown_complete()).await {
        Ok(code) => ExitCode::from(code),
        Err(_) => late("?"),
    }
}

async fn tracker(what: What) -> ExitCode {
    let (tracker, token) = (TaskTracker::new(), CancellationToken::new());
    set_up(what);
    let stop = token.clone();
    tracker.spawn(async move {
        if let Err(error) = work(what, stop.cancelled()).await {
            eprintln!("outbox: {error}");
        }
    });
    tracker.close();
    tokio::select! {
        () = told() => {}
        () = tracker.wait() => {}
    }
    token.cancel();
    match timeout(DEADLINE, tracker.wait()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => late("?"),
    }
}

async fn set(what: What) -> ExitCode {
    let (mut set, token) = (JoinSet::new(), CancellationToken::new());
    set_up(what);
    let stop = token.clone();
    set.spawn(async move { work(what, stop.cancelled()).await });
    let mut failed = false;
    let mut join = async |set: &mut JoinSet<_>| {
        while let Some(ended) = set.join_next().await {
            if !matches!(ended, Ok(Ok(()))) {
                eprintln!("{ended:?}");
                failed = true;
                break;
            }
        }
    };
    tokio::select! {
        () = told() => {}
        () = join(&mut set) => {}
    }
    token.cancel();
    if timeout(DEADLINE, join(&mut set)).await.is_err() {
        return late("?");
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

async fn map(what: What) -> ExitCode {
    let (mut map, token) = (JoinMap::new(), CancellationToken::new());
    set_up(what);
    let stop = token.clone();
    map.spawn("outbox", async move { work(what, stop.cancelled()).await });
    let mut failed = false;
    let mut join = async |map: &mut JoinMap<&str, _>| {
        while let Some((name, ended)) = map.join_next().await {
            if !matches!(ended, Ok(Ok(()))) {
                eprintln!("{name}: {ended:?}");
                failed = true;
                break;
            }
        }
    };
    tokio::select! {
        () = told() => {}
        () = join(&mut map) => {}
    }
    token.cancel();
    if timeout(DEADLINE, join(&mut map)).await.is_err() {
        let names: Vec<_> = map.keys().copied().collect();
        return late(&names.join(", "));
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
