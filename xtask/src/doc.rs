//! The documentation: rustdoc of every published crate, and the book.
//!
//! Invariant: a warning of rustdoc or of mdbook is an error, here and in `cargo xtask ci`.

use std::process::{Command, Stdio};

use crate::command::{Failure, cargo};
use crate::workspace::{self, BENCHES, EXAMPLES, OPERATIONS};

/// What is said where there is no mdbook.
pub(crate) const NO_MDBOOK: &str = "the book: mdbook is missing (cargo xtask doc --install)";

/// Builds both. mdbook is installed first if `install` says so.
pub(crate) fn run(install: bool) -> Result<(), Failure> {
    if install && !has_mdbook() {
        cargo(["install", "mdbook", "--locked"]).run()?;
    }
    rustdoc()?;
    if !book()? {
        println!("not run: {NO_MDBOOK}");
    }
    Ok(())
}

/// Documents the crates; the flags reach only rustdoc, so nothing is compiled again.
pub(crate) fn rustdoc() -> Result<(), Failure> {
    let unpublished = [BENCHES, EXAMPLES, OPERATIONS, "xtask"].into_iter().flat_map(|package| ["--exclude", package]);
    cargo(["doc", "--workspace", "--all-features", "--no-deps"])
        .args(unpublished)
        .env("RUSTDOCFLAGS", "-D warnings")
        .run()
}

/// Builds the book, and says whether there is an mdbook to do it.
pub(crate) fn book() -> Result<bool, Failure> {
    if !has_mdbook() {
        return Ok(false);
    }
    let again = "mdbook build docs";
    let built = Command::new("mdbook").args(["build", "docs"]).current_dir(workspace::root()).output();
    let built = built.map_err(|error| format!("mdbook could not be started: {error}"))?;
    let said = String::from_utf8_lossy(&built.stderr);
    print!("{}{said}", String::from_utf8_lossy(&built.stdout));
    // It goes on without a page that it cannot include, and only says so.
    if built.status.success() && !is_complaint(&said) {
        return Ok(true);
    }
    Err(Failure::from("the book does not build without a warning".to_owned()).repeat_with(again))
}

fn has_mdbook() -> bool {
    let asked = Command::new("mdbook").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    asked.is_ok_and(|status| status.success())
}

/// Whether mdbook has said that something is wrong: the level is a word of its own, or stands in brackets.
fn is_complaint(said: &str) -> bool {
    said.split_whitespace().any(|word| ["WARN", "ERROR"].contains(&word.trim_matches(['[', ']'])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_of_mdbook_is_a_complaint() {
        assert!(is_complaint(" WARN Potential incomplete link"));
        assert!(is_complaint("2026-01-01 12:00:00 [ERROR] (mdbook::preprocess::links): Error updating"));
        assert!(!is_complaint(" INFO Book building has started\n INFO Running the html backend"));
    }
}
