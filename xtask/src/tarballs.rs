//! What users get: each published crate as a tarball, packed without building it.
//!
//! Invariant: nothing in a tarball needs anything outside it. An included file is in the tarball, and no file uses a
//! package that is not published.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use crate::command::{Failure, cargo};
use crate::workspace::{self, Package, Workspace};

/// The files that each tarball must hold.
const REQUIRED: [&str; 5] = ["Cargo.toml", "README.md", "CHANGELOG.md", "LICENSE-APACHE", "LICENSE-MIT"];

/// The attributes and macros that include another file.
const INCLUDES: [&str; 4] = ["include_str!(\"", "include_bytes!(\"", "include!(\"", "path = \""];

/// A tarball and its size in bytes.
pub(crate) struct Tarball {
    pub(crate) name: String,
    pub(crate) size: u64,
}

/// Packs all crates, checks what is in the tarballs and returns their sizes.
pub(crate) fn check(workspace: &Workspace) -> Result<Vec<Tarball>, Failure> {
    let directory = workspace.target_directory.join("tarballs");
    let mut pack = cargo(["package", "--quiet", "--no-verify", "--allow-dirty", "--target-dir"]).arg(&directory);
    for package in workspace.crates() {
        pack = pack.args(["--package", &package.name]);
    }
    pack.run()?;
    let mut tarballs = Vec::new();
    let mut findings = Vec::new();
    for package in workspace.crates() {
        let found = faults(package.directory(), &list(package)?, &package.unpublished_dependencies())?;
        findings.extend(found.into_iter().map(|fault| format!("{}: {fault}", package.short_name())));
        let name = format!("{}-{}.crate", package.name, package.version);
        let path = directory.join("package").join(&name);
        let size = fs::metadata(&path).map_err(|error| format!("{}: {error}", path.display()))?.len();
        tarballs.push(Tarball { name, size });
    }
    if findings.is_empty() {
        return Ok(tarballs);
    }
    Err(Failure::from(findings.join("\n")).repeat_with("cargo xtask ci tarballs"))
}

/// Builds each crate from its tarball, as a user without the workspace would.
pub(crate) fn build(workspace: &Workspace) -> Result<(), Failure> {
    let mut package = cargo(["package", "--allow-dirty", "--all-features"]);
    for krate in workspace.crates() {
        package = package.args(["--package", &krate.name]);
    }
    package.run()
}

/// The files of a package's tarball, relative to the package.
fn list(package: &Package) -> Result<BTreeSet<PathBuf>, String> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["package", "--list", "--allow-dirty", "--package", &package.name])
        .current_dir(workspace::root())
        .output()
        .map_err(|error| format!("cargo package could not be started: {error}"))?;
    if !output.status.success() {
        return Err(format!("cargo package --list: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(PathBuf::from).collect())
}

/// The faults of a tarball with these files.
fn faults(directory: &Path, files: &BTreeSet<PathBuf>, unpublished: &[&str]) -> Result<Vec<String>, String> {
    let mut faults: Vec<String> = REQUIRED
        .iter()
        .filter(|file| !files.contains(Path::new(file)))
        .map(|file| format!("{file} is not in the tarball"))
        .collect();
    let is_rust = |file: &&PathBuf| file.extension().is_some_and(|extension| extension == "rs");
    for file in files.iter().filter(is_rust) {
        let path = directory.join(file);
        let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let here = file.parent().unwrap_or(Path::new(""));
        for included in text.lines().filter_map(included) {
            if !files.contains(&resolved(&here.join(included))) {
                faults.push(format!("{} includes {included}, which is not in the tarball", file.display()));
            }
        }
        for package in unpublished {
            if text.contains(&format!("{}::", package.replace('-', "_"))) {
                faults.push(format!("{} uses {package}, which is not published: exclude it", file.display()));
            }
        }
    }
    Ok(faults)
}

/// The path of the file that a line includes.
fn included(line: &str) -> Option<&str> {
    let line = line.trim_start();
    if line.starts_with("//") {
        return None;
    }
    let rest = INCLUDES.iter().find_map(|include| {
        let attribute = line.starts_with("#[") || include.contains('!');
        line.split_once(include).filter(|_| attribute).map(|(_, rest)| rest)
    })?;
    rest.split_once('"').map(|(path, _)| path)
}

/// The path with `..` resolved, unless it leads above the package.
fn resolved(path: &Path) -> PathBuf {
    let mut resolved = PathBuf::new();
    for component in path.components() {
        if component != Component::ParentDir || !resolved.pop() {
            resolved.push(component);
        }
    }
    resolved
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults_of(files: &[(&str, &str)]) -> Vec<String> {
        let directory = tempfile::tempdir().unwrap();
        let mut names: BTreeSet<PathBuf> = REQUIRED.iter().map(PathBuf::from).collect();
        for (name, text) in files {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
            names.insert(name.into());
        }
        faults(directory.path(), &names, &["private-tool"]).unwrap()
    }

    #[test]
    fn a_tarball_that_holds_what_it_needs_is_good() {
        let library = "#[doc = include_str!(\"../README.md\")]\nstruct Readme;\n#[path = \"deep/a.rs\"]\nmod a;\n";
        assert_eq!(faults_of(&[("src/lib.rs", library), ("src/deep/a.rs", "// include_str!(\"b\")\n")]), [""; 0]);
    }

    #[test]
    fn a_file_that_stays_behind_is_found() {
        for line in ["include_str!(\"../../../docs/a.md\")", "include_bytes!(\"b\")", "#[path = \"c.rs\"]"] {
            assert_eq!(faults_of(&[("src/lib.rs", line)]).len(), 1, "{line}");
        }
        assert_eq!(faults_of(&[("src/lib.rs", "let path = \"c.rs\";")]), [""; 0]);
    }

    #[test]
    fn a_use_of_a_package_that_is_not_published_is_found() {
        let found = faults_of(&[("src/lib.rs", ""), ("tests/it/main.rs", "use private_tool::run;\n")]);
        assert_eq!(found, ["tests/it/main.rs uses private-tool, which is not published: exclude it"]);
    }

    #[test]
    fn a_missing_license_is_found() {
        let none = faults(Path::new(""), &BTreeSet::new(), &[]).unwrap();
        assert_eq!(none.len(), REQUIRED.len());
    }
}
