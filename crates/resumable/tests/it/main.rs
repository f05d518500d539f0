//! The integration tests of `cancel-safe-resumable`, one binary.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod happy;
