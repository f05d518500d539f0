//! Several files as one: all of them change, or none.
//!
//! Invariant: until the commit every file is staged beside its target and owned by this object, so that dropping it at
//! any moment leaves the targets as they were and no file behind.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::chain::Site;
use crate::commit::{Gate, Job, current_runtime};
use crate::error::io_error;
use crate::lock::{LOCK_PATIENCE, with_locks};
use crate::names::{absolute, directory, split};
use crate::platform::Dir;
use crate::protocol::{Prepared, Sealed, Step, Unsynced, sync_files};
use crate::staged::{Staged, Target};
use crate::staging::{Staging, Workspace};
use crate::{AtomicFileWriter, CommitHandle, Error, WriteOptions};

/// How many staged files are synced and closed together, while the next are staged. At most twice as many are open.
const BATCH_FILES: usize = 64;

/// Changes several files, all or none. If it is dropped without a commit, it changes nothing.
///
/// A transaction stages new content in hidden files beside the targets at once; it only notes removals and renames.
/// [`commit`](Self::commit) then writes a journal and exchanges the files. However that ends, after a crash and a
/// [`recover`](crate::recover) all files are old or all are new. If `commit` returned `Ok`, all are new.
///
/// Each name can be changed once, but a name that a [`rename`](Self::rename) has freed can be filled again. So
/// `rename("log.1", "log.2")`, `rename("log", "log.1")`, `add_file("log", "")` rotate a log, and renaming two files to
/// each other swaps them. All targets must be on one file system. New files are written as the [options](Self::options)
/// say; these start as the defaults of [`WriteOptions`]. A removal or a rename acts on a symlink itself.
///
/// A commit puts new files in place before it removes old ones, so either an old file or its successor is always there.
///
/// A reader sees each file whole and never missing. Unless it uses [`open_together`](crate::open_together) or holds a
/// [`read_lock`](crate::read_lock), it may see some files old and others new: during the exchange, which takes
/// microseconds, or after a crash until the recovery.
///
/// A relative path is resolved against the working directory at the time when it is given.
///
/// Transactions that share a directory (of a target or of the journal) wait for each other; see
/// [`commit`](Self::commit).
///
/// # Examples
///
/// ```
/// use cancel_safe_atomic_fs::{self as atomic_fs, MultiFileTransaction};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> std::io::Result<()> {
/// # let dir = tempfile::tempdir()?;
/// # let dir = dir.path();
/// # std::fs::write(dir.join("draft.pem"), "c")?;
/// // When the program starts.
/// atomic_fs::recover(dir).await?;
///
/// let mut tx = MultiFileTransaction::new();
/// tx.add_file(dir.join("key.pem"), "k").await?;
/// tx.rename(dir.join("draft.pem"), dir.join("cert.pem"))?;
/// assert!(!dir.join("key.pem").exists());
/// tx.commit().await?;
/// assert_eq!(std::fs::read(dir.join("key.pem"))?, b"k");
/// assert_eq!(std::fs::read(dir.join("cert.pem"))?, b"c");
/// # Ok(())
/// # }
/// ```
#[must_use = "a transaction that is dropped without a commit changes nothing"]
pub struct MultiFileTransaction {
    journal_dir: Option<PathBuf>,
    options: WriteOptions,
    patience: Duration,
    changes: Vec<Change>,
    /// The index in `changes` whose writer is lent, so that its file is not complete yet.
    lent: Option<usize>,
    /// How many files of `changes` are open.
    open: usize,
    /// The job that syncs and closes the files before those.
    syncing: Option<Job<()>>,
    /// Whether a sync has failed. The system drops what it could not sync, and a second sync would not report it, so
    /// this is never reset.
    is_broken: bool,
    workspace: Option<Arc<Workspace>>,
}

/// A change that the caller requested, in the order of the calls.
enum Change {
    Put(Box<Sealed>),
    Writing(Lent),
    Remove(Arc<Path>),
    Rename { from: Arc<Path>, to: Arc<Path> },
}

