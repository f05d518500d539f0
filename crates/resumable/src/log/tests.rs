//! Tests of the block log.
