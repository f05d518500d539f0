//! Files that are held, damaged, foreign or full.

use std::{
    fs::{self, File},
    io::ErrorKind,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use cancel_safe_resumable::{Checkpoint, Codec, FileStore, ResumableTask, Run, TaskError};
use futures_util::StreamExt;
use tokio_util::sync::CancellationToken;

use crate::support::{PATIENCE, checkpoint, complete, double, eventually, not_run, numbers, restored};

/// The error of a run about the file.
async fn refusal(path: &Path) -> TaskError {
    let before = fs::read(path).unwrap();
    let error = complete(path, 100).await.unwrap_err();
    assert_eq!(before, fs::read(path).unwrap(), "a refused file is not changed");
    error
}

#[tokio::test]
async fn a_second_run_gets_busy_while_the_first_lives_and_the_file_after() {
    let (_dir, path) = checkpoint();
    let mut first = numbers(&path).stream(0..100, |_, x| double(x));
    first.next().await.unwrap();
    let wait = Duration::from_millis(50);
    let hasty = || numbers(&path).store(FileStore::at(&path).wait(wait)).stream(0..100, |_, x| double(x));
    let started = Instant::now();
    let error = hasty().finish().await.unwrap_err();
    assert!(error.is_busy() && started.elapsed() >= wait);
    assert!(matches!(&error, TaskError::Busy { path: named } if *named == path), "{error}");
    // A successor does not wait for the interval of a dropped run to end, only for its last sync.
    drop(first);
    assert_eq!(complete(&path, 100).await.unwrap().len(), 100);
}

#[tokio::test]
async fn a_token_ends_the_wait_for_a_held_file() {
    let (_dir, path) = checkpoint();
    let mut first = numbers(&path).stream(0..100, |_, x| double(x));
    first.next().await.unwrap();
    let token = CancellationToken::new();
    let patient = FileStore::at(&path).wait(Duration::MAX);
    let second = numbers(&path).store(patient).cancel(token.clone()).stream(0..100, |_, x| double(x));
    let second = tokio::spawn(second.finish());
    tokio::task::yield_now().await;
    assert!(!second.is_finished());
    token.cancel();
    let ended = tokio::time::timeout(PATIENCE, second).await.expect("it waits on");
    assert!(ended.unwrap().unwrap_err().is_cancelled());
    assert_eq!(first.finish().await.unwrap().completed, 100);
}

#[tokio::test]
async fn a_run_that_was_dropped_while_it_opened_lets_the_file_go() {
    let (_dir, path) = checkpoint();
    for _ in 0..20 {
        let mut run = numbers(&path).stream(0..100, |_, x| double(x));
        // It is nearly always still opening the file; on a busy machine the file may be open by now, which must work as
        // well.
        drop(futures_util::poll!(run.next()));
    }
    assert_eq!(complete(&path, 100).await.unwrap().len(), 100);
}

#[tokio::test]
async fn damage_before_the_end_is_refused_and_says_where() {
    let (_dir, path) = checkpoint();
    // Two sessions, so that there are blocks of both.
    complete(&path, 50).await.unwrap();
    let first_session = fs::metadata(&path).unwrap().len();
    complete(&path, 100).await.unwrap();
    let whole = fs::read(&path).unwrap();
    for at in (0..first_session as usize).step_by(7) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        fs::write(&path, bytes).unwrap();
        match refusal(&path).await {
            TaskError::Corrupt { path: named, offset, .. } => {
                assert!(named == path && offset <= at as u64 && offset < first_session);
            }
            other => panic!("byte {at}: {other}"),
        }
    }
}

/// Where the blocks of a checkpoint begin, and their types; at last its end.
fn blocks(bytes: &[u8]) -> Vec<(usize, u8)> {
    let length = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let (mut blocks, mut at) = (Vec::new(), 20 + length(12));
    while at < bytes.len() {
        blocks.push((at, bytes[at + 12]));
        at += 13 + length(at + 4);
    }
    blocks.push((at, 0));
    blocks
}

