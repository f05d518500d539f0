//! The last resort, on an OS thread: whatever the runtime does, the process is gone soon after the deadline. It waits by
//! the clock of the system alone, so a paused clock of tokio's does not hold it up.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use crate::report::EXIT_STRAGGLERS;
use crate::signal;
use crate::stop::StopReason;
use crate::supervisor::Core;
use crate::tree::SAMPLE;
use crate::voice::LAST_WORDS;

/// How long after the deadline the runtime may still report by itself, which lets `run` return as usual.
const OVERTIME: Duration = Duration::from_millis(45);
/// How long the runtime may take to begin with a stop before it counts as wedged.
const REACTION: Duration = Duration::from_millis(20);
/// How long `run` may take to return when the callbacks have.
const RETURN: Duration = Duration::from_millis(30);

/// Ends the process at the deadline, unless it is dropped before.
#[derive(Debug)]
pub(crate) struct Watchdog {
    core: Arc<Core>,
    thread: Thread,
}

impl Watchdog {
    pub(crate) fn start(core: Arc<Core>) -> io::Result<Self> {
        let watched = Arc::clone(&core);
        let watch = move || watch(&watched);
        let thread = thread::Builder::new().name("shutdown-watchdog".to_owned()).spawn(watch)?.thread().clone();
        Ok(Self { core, thread })
    }

    /// How long the callbacks may take when the runtime reports by itself, this long before the deadline or after it.
    pub(crate) fn patience(remaining: Duration) -> Duration {
        remaining.clamp(LAST_WORDS, Duration::from_secs(1))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.core.over.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

fn watch(core: &Core) {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut stopped = pin!(core.stop.token().cancelled());
    while stopped.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
        if core.over.load(Ordering::Acquire) {
            return;
        }
        thread::park();
    }
    // Whoever cancelled the shutdown handle itself left no reason, and a wedged runtime will not give one.
    core.request(StopReason::Requested);
    let begun = Instant::now();
    let delay = core.stop.get().map_or(Duration::ZERO, |stopping| core.delay(&stopping.reason));
    if delay < core.budget && sleep(delay.saturating_add(REACTION), &core.over) {
        core.nudge();
    }
    if sleep(core.budget.saturating_add(OVERTIME).saturating_sub(begun.elapsed()), &core.over) {
        end_process(core, EXIT_STRAGGLERS);
    }
}

/// Reports and ends the process. Returns only if `run` is about to return.
pub(crate) fn end_process(core: &Core, code: u8) {
    let Some(voice) = core.take_voice() else {
        // Somebody else has begun to report just in time, and gets as long as it would have taken here.
        await_callbacks(core);
        if sleep(RETURN, &core.over) {
            signal::exit(code);
        }
        return;
    };
    let nodes = core.nodes();
    let slots: Vec<_> = nodes.iter().flat_map(|node| node.live()).map(|slot| (slot.pulse(), slot)).collect();
    if !slots.is_empty() {
        sleep(SAMPLE, &AtomicBool::new(false));
    }
    for (earlier, slot) in slots {
        slot.cut(slot.judge(earlier));
    }
    for node in nodes {
        node.abandon();
    }
    voice.deliver(core.report(), Some(code), LAST_WORDS);
    signal::exit(code);
}

/// Waits until the callbacks have returned or need not any more. It is a matter of microseconds unless one hangs or the
/// machine is overloaded, so looking once a millisecond costs less than being told.
fn await_callbacks(core: &Core) {
    let begun = Instant::now();
    let awaited = || !core.told.load(Ordering::Acquire) && !core.over.load(Ordering::Acquire);
    while awaited() && begun.elapsed() < LAST_WORDS {
        thread::park_timeout(Duration::from_millis(1));
    }
}

/// Sleeps for `duration` and returns true, or returns false as soon as `off` is set.
fn sleep(duration: Duration, off: &AtomicBool) -> bool {
    let begun = Instant::now();
    while !off.load(Ordering::Acquire) {
        match duration.saturating_sub(begun.elapsed()) {
            Duration::ZERO => return true,
            rest => thread::park_timeout(rest),
        }
    }
    false
}
