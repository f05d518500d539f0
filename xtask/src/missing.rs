//! What the tests need beyond Rust and this machine does not have.
//!
//! Invariant: as root on Debian it is installed; everybody else is told the command that installs it.

use std::env;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is not installed, and how its package is called.
pub(crate) struct Missing<'a> {
    pub(crate) name: &'a str,
    pub(crate) debian: &'a str,
    pub(crate) homebrew: &'a str,
}

impl Missing<'_> {
    /// We install as root on Debian. Everybody else is told the command.
    pub(crate) fn may_be_installed(&self) -> Result<(), String> {
        let Self { name, homebrew, .. } = self;
        if !Path::new("/usr/bin/apt-get").exists() {
            let command = if cfg!(target_os = "macos") {
                format!("brew install {homebrew}")
            } else {
                "your package manager".into()
            };
            return Err(format!("the tests need {name}, which is missing; install it with: {command}"));
        }
        if !is_root() {
            let command = self.command();
            return Err(format!("the tests need {name}, which is missing; install it with: sudo sh -c '{command}'"));
        }
        Ok(())
    }

    pub(crate) fn install(&self) -> Result<(), String> {
        self.may_be_installed()?;
        let (name, command) = (self.name, self.command());
        println!("{name} is missing: {command}");
        let status = Command::new("sh").args(["-c", &command]).env("DEBIAN_FRONTEND", "noninteractive").status();
        if status.is_ok_and(|status| status.success()) {
            return Ok(());
        }
        Err(format!("{name} could not be installed; to see why: {command}"))
    }

    fn command(&self) -> String {
        format!("apt-get update && apt-get install -y {}", self.debian)
    }
}

/// Sees to what the campaigns of faults and power cuts run. They need Linux, and power cuts root: where a tool cannot be
/// had, the tests go on without it, and the closing table names what was not run.
pub(crate) fn see_to_tools() {
    let tools = [
        ("strace", "strace", "strace"),
        ("mkfs.xfs", "xfsprogs", "xfsprogs"),
        ("mkfs.btrfs", "btrfs-progs", "btrfs-progs"),
    ];
    for (program, name, debian) in tools {
        let is_of_use = cfg!(target_os = "linux") && (is_root() || program == "strace");
        if is_of_use && find(program).is_none() {
            let missing = Missing { name, debian, homebrew: "" };
            if let Err(why) = missing.install() {
                println!("{why}");
            }
        }
    }
}

/// Finds a program. Debian keeps some where the PATH of a user does not lead.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/usr/local/sbin", "/usr/libexec"].map(PathBuf::from);
    env::split_paths(&path).chain(more).map(|directory| directory.join(name)).find(|program| program.is_file())
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}
