//! The integration tests of `cancel-safe`, one binary: the example `mirror` as a child process, against a real server,
//! and tests that need a feature of a dependency that the crates' own tests lack.
#![cfg(all(feature = "full", feature = "sqlite", feature = "postgres"))]
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "../../examples/mirror/catalogue.rs"]
mod catalogue;
#[path = "../../examples/mirror/durable.rs"]
mod durable;
#[path = "../../examples/mirror/home.rs"]
mod home;
#[path = "../../examples/mirror/hosts.rs"]
#[expect(dead_code, reason = "the tests use a part of it")]
mod hosts;
#[path = "../../examples/mirror/judge.rs"]
mod judge;
#[path = "../../examples/mirror/list.rs"]
mod list;
#[path = "../../examples/mirror/manifest.rs"]
mod manifest;
#[path = "../../examples/mirror/moves.rs"]
mod moves;
#[path = "../../examples/mirror/parts.rs"]
mod parts;
#[path = "../../examples/mirror/paths.rs"]
mod paths;
#[path = "../../examples/mirror/report.rs"]
#[expect(dead_code, reason = "the tests use a part of it")]
mod report;
#[path = "../../examples/mirror/settle.rs"]
mod settle;
#[path = "../../examples/mirror/store.rs"]
mod store;

mod demo;
mod http2;
mod mirror;
mod origin;
mod places;
