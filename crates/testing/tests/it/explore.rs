//! The promises of an exploration: which points it visits, which failures it finds, and that it always ends.

use std::cell::{Cell, RefCell};
use std::future::{Future, pending, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use cancel_safe_testing::{Explore, Outcome, Report, Way};
use tokio::task::yield_now;
use tokio::time::sleep;

use crate::{assert_caught, run_again};

async fn nothing() {}

async fn fine<S, T>(_state: &S, _outcome: Outcome<T>) -> Result<(), String> {
    Ok(())
}

/// The points seen by the check, for one budget and one way.
fn points_seen(budget: Option<u32>, way: Way, operation: impl AsyncFn(&())) -> Vec<Option<usize>> {
    let seen = RefCell::new(Vec::new());
    let report =
        Explore::new().paused_time(true).budgets(budget).ways([way]).run(nothing, operation, async |(), outcome| {
            seen.borrow_mut().push(match outcome {
                Outcome::Completed(()) => None,
                Outcome::Dropped { point, .. } => Some(point),
            });
            Ok(())
        });
    report.assert_clean();
    seen.take()
}

#[test]
fn every_point_is_visited_and_completion_is_confirmed_three_times() {
    let seen = points_seen(None, Way::Eager, async |()| {
        yield_now().await;
        sleep(Duration::from_secs(3600)).await;
    });
    // The first run is the one that nobody drops.
    assert_eq!(seen, [None, Some(0), Some(1), Some(2), None, None, None]);
}

#[test]
fn every_await_is_listed_once() {
    let line = line!() + 4;
    let report = Explore::new().paused_time(true).run(
        nothing,
        async |()| {
            yield_now().await;
            sleep(Duration::from_millis(1)).await;
        },
        fine,
    );
    report.assert_clean();
    let sites: Vec<_> = report.sites().iter().map(|site| (site.file(), site.line())).collect();
    assert_eq!(sites, [(file!(), line), (file!(), line + 1)]);
    assert_eq!(report.sites()[0].to_string(), format!("{}:{line}", file!()));
}

#[test]
fn a_timeout_around_an_operation_does_not_hide_its_await() {
    let line = line!() + 3;
    let report = Explore::new().paused_time(true).budgets([]).run(
        nothing,
        async |()| tokio::time::timeout(Duration::from_secs(9), async { sleep(Duration::from_secs(1)).await }).await,
        async |(), outcome| if outcome.is_dropped() { Err("dropped".to_owned()) } else { Ok(()) },
    );
    assert_caught(&report, file!(), line, "dropped");
}

#[test]
fn an_await_after_a_timer_is_named_and_not_the_timer() {
    let line = line!() + 5;
    let report = Explore::new().paused_time(true).budgets([]).ways([Way::Eager]).run(
        nothing,
        async |()| {
            sleep(Duration::from_millis(1)).await;
            sleep(Duration::from_millis(2)).await;
        },
        async |(), outcome| match outcome {
            Outcome::Dropped { point: 2, .. } => Err("dropped".to_owned()),
            _ => Ok(()),
        },
    );
    assert_eq!(report.failures().len(), 1, "{report}");
    assert_caught(&report, file!(), line, "dropped");
}

/// A future written by hand, which only wakes and never clones.
struct HandWritten(bool);

impl Future for HandWritten {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

#[test]
fn a_future_written_by_hand_is_named_by_its_await() {
    let line = line!() + 3;
    let report = Explore::new().run(
        nothing,
        async |()| HandWritten(false).await,
        async |(), outcome| if outcome.is_dropped() { Err("dropped".to_owned()) } else { Ok(()) },
    );
    assert_caught(&report, file!(), line, "dropped");
}

#[test]
fn a_panic_in_the_check_is_a_failure() {
    let report = Explore::new().run(
        nothing,
        async |()| yield_now().await,
        async |(), outcome| {
            assert!(outcome.is_completed(), "left behind a mess");
            Ok(())
        },
    );
    assert!(
        report.failures().iter().any(|it| it.is_panic() && it.message().contains("left behind a mess")),
        "{report}"
    );
}

#[test]
fn a_panic_in_the_operation_is_a_failure() {
    let report = Explore::new().run(nothing, async |()| panic!("out of cheese"), fine::<(), ()>);
    assert!(report.failures().iter().any(|it| it.is_panic() && it.message().contains("out of cheese")), "{report}");
}

#[test]
fn a_panic_in_the_setup_is_a_failure() {
    let report = Explore::new().run(async || panic!("no cheese"), async |(): &()| (), fine);
    assert!(report.failures().iter().any(|it| it.is_panic() && it.message().contains("no cheese")), "{report}");
}

/// Panics when dropped.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        assert!(std::thread::panicking(), "bomb");
    }
}

