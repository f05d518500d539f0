//! Signals, on their own OS thread, so that a wedged runtime cannot hide one. SIGINT and SIGTERM stop the application,
//! as do the console's events on Windows; copies of a signal within the quiet time count as one signal.

#[cfg(not(all(any(unix, windows), feature = "signal")))]
#[path = "signal/none.rs"]
mod system;
#[cfg(all(unix, feature = "signal"))]
#[path = "signal/unix.rs"]
mod system;
#[cfg(all(windows, feature = "signal"))]
#[path = "signal/windows.rs"]
mod system;

use std::time::{Duration, Instant};

pub(crate) use system::{Forwarding, Signals};

/// The number of SIGINT, everywhere.
pub(crate) const INTERRUPT: i32 = 2;
/// The number of SIGTERM, everywhere.
#[cfg(any(all(windows, feature = "signal"), feature = "test-util"))]
pub(crate) const TERMINATE: i32 = 15;

/// A signal that does not stop an application; see [`on_signal`](crate::Application::on_signal).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Signal {
    /// SIGHUP, by convention the request to reread the configuration. Without an action it ends the process.
    Hangup,
    /// SIGQUIT, or Ctrl-\ on a terminal. Without an action, [`run`](crate::Application::run) lists on standard error
    /// what is alive.
    Quit,
    /// SIGUSR1. Without an action it ends the process.
    User1,
    /// SIGUSR2. Without an action it ends the process.
    User2,
}

/// What to do with the signals.
pub(crate) struct Forward<F, S, O> {
    quiet: Duration,
    /// `None` after the first signal that stops.
    first: Option<F>,
    second: S,
    other: O,
    /// When the first one came.
    since: Instant,
}

impl<F, S, O> Forward<F, S, O>
where
    F: FnOnce(i32) + Send + 'static,
    S: FnMut(i32) + Send + 'static,
    O: FnMut(Signal) + Send + 'static,
{
    /// Calls `first` with the first signal that stops, and `second` with each one that arrives `quiet` after it or
    /// later. Earlier ones are copies and show no impatience: `timeout`, npm and others send a process a signal that
    /// its group gets as well. Calls `other` with the signals that do not stop.
    pub(crate) fn new(quiet: Duration, first: F, second: S, other: O) -> Self {
        Self { quiet, first: Some(first), second, other, since: Instant::now() }
    }
}

#[cfg(all(any(unix, windows), feature = "signal"))]
impl<F: FnOnce(i32), S: FnMut(i32), O: FnMut(Signal)> Forward<F, S, O> {
    /// Handles a stop signal that arrived before anything listened. Two of them are never a first and an impatient
    /// second.
    fn kept(&mut self, number: i32) {
        self.first.take().into_iter().for_each(|first| first(number));
    }

    /// Handles a stop signal that has just arrived.
    fn stops(&mut self, number: i32) {
        if let Some(first) = self.first.take() {
            self.since = Instant::now();
            first(number);
        } else if self.since.elapsed() >= self.quiet {
            (self.second)(number);
        }
    }
}

/// Ends the process at once, without running anything that a wedged thread could hold up.
#[cfg(all(unix, feature = "signal"))]
pub(crate) fn exit(code: u8) -> ! {
    signal_hook::low_level::exit(code.into())
}

/// Ends the process. Handlers registered with the C library's `atexit` run first.
#[cfg(not(all(unix, feature = "signal")))]
pub(crate) fn exit(code: u8) -> ! {
    std::process::exit(code.into())
}
