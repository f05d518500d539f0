//! Lines of the closing table of `cargo xtask`: what a campaign has visited and found, and what could not be run.
//!
//! Invariant: what a passing test prints is captured, so the lines also go to a file, whole or not at all.

use std::fs::OpenOptions;
use std::io::Write as _;

/// The environment variable that names the file.
const POINTS_FILE: &str = "CANCEL_SAFE_POINTS_FILE";

/// Publishes what a campaign of kills, faults or random cuts has visited, and how many violations it found there, by the
/// line `campaign <krate> <name> <points> <violations>`. Lines of the same crate and name are added up. A name is one
/// word.
///
/// # Panics
///
/// If the file cannot be written: a table that lacks lines in silence would be worse.
#[track_caller]
pub fn publish_campaign(krate: &str, name: &str, points: usize, violations: usize) {
    publish(&format!("campaign {krate} {name} {points} {violations}\n"));
}

/// Publishes that a test could not do its work here, and why, by the line `not-run <krate> <what>: <why>`. A test that
/// returns and says nothing looks like one that has passed.
///
/// # Panics
///
/// If the file cannot be written.
#[track_caller]
pub fn publish_not_run(krate: &str, what: &str, why: &str) {
    publish(&format!("not-run {krate} {what}: {why}\n"));
}

#[track_caller]
fn publish(line: &str) {
    #[expect(clippy::print_stdout, reason = "printing is what was asked for; print! is what test capture captures")]
    {
        print!("{line}");
    }
    if let Some(path) = std::env::var_os(POINTS_FILE) {
        append(path.as_ref(), line);
    }
}

#[track_caller]
fn append(path: &std::path::Path, line: &str) {
    let file = OpenOptions::new().create(true).append(true).open(path);
    // One write of a whole line: lines of tests that run at the same time do not mix.
    let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
    assert!(written.is_ok(), "{} could not be appended to: {written:?}", path.display());
}

#[cfg(test)]
mod tests {
    use super::append;

    #[test]
    fn lines_are_appended_whole_and_a_file_that_cannot_be_written_is_told() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("points");
        append(&file, "campaign bank kills 7 0\n");
        append(&file, "not-run bank full-disk: it needs root\n");
        let text = std::fs::read_to_string(file).expect("the file");
        assert_eq!(text, "campaign bank kills 7 0\nnot-run bank full-disk: it needs root\n");
        let nowhere = directory.path().join("no").join("points");
        assert!(std::panic::catch_unwind(|| append(&nowhere, "line\n")).is_err());
    }
}
