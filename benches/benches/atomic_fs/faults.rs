//! The faults of writes that are dropped, fail or collide, and the faults of the machine: this crate and its peers meet
//! each of them in the same way.
//!
//! Faults come from strace, which tampers with the calls of a child process, and from a separate file system whose
//! power is cut; without strace or root the rows say so.

use std::collections::BTreeSet;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cancel_safe_benches::Table;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::disk::{Disk, run};
use crate::ways::{TRANSACTIONS, Transactions, WAYS, Way};

/// The calls that change something. Opening and creating are left out: before them there is nothing, and a starting
/// process opens its own files.
const CHANGES: [&str; 12] = [
    "write",
    "fsync",
    "fdatasync",
    "fchmod",
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "unlink",
    "unlinkat",
    "mkdirat",
];
/// The same without the calls that clean up: if those fail, something is left.
const WORK: &[&str] = CHANGES.split_at(9).0;
const SIZE_BYTES: usize = 64 << 10;
/// How long a dropped write may take to change the file, and to clean up.
const SETTLE: Duration = Duration::from_millis(40);
const TIDY: Duration = Duration::from_millis(300);
const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// The task of a child, by its name in the arguments.
pub(crate) fn child(runtime: &Runtime, task: &str, who: &str, path: &str) -> ExitCode {
    let path = PathBuf::from(path);
    let way = || WAYS.into_iter().find(|way| way.name == who).unwrap();
    let transactions = || TRANSACTIONS.into_iter().find(|crate_| crate_.name == who).unwrap();
    let result = runtime.block_on(async {
        match task {
            "drop" => drop_at_random(&way(), &path).await,
            "replace" => (way().replace)(path, new()).await,
            "replace all" => (transactions().replace)(path, NAMES.map(|name| (name.to_owned(), new())).to_vec()).await,
            other => panic!("no such task: {other}"),
        }
    });
    if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

pub(crate) fn run_all(runtime: &Runtime, scratch: &Path) {
    let disk = Disk::new(scratch);
    let disk = disk.as_ref().map_err(String::as_str);
    let place = Place { runtime, scratch, disk };
    let mut table = Table::new(std::iter::once("").chain(WAYS.iter().map(|way| way.name)));
    let mut row = |what: &str, cell: &dyn Fn(&Way) -> String| table.row(what, WAYS.iter().map(cell));
    let dropped: Vec<[String; 2]> = WAYS.iter().map(|way| place.dropped(way)).collect();
    let at = |way: &Way, part: usize| {
        WAYS.iter().position(|other| other.name == way.name).map_or(String::new(), |index| dropped[index][part].clone())
    };
    row("dropped, a rename takes 3 ms: the file changed afterwards", &|way| at(way, 0));
    row("the same: files left over", &|way| at(way, 1));
    row("four writers at once: errors", &|way| place.together(way)[0].clone());
    row("the same: files of mixed content", &|way| place.together(way)[1].clone());
    row("EIO at each call: files left over", &|way| place.faults(way));
    row("200,000 bytes on a full disk", &|way| place.full(way));
    row("a power cut after `Ok`: the file is", &|way| place.cut(way, false));
    row("the same, after another program's sync", &|way| place.cut(way, true));
    row("mode 0640 is afterwards", &|way| place.mode(way));
    row("a symbolic link is", &|way| place.link(way));
    row("a name of 255 bytes", &|way| place.long_name(way));
    table.print();

    let mut table = Table::new(std::iter::once("").chain(TRANSACTIONS.iter().map(|crate_| crate_.name)));
    let mut row = |what: &str, cell: &dyn Fn(&Transactions) -> String| table.row(what, TRANSACTIONS.iter().map(cell));
    row("reads during 200 transactions that found no file", &|crate_| place.read(crate_));
    row("killed at each call, then recovered: neither old nor new", &|crate_| place.killed(crate_, None));
    row("a sync elsewhere and a power cut at each call, then recovered: neither old nor new", &|crate_| match disk {
        Ok(disk) => place.killed(crate_, Some(disk)),
        Err(why) => why.to_owned(),
    });
    table.print();
}

fn old() -> Vec<u8> {
    vec![b'o'; SIZE_BYTES]
}

fn new() -> Vec<u8> {
    vec![b'n'; SIZE_BYTES]
}

/// The names in a directory, without the files that a crate keeps for itself between its transactions.
fn names(dir: &Path) -> BTreeSet<String> {
    let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != ".fstx").collect()
}

