//! Applications, workers and task groups that end in order, by the deadline, and say how.
//!
//! # The problem
//!
//! A server that stops on Ctrl-C is a few lines, and they look right:
//!
//! ```no_run
//! # use tokio_util::{sync::CancellationToken, task::TaskTracker};
//! # async fn http(_: CancellationToken) {}
//! # async fn outbox(_: CancellationToken) {}
//! # #[tokio::main]
//! # async fn main() -> std::io::Result<()> {
//! let (token, tracker) = (CancellationToken::new(), TaskTracker::new());
//! tracker.spawn(http(token.clone()));
//! tracker.spawn(outbox(token.clone())); // If it panics, nobody notices.
//! tokio::signal::ctrl_c().await?; // SIGTERM kills; so does a Ctrl-C before this line.
//! token.cancel(); // Both at once: `http` still hands work to an `outbox` that is gone.
//! tracker.close();
//! // For ever, if one of them ignores the token; a second Ctrl-C is lost.
//! tracker.wait().await;
//! # Ok(())
//! # }
//! ```
//!
//! A timeout around the last line does not help against a task that never yields, or against a blocking closure: the
//! runtime waits for those when it is dropped. When the process is finally killed, nothing has said which task was in
//! the way.
//!
//! # The same, with an end
//!
//! ```
//! use std::process::ExitCode;
//! use std::time::Duration;
//! use cancel_safe_shutdown::{Application, BoxError, WorkerContext};
//! use tokio::net::TcpListener;
//!
//! async fn outbox(cx: WorkerContext) -> Result<(), std::io::Error> {
//!     cx.cancelled().await;
//!     cx.mark("flush"); // In the report, if it does not get any further.
//!     Ok(())
//! }
//!
//! async fn http(cx: WorkerContext) -> Result<(), BoxError> {
//!     let listener = TcpListener::bind("127.0.0.1:0").await?;
//!     // Keeps no outcomes: it is here for months.
//!     let connections = cx.discarding_group();
//!     loop {
//!         let (stream, peer) = tokio::select! {
//!             () = cx.cancelled() => break,
//!             accepted = listener.accept() => accepted?,
//!         };
//!         let name = format!("connection {peer}");
//!         if connections.spawn_with(name, |cx| connection(stream, cx)).is_err() {
//!             break; // Told to stop since.
//!         }
//!     }
//!     let result = connections.wait().await; // No longer than the phase has time.
//!     Ok(result.into_result().map(drop)?)
//! }
//! # async fn connection(_: tokio::net::TcpStream, _: WorkerContext) {}
//!
//! fn main() -> ExitCode {
//!     let app = Application::new("billing")
//!         .phase("storage", |phase| phase.worker("outbox", outbox))
//!         .phase("ingress", |phase| {
//!             phase.worker("http", http).timeout(Duration::from_secs(10))
//!         })
//!         .shutdown_timeout(Duration::from_secs(25))
//!         .on_report(|report| eprintln!("{report}"));
//!     # let stop = app.shutdown_handle();
//!     # let app = app.worker("example", |_: WorkerContext| async move { stop.cancel() });
//!     app.run()
//! }
//! ```
//!
//! # Guarantees
//!
//! | event | what happens |
//! |---|---|
//! | SIGINT or SIGTERM at any time after [`Application::new`] | a stop; the default action never kills the process |
//! | SIGTERM or SIGINT inherited as blocked | it is unblocked; a SIGHUP inherited as ignored (`nohup`) stays ignored |
//! | SIGHUP, SIGUSR1, SIGUSR2 | what [`on_signal`](Application::on_signal) says; on SIGQUIT, `run` lists what is alive |
//! | every worker ends in time | exit code 0, or what [`exit_code`](Application::exit_code) says |
//! | a worker returns an error, or panics, past its [`Restart`] policy | the others stop; exit code 1, or 101; not if it is [tolerated](Phase::tolerated) |
//! | a destructor panics: of a payload, of what a worker has captured, of a task that is cancelled or never starts | the same as any other panic |
//! | a task is alive when its time is over | it is cut; exit code 70; the report says its name, where it was spawned, its last mark, and whether it was blocked inside a poll or parked at an await |
//! | a task cannot be cut: it never yields, or it is a blocking closure | the same; with [`run`](Application::run), the process is gone 100 ms after the deadline |
//! | a second signal within [a second](Application::second_signal_after) | it counts as a copy of the first; `timeout`, npm and `tini -g` send such copies |
//! | a second signal n later, with [`run`](Application::run) | a report, then exit code 128 + n at once, even if the runtime is wedged |
//! | a stop of several phases | each is told to stop when the phase that started after it has ended or was cut; a failed start rolls back the phases before it |
//! | a phase wedges threads of the runtime, with [`run`](Application::run) | a thread on the system's clock cuts it on time and tells the next phase on time; what the runtime can still run, runs; a task that never ran again is reported as [starved](StragglerState::Starved) |
//! | unnamed work (`tokio::spawn`, `spawn_blocking`) is alive at the end, with [`run`](Application::run) | it is [counted](Report::unnamed_tasks); closures have until the deadline to end; if unnamed work [holds a thread](Report::unnamed_threads) then, the exit code is 70 |
//! | [`on_report`](Application::on_report) is not set, with [`run`](Application::run) | standard error gets a line when a stop begins, and the report if anything failed or was cut |
//! | a phase [provides](Phase::provide) a value | the next phase starts when the value is made; the value is closed when that phase has ended |
//! | a stop begins | [`readiness`](Application::readiness) stops being ready before any worker is told; a stop by Ctrl-C skips the drain delay |
//! | several causes of a stop | the first is the reason; reason and flag change in one step |
//! | a [`TaskGroup`], or a future of this crate that owns one, is dropped | its tasks are dropped at their current await; nothing detaches |
//! | the body of a [`TaskGroup::scope`] returns an `Err` or panics | its tasks are cancelled, with their grace; the scope returns, or panics, when they have ended |
//! | a task in a worker's group panics | exit code 101, unless its outcome [was read](TaskGroup#panics-of-tasks) |
//! | a task is spawned on a closed group | the error returns it, never polled |
//! | any of these | each task is in the report exactly once |
//!
//! # Limitations
//!
//! Tasks:
//!
//! - Nothing can stop a blocking closure that has begun, or a future that does not yield. The report names them, and
//!   they end with the process.
//! - Unnamed work that a worker starts outside a group is counted, not named; the worker that waits for it is named.
//! - A closure that never returns, such as a read of `tokio::io::stdin`, holds a clean stop until its deadline.
//! - A runtime of one thread, or one whose threads are all wedged, cannot run any clean-up. Workers are told all the
//!   same, and the report says that they were starved.
//! - A group keeps its outcomes until you ask for them. Read a long-lived group with
//!   [`join_next`](TaskGroup::join_next), or make it [`discarding`](TaskGroup::discarding).
//!
//! The process:
//!
//! - [`serve`](Application::serve), inside your own runtime, cannot bound the drop of that runtime.
//! - The bounds at the deadline and after a second signal apply to tasks: a [callback](Application::on_report) that
//!   hangs holds the process half a second longer.
//! - A signal handler stays for the life of the process: after the application has ended, SIGINT and SIGTERM do
//!   nothing.
//! - On Windows, Ctrl-C works like SIGINT; Ctrl-Break and the end of the console, the session or the system work like
//!   SIGTERM. After the latter three, Windows itself ends the process within seconds.
//! - On other systems, and without the feature `signal`, only its [handle](Application::shutdown_handle) and its
//!   workers stop an application.
//! - Except on Unix with that feature, the last resort at the deadline is [`std::process::exit`], which runs `atexit`
//!   handlers.
//! - With `panic = "abort"` a panic ends the process.
//! - Only the panic hook knows the place of a panic, so the first task sets a hook that calls the previous one. If the
//!   program later sets a hook that does not call this one, a report shows the place where the task was spawned
//!   instead.
//!
//! # Comparison
//!
//! - `TaskTracker` and a `CancellationToken`: the parts of the broken example. They are right if every task is known to
//!   listen, and nobody needs to know which one did not.
//! - [`JoinSet`](tokio::task::JoinSet): its tasks have no names, and it aborts without a grace. It is right for a batch
//!   of futures inside one function.
//! - `tokio::time::timeout` around a server, or `axum::serve` with a graceful shutdown in a worker: it drops the accept
//!   loop and leaves the connections it has spawned. The feature `axum` has a server that owns its connections.
//!
//! # Features
//!
//! | feature | |
//! |---|---|
//! | `signal` (default) | SIGINT and SIGTERM stop an [`Application`] |
//! | `axum` | [`axum::serve`], whose connections end with their worker; the extractor [`axum::Cancelled`]; and [`axum::readiness`] for a probe |
//! | `systemd` | tells a service manager: ready, stopping, more time while it drains, and alive, but the last only after the runtime has run a task; without `NOTIFY_SOCKET` it sends nothing |
//! | `test-util` | [`TestRun`]: an application inside a test, on a paused clock |
//! | `tower` | [`tower::serve`] for any tower service, tonic's too; and a layer that gives each request a token |
//! | `tracing` | events for restarts and for the report |
//!
//! The MSRV is 1.89; it is raised only in a minor release.

