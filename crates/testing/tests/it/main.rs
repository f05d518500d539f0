//! The integration tests of `cancel-safe-testing`, one binary.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod crash;
mod explore;
mod field;
mod judged;
mod repeat;
mod reports;
mod suspended;
mod torn;
mod twins_files;
mod twins_state;

use cancel_safe_testing::Report;

/// Asserts that the exploration failed, and that it names the await at `line` of `file` for a failure that says
/// `message`; and that a site is named for every failure of an operation that had been polled and was dropped.
#[track_caller]
fn assert_caught(report: &Report, file: &str, line: u32, message: &str) {
    let at_line = report.failures().iter().find(|failure| {
        failure.site().is_some_and(|site| site.file() == file && site.line() == line)
            && failure.message().contains(message)
    });
    assert!(at_line.is_some(), "no failure {message:?} at {file}:{line}; {report}");
    let unnamed = report.failures().iter().find(|it| it.site().is_none() && it.point() > 0 && !it.is_completed());
    assert!(unnamed.is_none(), "a failure without a site: {unnamed:?}");
}

/// Runs one test of this binary in a separate process, because the environment of this one is shared.
fn run_again(test: &str, variables: &[(&str, &str)]) -> std::process::Output {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).envs(variables.iter().copied());
    command.output().unwrap()
}