#[tokio::test]
async fn a_block_that_is_lost_or_comes_back_is_refused() {
    let (_dir, path) = checkpoint();
    complete(&path, 50).await.unwrap();
    let whole = fs::read(&path).unwrap();
    let bounds = blocks(&whole);
    for block in bounds.windows(2) {
        let ((start, _), (end, _)) = (block[0], block[1]);
        // The last block is the seal: a file without it looks like the file of a killed run.
        if end < whole.len() {
            fs::write(&path, [&whole[..start], &whole[end..]].concat()).unwrap();
            let lost = refusal(&path).await;
            assert!(matches!(lost, TaskError::Corrupt { offset, .. } if offset == start as u64), "{lost}");
        }
        fs::write(&path, [&whole[..], &whole[start..end]].concat()).unwrap();
        let again = refusal(&path).await;
        assert!(matches!(again, TaskError::Corrupt { offset, .. } if offset == whole.len() as u64), "{again}");
    }
}

#[tokio::test]
async fn the_advice_of_the_message_works() {
    let (dir, _) = checkpoint();
    let path = dir.path().join("it's $HOME; a \"job\"");
    complete(&path, 50).await.unwrap();
    let middle = fs::metadata(&path).unwrap().len();
    complete(&path, 100).await.unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[middle as usize + 5] ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = refusal(&path).await.to_string();
    let command = format!("truncate -s {middle} '{}'", path.display().to_string().replace('\'', r"'\''"));
    assert!(error.contains(&command), "{error}");
    assert!(Command::new("sh").args(["-c", &command]).output().unwrap().status.success());
    let all = complete(&path, 100).await.unwrap();
    assert_eq!(all.iter().filter(|done| done.restored).count(), 50);
}

#[tokio::test]
async fn a_torn_tail_is_cut_off_and_reported() {
    let (_dir, path) = checkpoint();
    complete(&path, 50).await.unwrap();
    let good = fs::metadata(&path).unwrap().len();
    complete(&path, 100).await.unwrap();
    let whole = fs::read(&path).unwrap();
    for length in (good as usize..whole.len()).step_by(11) {
        fs::write(&path, &whole[..length]).unwrap();
        let mut run = numbers(&path).stream(0..100, |_, x| double(x));
        let mut seen = 0;
        while let Some(done) = run.next().await {
            assert_eq!(done.result, Ok(done.index as u64 * 2));
            seen += 1;
        }
        let summary = run.finish().await.unwrap();
        assert!(seen == 100 && summary.restored >= 50);
        assert!(summary.torn_bytes <= length as u64 - good);
    }
    assert_eq!(restored(&path, 100).await.len(), 100);
}

#[tokio::test]
async fn an_empty_or_foreign_file_is_not_a_first_run() {
    let (_dir, path) = checkpoint();
    for content in ["", "notes of somebody\n", "\u{89}RSUME"] {
        fs::write(&path, content).unwrap();
        assert!(refusal(&path).await.is_corrupt());
    }
}

#[tokio::test]
async fn what_is_no_file_in_a_directory_is_an_io_error() {
    let (dir, path) = checkpoint();
    let kinds = [(dir.path().to_owned(), ErrorKind::IsADirectory), (path.join("no/such"), ErrorKind::NotFound)];
    for (path, kind) in kinds {
        match complete(&path, 3).await.unwrap_err() {
            TaskError::Io(error) => assert_eq!(error.kind(), kind, "{error}"),
            other => panic!("{other}"),
        }
    }
}

#[tokio::test]
async fn only_temporary_files_of_killed_starters_are_swept() {
    let (dir, path) = checkpoint();
    let own = [".job.ckpt.new-0123456789abcdef", "job.ckpt.tmp", ".afs-notes", ".afs-file-of-mine"];
    for name in own {
        fs::write(dir.path().join(name), "of somebody").unwrap();
    }
    fs::write(dir.path().join(".afs-file-0123456789abcdef"), "half a hea").unwrap();
    complete(&path, 3).await.unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), own.len() + 1);
    assert!(own.iter().all(|name| dir.path().join(name).exists()));
}

