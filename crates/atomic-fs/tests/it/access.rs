//! Who may read a file after it was replaced: only users who could before, whatever lists, groups and directories say.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use cancel_safe_atomic_fs::{self as atomic_fs, AtomicFileWriter, MultiFileTransaction, Preserve};
use rustix::fs::XattrFlags;
use tempfile::TempDir;

use crate::child;
use crate::support::{not_run, temps};

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";
const NOBODY: u32 = 65534;

/// The owner, one more user, the group, the mask, all others.
fn list(owner: u16, user: (u32, u16), group: u16, mask: u16, other: u16) -> Vec<u8> {
    let entries =
        [(1, owner, u32::MAX), (2, user.1, user.0), (4, group, u32::MAX), (16, mask, u32::MAX), (32, other, u32::MAX)];
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, rights, id) in entries {
        bytes.extend(u16::to_le_bytes(tag));
        bytes.extend(u16::to_le_bytes(rights));
        bytes.extend(u32::to_le_bytes(id));
    }
    bytes
}

fn set_list(path: &Path, attribute: &str, list: &[u8]) {
    rustix::fs::setxattr(path, attribute, list, XattrFlags::empty()).unwrap();
}

fn access(path: &Path) -> (u32, Option<Vec<u8>>) {
    let mut value = [0; 256];
    let list = rustix::fs::getxattr(path, ACCESS, &mut value[..]).ok().map(|length| value[..length].to_vec());
    (std::fs::metadata(path).unwrap().mode() & 0o7777, list)
}

fn old_file(path: &Path, mode: u32) {
    std::fs::write(path, "old").unwrap();
    rustix::fs::removexattr(path, ACCESS).unwrap_or_default();
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
}

/// A directory on the usual disk and one in memory, which others may enter; those without lists are published.
fn places(test: &str) -> Vec<TempDir> {
    let mut places = Vec::new();
    for parent in [std::env::temp_dir(), "/dev/shm".into()] {
        let Ok(place) = tempfile::tempdir_in(&parent) else {
            not_run(test, "there is no /dev/shm");
            continue;
        };
        std::fs::set_permissions(place.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let probe = place.path().join("probe");
        std::fs::write(&probe, "").unwrap();
        let probed = rustix::fs::setxattr(&probe, ACCESS, &list(6, (12345, 6), 0, 6, 0), XattrFlags::empty());
        std::fs::remove_file(&probe).unwrap();
        match probed {
            Ok(()) => places.push(place),
            Err(_) => not_run(test, &format!("no access control lists in {}", parent.display())),
        }
    }
    places
}

fn is_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        not_run(test, "it needs root");
    }
    root
}

/// Replaces the file in every possible way: in one call, in pieces, and as part of a transaction.
async fn replace(path: &Path, way: usize) {
    match way {
        0 => atomic_fs::write(path, "new").await.unwrap(),
        1 => {
            let mut writer = AtomicFileWriter::new(path).await.unwrap();
            writer.write_all(b"new").await.unwrap();
            writer.commit().await.unwrap();
        }
        _ => {
            let mut tx = MultiFileTransaction::new();
            if way == 2 {
                tx.add_file(path, "new").await.unwrap();
            } else {
                tx.writer(path).await.unwrap().write_all(b"new").await.unwrap();
            }
            tx.commit().await.unwrap();
        }
    }
    assert_eq!(std::fs::read(path).unwrap(), b"new");
}
const WAYS: usize = 4;

#[tokio::test]
async fn an_access_control_list_is_kept_as_part_of_the_mode() {
    for place in places("an_access_control_list_is_kept_as_part_of_the_mode") {
        let path = place.path().join("file");
        // A mask that is wider than the group, and one that is narrower than the user; and set-ID bits beside a list.
        for (list, mode) in [
            (list(6, (12345, 6), 0, 6, 0), 0o660),
            (list(6, (12345, 7), 7, 4, 4), 0o644),
            (list(7, (12345, 0), 5, 5, 5), 0o4755),
            (list(4, (12345, 4), 4, 0, 0), 0o1400),
        ] {
            for way in 0..WAYS {
                old_file(&path, mode);
                set_list(&path, ACCESS, &list);
                assert_eq!(access(&path), (mode, Some(list.clone())));
                replace(&path, way).await;
                assert_eq!(access(&path), (mode, Some(list.clone())), "{mode:o} {way}");
                for keep in [Preserve::ALL, Preserve::MODE | Preserve::OWNER, Preserve::MODE | Preserve::XATTR] {
                    AtomicFileWriter::options().preserve(keep).write(&path, "newer").await.unwrap();
                    assert_eq!(access(&path), (mode, Some(list.clone())), "{mode:o} {keep:?}");
                }
            }
        }
    }
}

