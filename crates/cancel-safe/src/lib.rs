//! Async Rust that survives being dropped: seven crates behind one name, each a feature.
//!
//! A future can be dropped at any `.await`: a timeout fires, a `select!` branch loses, a client hangs up, the process is
//! told to stop. Most code is wrong at some of those points:
//!
//! ```no_run
//! # use std::time::Duration;
//! # use tokio::{fs::File, io::AsyncWriteExt, time::timeout};
//! async fn save(path: &str, data: &[u8]) -> std::io::Result<()> {
//!     let mut file = File::create(path).await?; // dropped here: the old content is gone
//!     file.write_all(data).await?; // dropped here: half of the new content is there
//!     file.sync_all().await // dropped here: and nobody ever knows which it was
//! }
//!
//! # async fn caller() {
//! let _ = timeout(Duration::from_millis(5), save("ledger.json", b"...")).await;
//! # }
//! ```
//!
//! This version is right at every point, and the test proves it by dropping it at every point:
//!
#![cfg_attr(all(feature = "atomic-fs", feature = "testing"), doc = "```")]
#![cfg_attr(not(all(feature = "atomic-fs", feature = "testing")), doc = "```ignore")]
//! use cancel_safe::{atomic_fs, testing::Explore};
//!
//! let report = Explore::new().run(
//!     async || {
//!         let dir = tempfile::tempdir().unwrap();
//!         std::fs::write(dir.path().join("ledger.json"), "old").unwrap();
//!         dir
//!     },
//!     async |dir| atomic_fs::write(dir.path().join("ledger.json"), "new").await.unwrap(),
//!     async |dir, _outcome| {
//!         let files = std::fs::read_dir(dir.path()).unwrap().count();
//!         let ledger = std::fs::read_to_string(dir.path().join("ledger.json")).unwrap();
//!         match ledger.as_str() {
//!             "old" | "new" if files == 1 => Ok(()),
//!             other => Err(format!("{other:?} in one of {files} files")),
//!         }
//!     },
//! );
//! report.assert_clean();
//! assert!(report.points() > 0);
//! ```
//!
//! # What is where
//!
//! | module and feature | crate | what it keeps safe |
//! |---|---|---|
//! | `guard` | `cancel-safe-guard` | cleanup that must run, sections that must not be cut, work that must finish |
//! | `atomic_fs`, feature `atomic-fs` | `cancel-safe-atomic-fs` | files: old or new, never torn, never late |
//! | `tx_guard`, feature `tx-guard` | `cancel-safe-tx-guard` | sqlx transactions: ended when dropped, with a known outcome |
//! | `http_timeout`, feature `http-timeout` | `cancel-safe-http-timeout` | HTTP calls: one deadline, bounded load, a breaker that cannot stick |
//! | `shutdown` | `cancel-safe-shutdown` | the end of a program: in order, by the deadline, with a report |
//! | `resumable` | `cancel-safe-resumable` | long computations: stop anywhere, resume from there |
//! | `testing` | `cancel-safe-testing` | the proof: it drops a future at every await point |
//!
//! This crate has no items of its own. Each of the seven has its own version and never exposes a type of another, so
//! you can take a single one instead: `atomic-fs = { package = "cancel-safe-atomic-fs", version = "0.1" }`.
//!
//! # Features
//!
//! No feature is on by default; `full` enables all seven, with the default features of each crate. A feature only adds.
//! The umbrella passes the other features on to the chosen crates:
//!
//! | feature | adds | to |
//! |---|---|---|
//! | `postgres` | PostgreSQL | `tx-guard`; for `resumable`, the store that a fleet shares |
//! | `mysql` | MySQL and MariaDB | `tx-guard` |
//! | `sqlite` | SQLite; on with `tx-guard` | `tx-guard` |
//! | `tower` | layers | `http-timeout`, `shutdown` |
//! | `axum` | a server whose connections end with their phase | `shutdown` |
//! | `systemd` | notifications for the service manager | `shutdown` |
//! | `test-util` | an application inside a test | `shutdown` |
//! | `multipart` | forms | `http-timeout` |
//! | `postcard` | a smaller encoding for fixed shapes | `resumable` |
//! | `indicatif` | a progress bar | `resumable` |
//! | `tracing` | events | all but `testing` |
//!
//! A program that wants PostgreSQL without SQLite takes `cancel-safe-tx-guard` without its default features. You choose
//! the async runtime and TLS: add `sqlx` with `runtime-tokio` and `reqwest` with a TLS feature to your own dependencies.
//!
//! # Limitations
//!
//! The crates need tokio. They promise nothing for a future that is leaked (`mem::forget`) instead of dropped, for a
//! process that is killed in the middle of another library's system call, or for effects outside what a crate guards.
//! Each front page says where its guarantees end.
//!
//! # Comparison
//!
//! `tokio-util` has the cancellation token and the task tracker that these crates build on, and leaves it to you what
//! they protect. Each crate's front page compares it with the crates that offer the same thing alone. If a plain
//! `tokio` or `std` call does what you need, prefer it.
//!
//! # Minimum supported Rust version
//!
//! 1.89, or 1.94 with `tx-guard` and therefore with `full`, because sqlx 0.9 requires it.

#[cfg(feature = "atomic-fs")]
pub use cancel_safe_atomic_fs as atomic_fs;
#[cfg(feature = "guard")]
pub use cancel_safe_guard as guard;
#[cfg(feature = "http-timeout")]
pub use cancel_safe_http_timeout as http_timeout;
#[cfg(feature = "resumable")]
pub use cancel_safe_resumable as resumable;
#[cfg(feature = "shutdown")]
pub use cancel_safe_shutdown as shutdown;
#[cfg(feature = "testing")]
pub use cancel_safe_testing as testing;
#[cfg(feature = "tx-guard")]
pub use cancel_safe_tx_guard as tx_guard;
