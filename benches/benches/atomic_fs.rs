//! Durable replacement, streams, many files and transactions, beside std, `tokio::fs` and comparable crates.
//!
//! Everything here syncs files and directories, except where a name says otherwise, so that like is compared with like.
//! The contestants take turns on one disk and the medians of all rounds are printed: figures that were taken one after
//! the other say more about other users of the disk than about the code. Before each turn the file system is synced, so
//! that no contestant pays for work that another has deferred, and neither does ours. As root, contests run on a
//! separate ext4 and a separate xfs, each with a journal, and on a tmpfs; otherwise on the disk of the target
//! directory, whose file system is named.
//!
//! Arguments: words. Only contests whose title contains one of them run, and only on the named file systems (`ext4`,
//! `xfs`, `tmpfs`, or `here` for the target directory's). `quick` runs a tenth of the rounds, with a quarter of the
//! files: it shows that everything works, and no more.

#![expect(clippy::unwrap_used, reason = "a bench that fails has nothing to measure")]
#![expect(clippy::print_stdout, reason = "a bench speaks through its output")]
#![expect(clippy::disallowed_methods, reason = "`tokio::fs` is what ours is compared with")]

use std::fs::File;
use std::hint::black_box;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use cancel_safe_atomic_fs::{self as atomic_fs, AtomicFileWriter, Durability, MultiFileTransaction};
use cancel_safe_benches::{Contest, percentile};
use tokio::io::AsyncWriteExt;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use crate::grounds::Ground;

#[cfg(feature = "peers")]
#[path = "atomic_fs/disk.rs"]
mod disk;
#[cfg(feature = "peers")]
#[path = "atomic_fs/faults.rs"]
mod faults;
#[path = "atomic_fs/grounds.rs"]
mod grounds;
#[cfg(feature = "peers")]
#[path = "atomic_fs/ways.rs"]
mod ways;

const CHUNK_BYTES: usize = 8 << 10;
const STREAM_BYTES: usize = 64 << 20;
static SMALL: [u8; 4 << 10] = [b'x'; 4 << 10];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    #[cfg(feature = "peers")]
    if let [role, task, who, path] = words.as_slice()
        && role == "child"
    {
        // One thread for all blocking jobs, so that their calls can be counted; no I/O driver, which writes by itself.
        let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).enable_time().build();
        return faults::child(&runtime.unwrap(), task, who, path);
    }
    grounds::take_own_mounts();
    let is_said = |word: &str| words.iter().any(|said| said == word);
    let titles: Vec<_> =
        words.iter().filter(|word| *word != "quick" && !grounds::NAMES.contains(&word.as_str())).collect();
    let is_wanted = |title: &str| titles.is_empty() || titles.iter().any(|word| title.contains(word.as_str()));
    let is_chosen = |name: &str| is_said(name) || !grounds::NAMES.iter().any(|name| is_said(name));
    let pace = if is_said("quick") { Pace::Quick } else { Pace::Full };
    let runtime = Runtime::new().unwrap();
    let scratch = Scratch::new(Path::new(env!("CARGO_TARGET_TMPDIR")));
    // They are dropped before the scratch directory, which must not be removed while something is mounted there.
    let grounds = Ground::all(&scratch.0, is_chosen);
    for (place, ground) in grounds.iter().enumerate() {
        let bench = Bench { runtime: &runtime, disk: Scratch::new(&ground.path), ground: &ground.name, pace };
        for (title, place_of, hold) in CONTESTS {
            if is_wanted(title) && (*place_of == Where::Everywhere || place == 0) {
                hold(&bench);
            }
        }
    }
    #[cfg(feature = "peers")]
    if is_wanted("faults") {
        faults::run_all(&runtime, &scratch.0);
    }
    ExitCode::SUCCESS
}

/// Where a contest runs: if the file system plays no part, it runs only once.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Where {
    Everywhere,
    Once,
}

