//! Critical sections that are torn during an exploration: which are failures, where, and in whose report.

use std::cell::Cell;
use std::future::{Future, pending};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use cancel_safe_guard::{critical, on_torn, timeout};
use cancel_safe_testing::{Explore, Outcome, Report, Way};
use tokio::task::{JoinSet, LocalSet, spawn_local, yield_now};
use tokio::time::sleep;

use crate::assert_caught;

fn explore() -> Explore {
    Explore::new().paused_time(true)
}

fn ms(number: u64) -> Duration {
    Duration::from_millis(number)
}

/// Two accounts that hold 100 together.
struct Bank {
    from: Cell<i32>,
    to: Cell<i32>,
}

const SECTION: u32 = line!() + 5;

impl Bank {
    async fn transfer(&self) {
        sleep(ms(10)).await;
        critical(async {
            self.from.set(self.from.get() - 30);
            sleep(ms(10)).await;
            self.to.set(self.to.get() + 30);
        })
        .await;
        sleep(ms(10)).await;
    }
}

async fn bank() -> Bank {
    Bank { from: Cell::new(100), to: Cell::new(0) }
}

async fn is_whole<T>(bank: &Bank, _outcome: Outcome<T>) -> Result<(), String> {
    match bank.from.get() + bank.to.get() {
        100 => Ok(()),
        sum => Err(format!("{sum} in the accounts")),
    }
}

async fn fine<S, T>(_state: &S, _outcome: Outcome<T>) -> Result<(), String> {
    Ok(())
}

#[test]
fn a_raw_timeout_inside_the_operation_tears_and_is_caught() {
    let report = explore().run(bank, async |bank| tokio::time::timeout(ms(15), bank.transfer()).await.is_ok(), fine);
    assert_caught(&report, file!(), SECTION, "dropped before its end");
    assert!(report.failures().iter().all(|it| it.is_torn()), "{report}");
    let text = report.to_string();
    assert!(text.contains(&format!("torn at {}:{SECTION}: ", file!())), "{text}");
}

#[test]
fn a_scope_inside_the_operation_tears_nothing() {
    explore().run(bank, async |bank| timeout(ms(15), bank.transfer()).await.is_ok(), fine).assert_clean();
}

#[test]
fn a_way_that_waits_for_sections_is_silent_on_whole_transfers_and_catches_a_step_outside() {
    let scoped = || explore().ways([Way::Scope]);
    let report = scoped().run(bank, async |bank| bank.transfer().await, is_whole);
    report.publish("testing", "Way::Scope").assert_clean();
    let eager = explore().ways([Way::Eager]).run(bank, async |bank| bank.transfer().await, fine);
    assert_eq!(report.points(), eager.points(), "they have the same points");

    let line = line!() + 5;
    let outside = scoped().run(
        bank,
        async |bank| {
            bank.from.set(70);
            sleep(ms(10)).await;
            critical(async { bank.to.set(30) }).await;
        },
        is_whole,
    );
    assert_caught(&outside, file!(), line, "70 in the accounts");
}

#[test]
fn a_section_at_the_end_returns_its_result_although_the_scope_was_cancelled() {
    let completed = Cell::new(0);
    let report = explore().ways([Way::Scope]).budgets([]).run(
        async || (),
        async |()| critical(async { sleep(ms(10)).await }).await,
        async |(), outcome| {
            completed.set(completed.get() + usize::from(outcome.is_completed()));
            Ok(())
        },
    );
    report.assert_clean();
    assert_eq!(report.points(), 2);
    // One at point 1, one when the operation is measured, three that confirm its end; at point 0 the scope is cancelled
    // before the section is entered, and finds it waiting.
    assert_eq!(completed.get(), 6);
}

#[test]
fn a_section_that_hangs_in_a_cancelled_scope_is_a_failure() {
    let hanging = |explore: Explore| {
        let runs = Cell::new(0);
        explore.ways([Way::Scope]).budgets([]).hang_after(ms(300)).run(
            async || runs.set(runs.get() + 1),
            async |()| {
                critical(async {
                    sleep(ms(1)).await;
                    // The first run is the one that nobody drops.
                    if runs.get() > 1 {
                        pending().await
                    }
                })
                .await;
            },
            fine,
        )
    };
    // The scope waits for a minute and then tears the section, which a paused clock comes to at once.
    let torn = hanging(explore());
    assert!(torn.failures().iter().any(cancel_safe_testing::Failure::is_torn), "{torn}");
    let hangs = hanging(Explore::new());
    assert!(hangs.failures().iter().any(|it| it.is_hang() && it.message().contains("cancelled scope")), "{hangs}");
}

