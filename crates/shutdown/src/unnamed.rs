//! Work that nobody has named: what a worker gave to `tokio::spawn` and `spawn_blocking` without a group. It is counted,
//! and blamed only if it keeps the runtime from ending.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};

use crate::report::Unnamed;
use crate::state::Core;

/// How long a task whose end has been told may take to leave the runtime.
const LEAVING: Duration = Duration::from_millis(3);
/// How long the runtime may take to end when its threads are held by work that is in the report already.
const RUNTIME_TIMEOUT: Duration = Duration::from_millis(500);

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
pub(crate) fn tasks(core: &Core) -> usize {
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
pub(crate) fn end(core: &Core, runtime: Runtime) -> Unnamed {
    let tasks = tasks(core);
    let is_cut = core.ledger.is_cut();
    let limit = if is_cut { core.remaining().min(RUNTIME_TIMEOUT) } else { core.remaining() };
    let begun = Instant::now();
    runtime.shutdown_timeout(limit);
    count(core, tasks, !is_cut && begun.elapsed() >= limit)
}

/// What there is to report of `tasks`, and of threads of the runtime's that did not end if they were `held`.
pub(crate) fn count(core: &Core, tasks: usize, held: bool) -> Unnamed {
    // Where the threads are not counted, it was at least one.
    let counted = core.counts_threads.load(Ordering::Relaxed).then(|| core.threads.load(Ordering::Acquire));
    Unnamed { tasks, threads: if held { counted.unwrap_or(1).max(1) } else { 0 } }
}
