//! Dropped at any moment: the file is old or new, nothing changes later, and no temporary file stays.

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use cancel_safe_atomic_fs::{self as atomic_fs, AtomicFileWriter, Error, blocking};
use cancel_safe_testing::{Explore, Outcome, Report, Way, scratch_dir};
use tempfile::{TempDir, tempdir};
use tokio::sync::Mutex;

#[cfg(target_os = "linux")]
use crate::child;
use crate::support::{SLOW_DISK, drain_pool, names};

const OLD: &[u8] = b"old";
const MIB: usize = 1 << 20;
const WAYS: [Way; 4] = [Way::Eager, Way::Settled, Way::Shutdown, Way::Panic];

/// A directory with one file, and the content of the file just after the operation was dropped.
struct Scene {
    dir: TempDir,
    path: PathBuf,
    at_drop: RefCell<Vec<u8>>,
}

impl Scene {
    fn new() -> Self {
        let dir = tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, OLD).unwrap();
        Self { dir, path, at_drop: RefCell::default() }
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }
}

/// Notes the content when it is dropped: declare it before the future that it watches.
struct Note<'a>(&'a Scene);

impl Drop for Note<'_> {
    fn drop(&mut self) {
        *self.0.at_drop.borrow_mut() = self.0.content();
    }
}

/// Drops `operation`, which writes `new`, at every point, and compares what is left behind with the documentation.
fn explore<R>(new: &[u8], operation: impl AsyncFn(&Path) -> R) -> Report {
    Explore::new().hang_after(SLOW_DISK).ways(WAYS).paused_time(true).run(
        async || Scene::new(),
        async |scene| {
            let _note = Note(scene);
            operation(&scene.path).await
        },
        async |scene, outcome| {
            let content = scene.content();
            if names(scene.dir.path()) != ["file"] {
                return Err(format!("left behind: {:?}", names(scene.dir.path())));
            }
            if content != OLD && content != new {
                return Err(format!("torn: {} bytes", content.len()));
            }
            match outcome {
                Outcome::Completed(_) if content != new => Err("completed, but old".to_owned()),
                Outcome::Dropped { point: 0, .. } if content != OLD => Err("never polled, but new".to_owned()),
                Outcome::Dropped { .. } if content != *scene.at_drop.borrow() && !scene.at_drop.borrow().is_empty() => {
                    Err("the file changed after the drop".to_owned())
                }
                _ => Ok(()),
            }
        },
    )
}

fn assert_clean(operation: &str, report: &Report) {
    report.publish("atomic-fs", operation).assert_clean();
}

#[test]
fn dropped_write_leaves_old_or_new_for_ever() {
    for length in [10, 3 * MIB] {
        let new = vec![b'N'; length];
        let report = explore(&new, async |path| atomic_fs::write(path, &new).await.unwrap());
        assert_clean(&format!("write/{length}-bytes"), &report);
    }
}

/// Content that records when it is released.
struct Witness(Vec<u8>, Arc<AtomicBool>);

impl AsRef<[u8]> for Witness {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.1.store(true, Ordering::Relaxed);
    }
}

/// Content, and whether it was released.
fn witness(content: Vec<u8>) -> (Bytes, Arc<AtomicBool>) {
    let gone = Arc::new(AtomicBool::new(false));
    (Bytes::from_owner(Witness(content, gone.clone())), gone)
}

#[test]
fn dropped_write_bytes_leaves_old_or_new_for_ever() {
    for length in [10, 3 * MIB] {
        let new = vec![b'N'; length];
        let report = explore(&new, async |path| {
            let (content, gone) = witness(new.clone());
            atomic_fs::write_bytes(path, content).await.unwrap();
            assert!(gone.load(Ordering::Relaxed), "it holds the content although the write has ended");
        });
        assert_clean(&format!("write_bytes/{length}-bytes"), &report);
    }
}

