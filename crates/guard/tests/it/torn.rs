//! Torn critical sections: counted exactly, reported once, with their place.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, pending, ready};
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, Once};
use std::time::Duration;

use cancel_safe_guard::{critical, critical_for, on_torn, timeout, torn_sections};
use tokio::task::yield_now;
use tokio::time::sleep;

use crate::{caught, poll_once, soon};

thread_local! {
    static HERE: RefCell<Vec<&'static Location<'static>>> = const { RefCell::new(Vec::new()) };
    static HOOK_PANICS: Cell<bool> = const { Cell::new(false) };
}

/// How many sections were torn in the whole process, by the line in this file that began them.
static BY_LINE: Mutex<BTreeMap<u32, usize>> = Mutex::new(BTreeMap::new());

/// Installs the hook, which the whole process shares, and forgets what was torn on this thread before.
pub(crate) fn watch() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        on_torn(|torn| {
            HERE.with_borrow_mut(|here| here.push(torn.location));
            if torn.location.file() == file!() {
                *BY_LINE.lock().unwrap().entry(torn.location.line()).or_default() += 1;
            }
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
async fn a_raw_select_tears_the_branches_that_lose() {
    watch();
    tokio::select! {
        biased;
        () = critical(pending::<()>()) => unreachable!("it never ends"),
        () = critical(pending::<()>()) => unreachable!("nor does this"),
        () = yield_now() => {}
        () = critical(pending::<()>()) => unreachable!("this is torn as well"),
    }
    assert_eq!(torn_here(), 3);
}

/// The records of sections that ran in separate tasks, on two workers.
struct Workers {
    entered: Arc<AtomicUsize>,
    left: Arc<AtomicUsize>,
    seed: u64,
}

impl Workers {
    const SECTIONS: usize = 2_000;

    fn run<F: Future<Output = ()> + Send + 'static>(around: impl Fn(Self, usize) -> F, aborts: bool) -> Self {
        let seed = fastrand::u64(..);
        let mut random = fastrand::Rng::with_seed(seed);
        let counts = Self { entered: Arc::default(), left: Arc::default(), seed };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
        runtime.block_on(async {
            for _ in 0..Self::SECTIONS {
                // Some never end, so that some are torn however the threads are scheduled.
                let endless = aborts && random.u8(..8) == 0;
                let (yields, before) = (random.usize(..8), counts.entered.load(SeqCst));
                let task = tokio::spawn(around(counts.share(), if endless { usize::MAX } else { yields }));
                for _ in 0..random.usize(..4) {
                    yield_now().await;
                }
                while endless && counts.entered.load(SeqCst) == before {
                    yield_now().await;
                }
                if endless || (aborts && random.bool()) {
                    task.abort();
                }
                assert!(soon(task).await.is_ok() || aborts, "seed {seed}");
            }
        });
        counts
    }

    fn share(&self) -> Self {
        Self { entered: Arc::clone(&self.entered), left: Arc::clone(&self.left), seed: self.seed }
    }

    async fn section(self, yields: usize) {
        self.entered.fetch_add(1, SeqCst);
        for _ in 0..yields {
            yield_now().await;
        }
        self.left.fetch_add(1, SeqCst);
    }

    /// The sections that were entered and not left.
    fn lacking(&self) -> usize {
        self.entered.load(SeqCst) - self.left.load(SeqCst)
    }
}

fn torn_at(line: u32) -> usize {
    BY_LINE.lock().unwrap().get(&line).copied().unwrap_or_default()
}

#[test]
fn what_aborts_tear_on_two_workers_is_counted_exactly() {
    watch();
    let line = line!() + 1;
    let counts = Workers::run(|counts, yields| critical(counts.section(yields)), true);
    assert!(counts.lacking() > 0, "nothing was torn");
    assert_eq!(torn_at(line), counts.lacking(), "seed {}", counts.seed);
}

#[test]
fn scopes_on_two_workers_tear_nothing() {
    watch();
    let line = line!() + 3;
    let around = |counts: Workers, yields: usize| async move {
        let deadline = Duration::from_micros(yields as u64 * 5);
        let section = timeout(deadline, critical(counts.section(yields)));
        let _ = timeout(deadline * 2, section).await;
    };
    let counts = Workers::run(around, false);
    assert!(counts.left.load(SeqCst) > 0, "every scope ended before its section began");
    assert_eq!((counts.lacking(), torn_at(line)), (0, 0), "seed {}", counts.seed);
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
