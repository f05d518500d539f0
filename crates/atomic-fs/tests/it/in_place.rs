//! Files that no rename can replace, written in place: after a drop, a kill or a failure at any call the old content
//! comes back, and whole content stays whole.

use std::collections::HashSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cancel_safe_atomic_fs::{
    self as atomic_fs, AtomicFileWriter, Durability, Error, InPlace, MultiFileTransaction, Preserve, RecoveryReport,
    TargetState, WriteOptions,
};
use cancel_safe_testing::{Explore, Outcome, Way};
use tempfile::TempDir;

use crate::campaign::{is_full, scratch};
use crate::child;
use crate::replay::{Trace, Verdicts};
use crate::strace::{self, Call, Run};
use crate::support::{SLOW_DISK, drain_pool, eventually, names, not_run, temps};

const MIB: usize = 1 << 20;
/// The prefix of a child's tasks for this module.
pub(crate) const TASK: &str = "in place: ";
/// As many files as a child writes elsewhere first, so that its calls are counted on a thread of its own.
const OTHERS: usize = 40;

fn in_place() -> WriteOptions {
    AtomicFileWriter::options().in_place(InPlace::WithBackup)
}

/// Runs the child's task. The number after the task is how many bytes it writes.
pub(crate) async fn run(path: &Path, other: &Path, task: &str) -> Result<(), Error> {
    let (task, number) = task.rsplit_once(' ').unwrap();
    let number: usize = number.parse().unwrap();
    match task {
        "write" => {
            for _ in 0..OTHERS {
                atomic_fs::write(other, b"x").await?;
            }
            in_place().write(path, vec![b'N'; number]).await
        }
        "write with mode 0600 and" => in_place().mode(0o600).write(path, vec![b'N'; number]).await,
        "write with mode 0666 and" => in_place().mode(0o666).write(path, vec![b'N'; number]).await,
        "write alone" => in_place().write(path, vec![b'N'; number]).await,
        "take turns" => {
            for letter in (b'a'..=b'z').cycle().take(number) {
                while let Err(error) = in_place().write(path, letters(letter)).await {
                    // Turns are not fair: one that has had none for long tries again.
                    assert!(error.is_busy(), "{error}");
                }
            }
            Ok(())
        }
        "cancel" => {
            cancel_at_random(path, number).await;
            Ok(())
        }
        other => panic!("no such task: {other}"),
    }
}

/// Content that shows a mix: how long it is depends on what it is.
fn letters(letter: u8) -> Vec<u8> {
    vec![letter; 20_000 + 100 * usize::from(letter)]
}

/// A directory with one file in it, which is a mount point. All mounts go when this is dropped.
struct Bound {
    place: TempDir,
    dir: PathBuf,
    /// The mount point.
    file: PathBuf,
    /// The file that is mounted there.
    source: PathBuf,
    mounts: Vec<PathBuf>,
}

impl Bound {
    /// `None`, which is also published, if nothing can be mounted here.
    fn new(test: &str) -> Option<Self> {
        Self::prepare(test, |_| true)
    }

    fn prepare(test: &str, prepare: impl FnOnce(&mut Self) -> bool) -> Option<Self> {
        let place = scratch();
        let root = place.path().canonicalize().unwrap();
        let [dir, source] = ["traced", "source"].map(|name| root.join(name));
        let mut bound = Self { place, file: dir.join("file"), dir, source, mounts: Vec::new() };
        std::fs::create_dir(&bound.dir).unwrap();
        let is_ready = rustix::process::geteuid().is_root() && prepare(&mut bound) && {
            std::fs::write(&bound.file, "").unwrap();
            std::fs::write(&bound.source, "").unwrap();
            bound.bind()
        };
        if !is_ready {
            not_run(test, "it needs root, mount(8) and the permission to mount");
        }
        is_ready.then_some(bound)
    }

    fn bind(&mut self) -> bool {
        let (source, file) = (self.source.clone(), self.file.clone());
        self.mount(&["--bind", source.to_str().unwrap()], &file)
    }

    fn mount(&mut self, arguments: &[&str], point: &Path) -> bool {
        let is_mounted = Command::new("mount").args(arguments).arg(point).status().is_ok_and(|s| s.success());
        if is_mounted {
            self.mounts.push(point.to_owned());
        }
        is_mounted
    }

    fn small_disk(&mut self, point: &Path) -> bool {
        std::fs::create_dir_all(point).unwrap();
        self.mount(&["-t", "tmpfs", "-o", "size=128k", "tmpfs"], point)
    }

    /// Removes the last mount.
    fn unmount(&mut self) {
        let point = self.mounts.pop().unwrap();
        assert!(Command::new("umount").arg(point).status().unwrap().success());
    }

