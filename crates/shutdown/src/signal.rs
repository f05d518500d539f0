//! SIGINT and SIGTERM, on an OS thread of their own: a wedged runtime cannot keep a signal from being seen. Copies of one
//! signal, delivered twice within a quiet time, are one signal.

use std::io;
use std::time::Duration;
#[cfg(all(unix, feature = "signal"))]
use std::time::Instant;

#[cfg(all(unix, feature = "signal"))]
use signal_hook::consts::{SIGINT, SIGTERM};

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
    /// From here on neither signal ends the process by its default.
    pub(crate) fn install() -> io::Result<Self> {
        Ok(Self { source: signal_hook::iterator::Signals::new([SIGINT, SIGTERM])? })
    }

    /// Calls `first` with the first signal, and `second` with each that arrives `quiet` after it or later: `timeout`,
    /// npm and others send a process the signal that its group gets as well, and nobody has lost patience then.
    ///
    /// A signal that has arrived already is the first, and `first` has been called with it when this returns.
    pub(crate) fn forward(
        mut self,
        quiet: Duration,
        first: impl FnOnce(i32) + Send + 'static,
        mut second: impl FnMut(i32) + Send + 'static,
    ) -> io::Result<Forwarding> {
        let handle = self.source.handle();
        let mut first = Some(first);
        let mut since = Instant::now();
        // Of two that came before anything could react, neither is an impatient second.
        for signal in self.source.pending() {
            first.take().into_iter().for_each(|first| first(signal));
        }
        std::thread::Builder::new().name("shutdown-signals".to_owned()).spawn(move || {
            for signal in self.source.forever() {
                if let Some(first) = first.take() {
                    since = Instant::now();
                    first(signal);
                } else if since.elapsed() >= quiet {
                    second(signal);
                }
            }
        })?;
        Ok(Forwarding { handle })
    }
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

    pub(crate) fn forward(
        self,
        _quiet: Duration,
        _first: impl FnOnce(i32) + Send + 'static,
        _second: impl FnMut(i32) + Send + 'static,
    ) -> io::Result<Forwarding> {
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
