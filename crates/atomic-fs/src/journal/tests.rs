//! The journal's encoding: what was written is read back, and no input makes the reader panic.

use std::ffi::OsStr;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;

const TAG: Tag = Tag(0x0123_4567_89ab_cdef);

fn sealed(bytes: &[u8]) -> Vec<u8> {
    seal(bytes.to_vec())
}

fn name() -> impl Strategy<Value = OsString> {
    let byte = any::<u8>().prop_filter("no part of a name", |byte| !matches!(byte, 0 | b'/'));
    let bytes = prop::collection::vec(byte, 1..256);
    bytes
        .prop_map(OsString::from_vec)
        .prop_filter("no target", |name| name != "." && name != ".." && !name.as_bytes().starts_with(b".afs-"))
}

fn moment() -> impl Strategy<Value = Moment> {
    (any::<i64>(), any::<u32>())
}

fn identity() -> impl Strategy<Value = Identity> {
    let parts = (any::<u64>(), prop::option::of(moment()), any::<u64>(), moment());
    parts.prop_map(|(inode, born, size, modified)| Identity { inode, born, size, modified })
}

/// For each name of a chain: whether it is in the other directory, the name, and the file there.
type Names = Vec<(bool, OsString, Identity)>;

fn names() -> impl Strategy<Value = Names> {
    prop::collection::vec((any::<bool>(), name(), identity()), 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_was_encoded_is_decoded(
        own in identity(),
        parts in prop::collection::vec((any::<bool>(), prop::option::of(identity()), names()), 0..8),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let [home, far] = ["home", "far"].map(|name| {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            Arc::new(Site::open(&dir.path().join(name)).unwrap())
        });
        let site = |is_far: bool| if is_far { far.clone() } else { home.clone() };
        let chain = |(is_hidden, new, names): &(bool, Option<Identity>, Names)| {
            let hidden = OsString::from(".afs-tx-0123456789abcdef-7");
            let spots: Vec<_> =
                names.iter().map(|(is_far, name, _)| Spot { site: site(*is_far), name: name.clone() }).collect();
            let carrier_name = if *is_hidden { hidden.clone() } else { spots[0].name.clone() };
            let carrier = Spot { site: spots[0].site.clone(), name: carrier_name };
            let files = std::iter::once(*new).chain(names.iter().map(|(.., file)| Some(*file))).collect();
            Chain { carrier, hidden, names: spots, files }
        };
        let chains: Vec<_> = parts.iter().map(chain).collect();
        let record = decode(&encode(TAG, &own, &home, &chains)).unwrap();
        assert_eq!((record.tag, record.own, record.written), (TAG, (own.inode, own.born), own.modified));
        let path = |name: &Name| (record.sites[name.site].clone(), name.name.clone());
        let same = |name: &Name, spot: &Spot| {
            let way = if spot.site.id == home.id { PathBuf::new() } else { PathBuf::from("../far") };
            path(name) == (way, spot.name.clone())
        };
        assert_eq!(record.chains.len(), chains.len());
        for (line, chain) in record.chains.iter().zip(&chains) {
            assert!(same(&line.carrier, &chain.carrier) && line.names.len() == chain.names.len());
            assert!(line.names.iter().zip(&chain.names).all(|(name, spot)| same(name, spot)));
            assert_eq!((&line.hidden, &line.files), (&chain.hidden, &chain.files));
        }
    }

    /// A checksum proves that nothing was damaged, not that the journal is genuine.
    #[test]
    fn a_journal_that_was_made_up_is_read_without_a_panic_and_names_only_files(
        body in prop::collection::vec(prop_oneof![Just(0_u8), 0..4_u8, any::<u8>()], 0..400),
    ) {
        if let Ok(record) = decode(&sealed(&[&MAGIC[..], &body].concat())) {
            for line in record.chains {
                for name in line.names.iter().map(|name| &name.name).chain([&line.carrier.name, &line.hidden]) {
                    assert!(!name.as_bytes().contains(&b'/') && name != "." && name != ".." && !name.is_empty());
                }
            }
        }
    }

    #[test]
    fn a_pointer_is_read_as_it_was_left(tag in any::<u64>(), home in name()) {
        let dir = tempfile::tempdir().unwrap();
        let site = Site::open(dir.path()).unwrap();
        let pointer = Pointer { tag: Tag(tag), home: Path::new("..").join(home) };
        pointer.leave(&site).unwrap();
        assert_eq!(Pointer::find(&site).unwrap(), Some(pointer));
    }
}

/// A journal of one chain: the hidden name, the targets and the files.
fn made_up(hidden: &[u8], carrier: &[u8], names: &[&[u8]]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    put_number(&mut out, TAG.0);
    put_number(&mut out, 7);
    put_moment(&mut out, None);
    put_moment(&mut out, Some((8, 9)));
    put_number(&mut out, 1);
    put_bytes(&mut out, b"");
    put_number(&mut out, 1);
    put_number(&mut out, 0);
    put_bytes(&mut out, carrier);
    put_bytes(&mut out, hidden);
    put_number(&mut out, names.len() as u64);
    for name in names {
        put_number(&mut out, 0);
        put_bytes(&mut out, name);
    }
    for number in 0..=names.len() as u64 {
        put_identity(&mut out, Some(&Identity { inode: number, born: None, size: 1, modified: (2, 3) }));
    }
    out
}

#[test]
fn a_journal_that_goes_on_or_leads_elsewhere_is_refused() {
    let ours = b".afs-tx-0123456789abcdef-1";
    assert_eq!(decode(&sealed(&made_up(ours, ours, &[b"file"]))).unwrap().chains.len(), 1);
    assert_eq!(decode(&sealed(&made_up(ours, b"one", &[b"file"]))).unwrap().chains.len(), 1);
    for name in [&b"../file"[..], b"/etc/passwd", b"..", b".", b"", b"a/", b"a/.", b".afs-journal-elsewhere"] {
        assert!(decode(&sealed(&made_up(ours, ours, &[name]))).is_err(), "{}", OsStr::from_bytes(name).display());
        assert!(decode(&sealed(&made_up(ours, name, &[b"file"]))).is_err(), "{}", OsStr::from_bytes(name).display());
        assert!(decode(&sealed(&made_up(name, name, &[b"file"]))).is_err(), "{}", OsStr::from_bytes(name).display());
    }
    let another = b".afs-tx-0123456789abcdee-1";
    assert!(decode(&sealed(&made_up(another, another, &[b"file"]))).is_err(), "a file of another transaction");
    assert!(decode(&sealed(&made_up(ours, ours, &[]))).is_err(), "it changes nothing");
    let longer = [made_up(ours, ours, &[b"file"]), vec![0]].concat();
    assert_eq!(decode(&sealed(&longer)).unwrap_err(), "it goes on behind its end");
    let mut unknown = made_up(ours, ours, &[b"file"]);
    // Whether the journal's birth is known.
    assert_eq!(std::mem::replace(&mut unknown[MAGIC.len() + 16], 2), 0);
    assert!(decode(&sealed(&unknown)).is_err(), "neither yes nor no");
    assert_eq!(decode(b"abc").unwrap_err(), "it is too short");
    assert!(decode(b"afs-tx1\nwhatever").unwrap_err().contains("version 1"));
}

/// Later versions must read what this version writes.
#[test]
fn the_format_is_that_of_the_golden_files() {
    let ours = b".afs-tx-0123456789abcdef-1";
    let journal = sealed(&made_up(ours, ours, &[b"log", b"log.1"]));
    assert_eq!(journal, include_bytes!("golden/journal-2"), "the format is another one: give it another version");
    assert!(decode(include_bytes!("golden/journal-2")).is_ok());
    let pointer = Pointer { tag: TAG, home: "../a".into() };
    assert_eq!(Pointer::parse(Path::new("../a/.afs-tx-0123456789abcdef")), Some(pointer));
    for link in ["../a", "../a/.afs-tx-0123456789abcdef-1", "../a/.afs-tx-0123456789ABCDEF", ".", "/", ""] {
        assert_eq!(Pointer::parse(Path::new(link)), None, "{link}");
    }
}

#[test]
fn the_way_from_one_directory_to_another_goes_over_what_contains_both() {
    let way = |from: &str, to: &str| way(Path::new(from), Path::new(to)).display().to_string();
    assert_eq!(way("/d/a", "/d/a"), "");
    assert_eq!(way("/d/a", "/d/b"), "../b");
    assert_eq!(way("/d/a", "/d/a/sub"), "sub");
    assert_eq!(way("/d/a/sub", "/d/a"), "..");
    assert_eq!(way("/", "/d"), "d");
    assert_eq!(way("/x/y", "/d/a"), "../../d/a");
}

/// An inode number may belong to another file elsewhere, or be reused.
#[test]
fn a_journal_is_in_its_place_if_number_and_birth_are_those_that_it_names() {
    let dir = tempfile::tempdir().unwrap();
    let home = Site::open(dir.path()).unwrap();
    let path = dir.path().join(COMMITTED);
    let own = Identity::of(&File::create(&path).unwrap()).unwrap();
    let later = own.born.map(|(seconds, nanoseconds)| (seconds + 1, nanoseconds));
    for (own, is_in_place) in [
        (own, true),
        (Identity { born: None, ..own }, true),
        (Identity { inode: own.inode + 1, ..own }, false),
        // If the file system has no birth times, the number is all there is.
        (Identity { born: later, ..own }, own.born.is_none()),
    ] {
        std::fs::write(&path, encode(TAG, &own, &home, &[])).unwrap();
        let found = find(&home).unwrap().unwrap();
        assert_eq!(matches!(found.trust, Trust::Numbers { .. }), is_in_place, "{own:?}");
    }
}

#[test]
fn two_journals_in_one_directory_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let home = Site::open(dir.path()).unwrap();
    for name in [PREPARED, COMMITTED] {
        let own = Identity::of(&File::create(dir.path().join(name)).unwrap()).unwrap();
        std::fs::write(dir.path().join(name), encode(TAG, &own, &home, &[])).unwrap();
    }
    assert!(matches!(find(&home), Err(Error::CorruptJournal { reason: "there are two journals", .. })));
}

/// As on a network file system: the committing rename took effect, and reported an error.
#[test]
fn a_journal_that_was_not_committed_goes_by_either_of_its_names_and_takes_what_leads_to_it_along() {
    let scratch = tempfile::tempdir().expect("the temporary directory has room");
    let [home, other] = ["home", "other"].map(|name| {
        std::fs::create_dir(scratch.path().join(name)).expect("the directory is ours");
        Arc::new(Site::open(&scratch.path().join(name)).expect("it is there"))
    });
    for name in [PREPARED, COMMITTED] {
        std::fs::write(home.path.join(name), "").expect("the directory is ours");
    }
    std::fs::write(other.path.join(POINTER), "").expect("the directory is ours");
    let pointed = vec![other.clone()];
    drop(Draft { home: &home, name: Some(PREPARED.into()), pointed, written: Moment::default() });
    for site in [home, other] {
        assert!(site.dir.list().expect("it is there").iter().all(|name| name == "." || name == ".."), "{site:?}");
    }
}
