//! Waiting in turn, and waiting together.
//!
//! Invariant: where a queue is fair, the rival asks after the call and before its drop, so that a lost place shows.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Barrier, Mutex, Notify, OnceCell, RwLock, Semaphore, SetOnce};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep};

use crate::fixtures::{HELD, Queue, hold};
use crate::row::{From, Row, SELECT, Says, on_paused_time};

const KEEP: &str = "keep the future, and poll it by reference; or `spawn` what waits";

pub(crate) fn in_turn() -> Vec<Row> {
    vec![
        Row::tokio("Mutex::lock", "sync/struct.Mutex.html#method.lock", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let mutex = Arc::new(Mutex::new(()));
                    hold(Arc::clone(&mutex).lock_owned().await);
                    Queue::new(mutex, async |mutex| drop(mutex.lock().await))
                },
                async |queue| queue.call(queue.resource.lock()).await,
                Queue::order,
            )
        })
        .says(Says::Place)
        .instead(KEEP)
        .note(
            "Here, and in the rows of `RwLock`, `Semaphore`, `Notify` and `reserve` that say *the place*, nothing is lost \
             but the place in the queue: what the lock guards, the permits and the notifications are as they were. In a \
             `select!` loop on a busy lock that is enough to wait for ever.",
        ),
        Row::tokio("RwLock::read", "sync/struct.RwLock.html#method.read", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let lock = Arc::new(RwLock::new(()));
                    hold(Arc::clone(&lock).write_owned().await);
                    Queue::new(lock, async |lock| drop(lock.write().await))
                },
                async |queue| queue.call(queue.resource.read()).await,
                Queue::order,
            )
        })
        .says(Says::Place)
        .instead(KEEP),
        Row::tokio("RwLock::write", "sync/struct.RwLock.html#method.write", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let lock = Arc::new(RwLock::new(()));
                    hold(Arc::clone(&lock).read_owned().await);
                    Queue::new(lock, async |lock| drop(lock.write().await))
                },
                async |queue| queue.call(queue.resource.write()).await,
                Queue::order,
            )
        })
        .says(Says::Place)
        .instead(KEEP),
        Row::tokio("Semaphore::acquire", "sync/struct.Semaphore.html#method.acquire", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let semaphore = Arc::new(Semaphore::new(1));
                    hold(Arc::clone(&semaphore).acquire_owned().await);
                    Queue::new(semaphore, async |semaphore| drop(semaphore.acquire().await))
                },
                async |queue| queue.call(queue.resource.acquire()).await,
                Queue::order,
            )
        })
        .says(Says::Place)
        .instead(KEEP),
        Row::tokio("Semaphore::acquire_many", "sync/struct.Semaphore.html#method.acquire_many", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let semaphore = Arc::new(Semaphore::new(4));
                    hold(Arc::clone(&semaphore).acquire_many_owned(2).await);
                    semaphore
                },
                async |semaphore| drop(semaphore.acquire_many(3).await),
                async |semaphore| semaphore.available_permits(),
            )
        })
        .how("with no rival")
        .says(Says::Place)
        .note(
            "With no rival there is no place to lose, and the permits that a dropped call had gathered go back. With a \
             rival, its page says, it behaves like `acquire`.",
        ),
        Row::tokio("Notify::notified", "sync/struct.Notify.html#method.notified", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let notify = Arc::new(Notify::new());
                    notify_twice(Arc::clone(&notify));
                    Queue::new(notify, async |notify| notify.notified().await)
                },
                async |queue| queue.call(queue.resource.notified()).await,
                Queue::order,
            )
        })
        .how("with `notify_one` and a rival")
        .says(Says::Place)
        .instead(KEEP),
        Row::tokio("Notify::notified", "sync/struct.Notify.html#method.notified", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let notify = Arc::new(Notify::new());
                    let notifier = Arc::clone(&notify);
                    drop(tokio::spawn(async move {
                        sleep(HELD).await;
                        notifier.notify_one();
                    }));
                    notify
                },
                async |notify| notify.notified().await,
                async |_| (),
            )
        })
        .how("with `notify_one` and no rival")
        .says(Says::Place)
        .note("The notification that a dropped call had received is kept for the next call."),
        Row::tokio("Notify::notified", "sync/struct.Notify.html#method.notified", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let notify = Arc::new(Notify::new());
                    let notifier = Arc::clone(&notify);
                    drop(tokio::spawn(async move {
                        sleep(HELD).await;
                        notifier.notify_waiters();
                    }));
                    notify
                },
                async |notify| notify.notified().await,
                async |_| (),
            )
        })
        .how("with `notify_waiters`")
        .said_at(Says::NotSafe, From::Tokio, SELECT)
        .instead("keep the future, and poll it by reference; `watch` where the event is a state"),
    ]
}

pub(crate) fn together() -> Vec<Row> {
    vec![
        Row::tokio("Barrier::wait", "sync/struct.Barrier.html#method.wait", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let barrier = Arc::new(Barrier::new(2));
                    let other = Arc::clone(&barrier);
                    drop(tokio::spawn(async move {
                        sleep(HELD).await;
                        other.wait().await;
                    }));
                    (barrier, Instant::now())
                },
                async |(barrier, begun)| {
                    barrier.wait().await;
                    format!("all arrived after {} ms", begun.elapsed().as_millis())
                },
                async |_| (),
            )
        })
        .says(Says::NotSafe)
        .instead(KEEP),
        Row::tokio("OnceCell::get_or_init", "sync/struct.OnceCell.html#method.get_or_init", || {
            on_paused_time(1).cancel_safe(
                async || OnceCell::new(),
                async |cell: &mut OnceCell<u32>| {
                    *cell
                        .get_or_init(async || {
                            yield_now().await;
                            7
                        })
                        .await
                },
                async |_| (),
            )
        })
        .instead("spawn the initialisation, and wait for its `JoinHandle` by reference"),
        Row::tokio("SetOnce::wait", "sync/struct.SetOnce.html#method.wait", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let once = Arc::new(SetOnce::new());
                    let setter = Arc::clone(&once);
                    drop(tokio::spawn(async move {
                        sleep(HELD).await;
                        setter.set(7).unwrap();
                    }));
                    once
                },
                async |once| *once.wait().await,
                async |_| (),
            )
        })
        .says(Says::Safe),
    ]
}

/// Notifies two waiters, one after the other.
fn notify_twice(notify: Arc<Notify>) {
    drop(tokio::spawn(async move {
        for _ in 0..2 {
            sleep(HELD).await;
            notify.notify_one();
            sleep(Duration::from_millis(1)).await;
        }
    }));
}