#[test]
fn a_panic_in_the_drop_is_a_failure() {
    let report = Explore::new().budgets([]).run(
        nothing,
        async |()| {
            let bomb = Bomb;
            yield_now().await;
            std::mem::forget(bomb);
        },
        fine,
    );
    assert_eq!(report.failures().len(), 3, "once in each way; {report}");
    assert!(report.failures().iter().all(|it| it.is_panic() && it.message().contains("bomb")), "{report}");
}

fn assert_hang(report: &Report, message: &str) {
    assert!(report.failures().iter().any(|it| it.is_hang() && it.message().contains(message)), "{report}");
}

#[test]
fn what_is_never_woken_is_a_hang() {
    let explore = Explore::new().hang_after(Duration::from_secs(1));
    assert_hang(&explore.run(nothing, async |()| pending::<()>().await, fine), "operation did not end");
    assert_hang(&explore.run(pending::<()>, async |()| (), fine), "setup did not end");
    assert_hang(&explore.run(nothing, async |()| (), async |(), _| pending().await), "check did not end");
}

#[test]
fn what_is_never_woken_is_a_hang_under_paused_time() {
    let explore = Explore::new().paused_time(true).hang_after(Duration::from_secs(1));
    assert_hang(&explore.run(nothing, async |()| pending::<()>().await, fine), "operation did not end");
}

#[test]
fn a_timer_of_a_year_is_not_a_hang_under_paused_time() {
    let year = Duration::from_secs(365 * 24 * 3600);
    let report = Explore::new().paused_time(true).run(nothing, async |()| sleep(year).await, fine);
    report.assert_clean();
}

#[test]
fn what_wakes_itself_for_ever_is_a_hang_with_a_site() {
    let line = line!() + 5;
    let report = Explore::new().max_polls(50).run(
        nothing,
        async |()| {
            loop {
                yield_now().await;
            }
        },
        fine::<(), ()>,
    );
    assert_caught(&report, file!(), line, "not completed after max_polls(50)");
    assert_hang(&report, "max_polls(50)");
    let refused = Explore::new().max_polls(50).run(
        nothing,
        async |()| {
            loop {
                yield_now().await;
            }
        },
        async |(), _outcome: Outcome<()>| Err("this too".to_owned()),
    );
    assert_hang(&refused, "max_polls(50)");
}

#[test]
fn more_points_than_the_bound_are_not_left_out_in_silence() {
    let six_points = async |(): &()| {
        for _ in 0..6 {
            yield_now().await;
        }
    };
    Explore::new().max_points(6).run(nothing, six_points, fine).assert_clean();
    let report = Explore::new().max_points(5).run(nothing, six_points, fine);
    assert!(report.failures().iter().any(|it| it.is_incomplete()), "{report}");
}

#[test]
fn an_exploration_out_of_time_is_not_clean() {
    let report = Explore::new().timeout(Duration::ZERO).run(nothing, async |()| yield_now().await, fine);
    assert!(report.failures().iter().any(|it| it.is_incomplete()), "{report}");
}

#[test]
fn an_exploration_without_ways_is_not_clean() {
    let report = Explore::new().ways([]).run(nothing, async |()| yield_now().await, fine);
    assert!(report.failures().iter().any(|it| it.is_incomplete()), "{report}");
}

#[test]
fn a_budget_lets_just_so_many_ready_leaves_through_at_each_poll() {
    let three_ready_leaves = async |(): &()| {
        let (send, mut receive) = tokio::sync::mpsc::unbounded_channel();
        for number in 0..3 {
            send.send(number).unwrap();
        }
        for _ in 0..3 {
            receive.recv().await.unwrap();
        }
    };
    let pendings = [1, 2, 3].map(|budget| {
        let seen = points_seen(Some(budget), Way::Eager, three_ready_leaves);
        seen.into_iter().flatten().max().unwrap_or(0)
    });
    assert_eq!(pendings, [2, 1, 0]);
}

#[test]
fn a_budget_of_none_adds_one_point_and_no_more() {
    let three_ready_leaves = async |lock: &tokio::sync::Mutex<()>| {
        for _ in 0..3 {
            drop(lock.lock().await);
        }
    };
    let report = Explore::new().budgets([0]).run(async || tokio::sync::Mutex::new(()), three_ready_leaves, fine);
    assert_eq!(report.points(), 2, "never polled, and before the first leaf; {report}");
}

#[test]
fn one_run_of_a_call_is_one_run_although_an_undisturbed_one_goes_before() {
    let call = async |(): &mut ()| yield_now().await;
    let report = Explore::new().only(1, Way::Eager, None).cancel_safe(nothing, call, async |()| ());
    assert_eq!(report.runs(), 1);
    report.assert_safe();
}

