//! A checkpoint for readers: read without its lock, even while a run writes to it.
//!
//! Invariant: it shows a prefix of what was recorded, and the same prefix on every call.

use std::{
    fmt,
    fs::File,
    io,
    marker::PhantomData,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use serde::de::DeserializeOwned;

use crate::{
    codec::Codec,
    error::TaskError,
    history::{self, History, Past},
    item::{Done, Quarantined},
    log::Identity,
    scan::read_header,
};

/// How often to read a live file again if something is wrong with it: a run may just have cut off a torn tail.
const READ_TRIES: u32 = 3;

/// What a checkpoint file holds, with results of type `R`.
///
/// Reading takes no lock and changes nothing, so it works while a run writes, on a read-only mount, and for a user with
/// read permission only. It shows what had been written when it was read: a consistent prefix. [`read`](Self::read) it
/// again for more.
///
/// Results stay in the file until you ask for them. A run that compacts or replaces its file does not disturb a reader.
/// On Windows, nobody else can read a file that a run holds.
///
/// # Examples
///
/// ```
/// use cancel_safe_resumable::{Checkpoint, map};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("squares.ckpt");
/// map(&path, 0..100u64, |n| async move { n * n }).await?;
///
/// let checkpoint = Checkpoint::<u64>::read(&path)?;
/// assert!(checkpoint.is_sealed());
/// assert_eq!((checkpoint.counts().results, checkpoint.sessions()), (100, 1));
/// for done in checkpoint.records() {
///     let done = done?;
///     assert_eq!(done.result, Ok((done.index * done.index) as u64));
/// }
/// # Ok(())
/// # }
/// ```
pub struct Checkpoint<R = ()> {
    path: PathBuf,
    history: Mutex<History>,
    result: PhantomData<fn() -> R>,
}

/// How many items a checkpoint knows, by their state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Items with a result.
    pub results: usize,
    /// Items in quarantine, without the uncertain ones.
    pub quarantined: usize,
    /// Items that were started [at most once](crate::Builder::at_most_once) and have no result: they are running now,
    /// or it is unknown how they ended.
    pub uncertain: usize,
    /// Items that failed and will be tried again.
    pub failed: usize,
    /// How many items of the input were read; only without keys. In a sealed checkpoint this is the whole input.
    pub read: Option<usize>,
}

