//! The tests of the programs, one binary.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod bank;
mod grpc;
mod page;
mod wire;