#[test]
fn dropped_write_bytes_lets_its_content_go() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let (release, released) = std::sync::mpsc::channel::<()>();
        let busy = tokio::task::spawn_blocking(move || released.recv());
        let (content, gone) = witness(vec![b'N'; 2 * MIB]);
        let mut write = Box::pin(atomic_fs::write_bytes(&path, content));
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(write.as_mut().poll(&mut cx).is_pending());
        assert!(!gone.load(Ordering::Relaxed), "what waits for a thread must not have copied it");
        drop(write);
        assert!(gone.load(Ordering::Relaxed), "a thread may not come free for long");
        release.send(()).unwrap();
        busy.await.unwrap().unwrap();
        drain_pool().await;
        // A write that is at work when it is dropped releases the content with its job.
        for wait_us in (0..2000).step_by(100) {
            let (content, gone) = witness(vec![b'N'; 2 * MIB]);
            drop(tokio::time::timeout(Duration::from_micros(wait_us), atomic_fs::write_bytes(&path, content)).await);
            drain_pool().await;
            assert!(gone.load(Ordering::Relaxed), "dropped after {wait_us} µs");
        }
    });
}

#[cfg(feature = "json")]
#[test]
fn dropped_write_json_leaves_old_or_new_for_ever() {
    let report = explore(b"5", async |path| atomic_fs::write_json(path, &5).await.unwrap());
    assert_clean("write_json", &report);
    // A timeout beyond the end of time is none.
    for (name, timeout) in
        [("write_json_with_timeout", Duration::from_secs(60)), ("write_json_with_timeout/none", Duration::MAX)]
    {
        let report = explore(b"5", async |path| atomic_fs::write_json_with_timeout(path, &5, timeout).await.unwrap());
        assert_clean(name, &report);
    }
}

#[test]
fn dropped_writer_leaves_old_or_new_for_ever() {
    let new = vec![b'N'; 2 * MIB + 2];
    let report = explore(&new, async |path| {
        let mut writer = AtomicFileWriter::new(path).await?;
        writer.write(&new[..1]).await?;
        writer.write_all(&new[1..2 * MIB]).await?;
        writer.write_all(&new[2 * MIB..]).await?;
        writer.commit().await
    });
    assert_clean("AtomicFileWriter::commit", &report);
}

#[test]
fn dropped_copy_into_a_writer_leaves_old_or_new_for_ever() {
    let new = vec![b'N'; 20_000];
    let report = explore(&new, async |path| {
        let mut writer = AtomicFileWriter::new(path).await.unwrap();
        // Read in pieces; budgets of one would livelock `io::copy` itself.
        for piece in new.chunks(5000) {
            let mut rest = piece;
            while !rest.is_empty() {
                let taken = tokio::io::AsyncWriteExt::write(&mut writer, rest).await.unwrap();
                rest = &rest[taken..];
            }
        }
        writer.commit().await.unwrap();
    });
    assert_clean("AtomicFileWriter/AsyncWrite", &report);
}

#[test]
fn dropped_discard_removes_the_temporary_file_all_the_same() {
    // A discarded write is never visible, so "new" is the old content here.
    let report = explore(OLD, async |path| {
        let mut writer = AtomicFileWriter::new(path).await.unwrap();
        writer.write(&vec![b'N'; MIB + 1]).await.unwrap();
        writer.discard().await.unwrap();
    });
    assert_clean("AtomicFileWriter::discard", &report);
}

#[test]
fn dropped_commit_handle_does_not_stop_its_commit() {
    let report = Explore::new().hang_after(SLOW_DISK).ways(WAYS).run(
        async || (Scene::new(), Cell::new(false)),
        async |(scene, under_way)| {
            let mut writer = AtomicFileWriter::new(&scene.path).await?;
            writer.write(b"new").await?;
            let handle = writer.commit_detached();
            under_way.set(true);
            handle.await
        },
        async |(scene, under_way), outcome: Outcome<Result<(), Error>>| {
            let landed = scene.content() == b"new";
            let cut = matches!(outcome, Outcome::Dropped { way: Way::Shutdown, .. });
            match (under_way.get(), landed) {
                (true, false) if !cut => Err(format!("the commit was lost: {outcome:?}")),
                (false, true) => Err("it landed without a commit".to_owned()),
                _ if names(scene.dir.path()) != ["file"] => Err(format!("left: {:?}", names(scene.dir.path()))),
                _ => Ok(()),
            }
        },
    );
    assert_clean("CommitHandle", &report);
}