mod application;
mod clock;
mod context;
mod group;
mod panics;
mod places;
mod report;
mod result;
mod roster;
#[cfg(feature = "tower")]
mod server;
mod signal;
mod state;
mod stop;
mod task;
mod ticket;
mod trace;
mod tree;
mod worker;

pub use application::Application;
pub use application::actions::SignalContext;
pub use application::course::AppError;
pub use application::phase::Phase;
pub use application::restart::{Restart, RestartPolicy};
#[cfg(feature = "test-util")]
pub use application::test_run::TestRun;
pub use context::WorkerContext;
pub use group::TaskGroup;
pub use group::named::LiveTask;
pub use group::scope::BodyOutput;
pub use panics::PanicLocation;
pub use report::{Report, TaskReport};
pub use result::{Rejected, Straggler, TaskCounts, TaskFailure, TaskGroupResult};
#[cfg(feature = "axum")]
pub use server::axum;
#[cfg(feature = "tower")]
pub use server::tower;
pub use signal::Signal;
pub use stop::{Readiness, StopReason};
pub use task::{BoxError, StragglerState, TaskOutcome, TaskOutput, WorkerOutput};
pub use worker::BackgroundWorker;

// The examples of the README compile.
#[cfg(all(doctest, feature = "axum", feature = "test-util"))]
#[doc = include_str!("../README.md")]
struct Readme;
