//! Durable replacement, streams, many files and transactions, beside std, `tokio::fs` and the crates of the field.
//!
//! Everything here syncs files and directories, except where a name says otherwise, so that like is compared with like.
//! The contestants take turns on one disk (that of the target directory) and the medians of all rounds are printed:
//! figures that were taken one after the other tell more about the disk's neighbours than about the code. Before each turn
//! the file system is synced, so that nobody pays for what another has put off; the same is true of what ours puts off.
//!
//! Arguments: words; only contests whose title contains one of them are held.

#![expect(clippy::unwrap_used, reason = "a bench that fails has nothing to measure")]
#![expect(clippy::print_stdout, reason = "a bench speaks through its output")]
#![expect(clippy::disallowed_methods, reason = "`tokio::fs` is what ours is compared with")]

use std::fs::File;
use std::hint::black_box;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use cancel_safe_atomic_fs::{self as atomic_fs, AtomicFileWriter, Durability, MultiFileTransaction};
use cancel_safe_benches::{Contest, percentile};
use tokio::io::AsyncWriteExt;
use tokio::runtime::Runtime;

#[cfg(feature = "peers")]
#[path = "atomic_fs/disk.rs"]
mod disk;
#[cfg(feature = "peers")]
#[path = "atomic_fs/faults.rs"]
mod faults;
#[cfg(feature = "peers")]
#[path = "atomic_fs/ways.rs"]
mod ways;

const CHUNK_BYTES: usize = 8 << 10;
const STREAM_BYTES: usize = 64 << 20;
const SMALL: [u8; 4 << 10] = [b'x'; 4 << 10];

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
    let is_wanted = |title: &str| words.is_empty() || words.iter().any(|word| title.contains(word.as_str()));
    let bench = Bench { runtime: Runtime::new().unwrap(), disk: Scratch::new(Path::new(env!("CARGO_TARGET_TMPDIR"))) };
    let contests: &[(&str, Contests)] = &[
        ("replace", replace),
        ("memory", in_memory),
        ("stream", stream),
        ("many", many),
        ("transaction", transaction),
        ("drop", dropped),
        #[cfg(feature = "peers")]
        ("faults", |bench| faults::run_all(&bench.runtime, &bench.disk.0)),
    ];
    for (_, hold) in contests.iter().filter(|(title, _)| is_wanted(title)) {
        hold(&bench);
    }
    ExitCode::SUCCESS
}

type Contests = fn(&Bench);

struct Bench {
    runtime: Runtime,
    disk: Scratch,
}

