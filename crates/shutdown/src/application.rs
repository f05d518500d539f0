//! The application: what runs, in which order it starts and stops, and how long a stop may take. Nothing runs before
//! `run` or `serve`, and nothing is left running after.

pub(crate) mod actions;
pub(crate) mod course;
pub(crate) mod phase;
pub(crate) mod process;
pub(crate) mod restart;
pub(crate) mod supervisor;
#[cfg(all(unix, feature = "systemd"))]
pub(crate) mod systemd;
#[cfg(feature = "test-util")]
pub(crate) mod test_run;

use std::fmt;
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Builder;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::application::actions::{Actions, SignalContext};
use crate::application::course::{AppError, Course, Listening};
use crate::application::phase::{Phase, again, once};
use crate::application::restart::{Restart, RestartPolicy};
use crate::context::WorkerContext;
use crate::report::{EXIT_NOT_STARTED, Report, Unnamed, chain};
use crate::signal::{Signal, Signals};
use crate::state::voice::{Audience, print};
use crate::state::{Core, Terms};
use crate::stop::{Readiness, Stop, StopReason};
use crate::task::WorkerOutput;

/// The total budget of a stop: 25 seconds, so that Kubernetes' default grace of 30 is never used up.
const DEFAULT_BUDGET: Duration = Duration::from_secs(25);
/// How long after a first signal another one is taken for a copy of it. A program that forwards a signal which its
/// child already has does so within milliseconds; a person who presses Ctrl-C again has waited longer than this.
const SECOND_SIGNAL_AFTER: Duration = Duration::from_secs(1);
/// The phase of the workers that were added to the application itself.
const OWN_PHASE: &str = "main";

/// Workers that start together, end together, and end the process with a report and an exit code.
///
/// A stop begins with SIGINT or SIGTERM, with the [shutdown handle](Self::shutdown_handle), with the first worker that
/// fails or panics, or when every worker has completed. The application tells the workers to stop, phase by phase, in
/// reverse order of their start. A task that has not ended when its time is over is cut and named in the [`Report`].
///
/// Once created, an application keeps SIGINT and SIGTERM from killing the process, even after it has ended, because a
/// handler cannot be removed without a race.
///
/// # Examples
///
/// ```
/// use std::process::ExitCode;
/// use std::time::Duration;
/// use cancel_safe_shutdown::{Application, WorkerContext};
///
/// async fn outbox(cx: WorkerContext) -> Result<(), std::io::Error> {
///     let mut tick = tokio::time::interval(Duration::from_secs(1));
///     while cx.token().run_until_cancelled(tick.tick()).await.is_some() {
///         // Send what is there.
///         # break;
///     }
///     Ok(())
/// }
///
/// fn main() -> ExitCode {
///     Application::new("billing").worker("outbox", outbox).run()
/// }
/// ```
#[must_use = "an application that is never run starts nothing"]
pub struct Application {
    name: String,
    phases: Vec<Phase>,
    stop: Arc<Stop>,
    terms: Terms,
    readiness: watch::Sender<Readiness>,
    second_signal_after: Duration,
    restart: RestartPolicy,
    audience: Audience,
    actions: Actions,
    runtime: Option<Builder>,
    signals: io::Result<Signals>,
}

