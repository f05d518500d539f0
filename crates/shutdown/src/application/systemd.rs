//! The messages to the service manager: ready, stopping, more time, alive. The application's own threads send them, so
//! a wedged runtime holds up none of them but "alive". The protocol is that of `sd-notify`.
//!
//! Invariant: without a NOTIFY_SOCKET nothing is sent and no thread started; WATCHDOG=1 follows an answer of the runtime.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel, sync_channel};
use std::thread;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::clock::{Alarm, Clock, drive};
use crate::state::Core;
use crate::stop::Readiness;

/// How often to ask for more time while the application stops.
const EXTEND_EVERY: Duration = Duration::from_secs(1);
/// How much to ask for beyond the rest of the budget. On an idle machine, the process is gone 100 ms after its
/// deadline.
const EXTEND_SLACK: Duration = Duration::from_secs(2);

/// Keeps the service manager informed for as long as this value lives.
#[derive(Debug)]
pub(crate) struct Notifier {
    _telling: DropGuard,
    _pulse: Option<Sender<()>>,
}

impl Notifier {
    /// Returns `None` if no service manager listens.
    pub(crate) fn start(core: &Arc<Core>, runtime: &Handle) -> io::Result<Option<Self>> {
        if std::env::var_os("NOTIFY_SOCKET").is_none() {
            return Ok(None);
        }
        let over = CancellationToken::new();
        let guard = over.clone().drop_guard();
        let told = Arc::clone(core);
        let tell = move || {
            let alarm = Arc::new(Alarm::default());
            let clock = Clock::System(Arc::clone(&alarm));
            let course = over.run_until_cancelled(tell(&told, told.watch_readiness(), &clock));
            let _over = drive(&alarm, course, || None);
        };
        thread::Builder::new().name("shutdown-systemd".to_owned()).spawn(tell)?;
        let limit = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero());
        let pulse = limit.map(|limit| start_pulse(limit / 2, Arc::clone(core), runtime.clone()));
        Ok(Some(Self { _telling: guard, _pulse: pulse.transpose()? }))
    }
}

/// Says when the application is ready and when it stops, and asks for the time that a stop may take.
async fn tell(core: &Core, mut readiness: watch::Receiver<Readiness>, clock: &Clock) {
    loop {
        let now = *readiness.borrow_and_update();
        match now {
            Readiness::Starting => {}
            Readiness::Ready => notify(&[NotifyState::Ready]),
            Readiness::Stopping => break,
        }
        if readiness.changed().await.is_err() {
            return;
        }
    }
    notify(&[NotifyState::Stopping]);
    loop {
        // The deadline is set a moment after the readiness is gone. If it is missed here, the next message, a second
        // later, has it.
        let wanted = (core.remaining() + EXTEND_SLACK).as_micros();
        notify(&[NotifyState::ExtendTimeoutUsec(u32::try_from(wanted).unwrap_or(u32::MAX))]);
        clock.sleep(EXTEND_EVERY).await;
    }
}

/// Says every `period` that the runtime is alive, after it has run a task to prove it. Ends when the returned sender is
/// dropped, or with the runtime.
fn start_pulse(period: Duration, core: Arc<Core>, runtime: Handle) -> io::Result<Sender<()>> {
    let (alive, over) = channel();
    let beat = move || {
        loop {
            let (answer, answers) = sync_channel(1);
            // The channel has room for the one answer, and a receiver waits for it.
            core.probe.ask_for(&runtime, move || answer.send(()).unwrap_or_default());
            // Waits without a bound: a wedged runtime must miss its beat.
            if answers.recv().is_err() {
                return;
            }
            notify(&[NotifyState::Watchdog]);
            if over.recv_timeout(period) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    };
    thread::Builder::new().name("shutdown-pulse".to_owned()).spawn(beat)?;
    Ok(alive)
}

/// A failure to send is only traced: the service manager will notice the missing message.
fn notify(states: &[NotifyState<'_>]) {
    let sent = sd_notify::notify(states);
    #[cfg(feature = "tracing")]
    if let Err(error) = &sent {
        tracing::warn!(%error, ?states, "the service manager was not told");
    }
    drop(sent);
}
