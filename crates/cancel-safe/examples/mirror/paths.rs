//! Maps URLs to paths below `DIR/files`: one path per URL, independent of the order of the list, and never outside.
//!
//! | URL | path |
//! |---|---|
//! | `http://host/a/b.txt` | `host/a/b.txt` |
//! | `http://host:8080/a%20b` | `host:8080/a b` (names are percent-decoded) |
//! | `/` or `/a/` | `host/~H`, `host/a/~H` (there is no name to take) |
//! | `/a?x=1` | `host/a~H` |
//! | `/a` where `/a/b` is in the list too | `host/a~H`, `host/a/b` |
//! | several URLs of one plain path (`/A` and `/%41`, `http:` and `https:`) | the first in the order of their text keeps it, the others get `host/A~H` |
//! | a last name that is reserved, over-long, not UTF-8, or looks like one of these forms | `host/a/~H` |
//! | the same in a directory's name, or a path longer than 1,024 bytes | `host/~H` |
//! | the same in the host | `~H(host)/…` |
//!
//! `H` is the first 32 hexadecimal digits of the SHA-256 of the whole URL (of `host[:port]` in the last row). Reserved are
//! `.`, `..`, `/`, `\`, control characters with NUL, the device names of Windows, and the prefix of temporary files.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use sha2::{Digest, Sha256};
use url::Url;

use super::report::host_of;

/// The longest name that is taken over as it is, in bytes: 255, less a `~` and its hash.
const MAX_NAME: usize = 255 - 33;
/// The longest plain path below `files`, in bytes.
const MAX_PATH: usize = 1024;
/// The prefix of temporary files. A file with this prefix could be swept away.
const TEMPORARY: &str = ".afs-";
/// Characters that some file systems accept in no name.
const REFUSED: &[char] = &['<', '>', ':', '"', '|', '?', '*'];

/// How the file system treats names; found out at the start of each run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Rules {
    /// `README` and `readme` are one file.
    pub(crate) folds: bool,
    /// It refuses `:` and similar characters in a name.
    pub(crate) refuses: bool,
}

impl Rules {
    /// A path as the file system compares it with others.
    pub(crate) fn folded(self, path: &str) -> String {
        if self.folds { path.to_lowercase() } else { path.to_owned() }
    }

    /// The same in 64 bits.
    fn hash(self, path: &str) -> u64 {
        if self.folds { short_hash(&path.to_lowercase()) } else { short_hash(path) }
    }
}

