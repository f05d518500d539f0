//! The signals of Unix. Invariant: once the handlers are installed, no stop signal is lost, and none ends the process
//! by its default action.

use std::io;

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};

use super::{Forward, Signal};

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

/// The installed handlers. Signals that arrive before [`Signals::forward`] are kept for it.
#[derive(Debug)]
pub(crate) struct Signals(signal_hook::iterator::Signals);

/// Ends the thread that forwards signals when it is dropped.
#[derive(Debug)]
pub(crate) struct Forwarding(signal_hook::iterator::Handle);

impl Signals {
    /// From here on neither SIGINT nor SIGTERM ends the process by its default action.
    pub(crate) fn install() -> io::Result<Self> {
        let source = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
        unblock(&[SIGINT, SIGTERM])?;
        Ok(Self(source))
    }

    /// Handles these signals as well, but not a SIGHUP that was already ignored, as `nohup` makes it.
    pub(crate) fn add(&self, signals: impl Iterator<Item = Signal>) -> io::Result<()> {
        for signal in signals.filter(|signal| *signal != Signal::Hangup || !is_ignored(SIGHUP)) {
            self.0.handle().add_signal(signal.number())?;
            unblock(&[signal.number()])?;
        }
        Ok(())
    }

    /// A signal that has already arrived is the first, and is forwarded before this returns.
    pub(crate) fn forward<F, S, O>(self, mut forward: Forward<F, S, O>) -> io::Result<Forwarding>
    where
        F: FnOnce(i32) + Send + 'static,
        S: FnMut(i32) + Send + 'static,
        O: FnMut(Signal) + Send + 'static,
    {
        let Self(mut source) = self;
        let handle = source.handle();
        for number in source.pending() {
            match Signal::of(number) {
                Some(signal) => (forward.other)(signal),
                None => forward.kept(number),
            }
        }
        std::thread::Builder::new().name("shutdown-signals".to_owned()).spawn(move || {
            for number in source.forever() {
                match Signal::of(number) {
                    Some(signal) => (forward.other)(signal),
                    None => forward.stops(number),
                }
            }
        })?;
        Ok(Forwarding(handle))
    }
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Lets this thread, and those it starts from now on, receive these signals. A parent may have started the process with
/// some of them blocked, and a signal that is blocked is never seen.
fn unblock(numbers: &[i32]) -> io::Result<()> {
    let mut set = nix::sys::signal::SigSet::empty();
    for number in numbers {
        set.add(nix::sys::signal::Signal::try_from(*number)?);
    }
    Ok(set.thread_unblock()?)
}

/// Whether the process was started with this signal ignored. Only Linux shows this without unsafe code.
fn is_ignored(number: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (number - 1) & 1 == 1)
}
