//! The integration tests of `cancel-safe-testing`, one binary.

mod twins;