/// Drops writes at random moments. Prints how many there were, how many changed the file later, and how many left
/// something behind.
async fn drop_at_random(way: &Way, dir: &Path) -> Result<(), String> {
    let (path, mut cuts, mut late, mut left) = (dir.join("file"), 0, 0, 0);
    for round in 0..200_u32 {
        let content = vec![u8::try_from(round % 251).unwrap(); SIZE_BYTES];
        let wait = Duration::from_micros(fastrand::u64(0..8_000));
        if timeout(wait, (way.replace)(path.clone(), content)).await.is_ok() {
            continue;
        }
        let before = std::fs::read(&path).unwrap();
        sleep(SETTLE).await;
        cuts += 1;
        late += u32::from(before != std::fs::read(&path).unwrap());
        let others = || -> Vec<_> { names(dir).into_iter().filter(|name| name != "file").collect() };
        let end = Instant::now() + TIDY;
        while !others().is_empty() && Instant::now() < end {
            sleep(Duration::from_millis(5)).await;
        }
        let others = others();
        left += u32::from(!others.is_empty());
        for other in others.iter().map(|name| dir.join(name)) {
            let removed = if other.is_dir() { std::fs::remove_dir_all(other) } else { std::fs::remove_file(other) };
            removed.unwrap();
        }
    }
    println!("{late} of {cuts}\n{left} of {cuts}");
    Ok(())
}

/// How a child ended, and whether one of its calls was tampered with.
struct Ended {
    status: ExitStatus,
    is_hit: bool,
}

struct Place<'a> {
    runtime: &'a Runtime,
    scratch: &'a Path,
    /// The disk, or why there is none.
    disk: Result<&'a Disk, &'a str>,
}

