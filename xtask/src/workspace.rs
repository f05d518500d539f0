//! What cargo knows about this workspace.
//!
//! Invariant: names of crates and features are read from `cargo metadata`, never listed a second time.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

/// The package that is never built with all its features: `peers` compiles every crate that ours are compared with.
pub(crate) const BENCHES: &str = "cancel-safe-benches";

/// The package that writes a page of the book; it explores foreign operations.
pub(crate) const OPERATIONS: &str = "cancel-safe-operations";

/// The package of programs that need more than the crates do, and of their tests.
pub(crate) const EXAMPLES: &str = "cancel-safe-examples";

/// The directory of the crate that only re-exports the others.
pub(crate) const UMBRELLA: &str = "cancel-safe";

#[derive(Deserialize)]
pub(crate) struct Workspace {
    pub(crate) packages: Vec<Package>,
    pub(crate) target_directory: PathBuf,
}

#[derive(Deserialize)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    manifest_path: PathBuf,
    pub(crate) features: BTreeMap<String, Vec<String>>,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// `None` for an ordinary one.
    kind: Option<String>,
    /// `*` if no version is required.
    req: String,
    /// The directory of a package of this workspace.
    path: Option<PathBuf>,
}

impl Workspace {
    pub(crate) fn load() -> Result<Self, String> {
        let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["metadata", "--no-deps", "--format-version", "1"])
            .current_dir(root())
            .output()
            .map_err(|error| format!("cargo metadata could not be started: {error}"))?;
        if !output.status.success() {
            return Err(format!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr)));
        }
        serde_json::from_slice(&output.stdout).map_err(|error| format!("cargo metadata is not what it was: {error}"))
    }

    /// The published crates: those under `crates/`.
    pub(crate) fn crates(&self) -> impl Iterator<Item = &Package> {
        self.packages.iter().filter(|package| package.directory().parent().is_some_and(|up| up.ends_with("crates")))
    }

    /// The crates that the umbrella re-exports: all except itself and the commands. cargo finds a command by its name,
    /// so its package is not named `cancel-safe-` plus its directory.
    pub(crate) fn libraries(&self) -> impl Iterator<Item = &Package> {
        self.crates().filter(|package| package.short_name() != UMBRELLA && !package.is_command())
    }

    /// The package in the directory `name`, or of that name.
    pub(crate) fn find(&self, name: &str) -> Result<&Package, String> {
        self.packages.iter().find(|package| package.name == name || package.short_name() == name).ok_or_else(|| {
            let known: Vec<_> = self.crates().map(Package::short_name).collect();
            format!("there is no crate `{name}`; there are {}", known.join(", "))
        })
    }
}

impl Package {
    pub(crate) fn directory(&self) -> &Path {
        self.manifest_path.parent().unwrap_or(&self.manifest_path)
    }

    /// The name of its directory, which is its usual short name.
    pub(crate) fn short_name(&self) -> &str {
        self.directory().file_name().and_then(|name| name.to_str()).unwrap_or(&self.name)
    }

    /// Whether it is a command of cargo, with no asynchronous operation of its own.
    pub(crate) fn is_command(&self) -> bool {
        self.name.starts_with("cargo-")
    }

    /// The unpublished packages of this workspace that its tests need: named only by their path.
    pub(crate) fn unpublished_dependencies(&self) -> Vec<&str> {
        let unpublished = |dependency: &&Dependency| dependency.path.is_some() && dependency.req == "*";
        let others = self.dependencies.iter().filter(unpublished).map(|dependency| dependency.name.as_str());
        others.filter(|name| *name != self.name).collect()
    }

    /// The packages of this workspace that must be published before it.
    pub(crate) fn published_siblings(&self) -> impl Iterator<Item = &str> {
        let published = |dependency: &&Dependency| dependency.path.is_some() && dependency.req != "*";
        let ordinary = |dependency: &&Dependency| dependency.kind.as_deref() != Some("dev");
        self.dependencies.iter().filter(published).filter(ordinary).map(|dependency| dependency.name.as_str())
    }

    /// Its features, without the collective `default`.
    pub(crate) fn single_features(&self) -> impl Iterator<Item = &str> {
        self.features.keys().map(String::as_str).filter(|&feature| feature != "default")
    }
}

/// The root of the workspace.
pub(crate) fn root() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crate_is_found_by_its_directory_and_by_its_package() {
        let workspace = Workspace::load().unwrap();
        assert_eq!(workspace.find("guard").unwrap().name, "cancel-safe-guard");
        assert_eq!(workspace.find("cancel-safe-guard").unwrap().short_name(), "guard");
        assert!(workspace.find("grard").err().unwrap().contains("there are"));
        assert!(
            workspace
                .crates()
                .all(|package| ![BENCHES, EXAMPLES, OPERATIONS, "xtask"].contains(&package.name.as_str()))
        );
        assert!(workspace.libraries().all(|package| package.name == format!("cancel-safe-{}", package.short_name())));
        assert!(workspace.find("cargo-cancel-safe").unwrap().is_command());
    }
}