    /// Gives the file this content, and removes the remains of an earlier attempt.
    fn renew(&self, content: &[u8]) {
        temps(&self.dir).iter().for_each(|name| std::fs::remove_file(self.dir.join(name)).unwrap());
        std::fs::write(&self.file, content).unwrap();
        std::fs::set_permissions(&self.file, PermissionsExt::from_mode(0o640)).unwrap();
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.file).unwrap()
    }

    /// Asserts that there is only the file, with this content.
    fn assert_is(&self, content: &[u8]) {
        assert!(self.content() == content, "{} bytes instead of {}", self.content().len(), content.len());
        assert_eq!(names(&self.dir), ["file"]);
    }

    /// Lets a child write `bytes` bytes, with a fault if there is one.
    fn write(&self, bytes: usize, inject: Option<&str>) -> Run {
        strace::run(&format!("{TASK}write {bytes}"), &self.file, self.place.path(), inject)
    }

    /// Leaves the file half written by a dead writer.
    fn crash(&self, old: &[u8]) {
        self.renew(old);
        let run = self.write(NEW_BYTES, Some("ftruncate:signal=SIGKILL:when=1"));
        assert_eq!(run.said, None, "{}", run.complaint);
        assert!(self.content() != old && self.record().is_some(), "{:?}", names(&self.dir));
    }

    /// The record of a writer, without a suffix.
    fn record(&self) -> Option<PathBuf> {
        let record = temps(&self.dir).into_iter().find(|name| name.starts_with(".afs-place-") && name.len() == 27);
        record.map(|name| self.dir.join(name))
    }

    fn backup(&self) -> PathBuf {
        format!("{}-old", self.record().unwrap().display()).into()
    }

    /// Recovers, as a program does when it starts.
    async fn recover(&self) -> Result<RecoveryReport, Error> {
        let report = atomic_fs::recover(&self.dir).await?;
        assert_eq!(atomic_fs::sweep(&self.dir).await?.failed, 0);
        Ok(report)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        for point in self.mounts.iter().rev() {
            // A process that still has it open, for example a child, does not keep it mounted here.
            let _gone = Command::new("umount").arg("-l").arg(point).status();
        }
    }
}

const NEW_BYTES: usize = 4096;

#[tokio::test]
async fn a_mount_point_is_written_in_place_and_stays_the_file_that_it_was() {
    let Some(bound) = Bound::new("a_mount_point_is_written_in_place_and_stays_the_file_that_it_was") else { return };
    bound.renew(b"old");
    chown(&bound.file, Some(1234), Some(4321)).unwrap();
    std::fs::set_permissions(&bound.file, PermissionsExt::from_mode(0o600)).unwrap();
    let look = || {
        let meta = std::fs::metadata(&bound.source).unwrap();
        (meta.ino(), meta.mode() & 0o7777, meta.uid(), meta.gid())
    };
    let before = look();
    assert_eq!(&before.1, &0o600);
    let link = bound.place.path().join("link");
    symlink(&bound.file, &link).unwrap();
    for (number, length) in [10, 5000, 3, 0, 3 * MIB + 5, 2 * MIB, 1, 0].into_iter().enumerate() {
        let content = vec![b'a' + u8::try_from(number).unwrap(); length];
        let options = match number % 3 {
            0 => in_place(),
            1 => in_place().preserve(Preserve::NONE).durability(Durability::None),
            _ => in_place().preserve(Preserve::ALL).durability(Durability::Ordered),
        };
        options.write(&bound.file, &content).await.unwrap();
        bound.assert_is(&content);
        let mut writer = options.open(&link).await.unwrap();
        writer.write_all(&content).await.unwrap();
        writer.write_all(b"more").await.unwrap();
        writer.commit().await.unwrap();
        bound.assert_is(&[&content, b"more".as_slice()].concat());
        assert_eq!((look(), std::fs::read(&bound.source).unwrap()), (before, bound.content()));
    }
    assert_eq!(bound.recover().await.unwrap(), RecoveryReport::default());
}

#[tokio::test]
async fn without_the_option_and_in_a_transaction_a_mount_point_is_refused() {
    let Some(bound) = Bound::new("without_the_option_and_in_a_transaction_a_mount_point_is_refused") else { return };
    bound.renew(b"old");
    let mut tx = MultiFileTransaction::new().options(in_place());
    tx.add_file(&bound.file, "new").await.unwrap();
    let mut two = MultiFileTransaction::new().options(in_place());
    two.add_file(&bound.file, "new").await.unwrap();
    two.add_file(bound.dir.join("other"), "new").await.unwrap();
    for error in [
        atomic_fs::write(&bound.file, "new").await.unwrap_err(),
        in_place().in_place(InPlace::Never).write(&bound.file, "new").await.unwrap_err(),
        tx.commit().await.unwrap_err(),
        two.commit().await.unwrap_err(),
    ] {
        assert!(error.is_not_replaceable() && error.target() == TargetState::Unchanged, "{error}");
    }
    let error = in_place().create_new(true).write(&bound.file, "new").await.unwrap_err();
    assert!(error.is_already_exists(), "{error}");
    bound.assert_is(b"old");
    // What can be replaced is replaced.
    let path = bound.dir.join("usual");
    std::fs::write(&path, "old").unwrap();
    let inode = || std::fs::metadata(&path).unwrap().ino();
    let before = inode();
    in_place().write(&path, "new").await.unwrap();
    assert_ne!(inode(), before);
}

#[tokio::test]
async fn a_mode_that_is_given_is_set_and_others_are_kept() {
    let Some(bound) = Bound::new("a_mode_that_is_given_is_set_and_others_are_kept") else { return };
    let mode = || std::fs::metadata(&bound.source).unwrap().mode() & 0o7777;
    for (old, given, expected) in [
        (0o640, Some(0o600), 0o600),
        (0o600, Some(0o644), 0o644),
        (0o604, Some(0o640), 0o640),
        (0o4755, None, 0o4755),
        (0o400, None, 0o400),
    ] {
        bound.renew(b"old");
        std::fs::set_permissions(&bound.file, PermissionsExt::from_mode(old)).unwrap();
        let options = given.map_or(in_place(), |mode| in_place().mode(mode));
        options.write(&bound.file, "new").await.unwrap();
        bound.assert_is(b"new");
        assert_eq!(mode(), expected, "{old:o} {given:?}");
    }
}

