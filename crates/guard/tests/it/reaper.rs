//! Shields, deferred cleanups and drains: everything started is finished, timed out or lost.

use std::future::{pending, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use cancel_safe_guard::{Drain, Reaper, timeout};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep};

use crate::{caught, poll_once};

const GRACE: Duration = Duration::from_secs(30);

fn counts(drain: Drain) -> (usize, usize, usize) {
    (drain.finished, drain.timed_out, drain.lost)
}

fn current_thread() -> Runtime {
    Builder::new_current_thread().enable_time().build().unwrap()
}

/// Yields once, then sets `done`.
async fn two_polls(done: Arc<AtomicUsize>) {
    yield_now().await;
    done.fetch_add(1, SeqCst);
}

#[tokio::test]
async fn a_shield_that_is_never_polled_never_runs() {
    let (reaper, done) = (Reaper::new(), Arc::new(AtomicUsize::new(0)));
    drop(reaper.shield(two_polls(Arc::clone(&done))));
    assert_eq!(counts(reaper.drain(GRACE).await), (0, 0, 0));
    assert_eq!(done.load(SeqCst), 0);
    assert_eq!(Arc::strong_count(&done), 1, "the future was dropped");
}

#[tokio::test]
async fn a_shield_returns_its_output_inline() {
    let reaper = Reaper::new();
    assert_eq!(reaper.shield(ready(7)).await, 7);
    assert_eq!(
        reaper
            .shield(async {
                yield_now().await;
                8
            })
            .await,
        8
    );
    assert_eq!(counts(reaper.drain(GRACE).await), (2, 0, 0));
}

#[tokio::test]
async fn a_shield_dropped_after_its_first_poll_finishes() {
    let (reaper, done) = (Reaper::new(), Arc::new(AtomicUsize::new(0)));
    let mut shield = reaper.shield(two_polls(Arc::clone(&done)));
    assert!(poll_once(&mut shield).is_pending());
    drop(shield);
    assert_eq!(done.load(SeqCst), 0, "nothing is finished inside the drop");
    let drain = reaper.drain(GRACE).await;
    assert_eq!(counts(drain), (1, 0, 0));
    assert!(drain.is_clean());
    assert_eq!(done.load(SeqCst), 1);
}

#[test]
fn a_shield_dropped_on_a_foreign_thread_finishes_on_the_runtime_that_polled_it() {
    let (reaper, runtime) = (Reaper::new(), current_thread());
    let done = Arc::new(AtomicUsize::new(0));
    let mut shield = reaper.shield(two_polls(Arc::clone(&done)));
    runtime.block_on(async { assert!(poll_once(&mut shield).is_pending()) });
    std::thread::spawn(move || drop(shield)).join().unwrap();
    assert_eq!(counts(runtime.block_on(reaper.drain(GRACE))), (1, 0, 0));
    assert_eq!(done.load(SeqCst), 1);
}

#[test]
fn a_shield_polled_outside_any_runtime_finishes_on_the_runtime_around_its_drop() {
    let (reaper, runtime) = (Reaper::new(), current_thread());
    let mut shield = reaper.shield(yield_now());
    assert!(poll_once(&mut shield).is_pending());
    runtime.block_on(async { drop(shield) });
    assert_eq!(counts(runtime.block_on(reaper.drain(GRACE))), (1, 0, 0));
}

#[test]
fn a_shield_without_any_runtime_is_lost_and_does_not_panic() {
    let reaper = Reaper::new();
    let mut inline = reaper.shield(yield_now());
    assert!(poll_once(&mut inline).is_pending());
    assert!(poll_once(&mut inline).is_ready(), "it runs inline without one");
    let mut shield = reaper.shield(yield_now());
    assert!(poll_once(&mut shield).is_pending());
    drop(shield);
    assert_eq!(counts(current_thread().block_on(reaper.drain(GRACE))), (1, 0, 1));
}

