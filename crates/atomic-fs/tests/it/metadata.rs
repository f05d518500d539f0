//! A file's owner, its readers, and the target of its name.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use cancel_safe_atomic_fs::{
    self as atomic_fs, AtomicFileWriter, Error, MultiFileTransaction, Preserve, Symlinks, TargetState,
};
use tempfile::tempdir;

use crate::support::{names, not_run, temps};

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn is_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        not_run(test, "it needs root");
    }
    root
}

/// The file keeps the metadata that it has when it is replaced.
#[tokio::test]
async fn a_file_that_changes_hands_while_a_writer_is_open_stays_with_its_new_owner() {
    if !is_root("a_file_that_changes_hands_while_a_writer_is_open") {
        return;
    }
    let dir = tempdir().unwrap();
    let paths = ["single", "several"].map(|name| dir.path().join(name));
    paths.iter().for_each(|path| std::fs::write(path, "old").unwrap());
    let keep = AtomicFileWriter::options().preserve(Preserve::ALL);
    let mut writer = keep.open(&paths[0]).await.unwrap();
    writer.write(b"new").await.unwrap();
    let mut tx = MultiFileTransaction::new().options(keep);
    tx.writer(&paths[1]).await.unwrap().write(b"new").await.unwrap();
    paths.iter().for_each(|path| chown(path, Some(65534), Some(65533)).unwrap());
    writer.commit().await.unwrap();
    tx.commit().await.unwrap();
    for path in paths {
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!((std::fs::read(&path).unwrap(), meta.uid(), meta.gid()), (b"new".to_vec(), 65534, 65533));
    }
}

#[tokio::test]
async fn a_replaced_file_keeps_its_mode() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    for wanted in [0o600, 0o644, 0o400, 0o666, 0o777, 0o640, 0o4755, 0o2755] {
        std::fs::write(&path, "old").unwrap();
        set_mode(&path, wanted);
        let given = mode(&path);
        atomic_fs::write(&path, "new").await.unwrap();
        assert_eq!(mode(&path), given, "{wanted:o}");
        std::fs::remove_file(&path).unwrap();
    }
}

#[tokio::test]
async fn an_explicit_mode_is_exact_for_new_and_old_files() {
    let dir = tempdir().unwrap();
    for wanted in [0o600, 0o666, 0o444, 0o4711] {
        let path = dir.path().join(format!("{wanted:o}"));
        for _ in 0..2 {
            AtomicFileWriter::options().mode(wanted).write(&path, "x").await.unwrap();
            assert_eq!(mode(&path), wanted);
            // Now it exists, with another mode.
            set_mode(&path, 0o640);
        }
    }
}

#[tokio::test]
async fn a_new_file_has_the_mode_that_std_would_give_it() {
    let dir = tempdir().unwrap();
    std::fs::write(dir.path().join("std"), "x").unwrap();
    atomic_fs::write(dir.path().join("ours"), "x").await.unwrap();
    assert_eq!(mode(&dir.path().join("ours")), mode(&dir.path().join("std")));
}

#[tokio::test]
async fn a_temporary_file_grants_nothing_that_the_final_file_does_not() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    let ask = AtomicFileWriter::options;
    for options in [ask().mode(0o600), ask().mode(0o440), ask(), ask().preserve(Preserve::ALL)] {
        std::fs::write(&path, "old").unwrap();
        set_mode(&path, 0o640);
        let mut writer = options.open(&path).await.unwrap();
        writer.write_all(&vec![0; 3 << 20]).await.unwrap();
        let temp = mode(&dir.path().join(&temps(dir.path())[0]));
        writer.commit().await.unwrap();
        assert_eq!(temp & !mode(&path), 0, "{temp:o} became {:o}", mode(&path));
        std::fs::remove_file(&path).unwrap();
    }
}

#[tokio::test]
async fn what_is_kept_is_what_the_file_has_when_it_is_replaced() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    for is_transaction in [false, true] {
        std::fs::write(&path, "old").unwrap();
        set_mode(&path, 0o644);
        let mut tx = MultiFileTransaction::new();
        let mut writer = AtomicFileWriter::new(&path).await.unwrap();
        if is_transaction {
            tx.writer(&path).await.unwrap().write_all(b"new").await.unwrap();
        }
        writer.write_all(b"new").await.unwrap();
        // It turns out that it should have been private.
        set_mode(&path, 0o600);
        if is_transaction {
            tx.commit().await.unwrap()
        } else {
            writer.commit().await.unwrap()
        }
        assert_eq!((std::fs::read_to_string(&path).unwrap().as_str(), mode(&path)), ("new", 0o600), "{is_transaction}");
    }
    std::fs::remove_file(&path).unwrap();
    let writer = AtomicFileWriter::new(&path).await.unwrap();
    AtomicFileWriter::options().mode(0o600).write(&path, "by somebody else").await.unwrap();
    writer.commit().await.unwrap();
    assert_eq!((std::fs::read(&path).unwrap().len(), mode(&path)), (0, 0o600));
}

