//! The end of the process: the last resort, on an OS thread, and the end of the runtime, whose unnamed work (what a worker
//! gave to `tokio::spawn` and `spawn_blocking` without a group) is counted, and blamed only if it holds the runtime up.
//!
//! Invariant: whatever the runtime does, the process is gone soon after the deadline. The watchdog waits by the clock of the
//! system alone, so a paused clock of tokio's does not hold it up, and it runs no code of the user's.

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
use crate::tree::{Node, SAMPLE};

/// How long after the deadline the runtime may still report by itself, which lets `run` return as usual.
const OVERTIME: Duration = Duration::from_millis(45);
/// How long `run` may take to return when the callbacks have.
const RETURN: Duration = Duration::from_millis(30);
/// How long a task whose end has been told may take to leave the runtime.
const LEAVING: Duration = Duration::from_millis(3);
/// How long the runtime may take to end when its threads are held by work that is in the report already.
const RUNTIME_TIMEOUT: Duration = Duration::from_millis(500);

/// Ends the process at the deadline, unless it is dropped before.
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

    /// How long the callbacks may take when the runtime reports by itself, this long before the deadline or after it.
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
        // Somebody else has begun to report just in time, and gets as long as it would have taken here.
        ending.reached(Stage::Told, Instant::now() + LAST_WORDS);
        if !ending.reached(Stage::Over, Instant::now() + RETURN) {
            signal::exit(code);
        }
        return;
    };
    let nodes = core.nodes();
    let live = |(node, starved): &(Arc<dyn Node>, bool)| {
        let starved = *starved;
        node.live().into_iter().map(move |slot| (slot.pulse(), slot, starved))
    };
    let slots: Vec<_> = nodes.iter().flat_map(live).collect();
    if !slots.is_empty() {
        // A sleep: nobody else ends what this thread has claimed.
        ending.reached(Stage::Over, Instant::now() + SAMPLE);
    }
    for (earlier, slot, starved) in slots {
        slot.cut(slot.judge(earlier, starved));
    }
    let unnamed = unnamed_tasks(core);
    for (node, _) in nodes {
        node.abandon();
    }
    // By its own deadline the runtime would have ended if nothing held it up.
    let held = code == EXIT_STRAGGLERS && !core.ledger.holds_threads();
    voice.deliver(core.report(count(core, unnamed, held)), Some(code), LAST_WORDS);
    signal::exit(code);
}

/// The runtime of an application that brings none. It counts its threads; in a runtime of the user's, the hooks for that
/// are the user's too.
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

/// How many tasks are alive that the application knows nothing of.
fn unnamed_tasks(core: &Core) -> usize {
    let Some(runtime) = core.runtime.get() else { return 0 };
    let ours = || core.named_futures() + core.ledger.abandoned_futures();
    let begun = Instant::now();
    loop {
        // Those that have told their end are alive for a moment longer.
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
/// Not by a plain drop, which waits for blocking closures for as long as they take. They have until the deadline, unless
/// it is named work that holds the runtime's threads.
pub(crate) fn end_runtime(core: &Core, runtime: Runtime) -> Unnamed {
    let tasks = unnamed_tasks(core);
    let is_cut = core.ledger.is_cut();
    let limit = if is_cut { core.remaining().min(RUNTIME_TIMEOUT) } else { core.remaining() };
    let begun = Instant::now();
    runtime.shutdown_timeout(limit);
    count(core, tasks, !is_cut && begun.elapsed() >= limit)
}

/// What there is to report of `tasks`, and of threads of the runtime's that did not end if they were `held`.
fn count(core: &Core, tasks: usize, held: bool) -> Unnamed {
    // Where the threads are not counted, it was at least one.
    let counted = core.counts_threads.load(Ordering::Relaxed).then(|| core.threads.load(Ordering::Acquire));
    Unnamed { tasks, threads: if held { counted.unwrap_or(1).max(1) } else { 0 } }
}
