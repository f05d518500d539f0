//! One run of an application: the threads beside the runtime, the runtime, and the end of both. If one part cannot be
//! started, none of the others is left running.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::{Builder, Handle};
use tokio::time::timeout;

use crate::application::actions::Actions;
use crate::application::phase::Phase;
use crate::application::process::{Watchdog, counting_builder, end_process, end_runtime};
use crate::application::restart::RestartPolicy;
use crate::application::supervisor::{Supervisor, Ticker, supervise};
#[cfg(all(unix, feature = "systemd"))]
use crate::application::systemd::Notifier;
use crate::clock::Clock;
use crate::report::{Report, Unnamed};
use crate::signal::{Forward, Forwarding, Signals};
use crate::state::Core;
use crate::stop::StopReason;

/// How much longer than the callbacks' time `serve` may wait for a blocking thread.
const ANSWER_SLACK: Duration = Duration::from_millis(100);

/// Why an application could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AppError {
    /// The handlers of SIGINT and SIGTERM could not be installed.
    #[error("the signal handlers could not be installed")]
    Signals(#[source] io::Error),
    /// One of the application's own threads (for signals, for the deadline, for callbacks) could not be started.
    #[error("the thread for {purpose} could not be started")]
    #[non_exhaustive]
    Thread {
        /// What the thread is for.
        purpose: &'static str,
        /// Why the system did not start it.
        source: io::Error,
    },
    /// The runtime could not be built.
    #[error("the runtime could not be built")]
    Runtime(#[source] io::Error),
    /// `run` was called inside a runtime. Call `serve` there.
    #[error("an application cannot own a runtime inside another runtime")]
    InsideRuntime,
}

impl AppError {
    /// Returns whether the program made a mistake: it called `run` inside a runtime.
    ///
    /// In every other case the system refused something.
    pub fn is_inside_runtime(&self) -> bool {
        matches!(self, Self::InsideRuntime)
    }

    pub(crate) fn thread(purpose: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Thread { purpose, source }
    }
}

/// What to run.
pub(crate) struct Course {
    pub(crate) phases: Vec<Phase>,
    pub(crate) restart: RestartPolicy,
    pub(crate) runtime: Option<Builder>,
    pub(crate) signals: io::Result<Listening>,
}

/// What to listen to.
pub(crate) struct Listening {
    pub(crate) signals: Signals,
    pub(crate) quiet: Duration,
    pub(crate) actions: Actions,
}

impl Listening {
    /// Forwards the signals that stop the application, and passes the others to the actions.
    pub(crate) fn start(
        self,
        core: &Arc<Core>,
        first: impl FnOnce(i32) + Send + 'static,
        second: impl FnMut(i32) + Send + 'static,
    ) -> Result<Forwarding, AppError> {
        let Self { signals, quiet, actions } = self;
        signals.add(actions.signals()).map_err(AppError::Signals)?;
        let actions = actions.start(Arc::clone(core)).map_err(AppError::thread("the actions on signals"))?;
        // This fails only when the actions' thread is gone, and only the end of the application ends that thread.
        let other = move |signal| {
            actions.send(signal).unwrap_or_default();
        };
        signals.forward(Forward::new(quiet, first, second, other)).map_err(AppError::thread("signals"))
    }
}

impl Course {
    pub(crate) fn run(self, core: &Arc<Core>) -> Result<u8, AppError> {
        if Handle::try_current().is_ok() {
            return Err(AppError::InsideRuntime);
        }
        let (first, second) = (Arc::clone(core), Arc::clone(core));
        let _forwarding = self.signals.map_err(AppError::Signals)?.start(
            core,
            move |signal| first.request(StopReason::Signal(signal)),
            move |signal| end_process(&second, u8::try_from(128 + signal).unwrap_or(u8::MAX)),
        )?;
        let watchdog = Watchdog::start(Arc::clone(core)).map_err(AppError::thread("the deadline"))?;
        let mut builder = self.runtime.unwrap_or_else(|| counting_builder(core));
        let runtime = builder.enable_all().build().map_err(AppError::Runtime)?;
        #[cfg(all(unix, feature = "systemd"))]
        let _notifier = Notifier::start(core, runtime.handle()).map_err(AppError::thread("the service manager"))?;
        let supervisor = Supervisor::start(core, self.phases, self.restart, runtime.handle());
        runtime.block_on(supervisor.map_err(AppError::thread("the phases"))?.ended());
        let unnamed = end_runtime(core, runtime);

        let Some(voice) = core.ending.claim() else {
            // The watchdog or a second signal was faster, and ends the process within milliseconds.
            loop {
                std::thread::park();
            }
        };
        let code = voice.deliver(core.report(unnamed), None, Watchdog::patience(core.remaining()));
        drop(watchdog);
        Ok(code)
    }
    /// Runs inside the caller's runtime.
    pub(crate) async fn serve(self, core: &Arc<Core>) -> Result<Report, AppError> {
        let Self { phases, restart, signals, .. } = self;
        let (first, second) = (Arc::clone(core), Arc::clone(&core.ending));
        let _forwarding = signals.map_err(AppError::Signals)?.start(
            core,
            move |signal| first.request(StopReason::Signal(signal)),
            move |_| second.hurry(),
        )?;
        let _ticker = Ticker::start(core, Handle::current()).map_err(AppError::thread("the runtime's pulse"))?;
        #[cfg(all(unix, feature = "systemd"))]
        let _notifier = Notifier::start(core, &Handle::current()).map_err(AppError::thread("the service manager"))?;
        Ok(serve(core, phases, restart).await)
    }
}

/// Runs the phases and has the report delivered.
pub(crate) async fn serve(core: &Arc<Core>, phases: Vec<Phase>, restart: RestartPolicy) -> Report {
    supervise(core, phases, restart, &Clock::Tokio).await;
    let mut report = core.report(Unnamed::default());
    if let Some(voice) = core.ending.claim() {
        let limit = Watchdog::patience(core.remaining());
        let telling = voice.tell(report.clone(), None);
        // Bounded here as well: stragglers may hold every blocking thread.
        let answer = timeout(limit + ANSWER_SLACK, tokio::task::spawn_blocking(move || telling.wait(limit)));
        if let Ok(Ok(code)) = answer.await {
            report.set_exit_code(code);
        }
    }
    report
}
