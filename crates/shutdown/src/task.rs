//! One task and its traces: name, origin, pulse, last mark. However a task ends, its outcome is recorded exactly once.

use std::borrow::Cow;
use std::fmt;
use std::panic::Location;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::task::JoinHandle;

use crate::panics::{Panic, PanicLocation, catch, watch};

use crate::stop::{OwnStop, Stopping};

/// The error of a task whose type was not kept.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// How a task ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TaskOutcome<T = (), E = BoxError> {
    /// It returned. A task that saw its cancellation and returned in time has completed too.
    Completed(T),
    /// It was told to stop and its future was dropped at an await, or it was never started.
    Cancelled,
    /// It returned an error.
    Failed(E),
    /// It panicked.
    #[non_exhaustive]
    Panicked {
        /// The panic message, or the type of the payload if that is not text.
        message: String,
        /// Where it panicked. If the program has set its own panic hook since, only that hook knows the place; then
        /// this is where the task was spawned.
        location: PanicLocation,
    },
    /// Its grace was over, or its runtime was shut down, and its future was dropped.
    Aborted,
    /// Its grace was over, and it cannot be stopped: it is a running blocking closure, or a future that does not yield.
    Abandoned,
}

impl<T, E> TaskOutcome<T, E> {
    /// Returns whether the task returned without an error.
    pub fn is_completed(&self) -> bool {
        matches!(self, Self::Completed(_))
    }

    /// Returns what the task returned, unless it ended otherwise.
    pub fn completed(self) -> Option<T> {
        match self {
            Self::Completed(value) => Some(value),
            _ => None,
        }
    }

    /// Returns whether the task was dropped because it was told to stop.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Cancelled)
    }

    /// Returns whether the task returned an error.
    pub fn is_failed(&self) -> bool {
        matches!(self, Self::Failed(_))
    }

    /// Returns whether the task panicked.
    pub fn is_panicked(&self) -> bool {
        matches!(self, Self::Panicked { .. })
    }
}

impl<T, E: fmt::Display> fmt::Display for TaskOutcome<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Completed(_) => f.write_str("completed"),
            Self::Cancelled => f.write_str("cancelled"),
            Self::Failed(error) => write!(f, "failed: {error}"),
            Self::Panicked { message, location } => write!(f, "panicked: {message}, at {location}"),
            Self::Aborted => f.write_str("aborted"),
            Self::Abandoned => f.write_str("abandoned"),
        }
    }
}

/// What a task of a [`TaskGroup<T, E>`](crate::TaskGroup) may return: `Result<T, E>`, or nothing if `T` is `()`.
pub trait TaskOutput<T, E> {
    /// Says how a task that returned this ended.
    fn into_outcome(self) -> TaskOutcome<T, E>;
}

impl<E> TaskOutput<(), E> for () {
    fn into_outcome(self) -> TaskOutcome<(), E> {
        TaskOutcome::Completed(())
    }
}

impl<T, E> TaskOutput<T, E> for Result<T, E> {
    fn into_outcome(self) -> TaskOutcome<T, E> {
        match self {
            Ok(value) => TaskOutcome::Completed(value),
            Err(error) => TaskOutcome::Failed(error),
        }
    }
}

#[expect(private_interfaces, reason = "the trait behind `Never` is the only way to name the type, and no more")]
impl<T, E> TaskOutput<T, E> for Never {
    fn into_outcome(self) -> TaskOutcome<T, E> {
        self
    }
}

/// What a worker may return: nothing, or `Result<(), E>` with any error.
pub trait WorkerOutput {
    /// Says whether the worker failed.
    ///
    /// # Errors
    ///
    /// The worker's own error, boxed.
    fn into_result(self) -> Result<(), BoxError>;
}

impl WorkerOutput for () {
    fn into_result(self) -> Result<(), BoxError> {
        Ok(())
    }
}

impl<E: Into<BoxError>> WorkerOutput for Result<(), E> {
    fn into_result(self) -> Result<(), BoxError> {
        self.map_err(Into::into)
    }
}

#[expect(private_interfaces, reason = "the trait behind `Never` is the only way to name the type, and no more")]
impl WorkerOutput for Never {
    fn into_result(self) -> Result<(), BoxError> {
        self
    }
}

/// The type of a `loop` without an end, and of a panic. Stable Rust can name it only as the return type of this
/// function pointer.
pub(crate) type Never = <fn() -> ! as Returning>::Value;

pub(crate) trait Returning {
    type Value;
}

impl<T> Returning for fn() -> T {
    type Value = T;
}

