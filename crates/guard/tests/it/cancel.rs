//! Every operation dropped at every await point, in every way.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::task::Poll;
use std::time::Duration;

use cancel_safe_guard::{
    Guard, Reaper, cancellation_point, critical, critical_for, join_then_try, timeout, timeout_at, try_commit_cancel,
    with_token,
};
use cancel_safe_testing::{Explore, Outcome, Report, Way};
use futures_util::future::FutureExt;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::torn::{torn_here, watch};

const GRACE: Duration = Duration::from_secs(30);

fn explore() -> Explore {
    Explore::new().paused_time(true)
}

async fn step() {
    sleep(Duration::from_millis(10)).await;
}

/// Two accounts that must always hold 100 together.
struct Bank {
    from: Cell<i32>,
    to: Cell<i32>,
}

impl Bank {
    fn new() -> Self {
        watch();
        Self { from: Cell::new(100), to: Cell::new(0) }
    }

    async fn transfer(&self) {
        self.from.set(self.from.get() - 30);
        step().await;
        self.to.set(self.to.get() + 30);
    }

    /// Checks that the accounts are whole, or that a torn section says that they are not.
    fn check(&self) -> Result<(), String> {
        let (sum, torn) = (self.from.get() + self.to.get(), torn_here());
        match (sum == 100, torn) {
            (true, 0) | (false, 1) => Ok(()),
            _ => Err(format!("{sum} in the accounts, {torn} sections torn")),
        }
    }
}

/// Drops `operation` at every point; a broken sum has to be reported as a torn section, and no other.
fn bank(operation: impl AsyncFn(&Bank)) -> Report {
    explore().run(async || Bank::new(), operation, async |bank, _| bank.check())
}

#[test]
fn a_raw_drop_of_a_critical_section_is_reported_at_every_point() {
    let report = bank(async |bank| {
        step().await;
        critical(bank.transfer()).await;
        step().await;
    });
    report.publish("guard", "critical").assert_clean();
}

#[test]
fn the_same_transfer_without_a_critical_section_is_caught() {
    let report = bank(async |bank| {
        step().await;
        bank.transfer().await;
        step().await;
    });
    assert!(!report.is_clean());
}

#[test]
fn a_bounded_critical_section_is_reported_at_every_point() {
    let report = bank(async |bank| critical_for(GRACE, bank.transfer()).await.unwrap());
    report.publish("guard", "critical_for").assert_clean();
}

#[test]
fn a_scope_cancelled_at_every_point_never_parts_a_critical_section() {
    let report = explore().ways([Way::Scope]).run(
        async || Bank::new(),
        async |bank| {
            step().await;
            let _ = timeout(Duration::from_millis(15), async {
                tokio::join!(critical(bank.transfer()), critical_for(GRACE, step())).1.unwrap();
                critical(critical(bank.transfer())).await;
            })
            .await;
            step().await;
        },
        async |bank, _| match (bank.from.get() + bank.to.get(), torn_here()) {
            (100, 0) => Ok(()),
            state => Err(format!("in the accounts and torn: {state:?}")),
        },
    );
    report.publish("guard", "Way::Scope").assert_clean();
}

#[test]
fn a_timeout_dropped_at_every_point_reports_what_it_tears() {
    let report = bank(async |bank| {
        let cut = timeout(Duration::from_millis(15), async {
            step().await;
            critical(bank.transfer()).await;
            step().await;
        });
        assert!(cut.await.is_err());
    });
    report.publish("guard", "timeout").assert_clean();
}

#[test]
fn a_timeout_beyond_the_end_of_time_dropped_at_every_point_reports_what_it_tears() {
    let report = bank(async |bank| timeout(Duration::MAX, critical(bank.transfer())).await.unwrap());
    report.publish("guard", "timeout without end").assert_clean();
}

#[test]
fn a_cancellation_point_beside_a_section_dropped_at_every_point_goes_no_further() {
    let report = bank(async |bank| {
        let cut = timeout(Duration::from_millis(5), async {
            let beside = async {
                sleep(Duration::from_millis(7)).await;
                // The scope is due, and the section holds it.
                cancellation_point().await;
                unreachable!("a scope that is due lets nobody pass");
            };
            tokio::join!(critical(bank.transfer()), beside);
        });
        assert!(cut.await.is_err());
    });
    report.publish("guard", "cancellation_point, in overtime").assert_clean();
}

#[test]
fn a_deadline_dropped_at_every_point_reports_what_it_tears() {
    let report = bank(async |bank| {
        let cut = timeout_at(Instant::now() + Duration::from_millis(5), async {
            critical(bank.transfer()).await;
            step().await;
        });
        assert!(cut.await.is_err());
    });
    report.publish("guard", "timeout_at").assert_clean();
}

