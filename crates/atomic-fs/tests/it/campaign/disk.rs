//! A separate file system on a loop device, whose power can be cut.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::{TempDir, tempdir};

use super::Layout;
use crate::child;
use crate::strace::{self, Run};
use crate::support::not_run;

/// How long to wait for the users of a file system before it is unmounted.
const BUSY_LIMIT: Duration = Duration::from_secs(10);

/// The file systems that are cut.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Ext4,
    Xfs,
}

impl Kind {
    pub(super) const ALL: [Self; 2] = [Self::Ext4, Self::Xfs];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }

    /// How it is made, and the minimal size of its image; the image is sparse.
    fn make(self) -> (&'static [&'static str], u64) {
        match self {
            Self::Ext4 => (&["mkfs.ext4", "-q", "-F"], 64 << 20),
            Self::Xfs => (&["mkfs.xfs", "-q", "-f"], 320 << 20),
        }
    }

    /// How it is mounted: without the ext4 defaults that hide a missing sync.
    fn options(self) -> &'static str {
        match self {
            Self::Ext4 => "noauto_da_alloc",
            // A file system that is kept alive this way has the same identity.
            Self::Xfs => "nouuid",
        }
    }
}

pub(super) struct Disk {
    kind: Kind,
    temp: TempDir,
    /// For files that must not be cut.
    scratch: TempDir,
    point: PathBuf,
    pub(super) layout: Layout,
}

impl Disk {
    /// `None`, which is also published with the reason, if `campaign` cannot run here.
    pub(super) fn new(kind: Kind, campaign: &str) -> Option<Self> {
        child::strace(campaign)?;
        match Self::try_new(kind) {
            Ok(disk) => Some(disk),
            Err(why) => {
                not_run(campaign, &why);
                None
            }
        }
    }

    fn try_new(kind: Kind) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("a power cut needs root".to_owned());
        }
        let temp = tempdir().unwrap();
        let point = temp.path().join("disk");
        std::fs::create_dir(&point).unwrap();
        let disk = Self { kind, temp, scratch: super::scratch(), point, layout: Layout::TwoDirectories };
        let (make, size_bytes) = kind.make();
        let image = disk.image();
        std::fs::File::create(&image).unwrap().set_len(size_bytes).unwrap();
        run(Command::new(make[0]).args(&make[1..]).arg(image))?;
        disk.mount()?;
        disk.try_cut()?;
        Ok(disk)
    }

    pub(super) fn with(mut self, layout: Layout) -> Self {
        self.layout = layout;
        self
    }

    fn image(&self) -> PathBuf {
        self.temp.path().join("image")
    }

    /// Mounts it on a new device each time. A process that has meanwhile got its own mounts, for example by unshare(1),
    /// keeps the previously mounted, cut file system alive; and the same device would show that again.
    fn mount(&self) -> Result<(), String> {
        let device = run(Command::new("losetup").args(["--find", "--show"]).arg(self.image()))?;
        let mut mount = Command::new("mount");
        let mounted = run(mount.args(["-t", self.kind.name(), "-o", self.kind.options(), &device]).arg(&self.point));
        // The device goes with the last mount.
        run(Command::new("losetup").args(["--detach", &device]))?;
        mounted.map(drop)
    }

    /// Cuts the power: nothing more reaches the disk. Then the machine starts again.
    pub(super) fn cut(&self) {
        self.try_cut().unwrap();
    }

    fn try_cut(&self) -> Result<(), String> {
        // Without flushing the log; ext4 accepts the call as well.
        run(Command::new("xfs_io").args(["-x", "-c", "shutdown"]).arg(&self.point))?;
        let begun = Instant::now();
        // A child of another test has a copy of each handle for a moment while it starts.
        while let Err(why) = run(Command::new("umount").arg(&self.point)) {
            if begun.elapsed() > BUSY_LIMIT {
                return Err(why);
            }
        }
        self.mount()
    }

    /// Makes the file system write its log, as any other program may do at any time.
    pub(super) fn sync_elsewhere(&self) {
        let file = std::fs::File::create(self.point.join("elsewhere")).unwrap();
        file.sync_all().unwrap();
    }

    /// The directory of the campaign.
    pub(super) fn dir(&self) -> PathBuf {
        self.point.join("traced")
    }

    pub(super) fn run(&self, task: &str, path: &Path, inject: Option<&str>) -> Run {
        strace::run(task, path, self.scratch.path(), inject)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Fails if it was never mounted.
        let _gone = Command::new("umount").arg("-q").arg(&self.point).status();
    }
}

/// Runs a command and returns its output; the error is its standard error.
fn run(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    match command.output() {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let said: Vec<_> = said.split_whitespace().collect();
            Err(format!("{name} failed: {}", said.join(" ")))
        }
        Err(error) => Err(format!("{name} cannot be run: {error}")),
    }
}