/// A directory that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(parent: &Path) -> Self {
        let path = parent.join(format!("atomic-fs-bench-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// Lets the file system finish what it has put off, such as freeing what was replaced.
    fn settle(&self) {
        assert!(std::process::Command::new("sync").arg("-f").arg(&self.0).status().unwrap().success());
    }

    /// An empty directory of its own for one contestant.
    fn fresh(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        drop(std::fs::remove_dir_all(&path));
        std::fs::create_dir_all(&path).unwrap();
        path
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

/// The same as a whole on the blocking pool: what one hop and one copy cost at the least.
async fn hop_replace(path: &Path, content: &[u8]) {
    let (path, content) = (path.to_path_buf(), content.to_vec());
    tokio::task::spawn_blocking(move || std_replace(&path, &content)).await.unwrap();
}

fn replace(bench: &Bench) {
    let Bench { runtime, disk } = bench;
    for (name, bytes, rounds) in [("4 KiB", 4 << 10, 400), ("1 MiB", 1 << 20, 100), ("64 MiB", 64 << 20, 10)] {
        let content = vec![b'x'; bytes];
        let content = &content;
        let path = |who: &str| disk.fresh(who).join("file");
        let (std, ours, naive, hop) = (path("std"), path("ours"), path("naive"), path("hop"));
        let contest = Contest::new(format!("replace a file of {name}, durably"), rounds)
            .before_each(|| disk.settle())
            .add("std", move || std_replace(&std, black_box(content)))
            .add("atomic-fs", move || runtime.block_on(atomic_fs::write(&ours, black_box(content))).unwrap())
            .add("tokio::fs, one await a step", move || runtime.block_on(naive_replace(&naive, black_box(content))))
            .add("std in one spawn_blocking", move || runtime.block_on(hop_replace(&hop, black_box(content))));
        #[cfg(feature = "peers")]
        let contest = peers::replace(contest, content, disk);
        contest.run();
    }
}

/// Without a disk only the hops to the blocking pool are left.
fn in_memory(bench: &Bench) {
    let shared = Path::new("/dev/shm");
    if !shared.is_dir() {
        println!("\nreplace a file of 4 KiB in memory: not run, because there is no /dev/shm");
        return;
    }
    let (runtime, memory) = (&bench.runtime, Scratch::new(shared));
    let path = |who: &str| memory.fresh(who).join("file");
    let (std, ours, naive, hop) = (path("std"), path("ours"), path("naive"), path("hop"));
    Contest::new("replace a file of 4 KiB in memory", 2_000)
        .add("atomic-fs", move || runtime.block_on(atomic_fs::write(&ours, black_box(&SMALL))).unwrap())
        .add("tokio::fs, one await a step", move || runtime.block_on(naive_replace(&naive, black_box(&SMALL))))
        .add("std in one spawn_blocking", move || runtime.block_on(hop_replace(&hop, black_box(&SMALL))))
        .add("std", move || std_replace(&std, black_box(&SMALL)))
        .run();
}

/// Nothing is synced here: the disk would hide what the chunks cost.
fn stream(bench: &Bench) {
    let Bench { runtime, disk } = bench;
    let chunk = &[b'x'; CHUNK_BYTES];
    let path = |who: &str| disk.fresh(who).join("file");
    let (std, ours, tokio) = (path("std"), path("ours"), path("tokio"));
    Contest::new("stream 64 MiB in chunks of 8 KiB, not synced", 15)
        .before_each(|| disk.settle())
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
}

/// Replaces `names` in `directory` by one transaction.
async fn commit(directory: &Path, names: &[String]) {
    let mut tx = MultiFileTransaction::new();
    for name in names {
        tx.add_file(directory.join(name), black_box(&SMALL)).await.unwrap();
    }
    tx.commit().await.unwrap();
}

/// Many small files: the kernel groups the syncs of concurrent writers by itself.
fn many(bench: &Bench) {
    let Bench { runtime, disk } = bench;
    let names: Vec<String> = (0..1000).map(|number| number.to_string()).collect();
    let names = &names;
    let (std, ours, tx) = (disk.fresh("std"), disk.fresh("ours"), disk.fresh("tx"));
    let contest = Contest::new("replace many files (1000 of 4 KiB), durably", 7)
        .before_each(|| disk.settle())
        .add("std, one after the other", move || names.iter().for_each(|name| std_replace(&std.join(name), &SMALL)))
        .add("atomic-fs, 32 writes at once", move || {
            runtime.block_on(async {
                let mut tasks = tokio::task::JoinSet::new();
                for name in names {
                    if tasks.len() == 32 {
                        tasks.join_next().await.unwrap().unwrap();
                    }
                    let path = ours.join(name);
                    tasks.spawn(async move { atomic_fs::write(path, SMALL).await.unwrap() });
                }
                tasks.join_all().await;
            });
        })
        .add("atomic-fs, one transaction", move || runtime.block_on(commit(&tx, names)));
    #[cfg(feature = "peers")]
    let contest = peers::transaction(contest, names, disk);
    contest.run();
}

fn transaction(bench: &Bench) {
    let Bench { runtime, disk } = bench;
    for (count, rounds) in [(1, 300), (10, 150)] {
        let names: Vec<String> = (0..count).map(|number| number.to_string()).collect();
        let names = &names;
        let (ours, single) = (disk.fresh("ours"), disk.fresh("single"));
        let contest = Contest::new(format!("replace {count} file(s) of 4 KiB in a transaction, durably"), rounds)
            .before_each(|| disk.settle())
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
    }
}

/// How long the drop of a write takes, at moments spread evenly over the time that a write takes.
fn dropped(bench: &Bench) {
    const DROPS: u32 = 2_000;
    let Bench { runtime, disk } = bench;
    let path = disk.fresh("drop").join("file");
    let whole = {
        let start = Instant::now();
        runtime.block_on(atomic_fs::write(&path, SMALL)).unwrap();
        start.elapsed()
    };
    let mut times = Vec::new();
    for number in 0..DROPS {
        let wait = whole * number / DROPS;
        runtime.block_on(async {
            let mut write = Box::pin(atomic_fs::write(&path, SMALL));
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
    println!("\ndrop a write of 4 KiB at one of {count} moments:");
    println!("  median {:?}, p99 {:?}, longest {:?}", at(0.5), at(0.99), at(1.0));
}

/// The crates of the field; they block the thread, which here costs them nothing.
#[cfg(feature = "peers")]
mod peers {
    use super::*;

    pub(super) fn replace<'a>(contest: Contest<'a>, content: &'a [u8], disk: &Scratch) -> Contest<'a> {
        let path = |who: &str| disk.fresh(who).join("file");
        let (awf, aw, temp) = (path("atomic-write-file"), path("atomicwrites"), path("tempfile"));
        contest
            .add("atomic-write-file", move || {
                let mut file = atomic_write_file::AtomicWriteFile::open(&awf).unwrap();
                file.write_all(black_box(content)).unwrap();
                file.commit().unwrap();
            })
            .add("atomicwrites", move || {
                let file = atomicwrites::AtomicFile::new(&aw, atomicwrites::AllowOverwrite);
                file.write(|file| file.write_all(black_box(content))).unwrap();
            })
            .add("tempfile, which syncs nothing", move || {
                let mut file = tempfile::NamedTempFile::new_in(temp.parent().unwrap()).unwrap();
                file.write_all(black_box(content)).unwrap();
                file.persist(&temp).unwrap();
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
