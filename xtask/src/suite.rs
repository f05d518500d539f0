//! The test run: what runs, and what it reports.
//!
//! Invariant: tests are counted from the closing lines of their runners, and a crate without a single test run has
//! failed. Points, campaigns and what could not be run are read from the files that the tests append to, so captured
//! output does not hide them.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fmt;
use std::fmt::Write as _;
use std::fs;
use std::thread::available_parallelism;

use crate::awaits::{self, Written};
use crate::command::{Cargo, Failure, cargo};
use crate::databases::{Databases, Wanted};
use crate::failed::Failed;
use crate::missing;
use crate::other_sqlx::OtherSqlx;
use crate::workspace::{BENCHES, OPERATIONS, Package, UMBRELLA, Workspace};

/// The crates whose tests talk to a server, by directory.
const ON_POSTGRES: [&str; 4] = [UMBRELLA, "tx-guard", "resumable", "examples"];
const ON_MYSQL: [&str; 2] = ["tx-guard", "examples"];
const ON_PGBOUNCER: [&str; 2] = ["tx-guard", "resumable"];

/// The crates whose tests tamper with system calls and cut the power of a disk.
const ON_FAULTS: [&str; 2] = ["atomic-fs", "resumable"];

/// What to run.
pub(crate) enum Scope {
    /// Unit and integration tests of the whole workspace, on the given databases.
    Tests(Databases),
    /// Doctests of the whole workspace, on the given databases.
    Doctests(Databases),
    /// All tests of the named crates, or of all crates; with arguments for the test binaries, and on another sqlx if
    /// one is given.
    Crates { names: Vec<String>, arguments: Vec<String>, campaign: Campaign, sqlx: Option<OtherSqlx> },
}

/// How much the campaigns of kills and faults visit.
#[derive(Clone, Copy)]
pub(crate) enum Campaign {
    /// A sample, within a minute.
    Quick,
    /// Everything.
    Full,
}

/// What the runners reported.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    failed: usize,
    /// The tests that the running binary announced, minus those it reported on.
    unreported: isize,
    /// The first binary whose numbers did not agree, and by how much.
    disagreed: Option<(String, isize)>,
    /// The line of cargo that announced the running binary.
    announced: String,
    by_crate: BTreeMap<String, usize>,
    points: BTreeMap<String, Points>,
    /// The awaits that were dropped.
    dropped: cargo_cancel_safe::Record,
    /// What each campaign of kills, faults and power cuts visited, by crate and name.
    campaigns: BTreeMap<String, Visited>,
    /// What was not run, and why.
    not_run: BTreeSet<String>,
    /// The library whose tests are running, as rustc spells it.
    current: String,
    /// cargo's arguments for running a failed test binary again.
    rerun: Option<String>,
    /// The output of the failed tests.
    said: Failed,
}

/// What one campaign visited.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct Visited {
    points: usize,
    violations: usize,
}

/// The cancellation points of one crate.
#[derive(Default)]
struct Points {
    operations: BTreeSet<String>,
    visited: usize,
}

/// Runs the tests and returns what they reported; a failed test, or a crate without one, is an error.
pub(crate) fn run(workspace: &Workspace, scope: &Scope) -> Result<Tally, Failure> {
    let written = Written::fresh(workspace)?;
    let mut tally = Tally::default();
    let succeeded = match scope {
        Scope::Tests(databases) => whole(databases, &written, "--tests", &mut tally),
        Scope::Doctests(databases) => whole(databases, &written, "--doc", &mut tally),
        Scope::Crates { names, arguments, campaign, sqlx } => {
            let chosen =
                Chosen { packages: select(workspace, names)?, arguments, campaign: *campaign, sqlx: sqlx.as_ref() };
            chosen.run(&written, &mut tally)
        }
    }?;
    let published = fs::read_to_string(&written.points).unwrap_or_default();
    tally.dropped = written.dropped()?;
    tally.read_points(&published);
    tally.read_campaigns(&published);
    tally.settle("");
    if !succeeded || tally.failed > 0 {
        // Only the violations: the other lines would look as if all were well.
        tally.campaigns.retain(|_, visited| visited.violations > 0);
        print!("{}{}", campaigns(&tally), tally.said);
        return Err(tally.failure(workspace));
    }
    tally.require_something(workspace, scope)?;
    Ok(tally)
}

