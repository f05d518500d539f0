//! The coverage, and the list of awaits, as text for people, as JSON and as LCOV.
//!
//! Invariant: every form shows the same figures; the text and JSON forms also list what could not be attributed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use crate::coverage::{Coverage, Figures, Package};
use crate::place::{Await, AwaitKind, Position};

/// The path as a person at the root of the workspace writes it.
#[must_use]
pub fn shown(path: &Path, root: &Path) -> String {
    let root = std::fs::canonicalize(root).unwrap_or_else(|_| root.to_owned());
    path.strip_prefix(root).unwrap_or(path).display().to_string().replace('\\', "/")
}

/// The whole path, without the prefix that Windows puts before resolved paths, which few tools understand.
fn whole(path: &Path) -> String {
    let path = path.display().to_string();
    path.strip_prefix(r"\\?\").map(str::to_owned).unwrap_or(path)
}

/// The table of the files that have awaits, with the total.
#[must_use]
pub fn table(coverage: &Coverage, root: &Path) -> String {
    let files = coverage.packages().iter().flat_map(Package::files);
    let rows: Vec<(String, Figures)> = files
        .filter(|counted| counted.figures().awaits > 0)
        .map(|counted| (shown(counted.path(), root), counted.figures()))
        .chain([("total".to_owned(), coverage.figures())])
        .collect();
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or_default();
    let mut text = format!("{:<width$}{:>9}{:>9}{:>9}{:>10}\n", "file", "awaits", "dropped", "never", "share");
    for (name, figures) in rows {
        let (awaits, dropped) = (figures.awaits, figures.dropped);
        let never = awaits - dropped;
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<width$}{awaits:>9}{dropped:>9}{never:>9}{:>9}%", share(figures.percent()));
    }
    text
}

/// The lines of the awaits that were never dropped, and of what could not be attributed; empty if there are none.
#[must_use]
pub fn never_dropped(coverage: &Coverage, root: &Path) -> String {
    let mut lines = Vec::new();
    for counted in coverage.packages().iter().flat_map(Package::files) {
        let path = shown(counted.path(), root);
        for (found, _) in counted.awaits().filter(|(_, drops)| *drops == 0) {
            let Position { line, .. } = found.position;
            // The column tells apart those that share a line.
            let is_shared = counted.awaits().filter(|(other, _)| other.position.line == line).count() > 1;
            let at = if is_shared { found.position.to_string() } else { line.to_string() };
            lines.push((format!("{path}:{at}"), place(found)));
        }
    }
    let mut text = section("never dropped", lines);
    let unattributed = coverage.unattributed().iter();
    let lines = unattributed.map(|it| (format!("{}:{}", shown(&it.path, root), it.position), it.reason.to_string()));
    text.push_str(&section("recorded, and cannot be attributed", lines.collect()));
    text
}

/// All awaits, one a line.
#[must_use]
pub fn list(coverage: &Coverage, root: &Path) -> String {
    let mut lines = Vec::new();
    for counted in coverage.packages().iter().flat_map(Package::files) {
        let path = shown(counted.path(), root);
        lines.extend(counted.awaits().map(|(found, _)| {
            let public = if found.public { "pub " } else { "" };
            (format!("{path}:{}", found.position), format!("{public}{}", place(found)))
        }));
    }
    columns(&lines, "")
}

/// `Type::name`, and the macro's name if the await is a macro.
fn place(found: &Await) -> String {
    let function = if found.function.is_empty() { "(no function)" } else { &found.function };
    match &found.kind {
        AwaitKind::Await => function.to_owned(),
        kind => format!("{function} ({kind})"),
    }
}

fn section(title: &str, lines: Vec<(String, String)>) -> String {
    if lines.is_empty() { String::new() } else { format!("\n{title}:\n{}", columns(&lines, "  ")) }
}

fn columns(lines: &[(String, String)], indent: &str) -> String {
    let width = lines.iter().map(|(left, _)| left.chars().count()).max().unwrap_or_default();
    lines.iter().map(|(left, right)| format!("{indent}{left:<width$}  {right}\n")).collect()
}

/// Rounded down to a tenth, so that only a full share is 100.0.
#[must_use]
pub fn share(percent: f64) -> String {
    format!("{:.1}", (percent * 10.0).floor() / 10.0)
}

/// The coverage for machines.
#[must_use]
pub fn json(coverage: &Coverage, malformed: u64) -> Value {
    let figures = coverage.figures();
    let unattributed = coverage.unattributed().iter().map(|it| {
        json!({
            "path": whole(&it.path),
            "line": it.position.line,
            "column": it.position.column,
            "drops": it.drops,
            "reason": it.reason.name(),
        })
    });
    json!({
        "packages": packages(coverage, true),
        "awaits": figures.awaits,
        "dropped": figures.dropped,
        "percent": figures.percent(),
        "unattributed": unattributed.collect::<Vec<_>>(),
        "malformed_lines": malformed,
    })
}

/// The list of awaits for machines.
#[must_use]
pub fn list_json(coverage: &Coverage) -> Value {
    json!({ "packages": packages(coverage, false), "awaits": coverage.figures().awaits })
}

fn packages(coverage: &Coverage, with_drops: bool) -> Vec<Value> {
    let one = |(found, drops): (&Await, u64)| {
        let mut value = json!({
            "line": found.position.line,
            "column": found.position.column,
            "kind": found.kind.to_string(),
            "function": found.function,
            "public": found.public,
        });
        if with_drops {
            value["drops"] = drops.into();
        }
        value
    };
    let package = |package: &Package| {
        let files = package.files().iter().filter(|counted| counted.figures().awaits > 0);
        let files = files.map(|counted| {
            let awaits: Vec<Value> = counted.awaits().map(one).collect();
            json!({ "path": whole(counted.path()), "awaits": awaits })
        });
        let mut value = json!({ "name": package.name(), "files": files.collect::<Vec<_>>() });
        value["awaits"] = package.figures().awaits.into();
        if with_drops {
            value["dropped"] = package.figures().dropped.into();
        }
        value
    };
    coverage.packages().iter().map(package).collect()
}

/// The coverage in the format of lcov. A line that has several awaits is covered when all of them were dropped: its
/// count is the lowest of theirs.
#[must_use]
pub fn lcov(coverage: &Coverage) -> String {
    let mut text = String::new();
    for counted in coverage.packages().iter().flat_map(Package::files) {
        let mut lines: BTreeMap<u32, u64> = BTreeMap::new();
        for (found, drops) in counted.awaits() {
            let least = lines.entry(found.position.line).or_insert(drops);
            *least = drops.min(*least);
        }
        if lines.is_empty() {
            continue;
        }
        let hit = lines.values().filter(|&&drops| drops > 0).count();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "SF:{}", whole(counted.path()));
        for (line, drops) in &lines {
            let _ = writeln!(text, "DA:{line},{drops}");
        }
        let _ = writeln!(text, "LF:{}\nLH:{hit}\nend_of_record", lines.len());
    }
    text
}
