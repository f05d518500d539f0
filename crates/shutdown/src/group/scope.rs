//! Groups that live as long as a block of code. However the block ends, none of its tasks is alive afterwards; a block
//! that fails cancels its tasks instead of waiting for them.

use std::any::Any;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::pin;
use std::task::Poll;

use crate::group::TaskGroup;
use crate::result::TaskGroupResult;
use crate::task::Never;

impl TaskGroup {
    /// Runs `body` with a new group, then waits for the tasks it has spawned.
    ///
    /// If the body returns an `Err` or panics, its tasks are cancelled first, with the grace of
    /// [`cancel_all`](Self::cancel_all), because nobody is left to give them work. A panic resumes when they have
    /// ended. A task that fails does not disturb the body or the others; the result shows it.
    ///
    /// # Cancel safety
    ///
    /// This method is not cancel safe. If dropped, the body and every task are dropped at their current await and the
    /// results are lost; a blocking closure that has begun runs on.
    ///
    /// # Panics
    ///
    /// With the panic of the body.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_shutdown::TaskGroup;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let (spawned, result) = TaskGroup::scope(async |group| {
    ///     let names = ["a", "b", "c"].into_iter();
    ///     names.filter(|name| group.spawn(*name, async {}).is_ok()).count()
    /// })
    /// .await;
    /// assert_eq!((spawned, result.completed.len()), (3, 3));
    ///
    /// let (bound, result) = TaskGroup::scope(async |group| {
    ///     group.spawn("server", std::future::pending::<()>()).map_err(|_| "closed")?;
    ///     Err::<(), _>("the port is taken")
    /// })
    /// .await;
    /// assert_eq!(bound, Err("the port is taken"));
    /// assert_eq!(result.cancelled, ["server"]);
    /// # }
    /// ```
    pub async fn scope<R: BodyOutput>(body: impl AsyncFnOnce(&mut Self) -> R) -> (R, TaskGroupResult) {
        let mut group = Self::new();
        let value = caught(body(&mut group)).await;
        if !matches!(&value, Ok(value) if !value.is_failure()) {
            group.cancel_all().await;
        }
        let result = group.wait().await;
        (value.unwrap_or_else(|payload| resume_unwind(payload)), result)
    }

    /// Runs `body` with a new group, waits for the tasks it has spawned, and returns what the body returned.
    ///
    /// It works like [`scope`](Self::scope), for a body that joins its tasks itself and reports with `?`. As in
    /// [`std::thread::scope`], the results of tasks that the body has not joined are dropped, even errors; a panic is
    /// not.
    ///
    /// # Cancel safety
    ///
    /// This method is not cancel safe. If dropped, the body and every task are dropped at their current await and the
    /// results are lost; a blocking closure that has begun runs on.
    ///
    /// # Errors
    ///
    /// The error of the body. Its tasks have been cancelled by then.
    ///
    /// # Panics
    ///
    /// With the panic of the body, or if a task that the body has not joined panicked.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_shutdown::{TaskGroup, TaskOutcome};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let first = TaskGroup::try_scope(async |group| {
    ///     group.spawn("primary", async { Err("unreachable".into()) })?;
    ///     group.spawn("replica", std::future::pending::<()>())?;
    ///     match group.join_next().await {
    ///         Some((_, TaskOutcome::Failed(error))) => Err(error),
    ///         _ => Ok("done"),
    ///     }
    /// });
    /// assert_eq!(first.await.unwrap_err().to_string(), "unreachable");
    /// # }
    /// ```
    pub async fn try_scope<R, F>(body: impl AsyncFnOnce(&mut Self) -> Result<R, F>) -> Result<R, F> {
        let (returned, result) = Self::scope(body).await;
        if let Some((name, message)) = result.panicked.first() {
            panic!("task `{name}` of a scope panicked: {message}");
        }
        returned
    }
}

/// Polls `body` to its end, which may be a panic.
async fn caught<R>(body: impl Future<Output = R>) -> Result<R, Box<dyn Any + Send>> {
    let mut body = pin!(body);
    // Whatever a panic may have broken is dropped with the body, and the panic goes on: unwinding past it is safe.
    poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| body.as_mut().poll(cx))) {
        Ok(polled) => polled.map(Ok),
        Err(payload) => Poll::Ready(Err(payload)),
    })
    .await
}

/// What the body of a [`TaskGroup::scope`] may return: any value. A `Result` may be a failure.
///
/// For your own type, write an empty `impl`, or wrap the value in `Ok`.
#[diagnostic::on_unimplemented(
    message = "a scope does not know whether `{Self}` is a failure",
    note = "return it in an `Ok`, or write `impl BodyOutput for {Self} {{}}`"
)]
pub trait BodyOutput {
    /// Returns whether the body failed, in which case its tasks are cancelled.
    fn is_failure(&self) -> bool {
        false
    }
}

impl<T, E> BodyOutput for Result<T, E> {
    fn is_failure(&self) -> bool {
        self.is_err()
    }
}

impl BodyOutput for Never {}

impl BodyOutput for () {}
impl<A, B> BodyOutput for (A, B) {}
impl<A, B, C> BodyOutput for (A, B, C) {}
impl<T> BodyOutput for Option<T> {}
impl<T> BodyOutput for Vec<T> {}
impl<T: ?Sized> BodyOutput for Box<T> {}
impl<T: ?Sized> BodyOutput for &T {}
impl<K, V, S> BodyOutput for std::collections::HashMap<K, V, S> {}
impl<K, V> BodyOutput for std::collections::BTreeMap<K, V> {}
impl BodyOutput for String {}
impl BodyOutput for TaskGroupResult {}

/// Implements the trait for types that are never a failure.
macro_rules! values {
    ($($value:ty)*) => { $(impl BodyOutput for $value {})* };
}

values! { bool char i8 i16 i32 i64 i128 isize u8 u16 u32 u64 u128 usize f32 f64 std::time::Duration }
