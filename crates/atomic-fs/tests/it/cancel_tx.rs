//! Transactions dropped at any moment: all files are old or all are new, and nothing changes later.

use std::cell::RefCell;
use std::path::Path;
use std::time::Duration;

use cancel_safe_atomic_fs::{self as atomic_fs, Error, MultiFileTransaction};
use cancel_safe_testing::{Explore, Outcome, Report, Way, scratch_dir};
use tempfile::{TempDir, tempdir};
use tokio::sync::Mutex;

use crate::child;
use crate::support::{SLOW_DISK, drain_pool, names};

const WAYS: [Way; 4] = [Way::Eager, Way::Settled, Way::Shutdown, Way::Panic];
type Pair = (String, String);

/// A directory with two files that belong together.
struct Scene {
    dir: TempDir,
    at_drop: RefCell<Option<Pair>>,
}

impl Scene {
    fn new() -> Self {
        let dir = tempdir().unwrap();
        renew(dir.path());
        Self { dir, at_drop: RefCell::default() }
    }
}

fn renew(dir: &Path) {
    for name in ["a", "b"] {
        std::fs::write(dir.join(name), "old").unwrap();
    }
}

fn pair(dir: &Path) -> Pair {
    let read = |name| std::fs::read_to_string(dir.join(name)).unwrap();
    (read("a"), read("b"))
}

/// Notes the content when it is dropped: declare it before the future that it watches.
struct Note<'a>(&'a Scene);

impl Drop for Note<'_> {
    fn drop(&mut self) {
        *self.0.at_drop.borrow_mut() = Some(pair(self.0.dir.path()));
    }
}

fn check(dir: &Path, is_whole: impl Fn(&Pair) -> bool) -> Result<(), String> {
    let now = pair(dir);
    if !is_whole(&now) {
        return Err(format!("a mix: {now:?}"));
    }
    if names(dir) != ["a", "b"] {
        return Err(format!("left behind: {:?}", names(dir)));
    }
    Ok(())
}

fn is_whole((a, b): &Pair) -> bool {
    a == b && (a == "old" || a == "new")
}

/// Drops `operation` at every point; if it completes, both files are `wanted`.
fn explore<R>(wanted: &str, operation: impl AsyncFn(&Path) -> R) -> Report {
    Explore::new().hang_after(SLOW_DISK).ways(WAYS).run(
        async || Scene::new(),
        async |scene| {
            let _note = Note(scene);
            operation(scene.dir.path()).await
        },
        async |scene, outcome| {
            check(scene.dir.path(), |(a, b)| a == b && (a == "old" || a == wanted))?;
            let now = pair(scene.dir.path());
            match outcome {
                Outcome::Completed(_) if now.0 != wanted => Err(format!("completed, but {now:?}")),
                Outcome::Dropped { .. } if scene.at_drop.borrow().as_ref().is_some_and(|then| *then != now) => {
                    Err("the files changed after the drop".to_owned())
                }
                _ => Ok(()),
            }
        },
    )
}

async fn change_both(dir: &Path) -> Result<(), Error> {
    let mut tx = MultiFileTransaction::new();
    tx.add_file(dir.join("a"), "new").await?;
    tx.writer(dir.join("b")).await?.write_all(b"new").await?;
    tx.commit().await
}

fn assert_clean(operation: &str, report: &Report) {
    report.publish("atomic-fs", operation).assert_clean();
}

#[test]
fn dropped_commit_leaves_all_old_or_all_new_for_ever() {
    let report = explore("new", async |dir| change_both(dir).await.unwrap());
    assert_clean("MultiFileTransaction::commit", &report);
}

#[test]
fn dropped_commit_of_large_files_leaves_all_old_or_all_new_for_ever() {
    // More than a writer keeps in memory, so that a piece of it is still on its way when the commit begins.
    let new = "N".repeat((1 << 20) + 1);
    let report = explore(&new, async |dir| {
        let mut tx = MultiFileTransaction::new();
        for name in ["a", "b"] {
            tx.writer(dir.join(name)).await.unwrap().write_all(new.as_bytes()).await.unwrap();
        }
        tx.commit().await.unwrap();
    });
    assert_clean("MultiFileTransaction::commit/large", &report);
}

#[test]
fn dropped_commit_that_waits_for_a_reader_leaves_all_old_or_all_new_for_ever() {
    let report = explore("new", async |dir| {
        let lock = atomic_fs::read_lock(dir).await.unwrap();
        let read = async {
            tokio::time::sleep(Duration::from_millis(2)).await;
            assert_eq!(pair(dir), ("old".into(), "old".into()), "it did not wait");
            drop(lock);
        };
        tokio::join!(async { change_both(dir).await.unwrap() }, read);
    });
    assert_clean("MultiFileTransaction::commit/waiting", &report);
}

