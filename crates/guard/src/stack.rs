//! The surroundings of the code that is being polled: a stack of scopes on each thread. Invariant: a frame is on the
//! stack exactly while its scope is inside `poll`, so the stack always shows the true surroundings, wherever a future
//! has been moved since its last poll.

use std::cell::RefCell;
use std::mem;
use std::sync::Arc;
use std::task::Waker;

use tokio::task;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::hold::{Bound, Holds};

thread_local! {
    static STACK: RefCell<Vec<Frame>> = const { RefCell::new(Vec::new()) };
}

struct Frame {
    /// A runtime may poll another task inside this one (a `LocalSet` does). That task inherits nothing, so only the
    /// task that pushed a frame sees it.
    task: Option<task::Id>,
    scope: Scope,
    /// Whether a critical section is being polled inside the scope, up to the next frame.
    critical: bool,
}

/// A cancel scope as seen from inside. It is on the stack during a poll and in its future between polls; moving it is
/// cheaper than sharing it, and nothing is allocated until a critical section inside it has to wait.
pub(crate) struct Scope {
    pub(crate) deadline: Option<Instant>,
    token: Option<CancellationToken>,
    /// The deadline has passed or the token has fired: the scope ends as soon as nothing holds it.
    pub(crate) due: bool,
    holds: Option<Arc<Holds>>,
}

impl Scope {
    #[inline]
    pub(crate) fn new(deadline: Option<Instant>, token: Option<CancellationToken>) -> Self {
        Self { deadline, token, due: false, holds: None }
    }

    /// Moves the owned parts out, and leaves the rest.
    #[inline]
    fn take(&mut self) -> Self {
        Self { deadline: self.deadline, token: self.token.take(), due: self.due, holds: self.holds.take() }
    }

    /// How long the critical sections inside hold the scope, if any of them waits. If so, `waker` is woken when one of
    /// them leaves the scope.
    #[inline]
    pub(crate) fn held(&self, waker: &Waker) -> Option<Bound> {
        self.holds.as_ref()?.bound(waker)
    }

    fn notice_due(&mut self) -> bool {
        self.due = self.due
            || self.deadline.is_some_and(|deadline| deadline <= Instant::now())
            || self.token.as_ref().is_some_and(CancellationToken::is_cancelled);
        self.due
    }
}

/// Keeps a scope on the stack, and puts it back into its future when dropped, even by a panic.
pub(crate) struct InScope<'a>(&'a mut Scope);

impl<'a> InScope<'a> {
    #[inline]
    pub(crate) fn enter(scope: &'a mut Scope) -> Self {
        if let Some(holds) = &scope.holds {
            holds.awake();
        }
        // If the stack is gone, nothing is pushed, and the scope stays in its future.
        let push = |stack: &RefCell<Vec<Frame>>| {
            stack.borrow_mut().push(Frame { task: task::try_id(), scope: scope.take(), critical: false });
        };
        STACK.try_with(push).unwrap_or_default();
        Self(scope)
    }
}

impl Drop for InScope<'_> {
    #[inline]
    fn drop(&mut self) {
        // The last frame is ours, because these guards live on the thread's own call stack, which unwinds in order.
        if let Ok(Some(frame)) = STACK.try_with(|stack| stack.borrow_mut().pop()) {
            // Field by field: the deadline has not changed, and copying the whole would stall on the stores just made.
            let Scope { deadline: _, token, due, holds } = frame.scope;
            self.0.token = token;
            self.0.due = due;
            self.0.holds = holds;
        }
    }
}

/// Marks the innermost scope as having a critical section polled inside it.
pub(crate) struct InCritical {
    /// The mark's previous value, for sections inside sections.
    before: bool,
}

impl InCritical {
    #[inline]
    pub(crate) fn enter() -> Self {
        Self { before: mark(true) }
    }
}

impl Drop for InCritical {
    #[inline]
    fn drop(&mut self) {
        mark(self.before);
    }
}

/// Sets the mark of the innermost frame and returns the old one.
///
/// The frame may belong to another task. That does not matter, because that task does not run before the mark is
/// restored.
#[inline]
fn mark(critical: bool) -> bool {
    let mark = |stack: &RefCell<Vec<Frame>>| match stack.borrow_mut().last_mut() {
        Some(frame) => mem::replace(&mut frame.critical, critical),
        None => false,
    };
    STACK.try_with(mark).unwrap_or(false)
}

/// The holds of the innermost enclosing scope, or `None` if there is no scope.
pub(crate) fn holds_around() -> Option<Arc<Holds>> {
    with_visible(|frames| Some(Arc::clone(frames.last_mut()?.scope.holds.get_or_insert_default())))
}

/// The nearest deadline of the enclosing scopes, regardless of critical sections.
pub(crate) fn nearest_deadline() -> Option<Instant> {
    with_visible(|frames| frames.iter().filter_map(|frame| frame.scope.deadline).min())
}

/// Looks outward, up to the first critical section, for scopes that should end, and makes them notice it.
pub(crate) fn notice_due() -> bool {
    let notice = |frames: &mut [Frame]| {
        let mut due = false;
        for frame in frames.iter_mut().rev().take_while(|frame| !frame.critical) {
            due |= frame.scope.notice_due();
        }
        Some(due)
    };
    with_visible(notice).unwrap_or(false)
}

/// Shows the frames of the current task, outermost first. `see` must not run foreign code: the stack is borrowed.
///
/// While a thread ends, its stack may already be gone. A future polled by another thread-local's destructor then sees
/// no frames.
fn with_visible<R>(see: impl FnOnce(&mut [Frame]) -> Option<R>) -> Option<R> {
    let see = |stack: &RefCell<Vec<Frame>>| {
        let mut stack = stack.borrow_mut();
        if stack.is_empty() {
            return None;
        }
        let task = task::try_id();
        let start = stack.iter().rposition(|frame| frame.task != task).map_or(0, |foreign| foreign + 1);
        see(&mut stack[start..])
    };
    STACK.try_with(see).ok().flatten()
}