#[tokio::test]
async fn a_name_may_be_as_long_as_the_file_system_takes() {
    let (dir, _) = checkpoint();
    for length in [240, 255] {
        let path = dir.path().join("n".repeat(length));
        assert_eq!(complete(&path, 3).await.unwrap().len(), 3);
    }
    let error = complete(&dir.path().join("n".repeat(256)), 3).await.unwrap_err();
    assert!(error.is_io(), "{error}");
}

#[cfg(unix)]
#[tokio::test]
async fn a_symlink_leads_to_the_checkpoint_also_before_there_is_one() {
    let (dir, path) = checkpoint();
    let real = dir.path().join("elsewhere");
    fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink("elsewhere/real.ckpt", dir.path().join("second")).unwrap();
    std::os::unix::fs::symlink(dir.path().join("second"), &path).unwrap();
    complete(&path, 10).await.unwrap();
    assert!(fs::symlink_metadata(&path).unwrap().is_symlink());
    assert_eq!(restored(&real.join("real.ckpt"), 10).await.len(), 10);
    // Links that lead nowhere are an error that says so, at once.
    let (circle, lost) = (dir.path().join("circle"), dir.path().join("lost"));
    std::os::unix::fs::symlink(&circle, &circle).unwrap();
    std::os::unix::fs::symlink("no/such/directory", &lost).unwrap();
    assert!(complete(&circle, 3).await.unwrap_err().is_io());
    match complete(&lost, 3).await.unwrap_err() {
        TaskError::Io(error) => assert_eq!(error.kind(), ErrorKind::NotFound, "{error}"),
        other => panic!("{other}"),
    }
}

/// Damages the checkpoint of a working run, and returns the error of the run and its later items.
async fn hurt_while_running(hurt: impl FnOnce(&Path)) -> TaskError {
    let (_dir, path) = checkpoint();
    let (go, gate) = tokio::sync::watch::channel(0);
    let builder = numbers(&path).checkpoint_every(Duration::from_millis(5)).concurrency(4);
    let mut run = builder.stream(0..1_000_000, move |_, x| {
        let mut gate = gate.clone();
        async move {
            drop(gate.wait_for(|open| x < *open).await);
            Ok(x)
        }
    });
    go.send(50).unwrap();
    for _ in 0..50 {
        run.next().await.unwrap();
    }
    hurt(&path);
    // Later items never end the run: it must end by itself, even if none of them is finished.
    tokio::time::timeout(PATIENCE, run.finish()).await.expect("the run ends").unwrap_err()
}

#[tokio::test]
async fn a_checkpoint_that_is_removed_renamed_replaced_or_changed_under_a_run_ends_it() {
    let removed = hurt_while_running(|path| fs::remove_file(path).unwrap()).await;
    assert!(removed.is_io() && removed.to_string().contains("removed"), "{removed}");
    let renamed = hurt_while_running(|path| fs::rename(path, path.with_extension("old")).unwrap()).await;
    assert!(renamed.is_io(), "{renamed}");
    let replaced = hurt_while_running(|path| {
        let copy = path.with_extension("copy");
        fs::copy(path, &copy).unwrap();
        fs::rename(copy, path).unwrap();
    });
    assert!(replaced.await.is_io());
    let truncated = hurt_while_running(|path| File::options().write(true).open(path).unwrap().set_len(0).unwrap());
    assert!(truncated.await.to_string().contains("bytes long"));
    let grown = hurt_while_running(|path| {
        use std::io::Write;
        File::options().append(true).open(path).unwrap().write_all(b"more").unwrap();
    });
    assert!(grown.await.is_io());
}

#[tokio::test]
async fn a_checkpoint_that_goes_right_before_the_end_is_an_error_of_finish() {
    let (_dir, path) = checkpoint();
    let mut run = numbers(&path).checkpoint_every(Duration::MAX).stream(0..10, |_, x| double(x));
    for _ in 0..10 {
        run.next().await.unwrap();
    }
    fs::remove_file(&path).unwrap();
    assert!(run.finish().await.unwrap_err().is_io());
}

