//! The integration tests of `cargo-cancel-safe`, one binary.