#[test]
fn dropped_write_all_is_no_part_of_the_file() {
    let report = Explore::new().hang_after(SLOW_DISK).ways([Way::Eager, Way::Settled, Way::Panic]).run(
        async || {
            let scene = Scene::new();
            let mut writer = AtomicFileWriter::new(&scene.path).await.unwrap();
            writer.write(b"before").await.unwrap();
            (scene, Mutex::new(Some(writer)))
        },
        async |(_, writer)| writer.lock().await.as_mut().unwrap().write_all(&vec![b'x'; 4 * MIB]).await.unwrap(),
        async |(scene, writer), outcome| {
            let mut writer = writer.lock().await.take().unwrap();
            writer.write(b"after").await.unwrap();
            writer.commit().await.unwrap();
            let wanted = if outcome.is_completed() { 4 * MIB } else { 0 } + "before".len() + "after".len();
            let content = scene.content();
            let whole = content.len() == wanted && content.starts_with(b"before") && content.ends_with(b"after");
            if whole { Ok(()) } else { Err(format!("{} bytes instead of {wanted}", content.len())) }
        },
    );
    assert_clean("AtomicFileWriter::write_all", &report);
}

#[test]
fn dropped_sweep_removes_nothing_later() {
    let report = Explore::new().hang_after(SLOW_DISK).ways(WAYS).run(
        async || {
            let scene = Scene::new();
            for digit in 0..8 {
                std::fs::write(scene.dir.path().join(format!(".afs-file-{:016x}", digit)), "litter").unwrap();
            }
            (scene, Cell::new(usize::MAX))
        },
        async |(scene, at_drop)| {
            struct Count<'a>(&'a Path, &'a Cell<usize>);
            impl Drop for Count<'_> {
                fn drop(&mut self) {
                    self.1.set(names(self.0).len());
                }
            }
            let _count = Count(scene.dir.path(), at_drop);
            atomic_fs::sweep(scene.dir.path()).await.unwrap()
        },
        async |(scene, at_drop), outcome| {
            let left = names(scene.dir.path()).len();
            match outcome {
                Outcome::Completed(report) if (left, report.removed) != (1, 8) => Err(format!("{report:?}")),
                Outcome::Dropped { .. } if at_drop.get() != usize::MAX && left != at_drop.get() => {
                    Err(format!("{} files at the drop, {left} later", at_drop.get()))
                }
                _ => Ok(()),
            }
        },
    );
    assert_clean("sweep", &report);
}

#[test]
fn a_process_killed_at_any_await_leaves_old_or_new_and_a_sweep_removes_the_rest() {
    let new = vec![b'N'; MIB + 2];
    let report = Explore::new().hang_after(SLOW_DISK).ways([Way::Crash]).budgets([1]).run(
        async || {
            let path = scratch_dir().join("file");
            // The setup runs again after the crash, and then finds the state that the crash left.
            if !path.exists() {
                std::fs::write(&path, OLD).unwrap();
            }
            path
        },
        async |path| {
            let mut writer = AtomicFileWriter::new(path).await?;
            writer.write(&new[..MIB]).await?;
            writer.write(&new[MIB..]).await?;
            writer.commit().await
        },
        async |path, _outcome| {
            let dir = path.parent().unwrap();
            let swept = atomic_fs::sweep(dir).await.unwrap();
            let content = std::fs::read(path).unwrap();
            let whole = content == OLD || content == new;
            if whole && swept.failed == 0 && names(dir) == ["file"] {
                Ok(())
            } else {
                Err(format!("{} bytes, {swept:?}, {:?}", content.len(), names(dir)))
            }
        },
    );
    assert_clean("AtomicFileWriter/crash", &report);
}

#[test]
fn the_same_check_catches_a_job_without_a_gate_and_a_temporary_file_without_an_owner() {
    let without_gate = explore(b"new", async |path| {
        let path = path.to_owned();
        tokio::task::spawn_blocking(move || blocking::write(path, "new").unwrap()).await.unwrap();
    });
    assert!(without_gate.failures().iter().any(|failure| failure.message().contains("after the drop")));

    #[expect(clippy::disallowed_methods, reason = "the point of this twin is that it is not cancel safe")]
    let one_await_a_step = explore(b"new", async |path| {
        let temp = path.with_extension("tmp");
        tokio::fs::write(&temp, "new").await.unwrap();
        tokio::fs::rename(&temp, path).await.unwrap();
    });
    assert!(one_await_a_step.failures().iter().any(|failure| failure.message().contains("left behind")));
}