#[tokio::test]
async fn an_access_control_list_without_its_mode_is_not_kept() {
    for place in places("an_access_control_list_without_its_mode_is_not_kept") {
        let (path, usual) = (place.path().join("file"), place.path().join("std"));
        std::fs::write(&usual, "new").unwrap();
        for keep in [Preserve::NONE, Preserve::XATTR, Preserve::OWNER, Preserve::OWNER | Preserve::XATTR] {
            old_file(&path, 0o640);
            set_list(&path, ACCESS, &list(6, (12345, 7), 4, 7, 0));
            AtomicFileWriter::options().preserve(keep).write(&path, "new").await.unwrap();
            assert_eq!(access(&path), access(&usual), "{keep:?}");
        }
    }
}

#[tokio::test]
async fn a_default_list_of_the_directory_is_applied_to_new_files_only() {
    for place in places("a_default_list_of_the_directory_is_applied_to_new_files_only") {
        let dir = place.path();
        set_list(dir, DEFAULT, &list(7, (12345, 7), 5, 7, 4));
        std::fs::write(dir.join("std"), "new").unwrap();
        assert!(access(&dir.join("std")).1.is_some(), "or this test shows nothing");
        let path = dir.join("file");
        for way in 0..WAYS {
            replace(&path, way).await;
            assert_eq!(access(&path), access(&dir.join("std")), "as any new file: {way}");
            std::fs::remove_file(&path).unwrap();
            for mode in [0o640, 0o600, 0o644, 0o660, 0o4750, 0o400] {
                old_file(&path, mode);
                replace(&path, way).await;
                assert_eq!(access(&path), (mode, None), "{mode:o} {way}");
                std::fs::remove_file(&path).unwrap();
            }
        }
        for mode in [0o640, 0o664, 0o600, 0o4755] {
            for keep in [Preserve::NONE, Preserve::MODE, Preserve::XATTR, Preserve::ALL] {
                let exact = AtomicFileWriter::options().mode(mode).preserve(keep);
                exact.write(&path, "new").await.unwrap();
                assert_eq!(access(&path), (mode, None), "new, {mode:o}");
                old_file(&path, 0o600);
                set_list(&path, ACCESS, &list(6, (12345, 6), 0, 6, 0));
                exact.write(&path, "new").await.unwrap();
                assert_eq!(access(&path), (mode, None), "replaced, {mode:o} {keep:?}");
                std::fs::remove_file(&path).unwrap();
            }
        }
    }
}

#[tokio::test]
async fn a_temporary_file_grants_nothing_to_others_before_it_is_whole() {
    for place in places("a_temporary_file_grants_nothing_to_others_before_it_is_whole") {
        let dir = place.path();
        set_list(dir, DEFAULT, &list(7, (12345, 7), 7, 7, 7));
        let path = dir.join("file");
        for options in [
            AtomicFileWriter::options(),
            AtomicFileWriter::options().mode(0o640),
            AtomicFileWriter::options().preserve(Preserve::ALL),
        ] {
            old_file(&path, 0o664);
            let mut writer = options.open(&path).await.unwrap();
            writer.write_all(&vec![0; 3 << 20]).await.unwrap();
            // The group bits are the mask of the list that the directory gave, which therefore grants nothing.
            let temp = access(&dir.join(&temps(dir)[0])).0;
            assert_eq!(temp & 0o7077, 0, "{temp:o}");
            writer.commit().await.unwrap();
            assert_eq!(access(&path).1, None);
        }
    }
}

#[tokio::test]
async fn rights_of_a_group_that_is_not_kept_go_with_it() {
    let test = "rights_of_a_group_that_is_not_kept_go_with_it";
    if !is_root(test) {
        return;
    }
    for place in places(test) {
        let path = place.path().join("file");
        for (mode, expected) in [(0o640, 0o600), (0o664, 0o644), (0o604, 0o600), (0o6755, 0o755), (0o2770, 0o700)] {
            for way in 0..WAYS {
                old_file(&path, 0o600);
                chown(&path, Some(1234), Some(4321)).unwrap();
                std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
                replace(&path, way).await;
                assert_eq!(access(&path), (expected, None), "{mode:o} {way}");
                std::fs::remove_file(&path).unwrap();
            }
        }
        old_file(&path, 0o660);
        set_list(&path, ACCESS, &list(6, (12345, 6), 4, 6, 0));
        chown(&path, None, Some(4321)).unwrap();
        AtomicFileWriter::options().preserve(Preserve::ALL).write(&path, "new").await.unwrap();
        assert_eq!(access(&path), (0o660, Some(list(6, (12345, 6), 4, 6, 0))), "the group is kept");
        atomic_fs::write(&path, "new").await.unwrap();
        assert_eq!(access(&path), (0o660, Some(list(6, (12345, 6), 0, 6, 0))), "whom the list names, it names on");
        // Only the owner differs: the group means the same people.
        old_file(&path, 0o640);
        chown(&path, Some(1234), Some(rustix::process::getegid().as_raw())).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o6640)).unwrap();
        atomic_fs::write(&path, "new").await.unwrap();
        assert_eq!(access(&path), (0o2640, None));
    }
}

