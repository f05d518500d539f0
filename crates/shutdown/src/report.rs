//! The report at the end: the reason, and every task exactly once with its outcome.

use std::collections::VecDeque;
use std::fmt::{self, Write};
use std::panic::Location;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::panics::{Panic, catch};
use crate::stop::StopReason;
use crate::task::{BoxError, StragglerState, TaskOutcome};
use crate::trace::Task;

/// How many ended tasks of the workers' groups the report keeps: the latest tasks that completed or were cancelled, and
/// as many that ended otherwise. The workers themselves are always kept.
pub(crate) const KEPT_TASKS: usize = 1024;

const EXIT_CLEAN: u8 = 0;
const EXIT_FAILED: u8 = 1;
pub(crate) const EXIT_STRAGGLERS: u8 = 70;
pub(crate) const EXIT_NOT_STARTED: u8 = 71;
pub(crate) const EXIT_PANICKED: u8 = 101;

/// How one task of an application ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TaskReport {
    /// The name it was given.
    pub name: String,
    /// Where it belongs: a worker to its phase, a task to its worker (and the groups below that).
    pub group: String,
    /// Whether it is a worker of the application, rather than a task of a worker.
    pub is_worker: bool,
    /// Whether it is a worker whose failure does not fail the application; see [`tolerated`](crate::Phase::tolerated).
    pub is_tolerated: bool,
    /// How it ended; errors are rendered with their sources.
    pub outcome: TaskOutcome<(), String>,
    /// Where it was spawned; for a worker, where it was added.
    pub spawned_at: &'static Location<'static>,
    /// The last [`mark`](crate::WorkerContext::mark) that it left.
    pub last_mark: Option<String>,
    /// What it was doing when its grace was over. `None` if it ended in time.
    pub straggling: Option<StragglerState>,
}

impl TaskReport {
    pub(crate) fn new(
        task: &Task,
        cut: Option<StragglerState>,
        group: &str,
        is_worker: bool,
        outcome: TaskOutcome<(), String>,
    ) -> Self {
        // A task that was cut but ended well before the abort reached it is no straggler.
        let cut_short = matches!(outcome, TaskOutcome::Aborted | TaskOutcome::Abandoned);
        Self {
            name: task.name.as_str().to_owned(),
            group: group.to_owned(),
            is_worker,
            is_tolerated: false,
            outcome,
            spawned_at: task.spawned_at,
            last_mark: task.name.last_mark(),
            straggling: cut.filter(|_| cut_short),
        }
    }
}

impl fmt::Display for TaskReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_worker { "worker" } else { "task" };
        write!(f, "{kind} `{}` of `{}`: {}", self.name, self.group, self.outcome)?;
        if let Some(state) = self.straggling {
            write!(f, ", {state}, spawned at {}", self.spawned_at)?;
            if let Some(mark) = &self.last_mark {
                write!(f, ", last mark `{mark}`")?;
            }
        }
        Ok(())
    }
}

/// Work that the application does not know.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Unnamed {
    /// Futures that were alive when every worker had ended.
    pub(crate) tasks: usize,
    /// Threads of the runtime that such work still held at the deadline.
    pub(crate) threads: usize,
}

/// How an application ended.
///
/// Its `Display` is the text to log: one line for the whole, then one for each task. Two reports are equal if
/// everything in them is equal, including the [time](Self::elapsed) and the places of the tasks. So two runs of one
/// program on a paused clock have equal reports.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "it says which workers failed and what was cut"]
pub struct Report {
    name: String,
    reason: StopReason,
    elapsed: Duration,
    tasks: Vec<TaskReport>,
    unlisted: u64,
    unnamed: Unnamed,
    unnoticed_panics: u64,
    exit_code: u8,
}

impl Report {
    pub(crate) fn new(name: &str, reason: StopReason, elapsed: Duration, ledger: &Ledger, unnamed: Unnamed) -> Self {
        let (tasks, unlisted, unnoticed_panics) = ledger.list();
        let name = name.to_owned();
        let mut report = Self { name, reason, elapsed, tasks, unlisted, unnamed, unnoticed_panics, exit_code: 0 };
        report.exit_code = report.verdict();
        report
    }

    pub(crate) fn set_exit_code(&mut self, code: u8) {
        self.exit_code = code;
    }

    /// Returns the name of the application.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns why the application stopped: the first reason, whatever came later.
    pub fn reason(&self) -> &StopReason {
        &self.reason
    }

    /// Returns the time from the request to stop until this report.
    pub fn elapsed(&self) -> Duration {
        self.elapsed
    }

