//! The child side of the tests that need a separate process, to be killed, stopped, traced or unprivileged.
//!
//! This test binary starts itself again; in the child, the one test below does the task that the environment names.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cancel_safe_atomic_fs::AtomicFileWriter as SafeFileWriter;
use cancel_safe_atomic_fs::{
    self as atomic_fs, AtomicFileWriter, Durability, Error, MultiFileTransaction, Preserve, blocking,
};

#[cfg(target_os = "linux")]
use crate::campaign::change_all_after_others;
use crate::cancel::cancel_at_random;
use crate::support::not_run;

const TASK: &str = "ATOMIC_FS_CHILD_TASK";
const PATH: &str = "ATOMIC_FS_CHILD_PATH";
/// Where the child may write before its task.
pub(crate) const OTHER: &str = "ATOMIC_FS_CHILD_OTHER";
/// The prefix of every line of the child for its parent.
const MARK: &str = "child says ";
/// How much a child writes, so that its content differs from the old one.
pub(crate) const SIZE_BYTES: usize = 4096;
/// How much it writes in pieces: more than a writer holds in its buffers.
pub(crate) const STREAM_BYTES: usize = (3 << 20) + 5;
/// How much it writes when it may hold no copy.
pub(crate) const LARGE_BYTES: usize = 64 << 20;
/// How many files it writes elsewhere first. strace counts calls by thread but tampers with every thread; after this
/// many calls only this thread has such counts, and a fault for it does not hit the test harness.
const OTHERS: usize = 40;

/// A command that runs `task` on `path` in a child; `wrapper` comes before it, `strace` for example.
pub(crate) fn command(wrapper: &[&str], task: &str, path: &Path) -> Command {
    let this = std::env::current_exe().unwrap();
    let mut words = wrapper.iter().map(std::ffi::OsStr::new).chain([this.as_os_str()]);
    let mut command = Command::new(words.next().unwrap());
    command.args(words).args(["--exact", "child::entry", "--nocapture", "--test-threads=1"]);
    command.env(TASK, task).env(PATH, path).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs the child to its end and returns its last message; `None` if it was killed before.
pub(crate) fn outcome(mut command: Command) -> Option<String> {
    let output = command.output().unwrap();
    last_word(&output.stdout)
}

/// The last message of a child with this output.
pub(crate) fn last_word(output: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(output).into_owned();
    text.lines().rev().find_map(|line| line.split_once(MARK)).map(|(_, said)| said.to_owned())
}

/// Waits until the child has said `wanted`.
pub(crate) fn await_word(child: &mut Child, wanted: &str) {
    let out = BufReader::new(child.stdout.as_mut().unwrap());
    assert!(out.lines().any(|line| line.unwrap().ends_with(&format!("{MARK}{wanted}"))), "the child never said it");
}

/// The name of strace, or `None`, which is also published, if `what` cannot run because strace does not work here.
pub(crate) fn strace(what: &str) -> Option<&'static str> {
    let works = Command::new("strace").args(["-qq", "-o", "/dev/null", "true"]).status().is_ok_and(|s| s.success());
    if !works {
        not_run(what, "it needs strace, and the permission to trace");
    }
    works.then_some("strace")
}

fn say(what: &str) {
    // A fault for a write of the pool's thread also hits this thread's write with the same number, once.
    let attempt = || {
        let mut out = std::io::stdout();
        writeln!(out, "\n{MARK}{what}").and_then(|()| out.flush()).is_ok()
    };
    assert!((0..3).any(|_| attempt()), "the parent does not hear");
}

fn say_result(result: Result<(), Error>) {
    match result {
        Ok(()) => say("Ok"),
        Err(error) => say(&format!("{:?} {:?} {error}", error.target(), error.kind())),
    }
}

fn other() -> PathBuf {
    PathBuf::from(std::env::var_os(OTHER).unwrap())
}

/// Drops root's rights, because root may do anything. The process starts as root, because the user nobody may not read
/// this binary's directory.
fn become_nobody() {
    if rustix::process::geteuid().is_root() {
        rustix::thread::set_thread_gid(rustix::process::Gid::from_raw(65534)).unwrap();
        rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(65534)).unwrap();
    }
}

fn write_others() {
    for _ in 0..OTHERS {
        blocking::write(other(), b"x").unwrap();
    }
}

/// A runtime whose blocking jobs are all counted on one thread. It has no I/O driver, which would be woken by a write to
/// an eventfd: how often varies, and a fault that hit it would leave the runtime asleep for ever.
fn one_pool_thread() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).enable_time().build().unwrap()
}