#[test]
fn a_shield_dropped_after_its_runtime_is_lost() {
    let reaper = Reaper::new();
    for builder in [&mut Builder::new_current_thread(), Builder::new_multi_thread().worker_threads(1)] {
        let runtime = builder.build().unwrap();
        let mut shield = reaper.shield(pending::<()>());
        runtime.block_on(async { assert!(poll_once(&mut shield).is_pending()) });
        drop(runtime);
        drop(shield);
    }
    assert_eq!(counts(current_thread().block_on(reaper.drain(GRACE))), (0, 0, 2));
}

#[test]
fn a_shield_cut_off_by_the_shutdown_of_its_runtime_is_lost() {
    let (reaper, runtime) = (Reaper::new(), current_thread());
    runtime.block_on(async {
        let mut abandoned = reaper.shield(pending::<()>());
        assert!(poll_once(&mut abandoned).is_pending());
        drop(abandoned);
        // This one is dropped by the shutdown itself, together with its caller.
        let shield = reaper.shield(pending::<()>());
        drop(tokio::spawn(shield));
        yield_now().await;
        assert_eq!(counts(reaper.drain(Duration::from_millis(1)).await), (0, 2, 0));
    });
    drop(runtime);
    let drain = current_thread().block_on(reaper.drain(GRACE));
    assert_eq!(counts(drain), (0, 0, 2));
    assert!(!drain.is_clean());
}

#[tokio::test]
async fn a_future_that_panics_is_lost_inline_and_abandoned() {
    let reaper = Reaper::new();
    let inline = caught(reaper.shield(async { panic!("on purpose") })).await;
    assert_eq!(inline, Err::<(), _>("on purpose".to_owned()));
    let mut abandoned = reaper.shield(async {
        yield_now().await;
        panic!("on purpose, in a task");
    });
    assert!(poll_once(&mut abandoned).is_pending());
    drop(abandoned);
    assert_eq!(counts(reaper.drain(GRACE).await), (0, 0, 2));
}

#[tokio::test(start_paused = true)]
async fn a_drain_returns_by_its_grace_and_a_later_one_counts_the_stragglers() {
    let (reaper, start) = (Reaper::new(), Instant::now());
    for seconds in 1..=5 {
        let work = reaper.shield(sleep(Duration::from_secs(seconds)));
        assert!(tokio::time::timeout(Duration::ZERO, work).await.is_err());
    }
    assert_eq!(counts(reaper.drain(Duration::ZERO).await), (0, 5, 0));
    let first = reaper.drain(Duration::from_millis(2_500)).await;
    assert_eq!((counts(first), first.is_clean()), ((2, 3, 0), false));
    assert_eq!(start.elapsed(), Duration::from_millis(2_500));
    assert_eq!(counts(reaper.drain(GRACE).await), (5, 0, 0));
    assert_eq!(start.elapsed(), Duration::from_secs(5), "it does not wait longer than needed");
}

#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_a_shield_that_its_caller_still_polls() {
    let (reaper, start) = (Reaper::new(), Instant::now());
    let caller = tokio::spawn({
        let reaper = reaper.clone();
        async move { reaper.shield(sleep(Duration::from_secs(3))).await }
    });
    yield_now().await;
    assert_eq!(counts(reaper.drain(GRACE).await), (1, 0, 0));
    assert_eq!(start.elapsed(), Duration::from_secs(3));
    caller.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_shield_abandoned_or_begun_during_a_drain_is_waited_for() {
    let (reaper, start) = (Reaper::new(), Instant::now());
    let caller = tokio::spawn(reaper.shield(sleep(Duration::from_secs(3))));
    let late = tokio::spawn({
        let reaper = reaper.clone();
        async move {
            sleep(Duration::from_secs(2)).await;
            reaper.shield(sleep(Duration::from_secs(4))).await;
        }
    });
    yield_now().await;
    let (drain, ()) = tokio::join!(reaper.drain(GRACE), async {
        sleep(Duration::from_secs(1)).await;
        caller.abort();
        assert!(caller.await.unwrap_err().is_cancelled());
    });
    assert_eq!(counts(drain), (2, 0, 0));
    assert_eq!(start.elapsed(), Duration::from_secs(6));
    late.await.unwrap();
}

