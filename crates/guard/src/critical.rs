//! Critical sections. Invariant: a section that was entered and not left is counted as torn exactly once.

use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::time::Instant;

use crate::hold::{Grip, SectionBound};
use crate::scope::{Elapsed, until};
use crate::stack::{InCritical, holds_around};

/// Runs `future` as a section that no enclosing scope drops. From its first poll to its end, every enclosing
/// [`timeout`](crate::timeout()), [`timeout_at`](crate::timeout_at) and [`with_token`](crate::with_token) waits for it,
/// and ends right after it.
///
/// Use it for the few steps that belong together and must await in between. It spawns nothing, and `future` may borrow.
/// A scope opened inside `future` still works. Use [`critical_for`] when the section itself must end. Keep sections
/// short: all enclosing deadlines wait for them.
///
/// A scope does not wait forever. A section that is never polled again never ends by itself, for example when a
/// `select!` over `&mut section` continues with another branch. So a scope waits at most
/// [`CRITICAL_LIMIT`](crate::CRITICAL_LIMIT), 60 s, after its own deadline passed or its token fired, whether the
/// section is polled or not. Then it drops its future, and the section is torn. [`critical_for`] sets another limit. In
/// a scope that is not due, a section may rest for any time.
///
/// A section holds the scope that polls it. When it moves to another scope, it holds that one and releases the first. A
/// section that several scopes poll in turn holds all of them.
///
/// Only the scopes of this crate wait. `tokio::select!`, `tokio::time::timeout`, `JoinHandle::abort` and the shutdown
/// of a runtime drop the section where it stands. It is then torn: [`torn_sections`] counts it and [`on_torn`] reports
/// it. The same goes for a section that panics. If the steps must finish even so, use
/// [`Reaper::shield`](crate::Reaper::shield).
///
/// # Cancel safety
///
/// This method is not cancel safe. The scopes of this crate do not drop it before its limit, but anything else may. If
/// dropped after its first poll and before completion, what `future` has done so far remains, and the section is
/// reported as torn. If dropped before its first poll, nothing has happened.
///
/// # Examples
///
/// ```
/// use std::cell::Cell;
/// use std::time::Duration;
/// use cancel_safe_guard::{critical, timeout};
/// use tokio::time::sleep;
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
/// let (from, to) = (Cell::new(100), Cell::new(0));
/// let transfer = critical(async {
///     from.set(from.get() - 30);
///     sleep(Duration::from_secs(2)).await; // writes the journal
///     to.set(to.get() + 30);
/// });
///
/// // The transfer is the last step, so its result is kept even though the deadline
/// // has passed.
/// assert!(timeout(Duration::from_secs(1), transfer).await.is_ok());
/// assert_eq!(from.get() + to.get(), 100);
/// # }
/// ```
#[track_caller]
pub fn critical<T>(future: impl Future<Output = T>) -> impl Future<Output = T> {
    Critical { future, section: Section::new(SectionBound::Limit, Location::caller()) }
}

/// Runs `future` as a [`critical`] section that lasts at most `grace`, counted from this call.
///
/// The enclosing scopes wait for it, and its bound also bounds their wait. When the grace is over, `future` is dropped
/// at its next pending point. The section then ends with an error that its own code can handle, and is not torn. A
/// grace may be longer than [`CRITICAL_LIMIT`](crate::CRITICAL_LIMIT); a grace too large for the clock never ends.
///
/// A section that is not polled cannot see its grace end. Then an enclosing scope enforces it. Once that scope is due,
/// because its deadline passed or its token fired, it waits at most until the end of the grace, and not at all if that
/// has passed. Then it drops its future, and the section is torn, because it had begun, and its own code had no chance
/// to handle the end. While no enclosing scope is due, nothing is dropped, and the section returns its error when it is
/// polled again.
///
/// # Cancel safety
///
/// This method is not cancel safe. The scopes of this crate do not drop it before its grace is over, but anything else
/// may. If dropped after its first poll and before completion, what `future` has done so far remains, and the section
/// is reported as torn. If dropped before its first poll, nothing has happened.
///
/// # Errors
///
/// [`Elapsed`] if the grace ends first. What `future` has done by then remains.
///
/// # Panics
///
/// Panics if it has to wait outside a tokio runtime with its timer enabled.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use cancel_safe_guard::{critical_for, timeout};
/// use tokio::time::{Instant, sleep};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
/// let start = Instant::now();
/// let section = critical_for(Duration::from_secs(3), sleep(Duration::from_secs(60)));
/// let result = timeout(Duration::from_secs(1), section);
/// assert!(matches!(result.await, Ok(Err(_))));
/// assert_eq!(start.elapsed(), Duration::from_secs(3));
/// # }
/// ```
///
/// A section that is not polled does not hold its scope past its grace:
///
/// ```
/// use std::pin::pin;
/// use std::time::Duration;
/// use cancel_safe_guard::{critical_for, timeout};
/// use tokio::time::{Instant, sleep};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
/// let start = Instant::now();
/// let result = timeout(Duration::from_secs(1), async {
///     let section = critical_for(Duration::from_secs(3), sleep(Duration::from_secs(2)));
///     let mut section = pin!(section);
///     tokio::select! {
///         biased;
///         _ = section.as_mut() => {}
///         () = sleep(Duration::from_millis(1)) => {
///             std::future::pending().await // and `section` rests
///         }
///     }
/// });
/// assert!(result.await.is_err());
/// assert_eq!(start.elapsed(), Duration::from_secs(3));
/// # }
/// ```
#[track_caller]
pub fn critical_for<T>(grace: Duration, future: impl Future<Output = T>) -> impl Future<Output = Result<T, Elapsed>> {
    let end = Instant::now().checked_add(grace);
    Critical { future: until(end, future), section: Section::new(SectionBound::grace(end), Location::caller()) }
}