/// What a task that outlived its grace was doing when it was cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StragglerState {
    /// The same poll was running at two observations some milliseconds apart: it blocks its thread or never yields.
    BlockedInPoll,
    /// It was waiting at an await, or moving from one await to the next.
    ParkedAtAwait,
    /// It is a blocking closure; only its own return can end it.
    BlockingClosure,
    /// It never learnt of its stop: other work held every thread of the runtime from then on.
    Starved,
}

impl StragglerState {
    /// The number by which a slot stores it. Zero stands for none.
    fn number(self) -> u8 {
        match self {
            Self::BlockedInPoll => 1,
            Self::ParkedAtAwait => 2,
            Self::BlockingClosure => 3,
            Self::Starved => 4,
        }
    }

    fn of(number: u8) -> Option<Self> {
        let states = [Self::BlockedInPoll, Self::ParkedAtAwait, Self::BlockingClosure, Self::Starved];
        states.into_iter().find(|state| state.number() == number)
    }
}

impl fmt::Display for StragglerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BlockedInPoll => "blocked inside a poll",
            Self::ParkedAtAwait => "parked at an await",
            Self::BlockingClosure => "inside a blocking closure",
            Self::Starved => "starved: the runtime ran nothing after it was told to stop",
        })
    }
}

/// What a cancel does to a task before its grace is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It has no token: dropped at its next await.
    Plain,
    /// It has a context: told, and left alone until its grace is over.
    Contextual,
    /// A blocking closure: told, and dropped if it has not begun.
    Blocking,
}

/// The pulse of a blocking closure that must not begin any more.
const CALLED_OFF: u32 = u32::MAX;

/// What others may know of a task while it runs. Shared by the task, its group and the reports.
///
/// A server has one for each connection, so what a plain task does not need is not in here but behind `own`.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) name: Cow<'static, str>,
    pub(crate) spawned_at: &'static Location<'static>,
    /// What only a task with a context needs.
    own: Option<Box<Own>>,
    /// The handle to abort the task, from its spawn until its outcome is recorded. It keeps the future's memory
    /// allocated.
    handle: Mutex<Option<JoinHandle<()>>>,
    /// Its place in the list of its group, from its entry until its outcome is recorded.
    place: AtomicU32,
    /// The number of polls begun and ended: odd inside a poll. Once the task has begun, only the task writes it, so
    /// plain stores will do.
    pulse: AtomicU32,
    pub(crate) kind: Kind,
    /// Whether its outcome has been recorded. The caller that sets the flag records it.
    told: AtomicBool,
    /// Whether to abort it. This may be decided before it is spawned.
    unwanted: AtomicBool,
    /// Whether this task alone was told to stop.
    called: AtomicBool,
    /// What it was doing when it was cut, as a number; zero if it was not cut.
    cut: AtomicU8,
}

/// What a task with a context has of its own.
#[derive(Debug, Default)]
struct Own {
    /// The stop of this task alone.
    stop: OwnStop,
    mark: Mutex<Option<Cow<'static, str>>>,
}

impl Slot {
    pub(crate) fn new(name: Cow<'static, str>, spawned_at: &'static Location<'static>, kind: Kind) -> Self {
        watch();
        Self {
            name,
            spawned_at,
            own: (kind != Kind::Plain).then(Box::default),
            handle: Mutex::new(None),
            place: AtomicU32::new(0),
            pulse: AtomicU32::new(0),
            kind,
            told: AtomicBool::new(false),
            unwanted: AtomicBool::new(false),
            called: AtomicBool::new(false),
            cut: AtomicU8::new(0),
        }
    }

    /// Call this under the group's lock, like every read of the place.
    pub(crate) fn set_place(&self, place: u32) {
        self.place.store(place, Ordering::Relaxed);
    }

    pub(crate) fn place(&self) -> u32 {
        self.place.load(Ordering::Relaxed)
    }

    /// The outcome of a task that panicked.
    pub(crate) fn panicked<T, E>(&self, panic: Panic) -> TaskOutcome<T, E> {
        let Panic { message, location } = panic;
        TaskOutcome::Panicked { message, location: location.unwrap_or_else(|| self.spawned_at.into()) }
    }

