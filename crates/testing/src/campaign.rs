//! Lines of a table that is made of many tests: what was visited, what was found, and what could not be run.
//!
//! Invariant: what a passing test prints is captured, so the lines also go to a file, whole or not at all.

use std::io::Write as _;

/// The environment variable that names the file.
pub(crate) const POINTS_FILE: &str = "CANCEL_SAFE_POINTS_FILE";

/// Publishes what a campaign of kills, faults or random cuts has visited, and how many violations it found there.
///
/// It prints the line `campaign <krate> <name> <points> <violations>`; if the environment variable
/// `CANCEL_SAFE_POINTS_FILE` is set, it also appends the line to that file. Lines of the same crate and name are to be
/// added up. A name is one word.
///
/// # Panics
///
/// If that file cannot be written: a table that lacks lines in silence would be worse.
#[track_caller]
pub fn publish_campaign(krate: &str, name: &str, points: usize, violations: usize) {
    publish(&format!("campaign {krate} {name} {points} {violations}\n"));
}

/// Publishes that a test could not do its work here, and why, by the line `not-run <krate> <what>: <why>`; see
/// [`publish_campaign`]. A test that returns and says nothing looks like one that has passed.
///
/// # Panics
///
/// If the file cannot be written.
#[track_caller]
pub fn publish_not_run(krate: &str, what: &str, why: &str) {
    publish(&format!("not-run {krate} {what}: {why}\n"));
}

#[track_caller]
pub(crate) fn publish(line: &str) {
    #[expect(clippy::print_stdout, reason = "printing is what was asked for; print! is what test capture captures")]
    {
        print!("{line}");
    }
    if let Some(path) = std::env::var_os(POINTS_FILE) {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&path);
        // One write of a whole line: lines of tests that run at the same time do not mix.
        let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
        assert!(written.is_ok(), "{} could not be appended to: {written:?}", path.display());
    }
}
