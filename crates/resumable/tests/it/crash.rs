//! Real processes, really killed. `CANCEL_SAFE_CAMPAIGN=full` kills many more of them.

use std::{
    io::Read as _,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use cancel_safe_resumable::{Checkpoint, FileStore, ResumableTask, TaskError};
use futures_util::StreamExt;
use tokio_util::sync::CancellationToken;

use crate::support::{checkpoint, in_full, visited};

const CHECKPOINT: &str = "RESUMABLE_CRASH";
const ITEMS: u64 = 2000;
const WORKER: &str = "crash::child_that_is_killed";
const REFRESHER: &str = "crash::child_that_refreshes";

/// The result of an item: text that occurs in the file once for each time it was recorded. It is long enough not to
/// occur among the file's digests by chance, as three bytes occasionally do.
fn result_of(x: u64) -> String {
    format!("<result {x:04}>")
}

fn job(path: &Path, concurrency: usize) -> cancel_safe_resumable::Builder<u64, String> {
    let store = FileStore::at(path).wait(Duration::from_millis(20));
    ResumableTask::builder("crash").store(store).checkpoint_every(Duration::from_millis(2)).concurrency(concurrency)
}

/// Runs in a child that is killed; does nothing in the test run itself.
#[tokio::test]
async fn child_that_is_killed() {
    let Some(path) = std::env::var_os(CHECKPOINT) else { return };
    let job = job(Path::new(&path), concurrency_of_child());
    let job = if std::env::var_os(PARALLEL).is_some() { job.parallel(concurrency_of_child()) } else { job };
    let run = job.stream(0..ITEMS, |_, x| async move {
        if x % 16 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(result_of(x))
    });
    match run.finish().await {
        Ok(_) | Err(TaskError::Busy { .. }) => {}
        Err(error) => panic!("{error}"),
    }
}

const CONCURRENCY: &str = "RESUMABLE_CRASH_CONCURRENCY";
const PARALLEL: &str = "RESUMABLE_CRASH_PARALLEL";

/// How the items of a child run.
#[derive(Clone, Copy)]
enum Items {
    /// In its task, this many at once.
    Concurrent(usize),
    /// In separate tasks.
    Parallel(usize),
}

fn concurrency_of_child() -> usize {
    std::env::var(CONCURRENCY).unwrap().parse().unwrap()
}

fn spawn(child: &str, path: &Path, items: Items) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let concurrency = match items {
        Items::Concurrent(items) => items,
        Items::Parallel(items) => {
            command.env(PARALLEL, "");
            items
        }
    };
    command
        // A panic's message is shown at once.
        .args([child, "--exact", "--nocapture"])
        .env(CHECKPOINT, path)
        .env(CONCURRENCY, concurrency.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Kills a child, which must not have failed before.
fn kill(child: &mut Child, round: usize) {
    if let Some(status) = child.try_wait().unwrap()
        && !status.success()
    {
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        panic!("round {round}: {status}\n{said}");
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

/// How often each result is in the file.
fn occurrences(path: &Path) -> Vec<usize> {
    let text = String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned();
    let mut times = vec![0; ITEMS as usize];
    for (at, _) in text.match_indices("<result ") {
        let number = text.get(at + 8..at + 12).and_then(|number| number.parse::<u64>().ok());
        if let Some(x) = number.filter(|x| *x < ITEMS && text[at..].starts_with(&result_of(*x))) {
            times[x as usize] += 1;
        }
    }
    times
}

/// Opens the checkpoint, which must not be damaged, and leaves it again.
async fn cut_torn_tail(path: &Path) {
    let token = CancellationToken::new();
    token.cancel();
    let run = job(path, 8).cancel(token).stream(0..ITEMS, |_, x| async move { Ok(result_of(x)) });
    let error = run.finish().await.unwrap_err();
    assert!(error.is_cancelled(), "{error}");
}

/// How many processes a test kills, at least.
fn wanted_kills() -> usize {
    if in_full() { 3500 } else { 12 }
}

/// Kills runs of one checkpoint until it is complete, and checks after each that nothing was lost or written twice.
/// Returns how many processes were killed.
#[expect(clippy::print_stdout, reason = "a failed test shows its seed")]
async fn survive(starters: usize, items: Items, seed: u64) -> usize {
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let (_dir, path) = checkpoint();
    let (mut before, mut rounds) = (vec![0; ITEMS as usize], 0);
    for round in 0..400 {
        rounds += 1;
        let mut children: Vec<Child> = (0..starters).map(|_| spawn(WORKER, &path, items)).collect();
        let patience = Duration::from_micros(random.u64(500..60_000));
        tokio::time::sleep(patience).await;
        children.iter_mut().for_each(|child| kill(child, round));
        if !path.exists() {
            assert!(before.iter().all(|count| *count == 0), "the checkpoint vanished");
            continue;
        }
        cut_torn_tail(&path).await;
        let now = occurrences(&path);
        for (x, (old, new)) in before.iter().zip(&now).enumerate() {
            assert!(*new <= 1, "round {round}: result {x} was recorded {new} times");
            assert!(new >= old, "round {round}: result {x} was lost");
        }
        before = now;
        if before.iter().all(|count| *count == 1) {
            break;
        }
    }
    let mut run = job(&path, 8).stream(0..ITEMS, |_, x| async move { Ok(result_of(x)) });
    let mut seen = vec![0; ITEMS as usize];
    while let Some(done) = run.next().await {
        assert_eq!(done.result, Ok(result_of(done.index as u64)));
        seen[done.index] += 1;
    }
    run.finish().await.unwrap();
    assert!(seen.iter().all(|count| *count == 1));
    assert!(occurrences(&path).iter().all(|count| *count == 1), "something was recorded twice");
    rounds * starters
}

#[tokio::test]
async fn a_killed_run_loses_nothing_it_wrote_and_records_nothing_twice() {
    let mut kills = 0;
    while kills < wanted_kills() {
        for items in [Items::Concurrent(1), Items::Concurrent(64), Items::Parallel(8)] {
            kills += survive(1, items, fastrand::u64(..)).await;
        }
    }
    visited("kills", kills);
}

#[tokio::test]
async fn two_starters_that_are_killed_never_share_a_checkpoint() {
    let mut kills = 0;
    while kills < wanted_kills() {
        kills += survive(2, Items::Concurrent(8), fastrand::u64(..)).await;
    }
    visited("kills-of-two", kills);
}

#[tokio::test]
async fn of_many_first_starters_one_creates_the_checkpoint() {
    for _ in 0..10 {
        let (dir, path) = checkpoint();
        let mut children: Vec<Child> = (0..4).map(|_| spawn(WORKER, &path, Items::Concurrent(8))).collect();
        tokio::time::sleep(Duration::from_millis(fastrand::u64(0..10))).await;
        children[0].kill().unwrap();
        for mut child in children.drain(1..) {
            assert!(child.wait().unwrap().success());
        }
        drop(children);
        cut_torn_tail(&path).await;
        let twice: Vec<_> = occurrences(&path).into_iter().enumerate().filter(|(_, count)| *count > 1).collect();
        assert!(twice.is_empty(), "recorded more than once: {twice:?}");
        // The next run that creates a checkpoint here removes any remains of the killed one.
        assert!(std::fs::read_dir(dir.path()).unwrap().count() <= 2);
    }
}

/// The result of a generation for an item.
fn refreshed(generation: u64, x: u64) -> String {
    format!("{generation}:{x}")
}

fn generation_of(result: &str) -> u64 {
    result.split(':').next().unwrap().parse().unwrap()
}

/// Replaces all results again and again until it is killed, so that it compacts the file at every second completion and,
/// after a kill, when it opens it; does nothing in the test run itself.
#[tokio::test]
async fn child_that_refreshes() {
    let Some(path) = std::env::var_os(CHECKPOINT) else { return };
    let path = Path::new(&path);
    let read = Checkpoint::<String>::read(path).unwrap();
    let first = read.records().map(|done| generation_of(&done.unwrap().result.unwrap())).max().unwrap();
    for generation in first + 1..first + 1000 {
        let builder = job(path, concurrency_of_child()).revalidate(move |_, found| generation_of(found) >= generation);
        match builder.stream(0..ITEMS / 10, move |_, x| async move { Ok(refreshed(generation, x)) }).finish().await {
            Ok(_) | Err(TaskError::Busy { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Kills runs that refresh and compact one checkpoint, and checks after each that every item has a result that is no
/// older than before. Returns how many were killed while they wrote a new file.
#[expect(clippy::print_stdout, reason = "a failed test shows its seed")]
async fn survive_compaction(starters: usize, rounds: usize, seed: u64) -> usize {
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let (dir, path) = checkpoint();
    let items = ITEMS / 10;
    job(&path, 8).stream(0..items, |_, x| async move { Ok(refreshed(1, x)) }).finish().await.unwrap();
    let (mut before, mut in_the_middle) = (vec![1; items as usize], 0);
    for round in 0..rounds {
        let mut children: Vec<Child> = (0..starters).map(|_| spawn(REFRESHER, &path, Items::Concurrent(8))).collect();
        tokio::time::sleep(Duration::from_micros(random.u64(500..80_000))).await;
        children.iter_mut().for_each(|child| kill(child, round));
        let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        in_the_middle += names.filter(|name| name.to_string_lossy().starts_with(".afs-file-")).count();
        let read = Checkpoint::<String>::read(&path).unwrap();
        let mut seen = 0;
        for done in read.records() {
            let done = done.unwrap();
            let result = done.result.unwrap();
            let generation = generation_of(&result);
            assert_eq!(result, refreshed(generation, done.index as u64));
            assert!(generation >= before[done.index], "round {round}: result {} went back", done.index);
            before[done.index] = generation;
            seen += 1;
        }
        assert_eq!(seen, items, "round {round}: a result was lost");
        let most = 3 * read.live_bytes() + (64 << 10);
        assert!(read.len_bytes() < most, "round {round}: {} bytes, nothing was compacted", read.len_bytes());
    }
    in_the_middle
}

#[tokio::test]
async fn a_run_that_is_killed_while_it_compacts_loses_nothing() {
    let rounds = if in_full() { 2000 } else { 20 };
    survive_compaction(1, rounds, fastrand::u64(..)).await;
    survive_compaction(2, rounds, fastrand::u64(..)).await;
    visited("kills-compacting", 2 * rounds);
}

const COMPACTOR: &str = "crash::child_that_compacts";
const TRUNCATOR: &str = "crash::child_that_compacts_in_place";
const LARGE: u64 = 20_000;

/// A result of a few hundred bytes, so that a compaction takes its time.
fn large(generation: u64, x: u64) -> String {
    format!("{generation}:{x}:").repeat(40)
}

/// Compacts a file; does nothing in the test run itself.
#[tokio::test]
async fn child_that_compacts() {
    let Some(path) = std::env::var_os(CHECKPOINT) else { return };
    FileStore::at(path).compact().unwrap();
}

/// The broken twin: makes a compacted copy and writes it over the file; does nothing in the test run itself.
#[tokio::test]
async fn child_that_compacts_in_place() {
    let Some(path) = std::env::var_os(CHECKPOINT) else { return };
    // In its own directory, so that nothing of it is visible.
    let aside = Path::new(&path).with_extension("aside");
    std::fs::create_dir(&aside).unwrap();
    let aside = aside.join("job.ckpt");
    std::fs::copy(&path, &aside).unwrap();
    FileStore::at(&aside).compact().unwrap();
    let new = std::fs::read(&aside).unwrap();
    std::fs::write(&path, &new[..new.len() / 2]).unwrap();
    // A slow disk. The rest would follow.
    std::future::pending::<()>().await;
}

/// Where a kill hit, and what it left.
#[derive(Debug, PartialEq)]
enum Left {
    /// The old file, with an incomplete new one beside it.
    OldInside,
    Old,
    New,
}

/// Lets a child compact a file that holds every result twice, kills the child as soon as its work is visible, and
/// checks what is left: the old file, byte by byte, or a new one with the newer version of every result.
async fn kill_a_compaction(old: &Path, mut spawn: impl FnMut(&Path) -> Child) -> Result<Left, String> {
    let (dir, path) = checkpoint();
    let length = std::fs::copy(old, &path).unwrap();
    let mut child = spawn(&path);
    let begun = || {
        let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().starts_with(".afs-file-")).count() > 0
    };
    let has_begun = std::time::Instant::now();
    while !begun() && std::fs::metadata(&path).unwrap().len() == length && child.try_wait().unwrap().is_none() {
        assert!(has_begun.elapsed() < Duration::from_secs(60), "nothing is to be seen of a compaction");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    if std::fs::read(&path).unwrap() == std::fs::read(old).unwrap() {
        return Ok(if begun() { Left::OldInside } else { Left::Old });
    }
    let read = Checkpoint::<String>::read(&path).map_err(|error| error.to_string())?;
    let results: Vec<_> = read.records().map(|done| done.unwrap()).collect();
    let is_whole = results.len() as u64 == LARGE && read.is_sealed() && read.torn_bytes() == 0;
    let are_new = results.iter().all(|done| done.result == Ok(large(2, done.index as u64)));
    if is_whole && are_new { Ok(Left::New) } else { Err(format!("{} of {LARGE} results", results.len())) }
}

/// A file that holds every result twice.
async fn twice(path: &Path) {
    for generation in 1..3 {
        let prefix = format!("{generation}:");
        let builder = job(path, 8).revalidate(move |_, found| found.starts_with(&prefix));
        let run = builder.stream(0..LARGE, move |_, x| async move { Ok(large(generation, x)) });
        run.finish().await.unwrap();
    }
    let read = Checkpoint::<String>::read(path).unwrap();
    assert!(read.len_bytes() > read.live_bytes() * 3 / 2, "there is something to compact");
}

/// Kills compactions until `wanted` kills hit inside one; after each kill there must be the old file or the new one.
async fn survive_kills_inside(wanted: usize, mut spawn: impl FnMut(&Path) -> Child) -> usize {
    let (_dir, old) = checkpoint();
    twice(&old).await;
    let (mut inside, mut kills) = (0, 0);
    while inside < wanted {
        kills += 1;
        assert!(kills < 20 + 20 * wanted, "only {inside} of {kills} kills fell inside a compaction");
        let left = kill_a_compaction(&old, &mut spawn).await.unwrap_or_else(|wrong| panic!("kill {kills}: {wrong}"));
        inside += usize::from(left == Left::OldInside);
    }
    inside
}

#[tokio::test]
async fn a_compaction_that_is_killed_leaves_the_old_file_or_the_new_one() {
    let wanted = if in_full() { 200 } else { 5 };
    let inside = survive_kills_inside(wanted, |path| spawn(COMPACTOR, path, Items::Concurrent(1))).await;
    visited("kills-inside-compactions", inside);
}

#[cfg(feature = "cli")]
#[tokio::test]
async fn the_command_that_is_killed_while_it_compacts_leaves_the_old_file_or_the_new_one() {
    let command = |path: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_resumable"));
        command.arg("compact").arg(path).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    survive_kills_inside(5, command).await;
}

#[tokio::test]
async fn the_check_of_killed_compactions_catches_one_that_writes_in_place() {
    let (_dir, old) = checkpoint();
    twice(&old).await;
    let left = kill_a_compaction(&old, |path| spawn(TRUNCATOR, path, Items::Concurrent(1))).await;
    assert!(left.is_err(), "{left:?} passes for the old file or the new one");
}
