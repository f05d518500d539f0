//! The integration tests of `cancel-safe-guard`, one binary.
