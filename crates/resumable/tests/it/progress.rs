//! A run's progress, and its estimate of the remaining time.

use std::{path::Path, time::Duration};

use cancel_safe_resumable::{Progress, Run};
use futures_util::StreamExt;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use crate::support::{checkpoint, double, numbers};

/// A run whose items each take the time `each`.
fn timed(path: &Path, items: u64, concurrency: usize, each: impl Fn(u64) -> Duration + Send + 'static) -> Run<u64> {
    numbers(path).concurrency(concurrency).stream(0..items, move |_, x| {
        let time = each(x);
        async move {
            sleep(time).await;
            Ok(x)
        }
    })
}

/// Asserts that the remaining time is about as long as the progress says.
fn assert_right(progress: &watch::Receiver<Progress>, left: Duration) {
    let seen = *progress.borrow();
    let (eta, truth) = (seen.eta.unwrap().as_secs_f64(), left.as_secs_f64());
    assert!((eta / truth - 1.0).abs() < 0.1, "{eta:.1} s, really {truth:.1} s: {seen:?}");
}

#[tokio::test(start_paused = true)]
async fn a_minute_after_a_resume_at_nine_tenths_the_eta_is_right() {
    for concurrency in [1, 8] {
        let (_dir, path) = checkpoint();
        numbers(&path).stream(0..9_000, |_, x| double(x)).take(9_000).count().await;
        let per_item = Duration::from_millis(250);
        let mut run = timed(&path, 10_000, concurrency, move |_| per_item);
        let progress = run.subscribe();
        for _ in 0..9_000 {
            assert!(run.next().await.unwrap().restored);
        }
        let resumed = Instant::now();
        while resumed.elapsed() < Duration::from_secs(60).min(per_item * 500 / concurrency as u32) {
            run.next().await.unwrap();
        }
        while futures_util::poll!(run.next()).is_ready() {}
        assert_right(&progress, per_item * 1_000 / concurrency as u32 - resumed.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_minute_after_a_hundredfold_change_of_speed_the_eta_is_right() {
    for (before, behind) in [(1, 100), (100, 1), (30, 3_000)] {
        let (_dir, path) = checkpoint();
        let millis = Duration::from_millis;
        let mut run = timed(&path, 300_000, 1, move |x| millis(if x < 1_000 { before } else { behind }));
        let progress = run.subscribe();
        let change = Instant::now() + millis(before) * 1_000;
        while Instant::now() < change + Duration::from_secs(60) {
            run.next().await.unwrap();
        }
        let left = 300_000 - progress.borrow().done as u32;
        assert_right(&progress, millis(behind) * left);
    }
}

#[tokio::test(start_paused = true)]
async fn one_slow_item_leaves_the_eta_where_it_is() {
    for concurrency in [1, 16] {
        let (_dir, path) = checkpoint();
        let slow = Duration::from_secs(600);
        let usual = Duration::from_millis(100) * concurrency as u32;
        let mut run = timed(&path, 5_000, concurrency, move |x| if x == 1_000 { slow } else { usual });
        let progress = run.subscribe();
        // The clock stands still only for futures that wait for it, and opening a file does not wait for it.
        run.next().await.unwrap();
        let task = tokio::spawn(run.finish());
        let begun = Instant::now();
        sleep(Duration::from_secs(99)).await;
        for _ in 0..60 {
            sleep(Duration::from_secs(4)).await;
            let seen = *progress.borrow();
            let rest = Duration::from_millis(100) * (5_000 - seen.done as u32);
            let (eta, truth) = (seen.eta.unwrap().as_secs_f64(), rest.as_secs_f64());
            assert!((eta / truth - 1.0).abs() < 0.1, "{eta:.1} s, really {truth:.1} s after {:?}", begun.elapsed());
        }
        task.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn as_long_as_the_total_is_unknown_there_is_no_percentage_and_no_eta() {
    let (_dir, path) = checkpoint();
    let source = (0..1_000u64).filter(|x| x % 2 == 0);
    let mut run = numbers(&path).concurrency(4).stream(source, |_, x| async move {
        sleep(Duration::from_millis(4)).await;
        Ok(x)
    });
    let progress = run.subscribe();
    assert!(!progress.borrow().is_total_known());
    for _ in 0..400 {
        run.next().await.unwrap();
    }
    while futures_util::poll!(run.next()).is_ready() {}
    let seen = *progress.borrow();
    assert_eq!((seen.eta, seen.percent(), seen.is_total_known()), (None, 0.0, false), "{seen:?}");
    assert!((seen.session_rate - 1_000.0).abs() < 100.0, "{seen:?}");
    assert_eq!(run.progress(), 0.0);
    while run.next().await.is_some() {}
    let seen = *progress.borrow();
    assert_eq!((seen.total, seen.is_total_known(), seen.eta), (500, true, Some(Duration::ZERO)));
    assert_eq!(run.progress(), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_progress_stands_by_itself() {
    let mut progress = Progress::new(1_000);
    assert_eq!((progress.total, progress.percent(), progress.eta), (1_000, 0.0, None));
    progress.restore(500);
    for _ in 0..100 {
        sleep(Duration::from_secs(1)).await;
        progress.advance(2);
    }
    assert_eq!((progress.done, progress.restored, progress.failed), (700, 500, 0));
    assert!((progress.session_rate - 2.0).abs() < 0.01);
    assert_eq!(progress.eta.unwrap().as_secs(), 150);
    progress.set_total(700);
    assert_eq!((progress.fraction(), progress.eta), (1.0, Some(Duration::ZERO)));
    let mut unknown = Progress::default();
    unknown.advance(3);
    assert_eq!((unknown.done, unknown.fraction(), unknown.eta), (3, 0.0, None));
}
