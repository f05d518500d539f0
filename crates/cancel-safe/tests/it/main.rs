//! The integration tests of `cancel-safe`, one binary.
