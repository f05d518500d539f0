//! Atomic files and multi-file transactions for async Rust: a file is old or new, and a dropped write never lands later.
