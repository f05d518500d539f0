//! The public bugs of published crates in `benches/history`: each old version must be caught, and each new one must be
//! clean.
//!
//! Invariant: a package there states the bug and the expected result in its own manifest, and its requirement with `=`
//! states the version; nothing is listed a second time.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use crate::command::{Cargo, Failure, cargo};
use crate::workspace;

const DIRECTORY: &str = "benches/history";

/// The lines of the README that enclose the table.
const BEGIN: &str = "<!-- Made by `cargo xtask history`. -->";
const END: &str = "<!-- The end of what is made. -->";

/// One bug: the version that has it, and one that no longer has it, if there is one.
struct Case {
    name: String,
    old: Version,
    new: Option<Version>,
}

/// One of our packages, which explores one version of a crate.
struct Version {
    manifest: PathBuf,
    krate: String,
    number: String,
    stated: Stated,
}

/// What the manifest says in `[package.metadata.history]`. The old version says what the bug is.
#[derive(Deserialize)]
struct Stated {
    expect: Expect,
    #[serde(default)]
    bug: String,
    #[serde(default)]
    source: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Expect {
    Found,
    Silent,
}

/// What the exploration printed.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Found(String),
    Silent,
    Nothing,
}

/// What to do about a lock file that no longer fits our own crates, because their dependencies have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Locks {
    /// Fail: a version is explored with the dependencies that are committed.
    Kept,
    /// Update it first. Its entries for other crates stay.
    Renewed,
}

/// Explores both versions of the named cases, or of all cases if none is named, and prints the table. A table of all
/// cases is also written into the README.
pub(crate) fn run(names: &[String], locks: Locks) -> Result<(), Failure> {
    let mut rows = String::from(
        "| crate | bug | reported or fixed in | found in | the exploration says | silent in |\n\
         |---|---|---|---|---|---|\n",
    );
    let mut wrong = Vec::new();
    let cases = cases(names)?;
    for case in &cases {
        if locks == Locks::Renewed {
            for version in std::iter::once(&case.old).chain(&case.new) {
                cargo(["update", "--quiet", "--workspace", "--manifest-path"]).arg(&version.manifest).run()?;
            }
        }
        let old = explore(&case.old)?;
        let new = case.new.as_ref().map(explore).transpose()?;
        for (version, said) in std::iter::once((&case.old, &old)).chain(case.new.iter().zip(&new)) {
            if !version.keeps_to(said) {
                let Version { krate, number, stated, .. } = version;
                let what = format!("{krate} {number} was to be {:?}, and was {said:?}", stated.expect);
                wrong.push(Failure::from(what).repeat_with(version.command().to_string()));
            }
        }
        writeln!(rows, "{}", row(case, &old)).map_err(|error| error.to_string())?;
    }
    println!("\n{rows}");
    if let Some(first) = wrong.first() {
        let what = format!("{} of {} cases: {}", wrong.len(), cases.len(), first.what);
        return Err(Failure { what, repeat: first.repeat.clone() });
    }
    if names.is_empty() {
        write_table(&rows)?;
    }
    println!("{} bugs of published crates were found, and their mended versions are clean", cases.len());
    Ok(())
}