#[test]
fn dropped_commit_of_renames_leaves_all_old_or_all_new_for_ever() {
    let report = explore("new", async |dir| {
        let mut tx = MultiFileTransaction::new();
        tx.add_file(dir.join("a"), "new").await.unwrap();
        tx.add_file(dir.join("b"), "new").await.unwrap();
        tx.commit().await.unwrap();
        // Exchanges nothing visible, but takes the same path.
        std::fs::hard_link(dir.join("a"), dir.join("c")).unwrap();
        let mut tx = MultiFileTransaction::new();
        tx.rename(dir.join("c"), dir.join("b")).unwrap();
        let _cleared = Clear(dir);
        tx.commit().await.unwrap();
    });
    assert_clean("MultiFileTransaction::commit/rename", &report);
}

/// Removes the file that the test itself has added.
struct Clear<'a>(&'a Path);

impl Drop for Clear<'_> {
    fn drop(&mut self) {
        match std::fs::remove_file(self.0.join("c")) {
            Ok(()) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound),
        }
    }
}

#[test]
fn dropped_rollback_removes_what_was_staged_all_the_same() {
    let report = explore("old", async |dir| {
        let mut tx = MultiFileTransaction::begin(dir);
        tx.add_file(dir.join("a"), "new").await.unwrap();
        tx.writer(dir.join("b")).await.unwrap().write_all(&vec![b'x'; (1 << 20) + 1]).await.unwrap();
        tx.rollback().await.unwrap();
    });
    assert_clean("MultiFileTransaction::rollback", &report);
}

#[test]
fn dropped_commit_within_a_time_leaves_all_old_or_all_new_for_ever() {
    for (name, limit) in [
        ("MultiFileTransaction::commit_within", Duration::from_secs(60)),
        ("MultiFileTransaction::commit_within/without end", Duration::MAX),
    ] {
        let report = explore("new", async |dir| {
            let mut tx = MultiFileTransaction::new();
            tx.add_files([(dir.join("a"), "new"), (dir.join("b"), "new")]).await.unwrap();
            tx.commit_within(limit).await.unwrap();
        });
        assert_clean(name, &report);
    }
}

#[test]
fn dropped_handle_of_a_detached_commit_leaves_it_to_go_on() {
    // Not with its runtime, and not by a panic before there is a handle.
    let report = Explore::new().hang_after(SLOW_DISK).ways([Way::Eager, Way::Settled]).run(
        async || {
            let scene = Scene::new();
            let mut tx = MultiFileTransaction::new();
            let paths = ["a", "b"].map(|name| scene.dir.path().join(name));
            tx.add_files(paths.map(|path| (path, "new"))).await.unwrap();
            (scene, RefCell::new(Some(tx)))
        },
        async |(_, tx)| {
            let tx = tx.borrow_mut().take().unwrap();
            tx.commit_detached().await.unwrap();
        },
        async |(scene, tx), _outcome| {
            if tx.borrow().is_none() {
                let is_new = || pair(scene.dir.path()) == ("new".into(), "new".into());
                crate::support::eventually("the detached commit", is_new).await;
            }
            drop(tx.borrow_mut().take());
            crate::support::eventually("all is cleaned up", || names(scene.dir.path()) == ["a", "b"]).await;
            Ok(())
        },
    );
    assert_clean("MultiFileTransaction::commit_detached", &report);
}

/// What is added to a transaction, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Add {
    File,
    Files,
    Writer,
}

#[test]
fn dropped_add_file_is_no_part_of_the_transaction() {
    for (name, add) in [
        ("MultiFileTransaction::add_file", Add::File),
        ("MultiFileTransaction::add_files", Add::Files),
        ("MultiFileTransaction::writer", Add::Writer),
    ] {
        explore_add(name, add, false);
    }
    explore_add("MultiFileTransaction::add_file/after a writer", Add::File, true);
}

