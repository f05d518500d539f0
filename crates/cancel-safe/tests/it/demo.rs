//! The demo from outside, mostly in its short form: what it prints, how it ends, and that nothing survives it.
//!
//! The judge's counting is tested beside its code, with a broken directory as the twin.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::judge;

fn start(dir: &Path, options: &[&str]) -> Child {
    let binary = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("examples/mirror");
    let mut command = Command::new(binary);
    command.args(options).current_dir(dir);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("the example `mirror` is built by `cargo test`")
}

#[track_caller]
fn run(dir: &Path, options: &[&str], code: i32) -> (String, String) {
    expect(start(dir, &[&["--short"], options].concat()).wait_with_output().unwrap(), code)
}

#[track_caller]
fn expect(output: Output, code: i32) -> (String, String) {
    let (said, told) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(code), "{said}{told}");
    (said, told)
}

/// The clients of a demo in `dir`, by process.
fn clients(dir: &Path) -> Vec<String> {
    let is_client = |process: &std::path::PathBuf| {
        let line = std::fs::read(process.join("cmdline")).unwrap_or_default();
        let inside = std::fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd == dir.canonicalize().unwrap());
        inside && String::from_utf8_lossy(&line).contains("--lifeline")
    };
    let processes = std::fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    processes.filter(is_client).map(|process| process.display().to_string()).collect()
}

/// Waits until `condition` holds; a minute is far more than needed.
#[track_caller]
fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < Duration::from_secs(60), "waited in vain for {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// The object of the table.
fn table(said: &str) -> Value {
    let objects = said.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    objects.into_iter().find(|object| object["event"] == "table").expect("a table")
}

#[test]
fn the_demo_finds_nothing_wrong_with_mirror_and_leaves_what_its_table_says() {
    let dir = tempfile::tempdir().unwrap();
    let (said, _) = run(dir.path(), &["--json"], 0);
    let table = table(&said);
    for fault in ["torn", "truncated", "wrong", "missing", "unrecorded", "misrecorded"] {
        assert_eq!(table["mirror"][fault], 0, "{table}");
    }
    for side in ["mirror", "plain loop"] {
        assert_eq!(table[side]["exit"], "0", "{table}");
        assert!((1..=5).contains(&table[side]["kills"].as_u64().unwrap()), "{table}");
    }
    let out = dir.path().join("mirror-demo");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let rows = runtime.block_on(judge::catalogue(&out.join("mirror/catalog.db"))).unwrap();
    let urls = std::fs::read_to_string(out.join("urls.txt")).unwrap();
    assert_eq!(rows.len(), urls.lines().count());
    // The next start of the plain loop took the truncated files for whole, and recorded them as such.
    let plain = &table["plain loop"];
    let count = |key: &str| plain[key].as_u64().unwrap();
    assert!(count("misrecorded") >= count("truncated"), "{plain}");
    assert!(count("truncated") <= count("torn"), "{plain}");
    assert_eq!(clients(dir.path()), Vec::<String>::new());
}

#[test]
fn a_second_demo_starts_anew_and_without_a_terminal_no_escape_is_written() {
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let (said, told) = run(dir.path(), &["--seed", "7"], 0);
        assert!(!said.contains('\x1b') && !told.contains('\x1b'), "{said}{told}");
        assert!(told.contains("The seed is 7") && told.contains("killed at"), "{told}");
        for line in
            ["killed with SIGKILL", "wrong digests", "files fetched again", "mirror has nothing wrong", "Read next"]
        {
            assert!(said.contains(line), "{line}: {said}");
        }
        std::fs::write(dir.path().join("mirror-demo/stranger"), "kept").unwrap();
    }
    assert_eq!(std::fs::read_to_string(dir.path().join("mirror-demo/stranger")).unwrap(), "kept");
}

#[test]
fn a_directory_that_is_no_demos_is_refused_untouched() {
    for name in ["plain/thesis", "mirror/files/thesis", "urls.txt", "plain.log", "mirror.log"] {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("mirror-demo").join(name);
        std::fs::create_dir_all(own.parent().unwrap()).unwrap();
        std::fs::write(&own, "years").unwrap();
        for _ in 0..2 {
            let (said, _) = run(dir.path(), &[], 64);
            assert!(said.contains("is not a demo's"), "{name}: {said}");
            assert_eq!(std::fs::read_to_string(&own).unwrap(), "years", "{name}");
        }
        assert!(!dir.path().join("mirror-demo/demo.lock").exists(), "{name}");
    }
}

#[test]
fn a_mirror_that_goes_wrong_is_told_and_the_demo_fails() {
    let dir = tempfile::tempdir().unwrap();
    // The demo passes its options on to mirror, which refuses most of the files.
    let (said, _) = run(dir.path(), &["--max-body", "10"], 2);
    assert!(said.contains("mirror ended with exit status: 2") && said.contains("mirror.log"), "{said}");
}

/// Starts a demo that never ends by itself, and waits until both clients run.
fn started() -> (TempDir, Child) {
    let dir = tempfile::tempdir().unwrap();
    let demo = start(dir.path(), &["--endless"]);
    wait_for("two clients", || clients(dir.path()).len() == 2);
    (dir, demo)
}

#[test]
fn a_signal_ends_the_demo_and_both_clients() {
    for (name, code) in [("TERM", 143), ("INT", 130)] {
        let (dir, demo) = started();
        let second = run(dir.path(), &[], 75);
        assert!(second.0.contains("another demo runs"), "{second:?}");
        let killed = Command::new("sh").args(["-c", &format!("kill -{name} {}", demo.id())]).output().unwrap();
        assert!(killed.status.success());
        let (said, _) = expect(demo.wait_with_output().unwrap(), code);
        assert!(said.contains("stopped"), "{said}");
        wait_for("the end of both clients", || clients(dir.path()).is_empty());
    }
}

#[test]
fn clients_do_not_outlive_a_demo_that_is_killed() {
    let (dir, mut demo) = started();
    demo.kill().unwrap();
    demo.wait().unwrap();
    wait_for("the end of both clients", || clients(dir.path()).is_empty());
    run(dir.path(), &[], 0);
}
