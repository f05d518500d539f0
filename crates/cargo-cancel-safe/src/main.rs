//! The command `cargo cancel-safe`: this room has the command line and the error output.
//!
//! Invariant: standard output has the result and nothing else; progress, warnings and errors are on standard error.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command speaks through its output")]

mod test;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use cargo_cancel_safe::{Coverage, Error, File, Record, Selection, Workspace, report};
use clap::{Args, Parser, Subcommand};

/// Cargo's own exit code for a failure.
const FAILED: u8 = 101;

/// Show which awaits of a crate its tests have dropped, and which they have never dropped.
///
/// A future can be dropped at any await. Tests that use `cancel-safe-testing` drop it at each; this command shows the
/// awaits that no such test has reached.
#[derive(Parser)]
#[command(name = "cargo-cancel-safe", bin_name = "cargo cancel-safe", version)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run `cargo test`, then show which awaits were dropped in some exploration and list those that never were
    ///
    /// All other arguments are passed on to `cargo test` unchanged, including `--` and everything after it. The awaits
    /// are counted in the packages that cargo tests: the ones selected by -p, --workspace, --exclude and
    /// --manifest-path, or else the package of the current directory, or the default members of the workspace.
    ///
    /// The count covers the library and the binaries of a package: `.await`, and `select!`, `join!` and `try_join!`,
    /// which wait themselves. It leaves out code that is compiled for tests only (`#[cfg(test)]`, test functions), and
    /// tests/, examples/ and benches/. An await that another `cfg` switches off is counted.
    ///
    /// An await counts as dropped if an exploration of cancel-safe-testing has dropped a future that waited there, also
    /// through its callers. Line tables tell the awaits apart, so the profile needs debug = "line-tables-only" or more.
    /// `dev` and `test` have that; --release does not.
    ///
    /// Exit codes: the exit code of `cargo test` when that fails; 1 when --fail-under is not reached; 2 for a wrong
    /// option; 101 when cargo or a file is at fault.
    #[command(override_usage = "cargo cancel-safe test [OPTIONS] [CARGO TEST ARGUMENTS]... [-- TEST BINARY ARGUMENTS]")]
    Test(TestOptions),
    /// List all awaits: where they are, which function they are in, and whether that is `pub`
    ///
    /// `pub` means the function's own keyword; whether its module can be reached is not checked. The functions of a
    /// trait's implementation count as public, and those of a trait count as the trait does. Code that is compiled for
    /// tests only is not listed.
    List(ListOptions),
}

#[derive(Args)]
struct TestOptions {
    /// Also write the coverage to FILE as LCOV, for editors and coverage services
    #[arg(long, value_name = "FILE")]
    lcov: Option<PathBuf>,
    /// Fail with exit code 1 when less than PERCENT of the awaits were dropped
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    fail_under: Option<f64>,
    /// Print the result as JSON; the output of the tests goes to standard error
    #[arg(long)]
    json: bool,
    /// The arguments of `cargo test`
    #[arg(last = true, hide = true)]
    arguments: Vec<OsString>,
}

#[derive(Args)]
struct ListOptions {
    /// Print the list as JSON
    #[arg(long)]
    json: bool,
    /// A package of the workspace: its name, also with a version, or with `*` and `?`
    #[arg(short, long, value_name = "SPEC")]
    package: Vec<String>,
    /// All packages of the workspace
    #[arg(long, alias = "all")]
    workspace: bool,
    /// Leave out this package
    #[arg(long, value_name = "SPEC", requires = "workspace")]
    exclude: Vec<String>,
    /// The Cargo.toml of the package or workspace
    #[arg(long, value_name = "PATH")]
    manifest_path: Option<PathBuf>,
}

fn percent(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(percent),
        _ => Err("it is a number from 0 to 100".to_owned()),
    }
}

fn main() -> ExitCode {
    let command_line = CommandLine::parse_from(arranged(std::env::args_os().collect()));
    let result = match command_line.command {
        Command::Test(options) => test::run(&options),
        Command::List(options) => list(options).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitCode::from(FAILED)
    })
}

/// The arguments as clap reads them: without the name of the subcommand, which cargo passes on, and for `test` with our
/// options first and those of `cargo test` after `--`, because we do not know them.
fn arranged(mut arguments: Vec<OsString>) -> Vec<OsString> {
    if arguments.get(1).is_some_and(|first| first == "cancel-safe") {
        arguments.remove(1);
    }
    if arguments.get(1).is_none_or(|command| command != "test") {
        return arguments;
    }
    let mut ours: Vec<OsString> = arguments.drain(..2).collect();
    let mut cargos = vec![OsString::from("--")];
    let mut rest = arguments.into_iter();
    while let Some(argument) = rest.next() {
        let text = argument.to_str().unwrap_or_default();
        match text.split_once('=').map_or(text, |(option, _)| option) {
            "--" => {
                cargos.push(argument);
                cargos.extend(rest.by_ref());
            }
            "--lcov" | "--fail-under" if !text.contains('=') => ours.extend([argument].into_iter().chain(rest.next())),
            "--lcov" | "--fail-under" | "--json" | "--help" | "-h" => ours.push(argument),
            _ => cargos.push(argument),
        }
    }
    ours.extend(cargos);
    ours
}

fn list(options: ListOptions) -> Result<(), Error> {
    let mut selection = Selection::default();
    selection.packages = options.package;
    selection.workspace = options.workspace;
    selection.exclude = options.exclude;
    if let Some(path) = options.manifest_path {
        selection.metadata = vec!["--manifest-path".into(), path.into()];
    }
    let workspace = Workspace::load(&selection)?;
    let coverage = Coverage::new(scan(&workspace, &selection)?, &Record::default(), workspace.root());
    if options.json {
        println!("{:#}", report::list_json(&coverage));
        return Ok(());
    }
    print!("{}", report::list(&coverage, workspace.root()));
    status("Found", &format!("{} awaits", coverage.figures().awaits));
    Ok(())
}

fn scan(workspace: &Workspace, selection: &Selection) -> Result<Vec<(String, Vec<File>)>, Error> {
    let mut scanned = Vec::new();
    for package in workspace.choose(selection)? {
        status("Scanning", package.name());
        scanned.push((package.name().to_owned(), package.scan()?));
    }
    Ok(scanned)
}

/// A line of progress as cargo prints it.
fn status(verb: &str, what: &str) {
    eprintln!("{verb:>12} {what}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrange(text: &str) -> String {
        let words: Vec<OsString> = text.split_whitespace().map(OsString::from).collect();
        arranged(words).iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        CommandLine::command().debug_assert();
    }

    #[test]
    fn our_options_are_told_from_those_of_cargo_wherever_they_stand() {
        assert_eq!(
            arrange("x cancel-safe test --release --lcov f -p a --json -- --lcov --json"),
            "x test --lcov f --json -- --release -p a -- --lcov --json"
        );
        assert_eq!(arrange("x test --fail-under=90 a b"), "x test --fail-under=90 -- a b");
        assert_eq!(arrange("x cancel-safe list --json"), "x list --json");
        assert_eq!(arrange("x cancel-safe"), "x");
        assert_eq!(arrange("x test --lcov"), "x test --lcov --");
    }

    #[test]
    fn a_percentage_is_between_0_and_100() {
        assert_eq!(percent("99.5"), Ok(99.5));
        assert!(["-1", "101", "NaN", "inf", "many", ""].iter().all(|text| percent(text).is_err()));
    }
}
