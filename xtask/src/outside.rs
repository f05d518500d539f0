//! A user's first minutes with the crates: tiny projects outside the workspace, with the lines from our READMEs.
//!
//! Invariant: a project knows the crates only by their names and versions, as it would from crates.io; cargo learns
//! separately where they are. No project has a feature of this workspace that it does not request itself.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::command::Failure;
use crate::workspace::{self, UMBRELLA, Workspace};

/// The project of each folder in `xtask/outside`, and the texts that its output must contain.
const PROJECTS: [(&str, Kind, &[&str]); 4] = [
    ("full", Kind::Compiles, &[]),
    ("no-feature", Kind::Fails, &["`atomic_fs` in `cancel_safe`", "the `atomic-fs` feature"]),
    (
        "no-database",
        Kind::Fails,
        &["`Postgres` is no database of this build", "choose a database by the crate's feature `postgres`"],
    ),
    (
        "bare",
        Kind::Runs,
        &[
            "http without a runtime: GET http://localhost/: a call needs a tokio runtime",
            "file without a runtime: \"never\" cannot be written outside a tokio runtime",
            "transaction without a runtime: transactions need a tokio runtime",
            "https without TLS: GET https://localhost/: the request is invalid after 1 attempt",
            "add its feature `rustls` or `native-tls` to your Cargo.toml",
            "sqlx without a runtime: the option sqlx/runtime-tokio is not valid: sqlx can open no connection",
            "add its feature `runtime-tokio` to your Cargo.toml",
        ],
    ),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Compiles,
    Fails,
    Runs,
}

/// Checks the projects from the READMEs, and the projects with a mistake.
pub(crate) fn check(workspace: &Workspace) -> Result<(), Failure> {
    for package in workspace.crates() {
        let readme = package.directory().join("README.md");
        let text = fs::read_to_string(&readme).map_err(|error| format!("{}: {error}", readme.display()))?;
        let dependencies = blocks(&text, "toml").next();
        let Some(dependencies) = dependencies else {
            if package.is_command() {
                continue;
            }
            return Err(Failure::from(format!("{} does not say what to write into a Cargo.toml", readme.display())));
        };
        println!("the README of {}", package.short_name());
        let manifest = format!(
            "[package]\nname = \"reader-of-{}\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n{dependencies}",
            package.short_name()
        );
        let project = Project::make(workspace, &format!("readme-{}", package.short_name()), &manifest)?;
        // As a test, because a README may request a dependency only for tests.
        let code = format!("#![allow(dead_code)]\n{}", example(&text, &package.name.replace('-', "_")));
        project.write("src/lib.rs", "")?;
        project.write("tests/readme.rs", &code)?;
        project.judge(&["check", "--tests"], Kind::Compiles, &[])?;
    }
    for (name, kind, said) in PROJECTS {
        println!("{name}");
        let from = workspace::root().join("xtask/outside").join(name);
        let read = |file: &str| {
            let path = from.join(file);
            fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))
        };
        let project = Project::make(workspace, name, &read("Cargo.toml")?)?;
        project.write("src/main.rs", &read("src/main.rs")?)?;
        project.judge(&[if kind == Kind::Runs { "run" } else { "check" }], kind, said)?;
    }
    Ok(())
}

/// The code blocks of a language, without the attributes that follow the language.
fn blocks<'a>(text: &'a str, language: &'a str) -> impl Iterator<Item = &'a str> {
    text.split("\n```").filter_map(move |part| {
        let (first, rest) = part.split_once('\n')?;
        (first.split(',').next() == Some(language)).then_some(rest)
    })
}

/// The first example that uses the crate, and the examples before it.
fn example(readme: &str, library: &str) -> String {
    let mut code = String::new();
    for block in blocks(readme, "rust") {
        code.push_str(block);
        code.push('\n');
        if block.contains(library) {
            break;
        }
    }
    code
}

/// A separate package.
struct Project<'a> {
    workspace: &'a Workspace,
    directory: PathBuf,
}

