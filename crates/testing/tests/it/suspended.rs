//! `suspended`: what waits for an operation that is alive and not polled.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use cancel_safe_testing::{Explore, Outcome, Report};
use tokio::sync::{Mutex, Semaphore, mpsc};
use tokio::time::sleep;

const MS: Duration = Duration::from_millis(1);

fn explore() -> Explore {
    Explore::new().paused_time(true)
}

async fn fine<S, T, R>(_state: &S, _outcome: Outcome<T>, _result: R) -> Result<(), String> {
    Ok(())
}

/// Asserts a futurelock, with the line where the operation is and the line where the rival waits.
#[track_caller]
fn assert_futurelock(report: &Report, operation: u32, rival: u32) {
    let lines = |it: &cancel_safe_testing::Failure| {
        (it.is_futurelock(), it.site().map(|site| site.line()), it.rival_site().map(|site| site.line()))
    };
    let found = report.failures().iter().any(|it| lines(it) == (true, Some(operation), Some(rival)));
    assert!(found, "no futurelock of {operation} and {rival}; {report}");
    assert!(report.failures().iter().all(cancel_safe_testing::Failure::is_futurelock), "{report}");
}

#[test]
fn a_mutex_that_is_held_across_an_await_is_found() {
    let line = line!();
    let report = explore().suspended(
        async || Mutex::new(0),
        async |count| {
            let mut count = count.lock().await;
            sleep(MS).await;
            *count += 1;
        },
        async |count| *count.lock().await += 1,
        fine,
    );
    assert_futurelock(&report, line + 5, line + 8);
    let mended = explore().suspended(
        async || Mutex::new(0),
        async |count| {
            sleep(MS).await;
            *count.lock().await += 1;
        },
        async |count| *count.lock().await += 1,
        async |count, outcome, ()| match (outcome, *count.lock().await) {
            (Outcome::Completed(()), 2) | (Outcome::Dropped { .. }, 1 | 2) => Ok(()),
            (_, count) => Err(format!("counted {count}")),
        },
    );
    // Its turn in the queue of the lock is held as well, until it is dropped: that is tokio's own futurelock.
    assert!(mended.failures().iter().all(cancel_safe_testing::Failure::is_futurelock), "{mended}");
    explore()
        .budgets([])
        .suspended(
            async || Mutex::new(0),
            async |count| {
                sleep(MS).await;
                *count.lock().await += 1;
            },
            async |count| *count.lock().await += 1,
            fine,
        )
        .assert_clean();
}

#[test]
fn a_permit_that_is_held_across_an_await_is_found() {
    let line = line!();
    let report = explore().budgets([]).suspended(
        async || Semaphore::new(1),
        async |permits| {
            let _permit = permits.acquire().await;
            sleep(MS).await;
        },
        async |permits| drop(permits.acquire().await),
        fine,
    );
    assert_futurelock(&report, line + 5, line + 7);
    let mended = explore().budgets([]).suspended(
        async || Semaphore::new(1),
        async |permits| {
            drop(permits.acquire().await);
            sleep(MS).await;
        },
        async |permits| drop(permits.acquire().await),
        fine,
    );
    mended.assert_clean();
}

#[test]
fn a_place_in_a_channel_that_is_reserved_across_an_await_is_found() {
    let line = line!();
    let report = explore().budgets([]).suspended(
        async || mpsc::channel::<u8>(1),
        async |(send, _receive)| {
            let place = send.reserve().await.unwrap();
            sleep(MS).await;
            drop(place);
        },
        async |(send, _receive)| send.reserve().await.map(drop).unwrap(),
        fine,
    );
    assert_futurelock(&report, line + 5, line + 8);
    let mended = explore().budgets([]).suspended(
        async || mpsc::channel::<u8>(1),
        async |(send, _receive)| {
            sleep(MS).await;
            drop(send.reserve().await.unwrap());
        },
        async |(send, _receive)| send.reserve().await.map(drop).unwrap(),
        fine,
    );
    mended.assert_clean();
}

/// A pool of one connection.
struct Pool {
    permits: Arc<Semaphore>,
    used: Cell<u32>,
}

impl Pool {
    fn new() -> Self {
        Self { permits: Arc::new(Semaphore::new(1)), used: Cell::new(0) }
    }

    async fn get(&self) -> tokio::sync::OwnedSemaphorePermit {
        let permit = Arc::clone(&self.permits).acquire_owned().await.unwrap();
        self.used.set(self.used.get() + 1);
        permit
    }
}

#[test]
fn a_connection_that_is_held_across_an_await_is_found_and_the_callers_are_told() {
    let line = line!();
    let report = explore().budgets([]).suspended(
        async || Pool::new(),
        async |pool| {
            let _connection = pool.get().await;
            sleep(MS).await;
        },
        async |pool| drop(pool.get().await),
        fine,
    );
    let failure = &report.failures()[0];
    assert!(failure.is_futurelock(), "{report}");
    assert_eq!(failure.site().unwrap().line(), line + 5);
    // The rival waits in the pool.
    assert!(failure.rival_site().unwrap().line() < line, "{report}");
    let text = report.to_string();
    assert!(text.contains("left alive at") && text.contains("the rival waits at"), "{text}");
    let mended = explore().budgets([]).suspended(
        async || Pool::new(),
        async |pool| {
            drop(pool.get().await);
            sleep(MS).await;
        },
        async |pool| drop(pool.get().await),
        fine,
    );
    mended.assert_clean();
}