#[test]
fn copying_does_not_livelock_when_starved() {
    let report = Explore::new().ways([Way::Eager]).run(
        nothing,
        async |()| tokio::io::copy(&mut &[7_u8; 100][..], &mut tokio::io::sink()).await.unwrap(),
        async |(), outcome| {
            if outcome.completed().is_none_or(|bytes| bytes == 100) { Ok(()) } else { Err(String::new()) }
        },
    );
    report.assert_clean();
}

#[test]
fn state_operation_and_check_need_not_be_send() {
    let rc = Rc::new(Cell::new(0));
    let report = Explore::new().run(
        async || Rc::clone(&rc),
        async |state| {
            let held = Rc::clone(state);
            yield_now().await;
            held.set(held.get() + 1);
        },
        async |state, _outcome| {
            let held = Rc::clone(state);
            yield_now().await;
            if held.get() < 1_000 { Ok(()) } else { Err("counted too far".to_owned()) }
        },
    );
    report.assert_clean();
    assert!(rc.get() > 0);
}

#[test]
fn a_task_that_lives_on_is_counted_and_fails_nothing() {
    let explore = Explore::new().paused_time(true).budgets([]).ways([Way::Eager]);
    let from_the_setup = explore.run(async || drop(tokio::spawn(pending::<()>())), async |()| yield_now().await, fine);
    from_the_setup.assert_clean();
    assert_eq!(from_the_setup.unsettled(), 0, "what the setup spawned is not waited for");
    let from_the_operation = explore.run(
        nothing,
        async |()| {
            drop(tokio::spawn(pending::<()>()));
            yield_now().await;
        },
        fine,
    );
    from_the_operation.assert_clean();
    assert!(from_the_operation.unsettled() > 0, "{from_the_operation}");
}

#[test]
fn what_is_made_in_the_setup_still_works_in_the_check() {
    let report = Explore::new().ways([Way::Eager, Way::Settled]).run(
        async || {
            let (ask, mut asked) = tokio::sync::mpsc::channel::<tokio::sync::oneshot::Sender<u8>>(1);
            drop(tokio::spawn(async move {
                while let Some(reply) = asked.recv().await {
                    let _ = reply.send(7);
                }
            }));
            ask
        },
        async |_ask| yield_now().await,
        async |ask, _outcome| {
            let (reply, answer) = tokio::sync::oneshot::channel();
            ask.send(reply).await.map_err(|_| "the actor is gone".to_owned())?;
            answer.await.map(drop).map_err(|_| "the actor did not answer".to_owned())
        },
    );
    report.assert_clean();
}

#[test]
fn a_panic_at_the_point_poisons_the_locks_that_are_held() {
    let line = line!() + 8;
    let report = Explore::new().paused_time(true).ways([Way::Panic]).run(
        async || Mutex::new(0),
        #[expect(clippy::await_holding_lock, reason = "this is the bug to be found")]
        async |count| {
            let Ok(mut count) = count.lock() else { return };
            *count += 1;
            // Held across this await.
            sleep(Duration::from_millis(1)).await;
            *count -= 1;
        },
        async |count, _outcome| if count.is_poisoned() { Err("poisoned".to_owned()) } else { Ok(()) },
    );
    assert_caught(&report, file!(), line, "poisoned");
}

#[test]
fn a_panic_at_the_point_visits_the_same_points_as_a_drop() {
    let operation = async |(): &()| {
        yield_now().await;
        sleep(Duration::from_millis(1)).await;
    };
    let dropped: Vec<_> = points_seen(None, Way::Eager, operation).into_iter().flatten().collect();
    let panicked: Vec<_> = points_seen(None, Way::Panic, operation).into_iter().flatten().collect();
    assert_eq!(dropped, panicked);
}

#[test]
fn one_run_can_be_asked_for() {
    let seen = RefCell::new(Vec::new());
    let report = Explore::new().only(2, Way::Settled, 1).run(
        nothing,
        async |()| {
            for _ in 0..3 {
                yield_now().await;
            }
        },
        async |(), outcome| {
            seen.borrow_mut().push(outcome);
            Ok(())
        },
    );
    report.assert_clean();
    assert_eq!(report.runs(), 1);
    assert_eq!(seen.take(), [Outcome::Dropped { point: 2, way: Way::Settled }]);
}

