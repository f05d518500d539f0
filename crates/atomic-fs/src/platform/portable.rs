//! Systems without calls below a directory handle: only what std has everywhere.
//!
//! Invariant: nothing here asks for more than std. On Unix it is compiled for the tests below, so that it cannot rot.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::{Entry, Guests, Kind, Moved};

/// A directory by its absolute path, for systems without calls below a directory handle.
#[derive(Debug)]
pub(crate) struct Dir(PathBuf);

impl Dir {
    /// Opens the directory `path`.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        if fs::metadata(&path)?.is_dir() { Ok(Self(path)) } else { Err(io::ErrorKind::NotADirectory.into()) }
    }

    /// Opens `path` as seen from this directory.
    pub(crate) fn open_dir(&self, path: &Path) -> io::Result<Self> {
        Self::open(&self.0.join(path))
    }

    /// Looks at `name` without following it; `None` if there is none.
    pub(crate) fn look(&self, name: &OsStr) -> io::Result<Option<Entry>> {
        match fs::symlink_metadata(self.0.join(name)) {
            Ok(meta) => Ok(Some(describe(&meta))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads where the symlink `name` points.
    pub(crate) fn read_link(&self, name: &OsStr) -> io::Result<PathBuf> {
        fs::read_link(self.0.join(name))
    }

    /// Creates the file `name`, which must not exist.
    pub(crate) fn create(&self, name: &OsStr, _mode: u32) -> io::Result<File> {
        File::create_new(self.0.join(name))
    }

    /// Opens the file `name` for reading.
    pub(crate) fn read(&self, name: &OsStr) -> io::Result<File> {
        OpenOptions::new().read(true).open(self.0.join(name))
    }

    /// Renames `from` to `to`, replacing what is there.
    pub(crate) fn rename(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        let (from, to) = (self.0.join(from), self.0.join(to));
        persist(pause_here, || fs::rename(&from, &to))
    }

    /// Renames `from` to `to`, which must not exist.
    pub(crate) fn rename_new(&self, from: &OsStr, to: &OsStr) -> io::Result<Moved> {
        let (from, to) = (self.0.join(from), self.0.join(to));
        persist(pause_here, || fs::hard_link(&from, &to))?;
        Ok(Moved::Linked)
    }

    /// Removes the file `name`.
    pub(crate) fn remove(&self, name: &OsStr) -> io::Result<()> {
        let path = self.0.join(name);
        persist(pause_here, || fs::remove_file(&path))
    }

    /// These systems have no call that syncs a directory.
    pub(crate) fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    /// These systems have no POSIX access control lists.
    pub(crate) fn guests(&self, _name: &OsStr) -> io::Result<Guests> {
        Ok(Guests::Unsupported)
    }

    /// These systems have no extended attributes that std or rustix could copy.
    pub(crate) fn copy_xattrs(&self, _name: &OsStr, _file: &File) -> io::Result<()> {
        Ok(())
    }
}

/// How often to try a rename or a removal at most.
const ATTEMPTS: u32 = 10;
/// The first pause. Each is twice as long as the one before; together they take about half a second.
const FIRST_PAUSE: Duration = Duration::from_millis(1);

/// How long to wait before retrying a call that has failed `failures` times, by its Windows error code; `None` if it
/// should not be retried.
///
/// On Windows a virus scanner or an indexer may open a file for a moment right after it was written, and meanwhile it
/// can be neither renamed nor removed. A permission that is really missing has one of these codes too, so it is
/// reported late.
fn pause(code: Option<i32>, failures: u32) -> Option<Duration> {
    const ACCESS_DENIED: i32 = 5;
    const SHARING_VIOLATION: i32 = 32;
    const LOCK_VIOLATION: i32 = 33;
    let is_passing = matches!(code, Some(ACCESS_DENIED | SHARING_VIOLATION | LOCK_VIOLATION));
    (is_passing && failures < ATTEMPTS).then(|| FIRST_PAUSE * 2_u32.pow(failures.saturating_sub(1)))
}

/// Like [`pause`] on Windows; elsewhere the codes mean something else, and nothing is retried.
fn pause_here(code: Option<i32>, failures: u32) -> Option<Duration> {
    if cfg!(windows) { pause(code, failures) } else { None }
}

/// Repeats `call` until it succeeds, or `pause` says that it should not be retried.
fn persist<T>(
    pause: impl Fn(Option<i32>, u32) -> Option<Duration>,
    mut call: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    let mut failures = 0;
    loop {
        let error = match call() {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        failures += 1;
        let Some(pause) = pause(error.raw_os_error(), failures) else { return Err(error) };
        // If something else wakes this thread, the pause is only shorter.
        thread::park_timeout(pause);
    }
}

/// Looks at an open file.
pub(super) fn look_at(file: &File) -> io::Result<Entry> {
    Ok(describe(&file.metadata()?))
}

fn describe(meta: &Metadata) -> Entry {
    let kind = if meta.is_file() {
        Kind::File
    } else if meta.is_symlink() {
        Kind::Symlink
    } else {
        Kind::Other("directory")
    };
    // There is no number to compare two looks by, so all files count as the same: a random name and a lock have to be
    // enough.
    Entry { kind, mode: 0, uid: 0, gid: 0, id: (0, 0), links: 1, size: meta.len() }
}

/// These systems have no owner to set.
pub(crate) fn set_owner(_file: &File, _entry: &Entry) -> io::Result<()> {
    Ok(())
}

/// These systems have no permission bits to set.
pub(crate) fn set_mode(_file: &File, _mode: u32) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A directory of its own, without the help of a crate that only the integration tests have.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new() -> Self {
            let path = std::env::temp_dir().join(format!("afs-portable-{:016x}", fastrand::u64(..)));
            fs::create_dir(&path).expect("a new name in the temporary directory");
            Self(path)
        }

        fn open(&self) -> Dir {
            Dir::open(&self.0).expect("it has just been made")
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _left = fs::remove_dir_all(&self.0);
        }
    }

    fn write(dir: &Dir, name: &str, content: &str) {
        let mut file = dir.create(name.as_ref(), 0o600).expect("the name is free");
        file.write_all(content.as_bytes()).expect("the disk has room");
        set_mode(&file, 0o600).expect("it does nothing");
        set_owner(&file, &look_at(&file).expect("the file is open")).expect("it does nothing");
        dir.copy_xattrs(name.as_ref(), &file).expect("it does nothing");
        assert_eq!(dir.guests(name.as_ref()).expect("it does nothing"), Guests::Unsupported);
    }

    fn read(dir: &Dir, name: &str) -> String {
        io::read_to_string(dir.read(name.as_ref()).expect("the file exists")).expect("it is text")
    }

    #[test]
    fn a_file_is_created_once_and_replaced_by_a_rename() {
        let scratch = Scratch::new();
        let dir = scratch.open();
        write(&dir, "new", "new content");
        assert_eq!(dir.create("new".as_ref(), 0).expect_err("it exists").kind(), io::ErrorKind::AlreadyExists);
        fs::write(scratch.0.join("target"), "old").expect("the disk has room");
        dir.rename("new".as_ref(), "target".as_ref()).expect("a rename replaces");
        dir.sync().expect("it does nothing");
        assert_eq!(read(&dir, "target"), "new content");
        assert_eq!(dir.look("new".as_ref()).expect("a look succeeds"), None);
        let entry = dir.look("target".as_ref()).expect("a look succeeds").expect("it exists");
        assert_eq!((entry.kind, entry.size), (Kind::File, 11));
        dir.remove("target".as_ref()).expect("it exists");
        assert_eq!(dir.look("target".as_ref()).expect("a look succeeds"), None);
    }

    #[test]
    fn a_name_that_must_be_new_is_not_replaced() {
        let scratch = Scratch::new();
        let dir = scratch.open();
        write(&dir, "new", "new");
        write(&dir, "taken", "old");
        let refused = dir.rename_new("new".as_ref(), "taken".as_ref()).expect_err("the name is taken");
        assert_eq!((refused.kind(), read(&dir, "taken").as_str()), (io::ErrorKind::AlreadyExists, "old"));
        let moved = dir.rename_new("new".as_ref(), "free".as_ref()).expect("the name is free");
        assert_eq!(
            (moved, read(&dir, "free").as_str()),
            (Moved::Linked, "new"),
            "the old name is the caller's to remove"
        );
    }

    #[test]
    fn what_is_no_directory_is_not_opened_as_one() {
        let scratch = Scratch::new();
        let dir = scratch.open();
        write(&dir, "file", "");
        assert_eq!(Dir::open(&scratch.0.join("file")).expect_err("a file").kind(), io::ErrorKind::NotADirectory);
        assert_eq!(Dir::open(&scratch.0.join("none")).expect_err("nothing").kind(), io::ErrorKind::NotFound);
        fs::create_dir(scratch.0.join("sub")).expect("the name is free");
        let sub = dir.open_dir("sub".as_ref()).expect("it is one");
        write(&sub, "inner", "deep");
        assert_eq!(fs::read_to_string(scratch.0.join("sub/inner")).expect("it is where it belongs"), "deep");
        let entry = dir.look("sub".as_ref()).expect("a look succeeds").expect("it exists");
        assert_eq!(entry.kind, Kind::Other("directory"));
    }

    #[test]
    fn what_passes_is_waited_for_with_a_bound_and_nothing_else_is() {
        for code in [5, 32, 33] {
            let pauses: Vec<_> = (1..).map_while(|failures| pause(Some(code), failures)).collect();
            assert_eq!((pauses.len(), pauses[0]), (9, Duration::from_millis(1)), "ten attempts have nine pauses");
            let all: Duration = pauses.iter().sum();
            assert!(all > Duration::from_millis(200) && all <= Duration::from_secs(1), "{all:?}");
        }
        for code in [None, Some(0), Some(2), Some(3), Some(13), Some(80), Some(183)] {
            assert_eq!(pause(code, 1), None, "{code:?}");
        }
        assert_eq!(pause_here(Some(32), 1).is_some(), cfg!(windows));
    }

    #[test]
    fn a_call_is_made_again_until_it_succeeds_or_is_in_vain() {
        let attempt = |succeeds_at: u32, code| {
            let mut calls = 0;
            let short = |code, failures| pause(code, failures).map(|_| Duration::ZERO);
            let result = persist(short, || {
                calls += 1;
                if calls < succeeds_at { Err(io::Error::from_raw_os_error(code)) } else { Ok(calls) }
            });
            (result.map_err(|error| error.raw_os_error()), calls)
        };
        assert_eq!(attempt(1, 32), (Ok(1), 1));
        assert_eq!(attempt(4, 32), (Ok(4), 4));
        assert_eq!(attempt(10, 5), (Ok(10), 10));
        assert_eq!(attempt(11, 33), (Err(Some(33)), 10));
        assert_eq!(attempt(2, 2), (Err(Some(2)), 1));
    }

    #[cfg(unix)]
    #[test]
    fn a_symlink_is_seen_as_one_and_read() {
        let scratch = Scratch::new();
        std::os::unix::fs::symlink("somewhere", scratch.0.join("link")).expect("the name is free");
        let dir = scratch.open();
        let entry = dir.look("link".as_ref()).expect("a look succeeds").expect("it exists");
        assert_eq!((entry.kind, dir.read_link("link".as_ref()).expect("a link")), (Kind::Symlink, "somewhere".into()));
    }
}
