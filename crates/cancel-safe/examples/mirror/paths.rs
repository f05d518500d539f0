//! Maps URLs to paths below `DIR/files`: injective, the same whatever the order of the list, and never outside.
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

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest, Sha256};
use url::Url;

/// The longest name that is taken over as it is, in bytes: 255, less a `~` and its hash.
const MAX_NAME: usize = 255 - 33;
/// The longest plain path below `files`, in bytes.
const MAX_PATH: usize = 1024;
/// What the names of temporary files begin with; one that does could be swept away.
const TEMPORARY: &str = ".afs-";

/// The path of each URL, relative to `DIR/files`, with `/` between the names.
pub(crate) fn assign<'a>(urls: impl IntoIterator<Item = &'a Url>) -> BTreeMap<&'a Url, String> {
    let wishes: BTreeMap<&Url, Wish> = urls.into_iter().map(|url| (url, Wish::of(url))).collect();
    // A name that some URL needs as a directory cannot be a file.
    let mut directories = BTreeSet::new();
    for wish in wishes.values() {
        let mut end = wish.directory.as_str();
        while directories.insert(end) {
            match end.rsplit_once('/') {
                Some((parent, _)) => end = parent,
                None => break,
            }
        }
    }
    let mut taken = BTreeSet::new();
    let mut paths = BTreeMap::new();
    for (url, wish) in &wishes {
        let plain = wish.plain().filter(|plain| !directories.contains(plain.as_str()) && taken.insert(plain.clone()));
        paths.insert(*url, plain.unwrap_or_else(|| wish.hashed(url)));
    }
    paths
}

/// Where a URL would like to be, were it alone.
struct Wish {
    directory: String,
    name: String,
    /// The name is the URL's own and says all of it.
    whole: bool,
}

impl Wish {
    fn of(url: &Url) -> Self {
        let authority = match (url.host_str(), url.port()) {
            (Some(host), Some(port)) => format!("{host}:{port}"),
            (host, _) => host.unwrap_or_default().to_owned(),
        };
        let host = if is_plain(&authority) { authority } else { format!("~{}", hash(&authority)) };
        let mut names: Vec<Option<String>> = url.path().split('/').skip(1).map(decode).collect();
        let last = names.pop().flatten();
        let directories: Option<Vec<String>> = names.into_iter().collect();
        let root = Self { directory: host.clone(), name: String::new(), whole: false };
        let Some(directories) = directories else { return root };
        let directory = directories.iter().fold(host, |path, name| path + "/" + name);
        let name = last.unwrap_or_default();
        if directory.len() + name.len() > MAX_PATH {
            return root;
        }
        Self { whole: !name.is_empty() && url.query().is_none(), directory, name }
    }

    fn plain(&self) -> Option<String> {
        self.whole.then(|| format!("{}/{}", self.directory, self.name))
    }

    fn hashed(&self, url: &Url) -> String {
        format!("{}/{}~{}", self.directory, self.name, hash(url.as_str()))
    }
}

/// The name that a segment of a URL's path stands for, if a file may bear it.
fn decode(segment: &str) -> Option<String> {
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
    String::from_utf8(bytes).ok().filter(|name| is_plain(name))
}

/// Whether a file or directory may be called so, and the name cannot be taken for a hashed one.
fn is_plain(name: &str) -> bool {
    let device = name.split('.').next().unwrap_or_default().to_ascii_lowercase();
    let reserved = matches!(device.as_str(), "con" | "prn" | "aux" | "nul")
        || (device.len() == 4
            && (device.starts_with("com") || device.starts_with("lpt"))
            && device.ends_with(|c: char| c.is_ascii_digit()));
    !name.is_empty()
        && name.len() <= MAX_NAME
        && name != "."
        && name != ".."
        && !name.starts_with(TEMPORARY)
        && !name.contains(|c: char| c.is_control() || c == '/' || c == '\\')
        && !reserved
        && !is_hashed(name)
}

/// Whether a path ends in a hash, which no plain one does.
pub(crate) fn is_hashed(path: &str) -> bool {
    path.rsplit_once('~').is_some_and(|(_, tail)| tail.len() == 32 && tail.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// The first 128 bits of a SHA-256, in hexadecimal.
fn hash(text: &str) -> String {
    Sha256::digest(text.as_bytes())[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