type Hold = fn(&Bench<'_>);

const CONTESTS: &[(&str, Where, Hold)] = &[
    ("replace", Where::Everywhere, replace),
    ("stream", Where::Once, stream),
    ("many", Where::Everywhere, many),
    ("writers", Where::Everywhere, writers),
    ("transaction", Where::Everywhere, transaction),
    ("drop", Where::Once, dropped),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Pace {
    Full,
    Quick,
}

struct Bench<'a> {
    runtime: &'a Runtime,
    disk: Scratch,
    /// The name of the file system.
    ground: &'a str,
    pace: Pace,
}

impl<'a> Bench<'a> {
    /// A contest over `rounds` rounds on this ground. Each turn begins at rest: nothing is waiting to be written, and a
    /// thread of the blocking pool is awake.
    fn contest(&'a self, title: impl std::fmt::Display, rounds: usize) -> Contest<'a> {
        let rounds = if self.pace == Pace::Quick { (rounds / 10).max(3) } else { rounds };
        Contest::new(format!("{}: {title}", self.ground), rounds).before_each(move || {
            self.disk.settle();
            self.runtime.block_on(self.runtime.spawn_blocking(|| ())).unwrap();
        })
    }

    /// The names of `count` files.
    fn names(&self, count: usize) -> Vec<String> {
        let count = if self.pace == Pace::Quick { count.div_ceil(4) } else { count };
        (0..count).map(|number| number.to_string()).collect()
    }
}

/// A directory that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(parent: &Path) -> Self {
        let path = parent.join(format!("atomic-fs-bench-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// Lets the file system finish deferred work, such as freeing replaced files.
    fn settle(&self) {
        assert!(std::process::Command::new("sync").arg("-f").arg(&self.0).status().unwrap().success());
    }

    /// A new empty directory for one contestant.
    fn fresh(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        drop(std::fs::remove_dir_all(&path));
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    /// Removes what the contestants have written.
    fn clear(&self) {
        for entry in std::fs::read_dir(&self.0).unwrap() {
            std::fs::remove_dir_all(entry.unwrap().path()).unwrap();
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// What a careful program does by hand: create, write, sync, rename, sync the directory.
fn std_replace(path: &Path, content: &[u8]) {
    let temp = path.with_extension("tmp");
    let mut file = File::create(&temp).unwrap();
    file.write_all(content).unwrap();
    file.sync_all().unwrap();
    drop(file);
    std::fs::rename(&temp, path).unwrap();
    File::open(path.parent().unwrap()).unwrap().sync_all().unwrap();
}

/// The same with one await a step.
async fn naive_replace(path: &Path, content: &[u8]) {
    let temp = path.with_extension("tmp");
    let mut file = tokio::fs::File::create(&temp).await.unwrap();
    file.write_all(content).await.unwrap();
    file.flush().await.unwrap();
    file.sync_all().await.unwrap();
    drop(file);
    tokio::fs::rename(&temp, path).await.unwrap();
    tokio::fs::File::open(path.parent().unwrap()).await.unwrap().sync_all().await.unwrap();
}

/// The same as one job on the blocking pool: the minimal cost of one hop.
async fn hop_replace(path: &Path, content: &Bytes) {
    let (path, content) = (path.to_path_buf(), content.clone());
    tokio::task::spawn_blocking(move || std_replace(&path, &content)).await.unwrap();
}

fn replace(bench: &Bench<'_>) {
    let Bench { runtime, disk, .. } = bench;
    for (name, bytes, rounds) in [("4 KiB", 4 << 10, 400), ("1 MiB", 1 << 20, 100), ("64 MiB", 64 << 20, 10)] {
        let content = Bytes::from(vec![b'x'; bytes]);
        let content = &content;
        let path = |who: &str| disk.fresh(who).join("file");
        let (std, hop, ours, whole, naive) = (path("std"), path("hop"), path("ours"), path("bytes"), path("naive"));
        let contest = bench
            .contest(format!("replace a file of {name}, durably"), rounds)
            .add("std", move || std_replace(&std, black_box(content)))
            .add("std in one spawn_blocking", move || runtime.block_on(hop_replace(&hop, black_box(content))))
            .add("atomic-fs, write", move || runtime.block_on(atomic_fs::write(&ours, black_box(content))).unwrap())
            .add("atomic-fs, write_bytes", move || {
                runtime.block_on(atomic_fs::write_bytes(&whole, black_box(content).clone())).unwrap();
            })
            .add("tokio::fs, one await a step", move || runtime.block_on(naive_replace(&naive, black_box(content))));
        #[cfg(feature = "peers")]
        let contest = peers::replace(contest, content, disk);
        contest.run();
        // Makes room for the next one.
        disk.clear();
    }
}

/// Nothing is synced here: the disk would hide the cost of the chunks.
fn stream(bench: &Bench<'_>) {
    let Bench { runtime, disk, .. } = bench;
    let chunk = &[b'x'; CHUNK_BYTES];
    let path = |who: &str| disk.fresh(who).join("file");
    let (std, ours, tokio) = (path("std"), path("ours"), path("tokio"));
    bench
        .contest("stream 64 MiB in chunks of 8 KiB, not synced", 15)
        .add("std, BufWriter of 256 KiB", move || {
            let temp = std.with_extension("tmp");
            let mut writer = BufWriter::with_capacity(256 << 10, File::create(&temp).unwrap());
            for _ in 0..STREAM_BYTES / CHUNK_BYTES {
                writer.write_all(black_box(chunk)).unwrap();
            }
            writer.flush().unwrap();
            std::fs::rename(&temp, &std).unwrap();
        })
        .add("atomic-fs", move || {
            runtime.block_on(async {
                let options = AtomicFileWriter::options().durability(Durability::None);
                let mut writer = options.open(&ours).await.unwrap();
                for _ in 0..STREAM_BYTES / CHUNK_BYTES {
                    writer.write_all(black_box(chunk)).await.unwrap();
                }
                writer.commit().await.unwrap();
            });
        })
        .add("tokio::fs::File", move || {
            runtime.block_on(async {
                let temp = tokio.with_extension("tmp");
                let mut file = tokio::fs::File::create(&temp).await.unwrap();
                for _ in 0..STREAM_BYTES / CHUNK_BYTES {
                    file.write_all(black_box(chunk)).await.unwrap();
                }
                file.flush().await.unwrap();
                tokio::fs::rename(&temp, &tokio).await.unwrap();
            });
        })
        .run();
    disk.clear();
}

/// Replaces `names` in `directory` by one transaction.
async fn commit(directory: &Path, names: &[String]) {
    let mut tx = MultiFileTransaction::new();
    tx.add_files(names.iter().map(|name| (directory.join(name), black_box(&SMALL)))).await.unwrap();
    tx.commit().await.unwrap();
}

/// As many files as a directory of mail has, by one caller.
fn many(bench: &Bench<'_>) {
    let Bench { runtime, disk, .. } = bench;
    let names = bench.names(1000);
    let names = &names;
    let (std, ours, tx) = (disk.fresh("std"), disk.fresh("ours"), disk.fresh("tx"));
    let contest = bench
        .contest(format!("replace many files ({} of 4 KiB) by one caller, durably", names.len()), 7)
        .add("std, one after the other", move || names.iter().for_each(|name| std_replace(&std.join(name), &SMALL)))
        .add("atomic-fs, one after the other", move || {
            runtime.block_on(async {
                for name in names {
                    atomic_fs::write(ours.join(name), black_box(&SMALL)).await.unwrap();
                }
            });
        })
        .add("atomic-fs, one transaction", move || runtime.block_on(commit(&tx, names)));
    #[cfg(feature = "peers")]
    let contest = peers::transaction(peers::many(contest, names, disk), names, disk);
    contest.run();
    disk.clear();
}

/// How many write at once.
const WRITERS: usize = 32;

/// Distributes `names` to threads, as a plain program does.
fn by_threads(names: &[String], write: impl Fn(&str) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..WRITERS {
            scope.spawn(|| {
                while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
                    write(name);
                }
            });
        }
    });
}

/// Tasks that each write one file after another, until there are no more.
async fn by_tasks<F: Future<Output = ()> + Send>(
    paths: Vec<PathBuf>,
    write: impl Fn(PathBuf) -> F + Copy + Send + 'static,
) {
    let paths = std::sync::Arc::new(paths);
    let next = std::sync::Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..WRITERS {
        let (paths, next) = (paths.clone(), next.clone());
        tasks.spawn(async move {
            while let Some(path) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
                write(path.clone()).await;
            }
        });
    }
    tasks.join_all().await;
}

/// Many writers at once: the kernel groups their syncs by itself.
fn writers(bench: &Bench<'_>) {
    let Bench { runtime, disk, .. } = bench;
    let names = bench.names(2000);
    let names = &names;
    let paths = |who: &str| {
        let directory = disk.fresh(who);
        names.iter().map(|name| directory.join(name)).collect::<Vec<_>>()
    };
    let (std, hop, ours) = (disk.fresh("std"), paths("hop"), paths("ours"));
    let contest = bench
        .contest(format!("replace {} files of 4 KiB by {WRITERS} writers at once, durably", names.len()), 9)
        .add("std, so many threads", move || by_threads(names, |name| std_replace(&std.join(name), &SMALL)))
        .add("std, each in a spawn_blocking", move || {
            runtime.block_on(by_tasks(hop.clone(), |path| async move {
                tokio::task::spawn_blocking(move || std_replace(&path, &SMALL)).await.unwrap();
            }));
        })
        .add("atomic-fs", move || {
            runtime.block_on(by_tasks(ours.clone(), |path| async { atomic_fs::write(path, &SMALL).await.unwrap() }));
        });
    #[cfg(feature = "peers")]
    let contest = peers::writers(contest, names, disk);
    contest.run();
    disk.clear();
}

fn transaction(bench: &Bench<'_>) {
    let Bench { runtime, disk, .. } = bench;
    for (count, rounds) in [(1, 300), (10, 150)] {
        let names: Vec<String> = (0..count).map(|number: u32| number.to_string()).collect();
        let names = &names;
        let (ours, single) = (disk.fresh("ours"), disk.fresh("single"));
        let contest = bench
            .contest(format!("replace {count} file(s) of 4 KiB in a transaction, durably"), rounds)
            .add("atomic-fs, a transaction", move || runtime.block_on(commit(&ours, names)))
            .add("atomic-fs, single writes in turn", move || {
                runtime.block_on(async {
                    for name in names {
                        atomic_fs::write(single.join(name), black_box(&SMALL)).await.unwrap();
                    }
                });
            });
        #[cfg(feature = "peers")]
        let contest = peers::transaction(contest, names, disk);
        contest.run();
        disk.clear();
    }
}

/// How long the drop of a write takes, at moments spread evenly over the time that a write takes.
fn dropped(bench: &Bench<'_>) {
    const DROPS: u32 = 2_000;
    let Bench { runtime, disk, ground, .. } = bench;
    let path = disk.fresh("drop").join("file");
    let whole = {
        let start = Instant::now();
        runtime.block_on(atomic_fs::write(&path, &SMALL)).unwrap();
        start.elapsed()
    };
    let mut times = Vec::new();
    for number in 0..DROPS {
        let wait = whole * number / DROPS;
        runtime.block_on(async {
            let mut write = Box::pin(atomic_fs::write(&path, &SMALL));
            let begun = Instant::now();
            // A timer would be too coarse: the thread spins.
            while begun.elapsed() < wait {
                if futures_util::poll!(&mut write).is_ready() {
                    return;
                }
            }
            let start = Instant::now();
            drop(write);
            times.push(start.elapsed());
        });
    }
    let count = times.len();
    let mut at = |part| percentile(&mut times, part).unwrap_or(Duration::ZERO);
    println!("\n{ground}: drop a write of 4 KiB at one of {count} moments:");
    println!("  median {:?}, p99 {:?}, longest {:?}", at(0.5), at(0.99), at(1.0));
}

/// Comparable crates; they block the thread, which costs them nothing here.
#[cfg(feature = "peers")]
mod peers {
    use super::*;

    pub(super) fn replace<'a>(contest: Contest<'a>, content: &'a [u8], disk: &Scratch) -> Contest<'a> {
        let path = |who: &str| disk.fresh(who).join("file");
        let (awf, aw, temp) = (path("atomic-write-file"), path("atomicwrites"), path("tempfile"));
        contest
            .add("atomic-write-file", move || by_atomic_write_file(&awf, black_box(content)))
            .add("atomicwrites", move || {
                let file = atomicwrites::AtomicFile::new(&aw, atomicwrites::AllowOverwrite);
                file.write(|file| file.write_all(black_box(content))).unwrap();
            })
            .add("tempfile, synced by hand", move || by_tempfile(&temp, black_box(content)))
    }

    fn by_atomic_write_file(path: &Path, content: &[u8]) {
        let mut file = atomic_write_file::AtomicWriteFile::open(path).unwrap();
        file.write_all(content).unwrap();
        file.commit().unwrap();
    }

    /// By itself it syncs nothing.
    fn by_tempfile(path: &Path, content: &[u8]) {
        let directory = path.parent().unwrap();
        let mut file = tempfile::NamedTempFile::new_in(directory).unwrap();
        file.write_all(content).unwrap();
        file.as_file().sync_all().unwrap();
        drop(file.persist(path).unwrap());
        File::open(directory).unwrap().sync_all().unwrap();
    }

    /// The crates without transactions, one file after another.
    pub(super) fn many<'a>(contest: Contest<'a>, names: &'a [String], disk: &Scratch) -> Contest<'a> {
        let (awf, temp) = (disk.fresh("atomic-write-file"), disk.fresh("tempfile"));
        contest
            .add("atomic-write-file, one after the other", move || {
                names.iter().for_each(|name| by_atomic_write_file(&awf.join(name), &SMALL));
            })
            .add("tempfile, one after the other", move || {
                names.iter().for_each(|name| by_tempfile(&temp.join(name), &SMALL));
            })
    }

    pub(super) fn writers<'a>(contest: Contest<'a>, names: &'a [String], disk: &Scratch) -> Contest<'a> {
        let (awf, temp) = (disk.fresh("atomic-write-file"), disk.fresh("tempfile"));
        contest
            .add("atomic-write-file, so many threads", move || {
                by_threads(names, |name| by_atomic_write_file(&awf.join(name), &SMALL));
            })
            .add("tempfile, synced by hand, so many threads", move || {
                by_threads(names, |name| by_tempfile(&temp.join(name), &SMALL));
            })
    }

    pub(super) fn transaction<'a>(contest: Contest<'a>, names: &'a [String], disk: &Scratch) -> Contest<'a> {
        let (fstx, fs_transaction) = (disk.fresh("fstx"), disk.fresh("fs-transaction"));
        contest
            .add("fstx", move || {
                let mut tx = fstx::Transaction::begin(&fstx).unwrap();
                for name in names {
                    tx.write(name, black_box(&SMALL)).unwrap();
                }
                tx.commit().unwrap();
            })
            .add("fs-transaction", move || {
                use fs_transaction::{ChangeSet, StdFs, exec::block_on};
                let mut change = ChangeSet::new();
                for name in names {
                    change.write(name, black_box(&SMALL));
                }
                block_on(change.apply(&StdFs, &fs_transaction)).unwrap();
            })
    }
}
