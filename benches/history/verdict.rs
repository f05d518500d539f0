//! Says in one line what an exploration found: `cargo xtask history` reads it.

use cancel_safe_testing::Report;

/// Prints the simplest failure with its line, or that there is none.
pub fn tell(report: &Report) {
    let Some(failure) = report.failures().first() else { return println!("silent: {report}") };
    let place = failure.site().map_or_else(|| "no await".to_owned(), ToString::to_string);
    println!("found at {place}: {}", failure.message());
    println!("{report}");
}
