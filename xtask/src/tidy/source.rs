//! The rules for one Rust file.
//!
//! Invariant: code is read as syntax, never as text, so that a string or a comment is not mistaken for code. Only
//! things that are not syntax (comments, the first line, the length) are read line by line.

use std::collections::HashSet;
use std::path::Path;

use proc_macro2::{Delimiter, Span, TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, Expr, File, ImplItem, ItemFn, ItemImpl, ItemMod, ItemTrait, Lit, Meta, ReturnType, Signature};
use syn::{TraitItem, Type, TypeParamBound, Visibility};

use super::Finding;

/// One of these sentences opens each `# Cancel safety` section.
const VERDICTS: [&str; 3] = [
    "This method is cancel safe.",
    "This method is not cancel safe.",
    "Once polled, it runs to completion even if dropped.",
];

/// Words that mark unfinished work in comments.
const MARKERS: [&str; 3] = ["TODO", "FIXME", "XXX"];

/// The most lines of code in a file of a library: with more, a room has more than one purpose.
const MOST_CODE_LINES: usize = 450;

/// A finding without its file.
pub(super) struct Breach {
    line: usize,
    rule: &'static str,
    fix: String,
}

impl Breach {
    pub(super) fn at(self, path: &Path) -> Finding {
        Finding { path: path.to_owned(), line: self.line, rule: self.rule, fix: self.fix }
    }
}

/// The rules of every Rust file in the tree.
pub(super) fn everywhere(text: &str) -> Vec<Breach> {
    let mut breaches = Vec::new();
    if !text.starts_with("//!") {
        let fix = "open the file with `//!`: what it is for, and the invariant it keeps".to_owned();
        breaches.push(Breach { line: 1, rule: "front-line", fix });
    }
    for (index, line) in text.lines().enumerate() {
        let Some((_, comment)) = line.split_once("//") else { continue };
        let mut words = comment.split(|c: char| !c.is_ascii_alphanumeric());
        if let Some(marker) = words.find(|word| MARKERS.contains(word)) {
            let fix = format!("{marker}: do it, or open an issue and take the comment out");
            breaches.push(Breach { line: index + 1, rule: "unfinished", fix });
        }
    }
    if let Ok(tokens) = text.parse::<TokenStream>() {
        attributes_and_macros(tokens, &mut breaches);
    }
    breaches
}

/// The rules of the published libraries.
pub(super) fn in_library(text: &str, file: &File, futures: &HashSet<String>) -> Vec<Breach> {
    let mut verdicts = Verdicts { futures, self_type: None, breaches: Vec::new() };
    verdicts.visit_file(file);
    let mut breaches = verdicts.breaches;
    let is_code = |line: &&str| !line.trim().is_empty() && !line.trim_start().starts_with("//");
    let code = text.lines().filter(is_code).count();
    if code > MOST_CODE_LINES {
        let fix = format!("{code} lines of code, {MOST_CODE_LINES} at most: give its second purpose a file of its own");
        breaches.push(Breach { line: 1, rule: "file-length", fix });
    }
    breaches
}

/// Finds `#[allow(…)]`, `#[ignore]` and macros that stand for missing code, inside macros too.
fn attributes_and_macros(tokens: TokenStream, breaches: &mut Vec<Breach>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    for (index, token) in tokens.iter().enumerate() {
        match token {
            TokenTree::Group(group) => {
                let before = index.checked_sub(1).and_then(|before| tokens.get(before));
                if group.delimiter() == Delimiter::Bracket && before.is_some_and(|token| is_punct(token, "#!")) {
                    attribute(group.stream(), breaches);
                }
                attributes_and_macros(group.stream(), breaches);
            }
            TokenTree::Ident(name) if *name == "todo" || *name == "unimplemented" => {
                let called = tokens.get(index + 1).is_some_and(|next| is_punct(next, "!"));
                let fix = || format!("{name}! stands for code that is missing: write it");
                breaches.extend(called.then(|| Breach { line: line(name.span()), rule: "unfinished", fix: fix() }));
            }
            _ => {}
        }
    }
}

