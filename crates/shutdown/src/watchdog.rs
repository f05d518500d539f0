//! The last resort, on an OS thread: whatever the runtime does, the process is gone soon after the deadline. It waits by
//! the clock of the system alone, so a paused clock of tokio's does not hold it up, and it runs no code of the user's.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::report::EXIT_STRAGGLERS;
use crate::signal;
use crate::stages::Stage;
use crate::state::Core;
use crate::tree::SAMPLE;
use crate::unnamed;
use crate::voice::LAST_WORDS;

/// How long after the deadline the runtime may still report by itself, which lets `run` return as usual.
const OVERTIME: Duration = Duration::from_millis(45);
/// How long `run` may take to return when the callbacks have.
const RETURN: Duration = Duration::from_millis(30);

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
    let live = |(node, starved): &(Arc<_>, bool)| {
        let starved = *starved;
        crate::tree::Node::live(&**node).into_iter().map(move |slot| (slot.pulse(), slot, starved))
    };
    let slots: Vec<_> = nodes.iter().flat_map(live).collect();
    if !slots.is_empty() {
        // A sleep: nobody else ends what this thread has claimed.
        ending.reached(Stage::Over, Instant::now() + SAMPLE);
    }
    for (earlier, slot, starved) in slots {
        slot.cut(slot.judge(earlier, starved));
    }
    let unnamed = unnamed::tasks(core);
    for (node, _) in nodes {
        node.abandon();
    }
    // By its own deadline the runtime would have ended if nothing held it up.
    let held = code == EXIT_STRAGGLERS && !core.ledger.holds_threads();
    voice.deliver(core.report(unnamed::count(core, unnamed, held)), Some(code), LAST_WORDS);
    signal::exit(code);
}