#[tokio::test]
async fn a_file_that_is_moved_away_while_a_run_waits_for_it_is_a_first_run() {
    let (_dir, path) = checkpoint();
    complete(&path, 10).await.unwrap();
    let held = File::open(&path).unwrap();
    held.lock().unwrap();
    let waiting = tokio::spawn({
        let path = path.clone();
        async move { complete(&path, 10).await }
    });
    fs::rename(&path, path.with_extension("old")).unwrap();
    tokio::task::yield_now().await;
    drop(held);
    let all = waiting.await.unwrap().unwrap();
    assert!(path.exists() && all.len() == 10);
}

const MOVING: &str = "RESUMABLE_MOVING";

/// Changes its working directory again and again; does nothing in the test run itself.
#[tokio::test]
async fn child_that_changes_its_directory() {
    let Some(dir) = std::env::var_os(MOVING).map(PathBuf::from) else { return };
    let go_to = |name: &str| std::env::set_current_dir(dir.join(name)).unwrap();
    let path = Path::new("job.ckpt");
    for generation in 1..4 {
        go_to("home");
        let builder = numbers(path).concurrency(8).checkpoint_every(Duration::from_millis(1));
        let builder = builder.revalidate(move |_, result| *result >= generation * 1000);
        let mut run = builder.stream(0..1000, move |_, x| async move { Ok(generation * 1000 + x) });
        run.next().await.unwrap();
        // There is another file with this name, which is not ours.
        go_to("away");
        // Longer than an idle run goes without a check, and with a sync before and after.
        tokio::time::sleep(Duration::from_millis(1200)).await;
        assert_eq!(run.finish().await.unwrap().completed, 1000);
    }
}

#[tokio::test]
async fn a_process_that_changes_its_directory_keeps_its_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let [home, away] = ["home", "away"].map(|name| {
        fs::create_dir(dir.path().join(name)).unwrap();
        dir.path().join(name).join("job.ckpt")
    });
    fs::write(&away, "of somebody").unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["faults::child_that_changes_its_directory", "--exact", "--nocapture"])
        .env(MOVING, dir.path())
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
    assert_eq!(fs::read_to_string(&away).unwrap(), "of somebody");
    // The third generation was compacted, without the two older ones, in its own directory.
    let read = Checkpoint::<u64>::read(&home).unwrap();
    assert!(read.is_sealed() && read.counts().results == 1000 && read.len_bytes() <= 2 * read.live_bytes());
    assert!(read.records().all(|done| done.is_ok_and(|done| done.result == Ok(3000 + done.index as u64))));
}

/// The field because of which the run of another computation is refused.
async fn mismatch<R>(path: &Path, change: impl FnOnce(Job<R>) -> Job<R>, result: R) -> &'static str
where
    R: serde::Serialize + serde::de::DeserializeOwned + Clone + Send + Sync + 'static,
{
    let job = change(ResumableTask::builder("crawl").version("v2").store(FileStore::at(path)));
    let run = job.stream(0..10u64, move |_, _| {
        let result = result.clone();
        async move { Ok(result) }
    });
    match run.finish().await {
        Err(error @ TaskError::VersionMismatch { field, .. }) => {
            assert!(error.is_mismatch() && error.to_string().contains(field));
            field
        }
        other => panic!("{other:?}"),
    }
}

type Job<R> = cancel_safe_resumable::Builder<u64, R>;

#[tokio::test]
async fn the_checkpoint_of_another_computation_is_refused() {
    let (_dir, path) = checkpoint();
    let job = |version: &str| ResumableTask::builder("crawl").version(version).store(FileStore::at(&path));
    job("v2").stream(0..5u64, |_, x| double(x)).finish().await.unwrap();
    assert_eq!(mismatch(&path, |job| job.version("v3"), 1u64).await, "version");
    assert_eq!(mismatch(&path, |job| job.key(u64::to_string), 1u64).await, "identity");
    let renamed = |_| ResumableTask::builder("other").version("v2").store(FileStore::at(&path));
    assert_eq!(mismatch(&path, renamed, 1u64).await, "job");
    #[cfg(feature = "postcard")]
    assert_eq!(mismatch(&path, |job| job.codec(Codec::Postcard), 1u64).await, "codec");
    assert_eq!(Codec::default(), Codec::MessagePack);

    let summary = job("v3").accept_version("v2").stream(0..10u64, |_, x| double(x)).finish().await.unwrap();
    assert_eq!((summary.restored, summary.completed), (5, 5));
}

