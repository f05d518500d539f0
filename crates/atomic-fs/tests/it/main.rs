//! The integration tests of `cancel-safe-atomic-fs`, one binary.
#![expect(clippy::unwrap_used, clippy::unwrap_in_result, reason = "a failed unwrap is a failed test")]
#![expect(clippy::print_stdout, reason = "a test that needs root says so, and a child process reports to its parent")]

mod blocking;
mod cancel;
mod happy;
mod prop;
mod support;

#[cfg(target_os = "linux")]
mod access;
#[cfg(target_os = "linux")]
mod campaign;
#[cfg(unix)]
mod cancel_tx;
#[cfg(unix)]
mod child;
#[cfg(unix)]
mod crash;
#[cfg(unix)]
mod faults;
#[cfg(target_os = "linux")]
mod field;
#[cfg(unix)]
mod hostile;
#[cfg(target_os = "linux")]
mod in_place;
#[cfg(target_os = "linux")]
mod lock;
#[cfg(target_os = "linux")]
mod many;
#[cfg(unix)]
mod metadata;
#[cfg(target_os = "linux")]
mod mounts;
#[cfg(unix)]
mod processes;
#[cfg(target_os = "linux")]
mod random;
#[cfg(target_os = "linux")]
mod replay;
#[cfg(target_os = "linux")]
mod strace;
#[cfg(unix)]
mod transaction;
