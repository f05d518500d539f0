//! Crashes: the process is killed at each point, and another one checks the state on the disk.

use std::cell::Cell;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use cancel_safe_testing::{Explore, Outcome, Way, scratch_dir};
use tokio::task::{spawn_blocking, yield_now};

use crate::assert_caught;

/// A counter in memory and, when told to, on disk.
struct Counter {
    path: PathBuf,
    value: Cell<u32>,
}

impl Counter {
    /// Opens the existing state: this may be the setup of the killed process or of the checking one.
    async fn open() -> Self {
        let path = scratch_dir().join("counter");
        let value = fs::read_to_string(&path).map_or(0, |text| text.parse().unwrap());
        Self { path, value: Cell::new(value) }
    }

    async fn save(&self) {
        let (path, text) = (self.path.clone(), self.value.get().to_string());
        spawn_blocking(move || {
            let temporary = path.with_extension("tmp");
            let mut file = fs::File::create(&temporary).unwrap();
            file.write_all(text.as_bytes()).unwrap();
            fs::rename(temporary, path).unwrap();
        })
        .await
        .unwrap();
    }
}

/// Saves in its destructor.
struct SaveOnDrop<'a>(&'a Counter);

impl Drop for SaveOnDrop<'_> {
    fn drop(&mut self) {
        fs::write(&self.0.path, self.0.value.get().to_string()).unwrap();
    }
}

async fn is_zero_or_two(counter: &Counter, _outcome: Outcome<()>) -> Result<(), String> {
    let stored = Counter::open().await.value.get();
    if stored == 0 || stored == counter.value.get().max(2) { Ok(()) } else { Err(format!("stored {stored}")) }
}

#[test]
fn a_destructor_does_not_run_in_a_crash() {
    let report = Explore::new().budgets([]).ways([Way::Eager, Way::Crash]).run(
        Counter::open,
        async |counter| {
            counter.value.set(1);
            counter.save().await;
            let _guard = SaveOnDrop(counter);
            counter.value.set(2);
            yield_now().await;
        },
        async |counter, outcome| match outcome {
            // The save itself may have been dropped; the question is about the guard.
            Outcome::Dropped { point: 2, .. } => is_zero_or_two(counter, outcome).await,
            _ => Ok(()),
        },
    );
    let line = line!() - 8;
    assert_caught(&report, file!(), line, "stored 1");
    assert!(report.failures().iter().all(|failure| failure.way() == Way::Crash), "{report}");
}

#[test]
fn one_atomic_save_survives_a_crash() {
    let report = Explore::new().budgets([1]).ways([Way::Crash]).run(
        Counter::open,
        async |counter| {
            counter.value.set(2);
            counter.save().await;
            yield_now().await;
        },
        is_zero_or_two,
    );
    report.assert_clean();
    assert!(report.points() >= 3, "{report}");
    assert!(report.sites().iter().all(|site| site.file() == file!()), "{report:?}");
}

#[test]
fn the_second_exploration_of_a_test_crashes_in_its_own_place() {
    for round in 0..2 {
        let report = Explore::new().budgets([]).ways([Way::Crash]).hang_after(Duration::from_secs(5)).run(
            async || scratch_dir().join(format!("round {round}")),
            async |path| {
                fs::write(path, b"").unwrap();
                yield_now().await;
            },
            async |path, outcome| match outcome {
                Outcome::Dropped { point: 1, .. } if !path.exists() => Err("another run was done".to_owned()),
                _ => Ok(()),
            },
        );
        report.assert_clean();
    }
}

#[test]
fn a_child_that_never_comes_to_the_exploration_is_a_failure() {
    // The harness knows no test by the name of this thread.
    let elsewhere = std::thread::Builder::new().name("elsewhere".to_owned()).spawn(|| {
        let explore = Explore::new().budgets([]).ways([Way::Crash]);
        explore.run(async || (), async |()| yield_now().await, async |(), _outcome| Ok(()))
    });
    let report = elsewhere.unwrap().join().unwrap();
    assert!(report.failures().iter().any(|it| it.is_incomplete() && it.message().contains("elsewhere")), "{report}");
}

#[test]
fn a_clean_run_leaves_no_directory_behind() {
    let seen = std::cell::RefCell::new(std::collections::BTreeSet::new());
    let report = Explore::new().budgets([]).run(
        async || {
            let directory = scratch_dir();
            fs::write(directory.join("file"), b"").unwrap();
            assert!(seen.borrow_mut().insert(directory), "each run has its own");
        },
        async |()| yield_now().await,
        async |(), _outcome| Ok(()),
    );
    report.assert_clean();
    assert_eq!(seen.borrow().len(), report.runs());
    assert!(seen.borrow().iter().all(|directory| !directory.exists()));
}
