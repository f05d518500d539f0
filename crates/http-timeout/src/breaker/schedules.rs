//! Random schedules of the circuit against a model that is too simple to be wrong, and twins that are.

use std::collections::VecDeque;

use proptest::{
    prelude::*,
    test_runner::{TestCaseError, TestError, TestRunner},
};

use super::*;

const SECOND: Nanos = 1_000_000_000;

fn rules() -> Rules {
    Rules {
        span: Span::Time { bucket: SECOND },
        min_calls: 8,
        failure_rate: Some(0.5),
        consecutive_failures: Some(4),
        slow: Some(SlowRule { threshold: 3 * SECOND, rate: 0.75 }),
        probes: 2,
        lease: 5 * SECOND,
        open_first: 4 * SECOND,
        open_max: 20 * SECOND,
        open_factor: 2.0,
        jitter: 0.0,
    }
}

/// One step of a schedule.
#[derive(Clone, Debug)]
enum Step {
    Wait(Nanos),
    Admit,
    /// Ends one of the admissions that are out, chosen by this number.
    Finish(usize, Ending),
    Isolate,
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let ending = prop_oneof![
        2 => Just(Ending::Success),
        4 => Just(Ending::Failure),
        1 => Just(Ending::Ignored),
        2 => Just(Ending::Cancelled),
    ];
    let step = prop_oneof![
        3 => (0..3 * SECOND).prop_map(Step::Wait),
        8 => Just(Step::Admit),
        8 => (any::<usize>(), ending).prop_map(|(which, ending)| Step::Finish(which, ending)),
        1 => prop_oneof![4 => Just(Step::Reset), 1 => Just(Step::Isolate)],
    ];
    prop::collection::vec(step, 1..120)
}

/// The model: plain values, a list of results, no words, no bits.
struct Model {
    rules: Rules,
    state: State,
    generation: u64,
    until: Nanos,
    openings: i32,
    probing: u32,
    successes: u32,
    consecutive: u32,
    results: VecDeque<(Nanos, Tally)>,
}

impl Model {
    fn new() -> Self {
        Self {
            rules: rules(),
            state: State::Closed,
            generation: 0,
            until: 0,
            openings: 0,
            probing: 0,
            successes: 0,
            consecutive: 0,
            results: VecDeque::new(),
        }
    }

    fn enter(&mut self, state: State) {
        self.state = state;
        self.generation += 1;
        (self.probing, self.successes, self.consecutive) = (0, 0, 0);
        self.results.clear();
    }

    fn open(&mut self, now: Nanos) {
        self.enter(State::Open);
        self.until = now + (4 * SECOND * 2_u64.pow(self.openings as u32)).min(20 * SECOND);
        self.openings = (self.openings + 1).min(10);
    }

    fn close(&mut self) {
        self.enter(State::Closed);
        self.openings = 0;
    }

    fn admit(&mut self, now: Nanos) -> Option<(u64, Nanos)> {
        match self.state {
            State::Closed => {}
            State::Isolated => return None,
            State::HalfOpen if self.probing + self.successes < self.rules.probes => {
                if self.probing == 0 {
                    self.until = now + self.rules.lease;
                }
                self.probing += 1;
            }
            State::Open | State::HalfOpen if now < self.until => return None,
            State::Open | State::HalfOpen => {
                self.enter(State::HalfOpen);
                self.probing = 1;
                self.until = now + self.rules.lease;
            }
        }
        Some((self.generation, now))
    }

    fn finish(&mut self, (generation, since): (u64, Nanos), ending: Ending, now: Nanos) {
        if generation != self.generation || ending == Ending::Ignored && self.state == State::Closed {
            return;
        }
        let slow = now - since >= 3 * SECOND;
        if self.state == State::HalfOpen {
            return match ending {
                Ending::Success if !slow => {
                    (self.probing, self.successes) = (self.probing - 1, self.successes + 1);
                    if self.successes == self.rules.probes {
                        self.close();
                    }
                }
                Ending::Ignored => self.probing -= 1,
                Ending::Cancelled if !slow => self.probing -= 1,
                _ => self.open(now),
            };
        }
        self.results.retain(|(at, _)| at / SECOND + 10 > now / SECOND);
        let conclusive = ending != Ending::Cancelled || slow;
        if !conclusive && self.results.iter().any(|(_, tally)| tally.conclusive) {
            return;
        }
        let failure = ending != Ending::Success;
        self.results.push_back((now, Tally { failure, slow, conclusive }));
        self.consecutive = if failure { self.consecutive + 1 } else { 0 };
        let count = |which: fn(&Tally) -> bool| self.results.iter().filter(|(_, tally)| which(tally)).count();
        let full = self.results.len() >= 8;
        let too_many =
            full && (count(|t| t.failure) * 2 >= self.results.len() || count(|t| t.slow) * 4 >= self.results.len() * 3);
        if (failure || slow) && (self.consecutive >= 4 || too_many) {
            self.open(now);
        }
    }
}