/// The results of writes that were cancelled at random.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Tally {
    seed: u64,
    cancelled: u32,
    /// Of those, how many had already replaced the file.
    landed: u32,
    late: u32,
    litter: u32,
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { seed, cancelled, landed, late, litter } = self;
        write!(f, "seed {seed}: {cancelled} cancelled {landed} landed {late} late {litter} litter")
    }
}

/// Cancels `rounds` writes, each at a random moment of the time that one takes, and counts late changes and litter.
///
/// The pool has one thread, so that it can be drained: then every job that could still do something has ended.
pub(crate) fn cancel_at_random<F: Future>(rounds: u32, write: impl Fn(&Path) -> F) -> Tally {
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    let mut tally = Tally { seed, cancelled: 0, landed: 0, late: 0, litter: 0 };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut longest = Duration::MAX;
        for _ in 0..10 {
            let begun = std::time::Instant::now();
            write(&path).await;
            // The shortest, so that on a busy machine too most are cancelled.
            longest = longest.min(begun.elapsed().mul_f64(1.2));
        }
        let mut too_early = 0;
        for _ in 0..rounds {
            // The first ten may have been quicker than any later one.
            if too_early == 10 {
                (longest, too_early) = (longest.mul_f64(1.2), 0);
            }
            std::fs::write(&path, "old").unwrap();
            let mut write = Box::pin(write(&path));
            let begun = std::time::Instant::now();
            let limit = longest.mul_f64(random.f64());
            // Not a timer, because a timer fires only on whole milliseconds.
            let ended = std::future::poll_fn(|cx| {
                if write.as_mut().poll(cx).is_ready() {
                    return std::task::Poll::Ready(true);
                }
                if begun.elapsed() >= limit {
                    return std::task::Poll::Ready(false);
                }
                cx.waker().wake_by_ref();
                std::task::Poll::Pending
            })
            .await;
            drop(write);
            let after_drop = std::fs::read(&path).unwrap();
            drain_pool().await;
            too_early = if ended || after_drop != OLD { 0 } else { too_early + 1 };
            if !ended {
                tally.cancelled += 1;
                tally.landed += u32::from(after_drop != OLD);
                tally.late += u32::from(std::fs::read(&path).unwrap() != after_drop);
            }
            tally.litter += u32::from(names(dir.path()) != ["file"]);
        }
    });
    tally
}

#[test]
fn a_write_that_is_dropped_at_random_never_lands_later() {
    let tally = cancel_at_random(400, |path| atomic_fs::write(path.to_owned(), vec![b'N'; 65536]));
    println!("{tally:?}");
    assert!(tally.cancelled > 0 && tally.late == 0 && tally.litter == 0, "{tally:?}");
}

/// The full form cancels ten thousand times.
#[cfg(target_os = "linux")]
#[test]
fn a_write_that_is_dropped_during_a_slow_rename_never_lands_later() {
    let name = "cancel/delayed-renames";
    let Some(strace) = child::strace(name) else { return };
    let rounds = if crate::campaign::is_full() { "12000" } else { "300" };
    let wrapper = [strace, "-f", "-qq", "-o", "/dev/null", "-e", "inject=renameat:delay_enter=3000"];
    let said = child::outcome(child::command(&wrapper, "cancel", Path::new(rounds)));
    let said = said.expect("the child was not killed");
    let count = |what: &str| -> usize {
        let words: Vec<_> = said.split(' ').collect();
        let position = words.iter().position(|word| *word == what).unwrap();
        words[position - 1].parse().unwrap()
    };
    println!("{said}");
    let violations = count("late") + count("litter");
    cancel_safe_campaign::publish_campaign("atomic-fs", name, count("cancelled"), violations);
    assert!(violations == 0, "{said}");
    assert!(count("landed") > 0 && count("cancelled") > count("landed"), "the moments are badly chosen: {said}");
}

