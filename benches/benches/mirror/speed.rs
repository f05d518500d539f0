//! How long 10,000 small files take, and how much memory they and one large body.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::clients::{self, Client, Job};
use super::grounds::Ground;
use super::origin::Origin;

const FILES: usize = 10_000;
const BYTES: usize = 1024;
const ROUNDS: usize = 5;
const LARGE_BYTES: u64 = 1 << 30;

/// One turn of one contestant.
struct Turn {
    /// Until the client has ended.
    seconds: f64,
    /// Until all that it has written is durable too.
    synced: f64,
}

/// Lets all clients fetch the same files in turns.
pub(crate) fn compare(ground: &Ground, scratch: &Path, mirror: &Path) {
    let (root, names) = small_files(scratch);
    let origin = Origin::over(&root, scratch);
    let clients = clients::all(mirror);
    let out = ground.path.join("out");
    let job = Job { base: &origin.base, names: &names, out: &out };
    let mut turns: Vec<Vec<Turn>> = (0..=clients.len()).map(|_| Vec::new()).collect();
    for round in 0..ROUNDS {
        for turn in 0..turns.len() {
            let index = (turn + round) % turns.len();
            fresh(&out);
            turns[index].push(match clients.get(index) {
                Some(client) => {
                    let job = Job { names: &names[..FILES / client.part], ..job };
                    let turn = run(client.command(&job), &ground.path);
                    require_all(client, &job);
                    let part = client.part as f64;
                    Turn { seconds: turn.seconds * part, synced: turn.synced * part }
                }
                None => run(clients::disk_alone(&job), &ground.path),
            });
        }
    }
    fresh(&out);
    let names = clients.iter().map(|client| client.name).chain(["the disk alone, 32 threads, each file durable"]);
    println!("\n{FILES} files of 1 KiB from {}, 32 at once, to {}, {ROUNDS} rounds:", origin.name, ground.name);
    println!("  {:<46}{:>8}{:>8}{:>14}{:>10}", "", "median", "least", "with a sync", "× curl -Z");
    let median = |of: &mut Vec<f64>| {
        of.sort_by(f64::total_cmp);
        (of[of.len() / 2], of[0])
    };
    let measured: Vec<_> = turns
        .iter()
        .map(|turns| {
            let seconds = median(&mut turns.iter().map(|turn| turn.seconds).collect());
            (seconds, median(&mut turns.iter().map(|turn| turn.synced).collect()).0)
        })
        .collect();
    let curl = clients.iter().position(|client| client.name == "curl -Z").map(|index| measured[index].0.0);
    for (name, ((median, least), synced)) in names.zip(measured) {
        let rate = curl.map_or_else(|| "-".to_owned(), |curl| format!("{:.2}", curl / median));
        println!("  {name:<46}{median:>6.2} s{least:>6.2} s{synced:>12.2} s{rate:>10}");
    }
}

/// The most memory that is resident for the small files, and for a body of 1 GiB.
pub(crate) fn memory(ground: &Ground, scratch: &Path, mirror: &Path) {
    let (root, names) = small_files(scratch);
    let large = std::fs::File::create(root.join("large")).expect("a writable directory");
    large.set_len(LARGE_BYTES).expect("a file with a hole");
    let origin = Origin::over(&root, scratch);
    let out = ground.path.join("out");
    // The ground has no room for it, and what is written there does not matter here.
    let elsewhere = scratch.join("out");
    println!("\nmost memory that mirror has resident:");
    for (what, out, names) in
        [("10,000 files of 1 KiB", &out, &names[..]), ("one body of 1 GiB", &elsewhere, &["large".to_owned()][..])]
    {
        let job = Job { base: &origin.base, names, out };
        for client in &clients::all(mirror)[..2] {
            fresh(out);
            let (seconds, kib) = watched(client.command(&job));
            println!("  {what}, {}: {} MiB, {seconds:.1} s", client.name, kib >> 10);
        }
        fresh(out);
    }
    std::fs::remove_file(root.join("large")).expect("it is there");
}

/// The files that are served, and their names.
fn small_files(scratch: &Path) -> (std::path::PathBuf, Vec<String>) {
    let root = scratch.join("served");
    let names: Vec<String> = (0..FILES).map(|number| format!("{}/{number}", number % 100)).collect();
    for name in &names {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().expect("a directory")).expect("a writable directory");
        std::fs::write(path, [b'x'; BYTES]).expect("a writable directory");
    }
    (root, names)
}

/// Empties the output. What one has left must not fall on the next.
fn fresh(out: &Path) {
    let _absent = std::fs::remove_dir_all(out);
    std::fs::create_dir_all(out).expect("a writable directory");
    sync(out);
}

/// Makes all of a file system durable.
fn sync(path: &Path) {
    let synced = Command::new("sync").arg("-f").arg(path).status();
    assert!(synced.is_ok_and(|status| status.success()), "sync -f {}", path.display());
}

fn run(mut command: Command, ground: &Path) -> Turn {
    let started = Instant::now();
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().expect("an executable");
    assert!(status.success(), "{command:?}: {status}");
    let seconds = started.elapsed().as_secs_f64();
    sync(ground);
    Turn { seconds, synced: started.elapsed().as_secs_f64() }
}

/// A client that leaves something out is not compared.
fn require_all(client: &Client, job: &Job<'_>) {
    let files = (client.files)(job);
    let is_whole = |name: &&String| files.join(name).metadata().is_ok_and(|found| found.len() == BYTES as u64);
    let whole = job.names.iter().filter(is_whole).count();
    assert_eq!(whole, job.names.len(), "{} has {whole} files", client.name);
}

/// Runs a command to its success; seconds, and the most memory that was resident, in KiB.
fn watched(mut command: Command) -> (f64, u64) {
    let started = Instant::now();
    let mut child = command.spawn().expect("an executable");
    let mut peak = 0;
    loop {
        // The kernel keeps the mark, so that looking now and then misses only what the last moment added.
        peak = peak.max(resident(&child));
        if let Some(status) = child.try_wait().expect("a child") {
            assert!(status.success(), "{command:?}: {status}");
            return (started.elapsed().as_secs_f64(), peak);
        }
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// The most that a process has had resident so far, in KiB.
pub(crate) fn resident(child: &std::process::Child) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
    let mark = text.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
    mark.unwrap_or(0)
}