/// A file whose writer is lent, until the next call on the transaction.
struct Lent {
    path: Arc<Path>,
    name: OsString,
    site: Arc<Site>,
    writer: Option<Box<AtomicFileWriter>>,
    /// The job that takes the last piece in, and closes the writer.
    sealing: Option<Job<Box<Sealed>>>,
}

impl MultiFileTransaction {
    /// Creates an empty transaction. Its journal will be in the directory of the first path that it is given.
    pub fn new() -> Self {
        Self {
            journal_dir: None,
            options: WriteOptions::default(),
            patience: LOCK_PATIENCE,
            changes: Vec::new(),
            lent: None,
            open: 0,
            syncing: None,
            is_broken: false,
            workspace: None,
        }
    }

    /// Creates an empty transaction. Its journal will be in the directory `journal_dir`; recover it there.
    ///
    /// It touches nothing until there is something to change.
    pub fn begin(journal_dir: impl AsRef<Path>) -> Self {
        Self { journal_dir: Some(absolute(directory(journal_dir.as_ref()))), ..Self::new() }
    }

    /// Sets how files that are added from now on are written: mode, owner, attributes, symlinks, and whether they must
    /// be new. The default is that of [`WriteOptions`].
    ///
    /// A transaction never [writes in place](crate::InPlace), whatever the options say: a mount point is [an
    /// error](Error::is_not_replaceable).
    ///
    /// A file's content has the [durability](WriteOptions::durability) that was set when the file was added. The names,
    /// and with them "all or none", have the durability that is set at the commit. There
    /// [`Ordered`](crate::Durability::Ordered) works like [`Full`](crate::Durability::Full). With
    /// [`None`](crate::Durability::None) all files are old or all are new while the machine runs, whatever happens to
    /// the process, but not after a power cut.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_atomic_fs::{AtomicFileWriter, MultiFileTransaction, Preserve};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> std::io::Result<()> {
    /// # let dir = tempfile::tempdir()?;
    /// # let dir = dir.path();
    /// // Files of a service, changed by root: they stay the service's.
    /// let kept = AtomicFileWriter::options().preserve(Preserve::ALL);
    /// let mut tx = MultiFileTransaction::new().options(kept);
    /// tx.add_file(dir.join("users"), "ann").await?;
    /// tx.add_file(dir.join("groups"), "staff").await?;
    /// tx.commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn options(mut self, options: WriteOptions) -> Self {
        self.options = options;
        self
    }

    /// Sets how long the commit waits for directories that others have locked. The default is 30 s.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Stages `content` to become the file `path`.
    ///
    /// It copies the content. For large content, write in pieces to a [`writer`](Self::writer); for many files at once,
    /// use [`add_files`](Self::add_files). The [options](Self::options) say what the new file keeps of the one that it
    /// replaces.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, the file is not part of the transaction, which remains
    /// usable.
    ///
    /// # Errors
    ///
    /// Same as [`WriteOptions::open`] and [`AtomicFileWriter::write_all`]; or the target is already [part of the
    /// transaction](Error::is_repeated_target), or on [another file system](Error::is_other_file_system). The
    /// transaction is as it was, and remains usable, unless it is [`Broken`](Error::Broken) because an earlier staged
    /// file could not be written or synced.
    pub async fn add_file(&mut self, path: impl AsRef<Path>, content: impl AsRef<[u8]>) -> Result<(), Error> {
        self.add_files([(path, content)]).await
    }

    /// Stages several files, each a path and its content, in one hop to the blocking pool.
    ///
    /// It copies all contents before it stages the first, so add large ones in several calls.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, none of the files is part of the transaction, which
    /// remains usable.
    ///
    /// # Errors
    ///
    /// Same as [`add_file`](Self::add_file), for the first file that could not be staged. Then none of them is part of
    /// the transaction.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_atomic_fs::MultiFileTransaction;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> std::io::Result<()> {
    /// # let dir = tempfile::tempdir()?;
    /// # let dir = dir.path();
    /// let mut tx = MultiFileTransaction::new();
    /// tx.add_files((0..100).map(|number| (dir.join(number.to_string()), "content"))).await?;
    /// tx.commit().await?;
    /// assert_eq!(std::fs::read_dir(dir)?.count(), 100);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn add_files<P: AsRef<Path>, C: AsRef<[u8]>>(
        &mut self,
        files: impl IntoIterator<Item = (P, C)>,
    ) -> Result<(), Error> {
        let given = files.into_iter().map(|(path, content)| {
            Ok::<_, Error>((Arc::<Path>::from(from_here(path.as_ref())?), content.as_ref().to_vec()))
        });
        let given = given.collect::<Result<Vec<_>, _>>()?;
        let Some((first, _)) = given.first() else { return Ok(()) };
        let first = first.clone();
        self.close_lent().await?;
        self.close_some(&first).await?;
        let (workspace, options) = (self.workspace(&first).await?, self.options);
        let staged = job(&first, move |gate| stage_all(&workspace, given, options, gate)).await?;
        let mut among = HashSet::new();
        for sealed in &staged {
            self.refuse_repetition(&sealed.site, &sealed.name, &sealed.path)?;
            if !among.insert((sealed.site.id, &sealed.name)) {
                return Err(Error::RepeatedTarget { path: sealed.path.to_path_buf() });
            }
        }
        self.open += staged.iter().filter(|sealed| sealed.file.is_some()).count();
        self.changes.extend(staged.into_iter().map(|sealed| Change::Put(Box::new(sealed))));
        Ok(())
    }

    /// Stages a file to become the file `path`, and lends a writer for its content.
    ///
    /// The next call on the transaction, or its commit, takes what was written so far as the content and closes the
    /// file; so you can write any number of files. Only the transaction can commit. If a write to the writer has
    /// failed, the commit fails.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, the file is not part of the transaction, which remains
    /// usable.
    ///
    /// # Errors
    ///
    /// Same as [`add_file`](Self::add_file).
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_atomic_fs::MultiFileTransaction;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> std::io::Result<()> {
    /// # let dir = tempfile::tempdir()?;
    /// # let dir = dir.path();
    /// let mut tx = MultiFileTransaction::new();
    /// let writer = tx.writer(dir.join("data")).await?;
    /// writer.write_all(b"in ").await?;
    /// writer.write_all(b"pieces").await?;
    /// tx.add_file(dir.join("index"), "9").await?;
    /// tx.commit().await?;
    /// assert_eq!(std::fs::read(dir.join("data"))?, b"in pieces");
    /// # Ok(())
    /// # }
    /// ```
    pub async fn writer(&mut self, path: impl AsRef<Path>) -> Result<&mut AtomicFileWriter, Error> {
        let path = Arc::<Path>::from(from_here(path.as_ref())?);
        let runtime = current_runtime(&path)?;
        self.close_lent().await?;
        self.close_some(&path).await?;
        let (workspace, target, options) = (self.workspace(&path).await?, path.clone(), self.options);
        let (staged, site) = job(&path, move |_| stage(&workspace, &target, options, None)).await?;
        let name = staged.target_name().to_owned();
        self.refuse_repetition(&site, &name, &path)?;
        let writer = Some(Box::new(AtomicFileWriter::over(staged, path.clone(), runtime)));
        self.lent = Some(self.changes.len());
        self.changes.push(Change::Writing(Lent { path, name, site, writer, sealing: None }));
        match self.changes.last_mut() {
            Some(Change::Writing(Lent { writer: Some(writer), .. })) => Ok(writer),
            _ => unreachable!("it has just been pushed"),
        }
    }

    /// Adds the removal of the file `path`; the commit finds out whether it is possible.
    ///
    /// # Errors
    ///
    /// The path [names no file](Error::InvalidPath), or is already
    /// [part of the transaction](Error::is_repeated_target).
    pub fn remove_file(&mut self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = self.note(path.as_ref())?;
        self.refuse_named(&path)?;
        self.changes.push(Change::Remove(path));
        Ok(())
    }

    /// Adds the renaming of the file `from` to `to`, replacing what is there.
    ///
    /// Like all names here, these name the files as they are before the transaction: `rename(a, b)` and `rename(b, a)`
    /// swap two files. If the new place is free, the file moves in one step; if it replaces another file, it briefly
    /// has only a hidden name.
    ///
    /// # Errors
    ///
    /// A path [names no file](Error::InvalidPath), or is already
    /// [part of the transaction](Error::is_repeated_target).
    pub fn rename(&mut self, from: impl AsRef<Path>, to: impl AsRef<Path>) -> Result<(), Error> {
        let (from, to) = (self.note(from.as_ref())?, self.note(to.as_ref())?);
        // The last rename of a circle closes it, and both its ends have been named before.
        if self.origin(&from).is_none_or(|origin| origin != to) {
            self.refuse_named(&from)?;
        }
        if from == to || self.is_taken(&to) {
            return Err(Error::RepeatedTarget { path: to.to_path_buf() });
        }
        self.changes.push(Change::Rename { from, to });
        Ok(())
    }

    /// Makes all changes, durably, or none.
    ///
    /// The commit locks the directories of the journal and of all targets against other transactions and
    /// [readers](crate::read_lock), and waits up to 30 s for these locks. (One thread of this crate tries for all
    /// callers that wait, so the blocking pool stays free.) Then it writes the journal, syncs it together with the
    /// staged files, several at once, and exchanges each file. If there is more than 16 MiB to sync, it syncs that
    /// before it locks the directories. A single file needs no journal. The blocking pool frees the space of small
    /// replaced files after the commit has returned.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, all files are old or all are new. That is decided
    /// before the drop returns, and this call never changes them later. During the exchange, the drop waits for its end
    /// (one system call for each file, and a sync of the directory where a rename replaces a file), or until all of it
    /// is undone. Before and after the exchange the drop waits for nothing. If the disk fails after such a drop,
    /// [recover](crate::recover) the files.
    ///
    /// # Errors
    ///
    /// [`Error::target`] says what became of the files:
    ///
    /// - [`Unchanged`](crate::TargetState::Unchanged): all of them, for good.
    /// - [`Visible`](crate::TargetState::Visible): only for a transaction of one file.
    /// - [`Undecided`](crate::TargetState::Undecided): the disk failed during the exchange, and again while that was
    ///   undone. Call [`recover`](crate::recover).
    ///
    /// Other reasons: a file to be removed or renamed is missing, or is [no file](Error::is_not_a_file); two paths lead
    /// to the [same target](Error::is_repeated_target); a directory stayed [locked](Error::is_busy), or holds a
    /// transaction that must be [recovered first](Error::is_unrecovered).
    pub async fn commit(self) -> Result<(), Error> {
        self.commit_by(Gate::new()).await
    }

    /// Makes all changes as [`commit`](Self::commit) does, if the first of them is made within `timeout`.
    ///
    /// Once the exchange of the files has begun the timeout no longer applies, and the call waits until it knows how
    /// that ends.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, all files are old or all are new, as after the drop of
    /// a [`commit`](Self::commit).
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`]: this call has changed no file, and never will. Otherwise as [`commit`](Self::commit).
    ///
    /// # Panics
    ///
    /// If the runtime has no timer.
    pub async fn commit_within(self, timeout: Duration) -> Result<(), Error> {
        let Some(path) = self.changes.first().map(Change::path) else { return Ok(()) };
        let late = || Error::TimedOut { path: path.to_path_buf(), timeout };
        // A timeout beyond the range of `Instant` means no timeout.
        let Some(deadline) = Instant::now().checked_add(timeout) else { return self.commit().await };
        let gate = Gate::with_deadline(Some(deadline));
        let mut commit = Box::pin(self.commit_by(gate.clone()));
        match tokio::time::timeout_at(deadline, &mut commit).await {
            // The job noticed before the timer that it was late.
            Ok(Err(Error::Interrupted { .. })) if gate.is_late() => Err(late()),
            Ok(ended) => ended,
            // The job is dropped with this, and never enters.
            Err(_) if gate.try_cancel() => Err(late()),
            Err(_) => commit.await,
        }
    }

    /// Starts a [`commit`](Self::commit) that no drop can cancel, only a shutdown of the runtime.
    ///
    /// # Cancel safety
    ///
    /// Once polled, it runs to completion even if dropped. It need not even be polled: the commit is in progress when
    /// this returns, and the handle only reports how it ended.
    ///
    /// # Errors
    ///
    /// The handle returns the errors of the commit, or says that this was called [outside a runtime](Error::NoRuntime).
    pub fn commit_detached(self) -> CommitHandle {
        let path = self.changes.first().map_or_else(|| Path::new("").into(), Change::path);
        let gate = Gate::new();
        let begun = current_runtime(&path).map(|runtime| runtime.spawn(self.commit_by(gate.clone())));
        CommitHandle::new(gate, path, begun)
    }

    async fn commit_by(mut self, gate: Arc<Gate>) -> Result<(), Error> {
        let Some(first) = self.changes.first().map(Change::path) else { return Ok(()) };
        self.close_lent().await?;
        let workspace = self.workspace(&first).await?;
        self.finish_syncing(&first).await?;
        // From here on the job owns everything, including the removal if the commit fails.
        let (changes, patience) = (std::mem::take(&mut self.changes), self.patience);
        let durability = self.options.durability;
        let prepare = move |gate: &Gate| {
            let steps = changes.into_iter().map(Change::into_step).collect::<Result<Vec<_>, _>>()?;
            Prepared::new(workspace, steps, durability, patience, gate)
        };
        with_locks(&current_runtime(&first)?, &gate, &first, prepare, Prepared::commit).await
    }

    /// Discards all changes and waits until the staged files are gone.
    ///
    /// # Cancel safety
    ///
    /// Once polled, it runs to completion even if dropped. The targets stay as they were; the staged files are removed
    /// in any case.
    ///
    /// # Errors
    ///
    /// Returns the error of a removal; [`recover`](crate::recover) removes the file later.
    pub async fn rollback(mut self) -> Result<(), Error> {
        let Some(first) = self.changes.first().map(Change::path) else { return Ok(()) };
        // A write that has failed has already removed its file.
        let _failed_before = self.close_lent().await;
        let work = move |_: &Gate| {
            let removed = std::mem::take(&mut self.changes).into_iter().map(Change::discard);
            // Removes all of them, and then returns the first failure.
            removed.fold(Ok(()), Result::and)
        };
        job(&first, work).await
    }

    /// The directories and the note of this transaction, created for its first path.
    async fn workspace(&mut self, path: &Arc<Path>) -> Result<Arc<Workspace>, Error> {
        if let Some(workspace) = &self.workspace {
            return Ok(workspace.clone());
        }
        let directory = match &self.journal_dir {
            Some(directory) => directory.clone(),
            None => split(path, path)?.0.to_path_buf(),
        };
        let workspace = job(path, move |_| Workspace::begin(&directory).map(Arc::new)).await?;
        Ok(self.workspace.insert(workspace).clone())
    }

    /// Starts to sync and close the open files if there are many; that goes on while others are staged.
    async fn close_some(&mut self, path: &Arc<Path>) -> Result<(), Error> {
        if self.open < BATCH_FILES {
            return self.refuse_broken(path);
        }
        self.finish_syncing(path).await?;
        let runtime = current_runtime(path)?;
        let files = take_open(self.changes.iter_mut().filter_map(|change| match change {
            Change::Put(sealed) => Some(&mut **sealed),
            _ => None,
        }));
        self.syncing = Some(Job::spawn(&runtime, &Gate::new(), path, move |gate| sync_files(files, gate)));
        self.open = 0;
        Ok(())
    }

    /// Waits for the files that are being synced.
    async fn finish_syncing(&mut self, path: &Arc<Path>) -> Result<(), Error> {
        if let Some(job) = &mut self.syncing {
            let synced = job.await;
            self.syncing = None;
            self.is_broken |= synced.is_err();
            synced?;
        }
        self.refuse_broken(path)
    }

    fn refuse_broken(&self, path: &Path) -> Result<(), Error> {
        if self.is_broken { Err(Error::Broken { path: path.to_path_buf() }) } else { Ok(()) }
    }

    /// Checks a path that is only noted, and makes its directory the journal's if it is the first path.
    fn note(&mut self, path: &Path) -> Result<Arc<Path>, Error> {
        let path = from_here(path)?;
        let (directory, _) = split(&path, &path)?;
        self.journal_dir.get_or_insert_with(|| directory.to_path_buf());
        Ok(path.into())
    }

    /// The original path of the file that ends up at `path`, following the renames back.
    fn origin(&self, path: &Arc<Path>) -> Option<Arc<Path>> {
        let source = |path: &Arc<Path>| {
            self.changes.iter().find_map(|change| match change {
                Change::Rename { from, to } if to == path => Some(from.clone()),
                _ => None,
            })
        };
        let mut origin = source(path)?;
        // This ends, because a closed circle has no free name left that could be given again.
        while let Some(before) = source(&origin) {
            if before == *path {
                return None;
            }
            origin = before;
        }
        Some(origin)
    }

    /// Whether `path` already gets a new file or is removed, so that nothing else can come there.
    fn is_taken(&self, path: &Arc<Path>) -> bool {
        self.changes.iter().any(|change| match change {
            Change::Rename { to, .. } => to == path,
            other => other.path() == *path,
        })
    }

    /// Refuses a path that is already named. The commit finds out whether another path names the same file.
    fn refuse_named(&self, path: &Arc<Path>) -> Result<(), Error> {
        let is_named = |change: &Change| match change {
            Change::Rename { from, to } => from == path || to == path,
            other => other.path() == *path,
        };
        if self.changes.iter().any(is_named) {
            return Err(Error::RepeatedTarget { path: path.to_path_buf() });
        }
        Ok(())
    }

    /// Refuses a staged file for a target that has one, or is noted.
    fn refuse_repetition(&self, site: &Site, name: &OsString, path: &Path) -> Result<(), Error> {
        let is_same = |change: &Change| match change {
            Change::Put(sealed) => sealed.site.id == site.id && sealed.name == *name,
            Change::Writing(lent) => lent.site.id == site.id && lent.name == *name,
            Change::Remove(removed) => **removed == *path,
            Change::Rename { to, .. } => **to == *path,
        };
        if self.changes.iter().any(is_same) {
            return Err(Error::RepeatedTarget { path: path.to_path_buf() });
        }
        Ok(())
    }

    /// Lets the writer that was lent last take in its last piece, and closes it.
    async fn close_lent(&mut self) -> Result<(), Error> {
        let Some(position) = self.lent else { return Ok(()) };
        let Change::Writing(lent) = &mut self.changes[position] else { return Ok(()) };
        // If this fails, the writer stays lent, and every later call fails.
        self.changes[position] = Change::Put(lent.seal().await?);
        self.lent = None;
        self.open += 1;
        Ok(())
    }
}

impl Lent {
    /// If this is dropped, the job that it has begun goes on, and the next call waits for it.
    async fn seal(&mut self) -> Result<Box<Sealed>, Error> {
        if let Some(writer) = &mut self.writer {
            writer.settle().await?;
        }
        if let Some(writer) = self.writer.take() {
            let (path, site, runtime) = (self.path.clone(), self.site.clone(), writer.runtime().clone());
            self.sealing = Some(Job::spawn(&runtime, &Gate::new(), &self.path, move |gate| {
                let (mut staged, base, tail) = writer.into_staged()?;
                staged.write_at(base, &tail, gate)?;
                staged.look_again()?;
                Sealed::new(*staged, base + tail.len() as u64, &path, site).map(Box::new)
            }));
        }
        let Some(job) = &mut self.sealing else { return Err(Error::Broken { path: self.path.to_path_buf() }) };
        let sealed = job.await;
        // The job is finished.
        self.sealing = None;
        sealed
    }
}

impl Default for MultiFileTransaction {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MultiFileTransaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths: Vec<_> = self.changes.iter().map(Change::path).collect();
        f.debug_struct("MultiFileTransaction").field("journal_dir", &self.journal_dir).field("paths", &paths).finish()
    }
}

impl Change {
    fn path(&self) -> Arc<Path> {
        match self {
            Self::Put(sealed) => sealed.path.clone(),
            Self::Writing(Lent { path, .. }) | Self::Remove(path) | Self::Rename { from: path, .. } => path.clone(),
        }
    }

    fn into_step(self) -> Result<Step, Error> {
        Ok(match self {
            Self::Put(sealed) => Step::Put(sealed),
            Self::Writing(lent) => return Err(Error::Broken { path: lent.path.to_path_buf() }),
            Self::Remove(path) => Step::Remove(path),
            Self::Rename { from, to } => Step::Rename { from, to },
        })
    }

    fn discard(self) -> Result<(), Error> {
        match self {
            Self::Put(sealed) => sealed.staging.end().map_err(io_error("remove the staged file of", &sealed.path)),
            // A writer whose write has failed has already removed its file.
            Self::Writing(_) | Self::Remove(_) | Self::Rename { .. } => Ok(()),
        }
    }
}

/// The path of a file as seen from the present working directory: all paths of a transaction keep the meaning that they
/// had when they were given, although a removal looks for its file only at the commit.
fn from_here(path: &Path) -> Result<PathBuf, Error> {
    // First as given, because the next step drops a dot at the end, which only a directory can have.
    split(path, path)?;
    Ok(absolute(path))
}

/// One hop to the blocking pool, cancelled if it is dropped.
async fn job<T: Send + 'static>(
    path: &Arc<Path>,
    work: impl FnOnce(&Gate) -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    Job::spawn(&current_runtime(path)?, &Gate::new(), path, work).await
}

/// Creates the staged file beside the resolved `path`, whose directory may be `known`.
fn stage(
    workspace: &Arc<Workspace>,
    path: &Path,
    options: WriteOptions,
    known: Option<&Arc<Site>>,
) -> Result<(Staged, Arc<Site>), Error> {
    let mut target = match known {
        Some(site) => Target::resolve_in(site.dir.clone(), path, options)?,
        None => Target::resolve(path, options)?,
    };
    let site = match known {
        // No symlink has led elsewhere.
        Some(site) if Arc::ptr_eq(&site.dir, &target.dir) => site.clone(),
        _ => workspace.adopt(target.dir, &target.parent, path)?,
    };
    // All files of a directory share one handle, so that a thousand files do not need a thousand handles.
    target.dir = site.dir.clone();
    let create = |dir: &Arc<Dir>, mode| Staging::create_for(workspace, dir, mode);
    Ok((Staged::create_at(path, target, options, create)?, site))
}

/// Stages whole files, and syncs and closes all but the last of them.
fn stage_all(
    workspace: &Arc<Workspace>,
    files: Vec<(Arc<Path>, Vec<u8>)>,
    options: WriteOptions,
    gate: &Gate,
) -> Result<Vec<Sealed>, Error> {
    let mut all: Vec<Sealed> = Vec::new();
    // The directory of the last file, with the path that led there, so that a thousand files need not resolve it each
    // time.
    let mut known: Option<(PathBuf, Arc<Site>)> = None;
    for (path, content) in files {
        if all.len().is_multiple_of(BATCH_FILES) {
            sync_files(take_open(all.iter_mut()), gate)?;
        }
        let directory = split(&path, &path)?.0;
        let same = known.take().filter(|(parent, _)| parent == directory);
        let (mut staged, site) = stage(workspace, &path, options, same.as_ref().map(|(_, site)| site))?;
        known = same.or_else(|| staged.is_direct().then(|| (directory.to_path_buf(), site.clone())));
        staged.write_at(0, &content, gate)?;
        all.push(Sealed::new(staged, content.len() as u64, &path, site)?);
    }
    Ok(all)
}

/// Takes the open files out of `sealed`, to be synced and closed.
fn take_open<'a>(sealed: impl Iterator<Item = &'a mut Sealed>) -> Vec<Unsynced> {
    sealed.filter_map(Sealed::take_unsynced).collect()
}