/// One run over all packages, so that tests, doctests and examples share one build of the dependencies: a run for each
/// package would select different features of tokio and sqlx each time, and build them again.
fn whole(databases: &Databases, written: &Written, what: &str, tally: &mut Tally) -> Result<bool, Failure> {
    let tests = || cargo(["test", "--workspace", "--exclude", BENCHES, "--all-features", what]);
    if what == "--tests" {
        // Built separately, because a linker may be silent for longer than a test may. Doctests are built as they run.
        tests().arg("--no-run").run()?;
        missing::see_to_tools();
    }
    let run = side_by_side(tests());
    written.tell(databases.tell(run)).run_lines(|line| tally.read(line))
}

/// Runs twice as many tests at a time as there are processors, unless the user has chosen a number: most tests mostly
/// wait for a server or a timer.
fn side_by_side(tests: Cargo) -> Cargo {
    const THREADS: &str = "RUST_TEST_THREADS";
    match (env::var_os(THREADS), available_parallelism()) {
        (None, Ok(processors)) => tests.env(THREADS, (processors.get() * 2).to_string()),
        _ => tests,
    }
}

/// The chosen crates, and how their tests run.
struct Chosen<'a> {
    packages: Vec<&'a Package>,
    arguments: &'a [String],
    campaign: Campaign,
    sqlx: Option<&'a OtherSqlx>,
}

impl Chosen<'_> {
    fn run(&self, written: &Written, tally: &mut Tally) -> Result<bool, Failure> {
        self.tests().arg("--no-run").run()?;
        if let Some(sqlx) = self.sqlx {
            sqlx.was_used()?;
        }
        let mut run = written.tell(side_by_side(self.tests()));
        if let Campaign::Full = self.campaign {
            run = run.env("CANCEL_SAFE_CAMPAIGN", "full");
        }
        if self.has_some_of(&ON_FAULTS) {
            missing::see_to_tools();
        }
        let wanted = Wanted {
            postgres: self.has_some_of(&ON_POSTGRES),
            mysql: self.has_some_of(&ON_MYSQL),
            pgbouncer: self.has_some_of(&ON_PGBOUNCER),
        };
        // Kept until the tests have ended.
        let databases = Databases::for_tests(wanted)?;
        databases.tell(run).arg("--").args(self.arguments).run_lines(|line| tally.read(line))
    }

    fn tests(&self) -> Cargo {
        let selected = self.packages.iter().flat_map(|package| ["--package", &package.name]);
        let tests = cargo(["test", "--all-features"]).args(selected);
        match self.sqlx {
            Some(sqlx) => sqlx.tell(tests),
            None => tests,
        }
    }

    fn has_some_of(&self, crates: &[&str]) -> bool {
        self.packages.iter().any(|package| crates.contains(&package.short_name()))
    }
}

fn select<'a>(workspace: &'a Workspace, names: &[String]) -> Result<Vec<&'a Package>, Failure> {
    if names.is_empty() {
        return Ok(workspace
            .packages
            .iter()
            .filter(|package| ![BENCHES, OPERATIONS].contains(&package.name.as_str()))
            .collect());
    }
    names.iter().map(|name| workspace.find(name).map_err(Failure::from)).collect()
}

