//! The explored pages of the book: which foreign operations are cancel safe, and what the patterns report.
//!
//! Invariant: the page has the defined operations and the locked versions. Each `cargo xtask tidy` checks this without
//! building or exploring anything; only `cargo xtask operations` checks whether the page is still true.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::command::{Failure, cargo};
use crate::workspace::{self, OPERATIONS, Workspace};

/// Where the page is, from the root.
pub(crate) const PAGE: &str = "docs/src/operations.md";

/// The beginning of the line of versions, such as `tokio 1.2.3, tokio-util 0.1.2.`
const VERSIONS: &str = "Measured with ";

/// Writes the page again, or explores a part of it.
pub(crate) fn run(part: Option<String>) -> Result<(), Failure> {
    cargo(["run", "--package", OPERATIONS, "--"]).args(part).run()
}

/// Writes the page of patterns again.
pub(crate) fn patterns() -> Result<(), Failure> {
    cargo(["run", "--package", OPERATIONS, "--", "--patterns"]).run()
}

/// Compares the page of patterns with the present reports, using the program that is built with the workspace.
pub(crate) fn check_patterns(workspace: &Workspace) -> Result<(), Failure> {
    let program = workspace.target_directory.join("debug").join(OPERATIONS);
    let status = Command::new(&program).arg("--check-patterns").status();
    let status = status.map_err(|error| format!("{}: {error}", program.display()))?;
    if status.success() {
        return Ok(());
    }
    Err(Failure::from(format!("{OPERATIONS} --check-patterns ({status})")))
}

/// What is wrong with the page.
pub(crate) fn check() -> Result<Option<String>, String> {
    let read = |path: &Path| fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()));
    let root = workspace::root();
    let mut sources = String::new();
    let rows = root.join("docs/operations/src/rows");
    let broken = |error: std::io::Error| format!("{}: {error}", rows.display());
    for entry in fs::read_dir(&rows).map_err(broken)? {
        sources.push_str(&read(&entry.map_err(broken)?.path())?);
    }
    let (page, lockfile) = (read(&root.join(PAGE))?, read(&root.join("Cargo.lock"))?);
    Ok(compare(&page, &lockfile, &sources).err())
}

fn compare(page: &str, lockfile: &str, sources: &str) -> Result<(), String> {
    let again = "let `cargo xtask operations` write it anew";
    let versions = page.lines().find_map(|line| line.strip_prefix(VERSIONS)?.strip_suffix('.'));
    let Some(versions) = versions else { return Err(format!("it names no versions: {again}")) };
    for package in versions.split(", ") {
        let (name, version) = package.split_once(' ').unwrap_or((package, ""));
        if !lockfile.contains(&format!("name = \"{name}\"\nversion = \"{version}\"\n")) {
            return Err(format!("{name} {version} is not the version in Cargo.lock: {again}"));
        }
    }
    let defined = sources.split("Row::").skip(1).filter_map(|after| {
        let (_constructor, arguments) = after.split_once('(')?;
        arguments.trim_start().strip_prefix('"')?.split('"').next()
    });
    let told = page.lines().filter_map(|line| line.strip_prefix("| [`")?.split('`').next());
    let mut balance: BTreeMap<&str, isize> = BTreeMap::new();
    defined.for_each(|name| *balance.entry(name).or_default() += 1);
    told.for_each(|name| *balance.entry(name).or_default() -= 1);
    match balance.iter().find(|(_, count)| **count != 0) {
        Some((name, count)) if *count > 0 => Err(format!("`{name}` is defined and is not there: {again}")),
        Some((name, _)) => Err(format!("`{name}` is there and is not defined: {again}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "Measured with a 1.2.3, a-b 0.1.0.\n\n| [`T::f`](u), twice | safe |\n| [`g`](u) | safe |\n";
    const LOCKFILE: &str = "name = \"a\"\nversion = \"1.2.3\"\nname = \"a-b\"\nversion = \"0.1.0\"\n";
    const SOURCES: &str = "Row::x(\n    \"T::f\", \"page\") vec![Row::y(\"g\", \"page\")]";

    #[test]
    fn a_page_that_is_not_of_this_workspace_is_found() {
        assert_eq!(compare(PAGE, LOCKFILE, SOURCES), Ok(()));
        let broken = |page: &str, lockfile: &str, sources: &str| compare(page, lockfile, sources).unwrap_err();
        assert!(broken("", LOCKFILE, SOURCES).contains("no versions"));
        assert!(broken(PAGE, &LOCKFILE.replace("0.1.0", "0.2.0"), SOURCES).contains("a-b 0.1.0"));
        assert!(broken(PAGE, LOCKFILE, "Row::x(\"T::f\")").contains("`g` is there"));
        assert!(broken(PAGE, LOCKFILE, &format!("{SOURCES} Row::x(\"g\")")).contains("`g` is defined"));
    }
}
