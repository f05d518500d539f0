//! The documentation: rustdoc of every published crate, and the book.
//!
//! Invariant: a warning of rustdoc is an error, here and in `cargo xtask ci`.

use std::process::{Command, Stdio};

use crate::command::{Failure, cargo};
use crate::workspace::{self, BENCHES, EXAMPLES, OPERATIONS};

pub(crate) fn run() -> Result<(), Failure> {
    rustdoc()?;
    book()
}

/// Documents the crates; the flags reach rustdoc alone, so nothing that is compiled already is compiled again.
pub(crate) fn rustdoc() -> Result<(), Failure> {
    let unpublished = [BENCHES, EXAMPLES, OPERATIONS, "xtask"].into_iter().flat_map(|package| ["--exclude", package]);
    cargo(["doc", "--workspace", "--all-features", "--no-deps"])
        .args(unpublished)
        .env("RUSTDOCFLAGS", "-D warnings")
        .run()
}

fn book() -> Result<(), Failure> {
    let installed = Command::new("mdbook").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !installed.is_ok_and(|status| status.success()) {
        println!("The book was not built, because mdbook is missing: cargo install mdbook --locked");
        return Ok(());
    }
    let built = Command::new("mdbook").args(["build", "docs"]).current_dir(workspace::root()).status();
    if built.is_ok_and(|status| status.success()) {
        return Ok(());
    }
    Err(Failure::from("the book does not build".to_owned()).repeat_with("mdbook build docs"))
}
