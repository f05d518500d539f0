//! The command `resumable follow`, on files that change under it.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use futures_util::StreamExt;
use tokio_util::sync::CancellationToken;

use crate::support::{PATIENCE, checkpoint, complete, eventually, not_run, numbers};

const ITEMS: u64 = 40;

/// The command, and the lines that it has printed.
struct Follower {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Follower {
    /// Checks a hundred times a second.
    fn of(path: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_resumable"));
        command.args(["follow", "--every", "0.01", "--total", &ITEMS.to_string()]).arg(path);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
        let (sender, lines) = mpsc::channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || {
            out.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)).unwrap_or_default();
        });
        Self { child, lines }
    }

    /// Waits until it says that `done` items are done.
    fn says(&self, done: usize) {
        let wanted = format!("numbers: {done} of {ITEMS} items");
        let mut said = Vec::new();
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            if line.starts_with(&wanted) {
                return;
            }
            said.push(line);
        }
        panic!("it never said {wanted:?}, but {said:#?}");
    }

    /// Waits for its end and returns the exit code, the last line and the error output.
    fn end(self) -> (i32, String, String) {
        let output = self.child.wait_with_output().unwrap();
        let last = self.lines.iter().last().unwrap_or_default();
        (output.status.code().unwrap(), last, String::from_utf8(output.stderr).unwrap())
    }

    fn ends_well(self) {
        assert_eq!(self.end(), (0, "numbers: complete".to_owned(), String::new()));
    }

    fn is_still_there(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

/// Finishes the items below `n`, and ends like a cancelled run.
async fn complete_some(path: &Path, n: u64) {
    let token = CancellationToken::new();
    let builder = numbers(path).checkpoint_every(Duration::from_millis(1)).cancel(token.clone());
    let mut run = builder.stream(0..ITEMS, move |_, x| async move {
        if x >= n {
            std::future::pending::<()>().await;
        }
        Ok(x * 2)
    });
    for _ in 0..n {
        run.next().await.unwrap();
    }
    token.cancel();
    assert!(run.finish().await.unwrap_err().is_cancelled());
}

fn cut(path: &Path, length: u64) {
    File::options().write(true).open(path).unwrap().set_len(length).unwrap();
}

const WRITER: &str = "RESUMABLE_FOLLOWED";

/// Finishes half of the items and waits to be killed; does nothing in the test run itself.
#[tokio::test]
async fn child_that_is_followed() {
    let Some(path) = std::env::var_os(WRITER) else { return };
    let builder = numbers(Path::new(&path)).checkpoint_every(Duration::from_millis(1));
    let run = builder.stream(0..ITEMS, |_, x| async move {
        if x >= ITEMS / 2 {
            std::future::pending::<()>().await;
        }
        Ok(x * 2)
    });
    drop(run.finish().await);
}

#[tokio::test]
async fn a_run_that_is_killed_is_waited_for_until_another_has_completed_it() {
    let (_dir, path) = checkpoint();
    let mut writer = Command::new(std::env::current_exe().unwrap())
        .args(["follow::child_that_is_followed", "--exact"])
        .env(WRITER, &path)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    eventually("there is a checkpoint", || path.exists()).await;
    let mut follower = Follower::of(&path);
    follower.says(ITEMS as usize / 2);
    writer.kill().unwrap();
    writer.wait().unwrap();
    // As if it had been killed in the middle of a write.
    cut(&path, fs::metadata(&path).unwrap().len() - 1);
    complete_some(&path, ITEMS - 1).await;
    follower.says(ITEMS as usize - 1);
    assert!(follower.is_still_there());
    complete(&path, ITEMS).await.unwrap();
    follower.ends_well();
}

#[tokio::test]
async fn a_complete_file_is_told_at_once_and_one_that_was_never_there_is_an_error() {
    let (dir, path) = checkpoint();
    complete(&path, ITEMS).await.unwrap();
    Follower::of(&path).ends_well();
    let (code, said, error) = Follower::of(&dir.path().join("missing")).end();
    assert_eq!((code, said.as_str(), error.lines().count()), (3, "", 1), "{error}");
}

#[tokio::test]
async fn a_file_in_the_place_of_another_is_followed_from_its_beginning() {
    let (_dir, path) = checkpoint();
    complete_some(&path, 30).await;
    let mut follower = Follower::of(&path);
    follower.says(30);
    // Another file, with less progress, created elsewhere and moved into its place.
    let aside = path.with_extension("aside");
    complete_some(&aside, 10).await;
    fs::rename(&aside, &path).unwrap();
    follower.says(10);
    assert!(follower.is_still_there());
    fs::remove_file(&path).unwrap();
    let (code, _, error) = follower.end();
    assert_eq!((code, error.lines().count()), (3, 1), "it does not come back: {error}");
}

/// What a check may find while a successor cuts off a torn tail and continues writing: old bytes, followed by later
/// ones.
#[tokio::test]
async fn damage_that_is_gone_at_the_next_look_is_none_and_damage_that_stays_is_told() {
    let (_dir, path) = checkpoint();
    complete_some(&path, 10).await;
    let good = fs::metadata(&path).unwrap().len();
    let mut follower = Follower::of(&path);
    follower.says(10);
    complete_some(&path, 30).await;
    follower.says(30);
    // The file is cut and extended between two checks, and then the follower is in the middle of a block.
    cut(&path, good);
    complete_some(&path, 39).await;
    follower.says(39);
    assert!(follower.is_still_there());
    let mut bytes = fs::read(&path).unwrap();
    bytes[good as usize + 40] ^= 1;
    let aside = path.with_extension("aside");
    fs::write(&aside, &bytes).unwrap();
    fs::rename(&aside, &path).unwrap();
    let (code, _, error) = follower.end();
    assert!(code == 1 && error.contains("damaged at byte"), "{code} {error}");
}

/// A read that finds less than before: the file was cut during the read.
#[tokio::test]
async fn a_look_at_a_file_that_is_cut_while_it_is_read_is_made_again() {
    let (_dir, path) = checkpoint();
    complete(&path, ITEMS).await.unwrap();
    let path = path.canonicalize().unwrap();
    for read in 1..=3 {
        let short = format!("inject=pread64:retval=0:when={read}");
        let output = Command::new("strace")
            .args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=pread64", "-e", &short, "-P"])
            .arg(&path)
            .args([env!("CARGO_BIN_EXE_resumable"), "follow"])
            .arg(&path)
            .output();
        let Ok(output) = output else {
            not_run("cut-while-read", "a short read is injected by strace, which cannot be run");
            return;
        };
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && said.ends_with("complete\n"), "read {read}: {said} {:?}", output.stderr);
    }
    // Each of these reads is such a read: a command that checks only once fails because of it.
    let output = Command::new("strace")
        .args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=pread64", "-e", "inject=pread64:retval=0", "-P"])
        .arg(&path)
        .args([env!("CARGO_BIN_EXE_resumable"), "follow"])
        .arg(&path)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3), "a file that stays cut is told");
}