#[tokio::test]
async fn accepted_results_of_another_type_are_read_or_named() {
    let (_dir, path) = checkpoint();
    complete(&path, 5).await.unwrap();
    let wider = ResumableTask::builder("numbers").store(FileStore::at(&path)).accept_version("1");
    let mut run = wider.stream(0..5u64, |_, x| async move { Ok(x as f64) });
    assert_eq!(run.next().await.unwrap().result, Ok(0.0));
    drop(run);
    let other = ResumableTask::builder("numbers").store(FileStore::at(&path)).accept_version("1");
    let error = other.stream(0..5u64, |_, _| async { Ok(String::new()) }).finish().await.unwrap_err();
    assert!(matches!(error, TaskError::Codec { index: 0, action: "read back", .. }), "{error}");
}

#[tokio::test]
async fn the_memory_of_a_run_is_bounded_by_what_the_disk_takes() {
    let (_dir, path) = checkpoint();
    // Forty results of a megabyte: the buffer is full again and again, and nothing is lost or stuck.
    let large = |_, x: u64| async move { Ok(x.to_string().repeat(1 << 19)) };
    let job = || ResumableTask::builder("large").store(FileStore::at(&path).wait(PATIENCE)).concurrency(4);
    assert_eq!(job().stream(10..50u64, large).finish().await.unwrap().completed, 40);
    assert_eq!(job().stream(10..50u64, large).finish().await.unwrap().restored, 40);
}

/// Mounts a file system of one megabyte, if this user may.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: &Path) -> Option<Self> {
        fs::create_dir(at).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "none"]).arg(at).output();
        mounted.is_ok_and(|output| output.status.success()).then(|| Self(at.to_owned()))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        assert!(Command::new("umount").arg(&self.0).output().unwrap().status.success());
    }
}

#[tokio::test]
async fn a_complete_checkpoint_can_be_read_where_nothing_can_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let Some(tmpfs) = Tmpfs::mount(&dir.path().join("archive")) else {
        not_run("read-only", "mounting a file system takes root, on Linux");
        return;
    };
    let (whole, part) = (tmpfs.0.join("whole.ckpt"), tmpfs.0.join("part.ckpt"));
    complete(&whole, 10).await.unwrap();
    let mut run = numbers(&part).stream(0..10, |_, x| double(x));
    run.next().await.unwrap();
    drop(run);
    assert_eq!(restored(&part, 10).await.len(), 1);
    let remounted = Command::new("mount").args(["-o", "remount,ro"]).arg(&tmpfs.0).output().unwrap();
    assert!(remounted.status.success());
    let all = complete(&whole, 10).await.unwrap();
    assert!(all.len() == 10 && all.iter().all(|done| done.restored));
    // The rest cannot be recorded, so it is not begun.
    let more = numbers(&whole).stream(0..11, |_, _| async { unreachable!() }).finish().await.unwrap_err();
    assert!(matches!(&more, TaskError::Io(error) if error.kind() == ErrorKind::ReadOnlyFilesystem), "{more}");
    let rest = numbers(&part).stream(0..10, |_, _| async { unreachable!() }).finish().await.unwrap_err();
    assert!(matches!(&rest, TaskError::Io(error) if error.kind() == ErrorKind::ReadOnlyFilesystem), "{rest}");
}

#[tokio::test]
async fn a_complete_checkpoint_can_be_read_while_another_run_holds_it() {
    let (_dir, path) = checkpoint();
    complete(&path, 10).await.unwrap();
    let held = File::open(&path).unwrap();
    held.lock().unwrap();
    let hasty =
        |n| numbers(&path).store(FileStore::at(&path).wait(Duration::from_millis(10))).stream(0..n, |_, x| double(x));
    assert_eq!(hasty(10).finish().await.unwrap().restored, 10);
    assert!(hasty(11).finish().await.unwrap_err().is_busy());
}