#[test]
fn a_file_that_is_made_private_during_a_long_write_stays_private() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    let content = vec![0; 64 << 20];
    let is_half_done = || {
        let temps = temps(dir.path());
        let temp = temps.first().and_then(|temp| std::fs::metadata(dir.path().join(temp)).ok());
        temp.is_some_and(|temp| temp.len() > 0 && temp.len() < content.len() as u64 / 2)
    };
    // A round in which the content was written before this thread had its turn shows nothing.
    let shown = (0..50).any(|_| {
        std::fs::write(&path, "old").unwrap();
        set_mode(&path, 0o644);
        let is_in_time = std::thread::scope(|scope| {
            let writer = scope.spawn(|| atomic_fs::blocking::write(&path, &content).unwrap());
            while !is_half_done() && !writer.is_finished() {
                std::thread::yield_now();
            }
            set_mode(&path, 0o600);
            is_half_done()
        });
        assert!(!is_in_time || mode(&path) == 0o600);
        is_in_time
    });
    assert!(shown, "no write took long enough");
}

#[tokio::test]
async fn nothing_is_kept_if_nothing_is_asked_for() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "old").unwrap();
    let usual = mode(&path);
    set_mode(&path, 0o600);
    AtomicFileWriter::options().preserve(Preserve::NONE).write(&path, "new").await.unwrap();
    assert_eq!(mode(&path), usual);
}

#[tokio::test]
async fn the_owner_is_kept_on_request_and_set_id_bits_only_with_it() {
    if !is_root("the_owner_is_kept_on_request_and_set_id_bits_only_with_it") {
        return;
    }
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    let prepare = || {
        std::fs::write(&path, "old").unwrap();
        chown(&path, Some(1234), Some(4321)).unwrap();
        set_mode(&path, 0o6750);
    };
    let owner = || std::fs::metadata(&path).map(|meta| (meta.uid(), meta.gid())).unwrap();
    prepare();
    AtomicFileWriter::options().preserve(Preserve::MODE | Preserve::OWNER).write(&path, "new").await.unwrap();
    assert_eq!((owner(), mode(&path)), ((1234, 4321), 0o6750));
    prepare();
    atomic_fs::write(&path, "new").await.unwrap();
    assert_eq!(
        (owner(), mode(&path)),
        ((0, 0), 0o700),
        "set-user-ID root must not be handed out, nor the group's rights"
    );
}

#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
#[tokio::test]
async fn extended_attributes_are_kept_on_request() {
    use rustix::fs::XattrFlags;
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "old").unwrap();
    if rustix::fs::setxattr(&path, "user.colour", b"green", XattrFlags::empty()).is_err() {
        not_run("extended_attributes_are_kept_on_request", "the file system has none");
        return;
    }
    rustix::fs::setxattr(&path, "user.empty", b"", XattrFlags::empty()).unwrap();
    set_mode(&path, 0o440);
    let colour = || {
        let mut value = [0; 16];
        rustix::fs::getxattr(&path, "user.colour", &mut value[..]).ok().map(|length| value[..length].to_vec())
    };
    AtomicFileWriter::options().preserve(Preserve::ALL).write(&path, "new").await.unwrap();
    assert_eq!((colour().as_deref(), mode(&path)), (Some(&b"green"[..]), 0o440));
    let mut list = [0; 256];
    let length = rustix::fs::listxattr(&path, &mut list[..]).unwrap();
    assert!(list[..length].split(|&b| b == 0).any(|name| name == b"user.empty"));
    atomic_fs::write(&path, "newer").await.unwrap();
    assert_eq!(colour(), None);
}

#[tokio::test]
async fn a_symlink_is_followed_to_the_file_that_it_means() {
    let dir = tempdir().unwrap();
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    std::fs::create_dir(&here).unwrap();
    std::fs::create_dir(&there).unwrap();
    let real = there.join("real");
    std::fs::write(&real, "old").unwrap();
    set_mode(&real, 0o600);
    symlink("../there/hop", here.join("link")).unwrap();
    symlink("real", there.join("hop")).unwrap();
    symlink(&real, here.join("absolute")).unwrap();
    symlink("../there/made", here.join("dangling")).unwrap();
    for (name, text) in [("link", "1"), ("absolute", "2")] {
        atomic_fs::write(here.join(name), text).await.unwrap();
        assert!(std::fs::symlink_metadata(here.join(name)).unwrap().is_symlink());
        assert_eq!((std::fs::read_to_string(&real).unwrap().as_str(), mode(&real)), (text, 0o600));
    }
    atomic_fs::write(here.join("dangling"), "3").await.unwrap();
    assert_eq!(std::fs::read_to_string(there.join("made")).unwrap(), "3");
    assert_eq!(names(&there), ["hop", "made", "real"]);
}

