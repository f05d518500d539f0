//! The breaker's circuit under every interleaving of the threads that use it.
//!
//! The library's own source files are compiled here again, with the model checker's types in place of the standard
//! library's. The model must find each injected fault, or it would prove nothing.

use std::{
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use loom::thread::{self, JoinHandle};

#[path = "../../src/breaker/circuit.rs"]
#[expect(dead_code, reason = "no test here makes a map, or asks for all figures")]
mod circuit;
#[path = "../../src/breaker/closed.rs"]
mod closed;
#[path = "../../src/breaker/probes.rs"]
mod probes;
#[path = "../../src/breaker/silence.rs"]
mod silence;
#[path = "../../src/breaker/window.rs"]
#[expect(dead_code, reason = "a window of calls is all under one lock")]
mod window;
#[path = "../../src/breaker/word.rs"]
#[expect(unreachable_pub, reason = "the library publishes what is private here")]
mod word;

use circuit::{Admission, Circuit, Ending, Refused, Rules, Times};
use probes::ProbeRules;
use window::{Counts, Nanos, Span};
use word::State;

/// How the types below misbehave, if at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// A compare-exchange reads and writes in two steps.
    ExchangeInTwoSteps,
    /// A load is ordered only with its own variable, as with acquire and release.
    WeakLoad,
    /// A swap reads and writes in two steps.
    SwapInTwoSteps,
}

thread_local! {
    // The threads of a model are coroutines on one thread, so all of them see this.
    static FAULT: Cell<Fault> = const { Cell::new(Fault::None) };
}

mod sync {
    //! The names that the circuit needs, made of loom's types.

    use std::{cell::Cell, sync::atomic::Ordering};

    pub(super) use loom::sync::{Mutex, MutexGuard};

    use super::{FAULT, Fault};

    /// Loom takes `SeqCst` for acquire and release, except in read-modify-writes, which see the last value. So loads
    /// and stores are read-modify-writes here; then all accesses are in one order, as with `SeqCst` on all of them.
    #[derive(Debug)]
    pub(super) struct AtomicU64(loom::sync::atomic::AtomicU64);

    impl AtomicU64 {
        pub(super) fn new(value: u64) -> Self {
            Self(loom::sync::atomic::AtomicU64::new(value))
        }

        pub(super) fn load(&self, order: Ordering) -> u64 {
            let is_weak = order != Ordering::SeqCst || FAULT.get() == Fault::WeakLoad;
            if is_weak { self.0.load(order) } else { self.0.fetch_add(0, order) }
        }

        pub(super) fn store(&self, value: u64, order: Ordering) {
            if order == Ordering::SeqCst {
                self.0.swap(value, order);
            } else {
                self.0.store(value, order);
            }
        }

        pub(super) fn fetch_add(&self, by: u64, order: Ordering) -> u64 {
            self.0.fetch_add(by, order)
        }

        pub(super) fn swap(&self, value: u64, order: Ordering) -> u64 {
            if FAULT.get() == Fault::SwapInTwoSteps {
                let before = self.0.fetch_add(0, order);
                self.0.store(value, order);
                return before;
            }
            self.0.swap(value, order)
        }

        pub(super) fn compare_exchange_weak(
            &self,
            current: u64,
            new: u64,
            success: Ordering,
            failure: Ordering,
        ) -> Result<u64, u64> {
            if FAULT.get() == Fault::ExchangeInTwoSteps {
                let before = self.0.fetch_add(0, success);
                if before != current {
                    return Err(before);
                }
                self.0.store(new, success);
                return Ok(before);
            }
            self.0.compare_exchange_weak(current, new, success, failure)
        }
    }

    loom::thread_local! {
        static INDEX: Cell<usize> = Cell::new(0);
    }

    /// Gives this thread its own stripe for counting.
    pub(super) fn set_thread_index(index: usize) {
        INDEX.with(|kept| kept.set(index));
    }

    pub(super) fn thread_index() -> usize {
        INDEX.with(Cell::get)
    }
}

const SECOND: Nanos = 1_000_000_000;

fn rules() -> Rules {
    Rules {
        span: Span::Time { bucket: SECOND },
        min_calls: 2,
        failure_rate: None,
        consecutive_failures: None,
        slow: None,
        late: 30 * SECOND,
        silence: Some(SECOND),
        probes: ProbeRules { most: 1, needed: 1, lease: SECOND, silence: SECOND / 2 },
        open_first: SECOND,
        open_max: SECOND,
        open_factor: 1.0,
        jitter: 0.0,
    }
}

