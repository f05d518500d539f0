//! How long a critical section holds its scopes: a section that nobody polls any more, or that does not end, is dropped by
//! the scope's own timer, on paused time to the millisecond.

use std::cell::{Cell, RefCell};
use std::future::{Future, pending, poll_fn};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use cancel_safe_guard::{CRITICAL_LIMIT, cancellation_point, critical, critical_for, timeout, timeout_at, with_token};
use tokio::sync::oneshot;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::torn::{torn_here, watch};
use crate::{elapsed, poll_once};

const HOUR: Duration = Duration::from_secs(3600);

fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// Begins `future` and then never polls it again, nor drops it: the loser of a `select!` over `&mut future`.
async fn abandon<T>(future: impl Future) -> T {
    let mut future = pin!(future);
    poll_fn(|cx| {
        assert!(future.as_mut().poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
    pending().await
}

/// Awaits `future`, which must end within an hour, and returns when it did.
async fn timed<T>(future: impl Future<Output = T>) -> (T, Duration) {
    let start = Instant::now();
    let output = tokio::time::timeout(HOUR, future).await.expect("the scope is held for ever");
    (output, start.elapsed())
}

#[tokio::test(start_paused = true)]
async fn a_bounded_section_that_nobody_polls_holds_its_scope_until_its_grace_is_over() {
    for deadline in [0, 1, 9, 10, 11, 100, 70_000] {
        for grace in [1, 9, 10, 11, 50, 90_000] {
            watch();
            let section = || abandon::<()>(critical_for(ms(grace), sleep(HOUR)));
            let end = ms(deadline.max(grace));
            assert_eq!(timed(timeout(ms(deadline), section())).await, (Err(elapsed()), end), "{deadline}, {grace}");
            assert_eq!(torn_here(), 1, "its own code has not seen the end of its grace");

            let at = Instant::now() + ms(deadline);
            assert_eq!(timed(timeout_at(at, section())).await, (Err(elapsed()), end), "{deadline}, {grace}");
            let token = CancellationToken::new();
            let scope = async { (timed(with_token(&token, section())).await.0.is_err(), Instant::now()) };
            let cancel = async {
                sleep(ms(deadline)).await;
                token.cancel();
            };
            let start = Instant::now();
            assert_eq!(tokio::join!(scope, cancel).0, (true, start + end), "{deadline}, {grace}");
            assert_eq!(torn_here(), 3);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_section_that_nobody_polls_holds_its_scope_until_the_limit() {
    watch();
    let result = timed(timeout(ms(10), abandon::<()>(critical(sleep(ms(50)))))).await;
    assert_eq!(result, (Err(elapsed()), ms(10) + CRITICAL_LIMIT));
    assert_eq!(torn_here(), 1);
    let token = CancellationToken::new();
    token.cancel();
    let (result, at) = timed(with_token(&token, abandon::<()>(critical(sleep(ms(50)))))).await;
    assert_eq!((result.is_err(), at), (true, CRITICAL_LIMIT));
    assert_eq!(torn_here(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_section_that_does_not_end_is_dropped_at_the_limit_and_one_that_ends_just_before_is_not() {
    watch();
    let section = |more: Duration| async move {
        critical(sleep(ms(10) + more)).await;
        pending::<()>().await;
    };
    let before = CRITICAL_LIMIT - ms(1);
    for (more, at, torn) in [(before, before, 0), (CRITICAL_LIMIT, CRITICAL_LIMIT, 0), (HOUR, CRITICAL_LIMIT, 1)] {
        assert_eq!(timed(timeout(ms(10), section(more))).await, (Err(elapsed()), ms(10) + at));
        assert_eq!(torn_here(), torn, "{more:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_limit_counts_from_the_end_of_the_scope_and_not_from_the_start_of_the_section() {
    watch();
    let result = timed(timeout(CRITICAL_LIMIT * 3, critical(sleep(CRITICAL_LIMIT * 4 - ms(1))))).await;
    assert_eq!(result, (Ok(()), CRITICAL_LIMIT * 4 - ms(1)));
    assert_eq!(torn_here(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_bounded_section_that_is_polled_ends_by_itself_however_long_its_grace_is() {
    watch();
    for (grace, length) in
        [(ms(20), HOUR), (ms(10), HOUR), (CRITICAL_LIMIT * 2, HOUR), (CRITICAL_LIMIT * 3, CRITICAL_LIMIT * 2)]
    {
        let expected = if length < grace { Ok(()) } else { Err(elapsed()) };
        let result = timed(timeout(ms(10), critical_for(grace, sleep(length)))).await;
        assert_eq!(result, (Ok(expected), grace.min(length)));
    }
    // No clock can represent this one.
    let result = timed(timeout(ms(10), critical_for(Duration::MAX, sleep(CRITICAL_LIMIT * 2)))).await;
    assert_eq!(result, (Ok(Ok(())), CRITICAL_LIMIT * 2));
    assert_eq!(torn_here(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_bounded_section_that_is_polled_one_poll_after_its_wake_ends_by_itself() {
    watch();
    // Polls the program in every second poll only, as a combinator with many children may.
    let mut polls = 0;
    let mut program = pin!(async {
        // The second one begins when the first has been given its last chance.
        (critical_for(ms(10), pending::<()>()).await, critical_for(ms(10), pending::<()>()).await)
    });
    let late = poll_fn(|cx| {
        polls += 1;
        if polls % 2 == 1 {
            return program.as_mut().poll(cx);
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    });
    let result = timed(timeout(ms(5), late)).await;
    assert_eq!(result, (Ok((Err(elapsed()), Err(elapsed()))), ms(20)));
    assert_eq!(torn_here(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_section_may_rest_for_long_in_a_scope_that_is_not_due() {
    watch();
    for (rest, expected) in [(ms(5), Ok(())), (ms(20), Ok(())), (CRITICAL_LIMIT * 2, Ok(()))] {
        let result = timeout(CRITICAL_LIMIT * 3, async {
            let mut section = pin!(critical(sleep(ms(10))));
            assert!(poll_once(&mut section).is_pending());
            sleep(rest).await;
            section.await;
        });
        assert_eq!(timed(result).await.0, expected);
    }
    let result = timeout(HOUR, async {
        let mut section = pin!(critical_for(ms(10), pending::<()>()));
        assert!(poll_once(&mut section).is_pending());
        sleep(ms(100)).await;
        section.await
    });
    assert_eq!(timed(result).await, (Ok(Err(elapsed())), ms(100)));
    assert_eq!(torn_here(), 0);
}

#[tokio::test(start_paused = true)]
async fn of_nested_scopes_each_enforces_the_bound_with_its_own_timer() {
    for outer in [0, 5, 10, 15, 70_000] {
        for inner in [0, 5, 10, 15, 70_000] {
            watch();
            let expected = if inner <= outer { Ok(Err(elapsed())) } else { Err(elapsed()) };
            let first = ms(outer.min(inner));

            let limited = timeout(ms(outer), timeout(ms(inner), abandon::<()>(critical(sleep(ms(1))))));
            assert_eq!(timed(limited).await, (expected, first + CRITICAL_LIMIT), "outer {outer}, inner {inner}");
            assert_eq!(torn_here(), 1);
            let nested = async {
                let section = critical_for(ms(10), sleep(HOUR));
                timeout(ms(outer), timeout(ms(inner), abandon::<()>(section))).await
            };
            let (result, at) = timed(nested).await;
            assert_eq!(at, first.max(ms(10)), "outer {outer}, inner {inner}");
            // If both are due when the grace ends, the inner one is cut.
            let expected = if inner <= outer.max(10) { Ok(Err(elapsed())) } else { Err(elapsed()) };
            assert_eq!(result, expected, "outer {outer}, inner {inner}");
            assert_eq!(torn_here(), 2);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_inner_scope_that_nobody_polls_holds_no_longer_than_it_would_by_itself() {
    watch();
    // The inner scope would drop its section at 10 ms + the limit.
    let inner = || abandon::<()>(timeout(ms(10), critical(sleep(HOUR))));
    let early = timed(timeout(ms(5), inner())).await;
    assert_eq!(early, (Err(elapsed()), ms(5) + CRITICAL_LIMIT));
    let between = timed(timeout(ms(5_000), inner())).await;
    assert_eq!(between, (Err(elapsed()), ms(10) + CRITICAL_LIMIT));
    let deep = abandon::<()>(timeout(ms(10), timeout(HOUR, critical(sleep(HOUR)))));
    assert_eq!(timed(timeout(ms(5_000), deep)).await, (Err(elapsed()), ms(10) + CRITICAL_LIMIT));
    let late = timed(timeout(CRITICAL_LIMIT * 2, inner())).await;
    assert_eq!(late, (Err(elapsed()), CRITICAL_LIMIT * 2));

    // It was polled until it was due, and not after that.
    let token = CancellationToken::new();
    let scope = timeout(ms(5_000), async {
        let mut inner = pin!(with_token(&token, critical(sleep(HOUR))));
        assert!(poll_once(&mut inner).is_pending());
        sleep(ms(100)).await;
        token.cancel();
        assert!(poll_once(&mut inner).is_pending());
        pending::<()>().await
    });
    assert_eq!(timed(scope).await, (Err(elapsed()), ms(100) + CRITICAL_LIMIT));
    assert_eq!(torn_here(), 5);
}

#[tokio::test(start_paused = true)]
async fn a_section_inside_a_bounded_one_is_finished_although_the_grace_is_over() {
    watch();
    let nested = timeout(ms(5), critical_for(ms(10), critical(sleep(ms(30)))));
    assert_eq!(timed(nested).await, (Ok(Ok(())), ms(30)));
    assert_eq!(torn_here(), 0);
    // The outermost scope drops everything at the limit, which counts from its own deadline.
    let nested = timeout(ms(5), critical_for(ms(10), critical(sleep(HOUR))));
    assert_eq!(timed(nested).await, (Err(elapsed()), ms(5) + CRITICAL_LIMIT));
    assert_eq!(torn_here(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_section_that_is_polled_outlasts_an_abandoned_one_beside_it() {
    watch();
    let both = timeout(ms(20), async {
        tokio::join!(abandon::<()>(critical_for(ms(10), sleep(HOUR))), async {
            critical(sleep(ms(50))).await;
            pending::<()>().await;
        });
    });
    assert_eq!(timed(both).await, (Err(elapsed()), ms(50)));
    assert_eq!(torn_here(), 1);
}

#[tokio::test(start_paused = true)]
async fn of_several_sections_the_one_with_the_longest_bound_counts() {
    for (graces, at) in
        [([10, 90_000], 90_000), ([90_000, 10], 90_000), ([10, 30_000], 60_020), ([90_000, 90_000], 90_000)]
    {
        watch();
        let sections = timeout(ms(20), async {
            tokio::join!(
                abandon::<()>(critical_for(ms(graces[0]), sleep(HOUR))),
                abandon::<()>(critical(sleep(HOUR))),
                abandon::<()>(critical_for(ms(graces[1]), sleep(HOUR))),
                async {
                    // Another one with the bound of the first leaves, and the first one stays.
                    critical_for(ms(graces[0]), yield_now()).await.unwrap();
                }
            );
        });
        assert_eq!(timed(sections).await, (Err(elapsed()), ms(at)), "{graces:?}");
        assert_eq!(torn_here(), 3);
    }
}

#[tokio::test(start_paused = true)]
async fn of_two_sections_with_one_bound_the_second_still_holds_when_the_first_has_left() {
    let scope = timeout(ms(5), async {
        let start = Instant::now();
        let both = [critical_for(ms(30), sleep(ms(10))), critical_for(ms(30), sleep(ms(20)))];
        let [one, two] = both;
        let (one, two) = tokio::join!(one, two);
        (one, two, start.elapsed())
    });
    assert_eq!(timed(scope).await.0, Ok((Ok(()), Ok(()), ms(20))));
}

#[tokio::test(start_paused = true)]
async fn a_section_that_leaves_from_elsewhere_lets_a_shorter_bound_end_the_scope() {
    watch();
    let (give, take) = oneshot::channel();
    let receiver = tokio::spawn(async move {
        let section = take.await.unwrap();
        sleep(ms(25)).await;
        drop(section);
    });
    let scope = timeout(ms(20), async {
        let mut long = Box::pin(critical(pending::<()>()));
        assert!(poll_once(&mut long).is_pending());
        assert!(give.send(long).is_ok());
        abandon::<()>(critical_for(ms(10), sleep(HOUR))).await
    });
    assert_eq!(timed(scope).await, (Err(elapsed()), ms(25)));
    receiver.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_futurelock_of_select_in_a_loop_ends_with_its_scope() {
    watch();
    let lock = tokio::sync::Mutex::new(());
    let scope = timeout(ms(100), async {
        let mut section = pin!(critical_for(ms(10), async {
            let _held = lock.lock().await;
            sleep(ms(50)).await;
        }));
        loop {
            tokio::select! {
                biased;
                _ = section.as_mut() => return,
                () = sleep(ms(1)) => drop(lock.lock().await), // waits for the section, which nobody polls meanwhile
            }
        }
    });
    assert_eq!(timed(scope).await, (Err(elapsed()), ms(100)));
    assert_eq!(torn_here(), 1);
    assert!(lock.try_lock().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_deadline_near_the_end_of_the_clock_leaves_no_room_for_a_limit_and_does_not_panic() {
    watch();
    let mut far = Duration::from_secs(1);
    while Instant::now().checked_add(far * 2).is_some() {
        far *= 2;
    }
    let mut step = far;
    while step > Duration::from_secs(1) {
        step /= 2;
        if Instant::now().checked_add(far + step + ms(100)).is_some() {
            far += step;
        }
    }
    let result = timeout(ms(5), timeout(far, critical_for(far, critical(sleep(ms(10))))));
    assert_eq!(timed(result).await, (Ok(Ok(Ok(()))), ms(10)));
    assert_eq!(torn_here(), 0);
}

/// The scope of a token without a timer: it waits for its section, and never panics.
async fn without_a_timer() {
    let token = CancellationToken::new();
    let passed = Cell::new(false);
    let result = with_token(&token, async {
        critical(async {
            token.cancel();
            for _ in 0..10 {
                yield_now().await;
            }
        })
        .await;
        passed.set(true);
        cancellation_point().await;
    });
    assert!(result.await.is_err());
    assert!(passed.get());
}

#[test]
fn a_token_scope_without_a_timer_waits_for_its_section() {
    watch();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(without_a_timer());

    let mut outside = Box::pin(without_a_timer());
    let polls = (0..100).take_while(|_| poll_once(&mut outside).is_pending()).count();
    assert_eq!(polls, 10);
    assert_eq!(torn_here(), 0);
}

#[test]
fn a_token_scope_that_meets_a_timer_later_uses_it() {
    watch();
    let token = CancellationToken::new();
    token.cancel();
    let mut scope = Box::pin(with_token(&token, abandon::<()>(critical(pending::<()>()))));
    assert!(poll_once(&mut scope).is_pending());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let (result, at) = runtime.block_on(async { timed(scope).await });
    assert_eq!((result.is_err(), at), (true, CRITICAL_LIMIT));
    assert_eq!(torn_here(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_is_torn_by_its_scope_has_been_dropped_when_the_scope_returns() {
    watch();
    let log = RefCell::new(Vec::new());
    let mut scope = pin!(timeout(ms(5), async {
        let _outside = cancel_safe_guard::Guard::new(|| log.borrow_mut().push("outside"));
        critical(async {
            let _inside = cancel_safe_guard::Guard::new(|| log.borrow_mut().push("inside"));
            pending::<()>().await;
        })
        .await;
    }));
    assert!(timed(scope.as_mut()).await.0.is_err());
    assert_eq!(*log.borrow(), ["inside", "outside"]);
}