#[tokio::test]
async fn a_full_disk_is_met_before_anything_is_overwritten() {
    let test = "a_full_disk_is_met_before_anything_is_overwritten";
    let content = vec![b'N'; 200_000];
    // The disk of what is mounted; and that of the mount point, where the backup would be.
    for is_target in [true, false] {
        let prepare = |bound: &mut Bound| {
            let point = if is_target { bound.place.path().join("disk") } else { bound.dir.clone() };
            if is_target {
                bound.source = point.join("source");
            }
            bound.small_disk(&point)
        };
        let Some(bound) = Bound::prepare(test, prepare) else { return };
        let old = if is_target { b"old".to_vec() } else { vec![b'o'; 150_000] };
        bound.renew(&old);
        let new = if is_target { &content[..] } else { b"new" };
        let error = in_place().write(&bound.file, new).await.unwrap_err();
        assert!(error.is_storage_full() && error.target() == TargetState::Unchanged, "{error}");
        bound.assert_is(&old);
        if is_target {
            // What was reserved is free again, and if nothing can be reserved, what was overwritten is put back.
            std::fs::write(bound.source.with_file_name("other"), vec![0; 100_000]).unwrap();
            std::fs::remove_file(bound.source.with_file_name("other")).unwrap();
            if child::strace(test).is_some() {
                let run = bound.write(content.len(), Some("fallocate:error=EOPNOTSUPP"));
                assert!(run.said.as_deref().is_some_and(|said| said.starts_with("Unchanged StorageFull")), "{run:?}");
                assert!(run.calls.iter().any(|call| call.name == "ftruncate"), "it was never begun");
                bound.assert_is(&old);
            }
            in_place().write(&bound.file, &content[..60_000]).await.unwrap();
            bound.assert_is(&content[..60_000]);
        }
    }
}

/// On the usual disk, with a mounted file from a file system other than the mount point's.
#[tokio::test]
async fn space_that_was_reserved_for_a_write_that_failed_is_given_back() {
    let test = "space_that_was_reserved_for_a_write_that_failed_is_given_back";
    let disk = tempfile::tempdir().unwrap();
    let prepare = |bound: &mut Bound| {
        bound.source = disk.path().join("source");
        true
    };
    let (Some(bound), Some(_)) = (Bound::prepare(test, prepare), child::strace(test)) else { return };
    let blocks =
        || std::fs::File::open(&bound.source).unwrap().sync_all().map(|()| bound.source.metadata().unwrap().blocks());
    let old = vec![b'o'; 5000];
    bound.renew(&old);
    let before = blocks().unwrap();
    let run = bound.write(4 * MIB, Some("symlinkat:error=EIO:when=1"));
    assert!(run.said.as_deref().is_some_and(|said| said.starts_with("Unchanged")), "{run:?}");
    assert!(run.calls.iter().any(|call| call.name == "fallocate"), "nothing was reserved");
    bound.assert_is(&old);
    // File systems round; 4 MiB are 8192 of these.
    assert!(blocks().unwrap() < before + 1000, "{} after {before}", blocks().unwrap());
    in_place().write(&bound.file, vec![b'N'; 4 * MIB]).await.unwrap();
    bound.assert_is(&vec![b'N'; 4 * MIB]);
    in_place().write(&bound.file, "short").await.unwrap();
    bound.assert_is(b"short");
    assert!(blocks().unwrap() < before + 1000, "{} after {before}", blocks().unwrap());
    // What is restored on a disk.
    bound.crash(&old);
    assert_eq!(bound.recover().await.unwrap().restored, 1);
    bound.assert_is(&old);
}

#[test]
fn dropped_write_in_place_leaves_old_or_new_for_ever() {
    let Some(bound) = Bound::new("dropped_write_in_place_leaves_old_or_new_for_ever") else { return };
    for length in [10, 3 * MIB] {
        let (old, new) = (vec![b'o'; 5000], vec![b'N'; length]);
        let report = Explore::new()
            .hang_after(SLOW_DISK)
            .ways([Way::Eager, Way::Settled, Way::Shutdown, Way::Panic])
            .paused_time(true)
            .run(
                async || bound.renew(&old),
                async |()| in_place().write(&bound.file, &new).await.unwrap(),
                async |(), outcome| {
                    let content = bound.content();
                    match outcome {
                        _ if names(&bound.dir) != ["file"] => Err(format!("left behind: {:?}", names(&bound.dir))),
                        Outcome::Completed(()) if content != new => Err("completed, but old".to_owned()),
                        Outcome::Dropped { point: 0, .. } if content != old => Err("never polled, but new".to_owned()),
                        _ if content != old && content != new => Err(format!("torn: {} bytes", content.len())),
                        _ => Ok(()),
                    }
                },
            );
        report.publish("atomic-fs", &format!("write-in-place/{length}-bytes")).assert_clean();
    }
}

/// Drops writes, each at a random moment of the time that one takes, and checks at once and later.
async fn cancel_at_random(path: &Path, rounds: usize) {
    let (old, new) = (vec![b'o'; 5000], vec![b'N'; 65536]);
    let mut longest = Duration::MAX;
    for _ in 0..5 {
        let begun = std::time::Instant::now();
        in_place().write(path, &new).await.unwrap();
        // The shortest, so that on a busy machine too many are dropped.
        longest = longest.min(begun.elapsed().mul_f64(1.2));
    }
    let (mut dropped, mut landed) = (0, 0);
    for round in 0..rounds {
        std::fs::write(path, &old).unwrap();
        let limit = longest.mul_f64(fastrand::f64());
        let is_dropped = tokio::time::timeout(limit, in_place().write(path, &new)).await.is_err();
        let at_drop = std::fs::read(path).unwrap();
        drain_pool().await;
        assert!(at_drop == old || at_drop == new, "round {round}: {} bytes", at_drop.len());
        assert!(std::fs::read(path).unwrap() == at_drop, "round {round}: it changed after the drop");
        assert_eq!(names(path.parent().unwrap()), ["file"], "round {round}");
        dropped += usize::from(is_dropped);
        landed += usize::from(is_dropped && at_drop == new);
    }
    println!("{dropped} dropped, {landed} of them landed");
    assert!(dropped > 0, "the moments are badly chosen");
}

