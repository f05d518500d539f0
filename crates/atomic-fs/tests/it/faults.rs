//! A disk, a directory or a privilege that is missing: a typed error, the old file, and no litter.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use cancel_safe_atomic_fs::{
    self as atomic_fs, AtomicFileWriter, Durability, Error, MultiFileTransaction, TargetState, blocking,
};
use tempfile::{TempDir, tempdir};

use crate::child::{self, SIZE_BYTES};
use crate::support::{eventually, names, not_run};

/// A mount that is removed when this is dropped.
struct Mount {
    dir: TempDir,
    point: PathBuf,
}

impl Mount {
    /// Mounts on `point` within a new directory; `None`, and a line that says so, if that is not possible.
    fn new(test: &str, prepare: impl FnOnce(&Path) -> (Vec<String>, PathBuf)) -> Option<Self> {
        let dir = tempdir().unwrap();
        let (arguments, point) = prepare(dir.path());
        let mounted = rustix::process::geteuid().is_root()
            && Command::new("mount").args(arguments).arg(&point).status().is_ok_and(|status| status.success());
        if !mounted {
            not_run(test, "it needs root, mount(8) and the permission to mount");
            return None;
        }
        Some(Self { dir, point })
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _status = Command::new("umount").arg(&self.point).status();
    }
}

fn small_disk(test: &str) -> Option<Mount> {
    Mount::new(test, |dir| {
        let point = dir.join("disk");
        std::fs::create_dir(&point).unwrap();
        (["-t", "tmpfs", "-o", "size=128k", "tmpfs"].map(String::from).to_vec(), point)
    })
}

