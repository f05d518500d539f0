//! The smallest cancellation: a drop after a number of pendings.
//!
//! Invariant: the future has been dropped when the outcome is returned.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

/// Polls `future` until it is ready, or drops it once it has been pending `pendings` times. Returns `None` if it was
/// dropped. With 0 pendings it is never polled.
///
/// Use it in a test that needs one drop at one point; [`Explore`](crate::Explore) visits them all.
///
/// # Cancel safety
///
/// This method is cancel safe. If dropped before completion, `future` is dropped with it, where it stands.
///
/// # Examples
///
/// ```
/// use cancel_safe_testing::drop_after;
/// use tokio::task::yield_now;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// assert_eq!(drop_after(1, async { yield_now().await; 7 }).await, None);
/// assert_eq!(drop_after(2, async { yield_now().await; 7 }).await, Some(7));
/// # }
/// ```
pub async fn drop_after<F: Future>(pendings: usize, future: F) -> Option<F::Output> {
    if pendings == 0 {
        return None;
    }
    let mut future = pin!(future);
    let mut left = pendings;
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => {
            left -= 1;
            if left == 0 { Poll::Ready(None) } else { Poll::Pending }
        }
    })
    .await
}
