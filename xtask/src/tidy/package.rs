//! The rules for one crate: its files, its changelog, its manifest, and its place in the umbrella.
//!
//! Invariant: a directory, the umbrella's feature and its module bear one name.

use std::collections::BTreeMap;
use std::path::Path;

use syn::spanned::Spanned;
use syn::{Item, UseTree, Visibility};

use super::{Finding, read, shown};
use crate::workspace::{Package, UMBRELLA, Workspace};

/// `Ok`, or the line of a breach and what to do.
type Checked = Result<(), (usize, String)>;

/// Checks what each crate must have.
pub(super) fn check(package: &Package, findings: &mut Vec<Finding>) {
    let directory = package.directory();
    let explores = !matches!(package.short_name(), UMBRELLA | "testing") && !package.is_command();
    findings.extend(missing(directory, explores).map(|(file, why)| Finding {
        path: shown(&directory.join(file)),
        line: 1,
        rule: "missing-file",
        fix: format!("write it: {why}"),
    }));
    let mut text_rule = |file: &str, rule: &'static str, check: &dyn Fn(&str) -> Checked| {
        // A missing file was reported above.
        let Ok(text) = read(&directory.join(file)) else { return };
        if let Err((line, fix)) = check(&text) {
            findings.push(Finding { path: shown(&directory.join(file)), line, rule, fix });
        }
    };
    text_rule("CHANGELOG.md", "changelog", &|text| changelog(text, &package.version));
    text_rule("Cargo.toml", "lints", &lints);
}

/// Checks that the umbrella has an alias for each library, and nothing else.
pub(super) fn check_umbrella(workspace: &Workspace, findings: &mut Vec<Finding>) -> Result<(), String> {
    let umbrella = workspace.find(UMBRELLA)?;
    let names: Vec<&str> = workspace.libraries().map(Package::short_name).collect();
    let manifest = shown(&umbrella.directory().join("Cargo.toml"));
    findings.extend(umbrella_features(&umbrella.features, &names).into_iter().map(|fix| Finding {
        path: manifest.clone(),
        line: 1,
        rule: "umbrella",
        fix,
    }));
    let passed_on = workspace.libraries().flat_map(|library| missing_features(&umbrella.features, library));
    findings.extend(passed_on.map(|fix| Finding { path: manifest.clone(), line: 1, rule: "umbrella", fix }));
    let library = umbrella.directory().join("src/lib.rs");
    findings.extend(umbrella_modules(&read(&library)?, &names).into_iter().map(|(line, fix)| Finding {
        path: shown(&library),
        line,
        rule: "umbrella",
        fix,
    }));
    Ok(())
}

/// The files that a crate lacks, each with its purpose.
fn missing(directory: &Path, explores: bool) -> impl Iterator<Item = (&'static str, &'static str)> + '_ {
    let required = [
        ("README.md", "the problem, an example, the guarantees, and what is not promised"),
        ("CHANGELOG.md", "what each version changed"),
        ("LICENSE-APACHE", "a link to the file at the root, so that it is published with the crate"),
        ("LICENSE-MIT", "a link to the file at the root, so that it is published with the crate"),
        ("tests/it/main.rs", "the one integration test binary"),
    ];
    let explored = ("tests/it/cancel.rs", "every async operation, dropped at every await point");
    let found = move |file: &str| directory.join(file).exists();
    required.into_iter().chain(explores.then_some(explored)).filter(move |(file, _)| !found(file))
}

/// Checks that the newest version in the changelog is the crate's.
fn changelog(text: &str, version: &str) -> Checked {
    let newest = text.lines().enumerate().find_map(|(index, line)| {
        let first = line.strip_prefix("## ")?.split_whitespace().next()?;
        let bare = first.trim_matches(['[', ']']);
        bare.starts_with(|c: char| c.is_ascii_digit()).then_some((index + 1, bare))
    });
    match newest {
        Some((_, newest)) if newest == version => Ok(()),
        Some((line, newest)) => {
            Err((line, format!("its newest version is {newest}, the manifest says {version}: make them agree")))
        }
        None => Err((1, format!("add a heading `## {version}` and what that version changed"))),
    }
}

