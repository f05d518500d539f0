//! Guards and the try-commit-cancel pattern on every way out; which futures are `Send`.

use std::cell::{Cell, RefCell};
use std::future::{pending, ready};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cancel_safe_guard::{
    Guard, Reaper, cancellation_point, critical, critical_for, join_then_try, timeout, timeout_at, try_commit_cancel,
    with_token,
};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::{caught, poll_once};

#[test]
fn a_guard_runs_once_when_it_is_dropped() {
    let runs = Cell::new(0);
    drop(Guard::new(|| runs.set(runs.get() + 1)));
    assert_eq!(runs.get(), 1);
}

#[test]
fn a_guard_that_is_run_by_hand_does_not_run_again() {
    let runs = Cell::new(0);
    Guard::new(|| runs.set(runs.get() + 1)).run();
    assert_eq!(runs.get(), 1);
}

#[test]
fn a_disarmed_guard_drops_its_closure_without_running_it() {
    let owned = Rc::new(());
    let captured = Rc::clone(&owned);
    let guard = Guard::new(move || unreachable!("{captured:?} was disarmed"));
    assert_eq!(Rc::strong_count(&owned), 2);
    guard.disarm();
    assert_eq!(Rc::strong_count(&owned), 1);
}

#[test]
fn a_guard_runs_when_its_owner_panics() {
    let runs = Cell::new(0);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _guard = Guard::new(|| runs.set(runs.get() + 1));
        panic!("on purpose");
    }));
    assert!(panicked.is_err());
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn a_guard_runs_when_its_task_is_aborted() {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let (armed, is_armed) = oneshot::channel();
    let task = tokio::spawn(async move {
        let _guard = Guard::new(|| {
            counted.fetch_add(1, Ordering::SeqCst);
        });
        armed.send(()).unwrap();
        pending::<()>().await;
    });
    is_armed.await.unwrap();
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    assert_eq!(runs.load(Ordering::SeqCst), 1);
}

/// What ran in a `try_commit_cancel`, in order.
#[derive(Default)]
struct Log(RefCell<Vec<&'static str>>);

impl Log {
    fn note(&self, what: &'static str) {
        self.0.borrow_mut().push(what);
    }

    fn lines(&self) -> Vec<&'static str> {
        self.0.borrow().clone()
    }
}

#[tokio::test]
async fn a_committed_operation_is_not_cancelled() {
    let log = Log::default();
    let result = try_commit_cancel(ready(Ok::<_, ()>(7)), || log.note("cancelled")).await;
    assert_eq!(result, Ok(7));
    assert!(log.lines().is_empty());
}

#[tokio::test]
async fn a_failed_operation_is_cancelled_after_it_has_let_go_of_everything() {
    let log = Log::default();
    let operation = async {
        let _held = Guard::new(|| log.note("released"));
        Err::<(), _>("no")
    };
    assert_eq!(try_commit_cancel(operation, || log.note("cancelled")).await, Err("no"));
    assert_eq!(log.lines(), ["released", "cancelled"]);
}

#[test]
fn a_dropped_operation_is_cancelled_after_it_has_let_go_of_everything() {
    let log = Log::default();
    let operation = async {
        let _held = Guard::new(|| log.note("released"));
        pending::<Result<(), ()>>().await
    };
    let mut running = Box::pin(try_commit_cancel(operation, || log.note("cancelled")));
    assert!(poll_once(&mut running).is_pending());
    assert!(log.lines().is_empty());
    drop(running);
    assert_eq!(log.lines(), ["released", "cancelled"]);
}

#[tokio::test]
async fn a_panicking_operation_is_cancelled() {
    let log = Log::default();
    let operation = async { panic!("on purpose") };
    let result = caught(try_commit_cancel::<(), ()>(operation, || log.note("cancelled"))).await;
    assert_eq!(result, Err("on purpose".to_owned()));
    assert_eq!(log.lines(), ["cancelled"]);
}

#[test]
fn an_operation_that_was_never_started_is_not_cancelled() {
    let log = Log::default();
    drop(try_commit_cancel(ready(Ok::<_, ()>(())), || log.note("cancelled")));
    assert!(log.lines().is_empty());
}

#[test]
fn futures_are_send_where_their_contents_are() {
    fn is_send<T: Send>(value: T) -> T {
        value
    }
    let token = CancellationToken::new();
    let reaper = is_send(Reaper::new());
    drop(is_send(timeout(Duration::from_secs(1), ready(1))));
    drop(is_send(timeout_at(Instant::now(), ready(1))));
    drop(is_send(with_token(&token, ready(1))));
    drop(is_send(critical(critical_for(Duration::from_secs(1), ready(1)))));
    drop(is_send(cancellation_point()));
    drop(is_send(try_commit_cancel(ready(Ok::<_, ()>(1)), || ())));
    drop(is_send(join_then_try((ready(Ok::<_, ()>(1)), ready(Ok("two"))))));
    drop(is_send(reaper.shield(ready(1))));
    drop(is_send(reaper.drain(Duration::ZERO)));
    let deferred = is_send(reaper.defer(|| ready(())));
    drop(is_send(deferred.run()));
}

#[tokio::test(start_paused = true)]
async fn a_join_then_try_gives_all_values_in_their_places() {
    let three = join_then_try((async { Ok::<_, ()>(1) }, async { Ok("two") }, async { Ok(vec![3]) })).await;
    assert_eq!(three, Ok((1, "two", vec![3])));
    let good = || async { Ok::<_, ()>(()) };
    let eight = (good(), good(), good(), good(), good(), good(), good(), good());
    assert!(join_then_try(eight).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn of_several_errors_the_first_in_the_tuple_is_told() {
    let late = async {
        sleep(Duration::from_secs(2)).await;
        Err::<(), _>("late")
    };
    assert_eq!(join_then_try((late, async { Err::<(), _>("early") })).await, Err("late"));
}

#[tokio::test(start_paused = true)]
async fn a_branch_at_its_end_holds_nothing_while_the_others_run() {
    let held = Arc::new(());
    let (quick, seen) = (held.clone(), held);
    let quick = async move {
        drop(quick);
        Ok::<_, ()>(())
    };
    let slow = async {
        sleep(Duration::from_secs(1)).await;
        Ok(Arc::strong_count(&seen))
    };
    assert_eq!(join_then_try((quick, slow)).await, Ok(((), 1)));
}
