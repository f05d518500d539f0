//! A directory for each run.
//!
//! Invariant: it is removed with the run, and a crashing process and the checking process use the same one.

use std::cell::RefCell;
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The environment variable that tells a crashing process its directory.
pub(crate) const INHERITED: &str = "CANCEL_SAFE_CRASH_DIR";

/// How often to try the removal of a directory.
const REMOVALS: usize = 20;

/// Distinguishes this process from an earlier one with the same process id, which may have been killed and left its
/// directories.
static PROCESS: LazyLock<String> = LazyLock::new(|| {
    let pid = std::process::id();
    format!("{pid}-{:016x}", RandomState::new().hash_one(pid))
});

thread_local! {
    /// The directory of the run on this thread.
    static CURRENT: RefCell<Option<PathBuf>> = const { RefCell::new(None) };
}

/// Returns the directory of the current run, for files that the setup makes and the check reads. It is fresh for each
/// run, and removed after it. With [`Way::Crash`](crate::Way::Crash) the killed process and the checking process share
/// it.
///
/// # Panics
///
/// If the directory cannot be made, or if it is called outside a run. Call it in the setup, the operation or the check,
/// on the thread that explores.
///
/// # Examples
///
/// ```
/// let report = cancel_safe_testing::Explore::new().run(
///     async || cancel_safe_testing::scratch_dir().join("settings.json"),
///     async |path| tokio::fs::read(path).await.unwrap_or_default(),
///     async |path, _outcome| match path.exists() {
///         true => Err("made a file".to_owned()),
///         false => Ok(()),
///     },
/// );
/// report.assert_clean();
/// ```
#[must_use]
pub fn scratch_dir() -> PathBuf {
    let path = CURRENT.with_borrow(Clone::clone);
    let Some(path) = path else { panic!("scratch_dir() was called outside a run") };
    if let Err(error) = std::fs::create_dir_all(&path) {
        panic!("{} could not be made: {error}", path.display());
    }
    path
}

/// The directory of a run, while the run lasts.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("cancel-safe-{}-{number}", *PROCESS));
        CURRENT.set(Some(path.clone()));
        Self { path }
    }

    /// Uses the directory handed down by the checking process. That process also removes it, so this returns no guard.
    pub(crate) fn inherit() {
        CURRENT.set(std::env::var_os(INHERITED).map(PathBuf::from));
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Scratch {
    /// Empties it, as if the run had not begun.
    pub(crate) fn empty(&self) {
        // Most runs never create it. One of the operation's threads may write a last file into it during the removal,
        // which makes one attempt fail; what cannot be removed at all is left like other temporary files.
        for _ in 0..REMOVALS {
            if !self.path.exists() || std::fs::remove_dir_all(&self.path).is_ok() {
                break;
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        CURRENT.set(None);
        self.empty();
    }
}
