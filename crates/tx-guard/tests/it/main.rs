//! The integration tests of `cancel-safe-tx-guard`, one binary.