impl<'a> Project<'a> {
    /// With the workspace's lockfile and profile, so that dependencies of the same features are compiled once.
    fn make(workspace: &'a Workspace, name: &str, manifest: &str) -> Result<Self, Failure> {
        let project = Self { workspace, directory: workspace.target_directory.join("outside").join(name) };
        let mut manifest =
            format!("{manifest}\n[workspace]\n\n[profile.dev]\ndebug = \"line-tables-only\"\n\n[patch.crates-io]\n");
        for package in workspace.libraries().chain(workspace.find(UMBRELLA)) {
            // Writing to a String cannot fail.
            let _ = writeln!(manifest, "{} = {{ path = {:?} }}", package.name, package.directory());
        }
        project.write("Cargo.toml", &manifest)?;
        let (locked, lockfile) = (workspace::root().join("Cargo.lock"), project.directory.join("Cargo.lock"));
        fs::copy(&locked, &lockfile).map_err(|error| format!("{}: {error}", lockfile.display()))?;
        Ok(project)
    }

    fn write(&self, file: &str, text: &str) -> Result<(), Failure> {
        let path = self.directory.join(file);
        let folder = path.parent().unwrap_or(Path::new("."));
        let written = fs::create_dir_all(folder).and_then(|()| fs::write(&path, text));
        written.map_err(|error| Failure::from(format!("{}: {error}", path.display())))
    }

    fn judge(&self, command: &[&str], kind: Kind, said: &[&str]) -> Result<(), Failure> {
        let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(command)
            .arg("--quiet")
            .arg("--target-dir")
            .arg(&self.workspace.target_directory)
            .env("RUST_BACKTRACE", "0")
            .current_dir(&self.directory)
            .output()
            .map_err(|error| format!("cargo could not be started: {error}"))?;
        fault(&output, kind, said).map_or(Ok(()), |fault| {
            let repeat = format!("cd {} && cargo {}", self.directory.display(), command.join(" "));
            Err(Failure::from(fault).repeat_with(repeat))
        })
    }
}

/// What is wrong with the outcome of a project.
fn fault(output: &Output, kind: Kind, said: &[&str]) -> Option<String> {
    let printed = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() == (kind == Kind::Fails) {
        return Some(format!("it ended with {}\n{printed}", output.status));
    }
    let missing = said.iter().find(|text| !printed.contains(**text))?;
    Some(format!("it does not say {missing:?}, but\n{printed}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::ExitStatus;

    use super::*;

    const README: &str = "# a\n\n```toml\n[dependencies]\na = \"1\"\n```\n\n```rust\nfn before() {}\n```\n\n\
        ```rust,no_run\nuse a_crate::x;\n```\n\n```rust\nfn behind() {}\n```\n";

    #[test]
    fn a_project_is_what_a_readme_says_up_to_the_first_use_of_the_crate() {
        assert_eq!(blocks(README, "toml").collect::<Vec<_>>(), ["[dependencies]\na = \"1\""]);
        let code = example(README, "a_crate");
        assert!(code.contains("before") && code.contains("a_crate::x") && !code.contains("behind"), "{code}");
    }

    #[test]
    fn a_project_that_ends_otherwise_or_says_something_else_is_found() {
        let output = |code: i32, text: &str| Output {
            status: ExitStatus::from_raw(code << 8),
            stdout: text.into(),
            stderr: Vec::new(),
        };
        assert_eq!(fault(&output(0, "a b"), Kind::Runs, &["a", "b"]), None);
        assert_eq!(fault(&output(1, "no feature"), Kind::Fails, &["feature"]), None);
        assert!(fault(&output(0, ""), Kind::Fails, &[]).is_some());
        assert!(fault(&output(1, ""), Kind::Compiles, &[]).is_some());
        assert!(fault(&output(0, "a c"), Kind::Runs, &["a", "b"]).is_some_and(|fault| fault.contains("\"b\"")));
    }
}
