//! The tasks of this workspace: this room is the command line, and decides nothing.
//!
//! Invariant: what a person can run by hand and what continuous integration runs is the same code.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line speaks through its output")]

#[cfg(not(unix))]
compile_error!("cargo xtask keeps its servers with Unix processes: on Windows, run it inside WSL");

mod awaits;
mod ci;
mod command;
mod databases;
mod doc;
mod examples;
mod failed;
mod foreign;
mod history;
mod mariadb;
mod missing;
mod operations;
mod other_sqlx;
mod outside;
mod pgbouncer;
mod postgres;
mod release;
mod server;
mod suite;
mod tarballs;
mod tidy;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::ci::Section;
use crate::command::{Failure, cargo, quoted};
use crate::databases::{Databases, Wanted};
use crate::history::Locks;
use crate::other_sqlx::OtherSqlx;
use crate::suite::{Campaign, Scope};
use crate::workspace::Workspace;

/// The tasks of the cancel-safe workspace.
///
/// `cargo xtask ci` is everything that a change must pass; the other commands are parts of it, for working on one
/// thing.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct CommandLine {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Check everything in order; stop at the first failure, and print the command that repeats it
    ///
    /// Needs a stable Rust toolchain with rustfmt and clippy, and PostgreSQL, MariaDB and PgBouncer. As root on Debian,
    /// it installs the three servers. The last line of a run that passed is `N passed, 0 failed`, followed by the
    /// number of things that could not be run here, if there are any.
    Ci {
        /// Only these sections; all of them if none is named
        #[arg(value_enum)]
        sections: Vec<Section>,
    },
    /// Run the tests and doctests of some crates, with a private PostgreSQL and MariaDB if they need one
    ///
    /// The servers, and a PgBouncer in front of PostgreSQL, are started in temporary directories and removed
    /// afterwards. To use a server of your own, set CANCEL_SAFE_TEST_POSTGRES_URL or CANCEL_SAFE_TEST_MYSQL_URL: the
    /// tests then run in a schema or database of their own there, which is dropped at the end.
    Test {
        /// Directories under crates/ (`atomic-fs`) or package names; all crates if none is named
        crates: Vec<String>,
        /// Use another sqlx: the directory of a checkout, or `mended` for the locked one with a fix, by which a dropped
        /// `begin` ends what it has begun, as in sqlx after 0.9.0. It is built below target/sqlx; Cargo.lock stays as
        /// it is
        #[arg(long, value_name = "PATH", requires = "crates")]
        sqlx: Option<String>,
        /// Everything after `--` goes to the test binaries, as with `cargo test`: a part of a test's name,
        /// `--nocapture`, …
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Run the campaigns of kills, faults and power cuts in full: minutes to hours instead of the tests' seconds
    ///
    /// These are the tests of `cargo xtask test`, but CANCEL_SAFE_CAMPAIGN=full makes them visit everything instead of
    /// a sample. Their output and the closing table say what they visited and found; below the table is what could not
    /// be run here, and why. Faults need Linux and strace; power cuts also need root and xfsprogs. As root on Debian,
    /// it installs the tools.
    Crash {
        /// Directories under crates/ or package names; all that have a campaign if none is named
        crates: Vec<String>,
        /// Visit only the sample that the tests visit
        #[arg(long)]
        quick: bool,
    },
    /// List the awaits that the last test run has never dropped
    ///
    /// Run it after `cargo xtask test` or `cargo xtask ci`. For other projects, `cargo cancel-safe test` does the same.
    Awaits {
        /// Directories under crates/ or package names; all crates if none is named
        crates: Vec<String>,
    },
    /// Check the house rules that a compiler does not know
    Tidy,
    /// Build the documentation of all crates without a warning, and the book if mdbook is installed
    Doc {
        /// Install mdbook from the registry if it is missing
        #[arg(long)]
        install: bool,
    },
    /// Explore old versions of published crates, which must be caught, and new ones, which must be clean
    ///
    /// Each is a package of its own in benches/history, with its own lock file, outside this workspace. If all are
    /// explored, the table in benches/history/README.md is rewritten.
    History {
        /// Directories in benches/history (`tokio-mutex`); all of them if none is named
        names: Vec<String>,
        /// Bring the lock files in line with our own crates first, after a dependency of `testing` has changed
        #[arg(long)]
        relock: bool,
    },
    /// Judge operations of tokio, tokio-util and futures again, and write docs/src/operations.md
    ///
    /// Takes a minute. The page is not written if an operation could not be judged, or is not as documented and no note
    /// says why.
    Operations {
        /// Explore only the operations whose names contain this, and print everything that was found
        part: Option<String>,
    },
    /// Explore the patterns of the book, broken and mended, and write their page (docs/src/breaking.md)
    Patterns,
    /// Check that a crate can be released, and tag it
    ///
    /// Nothing may be uncommitted, and the changelog must mention the version. The crate and the crates it needs are
    /// built from their tarballs. If cargo-semver-checks is installed, the interface is compared with the last release.
    Release {
        /// A directory under crates/ or a package name
        #[arg(required_unless_present = "check")]
        name: Option<String>,
        /// Make the tag. Pushing it publishes the crate, and is left to you
        #[arg(long)]
        execute: bool,
        /// Build each crate from its tarball, and do nothing else
        #[arg(long, conflicts_with_all = ["name", "execute"])]
        check: bool,
    },
    /// Run the benches, with the crates they compare ours to, and with private servers if they need them
    Bench {
        /// Bench targets in benches/; all of them if none is named
        names: Vec<String>,
        /// Everything after `--` goes to criterion: a part of a bench's name, `--quick`, …
        #[arg(last = true)]
        arguments: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run(CommandLine::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("\n{failure}");
            ExitCode::FAILURE
        }
    }
}