#[tokio::test]
async fn a_full_disk_ends_the_run_and_a_larger_one_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let Some(tmpfs) = Tmpfs::mount(&dir.path().join("small")) else {
        not_run("full-disk", "mounting a small file system takes root, on Linux");
        return;
    };
    let path = tmpfs.0.join("job.ckpt");
    let store = || FileStore::at(&path).wait(PATIENCE).wait_for_room(Duration::ZERO);
    let job = || ResumableTask::builder("big").store(store()).concurrency(4);
    let work = |_, x: u64| async move { Ok(format!("{x:01000}")) };
    // On a slow machine, everything that fits may be written at once and be torn as a whole, so something is written
    // before.
    assert_eq!(job().stream(0..10u64, work).finish().await.unwrap().completed, 10);
    match job().stream(0..3000u64, work).finish().await.unwrap_err() {
        TaskError::Io(error) => assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}"),
        other => panic!("{other}"),
    }
    let remounted = Command::new("mount").args(["-o", "remount,size=16m"]).arg(&tmpfs.0).output().unwrap();
    assert!(remounted.status.success());
    let mut run = job().stream(0..3000u64, work);
    let mut seen = 0;
    while let Some(done) = run.next().await {
        assert_eq!(done.result, Ok(format!("{:01000}", done.index)));
        seen += 1;
    }
    let summary = run.finish().await.unwrap();
    assert!(seen == 3000 && summary.restored >= 10 && summary.completed > 0, "{summary:?}");
}

/// A run over 3,000 items that take a kilobyte each, and how many were started.
fn large_run(path: &Path, longest_full: Duration, token: &CancellationToken) -> (Run<String>, Arc<AtomicUsize>) {
    let started = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&started);
    let store = FileStore::at(path).wait(PATIENCE).wait_for_room(longest_full);
    let builder = ResumableTask::builder("big").store(store).concurrency(4).cancel(token.clone());
    let run = builder.stream(0..3000u64, move |_, x| {
        counter.fetch_add(1, Ordering::Relaxed);
        async move {
            tokio::task::yield_now().await;
            Ok(format!("{x:01000}"))
        }
    });
    (run, started)
}

#[tokio::test]
async fn a_run_on_a_full_disk_pauses_until_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let Some(tmpfs) = Tmpfs::mount(&dir.path().join("small")) else {
        not_run("full-disk", "mounting a small file system takes root, on Linux");
        return;
    };
    let path = tmpfs.0.join("job.ckpt");
    let (run, started) = large_run(&path, Duration::from_secs(3600), &CancellationToken::new());
    let progress = run.subscribe();
    let run = tokio::spawn(run.finish());
    let pause = || progress.borrow().paused;
    eventually("the run pauses", || pause().is_some()).await;
    assert_eq!(pause().unwrap().reason(), "the disk of the checkpoint is full");
    let (before, until) = (started.load(Ordering::Relaxed), pause().unwrap().until);
    // The part that fits is whole and readable.
    eventually("the part that did not fit is cut off", || {
        Checkpoint::<String>::read(&path).is_ok_and(|read| read.torn_bytes() == 0)
    })
    .await;
    eventually("it is tried again", || pause().is_some_and(|pause| pause.until > until)).await;
    assert_eq!(started.load(Ordering::Relaxed), before, "an item was started in the pause");
    assert!(!run.is_finished());
    let remounted = Command::new("mount").args(["-o", "remount,size=16m"]).arg(&tmpfs.0).output().unwrap();
    assert!(remounted.status.success());
    assert_eq!(run.await.unwrap().unwrap().completed, 3000);
    assert_eq!(pause(), None);
    let read = Checkpoint::<String>::read(&path).unwrap();
    assert!(read.is_sealed() && read.counts().results == 3000);
    assert!(read.records().all(|done| done.is_ok_and(|done| done.result == Ok(format!("{:01000}", done.index)))));
}

