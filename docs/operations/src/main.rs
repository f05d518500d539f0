//! Judges widely used operations, and writes the page of the book with the results.
//!
//! Invariant: a page is written only if every operation was judged, and every difference from its documentation
//! explained.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line speaks through its output")]
#![expect(clippy::unwrap_used, reason = "an operation that fails is not judged, and then the page is not written")]
#![expect(clippy::disallowed_methods, reason = "the operations that are not cancel safe are what this is about")]
#![expect(clippy::disallowed_macros, reason = "and so is the macro")]

mod fixtures;
mod page;
mod patterns;
mod row;
mod rows;

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use crate::page::{Judged, Versions};

fn main() -> ExitCode {
    let argument = std::env::args().nth(1);
    let result = match argument.as_deref() {
        None => generate(),
        Some("--patterns") => write_patterns(),
        Some("--check-patterns") => check_patterns(),
        Some(part) => {
            tell(part);
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            eprintln!("{what}");
            ExitCode::FAILURE
        }
    }
}

fn versions() -> Result<Versions, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let lockfile = std::fs::read_to_string(root.join("Cargo.lock")).map_err(|error| format!("Cargo.lock: {error}"))?;
    Versions::read(&lockfile)
}

/// Explores everything, and writes the page.
fn generate() -> Result<(), String> {
    let (versions, started) = (versions()?, Instant::now());
    let (mut groups, mut refused) = (Vec::new(), Vec::new());
    for group in rows::all() {
        let mut judged = Vec::new();
        for row in group.rows {
            let (title, started) = (row.title(), Instant::now());
            let report = (row.judge)();
            println!("{:>6} ms  {title}", started.elapsed().as_millis());
            match Judged::new(row, &report) {
                Ok(row) => judged.push(row),
                Err(why) => refused.push(why),
            }
        }
        groups.push((group.title, judged));
    }
    if !refused.is_empty() {
        return Err(format!("The page was not written.\n\n{}", refused.join("\n\n")));
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../src/operations.md");
    std::fs::write(path, page::page(&versions, &groups)).map_err(|error| format!("the page: {error}"))?;
    println!("docs/src/operations.md was written after {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

const PATTERNS: &str = "../src/breaking.md";

/// Explores the patterns, and writes their page.
fn write_patterns() -> Result<(), String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(PATTERNS);
    std::fs::write(path, patterns::page()?).map_err(|error| format!("the page: {error}"))?;
    println!("docs/src/breaking.md was written");
    Ok(())
}

/// Explores the patterns, and compares the reports with their page.
fn check_patterns() -> Result<(), String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(PATTERNS);
    let page = std::fs::read_to_string(path).map_err(|error| format!("the page: {error}"))?;
    let now = patterns::page()?;
    if page == now {
        println!("docs/src/breaking.md tells what is reported now");
        return Ok(());
    }
    let differs = page.lines().zip(now.lines()).find(|(there, now)| there != now);
    let (there, now) = differs.unwrap_or(("(the end)", "(the end)"));
    Err(format!("docs/src/breaking.md: {there:?} is now {now:?}: let `cargo xtask patterns` write it anew"))
}

/// Explores the operations whose names contain this part, and prints everything.
fn tell(part: &str) {
    for row in rows::all().into_iter().flat_map(|group| group.rows).filter(|row| row.title().contains(part)) {
        let report = (row.judge)();
        println!("{}: {}\n{report}\n", row.title(), report.verdict());
    }
}
