//! Phases with a worker that holds a thread of the runtime, in real processes: each phase is cut in time and the next
//! one is told to stop, whatever the runtime can still do.
//!
//! `CANCEL_SAFE_CAMPAIGN=full` runs each of them 24 times.

use cancel_safe_campaign::publish_campaign;
use rustix::process::Signal;

use crate::signals::{Exit, Program};

fn runs() -> usize {
    if std::env::var("CANCEL_SAFE_CAMPAIGN").is_ok_and(|form| form == "full") { 24 } else { 3 }
}

/// Stops a program with a worker that never yields in its last phase, and checks each of its ends.
fn campaign(name: &str, check: impl Fn(&Exit)) {
    for _ in 0..runs() {
        check(&Program::ready(name).end_by(Signal::TERM));
    }
    publish_campaign("shutdown", &format!("wedged-phases/{name}"), runs(), 0);
}

/// When the report says that the first phase was cut, the other one has already ended by itself.
fn cut_and_flushed(exit: &Exit) {
    exit.assert(
        70,
        &[
            "DB FLUSHED",
            "worker `db` of `storage`: completed",
            "worker `spin` of `ingress`: abandoned, blocked inside a poll",
        ],
    );
    // The total timeout is far away: the wait was for the timeout of the phase and the runtime's last half second.
    assert!(exit.stderr.contains("SPIN TOLD"), "{}", exit.stderr);
}

/// Nothing can run, and the report says so about the worker that was not to blame.
fn cut_and_starved(exit: &Exit) {
    exit.assert(
        70,
        &[
            "worker `db` of `storage`: abandoned, starved: the runtime ran nothing after it was told to stop",
            "worker `spin` of `ingress`: abandoned, blocked inside a poll",
        ],
    );
}

#[test]
fn a_phase_behind_a_wedged_one_flushes_on_two_threads() {
    campaign("wedges one of 2 threads", cut_and_flushed);
}

#[test]
fn a_phase_behind_a_wedged_one_flushes_on_four_threads() {
    campaign("wedges one of 4 threads", cut_and_flushed);
}

#[test]
fn a_phase_behind_a_wedged_one_is_reported_as_starved_on_one_thread() {
    campaign("wedges one of 1 threads", cut_and_starved);
}

#[test]
fn a_phase_behind_a_wedged_one_is_reported_as_starved_on_a_current_thread_runtime() {
    campaign("wedges the current thread", cut_and_starved);
}

#[test]
fn a_phase_that_never_started_is_in_the_report_of_a_wedged_start() {
    let exit = Program::ready("wedges its start").end_by(Signal::TERM);
    exit.assert(
        70,
        &["worker `spin` of `storage`: abandoned, blocked inside a poll", "worker `good` of `ingress`: cancelled"],
    );
}

#[test]
fn a_closure_behind_a_wedged_phase_is_told_on_a_current_thread_runtime() {
    let exit = Program::ready("wedges the current thread before a closure").end_by(Signal::TERM);
    exit.assert(70, &["CLOSURE FLUSHED", "task `journal` of `db`: completed"]);
}

#[test]
fn a_worker_behind_an_unnamed_task_that_spins_is_not_blamed() {
    for name in ["spins without a name on one thread", "spins without a name on many threads"] {
        let exit = Program::ready(name).end_by(Signal::TERM);
        exit.assert_by_deadline();
        exit.assert(70, &["threads that unnamed work held to the end: 1"]);
        assert!(!exit.stderr.contains("blocked inside a poll"), "{}", exit.stderr);
        assert!(!exit.stderr.contains("parked at an await"), "{}", exit.stderr);
    }
}

#[test]
fn an_unnamed_closure_that_outlives_the_deadline_is_counted_and_exits_70() {
    let exit = Program::ready("blocks without a name").end_by(Signal::TERM);
    exit.assert_by_deadline();
    exit.assert(70, &["worker `hasher` of `main`: completed", "threads that unnamed work held to the end: 1"]);
}

#[test]
fn an_unnamed_closure_that_ends_by_the_deadline_is_waited_for() {
    let exit = Program::ready("blocks without a name for a moment").end_by(Signal::TERM);
    exit.assert(0, &["WRITTEN"]);
    assert!(!exit.stderr.contains("held to the end"), "{}", exit.stderr);
}

#[test]
fn parked_unnamed_tasks_are_counted_and_change_nothing() {
    let exit = Program::ready("parks without a name").end_by(Signal::TERM);
    exit.assert(0, &["unnamed tasks that were alive: 3"]);
    assert!(!exit.stderr.contains("held to the end"), "{}", exit.stderr);
}
