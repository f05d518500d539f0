//! Random programs of scopes, critical sections, raw drops, local tasks and panics, judged by rules that hold for all
//! of them.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::panic::resume_unwind;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use cancel_safe_guard::{
    Guard, cancellation_point, critical, critical_for, remaining, timeout, timeout_at, with_token,
};
use tokio::task::{LocalSet, spawn_local, yield_now};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::torn::{torn_here, watch};
use crate::{caught, soon};

const PROGRAMS: usize = 3_000;

/// A program. Times are in milliseconds, so that many of them coincide.
#[derive(Debug)]
enum Node {
    Sleep(u64),
    Yield,
    Point,
    Panic,
    Both(Rc<Self>, Rc<Self>),
    Join(Rc<Self>, Rc<Self>),
    Critical(Rc<Self>),
    CriticalFor(u64, Rc<Self>),
    Timeout(u64, Rc<Self>),
    TimeoutAt(u64, Rc<Self>),
    WithToken(u64, Rc<Self>),
    RawTimeout(u64, Rc<Self>),
    RawSelect(Rc<Self>, Rc<Self>),
    /// A `LocalSet`, whose tasks are polled inside the scopes around it.
    Set(Rc<Self>),
    Local(Rc<Self>),
    Caught(Rc<Self>),
}

/// What a program may contain.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manners {
    /// Nothing but the scopes drops anything.
    Civil,
    /// Raw drops and panics too.
    Rough,
}

fn program(random: &mut fastrand::Rng, manners: Manners, depth: usize) -> Node {
    let time = random.u64(..12);
    if depth == 0 || random.u8(..8) == 0 {
        return match random.u8(..10) {
            0..6 => Node::Sleep(time),
            6..8 => Node::Yield,
            8 => Node::Point,
            _ if manners == Manners::Rough => Node::Panic,
            _ => Node::Yield,
        };
    }
    let mut inner = || Rc::new(program(random, manners, depth - 1));
    let (one, two) = (inner(), inner());
    match random.u8(..if manners == Manners::Rough { 17 } else { 13 }) {
        0 | 1 => Node::Both(one, two),
        2 | 3 => Node::Join(one, two),
        4..7 => Node::Critical(one),
        7 => Node::CriticalFor(time, one),
        8 | 9 => Node::Timeout(time, one),
        10 => Node::TimeoutAt(time, one),
        11 => Node::WithToken(time, one),
        12 => Node::Set(one),
        13 => Node::RawTimeout(time, one),
        14 => Node::RawSelect(one, two),
        15 => Node::Local(one),
        _ => Node::Caught(one),
    }
}

/// What is counted while a program runs.
#[derive(Default)]
struct Counts {
    entered: Cell<usize>,
    left: Cell<usize>,
    late: Cell<usize>,
    wrong: RefCell<Vec<String>>,
}

impl Counts {
    fn require(&self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.wrong.borrow_mut().push(what());
        }
    }
}

/// The scopes around a node, as the program itself knows them.
#[derive(Clone, Default)]
struct Around {
    counts: Rc<Counts>,
    nearest: Option<Instant>,
    /// For each scope around, when a critical section inside it was released last.
    released: Vec<Rc<Cell<Option<Instant>>>>,
}

impl Around {
    /// The surroundings inside one more scope, and its own record.
    fn scope(&self, deadline: Option<Instant>) -> (Self, Rc<Cell<Option<Instant>>>) {
        let mut inner = self.clone();
        inner.nearest = [self.nearest, deadline].into_iter().flatten().min();
        let record = Rc::new(Cell::new(None));
        inner.released.push(Rc::clone(&record));
        (inner, record)
    }

    /// Checks that a scope that returned late was held up to that very moment.
    fn ended(&self, due: Instant, record: &Cell<Option<Instant>>) {
        let now = Instant::now();
        if now > due {
            self.counts.late.set(self.counts.late.get() + 1);
            self.counts.require(record.get() == Some(now), || {
                format!("a scope due at {due:?} returned at {now:?}, its last section ended at {:?}", record.get())
            });
        }
    }

    /// The body of a critical section, up to its release.
    async fn section(self, body: &Node) {
        let _released = Guard::new(|| self.released.iter().for_each(|record| record.set(Some(Instant::now()))));
        self.counts.entered.set(self.counts.entered.get() + 1);
        run(body, self.clone()).await;
    }

