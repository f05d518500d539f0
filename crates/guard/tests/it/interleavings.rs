//! The reaper's books under every interleaving of the threads that write and read them.
//!
//! The library's own source file is compiled here once more, with the model checker's types in place of the standard
//! library's and tokio's. Each way to break it that is injected must be found, or the model would prove nothing.

use std::cell::Cell;
use std::sync::Arc;

use loom::thread;

#[path = "../../src/ledger.rs"]
mod ledger;

use ledger::{Balance, Ledger};

/// How the types below misbehave, if at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// An addition reads and writes in two steps.
    AdditionInTwoSteps,
    /// A load is ordered with its own variable only, as it would be with acquire and release.
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
    //! The names that the ledger asks for, made of loom's types.

    use std::future::Future;
    use std::mem;
    use std::pin::Pin;
    use std::sync::atomic::Ordering;
    use std::task::{Context, Poll, Waker};

    use loom::sync::Mutex;

    use super::{Fault, injected};

    /// Loom takes `SeqCst` for acquire and release, except in read-modify-writes, which see the last value. So a load is one
    /// of these here; then all accesses are in one order, as `SeqCst` on all of them makes it.
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

    /// What tokio promises of its own: a wait ends if `notify_waiters` was called after it was created.
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

/// Runs `model` once for each interleaving with no more than `preemptions` involuntary switches between threads, `None` for
/// any number.
fn interleave(fault: Fault, preemptions: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
    FAULT.set(fault);
    let runs = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(move || {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        model();
    });
    let runs = runs.load(std::sync::atomic::Ordering::Relaxed);
    assert!(runs > 100, "only {runs} interleavings: the model lets its threads do too little");
}

/// One future ends, while this thread drains.
fn a_drain_beside_an_end() {
    let ledger = Arc::new(Ledger::default());
    let mut entry = ledger.entry();
    entry.start();
    let ending = thread::spawn(move || entry.finish());
    // A wake-up that is lost is a deadlock, which the model reports.
    loom::future::block_on(ledger.idle());
    assert_eq!(ledger.balance(), Balance { running: 0, finished: 1, lost: 0 });
    ending.join().unwrap();
}

/// Two futures end on two threads, one way each, while this thread drains.
fn a_drain_beside_two_ends() {
    let ledger = Arc::new(Ledger::default());
    let [mut finishing, mut losing] = [ledger.entry(), ledger.entry()];
    finishing.start();
    losing.start();
    let threads = [thread::spawn(move || finishing.finish()), thread::spawn(move || drop(losing))];
    loom::future::block_on(ledger.idle());
    assert_eq!(ledger.balance(), Balance { running: 0, finished: 1, lost: 1 });
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// A future starts and finishes on one thread, another starts and is handed over and lost on a second one, while this thread
/// reads the books.
fn starts_and_ends_beside_a_reader() {
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

/// Two threads drain at once, and a third one ends what they wait for.
fn two_drains_beside_an_end() {
    let ledger = Arc::new(Ledger::default());
    let mut entry = ledger.entry();
    entry.start();
    let other = Arc::clone(&ledger);
    let threads = [thread::spawn(move || entry.finish()), thread::spawn(move || loom::future::block_on(other.idle()))];
    loom::future::block_on(ledger.idle());
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(ledger.balance(), Balance { running: 0, finished: 1, lost: 0 });
}

#[test]
fn a_drain_is_woken_by_the_last_end_in_every_interleaving() {
    interleave(Fault::None, None, a_drain_beside_an_end);
}

#[test]
fn a_drain_is_woken_by_the_last_of_two_ends() {
    interleave(Fault::None, Some(2), a_drain_beside_two_ends);
}

#[test]
fn the_books_balance_in_every_interleaving() {
    interleave(Fault::None, None, starts_and_ends_beside_a_reader);
}

#[test]
fn drains_at_the_same_time_are_all_woken() {
    interleave(Fault::None, Some(2), two_drains_beside_an_end);
}

#[test]
#[should_panic] // The difference in the books overflows, or, where overflow is not checked, an assertion fails.
fn an_addition_in_two_steps_is_caught() {
    interleave(Fault::AdditionInTwoSteps, Some(2), starts_and_ends_beside_a_reader);
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_weaker_order_of_the_loads_is_caught() {
    interleave(Fault::WeakLoad, None, a_drain_beside_an_end);
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_wait_that_is_deaf_until_it_is_polled_is_caught() {
    interleave(Fault::DeafUntilPolled, None, a_drain_beside_an_end);
}