#[test]
fn a_failure_says_how_to_see_it_again() {
    let operation = async |(): &()| yield_now().await;
    let check = async |(): &(), outcome: Outcome<()>| match outcome {
        Outcome::Dropped { point: 1, way: Way::Settled } => Err("half done".to_owned()),
        _ => Ok(()),
    };
    let line = line!() - 5;
    let report = Explore::new().run(nothing, operation, check);
    let text = report.failures()[0].to_string();
    let expected = format!("dropped at {}:{line}: half done", file!());
    assert!(text.starts_with(&expected), "{text}");
    assert!(text.contains(".only(1, Way::Settled, None)"), "{text}");
    assert!(text.contains("CANCEL_SAFE_ONLY=1:settled:natural"), "{text}");
    let panic = catch_unwind(AssertUnwindSafe(|| report.assert_clean())).unwrap_err();
    assert!(panic.downcast_ref::<String>().unwrap().contains(&expected));
    assert_eq!(Explore::new().only(1, Way::Settled, None).run(nothing, operation, check).failures().len(), 1);
}

#[test]
fn an_environment_variable_asks_for_one_run() {
    const CHILD: &str = "CANCEL_SAFE_TEST_ONE_RUN";
    if std::env::var_os(CHILD).is_some() {
        let report = Explore::new().run(nothing, async |()| yield_now().await, fine);
        assert_eq!(report.runs(), 1);
        return;
    }
    let here = "explore::an_environment_variable_asks_for_one_run";
    assert!(run_again(here, &[(CHILD, ""), ("CANCEL_SAFE_ONLY", "1:eager:3")]).status.success());
    let wrong = run_again(here, &[(CHILD, ""), ("CANCEL_SAFE_ONLY", "1:gently:3")]);
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("has to look like 3:settled:natural"));
}

#[test]
fn what_is_published_goes_to_standard_output_and_to_the_file() {
    const CHILD: &str = "CANCEL_SAFE_TEST_PUBLISH";
    if std::env::var_os(CHILD).is_some() {
        let report = Explore::new().budgets([]).run(nothing, async |()| yield_now().await, fine);
        report.publish("bank", "transfer").publish("bank", "close").assert_clean();
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("points");
    let here = "explore::what_is_published_goes_to_standard_output_and_to_the_file";
    let output = run_again(here, &[(CHILD, ""), ("CANCEL_SAFE_POINTS_FILE", file.to_str().unwrap())]);
    assert!(output.status.success());
    let lines = "cancel-points bank transfer 2\ncancel-points bank close 2\n";
    assert!(String::from_utf8_lossy(&output.stdout).contains(lines));
    assert_eq!(std::fs::read_to_string(file).unwrap(), lines);
}

#[test]
fn a_wake_from_another_thread_is_seen() {
    let report = Explore::new().run(
        nothing,
        async |()| {
            let done = Arc::new(Mutex::new(false));
            let mut thread = None;
            poll_fn(|cx| {
                if *done.lock().unwrap() {
                    return Poll::Ready(());
                }
                let (waker, done) = (cx.waker().clone(), Arc::clone(&done));
                thread.get_or_insert_with(|| {
                    std::thread::spawn(move || {
                        *done.lock().unwrap() = true;
                        waker.wake();
                    })
                });
                Poll::Pending
            })
            .await;
        },
        fine,
    );
    assert!(report.points() >= 2, "{report}");
}

#[test]
#[should_panic(expected = "call it from a plain #[test]")]
fn inside_a_runtime_it_says_where_it_belongs() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async { Explore::new().run(nothing, async |()| (), fine) }).assert_clean();
}

/// Blocks its thread when it is dropped, as often as it was told.
struct Slow<'a>(&'a Cell<u32>);

impl Drop for Slow<'_> {
    #[expect(clippy::disallowed_methods, reason = "a destructor that blocks is what is looked for")]
    fn drop(&mut self) {
        if let Some(left) = self.0.get().checked_sub(1) {
            self.0.set(left);
            std::thread::sleep(Duration::from_millis(1_200));
        }
    }
}

/// Drops an operation at its only await, whose next `slow` drops block their thread.
fn drop_slowly(slow: u32, check: impl Fn() -> Result<(), String>) -> Report {
    let slow = Cell::new(slow);
    let explore = Explore::new().paused_time(true).drop_within(Duration::from_secs(1));
    explore.only(1, Way::Eager, None).run(
        async || (),
        async |()| {
            let _slow = Slow(&slow);
            sleep(Duration::from_secs(1)).await;
        },
        async |(), _outcome| check(),
    )
}

#[test]
fn a_drop_that_blocks_its_thread_is_a_failure_if_it_does_so_again() {
    drop_slowly(1, || Ok(())).assert_clean();
    let report = drop_slowly(2, || Ok(()));
    assert!(report.failures()[0].is_blocking_drop(), "{report}");
}

#[test]
fn what_else_is_wrong_at_a_slow_drop_is_not_forgotten() {
    let looked = Cell::new(false);
    let report = drop_slowly(1, || if looked.replace(true) { Ok(()) } else { Err("seen once".to_owned()) });
    assert!(report.to_string().contains("seen once"), "{report}");
}
