//! The rule that the imports of a crate's files point one way.
//!
//! Invariant: no circle is allowed, however many files it spans.

use std::collections::{BTreeMap, BTreeSet};

use proc_macro2::{Group, TokenStream, TokenTree};

/// Which of the crate's own files each file imports. A folder and the file of its name are one room.
#[derive(Debug, Default)]
pub(super) struct Imports(BTreeMap<String, BTreeSet<String>>);

impl Imports {
    /// Adds the file of the module `room`.
    pub(super) fn read(&mut self, room: &str, text: &str) {
        // Another rule reports files that do not parse.
        let Ok(tokens) = text.parse::<TokenStream>() else { return };
        imports(tokens, self.0.entry(room.to_owned()).or_default());
    }

    /// What to do about the circles.
    pub(super) fn check(&self) -> Vec<String> {
        let told = |circle: &Vec<&str>| {
            format!("{} import each other: move what they share to a file below", circle.join(", "))
        };
        self.circles().iter().map(told).collect()
    }

    /// Each set of files that import each other, directly or through others.
    fn circles(&self) -> BTreeSet<Vec<&str>> {
        let reached: BTreeMap<&str, BTreeSet<&str>> =
            self.0.keys().map(|room| (room.as_str(), self.reach(room))).collect();
        let beside = |room: &str| -> Vec<&str> {
            let mutual = |other: &&&str| reached.get(**other).is_some_and(|back| back.contains(room));
            reached.get(room).into_iter().flatten().filter(mutual).copied().collect()
        };
        reached.keys().map(|room| beside(room)).filter(|circle| circle.len() > 1).collect()
    }

    /// The files that a file imports, directly or through others.
    fn reach(&self, room: &str) -> BTreeSet<&str> {
        let mut reached = BTreeSet::new();
        let mut open = vec![room];
        while let Some(next) = open.pop() {
            for import in self.0.get(next).into_iter().flatten() {
                if self.0.contains_key(import) && import != next && reached.insert(import.as_str()) {
                    open.push(import);
                }
            }
        }
        reached
    }
}

/// Collects the first names of all paths that begin with `crate::`, except in the tests of a file.
fn imports(tokens: TokenStream, found: &mut BTreeSet<String>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    for (at, token) in tokens.iter().enumerate() {
        match token {
            TokenTree::Group(group) if !(at >= 2 && is(&tokens[at - 2], "mod") && is(&tokens[at - 1], "tests")) => {
                imports(group.stream(), found);
            }
            TokenTree::Ident(name) if *name == "crate" && is_path(&tokens[at + 1..]) => match tokens.get(at + 3) {
                Some(TokenTree::Ident(room)) => drop(found.insert(room.to_string())),
                Some(TokenTree::Group(list)) => found.extend(heads(list)),
                _ => {}
            },
            _ => {}
        }
    }
}

/// The first name of each path in `{a::b, c}`.
fn heads(list: &Group) -> Vec<String> {
    let tokens: Vec<TokenTree> = list.stream().into_iter().collect();
    let paths = tokens.split(|token| matches!(token, TokenTree::Punct(comma) if comma.as_char() == ','));
    paths.filter_map(|path| path.first().map(ToString::to_string)).collect()
}

fn is(token: &TokenTree, name: &str) -> bool {
    matches!(token, TokenTree::Ident(ident) if *ident == name)
}

fn is_path(after: &[TokenTree]) -> bool {
    let is_colon = |token: &TokenTree| matches!(token, TokenTree::Punct(colon) if colon.as_char() == ':');
    after.len() > 2 && after[..2].iter().all(is_colon)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crate_of(files: &[(&str, &str)]) -> Imports {
        let mut read = Imports::default();
        for (room, text) in files {
            read.read(room, text);
        }
        read
    }

    #[test]
    fn imports_that_point_down_are_no_circle() {
        let read = crate_of(&[
            ("top", "use crate::{middle::X, bottom};\npub(crate) fn go() { crate::middle::go() }"),
            (
                "middle",
                "use crate::bottom::Y;\n// crate::top\nconst T: &str = \"crate::top\"; /** crate::top */ fn f() {}",
            ),
            ("bottom", "fn go() {}\n#[cfg(test)] mod tests { use crate::top::X; }"),
        ]);
        assert_eq!(read.check(), Vec::<String>::new());
    }

    #[test]
    fn a_circle_over_several_files_is_found_once() {
        let read = crate_of(&[
            ("a", "use crate::b::X;"),
            ("b", "fn go() { vec![crate::c::go()] }"),
            ("c", "use crate::{d, a::{Y, Z}};"),
            ("d", "use crate::d::inner;"),
        ]);
        assert_eq!(read.check(), ["a, b, c import each other: move what they share to a file below"]);
    }
}