impl Application {
    /// Creates an application without workers.
    ///
    /// With the feature `signal`, this installs the handlers of SIGINT and SIGTERM. A signal that arrives after this
    /// call and before [`run`](Self::run) is kept, and then stops the application before it starts anything.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            phases: Vec::new(),
            stop: Arc::default(),
            terms: Terms { budget: DEFAULT_BUDGET, ..Terms::default() },
            readiness: watch::Sender::default(),
            second_signal_after: SECOND_SIGNAL_AFTER,
            restart: Restart::Never.into(),
            audience: Audience::default(),
            actions: Actions::default(),
            runtime: None,
            signals: Signals::install(),
        }
    }

    /// Adds a worker to the phase `main`. The first such worker sets the position of that phase.
    ///
    /// An error or a panic stops the application. A worker that returns is done, and the others continue. `work` is
    /// `Clone` because a [restart](Self::restart) calls it again; see [`worker_once`](Self::worker_once).
    #[track_caller]
    pub fn worker<W, F>(mut self, name: impl Into<String>, work: W) -> Self
    where
        W: FnOnce(WorkerContext) -> F + Clone + Send + 'static,
        F: Future + Send + 'static,
        F::Output: WorkerOutput,
    {
        self.own_phase().add(name.into(), again(work));
        self
    }

    /// Adds a worker that cannot be started twice, such as one that owns a receiver. It is never restarted.
    #[track_caller]
    pub fn worker_once<W, F>(mut self, name: impl Into<String>, work: W) -> Self
    where
        W: FnOnce(WorkerContext) -> F + Send + 'static,
        F: Future + Send + 'static,
        F::Output: WorkerOutput,
    {
        self.own_phase().add(name.into(), once(work));
        self
    }

    /// Sets the restart policy of the last worker added to the application itself; see [`Phase::restarted`].
    pub fn restarted(mut self, policy: impl Into<RestartPolicy>) -> Self {
        if let Some(worker) = self.own_phase().workers.last_mut() {
            worker.restart = Some(policy.into());
        }
        self
    }

    /// Lets the application continue if the last worker added to it fails or panics; see [`Phase::tolerated`].
    pub fn tolerated(mut self) -> Self {
        if let Some(worker) = self.own_phase().workers.last_mut() {
            worker.is_tolerated = true;
        }
        self
    }

    /// Adds a worker that is a plain closure over a token. It is never restarted.
    #[track_caller]
    pub fn add_worker<W, F>(&mut self, name: impl Into<String>, work: W)
    where
        W: FnOnce(CancellationToken) -> F + Send + 'static,
        F: Future + Send + 'static,
        F::Output: WorkerOutput,
    {
        self.own_phase().add(name.into(), once(|cx: WorkerContext| work(cx.token())));
    }

    /// Adds a phase. Phases start in the order in which they are added, and stop in reverse: each is told to stop only
    /// when the phase added after it has ended or was cut.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::time::Duration;
    /// use cancel_safe_shutdown::{Application, WorkerContext};
    ///
    /// async fn pool(cx: WorkerContext) {
    ///     cx.ready();
    ///     cx.cancelled().await;
    /// }
    /// async fn http(cx: WorkerContext) {
    ///     cx.cancelled().await;
    /// }
    ///
    /// let app = Application::new("shop")
    ///     .phase("storage", |phase| {
    ///         phase.worker("pool", pool).ready_within(Duration::from_secs(5))
    ///     })
    ///     .phase("ingress", |phase| {
    ///         phase.worker("http", http).timeout(Duration::from_secs(10))
    ///     });
    /// # let stop = app.shutdown_handle();
    /// # let app = app.worker("example", |_: WorkerContext| async move { stop.cancel() });
    /// # assert_eq!(
    /// app.run()
    /// # , std::process::ExitCode::SUCCESS);
    /// ```
    pub fn phase(mut self, name: impl Into<String>, build: impl FnOnce(Phase) -> Phase) -> Self {
        self.phases.push(build(Phase::new(name.into())));
        self
    }

    /// Sets the total budget of a stop, from its request to the end of the last task. The default is 25 seconds.
    pub fn shutdown_timeout(mut self, budget: Duration) -> Self {
        self.terms.budget = budget;
        self
    }

    /// Sets how long workers continue after a signal or a request before the first of them is told to stop. This gives
    /// load balancers time to look elsewhere. The default is zero.
    ///
    /// The delay runs inside the budget and inside the timeouts of the phases; it is not added to either. A phase whose
    /// workers have ended, or that has none, leaves the rest of the delay to the one before it. A stop because of a
    /// failure has no delay. Neither has a stop by SIGINT, because a person who presses Ctrl-C waits for no load
    /// balancer; [`drain_on_interrupt`](Self::drain_on_interrupt) adds the delay there.
    pub fn drain_delay(mut self, delay: Duration) -> Self {
        self.terms.drain_delay = delay;
        self
    }

    /// Gives a stop by SIGINT the [drain delay](Self::drain_delay) as well.
    pub fn drain_on_interrupt(mut self) -> Self {
        self.terms.drains_on_interrupt = true;
        self
    }

    /// Sets how long after the first signal a second one ends the process at once. The default is one second. With
    /// zero, any second signal ends it at once.
    ///
    /// All signals within this time count as one, because GNU `timeout`, npm, pnpm, dumb-init and `tini -g` deliver a
    /// Ctrl-C or SIGTERM that the process has already received. If the stop has another cause, the next signal is the
    /// first one.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::time::Duration;
    /// use cancel_safe_shutdown::Application;
    ///
    /// let application = Application::new("mirror");
    /// let application = application.second_signal_after(Duration::from_secs(3));
    /// # drop(application);
    /// ```
    pub fn second_signal_after(mut self, quiet: Duration) -> Self {
        self.second_signal_after = quiet;
        self
    }

    /// Adds an action for a signal that does not stop the application: for example, to reread the configuration on
    /// SIGHUP.
    ///
    /// Actions run on their own thread, from the start of the application. A panic ends only the action. If you add no
    /// action for SIGQUIT, [`run`](Self::run) has one that [lists](SignalContext::dump) on standard error what is
    /// alive. If the process was started with SIGHUP ignored, as by `nohup`, SIGHUP stays ignored on Linux, the only
    /// system that shows this. Without the feature `signal`, and outside Unix, no such signal arrives.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_shutdown::{Application, Signal, WorkerContext};
    /// use tokio::sync::watch;
    ///
    /// let (reload, mut config) = watch::channel(0_u32);
    /// let app = Application::new("shop")
    ///     .on_signal(Signal::Hangup, move |_| reload.send_modify(|version| *version += 1))
    ///     .worker_once("http", move |cx: WorkerContext| async move {
    ///         let token = cx.token();
    ///         while let Some(Ok(())) = token.run_until_cancelled(config.changed()).await {
    ///             // The configuration is to be read again.
    ///         }
    ///     });
    /// # drop(app);
    /// ```
    pub fn on_signal(mut self, signal: Signal, action: impl FnMut(SignalContext) + Send + 'static) -> Self {
        self.actions.add(signal, Box::new(action));
        self
    }

    /// Sets the restart policy of every phase that has none. The default is [`Restart::Never`].
    pub fn restart(mut self, policy: impl Into<RestartPolicy>) -> Self {
        self.restart = policy.into();
        self
    }

    /// Sets a callback for the report at the very end. Without it, [`run`](Self::run) writes to standard error: a line
    /// when a stop begins, and the report if anything failed or was cut.
    ///
    /// The callback runs on its own thread. The application waits for it until the deadline, but at most a second; at
    /// the deadline or at the second signal, at most half a second. Then the process ends, whether the callback has
    /// returned or not. A callback that panics makes the exit code 101 if every task ended in time.
    pub fn on_report(mut self, on_report: impl FnOnce(&Report) + Send + 'static) -> Self {
        self.audience.on_report = Some(Box::new(on_report));
        self
    }

    /// Sets a callback that may override the exit code of a stop if every task ended in time. By default nothing does.
    ///
    /// It runs before [`on_report`](Self::on_report), within the same time. `None` leaves the code as it is; a panic makes
    /// it 101.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_shutdown::{Application, StopReason};
    ///
    /// let application = Application::new("mirror").exit_code(|report| match report.reason() {
    ///     StopReason::Signal(number) => u8::try_from(128 + number).ok(),
    ///     _ => None,
    /// });
    /// # drop(application);
    /// ```
    pub fn exit_code(mut self, exit_code: impl FnOnce(&Report) -> Option<u8> + Send + 'static) -> Self {
        self.audience.on_exit_code = Some(Box::new(exit_code));
        self
    }

    /// Sets the runtime that [`run`](Self::run) builds, with all drivers enabled. The default is the multi-thread one.
    pub fn runtime(mut self, builder: Builder) -> Self {
        self.runtime = Some(builder);
        self
    }

    /// Returns a token that stops the application when it is cancelled, and is cancelled when the application stops.
    pub fn shutdown_handle(&self) -> CancellationToken {
        self.stop.token().clone()
    }

    /// Returns a receiver for the application's readiness, which says whether it should get work. Use it for a
    /// readiness probe.
    ///
    /// The application is ready when every phase has started, and the phases that [provide](Phase::provide) or have a
    /// [limit](Phase::ready_within) are ready. It stops being ready the moment a stop begins, before any worker is told
    /// and while the [drain delay](Self::drain_delay) runs.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_shutdown::{Application, Readiness, WorkerContext};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let http = |cx: WorkerContext| async move { cx.cancelled().await };
    /// let app = Application::new("shop").worker("http", http);
    /// let (mut readiness, stop) = (app.readiness(), app.shutdown_handle());
    /// let serving = tokio::spawn(app.serve());
    ///
    /// readiness.wait_for(|readiness| readiness.is_ready()).await?;
    /// stop.cancel();
    /// let stopped = readiness.wait_for(|readiness| !readiness.is_ready()).await?;
    /// assert_eq!(*stopped, Readiness::Stopping);
    /// assert_eq!(serving.await??.exit_code(), 0);
    /// # Ok(())
    /// # }
    /// ```
    pub fn readiness(&self) -> watch::Receiver<Readiness> {
        self.readiness.subscribe()
    }

    /// Runs the application to its end and returns the exit code for `main` to return; see [`Report::exit_code`].
    ///
    /// It builds the runtime, and ends with it. Whatever the workers do, the process is gone 100 ms after the deadline,
    /// and at once after a [second signal](Self::second_signal_after): if the runtime cannot return in time, a thread
    /// outside it ends the process, without destructors. Work that belongs to no worker also has until the deadline. If
    /// the application could not be started, the code is 71 and the report says why.
    pub fn run(mut self) -> ExitCode {
        self.audience.is_on_stderr = true;
        self.actions.add_dump();
        let (core, course) = match self.prepare() {
            Ok(prepared) => prepared,
            Err(error) => {
                // Without the thread for the callbacks, standard error is the only place to say it.
                print(format_args!("not started: {}", chain(&error)));
                return ExitCode::from(EXIT_NOT_STARTED);
            }
        };
        ExitCode::from(course.run(&core).unwrap_or_else(|error| {
            core.request(StopReason::NotStarted { cause: chain(&error) });
            core.ending.claim().map_or(EXIT_NOT_STARTED, |voice| {
                voice.deliver(core.report(Unnamed::default()), Some(EXIT_NOT_STARTED), Duration::from_secs(1))
            })
        }))
    }

    /// Runs the application to its end inside the caller's runtime.
    ///
    /// It works like [`run`](Self::run), except for what only the owner of the process can do. It cannot bound the
    /// runtime's own drop, which waits for blocking closures. It cannot end at the deadline if a task wedges the
    /// runtime. And a second signal ends the grace instead of the process. A failed worker is no error here; the report
    /// shows it.
    ///
    /// # Cancel safety
    ///
    /// This method is not cancel safe. If dropped, every worker is dropped at its current await without a grace, there
    /// is no report unless the callbacks already have it, and blocking closures that have begun keep running. Cancel
    /// the [shutdown handle](Self::shutdown_handle) instead.
    ///
    /// # Errors
    ///
    /// If the application could not be started at all; no worker has run.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_shutdown::{Application, WorkerContext};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let application = Application::new("once").worker("one", |_: WorkerContext| async {});
    /// let report = application.serve().await?;
    /// assert_eq!(report.exit_code(), 0);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn serve(self) -> Result<Report, AppError> {
        let (core, course) = self.prepare()?;
        course.serve(&core).await
    }

    pub(crate) fn prepare(self) -> Result<(Arc<Core>, Course), AppError> {
        let workers = self.phases.iter().map(|phase| phase.workers.len()).sum();
        let core = Core::start(self.name, self.stop, self.terms, workers, self.audience, self.readiness);
        let core = core.map_err(AppError::thread("callbacks"))?;
        let Self { phases, restart, runtime, signals, second_signal_after, actions, .. } = self;
        let signals = signals.map(|signals| Listening { signals, quiet: second_signal_after, actions });
        Ok((Arc::new(core), Course { phases, restart, runtime, signals }))
    }

    #[track_caller]
    fn own_phase(&mut self) -> &mut Phase {
        let index = self.phases.iter().position(|phase| phase.is_own).unwrap_or_else(|| {
            self.phases.push(Phase { is_own: true, ..Phase::new(OWN_PHASE.to_owned()) });
            self.phases.len() - 1
        });
        &mut self.phases[index]
    }
}

impl fmt::Debug for Application {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Application")
            .field("name", &self.name)
            .field("phases", &self.phases)
            .field("shutdown_timeout", &self.terms.budget)
            .finish_non_exhaustive()
    }
}