/// A 64-bit hash of a text, only for tables in memory.
pub(crate) fn short_hash(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// Finds out which URLs of a list cannot have the path that they ask for.
///
/// It compares hashes. If two paths happen to have the same hash, one of them gets a hashed name without need.
#[derive(Debug, Default)]
pub(crate) struct Names {
    plain: Vec<(u64, u32)>,
    directories: HashSet<u64>,
}

impl Names {
    /// Takes the wish of one more URL, which is known by `slot`.
    pub(crate) fn add(&mut self, slot: u32, wish: &Wish, rules: Rules) {
        if let Some(plain) = wish.plain() {
            self.plain.push((rules.hash(&plain), slot));
        }
        // A name that some URL needs as a directory cannot be a file.
        let mut end = wish.directory.as_str();
        while self.directories.insert(rules.hash(end)) {
            match end.rsplit_once('/') {
                Some((parent, _)) => end = parent,
                None => break,
            }
        }
    }

    /// Returns the slots that get a hashed name. If several ask for one path, the least by `order` gets it.
    pub(crate) fn contested<O: Ord, E>(mut self, order: impl Fn(u32) -> Result<O, E>) -> Result<Vec<u32>, E> {
        self.plain.sort_unstable();
        let mut contested = Vec::new();
        for group in self.plain.chunk_by(|a, b| a.0 == b.0) {
            let slots = group.iter().map(|(_, slot)| *slot);
            if self.directories.contains(&group[0].0) {
                contested.extend(slots);
            } else if group.len() > 1 {
                let mut ordered = slots.map(|slot| Ok((order(slot)?, slot))).collect::<Result<Vec<_>, E>>()?;
                ordered.sort_unstable();
                contested.extend(ordered.into_iter().skip(1).map(|(_, slot)| slot));
            }
        }
        Ok(contested)
    }
}

/// Where a URL's file would be if it were the only one.
#[derive(Debug)]
pub(crate) struct Wish {
    directory: String,
    name: String,
    /// Whether the path expresses the whole URL.
    whole: bool,
}

impl Wish {
    /// The wish of a normalised URL, or of the list's `out` for it. It takes the text apart without parsing it again: a
    /// list may have a million of them.
    pub(crate) fn of(url: &str, out: Option<&str>, rules: Rules) -> Self {
        if let Some((directory, name)) = out.and_then(|out| out.rsplit_once('/')) {
            return Self { directory: directory.to_owned(), name: name.to_owned(), whole: true };
        }
        let (_, place) = url.split_once("://").unwrap_or_default();
        let authority = host_of(url);
        let (path, has_query) = place.split_once('?').map_or((place, false), |(path, _)| (path, true));
        let host = if is_plain(authority, rules) { authority.to_owned() } else { format!("~{}", hash(authority)) };
        let (top, mut directory, mut name) = (host.len(), host, Some(String::new()));
        let mut segments = path.split('/').skip(1).peekable();
        while let Some(segment) = segments.next() {
            let decoded = decode(segment, rules);
            if segments.peek().is_none() {
                name = Some(decoded.unwrap_or_default());
            } else if let Some(inner) = decoded {
                directory.push('/');
                directory.push_str(&inner);
            } else {
                name = None;
                break;
            }
        }
        match name.filter(|name| directory.len() + name.len() <= MAX_PATH) {
            Some(name) => Self { whole: !name.is_empty() && !has_query, directory, name },
            None => {
                directory.truncate(top);
                Self { directory, name: String::new(), whole: false }
            }
        }
    }

    /// The path that expresses the whole URL, if there is one.
    pub(crate) fn plain(&self) -> Option<String> {
        self.whole.then(|| format!("{}/{}", self.directory, self.name))
    }

    /// The path that no other URL has.
    pub(crate) fn hashed(&self, url: &Url) -> String {
        format!("{}/{}~{}", self.directory, self.name, hash(url.as_str()))
    }
}

/// A path below `files` that a list may ask for.
pub(crate) fn is_output(path: &str) -> bool {
    path.len() <= MAX_PATH && path.contains('/') && path.split('/').all(|name| is_plain(name, Rules::default()))
}

/// The place to request so that the file of a URL that has left the list stays at `path`; `None` if its URL leads there
/// by itself.
pub(crate) fn kept_place(url: &Url, path: &str, rules: Rules) -> Option<String> {
    let wish = Wish::of(url.as_str(), None, rules);
    if wish.plain().as_deref() == Some(path) || wish.hashed(url) == path {
        return None;
    }
    // A file that had to make room there asks for the same place again.
    let asked = path.strip_suffix(&format!("~{}", hash(url.as_str()))).unwrap_or(path);
    is_output(asked).then(|| asked.to_owned())
}

/// Where the file of a URL waits until its place is free: the mapping puts no file at the top.
pub(crate) fn aside(url: &str) -> String {
    format!("~{}", hash(url))
}

/// The name that a segment of a URL's path stands for, if a file may bear it.
fn decode(segment: &str, rules: Rules) -> Option<String> {
    if !segment.contains('%') {
        return is_plain(segment, rules).then(|| segment.to_owned());
    }
    let mut bytes = Vec::with_capacity(segment.len());
    let mut rest = segment.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = |digit: &u8| (*digit as char).to_digit(16);
        (bytes, rest) = match (first, tail) {
            (b'%', [high, low, tail @ ..]) if hex(high).is_some() && hex(low).is_some() => {
                let value = hex(high).unwrap_or(0) * 16 + hex(low).unwrap_or(0);
                bytes.push(u8::try_from(value).unwrap_or(b'%'));
                (bytes, tail)
            }
            _ => {
                bytes.push(*first);
                (bytes, tail)
            }
        };
    }
    String::from_utf8(bytes).ok().filter(|name| is_plain(name, rules))
}

/// Whether a file or directory may be called so, and the name cannot be taken for a hashed one.
fn is_plain(name: &str, rules: Rules) -> bool {
    let device = name.split('.').next().unwrap_or_default();
    let is_one_of = |text: &str, names: &[&str]| names.iter().any(|name| text.eq_ignore_ascii_case(name));
    let is_port = |text: &str| text.ends_with(|c: char| c.is_ascii_digit());
    let reserved = is_one_of(device, &["con", "prn", "aux", "nul"])
        || (device.len() == 4
            && is_port(device)
            && device.get(..3).is_some_and(|kind| is_one_of(kind, &["com", "lpt"])));
    !name.is_empty()
        && name.len() <= MAX_NAME
        && name != "."
        && name != ".."
        && !name.starts_with(TEMPORARY)
        && !name.contains(|c: char| c.is_control() || c == '/' || c == '\\')
        && !reserved
        && !(rules.refuses && (name.contains(REFUSED) || name.ends_with(['.', ' '])))
        && !is_hashed(name)
}

