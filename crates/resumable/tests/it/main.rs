//! The integration tests of `cancel-safe-resumable`, one binary.
