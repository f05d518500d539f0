//! Why a run ended without all its results.
//!
//! Invariant: every message says what is on disk and what to do next.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{codec::Codec, item::BoxError, log::Damage};

/// Why a run ended without all its results. Whatever it was, the results recorded before it are kept.
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
        /// Where the damage begins. All before it is intact.
        offset: u64,
        /// What is wrong there.
        detail: &'static str,
    },

    /// The input is not the one the checkpoint was written for.
    #[error(
        "input mismatch at item {index} of checkpoint {}: {detail}; all recorded results are kept: run with the input of before, \
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
        /// What differs: `version`, `result type`, `job`, `codec` or `identity`.
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

    /// Two items have the same key, so that one result could not be told from the other.
    #[error(
        "items {first} and {index} have the same key; results before are safe: remove one or make the keys distinct"
    )]
    DuplicateKey {
        /// The item that had the key first.
        first: usize,
        /// The item that has it too.
        index: usize,
    },

    /// An item failed for good and the quarantine has no room for it.
    #[error(
        "item {index} failed {attempts} times and the quarantine is full ({limit}): {cause}; results before are safe: \
         mend the cause or allow more with `.quarantine(…)`, then run it again"
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

    /// All results were asked for, and some items have none. Everything else is recorded.
    #[error(
        "{items} items are in quarantine, the first is item {index}: {cause}; all other results are safe: mend the cause and \
         run it again with `.retry_quarantined(true)`, or take what there is with `.stream(…)`"
    )]
    Quarantined {
        /// How many items are in quarantine.
        items: usize,
        /// The first of them.
        index: usize,
        /// Why it is there.
        cause: String,
    },

    /// A value could not be written or read back. Of a result that could not be written nothing is recorded.
    #[error("item {index} cannot be {action} as {codec:?}; results before are safe: mend its serde implementation")]
    Codec {
        /// The item.
        index: usize,
        /// `written` or `read back`.
        action: &'static str,
        /// The codec in use.
        codec: Codec,
        /// What serde said.
        #[source]
        cause: BoxError,
    },

    /// The options contradict each other, or ask for what the runtime does not have. Nothing was opened, unless an item
    /// was to wait, and there is no time driver.
    #[error("invalid options: {0}")]
    Config(&'static str),

    /// The file system failed. What had been synced is safe; the checkpoint is not written to any more.
    #[error("{0}; results synced before are safe: mend the cause and run it again")]
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

    /// Returns whether the file system failed: full, read-only, broken.
    #[must_use]
    pub fn is_io(&self) -> bool {
        matches!(self, Self::Io(_))
    }

    pub(crate) fn damaged(path: &Path, damage: Damage) -> Self {
        let path = path.to_owned();
        match damage {
            Damage::Bad { offset, detail } => Self::Corrupt { path, offset, detail },
            Damage::NewerFormat { needs } => Self::NewerFormat { path, needs },
        }
    }

    /// An error of the file system, with what was being done and to which file.
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

fn advice(path: &Path, offset: u64) -> String {
    if offset == 0 {
        return "it was not changed: restore it from a backup, or move it away to start over".to_owned();
    }
    format!(
        "it was not changed, and all before that byte is intact: restore it from a backup, or keep a copy and run \
         `truncate -s {offset} '{}'` to go on with the results before it",
        path.display()
    )
}
