//! What every change must pass, section by section.
//!
//! Invariant: each section builds with the same features as its neighbours, so that nothing is compiled twice: clippy
//! has its own dependencies, but examples, tests and doctests share theirs. `RUSTFLAGS` is never set, because another
//! value would compile everything again. The checks for other systems have their own directory.

use std::time::{Duration, Instant};

use clap::ValueEnum;

use crate::command::{Cargo, Failure, cargo};
use crate::databases::{Databases, Wanted};
use crate::doc::{self, NO_MDBOOK};
use crate::suite::{self, Scope, Tally};
use crate::tarballs::Tarball;
use crate::workspace::{BENCHES, OPERATIONS, Workspace};
use crate::{examples, foreign, operations, outside, tarballs, tidy};

/// A part of `cargo xtask ci`.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Section {
    /// The code is formatted
    Format,
    /// The house rules hold
    Tidy,
    /// No lint complains
    Clippy,
    /// The examples build, and show what they promise
    Examples,
    /// Unit and integration tests pass
    Tests,
    /// The examples in the documentation run
    Doctests,
    /// The tarballs of the crates hold what they need
    Tarballs,
    /// The documentation builds without a warning, and the book's reports are up to date
    Docs,
    /// Each crate compiles with each of its features alone, and with none
    Features,
    /// The READMEs' projects compile outside the workspace, and an error names anything missing in one
    Outside,
    /// The crates that can be checked from here compile for Windows and macOS
    Foreign,
}

impl Section {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// Runs the given sections, or all; the first failure ends the run.
pub(crate) fn run(workspace: &Workspace, only: &[Section]) -> Result<(), Failure> {
    let sections: Vec<Section> =
        Section::value_variants().iter().copied().filter(|section| only.is_empty() || only.contains(section)).collect();
    if sections.iter().any(|section| matches!(section, Section::Tests | Section::Doctests)) {
        Wanted::ALL.can_be_had()?;
    }
    let mut run = Run { workspace, databases: None, tally: None, tarballs: Vec::new(), has_book: true };
    let mut times = Vec::new();
    for (index, &section) in sections.iter().enumerate() {
        let name = section.name();
        println!("\n==> {name} ({} of {})", index + 1, sections.len());
        let start = Instant::now();
        let result = run.section(section);
        let time = start.elapsed();
        result.map_err(|failure| failure.repeat_with(format!("cargo xtask ci {name}")))?;
        println!("==> {name}: passed in {}", seconds(time));
        times.push((name, time));
    }
    run.finish(&times)
}

struct Run<'a> {
    workspace: &'a Workspace,
    /// Shared by the sections; dropping them stops the servers.
    databases: Option<Databases>,
    tally: Option<Tally>,
    tarballs: Vec<Tarball>,
    /// The book was built, or nobody has asked for it.
    has_book: bool,
}

impl Run<'_> {
    fn section(&mut self, section: Section) -> Result<(), Failure> {
        match section {
            Section::Format => cargo(["fmt", "--all", "--check"]).run().map_err(|failure| Failure {
                what: "the code is not formatted; `cargo fmt --all` formats it".to_owned(),
                ..failure
            }),
            Section::Tidy => tidy::run(self.workspace),
            // The list of features would be half a page, so the command to repeat names the section.
            Section::Clippy => clippy(self.workspace).run().map_err(|_| "clippy complains".to_owned().into()),
            Section::Examples => {
                programs().run()?;
                examples::run(self.workspace)
            }
            Section::Tests => self.suite(Scope::Tests),
            Section::Doctests => self.suite(Scope::Doctests),
            Section::Tarballs => {
                self.tarballs = tarballs::check(self.workspace)?;
                Ok(())
            }
            Section::Docs => {
                doc::rustdoc()?;
                programs().run()?;
                operations::check_patterns(self.workspace)?;
                self.has_book = doc::book()?;
                Ok(())
            }
            Section::Features => features(self.workspace),
            Section::Outside => outside::check(self.workspace),
            Section::Foreign => foreign::run(self.workspace),
        }
    }

    fn suite(&mut self, scope: impl FnOnce(Databases) -> Scope) -> Result<(), Failure> {
        let databases = match self.databases.take() {
            Some(databases) => databases,
            None => Databases::for_tests(Wanted::ALL)?,
        };
        let scope = scope(databases);
        let tally = suite::run(self.workspace, &scope)?;
        if let Scope::Tests(databases) | Scope::Doctests(databases) = scope {
            self.databases = Some(databases);
        }
        match &mut self.tally {
            Some(sum) => sum.add(tally),
            None => self.tally = Some(tally),
        }
        Ok(())
    }

    /// Prints the tables; the total comes last, for readers of one line.
    fn finish(mut self, times: &[(String, Duration)]) -> Result<(), Failure> {
        drop(self.databases);
        match &mut self.tally {
            _ if self.has_book => {}
            Some(tally) => tally.could_not(NO_MDBOOK),
            None => println!("not run: {NO_MDBOOK}"),
        }
        if let Some(tally) = &self.tally {
            print!("{}", suite::table(self.workspace, tally)?);
        }
        if !self.tarballs.is_empty() {
            println!("{:<40}{:>8}", "tarball", "KiB");
            for Tarball { name, size } in &self.tarballs {
                println!("{name:<40}{:>8}", size.div_ceil(1024));
            }
            println!();
        }
        println!("{:<14}{:>8}", "section", "time");
        for (name, time) in times {
            println!("{name:<14}{:>8}", seconds(*time));
        }
        println!("{:<14}{:>8}\n", "total", seconds(times.iter().map(|(_, time)| *time).sum()));
        if let Some(tally) = &self.tally {
            println!("{tally}");
        }
        Ok(())
    }
}

/// The examples, and the program that explores, on the dependencies of the tests.
fn programs() -> Cargo {
    cargo(["build", "--workspace", "--exclude", BENCHES, "--all-features", "--examples", "--bin", OPERATIONS])
}

/// Clippy over every target of every package. The features are named one by one, because `--all-features` would switch
/// on `peers`, and a second run for the benches alone would check all dependencies once more.
fn clippy(workspace: &Workspace) -> Cargo {
    let features: Vec<String> = workspace
        .packages
        .iter()
        .flat_map(|package| package.single_features().map(move |feature| (package, feature)))
        .filter(|(package, feature)| package.name != BENCHES || *feature != "peers")
        .map(|(package, feature)| format!("{}/{feature}", package.name))
        .collect();
    cargo(["clippy", "--workspace", "--all-targets", "--features", &features.join(",")]).args(["--", "-D", "warnings"])
}

/// Features only add: each must compile without the others.
fn features(workspace: &Workspace) -> Result<(), Failure> {
    for package in workspace.crates() {
        let check = || cargo(["check", "--quiet", "--package", &package.name, "--no-default-features"]);
        println!("{}", package.short_name());
        check().run()?;
        for feature in package.single_features() {
            println!("{} with {feature}", package.short_name());
            check().args(["--features", feature]).run()?;
        }
    }
    Ok(())
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clippy_sees_every_feature_but_the_peers_of_the_benches() {
        let workspace = Workspace::load().unwrap();
        let shown = clippy(&workspace).to_string();
        assert!(shown.contains("cancel-safe-tx-guard/postgres"));
        assert!(!shown.contains("peers"));
    }
}