fn attribute(tokens: TokenStream, breaches: &mut Vec<Breach>) {
    for token in tokens {
        match token {
            TokenTree::Ident(name) if name == "allow" => breaches.push(Breach {
                line: line(name.span()),
                rule: "allow",
                fix: "mend the code, or say `#[expect(lint, reason = \"…\")]`: it speaks up when it is not needed"
                    .to_owned(),
            }),
            TokenTree::Ident(name) if name == "ignore" => breaches.push(Breach {
                line: line(name.span()),
                rule: "ignored-test",
                fix: "make the test run everywhere, or take it out: an ignored test proves nothing".to_owned(),
            }),
            // `cfg_attr(…, allow(…))`
            TokenTree::Group(group) if group.delimiter() == Delimiter::Parenthesis => {
                attribute(group.stream(), breaches)
            }
            _ => {}
        }
    }
}

fn is_punct(token: &TokenTree, any_of: &str) -> bool {
    matches!(token, TokenTree::Punct(punct) if any_of.contains(punct.as_char()))
}

pub(super) fn line(span: Span) -> usize {
    span.start().line
}

/// The types of this file that implement `Future`.
pub(super) fn future_types(file: &File) -> Vec<String> {
    struct Collect(Vec<String>);
    impl<'ast> Visit<'ast> for Collect {
        fn visit_item_impl(&mut self, item: &'ast ItemImpl) {
            let of_future = item.trait_.as_ref().and_then(|(of, _)| of.segments.last());
            if of_future.is_some_and(|last| last.ident == "Future") {
                self.0.extend(type_name(&item.self_ty));
            }
            visit::visit_item_impl(self, item);
        }
    }
    let mut collect = Collect(Vec::new());
    collect.visit_file(file);
    collect.0
}

/// Checks each public function that is async or returns a future. Bodies and trait implementations are skipped, because
/// nothing in them appears in the documentation of this crate.
struct Verdicts<'a> {
    futures: &'a HashSet<String>,
    self_type: Option<String>,
    breaches: Vec<Breach>,
}

impl Verdicts<'_> {
    fn check(&mut self, signature: &Signature, attributes: &[Attribute]) {
        if !self.returns_future(signature) || only_in_tests(attributes) {
            return;
        }
        if let Err(fix) = verdict(&documentation(attributes)) {
            let fix = format!("`{}`: {fix}", signature.ident);
            self.breaches.push(Breach { line: line(signature.ident.span()), rule: "cancel-safety", fix });
        }
    }

    fn returns_future(&self, signature: &Signature) -> bool {
        let ReturnType::Type(_, returned) = &signature.output else { return signature.asyncness.is_some() };
        signature.asyncness.is_some() || self.is_future(returned)
    }

    fn is_future(&self, returned: &Type) -> bool {
        match returned {
            Type::ImplTrait(it) => it.bounds.iter().any(is_future_bound),
            Type::TraitObject(it) => it.bounds.iter().any(is_future_bound),
            Type::Path(path) => {
                let Some(last) = path.path.segments.last() else { return false };
                let name = last.ident.to_string();
                let is_self = name == "Self" && self.self_type.as_ref().is_some_and(|own| self.futures.contains(own));
                let boxes = matches!(name.as_str(), "Pin" | "Box");
                let inner = || match &last.arguments {
                    syn::PathArguments::AngleBracketed(list) => list
                        .args
                        .iter()
                        .any(|argument| matches!(argument, syn::GenericArgument::Type(inner) if self.is_future(inner))),
                    _ => false,
                };
                is_self
                    || self.futures.contains(&name)
                    || matches!(name.as_str(), "BoxFuture" | "LocalBoxFuture")
                    || (boxes && inner())
            }
            _ => false,
        }
    }
}