#[tokio::test]
async fn a_full_disk_leaves_the_old_file() {
    let Some(disk) = small_disk("a_full_disk_leaves_the_old_file") else { return };
    let path = disk.point.join("file");
    std::fs::write(&path, "old").unwrap();
    let content = vec![b'N'; 200_000];
    for error in [
        atomic_fs::write(&path, &content).await.unwrap_err(),
        blocking::write(&path, &content).unwrap_err(),
        atomic_fs::write(&path, vec![b'N'; 5 << 20]).await.unwrap_err(),
        // Nor is a short file published when no sync would report it.
        AtomicFileWriter::options().durability(Durability::None).write(&path, &content).await.unwrap_err(),
    ] {
        assert!(error.is_storage_full() && error.target() == TargetState::Unchanged, "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(names(&disk.point), ["file"]);
    }
    // What was freed by the clean-up is free again, as soon as no child that another test is just starting has the file open.
    let start = std::time::Instant::now();
    while let Err(error) = atomic_fs::write(&path, &content[..60_000]).await {
        assert!(error.is_storage_full() && start.elapsed() < std::time::Duration::from_secs(30), "{error}");
    }
}

/// The last piece is written when the transaction is used again: that call and all later ones get the error.
#[cfg(unix)]
#[tokio::test]
async fn a_lent_writer_that_met_a_full_disk_breaks_its_transaction() {
    let Some(disk) = small_disk("a_lent_writer_that_met_a_full_disk_breaks_its_transaction") else { return };
    let at = |name: &str| disk.point.join(name);
    std::fs::write(at("old"), "old").unwrap();
    for is_committed in [true, false] {
        let mut tx = MultiFileTransaction::new();
        tx.writer(at("old")).await.unwrap().write_all(&[b'N'; 200_000]).await.unwrap();
        assert!(tx.add_file(at("b"), "b").await.unwrap_err().is_storage_full());
        for error in [tx.add_file(at("b"), "b").await.unwrap_err(), tx.writer(at("c")).await.map(drop).unwrap_err()] {
            assert!(matches!(error, Error::Broken { .. }), "{error}");
        }
        if is_committed {
            let error = tx.commit().await.unwrap_err();
            assert_eq!((error.target(), matches!(error, Error::Broken { .. })), (TargetState::Unchanged, true));
        } else {
            tx.rollback().await.unwrap();
        }
        assert_eq!((std::fs::read(at("old")).unwrap(), names(&disk.point)), (b"old".to_vec(), vec!["old".to_owned()]));
    }
}

/// A name may still be created when there is no room for content.
#[cfg(unix)]
#[tokio::test]
async fn a_transaction_that_cannot_even_be_noted_leaves_nothing() {
    let Some(disk) = small_disk("a_transaction_that_cannot_even_be_noted_leaves_nothing") else { return };
    let at = |name: &str| disk.point.join(name);
    for name in ["a", "b"] {
        std::fs::create_dir(at(name)).unwrap();
    }
    assert!(std::fs::write(at("filler"), [b'x'; 200_000]).is_err());
    let mut tx = MultiFileTransaction::begin(at("a"));
    let error = tx.add_file(at("b/y"), "").await.unwrap_err();
    assert!(error.is_storage_full() && error.target() == TargetState::Unchanged, "{error}");
    drop(tx);
    eventually("what was noted goes", || names(&at("a")).is_empty()).await;
    assert_eq!(names(&at("b")), [""; 0]);
}

#[tokio::test]
async fn a_writer_that_met_a_full_disk_cannot_be_committed() {
    let Some(disk) = small_disk("a_writer_that_met_a_full_disk_cannot_be_committed") else { return };
    let path = disk.point.join("file");
    let mut writer = AtomicFileWriter::new(&path).await.unwrap();
    let full = writer.write(&vec![b'N'; 4 << 20]).await.unwrap_err();
    assert!(full.is_storage_full(), "{full}");
    assert!(names(&disk.point).is_empty(), "the space is given back at once");
    assert!(matches!(writer.write(b"more").await.unwrap_err(), Error::Broken { .. }));
    assert!(matches!(writer.commit().await.unwrap_err(), Error::Broken { .. }));
    assert!(!path.exists());
}

#[tokio::test]
async fn a_file_that_is_a_mount_point_is_refused_and_left_alone() {
    let test = "a_file_that_is_a_mount_point_is_refused_and_left_alone";
    let Some(mount) = Mount::new(test, |dir| {
        let (source, point) = (dir.join("source"), dir.join("point"));
        std::fs::write(&source, "old").unwrap();
        std::fs::write(&point, "").unwrap();
        (vec!["--bind".into(), source.into_os_string().into_string().unwrap()], point)
    }) else {
        return;
    };
    let error = atomic_fs::write(&mount.point, "new").await.unwrap_err();
    assert!(error.is_not_replaceable() && error.target() == TargetState::Unchanged, "{error}");
    assert_eq!(std::fs::read(&mount.point).unwrap(), b"old");
    assert_eq!(names(mount.dir.path()), ["point", "source"]);
    // By way of a symlink the mount point itself is named, as well as the link.
    let link = mount.dir.path().join("link");
    std::os::unix::fs::symlink("point", &link).unwrap();
    let error = atomic_fs::write(&link, "new").await.unwrap_err();
    let (text, point) = (error.to_string(), format!("{:?}", mount.point));
    assert!(text.contains(&format!("{link:?}")) && text.contains(&point), "{text}");
    assert!(matches!(error, Error::NotReplaceable { resolved: Some(resolved), .. } if resolved == mount.point));
    // A removal of it did not fail as a rename.
    let mut tx = MultiFileTransaction::new();
    tx.remove_file(&mount.point).unwrap();
    let error = tx.commit().await.unwrap_err();
    assert!(error.is_not_replaceable() && error.to_string().contains(&point), "{error}");
}

#[tokio::test]
async fn an_error_names_the_step_that_was_attempted() {
    let test = "an_error_names_the_step_that_was_attempted";
    let dir = tempdir().unwrap();
    let (path, link) = (dir.path().join("file"), dir.path().join("link"));
    std::fs::write(&path, "old").unwrap();
    std::os::unix::fs::symlink("file", &link).unwrap();
    let attribute = |change: &str| Command::new("chattr").arg(change).arg(&path).status().is_ok_and(|s| s.success());
    if !attribute("+i") {
        not_run(test, "it needs root, and chattr(1) on a file system that knows immutable files");
        return;
    }
    let mut removal = MultiFileTransaction::new();
    removal.remove_file(&path).unwrap();
    let removal = removal.commit().await;
    let mut both = MultiFileTransaction::new();
    both.add_file(dir.path().join("other"), "new").await.unwrap();
    both.remove_file(&path).unwrap();
    let both = both.commit().await;
    let written = atomic_fs::write(&link, "new").await;
    assert!(attribute("-i"));
    for removed in [removal, both] {
        let error = removed.unwrap_err();
        assert!(error.to_string().starts_with("could not remove") && error.is_permission_denied(), "{error}");
    }
    let text = written.unwrap_err().to_string();
    assert!(text.starts_with("could not rename the new file to"), "{text}");
    assert!(text.contains(&format!("{link:?} (which leads to {path:?})")), "{text}");
    assert_eq!(names(dir.path()), ["file", "link"]);
    // The target of a link is named even if it is not a file.
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    let text = atomic_fs::write(&link, "new").await.unwrap_err().to_string();
    assert!(text.contains(&format!("{link:?} (which leads to {path:?}) is a directory")), "{text}");
}

#[tokio::test]
async fn a_transaction_with_a_mount_point_in_it_is_undone() {
    let Some(mount) = Mount::new("a_transaction_with_a_mount_point_in_it_is_undone", |dir| {
        let (source, point) = (dir.join("source"), dir.join("point"));
        std::fs::write(&source, "old").unwrap();
        std::fs::write(&point, "").unwrap();
        (vec!["--bind".into(), source.into_os_string().into_string().unwrap()], point)
    }) else {
        return;
    };
    let dir = mount.dir.path();
    std::fs::write(dir.join("before"), "old").unwrap();
    let mut tx = MultiFileTransaction::new();
    tx.add_file(dir.join("before"), "new").await.unwrap();
    tx.add_file(&mount.point, "new").await.unwrap();
    tx.add_file(dir.join("after"), "new").await.unwrap();
    let error = tx.commit().await.unwrap_err();
    assert!(error.is_not_replaceable() && error.target() == TargetState::Unchanged, "{error}");
    assert_eq!(std::fs::read(dir.join("before")).unwrap(), b"old");
    assert_eq!(std::fs::read(&mount.point).unwrap(), b"old");
    assert_eq!(names(dir), ["before", "point", "source"]);
}

#[tokio::test]
async fn a_disk_that_is_too_small_for_a_transaction_keeps_the_old_files() {
    let Some(disk) = small_disk("a_disk_that_is_too_small_for_a_transaction_keeps_the_old_files") else { return };
    let at = |name: &str| disk.point.join(name);
    std::fs::write(at("a"), "old").unwrap();
    let mut tx = MultiFileTransaction::new();
    tx.add_file(at("a"), "new").await.unwrap();
    let error = tx.add_file(at("b"), vec![b'N'; 200_000]).await.unwrap_err();
    assert!(error.is_storage_full(), "{error}");
    let writer = tx.writer(at("c")).await.unwrap();
    // It is buffered, and meets the full disk when it is committed.
    writer.write(&vec![b'N'; 200_000]).await.unwrap();
    let error = tx.commit().await.unwrap_err();
    assert!(error.is_storage_full() && error.target() == TargetState::Unchanged, "{error}");
    assert_eq!((std::fs::read(at("a")).unwrap(), names(&disk.point)), (b"old".to_vec(), vec!["a".to_owned()]));
}

#[tokio::test]
async fn a_read_only_file_system_is_a_typed_error() {
    let Some(disk) = small_disk("a_read_only_file_system_is_a_typed_error") else { return };
    let path = disk.point.join("file");
    std::fs::write(&path, "old").unwrap();
    let remounted = Command::new("mount").args(["-o", "remount,ro"]).arg(&disk.point).status().unwrap();
    assert!(remounted.success());
    let error = atomic_fs::write(&path, "new").await.unwrap_err();
    assert!(error.is_read_only() && error.target() == TargetState::Unchanged, "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
}

#[test]
fn a_directory_that_may_not_be_written_is_a_typed_error() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "old").unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o555)).unwrap();
    let said = child::outcome(child::command(&[], "write as nobody", &path)).unwrap();
    assert!(said.starts_with("Unchanged PermissionDenied"), "{said}");
    assert_eq!((std::fs::read(&path).unwrap(), names(dir.path()).len()), (b"old".to_vec(), 1));
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
}

