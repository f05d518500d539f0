//! Atomic files for async Rust: a file is old or new, and a dropped write never lands later.

mod commit;
mod error;
mod file;
mod options;
mod platform;
mod recovery;
mod staged;
mod whole;

pub mod blocking;

pub use error::{Error, TargetState};
pub use file::{AtomicFileWriter, CommitHandle};
pub use options::{Durability, Preserve, Symlinks, WriteOptions};
pub use recovery::{SweepReport, sweep};
pub use whole::write;
#[cfg(feature = "json")]
pub use whole::{write_json, write_json_with_timeout};