/// The same with another user who really tries.
#[tokio::test]
async fn nobody_reads_a_replaced_file_that_nobody_could_read_before() {
    let test = "nobody_reads_a_replaced_file_that_nobody_could_read_before";
    if !is_root(test) {
        return;
    }
    for place in places(test) {
        let path = place.path().join("file");
        let nobody_reads = || child::outcome(child::command(&[], "read as nobody", &path)).unwrap();
        let denied = "Err(PermissionDenied)";
        let group = |group| chown(&path, None, Some(group)).unwrap();
        // The mask of a list is not the right of the group, which has no members.
        old_file(&path, 0o600);
        group(NOBODY);
        set_list(&path, ACCESS, &list(6, (12345, 6), 0, 6, 0));
        assert_eq!(nobody_reads(), denied);
        AtomicFileWriter::options().preserve(Preserve::ALL).write(&path, "new").await.unwrap();
        assert_eq!(nobody_reads(), denied);
        // A list that denies one user what all others may do.
        old_file(&path, 0o644);
        set_list(&path, ACCESS, &list(6, (NOBODY, 0), 4, 4, 4));
        assert_eq!(nobody_reads(), denied);
        atomic_fs::write(&path, "new").await.unwrap();
        assert_eq!(nobody_reads(), denied);
        // The directory gives its new files a list.
        std::fs::remove_file(&path).unwrap();
        old_file(&path, 0o640);
        set_list(place.path(), DEFAULT, &list(7, (NOBODY, 7), 7, 7, 5));
        assert_eq!(nobody_reads(), denied);
        atomic_fs::write(&path, "new").await.unwrap();
        assert_eq!(nobody_reads(), denied);
        // A directory whose new files belong to its group.
        rustix::fs::removexattr(place.path(), DEFAULT).unwrap();
        chown(place.path(), None, Some(NOBODY)).unwrap();
        std::fs::set_permissions(place.path(), PermissionsExt::from_mode(0o2755)).unwrap();
        group(4321);
        assert_eq!(nobody_reads(), denied);
        atomic_fs::write(&path, "new").await.unwrap();
        assert_eq!((nobody_reads().as_str(), access(&path)), (denied, (0o600, None)));
        // Shows that the child does report.
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o604)).unwrap();
        assert_eq!(nobody_reads(), denied, "it belongs to the group");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        assert_eq!(nobody_reads(), "Ok");
    }
}

#[test]
fn who_is_not_root_grants_a_file_to_no_other_group() {
    let test = "who_is_not_root_grants_a_file_to_no_other_group";
    if !is_root(test) {
        return;
    }
    for place in places(test) {
        let path = place.path().join("file");
        chown(place.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        old_file(&path, 0o640);
        chown(&path, Some(NOBODY), Some(4321)).unwrap();
        let said = child::outcome(child::command(&[], "write as nobody", &path));
        assert_eq!((said.as_deref(), access(&path)), (Some("Ok"), (0o600, None)));
    }
}

/// The list is read through /proc, or otherwise through the file itself.
#[test]
fn a_list_is_kept_where_there_is_no_proc() {
    let test = "a_list_is_kept_where_there_is_no_proc";
    if !is_root(test) {
        return;
    }
    let hidden = ["unshare", "-m", "sh", "-c", "mount -t tmpfs none /proc && exec \"$@\"", "sh"];
    if !std::process::Command::new(hidden[0]).args(&hidden[1..]).arg("true").status().is_ok_and(|s| s.success()) {
        not_run(test, "it needs unshare(1), and the permission to mount");
        return;
    }
    for place in places(test) {
        let path = place.path().join("file");
        for (mode, list) in [(0o660, Some(list(6, (12345, 6), 0, 6, 0))), (0o640, None)] {
            old_file(&path, mode);
            if let Some(list) = &list {
                set_list(&path, ACCESS, list);
            }
            let said = child::outcome(child::command(&hidden, "write", &path));
            assert_eq!((said.as_deref(), access(&path)), (Some("Ok"), (mode, list)));
            assert_ne!(std::fs::read(&path).unwrap(), b"old");
        }
    }
}
