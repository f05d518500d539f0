//! The integration tests of `cancel-safe-http-timeout`, one binary.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod blame;
mod breaker;
mod cancel;
mod cuts;
mod faults;
mod happy;
mod hedge;
mod http2;
#[cfg(feature = "tower")]
mod layer;
mod limits;
mod retries;
mod server;
