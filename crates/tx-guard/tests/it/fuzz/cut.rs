//! Drops a future early, or lets it end.

use cancel_safe_testing::drop_after;

/// Drops `future` after it has been pending `after` times, each time when it was woken. `None` if it was dropped.
pub(crate) async fn cut<T>(future: impl Future<Output = T>, after: Option<u32>) -> Option<T> {
    let pendings = after.map_or(usize::MAX, |after| usize::try_from(after).unwrap_or(usize::MAX));
    drop_after(pendings, future).await
}