/// The tutorial's first exercise: a write that is cut before its commit does not exist. Its calls are the tutorial's,
/// except for two slips: the writer must be mutable, and without a pause a thousand lines are written before the time
/// is up.
async fn exercise() {
    let mut writer = SafeFileWriter::new("test.txt").await.unwrap();
    let result = tokio::time::timeout(Duration::from_millis(10), async {
        for i in 0..1000 {
            writer.write(format!("Line {}\n", i).as_bytes()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        writer.commit().await
    })
    .await;
    assert!(result.is_err(), "the limit must cut it");
    assert!(!Path::new("test.txt").exists());
}

#[test]
fn entry() {
    let (Ok(task), Ok(path)) = (std::env::var(TASK), std::env::var(PATH)) else { return };
    let path = Path::new(&path);
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let content = vec![b'N'; SIZE_BYTES];
    match task.as_str() {
        "write" => say_result(blocking::write(path, &content)),
        "write as nobody" => {
            become_nobody();
            say_result(blocking::write(path, &content));
        }
        "read as nobody" => {
            become_nobody();
            match std::fs::read(path) {
                Ok(_) => say("Ok"),
                Err(error) => say(&format!("Err({:?})", error.kind())),
            }
        }
        // How much more memory it took at its peak than before, in KiB. Zeros that nobody has touched take none themselves.
        #[cfg(target_os = "linux")]
        task @ ("write bytes" | "write a copy") => {
            let peak = || {
                let status = std::fs::read_to_string("/proc/self/status").unwrap();
                let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
                line.trim().trim_end_matches(" kB").parse::<usize>().unwrap()
            };
            let (before, content) = (peak(), bytes::Bytes::from(vec![0; LARGE_BYTES]));
            let content = if task == "write bytes" { content } else { content.to_vec().into() };
            one_pool_thread().block_on(atomic_fs::write_bytes(path, content)).unwrap();
            say(&(peak() - before).to_string());
        }
        "rename as nobody" => {
            become_nobody();
            // Its threads start with the rights of this one.
            say_result(one_pool_thread().block_on(async {
                let mut tx = MultiFileTransaction::new();
                tx.rename(path.join("f"), path.join("g"))?;
                tx.rename(path.join("over"), path.join("replaced"))?;
                tx.commit().await
            }));
        }
        "recover as nobody" => {
            become_nobody();
            say_result(one_pool_thread().block_on(async {
                let report = atomic_fs::recover(path).await?;
                assert_eq!((report.removed, report.live), (1, 1), "{report:?}");
                Ok(())
            }));
        }
        "drop a commit when its journal is committed" => runtime().block_on(async {
            let mut tx = MultiFileTransaction::new();
            tx.add_files((0..200).map(|number| (path.join(number.to_string()), "new"))).await.unwrap();
            let mut commit = Box::pin(tx.commit());
            while !path.join(".afs-journal").exists() {
                let cut = tokio::time::timeout(Duration::from_millis(1), &mut commit).await;
                assert!(cut.is_err(), "it ended too soon: {cut:?}");
            }
            let begun = std::time::Instant::now();
            drop(commit);
            let took = begun.elapsed();
            let are_new = (0..200).all(|number| path.join(number.to_string()).exists());
            say(if are_new && took < Duration::from_millis(1500) { "Ok" } else { "it waited, or left a mix" });
        }),
        "rotate and swap" => say_result(one_pool_thread().block_on(async {
            let mut tx = MultiFileTransaction::begin(path);
            tx.rename(path.join("log.1"), path.join("old/log.2"))?;
            tx.rename(path.join("log"), path.join("log.1"))?;
            tx.add_file(path.join("log"), "fresh").await?;
            tx.rename(path.join("blue"), path.join("green"))?;
            tx.rename(path.join("green"), path.join("blue"))?;
            tx.remove_file(path.join("gone"))?;
            tx.commit().await
        })),
        "keep owners as nobody" => {
            become_nobody();
            one_pool_thread().block_on(async {
                let keep = AtomicFileWriter::options().preserve(Preserve::ALL);
                let single = keep.write(path.join("theirs"), "new").await.unwrap_err();
                let mut tx = MultiFileTransaction::new().options(keep);
                tx.add_file(path.join("ours"), "new").await.unwrap();
                let several = tx.add_file(path.join("theirs"), "new").await.unwrap_err();
                drop(tx);
                say(&format!("{:?} {:?}", single.kind(), several.kind()));
            });
        }
        // The content of each file as it was added with, the names as they are committed with.
        task @ ("none, then full" | "full, then none") => say_result(one_pool_thread().block_on(async {
            let durability = |name| if name == "none" { Durability::None } else { Durability::Full };
            let (first, last) = task.split_once(", then ").unwrap();
            let mut tx = MultiFileTransaction::new();
            for name in [first, last] {
                tx = tx.options(AtomicFileWriter::options().durability(durability(name)));
                // More files than are kept open, so that some are closed before the commit.
                tx.add_files((0..70).map(|number| (path.join(format!("{name}{number}")), name))).await?;
            }
            tx.commit().await
        })),
        "remove and add" => say_result(one_pool_thread().block_on(async {
            let mut tx = MultiFileTransaction::new();
            tx.remove_file(path.join("old"))?;
            tx.add_files(["new", "taken"].map(|name| (path.join(name), "new"))).await?;
            tx.commit().await
        })),
        #[cfg(target_os = "linux")]
        task if task.starts_with(crate::random::TASK) => {
            say_result(one_pool_thread().block_on(crate::random::run(path, &task[crate::random::TASK.len()..])));
        }
        #[cfg(target_os = "linux")]
        task if task.starts_with(crate::in_place::TASK) => {
            let task = &task[crate::in_place::TASK.len()..];
            let other = std::env::var_os(OTHER).map_or_else(|| path.to_owned(), PathBuf::from);
            say_result(one_pool_thread().block_on(crate::in_place::run(path, &other, task)));
        }
        "two directories" => say_result(one_pool_thread().block_on(async {
            let mut tx = MultiFileTransaction::new();
            tx.add_file(path.join("a/x"), "new").await?;
            tx.add_file(path.join("b/y"), "new").await?;
            tx.commit().await
        })),
        "write after others" => {
            write_others();
            say_result(blocking::write(path, &content));
        }
        "write in place" => {
            write_others();
            std::fs::write(path, &content).unwrap();
            say("Ok");
        }
        "write in place and put back" => {
            write_others();
            let old = std::fs::read(path).unwrap();
            if std::fs::write(path, &content).is_ok() {
                say("Ok");
            } else {
                let put_back = std::fs::write(path, old);
                say(&format!("Unchanged, if that was {put_back:?}"));
            }
        }
        "one after the other" => {
            for name in ["a", "b", "n", "sub/f"] {
                blocking::write(path.join(name), format!("new {name}")).unwrap();
            }
            std::fs::rename(path.join("d"), path.join("e")).unwrap();
            std::fs::remove_file(path.join("c")).unwrap();
            say("Ok");
        }
        "undone by hand" => {
            let files = ["a", "b", "n", "sub/f"];
            let write = |state: &str, name: &&str| blocking::write(path.join(name), format!("{state} {name}"));
            match files.iter().position(|name| write("new", name).is_err()) {
                None => say("Ok"),
                Some(failed) => {
                    // It hopes that the failed operation does not fail again.
                    files[..failed].iter().rev().for_each(|name| drop(write("old", name)));
                    say("Unchanged, as far as it knows");
                }
            }
        }
        "recover with the journal put aside" => {
            let (journal, aside) = (path.join(".afs-journal"), path.join("aside"));
            let put_aside = std::fs::rename(&journal, &aside).and_then(|()| std::fs::File::open(path)?.sync_all());
            match put_aside.and_then(|()| std::fs::rename(&aside, &journal)) {
                Ok(()) => say_result(runtime().block_on(atomic_fs::recover(path)).map(drop)),
                Err(error) => say(&format!("Undecided {error}")),
            }
        }
        "keep all after others" | "ordered after others" | "create after others" => {
            let options = AtomicFileWriter::options();
            let (others, options) = match &*task {
                "keep all after others" => (options.preserve(Preserve::ALL), options.preserve(Preserve::ALL)),
                "ordered after others" => (options, options.durability(Durability::Ordered)),
                _ => (options, options.create_new(true)),
            };
            say_result(one_pool_thread().block_on(async {
                for _ in 0..OTHERS {
                    others.write(other(), b"x").await?;
                }
                options.write(path, &content).await
            }));
        }
        "transaction of one after others" => say_result(one_pool_thread().block_on(async {
            for _ in 0..OTHERS {
                atomic_fs::write(other(), b"x").await?;
            }
            let mut tx = MultiFileTransaction::new();
            tx.add_file(path, &content).await?;
            tx.commit().await
        })),
        "stream after others" => say_result(one_pool_thread().block_on(async {
            for _ in 0..OTHERS {
                atomic_fs::write(other(), b"x").await?;
            }
            let mut writer = AtomicFileWriter::new(path).await?;
            for piece in vec![b'N'; STREAM_BYTES].chunks(100_000) {
                writer.write(piece).await?;
            }
            writer.commit().await
        })),
        #[cfg(target_os = "linux")]
        "change all after others" => say_result(one_pool_thread().block_on(change_all_after_others(path, &other()))),
        "recover" => say_result(runtime().block_on(atomic_fs::recover(path)).map(drop)),
        "cancel" => {
            let rounds = path.to_str().unwrap().parse().unwrap();
            say(&cancel_at_random(rounds, |path| atomic_fs::write(path.to_owned(), vec![b'N'; 65536])).to_string());
        }
        "four writers" => say_result(runtime().block_on(async {
            let mut writers = tokio::task::JoinSet::new();
            for task in 0..4_u8 {
                let path = path.to_owned();
                writers.spawn(async move {
                    for round in 0..100 {
                        // Content that shows a mix: how long it is depends on what it is.
                        let letter = b'a' + (u8::try_from(std::process::id() % 5).unwrap() * 4 + task);
                        let content = vec![letter; 20_000 + usize::from(letter)];
                        // Only some rounds are synced: the races are the same, and the test is faster.
                        let durability = if round % 10 == 0 { Durability::Full } else { Durability::None };
                        AtomicFileWriter::options().durability(durability).write(&path, content).await?;
                    }
                    Ok(())
                });
            }
            writers.join_all().await.into_iter().collect()
        })),
        "count files" => runtime().block_on(async {
            for number in 1_u64.. {
                atomic_fs::write(path, number.to_string()).await.unwrap();
                say(&number.to_string());
            }
        }),
        #[cfg(target_os = "linux")]
        "read in turns" | "commit in turns" => {
            tokio::runtime::Runtime::new().unwrap().block_on(crate::lock::busy(&task, path));
        }
        #[cfg(target_os = "linux")]
        "hold up as nobody" => {
            become_nobody();
            one_pool_thread().block_on(crate::lock::hold_up(path, say));
        }
        #[cfg(target_os = "linux")]
        "replace many" => say_result(one_pool_thread().block_on(crate::many::replace_all(path))),
        "count transactions" => runtime().block_on(async {
            for number in 1_u64.. {
                let mut tx = MultiFileTransaction::begin(path);
                for name in ["a", "b", "sub/c"] {
                    tx.add_file(path.join(name), number.to_string()).await.unwrap();
                }
                tx.commit().await.unwrap();
                say(&number.to_string());
            }
        }),
        "exercise" => {
            std::env::set_current_dir(path).unwrap();
            runtime().block_on(exercise());
            say("done");
        }
        "transaction moves away" => runtime().block_on(async {
            std::env::set_current_dir(path.join("here")).unwrap();
            let mut tx = MultiFileTransaction::begin(".");
            tx.add_file("a", "new").await.unwrap();
            tx.remove_file("b").unwrap();
            tx.rename("c", "d").unwrap();
            std::env::set_current_dir(path.join("there")).unwrap();
            say_result(tx.commit().await);
        }),
        "write async" => say_result(runtime().block_on(atomic_fs::write(path, &content))),
        "hold" => runtime().block_on(async {
            let mut writer = AtomicFileWriter::new(path).await.unwrap();
            writer.write(&vec![b'N'; 3 << 20]).await.unwrap();
            say("holding");
            let mut line = String::new();
            std::io::stdin().read_line(&mut line).unwrap();
            say_result(writer.commit().await);
        }),
        "move away" => runtime().block_on(async {
            std::env::set_current_dir(path).unwrap();
            let mut writer = AtomicFileWriter::new("file").await.unwrap();
            writer.write(&content).await.unwrap();
            std::env::set_current_dir("/").unwrap();
            say_result(writer.commit().await);
        }),
        // `pair A B`: two files with these contents.
        other => say_result(runtime().block_on(async {
            let [_, a, b] = other.split(' ').collect::<Vec<_>>()[..] else { panic!("no such task: {other}") };
            let mut tx = MultiFileTransaction::new();
            tx.add_file(path.join("a"), a).await?;
            tx.add_file(path.join("b"), b).await?;
            tx.commit().await
        })),
    }
}