#[tokio::test]
async fn a_pause_on_a_full_disk_ends_with_its_limit_and_with_the_token() {
    let dir = tempfile::tempdir().unwrap();
    let Some(tmpfs) = Tmpfs::mount(&dir.path().join("small")) else {
        not_run("full-disk", "mounting a small file system takes root, on Linux");
        return;
    };
    let path = tmpfs.0.join("job.ckpt");
    let token = CancellationToken::new();
    let is_full = |ended: Result<_, TaskError>| match ended.unwrap_err() {
        TaskError::Io(error) => assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}"),
        other => panic!("{other}"),
    };
    is_full(large_run(&path, Duration::from_millis(2500), &token).0.finish().await);
    let (run, _) = large_run(&path, Duration::from_secs(3600), &token);
    let progress = run.subscribe();
    let run = tokio::spawn(run.finish());
    eventually("the run pauses", || progress.borrow().paused.is_some()).await;
    token.cancel();
    is_full(tokio::time::timeout(PATIENCE, run).await.expect("it waits on").unwrap());
    let (run, _) = large_run(&path, Duration::from_secs(3600), &CancellationToken::new());
    let progress = run.subscribe();
    let run = tokio::spawn(run.finish());
    eventually("the run pauses", || progress.borrow().paused.is_some()).await;
    run.abort();
    eventually("the checkpoint is free", || File::open(&path).is_ok_and(|file| file.try_lock().is_ok())).await;
    assert_eq!(Checkpoint::<String>::read(&path).unwrap().torn_bytes(), 0);
}

const FAULTY: &str = "RESUMABLE_FAULTY";

/// Runs in a child whose disk fails; does nothing in the test run itself.
#[tokio::test]
async fn child_on_a_failing_disk() {
    let Some(path) = std::env::var_os(FAULTY) else { return };
    let builder = numbers(Path::new(&path)).checkpoint_every(Duration::from_millis(1));
    let run = builder.stream(0..1_000_000, |_, x| async move {
        tokio::time::sleep(Duration::from_millis(1)).await;
        Ok(x * 2)
    });
    match run.finish().await {
        Err(TaskError::Io(error)) => println!("failed as it should: {error}"),
        other => panic!("the failure of the disk went unnoticed: {other:?}"),
    }
}

#[tokio::test]
async fn a_failed_sync_ends_the_run_at_once() {
    let (_dir, path) = checkpoint();
    let child = Command::new("strace")
        .args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO:when=3"])
        .arg(std::env::current_exe().unwrap())
        .args(["faults::child_on_a_failing_disk", "--exact", "--nocapture"])
        .env(FAULTY, &path)
        .output();
    let Ok(child) = child else {
        not_run("failed-sync", "a failed fdatasync is injected by strace, which cannot be run");
        return;
    };
    let output = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && output.contains("failed as it should"), "{output}");
    eventually("the checkpoint is free", || File::open(&path).is_ok_and(|file| file.try_lock().is_ok())).await;
    // Two intervals had been synced.
    assert!(!restored(&path, 1000).await.is_empty());
}

const CREATED: &str = "RESUMABLE_CREATED";

/// Continues with a file in a watched child; does nothing in the test run itself.
#[tokio::test]
async fn child_that_goes_on() {
    let Some(path) = std::env::var_os(CREATED) else { return };
    complete(Path::new(&path), 10).await.unwrap();
}

/// A starter that is killed right after it has created the file may not have synced its name.
#[tokio::test]
async fn the_name_of_a_file_that_nobody_wrote_to_is_synced_again() {
    let (dir, path) = checkpoint();
    let fired = CancellationToken::new();
    fired.cancel();
    assert!(numbers(&path).cancel(fired).stream(0..10, |_, x| double(x)).finish().await.unwrap_err().is_cancelled());
    // The first run finds a file without a session, the second one with a whole.
    for expected in [1, 0] {
        let trace = dir.path().join("trace");
        let child = Command::new("strace")
            .args(["-f", "-qq", "-y", "-e", "trace=fsync", "-o"])
            .arg(&trace)
            .arg(std::env::current_exe().unwrap())
            .args(["faults::child_that_goes_on", "--exact"])
            .env(CREATED, &path)
            .output();
        let Ok(child) = child else {
            not_run("synced-name", "system calls are watched by strace, which cannot be run");
            return;
        };
        let synced = fs::read_to_string(&trace).unwrap();
        let name = format!("<{}>", dir.path().canonicalize().unwrap().display());
        assert!(child.status.success() && synced.matches(&name).count() == expected, "{synced}");
    }
}