/// Its writes are slow, so that many drops find them begun.
#[test]
fn a_drop_that_finds_a_write_in_place_begun_waits_for_it() {
    let name = "in-place/dropped-while-written";
    let (Some(bound), Some(strace)) = (Bound::new(name), child::strace(name)) else { return };
    let rounds = if is_full() { 2000 } else { 60 };
    let wrapper = [strace, "-f", "-qq", "-o", "/dev/null", "-e", "inject=pwrite64:delay_exit=3000"];
    let said = child::outcome(child::command(&wrapper, &format!("{TASK}cancel {rounds}"), &bound.file));
    cancel_safe_campaign::publish_campaign("atomic-fs", name, rounds, usize::from(said.as_deref() != Some("Ok")));
    assert_eq!(said.as_deref(), Some("Ok"));
}

#[tokio::test]
async fn a_lock_that_others_hold_is_waited_for_and_a_drop_meanwhile_changes_nothing() {
    let test = "a_lock_that_others_hold_is_waited_for_and_a_drop_meanwhile_changes_nothing";
    let Some(bound) = Bound::new(test) else { return };
    bound.renew(b"old");
    let reader = std::fs::File::open(&bound.source).unwrap();
    reader.lock_shared().unwrap();
    let file = bound.file.clone();
    let dropped = tokio::spawn(async move { in_place().write(file, "new").await });
    eventually("it has its new content beside it", || !temps(&bound.dir).is_empty()).await;
    dropped.abort();
    assert!(dropped.await.unwrap_err().is_cancelled());
    eventually("the temporary file goes", || names(&bound.dir) == ["file"]).await;
    let error = in_place().write(&bound.file, "new").await.unwrap_err();
    assert!(error.is_busy() && error.target() == TargetState::Unchanged, "{error}");
    assert!(matches!(&error, Error::FileBusy { path, .. } if *path == bound.file), "{error:?}");
    bound.assert_is(b"old");
    let file = bound.file.clone();
    let waiting = tokio::spawn(async move { in_place().write(file, "new").await });
    eventually("it has its new content beside it", || !temps(&bound.dir).is_empty()).await;
    reader.unlock().unwrap();
    waiting.await.unwrap().unwrap();
    bound.assert_is(b"new");
}

