//! The house rules that a compiler does not know. This room walks the tree; `source` reads one Rust file, `package` one
//! crate, `circles` the imports between a crate's files, `prose` the code on pages, `tutorial` the page of the
//! tutorial's names.
//!
//! Invariant: every rule has a broken sample in the tests beside it, so a rule that stops working is noticed; and every
//! finding says where it is and what to do.

mod circles;
mod package;
mod prose;
mod settings;
mod source;
mod tutorial;

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use crate::command::Failure;
use crate::workspace::{self, EXAMPLES, Package, UMBRELLA, Workspace};
use crate::{examples, operations};

/// One breach of a rule.
#[derive(Debug)]
pub(crate) struct Finding {
    path: PathBuf,
    line: usize,
    rule: &'static str,
    fix: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}: {}", self.path.display(), self.line, self.rule, self.fix)
    }
}

/// Checks the whole tree and prints every finding.
pub(crate) fn run(workspace: &Workspace) -> Result<(), Failure> {
    let mut findings = Vec::new();
    let mut files = 0;
    for package in &workspace.packages {
        files += sources(package, &mut findings)?;
    }
    for package in workspace.crates() {
        package::check(package, &mut findings);
    }
    package::check_umbrella(workspace, &mut findings)?;
    pages(workspace, &mut findings)?;
    for package in workspace.libraries() {
        let path = shown(&package.directory().join("README.md"));
        let finding = |fix| Finding { path: path.clone(), line: 1, rule: "examples", fix };
        findings.extend(examples::faults(package)?.into_iter().map(finding));
    }
    findings.extend(tutorial::check()?);
    findings.extend(operations::check()?.into_iter().map(|fix| Finding {
        path: operations::PAGE.into(),
        line: 1,
        rule: "operations",
        fix,
    }));
    findings.sort_by(|a, b| (&a.path, a.line).cmp(&(&b.path, b.line)));
    for finding in &findings {
        println!("{finding}");
    }
    if findings.is_empty() {
        println!("{files} Rust files in {} packages keep the house rules", workspace.packages.len());
        return Ok(());
    }
    let what = format!("{} breaches of the house rules (CONTRIBUTING.md gives their reasons)", findings.len());
    Err(Failure::from(what).repeat_with("cargo xtask tidy"))
}

/// Checks the READMEs of the crates, the front page and the book: the code they show, and that a doctest compiles it.
fn pages(workspace: &Workspace, findings: &mut Vec<Finding>) -> Result<(), String> {
    let library = |package: &Package| read(&package.directory().join("src/lib.rs"));
    // Each page, the library whose doctests read it, and the path by which they do.
    let mut pages = Vec::new();
    for package in workspace.libraries() {
        pages.push((package.directory().join("README.md"), library(package)?, "../README.md".to_owned()));
    }
    let examples = library(workspace.find(EXAMPLES)?)?;
    let mut page =
        |name: String| pages.push((workspace::root().join(&name), examples.clone(), format!("../../{name}")));
    page("README.md".to_owned());
    page(format!("crates/{UMBRELLA}/README.md"));
    let book = workspace::root().join("docs/src");
    let broken = |error: std::io::Error| format!("{}: {error}", book.display());
    for entry in fs::read_dir(&book).map_err(broken)? {
        let path = entry.map_err(broken)?.path();
        if let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|name| name.ends_with(".md")) {
            page(format!("docs/src/{name}"));
        }
    }
    for (path, library, include) in pages {
        let text = read(&path)?;
        findings.extend(prose::page(&shown(&path), &text));
        let beside = |file: &str| fs::read_to_string(path.with_file_name(file)).ok();
        findings.extend(prose::included(&shown(&path), &text, beside));
        findings.extend(prose::compiled(&shown(&path), &text, &library, &include));
    }
    Ok(())
}

/// Checks the Rust files of one package and returns how many there are.
fn sources(package: &Package, findings: &mut Vec<Finding>) -> Result<usize, String> {
    let mut paths = Vec::new();
    rust_files(package.directory(), &mut paths)?;
    let library = package.directory().join("src");
    let published = package.directory().parent().is_some_and(|up| up.ends_with("crates"));
    let mut parsed = Vec::new();
    for path in paths {
        let text = read(&path)?;
        let shown = shown(&path);
        match syn::parse_file(&text) {
            Ok(file) => parsed.push((path, text, file)),
            Err(error) => findings.push(Finding {
                path: shown,
                line: error.span().start().line,
                rule: "syntax",
                fix: format!("make it parse: {error}"),
            }),
        }
    }
    // A type counts as a future wherever in the crate it implements `Future`.
    let in_library = |path: &Path| published && path.starts_with(&library);
    let futures: HashSet<String> = parsed
        .iter()
        .filter(|(path, ..)| in_library(path))
        .flat_map(|(_, _, file)| source::future_types(file))
        .collect();
    let page = read(&workspace::root().join(settings::PAGE))?;
    for (path, text, file) in &parsed {
        let mut breaches = source::everywhere(text);
        if in_library(path) {
            let settings = settings::of(file);
            findings.extend(settings.iter().flat_map(|it| it.check(&shown(path), &page, package.short_name())));
            breaches.extend(source::in_library(text, file, &futures));
            findings.extend(prose::comments(&shown(path), text));
        }
        findings.extend(breaches.into_iter().map(|breach| breach.at(&shown(path))));
    }
    if published {
        let mut imports = circles::Imports::default();
        for (path, text, _) in &parsed {
            if let Some(room) = room(path, &library) {
                imports.read(&room, text);
            }
        }
        findings.extend(imports.check().into_iter().map(|fix| Finding {
            path: shown(&library),
            line: 1,
            rule: "circle",
            fix,
        }));
    }
    Ok(parsed.len())
}

/// The top-level module to which a file belongs; `None` for the front page, which re-exports from all, and for tests.
fn room(path: &Path, library: &Path) -> Option<String> {
    let inside = path.strip_prefix(library).ok()?.with_extension("");
    let room = inside.iter().next()?.to_str()?;
    let is_room = !matches!(room, "lib" | "main") && !inside.ends_with("tests");
    is_room.then(|| room.to_owned())
}

fn rust_files(directory: &Path, found: &mut Vec<PathBuf>) -> Result<(), String> {
    let broken = |error: std::io::Error| format!("{}: {error}", directory.display());
    for entry in fs::read_dir(directory).map_err(broken)? {
        let path = entry.map_err(broken)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                rust_files(&path, found)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// The path as a person at the workspace root writes it.
fn shown(path: &Path) -> PathBuf {
    path.strip_prefix(workspace::root()).unwrap_or(path).to_owned()
}