#[test]
fn the_same_check_catches_a_write_without_the_gate() {
    let tally = cancel_at_random(200, |path| {
        let path = path.to_owned();
        tokio::task::spawn_blocking(move || blocking::write(path, vec![b'N'; 65536]))
    });
    println!("{tally:?}");
    assert!(tally.late > 0, "a blocking job that runs on after its future is gone must be caught");
}

#[test]
fn a_cancelled_write_does_not_undo_the_one_that_was_acknowledged_after_it() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        for round in 0..100_u32 {
            let first = tokio::time::timeout(
                Duration::from_micros(u64::from(round) * 20),
                atomic_fs::write(&path, vec![b'A'; 300_000]),
            );
            drop(first.await);
            atomic_fs::write(&path, "B").await.unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"B");
        }
        drop(runtime.handle().clone());
    });
    drop(runtime);
    assert_eq!((std::fs::read(&path).unwrap(), names(dir.path())), (b"B".to_vec(), vec!["file".to_owned()]));
}

#[test]
fn a_write_that_waits_for_a_busy_pool_is_dropped_at_every_poll_and_never_lands() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, OLD).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        for polls in 0..4 {
            // One before the pool is busy, so that its commit waits.
            let mut writer = AtomicFileWriter::new(&path).await.unwrap();
            writer.write(b"new").await.unwrap();
            let mut stream = AtomicFileWriter::new(&path).await.unwrap();
            let (release, released) = std::sync::mpsc::channel::<()>();
            let busy = tokio::task::spawn_blocking(move || released.recv());
            let write = atomic_fs::write(&path, "new");
            let open = AtomicFileWriter::new(&path);
            let mut futures: [std::pin::Pin<Box<dyn Future<Output = ()>>>; 4] = [
                Box::pin(async { write.await.unwrap() }),
                Box::pin(async { drop(open.await.unwrap()) }),
                Box::pin(async { writer.commit().await.unwrap() }),
                Box::pin(async move { stream.write_all(&vec![b'x'; 5 * MIB]).await.unwrap() }),
            ];
            for future in &mut futures {
                for _ in 0..polls {
                    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
                    assert!(future.as_mut().poll(&mut cx).is_pending());
                    tokio::task::yield_now().await;
                }
            }
            drop(futures);
            // At once, because it is unknown when the pool will have a free thread again.
            assert_eq!(names(dir.path()), ["file"], "after {polls} polls");
            release.send(()).unwrap();
            busy.await.unwrap().unwrap();
            drain_pool().await;
            assert_eq!((std::fs::read(&path).unwrap(), names(dir.path())), (OLD.to_vec(), vec!["file".to_owned()]));
        }
    });
}

/// Closing the last handle of a file without a name frees its space: a third of a second for a gigabyte.
#[cfg(target_os = "linux")]
#[test]
fn a_commit_that_is_dropped_in_the_queue_leaves_it_to_the_pool_to_free_the_space() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    let place = dir.path().canonicalize().unwrap();
    let open = || {
        let handles = std::fs::read_dir("/proc/self/fd").unwrap();
        let handles = handles.filter_map(|handle| std::fs::read_link(handle.ok()?.path()).ok());
        handles.filter(|file| file.parent() == Some(&place)).count()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let mut writer = AtomicFileWriter::new(&path).await.unwrap();
        writer.write_all(&vec![b'x'; 3 * MIB]).await.unwrap();
        drain_pool().await;
        let (release, released) = std::sync::mpsc::channel::<()>();
        let busy = tokio::task::spawn_blocking(move || released.recv());
        let mut commit = Box::pin(writer.commit());
        for _ in 0..3 {
            let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
            assert!(commit.as_mut().poll(&mut cx).is_pending());
            tokio::task::yield_now().await;
        }
        drop(commit);
        assert_eq!((names(dir.path()), open()), (vec![], 1), "the name goes, and the file stays open");
        release.send(()).unwrap();
        busy.await.unwrap().unwrap();
        drain_pool().await;
        assert_eq!(open(), 0);
    });
}