#[tokio::test]
async fn a_shield_dropped_after_completion_is_counted_once() {
    let reaper = Reaper::new();
    let mut shield = reaper.shield(yield_now());
    assert!(poll_once(&mut shield).is_pending());
    assert!(poll_once(&mut shield).is_ready());
    assert_eq!(counts(reaper.drain(GRACE).await), (1, 0, 0));
    drop(shield);
    assert_eq!(counts(reaper.drain(GRACE).await), (1, 0, 0));
}

/// A future that aborts the task which polls it: the task is dropped right after this poll.
#[tokio::test]
async fn a_shield_whose_caller_is_aborted_during_its_poll_finishes() {
    let (reaper, done) = (Reaper::new(), Arc::new(AtomicUsize::new(0)));
    let (tell, told) = oneshot::channel::<tokio::task::AbortHandle>();
    let work = Arc::clone(&done);
    let caller = tokio::spawn(reaper.shield(async move {
        told.await.unwrap().abort();
        two_polls(work).await;
    }));
    tell.send(caller.abort_handle()).unwrap();
    assert!(caller.await.unwrap_err().is_cancelled());
    assert_eq!(counts(reaper.drain(GRACE).await), (1, 0, 0));
    assert_eq!(done.load(SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn drains_at_the_same_time_all_return() {
    let reaper = Reaper::new();
    let mut work = reaper.shield(sleep(Duration::from_secs(3)));
    assert!(poll_once(&mut work).is_pending());
    drop(work);
    let (one, two, early) =
        tokio::join!(reaper.drain(GRACE), reaper.drain(GRACE), reaper.drain(Duration::from_secs(1)));
    assert_eq!((counts(one), counts(two), counts(early)), ((1, 0, 0), (1, 0, 0), (0, 1, 0)));
}

#[tokio::test(start_paused = true)]
async fn a_shield_inside_our_own_timeout_goes_on_after_it() {
    let (reaper, done) = (Reaper::new(), Arc::new(AtomicUsize::new(0)));
    let work = {
        let done = Arc::clone(&done);
        reaper.shield(async move {
            sleep(Duration::from_secs(2)).await;
            cancel_safe_guard::cancellation_point().await;
            done.fetch_add(1, SeqCst);
        })
    };
    assert!(timeout(Duration::from_secs(1), work).await.is_err());
    assert_eq!(done.load(SeqCst), 0);
    assert!(reaper.drain(GRACE).await.is_clean());
    assert_eq!(done.load(SeqCst), 1);
}

#[tokio::test]
async fn what_has_finished_has_dropped_its_future_and_its_output() {
    let (reaper, held) = (Reaper::new(), Arc::new(()));
    let (captured, output) = (Arc::clone(&held), Arc::clone(&held));
    let mut work = reaper.shield(async move {
        yield_now().await;
        drop(captured);
        output
    });
    assert!(poll_once(&mut work).is_pending());
    drop(work);
    assert!(reaper.drain(GRACE).await.is_clean());
    assert_eq!(Arc::strong_count(&held), 1);
}

#[tokio::test]
async fn a_deferred_cleanup_runs_on_drop() {
    let (reaper, done) = (Reaper::new(), Arc::new(AtomicUsize::new(0)));
    let cleanup = Arc::clone(&done);
    let deferred = reaper.defer(|| two_polls(cleanup));
    assert_eq!(counts(reaper.drain(GRACE).await), (0, 0, 0), "nothing is started before the drop");
    drop(deferred);
    assert_eq!(counts(reaper.drain(GRACE).await), (1, 0, 0));
    assert_eq!(done.load(SeqCst), 1);
}

#[tokio::test]
async fn a_disarmed_cleanup_does_not_run() {
    let reaper = Reaper::new();
    reaper.defer(|| async { unreachable!("it was disarmed") }).disarm();
    assert_eq!(counts(reaper.drain(GRACE).await), (0, 0, 0));
}

#[tokio::test]
async fn a_cleanup_run_by_hand_runs_once_even_if_it_is_dropped() {
    let (reaper, done) = (Reaper::new(), Arc::new(AtomicUsize::new(0)));
    let defer = || {
        let cleanup = Arc::clone(&done);
        reaper.defer(|| two_polls(cleanup))
    };
    defer().run().await;
    assert_eq!(done.load(SeqCst), 1);

    let mut dropped = Box::pin(defer().run());
    assert!(poll_once(&mut dropped).is_pending());
    drop(dropped);
    assert_eq!(counts(reaper.drain(GRACE).await), (2, 0, 0));

    drop(defer().run());
    assert_eq!(counts(reaper.drain(GRACE).await), (3, 0, 0));
    assert_eq!(done.load(SeqCst), 3);
}

#[test]
fn a_deferred_cleanup_uses_the_runtime_around_its_creation_else_around_its_drop() {
    let (reaper, runtime) = (Reaper::new(), current_thread());
    let created_inside = runtime.block_on(async { reaper.defer(yield_now) });
    std::thread::spawn(move || drop(created_inside)).join().unwrap();
    assert_eq!(counts(runtime.block_on(reaper.drain(GRACE))), (1, 0, 0));

    let created_outside = reaper.defer(yield_now);
    runtime.block_on(async { drop(created_outside) });
    assert_eq!(counts(runtime.block_on(reaper.drain(GRACE))), (2, 0, 0));

    drop(reaper.defer(yield_now));
    assert_eq!(counts(runtime.block_on(reaper.drain(GRACE))), (2, 0, 1));
}

#[test]
fn a_panic_in_a_cleanup_closure_is_a_loss_and_no_panic_in_drop() {
    fn never() -> std::future::Ready<()> {
        panic!("on purpose")
    }
    let (reaper, runtime) = (Reaper::new(), current_thread());
    let deferred = reaper.defer(never);
    runtime.block_on(async { drop(deferred) });
    assert_eq!(counts(runtime.block_on(reaper.drain(GRACE))), (0, 0, 1));
}

/// Shields end in every way at once, on two workers: the books have to agree with what the futures themselves saw.
#[test]
fn the_books_balance_under_contention() {
    const SHIELDS: usize = 3_000;
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    let reaper = Reaper::new();
    let [started, finished] = [(); 2].map(|()| Arc::new(AtomicUsize::new(0)));
    let slots = Arc::new(Semaphore::new(64));

    runtime.block_on(async {
        for _ in 0..SHIELDS {
            let permit = Arc::clone(&slots).acquire_owned().await.unwrap();
            let (yields, panics) = (random.usize(..6), random.u8(..10) == 0);
            let (started, finished) = (Arc::clone(&started), Arc::clone(&finished));
            let shield = reaper.shield(async move {
                let _permit = permit;
                started.fetch_add(1, SeqCst);
                for _ in 0..yields {
                    yield_now().await;
                }
                assert!(!panics, "on purpose");
                finished.fetch_add(1, SeqCst);
            });
            let caller = tokio::spawn(shield);
            for _ in 0..random.usize(..4) {
                yield_now().await;
            }
            if random.bool() {
                caller.abort();
            }
        }
        let drain = reaper.drain(GRACE).await;
        assert_eq!(drain.timed_out, 0, "seed {seed}");
        let all = || drain.finished + drain.timed_out + drain.lost;
        // A task that has not been polled yet may start its shield after the drain; none runs, so the books are whole.
        assert!(all() <= started.load(SeqCst), "seed {seed}");
    });
    drop(runtime);
    let drain = current_thread().block_on(reaper.drain(GRACE));
    assert_eq!(drain.finished, finished.load(SeqCst), "seed {seed}");
    assert_eq!(drain.finished + drain.lost, started.load(SeqCst), "seed {seed}");
    assert_eq!(drain.timed_out, 0, "seed {seed}");
}

/// The last end and the sleep of a drain race; a missed wake-up would cost the whole grace.
#[test]
fn a_drain_never_misses_the_last_end() {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    let reaper = Reaper::new();
    for round in 1..=2_000 {
        runtime.block_on(async {
            let (go, wait) = oneshot::channel::<()>();
            let mut work = reaper.shield(wait);
            assert!(poll_once(&mut work).is_pending());
            drop(work);
            drop(tokio::spawn(async move { go.send(()) }));
            assert_eq!(counts(reaper.drain(GRACE).await), (round, 0, 0));
        });
    }
}
