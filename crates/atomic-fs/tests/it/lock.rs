//! Who may hold up whom: readers and writers get their turns, a user who may only read holds up nobody, and locks leave
//! nothing behind.

use std::io::{BufRead, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cancel_safe_atomic_fs::{self as atomic_fs, Error, MultiFileTransaction, ReadLock};
use rustix::fs::XattrFlags;
use tempfile::{TempDir, tempdir};

use crate::child;
use crate::support::{LOCKS, eventually, not_run};

const NOBODY: u32 = 65534;

/// A directory that everyone may enter, with these files, each containing its name.
fn scene(files: &[&str]) -> TempDir {
    let dir = tempdir().unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    for file in files {
        std::fs::write(dir.path().join(file), file).unwrap();
    }
    dir
}

/// The existing locks, held or not.
fn locks(dir: &Path) -> Vec<&'static str> {
    LOCKS.into_iter().filter(|name| dir.join(name).exists()).collect()
}

/// Both files of a scene, with the same content.
async fn change(dir: &Path, content: &str) -> Result<(), Error> {
    let mut tx = MultiFileTransaction::new();
    tx.add_files(["a", "b"].map(|name| (dir.join(name), content))).await?;
    tx.commit().await
}

async fn lock(dir: &Path) -> ReadLock {
    atomic_fs::read_lock(dir).await.unwrap()
}

/// A child that does `task` until told to end.
struct Busy(Child);

impl Busy {
    fn begin(task: &str, dir: &Path) -> Self {
        let mut child = child::command(&[], task, dir).stderr(Stdio::inherit()).spawn().unwrap();
        child::await_word(&mut child, "busy");
        Self(child)
    }

