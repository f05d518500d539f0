//! The integration tests of `cargo-cancel-safe`, one binary: projects in a temporary directory, and the built command.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod coverage;
mod list;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// A project without dependencies, so that it builds at once and without a network.
struct Project {
    directory: TempDir,
}

impl Project {
    /// A package with these files; its manifest is written here.
    fn new(files: &[(&str, &str)]) -> Self {
        let project = Self { directory: tempfile::tempdir().unwrap() };
        project.write("Cargo.toml", "[package]\nname = \"bank\"\nedition = \"2024\"\n\n[workspace]\n");
        files.iter().for_each(|(path, text)| project.write(path, text));
        project
    }

    /// With symbolic links resolved, as the command prints it.
    fn root(&self) -> PathBuf {
        self.directory.path().canonicalize().unwrap()
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.directory.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Runs the command in the project, as cargo would.
    fn run(&self, arguments: &str) -> Ran {
        self.run_in("", arguments)
    }

    fn run_in(&self, directory: &str, arguments: &str) -> Ran {
        run(self.command(directory).args(arguments.split_whitespace()))
    }

    fn command(&self, directory: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cargo-cancel-safe"));
        command.arg("cancel-safe").current_dir(self.root().join(directory));
        // The projects must not build in the directory of this workspace, where they would wait for its lock.
        command.env_remove("CARGO_TARGET_DIR").env_remove("CARGO_BUILD_TARGET_DIR").env("CARGO_NET_OFFLINE", "true");
        command
    }
}

/// The output of the command.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

fn run(command: &mut Command) -> Ran {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { code: status.code(), out: text(stdout), err: text(stderr) }
}

impl Ran {
    #[track_caller]
    fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}\n{}", self.out, self.err);
        self
    }

    /// Fails unless standard error contains the text.
    #[track_caller]
    fn says(self, text: &str) -> Self {
        assert!(self.err.contains(text), "`{text}` is not in:\n{}", self.err);
        self
    }

    fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}", self.out))
    }
}

/// Replaces the paths of the project in the output with `@`.
fn without_root(text: &str, root: &Path) -> String {
    text.replace(&root.display().to_string(), "@")
}
