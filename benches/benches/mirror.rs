//! The main job as a whole process, beside what people use today: wget, wget2, curl, aria2, and a plain reqwest loop that
//! writes with `tokio::fs::write` and keeps no catalogue.
//!
//! Words choose parts: `speed` (10,000 files of 1 KiB), `kills` (what is under the final names after a SIGKILL), `memory`
//! (of those files and of one body of 1 GiB), `list` (a million lines to the first request). Words of
//! `atomic_fs/grounds.rs` choose file systems; without one, it is the ext4 with a journal on a loop device.
//!
//! All clients are processes of their own, and so is the server: nginx where it is installed, this program elsewhere. Times
//! are medians of rounds in which all take turns.

#![expect(clippy::print_stdout, reason = "a bench speaks through its output")]

use std::path::{Path, PathBuf};
use std::process::Command;

#[path = "mirror/clients.rs"]
mod clients;
#[path = "atomic_fs/grounds.rs"]
mod grounds;
#[path = "mirror/kills.rs"]
mod kills;
#[path = "mirror/list.rs"]
mod list;
#[path = "mirror/origin.rs"]
mod origin;
#[path = "mirror/speed.rs"]
mod speed;

use grounds::Ground;

const PARTS: [&str; 4] = ["speed", "kills", "memory", "list"];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // A client or a server of our own: this program again.
    if clients::is_one_of_ours(&arguments) || origin::is_ours(&arguments) {
        return;
    }
    grounds::take_own_mounts();
    let is_named = |all: &[&str]| all.iter().any(|word| arguments.iter().any(|argument| argument == word));
    let is_wanted = |word: &str| arguments.iter().any(|argument| argument == word);
    let is_part = |word: &str| !is_named(&PARTS) || is_wanted(word);
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a writable target directory");
    let mirror = build();
    let default = if is_named(&grounds::NAMES) { "" } else { "ext4" };
    for ground in Ground::all(scratch.path(), |name| name == default || is_wanted(name)) {
        if is_part("speed") {
            speed::compare(&ground, scratch.path(), &mirror);
        }
        if is_part("kills") {
            kills::compare(&ground, scratch.path(), &mirror);
        }
        if is_part("memory") {
            speed::memory(&ground, scratch.path(), &mirror);
        }
        if is_part("list") {
            list::first_request(&ground, &mirror);
        }
    }
}

/// Builds the example as this program was, and returns its path.
fn build() -> PathBuf {
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--profile", "bench", "--package", "cancel-safe", "--example", "mirror"])
        .args(["--features", "full,sqlite,postgres"])
        .status()
        .expect("cargo");
    assert!(built.success());
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("the target directory").join("release/examples/mirror")
}
