//! The place where two values differ, as a path that a person can follow.
//!
//! Invariant: it names fields, variants and kinds, and never shows their contents: an error is no place for data.

use std::collections::HashMap;

use crate::shape::{Digest, Kind, Label, Node};

/// A value, taken apart.
#[derive(Debug)]
pub(crate) struct Tree {
    digest: Digest,
    kind: Kind,
    /// The name of a variant.
    name: &'static str,
    /// The text of a string, which may be the name of a flattened field.
    text: String,
    children: Vec<(Label<Tree>, Tree)>,
}

/// A tree whose children are still being added.
#[derive(Debug)]
pub(crate) struct TreeParts {
    digest: <Digest as Node>::Parts,
    kind: Kind,
    name: &'static str,
    children: Vec<(Label<Tree>, Tree)>,
}

impl Node for Tree {
    type Parts = TreeParts;

    fn leaf(kind: Kind, bytes: &[u8]) -> Self {
        let text = if kind == Kind::Str { String::from_utf8_lossy(bytes).into_owned() } else { String::new() };
        Self { digest: Digest::leaf(kind, bytes), kind, name: "", text, children: Vec::new() }
    }

    fn begin(kind: Kind, name: &'static str) -> TreeParts {
        TreeParts { digest: Digest::begin(kind, name), kind, name, children: Vec::new() }
    }

    fn push(parts: &mut TreeParts, label: Label<Self>, node: Self) {
        let of_label = match &label {
            Label::Position(position) => Label::Position(*position),
            Label::Field(name) => Label::Field(name),
            Label::Entry { key, is_field } => Label::Entry { key: key.digest, is_field: *is_field },
            Label::Inside => Label::Inside,
        };
        Digest::push(&mut parts.digest, of_label, node.digest);
        parts.children.push((label, node));
    }

    fn end(parts: TreeParts) -> Self {
        let TreeParts { digest, kind, name, children } = parts;
        Self { digest: Digest::end(digest), kind, name, text: String::new(), children }
    }
}

/// The first difference of two values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Difference {
    /// From the value inwards, such as `.hosts[3].address`; empty for the value itself.
    pub(crate) path: String,
    pub(crate) detail: String,
}

/// Finds where `after` first differs from `before`.
pub(crate) fn difference(before: &Tree, after: &Tree) -> Option<Difference> {
    let mut path = String::new();
    let detail = descend(before, after, &mut path)?;
    Some(Difference { path, detail })
}

fn descend(before: &Tree, after: &Tree, path: &mut String) -> Option<String> {
    if before.digest == after.digest {
        return None;
    }
    if (before.kind, before.name) != (after.kind, after.name) {
        return Some(format!("{} comes back as {}", before.describe(), after.describe()));
    }
    match before.kind {
        Kind::Seq => return in_sequence(before, after, path),
        Kind::Map => return in_map(before, after, path),
        _ => {}
    }
    let lengths = (before.children.len(), after.children.len());
    for ((label, before), (other, after)) in before.children.iter().zip(&after.children) {
        if matches!((label, other), (Label::Field(one), Label::Field(two)) if one != two) {
            step(path, label);
            return Some("it comes back as another field".to_owned());
        }
        if before.digest != after.digest {
            step(path, label);
            return descend(before, after, path);
        }
    }
    match lengths {
        (before, after) if before != after => Some(format!("{before} fields come back as {after}")),
        _ => Some(format!("{} comes back with another value", before.describe())),
    }
}

