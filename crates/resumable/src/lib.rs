//! Long computations that can stop anywhere and resume from there.
//!
//! # The problem
//!
//! A million items, ten milliseconds each: three hours in which a deploy, a Ctrl-C or a power cut will come. So results
//! are saved now and then:
//!
//! ```no_run
//! # async fn expensive(item: u64) -> u64 { item }
//! # async fn compute(items: Vec<u64>) -> std::io::Result<Vec<u64>> {
//! let mut results: Vec<u64> = match std::fs::read("job.json") {
//!     // Torn by a crash? Start over, silently.
//!     Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_default(),
//!     // Unreadable? Start over, silently.
//!     Err(_) => Vec::new(),
//! };
//! for (index, item) in items.into_iter().enumerate().skip(results.len()) {
//!     // Another input? Wrong results, silently.
//!     results.push(expensive(item).await);
//!     if index % 100 == 0 {
//!         // NaN becomes null: never readable again.
//!         let all = serde_json::to_vec(&results)?;
//!         // Truncates first; two processes mix; no fsync; the cost grows with the square.
//!         tokio::fs::write("job.json", all).await?;
//!     }
//! }
//! # Ok(results)
//! # }
//! ```
//!
//! # The same, safe
//!
//! ```
//! # use cancel_safe_resumable as resumable;
//! # async fn expensive(item: u64) -> u64 { item * 2 }
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("job.ckpt");
//! let results: Vec<u64> = resumable::map(&path, 0..1000, expensive).await?;
//! # assert_eq!(results[999], 1998);
//! # Ok(())
//! # }
//! ```
//!
//! Drop it, kill it, cut the power: the same call resumes where it was. [`ResumableTask`] adds a token that cancels it
//! and a view of its progress; its [`builder`](ResumableTask::builder) adds concurrency, retries, a quarantine, keys
//! and results as a stream:
//!
//! ```
//! use cancel_safe_resumable::{FileStore, ItemError, ResumableTask, Retry};
//! use futures_util::StreamExt;
//! # use std::time::Duration;
//! # #[derive(Debug, thiserror::Error)]
//! # #[error("no answer")]
//! # struct Timeout;
//! # async fn fetch(url: &str, _key: &str) -> Result<usize, Timeout> { if url.is_empty() { Err(Timeout) } else { Ok(url.len()) } }
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("crawl.ckpt");
//! # let urls: Vec<String> = ["https://a.example", "", "https://b.example"].map(String::from).into();
//! let mut run = ResumableTask::builder("crawl")
//!     .version("v2")
//!     .store(FileStore::at(&path))
//!     .key(|url: &String| url.clone())
//!     .concurrency(64)
//!     .retry(Retry::attempts(3).backoff(Duration::from_millis(1), Duration::from_secs(1)))
//!     .quarantine(100)
//!     .stream(urls, |cx, url| async move {
//!         let length = fetch(&url, &cx.idempotency_key()).await?; // any error is retried
//!         if length == 0 {
//!             return Err(ItemError::permanent("an empty page"));
//!         }
//!         Ok(length)
//!     });
//! while let Some(done) = run.next().await {
//!     match done.result {
//!         Ok(length) => println!("{:?}: {length}", done.key),
//!         Err(quarantined) => println!("{:?}: {quarantined}", done.key),
//!     }
//! }
//! let summary = run.finish().await?;
//! assert_eq!((summary.completed, summary.quarantined), (2, 1));
//! # Ok(())
//! # }
//! ```
//!
//! # Guarantees
//!
//! | event | what is left behind |
//! |---|---|
//! | the token fires | everything completed so far is durable when the call returns; items in flight finish within [`grace`](Builder::grace), else they are dropped |
//! | the future or the run is dropped | a thread writes and syncs everything completed so far in a moment; a successor waits for that (up to [a second](FileStore::wait)) |
//! | the process is killed | everything written, which is all but the last [interval](Builder::checkpoint_every) (100 ms) at most; what was in flight runs again |
//! | the power is cut | everything synced, which is all but the last interval and the time of one fsync |
//! | a crash while the file is created | no checkpoint, or a whole one |
//! | a second run of the same checkpoint | it gets [`TaskError::Busy`], and changes nothing; if the checkpoint is complete, its results |
//! | the file is removed, renamed, replaced, truncated or appended to under a run | [`TaskError::Io`] at the next sync or within a second, and for every later item and the end |
//! | a torn tail | it is cut off and reported ([`Summary::torn_bytes`]) |
//! | another version, job or codec | [`TaskError::VersionMismatch`]; the file is not changed |
//! | a result that would not come back as it was | [`TaskError::RoundTrip`] or [`TaskError::Codec`] when the first one is recorded; see [Values](#values) |
//! | a result cannot be read as its type any more | [`TaskError::Codec`], which names the item, the field, both types and the version; the file is not changed |
//! | damage anywhere else, a block that is lost, doubled or in another place | [`TaskError::Corrupt`], which says where and what to do; the file is not changed |
//! | another input | [`TaskError::InputMismatch`] at the item that differs; what is recorded stays, and the items before it may have been added |
//! | a complete checkpoint on a read-only mount | its results |
//! | the disk is full, or a quota | the run pauses, up to [10 minutes](FileStore::wait_for_room), and says so in its [progress](Progress::paused); then [`TaskError::Io`] |
//! | any other write fails, or an fsync | [`TaskError::Io`]; the file is not written to any more |
//! | an item's function panics | [`process`](ResumableTask::process): the panic reaches the caller; in a stream: a failed attempt |
//!
//! Each result is recorded once, and each run hands it out exactly once, restored results included. Only a *missing*
//! file means a first run. An item may take effect twice if its process dies before its result is durable: send its
//! [idempotency key](ItemContext::idempotency_key) along, or run [at most once](Builder::at_most_once).
//!
//! The checkpoint is a log of blocks, each with a checksum. A thread owns and locks it. The loop that drives the items
//! waits for that thread only if 4 MiB are waiting to be written.
//!
//! # Values
//!
//! A recorded result can be read back as the same value, or recording it fails. This is proven for the first 16 results
//! of each session, and then for samples. The proof encodes and decodes the value, and shows both values to serde. If
//! serde sees a difference, the run ends with an error that names the type and the first field, before anything is
//! recorded. The samples take about 1 % of the run's time at most (each result is proven if an item costs a hundred
//! times its proof, which is about a microsecond for a small result), and never fewer than one result in 1,024. Items
//! that [`process`](ResumableTask::process) and [`map`] hand to their function as copies are proven in the same way.
//!
//! | shape | MessagePack | postcard |
//! |---|---|---|
//! | numbers (NaN, -0.0, `u128`), text, bytes, tuples, enums, structs, maps and sets of them | yes | yes |
//! | `untagged`, `flatten`, `tag`, `skip_serializing_if`, `serde_json::Value` | yes | refused |
//! | a `u128` or `i128` in one of these | refused | refused |
//! | `Some(None)`, `Some(())` | refused | yes |
//! | a value that fits several `untagged` variants | refused, if the first that fits is not its own | refused |
//! | a field that only one side has (`rename(serialize = …)` alone) | refused | yes |
//!
//! The proof cannot see what serde does not see: a field with `#[serde(skip)]`, or a `with` that rounds. The order of a
//! map's entries and of a sequence's members does not count, because to serde a set is a sequence. All NaNs are equal.
//!
//! # Limitations
//!
//! - A file serves one machine (for more, use `PgStore`): the lock is advisory (`flock`), and the file must be on a
//!   local file system. If the file is removed, a second run can begin beside the first, until the first notices
//!   (within a second).
//! - A run notices another file at its path, and a changed length of its own file. Only the next reader notices bytes
//!   that were changed in place.
//! - The future itself drives the items and does not spawn them, unless they are [`parallel`](Builder::parallel): they
//!   make progress, and their results are recorded, only while it is polled.
//! - Resuming reads results from the file as they are handed out, in pieces of up to 256 KiB, on the thread that polls
//!   the run. In memory it holds one byte for each item, 16 more where results are large or unordered, and all keys of
//!   a run by key.
//! - Without keys an item is identified by its position and its serialised form, which must be the same each time (with
//!   a `HashMap` in the item it is not); items may only be added at the end.
//! - Without keys, from the 1,025th item on, an edit is noticed at the edited item in 255 of 256 cases, and otherwise
//!   within the next few items, at the latest where the write that recorded it ended. Until then, the result handed out
//!   or recorded at its position may belong to the other item.
//! - If a power cut tears one unsynced write so that its end is on disk and its beginning is not, that looks like
//!   damage: the file is refused, and the error gives the command that continues from what was synced.
//! - A checkpoint is for one computation, not a queue. Its file grows until it is more than twice as large as its
//!   current records. Then it is rewritten when it is opened or complete. That takes room for both files, and a hard
//!   link keeps pointing to the old one.
//!
//! # Comparison
//!
//! **A loop and a JSON file**: see above. **A job queue on a database** (apalis, River, Graphile): many machines, with
//! at least one row per item, so tens of thousands of items a second at best. This crate is for a known input of many
//! items that may cost a microsecond each, in one process or, with `PgStore`, in a fleet that claims them in ranges.
//! **Durable execution** (Temporal, DBOS): workflows of many different steps; here there is one function and many
//! items. **GNU parallel `--resume`**: skips by sequence number, even if the command or the input has changed. If you
//! would not mind losing the time of a whole run, prefer a plain loop.
//!
//! # Features
//!
//! - `postgres`: `PgStore`, a job that processes on many machines share, and `Builder::process_tx`, which makes an
//!   item's effect and its result one transaction. It needs Rust 1.94, and sqlx with a runtime and TLS of your choice.
//! - `cli`: the command `resumable`: `inspect`, `verify`, `export`, `follow` (a live bar for a file that another
//!   process writes) and `compact` (rewrites the file with only its current records; in a program, use
//!   [`FileStore::compact`]).
//! - `indicatif`: a progress bar on the terminal in one line, `let _bar = bar(run.subscribe());`.
//! - `postcard`: [`Codec::Postcard`](Codec), the smallest encoding for results of a fixed shape.
//! - `tracing`: an event when a torn tail is cut off.
//!
//! # Minimum supported Rust version
//!
//! 1.89, for the file locks of the standard library; 1.94 with `postgres`, because sqlx requires it. It is raised only
//! in a minor release.