#[tokio::test]
async fn a_symlink_is_replaced_on_request() {
    let dir = tempdir().unwrap();
    let (real, link) = (dir.path().join("real"), dir.path().join("link"));
    std::fs::write(&real, "old").unwrap();
    set_mode(&real, 0o600);
    symlink("real", &link).unwrap();
    AtomicFileWriter::options().symlinks(Symlinks::Replace).write(&link, "new").await.unwrap();
    assert_eq!(std::fs::read(&real).unwrap(), b"old");
    assert!(std::fs::symlink_metadata(&link).unwrap().is_file());
    assert_eq!(std::fs::read(&link).unwrap(), b"new");
    assert_eq!(mode(&link) & 0o111, 0, "a link's own mode says nothing about a file's");
}

#[tokio::test]
async fn a_loop_of_symlinks_is_an_error_and_create_new_follows_none() {
    let dir = tempdir().unwrap();
    symlink("b", dir.path().join("a")).unwrap();
    symlink("a", dir.path().join("b")).unwrap();
    symlink("nowhere", dir.path().join("dangling")).unwrap();
    let error = atomic_fs::write(dir.path().join("a"), "x").await.unwrap_err();
    assert!(matches!(error, Error::InvalidPath { .. }), "{error}");
    let error = AtomicFileWriter::options().create_new(true).write(dir.path().join("dangling"), "x").await.unwrap_err();
    assert!(error.is_already_exists());
    assert_eq!(names(dir.path()), ["a", "b", "dangling"]);
}

#[tokio::test]
async fn names_of_255_bytes_work_and_longer_ones_are_refused() {
    let dir = tempdir().unwrap();
    let longest = dir.path().join("n".repeat(255));
    atomic_fs::write(&longest, "x").await.unwrap();
    assert_eq!(std::fs::read(&longest).unwrap(), b"x");
    let error = atomic_fs::write(dir.path().join("n".repeat(256)), "x").await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidFilename);
    assert_eq!(names(dir.path()).len(), 1);
}

#[tokio::test]
async fn what_is_no_file_is_refused_and_left_alone() {
    let dir = tempdir().unwrap();
    std::fs::create_dir(dir.path().join("directory")).unwrap();
    // By mkfifo(1), since not every system has the call that rustix would make.
    let made = std::process::Command::new("mkfifo").arg(dir.path().join("FIFO")).status().unwrap();
    assert!(made.success());
    let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    let before = names(dir.path());
    for kind in ["directory", "FIFO", "socket"] {
        for error in [
            atomic_fs::write(dir.path().join(kind), "x").await.unwrap_err(),
            AtomicFileWriter::new(dir.path().join(kind)).await.unwrap_err(),
        ] {
            assert!(error.is_not_a_file() && error.target() == TargetState::Unchanged, "{error}");
            assert!(error.to_string().contains(kind), "{error}");
        }
    }
    assert_eq!(names(dir.path()), before);
}

/// A separate device: a failing test must not cost the machine its `/dev/null`.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_device_is_refused_and_left_alone() {
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    let dir = tempdir().unwrap();
    let path = dir.path().join("device");
    // As /dev/null is.
    if mknodat(CWD, &path, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, makedev(1, 3)).is_err() {
        not_run("a_device_is_refused_and_left_alone", "it needs root, and the permission to make a device");
        return;
    }
    let error = atomic_fs::write(&path, "x").await.unwrap_err();
    assert!(error.is_not_a_file() && error.to_string().contains("device"), "{error}");
    assert_eq!((names(dir.path()).len(), std::fs::read(&path).unwrap_or_default().len()), (1, 0));
}

#[tokio::test]
async fn a_path_that_names_no_file_is_refused() {
    let dir = tempdir().unwrap();
    let like_a_directory = |end: &str| format!("{}{end}", dir.path().join("x").display());
    for path in [like_a_directory("/"), like_a_directory("/."), "..".into(), "/".into(), String::new()] {
        let mut tx = MultiFileTransaction::new();
        for error in [
            atomic_fs::write(&path, "x").await.unwrap_err(),
            tx.add_file(&path, "x").await.unwrap_err(),
            tx.writer(&path).await.unwrap_err(),
            tx.remove_file(&path).unwrap_err(),
            tx.rename(dir.path().join("y"), &path).unwrap_err(),
        ] {
            assert!(matches!(error, Error::InvalidPath { .. }), "{path:?}: {error}");
        }
    }
    let ours = dir.path().join(".afs-file-0123456789abcdef");
    let error = atomic_fs::write(ours, "x").await.unwrap_err();
    assert!(error.to_string().contains("reserved"), "{error}");
    assert!(names(dir.path()).is_empty());
}

#[tokio::test]
async fn a_parent_that_is_renamed_meanwhile_takes_the_file_along() {
    let dir = tempdir().unwrap();
    let (before, after) = (dir.path().join("before"), dir.path().join("after"));
    std::fs::create_dir(&before).unwrap();
    let mut writer = AtomicFileWriter::new(before.join("file")).await.unwrap();
    writer.write(b"x").await.unwrap();
    std::fs::rename(&before, &after).unwrap();
    std::fs::create_dir(&before).unwrap();
    writer.commit().await.unwrap();
    assert_eq!((names(&before).len(), names(&after)), (0, vec!["file".to_owned()]));
}
