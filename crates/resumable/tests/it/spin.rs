//! No poll of a run spins: each ends as soon as there is nothing to do.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::Duration,
};

use cancel_safe_resumable::{Builder, ItemError, Summary, TaskError};
use futures_util::{StreamExt, stream};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::support::{PATIENCE, checkpoint, double, numbers};

/// Runs `operation` on a separate runtime, which an endless poll may block, and returns its result.
fn bounded<T: Send + 'static>(operation: impl AsyncFnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        drop(sender.send(runtime.block_on(operation())));
    });
    receiver.recv_timeout(PATIENCE).expect("a poll never ends")
}

/// Runs three numbers from a source that then waits, and fires the token when all of them are done.
async fn cancelled_at_its_end<S>(
    rest: S,
    change: fn(Builder<u64, u64>) -> Builder<u64, u64>,
) -> Result<Summary, TaskError>
where
    S: futures_util::Stream<Item = u64> + Send + 'static,
{
    let (_dir, path) = checkpoint();
    let token = CancellationToken::new();
    let source = stream::iter(0..3u64).chain(rest);
    let mut run = change(numbers(&path)).cancel(token.clone()).stream_from(source, |_, x| double(x));
    for _ in 0..3 {
        run.next().await.unwrap();
    }
    assert!(futures_util::poll!(run.next()).is_pending());
    token.cancel();
    run.finish().await
}

#[test]
fn a_cancel_ends_a_run_whose_source_waits_and_says_that_nothing_will_come() {
    for change in [|builder| builder, |builder: Builder<u64, u64>| builder.concurrency(8).grace(Duration::from_secs(1))]
    {
        let ended = bounded(async move || cancelled_at_its_end(stream::pending(), change).await);
        assert!(ended.unwrap_err().is_cancelled());
    }
}

#[test]
fn a_run_whose_last_item_fires_the_token_is_complete() {
    let ended = bounded(async || {
        let (_dir, path) = checkpoint();
        let token = CancellationToken::new();
        let run = numbers(&path).cancel(token.clone()).stream(0..3, move |_, x| {
            if x == 2 {
                token.cancel();
            }
            double(x)
        });
        run.finish().await
    });
    assert_eq!(ended.unwrap().completed, 3);
}

/// The announcement fills the buffer and takes the only slot: there is room again long before there is a slot.
#[test]
fn a_full_buffer_and_no_free_slot_do_not_go_round() {
    let ended = bounded(async || {
        let (_dir, path) = checkpoint();
        let builder = numbers(&path).at_most_once().key(|x| format!("{x}{}", "k".repeat(5 << 20)));
        let run = builder.stream(0..2, |_, x| async move {
            tokio::time::sleep(Duration::from_millis(20)).await;
            Ok(x)
        });
        run.finish().await
    });
    assert_eq!(ended.unwrap().completed, 2);
}

#[test]
fn results_that_are_restored_let_others_run() {
    const ITEMS: u64 = 100_000;
    let turns = bounded(async || {
        let (_dir, path) = checkpoint();
        numbers(&path).stream(0..ITEMS, |_, x| double(x)).finish().await.unwrap();
        let turns = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&turns);
        tokio::spawn(async move {
            loop {
                counted.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
            }
        });
        let mut run = numbers(&path).stream(0..ITEMS, |_, x| double(x));
        // The run is open, and its thread has nothing to do any more.
        assert!(run.next().await.unwrap().restored);
        let before = turns.load(Ordering::Relaxed);
        for _ in 1..ITEMS {
            assert!(run.next().await.unwrap().restored);
        }
        turns.load(Ordering::Relaxed) - before
    });
    // tokio lets a task continue 128 times; here each time stands for a few items.
    assert!(turns > ITEMS / 10_000, "another task had {turns} turns");
}

#[test]
fn an_item_that_defers_itself_to_this_instant_lets_others_run() {
    let ended = bounded(async || {
        let (_dir, path) = checkpoint();
        let (token, begun) = (CancellationToken::new(), Arc::new(Notify::new()));
        let begin = Arc::clone(&begun);
        let run = numbers(&path).max_defers(u32::MAX).cancel(token.clone()).stream([0], move |_, _| {
            begin.notify_one();
            async { Err(ItemError::defer(Duration::ZERO, "again")) }
        });
        let (ended, ()) = tokio::join!(run.finish(), async {
            begun.notified().await;
            token.cancel();
        });
        ended
    });
    assert!(ended.unwrap_err().is_cancelled());
}
