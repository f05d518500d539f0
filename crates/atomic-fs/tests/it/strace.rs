//! Runs a child under strace, which may tamper with one of its calls, and reports what really happened.
//!
//! strace counts calls by thread, and tampers with the n-th call of every thread; which call that is can depend on the
//! scheduling. So the number only aims a fault; the log of the same run shows what it hit.

use std::collections::HashMap;
use std::path::Path;

use crate::child;

/// How long a child may take; most take a tenth of a second.
const CHILD_LIMIT_SECS: &str = "60";

/// One file system call: its name, and its number among the calls of this name on its thread.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) name: String,
    pub(crate) number: usize,
    /// All of it, with its result.
    pub(crate) text: String,
}

impl Call {
    /// Whether the call really succeeded.
    pub(crate) fn is_done(&self) -> bool {
        !self.is_injected() && self.text.rsplit_once(" = ").is_some_and(|(_, result)| !result.starts_with(['-', '?']))
    }

    pub(crate) fn is_injected(&self) -> bool {
        self.text.contains("(INJECTED)")
    }
}

/// A child's calls and messages.
#[derive(Debug)]
pub(crate) struct Run {
    /// Its last message; `None` if it died before.
    pub(crate) said: Option<String>,
    /// Its standard error.
    pub(crate) complaint: String,
    /// Its calls on the traced directory, in order.
    pub(crate) calls: Vec<Call>,
    /// Whether the fault hit one of these calls, and no other.
    pub(crate) is_hit: bool,
}

/// Runs `task` on `path`, with `inject` (such as `fsync:error=EIO:when=3`, one a line), and logs the calls that name
/// the directory `traced`. `scratch` holds the log, and the files that the child writes elsewhere first.
pub(crate) fn run(task: &str, path: &Path, scratch: &Path, inject: Option<&str>) -> Run {
    let (log, other) = (&scratch.join("log"), scratch.join("other"));
    // This makes the child's other work the same in every round, down to the number of its calls.
    let gone = std::fs::remove_file(&other).or_else(|_| std::fs::remove_dir_all(&other));
    assert!(gone.is_ok() || !other.exists(), "{gone:?}");
    let inject: Vec<_> =
        inject.iter().flat_map(|inject| inject.lines()).map(|inject| format!("inject={inject}")).collect();
    // A hanging child is killed together with strace; then it has no last message, like a child that was killed by a
    // fault.
    let mut wrapper = vec![
        "timeout",
        "-s",
        "KILL",
        CHILD_LIMIT_SECS,
        "strace",
        "-f",
        "-qq",
        "-y",
        "-s",
        "300",
        "-e",
        "trace=%file,%desc",
    ];
    wrapper.extend(["-o", log.to_str().unwrap()]);
    wrapper.extend(inject.iter().flat_map(|inject| ["-e", inject]));
    let output = child::command(&wrapper, task, path).env(child::OTHER, other).output().unwrap();
    let (ours, others): (Vec<_>, Vec<_>) =
        // `fcntl` is an assertion of std's debug builds: that what is being closed is open.
        read(log).into_iter().partition(|call| call.text.contains("/traced") && !matches!(&*call.name, "execve" | "fcntl"));
    let is_hit = ours.iter().any(Call::is_injected) && !others.iter().any(Call::is_injected);
    Run {
        said: child::last_word(&output.stdout),
        complaint: String::from_utf8_lossy(&output.stderr).into_owned(),
        calls: ours,
        is_hit,
    }
}

/// Reads a log, joining the two halves of a call that another thread's call has split.
fn read(log: &Path) -> Vec<Call> {
    let mut counts = HashMap::<(String, String), usize>::new();
    let mut open = HashMap::<String, usize>::new();
    let mut calls = Vec::<Call>::new();
    for line in std::fs::read_to_string(log).unwrap().lines() {
        // `1234  openat(AT_FDCWD</>, "/tmp/traced", …) = 3</tmp/traced>`
        let Some((thread, text)) = line.split_once(char::is_whitespace) else { continue };
        let text = text.trim_start();
        if let Some((_, rest)) = text.strip_prefix("<... ").and_then(|text| text.split_once(" resumed>")) {
            if let Some(position) = open.remove(thread) {
                calls[position].text.push_str(rest);
            }
            continue;
        }
        let Some((name, _)) = text.split_once('(') else { continue };
        let count = counts.entry((thread.to_owned(), name.to_owned())).or_default();
        *count += 1;
        let (text, is_open) = match text.strip_suffix("<unfinished ...>") {
            Some(text) => (text, true),
            None => (text, false),
        };
        if is_open {
            open.insert(thread.to_owned(), calls.len());
        }
        calls.push(Call { name: name.to_owned(), number: *count, text: text.to_owned() });
    }
    calls
}
