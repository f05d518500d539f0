//! Cancel scopes and critical sections, on paused time: what is cut, and when, to the millisecond.

use std::cell::{Cell, RefCell};
use std::future::{pending, ready};
use std::hint;
use std::io;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use cancel_safe_guard::{
    Cancelled, Elapsed, Guard, cancellation_point, critical, critical_for, remaining, timeout, timeout_at, with_token,
};
use tokio::sync::oneshot;
use tokio::task::{LocalSet, consume_budget, spawn_local, yield_now};
use tokio::time::{Instant, advance, sleep};
use tokio_util::sync::CancellationToken;

use crate::torn::{torn_here, watch};
use crate::{caught, poll_once, soon};

fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// A piece of a program: how long it takes, and whether it is critical.
#[derive(Clone, Copy)]
enum Step {
    Free(u64),
    Critical(u64),
    /// Critical, with a grace that is enough.
    Bounded(u64),
}
use Step::{Bounded, Critical, Free};

impl Step {
    fn length(self) -> u64 {
        match self {
            Free(length) | Critical(length) | Bounded(length) => length,
        }
    }

    async fn run(self, invariant: &Cell<i32>) {
        let section = async |length: u64| {
            invariant.set(invariant.get() + 1);
            // Two awaits, so that there is more than one place to tear.
            sleep(ms(length / 2)).await;
            sleep(ms(length - length / 2)).await;
            invariant.set(invariant.get() - 1);
        };
        match self {
            Free(length) => sleep(ms(length)).await,
            Critical(length) => critical(section(length)).await,
            Bounded(length) => critical_for(ms(length + 1), section(length)).await.unwrap(),
        }
    }
}

const PROGRAM: [Step; 7] = [Free(3), Critical(4), Free(2), Critical(3), Bounded(4), Free(3), Critical(2)];

/// When a program with this `deadline` ends: in the middle of a free step, or at the end of the critical steps that
/// contain the deadline. The end of one step and the start of the next are the same poll.
fn expected_end(deadline: u64) -> u64 {
    let mut now = 0;
    for step in PROGRAM {
        let end = now + step.length();
        if let Free(_) = step
            && deadline < end
        {
            return deadline.max(now);
        }
        now = end;
    }
    now
}

fn whole() -> u64 {
    PROGRAM.iter().map(|step| step.length()).sum()
}

async fn program(invariant: &Cell<i32>) {
    for step in PROGRAM {
        step.run(invariant).await;
    }
}

