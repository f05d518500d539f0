//! Lines for a table that many tests fill: what was visited.
//!
//! Invariant: the test harness captures what a passing test prints, so the lines also go to a file, whole or not at
//! all.

use std::io::Write as _;

/// The environment variable that names the file.
pub(crate) const POINTS_FILE: &str = "CANCEL_SAFE_POINTS_FILE";

#[track_caller]
pub(crate) fn publish(line: &str) {
    #[expect(clippy::print_stdout, reason = "printing is what was asked for; print! is what test capture captures")]
    {
        print!("{line}");
    }
    if let Some(path) = std::env::var_os(POINTS_FILE) {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&path);
        // One write of a whole line, so that the lines of concurrent tests do not mix.
        let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
        assert!(written.is_ok(), "{} could not be appended to: {written:?}", path.display());
    }
}
