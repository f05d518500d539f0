//! `cargo cancel-safe test`: runs the tests with coverage on and reports the result.
//!
//! Invariant: tests that fail make the command fail with their exit code, whatever the coverage is.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};

use cargo_cancel_safe::{COVERAGE_VARIABLE, Coverage, Error, Record, Selection, Workspace, cargo, report};

use crate::{FAILED, TestOptions, scan, status};

/// The exit code when fewer awaits were dropped than asked for.
const TOO_FEW: u8 = 1;

pub(crate) fn run(options: &TestOptions) -> Result<ExitCode, Error> {
    let selection = Selection::of_arguments(&options.arguments);
    let workspace = Workspace::load(&selection)?;
    let scanned = scan(&workspace, &selection)?;
    let file = fresh(workspace.target_directory())?;
    let tests = cargo_test(options, &file)?;
    let record = Record::read(&file)?;
    let coverage = Coverage::new(scanned, &record, workspace.root());
    let has_run = tests.success() && !options.arguments.iter().any(|argument| argument == "--no-run");
    warn(&coverage, &record, has_run, &file);
    if record.malformed() == 0 {
        // The file is worth keeping only for debugging.
        remove(&file)?;
    }
    if options.json {
        println!("{:#}", report::json(&coverage, record.malformed()));
    } else {
        print!("\n{}", report::table(&coverage, workspace.root()));
        print!("{}", report::never_dropped(&coverage, workspace.root()));
    }
    if let Some(path) = &options.lcov {
        fs::write(path, report::lcov(&coverage)).map_err(|source| Error::File { path: path.clone(), source })?;
        status("Wrote", &path.display().to_string());
    }
    if !tests.success() {
        eprintln!("error: the tests failed: the awaits are those dropped until then");
        let code = tests.code().and_then(|code| u8::try_from(code).ok());
        return Ok(ExitCode::from(code.unwrap_or(FAILED)));
    }
    Ok(judge(options.fail_under, &coverage))
}

fn judge(fail_under: Option<f64>, coverage: &Coverage) -> ExitCode {
    let figures = coverage.figures();
    match fail_under {
        Some(least) if figures.percent() < least => {
            let (dropped, awaits, share) = (figures.dropped, figures.awaits, report::share(figures.percent()));
            eprintln!(
                "error: {dropped} of {awaits} awaits were dropped ({share}%), and --fail-under asks for {least}%"
            );
            ExitCode::from(TOO_FEW)
        }
        _ => ExitCode::SUCCESS,
    }
}

/// A new, empty file that no other run uses at the same time.
fn fresh(target: &Path) -> Result<PathBuf, Error> {
    let directory = target.join("cancel-safe");
    let broken = |source| Error::File { path: directory.clone(), source };
    fs::create_dir_all(&directory).map_err(broken)?;
    let file = directory.join(format!("coverage-{}.txt", std::process::id()));
    remove(&file)?;
    Ok(file)
}

fn remove(file: &Path) -> Result<(), Error> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::File { path: file.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}

fn cargo_test(options: &TestOptions, file: &Path) -> Result<ExitStatus, Error> {
    let words = options.arguments.iter().map(|argument| argument.to_string_lossy());
    let shown = [String::from("cargo test")].into_iter().chain(words.map(String::from)).collect::<Vec<_>>().join(" ");
    status("Running", &format!("`{shown}`"));
    let mut command = Command::new(cargo());
    command.arg("test").args(&options.arguments).env(COVERAGE_VARIABLE, file);
    if options.json {
        command.stdout(Stdio::from(io::stderr()));
    }
    command.status().map_err(|source| Error::Command { command: shown, source })
}

/// Says why the figures may be lower than they should be.
fn warn(coverage: &Coverage, record: &Record, has_run: bool, file: &Path) {
    if record.malformed() > 0 {
        let lines = record.malformed();
        eprintln!(
            "warning: {lines} lines of {} were not understood and are not counted: they were torn when a process was \
             killed, or a newer cancel-safe-testing wrote them",
            file.display()
        );
    }
    let may_be_empty = !has_run || coverage.figures().awaits == 0;
    if record.is_empty() && !may_be_empty {
        eprintln!(
            "warning: no test used cancel_safe_testing::Explore, so no await was dropped\n  \
             add the crate with `cargo add --dev cancel-safe-testing` and explore an operation in a #[test];\n  \
             if one is explored, it needs a version that knows {COVERAGE_VARIABLE}, and a profile with \
             debug = \"line-tables-only\" or more"
        );
    } else if !coverage.has_record() && !may_be_empty {
        eprintln!(
            "warning: awaits were dropped, but none in the packages that are counted; choose others with -p or \
             --workspace, and do not rename source paths with --remap-path-prefix"
        );
    }
}
