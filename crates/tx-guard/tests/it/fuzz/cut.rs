//! Ways to drop a future before its time.

use std::pin::pin;
use std::task::Poll;

/// Drops `future` after it has been pending so many times, each time when it was woken. None if it was dropped.
pub(crate) async fn cut<T>(future: impl Future<Output = T>, after: Option<u32>) -> Option<T> {
    let Some(mut left) = after else { return Some(future.await) };
    let mut future = pin!(future);
    std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => {
            left -= 1;
            if left == 0 { Poll::Ready(None) } else { Poll::Pending }
        }
    })
    .await
}