impl<'ast> Visit<'ast> for Verdicts<'_> {
    fn visit_item_fn(&mut self, item: &'ast ItemFn) {
        if matches!(item.vis, Visibility::Public(_)) {
            self.check(&item.sig, &item.attrs);
        }
    }

    fn visit_item_impl(&mut self, item: &'ast ItemImpl) {
        if item.trait_.is_some() {
            return;
        }
        self.self_type = type_name(&item.self_ty);
        for member in &item.items {
            if let ImplItem::Fn(function) = member
                && matches!(function.vis, Visibility::Public(_))
            {
                self.check(&function.sig, &function.attrs);
            }
        }
        self.self_type = None;
    }

    fn visit_item_trait(&mut self, item: &'ast ItemTrait) {
        // Such a trait seals another one. The compiler checks that users cannot name it, so they cannot call it.
        if expects_unnameable(&item.attrs) {
            return;
        }
        for member in &item.items {
            if let TraitItem::Fn(function) = member
                && matches!(item.vis, Visibility::Public(_))
            {
                self.check(&function.sig, &function.attrs);
            }
        }
    }

    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        if !only_in_tests(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }
}

fn is_future_bound(bound: &TypeParamBound) -> bool {
    matches!(bound, TypeParamBound::Trait(of)
        if of.path.segments.last().is_some_and(|last| last.ident == "Future" || last.ident == "IntoFuture"))
}

pub(super) fn type_name(of: &Type) -> Option<String> {
    match of {
        Type::Path(path) => path.path.segments.last().map(|last| last.ident.to_string()),
        _ => None,
    }
}

fn expects_unnameable(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let lints = attribute.meta.require_list().map(|list| list.tokens.to_string());
        attribute.path().is_ident("expect") && lints.is_ok_and(|lints| lints.starts_with("unnameable_types"))
    })
}

fn only_in_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        matches!(&attribute.meta, Meta::List(list) if list.path.is_ident("cfg") && list.tokens.to_string() == "test")
    })
}

/// The text of the documentation comments.
pub(super) fn documentation(attributes: &[Attribute]) -> String {
    let mut text = String::new();
    for attribute in attributes {
        if let Meta::NameValue(pair) = &attribute.meta
            && pair.path.is_ident("doc")
            && let Expr::Lit(value) = &pair.value
            && let Lit::Str(line) = &value.lit
        {
            text.push_str(&line.value());
            text.push('\n');
        }
    }
    text
}