    /// Returns every worker, in the order in which they ended, and the tasks of their groups, each exactly once.
    ///
    /// It lists the latest 1,024 tasks of groups that completed or were cancelled, and the latest 1,024 that ended
    /// otherwise; [`unlisted`](Self::unlisted) counts the earlier ones.
    pub fn tasks(&self) -> &[TaskReport] {
        &self.tasks
    }

    /// Returns the first task of this name, if there is one: a worker before any task of a worker.
    pub fn task(&self, name: &str) -> Option<&TaskReport> {
        self.tasks.iter().find(|task| task.name == name)
    }

    /// Returns how many ended tasks of the workers' groups are not in [`tasks`](Self::tasks).
    pub fn unlisted(&self) -> u64 {
        self.unlisted
    }

    /// Returns how many tasks outside any group were alive when every worker had ended: tasks that workers, or
    /// libraries such as connection pools, gave to `tokio::spawn`.
    ///
    /// They are dropped with the runtime, and their number changes nothing. It is zero with
    /// [`serve`](crate::Application::serve), because its runtime may have other tasks for other reasons.
    pub fn unnamed_tasks(&self) -> usize {
        self.unnamed.tasks
    }

    /// Returns how many threads of the runtime were held at the deadline by work outside any group: closures of
    /// `tokio::task::spawn_blocking`, and tasks inside a poll. The exit code is 70 if there were any.
    ///
    /// In your own [runtime](crate::Application::runtime) they are not counted: the result is 1 if there were any.
    pub fn unnamed_threads(&self) -> usize {
        self.unnamed.threads
    }

    /// Whether something was alive when its time was over.
    pub(crate) fn is_cut(&self) -> bool {
        self.unnamed.threads > 0 || self.stragglers().next().is_some()
    }

    /// Whether nothing happened that is worth a report.
    pub(crate) fn is_uneventful(&self) -> bool {
        // A tolerated failure is worth a report all the same.
        let eventful = |task: &TaskReport| task.outcome.is_failed() || task.outcome.is_panicked();
        self.is_clean() && self.exit_code == EXIT_CLEAN && !self.tasks.iter().any(eventful)
    }

    /// Returns the tasks that had not ended when their grace was over.
    pub fn stragglers(&self) -> impl Iterator<Item = &TaskReport> {
        self.tasks.iter().filter(|task| task.straggling.is_some())
    }

    /// Returns whether every task ended by itself in time, no worker failed or panicked, and no task of a worker
    /// panicked unnoticed.
    pub fn is_clean(&self) -> bool {
        self.verdict() == EXIT_CLEAN
    }

    /// Returns the exit code:
    ///
    /// - 0 after a clean stop;
    /// - 1 after an error, or if a phase was not ready;
    /// - 101 after a panic of a worker, of a worker's task whose outcome [nobody has
    ///   read](crate::TaskGroup#panics-of-tasks), or of a callback;
    /// - 70 if the deadline passed with something still alive;
    /// - 71 if the application could not start;
    /// - 128 + n if a second signal n cut it short;
    /// - or the code that [`exit_code`](crate::Application::exit_code) chose instead.
    pub fn exit_code(&self) -> u8 {
        self.exit_code
    }

    /// The worst outcome decides.
    fn verdict(&self) -> u8 {
        let worker = |ended: fn(&TaskOutcome<(), String>) -> bool| {
            self.tasks.iter().any(|task| task.is_worker && !task.is_tolerated && ended(&task.outcome))
        };
        if let StopReason::NotStarted { .. } = self.reason {
            EXIT_NOT_STARTED
        } else if self.is_cut() {
            EXIT_STRAGGLERS
        } else if worker(TaskOutcome::is_panicked) || self.unnoticed_panics > 0 {
            EXIT_PANICKED
        } else if worker(TaskOutcome::is_failed) || matches!(self.reason, StopReason::NotReady { .. }) {
            EXIT_FAILED
        } else {
            EXIT_CLEAN
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, reason, elapsed, exit_code, .. } = self;
        // In one piece: standard error is not buffered, and ten thousand lines in ten pieces each would take a long
        // time.
        let mut text = format!("`{name}` stopped by {reason}; ended after {elapsed:.1?} with exit code {exit_code}");
        for task in &self.tasks {
            write!(text, "\n  {task}")?;
        }
        if self.unlisted > 0 {
            write!(text, "\n  and {} earlier tasks", self.unlisted)?;
        }
        if self.unnamed.tasks > 0 {
            write!(text, "\n  unnamed tasks that were alive: {}", self.unnamed.tasks)?;
        }
        if self.unnamed.threads > 0 {
            write!(text, "\n  threads that unnamed work held to the end: {}", self.unnamed.threads)?;
        }
        f.write_str(&text)
    }
}

