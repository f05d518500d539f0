//! Torn critical sections: counted exactly, reported once, with their place.

use std::cell::{Cell, RefCell};
use std::future::{pending, ready};
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::sync::Once;
use std::time::Duration;

use cancel_safe_guard::{critical, critical_for, on_torn, timeout, torn_sections};
use tokio::task::yield_now;
use tokio::time::sleep;

use crate::{caught, poll_once};

thread_local! {
    static HERE: RefCell<Vec<&'static Location<'static>>> = const { RefCell::new(Vec::new()) };
    static HOOK_PANICS: Cell<bool> = const { Cell::new(false) };
}

/// Installs the hook, which the whole process shares, and forgets what was torn on this thread before.
pub(crate) fn watch() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        on_torn(|torn| {
            HERE.with_borrow_mut(|here| here.push(torn.location));
            assert!(!HOOK_PANICS.get(), "the hook fails the test");
        });
    });
    HERE.with_borrow_mut(Vec::clear);
}

/// How many sections were torn on this thread since [`watch`].
pub(crate) fn torn_here() -> usize {
    HERE.with_borrow(Vec::len)
}

#[test]
fn a_section_dropped_in_the_middle_is_torn_once_and_named() {
    watch();
    let before = torn_sections();
    let line = line!() + 1;
    let mut section = Box::pin(critical(pending::<()>()));
    for _ in 0..3 {
        assert!(poll_once(&mut section).is_pending());
    }
    assert_eq!(torn_here(), 0);
    drop(section);
    assert_eq!(torn_here(), 1);
    assert!(torn_sections() > before);
    let place = HERE.with_borrow(|here| here[0]);
    assert_eq!((place.file(), place.line()), (file!(), line));
}

#[test]
fn a_bounded_section_names_the_caller_too() {
    watch();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let _inside = runtime.enter();
    let line = line!() + 1;
    let mut section = Box::pin(critical_for(Duration::from_secs(1), pending::<()>()));
    assert!(poll_once(&mut section).is_pending());
    drop(section);
    assert_eq!(HERE.with_borrow(|here| here[0].line()), line);
}

#[test]
fn a_section_that_was_not_entered_or_has_been_left_is_not_torn() {
    watch();
    drop(critical(pending::<()>()));
    let mut ended = Box::pin(critical(ready(())));
    assert!(poll_once(&mut ended).is_ready());
    drop(ended);
    assert_eq!(torn_here(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_timeout_of_tokio_tears_and_ours_does_not() {
    watch();
    let section = || critical(sleep(Duration::from_millis(20)));
    assert!(tokio::time::timeout(Duration::from_millis(10), section()).await.is_err());
    assert_eq!(torn_here(), 1);
    assert!(timeout(Duration::from_millis(10), section()).await.is_ok());
    assert_eq!(torn_here(), 1);
}

#[tokio::test]
async fn an_abort_tears() {
    watch();
    let task = tokio::spawn(critical(pending::<()>()));
    yield_now().await;
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    assert_eq!(torn_here(), 1);
}

#[test]
fn the_shutdown_of_a_runtime_tears() {
    watch();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    drop(runtime.spawn(critical(pending::<()>())));
    runtime.block_on(yield_now());
    assert_eq!(torn_here(), 0);
    drop(runtime);
    assert_eq!(torn_here(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_section_ended_by_its_own_grace_is_not_torn() {
    watch();
    assert!(critical_for(Duration::from_millis(5), pending::<()>()).await.is_err());
    assert_eq!(torn_here(), 0);
}

#[tokio::test]
async fn nested_sections_are_torn_one_by_one() {
    watch();
    let mut nested = Box::pin(critical(critical(async {
        tokio::join!(critical(pending::<()>()), critical(pending::<()>()), critical(ready(())));
    })));
    assert!(poll_once(&mut nested).is_pending());
    drop(nested);
    assert_eq!(torn_here(), 4);
}

#[tokio::test]
async fn a_section_that_panics_is_torn_once() {
    watch();
    assert!(caught(critical(async { panic!("at the first poll") })).await.is_err());
    assert_eq!(torn_here(), 1);
    let late = caught(critical(async {
        yield_now().await;
        panic!("at the second poll")
    }));
    assert!(late.await.is_err());
    assert_eq!(torn_here(), 2);
}

#[test]
fn a_hook_may_panic_to_fail_a_test() {
    watch();
    let mut section = Box::pin(critical(pending::<()>()));
    assert!(poll_once(&mut section).is_pending());
    HOOK_PANICS.set(true);
    let dropped = catch_unwind(AssertUnwindSafe(|| drop(section)));
    HOOK_PANICS.set(false);
    assert!(dropped.is_err());
    assert_eq!(torn_here(), 1);
}

#[test]
fn a_hook_that_panics_while_the_thread_unwinds_does_not_abort_the_process() {
    watch();
    let unwound = catch_unwind(AssertUnwindSafe(|| {
        let mut section = Box::pin(critical(pending::<()>()));
        assert!(poll_once(&mut section).is_pending());
        HOOK_PANICS.set(true);
        panic!("on purpose");
    }));
    HOOK_PANICS.set(false);
    assert_eq!(unwound.unwrap_err().downcast_ref(), Some(&"on purpose"));
    assert_eq!(torn_here(), 1);
}