#[tokio::test]
async fn writers_in_place_take_turns_and_a_reader_with_the_lock_sees_no_half() {
    let Some(bound) = Bound::new("writers_in_place_take_turns_and_a_reader_with_the_lock_sees_no_half") else { return };
    bound.renew(&letters(b'A'));
    let rounds = if is_full() { 1000 } else { 30 };
    let mut children: Vec<_> = (0..2)
        .map(|_| child::command(&[], &format!("{TASK}take turns {rounds}"), &bound.file).spawn().unwrap())
        .collect();
    let own: Vec<_> = (0..2_u8)
        .map(|number| {
            let file = bound.file.clone();
            tokio::spawn(
                async move { run(&file, &file, &format!("take turns {}", rounds + usize::from(number))).await },
            )
        })
        .collect();
    let mut seen = HashSet::new();
    while children.iter_mut().any(|child| child.try_wait().unwrap().is_none()) {
        let reader = std::fs::File::open(&bound.file).unwrap();
        if reader.try_lock_shared().is_ok() {
            let content = bound.content();
            reader.unlock().unwrap();
            assert!(content == letters(content[0]), "a mix of {} bytes", content.len());
            seen.insert(content[0]);
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert_eq!(child::last_word(&output.stdout).as_deref(), Some("Ok"), "{output:?}");
    }
    for own in own {
        own.await.unwrap().unwrap();
    }
    println!("{} contents seen", seen.len());
    bound.assert_is(&letters(bound.content()[0]));
}

/// Old content that is longer, shorter, and of several pieces; and how much is written over it.
fn sizes() -> [(Vec<u8>, usize); 3] {
    [(vec![b'o'; 5000], NEW_BYTES), (b"old".to_vec(), NEW_BYTES), (vec![b'o'; 3 * MIB + 1], 2 * MIB + 1)]
}

/// The calls of a run, each aim once.
fn aims(run: &Run, is_wanted: impl Fn(&Call) -> bool) -> Vec<Call> {
    let mut seen = HashSet::new();
    let calls = run.calls.iter().filter(|call| !matches!(&*call.name, "close" | "fcntl") && is_wanted(call));
    calls.filter(|call| seen.insert((call.name.clone(), call.number))).cloned().collect()
}

/// In the quick form about as many as `quick`, spread evenly.
fn sample<T>(points: Vec<T>, quick: usize) -> Vec<T> {
    let step = if is_full() { 1 } else { points.len().div_ceil(quick).max(1) };
    points.into_iter().skip(step / 2).step_by(step).collect()
}

/// Compares the state before and after the recovery with the child's messages.
async fn verify(bound: &Bound, old: &[u8], new: &[u8], inode: u64, run: &Run) -> Result<(), String> {
    let before = bound.content();
    let said = run.said.as_deref().unwrap_or("nothing");
    let told = said.split(' ').next().unwrap();
    // A child that lives to report has cleaned up, unless the disk refuses.
    let is_stuck = |call: &Call| call.is_injected() && matches!(&*call.name, "unlinkat" | "fsync");
    match told {
        "Ok" | "Visible" if before != new => return Err(format!("{said}, but {} bytes", before.len())),
        "Unchanged" if before != old => return Err(format!("{said}, but {} bytes", before.len())),
        "Ok" | "Unchanged" if !temps(&bound.dir).is_empty() && !run.calls.iter().any(is_stuck) => {
            return Err(format!("{said}, and left {:?}", names(&bound.dir)));
        }
        _ => {}
    }
    for copy in temps(&bound.dir).iter().filter(|name| name.ends_with("-old")) {
        let mode = std::fs::metadata(bound.dir.join(copy)).unwrap().mode() & 0o7777;
        if mode != 0o600 {
            return Err(format!("the copy grants {mode:o}"));
        }
    }
    let had_record = bound.record().is_some();
    let report = bound.recover().await.map_err(|error| format!("{said}, then {error}"))?;
    let after = bound.content();
    let is_wanted = match told {
        "Ok" | "Visible" => after == new,
        "Unchanged" | "Undecided" => after == old,
        _ if had_record => after == old,
        _ => after == old || after == new,
    };
    if !is_wanted || report.restored != usize::from(had_record) {
        let is = [("old", old), ("new", new)].into_iter().find(|(_, content)| after == *content);
        return Err(format!("torn, or not what was told: {said}, then {is:?} by {report:?}"));
    }
    let meta = std::fs::metadata(&bound.file).unwrap();
    if names(&bound.dir) != ["file"] || (meta.ino(), meta.mode() & 0o7777) != (inode, 0o640) {
        return Err(format!("left {:?}, {:o}", names(&bound.dir), meta.mode()));
    }
    Ok(())
}

/// Visits the calls of a write with each fault.
async fn visit(name: &str, task: &str, faults: &[&str], quick: usize) -> Option<Vec<String>> {
    let (Some(bound), Some(_)) = (Bound::new(name), child::strace(name)) else { return None };
    let inode = std::fs::metadata(&bound.source).unwrap().ino();
    let mut violations = Vec::new();
    let mut points = 0;
    for (old, bytes) in sizes() {
        let new = vec![b'N'; bytes];
        let task = task.replace("BYTES", &bytes.to_string());
        let attempt = |inject: Option<&str>| {
            bound.renew(&old);
            strace::run(&task, &bound.file, bound.place.path(), inject)
        };
        let run = attempt(None);
        assert_eq!(run.said.as_deref(), Some("Ok"), "{}", run.complaint);
        let calls = aims(&run, |call| call.name != "write" || call.text.contains("/traced/"));
        let all = calls.iter().flat_map(|call| faults.iter().map(move |fault| (call, fault))).collect();
        for (call, fault) in sample(all, quick) {
            let inject = format!("{}:{fault}:when={}", call.name, call.number);
            let run = attempt(Some(&inject));
            let is_ignored = matches!(&*call.name, "flock" | "unlinkat");
            let verdict = match run.said.as_deref() {
                Some("Ok") if run.is_hit && !is_ignored => Err("it was not reported".to_owned()),
                None if fault.starts_with("error") && run.is_hit => Err(format!("it died: {}", run.complaint)),
                _ => verify(&bound, &old, &new, inode, &run).await,
            };
            points += 1;
            violations.extend(verdict.err().map(|why| format!("{inject}: {why}")));
        }
    }
    let published = if name.ends_with("twin") { 0 } else { violations.len() };
    cancel_safe_campaign::publish_campaign("atomic-fs", name, points, published);
    Some(violations)
}

#[tokio::test]
async fn a_write_in_place_that_is_killed_at_any_call_is_recovered_to_old_or_new() {
    let violations = visit("in-place/kills", &format!("{TASK}write BYTES"), &["signal=SIGKILL"], 30).await;
    assert!(violations.as_ref().is_none_or(Vec::is_empty), "{violations:#?}");
}

#[tokio::test]
async fn a_write_in_place_that_fails_at_any_call_leaves_the_old_content() {
    let faults = ["error=EIO", "error=ENOSPC"];
    let violations = visit("in-place/faults", &format!("{TASK}write BYTES"), &faults, 30).await;
    assert!(violations.as_ref().is_none_or(Vec::is_empty), "{violations:#?}");
}

#[tokio::test]
async fn the_same_check_catches_a_write_in_place_without_a_backup() {
    // It writes as much as the first two.
    let Some(violations) = visit("in-place/twin", "write in place", &["signal=SIGKILL"], usize::MAX).await else {
        return;
    };
    assert!(violations.iter().any(|violation| violation.contains("torn")), "{violations:#?}");
}

/// From one call on the disk accepts nothing more, so that the old content cannot be restored either.
#[tokio::test]
async fn what_cannot_be_put_back_is_told_and_left_to_a_recovery() {
    let name = "in-place/double-faults";
    let (Some(bound), Some(_)) = (Bound::new(name), child::strace(name)) else { return };
    let inode = std::fs::metadata(&bound.source).unwrap().ino();
    let (old, new) = (vec![b'o'; 3 * MIB + 1], vec![b'N'; 2 * MIB + 1]);
    bound.renew(&old);
    let run = bound.write(new.len(), None);
    let begun = run.calls.iter().rposition(|call| call.name == "symlinkat").unwrap();
    let late = Run { calls: run.calls[begun + 1..].to_vec(), ..run };
    let calls = aims(&late, |call| matches!(&*call.name, "pwrite64" | "ftruncate" | "fsync"));
    let mut torn = 0;
    for call in &calls {
        bound.renew(&old);
        let inject = format!("{}:error=EIO:when={}+", call.name, call.number);
        let run = bound.write(new.len(), Some(&inject));
        let said = run.said.clone().unwrap();
        if said.starts_with("Undecided") {
            torn += 1;
            let (record, backup) = (bound.record().unwrap(), bound.backup());
            assert!(said.contains(&format!("{backup:?}")) && said.contains("recover"), "{said}");
            assert!(std::fs::read(&backup).unwrap() == old && record.is_symlink());
            // Not even a new write is tried before that.
            let error = in_place().write(&bound.file, "newer").await.unwrap_err();
            assert!(error.is_unrecovered() && error.target() == TargetState::Unchanged, "{error}");
        }
        verify(&bound, &old, &new, inode, &run).await.unwrap_or_else(|why| panic!("{inject}: {why}"));
    }
    assert!(torn >= 3, "{torn} of {} were torn", calls.len());
    cancel_safe_campaign::publish_campaign("atomic-fs", name, calls.len(), 0);
}

#[tokio::test]
async fn a_recovery_that_is_cut_at_any_call_is_finished_by_the_next_one() {
    let name = "in-place/recovery";
    let (Some(bound), Some(_)) = (Bound::new(name), child::strace(name)) else { return };
    let old = vec![b'o'; 3 * MIB + 1];
    let recover = |inject: Option<&str>| {
        bound.crash(&old);
        strace::run("recover", &bound.dir, bound.place.path(), inject)
    };
    let run = recover(None);
    assert_eq!((run.said.as_deref(), bound.content() == old), (Some("Ok"), true), "{}", run.complaint);
    let calls = aims(&run, |_| true);
    let faults = ["signal=SIGKILL", "error=EIO"];
    let points = sample(calls.iter().flat_map(|call| faults.map(|fault| (call, fault))).collect(), 30);
    for (call, fault) in &points {
        let inject = format!("{}:{fault}:when={}", call.name, call.number);
        let run = recover(Some(&inject));
        let said = run.said.unwrap_or_default();
        let is_told = |content: &[u8]| !said.starts_with("Ok") || content == old;
        assert!(is_told(&bound.content()), "{inject}: {said}");
        bound.recover().await.unwrap_or_else(|error| panic!("{inject}: {said}, then {error}"));
        assert!(bound.content() == old, "{inject}: {said}");
        assert_eq!(names(&bound.dir), ["file"], "{inject}: {said}");
    }
    cancel_safe_campaign::publish_campaign("atomic-fs", name, points.len(), 0);
}

/// A crash that left the file half written, or `None` if that is not possible here.
fn crashed(test: &str, old: &[u8]) -> Option<Bound> {
    let (Some(bound), Some(_)) = (Bound::new(test), child::strace(test)) else { return None };
    bound.crash(old);
    Some(bound)
}

#[tokio::test]
async fn until_a_recovery_a_dead_write_refuses_others_and_a_living_one_is_left_alone() {
    let test = "until_a_recovery_a_dead_write_refuses_others_and_a_living_one_is_left_alone";
    let old = vec![b'o'; 5000];
    let Some(mut bound) = crashed(test, &old) else { return };
    // Nor by another name.
    let (source, again) = (bound.source.clone(), bound.dir.join("again"));
    std::fs::write(&again, "").unwrap();
    assert!(bound.mount(&["--bind", source.to_str().unwrap()], &again));
    for path in [&bound.file, &again] {
        let error = in_place().write(path, "newer").await.unwrap_err();
        assert!(matches!(&error, Error::Unrecovered { directory } if *directory == bound.dir), "{error:?}");
    }
    bound.unmount();
    std::fs::remove_file(&again).unwrap();
    // As if its writer lived.
    let torn = bound.content();
    let writer = std::fs::File::open(bound.backup()).unwrap();
    writer.lock().unwrap();
    let report = bound.recover().await.unwrap();
    assert_eq!((report.live, report.restored, report.removed), (1, 0, 0), "{report:?}");
    assert!(bound.content() == torn && bound.record().is_some());
    writer.unlock().unwrap();
    let report = bound.recover().await.unwrap();
    assert_eq!((report.live, report.restored, report.removed), (0, 1, 0), "{report:?}");
    bound.assert_is(&old);
    assert_eq!(bound.recover().await.unwrap(), RecoveryReport::default());
    in_place().write(&bound.file, "newer").await.unwrap();
    bound.assert_is(b"newer");
}

/// The old content never has more rights than its own mode, nor the new content more than the given mode.
#[tokio::test]
async fn a_mode_comes_back_with_the_old_content_and_one_that_was_not_given_is_left_alone() {
    let test = "a_mode_comes_back_with_the_old_content_and_one_that_was_not_given_is_left_alone";
    let old = vec![b'o'; 5000];
    let Some(bound) = crashed(test, &old) else { return };
    let mode = || std::fs::metadata(&bound.source).unwrap().mode() & 0o7777;
    // It is made private between the crash and the recovery.
    std::fs::set_permissions(&bound.source, PermissionsExt::from_mode(0o600)).unwrap();
    assert_eq!(bound.recover().await.unwrap().restored, 1);
    bound.assert_is(&old);
    assert_eq!(mode(), 0o600);
    let wide = |mode| mode & !0o640 != 0;
    for given in ["0600", "0666"] {
        let task = format!("{TASK}write with mode {given} and {NEW_BYTES}");
        for number in 1..100 {
            bound.renew(&old);
            // Each call after the copy has been written, until there are no more.
            let inject = format!("fchmod:signal=SIGKILL:when={number}");
            let run = strace::run(&task, &bound.file, bound.place.path(), Some(&inject));
            let (is_old, seen) = (bound.content() == old, mode());
            if run.said.is_some() {
                assert_eq!(run.said.as_deref(), Some("Ok"));
                assert!(number >= 2, "it was never killed");
                bound.assert_is(&vec![b'N'; NEW_BYTES]);
                assert_eq!(format!("{seen:04o}"), given);
                break;
            }
            assert!(!wide(seen) || !is_old, "the old content grants {seen:o}");
            bound.recover().await.unwrap();
            bound.assert_is(&old);
            assert_eq!(mode(), 0o640, "{inject}");
        }
    }
}

#[tokio::test]
async fn a_backup_is_not_put_back_where_its_mount_is_absent_or_its_file_is_gone() {
    let test = "a_backup_is_not_put_back_where_its_mount_is_absent_or_its_file_is_gone";
    let old = vec![b'o'; 5000];
    let Some(mut bound) = crashed(test, &old) else { return };
    bound.unmount();
    let (record, backup) = (bound.record().unwrap(), bound.backup());
    for is_there in [true, false] {
        if !is_there {
            std::fs::remove_file(&bound.file).unwrap();
        }
        let error = bound.recover().await.unwrap_err();
        assert!(error.is_refused() && error.target() == TargetState::Unchanged, "{error}");
        assert!(error.to_string().contains(&format!("{backup:?}")), "{error}");
        assert!(record.is_symlink() && std::fs::read(&backup).unwrap() == old);
        assert!(!is_there || std::fs::read(&bound.file).unwrap().is_empty(), "the file below was touched");
    }
    std::fs::write(&bound.file, "").unwrap();
    assert!(bound.bind());
    assert_eq!(bound.recover().await.unwrap().restored, 1);
    bound.assert_is(&old);
}

#[tokio::test]
async fn a_copied_tree_is_recovered_by_itself_and_several_files_are_at_once() {
    let test = "a_copied_tree_is_recovered_by_itself_and_several_files_are_at_once";
    let old = vec![b'o'; 5000];
    let Some(bound) = crashed(test, &old) else { return };
    let torn = bound.content();
    let copy = bound.place.path().join("copy");
    assert!(Command::new("cp").arg("-a").arg(&bound.dir).arg(&copy).status().unwrap().success());
    // A second one, by hand: the text of a record says by what both files are known, neither of which is here what it was.
    std::fs::write(copy.join("other"), "torn").unwrap();
    symlink("1,2,644/other", copy.join(".afs-place-0000000000000001")).unwrap();
    std::fs::write(copy.join(".afs-place-0000000000000001-old"), "other").unwrap();
    // An orphaned copy.
    std::fs::write(copy.join(".afs-place-0000000000000002-old"), "litter").unwrap();
    let report = atomic_fs::recover(&copy).await.unwrap();
    assert_eq!((report.restored, report.removed), (2, 1), "{report:?}");
    assert!(std::fs::read(copy.join("file")).unwrap() == old && bound.content() == torn);
    assert_eq!(std::fs::read(copy.join("other")).unwrap(), b"other");
    assert_eq!(bound.recover().await.unwrap().restored, 1);
    bound.assert_is(&old);
}

#[tokio::test]
async fn a_hostile_record_is_refused_and_never_followed() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("dir");
    let outside = place.path().join("outside");
    let (record, backup) = (dir.join(".afs-place-00000000000000aa"), dir.join(".afs-place-00000000000000aa-old"));
    std::fs::create_dir(&dir).unwrap();
    std::fs::create_dir(dir.join("directory")).unwrap();
    std::fs::write(&outside, "outside").unwrap();
    std::fs::write(dir.join("file"), "file").unwrap();
    symlink(&outside, dir.join("link")).unwrap();
    std::fs::write(&backup, "hostile").unwrap();
    for link in [
        outside.to_str().unwrap(),
        "../outside",
        "file",
        "1,2,644/../outside",
        "1,2,644/..",
        "1,2,644/link",
        "1,2,644/directory",
        "1,2,644/missing",
        "1,2,644/.afs-place-00000000000000aa-old",
    ] {
        symlink(link, &record).unwrap();
        let error = atomic_fs::recover(&dir).await.unwrap_err();
        assert!(error.is_refused() && matches!(error, Error::UnusableBackup { .. }), "{link}: {error:?}");
        assert!(record.is_symlink() && std::fs::read(&backup).unwrap() == b"hostile", "{link}");
        std::fs::remove_file(&record).unwrap();
    }
    // A backup that is none, or missing.
    symlink("1,2,644/file", &record).unwrap();
    std::fs::remove_file(&backup).unwrap();
    assert!(atomic_fs::recover(&dir).await.unwrap_err().is_refused());
    symlink(&outside, &backup).unwrap();
    assert!(atomic_fs::recover(&dir).await.unwrap_err().is_refused());
    assert_eq!(std::fs::read(&outside).unwrap(), b"outside");
    assert_eq!(std::fs::read(dir.join("file")).unwrap(), b"file");
    // A refused record does not keep others from being recovered.
    std::fs::write(dir.join(".afs-place-00000000000000ab-old"), "back").unwrap();
    symlink("1,2,644/file", dir.join(".afs-place-00000000000000ab")).unwrap();
    std::fs::write(dir.join(".afs-tx-00000000000000ab-1"), "litter").unwrap();
    assert!(atomic_fs::recover(&dir).await.unwrap_err().is_refused());
    assert_eq!(std::fs::read(dir.join("file")).unwrap(), b"back");
    assert_eq!(temps(&dir), [".afs-place-00000000000000aa", ".afs-place-00000000000000aa-old"]);
    // What is no symlink is no record, and no directory is a backup.
    std::fs::remove_file(&record).unwrap();
    std::fs::remove_file(&backup).unwrap();
    std::fs::create_dir(&record).unwrap();
    std::fs::create_dir(&backup).unwrap();
    assert_eq!(atomic_fs::recover(&dir).await.unwrap(), RecoveryReport::default());
}