fn circuit(rules: Rules) -> Arc<Circuit> {
    Arc::new(Circuit::new(rules, fastrand::Rng::with_seed(0)))
}

fn admit(circuit: &Circuit, now: Nanos) -> Option<Admission> {
    let closed = circuit.admit_closed(|| now);
    if closed.is_some() {
        return closed;
    }
    match circuit.admit(now) {
        Ok((admission, _)) => Some(admission),
        Err(Refused::Wait(_)) => None,
        Err(Refused::Reopened(_)) => panic!("no probe has hung"),
    }
}

/// Ends a call on another thread; returns whether that changed the state.
fn ending(circuit: &Arc<Circuit>, admission: Admission, ending: Ending, now: Nanos) -> JoinHandle<bool> {
    let circuit = Arc::clone(circuit);
    thread::spawn(move || finish(&circuit, admission, ending, now))
}

fn finish(circuit: &Circuit, admission: Admission, ending: Ending, now: Nanos) -> bool {
    circuit.finish(&admission, ending, Times::until(now, &admission)).is_some()
}

/// Runs `model` once for each interleaving with at most `preemptions` preemptions of a thread that could continue.
fn interleave(fault: Fault, preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    FAULT.set(fault);
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(move || {
        counted.fetch_add(1, Relaxed);
        model();
    });
    let runs = runs.load(Relaxed);
    assert!(runs > 10, "only {runs} interleavings: the model lets its threads do too little");
}

/// Three calls fail on three threads, where three failures in a row are too many.
fn failures_beside_each_other() {
    let circuit = circuit(Rules { consecutive_failures: Some(3), ..rules() });
    let [a, b, c] = [(); 3].map(|()| admit(&circuit, 0).unwrap());
    let others = [ending(&circuit, a, Ending::Failure, 1), ending(&circuit, b, Ending::Failure, 1)];
    let mut changes = u32::from(finish(&circuit, c, Ending::Failure, 1));
    changes += others.into_iter().map(|other| u32::from(other.join().unwrap())).sum::<u32>();
    let seen = circuit.snapshot(1);
    assert_eq!((seen.state, seen.trips, changes), (State::Open, 1, 1), "a failure was lost");
}

/// One call fails while another succeeds, where one of two is too many.
fn a_failure_beside_the_success_that_completes_the_minimum() {
    let circuit = circuit(Rules { failure_rate: Some(0.5), ..rules() });
    let [a, b] = [(); 2].map(|()| admit(&circuit, 0).unwrap());
    let other = ending(&circuit, a, Ending::Failure, 1);
    sync::set_thread_index(1);
    finish(&circuit, b, Ending::Success, 1);
    other.join().unwrap();
    assert_eq!(circuit.state(), State::Open, "nobody has seen both");
}

/// Two calls ask to be the only probe.
fn probes_beside_each_other() {
    let circuit = circuit(Rules { consecutive_failures: Some(1), ..rules() });
    finish(&circuit, admit(&circuit, 0).unwrap(), Ending::Failure, 0);
    let other = {
        let circuit = Arc::clone(&circuit);
        thread::spawn(move || admit(&circuit, SECOND).is_some())
    };
    let admitted = u32::from(admit(&circuit, SECOND).is_some()) + u32::from(other.join().unwrap());
    let seen = circuit.snapshot(SECOND);
    assert_eq!((admitted, seen.state, seen.probes), (1, State::HalfOpen, 1));
}

/// A probe succeeds, another call's result comes from before the trip, and an operator resets the circuit.
fn results_beside_a_reset() {
    let circuit = circuit(Rules { consecutive_failures: Some(1), ..rules() });
    let [stale, failing] = [(); 2].map(|()| admit(&circuit, 0).unwrap());
    finish(&circuit, failing, Ending::Failure, 0);
    let probe = admit(&circuit, SECOND).unwrap();
    let others = [ending(&circuit, stale, Ending::Failure, SECOND), ending(&circuit, probe, Ending::Success, SECOND)];
    circuit.reset();
    others.into_iter().for_each(|other| drop(other.join()));
    let seen = circuit.snapshot(SECOND);
    assert_eq!((seen.state, seen.probes, seen.trips), (State::Closed, 0, 1));
    assert_eq!(seen.counts, Counts::default(), "a result of an earlier generation counts");
}