#[test]
fn what_the_exploration_drops_is_for_the_check_to_judge_and_its_message_says_so() {
    let every = [Way::Eager, Way::Settled, Way::Shutdown, Way::Panic];
    explore().ways(every).run(bank, async |bank| bank.transfer().await, fine).assert_clean();

    let report = explore().ways(every).run(bank, async |bank| bank.transfer().await, is_whole);
    assert!(report.failures().iter().all(|it| !it.is_torn()), "{report}");
    assert_caught(&report, file!(), SECTION + 2, "70 in the accounts (the drop has torn the critical section of ");
    assert!(report.failures()[0].message().contains(&format!("{}:{SECTION}; ", file!())), "{report}");
}

#[test]
fn a_section_in_a_task_that_dies_with_the_operation_is_caught() {
    let line = line!() + 5;
    let report = explore().run(
        bank,
        async |_bank| {
            let mut tasks = JoinSet::new();
            tasks.spawn(critical(sleep(ms(3_600_000))));
            drop(tasks.join_next().await);
        },
        fine,
    );
    assert_caught(&report, file!(), line, "dropped before its end");
    let at_shutdown = report.failures().iter().find(|it| it.way() == Way::Shutdown);
    assert!(at_shutdown.is_none(), "a runtime that goes away is the exploration's doing; {report}");
}

#[test]
fn a_section_in_a_local_task_is_caught_by_a_scope() {
    let line = line!() + 5;
    let operation = async |_: &Bank| {
        let local = LocalSet::new();
        local
            .run_until(async {
                drop(spawn_local(critical(sleep(ms(10)))).await);
            })
            .await;
    };
    assert_caught(&explore().ways([Way::Scope]).run(bank, operation, fine), file!(), line, "dropped before its end");
    explore().run(bank, operation, fine).assert_clean();
}

#[test]
fn a_section_that_panics_in_the_operation_is_both() {
    let report = explore().ways([Way::Eager]).run(
        bank,
        async |_bank| {
            critical(async {
                yield_now().await;
                panic!("on purpose")
            })
            .await
        },
        fine::<_, ()>,
    );
    assert!(report.failures().iter().any(|it| it.is_panic()), "{report}");
    assert!(report.failures().iter().any(|it| it.is_torn()), "{report}");
}

fn torn_by_raw_timeout(explore: &Explore) -> Report {
    explore.run(bank, async |_bank| tokio::time::timeout(ms(10), critical(sleep(ms(20)))).await.is_ok(), fine)
}

#[test]
fn explorations_at_the_same_time_see_only_their_own() {
    let explore = explore().budgets([]).ways([Way::Eager]);
    let expected = torn_by_raw_timeout(&explore);
    std::thread::scope(|scope| {
        for number in 0..4 {
            let (explore, expected) = (&explore, &expected);
            scope.spawn(move || {
                for _ in 0..5 {
                    if number % 2 == 0 {
                        explore
                            .run(bank, async |_bank| timeout(ms(10), critical(sleep(ms(20)))).await.is_ok(), fine)
                            .assert_clean();
                    } else {
                        assert_eq!(torn_by_raw_timeout(explore), *expected);
                    }
                }
            });
        }
    });
}

#[test]
fn a_hook_of_the_user_is_called_as_before_and_does_not_blind_the_exploration() {
    static SEEN: AtomicUsize = AtomicUsize::new(0);
    let explore = explore().budgets([]).ways([Way::Eager]);
    assert!(!torn_by_raw_timeout(&explore).is_clean());
    on_torn(|_| {
        SEEN.fetch_add(1, SeqCst);
    });
    assert!(!torn_by_raw_timeout(&explore).is_clean());
    assert!(SEEN.load(SeqCst) > 0);
}

#[test]
fn what_is_torn_outside_an_exploration_is_in_no_report() {
    let mut section = Box::pin(critical(pending::<()>()));
    let polled = section.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop()));
    assert!(polled.is_pending());
    drop(section);
    explore().run(bank, async |_bank| sleep(ms(1)).await, fine).assert_clean();
}
