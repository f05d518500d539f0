//! The integration tests of `cancel-safe-shutdown`, one binary.