/// Checks that the crate inherits the lints of the workspace.
fn lints(manifest: &str) -> Checked {
    let mut lines = manifest.lines().map(str::trim).skip_while(|line| *line != "[lints]").skip(1);
    let inherits =
        lines.by_ref().take_while(|line| !line.starts_with('[')).any(|line| line.replace(' ', "") == "workspace=true");
    if inherits { Ok(()) } else { Err((1, "add `[lints]` with `workspace = true`".to_owned())) }
}

fn umbrella_features(features: &BTreeMap<String, Vec<String>>, names: &[&str]) -> Vec<String> {
    let mut fixes = Vec::new();
    let has = |feature: &str, value: &str| features.get(feature).is_some_and(|list| list.iter().any(|v| v == value));
    for name in names {
        if !has(name, &format!("dep:cancel-safe-{name}")) {
            fixes.push(format!("add the feature `{name} = [\"dep:cancel-safe-{name}\"]`"));
        }
        if !has("full", name) {
            fixes.push(format!("add `{name}` to the feature `full`"));
        }
    }
    if features.get("default").is_some_and(|list| !list.is_empty()) {
        fixes.push("empty the feature `default`: a user names what they want".to_owned());
    }
    fixes
}

/// The features of a library that the umbrella does not offer. The default features come with the library, and a
/// program is not re-exported.
fn missing_features(umbrella: &BTreeMap<String, Vec<String>>, library: &Package) -> Vec<String> {
    let by_default = library.features.get("default").cloned().unwrap_or_default();
    let others =
        library.single_features().filter(|feature| *feature != "cli" && !by_default.iter().any(|on| on == feature));
    let lacks = |feature: &&str| {
        let value = format!("{}?/{feature}", library.name);
        !umbrella.get(*feature).is_some_and(|list| list.contains(&value))
    };
    others.filter(lacks).map(|feature| format!("pass it on: `{feature} = [\"{}?/{feature}\"]`", library.name)).collect()
}

fn umbrella_modules(library: &str, names: &[&str]) -> Vec<(usize, String)> {
    let file = match syn::parse_file(library) {
        Ok(file) => file,
        Err(error) => return vec![(error.span().start().line, format!("make it parse: {error}"))],
    };
    let mut missing: Vec<&str> = names.to_vec();
    let mut fixes = Vec::new();
    for item in &file.items {
        let alias = names.iter().find(|name| is_alias(item, name));
        match alias {
            Some(name) => missing.retain(|other| other != name),
            None => fixes.push((
                item.span().start().line,
                "take it out: the umbrella adds no items, only `pub use cancel_safe_x as x` behind feature `x`"
                    .to_owned(),
            )),
        }
    }
    fixes.extend(missing.into_iter().map(|name| {
        let module = name.replace('-', "_");
        (1, format!("add `#[cfg(feature = \"{name}\")] pub use cancel_safe_{module} as {module};`"))
    }));
    fixes
}