impl<R> Checkpoint<R> {
    /// Reads the whole checkpoint at `path`, and blocks the thread meanwhile.
    ///
    /// # Errors
    ///
    /// [`TaskError::Corrupt`] if it is damaged, [`TaskError::NewerFormat`] if it needs a newer reader, and
    /// [`TaskError::Io`] if it does not exist or cannot be read. Version and type of the results are not compared.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, TaskError> {
        let path = path.as_ref();
        let mut tries = 1;
        let history = loop {
            match read_once(path) {
                Err(error) if tries == READ_TRIES || !(error.is_corrupt() || is_cut_short(&error)) => {
                    return Err(error);
                }
                Err(_) => tries += 1,
                Ok(history) => break history,
            }
        };
        Ok(Self { path: path.to_owned(), history: Mutex::new(history), result: PhantomData })
    }

    /// Returns the name of the computation.
    #[must_use]
    pub fn job(&self) -> String {
        self.of(|history| history.header.job.clone())
    }

    /// Returns the version that the file was created with.
    #[must_use]
    pub fn version(&self) -> String {
        self.of(|history| history.header.version.clone())
    }

    /// Returns the name of the result type that the file was created with.
    #[must_use]
    pub fn result_type(&self) -> String {
        self.of(|history| history.header.result_type.clone())
    }

    /// Returns how results are encoded; `None` if this program is built without that codec.
    #[must_use]
    pub fn codec(&self) -> Option<Codec> {
        self.of(|history| Codec::of_number(history.header.codec))
    }

    /// Returns whether items are identified by a key, and not by their position.
    #[must_use]
    pub fn is_keyed(&self) -> bool {
        self.of(|history| history.header.identity == Identity::Key)
    }

    /// Returns whether the computation is complete, with nothing added since.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.of(|history| history.sealed.is_some())
    }

    /// Returns how many runs have written to it.
    #[must_use]
    pub fn sessions(&self) -> u64 {
        self.of(|history| history.epoch)
    }

    /// Returns how many items are in each state.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.of(|history| {
            let history::Counts { results, quarantined, uncertain, failed } = history.counts();
            let read = (history.header.identity == Identity::Position).then(|| history.marked());
            Counts { results, quarantined, uncertain, failed, read }
        })
    }

    /// Returns the length of the intact part, in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.of(|history| history.end)
    }

    /// Returns about how many bytes it would have after compaction.
    #[must_use]
    pub fn live_bytes(&self) -> u64 {
        self.of(|history| history.live_bytes())
    }

    /// Returns how many bytes follow the last intact block: a run is writing them, or died while it wrote them.
    #[must_use]
    pub fn torn_bytes(&self) -> u64 {
        self.of(|history| history.torn_bytes)
    }

    /// Returns the finished items with their results still encoded, as [`codec`](Self::codec) says: for tools that do not
    /// know the type. They come in the order of the input; with keys they come in the order of the file, and their index only counts them.
    /// An item that is running now under at-most-once is among them, as uncertain.
    pub fn raw(&self) -> impl Iterator<Item = Result<Done<Vec<u8>>, TaskError>> + use<'_, R> {
        let keys = self.of(|history| history.keys());
        let count = keys.as_ref().map_or_else(|| self.of(|history| history.marked()), Vec::len);
        (0..count).filter_map(move |at| {
            let key = keys.as_ref().and_then(|keys| keys.get(at)).cloned();
            self.finished(at, key).transpose()
        })
    }

    /// Returns the finished items, as [`raw`](Self::raw) does, with their results.
    ///
    /// If a result is not an `R`, or this program lacks its codec, the item is a [`TaskError::Codec`].
    pub fn records(&self) -> impl Iterator<Item = Result<Done<R>, TaskError>> + use<'_, R>
    where
        R: DeserializeOwned,
    {
        let codec = self.codec();
        self.raw().map(move |done| {
            let Done { index, key, restored, attempts, result, .. } = done?;
            let result = match result {
                Ok(bytes) => Ok(self.decode(codec, index, &bytes)?),
                Err(quarantined) => Err(quarantined),
            };
            Ok(Done { index, key, restored, attempts, result })
        })
    }

    fn decode(&self, codec: Option<Codec>, index: usize, bytes: &[u8]) -> Result<R, TaskError>
    where
        R: DeserializeOwned,
    {
        let Some(codec) = codec else {
            let name = Codec::name_of(self.of(|history| history.header.codec));
            let error = format!("its codec is {name}, which this program is built without");
            return Err(TaskError::io("decode", &self.path, io::Error::new(io::ErrorKind::Unsupported, error)));
        };
        let read = codec.decode(bytes).map_err(|cause| TaskError::unread::<R>(codec, index, bytes, cause));
        read.map_err(|error| self.of(|history| history.unread(error)))
    }

    /// The item at this position, or with this key, if it is finished.
    fn finished(&self, index: usize, key: Option<Arc<str>>) -> Result<Option<Done<Vec<u8>>>, TaskError> {
        self.of(|history| {
            let past = history.of(index, key.as_deref());
            let past = past.map_err(|error| TaskError::io("read checkpoint", &self.path, error))?;
            let (attempts, result) = match past {
                Past::Nothing | Past::Failed { .. } => return Ok(None),
                Past::Result(payload) => (0, Ok(payload.to_vec())),
                Past::Quarantined { attempts, cause } => {
                    (attempts, Err(Quarantined { attempts, cause, uncertain: false }))
                }
                Past::Uncertain => (1, Err(Quarantined::uncertain())),
            };
            Ok(Some(Done { index, key, restored: true, attempts, result }))
        })
    }

    /// Reading moves a window over the file; there is nothing that a panic could leave half done.
    fn of<T>(&self, look: impl FnOnce(&mut History) -> T) -> T {
        look(&mut self.history.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn read_once(path: &Path) -> Result<History, TaskError> {
    let file = File::open(path).map_err(|error| TaskError::io("open checkpoint", path, error))?;
    let unreadable = |unread| TaskError::unreadable(path, unread);
    let (header, from) = read_header(&file).map_err(unreadable)?;
    History::read(Arc::new(file), from, header).map_err(unreadable)
}

/// Whether the file became shorter while it was read.
pub(crate) fn is_cut_short(error: &TaskError) -> bool {
    matches!(error, TaskError::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof)
}

impl<R> fmt::Debug for Checkpoint<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = self.counts();
        f.debug_struct("Checkpoint").field("path", &self.path).field("counts", &counts).finish_non_exhaustive()
    }
}
