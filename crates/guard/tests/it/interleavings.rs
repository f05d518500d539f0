//! The reaper's books under every interleaving of the threads that write and read them.
//!
//! The library's own source file is compiled here again, with the model checker's types in place of the standard
//! library's and tokio's. The model must find each injected fault, or it would prove nothing.

use std::cell::Cell;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::task::{Context, Wake, Waker};

use loom::thread::{self, JoinHandle};

#[path = "../../src/ledger.rs"]
mod ledger;

use ledger::{Balance, Ledger};

/// How the types below misbehave, if at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// An addition reads and writes in two steps.
    AdditionInTwoSteps,
    /// A load is ordered only with its own variable, as with acquire and release.
    WeakLoad,
    /// A wake-up between the creation of a wait and its first poll is forgotten.
    DeafUntilPolled,
}

thread_local! {
    // The threads of a model are coroutines on one thread, so all of them see this.
    static FAULT: Cell<Fault> = const { Cell::new(Fault::None) };
}

fn injected(fault: Fault) -> bool {
    FAULT.get() == fault
}

mod sync {
    //! The names that the ledger needs, made of loom's types.

    use std::future::Future;
    use std::mem;
    use std::pin::Pin;
    use std::sync::atomic::Ordering;
    use std::task::{Context, Poll, Waker};

    use loom::sync::Mutex;

    use super::{Fault, injected};

    /// Loom takes `SeqCst` for acquire and release, except in read-modify-writes, which see the last value. So a load
    /// is a read-modify-write here; then all accesses are in one order, as with `SeqCst` on all of them.
    #[derive(Debug, Default)]
    pub(super) struct AtomicUsize(loom::sync::atomic::AtomicUsize);

    impl AtomicUsize {
        pub(super) fn load(&self, order: Ordering) -> usize {
            if injected(Fault::WeakLoad) { self.0.load(order) } else { self.0.fetch_add(0, order) }
        }

        pub(super) fn fetch_add(&self, by: usize, order: Ordering) -> usize {
            if injected(Fault::AdditionInTwoSteps) {
                let before = self.load(order);
                self.0.store(before + by, order);
                return before;
            }
            self.0.fetch_add(by, order)
        }

        pub(super) fn fetch_sub(&self, by: usize, order: Ordering) -> usize {
            self.0.fetch_sub(by, order)
        }
    }

    /// tokio's promise about its own type: a wait ends if `notify_waiters` was called after its creation.
    #[derive(Debug, Default)]
    pub(super) struct Notify(Mutex<Calls>);

    #[derive(Debug, Default)]
    struct Calls {
        number: usize,
        waiting: Vec<Waker>,
    }

    impl Notify {
        pub(super) fn notified(&self) -> Notified<'_> {
            let seen = (!injected(Fault::DeafUntilPolled)).then(|| self.0.lock().unwrap().number);
            Notified { notify: self, seen }
        }

        pub(super) fn notify_waiters(&self) {
            let woken = {
                let mut calls = self.0.lock().unwrap();
                calls.number += 1;
                mem::take(&mut calls.waiting)
            };
            woken.into_iter().for_each(Waker::wake);
        }
    }

    pub(super) struct Notified<'a> {
        notify: &'a Notify,
        seen: Option<usize>,
    }

    impl Future for Notified<'_> {
        type Output = ();

        fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
            let notify = self.notify;
            let mut calls = notify.0.lock().unwrap();
            if *self.seen.get_or_insert(calls.number) != calls.number {
                return Poll::Ready(());
            }
            calls.waiting.push(cx.waker().clone());
            Poll::Pending
        }
    }
}

/// Runs `model` once for each interleaving. With three threads there are too many; then it runs for each one with at
/// most `preemptions` preemptions of a thread that could continue.
fn interleave(fault: Fault, preemptions: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
    FAULT.set(fault);
    let runs = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(move || {
        counted.fetch_add(1, SeqCst);
        model();
    });
    let runs = runs.load(SeqCst);
    assert!(runs > 10, "only {runs} interleavings: the model lets its threads do too little");
}

/// Records whether it was woken.
#[derive(Default)]
struct Alarm(AtomicBool);

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.0.store(true, SeqCst);
    }
}