#[test]
fn a_token_scope_dropped_at_every_point_reports_what_it_tears() {
    let report = bank(async |bank| {
        let token = CancellationToken::new();
        let cut = with_token(&token, async {
            step().await;
            token.cancel();
            critical(bank.transfer()).await;
            step().await;
        });
        assert!(cut.await.is_err());
    });
    report.publish("guard", "with_token").assert_clean();
}

/// Begins a transfer, leaves it alone in the middle until the scopes around are due, and goes on with it.
async fn rest_in_the_middle(section: impl Future) {
    let mut section = pin!(section);
    assert!(poll_fn(|cx| Poll::Ready(section.as_mut().poll(cx))).await.is_pending());
    for _ in 0..3 {
        step().await;
    }
    section.await;
}

#[test]
fn a_scope_dropped_while_it_waits_for_a_resting_section_reports_what_it_tears() {
    let report = bank(async |bank| {
        let cut = timeout(Duration::from_millis(15), async {
            rest_in_the_middle(critical(bank.transfer())).await;
            step().await;
        });
        assert!(cut.await.is_err());
    });
    report.publish("guard", "timeout, in overtime").assert_clean();

    let report = bank(async |bank| {
        let inner = timeout(Duration::from_millis(5), async {
            rest_in_the_middle(critical_for(GRACE, bank.transfer())).await;
            step().await;
        });
        let nested = timeout_at(Instant::now() + Duration::from_millis(20), inner);
        assert!(nested.await.unwrap().is_err());
    });
    report.publish("guard", "nested scopes, in overtime").assert_clean();

    let report = bank(async |bank| {
        let token = CancellationToken::new();
        let cut = with_token(&token, async {
            tokio::join!(rest_in_the_middle(critical(bank.transfer())), async { token.cancel() });
            step().await;
        });
        assert!(cut.await.is_err());
    });
    report.publish("guard", "with_token, in overtime").assert_clean();
}

#[test]
fn a_section_shared_by_two_scopes_is_torn_once_wherever_they_are_dropped() {
    let report = bank(async |bank| {
        let section = critical(bank.transfer()).shared();
        let early = timeout(Duration::from_millis(3), section.clone());
        let late = timeout(Duration::from_millis(7), async {
            step().await;
            section.await;
        });
        assert!(matches!(tokio::join!(early, late), (Ok(()), Err(_))));
    });
    report.publish("guard", "shared section").assert_clean();
}

#[test]
fn a_guard_cleans_up_once_at_every_point_of_a_loop_with_cancellation_points() {
    let report = explore().run(
        async || Rc::new(Cell::new(0)),
        async |open| {
            open.set(open.get() + 1);
            let _close = Guard::new(|| open.set(open.get() - 1));
            for _ in 0..5 {
                cancellation_point().await;
            }
        },
        async |open, _| if open.get() == 0 { Ok(()) } else { Err(format!("{} still open", open.get())) },
    );
    report.publish("guard", "cancellation_point").assert_clean();
}

/// A seat that is reserved, then booked or released.
#[derive(Default)]
struct Seat {
    reserved: Cell<bool>,
    booked: Cell<bool>,
}

impl Seat {
    async fn book(&self) -> Result<(), ()> {
        self.reserved.set(true);
        step().await;
        step().await;
        self.booked.set(true);
        Ok(())
    }

    fn check(&self, completed: bool) -> Result<(), String> {
        match (completed, self.reserved.get(), self.booked.get()) {
            (true, true, true) | (false, false, false) => Ok(()),
            state => Err(format!("completed, reserved, booked: {state:?}")),
        }
    }
}

#[test]
fn what_was_tried_is_cancelled_at_every_point() {
    let report = explore().run(
        async || Seat::default(),
        async |seat| try_commit_cancel(seat.book(), || seat.reserved.set(false)).await,
        async |seat, outcome| seat.check(outcome.is_completed()),
    );
    report.publish("guard", "try_commit_cancel").assert_clean();
}

#[test]
fn a_try_without_its_cancel_is_caught() {
    let report = explore().run(
        async || Seat::default(),
        async |seat| seat.book().await,
        async |seat, outcome| seat.check(outcome.is_completed()),
    );
    assert!(!report.is_clean());
}

/// A journal whose entries come in pairs, with its reaper.
#[derive(Default)]
struct Journal {
    reaper: Reaper,
    lines: Arc<AtomicUsize>,
}

impl Journal {
    fn pair(&self) -> impl Future<Output = ()> + Send + use<> {
        let lines = Arc::clone(&self.lines);
        async move {
            lines.fetch_add(1, SeqCst);
            step().await;
            lines.fetch_add(1, SeqCst);
        }
    }