/// How the twins of the circuit are broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    None,
    /// A result counts in whatever generation it arrives.
    NoGenerations,
    /// A cancelled call never reports, as if nobody had written its `drop`.
    LeakyCancel,
    /// An ignored result is taken for a success.
    IgnoredIsSuccess,
}

fn agrees_with_the_model(schedule: &[Step], flaw: Flaw) -> Result<(), TestCaseError> {
    let (circuit, mut model) = (Circuit::new(rules(), fastrand::Rng::with_seed(1)), Model::new());
    let (mut now, mut out) = (0, Vec::new());
    for step in schedule {
        match *step {
            Step::Wait(time) => now += time,
            Step::Admit => {
                let admitted = circuit.admit(|| now).ok().map(|(admission, _)| admission);
                let expected = model.admit(now);
                prop_assert_eq!(admitted.is_some(), expected.is_some(), "admission at {}", now);
                out.extend(admitted.zip(expected));
            }
            Step::Finish(which, ending) if !out.is_empty() => {
                let (mut admission, expected) = out.swap_remove(which % out.len());
                let told =
                    if flaw == Flaw::IgnoredIsSuccess && ending == Ending::Ignored { Ending::Success } else { ending };
                if flaw == Flaw::NoGenerations {
                    admission.key = key(circuit.word.load(Ordering::Acquire));
                }
                if flaw != Flaw::LeakyCancel || ending != Ending::Cancelled {
                    circuit.finish(admission, told, || now);
                }
                model.finish(expected, ending, now);
            }
            Step::Finish(..) => {}
            Step::Isolate => {
                circuit.isolate();
                model.enter(State::Isolated);
            }
            Step::Reset => {
                circuit.reset();
                model.close();
            }
        }
        let seen = circuit.snapshot(now);
        prop_assert_eq!(seen.state, model.state, "at {} after {:?}", now, step);
        let counter = match model.state {
            State::Closed => model.consecutive,
            State::HalfOpen => model.probing,
            State::Open | State::Isolated => 0,
        };
        prop_assert_eq!(seen.counter, counter, "at {} after {:?}", now, step);
    }
    // Nobody may be left outside for good: after the longest wait a probe is let in, unless an operator says no.
    let later = now + 30 * SECOND;
    prop_assert!(model.state == State::Isolated || circuit.refusal(|| later).is_none(), "it is stuck");
    Ok(())
}

fn search(flaw: Flaw) -> Result<(), TestError<Vec<Step>>> {
    // Only a flaw that nobody put there is worth the search for its simplest schedule.
    let max_shrink_iters = if flaw == Flaw::None { 10_000 } else { 0 };
    let config =
        ProptestConfig { cases: 2_000, max_shrink_iters, failure_persistence: None, ..ProptestConfig::default() };
    TestRunner::new(config).run(&steps(), |schedule| agrees_with_the_model(&schedule, flaw))
}

#[test]
fn random_schedules_agree_with_the_model() {
    if let Err(error) = search(Flaw::None) {
        panic!("{error}");
    }
}

#[test]
fn twins_that_are_broken_are_caught_by_the_same_check() {
    for flaw in [Flaw::NoGenerations, Flaw::LeakyCancel, Flaw::IgnoredIsSuccess] {
        assert!(matches!(search(flaw), Err(TestError::Fail(..))), "{flaw:?} went unseen");
    }
}

#[test]
fn threads_that_drop_and_finish_at_random_leave_no_slot_taken() {
    let circuit = Circuit::new(Rules { open_first: 1, open_max: 1, ..rules() }, fastrand::Rng::with_seed(2));
    let clock = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (circuit, clock) = (&circuit, &clock);
            scope.spawn(move || {
                let mut rng = fastrand::Rng::with_seed(seed);
                let now = || clock.fetch_add(1, Ordering::Relaxed);
                for _ in 0..10_000 {
                    let endings = [Ending::Success, Ending::Failure, Ending::Ignored, Ending::Cancelled];
                    if let Ok((admission, _)) = circuit.admit(now) {
                        circuit.finish(admission, endings[rng.usize(..4)], now);
                    }
                }
            });
        }
    });
    let end = clock.load(Ordering::Relaxed);
    let seen = circuit.snapshot(end);
    assert!(seen.state != State::HalfOpen || seen.counter == 0, "{seen:?}");
    assert!(seen.trips > 100, "the schedule never tripped it: {seen:?}");
    assert!(circuit.refusal(|| end + SECOND).is_none());
}