#[tokio::test(start_paused = true)]
async fn nested_scopes_end_at_the_smallest_deadline_plus_the_critical_part_and_tear_nothing() {
    watch();
    for outer in 0..=whole() + 2 {
        for inner in 0..=whole() + 2 {
            let invariant = Cell::new(0);
            let start = Instant::now();
            let nested = timeout(ms(outer), timeout_at(start + ms(inner), program(&invariant)));
            let result = soon(nested).await;

            let end = expected_end(outer.min(inner));
            assert_eq!(start.elapsed(), ms(end), "outer {outer}, inner {inner}");
            assert_eq!(invariant.get(), 0, "outer {outer}, inner {inner}");
            // Of two scopes that are both due, the inner one is cut, and the outer one has a result to return.
            let expected = match (end == whole(), inner <= end) {
                (true, _) => Ok(Ok(())),
                (false, true) => Ok(Err(())),
                (false, false) => Err(()),
            };
            assert_eq!(result.map(|it| it.map_err(drop)).map_err(drop), expected, "outer {outer}, inner {inner}");
        }
    }
    assert_eq!(torn_here(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_same_program_under_the_timeout_of_tokio_is_torn() {
    watch();
    let mut broken = 0;
    for deadline in 0..whole() {
        let invariant = Cell::new(0);
        let _ = tokio::time::timeout(ms(deadline), program(&invariant)).await;
        broken += usize::from(invariant.get() != 0);
    }
    assert!(broken > 0, "the sweep has to be able to fail");
    // A bounded section consists of one section; each broken invariant was one torn section.
    assert_eq!(torn_here(), broken);
}

#[tokio::test(start_paused = true)]
async fn a_token_cuts_at_the_same_points_as_a_deadline() {
    watch();
    for cancel_at in 0..=whole() + 2 {
        let token = CancellationToken::new();
        let (invariant, start) = (Cell::new(0), Instant::now());
        let run = async { (soon(with_token(&token, program(&invariant))).await.is_ok(), start.elapsed()) };
        let cancel = async {
            sleep(ms(cancel_at)).await;
            token.cancel();
        };
        let (result, ()) = tokio::join!(run, cancel);
        let end = expected_end(cancel_at);
        assert_eq!(result, (end == whole(), ms(end)), "cancelled at {cancel_at}");
        assert_eq!(invariant.get(), 0, "cancelled at {cancel_at}");
    }
    assert_eq!(torn_here(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_inner_scope_still_works_inside_a_critical_section() {
    let start = Instant::now();
    let result = timeout(ms(10), async {
        let inner = critical(timeout(ms(25), pending::<()>())).await;
        (inner, start.elapsed())
    });
    assert!(matches!(soon(result).await, Ok((Err(_), at)) if at == ms(25)));
}

#[tokio::test(start_paused = true)]
async fn a_critical_section_inside_an_inner_scope_holds_all_the_scopes_around() {
    let start = Instant::now();
    let deep = timeout(
        ms(1),
        timeout(
            ms(2),
            timeout(ms(3), async {
                critical(sleep(ms(20))).await;
                pending::<()>().await;
            }),
        ),
    );
    assert!(matches!(soon(deep).await, Ok(Ok(Err(_)))));
    assert_eq!(start.elapsed(), ms(20));
}

#[tokio::test(start_paused = true)]
async fn both_arms_of_a_join_hold_the_scope() {
    let start = Instant::now();
    let result = timeout(ms(5), async {
        tokio::join!(
            async {
                critical(sleep(ms(10))).await;
                pending::<()>().await
            },
            critical(sleep(ms(25))),
        );
    });
    assert!(soon(result).await.is_err());
    assert_eq!(start.elapsed(), ms(25));
}

#[tokio::test(start_paused = true)]
async fn a_section_that_panics_holds_no_scope_any_longer() {
    watch();
    let start = Instant::now();
    let result = timeout(ms(10), async {
        let panicking = critical(async {
            sleep(ms(5)).await;
            timeout(ms(50), async { panic!("on purpose") }).await
        });
        let panicked: Result<Result<(), Elapsed>, _> = caught(panicking).await;
        assert_eq!(panicked, Err("on purpose".to_owned()));
        assert_eq!(remaining(), Some(ms(5)), "the surroundings are those from before the panic");
        pending::<()>().await;
    });
    assert!(soon(result).await.is_err());
    assert_eq!(start.elapsed(), ms(10));
    assert_eq!(torn_here(), 1);
    assert_eq!(remaining(), None);
}

/// Polls a section once inside a scope of 10 ms and then gives it away; it is polled again after `away`.
async fn given_away(away: u64, go_on: bool) -> Duration {
    let start = Instant::now();
    let mut section = Box::pin(critical(sleep(ms(40))));
    let (give, take) = oneshot::channel();
    let receiver = tokio::spawn(async move {
        let section = take.await.unwrap();
        sleep(ms(away)).await;
        if go_on {
            let held = timeout(ms(30), async {
                section.await;
                pending::<()>().await;
            });
            assert!(soon(held).await.is_err());
            assert_eq!(start.elapsed(), ms(40.max(away + 30)), "it holds the scope that it was moved to");
        }
    });
    let left = timeout(ms(10), async {
        assert!(poll_once(&mut section).is_pending());
        assert!(give.send(section).is_ok());
        pending::<()>().await;
    });
    assert!(soon(left).await.is_err());
    let elapsed = start.elapsed();
    soon(receiver).await.unwrap();
    elapsed
}

#[tokio::test(start_paused = true)]
async fn a_section_moved_to_another_scope_holds_that_one_and_wakes_the_one_it_has_left() {
    assert_eq!(given_away(0, true).await, ms(10));
    assert_eq!(given_away(5, true).await, ms(10));
    assert_eq!(given_away(25, true).await, ms(25));
}

#[tokio::test(start_paused = true)]
async fn a_section_dropped_elsewhere_wakes_the_scope_it_has_held() {
    watch();
    assert_eq!(given_away(25, false).await, ms(25));
    assert_eq!(torn_here(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_operation_is_in_the_scope_that_polls_it_now() {
    let seen = RefCell::new(Vec::new());
    let mut operation = pin!(timeout(ms(100), async {
        loop {
            sleep(ms(2)).await;
            seen.borrow_mut().push(remaining().unwrap());
            critical(sleep(ms(3))).await;
        }
    }));
    let start = Instant::now();
    for round in 1..=3 {
        let result: Result<Result<(), _>, _> = soon(timeout(ms(4), operation.as_mut())).await;
        assert!(result.is_err());
        assert_eq!(start.elapsed(), ms(5) * round, "each round is held by the section that it runs into");
    }
    assert_eq!(*seen.borrow(), [ms(2), ms(2), ms(2)]);
}

#[tokio::test(start_paused = true)]
async fn a_result_that_is_ready_is_returned_however_late() {
    assert_eq!(timeout(Duration::ZERO, ready(7)).await, Ok(7));
    let past = Instant::now();
    advance(ms(50)).await;
    assert_eq!(timeout_at(past, critical(ready(7))).await, Ok(7));
    let token = CancellationToken::new();
    token.cancel();
    assert_eq!(with_token(&token, ready(7)).await, Ok(7));
    assert!(soon(with_token(&token, yield_now())).await.is_err());
}

#[tokio::test]
async fn a_token_cancelled_in_the_poll_that_ends_the_section_still_returns_its_result() {
    let token = CancellationToken::new();
    let result = with_token(
        &token,
        critical(async {
            yield_now().await;
            token.cancel();
            7
        }),
    );
    assert_eq!(soon(result).await, Ok(7));
}

#[tokio::test(start_paused = true)]
async fn the_future_has_been_dropped_when_the_scope_returns() {
    let dropped = Cell::new(false);
    let mut scope = pin!(timeout(ms(5), async {
        let _guard = Guard::new(|| dropped.set(true));
        pending::<()>().await;
    }));
    assert!(soon(scope.as_mut()).await.is_err());
    assert!(dropped.get(), "although the scope itself is still alive");
}

#[tokio::test(start_paused = true)]
async fn the_duration_counts_from_the_call() {
    let start = Instant::now();
    let late = timeout(ms(10), sleep(ms(30)));
    sleep(ms(8)).await;
    assert!(soon(late).await.is_err());
    assert_eq!(start.elapsed(), ms(10));
}

#[tokio::test(start_paused = true)]
async fn a_duration_too_large_for_the_clock_is_no_deadline() {
    let result = timeout(Duration::MAX, async {
        sleep(Duration::from_secs(3600)).await;
        remaining()
    });
    assert_eq!(result.await, Ok(None));
}

#[tokio::test(start_paused = true)]
async fn the_remaining_time_is_that_to_the_smallest_deadline_around() {
    assert_eq!(remaining(), None);
    let result = timeout(
        ms(50),
        timeout(ms(20), async {
            assert_eq!(remaining(), Some(ms(20)));
            sleep(ms(5)).await;
            assert_eq!(critical(async { remaining() }).await, Some(ms(15)));
            assert_eq!(timeout(ms(100), async { remaining() }).await, Ok(Some(ms(15))));
            critical(sleep(ms(30))).await;
            remaining()
        }),
    );
    assert_eq!(soon(result).await, Ok(Ok(Some(Duration::ZERO))));
}

#[tokio::test(start_paused = true)]
async fn a_spawned_task_inherits_nothing() {
    let result = timeout(ms(50), async { tokio::spawn(async { remaining() }).await.unwrap() });
    assert_eq!(soon(result).await, Ok(None));
}

#[tokio::test(start_paused = true)]
async fn a_local_task_inherits_nothing_although_it_is_polled_inside_the_scope() {
    let local = LocalSet::new();
    let start = Instant::now();
    let result = timeout(
        ms(10),
        local.run_until(async {
            let outer = spawn_local(async {
                let before = remaining();
                // It does not hold the scope around its `LocalSet`, and its own scope is the only one it sees.
                let inner = timeout(ms(5), critical(async { remaining() })).await;
                critical(sleep(ms(100))).await;
                (before, inner)
            });
            let seen = timeout(ms(200), outer).await.unwrap().unwrap();
            assert_eq!(seen, (None, Ok(Some(ms(5)))));
        }),
    );
    assert!(soon(result).await.is_err());
    assert_eq!(start.elapsed(), ms(10));
}

#[tokio::test]
async fn a_future_that_is_never_idle_is_timed_out() {
    let busy = timeout(ms(5), async {
        loop {
            consume_budget().await;
        }
    });
    let result: Result<(), _> = tokio::time::timeout(Duration::from_secs(30), busy).await.unwrap();
    assert!(result.is_err());
}

#[tokio::test]
async fn a_cancellation_point_ends_a_computation_that_never_waits() {
    let token = CancellationToken::new();
    let steps = Cell::new(0);
    let computation = async {
        loop {
            steps.set(steps.get() + 1);
            if steps.get() == 7 {
                token.cancel();
            }
            cancellation_point().await;
        }
    };
    let result: Result<Result<(), _>, _> = timeout(ms(60_000), with_token(&token, computation)).await;
    assert!(matches!(result, Ok(Err(_))));
    assert_eq!(steps.get(), 7);
}

#[tokio::test]
async fn a_cancellation_point_sees_a_deadline_before_any_timer_has_fired() {
    let mut computation = Box::pin(timeout(ms(5), async {
        loop {
            let step = Instant::now();
            while step.elapsed() < ms(1) {
                hint::spin_loop();
            }
            cancellation_point().await;
        }
    }));
    // One poll: the runtime has had no chance to check its timers.
    let polled: Poll<Result<(), _>> = poll_once(&mut computation);
    assert!(matches!(polled, Poll::Ready(Err(_))));
}

#[tokio::test(start_paused = true)]
async fn a_cancellation_point_inside_a_critical_section_is_none() {
    let token = CancellationToken::new();
    let result = with_token(
        &token,
        critical(async {
            token.cancel();
            cancellation_point().await;
            timeout(ms(50), cancellation_point()).await.unwrap();
            // The scope inside the section is subject to it as always.
            let inner: Result<(), _> = timeout(ms(5), async {
                loop {
                    advance(ms(1)).await;
                    cancellation_point().await;
                }
            })
            .await;
            inner.is_err()
        }),
    );
    assert_eq!(soon(result).await, Ok(true));
}

#[tokio::test(start_paused = true)]
async fn a_cancellation_point_waits_for_a_critical_section_beside_it() {
    let token = CancellationToken::new();
    let (passed, start) = (Cell::new(false), Instant::now());
    let result = with_token(&token, async {
        tokio::join!(critical(sleep(ms(30))), async {
            sleep(ms(10)).await;
            token.cancel();
            cancellation_point().await;
            passed.set(true);
        });
    });
    assert!(soon(result).await.is_err());
    assert!(!passed.get());
    assert_eq!(start.elapsed(), ms(30));
}

#[tokio::test]
async fn a_cancellation_point_without_scopes_lets_foreign_scopes_in() {
    let endless = async {
        loop {
            cancellation_point().await;
        }
    };
    let result: Result<(), _> = tokio::time::timeout(ms(5), endless).await;
    assert!(result.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_bounded_section_ends_by_its_grace_whatever_is_around() {
    let start = Instant::now();
    let result = soon(timeout(ms(10), critical_for(ms(30), pending::<()>()))).await;
    assert!(matches!(result, Ok(Err(_))));
    assert_eq!(start.elapsed(), ms(30));
    assert_eq!(critical_for(ms(30), ready(7)).await, Ok(7));
}

#[test]
fn scopes_need_no_runtime_until_they_wait() {
    let token = CancellationToken::new();
    let mut scope = Box::pin(with_token(&token, timeout(ms(5), critical(ready(7)))));
    assert!(matches!(poll_once(&mut scope), Poll::Ready(Ok(Ok(7)))));
    let mut waiting = Box::pin(with_token(&token, critical(yield_now())));
    assert!(poll_once(&mut waiting).is_pending());
    assert!(poll_once(&mut waiting).is_ready());
}

#[test]
fn a_future_polled_by_a_thread_that_ends_sees_no_scopes_and_does_not_panic() {
    struct Last(oneshot::Sender<Option<Duration>>);
    impl Drop for Last {
        fn drop(&mut self) {
            let (sender, _) = oneshot::channel();
            let sender = std::mem::replace(&mut self.0, sender);
            let token = CancellationToken::new();
            let mut scope = Box::pin(with_token(&token, timeout(ms(5), critical(async { remaining() }))));
            if let Poll::Ready(Ok(Ok(seen))) = poll_once(&mut scope) {
                sender.send(seen).unwrap();
            }
        }
    }
    thread_local!(static LAST: RefCell<Option<Last>> = const { RefCell::new(None) });
    let (sender, receiver) = oneshot::channel();
    std::thread::spawn(move || {
        // Thread-locals end in an order of the platform's choosing; this one is registered before the crate's own.
        LAST.set(Some(Last(sender)));
        assert_eq!(remaining(), None);
    })
    .join()
    .unwrap();
    let seen = receiver.blocking_recv().unwrap();
    assert!(seen.is_none_or(|seen| seen <= ms(5)));
}

#[tokio::test(start_paused = true)]
async fn the_errors_say_what_happened() {
    let elapsed: Elapsed = soon(timeout(ms(1), pending::<()>())).await.unwrap_err();
    assert_eq!(elapsed.to_string(), "deadline has elapsed");
    assert_eq!(io::Error::from(elapsed).kind(), io::ErrorKind::TimedOut);
    let token = CancellationToken::new();
    token.cancel();
    let cancelled: Cancelled = soon(with_token(&token, pending::<()>())).await.unwrap_err();
    assert_eq!(cancelled.to_string(), "cancelled by its token");
}