    /// Follows the critical section, unless it is torn.
    fn leave(&self) {
        self.counts.left.set(self.counts.left.get() + 1);
    }
}

fn run(node: &Node, around: Around) -> Pin<Box<dyn Future<Output = ()> + '_>> {
    Box::pin(async move {
        let seen = remaining();
        let told = around.nearest.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        around.counts.require(seen == told, || format!("{seen:?} remain instead of {told:?}"));
        let after = |time: &u64| Instant::now() + Duration::from_millis(*time);
        match node {
            Node::Sleep(time) => sleep(Duration::from_millis(*time)).await,
            Node::Yield => yield_now().await,
            Node::Point => cancellation_point().await,
            Node::Panic => resume_unwind(Box::new("on purpose")),
            Node::Both(one, two) => {
                run(one, around.clone()).await;
                run(two, around).await;
            }
            Node::Join(one, two) => drop(tokio::join!(run(one, around.clone()), run(two, around))),
            Node::Critical(body) => {
                critical(around.clone().section(body)).await;
                around.leave();
            }
            Node::CriticalFor(time, body) => {
                let (inner, _) = around.scope(Some(after(time)));
                let _ = critical_for(Duration::from_millis(*time), inner.section(body)).await;
                around.leave();
            }
            Node::Timeout(time, body) => {
                let (inner, record) = around.scope(Some(after(time)));
                let due = after(time);
                let _ = timeout(Duration::from_millis(*time), run(body, inner)).await;
                around.ended(due, &record);
            }
            Node::TimeoutAt(time, body) => {
                let due = after(time);
                let (inner, record) = around.scope(Some(due));
                let _ = timeout_at(due, run(body, inner)).await;
                around.ended(due, &record);
            }
            Node::WithToken(time, body) => {
                let (token, due) = (CancellationToken::new(), after(time));
                let (canceller, delay) = (token.clone(), sleep(Duration::from_millis(*time)));
                drop(spawn_local(async move {
                    delay.await;
                    canceller.cancel();
                }));
                let (inner, record) = around.scope(None);
                let _ = with_token(&token, run(body, inner)).await;
                around.ended(due, &record);
            }
            Node::RawTimeout(time, body) => {
                let _ = tokio::time::timeout(Duration::from_millis(*time), run(body, around)).await;
            }
            Node::RawSelect(one, two) => tokio::select! {
                biased;
                () = run(one, around.clone()) => {}
                () = run(two, around) => {}
            },
            Node::Set(body) => LocalSet::new().run_until(run(body, around)).await,
            Node::Local(body) => {
                let (body, counts) = (Rc::clone(body), Rc::clone(&around.counts));
                let around = Around { counts, ..Around::default() };
                drop(spawn_local(async move { run(&body, around).await }).await);
            }
            Node::Caught(body) => drop(caught(run(body, around)).await),
        }
    })
}

/// Runs random programs. Returns how many scopes returned late and how many sections were torn, over all of them.
fn judge(manners: Manners) -> (usize, usize) {
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut late, mut torn) = (0, 0);
    for _ in 0..PROGRAMS {
        let program = program(&mut random, manners, 5);
        let around = Around::default();
        let counts = Rc::clone(&around.counts);
        watch();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let local = LocalSet::new();
        let ended = runtime.block_on(local.run_until(soon(caught(run(&program, around)))));
        assert!(ended.is_ok() || manners == Manners::Rough, "seed {seed}: {program:?}");
        drop((local, runtime));
        assert_eq!(remaining(), None, "seed {seed}: {program:?}");
        let wrong = counts.wrong.take();
        assert!(wrong.is_empty(), "seed {seed}: {wrong:?} in {program:?}");
        assert_eq!(torn_here(), counts.entered.get() - counts.left.get(), "seed {seed}: {program:?}");
        late += counts.late.get();
        torn += torn_here();
    }
    (late, torn)
}

#[test]
fn scopes_alone_never_tear_and_are_late_only_for_a_section() {
    let (late, torn) = judge(Manners::Civil);
    assert_eq!(torn, 0);
    assert!(late > 0, "no scope ever waited for a section");
}

#[test]
fn among_raw_drops_and_panics_each_torn_section_is_counted_once() {
    let (late, torn) = judge(Manners::Rough);
    assert!(late > 0 && torn > 0, "{late} late, {torn} torn");
}