/// Whether the item is `#[cfg(feature = "a-b")] pub use cancel_safe_a_b as a_b;`.
fn is_alias(item: &Item, name: &str) -> bool {
    let module = name.replace('-', "_");
    let Item::Use(import) = item else { return false };
    let UseTree::Rename(rename) = &import.tree else { return false };
    let behind_feature = import.attrs.iter().any(|attribute| {
        let condition = attribute.meta.require_list().map(|list| list.tokens.to_string().replace(' ', ""));
        attribute.path().is_ident("cfg") && condition.is_ok_and(|text| text == format!("feature=\"{name}\""))
    });
    behind_feature
        && matches!(import.vis, Visibility::Public(_))
        && rename.ident == format!("cancel_safe_{module}")
        && rename.rename == module
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_is_found() {
        let directory = std::env::temp_dir().join(format!("cancel-safe-tidy-{}", std::process::id()));
        std::fs::create_dir_all(directory.join("tests/it")).unwrap();
        for file in ["README.md", "LICENSE-MIT", "tests/it/main.rs"] {
            std::fs::write(directory.join(file), "").unwrap();
        }
        let named = |explores| missing(&directory, explores).map(|(file, _)| file).collect::<Vec<_>>();
        let (plain, exploring) = (named(false), named(true));
        std::fs::remove_dir_all(&directory).unwrap();
        assert_eq!(plain, ["CHANGELOG.md", "LICENSE-APACHE"]);
        assert_eq!(exploring, ["CHANGELOG.md", "LICENSE-APACHE", "tests/it/cancel.rs"]);
    }

    #[test]
    fn the_newest_version_of_the_changelog_must_be_the_crates() {
        assert_eq!(changelog("# Changelog\n\n## [0.2.0] - 2026-01-01\n\n## 0.1.0\n", "0.2.0"), Ok(()));
        assert_eq!(changelog("# Changelog\n\n## Unreleased\n\n## 0.1.0\n", "0.1.0"), Ok(()));
        assert_eq!(changelog("# Changelog\n\n## 0.1.0\n", "0.2.0").unwrap_err().0, 3);
        assert!(changelog("# Changelog\n", "0.1.0").is_err());
    }

    #[test]
    fn a_crate_without_the_workspace_lints_is_found() {
        assert_eq!(lints("[package]\n\n[lints]\nworkspace = true\n"), Ok(()));
        assert!(lints("[package]\nedition.workspace = true\n").is_err());
        assert!(lints("[lints]\n[lints.rust]\nworkspace = true\n").is_err());
    }

    #[test]
    fn a_crate_that_is_not_in_the_umbrellas_features_is_found() {
        let features = |list: &[(&str, &[&str])]| -> BTreeMap<String, Vec<String>> {
            list.iter().map(|(k, v)| ((*k).to_owned(), v.iter().map(|&s| s.to_owned()).collect())).collect()
        };
        let good = features(&[("default", &[]), ("full", &["a-b"]), ("a-b", &["dep:cancel-safe-a-b"])]);
        assert_eq!(umbrella_features(&good, &["a-b"]), Vec::<String>::new());
        assert_eq!(umbrella_features(&good, &["a-b", "c"]).len(), 2);
        let eager = features(&[("default", &["full"]), ("full", &["a-b"]), ("a-b", &["dep:cancel-safe-a-b"])]);
        assert_eq!(umbrella_features(&eager, &["a-b"]).len(), 1);
    }

    #[test]
    fn a_feature_that_is_not_passed_on_is_found() {
        let workspace = Workspace::load().unwrap();
        let mut umbrella = workspace.find(UMBRELLA).unwrap().features.clone();
        let shutdown = workspace.find("shutdown").unwrap();
        assert_eq!(missing_features(&umbrella, shutdown), [""; 0]);
        umbrella.remove("axum");
        let fix = "pass it on: `axum = [\"cancel-safe-shutdown?/axum\"]`";
        assert_eq!(missing_features(&umbrella, shutdown), [fix]);
    }

    #[test]
    fn the_umbrella_is_aliases_behind_features_and_nothing_else() {
        let good = "#[cfg(feature = \"a-b\")]\npub use cancel_safe_a_b as a_b;\n";
        assert_eq!(umbrella_modules(good, &["a-b"]), []);
        for broken in [
            "pub use cancel_safe_a_b as a_b;\n",
            "#[cfg(feature = \"a_b\")]\npub use cancel_safe_a_b as a_b;\n",
            "#[cfg(feature = \"a-b\")]\nuse cancel_safe_a_b as a_b;\n",
            "#[cfg(feature = \"a-b\")]\npub use cancel_safe_a_b as other;\n",
        ] {
            assert_eq!(umbrella_modules(broken, &["a-b"]).len(), 2, "{broken}");
        }
        let added = umbrella_modules(&format!("{good}\npub struct Extra;\n"), &["a-b"]);
        assert_eq!(added.len(), 1);
        assert_eq!(added[0].0, 4);
        assert_eq!(umbrella_modules("", &["a-b"]).len(), 1);
    }
}