impl Tally {
    /// Adds the counts of another part of the same run.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        for (name, tests) in other.by_crate {
            *self.by_crate.entry(name).or_default() += tests;
        }
        for (name, points) in other.points {
            let sum = self.points.entry(name).or_default();
            sum.operations.extend(points.operations);
            sum.visited += points.visited;
        }
        self.dropped.add(other.dropped);
        self.campaigns.extend(other.campaigns);
        self.not_run.extend(other.not_run);
    }

    /// Adds something that could not be run, other than a test, and why.
    pub(crate) fn could_not(&mut self, what: &str) {
        self.not_run.insert(what.to_owned());
    }

    /// Closes the count of the binary that was running, when cargo announces the next one or there is none.
    fn settle(&mut self, next: &str) {
        let ended = std::mem::replace(&mut self.announced, next.to_owned());
        let unreported = std::mem::take(&mut self.unreported);
        if unreported != 0 {
            self.disagreed.get_or_insert((ended, unreported));
        }
    }

    /// Reads one line of cargo's output.
    fn read(&mut self, line: &str) {
        self.said.read(line);
        let line = line.trim();
        if line.starts_with("Doc-tests ") || line.starts_with("Running ") {
            self.settle(line);
        }
        if let Some(library) = line.strip_prefix("Doc-tests ") {
            self.current = library.to_owned();
        } else if line.starts_with("Running unittests src/bin/") {
            // A program of the library whose tests are running.
        } else if let Some(path) = line.strip_prefix("Running unittests ") {
            // Each package's unit tests run before its integration binaries, which do not name the package.
            let binary = path.rsplit(['/', '\\']).next().unwrap_or(path);
            if let Some((library, _)) = binary.rsplit_once('-') {
                self.current = library.to_owned();
            }
        } else if let Some(counts) = line.strip_prefix("test result: ") {
            let (passed, failed) = (count(counts, "passed"), count(counts, "failed"));
            self.passed += passed;
            self.failed += failed;
            self.unreported -= (passed + failed + count(counts, "ignored") + count(counts, "measured")).cast_signed();
            *self.by_crate.entry(self.current.clone()).or_default() += passed;
        } else if let Some(number) = line.strip_prefix("running ").and_then(|rest| rest.split_once(" test")) {
            self.unreported += number.0.parse().unwrap_or(0);
        } else if let Some(rest) = line.strip_prefix("error: test failed, to rerun pass `") {
            self.rerun = Some(rest.trim_end_matches('`').to_owned());
        } else if let Some(rest) = line.strip_prefix("error: doctest failed, to rerun pass `") {
            self.rerun = Some(rest.trim_end_matches('`').to_owned());
        }
    }

    /// Reads the lines `cancel-points <crate> <operation> <points>`.
    fn read_points(&mut self, text: &str) {
        for line in text.lines() {
            let mut words = line.split_whitespace();
            if words.next() != Some("cancel-points") {
                continue;
            }
            let Some(name) = words.next() else { continue };
            let rest: Vec<_> = words.collect();
            let Some((visited, operation)) = rest.split_last() else { continue };
            let points = self.points.entry(short(name).to_owned()).or_default();
            points.operations.insert(operation.join(" "));
            points.visited += visited.parse::<usize>().unwrap_or(0);
        }
    }

    /// Reads the lines `campaign <crate> <name> <points> <violations>` and `not-run <crate> <what>: <why>`.
    fn read_campaigns(&mut self, text: &str) {
        for line in text.lines() {
            if let Some(what) = line.strip_prefix("not-run ") {
                self.not_run.insert(what.to_owned());
            } else if let Some(campaign) = line.strip_prefix("campaign ")
                && let [krate, name, points, violations] = campaign.split_whitespace().collect::<Vec<_>>()[..]
                && let (Ok(points), Ok(violations)) = (points.parse::<usize>(), violations.parse::<usize>())
            {
                let sum = self.campaigns.entry(format!("{krate} {name}")).or_default();
                sum.points += points;
                sum.violations += violations;
            }
        }
    }

    /// Fails if nothing was tested: a run without tests has not passed.
    fn require_something(&self, workspace: &Workspace, scope: &Scope) -> Result<(), Failure> {
        if let Some((binary, unreported)) = &self.disagreed {
            return Err(Failure::from(format!(
                "a test binary announced {unreported:+} tests more than it reported on ({binary}): \
                 it ended early with success, or a child process of a test prints to the same output"
            )));
        }
        if matches!(scope, Scope::Crates { arguments, .. } if !arguments.is_empty()) {
            return if self.passed > 0 { Ok(()) } else { Err("no test matches".to_owned().into()) };
        }
        let required: Vec<&Package> = match scope {
            Scope::Tests(_) => select(workspace, &[])?,
            Scope::Crates { names, .. } => select(workspace, names)?,
            Scope::Doctests(_) => workspace.crates().collect(),
        };
        for package in required {
            let repeat = format!("cargo xtask test {}", package.short_name());
            if self.by_crate.get(&package.name.replace('-', "_")).is_none_or(|&tests| tests == 0) {
                return Err(Failure::from(format!("no test of {} ran", package.name)).repeat_with(repeat));
            }
            let explores = package.directory().join("tests/it/cancel.rs").exists();
            if explores && !matches!(scope, Scope::Doctests(_)) && !self.points.contains_key(package.short_name()) {
                let what = format!("tests/it/cancel.rs of {} published no cancellation points", package.name);
                return Err(Failure::from(what).repeat_with(repeat));
            }
        }
        Ok(())
    }

    fn failure(&self, workspace: &Workspace) -> Failure {
        let Some(rerun) = &self.rerun else {
            return Failure::from("the tests could not be built or run".to_owned());
        };
        let mut words = rerun.split_whitespace().skip_while(|&word| word != "-p");
        match words.nth(1).map(|name| workspace.find(name)) {
            Some(Ok(package)) => Failure::from(format!("a test of {} failed ({rerun})", package.name))
                .repeat_with(format!("cargo xtask test {}", package.short_name())),
            _ => Failure::from(format!("a test failed ({rerun})")),
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        match self.not_run.len() {
            0 => Ok(()),
            count => write!(f, ", {count} not run"),
        }
    }
}

