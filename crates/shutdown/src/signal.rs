//! Signals, on an OS thread of their own: a wedged runtime cannot keep one from being seen. SIGINT and SIGTERM stop;
//! copies of one signal, delivered twice within a quiet time, are one signal.

use std::io;
use std::time::Duration;
#[cfg(all(unix, feature = "signal"))]
use std::time::Instant;

#[cfg(all(unix, feature = "signal"))]
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};

/// A signal that does not stop an application; see [`on_signal`](crate::Application::on_signal).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Signal {
    /// SIGHUP, by custom the request to read the configuration again. Without an action it ends the process.
    Hangup,
    /// SIGQUIT, or Ctrl-\ on a terminal. Without an action, [`run`](crate::Application::run) lists on the standard error
    /// what is alive.
    Quit,
    /// SIGUSR1. Without an action it ends the process.
    User1,
    /// SIGUSR2. Without an action it ends the process.
    User2,
}

#[cfg(all(unix, feature = "signal"))]
impl Signal {
    fn number(self) -> i32 {
        match self {
            Self::Hangup => SIGHUP,
            Self::Quit => SIGQUIT,
            Self::User1 => SIGUSR1,
            Self::User2 => SIGUSR2,
        }
    }

    fn of(number: i32) -> Option<Self> {
        [Self::Hangup, Self::Quit, Self::User1, Self::User2].into_iter().find(|signal| signal.number() == number)
    }
}

/// What is done with the signals.
pub(crate) struct Forward<F, S, O> {
    /// How long after the first one another is a copy of it.
    pub(crate) quiet: Duration,
    /// Called with the first signal that stops.
    pub(crate) first: F,
    /// Called with each one after the quiet time.
    pub(crate) second: S,
    /// Called with those that do not stop.
    pub(crate) other: O,
}

/// The installed handlers. Signals that arrive before [`Signals::forward`] are kept for it.
#[derive(Debug)]
pub(crate) struct Signals {
    #[cfg(all(unix, feature = "signal"))]
    source: signal_hook::iterator::Signals,
}

/// Ends the thread that forwards signals when it is dropped.
#[derive(Debug)]
pub(crate) struct Forwarding {
    #[cfg(all(unix, feature = "signal"))]
    handle: signal_hook::iterator::Handle,
}

#[cfg(all(unix, feature = "signal"))]
impl Signals {
    /// From here on neither SIGINT nor SIGTERM ends the process by its default.
    pub(crate) fn install() -> io::Result<Self> {
        let source = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
        unblock(&[SIGINT, SIGTERM])?;
        Ok(Self { source })
    }

    /// Sees to these signals as well, but not to a SIGHUP that `nohup` has had ignored.
    pub(crate) fn add(&self, signals: impl Iterator<Item = Signal>) -> io::Result<()> {
        for signal in signals.filter(|signal| *signal != Signal::Hangup || !is_ignored(SIGHUP)) {
            self.source.handle().add_signal(signal.number())?;
            unblock(&[signal.number()])?;
        }
        Ok(())
    }

    /// Calls `first` with the first signal, and `second` with each that arrives `quiet` after it or later: `timeout`,
    /// npm and others send a process the signal that its group gets as well, and nobody has lost patience then.
    ///
    /// A signal that has arrived already is the first, and `first` has been called with it when this returns.
    pub(crate) fn forward<F, S, O>(mut self, forward: Forward<F, S, O>) -> io::Result<Forwarding>
    where
        F: FnOnce(i32) + Send + 'static,
        S: FnMut(i32) + Send + 'static,
        O: FnMut(Signal) + Send + 'static,
    {
        let Forward { quiet, first, mut second, mut other } = forward;
        let handle = self.source.handle();
        let mut first = Some(first);
        let mut since = Instant::now();
        // Of two that came before anything could react, neither is an impatient second.
        for number in self.source.pending() {
            match Signal::of(number) {
                Some(signal) => other(signal),
                None => first.take().into_iter().for_each(|first| first(number)),
            }
        }
        std::thread::Builder::new().name("shutdown-signals".to_owned()).spawn(move || {
            for number in self.source.forever() {
                if let Some(signal) = Signal::of(number) {
                    other(signal);
                } else if let Some(first) = first.take() {
                    since = Instant::now();
                    first(number);
                } else if since.elapsed() >= quiet {
                    second(number);
                }
            }
        })?;
        Ok(Forwarding { handle })
    }
}

/// Lets this thread, and those it starts from now on, receive these signals. A parent may have started the process with
/// some of them blocked, and a signal that is blocked is never seen.
#[cfg(all(unix, feature = "signal"))]
fn unblock(numbers: &[i32]) -> io::Result<()> {
    let mut set = nix::sys::signal::SigSet::empty();
    for number in numbers {
        set.add(nix::sys::signal::Signal::try_from(*number)?);
    }
    Ok(set.thread_unblock()?)
}

/// Whether the process was started with this signal ignored. Only Linux tells without unsafe code.
#[cfg(all(unix, feature = "signal"))]
fn is_ignored(number: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (number - 1) & 1 == 1)
}

#[cfg(all(unix, feature = "signal"))]
impl Drop for Forwarding {
    fn drop(&mut self) {
        self.handle.close();
    }
}

#[cfg(not(all(unix, feature = "signal")))]
impl Signals {
    pub(crate) fn install() -> io::Result<Self> {
        Ok(Self {})
    }

    pub(crate) fn add(&self, _signals: impl Iterator<Item = Signal>) -> io::Result<()> {
        Ok(())
    }

    pub(crate) fn forward<F, S, O>(self, forward: Forward<F, S, O>) -> io::Result<Forwarding>
    where
        F: FnOnce(i32) + Send + 'static,
        S: FnMut(i32) + Send + 'static,
        O: FnMut(Signal) + Send + 'static,
    {
        let Forward { quiet, first, second, other } = forward;
        // Nothing will ever call them.
        let _unused = (quiet, first, second, other);
        Ok(Forwarding {})
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
