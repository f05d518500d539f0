//! Transactions of more files than are open at once.

use std::cell::Cell;
use std::path::Path;
use std::time::Duration;

use cancel_safe_atomic_fs::{self as atomic_fs, Error, MultiFileTransaction};
use cancel_safe_testing::{Explore, Outcome, Way};
use tempfile::{TempDir, tempdir};
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::child;
use crate::strace;
use crate::support::{SLOW_DISK, eventually, temps};

/// More than two batches of files that are synced and closed while others are staged.
const FILES: usize = 150;

fn is_all(dir: &Path, content: &str) -> bool {
    (0..FILES).all(|number| std::fs::read_to_string(dir.join(number.to_string())).is_ok_and(|read| read == content))
}

fn renew(dir: &Path) {
    std::fs::create_dir(dir).unwrap();
    for number in 0..FILES {
        std::fs::write(dir.join(number.to_string()), "old").unwrap();
    }
}

/// The child's part: replaces all files, and commits whatever the staging returned.
pub(crate) async fn replace_all(dir: &Path) -> Result<(), Error> {
    let mut tx = MultiFileTransaction::new();
    for number in 0..FILES {
        // A caller that ignores this error must not get it committed either.
        drop(tx.add_file(dir.join(number.to_string()), "new").await);
    }
    tx.commit().await
}

#[tokio::test]
async fn many_files_change_together_and_leave_nothing() {
    let scratch = tempdir().unwrap();
    let dir = scratch.path().join("dir");
    renew(&dir);
    replace_all(&dir).await.unwrap();
    assert!(is_all(&dir, "new"));
    assert_eq!(temps(&dir), [""; 0]);
}

#[tokio::test]
async fn many_files_that_are_given_up_leave_nothing() {
    let scratch = tempdir().unwrap();
    let dir = scratch.path().join("dir");
    renew(&dir);
    let mut tx = MultiFileTransaction::new();
    for number in 0..FILES {
        tx.add_file(dir.join(number.to_string()), "new").await.unwrap();
    }
    drop(tx);
    assert!(is_all(&dir, "old"));
    assert_eq!(temps(&dir), [""; 0]);
}

/// One of the awaits at which it is dropped waits for the files that are synced in between.
#[tokio::test]
async fn additions_that_were_dropped_can_be_made_again() {
    let scratch = tempdir().unwrap();
    let dir = scratch.path().join("dir");
    renew(&dir);
    let mut tx = MultiFileTransaction::new();
    let mut dropped = 0;
    for number in 0..FILES {
        let path = dir.join(number.to_string());
        // A timeout of nothing polls once.
        match timeout(Duration::ZERO, tx.add_file(&path, "new")).await {
            Ok(added) => added.unwrap(),
            Err(_) => {
                dropped += 1;
                tx.add_file(&path, "new").await.unwrap();
            }
        }
    }
    assert!(dropped > 0, "nothing was dropped");
    tx.commit().await.unwrap();
    assert!(is_all(&dir, "new"));
    eventually("what was dropped is removed", || temps(&dir).is_empty()).await;
}

/// Two batches of files that are staged; the next one closes the second, once the first is synced.
const TWO_BATCHES: usize = 128;

/// In memory if possible, since the files are recreated for each point.
struct Scene {
    dir: TempDir,
    tx: Mutex<Option<MultiFileTransaction>>,
    /// How many files were new when the operation had just been dropped.
    at_drop: Cell<Option<usize>>,
}

impl Scene {
    async fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let dir = if memory.exists() { tempfile::tempdir_in(memory) } else { tempdir() }.unwrap();
        let mut tx = MultiFileTransaction::new();
        for number in 0..=TWO_BATCHES {
            std::fs::write(dir.path().join(number.to_string()), "old").unwrap();
        }
        for number in 0..TWO_BATCHES {
            tx.add_file(dir.path().join(number.to_string()), "new").await.unwrap();
        }
        Self { dir, tx: Mutex::new(Some(tx)), at_drop: Cell::default() }
    }

    async fn add(&self, tx: &mut MultiFileTransaction) {
        tx.add_file(self.dir.path().join(TWO_BATCHES.to_string()), "new").await.unwrap();
    }

    fn new_files(&self) -> usize {
        let is_new = |number: &usize| std::fs::read(self.dir.path().join(number.to_string())).unwrap() == b"new";
        (0..=TWO_BATCHES).filter(is_new).count()
    }
}