#[test]
fn a_lock_that_is_meant_to_be_waited_for_may_be() {
    let report = explore().allow_waiting(true).suspended(
        async || Mutex::new(Vec::new()),
        async |log| {
            let mut log = log.lock().await;
            log.push("begun");
            sleep(MS).await;
            log.push("done");
        },
        async |log| {
            let mut log = log.lock().await;
            log.push("rival");
        },
        async |log, outcome, ()| match (outcome, log.lock().await.as_slice()) {
            (Outcome::Completed(()), ["begun", "done", "rival"] | ["rival", "begun", "done"]) => Ok(()),
            (Outcome::Dropped { .. }, ["rival"]) => Ok(()),
            (_, log) => Err(format!("{log:?}")),
        },
    );
    report.assert_clean();
}

#[test]
fn a_state_that_the_rival_sees_half_done_is_found() {
    let line = line!() + 5;
    let report = explore().budgets([]).suspended(
        async || (Cell::new(60), Cell::new(40)),
        async |(from, to)| {
            from.set(from.get() - 30);
            sleep(MS).await;
            to.set(to.get() + 30);
        },
        async |(from, to)| from.get() + to.get(),
        async |_, _outcome, sum| if sum == 100 { Ok(()) } else { Err(format!("saw {sum}")) },
    );
    crate::assert_caught(&report, file!(), line, "saw 70");
}

#[test]
fn a_resumed_operation_is_checked_too() {
    // It keeps a copy of what it has read across an await, and overwrites what the rival has written.
    let report = explore().budgets([]).suspended(
        async || Cell::new(0),
        async |count| {
            let read = count.get();
            sleep(MS).await;
            count.set(read + 1);
        },
        async |count| count.set(count.get() + 1),
        async |count, outcome, ()| match (outcome, count.get()) {
            (Outcome::Completed(()), 2) | (Outcome::Dropped { .. }, 1) => Ok(()),
            (outcome, count) => Err(format!("{count} after {outcome:?}")),
        },
    );
    assert!(report.failures().iter().all(|it| it.message().starts_with("1 after Completed")), "{report}");
    assert!(!report.is_clean());
    let text = report.failures()[0].to_string();
    assert!(text.contains("resumed-1:eager:natural"), "{text}");
    assert!(!text.contains(".only("), "only() resumes nothing: {text}");
}

#[test]
fn without_a_paused_clock_a_futurelock_is_known_before_the_limit() {
    let begun = std::time::Instant::now();
    let report = Explore::new().budgets([]).hang_after(Duration::from_secs(300)).suspended(
        async || Mutex::new(()),
        async |lock| {
            let _guard = lock.lock().await;
            sleep(MS).await;
        },
        async |lock| drop(lock.lock().await),
        fine,
    );
    assert!(report.failures().iter().any(cancel_safe_testing::Failure::is_futurelock), "{report}");
    assert!(begun.elapsed() < Duration::from_secs(200));
}

#[test]
fn a_rival_that_only_takes_its_time_is_no_futurelock() {
    for paused in [true, false] {
        let report = Explore::new().paused_time(paused).budgets([]).suspended(
            async || Mutex::new(()),
            async |lock| {
                sleep(MS).await;
                drop(lock.lock().await);
            },
            async |lock| {
                sleep(Duration::from_millis(300)).await;
                drop(lock.lock().await);
            },
            fine,
        );
        report.assert_clean();
    }
}

/// A step that is 1 between two awaits of the operation.
async fn two_steps(step: &Cell<u32>) {
    step.set(1);
    sleep(MS).await;
    step.set(2);
}

#[test]
fn a_rival_that_waits_for_nothing_of_the_operations_is_a_hang() {
    let report = explore().budgets([]).hang_after(200 * MS).suspended(
        async || Cell::new(0),
        two_steps,
        async |step| {
            if step.get() == 1 {
                std::future::pending::<()>().await;
            }
        },
        fine,
    );
    let failure = &report.failures()[0];
    assert!(failure.is_hang() && failure.message().starts_with("the rival did not end"), "{report}");
    assert!(!report.failures().iter().any(cancel_safe_testing::Failure::is_futurelock), "{report}");
}

#[test]
fn a_rival_that_ends_late_but_by_itself_is_no_failure() {
    // More than the limit, and less than twice.
    let report = Explore::new().budgets([]).hang_after(400 * MS).suspended(
        async || Cell::new(0),
        two_steps,
        async |step| {
            if step.get() == 1 {
                sleep(600 * MS).await;
            }
        },
        fine,
    );
    report.assert_clean();
}

#[test]
fn a_rival_is_not_starved() {
    let report = explore().suspended(
        async || Mutex::new(()),
        async |lock| drop(lock.lock().await),
        async |_| {
            let (send, mut receive) = mpsc::unbounded_channel();
            for number in 0..9 {
                send.send(number).unwrap();
            }
            let receive_all = async {
                for _ in 0..9 {
                    receive.recv().await.unwrap();
                }
            };
            futures_util::FutureExt::now_or_never(receive_all).is_some()
        },
        async |_, _outcome, at_once| if at_once { Ok(()) } else { Err("starved".to_owned()) },
    );
    report.assert_clean();
}
