//! Why a run ended without all its results.
//!
//! Invariant: every message says what is on disk and what to do next.

use std::{
    any::type_name,
    io,
    path::{Path, PathBuf},
};

use serde::de::DeserializeOwned;

use crate::{codec::Codec, item::BoxError, log::Damage, scan::Unread};

/// Why a run ended without all its results. In every case, the results recorded before are kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TaskError {
    /// The token fired. Everything completed so far is durable.
    #[error("cancelled; every result completed before is safe in the checkpoint: run it again to go on")]
    Cancelled,

    /// Another run holds the checkpoint, in this process or in another.
    #[error(
        "checkpoint {} is held by another run; it was not touched: let that run end or stop it, then start again",
        path.display()
    )]
    Busy {
        /// The checkpoint.
        path: PathBuf,
    },

    /// The checkpoint is damaged. It was not changed.
    #[error("checkpoint {} is damaged at byte {offset}: {detail}; {}", path.display(), advice(path, *offset))]
    Corrupt {
        /// The checkpoint.
        path: PathBuf,
        /// Where the damage begins. Everything before it is intact.
        offset: u64,
        /// What is wrong there.
        detail: &'static str,
    },

    /// The input is not the one the checkpoint was written for.
    #[error(
        "input mismatch at item {index} of checkpoint {}: {detail}; all recorded results are kept: run it with the earlier input, \
         or with `.key(…)` in a new checkpoint if items may come and go, or move the file away to start over",
        path.display()
    )]
    InputMismatch {
        /// The checkpoint.
        path: PathBuf,
        /// The first item that differs, counted from 0.
        index: usize,
        /// How it differs.
        detail: &'static str,
    },

    /// The checkpoint was written by another version of the computation, or by another computation.
    #[error(
        "checkpoint {} was written with {field} `{stored}`, this run has `{given}`; nothing was changed: accept the old \
         results with `.accept_version(…)` if they are still right, give a new version its own file, or move this one away",
        path.display()
    )]
    VersionMismatch {
        /// The checkpoint.
        path: PathBuf,
        /// What differs: `version`, `job`, `codec` or `identity`.
        field: &'static str,
        /// What the file says.
        stored: String,
        /// What this run says.
        given: String,
    },

    /// A newer version of this crate wrote the checkpoint.
    #[error("checkpoint {} needs a reader of format {needs} or newer; it was not touched: use the newer program", path.display())]
    NewerFormat {
        /// The checkpoint.
        path: PathBuf,
        /// The oldest format whose readers understand it.
        needs: u16,
    },

    /// Other workers have taken over ranges of this one: it was frozen or cut off from the database for longer than its
    /// lease. Nothing is recorded twice.
    #[error(
        "other workers took over {ranges} range{} of {} while this one was frozen or cut off past its lease; what it had \
         recorded is safe, and nothing is recorded twice: start it again to go on",
        plural(*ranges as usize), path.display()
    )]
    Fenced {
        /// The job.
        path: PathBuf,
        /// How many ranges this run has lost.
        ranges: u32,
    },

    /// Not all items of the job are finished yet. The results that exist were handed out before this error.
    #[error("{} is not complete: {done} of {total} items are finished; read it again when its workers are done", path.display())]
    Incomplete {
        /// The job.
        path: PathBuf,
        /// How many items were finished when they were read.
        done: usize,
        /// All items.
        total: usize,
    },

    /// The database failed, or was unreachable or silent for longer than the store's `outage`. What had been recorded
    /// is safe.
    #[error("cannot {action} in the database; results recorded before are safe: fix the cause and run it again")]
    Database {
        /// What the run tried to do.
        action: &'static str,
        /// What the driver said.
        #[source]
        source: BoxError,
    },

    /// Two items have the same key, so their results could not be told apart.
    #[error(
        "items {first} and {index} have the same key; results before are safe: remove one or make the keys distinct"
    )]
    DuplicateKey {
        /// The item that had the key first.
        first: usize,
        /// The later item with the same key.
        index: usize,
    },

    /// An item failed for good and the quarantine has no room for it.
    #[error(
        "item {index} failed after {attempts} attempt{} and the quarantine is full ({limit}): {cause}; results before are safe: \
         fix the cause or allow more with `.quarantine(…)`, then run it again",
        plural(*attempts as usize)
    )]
    QuarantineFull {
        /// The most items that may be in quarantine.
        limit: usize,
        /// The item that failed.
        index: usize,
        /// How often it was tried.
        attempts: u32,
        /// Why it failed the last time.
        cause: String,
    },

    /// The caller asked for all results, and some items have none. Everything else is recorded.
    #[error(
        "{items} item{} in quarantine, the first is item {index}: {cause}; all other results are safe: fix the cause and \
         run it again with `.retry_quarantined(true)`, or take what there is with `.stream(…)`",
        if *items == 1 { " is" } else { "s are" }
    )]
    Quarantined {
        /// How many items are in quarantine.
        items: usize,
        /// The first of them.
        index: usize,
        /// Why it is there.
        cause: String,
    },

    /// An item or a result cannot be written, or cannot be read back. A new result is not recorded, and an existing one
    /// is not changed.
    #[error(
        "item {index}: a `{type_name}` cannot be {action} as {codec:?}{}; results before are safe: {}",
        at(path), codec_advice(recorded_as.as_deref(), version.as_deref())
    )]
    Codec {
        /// The item.
        index: usize,
        /// `written` or `read back`.
        action: &'static str,
        /// The codec in use.
        codec: Codec,
        /// The type that this run writes or reads.
        type_name: &'static str,
        /// The field, such as `.hosts[3].address`; empty if it is the value itself or cannot be told.
        path: String,
        /// The result type that the checkpoint was created with, if the result comes from it.
        recorded_as: Option<Box<str>>,
        /// The version that the checkpoint was created with, if the result comes from it.
        version: Option<Box<str>>,
        /// What serde said.
        #[source]
        cause: BoxError,
    },

    /// A result, or an item that its function gets as a copy, would come back from the checkpoint as another value.
    /// Nothing of it is recorded.
    #[error(
        "item {index}: a `{type_name}` does not come back from {codec:?} as it was{}: {detail}; nothing of it was recorded, \
         results before are safe: fix its serde implementation, or use another type",
        at(path)
    )]
    RoundTrip {
        /// The item.
        index: usize,
        /// The type of the item, or of its result.
        type_name: &'static str,
        /// The codec in use.
        codec: Codec,
        /// The first field that differs, such as `.hosts[3].address`; empty if it is the value itself.
        path: String,
        /// How it differs. No data is shown.
        detail: String,
    },

    /// The options contradict each other, or need something that the runtime lacks. Nothing was opened, except if an
    /// item had to wait and the runtime has no time driver.
    #[error("invalid options: {0}")]
    Config(&'static str),

    /// The file system failed. What had been synced is safe; nothing more is written to the checkpoint.
    #[error("{0}; results synced before are safe: fix the cause and run it again")]
    Io(#[from] io::Error),
}

impl TaskError {
    /// Returns whether the token ended the run: run it again to go on.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Cancelled)
    }

    /// Returns whether another run holds the checkpoint: try again later.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Busy { .. })
    }

    /// Returns whether the checkpoint is damaged: a person must look at it.
    #[must_use]
    pub fn is_corrupt(&self) -> bool {
        matches!(self, Self::Corrupt { .. })
    }

    /// Returns whether the input, the version or the program is not the one the checkpoint belongs to.
    #[must_use]
    pub fn is_mismatch(&self) -> bool {
        matches!(self, Self::InputMismatch { .. } | Self::VersionMismatch { .. } | Self::NewerFormat { .. })
    }

    /// Returns whether an item failed for good and the quarantine had no room for it.
    #[must_use]
    pub fn is_quarantine_full(&self) -> bool {
        matches!(self, Self::QuarantineFull { .. })
    }

    /// Returns whether other workers have taken over ranges of this run: start the run again.
    #[must_use]
    pub fn is_fenced(&self) -> bool {
        matches!(self, Self::Fenced { .. })
    }

    /// Returns whether the database failed or was unreachable for too long: start the run again when the database is
    /// back.
    #[must_use]
    pub fn is_database(&self) -> bool {
        matches!(self, Self::Database { .. })
    }

    /// Returns whether a value does not survive serde: fix its type, or the type it is read as.
    #[must_use]
    pub fn is_codec(&self) -> bool {
        matches!(self, Self::Codec { .. } | Self::RoundTrip { .. })
    }

    /// Returns whether the file system failed: full, read-only, broken.
    #[must_use]
    pub fn is_io(&self) -> bool {
        matches!(self, Self::Io(_))
    }

    pub(crate) fn unreadable(path: &Path, unread: Unread) -> Self {
        match unread {
            Unread::Io(error) => Self::io("read checkpoint", path, error),
            Unread::Damage(Damage::Bad { offset, detail }) => Self::Corrupt { path: path.to_owned(), offset, detail },
            Unread::Damage(Damage::NewerFormat { needs }) => Self::NewerFormat { path: path.to_owned(), needs },
        }
    }

    /// A value of type `T` cannot be written.
    #[cold]
    pub(crate) fn unwritten<T: ?Sized>(codec: Codec, index: usize, cause: BoxError) -> Self {
        Self::codec::<T>(codec, index, "written", String::new(), cause)
    }

    /// A value of type `T` cannot be read back from `bytes`.
    #[cold]
    pub(crate) fn unread<T: DeserializeOwned>(codec: Codec, index: usize, bytes: &[u8], cause: BoxError) -> Self {
        Self::codec::<T>(codec, index, "read back", codec.path_of_failure::<T>(bytes), cause)
    }

    fn codec<T: ?Sized>(codec: Codec, index: usize, action: &'static str, path: String, cause: BoxError) -> Self {
        let type_name = type_name::<T>();
        Self::Codec { index, action, codec, type_name, path, recorded_as: None, version: None, cause }
    }

    /// Adds the type and version for which the checkpoint was created, if a result cannot be read from it.
    pub(crate) fn of_checkpoint(mut self, of_type: &str, of_version: &str) -> Self {
        if let Self::Codec { recorded_as, version, .. } = &mut self {
            *recorded_as = Some(of_type.into());
            *version = Some(of_version.into());
        }
        self
    }

    /// A file system error, with the operation and the file.
    pub(crate) fn io(action: &str, path: &Path, source: io::Error) -> Self {
        Self::Io(in_context(action, path, source))
    }
}

