//! The end of an application under every interleaving of the threads that may cause it.
//!
//! The library's own source file is compiled here again, with the model checker's types in place of the standard
//! library's. The model must find each injected fault of these types, or it would prove nothing. A thread that waits
//! for an announcement that never comes is a deadlock, which the model checker reports.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::task::{Context, Wake, Waker};
use std::time::{Duration, Instant};

use loom::thread;

#[path = "../../src/state/stages.rs"]
mod stages;

use stages::{Ending, Stage};

/// How the types below misbehave, if at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// An announcement reaches only one of the waiting threads.
    WakesOne,
    /// An announcement between the check of the value and the wait is lost.
    WaitsTooLate,
}

thread_local! {
    // The threads of a model are coroutines on one thread, so all of them see this.
    static FAULT: Cell<Fault> = const { Cell::new(Fault::None) };
}

mod sync {
    //! The names that the ending needs, made of loom's types.

    use std::time::Instant;

    use loom::sync::{Condvar, Mutex, MutexGuard};

    use super::{FAULT, Fault};

    #[derive(Debug)]
    pub(super) struct Monitor<T> {
        value: Mutex<T>,
        changed: Condvar,
    }

    impl<T> Monitor<T> {
        pub(super) fn new(value: T) -> Self {
            Self { value: Mutex::new(value), changed: Condvar::new() }
        }

        pub(super) fn lock(&self) -> MutexGuard<'_, T> {
            self.value.lock().unwrap()
        }

        pub(super) fn announce(&self) {
            match FAULT.get() {
                Fault::WakesOne => self.changed.notify_one(),
                Fault::None | Fault::WaitsTooLate => self.changed.notify_all(),
            }
        }

        /// A passed deadline counts as passed in every interleaving, and a future one never does.
        pub(super) fn wait<'a>(
            &'a self,
            mut value: MutexGuard<'a, T>,
            deadline: Option<Instant>,
        ) -> (MutexGuard<'a, T>, bool) {
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return (value, true);
            }
            if FAULT.get() == Fault::WaitsTooLate {
                drop(value);
                value = self.lock();
            }
            (self.changed.wait(value).unwrap(), false)
        }
    }
}

/// The holder reports.
struct Voice;

fn never() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

/// Runs `model` for each interleaving with at most `preemptions` preemptions of a thread that could continue.
fn interleave(fault: Fault, preemptions: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
    FAULT.set(fault);
    let runs = Arc::new(AtomicUsize::new(0));
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

fn ending() -> Arc<Ending<Voice>> {
    let ending = Ending::new();
    ending.give_voice(Voice);
    Arc::new(ending)
}

/// `run` reports and returns, beside a watchdog whose deadline never comes and callbacks on their own thread.
fn a_clean_end() {
    let ending = ending();
    let [watched, heard] = [Arc::clone(&ending), Arc::clone(&ending)];
    let watchdog = thread::spawn(move || {
        let deadline = watched.deadline();
        assert!(deadline.is_none() || watched.reached(Stage::Over, never()), "the deadline passed");
    });
    ending.begin(never());
    assert!(ending.claim().is_some(), "nobody else wants the voice");
    let voice = thread::spawn(move || heard.told());
    assert!(ending.reached(Stage::Told, never()));
    ending.over();
    watchdog.join().unwrap();
    voice.join().unwrap();
}

/// `run`, a watchdog at its deadline and a second signal all want to end the process.
fn a_race_for_the_voice() {
    let ending = ending();
    let told = Arc::new(AtomicUsize::new(0));
    let contend = |ending: Arc<Ending<Voice>>, told: Arc<AtomicUsize>| {
        move || match ending.claim() {
            Some(Voice) => {
                told.fetch_add(1, SeqCst);
                ending.told();
            }
            // The late one ends the process only after the report is out.
            None => {
                assert!(ending.reached(Stage::Told, never()));
                assert_eq!(told.load(SeqCst), 1, "told before it was told");
            }
        }
    };
    ending.begin(never());
    let signal = thread::spawn(contend(Arc::clone(&ending), Arc::clone(&told)));
    let (watched, heard) = (Arc::clone(&ending), Arc::clone(&told));
    let watchdog = thread::spawn(move || {
        let deadline = watched.deadline();
        // This deadline has passed, unless it is over.
        if deadline.is_some() && !watched.reached(Stage::Over, Instant::now()) {
            contend(watched, heard)();
        }
    });
    contend(Arc::clone(&ending), Arc::clone(&told))();
    signal.join().unwrap();
    watchdog.join().unwrap();
    assert_eq!(told.load(SeqCst), 1, "the voice was had by more or fewer than one");
}

/// Two threads wait for the same stage while a third one reaches it.
fn two_that_wait() {
    let ending = ending();
    let waiting: Vec<_> = (0..2)
        .map(|_| {
            let ending = Arc::clone(&ending);
            thread::spawn(move || assert!(ending.reached(Stage::Stopping, never())))
        })
        .collect();
    ending.begin(never());
    waiting.into_iter().for_each(|thread| thread.join().unwrap());
}

/// An application that ends before it was ever told to stop lets its watchdog go.
fn an_end_without_a_stop() {
    let ending = ending();
    let watched = Arc::clone(&ending);
    let watchdog = thread::spawn(move || assert!(watched.deadline().is_none()));
    let other = Arc::clone(&ending);
    let late = thread::spawn(move || other.told());
    ending.over();
    watchdog.join().unwrap();
    late.join().unwrap();
    assert!(ending.reached(Stage::Over, Instant::now()), "the stage went back");
}

/// A second signal hurries a supervisor that is polling.
fn a_hurried_supervisor() {
    struct Woken(AtomicBool);
    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, SeqCst);
        }
    }
    let ending = ending();
    let [hurrying, again] = [Arc::clone(&ending), Arc::clone(&ending)];
    let signal = thread::spawn(move || hurrying.hurry());
    let another = thread::spawn(move || again.hurry());
    let woken = Arc::new(Woken(AtomicBool::new(false)));
    let waker = Waker::from(Arc::clone(&woken));
    let poll = || ending.poll_hurried(&Context::from_waker(&waker)).is_ready();
    let hurried = poll();
    // Like a supervisor that was woken by something else.
    let hurried = hurried || poll();
    signal.join().unwrap();
    another.join().unwrap();
    assert!(hurried || woken.0.load(SeqCst), "hurried, and nobody has woken it");
    assert!(poll());
}

#[test]
fn a_clean_end_lets_every_thread_go() {
    interleave(Fault::None, Some(3), a_clean_end);
}

#[test]
fn one_thread_reports_and_the_others_wait_for_it() {
    interleave(Fault::None, Some(3), a_race_for_the_voice);
}

#[test]
fn a_stop_reaches_all_that_wait_for_it() {
    interleave(Fault::None, None, two_that_wait);
}

#[test]
fn a_watchdog_without_a_stop_is_let_go() {
    interleave(Fault::None, Some(3), an_end_without_a_stop);
}

#[test]
fn a_hurry_is_never_missed() {
    interleave(Fault::None, None, a_hurried_supervisor);
}

#[test]
#[should_panic(expected = "deadlock")]
fn an_announcement_to_one_of_two_is_caught() {
    interleave(Fault::WakesOne, None, two_that_wait);
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_wait_that_begins_too_late_is_caught() {
    interleave(Fault::WaitsTooLate, Some(3), a_clean_end);
}
