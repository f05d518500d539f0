//! Timers, tasks, and their ends.
//!
//! Invariant: results are in milliseconds of tokio's paused clock.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::{JoinSet, spawn_blocking, yield_now};
use tokio::time::{Instant, Sleep, interval, sleep, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::time::DelayQueue;

use futures_util::StreamExt as _;

use crate::fixtures::{HELD, hold};
use crate::row::{Row, Says, on_paused_time};

/// What becomes of a message that is sent after 25 ms.
fn late() -> (oneshot::Receiver<&'static str>, Instant) {
    let (send, receive) = oneshot::channel();
    drop(tokio::spawn(async move {
        sleep(Duration::from_millis(25)).await;
        // Nobody waits for it any more if the timeout has ended the wait.
        send.send("the message").unwrap_or_default();
    }));
    (receive, Instant::now())
}

fn millis(since: &Instant) -> String {
    format!("after {} ms", since.elapsed().as_millis())
}

pub(crate) fn timers() -> Vec<Row> {
    vec![
        Row::tokio("time::sleep", "time/fn.sleep.html", || {
            on_paused_time(1).cancel_safe(async || (), async |()| sleep(HELD).await, async |()| ())
        })
        .how("a new one for each call")
        .instead("a pinned `Sleep` that outlives the call, `sleep_until`, or `interval`"),
        Row::tokio("time::Sleep", "time/struct.Sleep.html", || {
            on_paused_time(1).cancel_safe(
                async || (Box::pin(sleep(HELD)), Instant::now()),
                async |(sleep, begun): &mut (Pin<Box<Sleep>>, Instant)| {
                    sleep.as_mut().await;
                    millis(begun)
                },
                async |_| (),
            )
        })
        .how("polled by reference"),
        Row::tokio("time::sleep_until", "time/fn.sleep_until.html", || {
            on_paused_time(1).cancel_safe(
                async || Instant::now(),
                async |begun| {
                    sleep_until(*begun + HELD).await;
                    millis(begun)
                },
                async |_| (),
            )
        })
        .how("a deadline that is kept"),
        Row::tokio("Interval::tick", "time/struct.Interval.html#method.tick", || {
            on_paused_time(3).cancel_safe(
                async || (interval(HELD), Instant::now()),
                async |(interval, begun)| {
                    interval.tick().await;
                    millis(begun)
                },
                async |_| (),
            )
        })
        .says(Says::Safe),
        Row::tokio("time::timeout", "time/fn.timeout.html", || {
            on_paused_time(1).cancel_safe(
                async || late(),
                async |(receive, _)| timeout(HELD, receive).await.map_or("elapsed", |message| message.unwrap()),
                async |_| (),
            )
        })
        .how("around a wait that is cancel safe")
        .instead("`timeout_at` with a deadline that is kept")
        .note("The time starts again with each call, so a loop waits longer than it says, or for ever."),
        Row::tokio("time::timeout_at", "time/fn.timeout_at.html", || {
            on_paused_time(1).cancel_safe(
                async || late(),
                async |(receive, begun)| {
                    timeout_at(*begun + HELD, receive).await.map_or("elapsed", |message| message.unwrap())
                },
                async |_| (),
            )
        })
        .how("with a deadline that is kept"),
        Row::tokio_util("DelayQueue::next", "time/struct.DelayQueue.html#cancellation-safety", || {
            on_paused_time(3).cancel_safe(
                async || {
                    let mut queue = DelayQueue::new();
                    for number in [3, 1, 2] {
                        queue.insert(number, HELD * number);
                    }
                    queue
                },
                async |queue| queue.next().await.map(|due| due.into_inner()),
                async |_| (),
            )
        })
        .says(Says::Safe),
    ]
}

pub(crate) fn tasks() -> Vec<Row> {
    vec![
        Row::tokio("JoinHandle", "task/struct.JoinHandle.html#cancel-safety", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let work = async {
                        sleep(HELD).await;
                        "done"
                    };
                    (tokio::spawn(work),)
                },
                async |(task,)| task.await.unwrap(),
                async |_| (),
            )
        })
        .how("polled by reference")
        .says(Says::Safe),
        Row::tokio("task::spawn", "task/fn.spawn.html", || {
            on_paused_time(1).cancel_safe(
                async || Arc::new(AtomicU32::new(0)),
                async |count| {
                    let count = Arc::clone(count);
                    let task = tokio::spawn(async move {
                        sleep(HELD).await;
                        count.fetch_add(1, Ordering::Relaxed);
                    });
                    task.await.unwrap();
                },
                async |count| {
                    sleep(HELD).await;
                    how_often(count.load(Ordering::Relaxed))
                },
            )
        })
        .how("and await it, in each call")
        .instead("spawn once, and wait for the `JoinHandle` by reference"),
        Row::tokio("task::spawn_blocking", "task/fn.spawn_blocking.html", || {
            on_paused_time(1).cancel_safe(
                async || Arc::new(AtomicU32::new(0)),
                async |count| {
                    let count = Arc::clone(count);
                    spawn_blocking(move || count.fetch_add(1, Ordering::Relaxed)).await.map(drop).unwrap();
                },
                async |count| {
                    sleep(HELD).await;
                    how_often(count.load(Ordering::Relaxed))
                },
            )
        })
        .how("and await it, in each call")
        .instead("spawn once, and wait for the `JoinHandle` by reference"),
        Row::tokio("task::yield_now", "task/fn.yield_now.html", || {
            on_paused_time(1).cancel_safe(async || (), async |()| yield_now().await, async |()| ())
        })
        .note("It holds nothing, so there is nothing to keep."),
        Row::tokio("JoinSet::join_next", "task/struct.JoinSet.html#method.join_next", || {
            on_paused_time(3).cancel_safe(
                async || staggered(),
                async |set| set.join_next().await.unwrap().unwrap(),
                async |_| (),
            )
        })
        .says(Says::Safe),
        Row::tokio("JoinSet::shutdown", "task/struct.JoinSet.html#method.shutdown", || {
            on_paused_time(1).cancel_safe(async || staggered(), async |set| set.shutdown().await, async |set| set.len())
        }),
        Row::tokio_util("TaskTracker::wait", "task/struct.TaskTracker.html#method.wait", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let tracker = TaskTracker::new();
                    drop(tracker.spawn(sleep(HELD)));
                    tracker.close();
                    tracker
                },
                async |tracker| tracker.wait().await,
                async |tracker| tracker.len(),
            )
        })
        .says(Says::Safe),
        Row::tokio_util("CancellationToken::cancelled", "sync/struct.CancellationToken.html#method.cancelled", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let token = CancellationToken::new();
                    hold(token.clone().drop_guard());
                    token
                },
                async |token| token.cancelled().await,
                async |_| (),
            )
        })
        .says(Says::Safe),
    ]
}

fn how_often(times: u32) -> &'static str {
    match times {
        0 => "never done",
        1 => "done once",
        _ => "done more than once",
    }
}

/// Tasks that end in the order of their numbers.
fn staggered() -> JoinSet<u32> {
    let mut set = JoinSet::new();
    for number in [3, 1, 2] {
        set.spawn(async move {
            sleep(HELD * number).await;
            number
        });
    }
    set
}