#[test]
fn the_umask_applies_to_new_files_and_not_to_kept_modes() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempdir().unwrap();
    let (new, kept) = (dir.path().join("new"), dir.path().join("kept"));
    std::fs::write(&kept, "old").unwrap();
    std::fs::set_permissions(&kept, PermissionsExt::from_mode(0o664)).unwrap();
    for (path, mode) in [(&new, 0o600), (&kept, 0o664)] {
        let said = child::outcome(child::command(&["sh", "-c", "umask 077; exec \"$0\" \"$@\""], "write", path));
        assert_eq!(said.as_deref(), Some("Ok"));
        assert_eq!(std::fs::metadata(path).unwrap().mode() & 0o7777, mode, "{path:?}");
    }
}

#[test]
fn a_process_that_moves_away_still_commits_where_it_began() {
    let dir = tempdir().unwrap();
    let said = child::outcome(child::command(&[], "move away", dir.path()));
    assert_eq!(said.as_deref(), Some("Ok"));
    assert_eq!(std::fs::read(dir.path().join("file")).unwrap().len(), SIZE_BYTES);
}

#[tokio::test]
async fn a_target_that_becomes_a_directory_meanwhile_is_left_alone() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    let mut writer = AtomicFileWriter::new(&path).await.unwrap();
    writer.write(b"x").await.unwrap();
    std::fs::create_dir(&path).unwrap();
    let error = writer.commit().await.unwrap_err();
    assert!(error.is_not_a_file() && error.target() == TargetState::Unchanged, "{error}");
    assert_eq!(names(dir.path()), ["file"]);
}

