//! The integration tests of `cancel-safe-resumable`, one binary.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod cancel;
mod checkpoint;
#[cfg(feature = "cli")]
mod cli;
mod compact;
mod crash;
mod faults;
#[cfg(all(feature = "postgres", unix))]
mod fleet;
#[cfg(feature = "cli")]
mod follow;
mod golden;
mod happy;
mod input;
mod items;
mod parallel;
mod pause;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "postgres")]
mod postgres_cancel;
#[cfg(feature = "postgres")]
mod postgres_doubt;
#[cfg(feature = "postgres")]
mod postgres_tx;
mod progress;
mod spin;
mod support;
mod tutorial;
mod values;