/// Drops the operation that adds `b`; `a` was added before, or has a lent writer that must be closed first.
fn explore_add(name: &str, add: Add, is_lent: bool) {
    let report = Explore::new().hang_after(SLOW_DISK).ways([Way::Eager, Way::Settled, Way::Panic]).run(
        async || {
            let scene = Scene::new();
            let mut tx = MultiFileTransaction::new();
            let path = scene.dir.path().join("a");
            if is_lent {
                tx.writer(path).await.unwrap().write_all(b"new").await.unwrap();
            } else {
                tx.add_file(path, "new").await.unwrap();
            }
            (scene, Mutex::new(Some(tx)))
        },
        async |(scene, tx)| {
            let mut tx = tx.lock().await;
            let (tx, path) = (tx.as_mut().unwrap(), scene.dir.path().join("b"));
            match add {
                Add::File => tx.add_file(path, "").await.unwrap(),
                Add::Files => tx.add_files([(path, "")]).await.unwrap(),
                // Empty, until it is written to.
                Add::Writer => tx.writer(path).await.map(drop).unwrap(),
            }
        },
        async |(scene, tx), outcome| {
            tx.lock().await.take().unwrap().commit().await.unwrap();
            let wanted = if outcome.is_completed() { "" } else { "old" };
            check(scene.dir.path(), |pair| *pair == ("new".into(), wanted.into()))
        },
    );
    assert_clean(name, &report);
}

/// Runs `work` on a directory that another holder keeps locked for a moment, if it `waits`.
async fn beside_a_lock<T>(dir: &Path, waits: bool, work: impl Future<Output = T>) -> T {
    let lock = waits.then(|| crate::support::lock_free(dir, false).unwrap());
    let hold = async {
        if waits {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        drop(lock);
    };
    tokio::join!(work, hold).0
}

#[test]
fn dropped_read_lock_locks_nothing() {
    for (name, waits) in [("read_lock", false), ("read_lock/waiting", true)] {
        let report = Explore::new().hang_after(SLOW_DISK).ways(WAYS).run(
            async || Scene::new(),
            async |scene| {
                let dir = scene.dir.path();
                drop(beside_a_lock(dir, waits, atomic_fs::read_lock(dir)).await.unwrap());
            },
            async |scene, _outcome| crate::support::lock_free(scene.dir.path(), false).map(drop),
        );
        assert_clean(name, &report);
    }
}

#[test]
fn dropped_open_together_leaves_nothing() {
    let report = Explore::new().hang_after(SLOW_DISK).ways(WAYS).run(
        async || Scene::new(),
        async |scene| {
            let path = |name| scene.dir.path().join(name);
            assert_eq!(atomic_fs::open_together([path("a"), path("b")]).await.unwrap().len(), 2);
        },
        async |scene, _outcome| check(scene.dir.path(), |pair| *pair == ("old".into(), "old".into())),
    );
    assert_clean("open_together", &report);
}

#[test]
fn dropped_recover_has_done_everything_or_nothing() {
    let Some(strace) = child::strace("a dropped recovery") else { return };
    // The first renames the journal, the second exchanges `a`, so `b` has not been exchanged yet.
    let template = Scene::new();
    let wrapper = [strace, "-f", "-qq", "-o", "/dev/null", "-e", "inject=renameat2:signal=SIGKILL:when=3"];
    assert_eq!(child::outcome(child::command(&wrapper, "pair new new", template.dir.path())), None);
    assert_eq!(pair(template.dir.path()), ("new".into(), "old".into()));
    for (name, waits) in [("recover", false), ("recover/waiting", true)] {
        let report = Explore::new().hang_after(SLOW_DISK).ways(WAYS).run(
            async || {
                let scene = Scene::new();
                for name in names(template.dir.path()) {
                    copy(&template.dir.path().join(&name), &scene.dir.path().join(&name));
                }
                scene
            },
            async |scene| {
                let _note = Note(scene);
                let dir = scene.dir.path();
                beside_a_lock(dir, waits, atomic_fs::recover(dir)).await.unwrap()
            },
            async |scene, outcome| {
                let (dir, now) = (scene.dir.path(), pair(scene.dir.path()));
                if scene.at_drop.borrow().as_ref().is_some_and(|then| *then != now) {
                    return Err("the files changed after the drop".to_owned());
                }
                if !is_whole(&now) && (outcome.is_completed() || names(dir) != names(template.dir.path())) {
                    return Err(format!("recovered in part: {now:?}, {:?}", names(dir)));
                }
                atomic_fs::recover(dir).await.map_err(|error| error.to_string())?;
                check(dir, |pair| *pair == ("new".into(), "new".into()))
            },
        );
        assert_clean(name, &report);
    }
}

/// With its times, as a backup keeps them.
fn copy(from: &Path, to: &Path) {
    std::fs::copy(from, to).unwrap();
    let modified = std::fs::metadata(from).unwrap().modified().unwrap();
    std::fs::File::options().write(true).open(to).unwrap().set_modified(modified).unwrap();
}

/// Cancels at random moments of the time that a transaction takes; returns how many were cancelled, and how many of
/// these changed a file after the drop, left a mix, or left something behind.
fn cancel_at_random<F: Future>(rounds: u32, operation: impl Fn(&Path) -> F) -> (u32, u32) {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let scene = Scene::new();
    let dir = scene.dir.path();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let (mut cancelled, mut wrong) = (0, 0);
    runtime.block_on(async {
        let mut longest = Duration::MAX;
        for _ in 0..10 {
            let begun = std::time::Instant::now();
            operation(dir).await;
            // The shortest, so that on a busy machine too most are cancelled.
            longest = longest.min(begun.elapsed().mul_f64(1.2));
        }
        for _ in 0..rounds {
            renew(dir);
            let mut running = Box::pin(operation(dir));
            let begun = std::time::Instant::now();
            let limit = longest.mul_f64(random.f64());
            let ended = std::future::poll_fn(|cx| {
                if running.as_mut().poll(cx).is_ready() {
                    return std::task::Poll::Ready(true);
                }
                cx.waker().wake_by_ref();
                if begun.elapsed() >= limit { std::task::Poll::Ready(false) } else { std::task::Poll::Pending }
            })
            .await;
            drop(running);
            let at_drop = pair(dir);
            drain_pool().await;
            cancelled += u32::from(!ended);
            wrong += u32::from(pair(dir) != at_drop || check(dir, is_whole).is_err());
        }
    });
    (cancelled, wrong)
}

#[test]
fn a_transaction_that_is_dropped_at_random_never_lands_later_nor_in_part() {
    let (cancelled, wrong) = cancel_at_random(300, |dir| {
        let dir = dir.to_owned();
        async move { change_both(&dir).await.unwrap() }
    });
    println!("{cancelled} cancelled, {wrong} wrong");
    assert!(cancelled > 0 && wrong == 0, "{cancelled} cancelled, {wrong} wrong");
}

#[test]
fn a_transaction_that_waits_for_a_busy_pool_is_dropped_at_every_poll_and_leaves_nothing() {
    let scene = Scene::new();
    let dir = scene.dir.path();
    let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        for polls in 0..4 {
            for is_rollback in [false, true] {
                // Staged before the pool is busy, so that the commit waits.
                let mut tx = MultiFileTransaction::new();
                tx.add_file(dir.join("a"), "new").await.unwrap();
                tx.writer(dir.join("b")).await.unwrap().write_all(b"new").await.unwrap();
                let (release, released) = std::sync::mpsc::channel::<()>();
                let busy = tokio::task::spawn_blocking(move || released.recv());
                let mut end =
                    Box::pin(async move { if is_rollback { tx.rollback().await } else { tx.commit().await } });
                for _ in 0..polls {
                    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
                    assert!(end.as_mut().poll(&mut cx).is_pending());
                    tokio::task::yield_now().await;
                }
                drop(end);
                // At once, because it is unknown when the pool will have a free thread again.
                assert_eq!(names(dir), ["a", "b"], "after {polls} polls");
                release.send(()).unwrap();
                busy.await.unwrap().unwrap();
                drain_pool().await;
                assert_eq!(check(dir, |pair| *pair == ("old".into(), "old".into())), Ok(()));
            }
        }
    });
}