#[test]
fn a_large_transaction_that_is_dropped_anywhere_leaves_all_old_or_all_new_for_ever() {
    struct Note<'a>(&'a Scene);
    impl Drop for Note<'_> {
        fn drop(&mut self) {
            self.0.at_drop.set(Some(self.0.new_files()));
        }
    }
    let report = Explore::new()
        .hang_after(SLOW_DISK)
        .ways([Way::Eager, Way::Settled, Way::Shutdown, Way::Panic])
        .budgets([1])
        .run(
            async || Scene::new().await,
            async |scene| {
                let _note = Note(scene);
                let mut tx = scene.tx.lock().await.take().unwrap();
                scene.add(&mut tx).await;
                tx.commit().await.unwrap();
            },
            async |scene, outcome| {
                drop(scene.tx.lock().await.take());
                let new = scene.new_files();
                let wanted = if outcome.is_completed() { TWO_BATCHES + 1 } else { scene.at_drop.get().unwrap_or(0) };
                if new != wanted || (new != 0 && new != TWO_BATCHES + 1) {
                    return Err(format!("{new} files are new, of {:?} at the drop: {outcome:?}", scene.at_drop));
                }
                let left = temps(scene.dir.path());
                if left.is_empty() { Ok(()) } else { Err(format!("left behind: {left:?}")) }
            },
        );
    report.publish("atomic-fs", "MultiFileTransaction/many").assert_clean();
}

#[test]
fn an_addition_to_a_large_transaction_that_is_dropped_anywhere_is_no_part_of_it() {
    let report = Explore::new().hang_after(SLOW_DISK).ways([Way::Eager, Way::Settled, Way::Panic]).budgets([1]).run(
        async || Scene::new().await,
        async |scene| scene.add(scene.tx.lock().await.as_mut().unwrap()).await,
        async |scene, outcome: Outcome<()>| {
            scene.tx.lock().await.take().unwrap().commit().await.map_err(|error| error.to_string())?;
            let (new, left) = (scene.new_files(), temps(scene.dir.path()));
            let is_right = new == TWO_BATCHES + usize::from(outcome.is_completed()) && left.is_empty();
            if is_right { Ok(()) } else { Err(format!("{new} files are new, left behind: {left:?}")) }
        },
    );
    report.publish("atomic-fs", "MultiFileTransaction::add_file/many").assert_clean();
}

/// The second sync of a file whose first one failed says `Ok`, although the data may be lost.
#[test]
fn a_sync_that_failed_between_two_additions_is_not_forgotten_by_the_commit() {
    if child::strace("a failing sync between two additions").is_none() {
        return;
    }
    for number in [1, 20, FILES - 5] {
        let scratch = tempdir().unwrap();
        let dir = scratch.path().join("traced");
        renew(&dir);
        let run = strace::run("replace many", &dir, scratch.path(), Some(&format!("fsync:error=EIO:when={number}")));
        assert!(run.is_hit, "sync {number} was not hit: {}", run.complaint);
        let said = run.said.unwrap_or(run.complaint);
        assert!(said.starts_with("Unchanged"), "sync {number}: {said}");
        assert!(is_all(&dir, "old"), "sync {number}: {said}");
        assert_eq!(temps(&dir), [""; 0], "sync {number}: {said}");
    }
    let scratch = tempdir().unwrap();
    let dir = scratch.path().join("traced");
    renew(&dir);
    let run = strace::run("replace many", &dir, scratch.path(), None);
    assert_eq!((run.said.as_deref(), is_all(&dir, "new")), (Some("Ok"), true), "without a fault");
    assert_eq!(atomic_fs::TargetState::Unchanged, Error::Broken { path: dir }.target());
}