/// Checks that the documentation has a `# Cancel safety` section that opens with one of the verdicts; otherwise returns
/// what to do.
fn verdict(documentation: &str) -> Result<(), String> {
    let mut lines = documentation.lines().map(str::trim).skip_while(|line| *line != "# Cancel safety");
    if lines.next().is_none() {
        return Err(format!("add a `# Cancel safety` section that opens with one of: {}", VERDICTS.join(" | ")));
    }
    let section: Vec<&str> = lines.take_while(|line| !line.starts_with("# ")).collect();
    let section = section.join(" ");
    let section = section.trim();
    let opens = VERDICTS.iter().any(|verdict| {
        section.strip_prefix(verdict).is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace))
    });
    if !opens {
        return Err(format!("open its `# Cancel safety` section with exactly one of: {}", VERDICTS.join(" | ")));
    }
    let given: usize = VERDICTS.iter().map(|verdict| section.matches(verdict).count()).sum();
    if given > 1 {
        return Err("give one verdict in its `# Cancel safety` section, and say the rest in other words".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rules that a library file with this text breaks, with their lines.
    fn broken(text: &str) -> Vec<(&'static str, usize)> {
        let file = syn::parse_file(text).unwrap();
        let futures = future_types(&file).into_iter().collect();
        let breaches = everywhere(text).into_iter().chain(in_library(text, &file, &futures));
        breaches.map(|breach| (breach.rule, breach.line)).collect()
    }

    /// A documented function after a front line.
    fn documented(section: &str, function: &str) -> String {
        let doc: String = section.lines().map(|line| format!("/// {line}\n")).collect();
        format!("//! A room.\n{doc}{function}\n")
    }

    #[test]
    fn each_verdict_is_accepted_alone_and_with_more_text() {
        for verdict in VERDICTS {
            for text in [verdict.to_owned(), format!("{verdict}\nIf dropped, nothing happened.\n\n# Errors\nNone.")] {
                let text = documented(&format!("Does.\n\n# Cancel safety\n\n{text}"), "pub async fn go() {}");
                assert_eq!(broken(&text), [], "{text}");
            }
        }
    }

    #[test]
    fn a_missing_wrong_or_second_verdict_is_found() {
        for section in [
            "Does.",
            "# Cancel safety\n\nIt is fine.",
            "# Cancel safety\n\nThis function is cancel safe.",
            "# Cancel safety\n\nThis method is cancel safe, mostly.",
            "# Cancel safety\n\n# Errors\n\nThis method is cancel safe.",
            "# Cancel safety\n\nThis method is cancel safe. This method is not cancel safe.",
        ] {
            let text = documented(section, "pub async fn go() {}");
            let last = text.lines().count();
            assert_eq!(broken(&text), [("cancel-safety", last)], "{text}");
        }
    }

    #[test]
    fn every_public_way_to_return_a_future_is_seen() {
        for function in [
            "pub async fn go() {}",
            "pub fn go() -> impl Future<Output = ()> + Send { async {} }",
            "pub fn go() -> impl std::future::Future<Output = ()> { async {} }",
            "pub fn go() -> Pin<Box<dyn Future<Output = ()> + Send>> { x }",
            "pub fn go() -> BoxFuture<'static, ()> { x }",
            "pub mod inner { pub async fn go() {} }",
            "pub trait T { fn go(&self) -> impl Future<Output = ()>; }",
            "impl S { pub async fn go(&self) {} }",
            "pub fn go() -> Shield<u8> { x } impl<T> Future for Shield<T> { type Output = (); }",
            "impl<T> Future for Shield<T> { type Output = (); } impl<T> Shield<T> { pub fn new() -> Self { x } }",
        ] {
            assert_eq!(broken(&format!("//! A room.\n{function}\n")), [("cancel-safety", 2)], "{function}");
        }
    }

    #[test]
    fn what_users_cannot_call_needs_no_verdict() {
        for function in [
            "async fn go() {}",
            "pub(crate) async fn go() {}",
            "pub fn go() -> Result<u8, Future> { x }",
            "impl Service for S { fn go(&self) -> impl Future<Output = ()> { x } }",
            "#[cfg(test)] mod tests { pub async fn go() {} }",
            "pub fn go() { pub async fn inner() {} }",
            "trait T { async fn go(&self); }",
            "#[expect(unnameable_types, reason = \"seals\")] pub trait T { async fn go(&self); }",
        ] {
            assert_eq!(broken(&format!("//! A room.\n{function}\n")), [], "{function}");
        }
    }

    #[test]
    fn a_file_without_an_opening_line_is_found() {
        assert_eq!(broken("fn go() {}\n"), [("front-line", 1)]);
        assert_eq!(broken("// A note.\n//! Too late.\n"), [("front-line", 1)]);
    }

    #[test]
    fn marks_of_unfinished_work_are_found_in_comments_and_code() {
        for marker in MARKERS {
            assert_eq!(broken(&format!("//! A room.\nfn go() {{}} // {marker}: later\n")), [("unfinished", 2)]);
            assert_eq!(broken(&format!("//! A room.\nconst TEXT: &str = \"{marker}\";\n")), []);
        }
        assert_eq!(broken("//! A room.\nfn go() {\n    todo!()\n}\n"), [("unfinished", 3)]);
        assert_eq!(broken("//! A room.\nmacro_rules! m { () => { unimplemented!() } }\n"), [("unfinished", 2)]);
    }

    #[test]
    fn allow_and_ignore_are_found_wherever_an_attribute_stands() {
        assert_eq!(broken("//! A room.\n#![allow(dead_code)]\n"), [("allow", 2)]);
        assert_eq!(broken("//! A room.\n#[cfg_attr(test, allow(dead_code))]\nfn go() {}\n"), [("allow", 2)]);
        assert_eq!(broken("//! A room.\n#[test]\n#[ignore = \"slow\"]\nfn go() {}\n"), [("ignored-test", 3)]);
        assert_eq!(broken("//! A room.\nfn go() { allow(ignore); let x = [allow]; }\n"), []);
    }

    #[test]
    fn a_room_that_is_too_long_is_found() {
        let lines = |count: usize| format!("//! A room.\n\n// A comment.\n{}", "fn go() {}\n".repeat(count));
        assert_eq!(broken(&lines(MOST_CODE_LINES)), []);
        assert_eq!(broken(&lines(MOST_CODE_LINES + 1)), [("file-length", 1)]);
    }
}
