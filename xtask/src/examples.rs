//! The examples of the crates: what each README says about them, and a run of each one that no test runs.
//!
//! Invariant: an example that its README names is built and run by ci, here or in a test of its crate.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::command::Failure;
use crate::workspace::{Package, Workspace};

/// How long one example may run. The longest takes ten seconds.
const BOUND: Duration = Duration::from_secs(120);

/// How many examples each library has at least.
const LEAST: usize = 2;

/// What a library lacks: it has a few examples, and its README names each with the command that runs it.
pub(crate) fn faults(package: &Package) -> Result<Vec<String>, String> {
    let path = package.directory().join("README.md");
    let readme = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(unnamed(&package.name, &of(package)?, &readme))
}

fn unnamed(package: &str, examples: &[String], readme: &str) -> Vec<String> {
    // A command may be broken over two lines.
    let readme: Vec<&str> = readme.split_whitespace().collect();
    let readme = readme.join(" ");
    let is_named = |example: &&String| {
        readme.split(&format!("cargo run -p {package} ")).skip(1).any(|command| {
            let command = command.split('`').next().unwrap_or(command);
            command.split("--example ").nth(1).is_some_and(|name| name.split(' ').next() == Some(example.as_str()))
        })
    };
    let mut faults: Vec<String> = examples
        .iter()
        .filter(|example| !is_named(example))
        .map(|example| format!("name `cargo run -p {package} --example {example}`"))
        .collect();
    if examples.len() < LEAST {
        faults.push(format!("{} examples, where each crate has at least {LEAST}", examples.len()));
    }
    faults
}

/// Runs each example that no test of its crate includes; they have been built.
pub(crate) fn run(workspace: &Workspace) -> Result<(), Failure> {
    let built = workspace.target_directory.join("debug/examples");
    for package in workspace.libraries() {
        let tests = tests(package)?;
        for example in of(package)? {
            if is_run_by(&tests, &example) {
                continue;
            }
            let repeat = format!("cargo run -p {} --example {example}", package.name);
            println!("\n{repeat}");
            let start = Instant::now();
            bounded(&built.join(&example), BOUND)
                .map_err(|why| Failure::from(format!("the example `{example}` {why}")).repeat_with(repeat))?;
            println!("({:.1} s)", start.elapsed().as_secs_f64());
        }
    }
    Ok(())
}

fn is_run_by(tests: &str, example: &str) -> bool {
    [format!("/examples/{example}.rs\""), format!("/examples/{example}/main.rs\"")]
        .iter()
        .any(|path| tests.contains(path.as_str()))
}

/// Runs a program on this terminal, for at most so long.
fn bounded(program: &Path, limit: Duration) -> Result<(), String> {
    let mut child = Command::new(program)
        .stdin(Stdio::null())
        .spawn()
        .map_err(|error| format!("could not be started ({}): {error}", program.display()))?;
    let ended = ends(&mut child, limit).map_err(|error| format!("could not be waited for: {error}"))?;
    if ended {
        let status = child.wait().map_err(|error| format!("could not be waited for: {error}"))?;
        return if status.success() { Ok(()) } else { Err(format!("did not show what it promises: {status}")) };
    }
    child.kill().and_then(|()| child.wait()).map_err(|error| format!("could not be killed: {error}"))?;
    Err(format!("had not ended after {} s", limit.as_secs()))
}

/// Whether the child ends within the limit.
#[expect(
    clippy::disallowed_methods,
    reason = "no executor runs here, std has no bounded wait, and this one has a bound"
)]
fn ends(child: &mut Child, limit: Duration) -> std::io::Result<bool> {
    let start = Instant::now();
    while child.try_wait()?.is_none() {
        if start.elapsed() > limit {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(true)
}

/// The names of a package's examples: its files, and its directories with a `main.rs`.
fn of(package: &Package) -> Result<Vec<String>, String> {
    let directory = package.directory().join("examples");
    let mut names = Vec::new();
    for path in entries(&directory)? {
        let is_example = path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").is_file();
        names.extend(path.file_stem().and_then(|name| name.to_str()).filter(|_| is_example).map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

/// The text of a package's integration tests.
fn tests(package: &Package) -> Result<String, String> {
    let mut text = String::new();
    for path in entries(&package.directory().join("tests/it"))?.into_iter().filter(|path| path.is_file()) {
        // Some are no text, and include nothing.
        text.push_str(&String::from_utf8_lossy(
            &fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?,
        ));
    }
    Ok(text)
}

/// What is in a directory, which may be missing.
fn entries(directory: &Path) -> Result<Vec<PathBuf>, String> {
    let broken = |error: std::io::Error| format!("{}: {error}", directory.display());
    match fs::read_dir(directory) {
        Ok(entries) => entries.map(|entry| entry.map(|entry| entry.path()).map_err(broken)).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(broken(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_example_that_no_readme_names_is_a_fault() {
        let both = ["one".to_owned(), "two".to_owned()];
        let readme =
            "See `cargo run -p a-crate\n--example one`, and `cargo run -p a-crate --features x --example two -- 3`.";
        assert_eq!(unnamed("a-crate", &both, readme), Vec::<String>::new());
        let faults = unnamed("a-crate", &both, &readme.replace("two", "twofold"));
        assert_eq!(faults, ["name `cargo run -p a-crate --example two`"]);
        assert_eq!(unnamed("b-crate", &both, readme).len(), 2);
        assert!(unnamed("a-crate", &both[..1], readme)[0].contains("1 examples"));
    }

    #[test]
    fn an_example_that_a_test_includes_is_run_there() {
        let tests = "#[path = \"../../examples/one.rs\"]\nmod one;\n#[path = \"../../examples/two/main.rs\"]";
        assert!(is_run_by(tests, "one") && is_run_by(tests, "two"));
        assert!(!is_run_by(tests, "on") && !is_run_by(tests, "three"));
    }

    #[test]
    fn an_example_that_fails_or_hangs_is_a_failure() {
        assert_eq!(bounded(Path::new("/bin/true"), BOUND), Ok(()));
        assert!(bounded(Path::new("/bin/false"), BOUND).unwrap_err().contains("did not show what it promises"));
        assert!(bounded(Path::new("/no/such/example"), BOUND).unwrap_err().contains("could not be started"));
        let mut sleeper = Command::new("sleep").arg("60").spawn().unwrap();
        assert!(!ends(&mut sleeper, Duration::from_millis(50)).unwrap());
        sleeper.kill().unwrap();
        assert!(ends(&mut sleeper, BOUND).unwrap());
    }
}
