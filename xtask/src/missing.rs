//! Programs that the tests need beyond Rust, and that this machine lacks.
//!
//! Invariant: as root on Debian they are installed; otherwise the error names the command that installs them.

use std::env;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;

/// A missing program, and the name of its package on each system.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Missing {
    pub(crate) name: &'static str,
    pub(crate) debian: &'static str,
    pub(crate) fedora: &'static str,
    pub(crate) arch: &'static str,
    pub(crate) alpine: &'static str,
    pub(crate) homebrew: &'static str,
}

/// The system's package manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum System {
    Debian,
    Fedora,
    Arch,
    Alpine,
    MacOs,
    Other,
}

impl System {
    fn here() -> Self {
        if cfg!(target_os = "macos") {
            return Self::MacOs;
        }
        Self::of(&fs::read_to_string("/etc/os-release").unwrap_or_default())
    }

    /// Reads the fields `ID` and `ID_LIKE` of os-release: a system is a known one, or like a known one.
    fn of(os_release: &str) -> Self {
        let field = |name: &str| {
            let line = os_release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            line.unwrap_or_default().trim_matches('"').to_owned()
        };
        let names = format!("{} {}", field("ID"), field("ID_LIKE"));
        let known = |name: &str| match name {
            "debian" | "ubuntu" => Some(Self::Debian),
            "fedora" | "rhel" | "centos" => Some(Self::Fedora),
            "arch" => Some(Self::Arch),
            "alpine" => Some(Self::Alpine),
            _ => None,
        };
        names.split_whitespace().find_map(known).unwrap_or(Self::Other)
    }

    /// The command that installs all of these at once.
    fn command(self, missing: &[Missing]) -> Option<String> {
        let (command, package): (_, fn(&Missing) -> &'static str) = match self {
            Self::Debian => ("apt-get update && apt-get install -y", |missing| missing.debian),
            Self::Fedora => ("dnf install -y", |missing| missing.fedora),
            Self::Arch => ("pacman -S --needed --noconfirm", |missing| missing.arch),
            Self::Alpine => ("apk add", |missing| missing.alpine),
            Self::MacOs => ("brew install", |missing| missing.homebrew),
            Self::Other => return None,
        };
        let packages: Vec<_> = missing.iter().map(package).filter(|package| !package.is_empty()).collect();
        Some(format!("{command} {}", packages.join(" ")))
    }
}

/// The message about everything that is missing, if we do not install it.
fn told(system: System, missing: &[Missing]) -> String {
    let names: Vec<_> = missing.iter().map(|missing| missing.name).collect();
    let names = names.join(" and ");
    match system.command(missing) {
        None => format!("the tests need {names}: install it with your package manager"),
        Some(command) if system == System::MacOs => format!("the tests need {names}: install it with: {command}"),
        Some(command) => format!("the tests need {names}: install it with: sudo sh -c '{command}'"),
    }
}

/// Succeeds if we will install all of this: as root, on Debian.
pub(crate) fn may_be_installed(missing: &[Missing]) -> Result<(), String> {
    let system = System::here();
    if missing.is_empty() || system == System::Debian && is_root() { Ok(()) } else { Err(told(system, missing)) }
}

impl Missing {
    pub(crate) fn install(&self) -> Result<(), String> {
        may_be_installed(&[*self])?;
        let command = System::Debian.command(&[*self]).unwrap_or_default();
        println!("{} is missing: {command}", self.name);
        let status = Command::new("sh").args(["-c", &command]).env("DEBIAN_FRONTEND", "noninteractive").status();
        if status.is_ok_and(|status| status.success()) {
            return Ok(());
        }
        Err(format!("{} could not be installed; to see why: {command}", self.name))
    }
}

/// Provides the tools for the campaigns of faults and power cuts. They need Linux, and power cuts need root. Without a
/// tool the tests continue, and the closing table names what was not run.
pub(crate) fn see_to_tools() {
    let tools = [("strace", "strace"), ("mkfs.xfs", "xfsprogs"), ("mkfs.btrfs", "btrfs-progs")];
    for (program, name) in tools {
        let is_of_use = cfg!(target_os = "linux") && (is_root() || program == "strace");
        if is_of_use && find(program).is_none() {
            // It has the same name everywhere, and exists only on Linux.
            let missing = Missing { name, debian: name, fedora: name, arch: name, alpine: name, homebrew: "" };
            if let Err(why) = missing.install() {
                println!("{why}");
            }
        }
    }
}

/// Finds a program. Debian keeps some outside a user's PATH.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/usr/local/sbin", "/usr/libexec"].map(PathBuf::from);
    env::split_paths(&path).chain(more).map(|directory| directory.join(name)).find(|program| program.is_file())
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Missing =
        Missing { name: "One", debian: "one-d", fedora: "one-f", arch: "one-r", alpine: "one-a", homebrew: "one-h" };
    const TWO: Missing =
        Missing { name: "Two", debian: "two-d", fedora: "two-f", arch: "two-r", alpine: "two-a", homebrew: "two-h" };

    #[test]
    fn a_system_is_known_by_its_name_or_by_what_it_is_like() {
        assert_eq!(System::of("NAME=\"Debian GNU/Linux\"\nID=debian\n"), System::Debian);
        assert_eq!(System::of("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n"), System::Debian);
        assert_eq!(System::of("ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n"), System::Fedora);
        assert_eq!(System::of("ID=manjaro\nID_LIKE=arch\n"), System::Arch);
        assert_eq!(System::of("ID=alpine\n"), System::Alpine);
        assert_eq!(System::of("ID=plan9\n"), System::Other);
        assert_eq!(System::of(""), System::Other);
    }

    #[test]
    fn everything_that_is_missing_is_told_at_once_with_one_command() {
        let told = |system| told(system, &[ONE, TWO]);
        let debian = "the tests need One and Two: install it with: sudo sh -c 'apt-get update && apt-get install -y one-d two-d'";
        assert_eq!(told(System::Debian), debian);
        assert_eq!(
            told(System::Fedora),
            "the tests need One and Two: install it with: sudo sh -c 'dnf install -y one-f two-f'"
        );
        assert!(told(System::Arch).contains("pacman -S --needed --noconfirm one-r two-r"));
        assert!(told(System::Alpine).contains("apk add one-a two-a"));
        assert_eq!(told(System::MacOs), "the tests need One and Two: install it with: brew install one-h two-h");
        assert_eq!(told(System::Other), "the tests need One and Two: install it with your package manager");
    }

    #[test]
    fn nothing_missing_is_nothing_to_install() {
        assert_eq!(may_be_installed(&[]), Ok(()));
    }
}
