//! Synchronous cleanup. Invariant: an armed cleanup runs exactly once, however its owner ends.

use std::fmt;
use std::future::Future;

/// Runs a closure exactly once when it is dropped, unless it is disarmed.
///
/// Every way out drops it: the end of the block, an early `?`, a panic, a lost `select!` branch, a timeout, an aborted
/// task. Only `mem::forget` and the end of the process skip it.
///
/// The closure runs inside `drop`, on an executor's thread: keep it short and do not block in it. If a cleanup has to
/// await, use [`Reaper::defer`](crate::Reaper::defer). A closure that panics while another panic unwinds aborts the
/// process, as in any destructor.
///
/// # Beware: an `async` block may leave its guard outside
///
/// Since edition 2021 a closure or an `async` block captures only the fields that it names. A guard in a neighbouring
/// field stays with the caller, and cleans up before the future has run. Bind the owner as a whole:
///
/// ```
/// use std::cell::Cell;
/// use std::future::Future;
/// use cancel_safe_guard::Guard;
///
/// struct Upload<F: FnOnce()> {
///     part: u32,
///     _cleanup: Guard<F>,
/// }
///
/// fn broken<F: FnOnce()>(upload: Upload<F>) -> impl Future<Output = u32> {
///     // Captures one number; the guard is dropped when `broken` returns.
///     async move { upload.part }
/// }
///
/// fn whole<F: FnOnce()>(upload: Upload<F>) -> impl Future<Output = u32> {
///     async move {
///         let upload = upload;
///         upload.part
///     }
/// }
///
/// let cleaned = Cell::new(0);
/// let clean = || cleaned.set(cleaned.get() + 1);
///
/// let future = broken(Upload { part: 1, _cleanup: Guard::new(clean) });
/// assert_eq!(cleaned.get(), 1, "cleaned up although the future has not run yet");
/// drop(future);
///
/// let future = whole(Upload { part: 1, _cleanup: Guard::new(clean) });
/// assert_eq!(cleaned.get(), 1, "the guard is inside the future");
/// drop(future);
/// assert_eq!(cleaned.get(), 2);
/// ```
///
/// # Comparison to `scopeguard`
///
/// `scopeguard::guard` owns a value, and can make its run depend on whether the thread is panicking. This guard owns
/// nothing and has no strategies: cancellation is not a panic, so a guard that checks `thread::panicking` misses it.
///
/// # Examples
///
/// ```
/// use std::cell::RefCell;
/// use cancel_safe_guard::Guard;
///
/// let log = RefCell::new(Vec::new());
/// {
///     let _unlock = Guard::new(|| log.borrow_mut().push("unlocked"));
///     log.borrow_mut().push("worked");
/// }
/// assert_eq!(*log.borrow(), ["worked", "unlocked"]);
/// ```
#[must_use = "a guard that is not bound to a name is dropped at once and cleans up at once"]
pub struct Guard<F: FnOnce()> {
    cleanup: Option<F>,
}

impl<F: FnOnce()> Guard<F> {
    /// Arms a guard with `cleanup`.
    pub fn new(cleanup: F) -> Self {
        Self { cleanup: Some(cleanup) }
    }

    /// Drops the cleanup without running it.
    ///
    /// # Examples
    ///
    /// ```
    /// # use cancel_safe_guard::Guard;
    /// let rollback = Guard::new(|| unreachable!("the work has succeeded"));
    /// rollback.disarm();
    /// ```
    pub fn disarm(mut self) {
        self.cleanup = None;
    }

    /// Runs the cleanup now. It does the same as `drop`, under a more telling name.
    pub fn run(self) {
        drop(self);
    }
}

impl<F: FnOnce()> Drop for Guard<F> {
    fn drop(&mut self) {
        if let Some(cleanup) = self.cleanup.take() {
            cleanup();
        }
    }
}

impl<F: FnOnce()> fmt::Debug for Guard<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard").finish_non_exhaustive()
    }
}

/// Runs `operation`, and runs `on_cancel` unless the operation succeeds.
///
/// `on_cancel` runs if `operation` was started and did not return `Ok`, and only then: it was dropped at an await, it
/// returned an error, or it panicked. By then `operation` and everything it held have been dropped. A future that was
/// never polled has started nothing, and undoes nothing.
///
/// # Cancel safety
///
/// This method is cancel safe. If dropped before completion, `operation` is dropped where it stands, and then
/// `on_cancel` runs. If dropped before the first poll, neither has run.
///
/// # Errors
///
/// Returns the error of `operation`, after `on_cancel` has run.
///
/// # Examples
///
/// ```
/// use std::cell::Cell;
/// use cancel_safe_guard::try_commit_cancel;
/// use tokio::time::{Duration, sleep, timeout};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
/// let reserved = Cell::new(1);
/// let commit = async {
///     sleep(Duration::from_secs(9)).await;
///     Ok::<_, std::io::Error>(())
/// };
///
/// let attempt = try_commit_cancel(commit, || reserved.set(0));
/// let result = timeout(Duration::from_secs(1), attempt).await;
/// assert!(result.is_err());
/// assert_eq!(reserved.get(), 0, "the reservation was released");
/// # }
/// ```
pub async fn try_commit_cancel<T, E>(
    operation: impl Future<Output = Result<T, E>>,
    on_cancel: impl FnOnce(),
) -> Result<T, E> {
    let guard = Guard::new(on_cancel);
    let result = operation.await;
    match &result {
        Ok(_) => guard.disarm(),
        Err(_) => guard.run(),
    }
    result
}