/// The table of what was tested, crate by crate; `dropped` counts the awaits of a crate that some test has dropped.
pub(crate) fn table(workspace: &Workspace, tally: &Tally) -> Result<String, Failure> {
    let mut text =
        format!("\n{:<18}{:>8}{:>12}{:>8}{:>8}{:>9}\n", "crate", "tests", "operations", "points", "awaits", "dropped");
    let mut row = |name: &str, [tests, operations, points, awaits, dropped]: [usize; 5]| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<18}{tests:>8}{operations:>12}{points:>8}{awaits:>8}{dropped:>9}");
    };
    let by_crate = awaits::figures(workspace, &tally.dropped)?;
    let mut total = [0; 5];
    for package in &workspace.packages {
        let Some(&tests) = tally.by_crate.get(&package.name.replace('-', "_")) else { continue };
        let points = tally.points.get(package.short_name());
        let (operations, visited) = points.map_or((0, 0), |points| (points.operations.len(), points.visited));
        let [awaits, dropped] = by_crate.get(package.short_name()).copied().unwrap_or_default();
        let here = [tests, operations, visited, awaits, dropped];
        row(package.short_name(), here);
        total.iter_mut().zip(here).for_each(|(sum, number)| *sum += number);
    }
    total[0] = tally.passed;
    row("total", total);
    text.push_str(&campaigns(tally));
    text.push('\n');
    Ok(text)
}

/// The table of what the campaigns visited, and what was not run; empty if there were none.
fn campaigns(tally: &Tally) -> String {
    let mut text = String::new();
    if !tally.campaigns.is_empty() {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "\n{:<60}{:>8}{:>12}", "campaign", "points", "violations");
    }
    for (name, visited) in &tally.campaigns {
        let _ = writeln!(text, "{name:<60}{:>8}{:>12}", visited.points, visited.violations);
    }
    if !tally.not_run.is_empty() {
        let _ = writeln!(text, "\nnot run");
    }
    for what in &tally.not_run {
        let _ = writeln!(text, "{what}");
    }
    text
}

/// A crate's directory name, whichever of its names was given.
fn short(name: &str) -> &str {
    name.strip_prefix("cancel-safe-").unwrap_or(name)
}