/// An operator isolates the circuit while a call trips it and another succeeds.
fn results_beside_an_isolation() {
    let circuit = circuit(Rules { consecutive_failures: Some(1), ..rules() });
    let [a, b] = [(); 2].map(|()| admit(&circuit, 0).unwrap());
    let others = [ending(&circuit, a, Ending::Failure, 0), ending(&circuit, b, Ending::Success, 0)];
    circuit.isolate();
    others.into_iter().for_each(|other| drop(other.join()));
    assert_eq!(circuit.state(), State::Isolated, "a result has taken back an operator's word");
}

/// An answer is finished while a call is cut, after four that were cut before it.
fn a_cut_beside_an_answer() {
    let circuit = circuit(rules());
    let cut = |since: Nanos| {
        let admission = admit(&circuit, since).unwrap();
        finish(&circuit, admission, Ending::Cut, since + SECOND / 2);
    };
    (0..4).for_each(|_| cut(0));
    let [a, b] = [(); 2].map(|()| admit(&circuit, SECOND / 2).unwrap());
    let other = ending(&circuit, a, Ending::Success, 2 * SECOND);
    finish(&circuit, b, Ending::Cut, 2 * SECOND);
    other.join().unwrap();
    if circuit.state() == State::Closed {
        // The answer came first, or in between: the cuts before it are forgotten.
        (0..3).for_each(|_| cut(5 * SECOND));
        assert_eq!(circuit.state(), State::Closed, "a cut from before the answer is still counted");
    }
}

/// Two calls succeed in different buckets on different stripes, while a third fails in the later one.
fn successes_beside_the_slide_of_the_window() {
    let circuit = circuit(rules());
    let [a, b, c] = [(); 3].map(|()| admit(&circuit, 0).unwrap());
    let others = [ending(&circuit, a, Ending::Success, SECOND - 1), ending(&circuit, b, Ending::Failure, SECOND + 1)];
    sync::set_thread_index(1);
    finish(&circuit, c, Ending::Success, SECOND);
    others.into_iter().for_each(|other| drop(other.join()));
    let seen = circuit.snapshot(2 * SECOND);
    assert_eq!(seen.counts, Counts { calls: 3, failures: 1, slow: 0 }, "a result was lost or counted twice");
    assert_eq!(circuit.snapshot(12 * SECOND).counts, Counts::default());
}

#[test]
fn failures_at_once_are_all_counted_and_trip_it_once() {
    interleave(Fault::None, 2, failures_beside_each_other);
}

#[test]
fn a_minimum_completed_at_once_is_seen_by_one_of_both() {
    interleave(Fault::None, 3, a_failure_beside_the_success_that_completes_the_minimum);
}

#[test]
fn one_slot_is_given_to_one_probe() {
    interleave(Fault::None, 3, probes_beside_each_other);
}

#[test]
fn results_from_before_a_reset_change_nothing() {
    interleave(Fault::None, 2, results_beside_a_reset);
}

#[test]
fn an_isolation_stays_whatever_ends_beside_it() {
    interleave(Fault::None, 2, results_beside_an_isolation);
}

#[test]
fn an_answer_ends_a_silence_whatever_is_cut_beside_it() {
    interleave(Fault::None, 3, a_cut_beside_an_answer);
}

#[test]
fn no_result_is_lost_when_the_window_slides() {
    interleave(Fault::None, 2, successes_beside_the_slide_of_the_window);
}

#[test]
#[should_panic(expected = "a failure was lost")]
fn an_exchange_in_two_steps_is_caught() {
    interleave(Fault::ExchangeInTwoSteps, 2, failures_beside_each_other);
}

#[test]
#[should_panic(expected = "nobody has seen both")]
fn a_weaker_order_of_the_loads_is_caught() {
    interleave(Fault::WeakLoad, 3, a_failure_beside_the_success_that_completes_the_minimum);
}

#[test]
#[should_panic(expected = "a result was lost or counted twice")]
fn a_swap_in_two_steps_is_caught() {
    interleave(Fault::SwapInTwoSteps, 2, successes_beside_the_slide_of_the_window);
}
