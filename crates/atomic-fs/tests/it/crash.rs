//! A process that is killed or stopped while it writes, and how few system calls a write is.

use std::io::Write;

use cancel_safe_atomic_fs as atomic_fs;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::tempdir;

use crate::child;
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

#[cfg(target_os = "linux")]
#[test]
fn a_write_of_4_kib_takes_at_most_12_file_system_calls_and_2_syncs() {
    for task in ["write", "write async"] {
        let dir = tempdir().unwrap();
        if child::strace("the count of system calls").is_none() {
            return;
        }
        let path = dir.path().join("traced/file");
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "old").unwrap();
        let run = crate::strace::run(task, &path, dir.path(), None);
        assert_eq!(run.said.as_deref(), Some("Ok"), "{}", run.complaint);
        let list: Vec<_> = run.calls.iter().map(|call| call.text.as_str()).collect();
        let list = list.join("\n");
        // The look at the old file's access control list is not among them: it goes by /proc, which has no such name.
        assert!(run.calls.len() <= 12, "{} calls:\n{list}", run.calls.len());
        assert_eq!(run.calls.iter().filter(|call| call.name.contains("sync")).count(), 2, "{list}");
    }
}
