//! A run that waits as a whole.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use cancel_safe_resumable::{Done, ItemContext, ItemError, Progress, Retry, Run};
use futures_util::StreamExt;
use tokio::time::{Instant, sleep};

use crate::support::{checkpoint, numbers};

const HOUR: Duration = Duration::from_secs(3600);
const MINUTE: Duration = Duration::from_secs(60);

/// A service that answers a hundred calls and then refuses for an hour.
#[derive(Clone)]
struct Quota {
    calls: Arc<AtomicUsize>,
    until: Instant,
    refuse: fn() -> ItemError,
}

impl Quota {
    fn new(refuse: fn() -> ItemError) -> Self {
        Self { calls: Arc::default(), until: Instant::now() + HOUR, refuse }
    }

    async fn call(self, cx: ItemContext, x: u64) -> Result<u64, ItemError> {
        assert_eq!(cx.attempt(), 1, "no attempt is lost");
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        sleep(Duration::from_millis(10)).await;
        if call >= 100 && Instant::now() < self.until { Err((self.refuse)()) } else { Ok(x) }
    }
}

async fn all(mut run: Run<u64>) -> Vec<Done<u64>> {
    let all = run.by_ref().collect::<Vec<_>>().await;
    run.finish().await.unwrap();
    all
}

#[tokio::test(start_paused = true)]
async fn a_pause_costs_one_call_each_time_whatever_the_concurrency() {
    for concurrency in [1, 8, 64] {
        let (_dir, path) = checkpoint();
        let quota = Quota::new(|| ItemError::pause(MINUTE).because("429"));
        let service = quota.clone();
        let builder = numbers(&path).concurrency(concurrency).retry(Retry::attempts(2)).quarantine(1);
        let all = all(builder.stream(0..5000, move |cx, x| service.clone().call(cx, x))).await;
        assert!(all.iter().all(|done| done.result == Ok(done.index as u64)) && all.len() == 5000);
        let calls = quota.calls.load(Ordering::Relaxed);
        // The calls that ran when the quota was used up, and one a minute.
        assert!(calls <= 5000 + concurrency + 61, "{calls} calls at {concurrency} at once");
    }
}

#[tokio::test(start_paused = true)]
async fn items_that_all_defer_themselves_do_not_all_ask_again() {
    for concurrency in [1, 8, 64] {
        let (_dir, path) = checkpoint();
        let quota = Quota::new(|| ItemError::defer(MINUTE, "429"));
        let service = quota.clone();
        let builder = numbers(&path).concurrency(concurrency);
        assert_eq!(all(builder.stream(0..5000, move |cx, x| service.clone().call(cx, x))).await.len(), 5000);
        let calls = quota.calls.load(Ordering::Relaxed);
        assert!(calls <= 5000 + 4 * concurrency + 16 + 75, "{calls} calls at {concurrency} at once");
    }
}

#[tokio::test(start_paused = true)]
async fn items_of_which_some_defer_themselves_hold_up_no_others() {
    let (_dir, path) = checkpoint();
    let begun = Instant::now();
    // One host is down and fails at once; the others take their time.
    let mut run = numbers(&path).concurrency(8).max_ahead(10_000).stream(0..1000, move |_, x| async move {
        if x % 2 == 0 && begun.elapsed() < HOUR {
            return Err(ItemError::defer(HOUR, "down"));
        }
        sleep(Duration::from_secs(1)).await;
        Ok(x)
    });
    for _ in 0..500 {
        assert_eq!(run.next().await.unwrap().index % 2, 1);
    }
    assert!(begun.elapsed() < MINUTE * 2, "{:?}", begun.elapsed());
    assert_eq!(all(run).await.len(), 500);
}

#[tokio::test(start_paused = true)]
async fn while_a_run_is_paused_nothing_starts_and_the_progress_says_why() {
    let (_dir, path) = checkpoint();
    let starts = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&starts);
    let begun = Instant::now();
    let mut run = numbers(&path).concurrency(4).stream(0..100, move |_, x| {
        seen.lock().unwrap().push(begun.elapsed());
        async move {
            sleep(Duration::from_secs(1)).await;
            // The third names a later time than the second, which comes after it.
            match (x, begun.elapsed() < MINUTE) {
                (2, true) => Err(ItemError::pause(begun + HOUR).because("the quota of today is used up")),
                (3, true) => Err(ItemError::pause(MINUTE).because("slower")),
                _ => Ok(x),
            }
        }
    });
    let progress = run.subscribe();
    for _ in 0..2 {
        run.next().await.unwrap();
    }
    assert!(futures_util::poll!(run.next()).is_pending());
    let paused: Progress = *progress.borrow();
    let pause = paused.paused.unwrap();
    assert_eq!(pause.until, begun + HOUR);
    assert_eq!((paused.done, paused.failed), (2, 0));
    assert!(paused.eta.unwrap() > HOUR - MINUTE, "{paused:?}");
    assert_eq!(all(run).await.len(), 98);
    assert_eq!(progress.borrow().paused, None);
    let starts = starts.lock().unwrap();
    let (before, behind): (Vec<Duration>, Vec<Duration>) = starts.iter().copied().partition(|start| *start < HOUR);
    assert_eq!((before.len(), behind.len()), (4, 98));
    let first = behind.iter().filter(|start| **start < HOUR + Duration::from_millis(500)).count();
    assert_eq!(first, 1, "one goes first");
    // The others do not wait for it longer than a second.
    assert!(begun.elapsed() < HOUR + Duration::from_secs(30), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn an_announced_item_that_pauses_is_not_uncertain_afterwards() {
    let (_dir, path) = checkpoint();
    let builder = || numbers(&path).at_most_once().concurrency(2).quarantine(9);
    let mut run = builder().stream(0..4, |_, _| async { Err(ItemError::pause(HOUR)) });
    let progress = run.subscribe();
    while progress.borrow().paused.is_none() {
        assert!(futures_util::poll!(run.next()).is_pending());
        tokio::task::yield_now().await;
    }
    drop(run);
    let all = all(builder().stream(0..4, |_, x| async move { Ok(x) })).await;
    // Its neighbour had been started, and its end was not seen.
    let uncertain = all.iter().filter(|done| done.result.is_err()).count();
    assert!(uncertain <= 1 && all.len() == 4, "{all:?}");
}
