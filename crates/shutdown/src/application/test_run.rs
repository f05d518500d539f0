//! An application inside a test: it runs in the test's runtime and on the test's clock, and stops as it would on a
//! signal. Invariant: it receives no signal of the process, starts no thread that reads the time, and never outlives
//! its test.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::application::Application;
use crate::application::actions::Actions;
use crate::application::course::{AppError, Course, Listening, serve};
use crate::report::Report;
use crate::signal::{INTERRUPT, Signal, TERMINATE};
use crate::state::Core;
use crate::stop::{Readiness, StopReason};

/// An application that runs in a test.
///
/// The test does to it what the system would do to the process, on the clock of the test's runtime. With a paused clock
/// a stop of 25 seconds takes no time, [`Report::elapsed`] is exact, and two runs have equal reports. It calls
/// [`on_report`](Application::on_report) as usual, and tells the service manager nothing.
///
/// Dropping it drops every worker at its current await.
///
/// # Limitations
///
/// - It runs as [`serve`](Application::serve) does. To test what only the owner of a process can do, use a process; for
///   example, for a worker that blocks the only thread of the test.
/// - A second signal ends the grace.
/// - The application took over SIGINT and SIGTERM when it was created, so Ctrl-C does not end a test that hangs.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use cancel_safe_shutdown::{Application, StopReason, TestRun, WorkerContext};
/// use tokio::time::sleep;
///
/// fn shop() -> Application {
///     let drain = |seconds| {
///         move |cx: WorkerContext| async move {
///             cx.cancelled().await;
///             sleep(Duration::from_secs(seconds)).await;
///         }
///     };
///     Application::new("shop")
///         .phase("storage", |phase| phase.worker("pool", drain(1)))
///         .phase("ingress", |phase| phase.worker("http", drain(2)))
/// }
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// // In a #[tokio::test(start_paused = true)]:
/// let mut run = TestRun::start(shop())?;
/// assert!(run.ready().await);
/// run.terminate();
/// let report = run.ended().await?;
///
/// assert_eq!((report.exit_code(), report.reason()), (0, &StopReason::Signal(15)));
/// assert_eq!(report.elapsed(), Duration::from_secs(3)); // One after the other.
/// assert!(report.task("http").is_some_and(|http| http.outcome.is_completed()));
///
/// let mut again = TestRun::start(shop())?;
/// again.ready().await;
/// again.terminate();
/// assert_eq!(again.ended().await?, report);
/// # Ok(())
/// # }
/// ```
#[must_use = "an application that is dropped ends at once"]
pub struct TestRun {
    core: Arc<Core>,
    readiness: watch::Receiver<Readiness>,
    actions: Actions,
    /// How long after the first signal another one counts as a copy.
    quiet: Duration,
    first: Option<Instant>,
    serving: AbortOnDropHandle<Report>,
}

impl TestRun {
    /// Starts an application in the runtime of the test.
    ///
    /// Its workers run when the test first awaits.
    ///
    /// # Errors
    ///
    /// If the application could not be started; no worker has run.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn start(application: Application) -> Result<Self, AppError> {
        let readiness = application.readiness();
        let (core, Course { phases, restart, signals, .. }) = application.prepare()?;
        let Listening { quiet, actions, .. } = signals.map_err(AppError::Signals)?;
        let served = Arc::clone(&core);
        let serving = AbortOnDropHandle::new(tokio::spawn(async move { serve(&served, phases, restart).await }));
        Ok(Self { core, readiness, actions, quiet, first: None, serving })
    }

    /// Returns whether the application should get work.
    pub fn readiness(&self) -> Readiness {
        *self.readiness.borrow()
    }

    /// Waits until every phase is ready and returns true, or until a stop begins and returns false.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, nothing has happened: the next call waits for the same.
    pub async fn ready(&mut self) -> bool {
        let settled = self.readiness.wait_for(|readiness| *readiness != Readiness::Starting).await;
        settled.is_ok_and(|readiness| readiness.is_ready())
    }

    /// Does what SIGTERM does: the first one stops; a second one after the [quiet
    /// time](Application::second_signal_after) ends the grace.
    pub fn terminate(&mut self) {
        self.deliver(TERMINATE);
    }

    /// Does what SIGINT (Ctrl-C) does: the same, without the [drain delay](Application::drain_delay).
    pub fn interrupt(&mut self) {
        self.deliver(INTERRUPT);
    }

    /// Does what the [shutdown handle](Application::shutdown_handle) does.
    pub fn request_stop(&self) {
        self.core.stop.token().cancel();
    }

    /// Runs the application's actions for this signal at once, on this thread.
    pub fn raise(&mut self, signal: Signal) {
        self.actions.act(&self.core, signal);
    }

    /// Waits for the end. The wait has no bound until a stop begins; from then on it takes no longer than the
    /// [budget](Application::shutdown_timeout).
    ///
    /// # Cancel safety
    ///
    /// This method is not cancel safe. If dropped, every worker is dropped at its current await, and there is no report.
    ///
    /// # Errors
    ///
    /// If the runtime of the test was shut down, or its own code panicked in place of the application.
    pub async fn ended(self) -> Result<Report, tokio::task::JoinError> {
        self.serving.await
    }

    fn deliver(&mut self, number: i32) {
        match self.first {
            None => {
                self.first = Some(Instant::now());
                self.core.request(StopReason::Signal(number));
            }
            Some(first) if first.elapsed() >= self.quiet => self.core.ending.hurry(),
            Some(_) => {}
        }
    }
}

impl fmt::Debug for TestRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestRun").field("readiness", &self.readiness()).finish_non_exhaustive()
    }
}
