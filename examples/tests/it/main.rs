//! The tests of the programs, one binary.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod bank;
mod crawler;
mod grpc;
mod page;
mod scope;
mod wire;