/// The tasks of an application that have ended. Bounded: a server's connections do not pile up in it.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    pages: Mutex<Pages>,
}

#[derive(Debug, Default)]
struct Pages {
    workers: Vec<TaskReport>,
    /// The names of the tolerated workers, and where they were added.
    tolerated: Vec<(String, &'static Location<'static>)>,
    orderly: VecDeque<TaskReport>,
    notable: VecDeque<TaskReport>,
    unlisted: u64,
    /// How many tasks, other than workers, have panicked without anyone having read their outcome.
    unnoticed_panics: u64,
}

impl Ledger {
    /// Writes a task down.
    pub(crate) fn record(&self, mut task: TaskReport) {
        let mut pages = self.pages();
        if task.is_worker {
            task.is_tolerated = pages.tolerated.iter().any(|(name, at)| *name == task.name && *at == task.spawned_at);
            pages.workers.push(task);
            return;
        }
        pages.unnoticed_panics += u64::from(task.outcome.is_panicked());
        let orderly = matches!(task.outcome, TaskOutcome::Completed(()) | TaskOutcome::Cancelled);
        let page = if orderly { &mut pages.orderly } else { &mut pages.notable };
        page.push_back(task);
        if page.len() > KEPT_TASKS {
            page.pop_front();
            pages.unlisted += 1;
        }
    }

    /// From now on, a failure of this worker does not fail the application.
    pub(crate) fn tolerate(&self, worker: &str, added_at: &'static Location<'static>) {
        self.pages().tolerated.push((worker.to_owned(), added_at));
    }

    /// Whether a task that cannot be stopped holds a thread of the runtime.
    pub(crate) fn holds_threads(&self) -> bool {
        self.any(|task| {
            let starved = task.straggling == Some(StragglerState::Starved);
            matches!(task.outcome, TaskOutcome::Abandoned) && !starved
        })
    }

    /// Whether a task had not ended when its time was over.
    pub(crate) fn is_cut(&self) -> bool {
        self.any(|task| task.straggling.is_some())
    }

    /// How many futures were recorded as abandoned; they live on in the runtime.
    pub(crate) fn abandoned_futures(&self) -> usize {
        let pages = self.pages();
        let tasks = pages.workers.iter().chain(&pages.notable);
        let lives_on = |task: &&TaskReport| {
            let closure = task.straggling == Some(StragglerState::BlockingClosure);
            matches!(task.outcome, TaskOutcome::Abandoned) && !closure
        };
        tasks.filter(lives_on).count()
    }

    fn any(&self, condition: impl Fn(&TaskReport) -> bool) -> bool {
        let pages = self.pages();
        pages.workers.iter().chain(&pages.notable).any(condition)
    }

    /// Notes that the outcomes of this many panicked tasks have been read.
    pub(crate) fn notice_panics(&self, count: u64) {
        let mut pages = self.pages();
        pages.unnoticed_panics = pages.unnoticed_panics.saturating_sub(count);
    }

    fn list(&self) -> (Vec<TaskReport>, u64, u64) {
        let pages = self.pages();
        let tasks = pages.workers.iter().chain(&pages.notable).chain(&pages.orderly).cloned().collect();
        (tasks, pages.unlisted, pages.unnoticed_panics)
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Converts an outcome to the form that a report holds.
pub(crate) fn say(outcome: &TaskOutcome<(), BoxError>) -> TaskOutcome<(), String> {
    match outcome {
        TaskOutcome::Completed(()) => TaskOutcome::Completed(()),
        TaskOutcome::Cancelled => TaskOutcome::Cancelled,
        TaskOutcome::Failed(error) => match catch(|| chain(error.as_ref())) {
            Ok(text) => TaskOutcome::Failed(text),
            // Rendering the error panicked: the error is lost, the panic is not.
            Err(Panic { message, location }) => TaskOutcome::Panicked {
                message: format!("in the text of an error: {message}"),
                location: location.unwrap_or_else(|| Location::caller().into()),
            },
        },
        TaskOutcome::Panicked { message, location } => {
            TaskOutcome::Panicked { message: message.clone(), location: location.clone() }
        }
        TaskOutcome::Aborted => TaskOutcome::Aborted,
        TaskOutcome::Abandoned => TaskOutcome::Abandoned,
    }
}

/// An error and its sources on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
