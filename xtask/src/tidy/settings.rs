//! The rules for settings: a time, a size or a count has a default, its documentation names the default, and the table
//! of all settings in docs/architecture.md has a row for it.
//!
//! Invariant: the settings are found in the code, so that none can be left out.

use std::path::Path;

use syn::visit::{self, Visit};
use syn::{FnArg, ImplItem, ItemImpl, PathSegment, ReceiverKind, ReturnType, Type, Visibility};

use super::Finding;
use super::source::{documentation, line, type_name};

/// The page with the table.
pub(super) const PAGE: &str = "docs/architecture.md";

/// The types of settings that need a default.
const LIMITS: [&str; 10] = ["Duration", "usize", "u8", "u16", "u32", "u64", "f32", "f64", "NonZeroUsize", "NonZeroU32"];

/// A method of a builder that takes a time, a size or a count.
pub(super) struct Setting {
    /// `Builder::method`.
    pub(super) name: String,
    line: usize,
    tells_default: bool,
}

impl Setting {
    /// Checks its documentation and its row in the table.
    pub(super) fn check(&self, path: &Path, page: &str, krate: &str) -> Vec<Finding> {
        let mut findings = Vec::new();
        let mut find = |rule, fix| findings.push(Finding { path: path.to_owned(), line: self.line, rule, fix });
        if !self.tells_default {
            find("default", format!("say the default of `{}`: \"Default: …\"", self.name));
        }
        let row = format!("| `{krate}` | `{}` |", self.name);
        if !page.lines().any(|line| line.starts_with(&row)) {
            find("settings", format!("add the row {row} … to the table in {PAGE}"));
        }
        findings
    }
}

/// The settings in a file of a published library.
pub(super) fn of(file: &syn::File) -> Vec<Setting> {
    struct Collect(Vec<Setting>);
    impl<'ast> Visit<'ast> for Collect {
        fn visit_item_impl(&mut self, item: &'ast ItemImpl) {
            let Some(of) = type_name(&item.self_ty) else { return };
            for member in &item.items {
                if let ImplItem::Fn(function) = member
                    && item.trait_.is_none()
                    && matches!(function.vis, Visibility::Public(_))
                    && is_setter(&function.sig)
                {
                    self.0.push(Setting {
                        name: format!("{of}::{}", function.sig.ident),
                        line: line(function.sig.ident.span()),
                        tells_default: documentation(&function.attrs).to_lowercase().contains("default"),
                    });
                }
            }
            visit::visit_item_impl(self, item);
        }
    }
    let mut collect = Collect(Vec::new());
    collect.visit_file(file);
    collect.0
}

/// Whether it takes `self` and a limit, and returns `Self`.
fn is_setter(signature: &syn::Signature) -> bool {
    let mut inputs = signature.inputs.iter();
    let owned =
        matches!(inputs.next(), Some(FnArg::Receiver(receiver)) if matches!(receiver.kind, ReceiverKind::Value));
    let returned = match &signature.output {
        ReturnType::Type(_, returned) => type_name(returned),
        ReturnType::Default => None,
    };
    let mut limits = inputs.filter(|input| matches!(input, FnArg::Typed(input) if is_limit(&input.ty)));
    owned && returned.is_some_and(|name| name == "Self") && limits.next().is_some()
}

/// Whether it is one of the types, or contains one: `Option<Duration>`, `impl Into<Option<Duration>>`.
fn is_limit(of: &Type) -> bool {
    struct Search(bool);
    impl<'ast> Visit<'ast> for Search {
        fn visit_path_segment(&mut self, segment: &'ast PathSegment) {
            self.0 |= LIMITS.iter().any(|limit| segment.ident == limit);
            visit::visit_path_segment(self, segment);
        }
    }
    let mut search = Search(false);
    search.visit_type(of);
    search.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(library: &str, page: &str) -> Vec<&'static str> {
        let settings = of(&syn::parse_file(library).unwrap());
        settings
            .iter()
            .flat_map(|setting| setting.check(Path::new("a.rs"), page, "a"))
            .map(|found| found.rule)
            .collect()
    }

    const GOOD: &str = "impl B {\n    /// Waits so long. Default: 5 s.\n    pub fn wait(mut self, wait: Duration) -> Self { self }\n}\n";

    #[test]
    fn a_setting_with_its_default_and_its_row_is_good() {
        assert_eq!(rules(GOOD, "| `a` | `B::wait` | 5 s | it fails |\n"), [""; 0]);
    }

    #[test]
    fn a_setting_without_its_default_or_its_row_is_found() {
        let silent = GOOD.replace("Default: 5 s.", "");
        assert_eq!(rules(&silent, "| `a` | `B::wait` | 5 s | it fails |\n"), ["default"]);
        assert_eq!(rules(GOOD, "| `b` | `B::wait` | 5 s | it fails |\n"), ["settings"]);
    }

    #[test]
    fn what_is_no_setting_is_left_alone() {
        let others = "impl B {\n    pub fn wait(&self, wait: Duration) -> Self { B }\n    pub fn name(self, name: &str) -> Self { self }\n    fn hidden(self, n: usize) -> Self { self }\n    pub fn new(n: usize) -> Self { B }\n}\nimpl T for B { fn wait(self, n: usize) -> Self { self } }\n";
        assert_eq!(rules(others, ""), [""; 0]);
        let optional =
            "impl B {\n    pub fn wait(self, wait: impl Into<Option<std::time::Duration>>) -> Self { self }\n}\n";
        assert_eq!(rules(optional, ""), ["default", "settings"]);
    }
}
