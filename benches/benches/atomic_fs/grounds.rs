//! The file systems on which contests run: as root an ext4 and an xfs on loop devices, and a tmpfs, made for this run.
//!
//! Invariant: whatever becomes of this process, nothing stays mounted. It mounts in its own mount namespace, which ends
//! with it; the loop device goes with the mount, and the image, which no longer has a name, goes with the device. And a
//! file system is named as the kernel reports it: nobody deploys an ext4 without a journal, which syncs more cheaply.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Set once this process has its own mount namespace.
const OWN_MOUNTS: &str = "CANCEL_SAFE_BENCH_OWN_MOUNTS";
/// Room for every contestant's file of 64 MiB.
const IMAGE_SIZE: &str = "1G";

/// One of our file systems, and how it is made: the program that makes it in an image, if it needs one.
struct Kind {
    name: &'static str,
    make: Option<&'static [&'static str]>,
    /// What [`kind_of`] must return for it.
    wanted: &'static str,
}

/// Made completely at once: anything deferred to the first mount would be written while others are measured.
const EXT4: &[&str] = &["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"];
const KINDS: [Kind; 3] = [
    Kind { name: "ext4", make: Some(EXT4), wanted: "ext4 with a journal" },
    Kind { name: "xfs", make: Some(&["mkfs.xfs", "-q", "-f"]), wanted: "xfs" },
    Kind { name: "tmpfs", make: None, wanted: "tmpfs" },
];

/// The words that select grounds.
pub(crate) const NAMES: [&str; 4] = ["ext4", "xfs", "tmpfs", "here"];

/// A directory on a file system of a known type.
pub(crate) struct Ground {
    /// For titles.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    is_mounted: bool,
}

impl Ground {
    /// The grounds that `is_wanted` selects, below `scratch`. The ground of `scratch` itself is among them if no other
    /// can be made, or if it is selected.
    pub(crate) fn all(scratch: &Path, is_wanted: impl Fn(&str) -> bool) -> Vec<Self> {
        let mut all = Vec::new();
        if std::env::var_os(OWN_MOUNTS).is_some() {
            for kind in KINDS.iter().filter(|kind| is_wanted(kind.name)) {
                match Self::make(kind, scratch) {
                    Ok(ground) => all.push(ground),
                    Err(why) => println!("{}: not run, because {why}", kind.name),
                }
            }
        } else {
            println!(
                "No file systems can be made here, which takes root on Linux: contests are held on the one there is."
            );
        }
        if all.is_empty() {
            all.push(Self { name: kind_of(scratch), path: scratch.to_path_buf(), is_mounted: false });
        }
        for ground in &all {
            println!("{}: {}", ground.path.display(), ground.name);
        }
        all
    }

    /// Makes a ground. The error says why that is impossible.
    fn make(kind: &Kind, scratch: &Path) -> Result<Self, String> {
        let path = scratch.join(kind.name);
        std::fs::create_dir(&path).map_err(|error| error.to_string())?;
        let mut mount = Command::new("mount");
        mount.args(["-t", kind.name]);
        if let Some(make) = kind.make {
            let image = scratch.join(format!("{}.image", kind.name));
            // Its blocks are allocated from the beginning, as on a device.
            run(Command::new("fallocate").args(["-l", IMAGE_SIZE]).arg(&image))?;
            let attached = run(Command::new(make[0]).args(&make[1..]).arg(&image)).and_then(|_| {
                // Without its own cache below the file system's.
                run(Command::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(&image))
            });
            std::fs::remove_file(&image).map_err(|error| error.to_string())?;
            let device = attached?;
            let mounted = run(mount.arg(&device).arg(&path));
            // Once it is mounted, this takes effect when it is unmounted.
            run(Command::new("losetup").args(["--detach", &device]))?;
            mounted?;
        } else {
            run(mount.arg("none").arg(&path))?;
        }
        let mut ground = Self { name: kind_of(&path), path, is_mounted: true };
        if ground.name != kind.wanted {
            return Err(format!("it turned out to be {}", ground.name));
        }
        ground.name = kind.name.to_owned();
        Ok(ground)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if self.is_mounted
            && let Err(error) = run(Command::new("umount").arg(&self.path))
        {
            println!("{}: {error}", self.path.display());
        }
    }
}

/// Continues in its own mount namespace, as the same process, if that is permitted.
pub(crate) fn take_own_mounts() {
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::process::CommandExt;
        let is_able = |command: &mut Command| {
            let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        if std::env::var_os(OWN_MOUNTS).is_none() && is_able(Command::new("unshare").args(["--mount", "true"])) {
            let Ok(program) = std::env::current_exe() else { return };
            let mut again = Command::new("unshare");
            again.arg("--mount").arg(program).args(std::env::args_os().skip(1)).env(OWN_MOUNTS, "1");
            let error = again.exec();
            println!("unshare: {error}");
        }
    }
}

/// The file system of `path` as the kernel reports it, and for an ext4 whether it has a journal.
fn kind_of(path: &Path) -> String {
    let unknown = || "an unknown file system".to_owned();
    let Ok(path) = path.canonicalize() else { return unknown() };
    // Only Linux has these; elsewhere the type stays unknown.
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // `36 35 98:0 / /mnt rw,noatime - ext4 /dev/vda rw`; the last mount at a place is the visible one.
    let mut found: Option<(usize, &str, &str)> = None;
    for line in mounts.lines() {
        let Some((mount, system)) = line.split_once(" - ") else { continue };
        let fields: Vec<_> = mount.split(' ').collect();
        let (Some(device), Some(point), Some(kind)) = (fields.get(2), fields.get(4), system.split(' ').next()) else {
            continue;
        };
        let depth = Path::new(point).components().count();
        if path.starts_with(point) && found.is_none_or(|(deepest, ..)| depth >= deepest) {
            found = Some((depth, *device, kind));
        }
    }
    match found {
        Some((_, device, kind @ ("ext3" | "ext4"))) => match has_journal(device) {
            Some(true) => format!("{kind} with a journal"),
            Some(false) => format!("{kind} without a journal"),
            None => format!("{kind}, perhaps without a journal"),
        },
        Some((_, _, kind)) => kind.to_owned(),
        None => unknown(),
    }
}

/// Whether the ext4 on `device` (its two numbers) has a journal; `None` if that is unknown.
fn has_journal(device: &str) -> Option<bool> {
    let link = std::fs::read_link(format!("/sys/dev/block/{device}")).ok()?;
    let name = link.file_name()?.to_str()?;
    // Only a device in use has this directory, and jbd2 the other, with one entry for each journal: `loop0-8`.
    std::fs::metadata(format!("/proc/fs/ext4/{name}")).ok()?;
    let Ok(journals) = std::fs::read_dir("/proc/fs/jbd2") else { return Some(false) };
    let start = format!("{name}-");
    Some(journals.flatten().any(|journal| journal.file_name().to_string_lossy().starts_with(&start)))
}

/// Runs a command and returns its output; the error is its standard error.
fn run(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    match command.stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        Ok(output) => Err(format!("{name} failed: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("{name} cannot be run: {error}")),
    }
}
