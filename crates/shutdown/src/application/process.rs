//! The end of the process, as a last resort on an OS thread, and the end of the runtime. Unnamed work in the runtime
//! (given to `tokio::spawn` and `spawn_blocking` without a group) is counted, and blamed only if it holds the runtime
//! up.
//!
//! Invariant: whatever the runtime does, the process is gone soon after the deadline. The watchdog uses only the
//! system's clock, so a paused tokio clock does not hold it up, and it runs none of the user's code.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};

use crate::report::{EXIT_STRAGGLERS, Unnamed};
use crate::signal;
use crate::state::Core;
use crate::state::stages::Stage;
use crate::state::voice::LAST_WORDS;
use crate::tree::SAMPLE;

/// How long after the deadline the runtime may still report by itself, which lets `run` return as usual.
const OVERTIME: Duration = Duration::from_millis(45);
/// How long `run` may take to return after the callbacks have returned.
const RETURN: Duration = Duration::from_millis(30);
/// How long a task may take to leave the runtime after its end was recorded.
const LEAVING: Duration = Duration::from_millis(3);
/// How long the runtime may take to end when work that is already in the report holds its threads.
const RUNTIME_TIMEOUT: Duration = Duration::from_millis(500);

/// Ends the process at the deadline, unless it is dropped earlier.
#[derive(Debug)]
pub(crate) struct Watchdog {
    core: Arc<Core>,
}

impl Watchdog {
    pub(crate) fn start(core: Arc<Core>) -> io::Result<Self> {
        let watched = Arc::clone(&core);
        let watch = move || {
            let Some(deadline) = watched.ending.deadline() else { return };
            if !watched.ending.reached(Stage::Over, deadline + OVERTIME) {
                end_process(&watched, EXIT_STRAGGLERS);
            }
        };
        thread::Builder::new().name("shutdown-watchdog".to_owned()).spawn(watch)?;
        Ok(Self { core })
    }

    /// How long the callbacks may take when the runtime reports by itself. `remaining` is the time left until the
    /// deadline.
    pub(crate) fn patience(remaining: Duration) -> Duration {
        remaining.clamp(LAST_WORDS, Duration::from_secs(1))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.core.ending.over();
    }
}

/// Reports and ends the process. Returns only if `run` is about to return.
pub(crate) fn end_process(core: &Core, code: u8) {
    let ending = &core.ending;
    let Some(voice) = ending.claim() else {
        // Another thread began to report just in time. It gets as long as the report would have taken here.
        ending.reached(Stage::Told, Instant::now() + LAST_WORDS);
        if !ending.reached(Stage::Over, Instant::now() + RETURN) {
            signal::exit(code);
        }
        return;
    };
    let nodes = core.nodes();
    let looks: Vec<_> = nodes.iter().map(|(node, _)| node.look()).collect();
    if looks.iter().any(|looks| !looks.is_empty()) {
        // A sleep: nobody else ends what this thread has claimed.
        ending.reached(Stage::Over, Instant::now() + SAMPLE);
    }
    for ((node, starved), looks) in nodes.iter().zip(&looks) {
        node.cut(looks, *starved);
    }
    let unnamed = unnamed_tasks(core);
    for (node, _) in nodes {
        node.abandon();
    }
    // The runtime would have ended by its own deadline if nothing held it up.
    let held = code == EXIT_STRAGGLERS && !core.ledger.holds_threads();
    voice.deliver(core.report(count(core, unnamed, held)), Some(code), LAST_WORDS);
    signal::exit(code);
}

/// The runtime of an application that brings none. It counts its threads. In a runtime that the user builds, the hooks
/// for counting belong to the user.
pub(crate) fn counting_builder(core: &Core) -> Builder {
    let (started, stopped) = (Arc::clone(&core.threads), Arc::clone(&core.threads));
    core.counts_threads.store(true, Ordering::Relaxed);
    let mut builder = Builder::new_multi_thread();
    builder
        .on_thread_start(move || {
            started.fetch_add(1, Ordering::AcqRel);
        })
        .on_thread_stop(move || {
            stopped.fetch_sub(1, Ordering::AcqRel);
        });
    builder
}

/// How many tasks are alive that the application does not know.
fn unnamed_tasks(core: &Core) -> usize {
    let Some(runtime) = core.runtime.get() else { return 0 };
    let ours = || core.named_futures() + core.ledger.abandoned_futures();
    let begun = Instant::now();
    loop {
        // A task that has reported its end is alive for a moment longer.
        let open = usize::try_from(core.probe.open()).unwrap_or_default();
        let unnamed = runtime.metrics().num_alive_tasks().saturating_sub(ours() + open);
        if unnamed == 0 || begun.elapsed() > LEAVING {
            return unnamed;
        }
        thread::park_timeout(LEAVING / 10);
    }
}

/// Ends a runtime whose workers have all ended, and counts what else it ran.
///
/// A plain drop would wait for blocking closures for as long as they take. Here they have until the deadline, unless
/// named work holds the runtime's threads.
pub(crate) fn end_runtime(core: &Core, runtime: Runtime) -> Unnamed {
    let tasks = unnamed_tasks(core);
    let is_cut = core.ledger.is_cut();
    let limit = if is_cut { core.remaining().min(RUNTIME_TIMEOUT) } else { core.remaining() };
    let begun = Instant::now();
    runtime.shutdown_timeout(limit);
    count(core, tasks, !is_cut && begun.elapsed() >= limit)
}

/// What to report of `tasks`, and of the runtime's threads if they were `held` and did not end.
fn count(core: &Core, tasks: usize, held: bool) -> Unnamed {
    // Where the threads are not counted, it was at least one.
    let counted = core.counts_threads.load(Ordering::Relaxed).then(|| core.threads.load(Ordering::Acquire));
    Unnamed { tasks, threads: if held { counted.unwrap_or(1).max(1) } else { 0 } }
}
