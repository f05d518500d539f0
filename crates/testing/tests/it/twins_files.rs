//! Broken twins that write files, each caught at its await, and their fixed twins, on which the check is silent.

#![expect(clippy::disallowed_methods, reason = "the broken twins are made of what is banned")]

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};

use cancel_safe_testing::{Explore, Outcome, Report, Way, scratch_dir};
use tokio::io::AsyncWriteExt as _;
use tokio::task::spawn_blocking;

use crate::assert_caught;

const OLD: &[u8] = b"OLD";
const NEW: &[u8] = &[b'N'; 100_000];

/// A directory with one file of old content.
async fn one_file() -> PathBuf {
    let path = scratch_dir().join("settings");
    fs::write(&path, OLD).unwrap();
    path
}

/// The file is old or new, new if the operation completed, and nothing else is in its directory.
async fn is_whole<T>(path: &PathBuf, outcome: Outcome<T>) -> Result<(), String> {
    match fs::read(path) {
        Err(error) => return Err(format!("file lost: {error}")),
        Ok(content) if content == NEW => {}
        Ok(content) if content == OLD && outcome.is_dropped() => {}
        Ok(content) => return Err(format!("torn: {} bytes", content.len())),
    }
    match fs::read_dir(path.parent().unwrap()).unwrap().count() {
        1 => Ok(()),
        count => Err(format!("litter: {} more files", count - 1)),
    }
}

fn explore_replacing(operation: impl AsyncFn(&PathBuf)) -> Report {
    Explore::new().run(one_file, operation, is_whole::<()>)
}

#[test]
fn writing_in_place_leaves_a_torn_file() {
    let line = line!() + 2;
    let report = explore_replacing(async |path| {
        let mut file = tokio::fs::File::create(path).await.unwrap();
        file.write_all(NEW).await.unwrap();
        file.flush().await.unwrap();
    });
    assert_caught(&report, file!(), line, "torn");
}

#[test]
fn one_temporary_name_and_a_rename_leave_litter() {
    let line = line!() + 5;
    let report = explore_replacing(async |path| {
        let temporary = path.with_extension("tmp");
        let mut file = tokio::fs::File::create(&temporary).await.unwrap();
        file.write_all(NEW).await.unwrap();
        file.sync_all().await.unwrap();
        tokio::fs::rename(&temporary, path).await.unwrap();
    });
    assert_caught(&report, file!(), line, "litter");
}

/// Removes the file when dropped.
struct Remove(Option<PathBuf>);

impl Drop for Remove {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            drop(fs::remove_file(path));
        }
    }
}

#[test]
fn a_guard_that_removes_the_temporary_file_runs_before_the_file_is_created() {
    let line = line!() + 4;
    let report = explore_replacing(async |path| {
        let temporary = path.with_extension("tmp");
        let mut guard = Remove(Some(temporary.clone()));
        let mut file = tokio::fs::File::create(&temporary).await.unwrap();
        file.write_all(NEW).await.unwrap();
        file.sync_all().await.unwrap();
        tokio::fs::rename(&temporary, path).await.unwrap();
        guard.0 = None;
    });
    assert_caught(&report, file!(), line, "litter");
    let ways: Vec<Way> = report.failures().iter().map(|failure| failure.way()).collect();
    assert!(ways.contains(&Way::Eager), "the create lands after the drop; {ways:?}");
}

/// The fixed twin of the three above: the whole protocol in one blocking job that cleans up after itself.
#[test]
fn one_blocking_job_leaves_the_old_or_the_new_file() {
    let report = explore_replacing(async |path| {
        let path = path.clone();
        let job = spawn_blocking(move || {
            let temporary = path.with_extension("tmp");
            let mut guard = Remove(Some(temporary.clone()));
            fs::write(&temporary, NEW).unwrap();
            fs::rename(&temporary, path).unwrap();
            guard.0 = None;
        });
        job.await.unwrap();
    });
    report.assert_clean();
    assert!(report.points() >= 2, "{report}");
}

const FILES: [&str; 3] = ["a", "b", "c"];

async fn three_files() -> PathBuf {
    let directory = scratch_dir();
    for name in FILES {
        fs::write(directory.join(name), OLD).unwrap();
    }
    directory
}

#[expect(clippy::ptr_arg, reason = "a check takes a reference to the very state")]
async fn all_or_none<T>(directory: &PathBuf, _outcome: Outcome<T>) -> Result<(), String> {
    match FILES.iter().filter(|name| fs::read(directory.join(name)).unwrap() == NEW).count() {
        0 | 3 => Ok(()),
        committed => Err(format!("half committed: {committed} of 3")),
    }
}

fn stage_all(directory: &Path) {
    for name in FILES {
        fs::write(directory.join(name).with_extension("new"), NEW).unwrap();
    }
}

#[test]
fn a_loop_of_renames_is_half_committed() {
    let line = line!() + 7;
    let report = Explore::new().run(
        three_files,
        async |directory| {
            stage_all(directory);
            for name in FILES {
                let path = directory.join(name);
                tokio::fs::rename(path.with_extension("new"), path).await.unwrap();
            }
        },
        all_or_none,
    );
    assert_caught(&report, file!(), line, "half committed");
}

#[test]
fn a_commit_in_one_blocking_job_is_never_half_done() {
    let report = Explore::new().run(
        three_files,
        async |directory| {
            stage_all(directory);
            let directory = directory.clone();
            let job = spawn_blocking(move || {
                for name in FILES {
                    let path = directory.join(name);
                    fs::rename(path.with_extension("new"), path).unwrap();
                }
            });
            job.await.unwrap();
        },
        all_or_none,
    );
    report.assert_clean();
}

/// A log, and how many bytes it has according to its writer.
struct Log {
    path: PathBuf,
    acknowledged: Cell<usize>,
}

async fn empty_log() -> Log {
    Log { path: scratch_dir().join("log"), acknowledged: Cell::new(0) }
}

async fn has_what_was_acknowledged(log: &Log, _outcome: Outcome<()>) -> Result<(), String> {
    let written = fs::read(&log.path).map_or(0, |content| content.len());
    let acknowledged = log.acknowledged.get();
    if written >= acknowledged { Ok(()) } else { Err(format!("{acknowledged} bytes acknowledged, {written} written")) }
}

#[test]
fn a_dropped_buffered_writer_loses_what_it_has_acknowledged() {
    let line = line!() + 8;
    let report = Explore::new().run(
        empty_log,
        async |log| {
            let mut writer = tokio::io::BufWriter::new(tokio::fs::File::create(&log.path).await.unwrap());
            for _ in 0..3 {
                writer.write_all(b"entry\n").await.unwrap();
                log.acknowledged.update(|bytes| bytes + 6);
                tokio::task::yield_now().await;
            }
        },
        has_what_was_acknowledged,
    );
    assert_caught(&report, file!(), line, "acknowledged");
    // Nobody has to drop it: it is wrong even when it completes.
    assert!(report.failures().iter().any(|failure| failure.is_completed() && failure.site().is_none()), "{report}");
}

#[test]
fn a_writer_that_flushes_before_it_acknowledges_loses_nothing() {
    let report = Explore::new().run(
        empty_log,
        async |log| {
            let mut writer = tokio::io::BufWriter::new(tokio::fs::File::create(&log.path).await.unwrap());
            for _ in 0..3 {
                writer.write_all(b"entry\n").await.unwrap();
                writer.flush().await.unwrap();
                log.acknowledged.update(|bytes| bytes + 6);
                tokio::task::yield_now().await;
            }
        },
        has_what_was_acknowledged,
    );
    report.assert_clean();
}
