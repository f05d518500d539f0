//! Child processes and signals.
//!
//! Invariant: every child ends by itself within milliseconds.

use std::process::Stdio;
use std::time::Duration;

use cancel_safe_testing::Explore;
use rustix::process::{Signal, getpid, kill_process};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

use crate::fixtures::text;
use crate::row::{Row, Says, TWO_UNITS, in_real_time};

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]).stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// The smallest possible exploration: each point of each way starts a child.
fn with_children() -> Explore {
    in_real_time(1).budgets([])
}

/// What a call that ran once leaves in a directory.
async fn how_often(directory: &mut TempDir) -> &'static str {
    let file = directory.path().join("log");
    // A child of a call that was dropped may still be on its way.
    for _ in 0..50 {
        let lines = std::fs::read_to_string(&file).unwrap_or_default().lines().count();
        if lines > 1 {
            return "it ran more than once";
        }
        sleep(Duration::from_millis(1)).await;
    }
    "it ran once"
}

pub(crate) fn rows() -> Vec<Row> {
    vec![
        Row::tokio("process::Child::wait", "process/struct.Child.html#method.wait", || {
            in_real_time(1).budgets(TWO_UNITS).cancel_safe(
                async || shell("exit 7").spawn().unwrap(),
                async |child| child.wait().await.unwrap().code(),
                async |_| (),
            )
        })
        .says(Says::Safe),
        Row::tokio("process::Child::kill", "process/struct.Child.html#method.kill", || {
            in_real_time(1).budgets(TWO_UNITS).cancel_safe(
                async || shell("exec sleep 5").spawn().unwrap(),
                async |child| child.kill().await.is_ok(),
                async |child| child.wait().await.unwrap().success(),
            )
        }),
        Row::tokio("process::Child::wait_with_output", "process/struct.Child.html#method.wait_with_output", || {
            with_children().cancel_safe(
                async || Some(shell("echo alpha").spawn().unwrap()),
                async |child: &mut Option<Child>| match child.take() {
                    Some(child) => text(&child.wait_with_output().await.unwrap().stdout),
                    None => "no child to wait for".to_owned(),
                },
                async |_| (),
            )
        })
        .instead("read `stdout` into a buffer that is kept, then `wait`; or spawn it"),
        Row::tokio("process::Command::output", "process/struct.Command.html#method.output", || {
            with_children().cancel_safe(
                async || TempDir::new().unwrap(),
                async |directory| {
                    let output = shell("echo alpha >> log").current_dir(directory.path()).output().await;
                    assert!(output.unwrap().status.success());
                },
                how_often,
            )
        })
        .how("in each call")
        .instead("`spawn` once, and `Child::wait`; `kill_on_drop` ends a child whose call was dropped")
        .note("The child of a dropped call keeps running, unless `kill_on_drop` was set."),
        Row::tokio("signal::unix::Signal::recv", "signal/unix/struct.Signal.html#method.recv", || {
            in_real_time(1).cancel_safe(
                async || {
                    let signals = signal(SignalKind::user_defined1()).unwrap();
                    drop(tokio::spawn(async {
                        sleep(Duration::from_millis(1)).await;
                        kill_process(getpid(), Signal::USR1).unwrap();
                    }));
                    signals
                },
                async |signals| signals.recv().await,
                async |_| (),
            )
        })
        .says(Says::Safe),
    ]
}