/// Finds the first member of a sequence that is nowhere in the restored one.
fn in_sequence<'a>(before: &'a Tree, after: &'a Tree, path: &mut String) -> Option<String> {
    let at = |tree: &'a Tree, position: usize| tree.children.get(position).map(|(_, node)| node);
    let stayed =
        |position| matches!((at(before, position), at(after, position)), (Some(a), Some(b)) if a.digest == b.digest);
    let mut elsewhere = HashMap::<u64, usize>::new();
    for (_, (_, node)) in after.children.iter().enumerate().filter(|(position, _)| !stayed(*position)) {
        *elsewhere.entry(node.digest.0).or_default() += 1;
    }
    for (position, (label, node)) in before.children.iter().enumerate().filter(|(position, _)| !stayed(*position)) {
        match elsewhere.get_mut(&node.digest.0) {
            Some(times) if *times > 0 => *times -= 1,
            _ => return inside(label, node, at(after, position), path),
        }
    }
    Some(format!("{} comes back with more in it", before.describe()))
}

/// Finds the first entry of a map that is nowhere in the restored one.
fn in_map(before: &Tree, after: &Tree, path: &mut String) -> Option<String> {
    let key_of = |label: &Label<Tree>| match label {
        Label::Entry { key, .. } => key.digest.0,
        Label::Position(_) | Label::Field(_) | Label::Inside => 0,
    };
    let found: HashMap<u64, &Tree> = after.children.iter().map(|(label, node)| (key_of(label), node)).collect();
    for (label, node) in &before.children {
        let other = found.get(&key_of(label)).copied();
        if other.is_none_or(|other| other.digest != node.digest) {
            return inside(label, node, other, path);
        }
    }
    Some(format!("{} comes back with more in it", before.describe()))
}

/// Descends into the values at the same place.
fn inside(label: &Label<Tree>, before: &Tree, after: Option<&Tree>, path: &mut String) -> Option<String> {
    step(path, label);
    match after {
        Some(after) => descend(before, after, path),
        None => Some(format!("{} does not come back", before.describe())),
    }
}

/// Adds a step to a path. The keys of a map are data, except those that name flattened fields.
fn step(path: &mut String, label: &Label<Tree>) {
    match label {
        Label::Position(position) => path.push_str(&format!("[{position}]")),
        Label::Field(name) => {
            path.push('.');
            path.push_str(name);
        }
        Label::Entry { key, is_field: true } => {
            path.push('.');
            path.push_str(&key.text);
        }
        Label::Entry { .. } => path.push_str("[…]"),
        Label::Inside => {}
    }
}

