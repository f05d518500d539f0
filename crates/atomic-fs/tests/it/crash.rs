//! A process that is killed at any system call: the file is old or new, and a sweep removes the rest.

use std::io::Write;
use std::path::Path;

use cancel_safe_atomic_fs as atomic_fs;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::tempdir;

use crate::child::{self, SIZE_BYTES};
use crate::strace::{self, Call};
use crate::support::{names, temps};

#[tokio::test]
async fn a_killed_writer_leaves_the_old_file_and_a_sweep_removes_its_litter() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "old").unwrap();
    let mut child = child::command(&[], "hold", &path).spawn().unwrap();
    child::await_word(&mut child, "holding");
    assert_eq!(temps(dir.path()).len(), 1);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!((std::fs::read(&path).unwrap(), temps(dir.path()).len()), (b"old".to_vec(), 1));

    let report = atomic_fs::sweep(dir.path()).await.unwrap();
    assert_eq!((report.removed, report.live, report.failed), (1, 0, 0));
    assert_eq!(names(dir.path()), ["file"]);
}

#[tokio::test]
async fn a_sweep_does_not_disturb_a_writer_that_is_stopped() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    let mut child = child::command(&[], "hold", &path).spawn().unwrap();
    child::await_word(&mut child, "holding");
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::STOP).unwrap();

    let report = atomic_fs::sweep(dir.path()).await.unwrap();
    assert_eq!((report.removed, report.live, report.failed), (0, 1, 0));

    kill_process(pid, Signal::CONT).unwrap();
    child.stdin.take().unwrap().write_all(b"go on\n").unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(names(dir.path()), ["file"]);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 3 << 20);
}

/// Makes the old file anew, with everything that a write can be asked to keep.
fn renew(path: &Path) {
    // Removed first, together with what the child writes to beforehand, so that every round makes the same calls.
    for stale in [path, &path.parent().unwrap().with_file_name("other")] {
        match std::fs::remove_file(stale) {
            Ok(()) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound),
        }
    }
    std::fs::write(path, "old").unwrap();
    // Without the privilege, or on a file system without attributes, there is so much less to keep.
    drop(std::os::unix::fs::chown(path, Some(1234), Some(4321)));
    let _ = rustix::fs::setxattr(path, "user.colour", b"green", rustix::fs::XattrFlags::empty());
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
}

/// Runs `task` under strace and returns the file system calls that belong to the write, in order.
fn trace(task: &str, dir: &Path) -> Option<Vec<Call>> {
    child::strace()?;
    let path = dir.join("traced/file");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    renew(&path);
    let run = strace::run(task, &path, "/traced", &dir.join("trace"), None);
    assert_eq!(run.said.as_deref(), Some("Ok"), "{}", run.complaint);
    Some(run.calls)
}

#[test]
fn a_write_of_4_kib_takes_at_most_12_file_system_calls_and_2_syncs() {
    for task in ["write", "write async"] {
        let dir = tempdir().unwrap();
        let Some(calls) = trace(task, dir.path()) else { return };
        let list: Vec<_> = calls.iter().map(|call| call.text.as_str()).collect();
        let list = list.join("\n");
        assert!(calls.len() <= 12, "{} calls:\n{list}", calls.len());
        assert_eq!(calls.iter().filter(|call| call.name.contains("sync")).count(), 2, "{list}");
    }
}

#[tokio::test]
async fn a_fault_or_a_kill_at_any_system_call_leaves_old_or_new() {
    visit("write after others", |_| true).await;
}

#[tokio::test]
async fn a_fault_or_a_kill_while_everything_is_kept_leaves_old_or_new() {
    // The thread of the pool also writes to wake the runtime, more or less often; so its writes cannot be counted.
    visit("keep all after others", |call| call.name != "write").await;
}

/// Runs `task` once for each of its system calls and each fault, and looks at what is left.
async fn visit(task: &str, is_counted: impl Fn(&Call) -> bool) {
    let dir = tempdir().unwrap();
    let Some(calls) = trace(task, dir.path()) else { return };
    let path = dir.path().join("traced/file");
    let traced = path.parent().unwrap();
    let (mut visited, mut missed) = (0, 0);
    for fault in ["error=EIO", "error=ENOSPC", "signal=SIGKILL"] {
        for call in calls.iter().filter(|call| call.name != "close" && is_counted(call)) {
            renew(&path);
            let inject = format!("{}:{fault}:when={}", call.name, call.number);
            let run = strace::run(task, &path, "/traced", &dir.path().join("trace"), Some(&inject));
            let renamed = run.calls.iter().any(|call| call.name.starts_with("rename") && call.is_done());
            let content = std::fs::read(&path).unwrap();
            let new = content == vec![b'N'; SIZE_BYTES];
            let context = format!("{inject}, new: {new}, left: {:?}, {run:?}", temps(traced));
            assert!(new || content == b"old", "torn: {context}");
            assert_eq!(new, renamed, "{context}");
            match run.said.as_deref() {
                Some("Ok") => {
                    // A file system may be without locks; everything else that fails must be reported.
                    assert!(new && (call.name == "flock" || !run.is_hit), "{context}");
                }
                Some(error) => assert_eq!(error.starts_with("Visible"), new, "{context}"),
                // Killed, or a fault that went astray has hit what the child does before.
                None => assert!(fault.contains("SIGKILL") || !run.is_hit, "{context}"),
            }
            if run.said.is_some() {
                assert!(temps(traced).is_empty(), "{context}");
            }
            let report = atomic_fs::sweep(traced).await.unwrap();
            assert!(report.failed == 0 && names(traced) == ["file"], "{report:?}: {context}");
            visited += 1;
            missed += usize::from(!fault.contains("SIGKILL") && !run.is_hit);
        }
    }
    println!("{task}: {visited} faults and kills at {} system calls, {missed} went astray", calls.len());
    assert!(missed * 4 <= visited, "the faults are badly aimed: {missed} of {visited} went astray");
}