/// The number before `word` in `ok. 3 passed; 0 failed; …`.
fn count(counts: &str, word: &str) -> usize {
    let mut words = counts.split([' ', ';', '.']).filter(|part| !part.is_empty());
    let mut previous = words.next();
    for part in words {
        if part == word {
            return previous.and_then(|number| number.parse().ok()).unwrap_or(0);
        }
        previous = Some(part);
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> Tally {
        let mut tally = Tally::default();
        lines.iter().for_each(|line| tally.read(line));
        tally
    }

    #[test]
    fn counts_are_summed_over_binaries_and_given_to_their_crate() {
        let mut tally = read(&[
            "     Running unittests src/lib.rs (target/debug/deps/cancel_safe_guard-0123abcd)",
            "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            "     Running unittests src/bin/guard.rs (target/debug/deps/guard-0123abcd)",
            "test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "     Running tests/it/main.rs (target/debug/deps/it-0123abcd)",
            "test result: FAILED. 40 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            "error: test failed, to rerun pass `-p cancel-safe-guard --test it`",
            "   Doc-tests cancel_safe_testing",
            "test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s",
        ]);
        assert_eq!(tally.to_string(), "48 passed, 2 failed");
        tally.could_not("the book: mdbook is missing");
        assert_eq!(tally.to_string(), "48 passed, 2 failed, 1 not run");
        assert_eq!(tally.by_crate["cancel_safe_guard"], 43);
        assert_eq!(tally.by_crate["cancel_safe_testing"], 5);
        let failure = tally.failure(&Workspace::load().unwrap());
        assert_eq!(failure.repeat.unwrap(), "cargo xtask test guard");
    }

    #[test]
    fn points_are_summed_and_an_operation_explored_twice_is_one_operation() {
        let mut tally = Tally::default();
        tally.read_points(
            "cancel-points guard shield 7\nnoise\ncancel-points cancel-safe-guard shield 3\ncancel-points guard a b 1\n",
        );
        assert_eq!(tally.points["guard"].operations.len(), 2);
        assert_eq!(tally.points["guard"].visited, 11);
    }

    #[test]
    fn campaigns_and_what_was_not_run_are_in_the_table() {
        let mut tally = Tally::default();
        tally.read_campaigns(
            "campaign atomic-fs write/faults 12 0\ncancel-points guard shield 7\ncampaign atomic-fs write/faults 3 1\n\
             not-run atomic-fs write/power-cuts-xfs: mkfs.xfs cannot be run\ncampaign of another kind\n",
        );
        assert_eq!(tally.campaigns["atomic-fs write/faults"], Visited { points: 15, violations: 1 });
        let text = campaigns(&tally);
        assert!(text.contains("not run\natomic-fs write/power-cuts-xfs: mkfs.xfs cannot be run\n"), "{text}");
        assert_eq!(tally.campaigns.len(), 1, "{text}");
        assert!(text.contains("campaign ") && text.contains("15           1\n"), "{text}");
    }

    #[test]
    fn a_binary_that_ends_early_with_success_has_not_passed() {
        let workspace = Workspace::load().unwrap();
        let scope = Scope::Crates {
            names: vec!["guard".to_owned()],
            arguments: vec!["any".to_owned()],
            campaign: Campaign::Quick,
            sqlx: None,
        };
        let closing = "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 9 filtered out; finished in 0.01s";
        let ends = |lines: &[&str]| {
            let mut tally = read(lines);
            tally.settle("");
            tally.require_something(&workspace, &scope)
        };
        assert!(ends(&["running 4 tests", closing]).is_ok());
        let binary = "     Running tests/it/main.rs (target/debug/deps/it-0123abcd)";
        for after in [&[][..], &["     Running tests/other.rs (other)", "running 0 tests", closing]] {
            let lines = [&["running 4 tests", closing, binary, "running 1 test"], after].concat();
            let failure = ends(&lines).unwrap_err().what;
            assert!(failure.contains("+1 tests") && failure.contains("it-0123abcd"), "{failure}");
        }
    }

    #[test]
    fn a_run_without_tests_has_not_passed() {
        let workspace = Workspace::load().unwrap();
        let names = vec!["guard".to_owned()];
        let scope = Scope::Crates { names, arguments: Vec::new(), campaign: Campaign::Quick, sqlx: None };
        let empty = read(&[
            "     Running unittests src/lib.rs (target/debug/deps/cancel_safe_guard-0123abcd)",
            "test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s",
        ]);
        assert!(empty.require_something(&workspace, &scope).unwrap_err().what.contains("no test of cancel-safe-guard"));
        let arguments = vec!["nothing".to_owned()];
        let filtered = Scope::Crates { names: Vec::new(), arguments, campaign: Campaign::Quick, sqlx: None };
        assert_eq!(empty.require_something(&workspace, &filtered).unwrap_err().what, "no test matches");
    }
}