/// Whether a path ends in a hash, which no plain one does.
fn is_hashed(path: &str) -> bool {
    path.rsplit_once('~').is_some_and(|(_, tail)| tail.len() == 32 && tail.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// The first 128 bits of a SHA-256, in hexadecimal.
fn hash(text: &str) -> String {
    Sha256::digest(text.as_bytes())[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    fn assign_by<'a>(urls: impl IntoIterator<Item = &'a Url>, rules: Rules) -> BTreeMap<&'a Url, String> {
        let urls: Vec<&Url> = urls.into_iter().collect::<BTreeSet<_>>().into_iter().collect();
        let wishes: Vec<Wish> = urls.iter().map(|url| Wish::of(url.as_str(), None, rules)).collect();
        let mut names = Names::default();
        for (slot, wish) in (0..).zip(&wishes) {
            names.add(slot, wish, rules);
        }
        let contested = names.contested(Ok::<_, ()>).unwrap();
        let path = |(slot, (url, wish)): (u32, (&'a Url, &Wish))| {
            let plain = wish.plain().filter(|_| !contested.contains(&slot));
            (url, plain.unwrap_or_else(|| wish.hashed(url)))
        };
        (0..).zip(urls.into_iter().zip(&wishes)).map(path).collect()
    }

    fn assign<'a>(urls: impl IntoIterator<Item = &'a Url>) -> BTreeMap<&'a Url, String> {
        assign_by(urls, Rules::default())
    }

    #[test]
    fn where_case_is_folded_no_two_paths_differ_by_case_alone() {
        let urls = ["http://h/README", "http://h/readme", "http://h/A/x", "http://h/a/y", "http://h/Readme/z"];
        let urls: Vec<Url> = urls.iter().map(|url| Url::parse(url).unwrap()).collect();
        let paths = assign_by(&urls, Rules { folds: true, refuses: false });
        let folded: BTreeSet<String> = paths.values().map(|path| path.to_lowercase()).collect();
        assert_eq!(folded.len(), 5, "{paths:?}");
        assert_eq!((paths[&urls[2]].as_str(), paths[&urls[4]].as_str()), ("h/A/x", "h/Readme/z"));
        assert!(paths[&urls[0]].starts_with("h/README~") && paths[&urls[1]].starts_with("h/readme~"), "{paths:?}");
    }

    #[test]
    fn what_a_file_system_refuses_is_hashed() {
        let urls = ["http://h:81/a", "http://h/a:b/c", "http://h/a%3Fb", "http://h/a", "http://h/dot./x"];
        let urls: Vec<Url> = urls.iter().map(|url| Url::parse(url).unwrap()).collect();
        let paths = assign_by(&urls, Rules { folds: false, refuses: true });
        assert_eq!(paths[&urls[3]], "h/a");
        assert!(paths.values().all(|path| !path.contains(REFUSED) && !path.contains("./")), "{paths:?}");
        assert!(paths[&urls[0]].starts_with('~') && paths[&urls[0]].ends_with("/a"), "{paths:?}");
    }

    #[test]
    fn an_output_name_stays_below_the_directory() {
        assert!(is_output("a/b c.txt"));
        for path in ["a", "/a/b", "a/../b", "a//b", "a/b/", "a/.afs-x", "a/nul", "a/b\\c"] {
            assert!(!is_output(path), "{path}");
        }
    }

    #[test]
    fn what_left_the_list_asks_for_its_place_where_its_url_leads_elsewhere() {
        let rules = Rules::default();
        let url = Url::parse("http://h/a").unwrap();
        let hashed = paths(&["http://h/a", "http://h/a/b"])[0].clone();
        assert!(is_hashed(&hashed) && is_hashed(&aside(url.as_str())));
        for (path, asked) in [("h/a", None), (hashed.as_str(), None), ("x/y", Some("x/y"))] {
            assert_eq!(kept_place(&url, path, rules).as_deref(), asked, "{path}");
        }
        let moved = Wish::of(url.as_str(), Some("x/y"), rules).hashed(&url);
        assert_eq!(kept_place(&url, &moved, rules).as_deref(), Some("x/y"));
        for path in [aside(url.as_str()), format!("x/y~{}", "0".repeat(32)), "../x/y".to_owned()] {
            assert_eq!(kept_place(&url, &path, rules), None, "{path}");
        }
    }

    fn paths(urls: &[&str]) -> Vec<String> {
        let urls: Vec<Url> = urls.iter().map(|url| Url::parse(url).unwrap()).collect();
        let assigned = assign(&urls);
        urls.iter().map(|url| assigned[url].clone()).collect()
    }

    #[test]
    fn ordinary_urls_keep_their_names() {
        assert_eq!(
            paths(&["http://h/a/b.txt", "http://h:81/a%20%C3%A9", "https://i/c%2Bd", "http://[::1]/x"]),
            ["h/a/b.txt", "h:81/a é", "i/c+d", "[::1]/x"]
        );
    }

    #[test]
    fn what_has_no_name_of_its_own_is_hashed() {
        let got = paths(&[
            "http://h/",
            "http://h/a?x",
            "http://h/%2E%2E%2F",
            "http://h/nul.txt",
            "http://h/.afs-1",
            "http://h/d%00/x",
        ]);
        for (path, start) in got.iter().zip(["h/~", "h/a~", "h/~", "h/~", "h/~", "h/~"]) {
            assert!(path.starts_with(start) && path.len() == start.len() + 32, "{path} for {start}");
        }
    }

    #[test]
    fn a_file_and_a_directory_of_one_name_are_apart_in_either_order() {
        let forward = paths(&["http://h/a", "http://h/a/b"]);
        let backward = paths(&["http://h/a/b", "http://h/a"]);
        assert_eq!((&forward[0], &forward[1]), (&backward[1], &backward[0]));
        assert!(forward[0].starts_with("h/a~"));
        assert_eq!(forward[1], "h/a/b");
    }

    #[test]
    fn the_two_schemes_are_apart_when_both_are_there() {
        let both = paths(&["https://h/a", "http://h/a"]);
        assert_eq!(both[1], "h/a");
        assert!(both[0].starts_with("h/a~"));
        assert_eq!(paths(&["https://h/a"]), ["h/a"]);
    }

    #[test]
    fn a_name_that_looks_hashed_is_not_taken_over() {
        let victim = paths(&["http://h/a?x"])[0].clone();
        let forged = format!("http://{victim}");
        assert_ne!(paths(&[&forged, "http://h/a?x"])[0], victim);
    }

    /// Segments that are likely to collide, escape or be refused.
    fn segment() -> impl Strategy<Value = String> {
        prop_oneof![
            4 => "[aAbB.~%2]{0,3}",
            1 => Just("..".to_owned()),
            1 => Just("%2e%2E".to_owned()),
            1 => Just("%2F".to_owned()),
            1 => Just("%00".to_owned()),
            1 => Just("%41".to_owned()),
            1 => Just("A".to_owned()),
            1 => Just("con".to_owned()),
            1 => Just("%FF".to_owned()),
            1 => Just("x".repeat(300)),
            1 => Just(format!("a~{}", "0".repeat(32))),
        ]
    }

    fn some_url() -> impl Strategy<Value = Url> {
        let host = prop_oneof![Just("h"), Just("h:8080"), Just(".."), Just("[::1]"), Just("a~b")];
        (
            prop_oneof![Just("http"), Just("https")],
            host,
            prop::collection::vec(segment(), 0..4),
            prop_oneof![3 => Just(""), 1 => Just("?"), 1 => Just("?q")],
        )
            .prop_filter_map("a URL", |(scheme, host, segments, query)| {
                let mut url = Url::parse(&format!("{scheme}://{host}/{}{query}", segments.join("/"))).ok()?;
                url.set_fragment(None);
                Some(url)
            })
    }

    proptest! {
        #[test]
        fn the_mapping_is_injective_stays_inside_and_never_needs_a_file_as_a_directory(urls in prop::collection::btree_set(some_url(), 1..24)) {
            let paths = assign(&urls);
            let distinct: BTreeSet<&String> = paths.values().collect();
            prop_assert_eq!(distinct.len(), urls.len());
            for (url, path) in &paths {
                for name in path.split('/') {
                    prop_assert!(!name.is_empty() && name != "." && name != ".." && name.len() <= 255, "{} -> {}", url, path);
                    prop_assert!(!name.contains('\0') && !name.starts_with(TEMPORARY), "{} -> {}", url, path);
                }
                prop_assert!(path.contains('/'), "{} -> {}", url, path);
                for (end, _) in path.match_indices('/') {
                    prop_assert!(!distinct.contains(&path[..end].to_owned()), "{} needs a file as a directory", path);
                }
            }
        }

        #[test]
        fn the_mapping_does_not_depend_on_the_order(urls in prop::collection::vec(some_url(), 1..12)) {
            let forward = assign(&urls);
            let backward = assign(urls.iter().rev());
            prop_assert_eq!(forward, backward);
        }
    }
}
