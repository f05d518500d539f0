//! The integration tests of `cancel-safe-atomic-fs`, one binary.