mod announce;
#[cfg(feature = "indicatif")]
mod bar;
mod builder;
mod checkpoint;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
mod codec;
mod compact;
mod difference;
mod disk;
mod drive;
mod emit;
mod error;
mod file;
mod flight;
mod gate;
mod history;
mod index;
mod intake;
mod item;
mod log;
mod plan;
#[cfg(feature = "postgres")]
mod postgres;
mod progress;
mod proof;
mod rate;
mod record;
mod run;
mod scan;
mod shape;
mod spawned;
mod stop;
mod store;
mod stores;
mod task;
mod timer;
mod varint;

#[cfg(feature = "indicatif")]
pub use crate::bar::{Bar, bar};
#[cfg(feature = "postgres")]
pub use crate::postgres::{PgResults, PgStore};
pub use crate::{
    builder::Builder,
    checkpoint::{Checkpoint, Counts},
    codec::Codec,
    drive::Summary,
    error::TaskError,
    item::{Done, ItemContext, ItemError, Quarantined, Retry, Until},
    progress::{Pause, Progress},
    run::Run,
    store::{Compacted, FileStore},
    stores::Store,
    task::{Map, ResumableTask, map},
};

// The examples of the README compile.
#[cfg(all(doctest, feature = "postgres"))]
#[doc = include_str!("../README.md")]
struct Readme;
