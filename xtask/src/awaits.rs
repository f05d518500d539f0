//! Which awaits of our crates the tests have dropped: the same figures that `cargo cancel-safe test` gives any user.
//!
//! Invariant: all awaits of a crate are counted, from its source; an await counts as dropped if an exploration recorded
//! it, in any part of a run.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use cargo_cancel_safe::{COVERAGE_VARIABLE, Coverage, PackageCoverage, Record, Selection, report};

use crate::command::{Cargo, Failure};
use crate::workspace::{self, Package, Workspace};

/// The files in which the tests of one run record what they have visited.
pub(crate) struct Written {
    pub(crate) points: PathBuf,
    awaits: PathBuf,
}

impl Written {
    /// Creates both, empty.
    pub(crate) fn fresh(workspace: &Workspace) -> Result<Self, Failure> {
        let directory = workspace.target_directory.join("xtask");
        let clear = |name: &str| {
            let path = directory.join(name);
            fs::create_dir_all(&directory)
                .and_then(|()| fs::write(&path, ""))
                .map_err(|error| Failure::from(format!("{} cannot be written: {error}", path.display())))?;
            Ok::<_, Failure>(path)
        };
        Ok(Self { points: clear("cancel-points.txt")?, awaits: clear("await-coverage.txt")? })
    }

    /// Tells the tests of a run of cargo where to write.
    pub(crate) fn tell(&self, run: Cargo) -> Cargo {
        run.env("CANCEL_SAFE_POINTS_FILE", &self.points).env(COVERAGE_VARIABLE, &self.awaits)
    }

    /// The awaits that the run has dropped.
    pub(crate) fn dropped(&self) -> Result<Record, Failure> {
        read(&self.awaits)
    }
}

/// The file with everything that the last test run has dropped, in all its parts.
fn record_of_last(workspace: &Workspace) -> PathBuf {
    workspace.target_directory.join("xtask").join("awaits.txt")
}

fn failed(error: &cargo_cancel_safe::Error) -> Failure {
    Failure::from(error.to_string())
}

fn read(path: &Path) -> Result<Record, Failure> {
    Record::read(path).map_err(|error| failed(&error))
}

/// How many awaits our crates have, by directory, and how many of them were dropped. The record is kept for [`tell`].
pub(crate) fn figures(workspace: &Workspace, record: &Record) -> Result<BTreeMap<String, [usize; 2]>, Failure> {
    record.write(&record_of_last(workspace)).map_err(|error| failed(&error))?;
    let coverage = coverage(&workspace.crates().collect::<Vec<_>>(), record)?;
    let named = |package: &PackageCoverage| {
        let short = workspace.find(package.name()).map_or(package.name(), Package::short_name);
        let figures = package.figures();
        (short.to_owned(), [figures.awaits, figures.dropped])
    };
    Ok(coverage.packages().iter().map(named).collect())
}

/// Prints which awaits of the named crates, or of all, the last test run has never dropped.
pub(crate) fn tell(workspace: &Workspace, names: &[String]) -> Result<(), Failure> {
    let path = record_of_last(workspace);
    if !path.exists() {
        return Err(Failure::from("no test has run yet".to_owned()).repeat_with("cargo xtask test"));
    }
    let chosen = match names {
        [] => workspace.crates().collect(),
        names => names.iter().map(|name| workspace.find(name)).collect::<Result<Vec<_>, _>>()?,
    };
    let coverage = coverage(&chosen, &read(&path)?)?;
    print!("{}{}", report::table(&coverage, workspace::root()), report::never_dropped(&coverage, workspace::root()));
    Ok(())
}

fn coverage(packages: &[&Package], record: &Record) -> Result<Coverage, Failure> {
    let mut selection = Selection::default();
    selection.packages = packages.iter().map(|package| package.name.clone()).collect();
    selection.metadata = vec!["--manifest-path".into(), workspace::root().join("Cargo.toml").into()];
    let scan = || -> Result<Vec<_>, cargo_cancel_safe::Error> {
        let all = cargo_cancel_safe::Workspace::load(&selection)?;
        let chosen = all.choose(&selection)?;
        chosen.into_iter().map(|package| Ok((package.name().to_owned(), package.scan()?))).collect()
    };
    let scanned = scan().map_err(|error| failed(&error))?;
    Ok(Coverage::new(scanned, record, workspace::root()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_crate_has_its_awaits_and_what_was_dropped_is_its_own() {
        let workspace = Workspace::load().unwrap();
        let all: Vec<&Package> = workspace.crates().collect();
        let guard = workspace.find("guard").unwrap();
        let scanned = coverage(&all, &Record::default()).unwrap();
        assert_eq!(scanned.packages().len(), all.len());
        let of_guard = scanned.packages().iter().find(|package| package.name() == guard.name).unwrap();
        let file = of_guard.files().iter().find(|counted| counted.figures().awaits > 0).unwrap();
        let (first, _) = file.awaits().next().unwrap();

        let path = std::env::temp_dir().join(format!("cancel-safe-awaits-{}", std::process::id()));
        let (line, column) = (first.position.line, first.position.column);
        fs::write(&path, format!("await\t{}\t{line}\t{column}\n", file.path().display())).unwrap();
        let record = read(&path);
        fs::remove_file(&path).unwrap();
        let dropped = coverage(&all, &record.unwrap()).unwrap();
        let by_crate = dropped.packages().iter().map(|package| (package.name(), package.figures().dropped));
        assert!(
            by_crate.eq(all.iter().map(|package| (package.name.as_str(), usize::from(package.name == guard.name))))
        );
    }
}
