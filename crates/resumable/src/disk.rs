//! The checkpoint's file: read at offsets, appended to, and identified by its place on the disk.
//!
//! Invariant: reading does not move anything that writing depends on, so a file may be read while a thread appends to
//! it.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use crate::scan::ReadAt;

/// As many symlinks as Linux follows.
const MOST_LINKS: u32 = 40;

impl ReadAt for File {
    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    #[cfg(unix)]
    fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, into, offset)
    }

    #[cfg(windows)]
    fn read_exact_at(&self, mut offset: u64, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            match std::os::windows::fs::FileExt::seek_read(self, into, offset) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    into = &mut into[count..];
                    offset += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Opens a file to append to it.
pub(crate) fn open_to_append(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    // If the file is truncated from outside, an append must not land behind a hole, because the length would then look
    // right.
    #[cfg(unix)]
    options.append(true);
    options.open(path)
}

/// Adds bytes to a file that ends at `end`.
#[cfg(unix)]
pub(crate) fn append(mut file: &File, _end: u64, bytes: &[u8]) -> io::Result<()> {
    io::Write::write_all(&mut file, bytes)
}

/// Adds bytes to a file that ends at `end`.
#[cfg(windows)]
pub(crate) fn append(file: &File, mut end: u64, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_write(file, bytes, end) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                bytes = &bytes[count..];
                end += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether the open file is still the one at the path.
#[cfg(unix)]
pub(crate) fn is_still_at(file: &File, path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let open = file.metadata()?;
    match fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (open.dev(), open.ino())),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
        Err(error) => Err(error),
    }
}

/// On other systems an open file cannot be moved away, so it is enough that something is at the path.
#[cfg(not(unix))]
pub(crate) fn is_still_at(_: &File, path: &Path) -> io::Result<bool> {
    fs::exists(path)
}

/// Checks that the path still leads to the open file, and that the file is as long as what was written to it.
pub(crate) fn check_place(file: &File, path: &Path, length: u64) -> io::Result<()> {
    if !is_still_at(file, path)? {
        let gone = "it was removed, renamed or replaced while this run used it; what was recorded since may be lost";
        return Err(io::Error::new(io::ErrorKind::NotFound, gone));
    }
    let found = file.metadata()?.len();
    if found != length {
        let what = format!("it is {found} bytes long instead of {length}: something else wrote to it or truncated it");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    Ok(())
}

/// The directory of a file.
pub(crate) fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Where a path leads through its symlinks, whether or not a file is there: a link may exist before its target.
pub(crate) fn link_target(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
        match fs::read_link(&path) {
            Ok(target) => path = directory_of(&path).join(target),
            // It is not a link, or does not exist.
            Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::NotFound) => {
                return Ok(path);
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "it leads through too many symlinks"))
}

/// Makes the names in the directory of a file durable.
#[cfg(unix)]
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(directory_of(path))?.sync_all()
}

/// On other systems a directory cannot be opened for a sync.
#[cfg(not(unix))]
pub(crate) fn sync_directory(_: &Path) -> io::Result<()> {
    Ok(())
}