/// Drains while `threads` run, and joins them one by one.
fn drain(ledger: &Ledger, threads: impl IntoIterator<Item = JoinHandle<()>>) {
    let alarm = Arc::new(Alarm::default());
    let waker = Waker::from(Arc::clone(&alarm));
    let idle_again = {
        let mut idle = pin!(ledger.idle());
        let mut poll = || idle.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        let mut is_idle = poll();
        for thread in threads {
            thread.join().unwrap();
            if alarm.0.swap(false, SeqCst) {
                is_idle = is_idle || poll();
            }
        }
        is_idle
    };
    assert!(idle_again, "all has ended and nobody has woken the drain");
}

/// One future ends, while this thread drains.
fn a_drain_beside_an_end() {
    let ledger = Arc::new(Ledger::default());
    let mut entry = ledger.entry();
    entry.start();
    drain(&ledger, [thread::spawn(move || entry.finish())]);
    assert_eq!(ledger.balance(), Balance { running: 0, finished: 1, lost: 0 });
}

/// Two futures end on two threads, one way each, while this thread drains.
fn a_drain_beside_two_ends() {
    let ledger = Arc::new(Ledger::default());
    let [mut finishing, mut losing] = [ledger.entry(), ledger.entry()];
    finishing.start();
    losing.start();
    drain(&ledger, [thread::spawn(move || finishing.finish()), thread::spawn(move || drop(losing))]);
    assert_eq!(ledger.balance(), Balance { running: 0, finished: 1, lost: 1 });
}

/// One thread begins to drain and gives up, another ends the only future, while this thread drains.
fn a_drain_beside_one_that_gives_up() {
    let ledger = Arc::new(Ledger::default());
    let mut entry = ledger.entry();
    entry.start();
    let other = Arc::clone(&ledger);
    let giving_up = thread::spawn(move || {
        let mut idle = Box::pin(other.idle());
        let _: bool = idle.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready();
    });
    drain(&ledger, [giving_up, thread::spawn(move || entry.finish())]);
    assert_eq!(ledger.balance(), Balance { running: 0, finished: 1, lost: 0 });
}

/// A future starts and finishes on one thread, another starts, is handed over and lost on a second one, while this thread
/// reads the books.
fn a_reader_beside_starts_and_ends() {
    let ledger = Arc::new(Ledger::default());
    let [mut finishing, mut losing] = [ledger.entry(), ledger.entry()];
    let threads = [
        thread::spawn(move || {
            finishing.start();
            finishing.finish();
        }),
        thread::spawn(move || {
            losing.start();
            let heir = losing.take();
            drop(losing);
            drop(heir);
        }),
    ];
    let Balance { running, finished, lost } = ledger.balance();
    assert!(running + finished + lost <= 2 && finished <= 1 && lost <= 1);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(ledger.balance(), Balance { running: 0, finished: 1, lost: 1 });
}

#[test]
fn a_drain_is_woken_by_the_end_in_every_interleaving() {
    interleave(Fault::None, None, a_drain_beside_an_end);
}

#[test]
fn a_drain_is_woken_by_the_last_of_two_ends() {
    interleave(Fault::None, Some(3), a_drain_beside_two_ends);
}

#[test]
fn a_drain_is_woken_although_another_one_gives_up() {
    interleave(Fault::None, Some(3), a_drain_beside_one_that_gives_up);
}

#[test]
fn the_books_balance_in_every_interleaving() {
    interleave(Fault::None, None, a_reader_beside_starts_and_ends);
}

#[test]
#[should_panic] // The difference in the books overflows, or, where overflow is not checked, an assertion fails.
fn an_addition_in_two_steps_is_caught() {
    interleave(Fault::AdditionInTwoSteps, None, a_reader_beside_starts_and_ends);
}

#[test]
#[should_panic(expected = "nobody has woken the drain")]
fn a_weaker_order_of_the_loads_is_caught() {
    interleave(Fault::WeakLoad, None, a_drain_beside_an_end);
}

#[test]
#[should_panic(expected = "nobody has woken the drain")]
fn a_wait_that_is_deaf_until_it_is_polled_is_caught() {
    interleave(Fault::DeafUntilPolled, None, a_drain_beside_an_end);
}