#[test]
fn the_same_check_catches_a_transaction_without_a_gate() {
    let (_, wrong) = cancel_at_random(100, |dir| {
        let dir = dir.to_owned();
        tokio::task::spawn_blocking(move || std::fs::write(dir.join("a"), "new"))
    });
    assert!(wrong > 0, "a job that runs on after its future is gone, and changes one file of two, must be caught");
}

#[test]
fn a_process_killed_at_any_await_of_a_transaction_is_recovered() {
    let report = Explore::new().hang_after(SLOW_DISK).ways([Way::Crash]).budgets([1]).run(
        async || {
            let dir = scratch_dir().join("files");
            // The setup runs again after the crash, and then finds the state that the crash left.
            if !dir.exists() {
                std::fs::create_dir(&dir).unwrap();
                renew(&dir);
            }
            dir
        },
        async |dir| change_both(dir).await.unwrap(),
        async |dir, _outcome| {
            atomic_fs::recover(dir).await.map_err(|error| error.to_string())?;
            check(dir, is_whole)
        },
    );
    assert_clean("MultiFileTransaction/crash", &report);
}

#[test]
fn the_same_check_catches_one_write_after_the_other() {
    let broken = explore("new", async |dir| {
        atomic_fs::write(dir.join("a"), "new").await.unwrap();
        atomic_fs::write(dir.join("b"), "new").await.unwrap();
    });
    assert!(broken.failures().iter().any(|failure| failure.message().contains("a mix")));
}
