//! What the programs of this package share.
//!
//! They need more than the crates do: their dependencies are in no build of a crate by itself, nor in the demo's.

pub mod ticks;