    fn end(mut self) {
        drop(self.0.stdin.take());
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        // One that has ended is not to be killed any more.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// The task of a [`Busy`] child, until its input ends.
pub(crate) async fn busy(task: &str, dir: &Path) {
    let stop = Arc::new(AtomicBool::new(false));
    let mut tasks = tokio::task::JoinSet::new();
    match task {
        "read in turns" => (0..4).for_each(|reader| drop(tasks.spawn(read_on(dir.to_owned(), reader, stop.clone())))),
        "commit in turns" => {
            (0..4).for_each(|writer| drop(tasks.spawn(commit_on(dir.to_owned(), writer, stop.clone()))))
        }
        other => panic!("no such task: {other}"),
    }
    println!("\nchild says busy");
    std::io::stdout().flush().unwrap();
    tokio::task::spawn_blocking(|| std::io::stdin().lock().lines().for_each(drop)).await.unwrap();
    stop.store(true, Ordering::Relaxed);
    tasks.join_all().await;
}

/// Readers that overlap, so that the lock is never free.
async fn read_on(dir: PathBuf, reader: u64, stop: Arc<AtomicBool>) {
    tokio::time::sleep(Duration::from_millis(5 * reader)).await;
    while !stop.load(Ordering::Relaxed) {
        let lock = lock(&dir).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(lock);
    }
}

/// Writers of which one always waits.
async fn commit_on(dir: PathBuf, writer: u64, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::Relaxed) {
        change(&dir, &format!("by writer {writer}")).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_that_overlap_do_not_keep_out_a_writer_here_or_elsewhere() {
    let dir = scene(&["a", "b"]);
    let elsewhere = Busy::begin("read in turns", dir.path());
    let stop = Arc::new(AtomicBool::new(false));
    let here: Vec<_> =
        (0..4).map(|reader| tokio::spawn(read_on(dir.path().to_owned(), reader, stop.clone()))).collect();
    // Each with the usual patience.
    for round in 0..5 {
        change(dir.path(), &round.to_string()).await.unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    for reader in here {
        reader.await.unwrap();
    }
    elsewhere.end();
    assert_eq!(locks(dir.path()), [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_that_follow_each_other_do_not_keep_out_a_reader_here_or_elsewhere() {
    let dir = scene(&[]);
    change(dir.path(), "old").await.unwrap();
    let elsewhere = Busy::begin("commit in turns", dir.path());
    let stop = Arc::new(AtomicBool::new(false));
    let here: Vec<_> =
        (0..4).map(|writer| tokio::spawn(commit_on(dir.path().to_owned(), writer, stop.clone()))).collect();
    for _ in 0..20 {
        let lock = lock(dir.path()).await;
        let [a, b] = ["a", "b"].map(|name| std::fs::read(dir.path().join(name)).unwrap());
        assert_eq!(a, b);
        drop(lock);
    }
    stop.store(true, Ordering::Relaxed);
    for writer in here {
        writer.await.unwrap();
    }
    elsewhere.end();
    assert_eq!(locks(dir.path()), [""; 0]);
}

/// Like the kernel's own lock, and like every lock whose holders do not check for waiters.
#[test]
fn a_lock_without_turns_starves_a_writer() {
    let dir = scene(&["lock"]);
    let open = || std::fs::File::open(dir.path().join("lock")).unwrap();
    let mut readers = std::collections::VecDeque::new();
    for _ in 0..1000 {
        let next = open();
        next.try_lock_shared().unwrap();
        readers.push_back(next);
        if readers.len() > 2 {
            readers.pop_front();
        }
        assert!(open().try_lock().is_err(), "it was free for a moment");
    }
}

#[tokio::test]
async fn whoever_may_only_read_holds_up_nobody_and_sees_all_or_nothing_without_a_lock() {
    if !rustix::process::geteuid().is_root() {
        not_run("whoever_may_only_read_holds_up_nobody", "only root can become somebody else");
        return;
    }
    let dir = scene(&["a", "b"]);
    let mut child = child::command(&[], "hold up as nobody", dir.path()).spawn().unwrap();
    child::await_word(&mut child, "holds what it can");
    change(dir.path(), "new").await.unwrap();
    let held = lock(dir.path()).await;
    child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    child::await_word(&mut child, "refused, and read new new");
    drop(held);
    assert!(child.wait().unwrap().success());
}

/// The child's task in that test, as the user nobody.
pub(crate) async fn hold_up(dir: &Path, say: impl Fn(&str)) {
    // Whatever it can open, it can lock.
    let directory = std::fs::File::open(dir).unwrap();
    directory.try_lock().unwrap();
    say("holds what it can");
    std::io::stdin().read_line(&mut String::new()).unwrap();
    let opened = std::fs::File::open(dir.join(LOCKS[0]));
    assert_eq!(opened.unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
    let error = atomic_fs::read_lock(dir).await.unwrap_err();
    assert!(error.is_permission_denied() && error.to_string().contains("the right to write"), "{error}");
    let files = atomic_fs::open_together(["a", "b"].map(|name| dir.join(name))).await.unwrap();
    let contents: Vec<_> = files.into_iter().map(|file| std::io::read_to_string(file).unwrap()).collect();
    // A recovery with nothing to do needs no right to write either.
    assert_eq!(atomic_fs::recover(dir).await.unwrap(), atomic_fs::RecoveryReport::default());
    say(&format!("refused, and read {}", contents.join(" ")));
}

#[tokio::test]
async fn files_of_a_directory_that_is_mounted_read_only_are_opened_together() {
    let dir = scene(&["a", "b"]);
    let point = tempdir().unwrap();
    let mount = |arguments: &[&str]| {
        let mut command = std::process::Command::new("mount");
        command.args(arguments).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    };
    let (source, target) = (dir.path().to_str().unwrap(), point.path().to_str().unwrap());
    if !mount(&["--bind", source, target]) {
        not_run("files_of_a_directory_that_is_mounted_read_only", "it needs root, and the permission to mount");
        return;
    }
    let is_read_only = mount(&["-o", "remount,bind,ro", target]);
    let at = |name: &str| point.path().join(name);
    let read = |files: Vec<std::fs::File>| files.into_iter().map(std::io::read_to_string).collect::<Vec<_>>();
    let opened = atomic_fs::open_together([at("b"), at("a")]).await.map(read);
    let recovered = atomic_fs::recover(point.path()).await;
    let locked = atomic_fs::read_lock(point.path()).await;
    let status = std::process::Command::new("umount").arg(point.path()).status();
    assert!(is_read_only && status.unwrap().success());
    let contents: Vec<_> = opened.unwrap().into_iter().map(Result::unwrap).collect();
    assert_eq!(contents, ["b", "a"]);
    assert_eq!(recovered.unwrap(), atomic_fs::RecoveryReport::default());
    assert_eq!(locked.unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_are_opened_together_are_never_a_mix_and_opened_one_by_one_they_are() {
    let memory = Path::new("/dev/shm");
    let dir = if memory.exists() { tempfile::tempdir_in(memory).unwrap() } else { tempdir().unwrap() };
    let path = dir.path().to_owned();
    for name in ["a", "b"] {
        std::fs::write(path.join(name), "old").unwrap();
    }
    let stop = Arc::new(AtomicBool::new(false));
    // A process of its own, so that whatever this one does the files go on to change.
    let writer = Busy::begin("commit in turns", &path);
    let (place, stopped) = (path.clone(), stop.clone());
    let loose = std::thread::spawn(move || {
        let mut mixes = 0;
        while !stopped.load(Ordering::Relaxed) {
            let opened = ["a", "b"].map(|name| std::fs::File::open(place.join(name)).unwrap());
            let [a, b] = opened.map(|file| file.metadata().unwrap().modified().unwrap());
            mixes += u32::from(a != b);
        }
        mixes
    });
    for _ in 0..500 {
        let files = atomic_fs::open_together([path.join("a"), path.join("b")]).await.unwrap();
        let [a, b] = files
            .try_into()
            .map(|files: [std::fs::File; 2]| files.map(|file| std::io::read_to_string(file).unwrap()))
            .unwrap();
        assert_eq!(a, b);
    }
    stop.store(true, Ordering::Relaxed);
    println!("{} mixes", loose.join().unwrap());
    writer.end();
}

#[tokio::test]
async fn what_is_opened_together_is_in_the_order_of_the_paths_and_what_is_missing_is_named() {
    let dir = scene(&["a", "b"]);
    let at = |name: &str| dir.path().join(name);
    std::os::unix::fs::symlink("b", at("link")).unwrap();
    let files = atomic_fs::open_together([at("link"), at("a"), at("link")]).await.unwrap();
    let contents: Vec<_> = files.into_iter().map(|file| std::io::read_to_string(file).unwrap()).collect();
    assert_eq!(contents, ["b", "a", "b"]);
    assert_eq!(atomic_fs::open_together([""; 0]).await.unwrap().len(), 0);
    let missing = atomic_fs::open_together([at("a"), at("c")]).await.unwrap_err();
    assert_eq!(missing.kind(), std::io::ErrorKind::NotFound);
    assert!(missing.to_string().contains("open") && missing.to_string().ends_with("c\""), "{missing}");
    assert!(atomic_fs::open_together([at("a"), dir.path().to_owned()]).await.unwrap_err().is_not_a_file());
}

#[tokio::test]
async fn the_last_of_several_readers_removes_the_lock_whatever_their_order() {
    let dir = scene(&[]);
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
        let mut held = [Some(lock(dir.path()).await), Some(lock(dir.path()).await), Some(lock(dir.path()).await)];
        for (count, next) in order.into_iter().enumerate() {
            assert_eq!(locks(dir.path()), [LOCKS[0]], "{count} have gone");
            held[next] = None;
        }
        // A child of another test may be a copy of this process for a moment, with its locks.
        eventually("it is removed", || {
            drop(std::fs::File::open(dir.path().join(LOCKS[0])).map(|file| file.try_lock()));
            locks(dir.path()).is_empty()
        })
        .await;
    }
}

#[tokio::test]
async fn locks_that_a_killed_process_left_are_in_nobodys_way_and_go() {
    let dir = scene(&["a", "b"]);
    let leave = || LOCKS.iter().for_each(|name| std::fs::write(dir.path().join(name), "").unwrap());
    leave();
    change(dir.path(), "new").await.unwrap();
    assert_eq!(locks(dir.path()), [""; 0]);
    leave();
    drop(lock(dir.path()).await);
    assert_eq!(locks(dir.path()), [""; 0]);
    leave();
    assert_eq!(atomic_fs::recover(dir.path()).await.unwrap(), atomic_fs::RecoveryReport::default());
    assert_eq!(locks(dir.path()), [""; 0]);
    // One that is held stays.
    let held = lock(dir.path()).await;
    atomic_fs::recover(dir.path()).await.unwrap();
    assert_eq!(locks(dir.path()), [LOCKS[0]]);
    drop(held);
}

#[tokio::test]
async fn nobody_passes_one_that_waits() {
    let dir = scene(&["a", "b"]);
    let turn = std::fs::File::create(dir.path().join(LOCKS[1])).unwrap();
    turn.try_lock().unwrap();
    // Somebody else's turn: neither a reader nor a writer enters, although the directory is free.
    let wait = Duration::from_millis(100);
    assert!(tokio::time::timeout(wait, atomic_fs::read_lock(dir.path())).await.is_err());
    let mut tx = MultiFileTransaction::new().patience(wait);
    tx.add_files(["a", "b"].map(|name| (dir.path().join(name), "new"))).await.unwrap();
    assert!(tx.commit().await.unwrap_err().is_busy());
    drop(turn);
    change(dir.path(), "new").await.unwrap();
    assert_eq!(locks(dir.path()), [""; 0]);
}

#[tokio::test]
async fn whoever_waits_is_next() {
    let dir = scene(&["a", "b"]);
    for is_writer in [true, false] {
        let first = crate::support::lock_free(dir.path(), false).unwrap();
        let path = dir.path().to_owned();
        let waiting = tokio::spawn(async move {
            match is_writer {
                true => change(&path, "new").await.unwrap(),
                false => drop(lock(&path).await),
            }
        });
        eventually("it waits", || locks(dir.path()) == LOCKS).await;
        let turn = std::fs::File::open(dir.path().join(LOCKS[1])).unwrap();
        assert!(turn.try_lock_shared().is_err(), "it holds its turn");
        drop(first);
        waiting.await.unwrap();
        assert_eq!(locks(dir.path()), [""; 0]);
    }
}

#[tokio::test]
async fn whoever_has_entered_one_directory_waits_for_the_next_with_its_turn_there() {
    let dir = scene(&[]);
    let dirs = ["one", "other"].map(|name| dir.path().join(name));
    dirs.iter().for_each(|dir| std::fs::create_dir(dir).unwrap());
    let mut held = dirs.each_ref().map(|dir| Some(crate::support::lock_free(dir, false).unwrap()));
    let paths = dirs.each_ref().map(|dir| dir.join("file"));
    let waiting = tokio::spawn(async move {
        let mut tx = MultiFileTransaction::new();
        tx.add_files(paths.map(|path| (path, "new"))).await.unwrap();
        tx.commit().await.unwrap();
    });
    let is_waited_for = |dir: &PathBuf| locks(dir) == LOCKS;
    eventually("it waits for one of them", || dirs.iter().any(is_waited_for)).await;
    let first = dirs.iter().position(is_waited_for).unwrap();
    assert_eq!(locks(&dirs[1 - first]), [LOCKS[0]]);
    held[first] = None;
    eventually("it waits for the other", || is_waited_for(&dirs[1 - first])).await;
    assert_eq!(locks(&dirs[first]), [LOCKS[0]], "it is in there, and others may wait to be next");
    held[1 - first] = None;
    waiting.await.unwrap();
    assert!(dirs.iter().all(|dir| locks(dir).is_empty() && dir.join("file").exists()));
}

fn access_of(dir: &Path) -> (u32, u32, u32) {
    let meta = std::fs::symlink_metadata(dir.join(LOCKS[0])).unwrap();
    (meta.mode() & 0o7777, meta.uid(), meta.gid())
}

#[tokio::test]
async fn a_lock_can_be_opened_by_those_who_may_write_to_the_directory() {
    if !rustix::process::geteuid().is_root() {
        not_run("a_lock_can_be_opened_by_those_who_may_write", "only root can give directories away");
        return;
    }
    let dir = scene(&[]);
    let cases = [
        ((0o755, 0, 0), (0o600, 0, 0)),
        ((0o700, NOBODY, 0), (0o600, NOBODY, 0)),
        ((0o755, NOBODY, 1234), (0o600, NOBODY, 1234)),
        ((0o775, NOBODY, 1234), (0o660, NOBODY, 1234)),
        ((0o2770, 0, 1234), (0o660, 0, 1234)),
        ((0o777, NOBODY, NOBODY), (0o666, NOBODY, NOBODY)),
        ((0o1777, 0, 0), (0o666, 0, 0)),
    ];
    for ((mode, uid, gid), wanted) in cases {
        chown(dir.path(), Some(uid), Some(gid)).unwrap();
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(mode)).unwrap();
        let held = lock(dir.path()).await;
        assert_eq!(access_of(dir.path()), wanted, "{mode:o}");
        drop(held);
        assert_eq!(locks(dir.path()), [""; 0]);
    }
}

#[tokio::test]
async fn a_lock_follows_the_list_of_the_directory_and_no_default_list() {
    let parent = Path::new("/dev/shm");
    let Ok(dir) = tempfile::tempdir_in(parent) else { return not_run("a lock's list", "there is no /dev/shm") };
    // The owner, two more users, the group, the mask, all others.
    let list = |rights: [u16; 6]| {
        let ids = [u32::MAX, 12345, 12346, u32::MAX, u32::MAX, u32::MAX];
        let mut bytes = 2_u32.to_le_bytes().to_vec();
        for ((tag, right), id) in [1_u16, 2, 2, 4, 16, 32].into_iter().zip(rights).zip(ids) {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(right.to_le_bytes());
            bytes.extend(id.to_le_bytes());
        }
        bytes
    };
    let set = |attribute, rights| rustix::fs::setxattr(dir.path(), attribute, &list(rights), XattrFlags::empty());
    if set("system.posix_acl_access", [7, 7, 5, 5, 7, 5]).is_err() {
        return not_run("a lock's list", "there are no access control lists in /dev/shm");
    }
    set("system.posix_acl_default", [7, 7, 7, 7, 7, 7]).unwrap();
    let held = lock(dir.path()).await;
    let mut value = [0; 256];
    let length = rustix::fs::getxattr(dir.path().join(LOCKS[0]), "system.posix_acl_access", &mut value[..]).unwrap();
    assert_eq!(value[..length], list([6, 6, 0, 0, 6, 0]));
    drop(held);
    assert_eq!(locks(dir.path()), [""; 0]);
}