/// The cases, by the names of their directories.
fn cases(names: &[String]) -> Result<Vec<Case>, String> {
    let directory = workspace::root().join(DIRECTORY);
    let broken = |error: std::io::Error| format!("{DIRECTORY}: {error}");
    let mut known = Vec::new();
    for entry in fs::read_dir(&directory).map_err(broken)? {
        let entry = entry.map_err(broken)?;
        if entry.path().is_dir() {
            known.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    known.sort();
    if let Some(name) = names.iter().find(|name| !known.contains(name)) {
        return Err(format!("there is no case `{name}` in {DIRECTORY}; there are {}", known.join(", ")));
    }
    known.retain(|name| names.is_empty() || names.contains(name));
    known.into_iter().map(|name| Case::load(&directory, name)).collect()
}

impl Case {
    fn load(directory: &Path, name: String) -> Result<Self, String> {
        let version = |which: &str| directory.join(&name).join(which).join("Cargo.toml");
        let old = Version::load(version("old"))?;
        let new = version("new").exists().then(|| Version::load(version("new"))).transpose()?;
        if old.stated.bug.is_empty() || old.stated.source.is_empty() {
            return Err(format!("{}: say what the bug is, and where it was reported", old.manifest.display()));
        }
        Ok(Self { name, old, new })
    }
}

/// The part of `cargo metadata` about a package that is needed here.
#[derive(Deserialize)]
struct Metadata {
    packages: [Package; 1],
}

#[derive(Deserialize)]
struct Package {
    dependencies: Vec<Dependency>,
    metadata: Tables,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    req: String,
}

#[derive(Deserialize)]
struct Tables {
    history: Stated,
}

impl Version {
    fn load(manifest: PathBuf) -> Result<Self, String> {
        let broken = |why: String| format!("{}: {why}", manifest.display());
        let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["metadata", "--no-deps", "--format-version", "1", "--manifest-path"])
            .arg(&manifest)
            .output()
            .map_err(|error| broken(error.to_string()))?;
        if !output.status.success() {
            return Err(broken(String::from_utf8_lossy(&output.stderr).into_owned()));
        }
        let Metadata { packages: [package] } =
            serde_json::from_slice(&output.stdout).map_err(|error| broken(error.to_string()))?;
        let mut exact =
            package.dependencies.into_iter().filter_map(|it| Some((it.name, it.req.strip_prefix('=')?.to_owned())));
        let (Some((krate, number)), None) = (exact.next(), exact.next()) else {
            return Err(broken("exactly one requirement begins with `=`: the version that is explored".to_owned()));
        };
        let manifest = manifest.strip_prefix(workspace::root()).unwrap_or(&manifest).to_owned();
        Ok(Self { manifest, krate, number, stated: package.metadata.history })
    }

    /// All versions share one target directory, which is not the workspace's, so `cargo clean` in the workspace keeps
    /// it.
    fn command(&self) -> Cargo {
        cargo(["run", "--locked", "--manifest-path"])
            .arg(&self.manifest)
            .env("CARGO_TARGET_DIR", "target/history")
            .env("RUST_BACKTRACE", "0")
    }

    fn keeps_to(&self, said: &Said) -> bool {
        match self.stated.expect {
            Expect::Found => matches!(said, Said::Found(_)),
            Expect::Silent => *said == Said::Silent,
        }
    }
}

fn explore(version: &Version) -> Result<Said, Failure> {
    println!("\n== {} {}", version.krate, version.number);
    let mut said = Said::Nothing;
    let succeeded = version.command().run_lines(|line| {
        if said == Said::Nothing {
            said = read(line);
        }
    })?;
    if succeeded {
        return Ok(said);
    }
    let what = format!(
        "{} could not be explored; if its lock file does not fit our crates any more: cargo xtask history --relock",
        version.manifest.display()
    );
    Err(Failure::from(what).repeat_with(version.command().to_string()))
}

/// Reads a line of `verdict.rs`. It names the file relative to the package's directory, as cargo does.
fn read(line: &str) -> Said {
    if line.starts_with("silent: ") {
        Said::Silent
    } else if let Some(found) = line.strip_prefix("found ") {
        let at_case = found.strip_prefix("at ../").map(|place| format!("at {place}"));
        let at_main = || found.strip_prefix("at ").map(|place| format!("at old/{place}"));
        Said::Found(at_case.or_else(at_main).unwrap_or_else(|| found.to_owned()))
    } else {
        Said::Nothing
    }
}

fn row(case: &Case, old: &Said) -> String {
    let Case { name, old: Version { krate, number, stated: Stated { bug, source, .. }, .. }, new } = case;
    let said = match old {
        Said::Found(said) => said.replace('|', "\\|"),
        Said::Silent => "nothing".to_owned(),
        Said::Nothing => "not even that it is silent".to_owned(),
    };
    let new = new.as_ref().map_or("no version yet", |new| &new.number);
    let report = match source {
        source if source.contains("/issues/") => "issue",
        source if source.contains("/pull/") => "pull request",
        _ => "changelog",
    };
    format!("| [{krate}]({name}) | {bug} | [{report}]({source}) | {number} | {said} | {new} |")
}

fn write_table(rows: &str) -> Result<(), String> {
    let path = workspace::root().join(DIRECTORY).join("README.md");
    let broken = |why: String| format!("{}: {why}", path.display());
    let text = fs::read_to_string(&path).map_err(|error| broken(error.to_string()))?;
    let text = between(&text, rows).ok_or_else(|| broken(format!("has to have the lines {BEGIN} and {END}")))?;
    fs::write(&path, text).map_err(|error| broken(error.to_string()))
}

fn between(text: &str, rows: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n\n{rows}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_read_and_everything_else_is_not_one() {
        let found = read("found at ../case.rs:20: nobody can lock it");
        assert_eq!(found, Said::Found("at case.rs:20: nobody can lock it".to_owned()));
        assert_eq!(read("found at main.rs:9: no"), Said::Found("at old/main.rs:9: no".to_owned()));
        assert_eq!(read("found before the first poll: no"), Said::Found("before the first poll: no".to_owned()));
        assert_eq!(read("silent: 9 points at 2 awaits in 67 runs: clean"), Said::Silent);
        assert_eq!(read("   Compiling tokio v0.2.2"), Said::Nothing);
    }

    #[test]
    fn the_table_is_replaced_and_what_is_around_it_stays() {
        let text = format!("# Before\n{BEGIN}\nold\n{END}\nafter\n");
        assert_eq!(between(&text, "new\n").unwrap(), format!("# Before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"));
        assert_eq!(between("no table here", "new\n"), None);
    }

    #[test]
    fn every_case_says_what_its_bug_is_and_what_is_expected() {
        let cases = cases(&[]).unwrap();
        assert!(cases.len() >= 10);
        for Case { name, old, new } in cases {
            assert_eq!(old.stated.expect, Expect::Found, "{name}");
            assert!(old.stated.source.starts_with("https://"), "{name}");
            assert!(new.is_none_or(|new| new.stated.expect == Expect::Silent && new.krate == old.krate), "{name}");
        }
        assert!(super::cases(&["no-such-case".to_owned()]).err().unwrap().contains("tokio-mutex"));
    }
}
