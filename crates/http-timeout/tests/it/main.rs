//! The integration tests of `cancel-safe-http-timeout`, one binary.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod blame;
mod breaker;
mod cancel;
mod cuts;
mod drops;
mod errors;
mod faults;
mod happy;
mod hedge;
mod http2;
mod interleavings;
mod judged;
#[cfg(feature = "tower")]
mod layer;
mod limits;
mod redirects;
mod relied;
mod retries;
mod server;