impl Place<'_> {
    fn fresh(&self, parent: Option<&Disk>) -> PathBuf {
        let dir = parent.map_or(self.scratch, Disk::path).join("fresh");
        drop(std::fs::remove_dir_all(&dir));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// A directory with an old file in it.
    fn file(&self) -> PathBuf {
        let path = self.fresh(None).join("file");
        std::fs::write(&path, old()).unwrap();
        path
    }

    fn traced(&self, inject: &str, names: &str, task: &str, who: &str, path: &Path) -> Command {
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-e", &format!("trace={names}"), "-e", &format!("inject={names}:{inject}"), "-o"]);
        command.arg(self.scratch.join("log")).arg(std::env::current_exe().unwrap());
        command.args(["child", task, who]).arg(path).stdin(Stdio::null());
        command
    }

    fn child(&self, inject: &str, name: &str, task: &str, who: &str, path: &Path) -> Ended {
        let output = self.traced(inject, name, task, who, path).output().unwrap();
        let is_hit = std::fs::read_to_string(self.scratch.join("log")).unwrap().contains("(INJECTED)");
        Ended { status: output.status, is_hit }
    }

    fn dropped(&self, way: &Way) -> [String; 2] {
        let path = self.file();
        let dir = path.parent().unwrap();
        let names = "rename,renameat,renameat2";
        let output = self.traced("delay_enter=3000", names, "drop", way.name, dir).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let mut lines = text.lines().map(str::to_owned);
        [(); 2].map(|()| lines.next().unwrap_or_else(|| String::from_utf8_lossy(&output.stderr).into_owned()))
    }

    fn together(&self, way: &Way) -> [String; 2] {
        let (path, mut errors, mut mixed) = (self.file(), 0, 0);
        for _ in 0..100 {
            let content = |letter: u8| vec![letter; SIZE_BYTES + usize::from(letter)];
            let results = self.runtime.block_on(async {
                let writers = (b'a'..b'e').map(|letter| (way.replace)(path.clone(), content(letter)));
                writers.collect::<JoinSet<_>>().join_all().await
            });
            errors += results.iter().filter(|result| result.is_err()).count();
            let found = std::fs::read(&path).unwrap();
            mixed += u32::from(found != old() && !(b'a'..b'e').any(|letter| found == content(letter)));
        }
        [format!("{errors} of 400"), format!("{mixed} of 100")]
    }

    fn faults(&self, way: &Way) -> String {
        let (mut points, mut left) = (0, 0);
        for name in WORK {
            for number in 1.. {
                let path = self.file();
                let ended = self.child(&format!("error=EIO:when={number}"), name, "replace", way.name, &path);
                if !ended.is_hit {
                    break;
                }
                points += 1;
                left += u32::from(names(path.parent().unwrap()).len() != 1);
            }
        }
        format!("{left} of {points}")
    }

    fn full(&self, way: &Way) -> String {
        let dir = self.fresh(None);
        if let Err(why) = run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=128k", "tmpfs"]).arg(&dir)) {
            return why;
        }
        let path = dir.join("file");
        std::fs::write(&path, "old").unwrap();
        let result = self.runtime.block_on((way.replace)(path.clone(), vec![b'n'; 200_000]));
        let length = std::fs::metadata(&path).unwrap().len();
        run(Command::new("umount").arg("-l").arg(&dir)).unwrap();
        match (result, length) {
            (Err(_), 3) => "an error".to_owned(),
            (Ok(()), length) => format!("`Ok`, and {length} bytes"),
            (Err(_), length) => format!("an error, and {length} bytes"),
        }
    }

    fn cut(&self, way: &Way, after_sync: bool) -> String {
        let disk = match self.disk {
            Ok(disk) => disk,
            Err(why) => return why.to_owned(),
        };
        let path = self.fresh(Some(disk)).join("file");
        std::fs::write(&path, old()).unwrap();
        run(Command::new("sync").arg("-f").arg(disk.path())).unwrap();
        self.runtime.block_on((way.replace)(path.clone(), new())).unwrap();
        if after_sync {
            disk.sync_elsewhere();
        }
        disk.cut();
        state(&path)
    }

    fn mode(&self, way: &Way) -> String {
        let path = self.file();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        self.runtime.block_on((way.replace)(path.clone(), new())).unwrap();
        format!("{:04o}", std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777)
    }

    fn link(&self, way: &Way) -> String {
        let path = self.file();
        let link = path.with_file_name("link");
        symlink("file", &link).unwrap();
        self.runtime.block_on((way.replace)(link.clone(), new())).unwrap();
        match (std::fs::symlink_metadata(&link).unwrap().is_symlink(), std::fs::read(&path).unwrap() == new()) {
            (true, true) => "followed".to_owned(),
            (false, false) => {
                let mode = std::fs::metadata(&link).unwrap().permissions().mode() & 0o7777;
                format!("replaced, mode {mode:04o}")
            }
            other => format!("{other:?}"),
        }
    }

    fn long_name(&self, way: &Way) -> String {
        let path = self.fresh(None).join("n".repeat(255));
        match self.runtime.block_on((way.replace)(path, new())) {
            Ok(()) => "`Ok`".to_owned(),
            Err(_) => "an error".to_owned(),
        }
    }

    /// A directory with four old files, safely on the disk.
    fn files(&self, disk: Option<&Disk>) -> PathBuf {
        let dir = self.fresh(disk);
        for name in NAMES {
            std::fs::write(dir.join(name), old()).unwrap();
        }
        run(Command::new("sync").arg("-f").arg(&dir)).unwrap();
        dir
    }

    fn read(&self, crate_: &Transactions) -> String {
        let (dir, over) = (self.files(None), AtomicBool::new(false));
        let (reads, missing) = std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let (mut reads, mut missing) = (0_u64, 0_u64);
                while !over.load(Ordering::Relaxed) {
                    for name in NAMES {
                        reads += 1;
                        missing += u64::from(std::fs::read(dir.join(name)).is_err());
                    }
                }
                (reads, missing)
            });
            for round in 0..200_u8 {
                let files = NAMES.map(|name| (name.to_owned(), vec![round; 4096])).to_vec();
                self.runtime.block_on((crate_.replace)(dir.clone(), files)).unwrap();
            }
            over.store(true, Ordering::Relaxed);
            reader.join().unwrap()
        });
        format!("{missing} of {reads}")
    }

    fn killed(&self, crate_: &Transactions, disk: Option<&Disk>) -> String {
        let (mut points, mut torn) = (0, 0);
        for name in CHANGES {
            for number in 1.. {
                let dir = self.files(disk);
                let ended = self.child(&format!("signal=KILL:when={number}"), name, "replace all", crate_.name, &dir);
                if ended.status.signal().is_none() && ended.status.code() != Some(128 + 9) {
                    break;
                }
                points += 1;
                if let Some(disk) = disk {
                    disk.sync_elsewhere();
                    disk.cut();
                }
                let recovered = self.runtime.block_on((crate_.recover)(dir.clone()));
                let states: BTreeSet<_> = NAMES.iter().map(|name| state(&dir.join(name))).collect();
                let is_whole = states.len() == 1 && (states.contains("new") || states.contains("old"));
                torn += u32::from(recovered.is_err() || !is_whole);
            }
        }
        format!("{torn} of {points}")
    }
}

fn state(path: &Path) -> String {
    match std::fs::read(path) {
        Ok(content) if content == new() => "new".to_owned(),
        Ok(content) if content == old() => "old".to_owned(),
        Ok(content) if content.is_empty() => "empty".to_owned(),
        Ok(content) => format!("torn, {} bytes", content.len()),
        Err(_) => "missing".to_owned(),
    }
}