/// The fault that makes an ordinary file irreplaceable.
const IS_BUSY: &str = "renameat:error=EBUSY";

/// Recovers and judges each state that a cut may leave; once everything is over, the content is to be what was `told`.
async fn replay(trace: &Trace, old: &[u8], told: Option<&[u8]>) -> Verdicts {
    let runtime = tokio::runtime::Handle::current();
    trace.replay(if is_full() { 100_000 } else { 300 }, |dirs, is_told| {
        let verdict = async {
            let dir = &dirs[0];
            let before = std::fs::read(dir.join("file")).map(|content| content.len());
            let report = atomic_fs::recover(dir).await.map_err(|error| format!("{before:?}, then {error}"))?;
            atomic_fs::sweep(dir).await.map_err(|error| error.to_string())?;
            let after = std::fs::read(dir.join("file")).map_err(|error| error.to_string())?;
            let new = vec![b'N'; NEW_BYTES];
            let is_wanted = match told.filter(|_| is_told) {
                Some(told) => after == told,
                None => after == old || after == new,
            };
            if is_wanted && names(dir) == ["file"] {
                return Ok(());
            }
            Err(format!("{before:?}, then {} bytes and {:?} by {report:?}", after.len(), names(dir)))
        };
        tokio::task::block_in_place(|| runtime.block_on(verdict))
    })
}

