//! What cargo knows of a workspace, and which of its packages a command line chooses.
//!
//! Invariant: a package is chosen here if and only if `cargo test` with the same arguments tests it.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use crate::error::Error;
use crate::package::{self, File};

/// A workspace.
#[derive(Debug, Deserialize)]
pub struct Workspace {
    packages: Vec<Package>,
    workspace_root: PathBuf,
    target_directory: PathBuf,
    /// The packages that cargo takes when none is named. They depend on the current directory.
    workspace_default_members: Vec<String>,
}

/// A package of the workspace.
#[derive(Debug, Deserialize)]
pub struct Package {
    id: String,
    name: String,
    version: String,
    targets: Vec<Target>,
}

#[derive(Debug, Deserialize)]
struct Target {
    kind: Vec<String>,
    src_path: PathBuf,
}

/// Which packages are chosen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Selection {
    /// `--package`: names, with a version or `*` and `?`, or identifiers as `cargo pkgid` prints them.
    pub packages: Vec<String>,
    /// `--workspace`
    pub workspace: bool,
    /// `--exclude`
    pub exclude: Vec<String>,
    /// The arguments that `cargo metadata` needs to see the same workspace: `--manifest-path` and the like.
    pub metadata: Vec<OsString>,
}

/// The options of cargo that choose its workspace, each with whether it takes a value.
const FOR_METADATA: [(&str, bool); 5] =
    [("--manifest-path", true), ("--config", true), ("--offline", false), ("--locked", false), ("--frozen", false)];

impl Selection {
    /// Reads what the arguments of `cargo test` choose, up to `--`.
    #[must_use]
    pub fn of_arguments(arguments: &[OsString]) -> Self {
        let mut selection = Self::default();
        let mut rest = arguments.iter().take_while(|argument| *argument != "--");
        while let Some(argument) = rest.next() {
            // Names of packages and options are text; anything else is the value of some other option.
            let Some(text) = argument.to_str() else { continue };
            let (option, joined) = split(text);
            let mut value = || joined.map(OsString::from).or_else(|| rest.next().cloned());
            match option {
                "-p" | "--package" => selection.packages.extend(value().as_deref().map(lossy)),
                "--exclude" => selection.exclude.extend(value().as_deref().map(lossy)),
                "--workspace" | "--all" => selection.workspace = true,
                _ => {
                    if let Some((_, takes_value)) = FOR_METADATA.iter().find(|(name, _)| *name == option) {
                        selection.metadata.push(option.into());
                        selection.metadata.extend(takes_value.then(value).flatten());
                    }
                }
            }
        }
        selection
    }
}

/// `--package=x` and `-px` as the option and its value.
fn split(text: &str) -> (&str, Option<&str>) {
    if let Some(value) = text.strip_prefix("-p").filter(|value| !value.is_empty()) {
        return ("-p", Some(value.strip_prefix('=').unwrap_or(value)));
    }
    match text.split_once('=') {
        Some((option, value)) if option.starts_with("--") => (option, Some(value)),
        _ => (text, None),
    }
}

fn lossy(text: &OsStr) -> String {
    text.to_string_lossy().into_owned()
}

/// The cargo that started this program, so that `cargo +nightly` stays on nightly.
#[must_use]
pub fn cargo() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