    /// Checks that the pair is whole, or was never begun, or that the reaper knows that it was lost.
    async fn check<T>(&self, outcome: &Outcome<T>, begun_at_point_zero: bool) -> Result<(), String> {
        let drain = self.reaper.drain(GRACE).await;
        let started = !matches!(outcome, Outcome::Dropped { point: 0, .. }) || begun_at_point_zero;
        let lines = self.lines.load(SeqCst);
        match (started, drain.finished, drain.timed_out, drain.lost, lines) {
            (false, 0, 0, 0, 0) | (true, 1, 0, 0, 2) | (true, 0, 0, 1, 0 | 1) => Ok(()),
            state => Err(format!("started, finished, timed out, lost, lines: {state:?}")),
        }
    }
}

#[test]
fn a_shield_dropped_at_any_point_finishes_or_is_counted_as_lost() {
    let report = explore().run(
        async || Journal::default(),
        async |journal| journal.reaper.shield(journal.pair()).await,
        async |journal, outcome| journal.check(&outcome, false).await,
    );
    report.publish("guard", "shield").assert_clean();
}

#[test]
fn the_same_work_spawned_by_a_drop_is_caught() {
    let report = explore().run(
        async || Journal::default(),
        async |journal| {
            let pair = journal.pair();
            let _finish = Guard::new(|| drop(tokio::spawn(pair)));
            step().await;
        },
        async |journal, outcome| journal.check(&outcome, false).await,
    );
    assert!(!report.is_clean());
}

#[test]
fn a_deferred_cleanup_runs_or_is_counted_as_lost_at_every_point() {
    let report = explore().run(
        async || Journal::default(),
        async |journal| {
            let pair = journal.pair();
            let _deferred = journal.reaper.defer(|| pair);
            step().await;
            step().await;
        },
        async |journal, outcome| journal.check(&outcome, false).await,
    );
    report.publish("guard", "defer").assert_clean();
}

#[test]
fn a_cleanup_run_by_hand_finishes_or_is_counted_as_lost_at_every_point() {
    let report = explore().run(
        async || Journal::default(),
        async |journal| {
            let pair = journal.pair();
            journal.reaper.defer(|| pair).run().await;
        },
        async |journal, outcome| journal.check(&outcome, false).await,
    );
    report.publish("guard", "Deferred::run").assert_clean();
}

#[test]
fn a_drain_dropped_at_any_point_changes_nothing() {
    let report = explore().run(
        async || {
            let journal = Journal::default();
            let mut shield = journal.reaper.shield(journal.pair());
            assert!(crate::poll_once(&mut shield).is_pending());
            drop(shield);
            journal
        },
        async |journal| journal.reaper.drain(GRACE).await,
        async |journal, outcome| journal.check(&outcome, true).await,
    );
    report.publish("guard", "drain").assert_clean();
}

/// Two counters that rise together, unless the caller leaves.
async fn rise(counter: &Cell<u32>, fails: bool) -> Result<(), u32> {
    counter.set(counter.get() + 1);
    step().await;
    counter.set(counter.get() + 1);
    if fails { Err(counter.get()) } else { Ok(()) }
}

fn both(join: impl AsyncFn(&Cell<u32>, &Cell<u32>) -> Result<(), u32>) -> Report {
    explore().run(
        async || (Cell::new(0), Cell::new(0)),
        async |(quick, slow)| join(quick, slow).await,
        async |(quick, slow), outcome| {
            // A drop leaves them where they were. A caller that got an answer finds both at their ends.
            match (outcome, quick.get(), slow.get()) {
                (Outcome::Completed(Err(2)), 2, 2) | (Outcome::Dropped { .. }, ..) => Ok(()),
                (_, quick, slow) => Err(format!("{quick} and {slow}")),
            }
        },
    )
}

#[test]
fn every_branch_is_at_its_end_when_the_first_error_is_told() {
    let report = both(async |quick, slow| {
        let slow = async {
            step().await;
            rise(slow, false).await
        };
        join_then_try((rise(quick, true), slow)).await.map(drop)
    });
    report.publish("guard", "join_then_try").assert_clean();
}

#[test]
fn a_join_that_returns_with_the_first_error_is_caught() {
    let report = both(async |quick, slow| {
        let slow = async {
            step().await;
            rise(slow, false).await
        };
        let (quick, slow) = (std::pin::pin!(rise(quick, true)), std::pin::pin!(slow));
        match futures_util::future::try_select(quick, slow).await {
            Ok(_) => Ok(()),
            Err(either) => Err(either.factor_first().0),
        }
    });
    assert!(!report.is_clean(), "{report}");
}