#[tokio::test]
async fn a_temporary_file_that_somebody_has_removed_is_discarded_all_the_same() {
    let dir = tempdir().unwrap();
    let writer = AtomicFileWriter::new(dir.path().join("file")).await.unwrap();
    std::fs::remove_file(dir.path().join(&names(dir.path())[0])).unwrap();
    writer.discard().await.unwrap();
    let mut tx = MultiFileTransaction::new();
    tx.add_file(dir.path().join("file"), "new").await.unwrap();
    for name in names(dir.path()) {
        std::fs::remove_file(dir.path().join(name)).unwrap();
    }
    tx.rollback().await.unwrap();
    assert_eq!(names(dir.path()), [""; 0]);
}

#[tokio::test]
async fn a_rollback_tells_of_the_first_file_that_it_could_not_remove_and_removes_the_others() {
    let dir = tempdir().unwrap();
    let mut tx = MultiFileTransaction::new();
    tx.add_files(["a", "b", "c"].map(|name| (dir.path().join(name), "new"))).await.unwrap();
    let staged: Vec<_> = names(dir.path()).into_iter().filter(|name| name.ends_with("-1")).collect();
    let first = dir.path().join(&staged[0]);
    std::fs::remove_file(&first).unwrap();
    std::fs::create_dir(&first).unwrap();
    let error = tx.rollback().await.unwrap_err();
    assert!(error.to_string().contains("could not remove the staged file of"), "{error}");
    let left = names(dir.path());
    assert!(
        left.contains(&staged[0]) && !left.iter().any(|name| name.ends_with("-2") || name.ends_with("-3")),
        "{left:?}"
    );
}

#[tokio::test]
async fn a_panic_while_a_writer_is_open_leaves_no_litter() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    let target = path.clone();
    let task = tokio::spawn(async move {
        let mut writer = AtomicFileWriter::new(&target).await.unwrap();
        writer.write(&vec![0; 2 << 20]).await.unwrap();
        panic!("in the middle");
    });
    assert!(task.await.unwrap_err().is_panic());
    eventually("the temporary file goes", || names(dir.path()).is_empty()).await;
}
