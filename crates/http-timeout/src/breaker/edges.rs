//! Cases that random schedules seldom hit: each rule of the circuit at its edge, one by one.
//!
//! Invariant: each of these tests fails if its rule is left out or is off by one.

use super::{
    circuit::{Admission, Circuit, Ending, Rules, SlowRule, Times},
    probes::ProbeRules,
    window::{Nanos, Span},
    word::State,
};

const MILLI: Nanos = 1_000_000;
const SECOND: Nanos = 1_000 * MILLI;
const LEASE: Nanos = 4 * SECOND;

fn rules() -> Rules {
    Rules {
        span: Span::Time { bucket: SECOND },
        min_calls: 8,
        failure_rate: None,
        consecutive_failures: Some(1),
        slow: None,
        late: 3 * SECOND,
        silence: Some(SECOND),
        probes: ProbeRules { most: 1, needed: 1, lease: LEASE, silence: 500 * MILLI },
        open_first: SECOND,
        open_max: 60 * SECOND,
        open_factor: 1.0,
        jitter: 0.0,
    }
}

fn circuit(rules: Rules) -> Circuit {
    Circuit::new(rules, fastrand::Rng::with_seed(1))
}

fn admit(circuit: &Circuit, now: Nanos) -> Admission {
    circuit.admit(now).expect("it admits a call").0
}

fn finish(circuit: &Circuit, admission: &Admission, ending: Ending, now: Nanos) {
    circuit.finish(admission, ending, Times::until(now, admission));
}

/// Opens at `now`.
fn open(circuit: &Circuit, now: Nanos) {
    finish(circuit, &admit(circuit, now), Ending::Failure, now);
    assert_eq!(circuit.state(), State::Open);
}

#[test]
fn a_head_renews_the_lease_to_its_very_end_and_then_costs_only_the_slot() {
    let circuit = circuit(rules());
    open(&circuit, 0);
    let probe = admit(&circuit, SECOND);
    let head = SECOND + LEASE - 1;
    circuit.head(&probe, head);
    let end = head + LEASE;
    assert!(circuit.notice(|| end).is_none(), "the answer has begun");
    assert!(circuit.admit(end - 1).is_err() && circuit.snapshot(end - 1).probes == 1);
    let next = admit(&circuit, end);
    assert_eq!((circuit.state(), circuit.snapshot(end).probes), (State::HalfOpen, 1));
    finish(&circuit, &next, Ending::Ignored, end);
    circuit.finish(&probe, Ending::Success, Times::with_head(end + 1, &probe, head, 0));
    assert_eq!(circuit.state(), State::Closed);
}

#[test]
fn a_head_of_an_earlier_generation_renews_no_lease() {
    let circuit = circuit(rules());
    open(&circuit, 0);
    let stale = admit(&circuit, SECOND);
    circuit.reset();
    open(&circuit, 2 * SECOND);
    admit(&circuit, 3 * SECOND);
    circuit.head(&stale, 4 * SECOND);
    assert!(circuit.notice(|| 3 * SECOND + LEASE).is_some(), "the probe has hung");
}

#[test]
fn a_probe_that_comes_back_after_its_lease_has_failed_though_nobody_looked() {
    let circuit = circuit(rules());
    open(&circuit, 0);
    let probe = admit(&circuit, SECOND);
    finish(&circuit, &probe, Ending::Success, SECOND + LEASE);
    assert_eq!(circuit.state(), State::Open);
}

#[test]
fn a_probe_cut_late_is_one_failure_and_no_silence() {
    let probes = ProbeRules { most: 3, needed: 2, lease: 10 * SECOND, silence: 10 * SECOND };
    let circuit = circuit(Rules { probes, ..rules() });
    open(&circuit, 0);
    for (begin, state) in [(SECOND, State::HalfOpen), (5 * SECOND, State::Open)] {
        let probe = admit(&circuit, begin);
        finish(&circuit, &probe, Ending::Cut, begin + 3 * SECOND);
        assert_eq!(circuit.state(), state);
    }
}

#[test]
fn a_probe_that_is_slow_has_failed_whatever_its_answer() {
    for (took, state) in [(2 * SECOND - 1, State::Closed), (2 * SECOND, State::Open)] {
        let circuit = circuit(Rules { slow: Some(SlowRule { threshold: 2 * SECOND, rate: 1.0 }), ..rules() });
        open(&circuit, 0);
        let probe = admit(&circuit, SECOND);
        finish(&circuit, &probe, Ending::Success, SECOND + took);
        assert_eq!(circuit.state(), state);
    }
}

#[test]
fn a_probe_tells_how_long_answers_take() {
    let circuit = circuit(rules());
    open(&circuit, 0);
    let probe = admit(&circuit, SECOND);
    finish(&circuit, &probe, Ending::Success, 2 * SECOND);
    for n in 0..20 {
        let call = admit(&circuit, 3 * SECOND + n * SECOND);
        finish(&circuit, &call, Ending::Cut, 3 * SECOND + n * SECOND + 900 * MILLI);
    }
    assert_eq!(circuit.state(), State::Closed, "each was cut before its usual answer");
}

#[test]
fn a_success_goes_without_the_clock_only_where_all_are_quick() {
    let odd = 2 * SECOND + 1;
    let answered = |took: Nanos, rules: Rules| {
        let circuit = circuit(rules);
        let call = admit(&circuit, 2 * SECOND - took);
        finish(&circuit, &call, Ending::Success, 2 * SECOND);
        circuit
    };
    let quick = answered(0, rules());
    assert!(quick.is_quick(&admit(&quick, odd)));
    assert!(!quick.is_quick(&admit(&quick, 2 * SECOND + 16)), "one in sixteen is timed");
    assert!(!quick.is_quick(&admit(&quick, odd + MILLI)), "nobody was there lately");
    let slower = answered(MILLI, rules());
    assert!(!slower.is_quick(&admit(&slower, odd)), "answers take their time");
    let ruled = answered(0, Rules { slow: Some(SlowRule { threshold: SECOND, rate: 1.0 }), ..rules() });
    assert!(!ruled.is_quick(&admit(&ruled, odd)), "somebody asks how long it took");
}

#[test]
fn an_isolated_circuit_names_its_longest_wait_and_reset_reports_only_a_change() {
    let circuit = circuit(rules());
    assert!(circuit.isolate().is_some() && circuit.isolate().is_none());
    assert_eq!(circuit.refusal(|| 0).map(|wait| wait.as_secs()), Some(60));
    assert!(circuit.reset().is_some() && circuit.reset().is_none());
}

#[test]
fn an_open_circuit_is_worth_keeping_until_its_longest_wait_after_it_was_due() {
    let circuit = circuit(rules());
    assert!(!circuit.is_worth_keeping(|| 0));
    open(&circuit, 0);
    let end = SECOND + 60 * SECOND;
    assert!(circuit.is_worth_keeping(|| end - 1) && !circuit.is_worth_keeping(|| end));
}
