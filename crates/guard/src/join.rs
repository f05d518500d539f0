//! Futures that run concurrently, none of which is dropped because another one failed.
//!
//! Invariant: every branch is polled to its end before the first error is returned.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use pin_project_lite::pin_project;

/// Runs all branches to their ends. Returns their values, or the error of the first failed branch in the order of the
/// tuple.
///
/// `tokio::try_join!` returns at the first error and drops the other branches where they stand: half a file, a
/// transaction in doubt. Use it if every branch is cancel safe and the rest of the work is worthless, as with reads.
/// Use this function if a branch changes something. It drops the other errors; `tokio::join!` returns them all.
///
/// A tuple has 2 to 8 branches. They run in the caller's task, so a branch that blocks its thread holds up the others.
/// The wait for a branch has no bound: give a branch that may never end a [`timeout`](crate::timeout()).
///
/// # Cancel safety
///
/// This method is not cancel safe. If dropped before completion, every unfinished branch is dropped where it stands.
/// Mark the steps of a branch that belong together with [`critical`](crate::critical()), or run the whole in a
/// [`Reaper::shield`](crate::Reaper::shield).
///
/// # Errors
///
/// Returns the error of the first failed branch in the tuple, once all branches have ended.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use cancel_safe_guard::join_then_try;
/// use tokio::time::sleep;
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
/// let mut written = 0;
/// let config = async {
///     sleep(Duration::from_secs(2)).await;
///     written += 1;
///     Ok("config")
/// };
/// let upload = async { Err::<(), _>("no route to host") };
///
/// assert_eq!(join_then_try((config, upload)).await, Err("no route to host"));
/// assert_eq!(written, 1, "the file was written to its end all the same");
/// # }
/// ```
pub fn join_then_try<B: Branches>(branches: B) -> impl Future<Output = Result<B::Values, B::Error>> {
    branches.run()
}

/// A tuple of 2 to 8 futures whose results share one error type, for [`join_then_try`].
pub trait Branches: sealed::Sealed {
    /// The tuple of the branches' values.
    type Values;
    /// The branches' error.
    type Error;

    /// [`join_then_try`] itself.
    ///
    /// # Cancel safety
    ///
    /// This method is not cancel safe. If dropped before completion, every unfinished branch is dropped where it
    /// stands.
    #[doc(hidden)]
    fn run(self) -> impl Future<Output = Result<Self::Values, Self::Error>>;
}

mod sealed {
    #[expect(unnameable_types, reason = "so that nobody else implements it")]
    pub trait Sealed {}
}

pin_project! {
    /// A future, or what it returned.
    #[project = Projected]
    enum Branch<F: Future> {
        Running { #[pin] future: F },
        Ended { output: Option<F::Output> },
    }
}

impl<F: Future> Branch<F> {
    /// Polls the branch if it is still running; returns whether it has ended.
    fn has_ended(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> bool {
        let Projected::Running { future } = self.as_mut().project() else { return true };
        let Poll::Ready(output) = future.poll(cx) else { return false };
        // The future is dropped at once, so that what it holds is not kept until the last branch ends.
        self.set(Self::Ended { output: Some(output) });
        true
    }

    fn take(self: Pin<&mut Self>) -> F::Output {
        let Projected::Ended { output } = self.project() else { unreachable!("every branch has ended") };
        output.take().expect("it is taken once")
    }
}

macro_rules! tuple {
    ($($future:ident $Future:ident $Value:ident),+) => {
        impl<$($Future,)+> sealed::Sealed for ($($Future,)+) {}

        impl<Failure, $($Future, $Value,)+> Branches for ($($Future,)+)
        where
            $($Future: Future<Output = Result<$Value, Failure>>,)+
        {
            type Values = ($($Value,)+);
            type Error = Failure;

            async fn run(self) -> Result<Self::Values, Failure> {
                let ($($future,)+) = self;
                $(let mut $future = pin!(Branch::Running { future: $future });)+
                poll_fn(|cx| {
                    let ended = [$($future.as_mut().has_ended(cx),)+];
                    if ended.contains(&false) { Poll::Pending } else { Poll::Ready(()) }
                })
                .await;
                Ok(($($future.as_mut().take()?,)+))
            }
        }
    };
}

tuple!(a A AV, b B BV);
tuple!(a A AV, b B BV, c C CV);
tuple!(a A AV, b B BV, c C CV, d D DV);
tuple!(a A AV, b B BV, c C CV, d D DV, e E EV);
tuple!(a A AV, b B BV, c C CV, d D DV, e E EV, f F FV);
tuple!(a A AV, b B BV, c C CV, d D DV, e E EV, f F FV, g G GV);
tuple!(a A AV, b B BV, c C CV, d D DV, e E EV, f F FV, g G GV, h H HV);
