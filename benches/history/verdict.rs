//! Says in one line what an exploration found: `cargo xtask history` reads it.

use cancel_safe_testing::Report;

/// Prints the simplest failure with its line, or that there is none.
pub fn tell(report: &Report) {
    let Some(failure) = report.failures().first() else { return println!("silent: {report}") };
    let message = failure.message().lines().next().unwrap_or_default();
    match failure.site() {
        Some(site) => println!("found at {site}: {message}"),
        None => println!("found before the first poll: {message}"),
    }
    println!("{report}");
}