    pub(crate) fn beat(&self) {
        self.pulse.store(self.pulse.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    /// Begins a blocking closure, unless it has been called off.
    pub(crate) fn begin(&self) -> bool {
        self.pulse.compare_exchange(0, 1, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Calls a blocking closure off, unless it has begun.
    pub(crate) fn call_off(&self) -> bool {
        self.kind == Kind::Blocking
            && self.pulse.compare_exchange(0, CALLED_OFF, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    pub(crate) fn pulse(&self) -> u32 {
        self.pulse.load(Ordering::Relaxed)
    }

    /// What the task is doing, judged by its pulse some milliseconds ago and by whether its runtime runs nothing.
    pub(crate) fn judge(&self, earlier: u32, starved: bool) -> StragglerState {
        let now = self.pulse();
        match self.kind {
            Kind::Blocking => StragglerState::BlockingClosure,
            Kind::Plain | Kind::Contextual if now == earlier && now % 2 == 1 => StragglerState::BlockedInPoll,
            Kind::Plain | Kind::Contextual if starved => StragglerState::Starved,
            Kind::Plain | Kind::Contextual => StragglerState::ParkedAtAwait,
        }
    }

    pub(crate) fn is_inside_poll(&self) -> bool {
        let pulse = self.pulse();
        pulse % 2 == 1 && pulse != CALLED_OFF
    }

    /// Tells this task alone to stop: a plain one is dropped at its next await, as is a closure that has not begun.
    pub(crate) fn tell_to_stop(&self, stopping: Stopping) {
        // The reason first, so that a reader that sees the flag also sees the reason.
        if let Some(own) = &self.own {
            own.stop.request(stopping);
        }
        self.called.store(true, Ordering::Release);
        if self.kind != Kind::Contextual {
            self.abort();
        }
    }

    /// Whether this task alone was told to stop.
    pub(crate) fn is_called(&self) -> bool {
        self.called.load(Ordering::Acquire)
    }

    /// The stop of this task alone. A plain task has none.
    pub(crate) fn own_stop(&self) -> Option<&OwnStop> {
        self.own.as_ref().map(|own| &own.stop)
    }

    /// Records that the task outlived its grace. The first judgement stands.
    pub(crate) fn cut(&self, state: StragglerState) {
        // Relaxed will do: only the end of the task reads it, and the abort that follows brings that end about.
        let _first = self.cut.compare_exchange(0, state.number(), Ordering::Relaxed, Ordering::Relaxed);
    }

    pub(crate) fn straggling(&self) -> Option<StragglerState> {
        StragglerState::of(self.cut.load(Ordering::Relaxed))
    }

    /// Returns true for exactly one caller, which may then record the outcome.
    pub(crate) fn claim(&self) -> bool {
        !self.told.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn is_told(&self) -> bool {
        self.told.load(Ordering::Acquire)
    }

    /// Makes the task abortable, now that it is spawned. A stop may already have come, and the task may already have
    /// ended.
    pub(crate) fn attach(&self, handle: JoinHandle<()>) {
        let mut held = self.lock_handle();
        if self.is_told() {
            return;
        }
        let handle = held.insert(handle);
        // An abort sets this flag before it takes the lock: either it finds the handle, or the flag is seen here.
        if self.unwanted.load(Ordering::Relaxed) {
            let handle = handle.abort_handle();
            drop(held);
            handle.abort();
        }
    }

    /// Releases the task, whose outcome has been recorded.
    pub(crate) fn detach(&self) {
        let handle = self.lock_handle().take();
        drop(handle);
    }

    /// Aborts the task, or has it aborted as soon as it is spawned.
    pub(crate) fn abort(&self) {
        self.unwanted.store(true, Ordering::Relaxed);
        let handle = self.lock_handle().as_ref().map(JoinHandle::abort_handle);
        if let Some(handle) = handle {
            handle.abort();
        }
    }

    #[cfg(test)]
    pub(crate) fn holds_task(&self) -> bool {
        self.lock_handle().is_some()
    }

    fn lock_handle(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves a mark. Only a context calls this, and every task with a context has room for the mark.
    pub(crate) fn set_mark(&self, mark: Cow<'static, str>) {
        if let Some(own) = &self.own {
            *own.mark.lock().unwrap_or_else(PoisonError::into_inner) = Some(mark);
        }
    }

    pub(crate) fn last_mark(&self) -> Option<String> {
        let own = self.own.as_ref()?;
        own.mark.lock().unwrap_or_else(PoisonError::into_inner).as_deref().map(str::to_owned)
    }
}

/// Runs `call`, turning a panic into the outcome that says so.
pub(crate) fn guarded<R, T, E>(slot: &Slot, call: impl FnOnce() -> R) -> Result<R, TaskOutcome<T, E>> {
    slot.beat();
    let result = catch(call);
    slot.beat();
    result.map_err(|panic| slot.panicked(panic))
}