impl Workspace {
    /// Asks cargo in the current directory.
    ///
    /// # Errors
    /// When cargo cannot be run or finds no workspace.
    pub fn load(selection: &Selection) -> Result<Self, Error> {
        let mut command = Command::new(cargo());
        command.args(["metadata", "--no-deps", "--format-version", "1"]).args(&selection.metadata);
        let output = command
            .output()
            .map_err(|source| Error::Command { command: format!("{} metadata", lossy(&cargo())), source })?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            return Err(Error::Metadata { stderr: stderr.trim().trim_start_matches("error: ").to_owned() });
        }
        serde_json::from_slice(&output.stdout).map_err(|error| Error::Metadata { stderr: error.to_string() })
    }

    /// The directory of the workspace.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.workspace_root
    }

    /// The directory that cargo builds in.
    #[must_use]
    pub fn target_directory(&self) -> &Path {
        &self.target_directory
    }

    /// The chosen packages, as cargo chooses them.
    ///
    /// # Errors
    /// When no package has a requested name.
    pub fn choose(&self, selection: &Selection) -> Result<Vec<&Package>, Error> {
        if let Some(spec) = selection.packages.iter().find(|spec| !self.packages.iter().any(|it| it.is(spec))) {
            let known: Vec<&str> = self.packages.iter().map(Package::name).collect();
            return Err(Error::NoPackage { spec: spec.clone(), known: known.join(", ") });
        }
        let chosen = |package: &&Package| {
            let excluded = selection.exclude.iter().any(|spec| package.is(spec));
            let named = selection.packages.iter().any(|spec| package.is(spec));
            match (selection.workspace, selection.packages.is_empty()) {
                (true, _) => !excluded,
                (false, false) => named,
                (false, true) => self.workspace_default_members.contains(&package.id),
            }
        };
        Ok(self.packages.iter().filter(chosen).collect())
    }
}

impl Package {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads its library and its binaries, without tests, examples, benches and the build script.
    ///
    /// # Errors
    /// When a source file is missing or cannot be parsed.
    pub fn scan(&self) -> Result<Vec<File>, Error> {
        let is_other = |kind: &String| ["test", "bench", "example", "custom-build"].contains(&kind.as_str());
        let own = self.targets.iter().filter(|target| !target.kind.iter().any(is_other));
        let roots: Vec<PathBuf> = own.map(|target| target.src_path.clone()).collect();
        package::scan(&roots)
    }

    /// Whether a package specification means this package.
    fn is(&self, spec: &str) -> bool {
        if spec.contains("://") {
            return self.id == spec || self.id.strip_prefix(spec).is_some_and(|rest| rest.starts_with(['#', '@']));
        }
        let (name, version) = match spec.split_once(['@', ':']) {
            Some((name, version)) => (name, Some(version)),
            None => (spec, None),
        };
        let version_is = |version: &str| {
            self.version.strip_prefix(version).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        matches_pattern(name.as_bytes(), self.name.as_bytes()) && version.is_none_or(version_is)
    }
}

/// Whether a name matches a pattern of a shell, with `*` and `?`.
fn matches_pattern(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern, name) {
        ([], []) => true,
        ([b'*', rest @ ..], _) => (0..=name.len()).any(|skipped| matches_pattern(rest, &name[skipped..])),
        ([b'?', pattern @ ..], [_, name @ ..]) => matches_pattern(pattern, name),
        ([a, pattern @ ..], [b, name @ ..]) => a == b && matches_pattern(pattern, name),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(arguments: &[&str]) -> Selection {
        Selection::of_arguments(&arguments.iter().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn the_packages_are_read_from_the_arguments_of_cargo_in_every_spelling() {
        let read = selection(&["-p", "a", "-pb", "--package=c", "--release", "--exclude", "d", "--", "-p", "e"]);
        assert_eq!(read.packages, ["a", "b", "c"]);
        assert_eq!(read.exclude, ["d"]);
        assert!(!read.workspace);
        let read = selection(&["--workspace", "--manifest-path=x/Cargo.toml", "--offline", "--features", "f"]);
        assert!(read.workspace);
        assert_eq!(read.metadata, ["--manifest-path", "x/Cargo.toml", "--offline"]);
    }

    #[test]
    fn a_package_is_meant_by_its_name_version_pattern_or_identifier() {
        let package = Package {
            id: "path+file:///w/a-b#1.2.3".to_owned(),
            name: "a-b".to_owned(),
            version: "1.2.3".to_owned(),
            targets: Vec::new(),
        };
        for spec in ["a-b", "a-b@1.2.3", "a-b@1.2", "a-b:1", "a*", "?-b", "*", "path+file:///w/a-b#1.2.3"] {
            assert!(package.is(spec), "{spec}");
        }
        for spec in ["a", "a-b@1.3", "a-b@1.2.30", "b*", "??", "path+file:///w/a"] {
            assert!(!package.is(spec), "{spec}");
        }
    }
}
