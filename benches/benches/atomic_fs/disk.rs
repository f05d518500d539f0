//! A separate file system on a loop device, whose power can be cut. It needs root.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub(crate) struct Disk {
    image: PathBuf,
    point: PathBuf,
}

impl Disk {
    /// An empty ext4 without the defaults that hide a missing sync. The error says what failed.
    pub(crate) fn new(scratch: &Path) -> Result<Self, String> {
        let disk = Self { image: scratch.join("image"), point: scratch.join("disk") };
        run(Command::new("mkdir").arg(&disk.point))?;
        run(Command::new("truncate").args(["-s", "64M"]).arg(&disk.image))?;
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&disk.image))?;
        disk.mount()?;
        Ok(disk)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.point
    }

    /// Cuts the power: nothing more reaches the disk. Then the machine starts again.
    pub(crate) fn cut(&self) {
        // Without flushing the log; ext4 accepts the call as well.
        run(Command::new("xfs_io").args(["-x", "-c", "shutdown"]).arg(&self.point)).unwrap();
        run(Command::new("umount").arg(&self.point)).unwrap();
        self.mount().unwrap();
    }

    /// Makes the file system write its log, as any other program may do at any time.
    pub(crate) fn sync_elsewhere(&self) {
        std::fs::File::create(self.point.join("elsewhere")).unwrap().sync_all().unwrap();
    }

    fn mount(&self) -> Result<(), String> {
        run(Command::new("mount").args(["-t", "ext4", "-o", "loop,noauto_da_alloc"]).arg(&self.image).arg(&self.point))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Fails if it was never mounted.
        drop(Command::new("umount").arg("-q").arg(&self.point).stderr(Stdio::null()).status());
    }
}

/// Runs a command; the error is its output.
pub(crate) fn run(command: &mut Command) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("{name}: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("{name}: {error}")),
    }
}