impl Tree {
    fn describe(&self) -> String {
        match self.name {
            "" => self.kind.noun().to_owned(),
            name => format!("the variant `{name}`"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use serde::Serialize;

    use super::*;
    use crate::shape::look;

    #[derive(Serialize)]
    enum Either {
        Left(u8),
        Right(u8),
        Named { a: u8, b: Option<u8> },
    }

    fn differ<A: Serialize, B: Serialize>(before: &A, after: &B) -> Option<(String, String)> {
        let (a, b): (Tree, Tree) = (look(before, true).unwrap(), look(after, true).unwrap());
        let digests: (Digest, Digest) = (look(before, true).unwrap(), look(after, true).unwrap());
        let found = difference(&a, &b);
        assert_eq!((a.digest, b.digest), digests, "a tree has the digest of its value");
        assert_eq!(found.is_none(), digests.0 == digests.1);
        found.map(|Difference { path, detail }| (path, detail))
    }

    fn at(path: &str, detail: &str) -> Option<(String, String)> {
        Some((path.to_owned(), detail.to_owned()))
    }

    #[test]
    fn what_the_bytes_of_a_codec_hide_is_seen() {
        assert_eq!(differ(&Some(None::<u8>), &None::<Option<u8>>), at("", "a Some comes back as a None"));
        assert_eq!(differ(&Some(()), &None::<()>), at("", "a Some comes back as a None"));
        assert_eq!(differ(&(), &None::<u8>), at("", "a unit comes back as a None"));
        assert_eq!(differ(&"a", &'a'), at("", "a string comes back as a char"));
        assert_eq!(differ(&5u64, &5u8), at("", "a u64 comes back as a u8"));
        assert_eq!(differ(&0.5f64, &0.5f32), at("", "an f64 comes back as an f32"));
        assert_eq!(differ(&0.0f64, &-0.0f64), at("", "an f64 comes back with another value"));
        assert_eq!(differ(&Either::Left(1), &Either::Right(1)), {
            at("", "the variant `Left` comes back as the variant `Right`")
        });
        let (one, two) = (Either::Named { a: 1, b: Some(2) }, Either::Named { a: 1, b: None });
        assert_eq!(differ(&one, &two), at(".b", "a Some comes back as a None"));
    }

    #[test]
    fn what_serde_is_told_depends_on_whether_it_is_for_people() {
        let address: std::net::IpAddr = "10.0.0.1".parse().unwrap();
        let (text, parts): (Tree, Tree) = (look(&address, true).unwrap(), look(&address, false).unwrap());
        assert_eq!((text.kind, parts.name), (Kind::Str, "V4"));
    }

    #[test]
    fn a_field_a_key_and_a_member_count_where_they_are() {
        #[derive(Serialize)]
        struct One {
            a: u8,
        }
        #[derive(Serialize)]
        struct Other {
            b: u8,
        }
        assert_eq!(differ(&One { a: 1 }, &Other { b: 1 }), at(".a", "it comes back as another field"));
        let map = |key: &str| BTreeMap::from([(key.to_owned(), 1u8)]);
        assert_eq!(differ(&map("a"), &map("b")), at("[…]", "a u8 does not come back"));
        assert!(differ(&[0u8; 2].as_slice(), &[0u8; 3].as_slice()).is_some());
    }

    #[test]
    fn the_path_leads_to_the_first_difference_and_shows_no_data() {
        let before = vec![("a", vec![1u8, 2]), ("b", vec![3, 4])];
        let mut after = before.clone();
        after[1].1[0] = 9;
        assert_eq!(differ(&before, &after), at("[1][1][0]", "a u8 comes back with another value"));
        after[1].1 = vec![3, 4, 4];
        assert_eq!(differ(&before, &after), at("[1][1]", "a sequence comes back with more in it"));
        let map = |value: u8| BTreeMap::from([("secret", value), ("other", 7)]);
        assert_eq!(differ(&map(1), &map(2)), at("[…]", "a u8 comes back with another value"));
        let less: BTreeMap<&str, u8> = BTreeMap::from([("other", 7)]);
        assert_eq!(differ(&map(1), &less), at("[…]", "a u8 does not come back"));
    }

    #[test]
    fn order_counts_in_tuples_and_not_in_sets_and_maps() {
        assert_eq!(differ(&(1u8, 2u8), &(2u8, 1u8)), at("[0]", "a u8 comes back with another value"));
        let members: Vec<u32> = (0..100).collect();
        let (one, two): (HashSet<u32>, HashSet<u32>) =
            (members.iter().copied().collect(), members.iter().rev().copied().collect());
        assert_eq!(differ(&one, &two), None);
        let entries = |set: &HashSet<u32>| set.iter().map(|x| (x.to_string(), vec![*x])).collect::<HashMap<_, _>>();
        assert_eq!(differ(&entries(&one), &entries(&two)), None);
        let of = |before: &[u8], after: &[u8]| differ(&before, &after).unwrap();
        assert_eq!(of(&[1, 1, 2], &[1, 2, 2]), at("[1]", "a u8 comes back with another value").unwrap());
        assert_eq!(of(&[1, 1], &[2, 1]), at("[0]", "a u8 comes back with another value").unwrap());
        assert_eq!(of(&[1, 2, 3], &[3, 1]), at("[1]", "a u8 comes back with another value").unwrap());
        assert_eq!(of(&[1, 2, 3], &[1, 2]), at("[2]", "a u8 does not come back").unwrap());
        assert_eq!(differ(&f64::NAN, &f64::from_bits(0x7ff8_0000_dead_beef)), None);
    }
}
