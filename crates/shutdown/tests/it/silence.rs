//! The output of a program without a callback: only that it stops, if all goes well, and everything else once.

use std::time::Instant;

use rustix::process::Signal;

use crate::signals::Program;

#[test]
fn an_error_is_told_without_a_callback() {
    let exit = Program::start("fails in silence").end(Instant::now());
    exit.assert(1, &["stopping: worker `stamp` failed\n", "worker `stamp` of `main`: failed: disk full"]);
    assert_eq!(exit.stderr.matches("disk full").count(), 1, "{}", exit.stderr);
}

#[test]
fn a_clean_stop_by_a_signal_says_one_line() {
    let exit = Program::ready("stops in silence").end_by(Signal::TERM);
    exit.assert(0, &[]);
    assert_eq!(exit.stderr, "READY\nstopping: SIGTERM; again to end at once\n");
}

#[test]
fn a_program_that_has_done_its_work_says_nothing() {
    let exit = Program::start("completes in silence").end(Instant::now());
    exit.assert(0, &[]);
    assert_eq!(exit.stderr, "");
}

#[test]
fn a_straggler_is_told_without_a_callback() {
    let exit = Program::ready("is deaf in silence").end_by(Signal::INT);
    exit.assert(70, &["stopping: SIGINT; again to end at once", "worker `deaf` of `main`: ab", "parked at an await"]);
}

#[test]
fn a_program_that_is_not_started_says_why() {
    Program::start("runs inside a runtime in silence").end(Instant::now()).assert(71, &["not started: an application"]);
}

#[test]
fn a_standard_error_that_nobody_reads_holds_nothing_up() {
    let exit = Program::ready("is deaf behind a full pipe").end_by(Signal::INT);
    exit.assert_by_deadline();
    assert_eq!(exit.code, Some(70));
}