/// A critical section that was entered and not left.
///
/// Either something other than a scope of this crate dropped it, or it panicked, or its scope dropped it at the end of
/// its grace or at [`CRITICAL_LIMIT`](crate::CRITICAL_LIMIT).
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Torn {
    /// Where [`critical`] or [`critical_for`] was called.
    pub location: &'static Location<'static>,
}

impl fmt::Display for Torn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "critical section of {} was torn", self.location)
    }
}

type Hook = Arc<dyn Fn(&Torn) + Send + Sync>;

static HOOK: RwLock<Option<Hook>> = RwLock::new(None);
static OBSERVER: OnceLock<fn(&Torn)> = OnceLock::new();
static TORN: AtomicU64 = AtomicU64::new(0);

/// Calls `hook` for each critical section that is torn from now on, in the whole process. It replaces the previous
/// hook.
///
/// The hook runs inside a destructor, on the thread that drops the section. It should be short, and must not block. It
/// may panic to fail a test. If the thread is already unwinding, that second panic is caught, because it would abort
/// the process.
///
/// With the feature `tracing` a torn section also emits an event of level `error`. In an exploration of
/// `cancel-safe-testing` it is a failure, with or without a hook.
///
/// # Examples
///
/// ```
/// use std::sync::atomic::{AtomicUsize, Ordering};
/// use cancel_safe_guard::{critical, on_torn};
/// use tokio::time::{Duration, timeout};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
/// static TORN: AtomicUsize = AtomicUsize::new(0);
/// on_torn(|torn| {
///     assert_eq!(torn.location.file(), file!());
///     TORN.fetch_add(1, Ordering::Relaxed);
/// });
///
/// // This timeout is tokio's, which knows nothing of critical sections.
/// let endless = critical(std::future::pending::<()>());
/// assert!(timeout(Duration::from_secs(1), endless).await.is_err());
/// assert_eq!(TORN.load(Ordering::Relaxed), 1);
/// # }
/// ```
pub fn on_torn(hook: impl Fn(&Torn) + Send + Sync + 'static) {
    let old = HOOK.write().unwrap_or_else(PoisonError::into_inner).replace(Arc::new(hook));
    // Dropped outside the lock: its destructor is foreign code.
    drop(old);
}

/// Shows each torn section to `observer` before the hook is called. Only for `cancel-safe-testing`, which has to see
/// them whatever hooks the program under test installs. The first observer stays, and must not panic.
#[doc(hidden)]
pub fn observe_torn(observer: fn(&Torn)) {
    OBSERVER.get_or_init(|| observer);
}

/// Returns how many critical sections have been torn in this process.
pub fn torn_sections() -> u64 {
    TORN.load(Relaxed)
}

pin_project! {
    // The future comes first, so that it has been dropped when the section is reported and its scope released.
    struct Critical<F> {
        #[pin]
        future: F,
        section: Section,
    }
}

impl<F: Future> Future for Critical<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        this.section.enter();
        let polled = {
            let _inside = InCritical::enter();
            this.future.poll(cx)
        };
        match polled {
            Poll::Ready(_) => this.section.leave(),
            // Only now, because no enclosing scope looks at its holds before this poll has returned, and most sections
            // never wait.
            Poll::Pending => this.section.hold(),
        }
        polled
    }
}

struct Section {
    progress: Progress,
    grip: Grip<SectionBound>,
    location: &'static Location<'static>,
}

#[derive(PartialEq, Eq)]
enum Progress {
    Untouched,
    Entered,
    Left,
}

impl Section {
    #[inline]
    fn new(bound: SectionBound, location: &'static Location<'static>) -> Self {
        Self { progress: Progress::Untouched, grip: Grip::new(bound), location }
    }

    fn enter(&mut self) {
        if self.progress == Progress::Untouched {
            self.progress = Progress::Entered;
        }
    }

    /// Out of line, like the release: most sections never wait, and are faster without it.
    #[cold]
    #[inline(never)]
    fn hold(&mut self) {
        self.grip.settle(holds_around());
    }

    fn leave(&mut self) {
        self.progress = Progress::Left;
        self.grip.release();
    }
}

impl Drop for Section {
    fn drop(&mut self) {
        if self.progress == Progress::Entered {
            report(Torn { location: self.location });
        }
    }
}

fn report(torn: Torn) {
    TORN.fetch_add(1, Relaxed);
    #[cfg(feature = "tracing")]
    tracing::error!(location = %torn.location, "a critical section was torn");
    if let Some(observer) = OBSERVER.get() {
        observer(&torn);
    }
    // Cloned out of the lock, so that a hook may install another.
    let hook = HOOK.read().unwrap_or_else(PoisonError::into_inner).clone();
    match hook {
        Some(hook) if thread::panicking() => catch_unwind(AssertUnwindSafe(|| hook(&torn))).unwrap_or_default(),
        Some(hook) => hook(&torn),
        None => {}
    }
}
