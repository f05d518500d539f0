//! The release of one crate: everything that can be checked before the tag, and the tag.
//!
//! Invariant: nothing here publishes. The tag is made only by `--execute`, and leaves this machine only when a person
//! pushes it.

use std::process::{Command, Stdio};

use crate::command::{Failure, cargo};
use crate::tidy;
use crate::workspace::{self, Package, Workspace};

/// Checks that the crate can be released as it is committed, and tags it if asked to.
pub(crate) fn run(workspace: &Workspace, name: &str, execute: bool) -> Result<(), Failure> {
    let package = workspace.find(name)?;
    if !workspace.crates().any(|krate| krate.name == package.name) {
        return Err(Failure::from(format!("`{name}` is not published")));
    }
    if !git(&["status", "--porcelain"])?.is_empty() {
        return Err(Failure::from("there are changes that are not committed".to_owned()).repeat_with("git status"));
    }
    let tag = format!("{}-v{}", package.short_name(), package.version);
    if !git(&["tag", "--list", &tag])?.is_empty() {
        return Err(Failure::from(format!("{tag} is released: give the crate another version")));
    }
    tidy::run(workspace)?;
    let changelog = package.directory().join("CHANGELOG.md");
    let text = std::fs::read_to_string(&changelog).map_err(|error| format!("{}: {error}", changelog.display()))?;
    if !tells_of(&text, &package.version) {
        return Err(Failure::from(format!("{} tells nothing of {}, or of more", changelog.display(), package.version)));
    }
    let order = in_order(workspace, package);
    println!("in this order, as far as crates.io does not have them: {}", order.join(", "));
    let mut pack = cargo(["package", "--all-features"]);
    for name in &order {
        pack = pack.args(["--package", name]);
    }
    pack.run()?;
    semver(package)?;
    if execute {
        git(&["tag", "--annotate", &tag, "--message", &format!("{} {}", package.name, package.version)])?;
        println!("tagged. It is published by: git push origin {tag}");
    } else {
        println!("{tag} can be released: cargo xtask release --execute {}", package.short_name());
    }
    Ok(())
}

/// Whether a changelog begins with this version, and has an entry for it.
fn tells_of(changelog: &str, version: &str) -> bool {
    let mut lines = changelog.lines().skip_while(|line| !line.starts_with("## "));
    let heading = lines.next().is_some_and(|line| line.contains(version));
    heading && lines.take_while(|line| !line.starts_with("## ")).any(|line| !line.trim().is_empty())
}

/// The crate and our crates that it depends on, each after its own dependencies.
fn in_order<'a>(workspace: &'a Workspace, package: &'a Package) -> Vec<&'a str> {
    fn visit<'a>(workspace: &'a Workspace, package: &'a Package, order: &mut Vec<&'a str>) {
        for dependency in package.published_siblings() {
            if let Some(sibling) = workspace.crates().find(|krate| krate.name == dependency) {
                visit(workspace, sibling, order);
            }
        }
        if !order.contains(&package.name.as_str()) {
            order.push(&package.name);
        }
    }
    let mut order = Vec::new();
    visit(workspace, package, &mut order);
    order
}

/// Compares the public interface with the last release, if the tool for that is installed.
fn semver(package: &Package) -> Result<(), Failure> {
    let asked = Command::new("cargo")
        .args(["semver-checks", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if asked {
        return cargo(["semver-checks", "--package", &package.name]).run();
    }
    println!("The interface was not compared with the last release: cargo install cargo-semver-checks --locked");
    Ok(())
}

fn git(arguments: &[&str]) -> Result<String, String> {
    let output = Command::new("git")
        .args(arguments)
        .current_dir(workspace::root())
        .output()
        .map_err(|error| format!("git could not be started: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    Err(format!("git {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crate_comes_behind_those_it_needs() {
        let workspace = Workspace::load().unwrap();
        let order = in_order(&workspace, workspace.find("cancel-safe").unwrap());
        let place = |name: &str| order.iter().position(|other| *other == name).unwrap();
        assert_eq!(order.last(), Some(&"cancel-safe"));
        assert!(place("cancel-safe-guard") < place("cancel-safe-tx-guard"), "{order:?}");
        assert!(place("cancel-safe-atomic-fs") < place("cancel-safe-resumable"), "{order:?}");
    }

    #[test]
    fn a_changelog_must_begin_with_the_version_and_what_it_changed() {
        assert!(tells_of("# Changelog\n\n## 0.2.0\n\n- A change.\n\n## 0.1.0\n", "0.2.0"));
        assert!(!tells_of("# Changelog\n\n## 0.2.0\n\n## 0.1.0\n\n- A change.\n", "0.2.0"));
        assert!(!tells_of("# Changelog\n\n## Unreleased\n\n- More.\n\n## 0.2.0\n\n- A change.\n", "0.2.0"));
        assert!(!tells_of("", "0.2.0"));
    }

    #[test]
    fn what_is_not_published_is_refused() {
        let workspace = Workspace::load().unwrap();
        assert!(run(&workspace, "xtask", false).unwrap_err().what.contains("not published"));
        assert!(run(&workspace, "grard", false).unwrap_err().what.contains("there is no crate"));
    }
}