/// The benches that need the servers: one needs both, and one only PostgreSQL.
const ON_DATABASES: &str = "tx_guard";
const ON_POSTGRES: &str = "resumable";

/// The bench that needs strace and its own file system.
const ON_FAULTS: &str = "atomic_fs";

/// The crates whose tests have a campaign that can be run in full.
const CAMPAIGNS: [&str; 6] = ["atomic-fs", "http-timeout", "resumable", "shutdown", "tx-guard", workspace::UMBRELLA];

fn report(workspace: &Workspace, scope: &Scope, again: &str) -> Result<(), Failure> {
    let tally = suite::run(workspace, scope).map_err(|failure| failure.repeat_with(again))?;
    print!("{}", suite::table(workspace, &tally)?);
    println!("{tally}");
    Ok(())
}

/// Refuses a crate without a campaign: it would run its tests, and they would look like one.
fn require_campaigns(workspace: &Workspace, names: &[String]) -> Result<(), Failure> {
    for name in names {
        let package = workspace.find(name)?;
        if !CAMPAIGNS.contains(&package.short_name()) {
            return Err(Failure::from(format!("`{name}` has no campaign; these have: {}", CAMPAIGNS.join(", "))));
        }
    }
    Ok(())
}

fn run(task: Task) -> Result<(), Failure> {
    let workspace = Workspace::load()?;
    match task {
        Task::Ci { sections } => ci::run(&workspace, &sections),
        Task::Test { crates, sqlx, arguments } => {
            let mut again = format!("cargo xtask test {}", crates.join(" "));
            if let Some(sqlx) = &sqlx {
                again = format!("{again} --sqlx {}", quoted(sqlx));
            }
            let sqlx = sqlx.map(|named| OtherSqlx::prepare(&workspace, &named)).transpose()?;
            let scope = Scope::Crates { names: crates, arguments, campaign: Campaign::Quick, sqlx };
            report(&workspace, &scope, again.trim_end())
        }
        Task::Crash { crates, quick } => {
            let names = if crates.is_empty() { CAMPAIGNS.map(String::from).to_vec() } else { crates };
            require_campaigns(&workspace, &names)?;
            let again = format!("cargo xtask crash {}{}", if quick { "--quick " } else { "" }, names.join(" "));
            let campaign = if quick { Campaign::Quick } else { Campaign::Full };
            let arguments = vec!["--nocapture".to_owned()];
            let scope = Scope::Crates { names, arguments, campaign, sqlx: None };
            report(&workspace, &scope, &again)
        }
        Task::Awaits { crates } => awaits::tell(&workspace, &crates),
        Task::Tidy => tidy::run(&workspace),
        Task::Doc { install } => doc::run(install),
        Task::History { names, relock } => history::run(&names, if relock { Locks::Renewed } else { Locks::Kept }),
        Task::Operations { part } => operations::run(part),
        Task::Patterns => operations::patterns(),
        Task::Release { name: Some(name), execute, check: _ } => release::run(&workspace, &name, execute),
        Task::Release { name: None, .. } => tarballs::build(&workspace),
        Task::Bench { names, arguments } => {
            if names.is_empty() || names.iter().any(|name| name == ON_FAULTS) {
                missing::see_to_tools();
            }
            let mut bench = cargo(["bench", "--package", "cancel-safe-benches", "--features", "peers"]);
            for name in &names {
                bench = bench.args(["--bench", name]);
            }
            if names.is_empty() {
                bench = bench.args(["--benches"]);
            }
            let is_run = |bench: &str| names.is_empty() || names.iter().any(|name| name == bench);
            let (postgres, mysql) = (is_run(ON_DATABASES) || is_run(ON_POSTGRES), is_run(ON_DATABASES));
            let databases = Databases::for_tests(Wanted { postgres, mysql, pgbouncer: false })?;
            databases.tell(bench).arg("--").args(&arguments).run()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crate_without_a_campaign_is_named_with_those_that_have_one() {
        let workspace = Workspace::load().unwrap();
        let asked = |name: &str| require_campaigns(&workspace, &[name.to_owned()]);
        assert!(CAMPAIGNS.iter().all(|name| asked(name).is_ok()));
        assert!(asked("cancel-safe-atomic-fs").is_ok());
        assert!(asked("guard").unwrap_err().what.contains("atomic-fs"));
        assert!(asked("grard").unwrap_err().what.contains("there is no crate"));
    }
}