pub(crate) fn in_context(action: &str, path: &Path, source: io::Error) -> io::Error {
    io::Error::new(source.kind(), InContext { what: format!("cannot {action} {}", path.display()), source })
}

#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
struct InContext {
    what: String,
    source: io::Error,
}

/// The plural ending for a count.
fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// The place of an error inside a value, as part of a sentence.
fn at(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!(" at `{path}`") }
}

fn codec_advice(recorded_as: Option<&str>, version: Option<&str>) -> String {
    let (Some(recorded_as), Some(version)) = (recorded_as, version) else {
        return "fix its serde implementation, or use another type".to_owned();
    };
    format!(
        "the checkpoint was created for `{recorded_as}`, version `{version}`, and was not changed: run with a type that \
         reads its results, or give the new one another version with `.version(…)` and a file of its own, or move this \
         one away"
    )
}

fn advice(path: &Path, offset: u64) -> String {
    if path.to_string_lossy().starts_with("postgres:") {
        return "it was not changed: restore the database from a backup, or delete the job to start over".to_owned();
    }
    if offset == 0 {
        return "it was not changed: restore it from a backup, or move it away to start over".to_owned();
    }
    format!(
        "it was not changed, and all before that byte is intact: restore it from a backup, or keep a copy and run \
         `truncate -s {offset} {}` to go on with the results before it",
        quoted(path)
    )
}

/// The path as one shell word, whatever it contains.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}
