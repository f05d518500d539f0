//! Which awaits were ever dropped, for `cargo cancel-safe test`.
//!
//! Invariant: each exploration adds whole lines, and a file that cannot be written is reported, because a table that
//! silently lacks lines would be worse than none.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write as _;

use crate::site::Place;

/// The environment variable that names the file to append to.
pub(crate) const COVERAGE: &str = "CANCEL_SAFE_COVERAGE";

/// Appends the lines `await<TAB>path<TAB>line<TAB>column`, if the variable is set.
pub(crate) fn append(places: &BTreeSet<Place>) {
    let Some(path) = std::env::var_os(COVERAGE) else { return };
    let mut lines = String::new();
    for Place { path, line, column } in places {
        // Writing to a String cannot fail.
        let _ = writeln!(lines, "await\t{path}\t{line}\t{column}");
    }
    let file = OpenOptions::new().create(true).append(true).open(&path);
    // One write of all lines, so that the lines of concurrent tests do not mix.
    let written = file.and_then(|mut file| file.write_all(lines.as_bytes()));
    assert!(written.is_ok(), "{} could not be appended to: {written:?}", path.display());
}
