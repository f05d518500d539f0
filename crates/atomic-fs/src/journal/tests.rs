//! The journal's encoding: what was written is what is read, and no bytes whatever make the reader stumble.

use proptest::prelude::*;

use super::*;

fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let sum = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    bytes
}

fn name() -> impl Strategy<Value = OsString> {
    let byte = any::<u8>().prop_filter("no part of a name", |byte| !matches!(byte, 0 | b'/'));
    let bytes = prop::collection::vec(byte, 1..256);
    bytes.prop_map(OsString::from_vec).prop_filter("a directory", |name| name != "." && name != "..")
}

fn identity() -> impl Strategy<Value = Option<Identity>> {
    let known = (any::<u64>(), any::<u64>(), any::<Option<u128>>());
    prop::option::of(known.prop_map(|(inode, size, digest)| Identity { inode, size, digest }))
}

type Parts = (OsString, OsString, Option<Identity>, Option<Identity>);

fn parts() -> impl Strategy<Value = Parts> {
    (name(), name(), identity(), identity()).prop_filter("no change", |(_, _, old, new)| old.is_some() || new.is_some())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_was_encoded_is_decoded(parts in prop::collection::vec((any::<bool>(), parts()), 0..8)) {
        let (home, far) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (home, far) = (Arc::new(Site::open(home.path()).unwrap()), Arc::new(Site::open(far.path()).unwrap()));
        let slot = |(is_far, (name, temp, old, new)): &(bool, Parts)| {
            let site = if *is_far { far.clone() } else { home.clone() };
            Slot::new(site, name.clone(), temp.clone(), *old, *new)
        };
        let slots: Vec<_> = parts.iter().map(slot).collect();
        let lines = decode(&encode(&home, &slots)).unwrap();
        assert_eq!(lines.len(), parts.len());
        for (line, (is_far, (name, temp, old, new))) in lines.iter().zip(&parts) {
            let directory = if *is_far { far.path.as_path() } else { Path::new("") };
            assert_eq!((&*line.directory, &line.name, &line.temp), (directory, name, temp));
            assert_eq!((line.old, line.new), (*old, *new));
        }
    }

    /// A checksum proves that nothing was damaged, not that nobody made it up.
    #[test]
    fn a_journal_that_was_made_up_is_read_without_a_panic_and_names_only_files(
        count in prop_oneof![0..4_u64, any::<u64>()],
        body in prop::collection::vec(prop_oneof![Just(0_u8), 0..4_u8, any::<u8>()], 0..300),
    ) {
        let bytes = sealed([&MAGIC[..], &count.to_le_bytes(), &body].concat());
        if let Ok(lines) = decode(&bytes) {
            for line in lines {
                for name in [&line.name, &line.temp] {
                    assert!(!name.as_bytes().contains(&b'/') && name != "." && name != ".." && !name.is_empty());
                }
            }
        }
    }
}

#[test]
fn a_journal_that_goes_on_or_leads_elsewhere_is_refused() {
    let line = |name: &[u8]| {
        let mut out = MAGIC.to_vec();
        put_number(&mut out, 1);
        put_bytes(&mut out, b"");
        put_bytes(&mut out, name);
        put_bytes(&mut out, b".afs-tx-0123456789abcdef-1");
        out.extend_from_slice(&[0, 1]);
        out.extend_from_slice(&[0; 32]);
        out
    };
    assert_eq!(decode(&sealed(line(b"file"))).unwrap().len(), 1);
    for name in [&b"../file"[..], b"/etc/passwd", b"..", b".", b"", b"a/", b"a/."] {
        assert!(decode(&sealed(line(name))).is_err(), "{}", String::from_utf8_lossy(name));
    }
    let mut longer = line(b"file");
    longer.push(0);
    assert_eq!(decode(&sealed(longer)).unwrap_err(), "it goes on behind its end");
    assert_eq!(decode(b"abc").unwrap_err(), "it is too short");
}
