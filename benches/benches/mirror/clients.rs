//! The clients: how each is asked to fetch the same list into the same tree.
//!
//! Invariant: each is given so many connections as it can use, and nothing else that it does not do by itself.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::StreamExt;

/// Fetches at once, and threads that write.
pub(crate) const CONCURRENCY: usize = 32;

/// What is to be fetched: names below `base`, into `out`; beside that is room for lists.
pub(crate) struct Job<'a> {
    pub(crate) base: &'a str,
    pub(crate) names: &'a [String],
    pub(crate) out: &'a Path,
}

/// One client.
pub(crate) struct Client {
    pub(crate) name: &'static str,
    /// It is given one file of so many, because it takes so long: aria2 starts its downloads once a second.
    pub(crate) part: usize,
    /// Below its output, where its files are.
    pub(crate) files: fn(&Job<'_>) -> PathBuf,
    command: Box<dyn Fn(&Job<'_>) -> Command>,
}

impl Client {
    /// The command that does `job`; it says nothing.
    pub(crate) fn command(&self, job: &Job<'_>) -> Command {
        let mut command = (self.command)(job);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }
}

/// All clients that are here; says which are not.
pub(crate) fn all(mirror: &Path) -> Vec<Client> {
    let ours = |name, options: &'static [&'static str]| {
        let mirror = mirror.to_owned();
        let command = Box::new(move |job: &Job<'_>| {
            let mut command = Command::new(&mirror);
            command.arg("--manifest").arg(urls(job)).arg("--out").arg(job.out).args(options);
            let per = CONCURRENCY.to_string();
            command.args(["--concurrency", &per, "--per-host", &per]);
            command
        });
        let files = |job: &Job<'_>| job.out.join("files").join(job.base.trim_start_matches("http://"));
        Client { name, part: 1, files, command }
    };
    let mut all = vec![
        ours("mirror, each file durable", &[]),
        ours("mirror, --durability end", &["--durability", "end"]),
        Client { name: "plain reqwest loop, tokio::fs::write", part: 1, files: out, command: Box::new(plain) },
    ];
    for (name, part, program, command) in [
        ("curl -Z", 1, "curl", curl as fn(&Job<'_>) -> Command),
        ("wget2", 1, "wget2", wget2),
        ("wget, one after the other", 1, "wget", wget),
        ("aria2c (a tenth of the files, × 10)", 10, "aria2c", aria2),
    ] {
        let is_here = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        match is_here {
            Ok(_) => all.push(Client { name, part, files: out, command: Box::new(command) }),
            Err(_) => println!("{program}: not run, because it is not installed"),
        }
    }
    all
}

fn out(job: &Job<'_>) -> PathBuf {
    job.out.to_owned()
}

/// Writes a list beside the output, and returns its place.
fn list(job: &Job<'_>, of_one: impl Fn(&mut String, &str)) -> PathBuf {
    let path = job.out.with_extension("list");
    let mut text = String::new();
    job.names.iter().for_each(|name| of_one(&mut text, name));
    std::fs::write(&path, text).expect("a writable directory");
    path
}

fn urls(job: &Job<'_>) -> PathBuf {
    list(job, |text, name| {
        let _infallible = writeln!(text, "{}/{name}", job.base);
    })
}

fn curl(job: &Job<'_>) -> Command {
    let config = list(job, |text, name| {
        let place = job.out.join(name);
        let _infallible = writeln!(text, "url = \"{}/{name}\"\noutput = \"{}\"", job.base, place.display());
    });
    let mut command = Command::new("curl");
    command.args(["--silent", "--parallel", "--create-dirs", "--parallel-max"]).arg(CONCURRENCY.to_string());
    command.arg("--config").arg(config);
    command
}

fn wget(job: &Job<'_>) -> Command {
    let mut command = Command::new("wget");
    command.args(["--quiet", "--force-directories", "--no-host-directories", "--input-file"]).arg(urls(job));
    command.arg("--directory-prefix").arg(job.out);
    command
}

fn wget2(job: &Job<'_>) -> Command {
    let mut command = Command::new("wget2");
    command.args(["--quiet", "--force-directories", "--no-host-directories", "--input-file"]).arg(urls(job));
    command.arg("--directory-prefix").arg(job.out).arg("--max-threads").arg(CONCURRENCY.to_string());
    command
}

fn aria2(job: &Job<'_>) -> Command {
    let input = list(job, |text, name| {
        let _infallible = writeln!(text, "{}/{name}\n  out={name}", job.base);
    });
    let mut command = Command::new("aria2c");
    command.args(["--no-conf", "--quiet", "--max-concurrent-downloads"]).arg(CONCURRENCY.to_string());
    command.arg("--dir").arg(job.out).arg("--input-file").arg(input);
    command
}

fn plain(job: &Job<'_>) -> Command {
    let mut command = ours("plain");
    command.arg(urls(job)).arg(job.base).arg(job.out);
    command
}

/// What the disk itself allows: no network, and each file made durable by a thread of its own kind.
pub(crate) fn disk_alone(job: &Job<'_>) -> Command {
    let mut command = ours("disk");
    command.arg(urls(job)).arg(job.base).arg(job.out).stdin(Stdio::null());
    command
}

fn ours(mode: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.arg(mode);
    command
}

/// Whether this process was started as a client; then its work is done.
pub(crate) fn is_one_of_ours(arguments: &[String]) -> bool {
    let [mode, list, base, out] = arguments else { return false };
    let text = || std::fs::read_to_string(list).expect("a list");
    match mode.as_str() {
        "plain" => fetch(base, &text(), Path::new(out)),
        "disk" => write_durably(base, &text(), Path::new(out)),
        _ => return false,
    }
    true
}

/// What somebody would write without these crates.
fn fetch(base: &str, list: &str, out: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let client = reqwest::Client::new();
        futures_util::stream::iter(list.lines())
            .for_each_concurrent(CONCURRENCY, |url| {
                let (client, place) = (client.clone(), out.join(url[base.len()..].trim_start_matches('/')));
                async move {
                    let body = client.get(url).send().await.expect("a response").bytes().await.expect("a body");
                    tokio::fs::create_dir_all(place.parent().expect("a directory")).await.expect("a directory");
                    tokio::fs::write(place, body).await.expect("a file");
                }
            })
            .await;
    });
}

/// Writes 1 KiB for each line: create, write, sync, rename, sync the directory.
fn write_durably(base: &str, list: &str, out: &Path) {
    let places: Vec<PathBuf> = list.lines().map(|url| out.join(url[base.len()..].trim_start_matches('/'))).collect();
    let next = AtomicUsize::new(0);
    let write = |place: &Path| -> std::io::Result<()> {
        let parent = place.parent().expect("a directory");
        std::fs::create_dir_all(parent)?;
        let hidden = place.with_extension("tmp");
        let mut file = std::fs::File::create(&hidden)?;
        std::io::Write::write_all(&mut file, &[b'x'; 1024])?;
        file.sync_all()?;
        std::fs::rename(&hidden, place)?;
        std::fs::File::open(parent)?.sync_all()
    };
    std::thread::scope(|scope| {
        for _ in 0..CONCURRENCY {
            scope.spawn(|| {
                while let Some(place) = places.get(next.fetch_add(1, Ordering::Relaxed)) {
                    write(place).expect("a writable directory");
                }
            });
        }
    });
}