/// A directory in which a file cannot be replaced because the rename is made to fail: nothing is mounted, so that every
/// state can be recreated elsewhere. There both files differ from those in the record, as in a copied tree.
fn home(old: &[u8]) -> (TempDir, PathBuf, PathBuf) {
    let scratch = scratch();
    let home = scratch.path().canonicalize().unwrap().join("home");
    std::fs::create_dir(&home).unwrap();
    let file = home.join("file");
    std::fs::write(&file, old).unwrap();
    (scratch, home, file)
}

/// By how the write ends, and that each of its syncs is needed: without it some state is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_state_that_a_cut_in_a_write_in_place_may_leave_is_recovered() {
    let name = "replay/in-place";
    if child::strace(name).is_none() {
        return;
    }
    let task = format!("{TASK}write alone {NEW_BYTES}");
    let (mut states, mut violations) = (0, Vec::new());
    for old in [vec![b'o'; 5000], b"old".to_vec(), Vec::new()] {
        let new = vec![b'N'; NEW_BYTES];
        // The write of the new content fails, or what makes it durable, or the removal of the record.
        let failing = ["", "ftruncate:error=EIO:when=1", "fsync:error=EIO:when=5", "unlinkat:error=EIO:when=1"];
        for inject in failing {
            let (_scratch, home, file) = home(&old);
            let all = [IS_BUSY, inject].join("\n");
            let inject = if inject.is_empty() { IS_BUSY } else { &all };
            let said = if inject == IS_BUSY { "Ok" } else { "Unchanged" };
            let trace = Trace::of(&task, &file, std::slice::from_ref(&home), Some(inject), said);
            let told = if said == "Ok" { &new } else { &old };
            let verdicts = replay(&trace, &old, Some(told)).await;
            states += verdicts.states;
            violations.extend(verdicts.violations.into_iter().map(|violation| format!("{inject}: {violation}")));
            if inject == IS_BUSY && !old.is_empty() {
                for (number, (skipped, trace)) in trace.without_each_sync().enumerate() {
                    let is_caught = !replay(&trace, &old, Some(&new)).await.violations.is_empty();
                    // The first one is of the temporary file, which a write in place does not need.
                    assert_eq!(is_caught, number > 0, "{skipped}");
                }
            }
        }
    }
    cancel_safe_campaign::publish_campaign("atomic-fs", name, states, violations.len());
    assert!(violations.is_empty(), "{} violations: {:#?}", violations.len(), &violations[..3.min(violations.len())]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_state_that_a_cut_in_its_recovery_may_leave_is_recovered_by_the_next_one() {
    let name = "replay/in-place-recovery";
    if child::strace(name).is_none() {
        return;
    }
    let task = format!("{TASK}write alone {NEW_BYTES}");
    let old = vec![b'o'; 5000];
    let (_scratch, home, file) = home(&old);
    let kills = ["-e", "inject=renameat:error=EBUSY", "-e", "inject=ftruncate:signal=SIGKILL:when=1"];
    let wrapper: Vec<_> = ["strace", "-f", "-qq", "-o", "/dev/null"].into_iter().chain(kills).collect();
    assert_eq!(child::outcome(child::command(&wrapper, &task, &file)), None);
    assert!(std::fs::read(&file).unwrap() != old, "it was not half written");
    let trace = Trace::of("recover", &home, std::slice::from_ref(&home), None, "Ok");
    let verdicts = replay(&trace, &old, Some(&old)).await;
    cancel_safe_campaign::publish_campaign("atomic-fs", name, verdicts.states, verdicts.violations.len());
    assert!(verdicts.violations.is_empty(), "{:#?}", verdicts.violations.first());
    for (skipped, trace) in trace.without_each_sync() {
        assert!(!replay(&trace, &old, Some(&old)).await.violations.is_empty(), "{skipped} is not needed");
    }
}
