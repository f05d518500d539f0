//! How items fail, wait, come back, and give up.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use cancel_safe_resumable::{Done, FileStore, ItemContext, ItemError, ResumableTask, Retry, Run, TaskError};
use futures_util::{FutureExt, StreamExt};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::support::{PATIENCE, checkpoint, complete, double, numbers, restored};

async fn drain(run: &mut Run<u64>) -> Vec<Done<u64>> {
    run.collect().await
}

/// Fails for the items of a list and doubles the others.
fn failing(poison: &'static [u64]) -> impl Fn(ItemContext, u64) -> std::future::Ready<Result<u64, ItemError>> {
    move |_, x| std::future::ready(if poison.contains(&x) { Err(io::Error::other("poison").into()) } else { Ok(x * 2) })
}

#[tokio::test(start_paused = true)]
async fn poison_items_first_and_last_do_not_stop_the_others() {
    let (_dir, path) = checkpoint();
    for concurrency in [1, 8] {
        let builder = numbers(&path).concurrency(concurrency).retry(Retry::attempts(3)).quarantine(2);
        let mut run = builder.stream(0..100, failing(&[0, 99]));
        let all = drain(&mut run).await;
        let summary = run.finish().await.unwrap();
        assert_eq!((all.len(), summary.quarantined), (100, 2));
        for done in all {
            match done.result {
                Ok(result) => assert_eq!(result, done.index as u64 * 2),
                Err(quarantined) => {
                    assert!([0, 99].contains(&done.index));
                    assert_eq!((quarantined.attempts, quarantined.cause.as_str()), (3, "poison"));
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn one_poison_item_too_many_ends_the_run_and_has_all_its_attempts_again() {
    let (_dir, path) = checkpoint();
    let builder = || numbers(&path).retry(Retry::attempts(2).backoff(Duration::ZERO, Duration::ZERO)).quarantine(1);
    let error = builder().stream(0..100, failing(&[10, 20])).finish().await.unwrap_err();
    assert!(error.is_quarantine_full());
    assert!(matches!(error, TaskError::QuarantineFull { limit: 1, index: 20, attempts: 2, .. }), "{error}");
    let attempts = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&attempts);
    let run = builder().stream(0..100, move |cx, x| {
        if cx.index() == 20 {
            seen.fetch_max(cx.attempt() as usize, Ordering::Relaxed);
        }
        double(x)
    });
    let summary = run.finish().await.unwrap();
    assert_eq!((summary.completed, summary.quarantined, summary.total), (80, 1, 100));
    assert_eq!(attempts.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_permanent_failure_is_not_tried_again() {
    let (_dir, path) = checkpoint();
    let mut run = numbers(&path)
        .retry(Retry::attempts(9))
        .quarantine(1)
        .stream([7], |_, _| async { Err(ItemError::permanent("no such page")) });
    let done = run.next().await.unwrap();
    assert_eq!(done.result.unwrap_err().to_string(), "in quarantine after 1 attempt: no such page");
}

#[tokio::test(start_paused = true)]
async fn attempts_count_across_a_restart_unless_each_run_has_its_own_and_the_idempotency_key_stays() {
    for (retry, expected) in
        [(Retry::attempts(4), &[1, 2, 3, 3, 4][..]), (Retry::attempts(4).per_run(), &[1, 2, 3, 1, 2, 3, 4])]
    {
        let (_dir, path) = checkpoint();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let stuck = Arc::new(tokio::sync::Notify::new());
        let run = |stop_at: u32| {
            let (seen, stuck) = (Arc::clone(&seen), Arc::clone(&stuck));
            numbers(&path).retry(retry).quarantine(1).stream([1u64], move |cx, _| {
                seen.lock().unwrap().push((cx.attempt(), cx.idempotency_key()));
                let stuck = Arc::clone(&stuck);
                async move {
                    if cx.attempt() == stop_at {
                        stuck.notify_one();
                        std::future::pending::<()>().await;
                    }
                    Err(ItemError::retry("not yet"))
                }
            })
        };
        tokio::select! {
            done = async { run(3).next().await } => panic!("it should be stuck: {done:?}"),
            () = stuck.notified() => {}
        }
        let done = run(9).next().await.unwrap();
        assert_eq!(done.attempts, 4);
        let seen = seen.lock().unwrap();
        // The drop cut the third attempt: it had not failed, so it never counts.
        assert_eq!(seen.iter().map(|(attempt, _)| *attempt).collect::<Vec<_>>(), expected);
        assert!(seen.iter().all(|(_, key)| *key == seen[0].1 && key.len() == 32));
    }
}

#[tokio::test]
async fn idempotency_keys_differ_between_items_and_checkpoints() {
    let keys = Arc::new(Mutex::new(Vec::new()));
    for _ in 0..2 {
        let (_dir, path) = checkpoint();
        let keys = Arc::clone(&keys);
        let run = numbers(&path).stream(0..50, move |cx, x| {
            keys.lock().unwrap().push(cx.idempotency_key());
            double(x)
        });
        run.finish().await.unwrap();
    }
    let mut keys = Arc::try_unwrap(keys).unwrap().into_inner().unwrap();
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), 100);
}

#[tokio::test(start_paused = true)]
async fn a_deferred_item_waits_without_a_slot_and_without_an_attempt() {
    let (_dir, path) = checkpoint();
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&calls);
    let started = Instant::now();
    let mut run = numbers(&path).concurrency(1).stream(0..20, move |cx, x| {
        let nth = if cx.index() == 0 { counter.fetch_add(1, Ordering::Relaxed) } else { 9 };
        async move {
            assert_eq!(cx.attempt(), 1);
            if nth < 2 {
                return Err(ItemError::defer(Duration::from_secs(60), "the breaker is open"));
            }
            Ok(x * 2)
        }
    });
    let order: Vec<usize> = drain(&mut run).await.iter().map(|done| done.index).collect();
    assert_eq!(order, (1..20).chain([0]).collect::<Vec<_>>());
    assert_eq!(started.elapsed().as_secs(), 120);
    run.finish().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_item_that_defers_without_end_fails_in_the_end() {
    let (_dir, path) = checkpoint();
    let forever = |_, _| async { Err(ItemError::defer(Duration::from_secs(1), "closed")) };
    let mut run = numbers(&path).max_defers(10).quarantine(1).stream([1], forever);
    let done = run.next().await.unwrap();
    assert_eq!(done.result.unwrap_err().attempts, 1);
}

#[tokio::test(start_paused = true)]
async fn waiting_items_are_bounded_and_the_run_still_ends() {
    let (_dir, path) = checkpoint();
    let waiting = Arc::new(AtomicUsize::new(0));
    let most = Arc::new(AtomicUsize::new(0));
    let (now, peak) = (Arc::clone(&waiting), Arc::clone(&most));
    let run = numbers(&path).concurrency(4).max_ahead(10).stream(0..200, move |_, x| {
        let (now, peak) = (Arc::clone(&now), Arc::clone(&peak));
        async move {
            if x % 2 == 0 && fastrand::bool() {
                peak.fetch_max(now.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
                return Err(ItemError::defer(Duration::from_millis(50), "later"));
            }
            Ok(x * 2)
        }
    });
    assert_eq!(run.finish().await.unwrap().completed, 200);
    assert!(most.load(Ordering::Relaxed) > 10, "some were deferred");
}

#[tokio::test]
async fn a_panic_in_a_stream_is_a_failed_attempt() {
    let (_dir, path) = checkpoint();
    let mut run = numbers(&path).quarantine(2).stream(0..10, |_, x| {
        assert!(x != 3, "three, when called");
        async move {
            assert!(x != 4, "four, when polled");
            Ok(x * 2)
        }
    });
    let causes: Vec<_> = drain(&mut run).await.into_iter().filter_map(|done| done.result.err()).collect();
    assert_eq!(causes[0].cause, "panicked: three, when called");
    assert_eq!(causes[1].cause, "panicked: four, when polled");
    assert_eq!(run.finish().await.unwrap().completed, 8);
}

#[tokio::test]
async fn a_panic_in_process_goes_on_to_the_caller_and_loses_nothing() {
    let (_dir, path) = checkpoint();
    let mut task = ResumableTask::new((0..10u64).collect(), path.clone(), CancellationToken::new());
    let panicking = task.process(|x| async move {
        assert!(x != 6, "six");
        x
    });
    assert!(std::panic::AssertUnwindSafe(panicking).catch_unwind().await.is_err());
    assert_eq!(task.process(|x| async move { x }).await.unwrap().len(), 10);
    assert_eq!(task.summary().unwrap().restored, 6);
}

#[tokio::test]
async fn a_source_that_panics_loses_nothing() {
    let (_dir, path) = checkpoint();
    let source = (0..10u64).inspect(|x| assert!(*x != 5, "the source breaks"));
    let run = numbers(&path).stream(source, |_, x| double(x)).finish();
    assert!(std::panic::AssertUnwindSafe(run).catch_unwind().await.is_err());
    let restored = complete(&path, 10).await.unwrap().iter().filter(|done| done.restored).count();
    assert_eq!(restored, 5);
}

#[tokio::test(start_paused = true)]
async fn one_slow_item_does_not_hold_the_others_up() {
    let (_dir, path) = checkpoint();
    let slow_first = |_, x: u64| async move {
        if x == 0 {
            sleep(Duration::from_secs(10)).await;
        }
        Ok(x * 2)
    };
    let mut run = numbers(&path).concurrency(2).stream(0..10_000, slow_first);
    let order: Vec<usize> = drain(&mut run).await.iter().map(|done| done.index).collect();
    assert_eq!(order.last(), Some(&0));
    run.finish().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_ordered_run_keeps_the_order_and_holds_no_more_than_it_may() {
    let (_dir, path) = checkpoint();
    let begun = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&begun);
    let mut run = numbers(&path).concurrency(4).max_ahead(16).ordered().stream(0..1000, move |_, x| {
        counter.fetch_add(1, Ordering::Relaxed);
        async move {
            sleep(Duration::from_millis(if x == 0 { 10_000 } else { fastrand::u64(0..20) })).await;
            Ok(x * 2)
        }
    });
    assert_eq!(run.next().await.unwrap().index, 0);
    assert!(begun.load(Ordering::Relaxed) <= 16 + 4 + 1, "it ran ahead of a slow first item");
    let order: Vec<usize> = drain(&mut run).await.iter().map(|done| done.index).collect();
    assert_eq!(order, (1..1000).collect::<Vec<_>>());
    run.finish().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn in_flight_items_finish_within_the_grace_and_are_dropped_without() {
    for (grace, kept) in [(0, 0), (5, 2), (60, 4)] {
        let (_dir, path) = checkpoint();
        let token = CancellationToken::new();
        let cancel = token.clone();
        let run = numbers(&path).concurrency(4).cancel(token).grace(Duration::from_secs(grace)).stream(
            0..100,
            move |_, x| {
                if x == 3 {
                    cancel.cancel();
                }
                async move {
                    sleep(Duration::from_secs(if x < 2 { 2 } else { 30 })).await;
                    Ok(x * 2)
                }
            },
        );
        assert!(run.finish().await.unwrap_err().is_cancelled());
        assert_eq!(restored(&path, 100).await.len(), kept, "grace {grace} s");
    }
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_run_whose_last_items_wait_is_not_complete() {
    let (_dir, path) = checkpoint();
    let token = CancellationToken::new();
    let cancel = token.clone();
    let run = numbers(&path).concurrency(2).cancel(token).grace(Duration::from_secs(60)).stream(0..2, move |_, x| {
        let cancel = cancel.clone();
        async move {
            if x == 0 {
                return Err(ItemError::defer(Duration::from_secs(3600), "not now"));
            }
            cancel.cancel();
            sleep(Duration::from_secs(5)).await;
            Ok(x * 2)
        }
    });
    assert!(run.finish().await.unwrap_err().is_cancelled());
    assert_eq!(restored(&path, 2).await, [1]);
}

#[tokio::test]
async fn when_a_cancel_returns_every_completed_item_is_on_disk() {
    let (_dir, path) = checkpoint();
    let token = CancellationToken::new();
    let never = Duration::from_secs(3600);
    let mut run = numbers(&path).checkpoint_every(never).cancel(token.clone()).stream(0..1000, |_, x| double(x));
    for _ in 0..123 {
        run.next().await.unwrap();
    }
    token.cancel();
    assert!(run.finish().await.unwrap_err().is_cancelled());
    let copy = path.with_extension("copy");
    std::fs::copy(&path, &copy).unwrap();
    assert_eq!(restored(&copy, 1000).await, (0..123).collect::<Vec<_>>());
}

#[tokio::test]
async fn quarantined_items_are_restored_as_such_until_they_are_retried() {
    let (_dir, path) = checkpoint();
    let builder = || numbers(&path).quarantine(5);
    assert_eq!(builder().stream(0..10, failing(&[2, 3])).finish().await.unwrap().quarantined, 2);
    let mut again = builder().stream(0..10, |_, x| double(x));
    let quarantined: Vec<_> = drain(&mut again).await.into_iter().filter(|done| done.result.is_err()).collect();
    assert!(quarantined.iter().all(|done| done.restored) && quarantined.len() == 2);
    drop(again);
    let summary = builder().retry_quarantined(true).stream(0..10, |_, x| double(x)).finish().await.unwrap();
    assert_eq!((summary.completed, summary.quarantined), (2, 0));
    assert_eq!(complete(&path, 10).await.unwrap().iter().filter(|done| done.result.is_ok()).count(), 10);
}

#[tokio::test]
async fn a_result_that_is_no_longer_valid_is_computed_anew_and_the_last_one_counts() {
    let (_dir, path) = checkpoint();
    complete(&path, 10).await.unwrap();
    let run = numbers(&path).revalidate(|item, result| *item != 4 && *result == item * 2);
    let summary = run.stream(0..10, |_, x| async move { Ok(x * 100) }).finish().await.unwrap();
    assert_eq!((summary.completed, summary.restored), (1, 9));
    let all = complete(&path, 10).await.unwrap();
    assert_eq!((all[3].result.clone(), all[4].result.clone()), (Ok(6), Ok(400)));
}

#[tokio::test]
async fn an_item_of_unknown_end_is_never_started_twice_in_silence() {
    let (_dir, path) = checkpoint();
    let builder = || numbers(&path).at_most_once().concurrency(4).quarantine(10);
    let starts = Arc::new(Mutex::new(vec![0; 40]));
    let run = |stuck: bool| {
        let starts = Arc::clone(&starts);
        move |_: ItemContext, x: u64| {
            starts.lock().unwrap()[x as usize] += 1;
            async move {
                if stuck && x == 21 {
                    std::future::pending::<()>().await;
                }
                Ok(x * 2)
            }
        }
    };
    let token = CancellationToken::new();
    let mut first = builder().cancel(token.clone()).stream(0..40, run(true));
    for _ in 0..30 {
        first.next().await.unwrap();
    }
    token.cancel();
    assert!(first.finish().await.unwrap_err().is_cancelled());
    let mut second = builder().stream(0..40, run(false));
    let all = drain(&mut second).await;
    let uncertain: Vec<_> = all.iter().filter_map(|done| Some((done.index, done.result.as_ref().err()?))).collect();
    assert!(uncertain.iter().any(|(index, _)| *index == 21));
    assert!(uncertain.iter().all(|(_, quarantined)| quarantined.uncertain));
    assert_eq!(all.len(), 40);
    assert!(starts.lock().unwrap().iter().all(|starts| *starts <= 1), "{starts:?}");
    second.finish().await.unwrap();
    // On request it runs again.
    let summary = builder().retry_quarantined(true).stream(0..40, run(false)).finish().await.unwrap();
    assert_eq!((summary.completed, summary.quarantined), (uncertain.len(), 0));
}

#[tokio::test]
async fn items_whose_intent_was_not_yet_durable_are_not_uncertain_after_a_drop() {
    let (_dir, path) = checkpoint();
    let (read, started) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (reader, starter) = (Arc::clone(&read), Arc::clone(&started));
    let source = (0..8).inspect(move |_| {
        reader.fetch_add(1, Ordering::Relaxed);
    });
    let mut run = numbers(&path).at_most_once().concurrency(8).stream(source, move |_, _| {
        starter.fetch_add(1, Ordering::Relaxed);
        std::future::pending()
    });
    // Dropped in the very poll that has announced all of them, because the sync takes longer.
    while read.load(Ordering::Relaxed) < 8 {
        assert!(futures_util::poll!(run.next()).is_pending());
        tokio::task::yield_now().await;
    }
    drop(run);
    let mut next = numbers(&path).at_most_once().concurrency(8).quarantine(8).stream(0..8, |_, x| double(x));
    let uncertain = drain(&mut next).await.iter().filter(|done| done.result.is_err()).count();
    assert_eq!(uncertain, started.load(Ordering::Relaxed));
    next.finish().await.unwrap();
}

#[tokio::test]
async fn no_time_is_too_long() {
    let (_dir, path) = checkpoint();
    let builder = || numbers(&path).checkpoint_every(Duration::MAX).grace(Duration::MAX);
    assert_eq!(builder().stream(0..10, |_, x| double(x)).finish().await.unwrap().completed, 10);
    assert_eq!(builder().stream(0..10, |_, x| double(x)).finish().await.unwrap().restored, 10);

    let retry = Retry::attempts(3).backoff(Duration::MAX, Duration::MAX);
    let token = CancellationToken::new();
    let mut run = builder().retry(retry).concurrency(2).cancel(token.clone()).stream(0..13, |_, x| async move {
        match x {
            10 => Err(ItemError::retry("not in this life")),
            11 => Err(ItemError::defer(Duration::MAX, "nor in this")),
            _ => Ok(x * 2),
        }
    });
    for _ in 0..11 {
        run.next().await.unwrap();
    }
    token.cancel();
    assert!(run.finish().await.unwrap_err().is_cancelled());
}

#[tokio::test]
async fn options_that_contradict_themselves_open_nothing() {
    let (_dir, path) = checkpoint();
    for builder in [
        ResumableTask::builder("no store"),
        numbers(&path).concurrency(0),
        numbers(&path).max_ahead(0),
        numbers(&path).retry(Retry::attempts(2).backoff(Duration::from_secs(2), Duration::from_secs(1))),
        numbers(&path).checkpoint_every_items(0),
        numbers(&path).store(FileStore::at("")),
    ] {
        let error = builder.stream(0..3, |_, x| double(x)).finish().await.unwrap_err();
        assert!(matches!(error, TaskError::Config(_)), "{error}");
    }
    assert!(!path.exists());
}

#[tokio::test]
async fn an_item_that_waited_is_finished_however_many_are_always_ready() {
    let (_dir, path) = checkpoint();
    let notify = Arc::new(tokio::sync::Notify::new());
    let mut run = numbers(&path).concurrency(4).stream(0..5000, move |_, x| {
        let notify = Arc::clone(&notify);
        async move {
            match x {
                0 => notify.notified().await,
                10 => notify.notify_one(),
                _ => {}
            }
            Ok(x)
        }
    });
    let order = tokio::time::timeout(PATIENCE, drain(&mut run)).await.expect("it waits on");
    let order: Vec<_> = order.iter().map(|done| done.index).collect();
    run.finish().await.unwrap();
    let at = order.iter().position(|index| *index == 0).unwrap();
    assert!((10..100).contains(&at) && order.len() == 5000, "it came out as number {at}");
}
