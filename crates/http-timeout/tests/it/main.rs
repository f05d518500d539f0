//! The integration tests of `cancel-safe-http-timeout`, one binary.
